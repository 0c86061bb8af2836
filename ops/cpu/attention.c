/* Decode attention over the block table: one query a sequence. */
#include "cache.h"
#include "pool.h"
#include "vectors.h"

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
