/*
 * Requests on a file or block device, one step at a time, by io_uring or by plain calls. A step is one system call's worth:
 * what is left of a transfer, or one range. The same two functions decide what the next step is (plan) and what its
 * result means (target_file_advance), so both ways behave alike.
 *
 *   READ, WRITE     preadv/pwritev of the pieces not yet done; a short transfer is continued, a read that hits the end
 *                   of the file is an error (the file was cut under us), never zeros
 *   FLUSH           fdatasync
 *   DISCARD         fallocate(PUNCH_HOLE) per range; not supported = UNSUPP, the driver stops asking
 *   WRITE_ZEROES    UNMAP: PUNCH_HOLE, which reads back as zeros; otherwise ZERO_RANGE, which keeps the space. Where
 *                   the file system has neither, zeros are written
 */
#define _GNU_SOURCE
#include "core.h"
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ZERO_BYTES = 65536, ZERO_PIECES = 64 };
enum { PHASE_FALLOCATE = 0, PHASE_WRITE_ZEROS = 1 };

/* 4096-aligned for O_DIRECT; const, so all pieces may share it. */
static const uint8_t zeros[ZERO_BYTES] __attribute__((aligned(4096)));

static int zero_fallocate_mode(const struct target_file *file, const struct vblk_range *range)
{
    if (range->unmap && !file->no_punch)
        return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (!file->no_zero_range)
        return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    return -1;
}

static int discard_mode(const struct target_file *file)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    /* On a block device this flag makes it BLKDISCARD instead of writing zeros (block/fops.c, blkdev_fallocate). */
    return file->is_block_device ? mode | FALLOC_FL_NO_HIDE_STALE : mode;
}

struct step {
    enum { STEP_READ, STEP_WRITE, STEP_SYNC, STEP_FALLOCATE } call;
    const struct iovec *iov;
    unsigned iov_count;
    int mode;
    uint64_t offset;
    uint64_t length;
    struct iovec zero_iov[ZERO_PIECES];
};

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
        step->call = STEP_SYNC;
        return 1;
    case VBLK_DISCARD:
    case VBLK_WRITE_ZEROES:
        while (req->step < req->range_count && req->ranges[req->step].length == 0)
            req->step++;
        if (req->step == req->range_count)
            return 0;
        range = &req->ranges[req->step];
        step->offset = range->offset + req->progress;
        step->length = range->length - req->progress;
        step->mode = req->op == VBLK_DISCARD ? discard_mode(file) : zero_fallocate_mode(file, range);
        if (req->op == VBLK_DISCARD && file->no_punch)
            return -EOPNOTSUPP;
        if (req->phase == PHASE_FALLOCATE && step->mode >= 0) {
            step->call = STEP_FALLOCATE;
            return 1;
        }
        req->phase = PHASE_WRITE_ZEROS;
        step->call = STEP_WRITE;
        step->iov = step->zero_iov;
        for (step->iov_count = 0; step->iov_count < ZERO_PIECES && step->length != 0; step->iov_count++) {
            size_t here = step->length < ZERO_BYTES ? (size_t)step->length : ZERO_BYTES;
            step->zero_iov[step->iov_count].iov_base = (void *)(uintptr_t)zeros;
            step->zero_iov[step->iov_count].iov_len = here;
            step->length -= here;
        }
        return 1;
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

int target_file_advance(struct target_file *file, struct vblk_req *req, int result)
{
    if (result == -EINTR || result == -EAGAIN)
        return 1; /* the same step again */
    bool ranged = req->op == VBLK_DISCARD || req->op == VBLK_WRITE_ZEROES;
    if (ranged && req->phase == PHASE_FALLOCATE) {
        if (result == -EOPNOTSUPP || result == -EINVAL || result == -ENOSYS) {
            /* Learnt once, for the whole file. A discard is then refused, zeros go the next cheaper way. */
            if (req->op == VBLK_DISCARD || (req->ranges[req->step].unmap && !file->no_punch))
                file->no_punch = true;
            else
                file->no_zero_range = true;
            return req->op == VBLK_DISCARD ? -EOPNOTSUPP : 1;
        }
        if (result < 0)
            return result;
        req->step++;
        return req->step == req->range_count ? 0 : 1;
    }
    if (result < 0)
        return result;
    if (req->op == VBLK_FLUSH) {
        req->step = 1;
        return 0;
    }
    if (result == 0)
        return -EIO; /* the end of the file, or a device that takes nothing: going on would never end */
    if (ranged) {
        req->progress += (uint64_t)result;
        if (req->progress == req->ranges[req->step].length) {
            req->step++;
            req->progress = 0;
            req->phase = PHASE_FALLOCATE;
        }
        return req->step == req->range_count ? 0 : 1;
    }
    advance_iov(req, (size_t)result);
    return req->step == req->iov_count ? 0 : 1;
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
            result = pwritev(file->fd, step.iov, (int)step.iov_count, (off_t)step.offset);
            break;
        case STEP_SYNC:
            result = fdatasync(file->fd);
            break;
        case STEP_FALLOCATE:
            result = fallocate(file->fd, step.mode, (off_t)step.offset, (off_t)step.length);
            break;
        }
        more = target_file_advance(file, req, result < 0 ? -errno : (int)result);
        if (more <= 0)
            return more;
    }
    return more;
}

int target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring)
{
    struct step step;
    int more = plan(file, req, &step);
    if (more <= 0)
        return more;
    struct io_uring_sqe *sqe = uring_sqe(ring);
    if (sqe == NULL)
        return -EBUSY; /* the ring has a slot per request: cannot happen, and must not pass silently */
    sqe->fd = 0; /* index of the registered file */
    sqe->flags = IOSQE_FIXED_FILE;
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
        } else {
            sqe->addr = (uintptr_t)step.iov;
            sqe->len = step.iov_count;
        }
        sqe->off = step.offset;
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
    }
    sqe->user_data = (uintptr_t)req;
    return 1;
}
