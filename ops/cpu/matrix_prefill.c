/* Attention of several new tokens a sequence on the matrix unit, from a cache of bfloat16.
 *
 * As in prefill.c a block of WIDTH rows lies along the vectors. Scores are keys times queries, [key][row], and sums are
 * values times weights, [d][row]: so keys are the unit's first factor as they lie in the cache, a softmax needs no sum
 * across lanes, and only values are turned round, once a chunk for all rows of a tile. */
#include "prefill.h"

#if HAS_AMX

#include <immintrin.h>

#define CHUNK 128L /* keys */

typedef struct {
    bf16 *query; /* times the scale, [depth / 2][WIDTH][2], and in as many numbers behind it what rounding took away */
    float *sum; /* of weights * values, [depth][WIDTH] */
    float *highest, *total;
} Block;

/* Of one thread. keys: [CHUNK][depth]; values: [depth][CHUNK]; scores: [CHUNK][WIDTH];
 * weights: [CHUNK / 2][WIDTH][2]. */
typedef struct {
    bf16 *keys, *values, *weights;
    float *scores, *blocks;
} Room;

long matrix_tile_block(long d) { return (2 * matrix_depth(d) + 2) * WIDTH; }

long matrix_tile_floats(long d, long blocks)
{ return CHUNK * (matrix_depth(d) + WIDTH / 2 + WIDTH) + blocks * matrix_tile_block(d); }

static Room room_of(float *at, long depth)
{
    float *values = at + CHUNK * depth / 2, *weights = values + CHUNK * depth / 2,
          *scores = weights + CHUNK * WIDTH / 2;
    return (Room){(bf16 *)at, (bf16 *)values, (bf16 *)weights, scores, scores + CHUNK * WIDTH};
}

static Block block_of(const Prefill *p, const Room *room, long row)
{
    long depth = matrix_depth(p->step->d);
    float *at = room->blocks + row / WIDTH * p->block, *sum = at + depth * WIDTH;
    return (Block){(bf16 *)at, sum, sum + depth * WIDTH, sum + (depth + 1) * WIDTH};
}

/* Word j of vector i becomes word i of vector j. */
static void turn(uvec v[LANES])
{
    for (int step = 1; step < LANES; step *= 2) {
        uint32_t first[LANES], second[LANES];
        for (int l = 0; l < LANES; l++) {
            first[l] = l & step ? LANES + l - step : l;
            second[l] = l & step ? LANES + l : l + step;
        }
        __m512i to_first = _mm512_loadu_si512(first), to_second = _mm512_loadu_si512(second);
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            __m512i a = (__m512i)v[i], b = (__m512i)v[i + step];
            v[i] = (uvec)_mm512_permutex2var_epi32(a, to_first, b);
            v[i + step] = (uvec)_mm512_permutex2var_epi32(a, to_second, b);
        }
    }
}

/* LANES values of each of 2 * LANES neighbouring tokens, `rows`, as LANES runs of all tokens; CHUNK apart. */
static void turn_values(const bf16 *const *rows, long i, long count, bf16 *to)
{
    uvec words[LANES];
    for (int pair = 0; pair < LANES; pair++) {
        hvec halves[2] = {};
        for (int odd = 0; odd < 2; odd++)
            if (rows[2 * pair + odd]) memcpy(&halves[odd], rows[2 * pair + odd] + i, count * sizeof(bf16));
        words[pair] = __builtin_convertvector(halves[0], uvec) | __builtin_convertvector(halves[1], uvec) << 16;
    }
    turn(words);
    for (int j = 0; j < LANES; j++) memcpy(to + j * CHUNK, &words[j], sizeof words[j]);
}

/* Keys and values of the positions [from, to) of a segment's sequence, zeros up to whole tiles. */
static void gather(const Prefill *p, const Room *room, long segment, long head, long from, long to)
{
    const Step *a = p->step;
    const Cache *cache = p->cache;
    long d = a->d, depth = matrix_depth(d), whole = (to - from + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    const bf16 *values[CHUNK];
    for (long t = 0; t < whole; t++) {
        bf16 *key = room->keys + t * depth;
        long at = from + t, count = at < to ? d : 0;
        values[t] = NULL;
        if (count) {
            long block = a->segment_blocks[segment * a->segment_width + at / cache->block_size];
            long slot = head * cache->num_slots + block * cache->block_size + at % cache->block_size;
            const bf16 *row = (const bf16 *)cache->data + slot * d;
            memcpy(key, row, d * sizeof *key);
            values[t] = row + a->kv_heads * cache->num_slots * d;
        }
        memset(key + count, 0, (depth - count) * sizeof *key);
    }
    for (long t = 0; t < whole; t += 2 * LANES)
        for (long i = 0; i < depth; i += LANES)
            turn_values(values + t, i, most(0, least(LANES, d - i)), room->values + i * CHUNK + t);
}

/* sums[i][row] (+)= a[i] . (b + rest) for 32 rows of a, `stride` numbers apart, of `depth` numbers; rest or null. */
INLINE void multiply(const bf16 *a, long stride, const bf16 *b, const bf16 *rest, long depth, float *sums,
                     const int is_more)
{
    const long line = WIDTH * sizeof(float);
    float *below = sums + TILE_ROWS * WIDTH;
    if (is_more) {
        _tile_loadd(0, sums, line);
        _tile_loadd(1, sums + TILE_ROWS, line);
        _tile_loadd(2, below, line);
        _tile_loadd(3, below + TILE_ROWS, line);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < depth; i += TILE_DEPTH, a += TILE_DEPTH, b += TILE_DEPTH * WIDTH) {
        _tile_loadd(6, b, 2 * WIDTH * sizeof *b);
        _tile_loadd(7, b + WIDTH, 2 * WIDTH * sizeof *b);
        _tile_loadd(4, a, stride * sizeof *a);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE_ROWS * stride, stride * sizeof *a);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (!rest) continue;
        _tile_loadd(6, rest + i * WIDTH, 2 * WIDTH * sizeof *b);
        _tile_loadd(7, rest + i * WIDTH + WIDTH, 2 * WIDTH * sizeof *b);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + TILE_ROWS, line);
    _tile_stored(2, below, line);
    _tile_stored(3, below + TILE_ROWS, line);
}

/* 2^x for x <= 0, at least 2^-126, by the Taylor series up to r^4: to 4e-5, where a weight has 8 bits; NaN stays. */
INLINE vec coarse_power_of_2(vec x)
{
    x = choose(x < -126.0f, (vec){} - 126.0f, x);
    vec rounded = x + 12582912.0f, r = x - (rounded - 12582912.0f);
    vec p = r * 9.6181291e-3f + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + ((ivec)rounded << 23));
}

INLINE uvec narrow_words(vec even, vec odd)
{
    __m256bh low = _mm512_cvtneps_pbh((__m512)even), high = _mm512_cvtneps_pbh((__m512)odd);
    hvec a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, &high, sizeof b);
    return __builtin_convertvector(a, uvec) | __builtin_convertvector(b, uvec) << 16;
}

/* -inf where a key is not seen because it is younger than the row's token or too old. */
static void mask(float (*scores)[WIDTH], const int32_t *positions, long first, long count, long window)
{
    for (int half = 0; half < 2; half++) {
        ivec position;
        memcpy(&position, positions + half * LANES, sizeof position);
        for (long t = 0; t < count; t++) {
            ivec age = position - (int32_t)(first + t);
            vec score = load_f32(scores[t] + half * LANES);
            store(scores[t] + half * LANES, choose((age < 0) | (age >= (int32_t)window), (vec){} - INFINITY, score));
        }
    }
}

/* Takes keys [first, first + count) of a chunk into the sums of a block, whose rows have these positions. `first` and
 * what is behind `count` make whole tiles. */
static void attend(const Prefill *p, const Room *room, const Block *b, long first, long count, long from,
                   const int32_t *positions)
{
    long depth = matrix_depth(p->step->d), whole = (count + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    float (*scores)[WIDTH] = (float (*)[WIDTH])room->scores;
    for (long t = 0; t < whole; t += 2 * TILE_ROWS)
        multiply(room->keys + (first + t) * depth, depth, b->query, b->query + depth * WIDTH, depth, scores[t], 0);
    if (from + first + count - 1 > positions[0] || positions[WIDTH - 1] - p->window >= from + first)
        mask(scores, positions, from + first, count, p->window);
    int is_higher = 0;
    for (int half = 0; half < 2; half++) {
        vec before = load_f32(b->highest + half * LANES), highest[2] = {before, before}, total[2] = {};
        for (long t = 0; t < count; t++) {
            vec score = load_f32(scores[t] + half * LANES);
            highest[t % 2] = choose(score > highest[t % 2], score, highest[t % 2]);
        }
        highest[0] = choose(highest[1] > highest[0], highest[1], highest[0]);
        for (long t = 0; t < whole; t += 2) {
            vec weights[2];
            for (int odd = 0; odd < 2; odd++) {
                weights[odd] = coarse_power_of_2(load_f32(scores[t + odd] + half * LANES) - highest[0]);
                if (t + odd >= count) weights[odd] = (vec){};
                total[odd] += weights[odd];
            }
            uvec words = narrow_words(weights[0], weights[1]);
            memcpy(room->weights + t * WIDTH + 2 * half * LANES, &words, sizeof words);
        }
        vec factor = coarse_power_of_2(before - highest[0]);
        store(b->total + half * LANES, load_f32(b->total + half * LANES) * factor + total[0] + total[1]);
        store(b->highest + half * LANES, highest[0]);
        ivec changed = highest[0] > before;
        for (int l = 0; l < LANES; l++) is_higher |= changed[l];
        if (is_higher)
            for (long i = 0; i < depth; i++) {
                float *sum = b->sum + i * WIDTH + half * LANES;
                store(sum, load_f32(sum) * factor);
            }
    }
    for (long i = 0; i < depth; i += 2 * TILE_ROWS)
        multiply(room->values + i * CHUNK + first, CHUNK, room->weights, NULL, whole, b->sum + i * WIDTH, 1);
}

void attend_tile_by_matrix(const Prefill *p, long segment, long head, long begin, long end)
{
    const Step *a = p->step;
    long d = a->d, group = p->group, rows = (end - begin) * group, heads = a->heads + 2 * a->kv_heads;
    long shift = a->segment_lens[segment] - a->segment_starts[segment + 1]; /* from a token's number to its position */
    const Room room = room_of(p->scratch + pool_self() * p->each, matrix_depth(d));
    for (long first = 0; first < rows; first += WIDTH) {
        Block b = block_of(p, &room, first);
        memset(b.query, 0, p->block * sizeof(float));
        for (long r = 0; r < WIDTH; r++) b.highest[r] = LOWEST;
        for (long row = first; row < least(first + WIDTH, rows); row++) {
            const float *query = p->qkv + ((begin + row / group) * heads + head * group + row % group) * d;
            for (long i = 0; i < d; i++) {
                bf16 *to = b.query + (i / 2 * WIDTH + row % WIDTH) * 2 + i % 2;
                float value = query[i] * a->scale * LOG2_E, left;
                *to = narrow(value);
                left = value - widen(*to);
                to[matrix_depth(d) * WIDTH] = left == left ? narrow(left) : 0;
            }
        }
    }
    begin_matrix();
    for (long from = most(0, begin + shift - p->window + 1); from < end + shift; from += CHUNK) {
        long to = least(from + CHUNK, end + shift);
        gather(p, &room, segment, head, from, to);
        for (long row = 0; row < rows; row += WIDTH) {
            Block b = block_of(p, &room, row);
            int32_t positions[WIDTH];
            for (long r = 0; r < WIDTH; r++) positions[r] = begin + shift + least(row + r, rows - 1) / group;
            long first = most(0, positions[0] - p->window + 1 - from) / TILE_DEPTH * TILE_DEPTH;
            long count = least(to, positions[WIDTH - 1] + 1) - from - first;
            if (count > 0) attend(p, &room, &b, first, count, from, positions);
        }
    }
    end_matrix();
    for (long row = 0; row < rows; row++) {
        Block b = block_of(p, &room, row);
        float *to = p->out + ((begin + row / group) * a->heads + head * group + row % group) * d;
        float factor = 1 / b.total[row % WIDTH];
        for (long i = 0; i < d; i++) to[i] = b.sum[i * WIDTH + row % WIDTH] * factor;
    }
}

#endif
