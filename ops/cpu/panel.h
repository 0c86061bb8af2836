/* A weight is packed into panels of WIDTH of its rows, side by side, so that a step along k reads one run of memory
 * and needs no sum across lanes. */
#ifndef PANEL_H
#define PANEL_H

#include "vectors.h"

#define WIDTH PAIR

/* Rows of x in a tile: two accumulators each, which leave registers for the weight and for x. */
#define ROWS (VECTORS == 32 ? 12 : 6)

/* ggml's numbers of formats; those of quantized.h follow. */
enum { FORMAT_F32 = 0, FORMAT_BF16 = 30 };

#endif
