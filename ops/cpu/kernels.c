/* The operators of a decode step on a CPU: few rows, so every one of them is bound by memory.
 *
 * Plain C with GCC/Clang vector types, compiled for the machine it runs on (AVX2, AVX-512, NEON, ...).
 * Activations are float32; weights and the KV cache are float32 or bfloat16, widened in registers, so
 * that a bfloat16 model moves half the bytes also where the processor has no bfloat16 arithmetic.
 * Arrays are row-major and contiguous.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
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

typedef float vec4 __attribute__((vector_size(16)));
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
    vec4 parts[LANES / 4];
    memcpy(parts, &v, sizeof v);
#if LANES == 16
    parts[0] += parts[2];
    parts[1] += parts[3];
#endif
    vec4 s = parts[0] + parts[1];
    return (s[0] + s[2]) + (s[1] + s[3]);
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

/* ---- threads -------------------------------------------------------------------------------------- */

/* An operator is cut into pieces that threads take one by one. The caller takes pieces, too, and waits only
 * for pieces that somebody has taken: a thread that another process keeps from running takes none, and
 * costs nothing. (OpenMP's barrier waits for every thread to arrive.) Who waits spins for longer than a
 * piece takes, or the next operator takes to come, and then sleeps.
 *
 * A piece takes microseconds. If one lasts longer than a spin, its thread has lost its core to another
 * process for milliseconds, and that will happen again: the caller then works alone for a while, twice as
 * long each time, before it tries again. A busy neighbour thus costs one core, not the speed of both. */

#define SPINS 3000          /* some 0.1 ms */
#define SHORTEST_ALONE 16   /* operators */
#define LONGEST_ALONE 4096  /* about a second */

typedef void (*Piece)(const void *job, long index);

typedef struct {
    _Atomic uint64_t ticket; /* generation << 48 | pieces << 24 | next piece: taken by compare-and-swap, so
                                that nobody takes a piece of a job that is over */
    _Atomic uint64_t done;   /* finished pieces of this generation */
    _Atomic int sleepers, caller_sleeps, quit;
    Piece run;               /* these two are stable while a piece of their generation is taken */
    const void *job;
    int alone, penalty;      /* the caller's: operators still to do alone; how many after the next delay */
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    int num_workers;
    pthread_t workers[];
} Pool;

#define MAX_PIECES ((1L << 24) - 1)
#define NEXT(ticket) ((ticket) & MAX_PIECES)
#define PIECES(ticket) ((ticket) >> 24 & MAX_PIECES)

INLINE void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes and runs pieces until none is left to take. */
static void help(Pool *pool)
{
    uint64_t ticket = atomic_load(&pool->ticket);
    while (NEXT(ticket) < PIECES(ticket)) {
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        pool->run(pool->job, (long)NEXT(ticket));
        if (atomic_fetch_add(&pool->done, 1) + 1 == PIECES(ticket) && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->lock);
        }
        ticket = atomic_load(&pool->ticket);
    }
}

static void *worker(void *argument)
{
    Pool *pool = argument;
    while (!atomic_load(&pool->quit)) {
        uint64_t seen = atomic_load(&pool->ticket);
        int spins = 0;
        while (NEXT(seen) >= PIECES(seen) && spins++ < SPINS) {
            relax();
            seen = atomic_load_explicit(&pool->ticket, memory_order_relaxed);
        }
        if (NEXT(seen) >= PIECES(seen)) {
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (atomic_load(&pool->ticket) == seen && !atomic_load(&pool->quit))
                pthread_cond_wait(&pool->work, &pool->lock);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->lock);
        }
        help(pool);
    }
    return NULL;
}

/* A pool of `threads` threads, the caller's own counted. Null if there is no memory. */
Pool *pool_new(int threads)
{
    Pool *pool = calloc(1, sizeof(Pool) + threads * sizeof(pthread_t));
    if (!pool) return NULL;
    pool->penalty = SHORTEST_ALONE;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (int i = 0; i < threads - 1; i++)
        if (!pthread_create(&pool->workers[pool->num_workers], NULL, worker, pool)) pool->num_workers++;
    return pool;
}

void pool_free(Pool *pool)
{
    atomic_store(&pool->quit, 1);
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->num_workers; i++) pthread_join(pool->workers[i], NULL);
    free(pool);
}

/* run(job, i) for every i below `pieces`, on all threads; returns when all are done. */
static void parallel(Pool *pool, Piece run, const void *job, long pieces)
{
    if (pieces <= 1 || pool->num_workers == 0 || pieces > MAX_PIECES || pool->alone > 0) {
        if (pieces > 1 && pool->alone > 0) pool->alone--;
        for (long i = 0; i < pieces; i++) run(job, i);
        return;
    }
    pool->run = run;
    pool->job = job;
    atomic_store(&pool->done, 0);
    uint64_t generation = (atomic_load(&pool->ticket) >> 48) + 1;
    atomic_store(&pool->ticket, generation << 48 | (uint64_t)pieces << 24);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }
    help(pool);
    for (int spins = 0; atomic_load(&pool->done) < (uint64_t)pieces && spins < SPINS; spins++) relax();
    if (atomic_load(&pool->done) == (uint64_t)pieces) {
        pool->penalty -= (pool->penalty - SHORTEST_ALONE + 31) / 32; /* forgotten within a step */
    } else {
        pool->alone = pool->penalty;
        pool->penalty = 2 * pool->penalty < LONGEST_ALONE ? 2 * pool->penalty : LONGEST_ALONE;
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->caller_sleeps, 1);
        while (atomic_load(&pool->done) < (uint64_t)pieces) pthread_cond_wait(&pool->finished, &pool->lock);
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->lock);
    }
}

/* ---- matrix products of a few rows ------------------------------------------------------------------ */

#define PIECE 32      /* weight rows a thread takes at a time */
#define AHEAD 1024    /* bytes by which a weight is fetched before it is used */

/* y[m] = x[m] . w for M rows of x (k floats apart; the results ldy apart) and one row of the weight, which
 * is read once, as one sequential stream: several streams at a time reach half the bandwidth. U partial
 * sums a dot keep the additions from waiting for each other; M * U of them fit the registers. */
#define DEFINE_DOTS(NAME, TYPE, LOAD, SCALAR)                                                               \
    INLINE void NAME(const float *x, const TYPE *w, float *y, long k, long ldy, const int M, const int U)   \
    {                                                                                                       \
        vec acc[8][4];                                                                                      \
        for (int m = 0; m < M; m++)                                                                         \
            for (int u = 0; u < U; u++) acc[m][u] = (vec){};                                                \
        long i = 0;                                                                                         \
        for (; i + U * LANES <= k; i += U * LANES) {                                                        \
            __builtin_prefetch((const char *)(w + i) + AHEAD);                                              \
            for (int u = 0; u < U; u++) {                                                                   \
                vec wv = LOAD(w + i + u * LANES);                                                           \
                for (int m = 0; m < M; m++) acc[m][u] += wv * load_f32(x + m * k + i + u * LANES);          \
            }                                                                                               \
        }                                                                                                   \
        for (; i + LANES <= k; i += LANES)                                                                  \
            for (int m = 0; m < M; m++) acc[m][0] += LOAD(w + i) * load_f32(x + m * k + i);                 \
        for (int m = 0; m < M; m++) {                                                                       \
            for (int u = 1; u < U; u++) acc[m][0] += acc[m][u];                                             \
            float total = sum(acc[m][0]);                                                                   \
            for (long j = i; j < k; j++) total += SCALAR(w[j]) * x[m * k + j];                              \
            y[m * ldy] = total;                                                                             \
        }                                                                                                   \
    }                                                                                                       \
    /* All m rows of x against weight rows [begin, end). */                                                 \
    static void NAME##_panel(const float *x, const TYPE *w, float *y, long m, long n, long k, long begin,   \
                             long end)                                                                      \
    {                                                                                                       \
        for (long r = begin; r < end; r++)                                                                  \
            for (long i = 0; i < m; i += 8) {                                                               \
                const TYPE *row = w + r * k;                                                                \
                const float *xi = x + i * k;                                                                \
                float *yi = y + i * n + r;                                                                  \
                switch (m - i < 8 ? m - i : 8) {                                                            \
                case 1: NAME(xi, row, yi, k, n, 1, 4); break;                                               \
                case 2: NAME(xi, row, yi, k, n, 2, 4); break;                                               \
                case 3: NAME(xi, row, yi, k, n, 3, 2); break;                                               \
                case 4: NAME(xi, row, yi, k, n, 4, 2); break;                                               \
                case 5: NAME(xi, row, yi, k, n, 5, 1); break;                                               \
                case 6: NAME(xi, row, yi, k, n, 6, 1); break;                                               \
                case 7: NAME(xi, row, yi, k, n, 7, 1); break;                                               \
                case 8: NAME(xi, row, yi, k, n, 8, 1); break;                                               \
                }                                                                                           \
            }                                                                                               \
    }

#define AS_IS(v) (v)
DEFINE_DOTS(dots_f32, float, load_f32, AS_IS)
DEFINE_DOTS(dots_bf16, bf16, load_bf16, widen)

typedef struct {
    const float *x, *bias, *residual;
    const void *w;
    float *y;
    long m, n, k;
    int is_bf16;
} Linear;

static void linear_piece(const void *job, long piece)
{
    const Linear *a = job;
    long begin = piece * PIECE, end = begin + PIECE < a->n ? begin + PIECE : a->n;
    if (a->is_bf16) dots_bf16_panel(a->x, a->w, a->y, a->m, a->n, a->k, begin, end);
    else dots_f32_panel(a->x, a->w, a->y, a->m, a->n, a->k, begin, end);
    for (long i = 0; i < a->m; i++)
        for (long r = begin; r < end; r++) {
            if (a->bias) a->y[i * a->n + r] += a->bias[r];
            if (a->residual) a->y[i * a->n + r] += a->residual[i * a->n + r];
        }
}

/* y[m, n] = x[m, k] . w[n, k]^T + bias[n] + residual[m, n]; bias and residual may be null. */
void linear(Pool *pool, const float *x, const void *w, const float *bias, const float *residual, float *y, long m,
            long n, long k, int is_bf16)
{
    Linear job = {x, bias, residual, w, y, m, n, k, is_bf16};
    parallel(pool, linear_piece, &job, (n + PIECE - 1) / PIECE);
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

#define ROWS 16       /* rows of an elementwise operator that a thread takes at a time */

typedef struct {
    const float *x, *weight;
    float *y;
    long n, d;
    float eps;
} Norm;

static void norm_piece(const void *job, long piece)
{
    const Norm *a = job;
    long end = (piece + 1) * ROWS < a->n ? (piece + 1) * ROWS : a->n;
    for (long row = piece * ROWS; row < end; row++)
        norm_row(a->x + row * a->d, a->weight, a->y + row * a->d, a->d, a->eps);
}

/* Root-mean-square norm of each of n rows of d (arXiv:1910.07467). y may be x. */
void rms_norm(Pool *pool, const float *x, const float *weight, float *y, long n, long d, float eps)
{
    Norm job = {x, weight, y, n, d, eps};
    parallel(pool, norm_piece, &job, (n + ROWS - 1) / ROWS);
}

typedef struct {
    const float *x;
    float *y;
    long n, width;
} Silu;

static void silu_piece(const void *job, long piece)
{
    const Silu *a = job;
    long end = (piece + 1) * ROWS < a->n ? (piece + 1) * ROWS : a->n;
    for (long row = piece * ROWS; row < end; row++) {
        const float *gate = a->x + row * 2 * a->width, *up = gate + a->width;
        float *out = a->y + row * a->width;
        long i = 0;
        for (; i + LANES <= a->width; i += LANES) {
            vec g = load_f32(gate + i);
            store(out + i, g / (1.0f + vexp(-g)) * load_f32(up + i));
        }
        for (; i < a->width; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* silu(gate) * up; x: [n, 2 * width], gate before up -> y: [n, width] (arXiv:2002.05202). */
void silu_and_mul(Pool *pool, const float *x, float *y, long n, long width)
{
    Silu job = {x, y, n, width};
    parallel(pool, silu_piece, &job, (n + ROWS - 1) / ROWS);
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

typedef struct {
    float *qkv;
    const float *q_norm, *k_norm, *cos, *sin;
    const int64_t *positions, *slots;
    float eps;
    long n, heads, kv_heads, d;
    const Cache *cache;
} Rotate;

static void rotate_piece(const void *job, long piece)
{
    const Rotate *a = job;
    long d = a->d, end = (piece + 1) * ROWS < a->n ? (piece + 1) * ROWS : a->n;
    for (long token = piece * ROWS; token < end; token++) {
        float *row = a->qkv + token * (a->heads + 2 * a->kv_heads) * d;
        const float *c = a->cos + a->positions[token] * d, *s = a->sin + a->positions[token] * d;
        for (long head = 0; head < a->heads + a->kv_heads; head++) {
            float *x = row + head * d;
            if (a->q_norm) norm_row(x, head < a->heads ? a->q_norm : a->k_norm, x, d, a->eps);
            for (long i = 0; i < d / 2; i++) {
                float p = x[i], q = x[i + d / 2];
                x[i] = p * c[i] + q * s[i];
                x[i + d / 2] = q * c[i + d / 2] + p * s[i + d / 2];
            }
        }
        for (long head = 0; head < a->kv_heads; head++) {
            put(a->cache, head, a->slots[token], row + (a->heads + head) * d, d);
            put(a->cache, a->kv_heads + head, a->slots[token], row + (a->heads + a->kv_heads + head) * d, d);
        }
    }
}

/* Normalises each head of q and k by q_norm and k_norm: [d] (null for none), and rotates it by cos and sin:
 * [positions, d] (sin negated in its first half), in place in qkv: [n, heads + 2 * kv_heads, d], then puts k
 * and v into their slots. */
void rotate_and_cache(Pool *pool, float *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos,
                      const float *sin, const int64_t *positions, const int64_t *slots, long n, long heads,
                      long kv_heads, long d, const Cache *cache)
{
    Rotate job = {qkv, q_norm, k_norm, cos, sin, positions, slots, eps, n, heads, kv_heads, d, cache};
    parallel(pool, rotate_piece, &job, (n + ROWS - 1) / ROWS);
}

/* ---- decode attention over the block table -------------------------------------------------------------- */

#define CHUNK 256     /* tokens of one sequence that a thread takes at a time */

#define GROUP 4       /* query heads of one KV head that share a pass over its keys and values */
#define SPAN 4        /* vectors of the output kept in registers for each of them */

/* Keys: score[g][t] = scale * q[g] . k[t] for G queries, d floats apart. Values: out[g] = sum over t of
 * weight[g][t] * v[t]. Each key and value is loaded and widened once for all G. */
#define DEFINE_ATTEND(NAME, TYPE, LOAD, SCALAR)                                                             \
    INLINE void NAME##_scores(const float *q, const TYPE *keys, const int64_t *blocks, long size, long begin, \
                              long end, long d, float scale, float score[][CHUNK + LANES], const int G)     \
    {                                                                                                       \
        for (long t = begin; t < end; t++) {                                                                \
            const TYPE *k = keys + (blocks[t / size] * size + t % size) * d;                                \
            vec acc[GROUP];                                                                                 \
            for (int g = 0; g < G; g++) acc[g] = (vec){};                                                   \
            long i = 0;                                                                                     \
            for (; i + LANES <= d; i += LANES) {                                                            \
                vec kv = LOAD(k + i);                                                                       \
                for (int g = 0; g < G; g++) acc[g] += load_f32(q + g * d + i) * kv;                         \
            }                                                                                               \
            for (int g = 0; g < G; g++) {                                                                   \
                float total = sum(acc[g]);                                                                  \
                for (long r = i; r < d; r++) total += q[g * d + r] * SCALAR(k[r]);                          \
                score[g][t - begin] = scale * total;                                                        \
            }                                                                                               \
        }                                                                                                   \
    }                                                                                                       \
    INLINE void NAME##_span(float weight[][CHUNK + LANES], const TYPE *values, const int64_t *blocks,       \
                            long size, long begin, long end, long d, float *out, long stride, const int G,  \
                            const int S)                                                                    \
    {                                                                                                       \
        vec acc[GROUP][SPAN];                                                                               \
        for (int g = 0; g < G; g++)                                                                         \
            for (int s = 0; s < S; s++) acc[g][s] = (vec){};                                                \
        for (long t = begin; t < end; t++) {                                                                \
            const TYPE *v = values + (blocks[t / size] * size + t % size) * d;                              \
            for (int s = 0; s < S; s++) {                                                                   \
                vec vv = LOAD(v + s * LANES);                                                               \
                for (int g = 0; g < G; g++) acc[g][s] += weight[g][t - begin] * vv;                         \
            }                                                                                               \
        }                                                                                                   \
        for (int g = 0; g < G; g++)                                                                         \
            for (int s = 0; s < S; s++) store(out + g * stride + s * LANES, acc[g][s]);                     \
    }                                                                                                       \
    INLINE void NAME##_values(float weight[][CHUNK + LANES], const TYPE *values, const int64_t *blocks,     \
                              long size, long begin, long end, long d, float *out, long stride, const int G) \
    {                                                                                                       \
        long i = 0;                                                                                         \
        for (; i + SPAN * LANES <= d; i += SPAN * LANES)                                                    \
            NAME##_span(weight, values + i, blocks, size, begin, end, d, out + i, stride, G, SPAN);         \
        for (; i + LANES <= d; i += LANES)                                                                  \
            NAME##_span(weight, values + i, blocks, size, begin, end, d, out + i, stride, G, 1);            \
        for (; i < d; i++)                                                                                  \
            for (int g = 0; g < G; g++) {                                                                   \
                float total = 0;                                                                            \
                for (long t = begin; t < end; t++)                                                          \
                    total += weight[g][t - begin] * SCALAR(values[(blocks[t / size] * size + t % size) * d + i]); \
                out[g * stride + i] = total;                                                                \
            }                                                                                               \
    }

DEFINE_ATTEND(f32, float, load_f32, AS_IS)
DEFINE_ATTEND(bf16, bf16, load_bf16, widen)

/* G query heads of one KV head against tokens [begin, end) of a sequence. The parts, `stride` floats apart:
 * d floats of sum of weights * v, not normalised, the maximum score, the sum of the weights. */
INLINE void attend(const float *q, const Cache *cache, const int64_t *blocks, long head, long kv_heads, long begin,
                   long end, long d, float scale, float *part, long stride, const int G)
{
    float score[GROUP][CHUNK + LANES];
    long size = cache->block_size, count = end - begin;
    long keys = head * cache->num_slots * d, values = (kv_heads + head) * cache->num_slots * d;
    if (cache->is_bf16)
        bf16_scores(q, (const bf16 *)cache->data + keys, blocks, size, begin, end, d, scale, score, G);
    else
        f32_scores(q, (const float *)cache->data + keys, blocks, size, begin, end, d, scale, score, G);
    for (int g = 0; g < G; g++) {
        float best = -INFINITY;
        for (long t = 0; t < count; t++) best = score[g][t] > best || score[g][t] != score[g][t] ? score[g][t] : best;
        for (long t = count; t < count + LANES; t++) score[g][t] = -INFINITY;
        vec total = {};
        for (long t = 0; t < count; t += LANES) {
            vec weight = vexp(load_f32(score[g] + t) - best);
            store(score[g] + t, weight);
            total += weight;
        }
        part[g * stride + d] = best;
        part[g * stride + d + 1] = sum(total);
    }
    if (cache->is_bf16)
        bf16_values(score, (const bf16 *)cache->data + values, blocks, size, begin, end, d, part, stride, G);
    else
        f32_values(score, (const float *)cache->data + values, blocks, size, begin, end, d, part, stride, G);
}

/* Floats of scratch that `decode_attention` needs. */
long decode_scratch(long batch, long heads, long d, long max_len)
{
    return batch * heads * ((max_len + CHUNK - 1) / CHUNK) * (d + 2);
}

typedef struct {
    const float *q;
    const Cache *cache;
    const int64_t *blocks, *lens;
    float *out, *scratch;
    long stride, batch, heads, kv_heads, d, width, chunks, window;
    float scale;
} Decode;

/* One KV head of one sequence, CHUNK of its tokens. */
static void decode_piece(const void *job, long piece)
{
    const Decode *a = job;
    long chunk = piece % a->chunks, head = piece / a->chunks % a->kv_heads, row = piece / a->chunks / a->kv_heads;
    long group = a->heads / a->kv_heads, d = a->d, part = d + 2, len = a->lens[row];
    long first = a->window && len > a->window ? len - a->window : 0;
    long begin = chunk * CHUNK > first ? chunk * CHUNK : first;
    long end = (chunk + 1) * CHUNK < len ? (chunk + 1) * CHUNK : len;
    for (long h = head * group; h < (head + 1) * group; h += GROUP) {
        const float *queries = a->q + row * a->stride + h * d;
        float *at = a->scratch + ((row * a->heads + h) * a->chunks + chunk) * part;
        long left = (head + 1) * group - h, taken = left < GROUP ? left : GROUP;
        if (begin >= end) {
            for (long g = 0; g < taken; g++) at[g * a->chunks * part + d] = -INFINITY;
            continue;
        }
#define ATTEND(G)                                                                                           \
    case G:                                                                                                 \
        attend(queries, a->cache, a->blocks + row * a->width, head, a->kv_heads, begin, end, d, a->scale, at, \
               a->chunks * part, G);                                                                        \
        break
        switch (taken) { ATTEND(1); ATTEND(2); ATTEND(3); ATTEND(4); }
    }
}

/* The parts of one query head, by their maxima, into its output. */
static void merge_piece(const void *job, long piece)
{
    const Decode *a = job;
    long d = a->d, part = d + 2;
    const float *parts = a->scratch + piece * a->chunks * part;
    float *result = a->out + piece * d, best = -INFINITY, total = 0;
    for (long c = 0; c < a->chunks; c++) {
        float top = parts[c * part + d];
        best = top > best || top != top ? top : best;
    }
    memset(result, 0, d * sizeof(float));
    for (long c = 0; c < a->chunks; c++) {
        const float *p = parts + c * part;
        if (p[d] == -INFINITY) continue;
        float factor = expf(p[d] - best);
        total += factor * p[d + 1];
        for (long i = 0; i < d; i++) result[i] += factor * p[i];
    }
    for (long i = 0; i < d; i++) result[i] /= total;
}

/* One query a sequence. q: [batch, heads, d], rotated, its rows `stride` floats apart; blocks: [batch, width];
 * lens: [batch], tokens to attend to, the new one included; window: only the last so many, or 0 for all
 * -> out: [batch, heads * d]. A sequence is split among threads and the parts are merged by their maxima
 * (Flash-Decoding, Dao et al., 2023). */
void decode_attention(Pool *pool, const float *q, long stride, const Cache *cache, const int64_t *blocks,
                      const int64_t *lens, float *out, float *scratch, long batch, long heads, long kv_heads, long d,
                      long width, long max_len, long window, float scale)
{
    long chunks = (max_len + CHUNK - 1) / CHUNK;
    Decode job = {q, cache, blocks, lens, out, scratch, stride, batch, heads, kv_heads, d, width, chunks, window, scale};
    parallel(pool, decode_piece, &job, batch * kv_heads * chunks);
    for (long i = 0; i < batch * heads; i++) merge_piece(&job, i);
}
