/*
 * Which pages are held (fixed.h). A region is cut into pieces of FIXED_PIECE_BYTES from its first byte on, each one buffer
 * of the ring; a request that lies in two of them goes the ordinary way, as does everything the kernel refuses to hold.
 */
#define _GNU_SOURCE
#include "fixed.h"

#include <errno.h>

static uint64_t piece_length(const struct iova_region *region, uint64_t skip)
{
    uint64_t left = region->last - region->start + 1 - skip;
    return left < FIXED_PIECE_BYTES ? left : FIXED_PIECE_BYTES;
}

static bool is_wanted(const struct iova_table *table, const struct fixed_piece *piece)
{
    for (uint32_t i = 0; i < table->count; i++) {
        const struct iova_region *region = &table->regions[i];
        uint64_t skip = piece->host - region->host;
        if ((region->flags & IOVA_PINNED) && skip <= region->last - region->start && skip % FIXED_PIECE_BYTES == 0 &&
            piece_length(region, skip) == piece->length)
            return true;
    }
    return false;
}

static void let_go(struct fixed *fixed, const struct iova_table *table)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < fixed->count; i++) {
        struct fixed_piece piece = fixed->pieces[i];
        if (is_wanted(table, &piece)) {
            fixed->pieces[kept++] = piece;
            continue;
        }
        (void)uring_set_buffer(fixed->ring, piece.slot, NULL, 0);
        fixed->used[piece.slot] = false;
        fixed->bytes -= piece.length;
    }
    fixed->count = kept;
}

/* Where a piece that begins at `host` is, or belongs. */
static uint32_t place_of(const struct fixed *fixed, uint64_t host)
{
    uint32_t low = 0;
    uint32_t high = fixed->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (fixed->pieces[middle].host < host)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* 0 or -errno. */
static int hold(struct fixed *fixed, uint64_t host, uint64_t length)
{
    uint32_t at = place_of(fixed, host);
    if (at < fixed->count && fixed->pieces[at].host == host)
        return 0;
    if (fixed->count == FIXED_PIECES)
        return -ENOBUFS;
    if (!fixed->reserved) {
        int error = uring_reserve_buffers(fixed->ring, FIXED_PIECES);
        if (error < 0)
            return error;
        fixed->reserved = true;
    }
    uint32_t slot = 0;
    while (fixed->used[slot])
        slot++;
    int error = uring_set_buffer(fixed->ring, slot, (void *)(uintptr_t)host, (size_t)length);
    if (error < 0)
        return error;
    memmove(&fixed->pieces[at + 1], &fixed->pieces[at], (fixed->count - at) * sizeof(fixed->pieces[0]));
    fixed->pieces[at] = (struct fixed_piece){host, length, slot};
    fixed->used[slot] = true;
    fixed->count++;
    fixed->bytes += length;
    return 0;
}

void fixed_adopt(struct fixed *fixed, const struct iova_table *table)
{
    fixed->last = 0;
    fixed->error = 0;
    if (table->drain) /* else it lacks nothing, and buffers may be in use */
        let_go(fixed, table);
    for (uint32_t i = 0; i < table->count; i++) {
        const struct iova_region *region = &table->regions[i];
        int error = 0;
        for (uint64_t skip = 0; (region->flags & IOVA_PINNED) && error == 0 && skip <= region->last - region->start;
             skip += FIXED_PIECE_BYTES)
            error = hold(fixed, region->host + skip, piece_length(region, skip));
        if (error < 0)
            fixed->error = -error;
    }
}

static bool holds(const struct fixed_piece *piece, uint64_t address, uint64_t length)
{
    uint64_t skip = address - piece->host;
    return skip < piece->length && length <= piece->length - skip;
}

int fixed_find(struct fixed *fixed, const void *address, size_t length)
{
    if (fixed->count == 0)
        return -1;
    uint64_t host = (uintptr_t)address;
    if (holds(&fixed->pieces[fixed->last], host, length))
        return (int)fixed->pieces[fixed->last].slot;
    uint32_t at = place_of(fixed, host + 1);
    if (at == 0 || !holds(&fixed->pieces[at - 1], host, length))
        return -1;
    fixed->last = at - 1;
    return (int)fixed->pieces[at - 1].slot;
}
