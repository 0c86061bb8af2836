/* Quantised weights, widened exactly: in registers for a product with few rows of x, or to memory. */
#include "quantized_panel.h"

/* Weight t of a quad. Its byte stays where it is, and the scale makes up for that, exactly; but in the last place a
 * byte would be the sign. */
INLINE vec widen_quant(uvec quad, int t, const Scale s)
{
    static const float unit[4] = {1.0f, 0x1p-8f, 0x1p-16f, 1.0f};
    ivec quant = (ivec)(t < 3 ? quad & (uint32_t)(0xff << 8 * t) : quad >> 24);
    return __builtin_convertvector(quant, vec) * (s.scale * unit[t]) + s.offset;
}

/* M rows of x. U partial sums keep the additions from waiting for each other. */
INLINE void tile(const float *x, const uint8_t *panel, long k, float out[][WIDTH], const int M, const int U,
                 const Format f)
{
    vec acc[4][FEW][2];
    const long stride = k;
    for (int u = 0; u < U; u++)
        for (int m = 0; m < M; m++) acc[u][m][0] = acc[u][m][1] = (vec){};
    for (; k > 0; k -= f.groups * GROUP, panel += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += f.span, x += f.span) {
            const uint8_t *group = panel + head_bytes(f) + at / GROUP * group_bytes(f);
            const Scale low = load_scale(panel, at, 0, f), high = load_scale(panel, at, 1, f);
            for (int i = 0; i < f.span; i += 4) {
                int q = (at % GROUP + i) / 4;
                uvec quads[2] = {load_quad(group, q, f), load_quad(group + WORDS / 2, q, f)};
                for (int t = 0; t < 4; t++) {
                    vec lower = widen_quant(quads[0], t, low), upper = widen_quant(quads[1], t, high);
                    for (int m = 0; m < M; m++) {
                        acc[t % U][m][0] += lower * x[m * stride + i + t];
                        acc[t % U][m][1] += upper * x[m * stride + i + t];
                    }
                }
            }
        }
    for (int m = 0; m < M; m++) {
        for (int u = 1; u < U; u++)
            for (int half = 0; half < 2; half++) acc[0][m][half] += acc[u][m][half];
        store(out[m], acc[0][m][0]);
        store(out[m] + LANES, acc[0][m][1]);
    }
}

INLINE void widen_part(const uint8_t *block, long count, float *out, const Format f)
{
    for (; count > 0; count -= f.groups * GROUP, block += block_bytes(f))
        for (int at = 0; at < f.groups * GROUP; at += f.span) {
            const uint8_t *group = block + head_bytes(f) + at / GROUP * group_bytes(f);
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

void widen_quantized(int format, const void *panel, long begin, long count, float *out)
{
#define WIDEN(NUMBER, NAME, ...)                                                                            \
    case NUMBER: {                                                                                          \
        const Format f = {__VA_ARGS__};                                                                     \
        long block = begin / (f.groups * GROUP);                                                            \
        widen_part((const uint8_t *)panel + block * block_bytes(f), count, out, f);                         \
        break;                                                                                              \
    }
    switch (format) { QUANTIZED_FORMATS(WIDEN) }
}

/* Compiling a tile takes a tenth of a second. */
#define DEFINE_TILES(NUMBER, NAME, ...)                                                                     \
    static void tile_##NAME(const float *x, const uint8_t *panel, long k, float out[][WIDTH], long rows)    \
    {                                                                                                       \
        const Format f = {__VA_ARGS__};                                                                     \
        if (rows == 1) tile(x, panel, k, out, 1, 4, f);                                                     \
        else tile(x, panel, k, out, FEW, 2, f);                                                             \
    }
QUANTIZED_FORMATS(DEFINE_TILES)

void tile_quantized(int format, const float *x, const void *panel, long k, float out[][WIDTH], long rows)
{
#define CASE(NUMBER, NAME, ...)                                                                             \
    case NUMBER: tile_##NAME(x, panel, k, out, rows); break;
    switch (format) { QUANTIZED_FORMATS(CASE) }
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
#define GATHER(NUMBER, NAME, ...)                                                                           \
    case NUMBER: gather_row(g, index, (Format){__VA_ARGS__}); break;
    switch (g->format) { QUANTIZED_FORMATS(GATHER) }
}

/* y[m, k] = the m rows, whose numbers are `rows`, of a packed weight that is not gated. */
void gather_quantized(Pool *pool, int format, const uint8_t *packed, const int64_t *rows, float *y, long m, long k)
{
    Gather gather = {packed, rows, y, k, format};
    parallel(pool, gather_piece, &gather, m);
}
