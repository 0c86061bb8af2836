/* The matrix unit adds products of two tiles to a third: 16 rows of x with 32 values of k each, and those values of
 * 16 rows of a weight (Intel's Architecture Instruction Set Extensions Programming Reference, chapter on AMX). */
#include "amx.h"

/* Whether `linear` does so: without it, a library is faster with many rows. */
int has_amx(void) { return HAS_AMX; }

#if HAS_AMX

#include <immintrin.h>

#define TILE_ROWS 16
#define TILE_DEPTH 32 /* values of k */
#define TILE (TILE_ROWS * TILE_DEPTH / 2) /* 32-bit words of a tile of weights */

/* Of k, whose weights are put in the order of tiles at a time: a part of the second-level cache. */
#define ARRANGED 1024L

static long padded(long k) { return (k + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH; }
static long padded_rows(long m) { return (m + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

long narrowed_floats(long m, long k) { return padded_rows(m) * padded(k) / 2; }
const bf16 *narrowed_row(const bf16 *y, long row, long k) { return y + row * padded(k); }

typedef struct {
    const float *x;
    bf16 *y;
    long m, k;
} Narrowing;

/* Rows and columns that only fill up the tiles are zeros. */
static void narrow_piece(const void *job, long row)
{
    const Narrowing *n = job;
    const float *x = n->x + row * n->k;
    bf16 *y = n->y + row * padded(n->k);
    long count = row < n->m ? n->k : 0, i = 0;
    for (; i + LANES <= count; i += LANES) {
        __m256bh values = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
        memcpy(y + i, &values, sizeof values);
    }
    for (; i < count; i++) y[i] = narrow(x[i]);
    memset(y + i, 0, (padded(n->k) - i) * sizeof *y);
}

void narrow_rows(Pool *pool, const float *x, bf16 *y, long m, long k)
{
    Narrowing narrowing = {x, y, m, k};
    parallel(pool, narrow_piece, &narrowing, padded_rows(m));
}

INLINE uvec load_run(const bf16 *panel, long i, long k)
{
    uvec words = {};
    if (i < k) memcpy(&words, panel + i * WIDTH, sizeof words);
    return words;
}

/* [begin, begin + count) of k as tiles: a word of one holds two neighbours in k of one row of the weight, where a word
 * of the panel holds one value of two rows. */
static void arrange(const bf16 *panel, long begin, long count, long k, uint32_t *tiles)
{
    const uint32_t upper = 0xffff0000u;
    for (long i = 0; i < count; i += TILE_DEPTH, tiles += 2 * TILE)
        for (int r = 0; r < TILE_ROWS; r++) {
            uvec even = load_run(panel, begin + i + 2 * r, k), odd = load_run(panel, begin + i + 2 * r + 1, k);
            uvec low = (even & ~upper) | odd << 16, high = even >> 16 | (odd & upper);
            memcpy(tiles + r * TILE_ROWS, &low, sizeof low);
            memcpy(tiles + TILE + r * TILE_ROWS, &high, sizeof high);
        }
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Tiles;

/* What the unit reads and writes is no memory access to some compilers. */
#define MEMORY_IS_USED() __asm__ volatile("" ::: "memory")

void multiply_matrix(const bf16 *x, const bf16 *panel, long k, float out[][WIDTH], long rows)
{
    static const Tiles all = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    uint32_t weights[ARRANGED / TILE_DEPTH * 2 * TILE];
    const long stride = padded(k), bytes = stride * sizeof *x, line = sizeof *out;
    _tile_loadconfig(&all);
    for (long begin = 0; begin < stride; begin += ARRANGED) {
        long count = stride - begin < ARRANGED ? stride - begin : ARRANGED;
        arrange(panel, begin, count, k, weights);
        MEMORY_IS_USED();
        for (long row = 0; row < rows; row += 2 * TILE_ROWS) {
            const bf16 *upper = x + row * stride + begin, *lower = upper + TILE_ROWS * stride;
            float *at = out[row], *below = out[row + TILE_ROWS];
            int has_lower = row + TILE_ROWS < rows;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            if (begin) {
                _tile_loadd(0, at, line);
                _tile_loadd(1, at + TILE_ROWS, line);
            }
            if (begin && has_lower) {
                _tile_loadd(2, below, line);
                _tile_loadd(3, below + TILE_ROWS, line);
            }
            for (long i = 0; i < count; i += TILE_DEPTH) {
                const uint32_t *tiles = weights + i / TILE_DEPTH * 2 * TILE;
                _tile_loadd(4, upper + i, bytes);
                _tile_loadd(6, tiles, 64);
                _tile_loadd(7, tiles + TILE, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (!has_lower) continue;
                _tile_loadd(5, lower + i, bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, at, line);
            _tile_stored(1, at + TILE_ROWS, line);
            if (has_lower) {
                _tile_stored(2, below, line);
                _tile_stored(3, below + TILE_ROWS, line);
            }
        }
        MEMORY_IS_USED();
    }
    _tile_release();
}

#endif
