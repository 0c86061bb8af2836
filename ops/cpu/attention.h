#ifndef ATTENTION_H
#define ATTENTION_H

#include "cache.h"
#include "pool.h"

/* See rows.c and attention.c. */
void rotate_and_cache(Pool *pool, const Step *step, const Cache *cache, float *qkv);
int attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out);

/* The segments' part of `attention`. */
INTERNAL int prefill_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out);

#endif
