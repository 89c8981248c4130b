/*
 * A split virtqueue seen from the device (virtio 1.3, 2.7). Pure: state in, memory in, results out.
 *
 * States of an entry: available (avail.idx passed it) -> popped (last_avail passed it) -> pushed (used slot filled) ->
 * published (used.idx passed it). Each popped head is pushed exactly once; the caller keeps that.
 *
 * Three results of a pop that must never be mixed up: a chain, nothing there, the driver broke the rules. After the
 * last one nothing more is ever popped. A fourth, UNMAPPED, only says "ask control for this memory and come back".
 *
 * Every descriptor is copied before it is looked at, each field once: the driver may rewrite it under our eyes.
 * Every loop is bounded by the length of the table it walks.
 *
 * Not handled: the driver changing the ring's size or address while it runs (the transports forbid it).
 */
#include "core.h"

#include <errno.h>

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 }; /* 2.7.5 */
enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };        /* 2.7.7, 2.7.10 */

static uint16_t *used_event(const struct vring *ring)
{
    return &ring->avail->ring[ring->num];
}

static uint16_t *avail_event(const struct vring *ring)
{
    return (uint16_t *)(void *)&ring->used->ring[ring->num];
}

void vring_rebind(struct vring *ring, void *desc, void *avail, void *used)
{
    ring->desc = desc;
    ring->avail = avail;
    ring->used = used;
}

void vring_init(struct vring *ring, uint16_t num, void *desc, void *avail, void *used, bool event_idx, bool indirect,
                uint16_t last_avail)
{
    memset(ring, 0, sizeof(*ring));
    ring->num = num;
    ring->mask = (uint16_t)(num - 1);
    ring->event_idx = event_idx;
    ring->indirect = indirect;
    ring->last_avail = last_avail;
    ring->seen_avail = last_avail;
    vring_rebind(ring, desc, avail, used);
    ring->used_idx = GUEST_LOAD(&ring->used->idx);
    ring->published = ring->used_idx;
    ring->notified = ring->used_idx;
}

static enum vring_pop_result broken(struct vring *ring, enum vring_fault fault)
{
    ring->fault = (uint8_t)fault;
    return VRING_BROKEN;
}

uint16_t vring_pending(struct vring *ring)
{
    if (ring->seen_avail == ring->last_avail)
        /* Acquire: the ring entries and descriptors behind idx are read after it. */
        ring->seen_avail = __atomic_load_n(&ring->avail->idx, __ATOMIC_ACQUIRE);
    return (uint16_t)(ring->seen_avail - ring->last_avail);
}

/* Append a copied descriptor to the chain. 0, or the fault. */
static enum vring_fault append(struct vring_chain *chain, const struct vring_desc *desc)
{
    uint32_t writable = (desc->flags & DESC_WRITE) != 0;
    if (chain->count == VRING_CHAIN_MAX)
        return VRING_FAULT_LONG;
    if (!writable && chain->readable != chain->count)
        return VRING_FAULT_ORDER;
    chain->segs[chain->count].iova = desc->addr;
    chain->segs[chain->count].length = desc->len;
    chain->segs[chain->count].writable = writable;
    chain->count++;
    if (!writable)
        chain->readable++;
    return VRING_OK;
}

static void copy_desc(struct vring_desc *to, const struct vring_desc *from)
{
    to->addr = GUEST_LOAD(&from->addr);
    to->len = GUEST_LOAD(&from->len);
    to->flags = GUEST_LOAD(&from->flags);
    to->next = GUEST_LOAD(&from->next);
}

/*
 * Append the chain in the indirect table of `length` bytes at `iova`. The table may straddle regions and nothing says it
 * is aligned, so an entry is translated by itself and copied bytewise, unless all of the table is in one piece. Only the
 * entries on the way need to be mapped.
 */
static enum vring_pop_result pop_indirect(struct vring *ring, const struct iova_table *table, uint64_t iova,
                                          uint32_t length, struct vring_chain *chain, struct vring_seg *unmapped)
{
    uint32_t entries = length / (uint32_t)sizeof(struct vring_desc);
    if (length == 0 || length % sizeof(struct vring_desc) != 0)
        return broken(ring, VRING_FAULT_INDIRECT);

    struct vb_iov whole = {0};
    bool in_one_piece = iova_translate(table, iova, length, IOVA_READ, &whole, 1) == 1;
    uint32_t next = 0;
    for (uint32_t walked = 0; walked < entries; walked++) {
        struct vring_desc desc;
        uint64_t at = (uint64_t)next * sizeof(desc);
        if (in_one_piece) {
            memcpy(&desc, (const uint8_t *)whole.base + at, sizeof(desc));
        } else {
            struct vb_iov part[sizeof(desc)];
            int count = -EFAULT;
            if (at <= UINT64_MAX - iova)
                count = iova_translate(table, iova + at, sizeof(desc), IOVA_READ, part, sizeof(desc));
            if (count < 0) {
                unmapped->iova = iova;
                unmapped->length = length;
                unmapped->writable = 0;
                return VRING_UNMAPPED;
            }
            uint8_t *to = (uint8_t *)&desc;
            for (int i = 0; i < count; i++) {
                memcpy(to, part[i].base, part[i].length);
                to += part[i].length;
            }
        }
        /* The compiler must not go back to the table for a second look at a field. */
        __asm__ volatile("" : "+m"(desc));
        if (desc.flags & DESC_INDIRECT)
            return broken(ring, VRING_FAULT_INDIRECT);
        enum vring_fault fault = append(chain, &desc);
        if (fault != VRING_OK)
            return broken(ring, fault);
        if (!(desc.flags & DESC_NEXT))
            return VRING_CHAIN;
        next = desc.next;
        if (next >= entries)
            return broken(ring, VRING_FAULT_NEXT);
    }
    return broken(ring, VRING_FAULT_LOOP);
}

enum vring_pop_result vring_chain_of(struct vring *ring, const struct iova_table *table, uint16_t head,
                                     struct vring_chain *chain, struct vring_seg *unmapped)
{
    if (head >= ring->num)
        return broken(ring, VRING_FAULT_HEAD);
    chain->head = head;
    chain->count = 0;
    chain->readable = 0;
    uint16_t next = head;
    for (uint32_t walked = 0; walked < ring->num; walked++) {
        struct vring_desc desc;
        copy_desc(&desc, &ring->desc[next]);
        if (desc.flags & DESC_INDIRECT) {
            /* 2.7.5.3.1: not together with NEXT. 2.7.5.3.2: it may end a chain of normal ones, WRITE means nothing. */
            if (!ring->indirect || (desc.flags & DESC_NEXT))
                return broken(ring, VRING_FAULT_INDIRECT);
            return pop_indirect(ring, table, desc.addr, desc.len, chain, unmapped);
        }
        enum vring_fault fault = append(chain, &desc);
        if (fault != VRING_OK)
            return broken(ring, fault);
        if (!(desc.flags & DESC_NEXT))
            return VRING_CHAIN;
        next = desc.next;
        if (next >= ring->num)
            return broken(ring, VRING_FAULT_NEXT);
    }
    return broken(ring, VRING_FAULT_LOOP);
}

enum vring_pop_result vring_pop(struct vring *ring, const struct iova_table *table, struct vring_chain *chain,
                                struct vring_seg *unmapped)
{
    if (ring->fault != VRING_OK)
        return VRING_BROKEN;
    uint16_t pending = vring_pending(ring);
    if (pending == 0)
        return VRING_EMPTY;
    if (pending > ring->num)
        return broken(ring, VRING_FAULT_AVAIL_IDX);
    uint16_t head = GUEST_LOAD(&ring->avail->ring[ring->last_avail & ring->mask]);
    enum vring_pop_result result = vring_chain_of(ring, table, head, chain, unmapped);
    if (result == VRING_CHAIN)
        ring->last_avail++;
    return result;
}

void vring_unpop(struct vring *ring)
{
    ring->last_avail--;
}

void vring_push(struct vring *ring, uint16_t head, uint32_t length)
{
    struct vring_used_elem *elem = &ring->used->ring[ring->used_idx & ring->mask];
    GUEST_STORE(&elem->id, (uint32_t)head);
    GUEST_STORE(&elem->len, length);
    ring->used_idx++;
}

uint16_t vring_publish(struct vring *ring)
{
    uint16_t count = (uint16_t)(ring->used_idx - ring->published);
    if (count != 0) {
        /* Release: data, status bytes and used elements are visible before the index that covers them. */
        __atomic_store_n(&ring->used->idx, ring->used_idx, __ATOMIC_RELEASE);
        ring->published = ring->used_idx;
    }
    return count;
}

bool vring_must_notify(struct vring *ring)
{
    uint16_t new_idx = ring->published;
    uint16_t old_idx = ring->notified;
    bool valid = ring->notified_valid;

    ring->notified = new_idx;
    ring->notified_valid = true;
    /* Full fence: used.idx must be visible before we look whether the driver sleeps, or both sides wait for ever. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!ring->event_idx)
        return !(GUEST_LOAD(&ring->avail->flags) & AVAIL_NO_INTERRUPT);
    if (!valid)
        return true;
    uint16_t event = GUEST_LOAD(used_event(ring));
    /* 2.7.7.2: did this step pass used_event? All arithmetic is modulo 2^16. */
    return (uint16_t)(new_idx - event - 1) < (uint16_t)(new_idx - old_idx);
}

uint16_t vring_avail_idx(const struct vring *ring)
{
    return GUEST_LOAD(&ring->avail->idx);
}

bool vring_driver_sleeps(struct vring *ring)
{
    return ring->event_idx && GUEST_LOAD(used_event(ring)) == ring->published;
}

bool vring_enable_kick(struct vring *ring)
{
    if (ring->event_idx)
        GUEST_STORE(avail_event(ring), ring->last_avail);
    else
        GUEST_STORE(&ring->used->flags, 0);
    /* Full fence, then look again: a driver that saw kicks off has not kicked for what it added since. */
    atomic_thread_fence(memory_order_seq_cst);
    ring->seen_avail = __atomic_load_n(&ring->avail->idx, __ATOMIC_ACQUIRE);
    return ring->seen_avail != ring->last_avail;
}

void vring_disable_kick(struct vring *ring)
{
    /* With EVENT_IDX leaving avail_event behind is enough: it is passed once per 65536 entries. */
    if (!ring->event_idx)
        GUEST_STORE(&ring->used->flags, USED_NO_NOTIFY);
}
