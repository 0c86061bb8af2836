#include "states.h"

#define CHANNELS 256L /* of a sequence, that a thread takes */

typedef struct {
    const Sequences *of;
    const Convolution *by;
    const float *x;
    float *mixed;
    long width, blocks; /* blocks: pieces of a sequence */
} Job;

static void convolve_piece(const void *job, long piece)
{
    const Job *j = job;
    const Convolution *c = j->by;
    long sequence = piece / j->blocks, from = piece % j->blocks * CHANNELS, to = least(from + CHANNELS, c->channels);
    long count, kept = c->size - 1;
    int goes_on;
    long first = first_of(j->of, sequence, &count, &goes_on);
    float *window = c->kept + j->of->rows[sequence] * kept * c->channels;
    if (!goes_on)
        for (long i = 0; i < kept && count; i++)
            memset(window + i * c->channels + from, 0, (to - from) * sizeof(float));
    for (long t = 0; t < count; t++)
        for (long at = from; at < to; at += LANES) {
            vec total = {};
            for (long i = 0; i < c->size; i++) {
                long token = t + i - kept;
                const float *source =
                    token < 0 ? window + (token + kept) * c->channels : j->x + (first + token) * j->width;
                total += load_part(source + at, to - at) * load_part(c->weight + i * c->channels + at, to - at);
            }
            if (c->bias) total += load_part(c->bias + at, to - at);
            store_part(j->mixed + (first + t) * c->channels + at, vsilu(total), to - at);
        }
    for (long i = 0; i < kept && count; i++) {
        long token = count + i - kept;
        const float *source = token < 0 ? window + (token + kept) * c->channels : j->x + (first + token) * j->width;
        memmove(window + i * c->channels + from, source + from, (to - from) * sizeof(float));
    }
}

void convolve(Pool *pool, const Sequences *of, const Convolution *by, const float *x, long width, float *mixed)
{
    Job job = {of, by, x, mixed, width, (by->channels + CHANNELS - 1) / CHANNELS};
    parallel(pool, convolve_piece, &job, (of->decodes + of->segments) * job.blocks);
}
