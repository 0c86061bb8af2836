#ifndef ATTENTION_H
#define ATTENTION_H

#include "cache.h"
#include "pool.h"

/* The segments' part of `attention`. */
INTERNAL int prefill_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out);

#endif
