/* Attention over the block table, of a whole step and of its decodes: one query a sequence. */
#include "attention.h"

#include "vectors.h"

#define UNROLL _Pragma("GCC unroll 8")
#define CHUNK 128     /* tokens of one sequence that a thread takes at a time */
#define GROUP 4       /* query heads of one KV head that share a pass over its keys and values */
#define KEYS 4        /* keys that are multiplied side by side */
#define PAIRS (VECTORS == 32 ? 2 : 1) /* of vectors of a value, whose sums are in registers side by side */
#define AHEAD 16      /* tokens between those that are used and those that are asked for */
#define ROOM 16.0f    /* weights are 2 to the power of this at most, so that their sums stay finite */
#define LOWEST -1e30f
#define TOKENS 64L    /* of a segment whose parts are in memory at a time, and of those, what a thread takes */
#define TOGETHER 8L
#define FLOATS 4096L  /* of queries and sums that a pass over keys and values goes through again and again, at most */
#define PIECES 4L     /* for a thread, at least, where there are as many */
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

/* Into the second level: from there they come in time, and lines on their way to the first level are few. */
INLINE void fetch_part(const Run *r, long t, long begin, const long bytes)
{
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(r->ahead + t * r->bytes + begin + i, 0, 2);
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

/* Some KV heads of a sequence of `length` tokens, `bytes_apart`. */
typedef struct {
    const char *keys;      /* of the cache's first slot */
    const int64_t *blocks;
    long block_rows, block_size, bytes, bytes_apart, to_values, length; /* bytes of a key; from a key to its value */
} Heads;

INLINE const char *key_at(const Heads *a, Place p)
{ return a->keys + (*p.block * a->block_rows + p.offset) * a->bytes; }

/* Some query heads of one KV head, GROUP at most, and what a pass over keys and values keeps of them: the score that
 * has a weight of 1, in bits, sums of the weights, and of weights * values, in the order of load_pair. */
typedef struct {
    vec total[GROUP];
    Scores weight;
    float *q, *sums;       /* [G][d] */
    float best[GROUP];
    long kv_head;
} State;

/* The weights of a run of keys; sums so far are made less where a weight would become too large. */
INLINE void weigh_keys(State *s, const Run *keys, long d, const int is_bf16, const int G)
{
    ivec is_over = {};
    if (keys->count < LANES)
        for (int g = 0; g < G; g++) store(s->weight[g], (vec){} - INFINITY);
    score_keys(s->q, keys, d, s->weight, is_bf16, G);
    for (int g = 0; g < G; g++) is_over |= load_f32(s->weight[g]) - s->best[g] > ROOM;
    if (any(is_over))
        for (int g = 0; g < G; g++) {
            float top = largest(load_f32(s->weight[g])), factor = exp2f(s->best[g] - top);
            if (!(top > s->best[g])) continue;
            s->best[g] = top;
            s->total[g] *= factor;
            for (long i = 0; i < d; i++) s->sums[g * d + i] *= factor;
        }
    for (int g = 0; g < G; g++) {
        vec weight = vexp2(load_f32(s->weight[g]) - s->best[g]);
        store(s->weight[g], weight);
        s->total[g] += weight;
    }
}

/* All states against the tokens from t to `end`, a few at a time: all keys of these, then their values, as they lie in
 * a block, so that memory is read from end to end and has as much to do while scores become weights. */
INLINE void attend(State *states, long count, const Heads *a, long t, long end, long d, const int is_bf16, const int G)
{
    Place place = place_of(a->blocks, t, a->block_size), ahead = behind(place, AHEAD, a->block_size);
    for (long tokens; t < end; t += tokens) {
        tokens = least(least(LANES, a->block_size - place.offset), end - t);
        const char *at = key_at(a, place), *next = t + AHEAD < a->length ? key_at(a, ahead) : at;
        place = behind(place, tokens, a->block_size);
        ahead = behind(ahead, tokens, a->block_size);
        for (State *s = states; s < states + count; s++) {
            long head = s->kv_head * a->bytes_apart;
            const Run keys = {at + head, next + head, a->bytes, tokens};
            weigh_keys(s, &keys, d, is_bf16, G);
        }
        for (State *s = states; s < states + count; s++) {
            long head = a->to_values + s->kv_head * a->bytes_apart;
            const Run values = {at + head, next + head, a->bytes, tokens};
            add_values(s->weight, &values, d, s->sums, is_bf16, G);
        }
    }
}

/* Of `heads` query heads each, GROUP at most. */
static void attend_states(State *states, long count, const Heads *a, long t, long end, long d, int is_bf16, long heads)
{
#define HEADS_ARE(G)                                            \
    case G:                                                     \
        if (is_bf16) attend(states, count, a, t, end, d, 1, G); \
        else attend(states, count, a, t, end, d, 0, G);         \
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
    long kv_heads;         /* of a piece, at most */
} Decode;

INLINE long length_of(const Decode *j, long row) { return j->lens ? j->lens[row] : j->len + row; }

/* The first of a chunk's tokens that a row sees, and where they end. */
INLINE long begin_of(const Decode *j, long row, long chunk)
{
    long window = j->step->window;
    return most(chunk * CHUNK, window ? length_of(j, row) - window : 0);
}
INLINE long end_of(const Decode *j, long row, long chunk) { return least((chunk + 1) * CHUNK, length_of(j, row)); }

/* The query heads of a KV head are those of so many states, of `heads` each: where these are more than there are, some
 * heads belong to two of them. */
typedef struct {
    long states, heads;
} Split;

INLINE Split split_of(long group)
{
    long states = (group + GROUP - 1) / GROUP;
    return (Split){states, (group + states - 1) / states};
}

INLINE long first_head(Split split, long state, long group) { return least(state * split.heads, group - split.heads); }

/* Some KV heads of some rows of one sequence, CHUNK of its tokens. A query head's part: d floats of the sum of weights
 * * v, not normalised, the score that has a weight of 1, the sum of the weights. */
static void decode_piece(const void *job, long piece)
{
    const Decode *j = job;
    const Step *a = j->step;
    const Cache *cache = j->cache;
    long chunk = piece % j->chunks, spans = (a->kv_heads + j->kv_heads - 1) / j->kv_heads;
    long first = piece / j->chunks % spans * j->kv_heads, kv_heads = least(j->kv_heads, a->kv_heads - first);
    long row = piece / j->chunks / spans * j->together, rows = least(row + j->together, j->rows);
    long group = a->heads / a->kv_heads, d = a->d, part = d + 2, stride = j->chunks * part;
    long bytes = d * (cache->is_bf16 ? sizeof(bf16) : sizeof(float));
    const Split split = split_of(group);
    long count = kv_heads * split.states, vectors = (split.heads * d + LANES - 1) / LANES;
    State states[count];
    vec memory[count][2][vectors];
    const Heads keys = {
        .keys = cache->data,
        .blocks = j->blocks + (j->lens ? row * a->width : 0),
        .block_rows = cache->block_rows,
        .block_size = cache->block_size,
        .bytes = bytes,
        .bytes_apart = cache->head_rows * bytes,
        .to_values = a->kv_heads * cache->head_rows * bytes,
        .length = length_of(j, rows - 1),
    };
    for (; row < rows; row++) {
        long begin = begin_of(j, row, chunk), end = end_of(j, row, chunk);
        float *parts = j->parts + (row * a->heads * j->chunks + chunk) * part;
        if (begin >= end) {
            for (long h = first * group; h < (first + kv_heads) * group; h++) parts[h * stride + d] = -INFINITY;
            continue;
        }
        memset(memory, 0, sizeof memory);
        for (long i = 0; i < count; i++) {
            long kv_head = first + i / split.states,
                 head = kv_head * group + first_head(split, i % split.states, group);
            const float *queries = j->qkv + (row * (a->heads + 2 * a->kv_heads) + head) * d;
            State *s = &states[i];
            *s = (State){.q = (float *)memory[i][0], .sums = (float *)memory[i][1], .kv_head = kv_head};
            for (long g = 0; g < split.heads; g++) {
                to_pairs(queries + g * d, a->scale * LOG2E, s->q + g * d, d, cache->is_bf16);
                s->best[g] = LOWEST;
            }
        }
        attend_states(states, count, &keys, begin, end, d, cache->is_bf16, split.heads);
        for (long i = 0; i < count; i++) {
            const State *s = &states[i];
            float *to = parts + (s->kv_head * group + first_head(split, i % split.states, group)) * stride;
            for (long g = 0; g < split.heads; g++, to += stride) {
                from_pairs(s->sums + g * d, to, d, cache->is_bf16);
                to[d] = s->best[g];
                to[d + 1] = sum(s->total[g]);
            }
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
    long spans = (job.rows + job.together - 1) / job.together * job.chunks;
    /* As many KV heads as lie side by side, but not more than find room in a cache or leave threads without work. */
    long room = FLOATS / (2 * step->heads / step->kv_heads * step->d);
    job.kv_heads = job.together > 1 ? 1 : most(1, least(room, spans * step->kv_heads / (PIECES * pool_threads(pool))));
    job.kv_heads = least(job.kv_heads, step->kv_heads);
    parallel(pool, decode_piece, &job, spans * ((step->kv_heads + job.kv_heads - 1) / job.kv_heads));
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
