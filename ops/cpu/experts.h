#ifndef EXPERTS_H
#define EXPERTS_H

#include "linear.h"

/* Mixtures of experts of one layer: `count` of them, of which each token goes to `chosen`. */
typedef struct {
    const float *norm, *correction; /* [hidden], [count], or null */
    const Linear *router;
    const Linear *const *gate_up, *const *down; /* of each expert */
    const Linear *shared_gate_up, *shared_down; /* of the expert that every token goes to, or null */
    const Linear *shared_gate;                  /* to one number, whose sigmoid it is multiplied by, or null */
    float eps, smallest_sum, scale;
    long count, chosen, hidden, width, groups, chosen_groups; /* width: the largest of all experts' */
    int is_sigmoid, is_normalized;
} Experts;

/* See experts.c. */
int experts(Pool *pool, const Experts *layer, const float *x, const float *residual, float *y, long n, float *scratch);

#endif
