/*
 * See pool.h. One pool per queue. A request goes: queue thread → list under the lock → a thread of the pool, which runs
 * target_file_sync → a list without lock → queue thread, which alone finishes requests and touches the ring.
 *
 * Threads are started when more requests wait than threads, at most THREADS_MAX per queue and PROCESS_MAX in the process
 * (but one per queue always), and end after IDLE_SECONDS without work. Whoever finds the list of done requests empty wakes
 * the queue thread; it takes the whole list, so while it is busy many requests cost one wake-up.
 *
 * What the page cache holds is not worth a hop: short transfers are tried on the queue thread first, with RWF_NOWAIT, which
 * does what is possible without waiting. File systems that do not know it say so once.
 *
 * A thread in a system call ends with the process, and the process's lock on the file stays until it has: no request of a
 * dead server lands later than that lock is free.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <sys/uio.h>
#include <time.h>

enum { THREADS_MAX = 16, PROCESS_MAX = 64, IDLE_SECONDS = 10, STACK_BYTES = 128 * 1024, AT_ONCE_BYTES = 128 * 1024 };

static atomic_uint process_threads;

int pool_open(struct pool *pool, struct target_file *file, struct vb_queue *queue)
{
    memset(pool, 0, sizeof(*pool));
    pool->file = file;
    pool->queue = queue;
    pool->last = &pool->first;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    int error = pthread_mutex_init(&pool->lock, NULL);
    if (error == 0)
        error = pthread_cond_init(&pool->wanted, &attributes);
    if (error == 0)
        error = pthread_cond_init(&pool->ended, NULL);
    pthread_condattr_destroy(&attributes);
    pool->is_open = error == 0;
    return -error;
}

void pool_close(struct pool *pool)
{
    if (!pool->is_open)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->wanted);
    while (pool->threads != 0)
        pthread_cond_wait(&pool->ended, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_destroy(&pool->ended);
    pthread_cond_destroy(&pool->wanted);
    pthread_mutex_destroy(&pool->lock);
    pool->is_open = false;
}

/* ---- the pool's threads ---- */

static void put_done(struct pool *pool, struct vblk_req *req)
{
    struct vblk_req *head = atomic_load_explicit(&pool->done, memory_order_relaxed);
    do
        req->next = head;
    while (!atomic_compare_exchange_weak_explicit(&pool->done, &head, req, memory_order_release, memory_order_relaxed));
    if (head == NULL)
        vb_queue_wake(pool->queue);
}

/* Under the lock. The oldest request, or NULL: nobody needs this thread. */
static struct vblk_req *take(struct pool *pool)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_SECONDS;
    int error = 0;
    while (pool->first == NULL && !pool->closing && error == 0) {
        pool->idle++;
        error = pthread_cond_timedwait(&pool->wanted, &pool->lock, &until);
        pool->idle--;
    }
    struct vblk_req *req = pool->first;
    if (req == NULL)
        return NULL;
    pool->first = req->next;
    if (pool->first == NULL)
        pool->last = &pool->first;
    pool->waiting--;
    return req;
}

static void *work(void *argument)
{
    struct pool *pool = argument;
    struct vblk_req *req;
    pthread_setname_np(pthread_self(), "vq-file");
    pthread_mutex_lock(&pool->lock);
    while ((req = take(pool)) != NULL) {
        pthread_mutex_unlock(&pool->lock);
        req->result = target_file_sync(pool->file, req);
        put_done(pool, req);
        pthread_mutex_lock(&pool->lock);
    }
    atomic_fetch_sub(&process_threads, 1);
    if (--pool->threads == 0)
        pthread_cond_signal(&pool->ended);
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Under the lock. Signals are masked as in the queue's thread, which calls this. */
static void add_thread(struct pool *pool)
{
    if (atomic_fetch_add(&process_threads, 1) >= PROCESS_MAX && pool->threads != 0) {
        atomic_fetch_sub(&process_threads, 1);
        return;
    }
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &attributes, work, pool) == 0)
        pool->threads++;
    else
        atomic_fetch_sub(&process_threads, 1); /* a limit on tasks: those there are must do */
    pthread_attr_destroy(&attributes);
}

/* ---- the queue's thread ---- */

/* 0 or -errno; 1 = there is more to do, and it may wait. */
static int try_at_once(struct target_file *file, struct vblk_req *req)
{
    bool reading = req->op == VBLK_READ;
    /* One that waited for storage has begun already. */
    if ((!reading && req->op != VBLK_WRITE) || req->length > AT_ONCE_BYTES || file->direct || req->progress != 0)
        return 1;
    if (reading ? file->no_nowait_read : file->no_nowait_write || file->sync || req->fua)
        return 1;
    const struct iovec *iov = (const struct iovec *)(const void *)req->iov;
    ssize_t result = reading ? preadv2(file->fd, iov, req->iov_count, (off_t)req->offset, RWF_NOWAIT)
                             : pwritev2(file->fd, iov, req->iov_count, (off_t)req->offset, RWF_NOWAIT);
    if (result < 0 && errno == EOPNOTSUPP) {
        file->no_nowait_read |= reading;
        file->no_nowait_write |= !reading;
    }
    if (result <= 0)
        return 1; /* who may wait finds out what is wrong, if anything is */
    int error = target_file_advance(file, req, (int)result);
    return error < 0 ? error : req->step != req->iov_count;
}

int pool_start(struct pool *pool, struct vblk_req *req)
{
    int result = try_at_once(pool->file, req);
    if (result <= 0)
        return result;
    pthread_mutex_lock(&pool->lock);
    if (pool->waiting >= pool->idle && pool->threads < THREADS_MAX)
        add_thread(pool);
    bool anybody = pool->threads != 0;
    if (anybody) {
        req->next = NULL;
        *pool->last = req;
        pool->last = &req->next;
        pool->waiting++;
        pthread_cond_signal(&pool->wanted);
    }
    pthread_mutex_unlock(&pool->lock);
    return anybody ? 1 : target_file_sync(pool->file, req);
}

struct vblk_req *pool_done(struct pool *pool)
{
    if (!pool_has_news(pool)) /* asked at every turn of every queue without io_uring, pool or not */
        return NULL;
    struct vblk_req *newest = atomic_exchange_explicit(&pool->done, NULL, memory_order_acquire);
    struct vblk_req *oldest = NULL;
    while (newest != NULL) {
        struct vblk_req *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}

bool pool_has_news(const struct pool *pool)
{
    return atomic_load_explicit(&pool->done, memory_order_relaxed) != NULL;
}
