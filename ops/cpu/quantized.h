/* Weights that are multiplied in the form in which a GGUF file quantises them (ggml's block formats).
 *
 * All of them are cases of one: a weight is scale * quant + offset. A quant has 2 to 8 bits; 16 or 32 weights of a
 * row share a scale and an offset; 32 or 256 of them form a block. The formats differ in how they scatter this over
 * the bytes of a block; IQ4 has 4 bits that choose one of 16 quants, of 8 bits. MXFP4's 4 bits are a number, e2m1,
 * twice which is a quant. Packed, all are alike, and nothing is rounded:
 *
 * A panel is WIDTH rows. Block after block it holds, each for its rows side by side: `d`, the float16 (of MXFP4 a
 * bfloat16) that the scales of the block are multiples of, and `m`, that of the offsets, if the format has it; in
 * blocks of 256 the multiples, signed bytes, four of a row in a 32-bit word, first those of `d`, then those of `m`; and
 * for each 32 weights the low bits of their quants and then the high ones. Weights 4 q to 4 q + 3 of the 32 are a quad:
 * their bits lie in the four bytes of one word, so that a shift and a mask bring them into bytes of their own.
 */
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "panel.h"
#include "pool.h"
#include "tuning.h"

#define GROUP 32
#define WORDS (4 * WIDTH) /* bytes of a word of each row of a panel */
#define HALVES (2 * WIDTH) /* bytes of a float16 of each row */

typedef struct {
    int groups;     /* of 32 weights in a block: 1, or 8 */
    int span;       /* weights that share a scale */
    int low, high;  /* bits of a quant in either plane */
    int sign;       /* of m's multiples: 0 if the format has no m */
    int zero;       /* without m, the quant of a weight of 0: the offset is scale * -zero */
    int bytes;      /* of a block of one row in the file */
    int is_e2m1;    /* see e2m1_quants */
} Format;

/* ggml's number and name; groups, span, low, high, sign, zero, bytes, is_e2m1 if it is. */
#define QUANTIZED_FORMATS(F)                \
    F(2, q4_0, 1, 32, 4, 0, 0, 8, 18)       \
    F(3, q4_1, 1, 32, 4, 0, 1, 0, 20)       \
    F(6, q5_0, 1, 32, 4, 1, 0, 16, 22)      \
    F(7, q5_1, 1, 32, 4, 1, 1, 0, 24)       \
    F(8, q8_0, 1, 32, 8, 0, 0, 128, 34)     \
    F(10, q2_k, 8, 16, 2, 0, -1, 0, 84)     \
    F(11, q3_k, 8, 16, 2, 1, 0, 4, 110)     \
    F(12, q4_k, 8, 32, 4, 0, -1, 0, 144)    \
    F(13, q5_k, 8, 32, 4, 1, -1, 0, 176)    \
    F(14, q6_k, 8, 16, 4, 2, 0, 32, 210)    \
    F(20, iq4_nl, 1, 32, 8, 0, 0, 128, 18)  \
    F(23, iq4_xs, 8, 32, 8, 0, 0, 128, 136) \
    F(39, mxfp4, 1, 32, 4, 0, 0, 12, 17, 1)

/* Words of a row with the multiples of `d` in a block: none where a block has one scale. */
INLINE long multiples(const Format f) { return f.groups == 1 ? 0 : f.groups * GROUP / f.span / 4; }

/* Of a packed block of a panel: bytes in front of the quants, of 32 weights' quants, and of all. */
INLINE long head_bytes(const Format f) { return (f.sign ? 2 : 1) * (HALVES + multiples(f) * WORDS); }
INLINE long group_bytes(const Format f) { return (long)(f.low + f.high) * WORDS; }
INLINE long block_bytes(const Format f) { return head_bytes(f) + f.groups * group_bytes(f); }

/* Bytes of a panel of rows of k weights; 0 for a format that is not among those above. */
INTERNAL long quantized_panel_bytes(int format, long k);

/* Packs rows [first, first + rows) of a weight that lies as in the file into a panel. Others of the panel are zeros. */
INTERNAL void pack_quantized(int format, const void *weight, long first, long rows, long k, void *panel);

/* out[m] = x[m] . panel^T for up to MOST_FEW_ROWS rows of x, k floats apart. For more it is faster to widen the weights
 * first. */
INTERNAL void tile_quantized(int format, const float *x, const void *panel, long k, float out[][WIDTH], long rows,
                             const Tuning *tuning);

INTERNAL int has_small_blocks(int format); /* of GROUP weights */

/* Weights [begin, begin + count) of the rows of a panel as float32: out[count][WIDTH]. Both are multiples of a block;
 * PART is one of every format's. `once`: see tuning.h. */
#define PART 256
INTERNAL void widen_quantized(int format, const void *panel, long begin, long count, float *out, int once);

#endif
