/* Vectors of as many floats as the processor's registers hold, by GCC's and Clang's vector types: one source for
 * AVX2, AVX-512, NEON and processors without any of them.
 *
 * Activations are float32; weights and the KV cache are float32 or bfloat16, widened in registers, so
 * that a bfloat16 model moves half the bytes also where the processor has no bfloat16 arithmetic.
 * Arrays are row-major and contiguous.
 */
#ifndef VECTORS_H
#define VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* LANES: floats a vector. VECTORS: registers there are. Clang and GCC make two of a wider type, so that a kernel
 * may be written for any width; these fit. */
#if defined(__AVX512F__)
#define LANES 16
#define VECTORS 32
#elif defined(__AVX__)
#define LANES 8
#define VECTORS 16
#else
#define LANES 4
#if defined(__aarch64__)
#define VECTORS 32
#else
#define VECTORS 16
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

INLINE vec load_f32(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* The first LANES numbers of p, or `count`, and zeros; and back. */
INLINE vec load_part(const float *p, long count)
{
    vec v = {};
    if (count >= LANES) return load_f32(p);
    if (count > 0) memcpy(&v, p, count * sizeof(float));
    return v;
}
INLINE void store_part(float *p, vec v, long count)
{
    if (count >= LANES) store(p, v);
    else if (count > 0) memcpy(p, &v, count * sizeof(float));
}

INLINE vec load_bf16(const bf16 *p)
{
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

/* PAIR elements from element i on. bfloat16 come as those at even places and those at odd places, the lower halves of
 * 32-bit words and the upper: one shift and one mask widen them. */
#define PAIR (2 * LANES)
INLINE void load_pair(const void *p, long i, const int is_bf16, vec *low, vec *high)
{
    if (is_bf16) {
        uvec words;
        memcpy(&words, (const bf16 *)p + i, sizeof words);
        *low = (vec)(words << 16);
        *high = (vec)(words & 0xffff0000u);
    } else {
        *low = load_f32((const float *)p + i);
        *high = load_f32((const float *)p + i + LANES);
    }
}

/* The larger of each two; of a NaN and a number the NaN. */
INLINE vec larger(vec a, vec b)
{
    ivec first = (a > b) | (a != a);
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

INLINE vec choose(ivec condition, vec a, vec b) { return (vec)(((ivec)a & condition) | ((ivec)b & ~condition)); }

INLINE float widen(bf16 h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest, ties to even; a NaN stays a NaN. */
INLINE bf16 narrow(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (bf16)((bits >> 16) | 64);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The same of LANES numbers. */
INLINE void store_bf16(bf16 *p, vec x)
{
    uvec bits = (uvec)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = (uvec)(x != x);
    hvec h = __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 64) & nan), hvec);
    memcpy(p, &h, sizeof h);
}

#if defined(__clang__)
#define SHUFFLE_EACH(a, b, at) shuffle(a, b, at)
INLINE vec shuffle(vec a, vec b, ivec at)
{
    vec y;
    for (int i = 0; i < LANES; i++) y[i] = at[i] < LANES ? a[at[i]] : b[at[i] - LANES];
    return y;
}
#else
#define SHUFFLE_EACH(a, b, at) __builtin_shuffle(a, b, at)
#endif

/* Lanes `step` apart exchanged. */
INLINE vec swap_runs(vec a, const int step)
{
    ivec at;
    for (int i = 0; i < LANES; i++) at[i] = i ^ step;
    return SHUFFLE_EACH(a, a, at);
}

INLINE float sum(vec a)
{
    if (LANES > 8) a += swap_runs(a, 8 % LANES);
    if (LANES > 4) a += swap_runs(a, 4 % LANES);
    a += swap_runs(a, 2);
    a += swap_runs(a, 1);
    return a[0];
}

/* A NaN if there is one. */
INLINE float largest(vec a)
{
    if (LANES > 8) a = larger(a, swap_runs(a, 8 % LANES));
    if (LANES > 4) a = larger(a, swap_runs(a, 4 % LANES));
    a = larger(a, swap_runs(a, 2));
    return larger(a, swap_runs(a, 1))[0];
}

INLINE int any(ivec condition)
{
    uint64_t words[sizeof condition / 8], found = 0;
    memcpy(words, &condition, sizeof words);
    for (unsigned i = 0; i < sizeof words / 8; i++) found |= words[i];
    return found != 0;
}

/* Of each pair of neighbouring runs of `step` lanes the sum: of a in the lower run, of b in the upper. With steps 1, 2,
 * 4 and so on, LANES vectors become one of their sums. */
INLINE vec add_runs(vec a, vec b, const int step)
{
    ivec first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i & step ? LANES + i - step : i;
        second[i] = i & step ? LANES + i : i + step;
    }
    return SHUFFLE_EACH(a, b, first) + SHUFFLE_EACH(a, b, second);
}

/* e^x: 2^n times a polynomial in the rest (degree 6, relative error below 2e-7). Arguments below -87
 * give 0, which is what a masked score wants; NaN stays NaN. */
INLINE vec vexp(vec x)
{
    const vec low = (vec){} - 87.0f, high = (vec){} + 88.0f;
    ivec under = x < low;
    ivec over = x > high;
    vec t = x * 1.44269504088896341f;
    vec n = (t + 12582912.0f) - 12582912.0f; /* round to an integer */
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec result = p * (vec)exponent;
    ivec finite = ~under & ~over;
    vec huge = (vec){} + INFINITY;
    ivec bits = ((ivec)result & finite) | ((ivec)huge & over);
    ivec nan = x != x;
    return (vec)((bits & ~nan) | ((ivec)x & nan));
}

/* 2^x for x up to 127, of the same precision; below -126 it is 0, NaN stays NaN. */
INLINE vec vexp2(vec x)
{
    const vec low = (vec){} - 126.0f;
    ivec under = x < low;
    vec shifted = x + 12582912.0f; /* whose lowest bits are x, rounded to an integer */
    vec r = x - (shifted - 12582912.0f);
    vec p = r * 1.535336e-4f + 1.3398875e-3f;
    p = p * r + 9.618437e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.931472e-1f;
    p = p * r + 1.0f;
    uvec exponent = ((uvec)shifted << 23) + 0x3f800000u;
    return (vec)((ivec)(p * (vec)exponent) & ~under);
}

#endif
