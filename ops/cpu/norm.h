#ifndef NORM_H
#define NORM_H

#include "pool.h"

/* Root-mean-square norm of each of n rows of d (arXiv:1910.07467). y may be x. */
void rms_norm(Pool *pool, const float *x, const float *weight, float *y, long n, long d, float eps);

#endif
