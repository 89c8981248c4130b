/*
 * IOVA translation over an immutable, sorted table of regions. Pure.
 *
 * Every address and length comes from the driver. Invariants the code leans on (checked by iova_table_check before a
 * table is published): start <= last, regions sorted and disjoint, host + length does not wrap. Violating them
 * would turn a hostile address into a wild pointer.
 */
#include "core.h"

#include <errno.h>
#include <sys/uio.h>

_Static_assert(sizeof(struct vb_iov) == sizeof(struct iovec), "vb_iov is iovec");
_Static_assert(offsetof(struct vb_iov, base) == offsetof(struct iovec, iov_base), "vb_iov is iovec");
_Static_assert(offsetof(struct vb_iov, length) == offsetof(struct iovec, iov_len), "vb_iov is iovec");

int iova_table_check(const struct iova_table *table)
{
    for (uint32_t i = 0; i < table->count; i++) {
        const struct iova_region *region = &table->regions[i];
        if (region->start > region->last || region->host == 0)
            return -EINVAL;
        if (region->last - region->start >= UINT64_MAX - region->host)
            return -EINVAL;
        if (i > 0 && region->start <= table->regions[i - 1].last)
            return -EINVAL;
    }
    return 0;
}

/* The region holding iova, or NULL. Tables are short (a ring each, one bounce area), so a plain bisection is enough. */
static const struct iova_region *find(const struct iova_table *table, uint64_t iova)
{
    uint32_t low = 0;
    uint32_t high = table->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct iova_region *region = &table->regions[middle];
        if (iova < region->start)
            high = middle;
        else if (iova > region->last)
            low = middle + 1;
        else
            return region;
    }
    return NULL;
}

int iova_translate(const struct iova_table *table, uint64_t iova, uint64_t length, uint32_t access,
                   struct vb_iov *out, uint32_t room)
{
    uint32_t count = 0;
    if (length != 0 && length - 1 > UINT64_MAX - iova)
        return -EFAULT;
    while (length != 0) {
        const struct iova_region *region = find(table, iova);
        if (region == NULL)
            return -EFAULT;
        if ((region->access & access) != access)
            return -EACCES;
        uint64_t skip = iova - region->start;
        /* Cannot overflow: last - iova < last - start, and a full 2^64 region cannot exist beside a non-zero host. */
        uint64_t here = region->last - iova + 1;
        if (here > length)
            here = length;
        uint8_t *host = (uint8_t *)(uintptr_t)(region->host + skip);
        if (count > 0 && (uint8_t *)out[count - 1].base + out[count - 1].length == host) {
            out[count - 1].length += (size_t)here;
        } else {
            if (count == room)
                return -ENOBUFS;
            out[count].base = host;
            out[count].length = (size_t)here;
            count++;
        }
        length -= here;
        if (length == 0)
            break;
        iova += here; /* cannot wrap: iova + length - 1 was checked above and length > here */
    }
    return (int)count;
}
