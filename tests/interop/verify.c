/*
 * Runs in the guest: random requests to a part of a disk, past the page cache, each held against a copy in memory.
 *
 *     verify DEVICE OFFSET LENGTH COUNT SEED        bytes, multiples of 4096; LENGTH at most 64 MiB
 *
 * Reads, writes, flushes, discards, and zeroes of both kinds (may give space back, may not), by the calls that become just
 * these virtio requests. At the end all is read once more. Prints "verified COUNT", or says what differed and fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { UNIT = 4096, LONGEST = 64 * UNIT };

static uint64_t state;

static uint64_t below(uint64_t limit)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % limit;
}

static void must(int good, const char *what, uint64_t offset)
{
    if (good)
        return;
    printf("%s at %llu: %s\n", what, (unsigned long long)offset, strerror(errno));
    exit(1);
}

/* Blocks with `known` 0 were discarded and may hold anything. */
static void compare(const uint8_t *found, const uint8_t *expected, const uint8_t *known, uint64_t at, uint64_t length)
{
    for (uint64_t i = 0; i < length; i += UNIT) {
        errno = 0;
        must(!known[(at + i) / UNIT] || memcmp(found + i, expected + at + i, UNIT) == 0, "not what was written", at + i);
    }
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    uint64_t base = strtoull(argv[2], NULL, 0);
    uint64_t size = strtoull(argv[3], NULL, 0);
    uint64_t count = strtoull(argv[4], NULL, 0);
    state = strtoull(argv[5], NULL, 0) * 0x9E3779B97F4A7C15U | 1;
    int fd = open(argv[1], O_RDWR | O_DIRECT);
    uint8_t *shadow = calloc(1, size);
    uint8_t *known = calloc(1, size / UNIT);
    uint8_t *data = aligned_alloc(UNIT, LONGEST);
    must(fd >= 0 && shadow && known && data, "start", 0);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t length = (1 + below(below(4) ? 4 : LONGEST / UNIT)) * UNIT;
        uint64_t at = below((size - length) / UNIT + 1) * UNIT;
        off_t there = (off_t)(base + at);
        switch (below(10)) {
        case 0: case 1: case 2:
            must(pread(fd, data, length, there) == (ssize_t)length, "read", at);
            compare(data, shadow, known, at, length);
            break;
        case 3: case 4: case 5: case 6:
            for (uint64_t k = 0; k < length; k += 8)
                *(uint64_t *)(void *)(data + k) = below(UINT64_MAX);
            must(pwrite(fd, data, length, there) == (ssize_t)length, "write", at);
            memcpy(shadow + at, data, length);
            memset(known + at / UNIT, 1, length / UNIT);
            break;
        case 7:
            must(fdatasync(fd) == 0, "flush", at);
            break;
        case 8:
            must(ioctl(fd, BLKDISCARD, (uint64_t[]){base + at, length}) == 0, "discard", at);
            memset(known + at / UNIT, 0, length / UNIT);
            break;
        default: {
            int mode = (below(2) ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE) | FALLOC_FL_KEEP_SIZE;
            must(fallocate(fd, mode, there, (off_t)length) == 0, "zeroes", at);
            memset(shadow + at, 0, length);
            memset(known + at / UNIT, 1, length / UNIT);
        }
        }
    }
    must(fsync(fd) == 0, "flush", 0);
    for (uint64_t at = 0; at < size; at += LONGEST) {
        uint64_t length = size - at < LONGEST ? size - at : LONGEST;
        must(pread(fd, data, length, (off_t)(base + at)) == (ssize_t)length, "read", at);
        compare(data, shadow, known, at, length);
    }
    printf("verified %llu\n", (unsigned long long)count);
    return 0;
}
