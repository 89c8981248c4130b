/* Which pages are held (fixed.h). What the kernel refuses to hold goes the ordinary way. */
#define _GNU_SOURCE
#include "fixed.h"

static bool is_held(const struct fixed *fixed, const struct iova_region *region)
{
    return (region->flags & IOVA_PINNED) && region->host == fixed->host &&
           region->last - region->start == fixed->length - 1;
}

/* The region to hold: the one that is held already, if it is still there. NULL = none. */
static const struct iova_region *choose(const struct fixed *fixed, const struct iova_table *table)
{
    const struct iova_region *found = NULL;
    for (uint32_t i = 0; i < table->count; i++) {
        const struct iova_region *region = &table->regions[i];
        if (fixed->length != 0 && is_held(fixed, region))
            return region;
        if (found == NULL && (region->flags & IOVA_PINNED))
            found = region;
    }
    return found;
}

/* 0 or -errno. */
static int hold(struct fixed *fixed, const struct iova_region *region)
{
    if (!fixed->reserved) {
        int error = uring_reserve_buffer(fixed->ring);
        if (error < 0)
            return error;
        fixed->reserved = true;
    }
    uint64_t length = region->last - region->start + 1;
    int error = uring_set_buffer(fixed->ring, (void *)(uintptr_t)region->host, (size_t)length);
    if (error < 0)
        return error;
    fixed->host = region->host;
    fixed->length = length;
    return 0;
}

void fixed_adopt(struct fixed *fixed, const struct iova_table *table)
{
    const struct iova_region *wanted = choose(fixed, table);
    fixed->error = 0;
    if (fixed->length != 0 && (wanted == NULL || !is_held(fixed, wanted))) { /* the table drains: nothing is in flight */
        (void)uring_set_buffer(fixed->ring, NULL, 0);
        fixed->length = 0;
    }
    if (fixed->length == 0 && wanted != NULL)
        fixed->error = -hold(fixed, wanted);
}

bool fixed_holds(const struct fixed *fixed, const void *address, size_t length)
{
    uint64_t skip = (uintptr_t)address - fixed->host;
    return skip < fixed->length && length <= fixed->length - skip;
}
