/* Targets that are done when they return: memory, and null (zeros in, nothing out). */
#include "core.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

/* Zeros, giving whole pages back to the kernel where that was asked for. */
static void clear(uint8_t *at, uint64_t length, bool unmap)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (unmap && length >= 2 * page) {
        uintptr_t first = ((uintptr_t)at + page - 1) & ~(page - 1);
        uintptr_t end = ((uintptr_t)at + length) & ~(page - 1);
        /* REMOVE, not DONTNEED: the storage may be shared memory, whose pages DONTNEED would only unmap here. */
        if (madvise((void *)first, end - first, MADV_REMOVE) == 0) { /* NOLINT: address arithmetic */
            memset(at, 0, first - (uintptr_t)at);
            memset((void *)end, 0, (uintptr_t)at + length - end); /* NOLINT */
            return;
        }
    }
    memset(at, 0, length);
}

int target_memory(const struct vb_target *target, struct vblk_req *req)
{
    uint8_t *base = (uint8_t *)(uintptr_t)target->address;
    if (req->op == VBLK_READ || req->op == VBLK_WRITE) {
        /* vblk_parse held the range against the capacity; a capacity beyond the memory would be our own bug. */
        if (req->length > target->size || req->offset > target->size - req->length)
            return -EIO;
        uint8_t *at = base + req->offset;
        for (uint16_t i = 0; i < req->iov_count; i++) {
            const struct vb_iov *piece = &req->iov[i];
            if (req->op == VBLK_READ)
                memcpy(piece->base, at, piece->length);
            else
                memcpy(at, piece->base, piece->length);
            at += piece->length;
        }
        return 0;
    }
    for (uint32_t i = 0; i < req->range_count; i++) {
        const struct vblk_range *range = &req->ranges[i];
        if (range->length > target->size || range->offset > target->size - range->length)
            return -EIO;
        clear(base + range->offset, range->length, range->unmap);
    }
    return 0;
}

int target_null(struct vblk_req *req)
{
    if (req->op == VBLK_READ)
        for (uint16_t i = 0; i < req->iov_count; i++)
            memset(req->iov[i].base, 0, req->iov[i].length);
    return 0;
}
