/* All layers of a decoder in one call: with six calls a layer, what Python adds to each took a sixth of a step. */
#include "attention.h"
#include "experts.h"
#include "linear.h"

typedef struct {
    const Linear *qkv, *o, *gate_up, *down;
    const Experts *experts; /* in the place of the two before, or null */
} Layer;

/* hidden: [n, d], what goes into the first layer, then what comes out of the last. scratch: room for n rows of what any
 * layer's qkv and attention give, or its gate_up, or what its experts need. Returns -1 if there is no memory, else 0.
 */
int decoder_layers(Pool *pool, const Step *step, const Cache *caches, const Layer *layers, long count, float *hidden,
                   float *scratch)
{
    long n = step->n;
    float *qkv = scratch, *attended = scratch + n * (step->heads + 2 * step->kv_heads) * step->d, *inner = scratch;
    for (long i = 0; i < count; i++) {
        if (linear(pool, layers[i].qkv, hidden, 0, qkv, n)) return -1;
        rotate_and_cache(pool, step, &caches[i], qkv);
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
