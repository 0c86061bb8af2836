/* What is done to each row of activations: embedding, norms, rotary embedding with the cache write, SwiGLU. */
#include "cache.h"
#include "norm.h"
#include "pool.h"
#include "vectors.h"

INLINE void norm_row(const float *x, const float *weight, float *y, long d, float eps)
{
    float scale = norm_scale(x, d, eps);
    long i = 0;
    for (; i + LANES <= d; i += LANES) store(y + i, load_f32(x + i) * scale * load_f32(weight + i));
    for (; i < d; i++) y[i] = x[i] * scale * weight[i];
}

#define ROWS 16       /* rows of an elementwise operator that a thread takes at a time */

typedef struct {
    const void *table;
    const int64_t *ids;
    float *y;
    long n, d;
    int is_bf16;
} Gather;

static void gather_piece(const void *job, long piece)
{
    const Gather *a = job;
    long end = (piece + 1) * ROWS < a->n ? (piece + 1) * ROWS : a->n, d = a->d;
    for (long row = piece * ROWS; row < end; row++) {
        float *y = a->y + row * d;
        if (!a->is_bf16) {
            memcpy(y, (const float *)a->table + a->ids[row] * d, d * sizeof(float));
            continue;
        }
        const bf16 *x = (const bf16 *)a->table + a->ids[row] * d;
        for (long i = 0; i < d; i++) y[i] = widen(x[i]);
    }
}

/* y: [n, d], the rows `ids` of a table of d floats or bf16 a row. */
void gather(Pool *pool, int is_bf16, const void *table, const int64_t *ids, float *y, long n, long d)
{
    Gather job = {table, ids, y, n, d, is_bf16};
    parallel(pool, gather_piece, &job, (n + ROWS - 1) / ROWS);
}

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

typedef struct {
    const Step *step;
    const Cache *cache;
    float *qkv;
} Rotate;

static void rotate_piece(const void *job, long piece)
{
    const Step *a = ((const Rotate *)job)->step;
    const Cache *cache = ((const Rotate *)job)->cache;
    long d = a->d, end = (piece + 1) * ROWS < a->n ? (piece + 1) * ROWS : a->n;
    for (long token = piece * ROWS; token < end; token++) {
        float *row = ((const Rotate *)job)->qkv + token * (a->heads + 2 * a->kv_heads) * d;
        const float *c = a->cos + a->positions[token] * d, *s = a->sin + a->positions[token] * d;
        for (long head = 0; head < a->heads + a->kv_heads; head++) {
            float *x = row + head * d;
            if (cache->q_norm) norm_row(x, head < a->heads ? cache->q_norm : cache->k_norm, x, d, a->eps);
            rotate_halves(x, c, s, d);
        }
        for (long head = 0; head < a->kv_heads; head++) {
            put(cache, head, a->slots[token], row + (a->heads + head) * d, d);
            put(cache, a->kv_heads + head, a->slots[token], row + (a->heads + a->kv_heads + head) * d, d);
        }
    }
}

/* Normalises each head of q and k if there are norms, and rotates it, in place in qkv: [n, heads + 2 * kv_heads, d];
 * then puts k and v into their slots. */
void rotate_and_cache(Pool *pool, const Step *step, const Cache *cache, float *qkv)
{
    Rotate job = {step, cache, qkv};
    parallel(pool, rotate_piece, &job, (step->n + ROWS - 1) / ROWS);
}
