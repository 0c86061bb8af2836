/* Attention of several new tokens a sequence, by FlashAttention-2's running softmax (Dao, 2023, arXiv:2307.08691).
 *
 * The queries of some tokens in all heads that share a KV head are the rows of a tile, which takes the keys and values
 * that it sees chunk by chunk. Rows lie along the vectors, WIDTH of them side by side in a block, so that keys and
 * values are used as they lie in the cache, widened to float32, and a softmax needs no sum across lanes. */
#include "prefill.h"

#define UNROLL _Pragma("GCC unroll 16")
#define CHUNK 60L /* keys, a multiple of ROWS: with their scores they leave the first-level cache room for a block */
#define VALUES (VECTORS == 32 ? 8L : ROWS) /* elements of a value that are summed up at a time: heads have whole 8 */

/* `vexp2` for x <= 0 in fewer instructions, as a softmax has one for each weight: 2^n times a polynomial in the rest
 * (degree 5, relative error below 2e-7); 0 below -126, and NaN stays NaN. */
INLINE vec power_of_2(vec x)
{
    vec shifted = x + 12582912.0f; /* whose lowest bits are x, rounded to an integer */
    vec r = x - (shifted - 12582912.0f);
    vec p = r * 1.3264727e-3f + 9.6715130e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314700e-1f;
    p = p * r + 1.0f;
    ivec under = x < -126.0f, known = x == x; /* the lowest bits of a NaN may be any */
    return choose(under, (vec){}, (vec)((uvec)p + ((uvec)shifted << 23 & (uvec)known)));
}

/* Half of the lanes of both in turns, from lane `first` on. */
INLINE vec interleave(vec a, vec b, const int first)
{
    ivec at;
    for (int i = 0; i < LANES; i++) at[i] = first + i / 2 + i % 2 * LANES;
    return SHUFFLE_EACH(a, b, at);
}

/* v[i][j] and v[j][i] exchanged, of runs of `step` of them. */
INLINE void exchange(vec v[LANES], const int step)
{
    ivec first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i & step ? LANES + i - step : i;
        second[i] = i & step ? LANES + i : i + step;
    }
    UNROLL for (int i = 0; i < LANES; i++) {
        if (i & step) continue;
        vec a = v[i], b = v[i + step];
        v[i] = SHUFFLE_EACH(a, b, first);
        v[i + step] = SHUFFLE_EACH(a, b, second);
    }
}

static void transpose(float square[LANES][LANES])
{
    vec v[LANES];
    UNROLL for (int i = 0; i < LANES; i++)
        v[i] = load_f32(square[i]);
    exchange(v, 1);
    exchange(v, 2);
    if (LANES > 4) exchange(v, 4 % LANES);
    if (LANES > 8) exchange(v, 8 % LANES);
    UNROLL for (int i = 0; i < LANES; i++)
        store(square[i], v[i]);
}

/* acc[r] += sum over i < count of a[r * row + i * step] * panel[i], for M of them by a panel of [count][WIDTH]. */
INLINE void multiply(const float *a, long row, long step, const float *panel, long count, vec acc[][2], const int M)
{
    for (long i = 0; i < count; i++, a += step, panel += WIDTH) {
        vec low = load_f32(panel), high = load_f32(panel + LANES);
        for (int r = 0; r < M; r++) {
            acc[r][0] += low * a[r * row];
            acc[r][1] += high * a[r * row];
        }
    }
}

/* WIDTH rows of a tile, in one piece of memory: queries times the scale, [d][WIDTH]; sums of weights * values,
 * [stride][WIDTH]; of each row the highest score, the sum of the weights, and its token's position. */
typedef struct {
    float *query, *sum, *highest, *total;
    int32_t *positions;
} Block;
#define OF_ROWS 3L /* numbers of a row beside its query and its sums */

/* `count` keys and values of neighbouring tokens, the first one's position, and room for the scores of a CHUNK. Keys
 * [begin, end) are seen by all rows of the block. */
typedef struct {
    const float *keys, *values;
    long first, count, begin, end;
    float (*scores)[WIDTH];
} Chunk;

INLINE Block block_of(const Prefill *p, float *blocks, long row)
{
    float *query = blocks + row / WIDTH * p->block, *sum = query + p->step->d * WIDTH;
    float *highest = sum + p->stride * WIDTH;
    return (Block){query, sum, highest, highest + WIDTH, (int32_t *)(highest + 2 * WIDTH)};
}

INLINE vec higher(vec a, vec b) { return choose(a > b, a, b); }

/* The scores, -inf where a key is not seen because it is younger than the row's token or too old, and the highest. */
INLINE void score_keys(const Prefill *p, const Block *b, const Chunk *c, vec highest[2])
{
    for (long t = 0; t < c->count; t += ROWS) {
        vec acc[ROWS][2];
        for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = (vec){};
        multiply(c->keys + t * p->stride, p->stride, 1, b->query, p->step->d, acc, ROWS);
        UNROLL for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) store(c->scores[t + r] + half * LANES, acc[r][half]);
        if (t >= c->begin && t + ROWS <= c->end) {
            UNROLL for (int r = 0; r < ROWS; r++)
                for (int half = 0; half < 2; half++) highest[half] = higher(acc[r][half], highest[half]);
            continue;
        }
        for (long i = t; i < least(t + ROWS, c->count); i++)
            for (int half = 0; half < 2; half++) {
                float *at = c->scores[i] + half * LANES;
                ivec age = (ivec)load_f32((float *)b->positions + half * LANES) - (int32_t)(c->first + i);
                vec score = choose((age < 0) | (age >= (int32_t)p->window), (vec){} - INFINITY, load_f32(at));
                store(at, score);
                highest[half] = higher(score, highest[half]);
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
    for (long i = 0; i < p->v; i += VALUES) {
        vec acc[VALUES][2];
        float *sum = b->sum + i * WIDTH;
        for (int r = 0; r < VALUES; r++)
            for (int half = 0; half < 2; half++) acc[r][half] = load_f32(sum + r * WIDTH + half * LANES) * factor[half];
        multiply(c->values + i, 1, p->stride, c->scores[0], c->count, acc, VALUES);
        for (int r = 0; r < VALUES; r++)
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
    for (; LANES == 16 && i + PAIR <= d; i += PAIR) { /* GCC 12 would widen LANES of them in halves */
        vec even, odd;
        load_pair(from, i, 1, &even, &odd);
        store(to + i, interleave(even, odd, 0));
        store(to + i + LANES, interleave(even, odd, LANES / 2));
    }
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

/* Queries of LANES rows of a tile, times the scale, side by side in their block; the last row's again where there are
 * no more. */
static void put_queries(const Prefill *p, const Tile *tile, long first, long rows, float *block)
{
    const float *queries[LANES];
    long d = p->step->d;
    for (long r = 0; r < LANES; r++) {
        long row = least(first + r, rows - 1), head = tile->head * p->group + row % p->group;
        queries[r] = tile->qkv + row / p->group * p->width + head * d;
    }
    for (long i = 0; i < d; i += LANES) {
        float square[LANES][LANES];
        for (long r = 0; r < LANES; r++) store(square[r], load_part(queries[r] + i, d - i) * (p->step->scale * LOG2_E));
        transpose(square);
        for (long j = i; j < least(i + LANES, d); j++) store(block + j * WIDTH, load_f32(square[j - i]));
    }
}

/* The outputs of LANES rows from what lies side by side in their block: sums of weights * values, and of weights. */
static void put_outputs(const Prefill *p, const Tile *tile, long first, long rows, const float *sum, const float *total)
{
    float *out[LANES];
    long count = least(LANES, rows - first);
    vec factor = 1.0f / load_f32(total);
    for (long r = 0; r < count; r++) {
        long row = first + r, head = tile->head * p->group + row % p->group;
        out[r] = tile->out + (row / p->group * p->step->heads + head) * p->v;
    }
    for (long i = 0; i < p->v; i += LANES) {
        float square[LANES][LANES];
        for (long j = i; j < least(i + LANES, p->v); j++) store(square[j - i], load_f32(sum + j * WIDTH) * factor);
        transpose(square);
        for (long r = 0; r < count; r++) store_part(out[r] + i, load_f32(square[r]), p->v - i);
    }
}

void attend_tile(const Prefill *p, const Tile *tile)
{
    long group = p->group, rows = tile->tokens * group, position = tile->position, window = p->window;
    float *scores = p->scratch + pool_self() * p->each, *keys = scores + CHUNK * WIDTH;
    float *values = p->to_values ? keys + (CHUNK + ROWS) * p->stride : keys,
          *blocks = keys + (2 * CHUNK + ROWS) * p->stride;
    for (long row = 0; row < rows; row += WIDTH) {
        Block b = block_of(p, blocks, row);
        memset(b.sum, 0, p->stride * WIDTH * sizeof(float));
        begin_softmax(p, tile->head, row, rows, b.highest, b.total);
        for (long r = 0; r < WIDTH; r++) b.positions[r] = position + least(row + r, rows - 1) / group;
        for (int lane = 0; lane < WIDTH; lane += LANES) put_queries(p, tile, row + lane, rows, b.query + lane);
    }
    long end = least(tile->to, position + tile->tokens);
    for (long from = most(tile->from, position - window + 1); from < end; from += CHUNK) {
        long to = least(from + CHUNK, end);
        gather(p, tile, from, to, keys, values);
        for (long row = 0; row < rows; row += WIDTH) {
            Block b = block_of(p, blocks, row);
            long oldest = b.positions[0], youngest = b.positions[WIDTH - 1];
            long first = most(from, oldest - window + 1), skipped = (first - from) * p->stride;
            long last = least(to, youngest + 1);
            Chunk c = {
                keys + skipped,
                values + skipped,
                first,
                .count = last - first,
                .begin = youngest - window + 1 - first,
                .end = least(last, oldest + 1) - first,
                .scores = (float (*)[WIDTH])scores,
            };
            if (c.count > 0) attend(p, &b, &c);
        }
    }
    for (long row = 0; row < rows; row += WIDTH) {
        Block b = block_of(p, blocks, row);
        for (int lane = 0; lane < WIDTH; lane += LANES)
            put_outputs(p, tile, row + lane, rows, b.sum + lane, b.total + lane);
        for (long r = 0; tile->totals && r < least(WIDTH, rows - row); r++)
            tile->totals[row + r] = b.highest[r] + log2f(b.total[r]);
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
    p->stride = (a->d + VALUES - 1) / VALUES * VALUES;
    p->is_matrix = HAS_BF16 && p->cache->is_bf16 && a->tuning->multiplies_bf16;
    /* Some tiles for every thread, but none with less than a block of rows if there are more. */
    long largest = (p->is_matrix ? MATRIX_TILE : TILE) / p->group;
    p->tokens = most(1, most(WIDTH / p->group, least(largest, total * a->kv_heads / (4 * threads))));
    long blocks = (p->tokens * p->group + WIDTH - 1) / WIDTH;
    p->chunk = CHUNK;
    p->block = (a->d + p->stride + OF_ROWS) * WIDTH;
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
