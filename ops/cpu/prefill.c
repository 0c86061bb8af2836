/* Attention of several new tokens a sequence, by FlashAttention-2's running softmax (Dao, 2023, arXiv:2307.08691).
 *
 * The queries of some tokens in all heads that share a KV head are the rows of a tile, which takes the keys and values
 * that it sees chunk by chunk. Rows lie along the vectors, WIDTH of them side by side in a block, so that keys and
 * values are used as they lie in the cache, widened to float32, and a softmax needs no sum across lanes. */
#include "attention.h"
#include "panel.h"
#include "vectors.h"

#define TILE 128L     /* rows, unless one token has more heads */
#define CHUNK 120L    /* keys */
#define LOWEST -1e30f /* what a maximum starts from: -inf minus this is -inf, not NaN */

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

INLINE vec choose(ivec condition, vec a, vec b) { return (vec)(((ivec)a & condition) | ((ivec)b & ~condition)); }

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

/* A block's queries times the scale, [d][WIDTH]; its sums of weights * values, [stride][WIDTH]; the highest score and
 * the sum of the weights of each row. Then, of the keys that it takes: the first one's position, their number, floats
 * between two of them, and the scores, [CHUNK][WIDTH]. */
typedef struct {
    float *query, *sum, *highest, *total, *score;
    ivec positions[2]; /* of the rows' tokens */
    long d, window, first, count, stride;
} Block;

/* Scores, -inf where a row does not see the key; `highest`: also of what was taken before. */
INLINE void score_keys(const Block *b, const float *keys, vec highest[2], const int is_masked)
{
    for (long t = 0; t < b->count; t += ROWS) {
        vec acc[ROWS][2];
        for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = (vec){};
        multiply(keys + t * b->stride, b->stride, 1, b->query, b->d, acc);
        for (int r = 0; r < ROWS && t + r < b->count; r++)
            for (int half = 0; half < 2; half++) {
                vec score = acc[r][half];
                if (is_masked) {
                    ivec age = b->positions[half] - (int32_t)(b->first + t + r);
                    ivec hidden = (age < 0) | (age >= (int32_t)b->window);
                    score = choose(hidden, (vec){} - INFINITY, score);
                }
                store(b->score + (t + r) * WIDTH + half * LANES, score);
                highest[half] = choose(score > highest[half], score, highest[half]);
            }
    }
}

/* Takes the keys and values into the sums. */
static void attend(const Block *b, const float *keys, const float *values)
{
    vec highest[2], factor[2], total[2];
    for (int half = 0; half < 2; half++) highest[half] = load_f32(b->highest + half * LANES);
    score_keys(b, keys, highest, 1);
    for (int half = 0; half < 2; half++) {
        factor[half] = power_of_2(load_f32(b->highest + half * LANES) - highest[half]);
        total[half] = load_f32(b->total + half * LANES) * factor[half];
        store(b->highest + half * LANES, highest[half]);
    }
    for (long t = 0; t < b->count; t++)
        for (int half = 0; half < 2; half++) {
            float *score = b->score + t * WIDTH + half * LANES;
            vec weight = power_of_2(load_f32(score) - highest[half]);
            store(score, weight);
            total[half] += weight;
        }
    for (int half = 0; half < 2; half++) store(b->total + half * LANES, total[half]);
    for (long i = 0; i < b->d; i += ROWS) {
        vec acc[ROWS][2];
        float *sum = b->sum + i * WIDTH;
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++)
                acc[r][half] = load_f32(sum + r * WIDTH + half * LANES) * factor[half];
        multiply(values + i, 1, b->stride, b->score, b->count, acc);
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) store(sum + r * WIDTH + half * LANES, acc[r][half]);
    }
}

/* One row of the cache, widened. */
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

typedef struct {
    const Step *step;
    const Cache *cache;
    const float *qkv;         /* of the segments' first token, as out */
    float *out, *scratch;
    long tokens, tiles, each; /* tokens of a tile; tiles of a KV head; floats of a thread's scratch */
    long stride;              /* d, rounded up to whole ROWS */
} Prefill;

/* The tokens [begin, end) of the step's segments, which belong to one of them, in the heads of one KV head. */
static void attend_tile(const Prefill *p, long segment, long head, long begin, long end)
{
    const Step *a = p->step;
    const Cache *cache = p->cache;
    long d = a->d, group = a->heads / a->kv_heads, rows = (end - begin) * group, width = (a->heads + 2 * a->kv_heads) * d;
    long shift = a->segment_lens[segment] - a->segment_starts[segment + 1]; /* from a token's number to its position */
    long window = a->window ? a->window : INT32_MAX, size = (d + p->stride + 2) * WIDTH;
    float *score = p->scratch + pool_self() * p->each, *keys = score + CHUNK * WIDTH;
    float *values = keys + (CHUNK + ROWS) * p->stride, *blocks = values + CHUNK * p->stride;
    for (long row = 0; row < (rows + WIDTH - 1) / WIDTH * WIDTH; row++) {
        float *to = blocks + row / WIDTH * size + row % WIDTH;
        const float *query = p->qkv + (begin + row / group) * width + (head * group + row % group) * d;
        for (long i = 0; i < d; i++) to[i * WIDTH] = row < rows ? query[i] * a->scale * 1.44269504f : 0;
        for (long i = 0; i < p->stride; i++) to[(d + i) * WIDTH] = 0;
        to[(d + p->stride) * WIDTH] = LOWEST;
        to[(d + p->stride + 1) * WIDTH] = 0;
    }
    for (long from = most(0, begin + shift - window + 1); from < end + shift; from += CHUNK) {
        long to = least(from + CHUNK, end + shift);
        for (long t = from; t < to; t++) {
            long block = a->segment_blocks[segment * a->segment_width + t / cache->block_size];
            long row = head * cache->num_slots + block * cache->block_size + t % cache->block_size;
            widen_row(cache, row, d, keys + (t - from) * p->stride);
            widen_row(cache, row + a->kv_heads * cache->num_slots, d, values + (t - from) * p->stride);
        }
        for (long row = 0; row < rows; row += WIDTH) {
            float *query = blocks + row / WIDTH * size, *sum = query + d * WIDTH, *highest = sum + p->stride * WIDTH;
            Block b = {query, sum, highest, highest + WIDTH, score, .d = d, .window = window, .stride = p->stride};
            int32_t positions[WIDTH];
            for (long i = 0; i < WIDTH; i++) positions[i] = begin + least(row + i, rows - 1) / group + shift;
            memcpy(b.positions, positions, sizeof positions);
            b.first = most(from, positions[0] - window + 1);
            b.count = least(to, positions[WIDTH - 1] + 1) - b.first;
            if (b.count > 0) attend(&b, keys + (b.first - from) * p->stride, values + (b.first - from) * p->stride);
        }
    }
    for (long row = 0; row < rows; row++) {
        const float *from = blocks + row / WIDTH * size + d * WIDTH + row % WIDTH;
        float *to = p->out + ((begin + row / group) * a->heads + head * group + row % group) * d;
        float total = from[(p->stride + 1) * WIDTH];
        for (long i = 0; i < d; i++) to[i] = from[i * WIDTH] / total;
    }
}

/* The number of tiles before a segment is found without a sum over them: each one may have an empty tile. */
INLINE long tiles_before(const Prefill *p, long segment)
{
    return p->step->segment_starts[segment] / p->tokens + segment;
}

static void prefill_piece(const void *job, long piece)
{
    const Prefill *p = job;
    const Step *a = p->step;
    long tile = p->tiles - 1 - piece % p->tiles; /* the longest first, as others can then take the short ones */
    long low = 0, high = a->segments;
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (tiles_before(p, middle) <= tile) low = middle;
        else high = middle;
    }
    long begin = a->segment_starts[low] + (tile - tiles_before(p, low)) * p->tokens;
    long end = least(begin + p->tokens, a->segment_starts[low + 1]);
    if (begin < end) attend_tile(p, low, piece / p->tiles, begin, end);
}

int prefill_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out)
{
    long d = step->d, group = step->heads / step->kv_heads, stride = (d + ROWS - 1) / ROWS * ROWS;
    long tokens = most(1, TILE / group), blocks = (tokens * group + WIDTH - 1) / WIDTH;
    long each = CHUNK * WIDTH + (2 * CHUNK + ROWS) * stride + blocks * (d + stride + 2) * WIDTH;
    each = (each + 31) / 32 * 32;
    float *scratch = pool_scratch(pool, pool_threads(pool) * each);
    if (!scratch) return -1;
    qkv += step->decodes * (step->heads + 2 * step->kv_heads) * d;
    out += step->decodes * step->heads * d;
    Prefill job = {step, cache, qkv, out, scratch, tokens, 0, each, stride};
    job.tiles = tiles_before(&job, step->segments);
    parallel(pool, prefill_piece, &job, job.tiles * step->kv_heads);
    return 0;
}
