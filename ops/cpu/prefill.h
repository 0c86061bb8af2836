/* What both ways of the attention of tiles of queries share: prefill.c, and matrix_prefill.c, which multiplies in
 * bfloat16. */
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
    long width, v;       /* floats of a token in qkv; of a value, and so of a head in out: d of them, or fewer */
    long to_values;      /* from a key in the cache to its value, in keys: 0 where a key begins with it */
    long group, window;  /* query heads of a KV head; as the step's, but never 0 */
    long stride;         /* floats between two widened keys or values: d, in whole ROWS */
    long tokens, tiles;  /* of a tile, at most; of a KV head */
    long chunk;          /* keys that are taken at a time */
    long block, each;    /* floats of WIDTH rows of a tile; of a thread's scratch */
    int is_matrix;       /* attend_tile_by_matrix */
} Prefill;

/* Neighbouring tokens of one sequence in the query heads of one KV head, row i is head i % group of token i / group,
 * and the keys [from, to) that they are attended to, as far as each sees them. */
typedef struct {
    const float *qkv;
    float *out;
    float *totals;         /* of each row the logarithm to base 2 of the sum of its weights, or null */
    const int64_t *blocks; /* of the sequence */
    long head, tokens, position, from, to; /* position: the first token's */
} Tile;

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

INTERNAL void attend_tile(const Prefill *p, const Tile *tile);
INTERNAL void attend_tile_by_matrix(const Prefill *p, const Tile *tile);

/* What is behind `to_values`, for so many tokens; at least one token is in a tile. */
INTERNAL void plan_tiles(Prefill *p, long total, long threads);
/* One of the two. */
INTERNAL void attend_planned_tile(const Prefill *p, const Tile *tile);
/* The segments of a step: what is in front of `group` is given, but for scratch. Returns -1 if there is no memory. */
INTERNAL int attend_segments(Pool *pool, Prefill job);

/* Rows of a tile at most, unless one token has more heads; and the floats it needs, with rows of `blocks` WIDTHs. */
#define TILE 192L
#define MATRIX_TILE 384L
#define MATRIX_CHUNK 128L /* keys */
INTERNAL long matrix_tile_block(long d);
INTERNAL long matrix_tile_floats(long d, long blocks);

#endif
