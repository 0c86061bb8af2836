/* x is rounded to 8 bits in groups of 32 values with a scale each, as ggml does (its Q8_1), and multiplied with the
 * quants of a weight in integers, which is exact: the float32 scales and offsets of both follow once a group. */
#include "int8.h"

#include "quantized_panel.h"

typedef int8_t bytes __attribute__((vector_size(LANES)));

typedef struct {
    const float *x;
    Int8Group *y;
    long m, k;
} Rounding;

/* A largest value so small that 127 divided by it is no number counts as 0. A group with a NaN or an infinity is NaN as
 * a whole: its scale is. */
static void quantize_group(const float *x, Int8Group *y)
{
    enum { COUNT = GROUP / LANES };
    const uvec positive = (uvec){} + 0x7fffffffu;
    uvec most = {};
    vec v[COUNT];
    for (int i = 0; i < COUNT; i++) {
        v[i] = load_f32(x + i * LANES);
        uvec size = (uvec)v[i] & positive; /* bits of floats are in order, NaN last */
        uvec greater = (uvec)(size > most);
        most = (size & greater) | (most & ~greater);
    }
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = most[i] > bits ? most[i] : bits;
    float largest;
    memcpy(&largest, &bits, 4);
    int is_finite = bits < 0x7f800000u, is_zero = largest < 0x1p-119f;
    float inverse = is_finite && !is_zero ? 127.0f / largest : 0.0f;
    y->scale = !is_finite ? NAN : is_zero ? 0.0f : largest / 127.0f;
    ivec sums[2] = {};
    for (int i = 0; i < COUNT; i++) {
        vec scaled = v[i] * inverse;
        __asm__("" : "+m"(scaled)); /* no fused addition: processors with and without one shall round alike */
        vec rounded = scaled + 12582912.0f; /* 1.5 * 2^23: what is behind the point is rounded away */
        ivec quants = is_finite ? (ivec)rounded - 0x4b400000 : (ivec){};
        bytes narrow = __builtin_convertvector(quants, bytes);
        memcpy(y->quants + i * LANES, &narrow, sizeof narrow);
        sums[2 * i / COUNT] += quants;
    }
    for (int half = 0; half < 2; half++) {
        y->sums[half] = 0;
        for (int i = 0; i < LANES; i++) y->sums[half] += sums[half][i];
    }
}

static void quantize_row(const void *job, long row)
{
    const Rounding *r = job;
    const float *x = r->x + row * r->k;
    Int8Group *y = r->y + row;
    for (long i = 0; i < r->k; i += GROUP, x += GROUP, y += r->m) quantize_group(x, y);
}

void quantize_rows(Pool *pool, const float *x, Int8Group *y, long m, long k)
{
    Rounding rounding = {x, y, m, k};
    parallel(pool, quantize_row, &rounding, m);
}

INLINE int32_t word_of(const int8_t *x)
{
    int32_t w;
    memcpy(&w, x, 4);
    return w;
}

#if defined(__AVX512BW__)
typedef __m512i wide;
#define ALL_WORDS _mm512_set1_epi32
#elif defined(__AVX2__)
typedef __m256i wide;
#define ALL_WORDS _mm256_set1_epi32
#endif

/* dot_quads gives for each row `start` plus the sum of quant * x over `count` quads. */

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#if defined(__AVX512VNNI__)
#define ADD_PRODUCTS _mm512_dpbusd_epi32
#else
#define ADD_PRODUCTS _mm256_dpbusd_avx_epi32
#endif
#define SIGNED_BITS 0

INLINE ivec dot_quads(const uvec *quads, const int8_t *x, const int count, const int bits, int start)
{
    wide sum = ALL_WORDS(start);
    (void)bits;
    for (int q = 0; q < count; q++) sum = ADD_PRODUCTS(sum, (wide)quads[q], ALL_WORDS(word_of(x + 4 * q)));
    return (ivec)sum;
}

#elif defined(__AVX2__)

#if defined(__AVX512BW__)
#define MULTIPLY_PAIRS _mm512_maddubs_epi16
#define ADD_PAIRS _mm512_add_epi16
#define JOIN_PAIRS(pairs) _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))
#define SIZES _mm512_abs_epi8
#define WITH_SIGNS(x, signs) _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(signs), _mm512_setzero_si512(), x)
#else
#define MULTIPLY_PAIRS _mm256_maddubs_epi16
#define ADD_PAIRS _mm256_add_epi16
#define JOIN_PAIRS(pairs) _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
#define SIZES _mm256_abs_epi8
#define WITH_SIGNS _mm256_sign_epi8
#endif
#define SIGNED_BITS 8

/* Products of two neighbours are added up in 16 bits, where a quant of b bits gives at most 2 * (2^b - 1) * 127. Their
 * sum over 8 quads stays below 2^15 for 4 bits (30480), over 4 for 5 bits (31496), over 2 for 6 bits (32004). Of 8
 * bits, the size goes with x, which takes over the sign, as the instruction wants one factor without: 2 * 128 * 127 is
 * 32512. */
INLINE ivec dot_quads(const uvec *quads, const int8_t *x, const int count, const int bits, int start)
{
    const int run = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
    ivec sum = (ivec)ALL_WORDS(start);
    for (int q = 0; q < count; q += run) {
        wide pairs = {};
        for (int i = q; i < q + run && i < count; i++) {
            wide weights = (wide)quads[i], values = ALL_WORDS(word_of(x + 4 * i));
            if (bits == SIGNED_BITS) {
                values = WITH_SIGNS(values, weights);
                weights = SIZES(weights);
            }
            pairs = ADD_PAIRS(pairs, MULTIPLY_PAIRS(weights, values));
        }
        sum += (ivec)JOIN_PAIRS(pairs);
    }
    return sum;
}

#else

#define SIGNED_BITS 0

INLINE ivec dot_quads(const uvec *quads, const int8_t *x, const int count, const int bits, int start)
{
    ivec sum = (ivec){} + start;
    (void)bits;
    for (int q = 0; q < count; q++)
        for (int t = 0; t < 4; t++) sum += (ivec)(quads[q] << (24 - 8 * t) >> 24) * (int32_t)x[4 * q + t];
    return sum;
}

#endif

/* The weights of a span are unpacked once for all rows. */
INLINE void tile(const Int8Group *x, long stride, const uint8_t *panel, long k, float out[][WIDTH], long rows, int once,
                 const Format f)
{
    /* Quants of SIGNED_BITS are made signed. Of others, that of a weight of 0 is subtracted, times the sum of x. */
    const int bits = f.is_e2m1 ? 5 : f.low + f.high, is_signed = bits == SIGNED_BITS;
    const uint32_t signs = is_signed ? 0x80808080u : 0;
    memset(out, 0, rows * sizeof *out);
    for (; k > 0; k -= f.groups * GROUP, panel += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += f.span) {
            const uint8_t *group = panel + head_bytes(f) + at / GROUP * group_bytes(f);
            if (at % GROUP == 0) fetch_ahead(group, f, once);
            for (int half = 0; half < 2; half++) {
                const Scale s = load_scale(panel, at, half, f);
                uvec quads[GROUP / 4];
#pragma GCC unroll 8
                for (int q = 0; q < f.span / 4; q++)
                    quads[q] = load_quad(group + half * WORDS / 2, at % GROUP / 4 + q, f) ^ signs;
                for (long r = 0; r < rows; r++) {
                    float *sums = out[r] + half * LANES;
                    int total = f.span == GROUP ? x[r].sums[0] + x[r].sums[1] : x[r].sums[at / f.span % 2];
                    int start = is_signed ? 0 : -f.zero * total;
                    ivec dot = dot_quads(quads, x[r].quants + at % GROUP, f.span / 4, bits, start);
                    vec value = __builtin_convertvector(dot, vec) * (s.scale * x[r].scale);
                    if (f.sign) value += s.offset * (x[r].scale * (float)total);
                    store(sums, load_f32(sums) + value);
                }
            }
            if ((at + f.span) % GROUP == 0) x += stride;
        }
}

void tile_int8(int format, const Int8Group *x, long stride, const void *panel, long k, float out[][WIDTH], long rows,
               int once)
{
#define CASE(NUMBER, NAME, ...) \
    case NUMBER: tile(x, stride, panel, k, out, rows, once, (Format){__VA_ARGS__}); break;
    switch (format) {
        QUANTIZED_FORMATS(CASE)
    }
}
