/* The matrix unit adds products of two tiles to a third: 16 rows of x with 32 values of k each, and those values of
 * 16 rows of a weight (Intel's Architecture Instruction Set Extensions Programming Reference, chapter on AMX).
 * AVX512-BF16 adds products of two values of k to each of 16 sums. */
#include "amx.h"

/* What the library is compiled for. With neither, another one is faster with many rows. */
int has_amx(void) { return HAS_AMX; }
int has_bf16(void) { return HAS_BF16; }

#if HAS_BF16

#include <immintrin.h>

#include "dot.h"
#include "norm.h"
#include "quantized_panel.h"

typedef struct {
    const float *x, *norm;
    float eps;
    const Narrowed *to;
} Narrowing;

/* TILE_ROWS rows, tile by tile, so that memory is written from end to end. Rows and columns that only fill up the tiles
 * are zeros. */
static void narrow_piece(const void *job, long piece)
{
    const Narrowing *n = job;
    const Narrowed to = *n->to;
    const long first = piece * TILE_ROWS, rows = least(TILE_ROWS, to.m - first);
    float scales[TILE_ROWS];
    for (long r = 0; r < rows; r++) scales[r] = n->norm ? norm_scale(n->x + (first + r) * to.k, to.k, n->eps) : 1.0f;
    for (long i = 0; i < matrix_depth(to.k); i += TILE_DEPTH)
        for (long r = 0; r < TILE_ROWS; r++)
            for (long j = i; j < i + TILE_DEPTH; j += LANES) {
                vec x = {};
                if (r < rows) x = load_part(n->x + (first + r) * to.k + j, to.k - j) * scales[r];
                if (n->norm) x *= load_part(n->norm + j, to.k - j);
                put_narrowed(&to, first + r, j, x);
            }
}

void narrow_rows(Pool *pool, const float *x, const float *norm, float eps, const Narrowed *to)
{
    Narrowing narrowing = {x, norm, eps, to};
    parallel(pool, narrow_piece, &narrowing, whole_rows(to->m) / TILE_ROWS);
}

/* Numbers of the one in the lower halves of words, of the other in the upper. */
INLINE __m512i interleave(vec even, vec odd)
{
    static const uint16_t places[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(places), (__m512i)both);
}

/* Weights pass from the words of their quants to pairs of bfloat16 in registers, by way of float32. */
INLINE void widen_pairs(const uint8_t *block, long k, bf16 *out, int once, const Format f)
{
    for (; k > 0; k -= f.groups * GROUP, block += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += f.span, out += f.span * WIDTH) {
            const uint8_t *group = block + head_bytes(f) + at / GROUP * group_bytes(f);
            if (at % GROUP == 0) fetch_ahead(group, f, once);
            for (int half = 0; half < 2; half++) {
                const Scale scale = load_scale(block, at, half, f);
#pragma GCC unroll 8
                for (int i = 0; i < f.span; i += 4) {
                    uvec quad = load_quad(group + half * WORDS / 2, (at % GROUP + i) / 4, f);
                    for (int t = 0; t < 4; t += 2) {
                        __m512i words = interleave(widen_quant(quad, t, scale), widen_quant(quad, t + 1, scale));
                        memcpy(out + (i + t) * WIDTH + half * 2 * LANES, &words, sizeof words);
                    }
                }
            }
        }
}

void widen_to_matrix(int format, const void *panel, long k, bf16 *out, int once)
{
#define PAIRS(NUMBER, NAME, ...) \
    case NUMBER: widen_pairs(panel, k, out, once, (Format){__VA_ARGS__}); break;
    switch (format) {
        QUANTIZED_FORMATS(PAIRS)
    }
}

#if HAS_AMX

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Tiles;

void begin_matrix(void)
{
    static const Tiles all = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    _tile_loadconfig(&all);
}

void end_matrix(void) { _tile_release(); }

/* Many rows of x come from the second level, one after the other, and must not drive the panel out of the first. */
#define LOAD_ROWS(tile, at)                                             \
    do {                                                                \
        if (has_rest) _tile_loadd(tile, at, TILE_DEPTH * sizeof(bf16)); \
        else _tile_stream_loadd(tile, at, TILE_DEPTH * sizeof(bf16));   \
    } while (0)

/* Tiles 0 to 3 are the sums of 32 rows of x by both halves, 4 and 5 are of x, 6 and 7 the halves. */
INLINE void multiply_rows(const Narrowed *x, long row, Halves halves, const bf16 *ahead, float out[][WIDTH],
                          const int has_lower, const int has_rest)
{
    const long depth = matrix_depth(x->k), line = 2 * WIDTH * sizeof(bf16);
    const long rest = has_rest ? narrowed_numbers(x) / 2 : 0;
    const bf16 *upper = x->values + row * depth, *lower = upper + TILE_ROWS * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < depth; i += TILE_DEPTH) {
        if (ahead)
            for (int j = 0; j < TILE_DEPTH; j++) __builtin_prefetch(ahead + (i + j) * WIDTH, 0, 2);
        _tile_loadd(6, halves.low + i * WIDTH, line);
        _tile_loadd(7, halves.high + i * WIDTH, line);
        LOAD_ROWS(4, upper + i * TILE_ROWS);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (has_lower) {
            LOAD_ROWS(5, lower + i * TILE_ROWS);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (!has_rest) continue;
        LOAD_ROWS(4, upper + rest + i * TILE_ROWS);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (has_lower) {
            LOAD_ROWS(5, lower + rest + i * TILE_ROWS);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, WIDTH * sizeof(float));
    _tile_stored(1, out[0] + TILE_ROWS, WIDTH * sizeof(float));
    if (has_lower) {
        _tile_stored(2, out[TILE_ROWS], WIDTH * sizeof(float));
        _tile_stored(3, out[TILE_ROWS] + TILE_ROWS, WIDTH * sizeof(float));
    }
}

void multiply_matrix(const Narrowed *x, long row, long count, Halves halves, const bf16 *ahead, float out[][WIDTH])
{
    MEMORY_IS_USED();
    if (x->has_rest && count > TILE_ROWS) multiply_rows(x, row, halves, ahead, out, 1, 1);
    else if (x->has_rest) multiply_rows(x, row, halves, ahead, out, 0, 1);
    else if (count > TILE_ROWS) multiply_rows(x, row, halves, ahead, out, 1, 0);
    else multiply_rows(x, row, halves, ahead, out, 0, 0);
    MEMORY_IS_USED();
}

#else

void begin_matrix(void) {}
void end_matrix(void) {}

/* Without a rest, which is for fewer rows than come here. */
void multiply_matrix(const Narrowed *x, long row, long count, Halves halves, const bf16 *ahead, float out[][WIDTH])
{
    long depth = matrix_depth(x->k);
    for (long r = 0; r < count; r += DOT_ROWS) {
        const bf16 *rows = x->values + (row + r) * depth;
        if (ahead && !r) dot_rows(rows, depth, halves.low, halves.high, depth, out[r], ahead, 0);
        else dot_rows(rows, depth, halves.low, halves.high, depth, out[r], NULL, 0);
    }
}

#endif

#endif
