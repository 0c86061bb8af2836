/* Attention over the block table, of a whole step and of its decodes: one query a sequence. */
#include "attention.h"

#include "vectors.h"

#define UNROLL _Pragma("GCC unroll 8")
#define CHUNK 128     /* tokens of one sequence that a thread takes at a time */
#define GROUP 4       /* query heads of one KV head that share a pass over its keys and values */
#define KEYS 4        /* keys that are multiplied side by side */
#define PAIRS (VECTORS == 32 ? 2 : 1) /* of vectors of a value, whose sums are in registers side by side */
#define AHEAD 32      /* tokens between those that are used and those that are asked for */
#define ROOM 16.0f    /* weights are 2 to the power of this at most, so that their sums stay finite */
#define LOWEST -1e30f
#define TOKENS 64L    /* of a segment whose parts are in memory at a time, and of those, what a thread takes */
#define TOGETHER 8L
#define LOG2E 1.44269504088896341f

typedef float Scores[GROUP][LANES];

/* Element i of a token's key or value. */
INLINE float element(const void *p, long i, const int is_bf16)
{ return is_bf16 ? widen(((const bf16 *)p)[i]) : ((const float *)p)[i]; }

/* scale * x in the order in which load_pair gives the elements of a key: of each PAIR of bfloat16, even before odd. */
INLINE void to_pairs(const float *x, float scale, float *pairs, long d, const int is_bf16)
{
    long i = 0;
    for (; is_bf16 && i + PAIR <= d; i += PAIR)
        for (int j = 0; j < LANES; j++) {
            pairs[i + j] = scale * x[i + 2 * j];
            pairs[i + LANES + j] = scale * x[i + 2 * j + 1];
        }
    for (; i < d; i++) pairs[i] = scale * x[i];
}

/* And back, without the scale. */
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

/* Some neighbouring tokens of one head, `bytes` apart, and those whose memory is asked for in the meantime. */
typedef struct {
    const char *at, *ahead;
    long bytes, count;
} Run;

INLINE void fetch_part(const Run *r, long t, long begin, const long bytes)
{
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(r->ahead + t * r->bytes + begin + i);
}

/* acc[t][g] = q[g] . key t in as many parts as there are lanes, for G queries and K keys from `first` on, up to where d
 * is no whole PAIR any more. */
INLINE void multiply_keys(const float *q, const Run *keys, long first, long d, vec acc[KEYS][GROUP], const int is_bf16,
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
            fetch_part(keys, first + t, i * size, PAIR * size);
            load_pair(keys->at + (first + t) * keys->bytes, i, is_bf16, &low, &high);
            for (int g = 0; g < G; g++) acc[t][g] += low * query[g][0];
            for (int g = 0; g < G; g++) acc[t][g] += high * query[g][1];
        }
    }
}

/* score[g][t] = q[g] . key t, for G queries and LANES keys or fewer, of which the rest are left as they are. */
INLINE void score_keys(const float *q, const Run *keys, long d, Scores score, const int is_bf16, const int G)
{
    vec acc[KEYS][GROUP], part[LANES / KEYS][GROUP];
    if (keys->count == LANES && d >= PAIR) { /* GCC, which sees that d is no less, keeps the sums in registers */
        UNROLL for (int i = 0; i < LANES / KEYS; i++) {
            multiply_keys(q, keys, i * KEYS, d, acc, is_bf16, G, KEYS);
            for (int g = 0; g < G; g++)
                part[i][g] = add_runs(add_runs(acc[0][g], acc[1][g], 1), add_runs(acc[2][g], acc[3][g], 1), 2);
        }
        for (int g = 0; g < G; g++) {
            /* What steps are has to be known when this is compiled: else their shuffles are built each time. */
            if (LANES > KEYS)
                for (int i = 0; i < LANES / KEYS / 2; i++)
                    part[i][g] = add_runs(part[2 * i][g], part[2 * i + 1][g], KEYS);
            if (LANES > 2 * KEYS) part[0][g] = add_runs(part[0][g], part[1][g], 2 * KEYS);
            store(score[g], part[0][g]);
        }
    } else
        for (long t = 0; t < keys->count; t++) {
            multiply_keys(q, keys, t, d, acc, is_bf16, G, 1);
            for (int g = 0; g < G; g++) score[g][t] = sum(acc[0][g]);
        }
    for (long i = d / PAIR * PAIR; i < d; i++)
        for (long t = 0; t < keys->count; t++)
            for (int g = 0; g < G; g++) score[g][t] += q[g * d + i] * element(keys->at + t * keys->bytes, i, is_bf16);
}

/* sums[g] += weight[g][t] * value t, of P pairs of vectors from element i on. */
INLINE void add_pairs(Scores weight, const Run *values, long i, float *sums, long d, const int is_bf16, const int G,
                      const int P)
{
    vec acc[GROUP][2 * PAIRS], value[2 * PAIRS];
    long size = is_bf16 ? sizeof(bf16) : sizeof(float);
    for (int g = 0; g < G; g++)
        for (int p = 0; p < 2 * P; p++) acc[g][p] = load_f32(sums + g * d + i + p * LANES);
    for (long t = 0; t < values->count; t++) {
        fetch_part(values, t, i * size, P * PAIR * size);
        for (int p = 0; p < P; p++)
            load_pair(values->at + t * values->bytes, i + p * PAIR, is_bf16, &value[2 * p], &value[2 * p + 1]);
        for (int g = 0; g < G; g++)
            for (int p = 0; p < 2 * P; p++) acc[g][p] += weight[g][t] * value[p];
    }
    for (int g = 0; g < G; g++)
        for (int p = 0; p < 2 * P; p++) store(sums + g * d + i + p * LANES, acc[g][p]);
}

INLINE void add_values(Scores weight, const Run *values, long d, float *sums, const int is_bf16, const int G)
{
    long i = 0;
    for (; i + PAIRS * PAIR <= d; i += PAIRS * PAIR) add_pairs(weight, values, i, sums, d, is_bf16, G, PAIRS);
    for (; i + PAIR <= d; i += PAIR) add_pairs(weight, values, i, sums, d, is_bf16, G, 1);
    for (; i < d; i++)
        for (int g = 0; g < G; g++)
            for (long t = 0; t < values->count; t++)
                sums[g * d + i] += weight[g][t] * element(values->at + t * values->bytes, i, is_bf16);
}

/* A token of a sequence. */
typedef struct {
    const int64_t *block; /* that it lies in */
    long offset;
} Place;

INLINE Place place_of(const int64_t *blocks, long token, long size)
{ return (Place){blocks + token / size, token % size}; }

INLINE Place behind(Place p, long count, long size)
{
    for (p.offset += count; p.offset >= size; p.offset -= size) p.block++;
    return p;
}

/* One KV head of a sequence of `length` tokens. */
typedef struct {
    const char *keys;      /* of the cache's first slot */
    const int64_t *blocks;
    long block_rows, block_size, bytes, to_values, length; /* bytes of a key; from a key to its value */
} Head;

INLINE const char *key_at(const Head *a, Place p) { return a->keys + (*p.block * a->block_rows + p.offset) * a->bytes; }

/* G query heads of one KV head against its tokens from t to `end`, a few at a time, so that memory has as much to do
 * while scores become weights as while keys are read. Their parts, `stride` floats apart: d floats of the sum of
 * weights * v, not normalised, the score that has a weight of 1, the sum of the weights; scores in bits. */
INLINE void attend(const float *queries, const Head *a, long t, long end, long d, float scale, float *part, long stride,
                   const int is_bf16, const int G)
{
    float q[G * d], sums[G * d], best[GROUP];
    Scores score;
    vec total[GROUP];
    Place place = place_of(a->blocks, t, a->block_size), ahead = behind(place, AHEAD, a->block_size);
    for (int g = 0; g < G; g++) {
        to_pairs(queries + g * d, scale * LOG2E, q + g * d, d, is_bf16);
        total[g] = (vec){};
        best[g] = LOWEST;
    }
    memset(sums, 0, sizeof sums);
    for (long count; t < end; t += count) {
        count = least(least(LANES, a->block_size - place.offset), end - t);
        const char *at = key_at(a, place), *next = t + AHEAD < a->length ? key_at(a, ahead) : at;
        const Run keys = {at, next, a->bytes, count};
        const Run values = {at + a->to_values, next + a->to_values, a->bytes, count};
        place = behind(place, count, a->block_size);
        ahead = behind(ahead, count, a->block_size);
        if (count < LANES)
            for (int g = 0; g < G; g++) store(score[g], (vec){} - INFINITY);
        score_keys(q, &keys, d, score, is_bf16, G);
        ivec is_over = {};
        for (int g = 0; g < G; g++) is_over |= load_f32(score[g]) - best[g] > ROOM;
        if (any(is_over))
            for (int g = 0; g < G; g++) {
                float top = largest(load_f32(score[g])), factor = exp2f(best[g] - top);
                if (!(top > best[g])) continue;
                best[g] = top;
                total[g] *= factor;
                for (long i = 0; i < d; i++) sums[g * d + i] *= factor;
            }
        for (int g = 0; g < G; g++) {
            vec weight = vexp2(load_f32(score[g]) - best[g]);
            store(score[g], weight);
            total[g] += weight;
        }
        add_values(score, &values, d, sums, is_bf16, G);
    }
    for (int g = 0; g < G; g++) {
        from_pairs(sums + g * d, part + g * stride, d, is_bf16);
        part[g * stride + d] = best[g];
        part[g * stride + d + 1] = sum(total[g]);
    }
}

/* `heads` of them: at most GROUP. */
static void attend_heads(const float *q, const Head *a, long t, long end, long d, float scale, float *part, long stride,
                         int is_bf16, long heads)
{
#define HEADS_ARE(G)                                                     \
    case G:                                                              \
        if (is_bf16) attend(q, a, t, end, d, scale, part, stride, 1, G); \
        else attend(q, a, t, end, d, scale, part, stride, 0, G);         \
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

/* One KV head of some rows of one sequence, CHUNK of its tokens. */
static void decode_piece(const void *job, long piece)
{
    const Decode *j = job;
    const Step *a = j->step;
    const Cache *cache = j->cache;
    long chunk = piece % j->chunks, head = piece / j->chunks % a->kv_heads;
    long row = piece / j->chunks / a->kv_heads * j->together, last = least(row + j->together, j->rows) - 1;
    long group = a->heads / a->kv_heads, d = a->d, part = d + 2, stride = j->chunks * part;
    long bytes = d * (cache->is_bf16 ? sizeof(bf16) : sizeof(float)), of_head = cache->head_rows * bytes;
    const Head keys = {
        .keys = (const char *)cache->data + head * of_head,
        .blocks = j->blocks + (j->lens ? row * a->width : 0),
        .block_rows = cache->block_rows,
        .block_size = cache->block_size,
        .bytes = bytes,
        .to_values = a->kv_heads * of_head,
        .length = length_of(j, last),
    };
    for (; row <= last; row++) {
        long begin = begin_of(j, row, chunk), end = end_of(j, row, chunk);
        for (long h = head * group; h < (head + 1) * group; h += GROUP) {
            const float *queries = j->qkv + (row * (a->heads + 2 * a->kv_heads) + h) * d;
            float *at = j->parts + ((row * a->heads + h) * j->chunks + chunk) * part;
            long heads = least((head + 1) * group - h, GROUP);
            if (begin < end) attend_heads(queries, &keys, begin, end, d, a->scale, at, stride, cache->is_bf16, heads);
            else
                for (long g = 0; g < heads; g++) at[g * stride + d] = -INFINITY;
        }
    }
}

/* The parts of one query head, by their maxima, into its output; a sink is a part without a value. */
static void merge_piece(const void *job, long query)
{
    const Decode *j = job;
    long d = j->step->d, part = d + 2;
    const float *parts = j->parts + query * j->chunks * part;
    const float *sinks = j->cache->sinks;
    const float sink = sinks ? LOG2E * sinks[query % j->step->heads] : -INFINITY;
    float *result = j->out + query * d, best = sink, total = 0;
    for (long c = 0; c < j->chunks; c++) {
        float top = parts[c * part + d];
        best = top > best || top != top ? top : best;
    }
    memset(result, 0, d * sizeof(float));
    if (sinks) total = exp2f(sink - best);
    for (long c = 0; c < j->chunks; c++) {
        const float *p = parts + c * part;
        if (p[d] == -INFINITY) continue;
        float factor = exp2f(p[d] - best);
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
