/* Products of quantised weights with activations that are rounded to 8 bits, in integers: faster, not exact. */
#ifndef INT8_H
#define INT8_H

#include "quantized.h"

/* GROUP values of a row of x: each is about scale * quant. */
typedef struct {
    int8_t quants[GROUP]; /* -127 to 127 */
    float scale;
    int32_t sums[2];      /* of the quants in either half */
} Int8Group;

/* Rounds x[m][k] to y[k / GROUP][m]; k is a multiple of GROUP. */
INTERNAL void quantize_rows(Pool *pool, const float *x, Int8Group *y, long m, long k);

/* out[r] = x[r] . panel^T for `rows` rows of x; the same GROUP of the next row follows, that of the next k `stride`
 * groups later. */
INTERNAL void tile_int8(int format, const Int8Group *x, long stride, const void *panel, long k, float out[][WIDTH],
                        long rows, int once);

#endif
