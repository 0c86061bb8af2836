/* All layers of a decoder in one call: with six calls a layer, what Python adds to each took a sixth of a step. */
#include "attention.h"
#include "experts.h"
#include "linear.h"

typedef struct {
    const Linear *qkv, *o, *gate_up, *down;
    const Experts *experts; /* in the place of the two before, or null */
} Layer;

/* The tokens whose last hidden states are needed, in order, and the step that attends to their sequences with them
 * alone. */
typedef struct {
    const Step *step;
    const int64_t *rows;
} Needed;

/* rows[i] of x becomes row i. */
static void keep_rows(float *x, const Needed *needed, long size)
{
    for (long i = 0; i < needed->step->n; i++) memmove(x + i * size, x + needed->rows[i] * size, size * sizeof *x);
}

/* hidden: [n, d], what goes into the first layer, then what comes out of the last. scratch: room for n rows of what any
 * layer's qkv and attention give, or its gate_up, or what its experts need. If only some rows are `needed`, the last
 * layer computes no more than the keys and values of others, and the first rows of hidden are those. Returns -1 if
 * there is no memory, else 0. */
int decoder_layers(Pool *pool, const Step *step, const Needed *needed, const Cache *caches, const Layer *layers,
                   long count, float *hidden, long d, float *scratch)
{
    long n = step->n, width = (step->heads + 2 * step->kv_heads) * step->d;
    float *qkv = scratch, *attended = scratch + n * width, *inner = scratch;
    for (long i = 0; i < count; i++) {
        if (linear(pool, layers[i].qkv, hidden, 0, qkv, n)) return -1;
        rotate_and_cache(pool, step, &caches[i], qkv);
        if (needed && i == count - 1) {
            keep_rows(qkv, needed, width);
            keep_rows(hidden, needed, d);
            step = needed->step;
            n = step->n;
        }
        if (attention(pool, step, &caches[i], qkv, attended)) return -1;
        if (linear(pool, layers[i].o, attended, hidden, hidden, n)) return -1;
        if (layers[i].experts) {
            if (experts(pool, layers[i].experts, hidden, hidden, hidden, n, scratch)) return -1;
            continue;
        }
        if (mlp(pool, layers[i].gate_up, layers[i].down, hidden, inner, hidden, hidden, n)) return -1;
    }
    return 0;
}
