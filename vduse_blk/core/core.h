/* What the C files share among themselves and Python does not see. */
#ifndef VDUSE_BLK_CORE_H
#define VDUSE_BLK_CORE_H

#include "api.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/types.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "virtio 1.x is little-endian and no byte is swapped here");

/* Guest memory is read and written through these: once, whole, never re-read by the compiler. */
#define GUEST_LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define GUEST_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Counters have one writer and any number of readers. */
#define COUNT(counter, n) GUEST_STORE(&(counter), (counter) + (n))

/* ---- split ring ---- */

struct vring_desc { /* virtio 1.3, 2.7.5 */
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};
struct vring_avail { /* 2.7.6; ring[num] is used_event */
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[];
};
struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};
struct vring_used { /* 2.7.8; the u16 behind ring[num] is avail_event */
    uint16_t flags;
    uint16_t idx;
    struct vring_used_elem ring[];
};
_Static_assert(sizeof(struct vring_desc) == 16, "split descriptor");
_Static_assert(sizeof(struct vring_used_elem) == 8, "used element");

/* Owner: the queue thread. Indices are free-running, as on the wire. */
struct vring {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t num; /* power of two */
    uint16_t mask;
    uint16_t last_avail;  /* next avail entry to pop */
    uint16_t seen_avail;  /* avail.idx as last read */
    uint16_t used_idx;    /* next used slot to fill */
    uint16_t published;   /* used.idx as the driver sees it */
    uint16_t notified;    /* used.idx at the last decision about an interrupt */
    bool notified_valid;  /* false until the first decision: that one always notifies */
    bool event_idx;
    bool indirect;
    uint8_t fault; /* enum vring_fault; once set nothing more is popped */
};

/*
 * The memory behind the three areas must be mapped for 16*num, 6+2*num and 6+8*num bytes. `used_idx` continues where
 * used.idx stands.
 */
void vring_init(struct vring *ring, uint16_t num, void *desc, void *avail, void *used, bool event_idx, bool indirect,
                uint16_t last_avail);
/* Re-point a ring at memory that moved; indices stay. */
void vring_rebind(struct vring *ring, void *desc, void *avail, void *used);
/*
 * CHAIN: *chain is filled and the entry is consumed. EMPTY: nothing there. BROKEN: ring->fault says why, for good.
 * UNMAPPED: the indirect table at *unmapped is not in the table; the entry is NOT consumed.
 */
enum vring_pop_result vring_pop(struct vring *ring, const struct iova_table *table, struct vring_chain *chain,
                                struct vring_seg *unmapped);
/* Give back the entry just popped (its memory is not mapped yet): the next pop returns it again. */
void vring_unpop(struct vring *ring);
void vring_push(struct vring *ring, uint16_t head, uint32_t length);
/* Make the pushed entries visible; returns how many there were. */
uint16_t vring_publish(struct vring *ring);
/* Must the driver be interrupted for what was published since the last call? */
bool vring_must_notify(struct vring *ring);
/* Ask for kicks; true = entries arrived meanwhile, do not sleep. */
bool vring_enable_kick(struct vring *ring);
void vring_disable_kick(struct vring *ring);
/* Entries the driver has made available and we have not popped, at most num. */
uint16_t vring_pending(struct vring *ring);
/* As it is now; only to be compared. */
uint16_t vring_avail_idx(const struct vring *ring);
/* Whether the driver has seen all that is published and asked to be woken by the next. Not known (false) without EVENT_IDX. */
bool vring_driver_sleeps(struct vring *ring);

/* The chain of `head`, which was popped before: as vring_pop, without the avail ring. */
enum vring_pop_result vring_chain_of(struct vring *ring, const struct iova_table *table, uint16_t head,
                                     struct vring_chain *chain, struct vring_seg *unmapped);

/* ---- crash log ---- */

struct inflight_region;
struct inflight { /* owner: the queue thread */
    struct inflight_region *region; /* NULL: none */
    uint16_t num;
    bool fresh;       /* nobody had used it: it says nothing about where the queue stands */
    uint64_t counter; /* of the next request popped */
};

/*
 * Begin with what `memory` holds and the ring's used.idx. Fills heads (room for num) with what was popped and not published,
 * in the order of popping, and returns their number.
 */
uint16_t inflight_recover(struct inflight *log, void *memory, uint16_t num, uint16_t used_idx, uint16_t *heads);
void inflight_mark(struct inflight *log, uint16_t head);
void inflight_push(struct inflight *log, uint16_t head);
/* The last `count` heads pushed are published, used.idx is `used_idx`. */
void inflight_commit(struct inflight *log, uint16_t count, uint16_t used_idx);

/* ---- pages written ---- */

struct dirty_log {
    uint8_t *bits; /* NULL: none */
    uint64_t bytes;
};
void dirty_mark(const struct dirty_log *log, uint64_t address, uint64_t length);

/* ---- requests ---- */

struct vblk_req {
    uint16_t head;
    uint8_t op; /* enum vblk_op */
    bool busy;  /* popped and not yet pushed */
    bool fua;   /* WRITE, WRITE_ZEROES: durable when answered */
    uint8_t status;
    uint16_t iov_count;
    uint32_t used_length; /* what the used ring will say when the status byte is reachable */
    uint32_t range_count;
    uint64_t offset;
    uint64_t length;
    uint8_t *status_byte; /* NULL: unreachable */
    struct vb_iov *iov;   /* arena, iov_room pieces */
    uint32_t iov_room;
    struct vblk_range *ranges; /* arena, VBLK_RANGES_MAX */
    struct vring_seg *written; /* arena, VRING_CHAIN_MAX: the device-writable segments; only where pages are logged */
    uint16_t written_count;
    /* execution, owned by the target */
    uint32_t step;      /* first iov piece or range not yet done */
    uint64_t progress;  /* bytes done of the whole (read, write) or of the present range */
    uint8_t phase;      /* target's own */
    int result;            /* pool: 0 or -errno */
    struct vblk_req *next; /* pool: in one of its lists */
    /* waiting, owned by retry.c */
    bool over;          /* taken from the list to be failed */
    uint32_t tries;
    int error;
    uint64_t failed_ns; /* first error, CLOCK_MONOTONIC; 0 = none */
    uint64_t due_ns;
    struct vblk_req *next_parked;
};

enum vblk_verdict {
    VBLK_SUBMIT = 1,    /* go and do it */
    VBLK_ANSWERED = 0,  /* req->status holds the answer already */
    VBLK_UNMAPPED = -1  /* *unmapped is not in the table; nothing was written */
};

enum vblk_verdict vblk_parse(const struct vblk_rules *rules, const struct vring_chain *chain,
                             const struct iova_table *table, struct vblk_req *req, struct vring_seg *unmapped);
/* The one completion path: writes the status byte, returns the used length. A failed read is zero-filled first. */
uint32_t vblk_finish(struct vblk_req *req, enum vblk_status status);
bool vblk_malformed(const struct vblk_req *req);
enum vblk_status vblk_status_of_errno(int error);

/* ---- requests that wait for storage ---- */

struct retry { /* owner: the queue thread */
    struct vblk_req *first;
    uint64_t due_ns;   /* of the earliest in the list */
    uint64_t error_ns; /* the policy as retry_take last saw it */
    uint64_t full_ns;
    uint64_t random;
    /* read by control */
    _Atomic uint32_t waiting;
    _Atomic int32_t error;
    _Atomic uint64_t since_ns;
};

/* ---- queue ---- */

struct vb_queue {
    struct vb_queue_config config;
    struct vblk_rules *rules;
    const struct iova_table *table; /* queue */
    _Atomic(const struct iova_table *) table_next; /* control publishes, queue adopts */
    struct vring ring;
    bool bound;           /* queue: the ring's memory is in `table` */
    uint64_t faults_seen; /* queue: mapping_faults() when it last looked */
    struct vblk_req *reqs;      /* num, indexed by head */
    struct vb_iov *iov_arena;   /* num * iov_room */
    struct vblk_range *range_arena;
    uint32_t iov_room;
    struct dirty_log dirty;
    struct vring_seg *written_arena; /* num * VRING_CHAIN_MAX */
    struct inflight log;
    uint16_t *replay;      /* num: heads to do again, found in the log */
    uint16_t replay_count;
    uint16_t replay_next;
    struct retry retry;
    uint32_t inflight; /* queue: equals pops minus pushes; if it drifts, stop never ends */
    struct vb_counters counters;
    struct vring_chain chain; /* queue: scratch, 4 KiB, too large for comfort on a stack */
    struct vring_seg missed;  /* queue: what the last miss asked for */
    bool missed_valid;
    int wake_fd;
    /* read by control */
    _Atomic uint32_t state;
    _Atomic uint32_t fault;
    _Atomic uint32_t table_generation;
    _Atomic uint32_t missing; /* queue.c's MISS_... */
    _Atomic uint64_t miss_start;
    _Atomic uint64_t miss_last;
    _Atomic int32_t error;
    _Atomic uint32_t last_avail;
    _Atomic uint32_t replayed;
    _Atomic uint64_t pinned;
    _Atomic int32_t pin_error;
    _Atomic bool stopping;
    _Atomic bool held;  /* control: pop nothing new */
    _Atomic bool quiet; /* queue: it is held and has nothing in flight */
    struct vb_engine *engine;
    /* Queue: the table has changed; called before control learns of it. NULL: nobody asks. */
    void (*adopted)(struct vb_queue *queue);
};

/* Adopt a newer table if one is published and may be adopted now. False: do not pop (unmapped, draining or broken). */
bool queue_ready(struct vb_queue *queue);
/*
 * Pop and parse one request. Returns it when storage must be asked; NULL otherwise with *more telling whether another call
 * makes sense (an answered request, say) or not (empty, broken, waiting for control).
 */
struct vblk_req *queue_fetch(struct vb_queue *queue, bool *more);
/* Finish and push one request; the driver sees it at the next queue_publish. */
void queue_finish(struct vb_queue *queue, struct vblk_req *req, enum vblk_status status);
/* Publish and, if the driver wants it, notify. True: notified. */
bool queue_publish(struct vb_queue *queue);
void queue_break(struct vb_queue *queue, enum vring_fault fault);
void queue_post_event(struct vb_queue *queue);

/* The request has failed with `error`. True: it waits, and is not to be finished. */
bool retry_park(struct vb_queue *queue, struct vblk_req *req, int error);
/* The request is about to be finished. */
void retry_ended(struct vb_queue *queue, struct vblk_req *req);
/* Requests to take up now, linked by next_parked: those that are `over` must be failed, others tried. */
struct vblk_req *retry_take(struct vb_queue *queue);
/* Nanoseconds until retry_take has one; UINT64_MAX: none waits. */
uint64_t retry_sleep_ns(const struct vb_queue *queue);

/* ---- targets: each starts a request; those that finish at once return their result, others report later ---- */

enum { TARGET_PENDING = 1, TARGET_FULL = 2 };

struct uring;
struct fixed;
struct target_file {
    int fd;
    struct fixed *fixed; /* registered buffers of the ring; NULL without a ring */
    bool is_block_device;
    bool direct;        /* O_DIRECT */
    bool sync;          /* O_DSYNC */
    /* Learnt, by whichever thread comes across it. */
    _Atomic bool no_zero_range;   /* fallocate(ZERO_RANGE) is not supported, write zeros instead */
    _Atomic bool no_punch;        /* fallocate(PUNCH_HOLE) is not supported */
    _Atomic bool no_command;      /* io_uring cannot discard */
    _Atomic bool no_discard;      /* the device cannot discard */
    _Atomic bool no_nowait_read;  /* RWF_NOWAIT is not supported */
    _Atomic bool no_nowait_write;
    bool in_memory;     /* tmpfs and the like: what io_uring gets is for other threads */
    uint8_t *lost;      /* as in vb_target */
};

void target_file_open(struct target_file *file, const struct vb_target *target);

/* Serve one request by plain system calls. 0 or -errno. Any thread. */
int target_file_sync(struct target_file *file, struct vblk_req *req);
/*
 * Prepare the next step of a request. TARGET_PENDING = an SQE was filled, TARGET_FULL = there is none, submit and call
 * again, 0 = the request is complete, -errno = it failed.
 */
int target_file_prepare(struct target_file *file, struct vblk_req *req, struct uring *ring);
/* Take in the result of the step: 1 = prepare the next (which may find that there is none), -errno = failed. */
int target_file_advance(struct target_file *file, struct vblk_req *req, int result);
/* Whether data is lost that this request promises to be durable: no other attempt can mend it. */
bool target_file_is_lost(const struct target_file *file, const struct vblk_req *req);
/* Memory and null: 0 or -errno. */
int target_memory(const struct vb_target *target, struct vblk_req *req);
int target_null(struct vblk_req *req);

#endif
