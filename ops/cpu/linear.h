#ifndef LINEAR_H
#define LINEAR_H

#include "pool.h"

/* A packed weight, and what is done before and after the product with it. */
typedef struct Linear Linear;

/* See linear.c. */
int linear(Pool *pool, const Linear *layer, const float *x, const float *residual, float *y, long m);
INTERNAL int mlp(Pool *pool, const Linear *gate_up, const Linear *down, const float *x, float *inner,
                 const float *residual, float *y, long m);

#endif
