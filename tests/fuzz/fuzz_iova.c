/*
 * iova_table_check and iova_translate against an oracle that looks at every byte.
 *
 * Input: number of regions, then for each its distance from the one before, its length, its distance in memory and its
 * access; then questions until the input ends. One bit of a region's length byte makes it wrong, so that the check is
 * asked, too. Host addresses are never followed here.
 */
#include "core.h"
#include "input.h"

#include <errno.h>

enum { REGIONS_MAX = 12, PIECES_MAX = 16, LINEAR_MAX = 600 };

/* The definition: sorted, disjoint, nothing empty, no address wraps. 128 bits, so that nothing can overflow here. */
static bool is_good(const struct iova_table *table)
{
    for (uint32_t i = 0; i < table->count; i++) {
        const struct iova_region *r = &table->regions[i];
        __extension__ unsigned __int128 end = r->host;
        end += r->last;
        end -= r->start;
        end += 1; /* one behind the last byte is a pointer, too */
        if (r->start > r->last || r->host == 0 || end > UINT64_MAX)
            return false;
        for (uint32_t j = 0; j < i; j++)
            if (table->regions[j].last >= r->start)
                return false;
    }
    return true;
}

static int linear(const struct iova_table *table, uint64_t iova, uint64_t length, uint32_t access, struct vb_iov *out,
                  uint32_t room)
{
    uint32_t count = 0;
    if (length != 0 && length - 1 > UINT64_MAX - iova)
        return -EFAULT;
    for (uint64_t i = 0; i < length; i++) {
        const struct iova_region *r = NULL;
        for (uint32_t k = 0; k < table->count; k++)
            if (iova + i >= table->regions[k].start && iova + i <= table->regions[k].last)
                r = &table->regions[k];
        if (r == NULL)
            return -EFAULT;
        if ((r->access & access) != access)
            return -EACCES;
        uintptr_t host = (uintptr_t)(r->host + (iova + i - r->start));
        if (count > 0 && (uintptr_t)out[count - 1].base + out[count - 1].length == host) {
            out[count - 1].length++;
        } else {
            if (count == room)
                return -ENOBUFS;
            out[count].base = (void *)host;
            out[count].length = 1;
            count++;
        }
    }
    return (int)count;
}

static void ask(const struct iova_table *table, uint64_t iova, uint64_t length, uint32_t access, uint32_t room)
{
    struct vb_iov expected[PIECES_MAX];
    /* Exactly as long as promised: a piece too many is an overrun. */
    struct vb_iov *found = malloc(room * sizeof(*found));
    int count = iova_translate(table, iova, length, access, found, room);
    if (length <= LINEAR_MAX) {
        MUST(count == linear(table, iova, length, access, expected, room));
        for (int i = 0; i < count; i++)
            MUST(found[i].base == expected[i].base && found[i].length == expected[i].length);
    } else if (count >= 0) {
        uint64_t sum = 0;
        for (int i = 0; i < count; i++)
            sum += found[i].length;
        MUST((uint32_t)count <= room && sum == length);
    } else {
        MUST(count == -EFAULT || count == -EACCES || count == -ENOBUFS);
    }
    free(found);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    uint8_t shape = in8(&in);
    uint64_t iova = (shape & 1) ? UINT64_MAX - in16(&in) : in16(&in);
    uint64_t host = 1 + in16(&in);

    uint32_t regions = in8(&in) % (REGIONS_MAX + 1u);
    struct iova_table *table = calloc(1, sizeof(*table) + regions * sizeof(table->regions[0]));
    table->count = regions;
    for (uint32_t i = 0; i < table->count; i++) {
        struct iova_region *r = &table->regions[i];
        uint8_t gap = in8(&in);
        uint8_t length = in8(&in);
        uint8_t more = in8(&in);
        iova += gap % 16;
        r->start = iova;
        r->last = iova + length % 64 - (length >= 250 ? 1 : 0);
        r->host = more == 255 ? UINT64_MAX - gap : host;
        r->access = (more >> 6) & 3;
        if (length == 249)
            r->last = UINT64_MAX - gap;
        host += (uint64_t)(length % 64) + 1 + more % 8;
        iova = r->last + 1;
    }
    MUST((iova_table_check(table) == 0) == is_good(table));
    while (in.left > 0 && is_good(table)) {
        uint8_t how = in8(&in);
        uint64_t from = (how & 1) ? in64(&in) : (table->count ? table->regions[0].start : 0) - 4 + in16(&in) % 800;
        uint64_t length = (how & 2) ? in64(&in) : in16(&in) % LINEAR_MAX;
        ask(table, from, length, 1 + ((uint32_t)how >> 2) % 3, how >> 4);
    }
    free(table);
    return 0;
}
