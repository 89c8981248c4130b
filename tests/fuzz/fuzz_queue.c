/*
 * A whole queue under a driver made of fuzz input: ring memory of any content, requests of any shape, tables that come
 * and go, and either a caller that answers later (as Python does) or a memory target that answers at once.
 *
 * Input: the disk and the ring (HEAD below), the regions, then a program of operations until the input ends. Each
 * region, each ring area and the disk is a heap block of exactly its size, freed as soon as the queue has let go of it:
 * the address sanitizer sees every byte too far and every byte too late. seeds.py writes programs.
 *
 * What must hold besides: the MUSTs below.
 */
#include "core.h"
#include "input.h"

#include <sys/eventfd.h>
#include <unistd.h>

enum { REGIONS_MAX = 6, TABLES_MAX = 64, AREAS = 3, OPERATIONS_MAX = 400, DISK_BLOCKS = 64, ITEMS = 16 };
enum { RING_IOVA = 0x10000, RING_STEP = 0x10000, DATA_IOVA = 0x100000 };

struct block {
    uint64_t iova;
    uint32_t length;
    uint32_t access;
    uint8_t *memory;
    bool mapped; /* in the newest table */
};

struct world {
    struct input in;
    struct vb_queue_config config;
    struct vblk_rules rules;
    struct vb_target target;
    struct vb_queue *queue;
    struct block blocks[AREAS + REGIONS_MAX]; /* desc, avail, used, then data; sorted by iova */
    uint32_t count;
    struct iova_table *tables[TABLES_MAX];
    uint32_t table_count;
    uint32_t inflight_count;
    uint16_t inflight[VRING_NUM_MAX];
    uint16_t avail_idx;
    bool bound;
    uint16_t first_used;
    uint16_t last_used_idx;
    bool by_target;
    uint8_t sum; /* so that reading is not optimized away */
};

/* ---- memory ---- */

static struct iova_table *make_table(struct world *w, bool drain)
{
    struct iova_table *table = calloc(1, sizeof(*table) + w->count * sizeof(struct iova_region));
    table->generation = w->table_count + 1;
    table->drain = drain;
    for (uint32_t i = 0; i < w->count; i++) {
        const struct block *b = &w->blocks[i];
        if (!b->mapped)
            continue;
        struct iova_region *r = &table->regions[table->count++];
        r->start = b->iova;
        r->last = b->iova + b->length - 1;
        r->host = (uintptr_t)b->memory;
        r->access = b->access;
    }
    w->tables[w->table_count++] = table;
    return table;
}

/* Once the queue has adopted the newest table, what that lacks is gone. */
static void free_what_is_gone(struct world *w)
{
    struct vb_view view;
    vb_queue_view(w->queue, &view);
    if (view.table_generation != w->tables[w->table_count - 1]->generation)
        return;
    for (uint32_t i = 0; i < w->count; i++) {
        if (!w->blocks[i].mapped) {
            free(w->blocks[i].memory);
            w->blocks[i].memory = NULL;
        }
    }
}

static void add_block(struct world *w, uint64_t iova, uint32_t length, uint32_t access)
{
    struct block *b = &w->blocks[w->count++];
    b->iova = iova;
    b->length = length;
    b->access = access;
    b->memory = malloc(length);
    b->mapped = true;
    memset(b->memory, 0, length);
}

static void put(struct world *w, uint64_t iova, const void *bytes, uint32_t length)
{
    for (uint32_t i = 0; i < w->count; i++) {
        const struct block *b = &w->blocks[i];
        if (b->memory == NULL || iova < b->iova || iova - b->iova >= b->length)
            continue;
        uint64_t room = b->length - (iova - b->iova);
        memcpy(b->memory + (iova - b->iova), bytes, length < room ? length : room);
    }
}

static void put16(struct world *w, uint64_t iova, uint16_t value)
{
    put(w, iova, &value, sizeof(value));
}

/* An address: in or around a data region, or anything at all. */
static uint64_t address(struct world *w)
{
    uint8_t how = in8(&w->in);
    if (how == 255)
        return in64(&w->in);
    const struct block *b = &w->blocks[how % w->count];
    return b->iova + in16(&w->in);
}

/* ---- the driver ---- */

static uint64_t desc_iova(uint32_t slot)
{
    return RING_IOVA + 16 * (uint64_t)slot;
}

static void put_desc(struct world *w, uint64_t at, uint64_t iova, uint32_t length, uint16_t flags, uint16_t next)
{
    struct vring_desc desc = {iova, length, flags, next};
    put(w, at, &desc, sizeof(desc));
}

static void show(struct world *w, uint16_t head)
{
    uint64_t avail = w->config.avail_iova;
    put16(w, avail + 4 + 2 * (uint64_t)(w->avail_idx & (w->config.num - 1)), head);
    w->avail_idx++;
    put16(w, avail + 2, w->avail_idx);
}

/* A request that is right unless the input makes it wrong: header, data in up to four buffers, status. */
static void request(struct world *w)
{
    struct {
        uint32_t type;
        uint32_t ioprio;
        uint64_t sector;
    } header = {in8(&w->in), 0, in8(&w->in)};
    uint8_t shape = in8(&w->in); /* 0x03 buffers, 0x04 indirect, 0x08 table elsewhere, 0x70 size, 0x80 data is written */
    uint16_t slot = in8(&w->in) & (uint16_t)(w->config.num - 1);
    uint16_t mask = (uint16_t)(w->config.num - 1);
    uint64_t at = address(w);
    uint32_t buffers = shape & 3;
    uint32_t length = ((uint32_t)(shape >> 4) & 7) * 512;
    uint16_t direction = (shape & 0x80) ? 2 : 0;
    bool indirect = (shape & 4) != 0;
    uint64_t table = (shape & 8) ? address(w) : at + 4096;
    uint64_t entry = indirect ? table : desc_iova(slot);
    uint32_t total = buffers + 2;

    if (header.type == 255)
        header.type = in32(&w->in);
    if (header.sector == 255)
        header.sector = in64(&w->in);
    put(w, at, &header, sizeof(header));
    for (uint32_t i = 0; i < total; i++) {
        uint64_t iova = at;
        uint32_t size = sizeof(header);
        uint16_t flags = i + 1 < total ? 1 : 0;
        if (i > 0 && i + 1 < total) {
            iova = in8(&w->in) % 4 ? at + 512 * (uint64_t)i : address(w);
            size = header.type == 11 || header.type == 13 ? 16 * (length / 512) : length;
            flags |= direction;
            if ((header.type == 11 || header.type == 13) && size >= 16) {
                uint64_t range[2] = {in8(&w->in), in8(&w->in) % 32u | (uint64_t)(in8(&w->in) % 4) << 32};
                put(w, iova, range, sizeof(range));
            }
        } else if (i + 1 == total) {
            iova = in8(&w->in) % 4 ? at + 20 : address(w);
            size = 1;
            flags |= 2;
        }
        uint16_t next = (uint16_t)(indirect ? i + 1 : ((slot + i + 1) & mask));
        put_desc(w, entry, iova, size, flags, next);
        entry = indirect ? entry + 16 : desc_iova(next);
    }
    if (indirect)
        put_desc(w, desc_iova(slot), table, 16 * total, 4, 0);
    show(w, slot);
}

/* ---- the device ---- */

static bool inside(const struct world *w, const struct vb_iov *piece, uint32_t access)
{
    for (uint32_t i = 0; i < w->count; i++) {
        const struct block *b = &w->blocks[i];
        const uint8_t *base = piece->base;
        /* Heap blocks are never neighbours under the sanitizer, so a piece is inside one region. */
        if (b->memory && (b->access & access) && base >= b->memory && base + piece->length <= b->memory + b->length)
            return true;
    }
    return false;
}

static void check_item(struct world *w, const struct vb_item *item)
{
    uint64_t block = w->rules.block_size;
    MUST(item->head < w->config.num);
    for (uint32_t i = 0; i < w->inflight_count; i++)
        MUST(w->inflight[i] != item->head);
    if (item->op == VBLK_READ || item->op == VBLK_WRITE) {
        uint64_t sum = 0;
        MUST(item->iov_count > 0 && item->iov_count <= w->config.seg_max + 2u);
        for (uint32_t i = 0; i < item->iov_count; i++) {
            MUST(inside(w, &item->iov[i], item->op == VBLK_READ ? IOVA_WRITE : IOVA_READ));
            sum += item->iov[i].length;
        }
        MUST(sum == item->length && sum > 0);
        MUST(item->offset % block == 0 && item->length % block == 0);
        MUST(item->length <= w->rules.capacity && item->offset <= w->rules.capacity - item->length);
        MUST(item->op == VBLK_READ || !w->rules.read_only);
    } else if (item->op == VBLK_DISCARD || item->op == VBLK_WRITE_ZEROES) {
        MUST(!w->rules.read_only);
        MUST(item->range_count > 0 && item->range_count <= w->rules.max_ranges);
        for (uint64_t i = 0; i < item->range_count; i++) {
            const struct vblk_range *r = &item->ranges[i];
            MUST(r->offset % block == 0 && r->length % block == 0);
            MUST(r->length == 0 || (r->length <= w->rules.capacity && r->offset <= w->rules.capacity - r->length));
        }
    } else {
        MUST(item->op == VBLK_FLUSH);
    }
}

/* Do to the memory what a backend would do. */
static uint8_t touch(const struct vb_item *item)
{
    uint8_t sum = 0;
    for (uint32_t i = 0; i < item->iov_count; i++) {
        uint8_t *base = item->iov[i].base;
        if (item->op == VBLK_READ)
            memset(base, 0xA5, item->iov[i].length);
        for (size_t k = 0; k < item->iov[i].length; k++)
            sum ^= base[k];
    }
    return sum;
}

static bool is_broken(const struct world *w)
{
    struct vb_view view;
    vb_queue_view(w->queue, &view);
    MUST((view.state == VB_BROKEN) == (view.fault != VRING_OK));
    return view.state == VB_BROKEN;
}

static uint64_t completed(const struct world *w)
{
    const struct vb_counters *c = vb_queue_counters(w->queue);
    uint64_t sum = 0;
    for (int i = 0; i < VBLK_OPS; i++)
        sum += c->ops[i];
    return sum;
}

/* Each popped head is pushed once, and pushes are published at the end of a turn. */
static void check_used(struct world *w)
{
    const struct vb_counters *c = vb_queue_counters(w->queue);
    const struct vring *ring = &w->queue->ring;
    uint64_t done = completed(w);
    MUST(c->inflight == w->inflight_count);
    MUST(c->notifies <= c->publishes && c->publishes <= done);
    if (ring->num != 0) {
        if (!w->bound)
            w->first_used = (uint16_t)(ring->used_idx - done);
        w->bound = true;
        MUST(ring->published == ring->used_idx);
        MUST(ring->used_idx == (uint16_t)(w->first_used + done));
        w->last_used_idx = ring->used_idx;
    }
    free_what_is_gone(w);
}

static void poll_items(struct world *w)
{
    uint32_t room = 1 + in8(&w->in) % ITEMS;
    /* Exactly as many as there is room for. */
    struct vb_item *items = malloc(room * sizeof(*items));
    bool was_broken = is_broken(w);
    int count = vb_queue_poll(w->queue, items, room);
    MUST(count >= 0 && (uint32_t)count <= room);
    MUST(!was_broken || count == 0);
    for (int i = 0; i < count; i++) {
        check_item(w, &items[i]);
        w->sum ^= touch(&items[i]);
        w->inflight[w->inflight_count++] = items[i].head;
    }
    free(items);
    check_used(w);
}

/* As storage in Python that takes batches: some of the disk is in memory, some results are errors or left open. */
static void serve_batch(struct world *w)
{
    uint32_t room = 1 + in8(&w->in) % ITEMS;
    uint8_t how = in8(&w->in);
    struct vb_item *items = malloc(room * sizeof(*items));
    int32_t *results = malloc(room * sizeof(*results));
    struct vb_done *done = malloc(room * sizeof(*done));
    struct vb_batch_totals totals;
    struct vb_batch_limits limits = {
        .size = (how & 1) ? w->target.size : w->rules.capacity,
        .max_transfer = (how & 2) ? w->rules.block_size : 0,
        .block_size = (how & 4) ? 0 : w->rules.block_size,
        .writes = (how & 8) == 0,
        .fua = (how & 16) == 0,
    };
    uint32_t count = (uint32_t)vb_queue_poll(w->queue, items, room);
    uint32_t admitted = vb_batch_admit(items, results, count, &limits);
    MUST(admitted <= count && (limits.block_size != 0 || admitted == 0));
    for (uint32_t i = 0; i < count; i++) {
        check_item(w, &items[i]);
        w->inflight[w->inflight_count++] = items[i].head;
        MUST(i >= admitted || items[i].op == VBLK_READ || (items[i].op == VBLK_WRITE && limits.writes));
    }
    /* A window of exactly its size, so that a byte beside it is seen. */
    uint64_t start = in8(&w->in) % DISK_BLOCKS * 512u;
    uint64_t size = in8(&w->in) % DISK_BLOCKS * 512u;
    uint8_t *window = calloc(1, size);
    vb_batch_copy(items, results, admitted, window, start, size, (how & 32) == 0);
    free(window);
    uint32_t open = 0;
    for (uint32_t i = 0; i < admitted; i++) {
        if (in8(&w->in) == 255)
            results[i] = (int32_t)in32(&w->in);
        open += results[i] == VB_BATCH_OPEN;
    }
    uint32_t answered = vb_batch_settle(items, results, admitted, done, &totals);
    MUST(answered + open == admitted && totals.reads + totals.writes + totals.errors == answered);
    for (uint32_t i = 0; i < answered; i++) {
        uint32_t at = 0;
        while (at < w->inflight_count && w->inflight[at] != done[i].head)
            at++;
        MUST(at < w->inflight_count);
        w->inflight[at] = w->inflight[--w->inflight_count];
    }
    for (uint32_t i = 0; i < open; i++) {
        uint32_t at = 0;
        while (at < w->inflight_count && w->inflight[at] != items[i].head)
            at++;
        MUST(at < w->inflight_count);
    }
    MUST(vb_queue_complete(w->queue, done, answered) == 0);
    free(done);
    free(results);
    free(items);
    check_used(w);
}

/* As the engine's synchronous loop does it. */
static void serve_by_target(struct world *w)
{
    uint32_t most = 1 + in8(&w->in) % ITEMS;
    if (!queue_ready(w->queue)) {
        check_used(w);
        return;
    }
    vring_disable_kick(&w->queue->ring);
    for (uint32_t i = 0; i < most; i++) {
        bool more;
        struct vblk_req *req = queue_fetch(w->queue, &more);
        if (req == NULL && !more)
            break;
        if (req == NULL)
            continue;
        int result = w->target.kind == VB_TARGET_NULL ? target_null(req) : target_memory(&w->target, req);
        queue_finish(w->queue, req, vblk_status_of_errno(-result));
    }
    queue_publish(w->queue);
    (void)(w->queue->ring.fault == VRING_OK && vring_enable_kick(&w->queue->ring));
    check_used(w);
}

static void complete(struct world *w)
{
    uint8_t how = in8(&w->in);
    struct vb_done done[4];
    uint32_t count = 0;
    bool known = true;
    while (count < 1u + how % 4 && w->inflight_count > 0) {
        uint32_t which = in8(&w->in) % w->inflight_count;
        done[count].head = w->inflight[which];
        done[count].status = (uint16_t)(how >> 6) % 3;
        w->inflight[which] = w->inflight[--w->inflight_count];
        count++;
    }
    if (count < 4 && (how & 0x20)) {
        done[count].head = in16(&w->in);
        done[count].status = 0;
        known = false;
        for (uint32_t i = 0; i < w->inflight_count; i++)
            if (w->inflight[i] == done[count].head)
                known = true;
        if (!known)
            count++;
        else
            known = true;
    }
    int result = vb_queue_complete(w->queue, done, count);
    MUST((result == 0) == known);
    check_used(w);
}

static void change_table(struct world *w)
{
    uint8_t how = in8(&w->in);
    if (w->table_count == TABLES_MAX)
        return;
    struct vb_view view;
    vb_queue_view(w->queue, &view);
    /* Control waits until a table is adopted before it takes something away again (IovaMap.remove). */
    bool adopted = view.table_generation == w->tables[w->table_count - 1]->generation;
    struct block *b = &w->blocks[in8(&w->in) % w->count];
    bool drain = false;
    if (how & 1) {
        if (b->mapped && adopted) {
            b->mapped = false;
            drain = true;
        } else if (!b->mapped && b->memory == NULL) {
            b->memory = calloc(1, b->length);
            b->mapped = true;
        }
    }
    if (!adopted && w->tables[w->table_count - 1]->drain)
        drain = true; /* it still lacks what the queue may be using */
    vb_queue_set_table(w->queue, make_table(w, drain));
    if (!(how & 2))
        vb_queue_answer_miss(w->queue);
}

static void set_capacity(struct world *w)
{
    uint64_t blocks = in8(&w->in) % (DISK_BLOCKS + 1);
    uint64_t capacity = blocks * w->rules.block_size;
    vblk_set_capacity(&w->rules, capacity);
}

static void bytes(struct world *w)
{
    uint64_t at = address(w);
    uint32_t length = in8(&w->in) % 64;
    uint8_t buffer[64];
    for (uint32_t i = 0; i < length; i++)
        buffer[i] = in8(&w->in);
    put(w, at, buffer, length);
}

static void step(struct world *w)
{
    struct input *in = &w->in;
    uint64_t event = w->config.avail_iova + 4 + 2 * (uint64_t)w->config.num;
    switch (in8(in) % 13) {
    case 0:
    case 1:
        request(w);
        break;
    case 2:
    case 3:
        w->by_target ? serve_by_target(w) : poll_items(w);
        break;
    case 4:
    case 5:
        if (!w->by_target)
            complete(w);
        break;
    case 6: { /* any descriptor */
        uint32_t slot = in8(in) % w->config.num;
        uint64_t iova = address(w);
        uint32_t length = in8(in) == 255 ? in32(in) : in16(in);
        uint16_t flags = in8(in);
        put_desc(w, desc_iova(slot), iova, length, flags & 15, in8(in));
        break;
    }
    case 7: /* any head */
        show(w, in8(in) == 255 ? in16(in) : in8(in) & (uint16_t)(w->config.num - 1));
        break;
    case 8:
        bytes(w);
        break;
    case 9:
        change_table(w);
        break;
    case 10:
        set_capacity(w);
        break;
    case 11:
        if (w->config.event_idx)
            put16(w, event, (uint16_t)(w->last_used_idx + in8(in) - 2));
        else
            put16(w, w->config.avail_iova, in8(in) & 1);
        break;
    case 12:
        if (!w->by_target)
            serve_batch(w);
        break;
    }
}

/* ---- life ---- */

static bool build(struct world *w)
{
    struct input *in = &w->in;
    uint8_t flags = in8(in);
    uint8_t flags2 = in8(in);
    struct vb_queue_config *c = &w->config;
    uint32_t num = 2u << (in8(in) % 6);
    c->num = num;
    c->event_idx = flags & 1;
    c->indirect = (flags & 2) != 0;
    c->seg_max = (uint16_t)(1 + in8(in) % 258);
    c->last_avail = (flags & 4) ? VB_RESUME : in16(in);
    w->avail_idx = (uint16_t)((flags & 4) ? in16(in) : c->last_avail);
    c->desc_iova = RING_IOVA;
    c->avail_iova = RING_IOVA + RING_STEP;
    c->used_iova = RING_IOVA + 2 * RING_STEP;
    c->kick_fd = -1;
    c->notify_fd = -1; /* an eventfd write to it fails with EBADF, which the queue must not mind */
    c->event_fd = -1;

    struct vblk_rules *r = &w->rules;
    r->block_size = 512u << ((flags >> 3) & 3);
    r->capacity = (uint64_t)(1 + in8(in) % DISK_BLOCKS) * r->block_size;
    r->read_only = (flags2 & 7) == 7;
    r->discard = !(flags2 & 8);
    r->write_zeroes = !(flags2 & 16);
    r->max_discard_sectors = r->max_write_zeroes_sectors = 64;
    r->max_ranges = 1 + in8(in) % VBLK_RANGES_MAX;
    memcpy(r->serial, "serial-of-20-letters", VBLK_SERIAL_SIZE);

    w->by_target = (flags & 0x20) != 0;
    w->target.kind = (flags & 0x40) ? VB_TARGET_NULL : VB_TARGET_MEMORY;
    /* The disk may be smaller than its capacity says: a resize that went wrong. */
    w->target.size = (flags & 0x80) ? r->capacity / 2 : (uint64_t)DISK_BLOCKS * r->block_size;
    w->target.address = (uintptr_t)calloc(1, w->target.size);

    add_block(w, c->desc_iova, 16 * num, IOVA_READ);
    add_block(w, c->avail_iova, 6 + 2 * num, IOVA_READ);
    add_block(w, c->used_iova, 6 + 8 * num, IOVA_READ | IOVA_WRITE);
    uint64_t iova = (flags2 & 0x20) ? UINT64_MAX - 0xffff : DATA_IOVA;
    uint32_t regions = 1 + in8(in) % REGIONS_MAX;
    for (uint32_t i = 0; i < regions; i++) {
        uint32_t length = 1 + in16(in) % 8192u;
        uint8_t more = in8(in);
        if (length - 1 > UINT64_MAX - iova)
            break;
        add_block(w, iova, length, (more & 3) == 1 ? IOVA_READ : (more & 3) == 2 ? IOVA_WRITE : IOVA_READ | IOVA_WRITE);
        if (length > UINT64_MAX - iova - 4096)
            break;
        iova += length + (uint32_t)((more & 12) == 12 ? 4096 : (more & 12) == 8 ? 1 : 0);
    }
    if (flags2 & 0x40) { /* not there yet: control will find it */
        struct block *last = &w->blocks[w->count - 1];
        last->mapped = false;
        free(last->memory);
        last->memory = NULL;
    }
    put16(w, c->avail_iova + 2, w->avail_idx);
    put16(w, c->used_iova + 2, w->avail_idx);
    int error;
    w->queue = vb_queue_new(c, r, make_table(w, false), &error);
    MUST(w->queue != NULL || c->seg_max > VRING_CHAIN_MAX - 2);
    return w->queue != NULL;
}

static void end(struct world *w)
{
    /* What is in flight is answered before a queue is freed. */
    while (w->queue && w->inflight_count > 0) {
        struct vb_done done = {w->inflight[--w->inflight_count], VBLK_S_IOERR};
        MUST(vb_queue_complete(w->queue, &done, 1) == 0);
    }
    if (w->queue)
        check_used(w);
    vb_queue_free(w->queue);
    for (uint32_t i = 0; i < w->count; i++)
        free(w->blocks[i].memory);
    for (uint32_t i = 0; i < w->table_count; i++)
        free(w->tables[i]);
    free((void *)(uintptr_t)w->target.address); /* NOLINT: it was cast when it was stored */
    free(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct world *w = calloc(1, sizeof(*w));
    w->in.at = data;
    w->in.left = size;
    if (build(w))
        for (int i = 0; i < OPERATIONS_MAX && w->in.left > 0; i++)
            step(w);
    end(w);
    return 0;
}
