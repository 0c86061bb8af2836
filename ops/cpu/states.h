/* What layers with states at the rows of requests have in common: the sequences of a step, and the causal convolution
 * in front of a recurrence (ops/causal_conv.py has the formula). */
#ifndef STATES_H
#define STATES_H

#include "pool.h"
#include "vectors.h"

/* The sequences of a step: `decodes` of one token each, then `segments` of more. */
typedef struct {
    const int64_t *positions, *rows, *starts; /* [n]; [decodes + segments]; [segments + 1], from the first behind */
    long n, decodes, segments;
} Sequences;

typedef struct {
    const float *weight, *bias; /* [size, channels], the newest token last; [channels], or null */
    float *kept;                /* [rows, size - 1, channels] */
    long channels, size;
} Convolution;

/* A sequence's first token, how many it has, and whether its row's state counts. */
INLINE long first_of(const Sequences *a, long sequence, long *count, int *goes_on)
{
    long first = sequence;
    *count = 1;
    if (sequence >= a->decodes) {
        const int64_t *start = a->starts + sequence - a->decodes;
        first = a->decodes + start[0];
        *count = start[1] - start[0];
    }
    *goes_on = *count && a->positions[first] > 0;
    return first;
}

INLINE vec vsilu(vec x) { return x / (1.0f + vexp(-x)); }

/* x: [n, width], the channels first -> mixed: [n, channels]; what the rows keep moves on. */
INTERNAL void convolve(Pool *pool, const Sequences *of, const Convolution *by, const float *x, long width,
                       float *mixed);

#endif
