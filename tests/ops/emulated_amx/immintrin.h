/* In the place of the compiler's: what the kernels use of AVX-512 and AMX in plain C, for processors without them.
 * Compiled with -D__AVX512F__ -D__F16C__ -D__AMX_BF16__, they are tested, and their accesses to memory checked, anywhere. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#include <stdint.h>
#include <string.h>

typedef struct { uint16_t at[16]; } __m256i;
typedef struct { uint16_t at[16]; } __m256bh;
typedef float __m512 __attribute__((vector_size(64)));
typedef uint32_t __m512i __attribute__((vector_size(64)));

static inline float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline __m512 _mm512_loadu_ps(const void *p) { __m512 v; memcpy(&v, p, 64); return v; }
static inline __m256i _mm256_loadu_si256(const void *p) { __m256i v; memcpy(&v, p, 32); return v; }

static inline __m256bh _mm512_cvtneps_pbh(__m512 x)
{
    __m256bh y;
    for (int i = 0; i < 16; i++) {
        float value = x[i];
        uint32_t bits;
        memcpy(&bits, &value, 4);
        y.at[i] = value != value ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    return y;
}

typedef __m512i __m512bh;
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower)
{
    __m256bh halves[2] = {_mm512_cvtneps_pbh(lower), _mm512_cvtneps_pbh(upper)};
    __m512bh y;
    memcpy(&y, halves, sizeof y);
    return y;
}
static inline __m512i _mm512_permutexvar_epi16(__m512i places, __m512i x)
{
    uint16_t at[32], from[32], to[32];
    memcpy(at, &places, 64);
    memcpy(from, &x, 64);
    for (int i = 0; i < 32; i++) to[i] = from[at[i] & 31];
    __m512i y;
    memcpy(&y, to, 64);
    return y;
}

static inline __m512 _mm512_max_ps(__m512 a, __m512 b)
{
    for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}

/* Less the whole number below (how = 1), and times 2 to that. */
static inline __m512 _mm512_reduce_ps(__m512 x, int how)
{
    for (int i = 0; i < 16; i++) x[i] = __builtin_isinf(x[i]) ? 0 : x[i] - __builtin_floorf(x[i]) + 0 * how;
    return x;
}
static inline __m512 _mm512_scalef_ps(__m512 a, __m512 b)
{
    for (int i = 0; i < 16; i++) {
        float whole = b[i] < -500 ? -500 : __builtin_floorf(b[i]);
        a[i] = b[i] == b[i] ? __builtin_ldexpf(a[i], whole) : b[i];
    }
    return a;
}

static inline __m512i _mm512_loadu_si512(const void *p) { __m512i v; memcpy(&v, p, 64); return v; }
static inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b)
{
    __m512i y;
    for (int i = 0; i < 16; i++) y[i] = index[i] & 16 ? b[index[i] & 15] : a[index[i] & 15];
    return y;
}

static inline __m512 _mm512_cvtph_ps(__m256i x)
{
    __m512 y;
    for (int i = 0; i < 16; i++) {
        uint32_t half = x.at[i], sign = (half & 0x8000) << 16, rest = half & 0x7fff;
        float size = from_bits(rest << 13) * 0x1p112f;
        y[i] = from_bits(sign | (rest >= 0x7c00 ? 0x7f800000 | rest << 13 : (union { float f; uint32_t u; }){size}.u));
    }
    return y;
}

/* Eight tiles of 16 rows of 64 bytes, of each thread. */
static _Thread_local unsigned char emulated_tile[8][16][64];

#define _tile_loadconfig(configuration) ((void)(configuration))
#define _tile_release() ((void)0)
#define _tile_zero(number) memset(emulated_tile[number], 0, sizeof emulated_tile[number])

static inline void _tile_loadd(int number, const void *p, long stride)
{
    for (int row = 0; row < 16; row++) memcpy(emulated_tile[number][row], (const char *)p + row * stride, 64);
}

#define _tile_stream_loadd _tile_loadd

static inline void _tile_stored(int number, void *p, long stride)
{
    for (int row = 0; row < 16; row++) memcpy((char *)p + row * stride, emulated_tile[number][row], 64);
}

/* sum[row][column] += of each k, and of both values in a word, x[row][k] * weight[k][column]. */
static inline void _tile_dpbf16ps(int sum, int x, int weight)
{
    for (int row = 0; row < 16; row++) {
        float sums[16];
        uint16_t values[32], weights[32];
        memcpy(sums, emulated_tile[sum][row], 64);
        memcpy(values, emulated_tile[x][row], 64);
        for (int k = 0; k < 16; k++) {
            memcpy(weights, emulated_tile[weight][k], 64);
            for (int column = 0; column < 16; column++)
                for (int i = 0; i < 2; i++)
                    sums[column] += from_bits((uint32_t)values[2 * k + i] << 16) *
                                    from_bits((uint32_t)weights[2 * column + i] << 16);
        }
        memcpy(emulated_tile[sum][row], sums, 64);
    }
}

#endif
