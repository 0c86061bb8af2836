/* What one processor does best and another worst, which calibration.py measures: see tuning.py. */
#ifndef TUNING_H
#define TUNING_H

#include "vectors.h"

typedef struct {
    int fetches_once; /* weights for a few rows are fetched past the second-level cache */
    int few_rows;     /* up to so many rows of x quantised weights are widened in registers: MOST_FEW_ROWS at most */
    int matrix_rows, matrix_rows_quantized; /* from so many rows on the matrix unit is faster, if there is one */
    int multiplies_bf16; /* AVX512-BF16 for many rows, if the library has it: see dot.h */
    int is_exact; /* quantised weights are never rounded to bfloat16 */
    int is_invariant; /* a row of a product has the same bits whatever rows are beside it */
} Tuning;

#define MOST_FEW_ROWS 4

/* Asks for memory that a product will read soon. */
INLINE void fetch(const char *at, const int once)
{
    if (once) __builtin_prefetch(at, 0, 0);
    else __builtin_prefetch(at, 0, 2);
}

#endif
