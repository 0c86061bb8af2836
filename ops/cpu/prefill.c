/* Attention of several new tokens a sequence, by FlashAttention-2's running softmax (Dao, 2023, arXiv:2307.08691).
 *
 * The queries of some tokens in all heads that share a KV head are the rows of a tile, which takes the keys and values
 * that it sees chunk by chunk. Rows lie along the vectors, WIDTH of them side by side in a block, so that keys and
 * values are used as they lie in the cache, widened to float32, and a softmax needs no sum across lanes. */
#include "prefill.h"

#define CHUNK 120L    /* keys, a multiple of ROWS */
#define TURNED 64L /* elements of queries that are put side by side while their lines are in the first-level cache */

/* 2^x for x <= 0, and 0 below -126: 2^n times the Taylor series of the rest. NaN stays NaN. */
INLINE vec power_of_2(vec x)
{
    vec n = (x + 12582912.0f) - 12582912.0f; /* round to an integer */
    vec r = x - n;
    vec p = r * 1.5403530e-4f + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23, under = x < -126.0f;
    return choose(under, (vec){}, p * (vec)exponent);
}

/* acc[r] += sum over i < count of a[r * row + i * step] * panel[i], for ROWS of them by a panel of [count][WIDTH]. */
INLINE void multiply(const float *a, long row, long step, const float *panel, long count, vec acc[ROWS][2])
{
    for (long i = 0; i < count; i++, a += step, panel += WIDTH) {
        vec low = load_f32(panel), high = load_f32(panel + LANES);
        for (int r = 0; r < ROWS; r++) {
            acc[r][0] += low * a[r * row];
            acc[r][1] += high * a[r * row];
        }
    }
}

/* WIDTH rows of a tile, in one piece of memory: queries times the scale, [d][WIDTH]; sums of weights * values,
 * [stride][WIDTH]; of each row the highest score and the sum of the weights. */
typedef struct {
    float *query, *sum, *highest, *total;
    ivec positions[2]; /* of the rows' tokens, where there is something to take */
} Block;

/* `count` keys and values of neighbouring tokens, the first one's position, and room for the scores. */
typedef struct {
    const float *keys, *values;
    long first, count;
    float (*scores)[WIDTH];
} Chunk;

INLINE Block block_of(const Prefill *p, float *blocks, long row)
{
    float *query = blocks + row / WIDTH * p->block, *sum = query + p->step->d * WIDTH;
    return (Block){query, sum, sum + p->stride * WIDTH, sum + (p->stride + 1) * WIDTH, {}};
}

/* The scores, -inf where a key is not seen because it is younger than the row's token or too old, and the highest. */
INLINE void score_keys(const Prefill *p, const Block *b, const Chunk *c, vec highest[2])
{
    for (long t = 0; t < c->count; t += ROWS) {
        vec acc[ROWS][2];
        for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = (vec){};
        multiply(c->keys + t * p->stride, p->stride, 1, b->query, p->step->d, acc);
        for (int r = 0; r < ROWS && t + r < c->count; r++)
            for (int half = 0; half < 2; half++) {
                ivec age = b->positions[half] - (int32_t)(c->first + t + r);
                vec score = choose((age < 0) | (age >= (int32_t)p->window), (vec){} - INFINITY, acc[r][half]);
                store(c->scores[t + r] + half * LANES, score);
                highest[half] = choose(score > highest[half], score, highest[half]);
            }
    }
}

/* Takes a chunk into the sums of a block. */
static void attend(const Prefill *p, const Block *b, const Chunk *c)
{
    vec highest[2], factor[2], total[2];
    for (int half = 0; half < 2; half++) highest[half] = load_f32(b->highest + half * LANES);
    score_keys(p, b, c, highest);
    for (int half = 0; half < 2; half++) {
        factor[half] = power_of_2(load_f32(b->highest + half * LANES) - highest[half]);
        total[half] = load_f32(b->total + half * LANES) * factor[half];
        store(b->highest + half * LANES, highest[half]);
    }
    for (long t = 0; t < c->count; t++)
        for (int half = 0; half < 2; half++) {
            vec weight = power_of_2(load_f32(c->scores[t] + half * LANES) - highest[half]);
            store(c->scores[t] + half * LANES, weight);
            total[half] += weight;
        }
    for (int half = 0; half < 2; half++) store(b->total + half * LANES, total[half]);
    for (long i = 0; i < p->v; i += ROWS) {
        vec acc[ROWS][2];
        float *sum = b->sum + i * WIDTH;
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) acc[r][half] = load_f32(sum + r * WIDTH + half * LANES) * factor[half];
        multiply(c->values + i, 1, p->stride, c->scores[0], c->count, acc);
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) store(sum + r * WIDTH + half * LANES, acc[r][half]);
    }
}

INLINE void widen_row(const Cache *cache, long row, long d, float *to)
{
    long i = 0;
    if (!cache->is_bf16) {
        memcpy(to, (const float *)cache->data + row * d, d * sizeof(float));
        return;
    }
    const bf16 *from = (const bf16 *)cache->data + row * d;
    for (; i + LANES <= d; i += LANES) store(to + i, load_bf16(from + i));
    for (; i < d; i++) to[i] = widen(from[i]);
}

/* Keys and values of the positions [from, to) of a sequence. */
static void gather(const Prefill *p, const Tile *tile, long from, long to, float *keys, float *values)
{
    const Cache *cache = p->cache;
    for (long t = from; t < to; t++, keys += p->stride, values += p->stride) {
        long block = tile->blocks[t / cache->block_size];
        long row = cached_row(cache, tile->head, block, t % cache->block_size);
        widen_row(cache, row, p->step->d, keys);
        if (p->to_values) widen_row(cache, row + p->to_values, p->step->d, values);
    }
}

void attend_tile(const Prefill *p, const Tile *tile)
{
    const Step *a = p->step;
    long d = a->d, group = p->group, rows = tile->tokens * group, position = tile->position;
    float *scores = p->scratch + pool_self() * p->each, *keys = scores + CHUNK * WIDTH;
    float *values = p->to_values ? keys + (CHUNK + ROWS) * p->stride : keys,
          *blocks = keys + (2 * CHUNK + ROWS) * p->stride;
    for (long first = 0; first < rows; first += WIDTH) {
        Block b = block_of(p, blocks, first);
        memset(b.query, 0, p->block * sizeof(float));
        begin_softmax(p, tile->head, first, rows, b.highest, b.total);
        for (long part = 0; part < d; part += TURNED)
            for (long row = first; row < least(first + WIDTH, rows); row++) {
                const float *query = tile->qkv + row / group * p->width + (tile->head * group + row % group) * d;
                for (long i = part; i < least(part + TURNED, d); i++)
                    b.query[i * WIDTH + row % WIDTH] = query[i] * a->scale * LOG2_E;
            }
    }
    long end = least(tile->to, position + tile->tokens);
    for (long from = most(tile->from, position - p->window + 1); from < end; from += CHUNK) {
        long to = least(from + CHUNK, end);
        gather(p, tile, from, to, keys, values);
        for (long row = 0; row < rows; row += WIDTH) {
            Block b = block_of(p, blocks, row);
            int32_t positions[WIDTH];
            for (long r = 0; r < WIDTH; r++) positions[r] = position + least(row + r, rows - 1) / group;
            memcpy(b.positions, positions, sizeof positions);
            long first = most(from, positions[0] - p->window + 1), skipped = (first - from) * p->stride;
            long count = least(to, positions[WIDTH - 1] + 1) - first;
            Chunk c = {keys + skipped, values + skipped, first, count, (float (*)[WIDTH])scores};
            if (count > 0) attend(p, &b, &c);
        }
    }
    for (long row = 0; row < rows; row++) {
        Block b = block_of(p, blocks, row);
        float *to = tile->out + (row / group * a->heads + tile->head * group + row % group) * p->v;
        float total = b.total[row % WIDTH], factor = 1 / total;
        for (long i = 0; i < p->v; i++) to[i] = b.sum[i * WIDTH + row % WIDTH] * factor;
        if (tile->totals) tile->totals[row] = b.highest[row % WIDTH] + log2f(total);
    }
}

void attend_planned_tile(const Prefill *p, const Tile *tile)
{
#if HAS_BF16
    if (p->is_matrix) {
        attend_tile_by_matrix(p, tile);
        return;
    }
#endif
    attend_tile(p, tile);
}

/* The number of a segment's first tile. To be known without a sum over the segments, each has room for a tile more than
 * it may need. */
INLINE long first_tile(const Prefill *p, long segment)
{ return p->step->segment_starts[segment] / p->tokens + segment; }

static void prefill_piece(const void *job, long piece)
{
    const Prefill *p = job;
    const Step *a = p->step;
    const int64_t *starts = a->segment_starts;
    long number = p->tiles - 1 - piece % p->tiles; /* the longest of a sequence first: others may take the short ones */
    long segment = 0, beyond = a->segments;
    while (beyond - segment > 1) {
        long middle = (segment + beyond) / 2;
        if (first_tile(p, middle) <= number) segment = middle;
        else beyond = middle;
    }
    long begin = starts[segment] + (number - first_tile(p, segment)) * p->tokens;
    long end = least(begin + p->tokens, starts[segment + 1]);
    if (begin >= end) return;
    const Tile tile = {
        p->qkv + begin * p->width,
        p->out + begin * a->heads * p->v,
        .blocks = a->segment_blocks + segment * a->segment_width,
        .head = piece / p->tiles,
        .tokens = end - begin,
        .position = begin + a->segment_lens[segment] - starts[segment + 1],
        .to = a->segment_lens[segment],
    };
    attend_planned_tile(p, &tile);
}

void plan_tiles(Prefill *p, long total, long threads)
{
    const Step *a = p->step;
    p->group = a->heads / a->kv_heads;
    p->window = a->window ? least(a->window, INT32_MAX) : INT32_MAX;
    p->stride = (a->d + ROWS - 1) / ROWS * ROWS;
    p->is_matrix = HAS_BF16 && p->cache->is_bf16 && a->tuning->multiplies_bf16;
    /* Some tiles for every thread, but none with less than a block of rows if there are more. */
    long largest = (p->is_matrix ? MATRIX_TILE : TILE) / p->group;
    p->tokens = most(1, most(WIDTH / p->group, least(largest, total * a->kv_heads / (4 * threads))));
    long blocks = (p->tokens * p->group + WIDTH - 1) / WIDTH;
    p->chunk = CHUNK;
    p->block = (a->d + p->stride + 2) * WIDTH;
    p->each = (CHUNK * WIDTH + (2 * CHUNK + ROWS) * p->stride + blocks * p->block + 31) / 32 * 32;
#if HAS_BF16
    if (p->is_matrix) {
        p->chunk = MATRIX_CHUNK;
        p->block = matrix_tile_block(a->d);
        p->each = matrix_tile_floats(a->d, blocks);
    }
#endif
}

int attend_segments(Pool *pool, Prefill job)
{
    const Step *step = job.step;
    long threads = pool_threads(pool);
    plan_tiles(&job, step->segment_starts[step->segments], threads);
    job.scratch = pool_scratch(pool, threads * job.each);
    if (!job.scratch) return -1;
    job.qkv += step->decodes * job.width;
    job.out += step->decodes * step->heads * job.v;
    job.tiles = first_tile(&job, step->segments);
    parallel(pool, prefill_piece, &job, job.tiles * step->kv_heads);
    return 0;
}

int prefill_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out)
{
    return attend_segments(pool, (Prefill){
                                     step,
                                     cache,
                                     qkv,
                                     out,
                                     .width = (step->heads + 2 * step->kv_heads) * step->d,
                                     .v = step->d,
                                     .to_values = step->kv_heads * cache->head_rows,
                                 });
}
