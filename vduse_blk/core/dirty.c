/*
 * The log of pages the device has written, for whoever copies the driver's memory while it runs (live migration; vhost's
 * VHOST_F_LOG_ALL). One bit per page of the driver's address space; the reader takes bits and clears them at any time. Pure.
 *
 * A page is marked after it was written: marked before, the reader could take the bit, copy the old content and never come
 * back. And it is marked before the driver sees the used index that covers the write, except the page of that index itself.
 */
#include "core.h"

void dirty_mark(const struct dirty_log *log, uint64_t address, uint64_t length)
{
    if (length == 0)
        return;
    uint64_t last = address + (length - 1) < address ? UINT64_MAX : address + (length - 1);
    uint64_t end = log->bytes > UINT64_MAX / 8 ? UINT64_MAX : log->bytes * 8;
    for (uint64_t page = address / DIRTY_PAGE; page <= last / DIRTY_PAGE && page < end; page++) {
        uint8_t bit = (uint8_t)(1u << (page % 8));
        /* Release, and always: a bit that was set a moment ago may have been taken since the write. */
        __atomic_fetch_or(&log->bits[page / 8], bit, __ATOMIC_RELEASE);
    }
}
