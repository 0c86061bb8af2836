/* Products of numbers of bfloat16: on the matrix unit of Intel's processors, or by AVX512-BF16, for whichever the
 * library is compiled. */
#ifndef AMX_H
#define AMX_H

#include "panel.h"
#include "pool.h"

#if defined(__AMX_BF16__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif
#if HAS_AMX || defined(__AVX512BF16__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

#define TILE_ROWS 16
#define TILE_DEPTH 32 /* values of k */

/* k, in whole tiles: as many values a row of a panel of bfloat16 has. */
INLINE long matrix_depth(long k) { return (k + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH; }

/* Up to so many rows of x are narrowed to two numbers of bfloat16 whose sum has 16 bits of precision: the second
 * product costs no time, as memory is waited for. MAX_KERNEL_ROWS_BF16 in operators.py. AVX512-BF16 would be slower
 * than float32 so: it takes no fewer rows than these. */
#define EXACT_ROWS 32

#if HAS_BF16
#include <immintrin.h>

/* Asks for a line that will be written, which another thread may have had last. */
INLINE void fetch_to_write(void *at) { __asm__ volatile("prefetchw %0" ::"m"(*(char *)at)); }
#endif

/* Between memory accesses and the unit's: its loads are none to GCC, which could do a store behind them. */
#define MEMORY_IS_USED() __asm__ volatile("" ::: "memory")

/* Rows that are multiplied with a panel at a time. */
#define MATRIX_ROWS (2L * TILE_ROWS)

/* Bytes of narrowed x that a thread goes through panel after panel: half the second-level cache of such processors. */
#define NARROWED_BYTES (HAS_AMX ? 1L << 20 : 1L << 19)

/* x[m][k] in bfloat16, in whole tiles, and if it has a rest, what rounding took away, in as many numbers behind it. For
 * the matrix unit each tile is one run of memory: TILE_ROWS rows of k, tile by tile. */
typedef struct {
    bf16 *values;
    long m, k;
    int has_rest;
} Narrowed;

INLINE long whole_rows(long m) { return (m + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }
INLINE long narrowed_numbers(const Narrowed *x) { return (1 + x->has_rest) * whole_rows(x->m) * matrix_depth(x->k); }

/* Where value i of a row lies, for an i of whole LANES. */
INLINE bf16 *narrowed_at(const Narrowed *x, long row, long i)
{
    if (!HAS_AMX) return x->values + row * matrix_depth(x->k) + i;
    return x->values + row / TILE_ROWS * TILE_ROWS * matrix_depth(x->k) + i / TILE_DEPTH * TILE_ROWS * TILE_DEPTH +
           row % TILE_ROWS * TILE_DEPTH + i % TILE_DEPTH;
}

#if HAS_BF16
INLINE uvec narrow_vector(vec x)
{
    __m256bh values = _mm512_cvtneps_pbh((__m512)x);
    hvec narrow;
    memcpy(&narrow, &values, sizeof narrow);
    return __builtin_convertvector(narrow, uvec);
}

/* LANES values of a row from i on. What is not finite has no rest. */
INLINE void put_narrowed(const Narrowed *to, long row, long i, vec x)
{
    bf16 *at = narrowed_at(to, row, i);
    uvec high = narrow_vector(x);
    hvec narrow = __builtin_convertvector(high, hvec);
    memcpy(at, &narrow, sizeof narrow);
    if (!to->has_rest) return;
    vec left = x - (vec)(high << 16);
    narrow = __builtin_convertvector(narrow_vector((vec)((ivec)left & (left == left))), hvec);
    memcpy(at + narrowed_numbers(to) / 2, &narrow, sizeof narrow);
}
#endif

/* Rounds to nearest, ties to even, rows of x that are normalised before if there is a norm[k] (see norm.h). */
INTERNAL void narrow_rows(Pool *pool, const float *x, const float *norm, float eps, const Narrowed *to);

/* The weights of a panel of a quantised format, rounded to bfloat16. */
INTERNAL void widen_to_matrix(int format, const void *panel, long k, bf16 *out, int once);

/* A thread has the matrix unit between these. */
INTERNAL void begin_matrix(void);
INTERNAL void end_matrix(void);

/* Two halves of panels, which are multiplied as one: those of one panel, or of the gate's and the up projection's. */
typedef struct {
    const bf16 *low, *high; /* [k / 2][LANES][2], with room for LANES between neighbours in k */
} Halves;

/* out[r] = x[row + r] . halves^T for `count` rows of at most MATRIX_ROWS, `row` in whole tiles; out has room for whole
 * tiles. As much as a panel has is fetched from `ahead` on, unless it is null. */
INTERNAL void multiply_matrix(const Narrowed *x, long row, long count, Halves halves, const bf16 *ahead,
                              float out[][WIDTH]);

#endif
