/* Layers of Mamba-2 between their products (ops/mamba2.py has the formulas and the shapes). Tokens of a sequence are
 * taken one after the other, whose state stays in the cache of a core meanwhile: a token's output has the same bits
 * however its sequence is cut, and beside any others. */
#include "norm.h"
#include "states.h"

#define VALUES 16L /* of a head, whose rows of the state a thread takes through all tokens */
#define ROWS 4     /* of them that are multiplied side by side */

typedef struct {
    const float *weight, *bias;           /* of the convolution */
    const float *a_log, *dt_bias, *skip;  /* [heads] */
    const float *norm;                    /* [heads * head_dim] */
    float *conv, *ssm; /* states: [rows, size - 1, channels]; [rows, heads, head_dim, state_size] */
} Mamba2Layer;

typedef struct {
    Sequences of;
    long heads, head_dim, groups, state_size, size;
    float eps;
} Mamba2Step;

typedef struct {
    const Mamba2Step *step;
    const Mamba2Layer *layer;
    const float *x; /* [n, width]: x, B, C, z, dt */
    float *out, *mixed, *gates; /* [n, inner]; [n, channels]; [n, heads, 2], what is kept, and dt */
    long inner, channels, width;
    long blocks; /* pieces of a head */
} Mamba2;

/* What a token's heads keep and take. */
static void prepare_piece(const void *job, long token)
{
    const Mamba2 *j = job;
    long heads = j->step->heads;
    float *gate = j->gates + token * heads * 2;
    const float *dt = j->x + token * j->width + j->channels + j->inner;
    for (long h = 0; h < heads; h++) {
        float x = dt[h] + j->layer->dt_bias[h], softplus = x > 20.0f ? x : log1pf(expf(x));
        gate[2 * h] = expf(-expf(j->layer->a_log[h]) * softplus);
        gate[2 * h + 1] = softplus;
    }
}

/* One token of `count` rows of a head's state: S = keep S + dt x B'; y = S C + skip x. */
INLINE void update_rows(float *state, const float *b, const float *c, const float *x, float *y, long d, float keep,
                        float dt, float skip, const int count)
{
    vec seen[ROWS] = {};
    for (long i = 0; i < d; i += LANES) {
        vec in = load_part(b + i, d - i), out = load_part(c + i, d - i);
        for (int r = 0; r < count; r++) {
            vec s = load_part(state + r * d + i, d - i) * keep + in * (dt * x[r]);
            store_part(state + r * d + i, s, d - i);
            seen[r] += s * out;
        }
    }
    for (int r = 0; r < count; r++) y[r] = sum(seen[r]) + skip * x[r];
}

static void update_piece(const void *job, long piece)
{
    const Mamba2 *j = job;
    const Mamba2Step *a = j->step;
    long from = piece % j->blocks * VALUES, to = least(from + VALUES, a->head_dim), d = a->state_size;
    long h = piece / j->blocks % a->heads, sequence = piece / j->blocks / a->heads, count;
    int goes_on;
    long first = first_of(&a->of, sequence, &count, &goes_on), group = h / (a->heads / a->groups);
    float *state = j->layer->ssm + (a->of.rows[sequence] * a->heads + h) * a->head_dim * d, skip = j->layer->skip[h];
    if (count && !goes_on) memset(state + from * d, 0, (to - from) * d * sizeof(float));
    for (long token = first; token < first + count; token++) {
        const float *x = j->mixed + token * j->channels + h * a->head_dim;
        const float *b = j->mixed + token * j->channels + j->inner + group * d, *c = b + a->groups * d;
        const float *gate = j->gates + (token * a->heads + h) * 2;
        float *y = j->out + token * j->inner + h * a->head_dim;
        long r = from;
        for (; r + ROWS <= to; r += ROWS)
            update_rows(state + r * d, b, c, x + r, y + r, d, gate[0], gate[1], skip, ROWS);
        for (; r < to; r++) update_rows(state + r * d, b, c, x + r, y + r, d, gate[0], gate[1], skip, 1);
    }
}

/* The gate and the norms of a token's groups. */
static void gate_piece(const void *job, long token)
{
    const Mamba2 *j = job;
    long d = j->inner / j->step->groups;
    const float *z = j->x + token * j->width + j->channels, *norm = j->layer->norm;
    float *y = j->out + token * j->inner;
    for (long g = 0; g < j->step->groups; g++, y += d, z += d, norm += d) {
        for (long i = 0; i < d; i += LANES)
            store_part(y + i, load_part(y + i, d - i) * vsilu(load_part(z + i, d - i)), d - i);
        float scale = norm_scale(y, d, j->step->eps);
        for (long i = 0; i < d; i += LANES)
            store_part(y + i, load_part(y + i, d - i) * scale * load_part(norm + i, d - i), d - i);
    }
}

/* x: [n, width] -> out: [n, inner]; the states of the step's rows go on. Returns -1 if there is no memory, else 0. */
int mamba2(Pool *pool, const Mamba2Step *step, const Mamba2Layer *layer, const float *x, float *out)
{
    long inner = step->heads * step->head_dim, channels = inner + 2 * step->groups * step->state_size;
    float *mixed = pool_scratch(pool, step->of.n * (channels + 2 * step->heads));
    if (!mixed) return -1;
    Convolution convolution = {layer->weight, layer->bias, layer->conv, channels, step->size};
    Mamba2 job = {step,
                  layer,
                  x,
                  out,
                  mixed,
                  mixed + step->of.n * channels,
                  inner,
                  channels,
                  channels + inner + step->heads,
                  (step->head_dim + VALUES - 1) / VALUES};
    convolve(pool, &step->of, &convolution, x, job.width, mixed);
    parallel(pool, prepare_piece, &job, step->of.n);
    parallel(pool, update_piece, &job, (step->of.decodes + step->of.segments) * step->heads * job.blocks);
    parallel(pool, gate_piece, &job, step->of.n);
    return 0;
}
