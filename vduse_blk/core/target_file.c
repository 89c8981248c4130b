/*
 * Requests on a file or block device, one step at a time, by io_uring or by plain calls. A step is one system call's worth:
 * what is left of a transfer, or one range. The same two functions decide what the next step is (plan) and what its
 * result means (target_file_advance), so both ways behave alike.
 *
 *   READ, WRITE     preadv/pwritev of the pieces not yet done; a short transfer is continued, a read that hits the end
 *                   of the file is an error (the file was cut under us), never zeros. Pieces that direct I/O does not
 *                   take go through memory that it does
 *   FLUSH           fdatasync. After one that failed all fail, on every queue: the kernel has marked clean what it could
 *                   not write, and says so once
 *   DISCARD         a file: fallocate(PUNCH_HOLE) per range; a block device: BLKDISCARD, through io_uring where the kernel
 *                   has it (6.12). Not supported = UNSUPP, the driver stops asking
 *                   A write that must be durable has RWF_DSYNC; one that fails tells of lost data just so
 *   WRITE_ZEROES    UNMAP: PUNCH_HOLE, which reads back as zeros; otherwise ZERO_RANGE, which keeps the space. Where
 *                   the file system has neither, zeros are written. On an O_DSYNC descriptor made durable at the end
 *                   (that flag is about writes only), and so if the request asks for it
 */
#define _GNU_SOURCE
#include "core.h"
#include "fixed.h"
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef BLOCK_URING_CMD_DISCARD
#define BLOCK_URING_CMD_DISCARD _IO(0x12, 0) /* linux/blkdev.h */
#endif

enum { ZERO_BYTES = 65536, ZERO_PIECES = 64, BOUNCE_BYTES = 1 << 20, BOUNCE_ALIGN = 4096 };

/* How a range is done; req->phase. What a request in flight tries must not depend on what others learn meanwhile. */
enum way { WAY_OPEN = 0, WAY_COMMAND, WAY_IOCTL, WAY_PUNCH, WAY_ZERO_RANGE, WAY_WRITE, WAY_SYNC };

/* 4096-aligned for O_DIRECT; const, so all pieces may share it. */
static const uint8_t zeros[ZERO_BYTES] __attribute__((aligned(4096)));

void target_file_open(struct target_file *file, const struct vb_target *target)
{
    memset(file, 0, sizeof(*file));
    int flags = fcntl(target->fd, F_GETFL);
    file->fd = target->fd;
    file->lost = target->lost;
    file->is_block_device = target->is_block_device != 0;
    file->direct = flags >= 0 && (flags & O_DIRECT);
    file->sync = flags >= 0 && (flags & O_DSYNC);
}

static bool has_lost(const struct target_file *file)
{
    return file->lost != NULL && __atomic_load_n(file->lost, __ATOMIC_ACQUIRE) != 0;
}

/* The kernel has said that something was not written. It says so once, so we remember. */
static void lose(const struct target_file *file)
{
    if (file->lost != NULL)
        __atomic_store_n(file->lost, 1, __ATOMIC_RELEASE);
}

bool target_file_is_lost(const struct target_file *file, const struct vblk_req *req)
{
    return has_lost(file) && (req->op == VBLK_FLUSH || req->fua || req->phase == WAY_SYNC);
}

/* The cheapest way that is not known to fail, or WAY_OPEN. */
static enum way choose(const struct target_file *file, enum vblk_op op, const struct vblk_range *range)
{
    if (op == VBLK_DISCARD && file->is_block_device)
        return !file->no_command ? WAY_COMMAND : !file->no_discard ? WAY_IOCTL : WAY_OPEN;
    if ((op == VBLK_DISCARD || range->unmap) && !file->no_punch)
        return WAY_PUNCH;
    if (op == VBLK_DISCARD)
        return WAY_OPEN;
    return !file->no_zero_range ? WAY_ZERO_RANGE : WAY_WRITE;
}

/* Learnt once, for the whole file. */
static void learn(struct target_file *file, enum way way)
{
    file->no_command |= way == WAY_COMMAND;
    file->no_discard |= way == WAY_IOCTL;
    file->no_punch |= way == WAY_PUNCH;
    file->no_zero_range |= way == WAY_ZERO_RANGE;
}

struct step {
    enum { STEP_READ, STEP_WRITE, STEP_SYNC, STEP_FALLOCATE, STEP_COMMAND, STEP_IOCTL } call;
    const struct iovec *iov;
    unsigned iov_count;
    int mode;
    uint64_t offset;
    uint64_t length;
    struct iovec zero_iov[ZERO_PIECES];
};

static void plan_zeros(struct step *step)
{
    step->call = STEP_WRITE;
    step->iov = step->zero_iov;
    for (step->iov_count = 0; step->iov_count < ZERO_PIECES && step->length != 0; step->iov_count++) {
        size_t here = step->length < ZERO_BYTES ? (size_t)step->length : ZERO_BYTES;
        step->zero_iov[step->iov_count].iov_base = (void *)(uintptr_t)zeros;
        step->zero_iov[step->iov_count].iov_len = here;
        step->length -= here;
    }
}

/* 1 = *step is what to do next, 0 = nothing is left, -errno. */
static int plan(struct target_file *file, struct vblk_req *req, struct step *step)
{
    const struct vblk_range *range;
    switch ((enum vblk_op)req->op) {
    case VBLK_READ:
    case VBLK_WRITE:
        if (req->step == req->iov_count)
            return 0;
        step->call = req->op == VBLK_READ ? STEP_READ : STEP_WRITE;
        step->iov = (const struct iovec *)(const void *)&req->iov[req->step];
        step->iov_count = req->iov_count - req->step;
        step->offset = req->offset + req->progress;
        return 1;
    case VBLK_FLUSH:
        if (req->step == 1)
            return 0;
        if (has_lost(file))
            return -EIO;
        step->call = STEP_SYNC;
        return 1;
    case VBLK_DISCARD:
    case VBLK_WRITE_ZEROES:
        while (req->step < req->range_count && req->ranges[req->step].length == 0)
            req->step++;
        if (req->step == req->range_count) {
            if (req->op == VBLK_DISCARD || req->phase == WAY_SYNC || !(file->sync || req->fua))
                return 0;
            if (has_lost(file))
                return -EIO;
            req->phase = WAY_SYNC;
            step->call = STEP_SYNC;
            return 1;
        }
        range = &req->ranges[req->step];
        step->offset = range->offset + req->progress;
        step->length = range->length - req->progress;
        if (req->phase == WAY_OPEN)
            req->phase = (uint8_t)choose(file, req->op, range);
        switch ((enum way)req->phase) {
        case WAY_COMMAND:
            step->call = STEP_COMMAND;
            return 1;
        case WAY_IOCTL:
            step->call = STEP_IOCTL;
            return 1;
        case WAY_PUNCH:
        case WAY_ZERO_RANGE:
            step->call = STEP_FALLOCATE;
            step->mode = FALLOC_FL_KEEP_SIZE | (req->phase == WAY_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
            return 1;
        case WAY_WRITE:
            plan_zeros(step);
            return 1;
        case WAY_OPEN:
        case WAY_SYNC:
            break;
        }
        return -EOPNOTSUPP;
    case VBLK_GET_ID:
    case VBLK_OTHER:
    case VBLK_OPS:
        break;
    }
    return -EIO;
}

static void advance_iov(struct vblk_req *req, size_t done)
{
    req->progress += done;
    while (done != 0) {
        struct vb_iov *piece = &req->iov[req->step];
        size_t here = done < piece->length ? done : piece->length;
        piece->base = (uint8_t *)piece->base + here;
        piece->length -= here;
        done -= here;
        if (piece->length == 0)
            req->step++;
    }
}

/* Zeros for WRITE_ZEROES are made durable all at once, at the end. */
static int write_flags(const struct vblk_req *req)
{
    return req->op == VBLK_WRITE && req->fua ? RWF_DSYNC : 0;
}

/* One direct transfer through aligned memory, of what is left of a request or BOUNCE_BYTES. Bytes done, or -errno. */
static int bounce(const struct target_file *file, const struct vblk_req *req)
{
    uint64_t left = req->length - req->progress;
    size_t length = left < BOUNCE_BYTES ? (size_t)left : BOUNCE_BYTES;
    off_t offset = (off_t)(req->offset + req->progress);
    uint8_t *memory = aligned_alloc(BOUNCE_ALIGN, (length + BOUNCE_ALIGN - 1) & ~(size_t)(BOUNCE_ALIGN - 1));
    if (memory == NULL)
        return -ENOMEM;
    bool reading = req->op == VBLK_READ;
    ssize_t done = reading ? pread(file->fd, memory, length, offset) : (ssize_t)length;
    int error = done < 0 ? -errno : 0;
    size_t at = 0;
    for (uint32_t i = req->step; i < req->iov_count && error == 0 && at < (size_t)done; i++) {
        size_t here = req->iov[i].length < (size_t)done - at ? req->iov[i].length : (size_t)done - at;
        if (reading)
            memcpy(req->iov[i].base, memory + at, here);
        else
            memcpy(memory + at, req->iov[i].base, here);
        at += here;
    }
    if (!reading) {
        struct iovec whole = {.iov_base = memory, .iov_len = length};
        done = pwritev2(file->fd, &whole, 1, offset, write_flags(req));
        error = done < 0 ? -errno : 0;
    }
    free(memory);
    return error != 0 ? error : (int)done;
}

static int advance_transfer(struct target_file *file, struct vblk_req *req, int result)
{
    /* The driver may cut its buffers as it likes, direct I/O may not. Linux never does it, so this may be slow. */
    if (result == -EINVAL && file->direct)
        result = bounce(file, req);
    if (result == -EINTR || result == -EAGAIN)
        return 1;
    if (result == -EIO && req->op == VBLK_WRITE && req->fua)
        lose(file);
    if (result < 0)
        return result;
    if (result == 0)
        return -EIO; /* the end of the file, or a device that takes nothing: going on would never end */
    advance_iov(req, (size_t)result);
    return 1;
}

static int advance_range(struct target_file *file, struct vblk_req *req, int result)
{
    enum way way = req->phase;
    bool may_be_unknown = way != WAY_WRITE && way != WAY_SYNC;
    if (may_be_unknown && (result == -EOPNOTSUPP || result == -EINVAL || result == -ENOSYS || result == -ENOTTY)) {
        learn(file, way);
        req->phase = WAY_OPEN;
        return 1;
    }
    if (result < 0 && way == WAY_SYNC)
        lose(file);
    if (result < 0)
        return result;
    if (way == WAY_SYNC)
        return 1;
    if (way == WAY_WRITE) {
        if (result == 0)
            return -EIO;
        req->progress += (uint64_t)result;
        if (req->progress < req->ranges[req->step].length)
            return 1;
    }
    req->step++;
    req->progress = 0;
    req->phase = WAY_OPEN;
    return 1;
}

int target_file_advance(struct target_file *file, struct vblk_req *req, int result)
{
    if (result == -EINTR || result == -EAGAIN)
        return 1; /* the same step again */
    switch ((enum vblk_op)req->op) {
    case VBLK_READ:
    case VBLK_WRITE:
        return advance_transfer(file, req, result);
    case VBLK_DISCARD:
    case VBLK_WRITE_ZEROES:
        return advance_range(file, req, result);
    default: /* FLUSH */
        if (result < 0) {
            lose(file);
            return result;
        }
        req->step = 1;
        return has_lost(file) ? -EIO : 1; /* of two at once the kernel tells only one */
    }
}

static int discard_device(int fd, uint64_t offset, uint64_t length)
{
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKDISCARD, range);
}

int target_file_sync(struct target_file *file, struct vblk_req *req)
{
    struct step step;
    int more;
    while ((more = plan(file, req, &step)) == 1) {
        ssize_t result = -1;
        switch (step.call) {
        case STEP_READ:
            result = preadv(file->fd, step.iov, (int)step.iov_count, (off_t)step.offset);
            break;
        case STEP_WRITE:
            result = pwritev2(file->fd, step.iov, (int)step.iov_count, (off_t)step.offset, write_flags(req));
            break;
        case STEP_SYNC:
            result = fdatasync(file->fd);
            break;
        case STEP_FALLOCATE:
            result = fallocate(file->fd, step.mode, (off_t)step.offset, (off_t)step.length);
            break;
        case STEP_COMMAND:
            errno = EOPNOTSUPP;
            break;
        case STEP_IOCTL:
            result = discard_device(file->fd, step.offset, step.length);
            break;
        }
        more = target_file_advance(file, req, result < 0 ? -errno : (int)result);
        if (more < 0)
            return more;
    }
    return more;
}

int target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring)
{
    struct step step;
    int more = plan(file, req, &step);
    if (more == 1 && step.call == STEP_IOCTL)
        return target_file_sync(file, req); /* old kernels: the queue stands still meanwhile */
    if (more <= 0)
        return more;
    struct io_uring_sqe *sqe = uring_sqe(ring);
    if (sqe == NULL)
        return TARGET_FULL;
    sqe->fd = 0; /* index of the registered file */
    sqe->flags = (uint8_t)(IOSQE_FIXED_FILE | (file->in_memory ? IOSQE_ASYNC : 0));
    switch (step.call) {
    case STEP_READ:
    case STEP_WRITE:
        sqe->opcode = step.call == STEP_READ ? IORING_OP_READV : IORING_OP_WRITEV;
        if (step.iov == step.zero_iov) {
            /* The vector dies with this frame and the kernel copies it only at submit: one piece, in place. */
            sqe->opcode = IORING_OP_WRITE;
            sqe->addr = (uintptr_t)zeros;
            sqe->len = (uint32_t)step.zero_iov[0].iov_len;
        } else if (step.iov_count == 1) {
            sqe->opcode = step.call == STEP_READ ? IORING_OP_READ : IORING_OP_WRITE;
            sqe->addr = (uintptr_t)step.iov->iov_base;
            sqe->len = (uint32_t)step.iov->iov_len; /* TRANSFER_MAX fits */
            if (fixed_holds(file->fixed, step.iov->iov_base, step.iov->iov_len))
                sqe->opcode = step.call == STEP_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED; /* of buffer 0 */
        } else {
            sqe->addr = (uintptr_t)step.iov;
            sqe->len = step.iov_count;
        }
        sqe->off = step.offset;
        sqe->rw_flags = (uint32_t)(step.call == STEP_WRITE ? write_flags(req) : 0);
        break;
    case STEP_SYNC:
        sqe->opcode = IORING_OP_FSYNC;
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
        break;
    case STEP_FALLOCATE:
        sqe->opcode = IORING_OP_FALLOCATE;
        sqe->off = step.offset;
        sqe->addr = step.length;
        sqe->len = (uint32_t)step.mode;
        break;
    case STEP_COMMAND:
        sqe->opcode = IORING_OP_URING_CMD;
        sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
        sqe->addr = step.offset;
        sqe->addr3 = step.length;
        break;
    case STEP_IOCTL:
        break;
    }
    sqe->user_data = (uintptr_t)req;
    return 1;
}
