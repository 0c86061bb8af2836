/* An operator is cut into pieces that threads take one by one. The caller takes pieces, too, and waits only
 * for pieces that somebody has taken: a thread that another process keeps from running takes none, and
 * costs nothing. (OpenMP's barrier waits for every thread to arrive.) Who waits spins for longer than a
 * piece takes, or the next operator takes to come, and then sleeps.
 *
 * A piece takes microseconds. If one lasts longer than a spin, its thread has lost its core to another
 * process for milliseconds, and that will happen again: the caller then works alone for a while, twice as
 * long each time, before it tries again. A busy neighbour thus costs one core, not the speed of both. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define SPINS 3000          /* some 0.1 ms */
#define SHORTEST_ALONE 16   /* operators */
#define LONGEST_ALONE 4096  /* about a second */

struct Pool {
    _Atomic uint64_t ticket; /* generation << 48 | pieces << 24 | next piece: taken by compare-and-swap, so
                                that nobody takes a piece of a job that is over */
    _Atomic uint64_t done;   /* finished pieces of this generation */
    _Atomic int sleepers, caller_sleeps, quit;
    Piece run;               /* these two are stable while a piece of their generation is taken */
    const void *job;
    int alone, penalty;      /* the caller's: operators still to do alone; how many after the next delay */
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    int num_workers;
    pthread_t workers[];
};

#define MAX_PIECES ((1L << 24) - 1)
#define NEXT(ticket) ((ticket) & MAX_PIECES)
#define PIECES(ticket) ((ticket) >> 24 & MAX_PIECES)

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes and runs pieces until none is left to take. */
static void help(Pool *pool)
{
    uint64_t ticket = atomic_load(&pool->ticket);
    while (NEXT(ticket) < PIECES(ticket)) {
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        pool->run(pool->job, (long)NEXT(ticket));
        if (atomic_fetch_add(&pool->done, 1) + 1 == PIECES(ticket) && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->lock);
        }
        ticket = atomic_load(&pool->ticket);
    }
}

static void *worker(void *argument)
{
    Pool *pool = argument;
    while (!atomic_load(&pool->quit)) {
        uint64_t seen = atomic_load(&pool->ticket);
        int spins = 0;
        while (NEXT(seen) >= PIECES(seen) && spins++ < SPINS) {
            relax();
            seen = atomic_load_explicit(&pool->ticket, memory_order_relaxed);
        }
        if (NEXT(seen) >= PIECES(seen)) {
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (atomic_load(&pool->ticket) == seen && !atomic_load(&pool->quit))
                pthread_cond_wait(&pool->work, &pool->lock);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->lock);
        }
        help(pool);
    }
    return NULL;
}

Pool *pool_new(int threads)
{
    Pool *pool = calloc(1, sizeof(Pool) + threads * sizeof(pthread_t));
    if (!pool) return NULL;
    pool->penalty = SHORTEST_ALONE;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (int i = 0; i < threads - 1; i++)
        if (!pthread_create(&pool->workers[pool->num_workers], NULL, worker, pool)) pool->num_workers++;
    return pool;
}

void pool_free(Pool *pool)
{
    atomic_store(&pool->quit, 1);
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->num_workers; i++) pthread_join(pool->workers[i], NULL);
    free(pool);
}

void parallel(Pool *pool, Piece run, const void *job, long pieces)
{
    if (pieces <= 1 || pool->num_workers == 0 || pieces > MAX_PIECES || pool->alone > 0) {
        if (pieces > 1 && pool->alone > 0) pool->alone--;
        for (long i = 0; i < pieces; i++) run(job, i);
        return;
    }
    pool->run = run;
    pool->job = job;
    atomic_store(&pool->done, 0);
    uint64_t generation = (atomic_load(&pool->ticket) >> 48) + 1;
    atomic_store(&pool->ticket, generation << 48 | (uint64_t)pieces << 24);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }
    help(pool);
    for (int spins = 0; atomic_load(&pool->done) < (uint64_t)pieces && spins < SPINS; spins++) relax();
    if (atomic_load(&pool->done) == (uint64_t)pieces) {
        pool->penalty -= (pool->penalty - SHORTEST_ALONE + 31) / 32; /* forgotten within a step */
    } else {
        pool->alone = pool->penalty;
        pool->penalty = 2 * pool->penalty < LONGEST_ALONE ? 2 * pool->penalty : LONGEST_ALONE;
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->caller_sleeps, 1);
        while (atomic_load(&pool->done) < (uint64_t)pieces) pthread_cond_wait(&pool->finished, &pool->lock);
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->lock);
    }
}
