/* Matrix products of a few rows: bound by reading the weight, which is read once for all of them. */
#include "pool.h"
#include "vectors.h"

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
