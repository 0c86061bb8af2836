/* Reading a panel of quantised weights, which quantized.h describes. */
#ifndef QUANTIZED_PANEL_H
#define QUANTIZED_PANEL_H

#include "quantized.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

INLINE uvec load_words(const uint8_t *p)
{
    uvec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* float16 to float32, exactly: infinities, NaNs and numbers below the normal ones, too. */
INLINE vec load_f16(const uint8_t *p)
{
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
    hvec h;
    memcpy(&h, p, sizeof h);
    uvec bits = __builtin_convertvector(h, uvec);
    /* The biases of the exponents differ by 112; a product makes normal what was below the normal numbers. */
    vec value = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    uvec special = (uvec)((bits & 0x7c00) == 0x7c00) & 0x7f800000u;
    return (vec)((uvec)value | special | (bits & 0x8000) << 16);
#endif
}

/* Byte t of each word, signed. */
INLINE vec load_byte(const uint8_t *p, int t)
{ return __builtin_convertvector((ivec)(load_words(p) << (24 - 8 * t)) >> 24, vec); }

/* `bits` bits of the quants of quad q, in the bytes of a word. */
INLINE uvec load_bits(const uint8_t *plane, int q, const int bits)
{
    const int quads = 8 / bits; /* that share a word */
    uvec words = load_words(plane + q / quads * WORDS);
    return bits == 8 ? words : words >> (q % quads * bits) & 0x01010101u * ((1u << bits) - 1);
}

/* Of codes of e2m1 in the bytes of a word: 12 more than twice their numbers, which are 0, 1, 2, 3, 4, 6, 8, 12 and
 * their opposites. */
INLINE uvec e2m1_quants(uvec code)
{
    const uint32_t ones = 0x01010101u;
    uvec middle = code >> 1 & ones, high = code >> 2 & ones, sign = code >> 3 & ones, both = middle & high;
    uvec size = (code & ones) | (middle | high) << 1;
    size += size & ((high << 8) - high); /* all bits of a byte that is 1 */
    size += size & ((both << 8) - both);
    return size + ones * 12 - (size & ((sign << 8) - sign)) * 2;
}

INLINE uvec load_quad(const uint8_t *group, int q, const Format f)
{
    uvec quad = load_bits(group, q, f.low);
    if (f.is_e2m1) return e2m1_quants(quad);
    return f.high ? quad | load_bits(group + f.low * WORDS, q, f.high) << f.low : quad;
}

/* Asks for what lies 2048 bytes behind a group: with few rows of x, memory is what there is to wait for. */
INLINE void fetch_ahead(const uint8_t *group, const Format f, int once)
{
    const char *at = (const char *)group + 2048;
    const long begin = f.groups == 1 ? -head_bytes(f) : 0;
    if (once)
        for (long i = begin; i < group_bytes(f); i += 64) fetch(at + i, 1);
    else
        for (long i = begin; i < group_bytes(f); i += 64) fetch(at + i, 0);
}

/* The scale and the offset of the weights from `at` on in a block. */
typedef struct {
    vec scale, offset;
} Scale;

/* Of the lower rows of a panel (half 0) or of the upper ones (half 1). */
INLINE Scale load_scale(const uint8_t *block, int at, int half, const Format f)
{
    const uint8_t *words = block + (f.sign ? 2 : 1) * HALVES + half * WORDS / 2;
    int index = at / f.span;
    Scale s;
    const uint8_t *d = block + half * HALVES / 2;
    s.scale = f.is_e2m1 ? load_bf16((const bf16 *)d) : load_f16(d);
    if (f.groups > 1) s.scale *= load_byte(words + index / 4 * WORDS, index % 4);
    if (!f.sign) {
        s.offset = s.scale * (float)-f.zero;
        return s;
    }
    words += multiples(f) * WORDS;
    s.offset = load_f16(block + HALVES + half * HALVES / 2) * (float)f.sign;
    if (f.groups > 1) s.offset *= load_byte(words + index / 4 * WORDS, index % 4);
    return s;
}

/* Weight t of a quad. Its byte stays where it is, and the scale makes up for that, exactly; but in the last place a
 * byte would be the sign. */
INLINE vec widen_quant(uvec quad, int t, const Scale s)
{
    static const float unit[4] = {1.0f, 0x1p-8f, 0x1p-16f, 1.0f};
    ivec quant = (ivec)(t < 3 ? quad & (uint32_t)(0xff << 8 * t) : quad >> 24);
    return __builtin_convertvector(quant, vec) * (s.scale * unit[t]) + s.offset;
}

#endif
