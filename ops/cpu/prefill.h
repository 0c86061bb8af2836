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

INLINE vec choose(ivec condition, vec a, vec b) { return (vec)(((ivec)a & condition) | ((ivec)b & ~condition)); }

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
