/*
 * The in-flight log of one split virtqueue: which heads were popped and not yet answered, in memory that survives the
 * process. The layout is that of vhost-user (specification, "Inflight I/O tracking", split virtqueue), so one code serves a
 * file of ours and a buffer of a front-end's. Pure; nothing in it is trusted.
 *
 *   pop       mark: flag and counter of the head
 *   push      chain: the head joins the batch (last_batch_head, next)
 *   publish   used.idx moves, then clear: flags of the batch, then used_idx of the log
 *
 * Killed between used.idx and the end of clear, the batch is known by the difference of the two indices and cleared again;
 * killed anywhere else, a head is marked exactly if its answer is not published. What is marked is done again: every
 * request of a disk may be repeated as long as it has not been answered. Marks are made in the order of the available
 * ring, so the successor pops on at used.idx plus the number of marked heads.
 *
 * A killed process loses no store it has executed; only the compiler must not reorder them, hence releases.
 */
#include "core.h"

enum { INFLIGHT_VERSION = 1 };

#define RELEASE_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

size_t inflight_size(uint16_t num)
{
    return sizeof(struct inflight) + (size_t)num * sizeof(struct inflight_entry);
}

void inflight_reset(struct inflight *log, uint16_t num, uint16_t used_idx)
{
    memset(log, 0, inflight_size(num));
    log->desc_num = num;
    log->used_idx = used_idx;
    RELEASE_STORE(&log->version, (uint16_t)INFLIGHT_VERSION);
}

bool inflight_is_of(const struct inflight *log, uint16_t num)
{
    return GUEST_LOAD(&log->version) == INFLIGHT_VERSION && GUEST_LOAD(&log->desc_num) == num;
}

void inflight_mark(struct inflight *log, uint16_t head, uint64_t counter)
{
    GUEST_STORE(&log->entries[head].counter, counter);
    RELEASE_STORE(&log->entries[head].inflight, (uint8_t)1);
}

void inflight_chain(struct inflight *log, uint16_t head)
{
    GUEST_STORE(&log->entries[head].next, GUEST_LOAD(&log->last_batch_head));
    RELEASE_STORE(&log->last_batch_head, head);
}

/* Clear the flags of the last (used_idx - log->used_idx) heads chained. */
static void clear(struct inflight *log, uint16_t num, uint16_t used_idx)
{
    uint16_t count = (uint16_t)(used_idx - GUEST_LOAD(&log->used_idx));
    uint16_t head = GUEST_LOAD(&log->last_batch_head);
    for (uint16_t i = 0; i < count && i < num && head < num; i++) {
        RELEASE_STORE(&log->entries[head].inflight, (uint8_t)0);
        head = GUEST_LOAD(&log->entries[head].next);
    }
    RELEASE_STORE(&log->used_idx, used_idx);
}

void inflight_published(struct inflight *log, uint16_t num, uint16_t used_idx)
{
    clear(log, num, used_idx);
}

uint16_t inflight_recover(struct inflight *log, uint16_t num, uint16_t used_idx, uint16_t *heads)
{
    uint16_t count = 0;
    clear(log, num, used_idx);
    for (uint16_t head = 0; head < num; head++)
        if (GUEST_LOAD(&log->entries[head].inflight) != 0)
            heads[count++] = head;
    /* Shell sort by counter: no allocation, no recursion, and the list is short. */
    for (uint16_t gap = count / 2; gap > 0; gap /= 2) {
        for (uint16_t i = gap; i < count; i++) {
            uint16_t head = heads[i];
            uint64_t counter = GUEST_LOAD(&log->entries[head].counter);
            uint16_t at = i;
            for (; at >= gap && GUEST_LOAD(&log->entries[heads[at - gap]].counter) > counter; at = (uint16_t)(at - gap))
                heads[at] = heads[at - gap];
            heads[at] = head;
        }
    }
    return count;
}
