/* What the kernels of a step's attention are told. */
#ifndef CACHE_H
#define CACHE_H

#include "tuning.h"

/* The paged cache of one layer: [blocks, 2 * kv_heads, block_size, d], keys of all heads before values, so many rows of
 * d from a head to the next and from a block to the next; and the norms of its queries and keys: [d], or null; and of
 * each query head the score of a key without a value, or null. */
typedef struct {
    void *data;
    long head_rows, block_rows, block_size;
    int is_bf16;
    const float *q_norm, *k_norm, *sinks;
} Cache;

/* The row of a token of a block. */
INLINE long cached_row(const Cache *cache, long head, long block, long token)
{ return head * cache->head_rows + block * cache->block_rows + token; }

/* The sequences of one step: `decodes` tokens of one sequence each, then `segments`, each the last tokens of one. */
typedef struct {
    const float *cos, *sin;           /* [positions, d], sin negated in its first half */
    const int64_t *positions, *slots; /* [n] */
    const int64_t *blocks, *lens;     /* [decodes, width]; [decodes], tokens to attend to, the new one included */
    const int64_t *segment_starts;    /* [segments + 1], counted from the first token that is no decode */
    const int64_t *segment_blocks, *segment_lens; /* [segments, segment_width]; [segments], as lens */
    long n, decodes, width, segments, segment_width;
    long heads, kv_heads, d, window;  /* window: only the last so many tokens, or 0 for all */
    float scale, eps;                 /* of the scores; of the norms */
    const Tuning *tuning;             /* if is_invariant, a token's output has the same bits beside any tokens */
} Step;

/* Rotates x[d] by its token's rows of cos and sin. */
INLINE void rotate_halves(float *x, const float *cos, const float *sin, long d)
{
    for (long i = 0; i < d / 2; i++) {
        float p = x[i], q = x[i + d / 2];
        x[i] = p * cos[i] + q * sin[i];
        x[i + d / 2] = q * cos[i + d / 2] + p * sin[i + d / 2];
    }
}

/* A new token's key or value into its slot. */
INLINE void put(const Cache *cache, long head, long slot, const float *x, long d)
{
    long at = cached_row(cache, head, slot / cache->block_size, slot % cache->block_size) * d;
    bf16 *to = (bf16 *)cache->data + at;
    long i = 0;
    if (!cache->is_bf16) {
        memcpy((float *)cache->data + at, x, d * sizeof(float));
        return;
    }
    for (; i + LANES <= d; i += LANES) store_bf16(to + i, load_f32(x + i));
    for (; i < d; i++) to[i] = narrow(x[i]);
}

#endif
