/* y = x . W^T for any number of rows of x, by one kernel: a tile of a few rows by one panel of the weight, which
 * stays in registers while it is summed up over k. With few rows the tile is as fast as memory, and each weight is
 * read once for all of them; with many it is as fast as the multipliers (Goto & van de Geijn, 2008). */
#include "amx.h"
#include "int8.h"
#include "linear.h"
#include "norm.h"
#include "packed.h"
#include "pool.h"
#include "tuning.h"

/* Bytes of the weight between what is fetched and what is used, where memory is all there is to wait for. */
#define AHEAD 4096

/* Terms of a sum that are added up one by one. */
#define DEPTH 1024L

/* Bytes of x that a thread goes through again and again, panel after panel: half a small second-level cache. */
#define BLOCK_BYTES (256L << 10)

/* Rows of such a block. */
#define BLOCK_ROWS (10 * ROWS)

/* Rows of a weight that are of one format. */
typedef struct {
    const void *panels;
    long n;
    int format; /* FORMAT_F32, FORMAT_BF16 or one of QUANTIZED_FORMATS */
} Part;

struct Linear {
    const Part *parts;        /* one below the other; gate and up, n rows each, if gated */
    const float *norm, *bias; /* [k], [n] ([2 * n] if gated), or null */
    const Tuning *tuning;
    float eps;
    long n, k;
    int num_parts, is_gated, is_clamped; /* is_clamped: see clamped_swiglu */
    int rounds_x;             /* to 8 bits, for products in integers with parts of QUANTIZED_FORMATS */
};

/* Weights i of the rows of a panel. Of bfloat16, those with an even i lie in the lower halves of words, and those with
 * an odd one in the upper: a shift or a mask widens them. */
INLINE void load_step(const void *panel, long i, const int is_odd, const int is_bf16, vec *low, vec *high)
{
    if (is_bf16) {
        const uint32_t *at = (const uint32_t *)panel + i / 2 * WIDTH;
        uvec first, second;
#if VECTORS == 16
        if (is_odd) __asm__ volatile("" ::: "memory"); /* to load them again takes no register in the meantime */
#endif
        memcpy(&first, at, sizeof first);
        memcpy(&second, at + LANES, sizeof second);
        *low = (vec)(is_odd ? first & 0xffff0000u : first << 16);
        *high = (vec)(is_odd ? second & 0xffff0000u : second << 16);
    } else {
        *low = load_f32((const float *)panel + i * WIDTH);
        *high = load_f32((const float *)panel + i * WIDTH + LANES);
    }
}

/* out[m] = x[m] . panel^T for M rows of x, `stride` floats apart; added to what out holds if `is_more`. Terms are added
 * up in the order of k whatever M is, so that a row's sums do not depend on the rows beside it; sums of DEPTH terms
 * each keep rounding small however long k is. The first goes on from `from`, or begins at 0 without it. What is to be
 * read next is fetched on the way: `step` bytes of it, from `ahead` on, for each run. */
INLINE void tile_rows(const float *x, long stride, const void *panel, long k, float (*from)[WIDTH], float out[][WIDTH],
                      int is_more, const char *ahead, long step, const int once, const int is_bf16, const int M)
{
    for (long begin = 0; begin < k; begin += DEPTH) {
        long end = k - begin < DEPTH ? k : begin + DEPTH, i = begin;
        vec acc[ROWS][2], low, high;
        for (int m = 0; m < M; m++)
            for (int half = 0; half < 2; half++) acc[m][half] = from ? load_f32(from[m] + half * LANES) : (vec){};
        from = NULL;
        for (; i + 2 <= end; i += 2)
            for (int u = 0; u < 2; u++) {
                fetch(ahead, once);
                ahead += step;
                load_step(panel, i + u, u, is_bf16, &low, &high);
                for (int m = 0; m < M; m++) {
                    acc[m][0] += low * x[m * stride + i + u];
                    acc[m][1] += high * x[m * stride + i + u];
                }
            }
        if (i < end) {
            load_step(panel, i, i % 2, is_bf16, &low, &high);
            for (int m = 0; m < M; m++) {
                acc[m][0] += low * x[m * stride + i];
                acc[m][1] += high * x[m * stride + i];
            }
        }
        for (int m = 0; m < M; m++)
            for (int half = 0; half < 2; half++) {
                if (begin || is_more) acc[m][half] += load_f32(out[m] + half * LANES);
                store(out[m] + half * LANES, acc[m][half]);
            }
    }
}

/* What is fetched `once` may bypass the second level only for a few rows: for more, the next panel lies there. */
INLINE void tile(const float *x, long stride, const void *panel, long k, float (*from)[WIDTH], float out[][WIDTH],
                 int is_more, const char *ahead, long step, int once, const int is_bf16, long rows)
{
#define ROWS_WITH(M, ONCE) tile_rows(x, stride, panel, k, from, out, is_more, ahead, step, ONCE, is_bf16, M)
#define ROWS_ARE(M)                          \
    case M:                                  \
        if (M <= 2 && once) ROWS_WITH(M, 1); \
        else ROWS_WITH(M, 0);                \
        break
    switch (rows) {
        ROWS_ARE(1);
        ROWS_ARE(2);
        ROWS_ARE(3);
        ROWS_ARE(4);
        ROWS_ARE(5);
        ROWS_ARE(6);
#if VECTORS == 32
        ROWS_ARE(7);
        ROWS_ARE(8);
        ROWS_ARE(9);
        ROWS_ARE(10);
        ROWS_ARE(11);
        ROWS_ARE(12);
#endif
    }
}

/* Compiled once for all who call it. */
static void tile_f32(const float *x, long stride, const float *panel, long k, float (*from)[WIDTH], float out[][WIDTH],
                     int is_more, const char *ahead, long step, int once, long rows)
{ tile(x, stride, panel, k, from, out, is_more, ahead, step, once, 0, rows); }

typedef struct {
    const Linear *layer;
    const float *x, *residual;
    const Int8Group *rounded; /* x, or null */
    const Narrowed *narrowed; /* x, or null */
    bf16 *widened;            /* of each thread, two panels of quantised weights; or null */
    const Narrowed *narrowed_y; /* in the place of y, or null */
    float *y;
    long m, block, panels;    /* rows of x; rows of a block; pieces of a block */
} Product;

/* What a piece is of: a panel of a part, or of the gate and as many of the up projection, and rows of x. */
typedef struct {
    const Part *part;
    long panel, column, begin, rows; /* column: of y, the part's first */
} Place;

INLINE Place place_of(const Product *p, long piece)
{
    long begin = piece / p->panels * p->block;
    Place at = {p->layer->parts, piece % p->panels, 0, begin, least(p->block, p->m - begin)};
    for (; at.panel >= panels_of(at.part->n); at.part++) {
        at.panel -= panels_of(at.part->n);
        at.column += at.part->n;
    }
    return at;
}

/* Of a block of rows. */
static long pieces_of(const Linear *layer)
{
    long panels = 0;
    for (int i = 0; i < (layer->is_gated ? 1 : layer->num_parts); i++) panels += panels_of(layer->parts[i].n);
    return panels;
}

INLINE const void *panel_at(const Part *part, long panel, long k)
{ return (const char *)part->panels + panel * panel_bytes(part->format, k); }

/* See ops/activation.py. NaN stays NaN. */
INLINE vec clamped_swiglu(vec gate, vec up)
{
    const vec alpha = (vec){} + 1.702f, limit = (vec){} + 7.0f;
    gate = choose(gate > limit, limit, gate);
    up = choose(up > limit, limit, choose(up < -limit, -limit, up));
    return gate / (1.0f + vexp(-alpha * gate)) * (up + 1.0f);
}

/* LANES columns of a place, from its column `half` on, in one row of y, from sums of a tile. */
INLINE void finish_half(const Product *p, const Place *at, int half, const float *sums, const float *up, long row)
{
    const Linear *a = p->layer;
    long of_part = at->panel * WIDTH + half, column = at->column + of_part, count = at->part->n - of_part;
    vec value = load_f32(sums);
    if (a->bias) value += load_part(a->bias + column, count);
    if (a->is_gated) {
        vec other = load_f32(up);
        if (a->bias) other += load_part(a->bias + a->n + column, count);
        value = a->is_clamped ? clamped_swiglu(value, other) : value / (1.0f + vexp(-value)) * other;
    }
    if (p->residual) value += load_part(p->residual + row * a->n + column, count);
#if HAS_BF16
    if (p->narrowed_y) {
        float part[LANES] = {}; /* zeros fill up tiles */
        if (count < LANES) store_part(part, value, count);
        put_narrowed(p->narrowed_y, row, column, count < LANES ? load_f32(part) : value);
        return;
    }
#endif
    store_part(p->y + row * a->n + column, value, count);
}

INLINE void finish(const Product *p, const Place *at, const float *sums, const float *up, long row)
{
    for (int half = 0; half < WIDTH; half += LANES) finish_half(p, at, half, sums + half, up + half, row);
}

/* sums = x . panel^T for a block of rows and a panel of float32 or bfloat16, tile by tile. The first waits for memory;
 * with more of them, each fetches its part of the next panel. */
static void multiply_plain(int format, const float *x, long rows, const char *panel, long k, float sums[][WIDTH],
                           int once)
{
    long tiles = (rows + ROWS - 1) / ROWS, run = WIDTH * plain_bytes(format), size = run * k;
    for (long t = 0; t < tiles; t++) {
        long row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
        const char *ahead = panel + (tiles == 1 ? AHEAD : size + size * t / tiles);
        if (format == FORMAT_F32)
            tile_f32(x + row * k, k, (const float *)panel, k, NULL, sums + row, 0, ahead, run / tiles, once, count);
        else tile(x + row * k, k, panel, k, NULL, sums + row, 0, ahead, run / tiles, once, 1, count);
    }
}

/* The same for quantised weights. For a few rows they are widened in registers; for more into the first-level cache,
 * once for all rows of x: PART of each row at a time, or half of it where blocks are small, which leaves room for x. */
static void multiply_quantized(int format, const float *x, long rows, const void *panel, long k, float sums[][WIDTH],
                               const Tuning *tuning)
{
    float weights[PART * WIDTH], halves[BLOCK_ROWS][WIDTH];
    long tiles = (rows + ROWS - 1) / ROWS, step = has_small_blocks(format) ? PART / 2 : PART;
    if (rows <= least(tuning->few_rows, MOST_FEW_ROWS)) {
        tile_quantized(format, x, panel, k, sums, rows, tuning);
        return;
    }
    for (long i = 0; i < k; i += step) {
        long count = least(step, k - i);
        int is_second = i % PART > 0, is_last = (i + step) % PART == 0 || i + step >= k;
        widen_quantized(format, panel, i, count, weights, tuning->fetches_once);
        for (long t = 0; t < tiles; t++) {
            long row = rows * t / tiles, next = rows * (t + 1) / tiles;
            tile_f32(x + row * k + i, k, weights, count, is_second ? halves + row : NULL,
                     (is_last ? sums : halves) + row, is_last && i >= PART, (const char *)weights, 0, 0, next - row);
        }
    }
}

static void product_piece(const void *job, long piece)
{
    const Product *p = job;
    const Linear *a = p->layer;
    const Place at = place_of(p, piece);
    const float *x = p->x + at.begin * a->k;
    float sums[2][BLOCK_ROWS][WIDTH];
    for (int half = 0; half <= a->is_gated; half++) {
        int format = at.part[half].format;
        const void *panel = panel_at(&at.part[half], at.panel, a->k);
        if (is_plain(format)) multiply_plain(format, x, at.rows, panel, a->k, sums[half], a->tuning->fetches_once);
        else if (p->rounded)
            tile_int8(format, p->rounded + at.begin, p->m, panel, a->k, sums[half], at.rows, a->tuning->fetches_once);
        else multiply_quantized(format, x, at.rows, panel, a->k, sums[half], a->tuning);
    }
    for (long r = 0; r < at.rows; r++) finish(p, &at, sums[0][r], sums[1][r], at.begin + r);
}

#if HAS_BF16

/* Asks for where results of `count` rows go, `columns` of a place from its column `half` on. */
INLINE void fetch_results(const Product *p, const Place *at, int half, long columns, long row, long count)
{
    long n = p->layer->n, column = at->column + at->panel * WIDTH + half;
    for (long r = row; r < row + count; r++)
        for (long i = column; i < column + columns; i += LANES)
            if (p->narrowed_y) fetch_to_write(narrowed_at(p->narrowed_y, r, i));
            else fetch_to_write(p->y + r * n + i);
}

/* The same with x in bfloat16. Quantised weights are widened once for all rows of the block. */
static void matrix_piece(const void *job, long piece)
{
    const Product *p = job;
    const Linear *a = p->layer;
    const Place at = place_of(p, piece);
    const bf16 *panels[2];
    float sums[2][MATRIX_ROWS][WIDTH];
    long size = WIDTH * matrix_depth(a->k);
    for (int half = 0; half <= a->is_gated; half++) {
        const Part *part = &at.part[half];
        panels[half] = panel_at(part, at.panel, a->k);
        if (part->format == FORMAT_BF16) continue;
        bf16 *widened = p->widened + (2 * pool_self() + half) * size;
        widen_to_matrix(part->format, panels[half], a->k, widened, a->tuning->fetches_once);
        panels[half] = widened;
    }
    begin_matrix();
    /* Many rows of both projections: half of the columns at a time, whose weights stay in the first-level cache. */
    if (a->is_gated && at.rows > MATRIX_ROWS) {
        for (int half = 0; half < WIDTH; half += LANES)
            for (long row = 0; row < at.rows; row += MATRIX_ROWS) {
                long count = least(MATRIX_ROWS, at.rows - row), first = at.begin + row;
                const bf16 *ahead =
                    row || at.part[half / LANES].format != FORMAT_BF16 ? NULL : panels[half / LANES] + size;
                fetch_results(p, &at, half, LANES, first, count);
                Halves halves = {panels[0] + 2 * half, panels[1] + 2 * half};
                multiply_matrix(p->narrowed, first, count, halves, ahead, sums[0]);
                for (long r = 0; r < count; r++) finish_half(p, &at, half, sums[0][r], sums[0][r] + LANES, first + r);
            }
        end_matrix();
        return;
    }
    for (long row = 0; row < at.rows; row += MATRIX_ROWS) {
        long count = least(MATRIX_ROWS, at.rows - row);
        fetch_results(p, &at, 0, WIDTH, at.begin + row, count);
        for (int half = 0; half <= a->is_gated; half++) {
            /* The first rows fetch the next panel, which follows this one. */
            const bf16 *ahead = row || at.part[half].format != FORMAT_BF16 ? NULL : panels[half] + size;
            Halves halves = {panels[half], panels[half] + WIDTH};
            multiply_matrix(p->narrowed, at.begin + row, count, halves, ahead, sums[half]);
        }
        for (long r = 0; r < count; r++) finish(p, &at, sums[0][r], sums[1][r], at.begin + row + r);
    }
    end_matrix();
}

/* As many rows as stay in the second-level cache, panel after panel; fewer if threads would have nothing to do, and
 * about as many in every block. */
static long matrix_block(long m, long k, long panels, int threads)
{
    long block = most(NARROWED_BYTES / (2 * k) / MATRIX_ROWS, 1) * MATRIX_ROWS;
    while (block > 2 * MATRIX_ROWS && panels * ((m + block - 1) / block) < 4 * threads)
        block = block / 2 / MATRIX_ROWS * MATRIX_ROWS;
    long blocks = (m + block - 1) / block, rows = (m + blocks - 1) / blocks;
    return (rows + MATRIX_ROWS - 1) / MATRIX_ROWS * MATRIX_ROWS;
}

/* Whether m rows are multiplied in bfloat16: on the matrix unit invariant ones all, unless they are multiplied in
 * integers; by AVX512-BF16 many that are neither. */
static int takes_matrix(const Linear *layer, long m)
{
    const Tuning *tuning = layer->tuning;
    int border = HAS_AMX ? tuning->matrix_rows : EXACT_ROWS + 1;
    for (int i = 0; i < layer->num_parts; i++) {
        if (layer->parts[i].format == FORMAT_F32) return 0;
        if (layer->parts[i].format == FORMAT_BF16) continue;
        if (tuning->is_exact) return 0;
        if (HAS_AMX) border = tuning->matrix_rows_quantized;
    }
    if (!HAS_AMX && (tuning->is_invariant || layer->rounds_x || !tuning->multiplies_bf16)) return 0;
    return tuning->is_invariant ? !layer->rounds_x : m >= border;
}

/* Few rows cost no time twice, and so nothing of their precision. */
static Narrowed narrowed_rows(const Linear *layer, long m)
{ return (Narrowed){.k = layer->k, .m = m, .has_rest = layer->tuning->is_invariant || m <= EXACT_ROWS}; }

static long widened_numbers(const Pool *pool, const Linear *layer)
{
    for (int i = 0; i < layer->num_parts; i++)
        if (layer->parts[i].format != FORMAT_BF16) return 2 * pool_threads(pool) * WIDTH * matrix_depth(layer->k);
    return 0;
}

static void multiply_narrowed(Pool *pool, Product p)
{
    p.panels = pieces_of(p.layer);
    p.block = matrix_block(p.m, p.layer->k, p.panels, pool_threads(pool));
    parallel(pool, matrix_piece, &p, p.panels * ((p.m + p.block - 1) / p.block));
}

static int multiply_by_matrix(Pool *pool, const Linear *layer, const float *x, const float *residual, float *y, long m)
{
    Narrowed narrowed = narrowed_rows(layer, m);
    long numbers = narrowed_numbers(&narrowed);
    narrowed.values = (bf16 *)pool_scratch(pool, (numbers + widened_numbers(pool, layer)) / 2);
    if (!narrowed.values) return -1;
    narrow_rows(pool, x, layer->norm, layer->eps, &narrowed);
    Product product = {.layer = layer, .residual = residual, .narrowed = &narrowed, .y = y, .m = m};
    product.widened = narrowed.values + numbers;
    multiply_narrowed(pool, product);
    return 0;
}

/* What gate_up gives is rounded once, and goes into the other product's tiles. */
static int mlp_by_matrix(Pool *pool, const Linear *gate_up, const Linear *down, const float *x, const float *residual,
                         float *y, long m)
{
    Narrowed outer = narrowed_rows(gate_up, m), inner = narrowed_rows(down, m);
    long numbers = narrowed_numbers(&outer), all = numbers + narrowed_numbers(&inner);
    long widened = most(widened_numbers(pool, gate_up), widened_numbers(pool, down));
    outer.values = (bf16 *)pool_scratch(pool, (all + widened) / 2);
    if (!outer.values) return -1;
    inner.values = outer.values + numbers;
    narrow_rows(pool, x, gate_up->norm, gate_up->eps, &outer);
    Product first = {.layer = gate_up, .narrowed = &outer, .narrowed_y = &inner, .m = m};
    Product second = {.layer = down, .residual = residual, .narrowed = &inner, .y = y, .m = m};
    first.widened = second.widened = outer.values + all;
    multiply_narrowed(pool, first);
    multiply_narrowed(pool, second);
    return 0;
}

#endif

/* y[m, n] = x[m, k] . W^T + bias + residual[m, n], where the rows of x are normalised before if the layer has a
 * norm. If it is gated, W is [2 * n, k], gate before up, and silu(gate) * up takes the place of the product
 * (arXiv:2002.05202). residual may be null, or y. Returns -1 if there is no memory, else 0. */
int linear(Pool *pool, const Linear *layer, const float *x, const float *residual, float *y, long m)
{
    if (!m) return 0;
    long k = layer->k, panels = pieces_of(layer);
    long block = least(BLOCK_BYTES / (4 * k) / ROWS, BLOCK_ROWS / ROWS) * ROWS;
#if HAS_BF16
    if (takes_matrix(layer, m)) return multiply_by_matrix(pool, layer, x, residual, y, m);
#endif
    long normed_floats = layer->norm ? m * k : 0;
    long rounded_floats = layer->rounds_x ? m * k / GROUP * (long)(sizeof(Int8Group) / sizeof(float)) : 0;
    float *scratch = NULL;
    if (normed_floats || rounded_floats) {
        scratch = pool_scratch(pool, normed_floats + rounded_floats);
        if (!scratch) return -1;
    }
    if (layer->norm) {
        rms_norm(pool, x, layer->norm, scratch, m, k, layer->eps);
        x = scratch;
    }
    Int8Group *rounded = layer->rounds_x ? (Int8Group *)(scratch + normed_floats) : NULL;
    if (rounded) quantize_rows(pool, x, rounded, m, k);
    Product product = {
        .layer = layer,
        .x = x,
        .residual = residual,
        .rounded = rounded,
        .y = y,
        .m = m,
        .block = block > ROWS ? block : ROWS,
        .panels = panels,
    };
    parallel(pool, product_piece, &product, panels * ((m + product.block - 1) / product.block));
    return 0;
}

/* y[m, n] = down(gate_up(x[m, k])) + residual[m, n]; inner: room for m rows of what gate_up gives. Returns -1 if there
 * is no memory, else 0. */
int mlp(Pool *pool, const Linear *gate_up, const Linear *down, const float *x, float *inner, const float *residual,
        float *y, long m)
{
#if HAS_BF16
    if (m && !down->norm && takes_matrix(gate_up, m) && takes_matrix(down, m))
        return mlp_by_matrix(pool, gate_up, down, x, residual, y, m);
#endif
    if (linear(pool, gate_up, x, NULL, inner, m)) return -1;
    return linear(pool, down, inner, residual, y, m);
}
