/* What both ways of the attention of several new tokens a sequence share: prefill.c, and matrix_prefill.c, which
 * multiplies in bfloat16. */
#ifndef PREFILL_H
#define PREFILL_H

#include "amx.h"
#include "attention.h"
#include "panel.h"
#include "vectors.h"

#define LOG2_E 1.44269504f
#define LOWEST -1e30f /* what a maximum starts from: -inf minus this is -inf, not NaN */

typedef struct {
    const Step *step;
    const Cache *cache;
    const float *qkv;    /* from the segments' first token on, as out */
    float *out, *scratch;
    long group, window;  /* query heads of a KV head; as the step's, but never 0 */
    long stride;         /* floats between two widened keys or values: d, in whole ROWS */
    long tokens, tiles;  /* of a tile, at most; of a KV head */
    long block, each;    /* floats of WIDTH rows of a tile; of a thread's scratch */
    int is_matrix;       /* attend_tile_by_matrix */
} Prefill;

/* What the softmax of rows [first, first + WIDTH) of a tile starts from: nothing, or the sinks of their heads. Sums of
 * weights are zeros before. */
INLINE void begin_softmax(const Prefill *p, long head, long first, long rows, float *highest, float *total)
{
    const float *sinks = p->cache->sinks;
    for (long r = 0; r < WIDTH; r++) {
        int has_sink = sinks && first + r < rows;
        highest[r] = has_sink ? sinks[head * p->group + (first + r) % p->group] * LOG2_E : LOWEST;
        total[r] = has_sink;
    }
}

/* Tokens [begin, end) of the segments', all of one of them, in the query heads of one KV head: row i is head i % group
 * of token i / group. */
INTERNAL void attend_tile(const Prefill *p, long segment, long head, long begin, long end);
INTERNAL void attend_tile_by_matrix(const Prefill *p, long segment, long head, long begin, long end);

/* Rows of a tile at most, unless one token has more heads; and the floats it needs, with rows of `blocks` WIDTHs. */
#define TILE 128L
#define MATRIX_TILE 384L
INTERNAL long matrix_tile_block(long d);
INTERNAL long matrix_tile_floats(long d, long blocks);

#endif
