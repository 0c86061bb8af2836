/* A router chooses the experts of each token; the rows of each expert's tokens are gathered, multiplied as every other
 * matrix is, and added up. Of experts that no token goes to nothing is read. A token's experts are added in the order
 * of their numbers, whatever other tokens there are. */
#include "experts.h"
#include "norm.h"
#include "pool.h"
#include "vectors.h"

#define ROWS 16    /* rows that a thread takes at a time */
#define FEW 4      /* rows that are not worth other threads */

typedef struct {
    const Experts *layer;
    float *logits, *ranked, *weights; /* [n, count], the same, [n, chosen] */
    int32_t *chosen;                  /* [n, chosen] */
    long n;
} Routing;

/* logits to what the router gives for them: softmax or sigmoid. */
static void score(const Experts *a, float *x)
{
    float largest = x[0], total = 0;
    for (long e = 1; e < a->count; e++)
        if (x[e] > largest) largest = x[e];
    for (long e = 0; e < a->count; e++) {
        x[e] = a->is_sigmoid ? 1.0f / (1.0f + expf(-x[e])) : expf(x[e] - largest);
        total += x[e];
    }
    for (long e = 0; e < a->count && !a->is_sigmoid; e++) x[e] /= total;
}

/* The first of the largest of n numbers; of what is not a number the first. */
static long best_of(const float *x, long n)
{
    long best = 0;
    for (long i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* Leaves -inf in the groups whose two best have not the largest sums. */
static void drop_groups(const Experts *a, float *ranked)
{
    long size = a->count / a->groups;
    for (long round = a->chosen_groups; round < a->groups; round++) {
        long worst = -1;
        float least_sum = 0;
        for (long g = 0; g < a->groups; g++) {
            const float *group = ranked + g * size;
            long first = best_of(group, size);
            float second = -INFINITY;
            if (group[first] == -INFINITY) continue;
            for (long i = 0; i < size; i++)
                if (i != first && group[i] > second) second = group[i];
            float total = group[first] + (size > 1 ? second : 0.0f);
            /* Of equal ones the last goes. */
            if (worst < 0 || total <= least_sum) worst = g, least_sum = total;
        }
        for (long i = 0; i < size && worst >= 0; i++) ranked[worst * size + i] = -INFINITY;
    }
}

static void route_piece(const void *job, long piece)
{
    const Routing *p = job;
    const Experts *a = p->layer;
    for (long row = piece * ROWS; row < least(p->n, (piece + 1) * ROWS); row++) {
        float *scores = p->logits + row * a->count, *ranked = p->ranked + row * a->count, total = 0;
        float *weights = p->weights + row * a->chosen;
        score(a, scores);
        for (long e = 0; e < a->count; e++) ranked[e] = scores[e] + (a->correction ? a->correction[e] : 0.0f);
        if (a->groups > 1) drop_groups(a, ranked);
        for (long i = 0; i < a->chosen; i++) {
            long best = best_of(ranked, a->count);
            ranked[best] = -INFINITY;
            p->chosen[row * a->chosen + i] = best;
            weights[i] = scores[best];
            total += scores[best];
        }
        for (long i = 0; i < a->chosen; i++) {
            if (a->is_normalized) weights[i] /= total + a->smallest_sum;
            weights[i] *= a->scale;
        }
    }
}

typedef struct {
    const float *from, *weights; /* rows, and of each its weight */
    float *to;
    const int32_t *rows;         /* of x, or of y */
    long m, d;
} Move;

static void gather_piece(const void *job, long piece)
{
    const Move *p = job;
    for (long i = piece * ROWS; i < least(p->m, (piece + 1) * ROWS); i++)
        memcpy(p->to + i * p->d, p->from + p->rows[i] * p->d, p->d * sizeof(float));
}

static void add_piece(const void *job, long piece)
{
    const Move *p = job;
    for (long i = piece * ROWS; i < least(p->m, (piece + 1) * ROWS); i++) {
        const float *from = p->from + i * p->d;
        float *to = p->to + p->rows[i] * p->d, weight = p->weights[i];
        for (long j = 0; j < p->d; j++) to[j] += weight * from[j];
    }
}

/* Few rows in this thread: to wake others takes longer. */
static void move(Pool *pool, Piece piece, const Move *job)
{
    if (job->m <= FEW) piece(job, 0);
    else parallel(pool, piece, job, (job->m + ROWS - 1) / ROWS);
}

/* y += the expert that every row goes to. scales: room for n numbers. */
static int add_shared(Pool *pool, const Experts *a, const float *x, float *inner, float *given, float *scales, float *y,
                      long n)
{
    if (mlp(pool, a->shared_gate_up, a->shared_down, x, inner, NULL, given, n)) return -1;
    if (a->shared_gate && linear(pool, a->shared_gate, x, NULL, scales, n)) return -1;
    for (long row = 0; row < n; row++) {
        float scale = a->shared_gate ? 1.0f / (1.0f + expf(-scales[row])) : 1.0f;
        for (long j = row * a->hidden; j < (row + 1) * a->hidden; j++) y[j] += scale * given[j];
    }
    return 0;
}

/* y = residual + the weighted sum of what the experts of each row of norm(x) give; [n, hidden]. residual may be null,
 * or y, and so may x. scratch: room for n rows of 3 * hidden + width + 2 * count + 2 * chosen + 2 numbers. Returns -1
 * if there is no memory, else 0. */
int experts(Pool *pool, const Experts *a, const float *x, const float *residual, float *y, long n, float *scratch)
{
    long d = a->hidden, k = a->chosen, size = n * d * sizeof(float);
    float *normed = scratch, *gathered = normed + n * d, *given = gathered + n * d, *inner = given + n * d;
    float *logits = inner + n * a->width, *ranked = logits + n * a->count, *weights = ranked + n * a->count;
    float *own = weights + n * k;
    int32_t *chosen = (int32_t *)(own + n), *rows = chosen + n * k;
    if (!n) return 0;
    if (a->norm) rms_norm(pool, x, a->norm, normed, n, d, a->eps);
    else memcpy(normed, x, size);
    if (linear(pool, a->router, normed, NULL, logits, n)) return -1;
    Routing routing = {a, logits, ranked, weights, chosen, n};
    parallel(pool, route_piece, &routing, (n + ROWS - 1) / ROWS);
    if (!residual) memset(y, 0, size);
    else if (residual != y) memcpy(y, residual, size);
    if (a->shared_down && add_shared(pool, a, normed, inner, given, logits, y, n)) return -1;
    for (long e = 0; e < a->count; e++) {
        long m = 0;
        for (long i = 0; i < n * k; i++)
            if (chosen[i] == e && (!m || rows[m - 1] != i / k)) {
                rows[m] = i / k;
                own[m++] = weights[i];
            }
        if (!m) continue;
        Move in = {normed, NULL, gathered, rows, m, d}, out = {given, own, y, rows, m, d};
        move(pool, gather_piece, &in);
        if (mlp(pool, a->gate_up[e], a->down[e], gathered, inner, NULL, given, m)) return -1;
        move(pool, add_piece, &out);
    }
    return 0;
}
