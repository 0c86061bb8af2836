/* Attention of several new tokens a sequence on the matrix unit or by AVX512-BF16, from a cache of bfloat16.
 *
 * As in prefill.c a block of WIDTH rows lies along the vectors. Scores are keys times queries, [key][row], and sums are
 * values times weights, [d][row]: so keys are the unit's first factor as they lie in the cache, a softmax needs no sum
 * across lanes, and only values are turned round, once a chunk for all rows of a tile. */
#include "dot.h"
#include "prefill.h"

#if HAS_BF16

#include <immintrin.h>

#define CHUNK MATRIX_CHUNK

typedef struct {
    bf16 *query; /* times the scale, [depth / 2][WIDTH][2] */
    float *sum;  /* of weights * values, [depth][WIDTH] */
    float *highest, *total;
} Block;

/* Of one thread. keys: [CHUNK][depth]; values: [depth][CHUNK]; scores: [CHUNK][WIDTH];
 * weights: [CHUNK / 2][WIDTH][2]. */
typedef struct {
    bf16 *keys, *values, *weights;
    float *scores, *blocks;
} Room;

long matrix_tile_block(long d) { return (matrix_depth(d) / 2 + matrix_depth(d) + 2) * WIDTH; }

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
    float *at = room->blocks + row / WIDTH * p->block, *sum = at + depth / 2 * WIDTH;
    return (Block){(bf16 *)at, sum, sum + depth * WIDTH, sum + (depth + 1) * WIDTH};
}

/* Of a pair of vectors whose numbers differ in one bit `step`: which words become the first, and which the second. */
#define FIRST(l, step) ((l) & (step) ? LANES + (l) - (step) : (l))
#define SECOND(l, step) ((l) & (step) ? LANES + (l) : (l) + (step))
#define FOUR(PICK, l, step) PICK(l, step), PICK(l + 1, step), PICK(l + 2, step), PICK(l + 3, step)
#define ALL(PICK, step) {FOUR(PICK, 0, step), FOUR(PICK, 4, step), FOUR(PICK, 8, step), FOUR(PICK, 12, step)}

/* Word j of vector i becomes word i of vector j. */
INLINE void turn(uvec v[LANES])
{
    static const uint32_t pick[4][2][LANES] = {
        {ALL(FIRST, 1), ALL(SECOND, 1)},
        {ALL(FIRST, 2), ALL(SECOND, 2)},
        {ALL(FIRST, 4), ALL(SECOND, 4)},
        {ALL(FIRST, 8), ALL(SECOND, 8)},
    };
#pragma GCC unroll 4
    for (int bit = 0; bit < 4; bit++) {
        __m512i to_first = _mm512_loadu_si512(pick[bit][0]), to_second = _mm512_loadu_si512(pick[bit][1]);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & 1 << bit) continue;
            __m512i a = (__m512i)v[i], b = (__m512i)v[i + (1 << bit)];
            v[i] = (uvec)_mm512_permutex2var_epi32(a, to_first, b);
            v[i + (1 << bit)] = (uvec)_mm512_permutex2var_epi32(a, to_second, b);
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

/* Keys and values of the positions [from, to) of a sequence, zeros up to whole tiles. */
static void gather(const Prefill *p, const Room *room, const Tile *tile, long from, long to)
{
    const Cache *cache = p->cache;
    long d = p->step->d, depth = matrix_depth(d), whole = (to - from + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    const bf16 *values[CHUNK];
    for (long t = 0; t < whole; t++) {
        bf16 *key = room->keys + t * depth;
        long at = from + t, count = at < to ? d : 0;
        values[t] = NULL;
        if (count) {
            long block = tile->blocks[at / cache->block_size];
            long place = cached_row(cache, tile->head, block, at % cache->block_size);
            const bf16 *row = (const bf16 *)cache->data + place * d;
            memcpy(key, row, d * sizeof *key);
            values[t] = row + p->to_values * d;
        }
        memset(key + count, 0, (depth - count) * sizeof *key);
    }
    for (long t = 0; t < whole; t += 2 * LANES)
        for (long i = 0; i < matrix_depth(p->v); i += LANES)
            turn_values(values + t, i, most(0, least(LANES, p->v - i)), room->values + i * CHUNK + t);
}

/* sums[i][row] (+)= a[i] . b for 32 rows of a, `stride` numbers apart, of `depth` numbers. */
INLINE void multiply(const bf16 *a, long stride, const bf16 *b, long depth, float *sums, const int is_more)
{
#if HAS_AMX
    const long line = WIDTH * sizeof(float);
    float *below = sums + TILE_ROWS * WIDTH;
    MEMORY_IS_USED();
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
    }
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + TILE_ROWS, line);
    _tile_stored(2, below, line);
    _tile_stored(3, below + TILE_ROWS, line);
    MEMORY_IS_USED();
#else
    for (int r = 0; r < 2 * TILE_ROWS; r += DOT_ROWS, a += DOT_ROWS * stride, sums += DOT_ROWS * WIDTH)
        dot_rows(a, stride, b, b + WIDTH, depth, sums, NULL, is_more);
#endif
}

/* The larger of each two; of a NaN and a number the second. */
INLINE vec larger_of(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }

/* 2^x for x <= 0: 2^floor(x) times a cubic polynomial in the rest, to 8e-5, where a weight has 8 bits; NaN stays. */
INLINE vec coarse_power_of_2(vec x)
{
    vec r = (vec)_mm512_reduce_ps((__m512)x, 1);
    vec p = r * 7.80245227e-2f + 2.26067155e-1f;
    p = p * r + 6.95833541e-1f;
    p = p * r + 9.99925219e-1f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

/* Of two numbers, none negative, the nearest in bfloat16, in the lower and the upper half of a word. */
INLINE uvec narrow_words(vec even, vec odd)
{ return ((uvec)even + 0x8000u) >> 16 | (((uvec)odd + 0x8000u) & 0xffff0000u); }

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
    long depth = matrix_depth(p->step->d), of_values = matrix_depth(p->v),
         whole = (count + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    float (*scores)[WIDTH] = (float (*)[WIDTH])room->scores;
    for (long t = 0; t < whole; t += 2 * TILE_ROWS)
        multiply(room->keys + (first + t) * depth, depth, b->query, depth, scores[t], 0);
    if (from + first + count - 1 > positions[0] || positions[WIDTH - 1] - p->window >= from + first)
        mask(scores, positions, from + first, count, p->window);
    for (long t = count; t < whole; t++)
        for (int half = 0; half < 2; half++) store(scores[t] + half * LANES, (vec){} - INFINITY);
    for (int half = 0; half < 2; half++) {
        vec before = load_f32(b->highest + half * LANES), highest[4] = {before, before, before, before}, total[2] = {};
        for (long t = 0; t < whole; t += 4)
            for (int i = 0; i < 4; i++) highest[i] = larger_of(load_f32(scores[t + i] + half * LANES), highest[i]);
        vec most = larger_of(larger_of(highest[0], highest[1]), larger_of(highest[2], highest[3]));
        for (long t = 0; t < whole; t += 2) {
            vec even = coarse_power_of_2(load_f32(scores[t] + half * LANES) - most);
            vec odd = coarse_power_of_2(load_f32(scores[t + 1] + half * LANES) - most);
            total[0] += even;
            total[1] += odd;
            uvec words = narrow_words(even, odd);
            memcpy(room->weights + t * WIDTH + 2 * half * LANES, &words, sizeof words);
        }
        vec factor = coarse_power_of_2(before - most);
        store(b->total + half * LANES, load_f32(b->total + half * LANES) * factor + total[0] + total[1]);
        store(b->highest + half * LANES, most);
        if (memcmp(&before, &most, sizeof most))
            for (long i = 0; i < of_values; i++) {
                float *sum = b->sum + i * WIDTH + half * LANES;
                store(sum, load_f32(sum) * factor);
            }
    }
    for (long i = 0; i < of_values; i += 2 * TILE_ROWS)
        multiply(room->values + i * CHUNK + first, CHUNK, room->weights, whole, b->sum + i * WIDTH, 1);
}

/* Two vectors in bfloat16, one behind the other. */
INLINE uvec narrow_pair(vec a, vec b) { return (uvec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

/* Queries of `count` rows, at most LANES, times the scale, into a block. They are rounded as the keys are. */
static void put_queries(const Prefill *p, const Tile *tile, long row, long count, bf16 *to)
{
    const Step *a = p->step;
    float factor = a->scale * LOG2_E;
    for (long i = 0; i < a->d; i += 2 * LANES) {
        uvec words[LANES] = {};
        for (long r = 0; r < count; r++) {
            const float *token = tile->qkv + (row + r) / p->group * p->width;
            const float *query = token + (tile->head * p->group + (row + r) % p->group) * a->d + i;
            vec low = load_part(query, a->d - i), high = load_part(query + LANES, a->d - i - LANES);
            words[r] = narrow_pair(low * factor, high * factor);
        }
        turn(words);
        for (long j = 0; j < LANES; j++) memcpy(to + (i / 2 + j) * 2 * WIDTH, &words[j], sizeof words[j]);
    }
}

/* The outputs of `count` rows, at most LANES, from the sums of their block. */
static void take_sums(const Prefill *p, Block b, const Tile *tile, long row, long count)
{
    long lane = row % WIDTH;
    vec factor = 1.0f / load_f32(b.total + lane);
    for (long i = 0; i < p->v; i += LANES) {
        uvec sums[LANES];
        for (int j = 0; j < LANES; j++) sums[j] = (uvec)(load_f32(b.sum + (i + j) * WIDTH + lane) * factor);
        turn(sums);
        for (long r = 0; r < count; r++) {
            long head = (row + r) / p->group * p->step->heads + tile->head * p->group + (row + r) % p->group;
            memcpy(tile->out + head * p->v + i, &sums[r], least(LANES, p->v - i) * sizeof(float));
        }
    }
    for (long r = 0; tile->totals && r < count; r++)
        tile->totals[row + r] = b.highest[lane + r] + log2f(b.total[lane + r]);
}

void attend_tile_by_matrix(const Prefill *p, const Tile *tile)
{
    long group = p->group, rows = tile->tokens * group, position = tile->position;
    const Room room = room_of(p->scratch + pool_self() * p->each, matrix_depth(p->step->d));
    for (long first = 0; first < rows; first += WIDTH) {
        Block b = block_of(p, &room, first);
        memset(b.query, 0, p->block * sizeof(float));
        begin_softmax(p, tile->head, first, rows, b.highest, b.total);
        for (long row = first; row < least(first + WIDTH, rows); row += LANES)
            put_queries(p, tile, row, least(LANES, rows - row), b.query + 2 * (row - first));
    }
    begin_matrix();
    long end = least(tile->to, position + tile->tokens);
    for (long from = most(tile->from, position - p->window + 1); from < end; from += CHUNK) {
        long to = least(from + CHUNK, end);
        gather(p, &room, tile, from, to);
        for (long row = 0; row < rows; row += WIDTH) {
            Block b = block_of(p, &room, row);
            int32_t positions[WIDTH];
            for (long r = 0; r < WIDTH; r++) positions[r] = position + least(row + r, rows - 1) / group;
            long first = most(0, positions[0] - p->window + 1 - from) / TILE_DEPTH * TILE_DEPTH;
            long count = least(to, positions[WIDTH - 1] + 1) - from - first;
            if (count > 0) attend(p, &room, &b, first, count, from, positions);
        }
    }
    end_matrix();
    for (long row = 0; row < rows; row += LANES)
        take_sums(p, block_of(p, &room, row), tile, row, least(LANES, rows - row));
}

#endif
