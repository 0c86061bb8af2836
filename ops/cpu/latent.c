/* Attention over latent keys and values (MLA, arXiv:2405.04434): all heads attend to the same keys, whose first `rank`
 * elements are the values. So a token's heads are the rows of a tile as prefill.c has them, for which each key is read
 * once; a decode is a tile of one token, of some keys, whose results are merged by the sums of their weights
 * (Flash-Decoding, Dao et al., 2023). */
#include "prefill.h"

#define CHUNKS 4L     /* of the keys of a sequence that a thread takes for a decode */

/* The step's d is of keys, whose last d - rank elements are rotated: so long are rows of cos and sin. One KV head. */
typedef struct {
    Step step;
    long rank;
} LatentStep;

typedef struct {
    const LatentStep *latent;
    const Cache *cache;
    float *qkv;
} Rotate;

static void rotate_piece(const void *job, long token)
{
    const Rotate *j = job;
    const Step *a = &j->latent->step;
    long rank = j->latent->rank, rotated = a->d - rank;
    const float *cos = a->cos + a->positions[token] * rotated, *sin = a->sin + a->positions[token] * rotated;
    float *x = j->qkv + token * (a->heads + 1) * a->d;
    for (long head = 0; head <= a->heads; head++, x += a->d) rotate_halves(x + rank, cos, sin, rotated);
    put(j->cache, 0, a->slots[token], x - a->d, a->d);
}

/* outs: [decodes, parts, heads, rank], totals: [decodes, parts, heads], of `keys` keys each. */
typedef struct {
    Prefill tiles;
    float *outs, *totals;
    long parts, keys;
} Decode;

static void decode_piece(const void *job, long piece)
{
    const Decode *j = job;
    const Prefill *p = &j->tiles;
    const Step *a = p->step;
    long row = piece / j->parts, from = piece % j->parts * j->keys;
    float *totals = j->totals + piece * a->heads;
    if (from >= a->lens[row]) {
        for (long head = 0; head < a->heads; head++) totals[head] = -INFINITY;
        return;
    }
    const Tile tile = {
        p->qkv + row * p->width,
        j->outs + piece * a->heads * p->v,
        totals,
        a->blocks + row * a->width,
        .tokens = 1,
        .position = a->lens[row] - 1,
        .from = from,
        .to = from + j->keys,
    };
    attend_planned_tile(p, &tile);
}

/* One head of a decode. */
static void merge_piece(const void *job, long query)
{
    const Decode *j = job;
    const Prefill *p = &j->tiles;
    long heads = p->step->heads, first = query / heads * j->parts * heads + query % heads;
    float *out = p->out + query * p->v, best = -INFINITY, sum = 0;
    for (long i = 0; i < j->parts; i++) {
        float total = j->totals[first + i * heads];
        best = total > best || total != total ? total : best;
    }
    memset(out, 0, p->v * sizeof(float));
    for (long i = 0; i < j->parts; i++) {
        long at = first + i * heads;
        if (j->totals[at] == -INFINITY) continue;
        float weight = exp2f(j->totals[at] - best);
        sum += weight;
        for (long e = 0; e < p->v; e++) out[e] += weight * j->outs[at * p->v + e];
    }
    for (long e = 0; e < p->v; e++) out[e] /= sum;
}

static int attend_decodes(Pool *pool, Prefill tiles)
{
    const Step *step = tiles.step;
    long longest = 0, threads = pool_threads(pool);
    for (long i = 0; i < step->decodes; i++) longest = most(step->lens[i], longest);
    plan_tiles(&tiles, 1, threads);
    Decode job = {.keys = CHUNKS * tiles.chunk};
    job.parts = (longest + job.keys - 1) / job.keys;
    long outputs = step->decodes * job.parts * step->heads;
    tiles.scratch = pool_scratch(pool, threads * tiles.each + outputs * (tiles.v + 1));
    if (!tiles.scratch) return -1;
    job.outs = tiles.scratch + threads * tiles.each;
    job.totals = job.outs + outputs * tiles.v;
    job.tiles = tiles;
    parallel(pool, decode_piece, &job, step->decodes * job.parts);
    parallel(pool, merge_piece, &job, step->decodes * step->heads);
    return 0;
}

/* Rotates queries and keys in place, puts the keys into their slots, and attends. qkv: [n, heads + 1, d] -> out:
 * [n, heads, rank]. Returns -1 if there is no memory, else 0. */
int latent_attention(Pool *pool, const LatentStep *latent, const Cache *cache, float *qkv, float *out)
{
    const Step *step = &latent->step;
    Rotate rotate = {latent, cache, qkv};
    parallel(pool, rotate_piece, &rotate, step->n);
    Prefill tiles = {step, cache, qkv, out, .width = (step->heads + 1) * step->d, .v = latent->rank};
    if (step->decodes && attend_decodes(pool, tiles)) return -1;
    return step->segments ? attend_segments(pool, tiles) : 0;
}
