/*
 * io_uring as an adversary plays it, in place of uring.c: requests are done one after another in any order, later than they
 * could be, on storage of the same kind (fake_storage.h). For the durability checker (tests/device/durability.py).
 */
#define _GNU_SOURCE
#include "core.h"
#include "fake_storage.h"
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ENTRIES = 64, PENDING = 1024, RESULTS = 4096 };

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
    struct io_uring_cqe shown;
};

static struct fake *fake_of(const struct uring *ring)
{
    return ring->rings;
}

int uring_open(struct uring *ring, unsigned sq_entries, unsigned cq_entries, enum uring_mode mode)
{
    (void)sq_entries;
    (void)cq_entries;
    (void)mode;
    memset(ring, 0, sizeof(*ring));
    struct fake *fake = calloc(1, sizeof(*fake));
    if (fake == NULL)
        return -ENOMEM;
    fake->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    ring->rings = fake;
    ring->fd = 0;
    return 0;
}

void uring_close(struct uring *ring)
{
    struct fake *fake = fake_of(ring);
    if (fake != NULL) {
        close(fake->epoll_fd);
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
            fake->pending[fake->pending_count++] = (struct op){*sqe, fake_now()};
        }
    }
    fake->queued_count = 0;
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
        return (int)fake_write(fake->fd, &one, 1, sqe->off, sqe->rw_flags, op->began);
    case IORING_OP_WRITEV:
        return (int)fake_write(fake->fd, pieces, sqe->len, sqe->off, sqe->rw_flags, op->began);
    case IORING_OP_FSYNC:
        return fake_sync(op->began);
    case IORING_OP_FALLOCATE: /* length in addr */
        return fake_allocate(fake->fd, (int)sqe->len, sqe->off, sqe->addr, op->began);
    default:
        return -EOPNOTSUPP;
    }
}

static void do_one(struct fake *fake)
{
    unsigned which = (unsigned)fake_below(fake->pending_count);
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
    int count = epoll_wait(fake->epoll_fd, events, 4, !wait ? 0 : fake->pending_count ? (int)fake_below(2) : timeout_ms);
    for (int i = 0; i < count; i++)
        answer(fake, events[i].data.u64, 1, IORING_CQE_F_MORE);
    if (fake->pending_count && (wait || fake_below(3) == 0))
        for (uint64_t turns = 1 + fake_below(4); turns > 0 && fake->pending_count; turns--)
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
