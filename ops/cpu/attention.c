/* Attention over the block table, of a whole step and of its decodes: one query a sequence. */
#include "attention.h"

#include "vectors.h"

#define CHUNK 128     /* tokens of one sequence that a thread takes at a time */
#define GROUP 4       /* query heads of one KV head that share a pass over its keys and values */
#define KEYS 4        /* keys that are multiplied side by side */
#define TOKENS 64L    /* of a segment whose parts are in memory at a time, and of those, what a thread takes */
#define TOGETHER 8L
#define UNROLL _Pragma("GCC unroll 8")

typedef float Scores[GROUP][CHUNK + LANES];

/* Element i of a token's key or value. */
INLINE float element(const void *p, long i, const int is_bf16)
{ return is_bf16 ? widen(((const bf16 *)p)[i]) : ((const float *)p)[i]; }

/* x in the order in which load_pair gives the elements of a key: of each PAIR of bfloat16, even before odd. */
INLINE void to_pairs(const float *x, float *pairs, long d, const int is_bf16)
{
    long i = 0;
    for (; is_bf16 && i + PAIR <= d; i += PAIR)
        for (int j = 0; j < LANES; j++) {
            pairs[i + j] = x[i + 2 * j];
            pairs[i + LANES + j] = x[i + 2 * j + 1];
        }
    memcpy(pairs + i, x + i, (d - i) * sizeof(float));
}

/* And back. */
INLINE void from_pairs(const float *pairs, float *x, long d, const int is_bf16)
{
    long i = 0;
    for (; is_bf16 && i + PAIR <= d; i += PAIR)
        for (int j = 0; j < LANES; j++) {
            x[i + 2 * j] = pairs[i + j];
            x[i + 2 * j + 1] = pairs[i + LANES + j];
        }
    memcpy(x + i, pairs + i, (d - i) * sizeof(float));
}

#define AHEAD 32      /* keys between those that are used and those that are asked for, if they are asked for then */

/* Where some tokens' keys are, so many bytes in front of their values. While keys are used, their values are asked for,
 * and as many keys of `ahead`; while values are, as many keys of `next`. One of the two is `keys`, which costs nothing:
 * see fetches_next of tuning.h. */
typedef struct {
    const char *const *keys, *const *ahead, *const *next;
    long to_values;
} Tokens;

/* acc[t][g] = q[g] . key t in as many parts as there are lanes, for G queries and K keys from `first` on, up to where d
 * is no whole PAIR any more. */
INLINE void multiply_keys(const float *q, const Tokens *at, long first, long d, vec acc[KEYS][GROUP], const int is_bf16,
                          const int G, const int K)
{
    long size = is_bf16 ? sizeof(bf16) : sizeof(float);
    for (int t = 0; t < K; t++)
        for (int g = 0; g < G; g++) acc[t][g] = (vec){};
    for (long i = 0; i + PAIR <= d; i += PAIR) {
        vec query[GROUP][2], low, high;
        for (int g = 0; g < G; g++)
            for (int half = 0; half < 2; half++) query[g][half] = load_f32(q + g * d + i + half * LANES);
        for (int t = 0; t < K; t++) {
            __builtin_prefetch(at->ahead[first + t] + i * size);
            __builtin_prefetch(at->keys[first + t] + at->to_values + i * size);
            load_pair(at->keys[first + t], i, is_bf16, &low, &high);
            for (int g = 0; g < G; g++) acc[t][g] += low * query[g][0];
            for (int g = 0; g < G; g++) acc[t][g] += high * query[g][1];
        }
    }
}

/* What multiply_keys leaves out, for `count` keys. */
INLINE void add_rest(const float *q, const char *const *keys, long first, long count, long d, float scale, Scores score,
                     const int is_bf16, const int G)
{
    for (long i = d / PAIR * PAIR; i < d; i++)
        for (long t = first; t < first + count; t++)
            for (int g = 0; g < G; g++) score[g][t] += scale * q[g * d + i] * element(keys[t], i, is_bf16);
}

/* score[g][t] = scale * q[g] . key t, for G queries and `count` keys. Parts are added up for LANES keys at a time. */
INLINE void score_keys(const float *q, const Tokens *at, long count, long d, float scale, Scores score,
                       const int is_bf16, const int G)
{
    vec acc[KEYS][GROUP];
    long t = 0;
    for (; t + LANES <= count; t += LANES) {
        vec part[LANES / KEYS][GROUP];
        UNROLL for (int i = 0; i < LANES / KEYS; i++) {
            multiply_keys(q, at, t + i * KEYS, d, acc, is_bf16, G, KEYS);
            for (int g = 0; g < G; g++)
                part[i][g] = add_runs(add_runs(acc[0][g], acc[1][g], 1), add_runs(acc[2][g], acc[3][g], 1), 2);
        }
        for (int g = 0; g < G; g++) {
            /* What steps are has to be known when this is compiled: else their shuffles are built each time. */
            if (LANES > KEYS)
                for (int i = 0; i < LANES / KEYS / 2; i++)
                    part[i][g] = add_runs(part[2 * i][g], part[2 * i + 1][g], KEYS);
            if (LANES > 2 * KEYS) part[0][g] = add_runs(part[0][g], part[1][g], 2 * KEYS);
            store(score[g] + t, part[0][g] * scale);
        }
        add_rest(q, at->keys, t, LANES, d, scale, score, is_bf16, G);
    }
    for (; t < count; t++) {
        multiply_keys(q, at, t, d, acc, is_bf16, G, 1);
        for (int g = 0; g < G; g++) score[g][t] = scale * sum(acc[0][g]);
        add_rest(q, at->keys, t, 1, d, scale, score, is_bf16, G);
    }
}

/* out[g] = sum over t of weight[g][t] * value t, for one pair of vectors of it, from element i on. U partial sums keep
 * the additions from waiting for each other. */
INLINE void add_pair(Scores weight, const Tokens *at, long count, long i, float *out, long d, const int is_bf16,
                     const int G, const int U)
{
    vec acc[4][GROUP][2], low, high;
    long t = 0, size = is_bf16 ? sizeof(bf16) : sizeof(float);
    for (int u = 0; u < U; u++)
        for (int g = 0; g < G; g++) acc[u][g][0] = acc[u][g][1] = (vec){};
    for (; t + U <= count; t += U)
        for (int u = 0; u < U; u++) {
            __builtin_prefetch(at->next[t + u] + i * size);
            load_pair(at->keys[t + u] + at->to_values, i, is_bf16, &low, &high);
            for (int g = 0; g < G; g++) {
                acc[u][g][0] += weight[g][t + u] * low;
                acc[u][g][1] += weight[g][t + u] * high;
            }
        }
    for (; t < count; t++) {
        load_pair(at->keys[t] + at->to_values, i, is_bf16, &low, &high);
        for (int g = 0; g < G; g++) {
            acc[0][g][0] += weight[g][t] * low;
            acc[0][g][1] += weight[g][t] * high;
        }
    }
    for (int g = 0; g < G; g++)
        for (int half = 0; half < 2; half++) {
            for (int u = 1; u < U; u++) acc[0][g][half] += acc[u][g][half];
            store(out + g * d + i + half * LANES, acc[0][g][half]);
        }
}

INLINE void add_values(Scores weight, const Tokens *at, long count, long d, float *out, const int is_bf16, const int G)
{
    long i = 0;
    for (; i + PAIR <= d; i += PAIR) add_pair(weight, at, count, i, out, d, is_bf16, G, G == 1 ? 4 : G <= 3 ? 2 : 1);
    for (; i < d; i++)
        for (int g = 0; g < G; g++) {
            float total = 0;
            for (long t = 0; t < count; t++) total += weight[g][t] * element(at->keys[t] + at->to_values, i, is_bf16);
            out[g * d + i] = total;
        }
}

/* G query heads of one KV head against `count` tokens. Their parts, `stride` floats apart: d floats of the sum of
 * weights * v, not normalised, the maximum score, the sum of the weights. */
INLINE void attend(const float *queries, const Tokens *at, long count, long d, float scale, float *part, long stride,
                   const int is_bf16, const int G)
{
    Scores score;
    float q[G * d], sums[G * d];
    for (int g = 0; g < G; g++) to_pairs(queries + g * d, q + g * d, d, is_bf16);
    score_keys(q, at, count, d, scale, score, is_bf16, G);
    for (int g = 0; g < G; g++) {
        long t;
        for (t = count; t < count + LANES; t++) score[g][t] = -INFINITY;
        vec top = load_f32(score[g]), total = {};
        for (t = LANES; t < count; t += LANES) top = larger(top, load_f32(score[g] + t));
        float best = top[0];
        for (int l = 1; l < LANES; l++) best = top[l] > best || top[l] != top[l] ? top[l] : best;
        for (t = 0; t < count; t += LANES) {
            vec weight = vexp(load_f32(score[g] + t) - best);
            store(score[g] + t, weight);
            total += weight;
        }
        part[g * stride + d] = best;
        part[g * stride + d + 1] = sum(total);
    }
    add_values(score, at, count, d, sums, is_bf16, G);
    for (int g = 0; g < G; g++) from_pairs(sums + g * d, part + g * stride, d, is_bf16);
}

/* `heads` of them: at most GROUP. */
static void attend_heads(const float *q, const Tokens *at, long count, long d, float scale, float *part, long stride,
                         int is_bf16, long heads)
{
#define HEADS_ARE(G)                                                     \
    case G:                                                              \
        if (is_bf16) attend(q, at, count, d, scale, part, stride, 1, G); \
        else attend(q, at, count, d, scale, part, stride, 0, G);         \
        break
    switch (heads) {
        HEADS_ARE(1);
        HEADS_ARE(2);
        HEADS_ARE(3);
        HEADS_ARE(4);
    }
}

/* Rows of a step that are attended to one by one: decodes, or new tokens of one sequence. */
typedef struct {
    const Step *step;
    const Cache *cache;
    const float *qkv;
    float *out, *parts;
    const int64_t *blocks, *lens; /* of the decodes, as the step's; of the one sequence, and null */
    long rows, len; /* len: where lens is null, what the first row sees; each of the others one more */
    long together, chunks; /* neighbouring rows of a piece; CHUNKs of a row, at most */
} Decode;

INLINE long length_of(const Decode *j, long row) { return j->lens ? j->lens[row] : j->len + row; }

/* The first of a chunk's tokens that a row sees, and where they end. */
INLINE long begin_of(const Decode *j, long row, long chunk)
{
    long window = j->step->window;
    return most(chunk * CHUNK, window ? length_of(j, row) - window : 0);
}
INLINE long end_of(const Decode *j, long row, long chunk) { return least((chunk + 1) * CHUNK, length_of(j, row)); }

/* Addresses of the keys of tokens [from, to) of the sequence with these blocks, in one KV head. */
static void find_keys(const Cache *cache, const int64_t *blocks, long head, long bytes, long from, long to,
                      const char **keys)
{
    long size = cache->block_size;
    for (long t = from, end; t < to; t = end) {
        long slot = head * cache->num_slots + blocks[t / size] * size + t % size;
        const char *key = (const char *)cache->data + slot * bytes;
        end = least(to, (t / size + 1) * size);
        for (long i = t; i < end; i++, key += bytes) *keys++ = key;
    }
}

/* Addresses of `count` keys that come behind the last chunk of a row in one KV head: of the same row in the next head,
 * or of the next row. There are some in front of them, which are repeated where there are too few. */
static void find_next(const Decode *j, long row, long head, long bytes, const char **keys, long count)
{
    const Step *a = j->step;
    head++;
    if (head == a->kv_heads) {
        head = 0;
        row = least(row + j->together, j->rows - 1);
    }
    long length = length_of(j, row), from = most(0, a->window ? length - a->window : 0);
    long found = least(count, length - from);
    find_keys(j->cache, j->blocks + (j->lens ? row * a->width : 0), head, bytes, from, from + found, keys);
    for (long t = most(found, 0); t < count; t++) keys[t] = keys[-1];
}

/* One KV head of some rows of one sequence, CHUNK of its tokens. */
static void decode_piece(const void *job, long piece)
{
    const Decode *j = job;
    const Step *a = j->step;
    const Cache *cache = j->cache;
    long chunk = piece % j->chunks, head = piece / j->chunks % a->kv_heads;
    long row = piece / j->chunks / a->kv_heads * j->together, last = least(row + j->together, j->rows) - 1;
    long group = a->heads / a->kv_heads, d = a->d, part = d + 2, stride = j->chunks * part;
    long first = begin_of(j, row, chunk);
    const int64_t *blocks = j->blocks + (j->lens ? row * a->width : 0);
    long bytes = d * (cache->is_bf16 ? sizeof(bf16) : sizeof(float)),
         to_values = a->kv_heads * cache->num_slots * bytes;
    long end = end_of(j, last, chunk), seen = least(end + CHUNK, length_of(j, last));
    int fetches_next = a->tuning->fetches_next;
    const char *keys[2 * CHUNK], **next = keys + end - first;
    if (first < end) {
        find_keys(cache, blocks, head, bytes, first, seen, keys);
        if (seen < end + CHUNK) find_next(j, row, head, bytes, keys + seen - first, end + CHUNK - seen);
    }
    for (; row <= last; row++) {
        long begin = begin_of(j, row, chunk), count = end_of(j, row, chunk) - begin, skipped = begin - first;
        for (long h = head * group; h < (head + 1) * group; h += GROUP) {
            const float *queries = j->qkv + (row * (a->heads + 2 * a->kv_heads) + h) * d;
            float *at = j->parts + ((row * a->heads + h) * j->chunks + chunk) * part;
            long heads = least((head + 1) * group - h, GROUP);
            const char *const *own = keys + skipped;
            const Tokens tokens = {own, fetches_next ? own : own + AHEAD, fetches_next ? next : own, to_values};
            if (count > 0) attend_heads(queries, &tokens, count, d, a->scale, at, stride, cache->is_bf16, heads);
            else
                for (long g = 0; g < heads; g++) at[g * stride + d] = -INFINITY;
        }
    }
    /* What was not reached because this chunk is short. */
    long from = fetches_next ? end - first : 0, to = fetches_next ? CHUNK : AHEAD - (end - first);
    for (long t = from; first < end && t < to; t++)
        for (long i = 0; i < bytes; i += 64) __builtin_prefetch(next[t] + i);
}

/* The parts of one query head, by their maxima, into its output; a sink is a part without a value. */
static void merge_piece(const void *job, long query)
{
    const Decode *j = job;
    long d = j->step->d, part = d + 2;
    const float *parts = j->parts + query * j->chunks * part;
    const float *sinks = j->cache->sinks;
    const float sink = sinks ? sinks[query % j->step->heads] : -INFINITY;
    float *result = j->out + query * d, best = sink, total = 0;
    for (long c = 0; c < j->chunks; c++) {
        float top = parts[c * part + d];
        best = top > best || top != top ? top : best;
    }
    memset(result, 0, d * sizeof(float));
    if (sinks) total = expf(sink - best);
    for (long c = 0; c < j->chunks; c++) {
        const float *p = parts + c * part;
        if (p[d] == -INFINITY) continue;
        float factor = expf(p[d] - best);
        total += factor * p[d + 1];
        for (long i = 0; i < d; i++) result[i] += factor * p[i];
    }
    for (long i = 0; i < d; i++) result[i] /= total;
}

/* A sequence is split among threads and the parts are merged by their maxima (Flash-Decoding, Dao et al., 2023). */
static int attend_rows(Pool *pool, Decode job, long longest)
{
    const Step *step = job.step;
    job.chunks = (longest + CHUNK - 1) / CHUNK;
    job.parts = pool_scratch(pool, job.rows * step->heads * job.chunks * (step->d + 2));
    if (!job.parts) return -1;
    long pieces = (job.rows + job.together - 1) / job.together * step->kv_heads * job.chunks;
    parallel(pool, decode_piece, &job, pieces);
    parallel(pool, merge_piece, &job, job.rows * step->heads);
    return 0;
}

static int decode_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out)
{
    long longest = 0;
    for (long i = 0; i < step->decodes; i++) longest = most(step->lens[i], longest);
    Decode job = {step,         cache, qkv, out, .blocks = step->blocks, .lens = step->lens, .rows = step->decodes,
                  .together = 1};
    return attend_rows(pool, job, longest);
}

/* The segments as if each of their tokens were a decode, TOKENS at a time: the same bits, however they are cut. */
static int invariant_attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out)
{
    for (long segment = 0; segment < step->segments; segment++) {
        long end = step->segment_starts[segment + 1], len = step->segment_lens[segment];
        for (long token = step->segment_starts[segment]; token < end; token += TOKENS) {
            long row = step->decodes + token, rows = least(TOKENS, end - token), first = len - end + token + 1;
            Decode job = {
                step,
                cache,
                qkv + row * (step->heads + 2 * step->kv_heads) * step->d,
                out + row * step->heads * step->d,
                .blocks = step->segment_blocks + segment * step->segment_width,
                .rows = rows,
                .len = first,
                .together = TOGETHER,
            };
            if (attend_rows(pool, job, first + rows - 1)) return -1;
        }
    }
    return 0;
}

/* Every token of the step against its sequence, of which the cache has all keys and values. qkv: [n, heads + 2 *
 * kv_heads, d], the queries rotated -> out: [n, heads * d]. Returns -1 if there is no memory, else 0. */
int attention(Pool *pool, const Step *step, const Cache *cache, const float *qkv, float *out)
{
    if (step->decodes && decode_attention(pool, step, cache, qkv, out)) return -1;
    if (!step->segments) return 0;
    if (step->tuning->is_invariant) return invariant_attention(pool, step, cache, qkv, out);
    return prefill_attention(pool, step, cache, qkv, out);
}
