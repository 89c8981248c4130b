/*
 * Load for a block device (or a regular file): requests of one size at a constant queue depth, past the page cache.
 *
 *   blkgen PATH read|write random|sequential BYTES DEPTH SECONDS
 *
 * As little work of its own as can be, so that it is the disk that is measured: io_uring with a registered file and
 * registered buffers; every completion that is there is reaped, replaced, and the replacements are submitted together by the
 * same system call that waits for the next; one look at the clock serves all of them. The time of a request is from the
 * call that submits it to the reaping of its completion.
 *
 * Result: one JSON object on standard output; times in microseconds. A request that fails or is short ends the program
 * with status 1 and a sentence. Options are positional and all required: bench/guest.py is the only user.
 */
#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 1024 };

/* Times are counted in classes: 16 for each power of two, so a percentile is off by less than 1/16. */
enum { FINE_BITS = 4, FINE = 1 << FINE_BITS, CLASSES = (64 - FINE_BITS + 1) * FINE };

struct load {
    int fd;
    bool write;
    bool random;
    uint64_t block; /* bytes */
    uint64_t blocks;
    unsigned depth;
    struct uring ring;
    uint8_t *buffers; /* depth * block, registered as one */
    uint64_t began[DEPTH_MAX]; /* ns */
    uint64_t next;  /* sequential: block */
    uint64_t state; /* random: xorshift */
    unsigned flying;
    uint64_t done;
    uint64_t longest; /* ns */
    uint64_t total;   /* ns */
    uint64_t classes[CLASSES];
};

static void die(const char *what, int error)
{
    fprintf(stderr, "blkgen: %s: %s\n", what, strerror(error));
    exit(1);
}

static uint64_t nanoseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static unsigned class_of(uint64_t value)
{
    if (value < FINE)
        return (unsigned)value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - FINE_BITS;
    return (shift + 1) * FINE + (unsigned)((value >> shift) & (FINE - 1));
}

/* The middle of a class. */
static double value_of(unsigned class)
{
    if (class < FINE)
        return class;
    unsigned shift = class / FINE - 1;
    return (double)((uint64_t)(FINE + class % FINE) << shift) + (double)(1ull << shift) / 2;
}

static double percentile(const struct load *load, unsigned percent)
{
    uint64_t wanted = (load->done * percent + 99) / 100;
    uint64_t seen = 0;
    for (unsigned class = 0; class < CLASSES; class++) {
        seen += load->classes[class];
        if (seen >= wanted)
            return value_of(class) / 1000;
    }
    return 0;
}

static uint64_t block_to_use(struct load *load)
{
    if (!load->random) {
        uint64_t block = load->next;
        load->next = block + 1 == load->blocks ? 0 : block + 1;
        return block;
    }
    uint64_t x = load->state; /* xorshift64 (Marsaglia 2003): the same blocks in every run */
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    load->state = x;
    return x % load->blocks;
}

static void start(struct load *load, unsigned slot, uint64_t now)
{
    struct io_uring_sqe *sqe = uring_sqe(&load->ring); /* never NULL: the queue holds `depth` */
    sqe->opcode = load->write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->fd = 0;
    sqe->buf_index = 0;
    sqe->addr = (uintptr_t)(load->buffers + slot * load->block);
    sqe->len = (uint32_t)load->block;
    sqe->off = block_to_use(load) * load->block;
    sqe->user_data = slot;
    load->began[slot] = now;
    load->flying++;
}

static void finish(struct load *load, const struct io_uring_cqe *cqe, uint64_t now)
{
    if (cqe->res < 0)
        die("a request failed", -cqe->res);
    if ((uint64_t)cqe->res != load->block) {
        fprintf(stderr, "blkgen: a request of %" PRIu64 " bytes moved %d\n", load->block, cqe->res);
        exit(1);
    }
    uint64_t took = now - load->began[cqe->user_data];
    load->classes[class_of(took)]++;
    load->total += took;
    load->longest = took > load->longest ? took : load->longest;
    load->done++;
    load->flying--;
}

/* Returns the time the load took, ns. */
static uint64_t run(struct load *load, double seconds)
{
    uint64_t first = nanoseconds(CLOCK_MONOTONIC);
    uint64_t now = first;
    uint64_t end = first + (uint64_t)(seconds * 1e9);
    for (unsigned slot = 0; slot < load->depth; slot++)
        start(load, slot, now);
    while (load->flying != 0) {
        int error = uring_enter(&load->ring, 1);
        if (error != 0 && error != -EINTR)
            die("io_uring_enter", -error);
        now = nanoseconds(CLOCK_MONOTONIC);
        struct io_uring_cqe *cqe;
        while ((cqe = uring_peek(&load->ring)) != NULL) {
            unsigned slot = (unsigned)cqe->user_data;
            finish(load, cqe, now);
            uring_seen(&load->ring);
            if (now < end)
                start(load, slot, now);
        }
    }
    return now - first;
}

static uint64_t size_of(int fd)
{
    struct stat status;
    uint64_t size = 0;
    if (fstat(fd, &status) < 0)
        die("fstat", errno);
    if (S_ISBLK(status.st_mode) && ioctl(fd, BLKGETSIZE64, &size) < 0)
        die("BLKGETSIZE64", errno);
    return S_ISBLK(status.st_mode) ? size : (uint64_t)status.st_size;
}

static void prepare(struct load *load, const char *path)
{
    load->fd = open(path, (load->write ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    if (load->fd < 0)
        die(path, errno);
    load->blocks = size_of(load->fd) / load->block;
    if (load->blocks == 0)
        die(path, ENOSPC);
    load->state = 88172645463325252u;
    size_t bytes = load->depth * load->block;
    load->buffers = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (load->buffers == MAP_FAILED)
        die("memory for the buffers", errno);
    for (size_t i = 0; i < bytes; i++) /* not all zeros: nobody may take a short cut */
        load->buffers[i] = (uint8_t)(i * 2654435761u >> 24 | 1);
    int error = uring_open(&load->ring, load->depth, 2 * load->depth, URING_DEFER_TASKRUN);
    if (error == 0)
        error = uring_register_file(&load->ring, load->fd);
    if (error < 0)
        die("io_uring", -error);
    struct iovec all = {.iov_base = load->buffers, .iov_len = bytes};
    if (syscall(__NR_io_uring_register, load->ring.fd, IORING_REGISTER_BUFFERS, &all, 1) < 0)
        die("registering the buffers", errno);
}

static void usage(void)
{
    fprintf(stderr, "usage: blkgen PATH read|write random|sequential BYTES DEPTH SECONDS\n");
    exit(2);
}

int main(int argc, char **argv)
{
    static struct load load;
    if (argc != 7)
        usage();
    load.write = strcmp(argv[2], "write") == 0;
    load.random = strcmp(argv[3], "random") == 0;
    load.block = strtoull(argv[4], NULL, 10);
    unsigned long depth = strtoul(argv[5], NULL, 10);
    double seconds = strtod(argv[6], NULL);
    bool words = (load.write || strcmp(argv[2], "read") == 0) && (load.random || strcmp(argv[3], "sequential") == 0);
    if (!words || load.block < 512 || load.block % 512 != 0 || load.block > 16 << 20 || depth < 1 || depth > DEPTH_MAX ||
        !(seconds > 0 && seconds < 3600))
        usage();
    load.depth = (unsigned)depth;
    prepare(&load, argv[1]);
    uint64_t cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t took = run(&load, seconds);
    cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    double ios = (double)load.done;
    printf("{\"ios\": %" PRIu64 ", \"seconds\": %.6f, \"iops\": %.1f, \"mib_s\": %.2f, \"mean_us\": %.2f, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"max_us\": %.2f, \"cpu_us\": %.1f}\n",
           load.done, (double)took / 1e9, ios / ((double)took / 1e9),
           ios * (double)load.block / 1048576.0 / ((double)took / 1e9), (double)load.total / ios / 1000,
           percentile(&load, 50), percentile(&load, 99), (double)load.longest / 1000, (double)cpu / 1000);
    return 0;
}
