#ifndef NORM_H
#define NORM_H

#include "pool.h"
#include "vectors.h"

/* What a row is multiplied with, besides the weight. */
INLINE float norm_scale(const float *x, long d, float eps)
{
    vec acc = {};
    float total = 0;
    long i = 0;
    for (; i + LANES <= d; i += LANES) {
        vec v = load_f32(x + i);
        acc += v * v;
    }
    for (; i < d; i++) total += x[i] * x[i];
    return 1.0f / sqrtf((sum(acc) + total) / d + eps);
}

/* Root-mean-square norm of each of n rows of d (arXiv:1910.07467). y may be x. */
void rms_norm(Pool *pool, const float *x, const float *weight, float *y, long n, long d, float eps);

#endif
