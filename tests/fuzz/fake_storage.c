/* See fake_storage.h. */
#define _GNU_SOURCE
#include "fake_storage.h"
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SLOW_US = 400 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t state; /* of the random numbers; under the lock */
static int log_fd;

static void begin(void)
{
    const char *seed = getenv("VDUSE_BLK_TEST_SEED");
    const char *log = getenv("VDUSE_BLK_TEST_LOG");
    state = seed ? strtoull(seed, NULL, 0) : 1;
    log_fd = open(log ? log : "", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0)
        abort();
}

uint64_t fake_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

uint64_t fake_below(uint64_t limit)
{
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    state = state * 6364136223846793005u + 1442695040888963407u;
    uint64_t result = (state >> 33) % limit;
    pthread_mutex_unlock(&lock);
    return result;
}

static void record(char what, uint64_t offset, uint64_t length, bool forced, uint64_t began, const uint8_t *data)
{
    char line[8192];
    pthread_once(&once, begin);
    int at = snprintf(line, sizeof(line), "%c %llu %llu %d %llu %llu", what, (unsigned long long)offset,
                      (unsigned long long)length, forced, (unsigned long long)began, (unsigned long long)fake_now());
    for (uint64_t i = 0; data != NULL && i < length; i += FAKE_BLOCK) {
        uint64_t value;
        memcpy(&value, data + i, sizeof(value));
        at += snprintf(line + at, sizeof(line) - (size_t)at, " %llu", (unsigned long long)value);
    }
    line[at++] = '\n';
    if (write(log_fd, line, (size_t)at) != at) /* O_APPEND: a line is not torn by another thread's */
        abort();
}

ssize_t fake_write(int fd, const struct iovec *pieces, unsigned count, uint64_t offset, uint32_t flags, uint64_t began)
{
    static _Thread_local uint8_t *data;
    uint64_t length = 0;
    if (data == NULL && (data = malloc(1 << 20)) == NULL)
        abort();
    for (unsigned i = 0; i < count; i++) {
        memcpy(data + length, pieces[i].iov_base, pieces[i].iov_len);
        length += pieces[i].iov_len;
    }
    if (fake_below(30) == 0) /* EIO of a durable write tells of lost data, which ends it */
        return flags & RWF_DSYNC ? -ENOMEM : -EIO;
    if (length > FAKE_BLOCK && fake_below(8) == 0)
        length = (1 + fake_below(length / FAKE_BLOCK)) * FAKE_BLOCK;
    if (pwrite(fd, data, length, (off_t)offset) != (ssize_t)length)
        abort();
    record('w', offset, length, (flags & RWF_DSYNC) != 0, began, data);
    return (ssize_t)length;
}

int fake_sync(uint64_t began)
{
    record('f', 0, 0, false, began, NULL);
    return 0;
}

int __real_fallocate(int fd, int mode, off_t offset, off_t length);

int fake_allocate(int fd, int mode, uint64_t offset, uint64_t length, uint64_t began)
{
    if (__real_fallocate(fd, mode, (off_t)offset, (off_t)length) < 0)
        return -errno;
    record(mode & FALLOC_FL_PUNCH_HOLE ? 'p' : 'z', offset, length, false, began, NULL);
    return 0;
}

/* ---- the core's system calls: they take their time, and threads overtake one another ---- */

static void linger(void)
{
    usleep((useconds_t)fake_below(SLOW_US));
}

static ssize_t as_call(ssize_t result)
{
    linger();
    if (result < 0)
        errno = (int)-result;
    return result < 0 ? -1 : result;
}

ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    uint64_t began = fake_now();
    if (flags & RWF_NOWAIT) {
        if (fake_below(4) != 0)
            return as_call(-EAGAIN);
    } else {
        linger();
    }
    return as_call(fake_write(fd, pieces, (unsigned)count, (uint64_t)offset, (uint32_t)flags, began));
}

int __wrap_fdatasync(int fd);
int __wrap_fdatasync(int fd)
{
    uint64_t began = fake_now();
    (void)fd;
    linger();
    return (int)as_call(fake_sync(began));
}

int __wrap_fallocate(int fd, int mode, off_t offset, off_t length);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t length)
{
    uint64_t began = fake_now();
    linger();
    return (int)as_call(fake_allocate(fd, mode, (uint64_t)offset, (uint64_t)length, began));
}

/* ---- faults of the engine that the checker must find ---- */

/* True: the request is answered without anything done. */
static bool is_forged(struct vblk_req *req)
{
    const char *mutant = getenv("VDUSE_BLK_TEST_MUTANT");
    if (mutant != NULL && strcmp(mutant, "fua") == 0)
        req->fua = false;
    return mutant != NULL && strcmp(mutant, "flush") == 0 && req->op == VBLK_FLUSH;
}

int __real_target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring);
int __wrap_target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring);
int __wrap_target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring)
{
    return is_forged(req) ? 0 : __real_target_file_prepare(file, req, ring);
}

int __real_target_file_sync(struct target_file *file, struct vblk_req *req);
int __wrap_target_file_sync(struct target_file *file, struct vblk_req *req);
int __wrap_target_file_sync(struct target_file *file, struct vblk_req *req)
{
    return is_forged(req) ? 0 : __real_target_file_sync(file, req);
}
