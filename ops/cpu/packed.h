/* How weights are packed, and how many bytes they then take. */
#ifndef PACKED_H
#define PACKED_H

#include "amx.h"
#include "quantized.h"

/* A panel of float32 is [k][WIDTH]. One of bfloat16 is [k / 2][WIDTH][2], as the matrix unit takes it: neighbours in k
 * share a 32-bit word, and zeros fill k up to whole tiles. Panels of quantised weights are described in quantized.h. */

INLINE int is_plain(int format) { return format == FORMAT_F32 || format == FORMAT_BF16; }
INLINE long plain_bytes(int format) { return format == FORMAT_BF16 ? sizeof(bf16) : sizeof(float); }
INLINE long panels_of(long n) { return (n + WIDTH - 1) / WIDTH; }
INLINE long panel_bytes(int format, long k)
{
    if (!is_plain(format)) return quantized_panel_bytes(format, k);
    return WIDTH * plain_bytes(format) * (format == FORMAT_BF16 ? matrix_depth(k) : k);
}

#endif
