/*
 * The engine under load, for the sanitizers: a driver on a thread, a queue served by the engine's own, storage of every kind;
 * one queue, then four at once. Every request is held against a shadow copy of the queue's part of the disk.
 *
 *     engine_stress [REQUESTS] [SEED]
 *
 * A queue's part is cut into as many stripes as there may be requests in flight; each request stays in a stripe of its own, so
 * the shadow always says what a read must give. Control is played by a third thread, which looks at the view and counters,
 * publishes new tables and resizes the disk all the while. Under -fsanitize=thread the driver's accesses to the ring are atomic, as a
 * driver's are; the device may not touch a buffer before it is offered or after it is given back, and that is what
 * remains to be said.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { NUM = 64, DEPTH = 16, STRIPE = 256 * 1024, PART = DEPTH * STRIPE, BUFFER = 128 * 1024, SLOT = BUFFER + 8192 };
enum { QUEUES = 4, DISK = QUEUES * PART };
enum { BASE = 0x40000000, RING_BYTES = 8192, PIECES = 4 };
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };

#define MUST(condition)                                                                \
    do {                                                                               \
        if (!(condition)) {                                                            \
            fprintf(stderr, "%s:%d: violated: %s\n", __FILE__, __LINE__, #condition);  \
            abort();                                                                   \
        }                                                                              \
    } while (0)

struct request {
    bool busy;
    uint32_t type;
    uint64_t offset;
    uint32_t length;
    uint16_t head;
};

/* One slot of guest memory per request: header, ranges, status, an indirect table, then the data. */
struct slot {
    uint32_t type, ioprio;
    uint64_t sector;
    struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } ranges[2];
    uint8_t status;
    struct vring_desc table[PIECES + 4] __attribute__((aligned(16)));
};

struct driver {
    uint8_t *memory;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    bool event_idx;
    bool indirect;
    uint16_t avail_idx, kicked_at, used_seen;
    uint16_t free[NUM];
    uint32_t free_count;
    struct request requests[DEPTH];
    int8_t owner[NUM]; /* head -> request */
    uint8_t *shadow;
    bool unknown[PART / 512]; /* discarded: reads as anything */
    int kick_fd, call_fd, event_fd;
    uint64_t first; /* byte of the disk where this queue's part begins */
    uint64_t random;
    uint64_t done, interrupts;
    bool forgets; /* null: reads give zeros, whatever was written */
};

static uint64_t below(struct driver *d, uint64_t limit)
{
    d->random ^= d->random << 13;
    d->random ^= d->random >> 7;
    d->random ^= d->random << 17;
    return d->random % limit;
}

static uint64_t iova_of(const struct driver *d, const void *host)
{
    return BASE + (uint64_t)((const uint8_t *)host - d->memory);
}

static struct slot *slot_of(const struct driver *d, int which)
{
    return (struct slot *)(void *)(d->memory + RING_BYTES + which * SLOT);
}

static uint8_t *data_of(const struct driver *d, int which)
{
    return (uint8_t *)slot_of(d, which) + 4096;
}

/* ---- building a request ---- */

static void add(struct vring_desc *list, uint32_t *count, const struct driver *d, const void *host, uint32_t length, uint16_t flags)
{
    list[*count] = (struct vring_desc){iova_of(d, host), length, flags, 0};
    (*count)++;
}

static void offer(struct driver *d, struct vring_desc *list, uint32_t count, int which)
{
    struct request *r = &d->requests[which];
    bool indirect = d->indirect && (below(d, 4) != 0 || d->free_count < count);
    if (indirect) {
        struct slot *slot = slot_of(d, which);
        for (uint32_t i = 0; i < count; i++) {
            list[i].flags |= i + 1 < count ? 1 : 0;
            list[i].next = (uint16_t)(i + 1);
            slot->table[i] = list[i];
        }
        r->head = d->free[--d->free_count];
        d->desc[r->head] = (struct vring_desc){iova_of(d, slot->table), count * 16, 4, 0};
    } else {
        uint16_t at = d->free[--d->free_count];
        r->head = at;
        for (uint32_t i = 0; i < count; i++) {
            uint16_t next = i + 1 < count ? d->free[--d->free_count] : 0;
            list[i].flags |= i + 1 < count ? 1 : 0;
            list[i].next = next;
            d->desc[at] = list[i];
            at = next;
        }
    }
    d->owner[r->head] = (int8_t)which;
    __atomic_store_n(&d->avail->ring[d->avail_idx % NUM], r->head, __ATOMIC_RELAXED);
    d->avail_idx++;
    __atomic_store_n(&d->avail->idx, d->avail_idx, __ATOMIC_RELEASE);
}

static void build(struct driver *d, int which)
{
    static const uint32_t types[] = {T_IN, T_IN, T_IN, T_OUT, T_OUT, T_OUT, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES};
    struct request *r = &d->requests[which];
    struct slot *slot = slot_of(d, which);
    uint8_t *data = data_of(d, which);
    struct vring_desc list[PIECES + 2];
    uint32_t count = 0;

    r->busy = true;
    r->type = types[below(d, sizeof(types) / sizeof(types[0]))];
    /* Mostly small, aligned like file systems do; sometimes large or odd. */
    uint32_t unit = below(d, 4) ? 4096 : 512;
    r->length = (uint32_t)(1 + below(d, below(d, 8) ? 4 : BUFFER / unit)) * unit;
    r->offset = (uint64_t)which * STRIPE + below(d, (STRIPE - r->length) / unit + 1) * unit;
    slot->type = r->type;
    slot->ioprio = 0;
    slot->sector = (d->first + r->offset) / 512;
    slot->status = 0x5A;
    add(list, &count, d, slot, 16, 0);
    if (r->type == T_IN || r->type == T_OUT) {
        uint16_t writable = r->type == T_IN ? 2 : 0;
        uint32_t at = 0;
        for (uint32_t i = 0; i < r->length && !writable; i += 8)
            *(uint64_t *)(void *)(data + i) = below(d, UINT64_MAX);
        if (writable)
            memset(data, 0x5A, r->length);
        for (int i = 0; i < PIECES - 1 && at < r->length; i++) {
            uint32_t part = (uint32_t)(1 + below(d, (r->length - at) / 512)) * 512;
            add(list, &count, d, data + at, part, writable);
            at += part;
        }
        if (at < r->length)
            add(list, &count, d, data + at, r->length - at, writable);
    } else if (r->type == T_GET_ID) {
        memset(data, 0x5A, 20);
        add(list, &count, d, data, 20, 2);
    } else if (r->type == T_DISCARD || r->type == T_WRITE_ZEROES) {
        /* The same range in two. */
        uint32_t sectors = r->length / 512;
        uint32_t first = (uint32_t)below(d, sectors + 1);
        uint32_t unmap = r->type == T_WRITE_ZEROES ? (uint32_t)below(d, 2) : 0;
        slot->ranges[0].sector = (d->first + r->offset) / 512;
        slot->ranges[0].sectors = first;
        slot->ranges[1].sector = (d->first + r->offset) / 512 + first;
        slot->ranges[1].sectors = sectors - first;
        slot->ranges[0].flags = slot->ranges[1].flags = unmap;
        add(list, &count, d, slot->ranges, 32, 0);
    }
    add(list, &count, d, &slot->status, 1, 2);
    offer(d, list, count, which);
}

/* ---- taking it back ---- */

static void check(struct driver *d, int which)
{
    struct request *r = &d->requests[which];
    struct slot *slot = slot_of(d, which);
    uint8_t *data = data_of(d, which);
    uint8_t *shadow = d->shadow + r->offset;
    uint64_t sector = r->offset / 512;

    /* Storage may not be able to discard. */
    MUST(slot->status == VBLK_S_OK || (slot->status == VBLK_S_UNSUPP && r->type == T_DISCARD));
    if (r->type == T_IN) {
        for (uint32_t i = 0; i < r->length; i += 512)
            MUST(d->unknown[sector + i / 512] || memcmp(data + i, shadow + i, 512) == 0);
    } else if (r->type == T_OUT) {
        if (!d->forgets)
            memcpy(shadow, data, r->length);
        memset(d->unknown + sector, 0, r->length / 512);
    } else if (r->type == T_GET_ID) {
        MUST(memcmp(data, "stress\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20) == 0);
    } else if (r->type == T_WRITE_ZEROES) {
        memset(shadow, 0, r->length);
        memset(d->unknown + sector, 0, r->length / 512);
    } else if (r->type == T_DISCARD && slot->status == VBLK_S_OK && !d->forgets) {
        memset(d->unknown + sector, 1, r->length / 512);
    }
    r->busy = false;
    d->done++;
}

static bool take_back(struct driver *d)
{
    bool any = false;
    while (d->used_seen != __atomic_load_n(&d->used->idx, __ATOMIC_ACQUIRE)) {
        uint32_t head = __atomic_load_n(&d->used->ring[d->used_seen % NUM].id, __ATOMIC_RELAXED);
        MUST(head < NUM && d->owner[head] >= 0);
        int which = d->owner[head];
        d->owner[head] = -1;
        check(d, which);
        for (uint16_t at = (uint16_t)head;;) {
            struct vring_desc desc = d->desc[at];
            d->free[d->free_count++] = at;
            if (!(desc.flags & 1))
                break;
            at = desc.next;
        }
        d->used_seen++;
        any = true;
    }
    return any;
}

static void kick(struct driver *d)
{
    uint64_t one = 1;
    uint16_t old = d->kicked_at;
    d->kicked_at = d->avail_idx;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (d->event_idx) {
        const uint16_t *event = (const uint16_t *)(const void *)&d->used->ring[NUM];
        uint16_t wanted = __atomic_load_n(event, __ATOMIC_RELAXED);
        if ((uint16_t)(d->avail_idx - wanted - 1) >= (uint16_t)(d->avail_idx - old))
            return;
    } else if (__atomic_load_n(&d->used->flags, __ATOMIC_RELAXED) & 1) {
        return;
    }
    MUST(write(d->kick_fd, &one, sizeof(one)) == sizeof(one));
}

/* Sleep until the device interrupts; a second look after asking for it, as the protocol has it. */
static void wait_used(struct driver *d)
{
    struct pollfd poll_fd = {.fd = d->call_fd, .events = POLLIN};
    if (d->event_idx)
        __atomic_store_n(&d->avail->ring[NUM], d->used_seen, __ATOMIC_RELAXED);
    else
        __atomic_store_n(&d->avail->flags, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (take_back(d))
        return;
    MUST(poll(&poll_fd, 1, 20000) == 1); /* no interrupt: somebody waits for ever */
    uint64_t count;
    if (read(d->call_fd, &count, sizeof(count)) == sizeof(count))
        d->interrupts += count;
    if (!d->event_idx)
        __atomic_store_n(&d->avail->flags, 1, __ATOMIC_RELAXED);
    (void)take_back(d);
}

static uint32_t in_flight(const struct driver *d)
{
    uint32_t count = 0;
    for (int i = 0; i < DEPTH; i++)
        count += d->requests[i].busy;
    return count;
}

static void drive(struct driver *d, uint64_t requests)
{
    uint64_t offered = 0;
    while (d->done < requests) {
        uint32_t depth = 1 + (uint32_t)below(d, DEPTH);
        for (int i = 0; i < DEPTH && in_flight(d) < depth && offered < requests && d->free_count >= PIECES + 2; i++) {
            if (d->requests[i].busy)
                continue;
            build(d, i);
            offered++;
            if (below(d, 3) == 0)
                kick(d);
        }
        kick(d);
        if (in_flight(d) > 0 && !take_back(d))
            wait_used(d);
    }
    MUST(in_flight(d) == 0 && d->free_count == NUM);
}

/* What the storage holds, past the engine. */
static void check_storage(const struct driver *d, const struct vb_target *target)
{
    uint8_t sector[512] __attribute__((aligned(512))); /* direct I/O wants it */
    for (uint64_t i = 0; i < PART / 512; i++) {
        const uint8_t *found = sector;
        if (target->kind == VB_TARGET_FILE)
            MUST(pread(target->fd, sector, 512, (off_t)(d->first + i * 512)) == 512);
        else
            found = (const uint8_t *)(uintptr_t)target->address + d->first + i * 512;
        MUST(d->unknown[i] || memcmp(found, d->shadow + i * 512, 512) == 0);
    }
}

/* ---- control ---- */

struct control {
    struct vb_queue *queue;
    struct vblk_rules *rules;
    struct iova_table *tables[2]; /* the same memory as one region or as two */
    _Atomic bool stop;
};

static void *run_control(void *argument)
{
    struct control *c = argument;
    uint32_t generation = 1;
    while (!atomic_load(&c->stop)) {
        struct vb_view view;
        struct timespec pause = {.tv_nsec = 500 * 1000};
        vb_queue_view(c->queue, &view);
        MUST(view.state == VB_RUNNING && view.fault == VRING_OK && !view.missing);
        const struct vb_counters *counters = vb_queue_counters(c->queue);
        MUST(__atomic_load_n(&counters->inflight, __ATOMIC_RELAXED) <= NUM);
        MUST(__atomic_load_n(&counters->ops[VBLK_READ], __ATOMIC_RELAXED) < UINT32_MAX);
        if (view.table_generation == generation) {
            struct iova_table *next = c->tables[++generation % 2];
            next->generation = generation;
            next->drain = generation % 4 == 0;
            vb_queue_set_table(c->queue, next);
            vblk_set_capacity(c->rules, generation % 8 < 4 ? DISK : 2 * (uint64_t)DISK);
        }
        nanosleep(&pause, NULL);
    }
    return NULL;
}

static struct iova_table *make_table(const struct driver *d, size_t bytes, uint32_t regions)
{
    struct iova_table *table = calloc(1, sizeof(*table) + regions * sizeof(struct iova_region));
    table->count = regions;
    table->generation = 1;
    uint64_t each = bytes / regions;
    for (uint32_t i = 0; i < regions; i++) {
        table->regions[i].start = BASE + i * each;
        table->regions[i].last = BASE + (i + 1 == regions ? bytes : (i + 1) * each) - 1;
        table->regions[i].host = (uintptr_t)d->memory + i * each;
        table->regions[i].access = IOVA_READ | IOVA_WRITE;
        table->regions[i].flags = IOVA_PINNED;
    }
    MUST(iova_table_check(table) == 0);
    return table;
}

/* ---- one kind of storage ---- */

struct job {
    const char *name;
    const struct vb_target *target;
    struct vblk_rules *rules; /* of the disk: all its queues share them */
    uint32_t queue;
    bool event_idx, indirect;
    uint64_t requests, seed;
};

static void *stress(void *argument)
{
    const struct job *job = argument;
    const char *name = job->name;
    const struct vb_target *target = job->target;
    bool event_idx = job->event_idx;
    bool indirect = job->indirect;
    uint64_t requests = job->requests;
    uint64_t seed = job->seed;
    struct driver *d = calloc(1, sizeof(*d));
    size_t bytes = RING_BYTES + (size_t)DEPTH * SLOT;
    struct timespec began;
    struct timespec ended;
    d->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(d->memory != MAP_FAILED);
    d->desc = (void *)d->memory;
    d->avail = (void *)(d->memory + 16 * NUM);
    d->used = (void *)(d->memory + 4096);
    d->event_idx = event_idx;
    d->indirect = indirect;
    d->random = seed;
    d->first = (uint64_t)job->queue * PART;
    for (uint16_t i = 0; i < NUM; i++) {
        d->free[d->free_count++] = i;
        d->owner[i] = -1;
    }
    /* Near the wrap-around of the indices. */
    d->avail_idx = d->used_seen = d->kicked_at = (uint16_t)(0xffff - seed % 500);
    d->avail->idx = d->avail_idx;
    d->used->idx = d->used_seen;
    d->shadow = calloc(1, PART);
    memset(d->unknown, 1, sizeof(d->unknown));
    d->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    d->call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    d->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    d->forgets = target->kind == VB_TARGET_NULL;
    if (d->forgets)
        memset(d->unknown, 0, sizeof(d->unknown));

    struct vb_queue_config config = {
        .index = job->queue, .num = NUM, .desc_iova = iova_of(d, d->desc), .avail_iova = iova_of(d, d->avail), .used_iova = iova_of(d, d->used),
        .last_avail = VB_RESUME, .event_idx = event_idx, .indirect = indirect, .seg_max = 64, .kick_fd = d->kick_fd,
        .notify_fd = d->call_fd, .event_fd = d->event_fd,
    };
    struct control control = {.rules = job->rules, .tables = {make_table(d, bytes, 3), make_table(d, bytes, 1)}};
    pthread_t thread;
    int error;
    control.queue = vb_queue_new(&config, job->rules, control.tables[1], &error);
    MUST(control.queue != NULL);
    error = vb_engine_start(control.queue, target);
    if (error != 0) {
        printf("%-26s skipped: %s\n", name, strerror(-error));
        goto out;
    }
    MUST(pthread_create(&thread, NULL, run_control, &control) == 0);
    clock_gettime(CLOCK_MONOTONIC, &began);
    drive(d, requests);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    atomic_store(&control.stop, true);
    pthread_join(thread, NULL);
    vb_engine_stop(control.queue);

    const struct vb_counters *counters = vb_queue_counters(control.queue);
    uint64_t sum = 0;
    for (int i = 0; i < VBLK_OPS; i++) {
        sum += counters->ops[i];
        MUST(counters->errors[i] == 0);
    }
    MUST(sum == requests && counters->malformed == 0 && counters->inflight == 0);
    MUST(counters->notifies <= counters->publishes && counters->publishes <= sum);
    MUST(d->interrupts <= counters->notifies);
    if (target->kind != VB_TARGET_NULL)
        check_storage(d, target);
    double seconds = (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) / 1e9;
    printf("%-26s %8.0f requests/s, %.2f publishes and %.2f interrupts per request\n", name, (double)sum / seconds,
           (double)counters->publishes / (double)sum, (double)counters->notifies / (double)sum);
out:
    vb_queue_free(control.queue);
    free(control.tables[0]);
    free(control.tables[1]);
    close(d->kick_fd);
    close(d->call_fd);
    close(d->event_fd);
    munmap(d->memory, bytes);
    free(d->shadow);
    free(d);
    return NULL;
}

/* `queues` at once, of all kinds of ring if there are four. The kinds of one queue come by `way`. */
static void stress_disk(const char *name, const struct vb_target *target, uint32_t queues, uint32_t way, uint64_t requests, uint64_t seed)
{
    struct vblk_rules rules = {
        .capacity = DISK, .block_size = 512, .discard = 1, .write_zeroes = 1, .max_discard_sectors = 4096,
        .max_write_zeroes_sectors = 4096, .max_ranges = 8, .serial = "stress",
    };
    struct job jobs[QUEUES];
    pthread_t threads[QUEUES];
    for (uint32_t i = 0; i < queues; i++) {
        jobs[i] = (struct job){name, target, &rules, i, (way + i) & 1, (way + i) & 2, requests, seed * (2 * (uint64_t)(way + i) + 1)};
        MUST(pthread_create(&threads[i], NULL, stress, &jobs[i]) == 0);
    }
    for (uint32_t i = 0; i < queues; i++)
        pthread_join(threads[i], NULL);
}

static int open_disk(const char *folder)
{
    char path[256];
    snprintf(path, sizeof(path), "%s/engine-stress-XXXXXX", folder);
    int fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0) {
        perror(path);
        exit(2);
    }
    unlink(path);
    MUST(ftruncate(fd, DISK) == 0);
    return fd;
}

/* The same file again, past the page cache: what holds pages. */
static int open_direct(int other)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", other);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_DIRECT);
    if (fd < 0) {
        perror("O_DIRECT in $TMPDIR");
        exit(2);
    }
    return fd;
}

int main(int argc, char **argv)
{
    uint64_t requests = argc > 1 ? strtoull(argv[1], NULL, 0) : 4000;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) | 1 : 88172645463325252U;
    const char *folder = getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp";
    struct vb_target file = {.kind = VB_TARGET_FILE, .fd = open_disk(folder)};
    struct vb_target direct = {.kind = VB_TARGET_FILE, .fd = open_direct(file.fd)};
    struct vb_target shared = {.kind = VB_TARGET_FILE, .fd = open_disk("/dev/shm")};
    void *storage = mmap(NULL, DISK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(storage != MAP_FAILED);
    struct vb_target memory = {.kind = VB_TARGET_MEMORY, .address = (uintptr_t)storage, .size = DISK};

    struct vb_target null = {.kind = VB_TARGET_NULL};

    MUST(mapping_guard_install() == 0);
    for (uint32_t way = 0; way < 4; way++) {
        static const uint32_t spins[] = {VB_SPIN_AUTO, VB_SPIN_NEVER, VB_SPIN_ALWAYS, VB_SPIN_AUTO};
        static const uint32_t modes[] = {VB_IO_URING, VB_IO_URING_COOP, VB_IO_URING_PLAIN, VB_IO_URING};
        file.spin = shared.spin = memory.spin = spins[way];
        for (uint32_t queues = 1; queues <= QUEUES; queues += QUEUES - 1) {
            uint64_t each = requests / 4 / queues;
            file.io_mode = modes[way];
            stress_disk("file by io_uring", &file, queues, way, each, seed);
            direct.spin = file.spin;
            direct.io_mode = file.io_mode;
            stress_disk("file by held pages", &direct, queues, way, each, seed);
            file.io_mode = VB_IO_SYNC;
            stress_disk("file by threads", &file, queues, way, each, seed);
            shared.io_mode = VB_IO_AUTO;
            stress_disk("tmpfs file", &shared, queues, way, each, seed);
            stress_disk("memory", &memory, queues, way, each, seed);
        }
        stress_disk("null", &null, 1, way, requests / 4, seed);
    }
    munmap(storage, DISK);
    close(direct.fd);
    close(file.fd);
    close(shared.fd);
    printf("engine_stress: ok\n");
    return 0;
}
