/*
 * Threads that run requests on a file where io_uring is forbidden: what is not in the page cache waits for the device there
 * and not on the queue's thread, so that a queue has many requests at the device.
 */
#ifndef VDUSE_BLK_POOL_H
#define VDUSE_BLK_POOL_H

#include "core.h"

#include <pthread.h>

struct pool { /* owner: the queue thread; its own threads take from `first` and add to `done` */
    struct target_file *file;
    struct vb_queue *queue; /* woken when `done` is no longer empty */
    pthread_mutex_t lock;
    pthread_cond_t wanted;     /* there is a request, or the end */
    pthread_cond_t ended;      /* the last thread has gone */
    struct vblk_req *first;    /* lock: requests nobody has taken, oldest first */
    struct vblk_req **last;    /* lock: where the next is put */
    uint32_t waiting;          /* lock: requests nobody has taken */
    uint32_t idle;             /* lock: threads that wait for one */
    uint32_t threads;          /* lock */
    bool closing;              /* lock */
    bool is_open;
    _Atomic(struct vblk_req *) done; /* newest first */
};

/* `file` and `queue` must outlive the pool. 0 or -errno; no thread is started. */
int pool_open(struct pool *pool, struct target_file *file, struct vb_queue *queue);
/* Nothing may be in flight. Returns when all threads have let go of everything. */
void pool_close(struct pool *pool);
/*
 * Serve a request: 0 or -errno if that was possible at once, without waiting for the device; 1 = pool_done will return it.
 * Where not even one thread can be had the request is served at once, waiting.
 */
int pool_start(struct pool *pool, struct vblk_req *req);
/* What has been served since the last call, oldest first, by `next`, with `result` 0 or -errno; NULL = nothing. */
struct vblk_req *pool_done(struct pool *pool);
bool pool_has_news(const struct pool *pool);

#endif
