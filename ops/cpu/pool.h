/* Threads that share the pieces of an operator. */
#ifndef POOL_H
#define POOL_H

/* Of this library only, whatever another one calls its functions. */
#define INTERNAL __attribute__((visibility("hidden")))

typedef struct Pool Pool;
typedef void (*Piece)(const void *job, long index);

/* A pool of `threads` threads, the caller's own counted. Null if there is no memory. */
Pool *pool_new(int threads);

/* Ends its threads. */
void pool_free(Pool *pool);

/* run(job, i) for every i below `pieces`, on all threads; returns when all are done. One caller at a time. */
INTERNAL void parallel(Pool *pool, Piece run, const void *job, long pieces);

/* How many threads there are, and which of them runs this, counted from 0. */
INTERNAL int pool_threads(const Pool *pool);
INTERNAL int pool_self(void);

/* Memory for the caller of `parallel` until it asks again. Null if there is none. */
INTERNAL float *pool_scratch(Pool *pool, long floats);

#endif
