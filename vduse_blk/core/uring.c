/* io_uring by system call; see uring.h. Ordering rules: man io_uring(7) and the kernel's io_uring/io_uring.c. */
#define _GNU_SOURCE
#include "uring.h"

#include "api.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int setup(unsigned entries, struct io_uring_params *params)
{
    long fd = syscall(__NR_io_uring_setup, entries, params);
    return fd < 0 ? -errno : (int)fd;
}

static int register_op(int fd, unsigned op, void *arg, unsigned count)
{
    long result = syscall(__NR_io_uring_register, fd, op, arg, count);
    return result < 0 ? -errno : (int)result;
}

int uring_open(struct uring *ring, unsigned sq_entries, unsigned cq_entries, enum uring_mode mode)
{
    static const unsigned modes[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG, /* 6.1 */
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,                               /* 5.19 */
        0,
    };
    struct io_uring_params params;
    int fd = -EINVAL;

    memset(ring, 0, sizeof(*ring));
    ring->fd = -1;
    for (unsigned i = mode; i < sizeof(modes) / sizeof(modes[0]) && fd == -EINVAL; i++) {
        memset(&params, 0, sizeof(params));
        params.flags = modes[i] | IORING_SETUP_CQSIZE;
        params.cq_entries = cq_entries;
        fd = setup(sq_entries, &params);
    }
    if (fd < 0)
        return fd;
    ring->fd = fd;
    ring->enter_fd = fd;
    if (!(params.features & IORING_FEAT_SINGLE_MMAP) || !(params.features & IORING_FEAT_NODROP) ||
        !(params.features & IORING_FEAT_EXT_ARG)) {
        uring_close(ring);
        return -ENOSYS; /* older than 5.11: not worth a second code path */
    }
    size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_size = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    ring->rings = mmap(NULL, ring->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
    if (ring->rings == MAP_FAILED) {
        int error = errno;
        ring->rings = NULL;
        uring_close(ring);
        return -error;
    }
    ring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
    ring->sqes = mmap(NULL, ring->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
    if (ring->sqes == MAP_FAILED) {
        int error = errno;
        ring->sqes = NULL;
        uring_close(ring);
        return -error;
    }
    char *base = ring->rings;
    ring->sq_head = (unsigned *)(void *)(base + params.sq_off.head);
    ring->sq_tail = (unsigned *)(void *)(base + params.sq_off.tail);
    ring->sq_flags = (unsigned *)(void *)(base + params.sq_off.flags);
    ring->sq_mask = params.sq_entries - 1;
    ring->sq_entries = params.sq_entries;
    unsigned *array = (unsigned *)(void *)(base + params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; i++)
        array[i] = i;
    ring->cq_head = (unsigned *)(void *)(base + params.cq_off.head);
    ring->cq_tail = (unsigned *)(void *)(base + params.cq_off.tail);
    ring->cq_mask = params.cq_entries - 1;
    ring->cqes = (struct io_uring_cqe *)(void *)(base + params.cq_off.cqes);

    /* Saves a file lookup per enter; kernels before 5.18 refuse and nothing is lost. */
    struct io_uring_rsrc_update update = {.offset = UINT32_MAX, .data = (unsigned)fd};
    if (register_op(fd, IORING_REGISTER_RING_FDS, &update, 1) == 1) {
        ring->enter_fd = (int)update.offset;
        ring->enter_flags = IORING_ENTER_REGISTERED_RING;
    }
    return 0;
}

void uring_close(struct uring *ring)
{
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_size);
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    if (ring->fd >= 0) {
        /* Else the file, and the lock that sits on it, would live on for some 40 ms after the close, even after the process. */
        (void)register_op(ring->fd, IORING_UNREGISTER_FILES, NULL, 0);
        (void)register_op(ring->fd, IORING_UNREGISTER_BUFFERS, NULL, 0); /* likewise pages */
        close(ring->fd);
    }
    ring->fd = -1;
    ring->sqes = NULL;
    ring->rings = NULL;
}

int uring_register_file(struct uring *ring, int fd)
{
    return register_op(ring->fd, IORING_REGISTER_FILES, &fd, 1);
}

int uring_reserve_buffer(struct uring *ring)
{
    struct io_uring_rsrc_register room = {.nr = 1, .flags = IORING_RSRC_REGISTER_SPARSE};
    return register_op(ring->fd, IORING_REGISTER_BUFFERS2, &room, sizeof(room));
}

int uring_set_buffer(struct uring *ring, void *address, size_t length)
{
    struct iovec piece = {.iov_base = address, .iov_len = length};
    struct io_uring_rsrc_update2 update = {.offset = 0, .data = (uintptr_t)&piece, .nr = 1};
    int result = register_op(ring->fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
    return result < 0 ? result : 0;
}

struct io_uring_sqe *uring_sqe(struct uring *ring)
{
    unsigned head = __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
    if (ring->sq_local - head >= ring->sq_entries)
        return NULL;
    struct io_uring_sqe *sqe = &ring->sqes[ring->sq_local & ring->sq_mask];
    ring->sq_local++;
    memset(sqe, 0, sizeof(*sqe));
    return sqe;
}

unsigned uring_unsent(const struct uring *ring)
{
    return ring->sq_local - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
}

int uring_enter(struct uring *ring, unsigned wait)
{
    __atomic_store_n(ring->sq_tail, ring->sq_local, __ATOMIC_RELEASE);
    unsigned count = uring_unsent(ring);
    long result = syscall(__NR_io_uring_enter, ring->enter_fd, count, wait,
                          ring->enter_flags | IORING_ENTER_GETEVENTS, NULL, 0);
    return result < 0 ? -errno : 0;
}

int uring_sleep(struct uring *ring, uint64_t ns)
{
    if (ns == UINT64_MAX)
        return uring_enter(ring, 1);
    struct __kernel_timespec time = {.tv_sec = (long long)(ns / 1000000000u), .tv_nsec = (long long)(ns % 1000000000u)};
    struct io_uring_getevents_arg arg = {.ts = (uintptr_t)&time};
    __atomic_store_n(ring->sq_tail, ring->sq_local, __ATOMIC_RELEASE);
    unsigned count = uring_unsent(ring);
    long result = syscall(__NR_io_uring_enter, ring->enter_fd, count, 1,
                          ring->enter_flags | IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof(arg));
    return result < 0 ? -errno : 0;
}

struct io_uring_cqe *uring_peek(struct uring *ring)
{
    unsigned head = *ring->cq_head; /* we alone write it */
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return NULL;
    return &ring->cqes[head & ring->cq_mask];
}

bool uring_has_news(struct uring *ring)
{
    /* Work that the kernel does only inside an enter: completions of real I/O, kicks and wakes. */
    return uring_peek(ring) != NULL ||
           (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
}

void uring_seen(struct uring *ring)
{
    __atomic_store_n(ring->cq_head, *ring->cq_head + 1, __ATOMIC_RELEASE);
}

int vb_uring_probe(void)
{
    struct uring ring;
    int error = uring_open(&ring, 4, 8, URING_DEFER_TASKRUN);
    if (error != 0)
        return error;
    uring_close(&ring);
    return 1;
}
