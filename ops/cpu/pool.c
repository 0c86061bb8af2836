/* An operator is cut into pieces. Each thread has a span of neighbouring pieces, so that it reads a weight as one
 * long stream, and takes them one by one; when its span is done it takes from the others'. The caller is one of
 * the threads, and waits only for pieces that somebody has taken: a thread that another process keeps from
 * running takes none, and costs nothing. (OpenMP's barrier waits for every thread to arrive.) Who waits spins for
 * longer than a piece takes, or the next operator takes to come, and then sleeps.
 *
 * If a piece lasts much longer than the caller's own did, its thread has lost its core to another process for
 * milliseconds, and that will happen again: the caller then does without this thread for a while, twice as long each
 * time, before it tries it again. A busy neighbour thus costs one core, not the speed of all. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define SPIN 100000               /* ns: a pause takes 10 to 140 of them, by the processor */
#define PATIENCE 100000           /* ns, beside the time of some pieces */
#define SHORTEST_AWAY 1000000     /* ns */
#define LONGEST_AWAY 1000000000   /* ns */

/* ticket: the pieces of one thread that nobody has taken: generation << 48 | end << 24 | next. They are taken by
 * compare-and-swap, so that nobody takes a piece of an operator that is over. Each has a cache line of its own. */
typedef struct {
    _Alignas(128) _Atomic uint64_t ticket;
    _Atomic int is_asleep, is_busy;
} Span;

#define MAX_PIECES ((1L << 24) - 1)
#define NEXT(ticket) ((long)((ticket) & MAX_PIECES))
#define END(ticket) ((long)((ticket) >> 24 & MAX_PIECES))

/* away_until, penalty: the caller's, in ns: when to try this thread again; for how long not after its next delay. */
typedef struct {
    Pool *pool;
    int index;
    pthread_t thread;
    int64_t away_until, penalty;
} Worker;

struct Pool {
    Span *spans;             /* one a thread; the caller's is the first */
    Worker *workers;
    float *scratch;
    long scratch_size;
    int num_threads;         /* the caller counted */
    uint64_t generation;     /* the caller's */
    Piece run;               /* these three are stable while a piece of their generation is taken */
    const void *job;
    long pieces;
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    _Atomic int caller_sleeps, quit;
    _Alignas(128) _Atomic long done; /* finished pieces of this generation */
};

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Takes and runs pieces until none is left to take, from the thread's own span first. How many it was. */
static long help(Pool *pool, int self)
{
    long finished = 0;
    for (int i = 0; i < pool->num_threads; i++) {
        Span *span = &pool->spans[self + i < pool->num_threads ? self + i : self + i - pool->num_threads];
        uint64_t ticket = atomic_load(&span->ticket);
        while (NEXT(ticket) < END(ticket)) {
            if (!atomic_compare_exchange_weak(&span->ticket, &ticket, ticket + 1)) continue;
            pool->run(pool->job, NEXT(ticket));
            finished++;
            ticket = atomic_load(&span->ticket);
        }
    }
    if (!finished) return 0;
    long pieces = pool->pieces;
    if (atomic_fetch_add(&pool->done, finished) + finished == pieces && atomic_load(&pool->caller_sleeps)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_signal(&pool->finished);
        pthread_mutex_unlock(&pool->lock);
    }
    return finished;
}

static _Thread_local int self; /* 0 in a pool's caller */

int pool_self(void) { return self; }
int pool_threads(const Pool *pool) { return pool->num_threads; }

static void *work(void *argument)
{
    Worker *me = argument;
    Pool *pool = me->pool;
    self = me->index;
    Span *span = &pool->spans[me->index];
    _Atomic uint64_t *mine = &span->ticket;
    while (!atomic_load(&pool->quit)) {
        uint64_t seen = atomic_load(mine);
        int64_t until = now() + SPIN;
        while (NEXT(seen) >= END(seen) && now() < until) {
            relax();
            seen = atomic_load_explicit(mine, memory_order_relaxed);
        }
        if (NEXT(seen) >= END(seen)) {
            pthread_mutex_lock(&pool->lock);
            atomic_store(&span->is_asleep, 1);
            while (atomic_load(mine) == seen && !atomic_load(&pool->quit)) pthread_cond_wait(&pool->work, &pool->lock);
            atomic_store(&span->is_asleep, 0);
            pthread_mutex_unlock(&pool->lock);
        }
        atomic_store(&span->is_busy, 1);
        help(pool, me->index);
        atomic_store(&span->is_busy, 0);
    }
    return NULL;
}

Pool *pool_new(int threads)
{
    Pool *pool = aligned_alloc(128, sizeof(Pool));
    if (!pool) return NULL;
    *pool = (Pool){.num_threads = 1};
    pool->spans = aligned_alloc(128, threads * sizeof(Span));
    pool->workers = calloc(threads, sizeof(Worker));
    if (!pool->spans || !pool->workers) {
        free(pool->spans);
        free(pool->workers);
        free(pool);
        return NULL;
    }
    for (int i = 0; i < threads; i++) pool->spans[i] = (Span){0};
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (int i = 1; i < threads; i++) {
        pool->workers[i] = (Worker){.pool = pool, .index = i, .penalty = SHORTEST_AWAY};
        if (pthread_create(&pool->workers[i].thread, NULL, work, &pool->workers[i])) break;
        pool->num_threads++;
    }
    return pool;
}

void pool_free(Pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->quit, 1);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->workers[i].thread, NULL);
    free(pool->scratch);
    free(pool->spans);
    free(pool->workers);
    free(pool);
}

float *pool_scratch(Pool *pool, long floats)
{
    if (floats > pool->scratch_size || !pool->scratch) {
        free(pool->scratch);
        pool->scratch = aligned_alloc(128, (floats / 32 + 1) * 128);
        pool->scratch_size = pool->scratch ? floats : 0;
    }
    return pool->scratch;
}

void parallel(Pool *pool, Piece run, const void *job, long pieces)
{
    int64_t begin = now();
    long members = 1; /* the caller, and threads that are not away */
    for (int i = 1; i < pool->num_threads; i++) members += begin >= pool->workers[i].away_until;
    if (pieces <= 1 || members == 1 || pieces > MAX_PIECES) {
        for (long i = 0; i < pieces; i++) run(job, i);
        return;
    }
    pool->run = run;
    pool->job = job;
    pool->pieces = pieces;
    atomic_store(&pool->done, 0);
    pool->generation++;
    int is_one_asleep = 0;
    for (long i = 0, member = 0; i < pool->num_threads; i++) {
        Span *span = &pool->spans[i];
        if (i && begin < pool->workers[i].away_until) continue;
        uint64_t next = pieces * member / members, end = pieces * (member + 1) / members;
        atomic_store(&span->ticket, pool->generation << 48 | end << 24 | next);
        is_one_asleep |= atomic_load(&span->is_asleep);
        member++;
    }
    if (is_one_asleep) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }
    long own = help(pool, 0);
    int64_t end = now(), limit = end + PATIENCE + 4 * (end - begin) / (own ? own : 1);
    while (atomic_load(&pool->done) < pieces && now() < limit) relax();
    int is_late = atomic_load(&pool->done) < pieces;
    for (int i = 1; i < pool->num_threads; i++) {
        Worker *worker = &pool->workers[i];
        if (begin < worker->away_until) continue;
        if (!is_late) worker->penalty -= (worker->penalty - SHORTEST_AWAY) / 32; /* forgotten within a step */
        else if (own && atomic_load(&pool->spans[i].is_busy)) { /* without own, who knows how long a piece takes */
            worker->away_until = limit + worker->penalty;
            worker->penalty = 2 * worker->penalty < LONGEST_AWAY ? 2 * worker->penalty : LONGEST_AWAY;
        }
    }
    if (is_late) {
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->caller_sleeps, 1);
        while (atomic_load(&pool->done) < pieces) pthread_cond_wait(&pool->finished, &pool->lock);
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->lock);
    }
}
