/* From the blocks of a GGUF file (ggml-common.h describes them) to the panels of quantized.h. */
#include "quantized.h"

typedef struct {
    uint16_t d, m;
    int8_t scales[16], offsets[16]; /* multiples of d and m */
    uint32_t quads[8][8];           /* of each 32 weights: four quants a word */
} Block;

#define EACH(bits) (0x01010101u * ((1u << (bits)) - 1)) /* the low bits of each byte */

INLINE uint16_t half_at(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}
INLINE uint32_t word_at(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}

/* The low halves of 16 bytes are the first 16 weights, the high halves the others. */
INLINE void unpack_halves(const uint8_t *p, uint32_t quads[8])
{
    for (int q = 0; q < 8; q++) quads[q] = word_at(p + q % 4 * 4) >> q / 4 * 4 & EACH(4);
}

/* Bit i of the word at p is the fifth of weight i. */
INLINE void add_fifth_bits(const uint8_t *p, Block *b)
{
    for (int q = 0; q < 8; q++) b->quads[0][q] |= ((word_at(p) >> 4 * q & 15) * 0x00204081u & EACH(1)) << 4;
}

static void unpack_q4_0(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    unpack_halves(p + 2, b->quads[0]);
}

static void unpack_q4_1(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    b->m = half_at(p + 2);
    unpack_halves(p + 4, b->quads[0]);
}

static void unpack_q5_0(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    unpack_halves(p + 6, b->quads[0]);
    add_fifth_bits(p + 2, b);
}

static void unpack_q5_1(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    b->m = half_at(p + 2);
    unpack_halves(p + 8, b->quads[0]);
    add_fifth_bits(p + 4, b);
}

static void unpack_q8_0(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    for (int q = 0; q < 8; q++) b->quads[0][q] = word_at(p + 2 + 4 * q) ^ 0x80808080u; /* signed: + 128 */
}

/* `bits` bits of the quants of group g from 32 bytes that `per` groups share. */
INLINE void unpack_shared(const uint8_t *p, int shift, int bits, int at, uint32_t quads[8])
{
    for (int q = 0; q < 8; q++) quads[q] |= (word_at(p + 4 * q) >> shift & EACH(bits)) << at;
}

static void unpack_q2_k(const uint8_t *p, Block *b)
{
    b->d = half_at(p + 80);
    b->m = half_at(p + 82);
    for (int i = 0; i < 16; i++) {
        b->scales[i] = p[i] & 15;
        b->offsets[i] = p[i] >> 4;
    }
    for (int g = 0; g < 8; g++) unpack_shared(p + 16 + g / 4 * 32, 2 * (g % 4), 2, 0, b->quads[g]);
}

static void unpack_q3_k(const uint8_t *p, Block *b)
{
    const uint8_t *scales = p + 96;
    b->d = half_at(p + 108);
    for (int i = 0; i < 16; i++)
        b->scales[i] = ((scales[i % 8] >> i / 8 * 4 & 15) | (scales[8 + i % 4] >> i / 4 * 2 & 3) << 4) - 32;
    for (int g = 0; g < 8; g++) {
        unpack_shared(p + 32 + g / 4 * 32, 2 * (g % 4), 2, 0, b->quads[g]);
        unpack_shared(p, g, 1, 2, b->quads[g]);
    }
}

/* Eight scales and eight offsets of 6 bits in 12 bytes. */
INLINE void unpack_scales(const uint8_t *p, Block *b)
{
    for (int i = 0; i < 4; i++) {
        b->scales[i] = p[i] & 63;
        b->offsets[i] = p[i + 4] & 63;
        b->scales[i + 4] = (p[i + 8] & 15) | p[i] >> 6 << 4;
        b->offsets[i + 4] = p[i + 8] >> 4 | p[i + 4] >> 6 << 4;
    }
}

static void unpack_q4_k(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    b->m = half_at(p + 2);
    unpack_scales(p + 4, b);
    for (int g = 0; g < 8; g++) unpack_shared(p + 16 + g / 2 * 32, g % 2 * 4, 4, 0, b->quads[g]);
}

static void unpack_q5_k(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    b->m = half_at(p + 2);
    unpack_scales(p + 4, b);
    for (int g = 0; g < 8; g++) {
        unpack_shared(p + 48 + g / 2 * 32, g % 2 * 4, 4, 0, b->quads[g]);
        unpack_shared(p + 16, g, 1, 4, b->quads[g]);
    }
}

static void unpack_q6_k(const uint8_t *p, Block *b)
{
    b->d = half_at(p + 208);
    memcpy(b->scales, p + 192, 16);
    for (int g = 0; g < 8; g++) {
        unpack_shared(p + g / 4 * 64 + g % 2 * 32, g % 4 / 2 * 4, 4, 0, b->quads[g]);
        unpack_shared(p + 128 + g / 4 * 32, g % 4 * 2, 2, 4, b->quads[g]);
    }
}

/* Four bits choose one of 16 quants, which lie closer together about 0; kept as 8 bits, + 128. */
INLINE void unpack_chosen(const uint8_t *p, uint32_t quads[8])
{
    static const uint8_t quants[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
    unpack_halves(p, quads);
    for (int q = 0; q < 8; q++) {
        uint32_t choices = quads[q];
        quads[q] = 0;
        for (int at = 0; at < 32; at += 8) quads[q] |= (uint32_t)quants[choices >> at & 15] << at;
    }
}

static void unpack_iq4_nl(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    unpack_chosen(p + 2, b->quads[0]);
}

static void unpack_iq4_xs(const uint8_t *p, Block *b)
{
    b->d = half_at(p);
    for (int g = 0; g < 8; g++) {
        b->scales[g] = ((p[4 + g / 2] >> g % 2 * 4 & 15) | (half_at(p + 2) >> 2 * g & 3) << 4) - 32;
        unpack_chosen(p + 8 + 16 * g, b->quads[g]);
    }
}

/* The scale is half of 2^(e - 127), as quants are twice the numbers. */
static void unpack_mxfp4(const uint8_t *p, Block *b)
{
    b->d = p[0] < 2 ? 32 << p[0] : (p[0] - 1) << 7;
    unpack_halves(p + 1, b->quads[0]);
}

/* Puts `bits` bits of each quant, from bit `from` on, into a plane; words of one row lie WORDS bytes apart. */
INLINE void pack_bits(const uint32_t quads[8], int from, const int bits, uint8_t *plane)
{
    const int per = 8 / bits; /* quads a word */
    for (int i = 0; i < bits; i++) {
        uint32_t word = 0;
        for (int q = 0; q < per; q++) word |= (quads[i * per + q] >> from & EACH(bits)) << q * bits;
        memcpy(plane + i * WORDS, &word, 4);
    }
}

/* One block of one row into lane `lane` of the panel's block at `out`. */
INLINE void pack_block(const Block *b, uint8_t *out, int lane, const Format f)
{
    uint8_t *words = out + (f.sign ? 2 : 1) * HALVES + 4 * lane;
    memcpy(out + 2 * lane, &b->d, 2);
    if (f.sign) memcpy(out + HALVES + 2 * lane, &b->m, 2);
    for (int i = 0; i < multiples(f); i++, words += WORDS) memcpy(words, b->scales + 4 * i, 4);
    if (f.sign)
        for (int i = 0; i < multiples(f); i++, words += WORDS) memcpy(words, b->offsets + 4 * i, 4);
    for (int g = 0; g < f.groups; g++, words += group_bytes(f)) {
        pack_bits(b->quads[g], 0, f.low, words);
        if (f.high) pack_bits(b->quads[g], f.low, f.high, words + f.low * WORDS);
    }
}

INLINE void pack_rows(void (*unpack)(const uint8_t *, Block *), const uint8_t *row, long rows, long k, uint8_t *panel,
                      const Format f)
{
    for (long lane = 0; lane < rows; lane++) {
        uint8_t *out = panel;
        for (long i = 0; i < k; i += f.groups * GROUP, row += f.bytes, out += block_bytes(f)) {
            Block block = {0};
            unpack(row, &block);
            pack_block(&block, out, lane, f);
        }
    }
}

void pack_quantized(int format, const void *weight, long first, long rows, long k, void *panel)
{
    const uint8_t *bytes = weight;
    if (rows < WIDTH) memset(panel, 0, quantized_panel_bytes(format, k));
#define PACK(NUMBER, NAME, ...)                                                                          \
    case NUMBER: {                                                                                       \
        const Format f = {__VA_ARGS__};                                                                  \
        pack_rows(unpack_##NAME, bytes + first * (k / (f.groups * GROUP)) * f.bytes, rows, k, panel, f); \
        break;                                                                                           \
    }
    switch (format) {
        QUANTIZED_FORMATS(PACK)
    }
}

long quantized_panel_bytes(int format, long k)
{
#define BYTES(NUMBER, NAME, ...)                        \
    case NUMBER: {                                      \
        const Format f = {__VA_ARGS__};                 \
        return k / (f.groups * GROUP) * block_bytes(f); \
    }
    switch (format) {
        QUANTIZED_FORMATS(BYTES)
    }
    return 0;
}
