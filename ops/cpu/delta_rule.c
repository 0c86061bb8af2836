/* Layers of a gated delta rule between their products (ops/delta_rule.py has the formulas and the shapes). Tokens of a
 * sequence are taken one after the other, whose state stays in the cache of a core meanwhile: a token's output has the
 * same bits however its sequence is cut, and beside any others. */
#include "norm.h"
#include "states.h"

#define VALUES 16L /* of a head, whose rows of the state a thread takes through all tokens */
#define ROWS 4     /* of them that are multiplied side by side */

typedef struct {
    const float *weight;                /* [size, channels], the newest token last */
    const float *a_log, *dt_bias;       /* [heads] */
    const float *norm;                  /* [value_dim] */
    float *conv, *delta;                /* states: [rows, size - 1, channels]; [rows, heads, value_dim, key_dim] */
} DeltaLayer;

typedef struct {
    Sequences of;
    long key_heads, heads, key_dim, value_dim, size;
    float eps, l2_eps;
} DeltaStep;

typedef struct {
    const DeltaStep *step;
    const DeltaLayer *layer;
    const float *x;                /* [n, width]: q, k, v, z, b, a */
    float *out, *mixed, *gates;    /* [n, heads * value_dim]; [n, channels]; [n, heads, 2], what is kept, and beta */
    long channels, width, blocks;  /* blocks: pieces of a head */
} Delta;

/* Gives a vector the length `length`. */
INLINE void scale_to(float *x, long d, float eps, float length)
{
    vec total = {};
    for (long i = 0; i < d; i += LANES) {
        vec v = load_part(x + i, d - i);
        total += v * v;
    }
    float scale = length / sqrtf(sum(total) + eps);
    for (long i = 0; i < d; i += LANES) store_part(x + i, load_part(x + i, d - i) * scale, d - i);
}

/* The lengths of a token's queries and keys, and what its heads keep and take. */
static void prepare_piece(const void *job, long token)
{
    const Delta *j = job;
    const DeltaStep *a = j->step;
    float *q = j->mixed + token * j->channels, *gate = j->gates + token * a->heads * 2;
    const float *b = j->x + token * j->width + j->channels + a->heads * a->value_dim;
    for (long h = 0; h < a->key_heads; h++) {
        scale_to(q + h * a->key_dim, a->key_dim, a->l2_eps, 1.0f / sqrtf(a->key_dim));
        scale_to(q + (a->key_heads + h) * a->key_dim, a->key_dim, a->l2_eps, 1.0f);
    }
    for (long h = 0; h < a->heads; h++) {
        float x = b[a->heads + h] + j->layer->dt_bias[h], softplus = x > 20.0f ? x : log1pf(expf(x));
        gate[2 * h] = expf(-expf(j->layer->a_log[h]) * softplus);
        gate[2 * h + 1] = 1.0f / (1.0f + expf(-b[h]));
    }
}

/* One token of `count` rows of a head's state: S = keep S; S += beta (v - S k) k'; y = S q. */
INLINE void update_rows(float *state, const float *q, const float *k, const float *v, float *y, long d, float keep,
                        float beta, const int count)
{
    vec known[ROWS] = {}, seen[ROWS] = {};
    for (long i = 0; i < d; i += LANES) {
        vec key = load_part(k + i, d - i);
        for (int r = 0; r < count; r++) known[r] += load_part(state + r * d + i, d - i) * key;
    }
    for (int r = 0; r < count; r++) known[r] = (vec){} + beta * (v[r] - keep * sum(known[r]));
    for (long i = 0; i < d; i += LANES) {
        vec key = load_part(k + i, d - i), query = load_part(q + i, d - i);
        for (int r = 0; r < count; r++) {
            vec s = load_part(state + r * d + i, d - i) * keep + known[r] * key;
            store_part(state + r * d + i, s, d - i);
            seen[r] += s * query;
        }
    }
    for (int r = 0; r < count; r++) y[r] = sum(seen[r]);
}

static void update_piece(const void *job, long piece)
{
    const Delta *j = job;
    const DeltaStep *a = j->step;
    long from = piece % j->blocks * VALUES, to = least(from + VALUES, a->value_dim), d = a->key_dim;
    long h = piece / j->blocks % a->heads, sequence = piece / j->blocks / a->heads, count;
    int goes_on;
    long first = first_of(&a->of, sequence, &count, &goes_on);
    float *state = j->layer->delta + (a->of.rows[sequence] * a->heads + h) * a->value_dim * d;
    if (count && !goes_on) memset(state + from * d, 0, (to - from) * d * sizeof(float));
    for (long token = first; token < first + count; token++) {
        const float *q = j->mixed + token * j->channels + h / (a->heads / a->key_heads) * d;
        const float *k = q + a->key_heads * d, *gate = j->gates + (token * a->heads + h) * 2;
        const float *v = j->mixed + token * j->channels + 2 * a->key_heads * d + h * a->value_dim;
        float *y = j->out + (token * a->heads + h) * a->value_dim;
        long r = from;
        for (; r + ROWS <= to; r += ROWS) update_rows(state + r * d, q, k, v + r, y + r, d, gate[0], gate[1], ROWS);
        for (; r < to; r++) update_rows(state + r * d, q, k, v + r, y + r, d, gate[0], gate[1], 1);
    }
}

/* The norm and the gate of a token's heads. */
static void gate_piece(const void *job, long token)
{
    const Delta *j = job;
    const DeltaStep *a = j->step;
    long d = a->value_dim;
    const float *z = j->x + token * j->width + j->channels;
    float *y = j->out + token * a->heads * d;
    for (long h = 0; h < a->heads; h++, y += d, z += d) {
        float scale = norm_scale(y, d, a->eps);
        for (long i = 0; i < d; i += LANES) {
            vec gated = load_part(y + i, d - i) * scale * load_part(j->layer->norm + i, d - i);
            store_part(y + i, gated * vsilu(load_part(z + i, d - i)), d - i);
        }
    }
}

/* x: [n, width] -> out: [n, heads * value_dim]; the states of the step's rows go on. Returns -1 if there is no memory,
 * else 0. */
int delta_rule(Pool *pool, const DeltaStep *step, const DeltaLayer *layer, const float *x, float *out)
{
    long values = step->heads * step->value_dim, channels = 2 * step->key_heads * step->key_dim + values;
    float *mixed = pool_scratch(pool, step->of.n * (channels + 2 * step->heads));
    if (!mixed) return -1;
    Convolution convolution = {layer->weight, 0, layer->conv, channels, step->size};
    Delta job = {step,
                 layer,
                 x,
                 out,
                 mixed,
                 mixed + step->of.n * channels,
                 channels,
                 channels + values + 2 * step->heads,
                 (step->value_dim + VALUES - 1) / VALUES};
    convolve(pool, &step->of, &convolution, x, job.width, mixed);
    parallel(pool, prepare_piece, &job, step->of.n);
    parallel(pool, update_piece, &job, (step->of.decodes + step->of.segments) * step->heads * job.blocks);
    parallel(pool, gate_piece, &job, step->of.n);
    return 0;
}
