#ifndef CACHE_H
#define CACHE_H

/* The paged cache of one layer: [2 * kv_heads, blocks * block_size, d], keys of all heads before values. */
typedef struct {
    void *data;
    long num_slots;
    long block_size;
    int is_bf16;
} Cache;

#endif
