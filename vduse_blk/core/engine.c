/*
 * The queue thread: wait, fetch a chunk, submit, reap, publish, notify; Python sleeps throughout.
 *
 *   fetch <= chunk requests and <= CHUNK_BYTES -> submit (and wait only if nothing else is waiting) -> reap -> publish
 *   once -> notify at most once -> again
 *
 * How many requests a chunk is, when to wake the driver, and whether to look before sleeping, is pace.c's affair. Besides, a
 * chunk is bounded by bytes, so that large transfers still overlap. Those go in pairs where more wait.
 *
 * Kicks are asked for only just before sleeping, and the ring is looked at once more after asking. Eventfds are polled edge
 * style and never read.
 *
 * Two loops: serve_uring for files, serve_sync for storage that is done when the call returns (memory, null) and for
 * processes where io_uring is forbidden, whose requests on files run in a pool of threads (pool.h). Files in memory are
 * served by the first, but with plain calls: io_uring has nothing to wait for there but other CPUs that copy. That pays only
 * for large reads, and only beside our own copying, so that nothing is lost where the other CPUs are busy. Writes to one file
 * happen one after the other wherever they are done: the kernel locks the inode.
 */
#define _GNU_SOURCE
#include "core.h"
#include "fixed.h"
#include "pace.h"
#include "pool.h"
#include "uring.h"

#include <errno.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK_BYTES = 256 * 1024, PAIR_BYTES = 1024 * 1024, PAIR_LEAST = 3 };
enum { SQ_ENTRIES = 64, STACK_BYTES = 256 * 1024 };
enum { INLINE_BYTES = 128 * 1024 };
enum { TAG_KICK = 1, TAG_WAKE = 2 }; /* user_data below any pointer */

struct vb_engine { /* owner: the queue thread once started; control creates and joins */
    struct vb_queue *queue;
    struct vb_target target;
    struct target_file file;
    struct uring ring;
    struct fixed fixed;
    struct pool pool;
    bool by_uring;
    bool arm_kick;
    bool arm_wake;
    int epoll_fd;
    uint32_t cpus; /* this process may run on */
    uint32_t handed_over; /* requests that other CPUs copy now */
    struct pace pace;
    pthread_t thread;
    sem_t started;
    int start_error;
};

/* ---- pace ---- */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool something_to_do(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    return vring_pending(&queue->ring) != 0 || (engine->by_uring && uring_has_news(&engine->ring)) ||
           pool_has_news(&engine->pool) ||
           atomic_load_explicit(&queue->stopping, memory_order_relaxed) ||
           atomic_load_explicit(&queue->table_next, memory_order_relaxed) != queue->table;
}

/* Kicks are off meanwhile. True: there is something to do. */
static bool spin(struct vb_engine *engine)
{
    uint32_t most = pace_look_ns(&engine->pace);
    if (most == 0)
        return false;
    uint64_t end = now_ns() + most;
    do {
        for (int i = 0; i < 16; i++) {
            if (something_to_do(engine)) {
                COUNT(engine->queue->counters.spin_hits, 1);
                pace_seen(&engine->pace);
                return true;
            }
            cpu_relax();
        }
    } while (now_ns() < end);
    pace_in_vain(&engine->pace);
    return false;
}

static uint64_t before_sleep(void)
{
    pace_asleep();
    return now_ns();
}

/* `began_io`: the call also handed over requests. Before anything is reaped: what flies now flew during the sleep. */
static void after_sleep(struct vb_engine *engine, uint64_t slept_at, bool began_io)
{
    pace_awake();
    pace_slept(&engine->pace, now_ns() - slept_at, engine->queue->inflight != 0, began_io);
}

static void publish(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    if (queue_publish(queue))
        pace_told(&engine->pace, vring_avail_idx(&queue->ring));
}

/* Everything the driver has made available is done, if storage has none of it. */
static void ran_out(struct vb_engine *engine)
{
    if (engine->queue->inflight == 0)
        pace_ran_out(&engine->pace, engine->queue->ring.last_avail);
}

/*
 * Whether a chunk of so many requests and bytes takes another. Large ones, up to PAIR_BYTES, go in pairs where PAIR_LEAST more
 * wait or are with the storage: they share an interrupt, which takes a tenth of the time of copying 1 MiB, and there is still
 * something to do when the driver comes. Not while other CPUs copy for us: what they have done is told as soon as we have
 * seen it.
 */
static bool takes_another(const struct vb_engine *engine, uint32_t count, uint64_t bytes)
{
    struct vb_queue *queue = engine->queue;
    return bytes < CHUNK_BYTES || (count == 1 && bytes <= PAIR_BYTES && engine->handed_over == 0 &&
                                   queue->inflight + vring_pending(&queue->ring) >= PAIR_LEAST);
}

/* ---- storage that is done when the call returns, or when a thread of the pool says so ---- */

/* 0 or -errno; 1 = later. */
static int run_sync(struct vb_engine *engine, struct vblk_req *req)
{
    switch ((enum vb_target_kind)engine->target.kind) {
    case VB_TARGET_FILE:
        return engine->pool.is_open ? pool_start(&engine->pool, req) : target_file_sync(&engine->file, req);
    case VB_TARGET_MEMORY:
        return target_memory(&engine->target, req);
    case VB_TARGET_NULL:
        return target_null(req);
    case VB_TARGET_NONE:
        break;
    }
    return -EIO;
}

/* False: the thread may end. Asked again before every sleep: who stops it wakes it once. */
static bool goes_on(const struct vb_queue *queue)
{
    return !atomic_load(&queue->stopping) || queue->inflight != 0 || vb_queue_replaying(queue);
}

/* The request has come to an end with 0 or -errno; or it waits, to be tried again. */
static void finish_errno(struct vb_engine *engine, struct vblk_req *req, int result)
{
    struct vb_queue *queue = engine->queue;
    if (result < 0 && !target_file_is_lost(&engine->file, req) && retry_park(queue, req, -result))
        return;
    retry_ended(queue, req);
    queue_finish(queue, req, vblk_status_of_errno(-result));
}

/* Take up what has waited long enough. False: nothing has. */
static bool take_up(struct vb_engine *engine, void (*start)(struct vb_engine *, struct vblk_req *))
{
    struct vblk_req *req = retry_take(engine->queue);
    bool any = req != NULL;
    while (req != NULL) {
        struct vblk_req *next = req->next_parked;
        if (req->over)
            finish_errno(engine, req, -req->error);
        else
            start(engine, req);
        req = next;
    }
    return any;
}

static void do_sync(struct vb_engine *engine, struct vblk_req *req)
{
    int result = run_sync(engine, req);
    if (result <= 0)
        finish_errno(engine, req, result);
}

static int sleep_ms(const struct vb_queue *queue)
{
    uint64_t ns = retry_sleep_ns(queue);
    return ns == UINT64_MAX ? -1 : (int)(ns / 1000000u) + 1;
}

static void serve_sync(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    while (goes_on(queue)) {
        bool again = false;
        struct vblk_req *next;
        for (struct vblk_req *done = pool_done(&engine->pool); done != NULL; done = next) {
            next = done->next;
            finish_errno(engine, done, done->result);
        }
        bool taken_up = take_up(engine, do_sync);
        if ((!atomic_load(&queue->stopping) || vb_queue_replaying(queue)) && queue_ready(queue)) {
            uint64_t bytes = 0;
            uint32_t room = pace_chunk(&engine->pace, queue);
            vring_disable_kick(&queue->ring);
            for (uint32_t count = 0; count < room && takes_another(engine, count, bytes); count++) {
                bool more;
                struct vblk_req *req = queue_fetch(queue, &more);
                again = req != NULL || more;
                if (!again)
                    break;
                if (req != NULL) {
                    bytes += req->length;
                    do_sync(engine, req);
                }
            }
            publish(engine);
            if (!again)
                ran_out(engine);
            if (!again && queue->ring.fault == VRING_OK && !atomic_load(&queue->missing))
                again = spin(engine) || vring_enable_kick(&queue->ring);
        } else {
            publish(engine);
        }
        if (!again && !taken_up && goes_on(queue)) {
            struct epoll_event events[2];
            uint64_t slept_at = before_sleep();
            (void)epoll_wait(engine->epoll_fd, events, 2, sleep_ms(queue));
            after_sleep(engine, slept_at, false);
            COUNT(queue->counters.wakeups, 1);
        }
    }
}

/* ---- storage behind io_uring ---- */

static struct io_uring_sqe *sqe_or_submit(struct vb_engine *engine)
{
    struct io_uring_sqe *sqe = uring_sqe(&engine->ring);
    while (sqe == NULL) {
        (void)uring_enter(&engine->ring, 0);
        sqe = uring_sqe(&engine->ring);
    }
    return sqe;
}

static void arm_poll(struct vb_engine *engine, int fd, uint64_t tag)
{
    struct io_uring_sqe *sqe = sqe_or_submit(engine);
    sqe->opcode = IORING_OP_POLL_ADD;
    sqe->fd = fd;
    sqe->poll32_events = POLLIN;
    sqe->len = IORING_POLL_ADD_MULTI;
    sqe->user_data = tag;
}

/* Whether another CPU should copy this one, while we copy the next. */
static bool hand_over(const struct vb_engine *engine, const struct vblk_req *req)
{
    return req->op == VBLK_READ && req->length >= INLINE_BYTES && engine->handed_over < 2 * (engine->cpus - 1) &&
           vring_pending(&engine->queue->ring) != 0;
}

/* Start the next step of a request, or finish it. */
static void start_step(struct vb_engine *engine, struct vblk_req *req)
{
    bool in_memory = engine->file.in_memory;
    if (in_memory && !hand_over(engine, req)) {
        finish_errno(engine, req, target_file_sync(&engine->file, req));
        return;
    }
    int result = target_file_prepare(&engine->file, req, &engine->ring);
    while (result == TARGET_FULL) { /* the submission queue: hand it over and go on */
        (void)uring_enter(&engine->ring, 0);
        COUNT(engine->queue->counters.submits, 1);
        result = target_file_prepare(&engine->file, req, &engine->ring);
    }
    if (result <= 0) {
        finish_errno(engine, req, result);
    } else if (in_memory) {
        engine->handed_over++;
        (void)uring_enter(&engine->ring, 0); /* now: what comes next is done here */
        COUNT(engine->queue->counters.submits, 1);
    }
}

static void reap(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    struct io_uring_cqe *cqe;
    while ((cqe = uring_peek(&engine->ring)) != NULL) {
        uint64_t tag = cqe->user_data;
        int result = cqe->res;
        bool armed = (cqe->flags & IORING_CQE_F_MORE) != 0;
        uring_seen(&engine->ring);
        if (tag == TAG_KICK) {
            COUNT(queue->counters.wakeups, 1);
            engine->arm_kick |= !armed;
        } else if (tag == TAG_WAKE) {
            engine->arm_wake |= !armed;
        } else {
            struct vblk_req *req = (struct vblk_req *)(uintptr_t)tag;
            engine->handed_over -= engine->file.in_memory;
            int error = target_file_advance(&engine->file, req, result);
            if (error < 0)
                finish_errno(engine, req, error);
            else
                start_step(engine, req);
        }
    }
}

static bool fetch_chunk(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    uint64_t bytes = 0;
    bool more = true;
    uint32_t room = pace_chunk(&engine->pace, queue);
    for (uint32_t count = 0; count < room && takes_another(engine, count, bytes); count++) {
        struct vblk_req *req = queue_fetch(queue, &more);
        if (req != NULL) {
            bytes += req->length;
            more = true;
            start_step(engine, req);
        } else if (!more) {
            break;
        }
    }
    return more;
}

static void serve_uring(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    engine->arm_kick = true;
    engine->arm_wake = true;
    while (goes_on(queue)) {
        bool taken_up = take_up(engine, start_step);
        bool more = false;
        bool ready = (!atomic_load(&queue->stopping) || vb_queue_replaying(queue)) && queue_ready(queue);
        if (ready) {
            vring_disable_kick(&queue->ring);
            more = fetch_chunk(engine);
            if (!more) {
                publish(engine);
                ran_out(engine);
                if (queue->ring.fault == VRING_OK && !atomic_load(&queue->missing)) {
                    if (pace_may_look(&engine->pace) && uring_unsent(&engine->ring) != 0)
                        more = true; /* hand over what was fetched before looking for more */
                    else
                        more = spin(engine) || vring_enable_kick(&queue->ring);
                }
            }
        }
        if (engine->arm_kick)
            arm_poll(engine, queue->config.kick_fd, TAG_KICK);
        if (engine->arm_wake)
            arm_poll(engine, queue->wake_fd, TAG_WAKE);
        engine->arm_kick = false;
        engine->arm_wake = false;

        more |= taken_up || !goes_on(queue);
        bool begins_io = uring_unsent(&engine->ring) != 0;
        uint64_t slept_at = more ? 0 : before_sleep();
        int error = more ? uring_enter(&engine->ring, 0) : uring_sleep(&engine->ring, retry_sleep_ns(queue));
        if (!more)
            after_sleep(engine, slept_at, begins_io);
        COUNT(queue->counters.submits, 1);
        if (error != 0 && error != -EINTR && error != -EBUSY && error != -EAGAIN && error != -ETIME) {
            atomic_store(&queue->error, -error);
            queue_break(queue, VRING_FAULT_ENGINE);
            (void)usleep(1000); /* what flies may still come back; do not burn the CPU over it */
        }
        reap(engine);
        publish(engine);
    }
}

/* ---- life ---- */

/* A block device never is, although its node lies in a file system that does. */
static bool is_in_memory(const struct vb_target *target)
{
    struct statfs fs;
    return !target->is_block_device && fstatfs(target->fd, &fs) == 0 &&
           (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

static int open_epoll(struct vb_engine *engine)
{
    struct vb_queue *queue = engine->queue;
    int fds[2] = {queue->config.kick_fd, queue->wake_fd};
    engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (engine->epoll_fd < 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLET};
        if (epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, fds[i], &event) < 0)
            return -errno;
    }
    return 0;
}

static int open_uring(struct vb_engine *engine)
{
    unsigned cq = 2 * engine->queue->config.num;
    enum uring_mode mode = engine->target.io_mode == VB_IO_URING_COOP    ? URING_COOP_TASKRUN
                           : engine->target.io_mode == VB_IO_URING_PLAIN ? URING_PLAIN
                                                                         : URING_DEFER_TASKRUN;
    int error = uring_open(&engine->ring, SQ_ENTRIES, cq < 256 ? 256 : cq, mode);
    if (error == 0)
        error = uring_register_file(&engine->ring, engine->target.fd);
    if (error < 0)
        uring_close(&engine->ring);
    return error;
}

static void hold_pages(struct vb_queue *queue)
{
    struct fixed *fixed = &queue->engine->fixed;
    fixed_adopt(fixed, queue->table);
    atomic_store(&queue->pinned, fixed->length);
    atomic_store(&queue->pin_error, fixed->error);
}

/* On the queue thread, because the ring belongs to the thread that creates it. */
static int choose_loop(struct vb_engine *engine)
{
    const struct vb_target *target = &engine->target;
    if (target->kind == VB_TARGET_FILE && target->io_mode != VB_IO_SYNC) {
        int error = open_uring(engine);
        if (error == 0) {
            engine->by_uring = true;
            engine->fixed.ring = &engine->ring;
            engine->file.fixed = &engine->fixed;
            engine->file.in_memory = target->io_mode == VB_IO_AUTO && is_in_memory(target);
            return 0;
        }
        if (target->io_mode != VB_IO_AUTO)
            return error;
    }
    if (target->kind == VB_TARGET_FILE && !is_in_memory(target)) {
        int error = pool_open(&engine->pool, &engine->file, engine->queue);
        if (error < 0)
            return error;
    }
    return open_epoll(engine);
}

static void *run(void *argument)
{
    struct vb_engine *engine = argument;
    struct vb_queue *queue = engine->queue;
    char name[16];
    snprintf(name, sizeof(name), "vq%u", queue->config.index & 0xffff);
    pthread_setname_np(pthread_self(), name);

    engine->start_error = choose_loop(engine);
    bool serve = engine->start_error == 0;
    if (serve)
        atomic_store(&queue->state, VB_RUNNING);
    sem_post(&engine->started);
    if (!serve)
        return NULL;
    pace_awake();
    if (engine->by_uring) {
        if (engine->file.direct && !engine->file.in_memory) { /* others copy, and look no page up */
            hold_pages(queue);
            queue->adopted = hold_pages;
        }
        serve_uring(engine);
        queue->adopted = NULL;
        uring_close(&engine->ring); /* nobody but its one issuer may unregister the file and the buffers */
        atomic_store(&queue->pinned, 0);
    } else {
        serve_sync(engine);
        pool_close(&engine->pool);
    }
    pace_asleep();
    return NULL;
}

static void engine_free(struct vb_engine *engine)
{
    pool_close(&engine->pool);
    uring_close(&engine->ring);
    if (engine->epoll_fd >= 0)
        close(engine->epoll_fd);
    sem_destroy(&engine->started);
    free(engine);
}

static int start_thread(struct vb_engine *engine)
{
    pthread_attr_t attributes;
    sigset_t all;
    sigset_t before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* The thread inherits the mask: signals are the interpreter's business. SIGBUS of its own stays deliverable. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&engine->thread, &attributes, run, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return -error;
}

int vb_engine_start(struct vb_queue *queue, const struct vb_target *target)
{
    if (queue->engine != NULL)
        return -EBUSY;
    struct vb_engine *engine = calloc(1, sizeof(*engine));
    if (engine == NULL)
        return -ENOMEM;
    engine->queue = queue;
    engine->target = *target;
    target_file_open(&engine->file, target);
    cpu_set_t cpus;
    engine->cpus = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? (uint32_t)CPU_COUNT(&cpus) : 1;
    pace_init(&engine->pace, target->spin, engine->cpus);
    engine->epoll_fd = -1;
    engine->ring.fd = -1;
    sem_init(&engine->started, 0, 0);
    atomic_store(&queue->stopping, false);
    queue->engine = engine;
    int error = start_thread(engine);
    if (error == 0) {
        while (sem_wait(&engine->started) < 0)
            ;
        error = engine->start_error;
        if (error < 0)
            pthread_join(engine->thread, NULL);
    }
    if (error < 0) {
        queue->engine = NULL;
        engine_free(engine);
    }
    return error;
}

void vb_engine_stop(struct vb_queue *queue)
{
    struct vb_engine *engine = queue->engine;
    if (engine == NULL)
        return;
    atomic_store(&queue->stopping, true);
    vb_queue_wake(queue);
    pthread_join(engine->thread, NULL);
    queue->engine = NULL;
    engine_free(engine);
    if (atomic_load(&queue->state) == VB_RUNNING)
        atomic_store(&queue->state, VB_STOPPED);
}
