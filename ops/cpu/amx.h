/* Many rows of x by bfloat16 weights on the matrix unit of Intel's processors, where the library is compiled for it. */
#ifndef AMX_H
#define AMX_H

#include "panel.h"
#include "pool.h"

#if defined(__AMX_BF16__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

/* Rows of x are narrowed to bfloat16 for it, so that up to so many, where memory is waited for anyway, are not:
 * MAX_KERNEL_ROWS_BF16 in operators.py. */
#define EXACT_ROWS 32

/* Most rows that a thread multiplies with a panel at a time. */
#define MATRIX_ROWS 512L

/* Floats that narrowed rows of k take. */
INTERNAL long narrowed_floats(long m, long k);

/* Rounds x[m][k] to nearest, ties to even, into rows that `narrowed_row` finds. */
INTERNAL void narrow_rows(Pool *pool, const float *x, bf16 *y, long m, long k);
INTERNAL const bf16 *narrowed_row(const bf16 *y, long row, long k);

/* out[r] = x[r] . panel^T for `rows` narrowed rows of x; out has room for a multiple of 32 rows. */
INTERNAL void multiply_matrix(const bf16 *x, const bf16 *panel, long k, float out[][WIDTH], long rows);

#endif
