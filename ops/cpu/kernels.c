/* The operators of a decode step on a CPU: few rows, so every one of them is bound by memory.
 *
 * Plain C with GCC/Clang vector types, compiled for the machine it runs on (AVX2, AVX-512, NEON, ...).
 * Activations are float32; weights and the KV cache are float32 or bfloat16, widened in registers, so
 * that a bfloat16 model moves half the bytes also where the processor has no bfloat16 arithmetic.
 * Arrays are row-major and contiguous. Work is handed to OpenMP threads in small pieces on demand: with
 * another process on one of the cores, the thread there simply takes fewer pieces.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

typedef uint16_t bf16;

/* ---- vectors ------------------------------------------------------------------------------------ */

INLINE vec load_f32(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec load_bf16(const bf16 *p)
{
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

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

INLINE float sum(vec v)
{
    float total = 0;
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    total += v[0];
    return total;
}

/* e^x: 2^n times a polynomial in the rest (degree 6, relative error below 2e-7). Arguments below -87
 * give 0, which is what a masked score wants; NaN stays NaN. */
INLINE vec vexp(vec x)
{
    const vec low = (vec){} - 87.0f, high = (vec){} + 88.0f;
    ivec under = x < low, over = x > high;
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

/* ---- matrix products of a few rows ------------------------------------------------------------------ */

#define ROWS 8        /* rows of x that share one pass over the weights */
#define PIECE 32      /* weight rows a thread takes at a time */

/* y[m, n..n+R) for R rows of the weight and M rows of x: each weight is loaded once for all M. */
#define DEFINE_DOTS(NAME, TYPE, LOAD, SCALAR)                                                               \
    INLINE void NAME(const float *x, const TYPE *w, float *y, long k, long ldy, const int M, const int R)   \
    {                                                                                                       \
        vec acc[ROWS][4];                                                                                   \
        for (int m = 0; m < M; m++)                                                                         \
            for (int r = 0; r < R; r++) acc[m][r] = (vec){};                                                \
        long i = 0;                                                                                         \
        for (; i + LANES <= k; i += LANES) {                                                                \
            vec wv[4];                                                                                      \
            for (int r = 0; r < R; r++) wv[r] = LOAD(w + r * k + i);                                        \
            for (int m = 0; m < M; m++) {                                                                   \
                vec xv = load_f32(x + m * k + i);                                                           \
                for (int r = 0; r < R; r++) acc[m][r] += wv[r] * xv;                                        \
            }                                                                                               \
        }                                                                                                   \
        for (int m = 0; m < M; m++)                                                                         \
            for (int r = 0; r < R; r++) {                                                                   \
                float total = sum(acc[m][r]);                                                               \
                for (long j = i; j < k; j++) total += SCALAR(w[r * k + j]) * x[m * k + j];                  \
                y[m * ldy + r] = total;                                                                     \
            }                                                                                               \
    }

#define AS_IS(v) (v)
DEFINE_DOTS(dots_f32, float, load_f32, AS_IS)
DEFINE_DOTS(dots_bf16, bf16, load_bf16, widen)

/* All M rows of x against weight rows [begin, end). The constants let the compiler keep acc in registers:
 * 1 x 4 dots when x has one row (four streams from memory at once), else up to 4 x 2. */
#define DEFINE_PANEL(NAME, TYPE, DOTS)                                                                      \
    static void NAME(const float *x, const TYPE *w, float *y, long m, long n, long k, long begin, long end) \
    {                                                                                                       \
        long r = begin;                                                                                     \
        if (m == 1) {                                                                                       \
            for (; r + 4 <= end; r += 4) DOTS(x, w + r * k, y + r, k, n, 1, 4);                             \
            for (; r < end; r++) DOTS(x, w + r * k, y + r, k, n, 1, 1);                                     \
            return;                                                                                         \
        }                                                                                                   \
        for (; r < end; r += 2) {                                                                           \
            const TYPE *rows = w + r * k;                                                                   \
            int two = r + 2 <= end;                                                                         \
            for (long i = 0; i < m; i += 4) {                                                               \
                const float *xi = x + i * k;                                                                \
                float *yi = y + i * n + r;                                                                  \
                switch ((m - i < 4 ? m - i : 4) * 2 + two) {                                                \
                case 2: DOTS(xi, rows, yi, k, n, 1, 1); break;                                              \
                case 3: DOTS(xi, rows, yi, k, n, 1, 2); break;                                              \
                case 4: DOTS(xi, rows, yi, k, n, 2, 1); break;                                              \
                case 5: DOTS(xi, rows, yi, k, n, 2, 2); break;                                              \
                case 6: DOTS(xi, rows, yi, k, n, 3, 1); break;                                              \
                case 7: DOTS(xi, rows, yi, k, n, 3, 2); break;                                              \
                case 8: DOTS(xi, rows, yi, k, n, 4, 1); break;                                              \
                case 9: DOTS(xi, rows, yi, k, n, 4, 2); break;                                              \
                }                                                                                           \
            }                                                                                               \
        }                                                                                                   \
    }

DEFINE_PANEL(panel_f32, float, dots_f32)
DEFINE_PANEL(panel_bf16, bf16, dots_bf16)

/* y[m, n] = x[m, k] . w[n, k]^T + bias[n] + residual[m, n]; bias and residual may be null. */
void linear(const float *x, const void *w, const float *bias, const float *residual, float *y, long m, long n,
            long k, int is_bf16)
{
    long pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(dynamic, 1)
    for (long piece = 0; piece < pieces; piece++) {
        long begin = piece * PIECE, end = begin + PIECE < n ? begin + PIECE : n;
        if (is_bf16) panel_bf16(x, w, y, m, n, k, begin, end);
        else panel_f32(x, w, y, m, n, k, begin, end);
        for (long i = 0; i < m; i++)
            for (long r = begin; r < end; r++) {
                if (bias) y[i * n + r] += bias[r];
                if (residual) y[i * n + r] += residual[i * n + r];
            }
    }
}

/* ---- norms, rotary embedding, activation -------------------------------------------------------------- */

INLINE void norm_row(const float *x, const float *weight, float *y, long d, float eps)
{
    vec acc = {};
    float total = 0;
    long i = 0;
    for (; i + LANES <= d; i += LANES) { vec v = load_f32(x + i); acc += v * v; }
    for (; i < d; i++) total += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum(acc) + total) / d + eps);
    for (i = 0; i + LANES <= d; i += LANES) store(y + i, load_f32(x + i) * scale * load_f32(weight + i));
    for (; i < d; i++) y[i] = x[i] * scale * weight[i];
}

/* Root-mean-square norm of each of n rows of d (arXiv:1910.07467). y may be x. */
void rms_norm(const float *x, const float *weight, float *y, long n, long d, float eps)
{
#pragma omp parallel for if (n * d > 32768)
    for (long row = 0; row < n; row++) norm_row(x + row * d, weight, y + row * d, d, eps);
}

/* silu(gate) * up; x: [n, 2i], gate before up -> y: [n, i] (arXiv:2002.05202). */
void silu_and_mul(const float *x, float *y, long n, long width)
{
#pragma omp parallel for if (n * width > 16384)
    for (long row = 0; row < n; row++) {
        const float *gate = x + row * 2 * width, *up = gate + width;
        float *out = y + row * width;
        long i = 0;
        for (; i + LANES <= width; i += LANES) {
            vec g = load_f32(gate + i);
            store(out + i, g / (1.0f + vexp(-g)) * load_f32(up + i));
        }
        for (; i < width; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* The paged cache of one layer: [2 * kv_heads, blocks * block_size, d], keys of all heads before values. */
typedef struct {
    void *data;
    long num_slots;
    long block_size;
    int is_bf16;
} Cache;

INLINE void put(const Cache *cache, long head, long slot, const float *x, long d)
{
    long at = (head * cache->num_slots + slot) * d;
    if (cache->is_bf16)
        for (long i = 0; i < d; i++) ((bf16 *)cache->data)[at + i] = narrow(x[i]);
    else
        memcpy((float *)cache->data + at, x, d * sizeof(float));
}

/* Rotates qk: [n, heads + kv_heads, d] in place by cos and sin: [positions, d] (sin negated in its first
 * half), then puts k and v: [n, kv_heads, d] into their slots. Strides are from token to token, in floats. */
void rotate_and_cache(float *qk, long qk_stride, const float *v, long v_stride, const float *cos, const float *sin,
                      const int64_t *positions, const int64_t *slots, long n, long heads, long kv_heads, long d,
                      const Cache *cache)
{
#pragma omp parallel for if (n > 16)
    for (long token = 0; token < n; token++) {
        float *row = qk + token * qk_stride;
        const float *c = cos + positions[token] * d, *s = sin + positions[token] * d;
        for (long head = 0; head < heads + kv_heads; head++) {
            float *x = row + head * d;
            for (long i = 0; i < d / 2; i++) {
                float a = x[i], b = x[i + d / 2];
                x[i] = a * c[i] + b * s[i];
                x[i + d / 2] = b * c[i + d / 2] + a * s[i + d / 2];
            }
        }
        for (long head = 0; head < kv_heads; head++) {
            put(cache, head, slots[token], row + (heads + head) * d, d);
            put(cache, kv_heads + head, slots[token], v + token * v_stride + head * d, d);
        }
    }
}

/* ---- decode attention over the block table -------------------------------------------------------------- */

#define CHUNK 256     /* tokens of one sequence that a thread takes at a time */

#define DEFINE_DOT(NAME, TYPE, LOAD, SCALAR)                                                                \
    INLINE float NAME(const float *q, const TYPE *k, long d)                                                \
    {                                                                                                       \
        vec acc = {};                                                                                       \
        long i = 0;                                                                                         \
        for (; i + LANES <= d; i += LANES) acc += load_f32(q + i) * LOAD(k + i);                            \
        float total = sum(acc);                                                                             \
        for (; i < d; i++) total += q[i] * SCALAR(k[i]);                                                    \
        return total;                                                                                       \
    }                                                                                                       \
    INLINE void NAME##_axpy(float weight, const TYPE *v, float *out, long d)                                \
    {                                                                                                       \
        long i = 0;                                                                                         \
        for (; i + LANES <= d; i += LANES) store(out + i, load_f32(out + i) + weight * LOAD(v + i));        \
        for (; i < d; i++) out[i] += weight * SCALAR(v[i]);                                                 \
    }

DEFINE_DOT(dot_f32, float, load_f32, AS_IS)
DEFINE_DOT(dot_bf16, bf16, load_bf16, widen)

/* One query head against tokens [begin, end) of a sequence: out = sum of weights * v, not normalised;
 * returns the maximum score and the sum of the weights through `top` and `total`. */
INLINE void attend(const float *q, const Cache *cache, const int64_t *blocks, long head, long kv_heads, long begin,
                   long end, long d, float scale, float *out, float *top, float *total)
{
    float score[CHUNK + LANES];
    float best = -INFINITY;
    long size = cache->block_size, count = end - begin;
    for (long t = begin; t < end; t++) {
        long slot = blocks[t / size] * size + t % size;
        long at = (head * cache->num_slots + slot) * d;
        float s = scale * (cache->is_bf16 ? dot_bf16(q, (const bf16 *)cache->data + at, d)
                                          : dot_f32(q, (const float *)cache->data + at, d));
        score[t - begin] = s;
        best = s > best || s != s ? s : best;
    }
    for (long i = count; i < count + LANES; i++) score[i] = -INFINITY;
    vec weights = {};
    for (long i = 0; i < count; i += LANES) {
        vec e = vexp(load_f32(score + i) - best);
        store(score + i, e);
        weights += e;
    }
    memset(out, 0, d * sizeof(float));
    for (long t = begin; t < end; t++) {
        long slot = blocks[t / size] * size + t % size;
        long at = ((kv_heads + head) * cache->num_slots + slot) * d;
        if (cache->is_bf16) dot_bf16_axpy(score[t - begin], (const bf16 *)cache->data + at, out, d);
        else dot_f32_axpy(score[t - begin], (const float *)cache->data + at, out, d);
    }
    *top = best;
    *total = sum(weights);
}

/* Floats of scratch that `decode_attention` needs. */
long decode_scratch(long batch, long heads, long d, long max_len)
{
    return batch * heads * ((max_len + CHUNK - 1) / CHUNK) * (d + 2);
}

/* One query a sequence. q: [batch, heads, d], rotated, its rows `stride` floats apart; blocks: [batch, width];
 * lens: [batch], tokens to attend to, the new one included; window: only the last so many, or 0 for all
 * -> out: [batch, heads * d]. A sequence is split among threads and the parts are merged by their maxima
 * (Flash-Decoding, Dao et al., 2023). */
void decode_attention(const float *q, long stride, const Cache *cache, const int64_t *blocks, const int64_t *lens,
                      float *out, float *scratch, long batch, long heads, long kv_heads, long d, long width,
                      long max_len, long window, float scale)
{
    long chunks = (max_len + CHUNK - 1) / CHUNK, part = d + 2, group = heads / kv_heads;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (long job = 0; job < batch * kv_heads * chunks; job++) {
            long chunk = job % chunks, head = job / chunks % kv_heads, row = job / chunks / kv_heads;
            long first = window && lens[row] > window ? lens[row] - window : 0;
            long begin = chunk * CHUNK > first ? chunk * CHUNK : first;
            long end = (chunk + 1) * CHUNK < lens[row] ? (chunk + 1) * CHUNK : lens[row];
            /* The query heads of a group read the same keys and values, from cache after the first. */
            for (long h = head * group; h < (head + 1) * group; h++) {
                float *at = scratch + ((row * heads + h) * chunks + chunk) * part;
                at[d] = -INFINITY;
                if (begin < end)
                    attend(q + row * stride + h * d, cache, blocks + row * width, head, kv_heads, begin, end, d,
                           scale, at, at + d, at + d + 1);
            }
        }
#pragma omp for
        for (long job = 0; job < batch * heads; job++) {
            const float *parts = scratch + job * chunks * part;
            float *result = out + job * d, best = -INFINITY, total = 0;
            for (long c = 0; c < chunks; c++) {
                float top = parts[c * part + d];
                best = top > best || top != top ? top : best;
            }
            memset(result, 0, d * sizeof(float));
            for (long c = 0; c < chunks; c++) {
                const float *p = parts + c * part;
                if (p[d] == -INFINITY) continue;
                float factor = expf(p[d] - best);
                total += factor * p[d + 1];
                dot_f32_axpy(factor, p, result, d);
            }
            for (long i = 0; i < d; i++) result[i] /= total;
        }
    }
}
