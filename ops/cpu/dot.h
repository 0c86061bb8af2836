/* Rows of bfloat16 by a panel of it, by AVX512-BF16: what the matrix unit does elsewhere. */
#ifndef DOT_H
#define DOT_H

#include "panel.h"

#if defined(__AVX512BF16__)

#include <immintrin.h>

/* Sums of so many rows are as many as the processor can have under way, and leave registers for the panel. */
#define DOT_ROWS 8

INLINE __m512bh load_pairs(const bf16 *p)
{
    __m512bh v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* sums[r] (+)= a[r] . b for DOT_ROWS rows, `stride` numbers apart, of `depth` numbers; b: [depth / 2][WIDTH][2], its
 * halves where these are. As much as b has is fetched from `ahead` on, unless it is null. */
INLINE void dot_rows(const bf16 *a, long stride, const bf16 *low_half, const bf16 *high_half, long depth, float *sums,
                     const bf16 *ahead, const int is_more)
{
    vec acc[DOT_ROWS][2];
    for (int r = 0; r < DOT_ROWS; r++)
        for (int half = 0; half < 2; half++)
            acc[r][half] = is_more ? load_f32(sums + r * WIDTH + half * LANES) : (vec){};
    for (long i = 0; i < depth; i += 2) {
        __m512bh low = load_pairs(low_half + i * WIDTH), high = load_pairs(high_half + i * WIDTH);
        if (ahead) {
            __builtin_prefetch(ahead + i * WIDTH, 0, 2);
            __builtin_prefetch(ahead + i * WIDTH + WIDTH, 0, 2);
        }
        for (int r = 0; r < DOT_ROWS; r++) {
            int32_t pair;
            memcpy(&pair, a + r * stride + i, sizeof pair);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = (vec)_mm512_dpbf16_ps((__m512)acc[r][0], x, low);
            acc[r][1] = (vec)_mm512_dpbf16_ps((__m512)acc[r][1], x, high);
        }
    }
    for (int r = 0; r < DOT_ROWS; r++)
        for (int half = 0; half < 2; half++) store(sums + r * WIDTH + half * LANES, acc[r][half]);
}

#endif
#endif
