/*
 * The requests of one vb_queue_poll as a batch, for storage in Python that takes many at once. Pure.
 *
 *   vb_batch_admit    moves the reads and writes that need nothing but storage to the front: the batch
 *   vb_batch_copy     serves those that lie in a piece of memory
 *   vb_batch_settle   turns results into answers, counts, and moves what has none to the front again
 *
 * An item's result is VB_BATCH_OPEN, 0, or an errno; anything else is a bug of whoever wrote it and counts as EIO. What is not
 * admitted, and what is still open when the batch is settled, takes the way of single requests: every refusal and every
 * emulation is there, and only there.
 */
#include "core.h"

#include <errno.h>

static bool may_join(const struct vb_item *item, const struct vb_batch_limits *limits)
{
    if (item->op == VBLK_WRITE ? !limits->writes || (item->fua && !limits->fua) : item->op != VBLK_READ)
        return false;
    if (item->length == 0 || item->length > limits->size || item->offset > limits->size - item->length)
        return false;
    if (limits->max_transfer != 0 && item->length > limits->max_transfer)
        return false;
    return item->offset % limits->block_size == 0 && item->length % limits->block_size == 0;
}

uint32_t vb_batch_admit(struct vb_item *items, int32_t *results, uint32_t count, const struct vb_batch_limits *limits)
{
    uint32_t admitted = 0;
    if (limits->block_size == 0)
        return 0;
    for (uint32_t i = 0; i < count; i++) {
        if (!may_join(&items[i], limits))
            continue;
        struct vb_item item = items[i];
        items[i] = items[admitted];
        items[admitted] = item;
        results[admitted++] = VB_BATCH_OPEN;
    }
    return admitted;
}

void vb_batch_copy(const struct vb_item *items, int32_t *results, uint32_t count, uint8_t *memory, uint64_t start,
                   uint64_t size, int writable)
{
    for (uint32_t i = 0; i < count; i++) {
        const struct vb_item *item = &items[i];
        bool reading = item->op == VBLK_READ;
        if (results[i] != VB_BATCH_OPEN || !(reading || (item->op == VBLK_WRITE && writable)))
            continue;
        if (item->offset < start || item->length > size || item->offset - start > size - item->length)
            continue;
        uint8_t *at = memory + (item->offset - start);
        uint64_t left = item->length;
        for (uint32_t piece = 0; piece < item->iov_count && left != 0; piece++) {
            const struct vb_iov *iov = &item->iov[piece];
            uint64_t here = iov->length < left ? iov->length : left;
            if (reading)
                memcpy(iov->base, at, here);
            else
                memcpy(at, iov->base, here);
            at += here;
            left -= here;
        }
        results[i] = left == 0 ? 0 : EIO; /* the parser made pieces for every byte */
    }
}

uint32_t vb_batch_settle(struct vb_item *items, const int32_t *results, uint32_t count, struct vb_done *done,
                         struct vb_batch_totals *totals)
{
    uint32_t answered = 0;
    uint32_t open = 0;
    memset(totals, 0, sizeof(*totals));
    for (uint32_t i = 0; i < count; i++) {
        if (results[i] == VB_BATCH_OPEN) {
            items[open++] = items[i];
            continue;
        }
        enum vblk_status status = vblk_status_of_errno(results[i]);
        done[answered].head = items[i].head;
        done[answered++].status = (uint16_t)status;
        if (status != VBLK_S_OK) {
            totals->errors++;
        } else if (items[i].op == VBLK_READ) {
            totals->reads++;
            totals->read_bytes += items[i].length;
        } else {
            totals->writes++;
            totals->write_bytes += items[i].length;
        }
    }
    return answered;
}
