/* Attention of several new tokens a sequence, by FlashAttention-2's running softmax (Dao, 2023, arXiv:2307.08691).
 *
 * The queries of some tokens in all heads that share a KV head are the rows of a tile, which takes the keys and values
 * that it sees chunk by chunk. Rows lie along the vectors, WIDTH of them side by side in a block, so that keys and
 * values are used as they lie in the cache, widened to float32, and a softmax needs no sum across lanes. */
#include "prefill.h"

#define CHUNK 120L    /* keys, a multiple of ROWS */

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
    for (long i = 0; i < p->step->d; i += ROWS) {
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

/* Keys and values of the positions [from, to) of a segment's sequence. */
static void gather(const Prefill *p, long segment, long head, long from, long to, float *keys, float *values)
{
    const Step *a = p->step;
    const Cache *cache = p->cache;
    for (long t = from; t < to; t++, keys += p->stride, values += p->stride) {
        long block = a->segment_blocks[segment * a->segment_width + t / cache->block_size];
        long row = head * cache->num_slots + block * cache->block_size + t % cache->block_size;
        widen_row(cache, row, a->d, keys);
        widen_row(cache, row + a->kv_heads * cache->num_slots, a->d, values);
    }
}

void attend_tile(const Prefill *p, long segment, long head, long begin, long end)
{
    const Step *a = p->step;
    long d = a->d, group = p->group, rows = (end - begin) * group, heads = a->heads + 2 * a->kv_heads;
    long shift = a->segment_lens[segment] - a->segment_starts[segment + 1]; /* from a token's number to its position */
    float *scores = p->scratch + pool_self() * p->each, *keys = scores + CHUNK * WIDTH;
    float *values = keys + (CHUNK + ROWS) * p->stride, *blocks = values + CHUNK * p->stride;
    for (long first = 0; first < rows; first += WIDTH) {
        Block b = block_of(p, blocks, first);
        memset(b.query, 0, p->block * sizeof(float));
        begin_softmax(p, head, first, rows, b.highest, b.total);
        for (long row = first; row < least(first + WIDTH, rows); row++) {
            const float *query = p->qkv + ((begin + row / group) * heads + head * group + row % group) * d;
            for (long i = 0; i < d; i++) b.query[i * WIDTH + row % WIDTH] = query[i] * a->scale * LOG2_E;
        }
    }
    for (long from = most(0, begin + shift - p->window + 1); from < end + shift; from += CHUNK) {
        long to = least(from + CHUNK, end + shift);
        gather(p, segment, head, from, to, keys, values);
        for (long row = 0; row < rows; row += WIDTH) {
            Block b = block_of(p, blocks, row);
            int32_t positions[WIDTH];
            for (long r = 0; r < WIDTH; r++) positions[r] = begin + shift + least(row + r, rows - 1) / group;
            memcpy(b.positions, positions, sizeof positions);
            long first = most(from, positions[0] - p->window + 1), skipped = (first - from) * p->stride;
            long count = least(to, positions[WIDTH - 1] + 1) - first;
            Chunk c = {keys + skipped, values + skipped, first, count, (float (*)[WIDTH])scores};
            if (count > 0) attend(p, &b, &c);
        }
    }
    for (long row = 0; row < rows; row++) {
        Block b = block_of(p, blocks, row);
        float *to = p->out + ((begin + row / group) * a->heads + head * group + row % group) * d;
        float factor = 1 / b.total[row % WIDTH];
        for (long i = 0; i < d; i++) to[i] = b.sum[i * WIDTH + row % WIDTH] * factor;
    }
}

/* The number of a segment's first tile. To be known without a sum over the segments, each has room for a tile more than
 * it may need. */
INLINE long first_tile(const Prefill *p, long segment)
{ return p->step->segment_starts[segment] / p->tokens + segment; }

static void prefill_piece(const void *job, long piece)
{
    const Prefill *p = job;
    const int64_t *starts = p->step->segment_starts;
    long tile = p->tiles - 1 - piece % p->tiles; /* the longest of a sequence first: others may take the short ones */
    long segment = 0, beyond = p->step->segments;
    while (beyond - segment > 1) {
        long middle = (segment + beyond) / 2;
        if (first_tile(p, middle) <= tile) segment = middle;
        else beyond = middle;
    }
    long begin = starts[segment] + (tile - first_tile(p, segment)) * p->tokens;
    long end = least(begin + p->tokens, starts[segment + 1]);
    if (begin >= end) return;
#if HAS_BF16
    if (p->is_matrix) {
        attend_tile_by_matrix(p, segment, piece / p->tiles, begin, end);
        return;
    }
#endif
    attend_tile(p, segment, piece / p->tiles, begin, end);
}

int prefill_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out)
{
    long d = step->d, group = step->heads / step->kv_heads, stride = (d + ROWS - 1) / ROWS * ROWS;
    long total = step->segment_starts[step->segments], threads = pool_threads(pool);
    int is_matrix = HAS_BF16 && cache->is_bf16 && step->tuning->multiplies_bf16;
    /* Some tiles for every thread, but none with less than a block of rows if there are more. */
    long largest = (is_matrix ? MATRIX_TILE : TILE) / group;
    long tokens = most(1, most(WIDTH / group, least(largest, total * step->kv_heads / (4 * threads))));
    long block = (d + stride + 2) * WIDTH, blocks = (tokens * group + WIDTH - 1) / WIDTH;
    long each = (CHUNK * WIDTH + (2 * CHUNK + ROWS) * stride + blocks * block + 31) / 32 * 32;
#if HAS_BF16
    if (is_matrix) {
        block = matrix_tile_block(d);
        each = matrix_tile_floats(d, blocks);
    }
#endif
    float *scratch = pool_scratch(pool, threads * each);
    if (!scratch) return -1;
    qkv += step->decodes * (step->heads + 2 * step->kv_heads) * d;
    out += step->decodes * step->heads * d;
    long window = step->window ? least(step->window, INT32_MAX) : INT32_MAX;
    Prefill job = {step, cache, qkv, out, scratch, group, window, stride, tokens, 0, block, each, is_matrix};
    job.tiles = first_tile(&job, step->segments);
    parallel(pool, prefill_piece, &job, job.tiles * step->kv_heads);
    return 0;
}
