/*
 * One virtqueue of a disk, without a thread: adopt tables, fetch requests, finish them, publish, notify. Used by the
 * engine thread (engine.c) and, for backends in Python, by the event loop (vb_queue_poll, vb_queue_complete).
 *
 * Everything here runs on the queue's own thread, except the functions marked "control" in api.h, which only touch
 * atomics and eventfds.
 *
 * Misses. VDUSE shows its bounce area only once the first request uses it. A request that names unmapped memory is put
 * back, the range is left for control (missing, miss_*), and the queue pops nothing until control has answered: with a new
 * table first, if it found something. A table alone is no answer, it may be another queue's. If the same range is still
 * missing after the answer, it is the driver's fault and the request fails. So a lookup never does a system call, and a
 * request is delayed, never lost.
 */
#include "core.h"

#include <errno.h>
#include <linux/vduse.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MISS_NONE = 0, MISS_ASKED, MISS_ANSWERED }; /* vb_queue.missing: the queue asks and takes, control answers */

static void signal_eventfd(int fd)
{
    uint64_t one = 1;
    /* EAGAIN: the counter is full, so whoever sleeps on it is awake. */
    while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

void queue_post_event(struct vb_queue *queue)
{
    if (queue->config.event_fd >= 0)
        signal_eventfd(queue->config.event_fd);
}

void queue_break(struct vb_queue *queue, enum vring_fault fault)
{
    if (atomic_load_explicit(&queue->state, memory_order_relaxed) == VB_BROKEN)
        return;
    queue->ring.fault = (uint8_t)fault;
    atomic_store(&queue->fault, (uint32_t)fault);
    atomic_store(&queue->state, VB_BROKEN);
    queue_post_event(queue);
}

static void *arena(size_t bytes)
{
    /* Zeroed, and pages that are never used cost nothing. */
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static bool config_is_sane(const struct vb_queue_config *config, const struct vblk_rules *rules)
{
    return config->num >= 2 && config->num <= VRING_NUM_MAX && (config->num & (config->num - 1)) == 0 &&
           (uintptr_t)config->inflight % 8 == 0 && config->seg_max >= 1 && config->seg_max <= VRING_CHAIN_MAX - 2 && config->last_avail <= VB_RESUME &&
           rules->max_ranges >= 1 && rules->max_ranges <= VBLK_RANGES_MAX && rules->block_size >= VBLK_SECTOR &&
           rules->block_size % VBLK_SECTOR == 0;
}

/* One of the ring's three areas; NULL if it is not mapped in one piece or misaligned. */
static void *ring_area(const struct iova_table *table, uint64_t iova, uint64_t length, uint32_t access, uint64_t align)
{
    struct vb_iov piece;
    if (iova % align != 0 || iova_translate(table, iova, length, access, &piece, 1) != 1)
        return NULL;
    return (uintptr_t)piece.base % align == 0 ? piece.base : NULL;
}

static bool bind_ring(struct vb_queue *queue)
{
    const struct vb_queue_config *config = &queue->config;
    uint64_t num = config->num;
    /* Alignments: virtio 1.3, 2.7. Each area with the event index behind it. */
    void *desc = ring_area(queue->table, config->desc_iova, 16 * num, IOVA_READ, 16);
    void *avail = ring_area(queue->table, config->avail_iova, 6 + 2 * num, IOVA_READ, 2);
    void *used = ring_area(queue->table, config->used_iova, 6 + 8 * num, IOVA_READ | IOVA_WRITE, 4);
    if (!desc || !avail || !used)
        return false;
    if (queue->ring.num != 0) {
        vring_rebind(&queue->ring, desc, avail, used);
        return true;
    }
    const struct vring_used *ring_used = used;
    uint16_t used_idx = GUEST_LOAD(&ring_used->idx);
    uint16_t first = config->last_avail == VB_RESUME ? used_idx : (uint16_t)config->last_avail;
    if (config->inflight != NULL) {
        queue->replay_count = inflight_recover(&queue->log, config->inflight, (uint16_t)num, used_idx, queue->replay);
        if (!queue->log.fresh)
            first = (uint16_t)(used_idx + queue->replay_count);
        atomic_store(&queue->replayed, queue->replay_count);
    }
    vring_init(&queue->ring, (uint16_t)num, desc, avail, used, config->event_idx, config->indirect, first);
    return true;
}

struct vb_queue *vb_queue_new(const struct vb_queue_config *config, struct vblk_rules *rules,
                              const struct iova_table *table, int *error)
{
    *error = EINVAL;
    if (!config_is_sane(config, rules) || iova_table_check(table) != 0)
        return NULL;
    *error = ENOMEM;
    struct vb_queue *queue = calloc(1, sizeof(*queue));
    if (queue == NULL)
        return NULL;
    queue->config = *config;
    queue->rules = rules;
    queue->table = table;
    /* A driver may cut one of seg_max segments where two regions meet; two spare pieces are enough for that. */
    queue->iov_room = (uint32_t)config->seg_max + 2;
    atomic_init(&queue->table_next, table);
    atomic_init(&queue->table_generation, table->generation);
    atomic_init(&queue->state, VB_IDLE);
    queue->faults_seen = mapping_faults();
    queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->replay = arena(config->num * sizeof(*queue->replay));
    queue->reqs = arena(config->num * sizeof(*queue->reqs));
    queue->iov_arena = arena((size_t)config->num * queue->iov_room * sizeof(struct vb_iov));
    queue->range_arena = arena((size_t)config->num * VBLK_RANGES_MAX * sizeof(struct vblk_range));
    queue->dirty.bits = config->dirty;
    queue->dirty.bytes = config->dirty_bytes;
    if (config->dirty != NULL)
        queue->written_arena = arena((size_t)config->num * VRING_CHAIN_MAX * sizeof(struct vring_seg));
    if (queue->wake_fd < 0 || (config->dirty && !queue->written_arena) || !queue->replay || !queue->reqs ||
        !queue->iov_arena || !queue->range_arena) {
        vb_queue_free(queue);
        return NULL;
    }
    /* Right away if its memory is there, so that a queue that never runs knows where it stands. */
    queue->bound = bind_ring(queue);
    if (!queue->bound)
        queue->ring.last_avail = (uint16_t)config->last_avail;
    atomic_init(&queue->last_avail, queue->ring.last_avail);
    *error = 0;
    return queue;
}

void vb_queue_free(struct vb_queue *queue)
{
    if (queue == NULL)
        return;
    size_t num = queue->config.num;
    if (queue->written_arena)
        munmap(queue->written_arena, num * VRING_CHAIN_MAX * sizeof(struct vring_seg));
    if (queue->replay)
        munmap(queue->replay, num * sizeof(*queue->replay));
    if (queue->reqs)
        munmap(queue->reqs, num * sizeof(*queue->reqs));
    if (queue->iov_arena)
        munmap(queue->iov_arena, num * queue->iov_room * sizeof(struct vb_iov));
    if (queue->range_arena)
        munmap(queue->range_arena, num * VBLK_RANGES_MAX * sizeof(struct vblk_range));
    if (queue->wake_fd >= 0)
        close(queue->wake_fd);
    free(queue);
}

const struct vb_counters *vb_queue_counters(const struct vb_queue *queue)
{
    return &queue->counters;
}

void vb_queue_view(const struct vb_queue *queue, struct vb_view *view)
{
    view->state = atomic_load(&queue->state);
    view->fault = atomic_load(&queue->fault);
    view->table_generation = atomic_load(&queue->table_generation);
    view->missing = atomic_load(&queue->missing) == MISS_ASKED;
    view->miss_start = atomic_load(&queue->miss_start);
    view->miss_last = atomic_load(&queue->miss_last);
    view->error = atomic_load(&queue->error);
    view->last_avail = atomic_load(&queue->last_avail);
    view->replayed = atomic_load(&queue->replayed);
    view->pinned = atomic_load(&queue->pinned);
    view->pin_error = atomic_load(&queue->pin_error);
    view->waiting = atomic_load(&queue->retry.waiting);
    view->wait_error = atomic_load(&queue->retry.error);
    view->wait_since = atomic_load(&queue->retry.since_ns);
}

void vb_queue_set_table(struct vb_queue *queue, const struct iova_table *table)
{
    atomic_store(&queue->table_next, table);
    vb_queue_wake(queue);
}

void vb_queue_answer_miss(struct vb_queue *queue)
{
    uint32_t asked = MISS_ASKED;
    atomic_compare_exchange_strong(&queue->missing, &asked, MISS_ANSWERED);
    vb_queue_wake(queue);
}

void vb_queue_hold(struct vb_queue *queue, int on)
{
    if (atomic_exchange(&queue->held, on != 0) == (on != 0))
        return;
    atomic_store(&queue->quiet, false);
    vb_queue_wake(queue);
}

int vb_queue_is_quiet(const struct vb_queue *queue)
{
    return atomic_load(&queue->quiet);
}

void vb_queue_wake(struct vb_queue *queue)
{
    signal_eventfd(queue->wake_fd);
}

bool queue_ready(struct vb_queue *queue)
{
    bool held = atomic_load(&queue->held) && !vb_queue_replaying(queue);
    atomic_store(&queue->quiet, held && queue->inflight == 0);
    /* A broken queue adopts tables too: it must let go of memory that control wants to unmap. */
    const struct iova_table *next = atomic_load_explicit(&queue->table_next, memory_order_acquire);
    if (next != queue->table) {
        if (next->drain && queue->inflight != 0)
            return false; /* what flies still points into memory that is about to go */
        if (next->drain) {
            (void)queue_publish(queue); /* to the ring as it is: what was done a moment ago may not be told yet */
            queue->bound = false;
        }
        queue->table = next;
        if (queue->adopted != NULL)
            queue->adopted(queue);
        atomic_store(&queue->table_generation, next->generation);
        queue_post_event(queue);
    }
    if (held || atomic_load_explicit(&queue->state, memory_order_relaxed) == VB_BROKEN)
        return false;
    if (mapping_faults() != queue->faults_seen) {
        queue_break(queue, VRING_FAULT_MEMORY);
        return false;
    }
    if (!queue->bound) {
        queue->bound = bind_ring(queue);
        if (!queue->bound && queue->ring.num == 0)
            queue_break(queue, VRING_FAULT_RING_MAP);
    }
    return queue->bound;
}

/* Ask control for a range. False: it was asked for already and is still not there. */
static bool ask(struct vb_queue *queue, const struct vring_seg *range)
{
    if (queue->missed_valid && queue->missed.iova == range->iova && queue->missed.length == range->length)
        return false;
    queue->missed = *range;
    queue->missed_valid = true;
    COUNT(queue->counters.misses, 1);
    uint64_t length = range->length ? range->length : 1;
    uint64_t room = UINT64_MAX - range->iova;
    atomic_store(&queue->miss_start, range->iova);
    atomic_store(&queue->miss_last, range->iova + (length - 1 > room ? room : length - 1));
    atomic_store(&queue->missing, MISS_ASKED);
    queue_post_event(queue);
    return true;
}

int vb_queue_replaying(const struct vb_queue *queue)
{
    return queue->replay_next != queue->replay_count && queue->ring.fault == VRING_OK && queue->bound &&
           atomic_load_explicit(&queue->missing, memory_order_relaxed) == MISS_NONE;
}

/* The next chain: first what the log says was popped before and not answered, then what the driver has made available. */
static enum vring_pop_result next_chain(struct vb_queue *queue, struct vring_seg *unmapped)
{
    struct vring *ring = &queue->ring;
    if (queue->replay_next == queue->replay_count)
        return vring_pop(ring, queue->table, &queue->chain, unmapped);
    if (ring->fault != VRING_OK)
        return VRING_BROKEN;
    return vring_chain_of(ring, queue->table, queue->replay[queue->replay_next], &queue->chain, unmapped);
}

/* The chain belongs to a request now, or (`taken` false) its memory is not mapped yet and it must come again. */
static void chain_taken(struct vb_queue *queue, bool taken)
{
    if (queue->replay_next != queue->replay_count)
        queue->replay_next += taken; /* it is marked, with the counter that says when it was popped */
    else if (!taken)
        vring_unpop(&queue->ring);
    else if (queue->log.region != NULL)
        inflight_mark(&queue->log, queue->chain.head);
}

/* Keep what the request may write to: by the time it is answered its pieces have been advanced. */
static void note_written(struct vb_queue *queue, struct vblk_req *req)
{
    const struct vring_chain *chain = &queue->chain;
    req->written = queue->written_arena + (size_t)chain->head * VRING_CHAIN_MAX;
    req->written_count = (uint16_t)(chain->count - chain->readable);
    memcpy(req->written, chain->segs + chain->readable, req->written_count * sizeof(*req->written));
}

struct vblk_req *queue_fetch(struct vb_queue *queue, bool *more)
{
    struct vring_seg unmapped;
    *more = false;
    uint32_t missing = atomic_load_explicit(&queue->missing, memory_order_acquire);
    if (missing != MISS_NONE) {
        /* Answered with a table that is not adopted yet: control wakes us after the answer, so there will be another turn. */
        if (missing == MISS_ASKED || atomic_load(&queue->table_next) != queue->table)
            return NULL;
        atomic_store(&queue->missing, MISS_NONE);
    }
    enum vring_pop_result popped = next_chain(queue, &unmapped);
    if (popped == VRING_EMPTY)
        return NULL;
    if (popped == VRING_UNMAPPED && ask(queue, &unmapped))
        return NULL;
    if (popped == VRING_UNMAPPED)
        queue->ring.fault = VRING_FAULT_INDIRECT_MAP;
    if (popped != VRING_CHAIN) {
        queue_break(queue, queue->ring.fault);
        return NULL;
    }
    struct vblk_req *req = &queue->reqs[queue->chain.head];
    if (req->busy) {
        queue_break(queue, VRING_FAULT_HEAD);
        return NULL;
    }
    req->iov = queue->iov_arena + (size_t)queue->chain.head * queue->iov_room;
    req->iov_room = queue->iov_room;
    req->ranges = queue->range_arena + (size_t)queue->chain.head * VBLK_RANGES_MAX;
    enum vblk_verdict verdict = vblk_parse(queue->rules, &queue->chain, queue->table, req, &unmapped);
    if (verdict == VBLK_UNMAPPED) {
        if (ask(queue, &unmapped)) {
            chain_taken(queue, false);
            return NULL;
        }
        req->op = VBLK_OTHER;
        req->status = VBLK_S_IOERR;
        verdict = VBLK_ANSWERED;
    }
    chain_taken(queue, true);
    if (queue->written_arena != NULL)
        note_written(queue, req);
    queue->missed_valid = false;
    req->busy = true;
    queue->inflight++;
    GUEST_STORE(&queue->counters.inflight, (uint64_t)queue->inflight);
    if (verdict == VBLK_SUBMIT)
        return req;
    *more = true;
    queue_finish(queue, req, (enum vblk_status)req->status);
    return NULL;
}

void queue_finish(struct vb_queue *queue, struct vblk_req *req, enum vblk_status status)
{
    struct vb_counters *counters = &queue->counters;
    if (mapping_faults() != queue->faults_seen) {
        status = VBLK_S_IOERR; /* some of the data may have gone to, or come from, a stand-in page */
        queue_break(queue, VRING_FAULT_MEMORY);
    }
    if (vblk_malformed(req))
        COUNT(counters->malformed, 1);
    COUNT(counters->ops[req->op], 1);
    if (status == VBLK_S_OK)
        COUNT(counters->bytes[req->op], req->length);
    else if (status == VBLK_S_IOERR)
        COUNT(counters->errors[req->op], 1);
    else
        COUNT(counters->unsupported, 1);
    uint32_t length = vblk_finish(req, status);
    if (queue->dirty.bits != NULL)
        for (uint16_t i = 0; i < req->written_count; i++)
            dirty_mark(&queue->dirty, req->written[i].iova, req->written[i].length);
    req->busy = false;
    queue->inflight--;
    GUEST_STORE(&counters->inflight, (uint64_t)queue->inflight);
    if (queue->log.region != NULL)
        inflight_push(&queue->log, req->head);
    vring_push(&queue->ring, req->head, length);
}

static void notify(struct vb_queue *queue)
{
    const struct vb_queue_config *config = &queue->config;
    COUNT(queue->counters.notifies, 1);
    if (config->notify_kind == VB_NOTIFY_EVENTFD) {
        /* A full one has woken its reader already, and if it is blocking a write would wait for that reader. */
        struct pollfd room = {.fd = config->notify_fd, .events = POLLOUT};
        if (poll(&room, 1, 0) == 1)
            signal_eventfd(config->notify_fd);
        return;
    }
    uint32_t index = config->index;
    if (ioctl(config->notify_fd, VDUSE_VQ_INJECT_IRQ, &index) < 0 && atomic_load(&queue->error) != errno) {
        /* EPERM: the kernel declared the device broken. EINVAL: no DRIVER_OK. Control decides what that means. */
        atomic_store(&queue->error, errno);
        queue_post_event(queue);
    }
}

bool queue_publish(struct vb_queue *queue)
{
    atomic_store_explicit(&queue->last_avail, queue->ring.last_avail, memory_order_relaxed);
    uint16_t count = vring_publish(&queue->ring);
    if (count == 0)
        return false;
    if (queue->dirty.bits != NULL && queue->config.log_used)
        dirty_mark(&queue->dirty, queue->config.dirty_used, 6 + 8 * (uint64_t)queue->config.num);
    if (queue->log.region != NULL)
        inflight_commit(&queue->log, count, queue->ring.published);
    COUNT(queue->counters.publishes, 1);
    bool wanted = vring_must_notify(&queue->ring);
    if (wanted)
        notify(queue);
    return wanted;
}

int vb_queue_poll(struct vb_queue *queue, struct vb_item *items, uint32_t room)
{
    uint32_t count = 0;
    COUNT(queue->counters.wakeups, 1);
    if (atomic_load_explicit(&queue->state, memory_order_relaxed) == VB_IDLE)
        atomic_store(&queue->state, VB_RUNNING);
    if (!queue_ready(queue))
        return 0;
    vring_disable_kick(&queue->ring);
    while (count < room) {
        bool more;
        struct vblk_req *req = queue_fetch(queue, &more);
        if (req != NULL) {
            struct vb_item *item = &items[count++];
            item->head = req->head;
            item->op = req->op;
            item->fua = req->fua;
            item->iov_count = req->iov_count;
            item->offset = req->offset;
            item->length = req->length;
            item->iov = req->iov;
            item->ranges = req->ranges;
            item->range_count = req->range_count;
            continue;
        }
        if (more)
            continue;
        if (count > 0 || atomic_load_explicit(&queue->state, memory_order_relaxed) == VB_BROKEN ||
            atomic_load_explicit(&queue->missing, memory_order_relaxed))
            break;
        if (!vring_enable_kick(&queue->ring))
            break;
        vring_disable_kick(&queue->ring);
    }
    queue_publish(queue);
    return (int)count;
}

int vb_queue_complete(struct vb_queue *queue, const struct vb_done *done, uint32_t count)
{
    int result = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (done[i].head >= queue->config.num || !queue->reqs[done[i].head].busy) {
            result = -EINVAL;
            continue;
        }
        queue_finish(queue, &queue->reqs[done[i].head], (enum vblk_status)done[i].status);
    }
    queue_publish(queue);
    return result;
}
