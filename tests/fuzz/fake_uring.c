/*
 * io_uring as an adversary plays it, in place of uring.c: requests are done one after another in any order, later than they
 * could be, in parts, and sometimes not at all; and every one is written down with the moments at which it began and
 * ended. For the durability checker (tests/device/durability.py).
 *
 *     VDUSE_BLK_TEST_LOG   file to append to: "OP OFFSET LENGTH FUA BEGAN ENDED VALUE..." with times of CLOCK_MONOTONIC in ns, and
 *                          for writes the first eight bytes of every BLOCK
 *     VDUSE_BLK_TEST_SEED  of the order
 *     VDUSE_BLK_TEST_MUTANT  "flush": flushes are answered without being done; "fua": durable writes are done as ordinary ones
 */
#define _GNU_SOURCE
#include "core.h"
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, ENTRIES = 64, PENDING = 1024, RESULTS = 4096, PIECES = 300 };

struct op {
    struct io_uring_sqe sqe;
    uint64_t began;
};

struct result {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};

struct fake { /* behind uring.rings; owner: the queue thread */
    struct io_uring_sqe queued[ENTRIES];
    unsigned queued_count;
    struct op pending[PENDING];
    unsigned pending_count;
    struct result results[RESULTS];
    unsigned head;
    unsigned tail;
    int epoll_fd;
    int fd;
    int log;
    uint64_t random;
    struct io_uring_cqe shown;
};

static struct fake *fake_of(const struct uring *ring)
{
    return ring->rings;
}

static uint64_t below(struct fake *fake, uint64_t limit)
{
    fake->random = fake->random * 6364136223846793005u + 1442695040888963407u;
    return (fake->random >> 33) % limit;
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

int uring_open(struct uring *ring, unsigned sq_entries, unsigned cq_entries, enum uring_mode mode)
{
    const char *seed = getenv("VDUSE_BLK_TEST_SEED");
    const char *log = getenv("VDUSE_BLK_TEST_LOG");
    (void)sq_entries;
    (void)cq_entries;
    (void)mode;
    memset(ring, 0, sizeof(*ring));
    struct fake *fake = calloc(1, sizeof(*fake));
    if (fake == NULL || log == NULL)
        return -ENOMEM;
    fake->random = seed ? strtoull(seed, NULL, 0) : 1;
    fake->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    fake->log = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    ring->rings = fake;
    ring->fd = 0;
    return 0;
}

void uring_close(struct uring *ring)
{
    struct fake *fake = fake_of(ring);
    if (fake != NULL) {
        close(fake->epoll_fd);
        close(fake->log);
        free(fake);
    }
    ring->rings = NULL;
    ring->fd = -1;
}

int uring_register_file(struct uring *ring, int fd)
{
    fake_of(ring)->fd = fd;
    return 0;
}

int uring_reserve_buffer(struct uring *ring)
{
    (void)ring;
    return 0;
}

/* Pages are there anyhow: a fixed operation is an ordinary one. */
int uring_set_buffer(struct uring *ring, void *address, size_t length)
{
    (void)ring;
    (void)address;
    (void)length;
    return 0;
}

struct io_uring_sqe *uring_sqe(struct uring *ring)
{
    struct fake *fake = fake_of(ring);
    if (fake->queued_count == ENTRIES)
        return NULL;
    struct io_uring_sqe *sqe = &fake->queued[fake->queued_count++];
    memset(sqe, 0, sizeof(*sqe));
    return sqe;
}

unsigned uring_unsent(const struct uring *ring)
{
    return fake_of(ring)->queued_count;
}

static void answer(struct fake *fake, uint64_t user_data, int res, uint32_t flags)
{
    fake->results[fake->tail++ % RESULTS] = (struct result){user_data, res, flags};
}

static void submit(struct fake *fake)
{
    for (unsigned i = 0; i < fake->queued_count; i++) {
        const struct io_uring_sqe *sqe = &fake->queued[i];
        if (sqe->opcode == IORING_OP_POLL_ADD) {
            struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = sqe->user_data};
            if (epoll_ctl(fake->epoll_fd, EPOLL_CTL_ADD, sqe->fd, &event) < 0)
                abort();
        } else {
            if (fake->pending_count == PENDING)
                abort();
            fake->pending[fake->pending_count++] = (struct op){*sqe, now()};
        }
    }
    fake->queued_count = 0;
}

static void record(struct fake *fake, const struct op *op, char what, uint64_t length, const uint8_t *data)
{
    char line[8192];
    int at = snprintf(line, sizeof(line), "%c %llu %llu %d %llu %llu", what, (unsigned long long)op->sqe.off,
                      (unsigned long long)length, (op->sqe.rw_flags & RWF_DSYNC) != 0, (unsigned long long)op->began,
                      (unsigned long long)now());
    for (uint64_t i = 0; data != NULL && i < length; i += BLOCK) {
        uint64_t value;
        memcpy(&value, data + i, sizeof(value));
        at += snprintf(line + at, sizeof(line) - (size_t)at, " %llu", (unsigned long long)value);
    }
    line[at++] = '\n';
    if (write(fake->log, line, (size_t)at) != at)
        abort();
}

static int write_some(struct fake *fake, const struct op *op, const struct iovec *pieces, unsigned count)
{
    static _Thread_local uint8_t data[1 << 20];
    uint64_t length = 0;
    for (unsigned i = 0; i < count; i++) {
        memcpy(data + length, pieces[i].iov_base, pieces[i].iov_len);
        length += pieces[i].iov_len;
    }
    if (below(fake, 30) == 0) /* EIO of a durable write tells of lost data, which ends it */
        return op->sqe.rw_flags & RWF_DSYNC ? -ENOMEM : -EIO;
    if (length > BLOCK && below(fake, 8) == 0)
        length = (1 + below(fake, length / BLOCK)) * BLOCK;
    if (pwrite(fake->fd, data, length, (off_t)op->sqe.off) != (ssize_t)length)
        abort();
    record(fake, op, 'w', length, data);
    return (int)length;
}

static int run_op(struct fake *fake, const struct op *op)
{
    const struct io_uring_sqe *sqe = &op->sqe;
    struct iovec one = {(void *)(uintptr_t)sqe->addr, sqe->len};
    const struct iovec *pieces = (const struct iovec *)(uintptr_t)sqe->addr;
    switch (sqe->opcode) {
    case IORING_OP_READ:
    case IORING_OP_READ_FIXED:
        return (int)preadv(fake->fd, &one, 1, (off_t)sqe->off);
    case IORING_OP_READV:
        return (int)preadv(fake->fd, pieces, (int)sqe->len, (off_t)sqe->off);
    case IORING_OP_WRITE:
    case IORING_OP_WRITE_FIXED:
        return write_some(fake, op, &one, 1);
    case IORING_OP_WRITEV:
        return write_some(fake, op, pieces, sqe->len);
    case IORING_OP_FSYNC:
        record(fake, op, 'f', 0, NULL);
        return 0;
    case IORING_OP_FALLOCATE: /* length in addr */
        if (fallocate(fake->fd, (int)sqe->len, (off_t)sqe->off, (off_t)sqe->addr) < 0)
            return -errno;
        record(fake, op, (sqe->len & 2) ? 'p' : 'z', sqe->addr, NULL); /* 2: PUNCH_HOLE */
        return 0;
    default:
        return -EOPNOTSUPP;
    }
}

static void do_one(struct fake *fake)
{
    unsigned which = (unsigned)below(fake, fake->pending_count);
    struct op op = fake->pending[which];
    int res = run_op(fake, &op);
    fake->pending[which] = fake->pending[--fake->pending_count];
    answer(fake, op.sqe.user_data, res, 0);
}

static int go(struct uring *ring, bool wait, int timeout_ms)
{
    struct fake *fake = fake_of(ring);
    struct epoll_event events[4];
    submit(fake);
    wait = wait && fake->head == fake->tail;
    int count = epoll_wait(fake->epoll_fd, events, 4, !wait ? 0 : fake->pending_count ? (int)below(fake, 2) : timeout_ms);
    for (int i = 0; i < count; i++)
        answer(fake, events[i].data.u64, 1, IORING_CQE_F_MORE);
    if (fake->pending_count && (wait || below(fake, 3) == 0))
        for (uint64_t turns = 1 + below(fake, 4); turns > 0 && fake->pending_count; turns--)
            do_one(fake);
    return wait && fake->head == fake->tail ? -ETIME : 0;
}

int uring_enter(struct uring *ring, unsigned wait)
{
    return go(ring, wait != 0, -1);
}

int uring_sleep(struct uring *ring, uint64_t ns)
{
    return go(ring, true, ns == UINT64_MAX ? -1 : (int)(ns / 1000000) + 1);
}

struct io_uring_cqe *uring_peek(struct uring *ring)
{
    struct fake *fake = fake_of(ring);
    if (fake->head == fake->tail)
        return NULL;
    const struct result *result = &fake->results[fake->head % RESULTS];
    fake->shown.user_data = result->user_data;
    fake->shown.res = result->res;
    fake->shown.flags = result->flags;
    return &fake->shown;
}

bool uring_has_news(struct uring *ring)
{
    return uring_peek(ring) != NULL;
}

void uring_seen(struct uring *ring)
{
    fake_of(ring)->head++;
}

int vb_uring_probe(void)
{
    return 1;
}

/* ---- faults of the engine that the checker must find ---- */

int __real_target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring);
int __wrap_target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring);

int __wrap_target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring)
{
    const char *mutant = getenv("VDUSE_BLK_TEST_MUTANT");
    if (mutant != NULL && strcmp(mutant, "flush") == 0 && req->op == VBLK_FLUSH)
        return 0;
    if (mutant != NULL && strcmp(mutant, "fua") == 0)
        req->fua = false;
    return __real_target_file_prepare(file, req, ring);
}
