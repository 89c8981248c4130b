/*
 * Storage as an adversary plays it: it is slow, does writes in parts or not at all, and writes down what it did with the
 * moments at which each thing began and ended. For the durability checker (tests/device/durability.py): fake_uring.c asks it
 * by name, and the core's own system calls (target_file.c, pool.c) come here by the linker's --wrap.
 *
 *     VDUSE_BLK_TEST_LOG   file to append to: "OP OFFSET LENGTH FUA BEGAN ENDED VALUE..." with times of CLOCK_MONOTONIC in ns, and
 *                          for writes the first eight bytes of every FAKE_BLOCK
 *     VDUSE_BLK_TEST_SEED  of what goes wrong
 *     VDUSE_BLK_TEST_MUTANT  "flush": flushes are answered without being done; "fua": durable writes are done as ordinary ones
 */
#ifndef FAKE_STORAGE_H
#define FAKE_STORAGE_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum { FAKE_BLOCK = 4096 };

/* Of CLOCK_MONOTONIC, in ns. */
uint64_t fake_now(void);

/* A random number below limit. Any thread. */
uint64_t fake_below(uint64_t limit);

/* Each ends now and began at `began`. Bytes or 0, or -errno, as io_uring answers. Any thread. */
ssize_t fake_write(int fd, const struct iovec *pieces, unsigned count, uint64_t offset, uint32_t flags, uint64_t began);
int fake_sync(uint64_t began);
int fake_allocate(int fd, int mode, uint64_t offset, uint64_t length, uint64_t began);

#endif
