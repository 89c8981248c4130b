/*
 * The crash log of a split virtqueue: which heads were popped and are not answered, in memory that outlives this process.
 * Layout and order of the stores are those of the vhost-user specification ("Inflight I/O tracking"), so that the front-end
 * may be any. Pure.
 *
 *   popped      counter, then inflight = 1           inflight_mark, before anything is done for the request
 *   answered    linked into the batch's list         inflight_push, before its used element is visible
 *   published   inflight = 0, then used_idx          inflight_commit, after used.idx
 *
 * A death between two of these stores leaves: not marked = not popped; marked = to be done again, which is harmless; or
 * used.idx beyond the log's used_idx: then the last used.idx - used_idx heads of the list were published, and their marks
 * go. Heads are marked in the order of the avail ring, so what was popped is used.idx plus the number of marks.
 *
 * The memory is shared with the front-end: nothing read from it is used as an index unchecked, and every loop is bounded.
 *
 * Not handled: packed rings.
 */
#include "core.h"

enum { INFLIGHT_VERSION = 1 };

struct inflight_desc {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;    /* the head answered before this one */
    uint64_t counter; /* when it was popped */
};

struct inflight_region {
    uint64_t features;
    uint16_t version; /* 0: fresh */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_desc desc[];
};
_Static_assert(sizeof(struct inflight_desc) == INFLIGHT_DESC_BYTES, "vhost-user DescStateSplit");
_Static_assert(sizeof(struct inflight_region) == INFLIGHT_HEADER_BYTES, "vhost-user QueueRegionSplit");

/* Stores of one process are seen in order by whoever maps the memory after its death; the compiler must keep it, too. */
#define ORDERED_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* Unmark the last `count` heads of the list. */
static void unmark(struct inflight *log, uint16_t count)
{
    uint16_t head = GUEST_LOAD(&log->region->last_batch_head);
    for (uint16_t i = 0; i < count && i < log->num && head < log->num; i++) {
        ORDERED_STORE(&log->region->desc[head].inflight, 0);
        head = GUEST_LOAD(&log->region->desc[head].next);
    }
}

uint16_t inflight_recover(struct inflight *log, void *memory, uint16_t num, uint16_t used_idx, uint16_t *heads)
{
    struct inflight_region *region = memory;
    log->region = region;
    log->num = num;
    log->counter = 0;
    log->fresh = GUEST_LOAD(&region->version) != INFLIGHT_VERSION;
    if (log->fresh) {
        memset(region->desc, 0, num * sizeof(region->desc[0]));
        GUEST_STORE(&region->features, 0);
        GUEST_STORE(&region->desc_num, num);
        GUEST_STORE(&region->last_batch_head, 0);
        GUEST_STORE(&region->used_idx, used_idx);
        ORDERED_STORE(&region->version, INFLIGHT_VERSION);
        return 0;
    }
    unmark(log, (uint16_t)(used_idx - GUEST_LOAD(&region->used_idx)));
    ORDERED_STORE(&region->used_idx, used_idx);

    /* Sorted by counter. Insertion: the list is short, and nearly sorted where heads are taken in turn. */
    uint16_t count = 0;
    for (uint16_t head = 0; head < num; head++) {
        if (GUEST_LOAD(&region->desc[head].inflight) == 0)
            continue;
        uint64_t counter = GUEST_LOAD(&region->desc[head].counter);
        uint16_t at = count++;
        /* The loop ends at 0 whatever the counters do under our eyes. */
        for (; at > 0 && GUEST_LOAD(&region->desc[heads[at - 1]].counter) > counter; at--)
            heads[at] = heads[at - 1];
        heads[at] = head;
        if (counter >= log->counter)
            log->counter = counter + 1;
    }
    return count;
}

void inflight_mark(struct inflight *log, uint16_t head)
{
    struct inflight_desc *desc = &log->region->desc[head];
    GUEST_STORE(&desc->counter, log->counter);
    log->counter++;
    ORDERED_STORE(&desc->inflight, 1);
}

void inflight_push(struct inflight *log, uint16_t head)
{
    GUEST_STORE(&log->region->desc[head].next, GUEST_LOAD(&log->region->last_batch_head));
    ORDERED_STORE(&log->region->last_batch_head, head);
}

void inflight_commit(struct inflight *log, uint16_t count, uint16_t used_idx)
{
    unmark(log, count);
    ORDERED_STORE(&log->region->used_idx, used_idx);
}
