/* Packs weights into panels. */
#include "packed.h"
#include "pool.h"

/* Bytes that `linear` needs in the place of n rows of k; 0 for a format that it does not know. */
long packed_bytes(int format, long n, long k) { return panels_of(n) * panel_bytes(format, k); }

typedef struct {
    const void *weight;
    void *packed;
    long n, k;
    int format;
} Packing;

/* One panel: rows of the weight, or zeros where it has no more. */
static void pack_piece(const void *job, long piece)
{
    const Packing *p = job;
    long row = piece * WIDTH, rows = least(WIDTH, p->n - row);
    if (!is_plain(p->format)) {
        uint8_t *to = (uint8_t *)p->packed + piece * quantized_panel_bytes(p->format, p->k);
        pack_quantized(p->format, p->weight, row, rows, p->k, to);
        return;
    }
    long depth = p->format == FORMAT_BF16 ? matrix_depth(p->k) : p->k, size = piece * depth * WIDTH;
    for (long lane = 0; lane < WIDTH; lane++) {
        long from = (row + lane) * p->k, count = lane < rows ? p->k : 0;
        for (long i = 0; i < depth; i++) {
            if (p->format == FORMAT_BF16)
                ((bf16 *)p->packed)[size + (i / 2 * WIDTH + lane) * 2 + i % 2] =
                    i < count ? ((const bf16 *)p->weight)[from + i] : 0;
            else ((float *)p->packed)[size + i * WIDTH + lane] = i < count ? ((const float *)p->weight)[from + i] : 0;
        }
    }
}

/* Packs them, from rows as a GGUF file has them if they are quantised. */
void pack(Pool *pool, int format, const void *weight, void *packed, long n, long k)
{
    Packing packing = {weight, packed, n, k, format};
    parallel(pool, pack_piece, &packing, panels_of(n));
}
