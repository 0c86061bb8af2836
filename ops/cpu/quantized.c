/* Quantised weights, widened exactly: the quants alone in registers for a product, or whole weights to memory. */
#include "quantized_panel.h"

/* Quant t of a quad, less that of a weight of 0, 2^(8 t) fold: see widen_quant. */
INLINE vec take_quant(uvec quad, int t, const Format f)
{
    const int shift = t < 3 ? 8 * t : 0;
    ivec quant = (ivec)(t < 3 ? quad & 0xffu << shift : quad >> 24);
    return __builtin_convertvector(f.sign ? quant : quant - (f.zero << shift), vec);
}

INLINE float sum_up(const float *x, const int count)
{
    vec total = load_f32(x);
    for (int i = LANES; i < count; i += LANES) total += load_f32(x + i);
    return sum(total);
}

/* One row of x, faster than tile_rows but rounded otherwise. In a span, the quants times x are added up, separately for
 * each place in a quad; then they are scaled, and the offset is multiplied with the sum of x. */
INLINE void tile_row(const float *x, const uint8_t *panel, long k, float *out, int once, const Format f)
{
    vec total[2] = {};
    for (; k > 0; k -= f.groups * GROUP, panel += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += f.span, x += f.span) {
            const uint8_t *group = panel + head_bytes(f) + at / GROUP * group_bytes(f);
            if (at % GROUP == 0) fetch_ahead(group, f, once);
            vec acc[2][4] = {};
#pragma GCC unroll 8
            for (int i = 0; i < f.span; i += 4) {
                int q = (at % GROUP + i) / 4;
                uvec quads[2] = {load_quad(group, q, f), load_quad(group + WORDS / 2, q, f)};
                for (int t = 0; t < 4; t++)
                    for (int half = 0; half < 2; half++) acc[half][t] += take_quant(quads[half], t, f) * x[i + t];
            }
            float sum = f.sign ? sum_up(x, f.span) : 0.0f;
            for (int half = 0; half < 2; half++) {
                const Scale s = load_scale(panel, at, half, f);
                const vec *a = acc[half];
                total[half] += s.scale * (a[0] + a[3] + a[1] * 0x1p-8f + a[2] * 0x1p-16f);
                if (f.sign) total[half] += s.offset * sum;
            }
        }
    store(out, total[0]);
    store(out + LANES, total[1]);
}

/* M rows of x, k floats apart, by weights that are widened in registers, once for all of them. Terms are added up in
 * the order in which tile_f32 adds up those of widened weights, PART after PART, so that a row's sums are the same. */
INLINE void tile_rows(const float *x, const uint8_t *panel, long k, float out[][WIDTH], int once, const int M,
                      const Format f)
{
    for (long i = 0; i < k; i += PART) {
        vec acc[MOST_FEW_ROWS][2];
        for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = (vec){};
        for (long j = i; j < least(k, i + PART); panel += block_bytes(f))
            for (int at = 0; at < f.groups * GROUP; at += f.span, j += f.span) {
                const uint8_t *group = panel + head_bytes(f) + at / GROUP * group_bytes(f);
                if (at % GROUP == 0) fetch_ahead(group, f, once);
                const Scale low = load_scale(panel, at, 0, f), high = load_scale(panel, at, 1, f);
#pragma GCC unroll 1
                for (int q = 0; q < f.span / 4; q++) {
                    uvec lower = load_quad(group, at % GROUP / 4 + q, f);
                    uvec upper = load_quad(group + WORDS / 2, at % GROUP / 4 + q, f);
                    for (int t = 0; t < 4; t++) {
                        vec a = widen_quant(lower, t, low), b = widen_quant(upper, t, high);
                        for (int m = 0; m < M; m++) {
                            acc[m][0] += a * x[m * k + j + 4 * q + t];
                            acc[m][1] += b * x[m * k + j + 4 * q + t];
                        }
                    }
                }
            }
        for (int m = 0; m < M; m++)
            for (int half = 0; half < 2; half++) {
                if (i) acc[m][half] += load_f32(out[m] + half * LANES);
                store(out[m] + half * LANES, acc[m][half]);
            }
    }
}

INLINE void widen_part(const uint8_t *block, long count, float *out, int once, const Format f)
{
    for (; count > 0; count -= f.groups * GROUP, block += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += f.span) {
            const uint8_t *group = block + head_bytes(f) + at / GROUP * group_bytes(f);
            if (at % GROUP == 0) fetch_ahead(group, f, once);
            for (int half = 0; half < 2; half++) {
                const Scale scale = load_scale(block, at, half, f);
#pragma GCC unroll 8
                for (int i = 0; i < f.span; i += 4) {
                    uvec quad = load_quad(group + half * WORDS / 2, (at % GROUP + i) / 4, f);
                    for (int t = 0; t < 4; t++)
                        store(out + (i + t) * WIDTH + half * LANES, widen_quant(quad, t, scale));
                }
            }
            out += f.span * WIDTH;
        }
}

int has_small_blocks(int format)
{
#define GROUPS(NUMBER, NAME, ...) \
    case NUMBER: return ((Format){__VA_ARGS__}).groups == 1;
    switch (format) {
        QUANTIZED_FORMATS(GROUPS)
    }
    return 0;
}

void widen_quantized(int format, const void *panel, long begin, long count, float *out, int once)
{
#define WIDEN(NUMBER, NAME, ...)                                                          \
    case NUMBER: {                                                                        \
        const Format f = {__VA_ARGS__};                                                   \
        long block = begin / (f.groups * GROUP);                                          \
        widen_part((const uint8_t *)panel + block * block_bytes(f), count, out, once, f); \
        break;                                                                            \
    }
    switch (format) {
        QUANTIZED_FORMATS(WIDEN)
    }
}

INLINE void tile(const float *x, const uint8_t *panel, long k, float out[][WIDTH], long rows, const Tuning *tuning,
                 const Format f)
{
    int once = tuning->fetches_once;
    switch (rows) {
    case 1:
        if (tuning->is_invariant) tile_rows(x, panel, k, out, once, 1, f);
        else tile_row(x, panel, k, out[0], once, f);
        break;
    case 2: tile_rows(x, panel, k, out, once, 2, f); break;
    case 3: tile_rows(x, panel, k, out, once, 3, f); break;
    case 4: tile_rows(x, panel, k, out, once, 4, f); break;
    }
}

/* One function for each format, as the compiler's time grows faster than a function does. */
#define TILE_FUNCTION(NUMBER, NAME, ...)                                                                   \
    static __attribute__((noinline)) void tile_##NAME(const float *x, const uint8_t *panel, long k,        \
                                                      float out[][WIDTH], long rows, const Tuning *tuning) \
    { tile(x, panel, k, out, rows, tuning, (Format){__VA_ARGS__}); }
QUANTIZED_FORMATS(TILE_FUNCTION)

void tile_quantized(int format, const float *x, const void *panel, long k, float out[][WIDTH], long rows,
                    const Tuning *tuning)
{
#define TILE(NUMBER, NAME, ...) \
    case NUMBER: tile_##NAME(x, panel, k, out, rows, tuning); break;
    switch (format) {
        QUANTIZED_FORMATS(TILE)
    }
}

typedef struct {
    const uint8_t *packed;
    const int64_t *rows;
    float *y;
    long k;
    int format;
} Gather;

/* One row: its panel is widened, of which only its lane is kept. */
INLINE void gather_row(const Gather *g, long index, const Format f)
{
    long row = g->rows[index], lane = row % WIDTH;
    int half = lane / LANES;
    const uint8_t *block = g->packed + row / WIDTH * (g->k / (f.groups * GROUP)) * block_bytes(f);
    float *y = g->y + index * g->k;
    for (long i = 0; i < g->k; i += f.groups * GROUP, block += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += 4) {
            const uint8_t *group = block + head_bytes(f) + at / GROUP * group_bytes(f);
            const Scale scale = load_scale(block, at, half, f);
            uvec quad = load_quad(group + half * WORDS / 2, at % GROUP / 4, f);
            for (int t = 0; t < 4; t++) *y++ = widen_quant(quad, t, scale)[lane % LANES];
        }
}

static void gather_piece(const void *job, long index)
{
    const Gather *g = job;
#define GATHER(NUMBER, NAME, ...) \
    case NUMBER: gather_row(g, index, (Format){__VA_ARGS__}); break;
    switch (g->format) {
        QUANTIZED_FORMATS(GATHER)
    }
}

/* y[m, k] = the m rows, whose numbers are `rows`, of a packed weight that is not gated. */
void gather_quantized(Pool *pool, int format, const uint8_t *packed, const int64_t *rows, float *y, long m, long k)
{
    Gather gather = {packed, rows, y, k, format};
    parallel(pool, gather_piece, &gather, m);
}
