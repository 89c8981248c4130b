/*
 * The little of io_uring that the engine needs, over the three system calls. One ring, one thread, no SQ index array
 * games: entry i of the SQ array is always i. Kept here rather than taken from liburing so that a wheel has no shared
 * library to miss and probing for features stays in one place.
 */
#ifndef VDUSE_BLK_URING_H
#define VDUSE_BLK_URING_H

#include <linux/io_uring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct uring { /* owner: the thread that called uring_open */
    int fd;
    int enter_fd; /* index of the registered ring, or fd */
    unsigned enter_flags;
    void *rings;
    size_t rings_size;
    struct io_uring_sqe *sqes;
    size_t sqes_size;
    unsigned *sq_head;
    unsigned *sq_tail;
    unsigned *sq_flags;
    unsigned sq_mask;
    unsigned sq_entries;
    unsigned sq_local; /* our tail; published at submit */
    unsigned *cq_head;
    unsigned *cq_tail;
    unsigned cq_mask;
    struct io_uring_cqe *cqes;
};

/* Cheapest first. */
enum uring_mode { URING_DEFER_TASKRUN = 0, URING_COOP_TASKRUN, URING_PLAIN };
/* 0 or -errno. Takes the cheapest mode this kernel has, from `mode` on. */
int uring_open(struct uring *ring, unsigned sq_entries, unsigned cq_entries, enum uring_mode mode);
void uring_close(struct uring *ring);
int uring_register_file(struct uring *ring, int fd);
/* Make room for the registered buffer, once. 0 or -errno; kernels before 5.19 refuse. */
int uring_reserve_buffer(struct uring *ring);
/* Have the kernel hold the pages of [address, address+length), at most 1 GiB, as buffer 0; NULL: let go of it. 0 or
 * -errno. */
int uring_set_buffer(struct uring *ring, void *address, size_t length);
/* A zeroed SQE, or NULL when the SQ is full: submit first. */
struct io_uring_sqe *uring_sqe(struct uring *ring);
unsigned uring_unsent(const struct uring *ring);
/* Submit all and wait for at least `wait` completions. 0 or -errno (-EINTR included). */
int uring_enter(struct uring *ring, unsigned wait);
/* The same, waiting for one completion at most so many nanoseconds; UINT64_MAX: without a limit. -ETIME: none came. */
int uring_sleep(struct uring *ring, uint64_t ns);
/* The next completion, or NULL; uring_seen gives it back. */
struct io_uring_cqe *uring_peek(struct uring *ring);
void uring_seen(struct uring *ring);
/* Whether an enter would bring completions, without one. */
bool uring_has_news(struct uring *ring);

#endif
