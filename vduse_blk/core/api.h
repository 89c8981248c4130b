/*
 * The interface of the C core: included by every C file and fed, as this very text, to cffi. Hence: declarations and
 * enums only, no preprocessor lines but the include guard (lines starting with '#' are dropped for cffi).
 *
 * Owners: "control" is the thread that creates, starts and stops a queue and publishes tables (the exporter's message
 * thread, or the event loop for a plugin queue); "queue" is the one thread that serves the queue.
 */
#ifndef VDUSE_BLK_API_H
#define VDUSE_BLK_API_H
#include <stddef.h>
#include <stdint.h>
#endif

/* ---- iova.c: address translation ------------------------------------------------------------------------------ */

/* What the device may do with a region; the values are those of the VDUSE uapi (VDUSE_ACCESS_RO, _WO). */
enum iova_access { IOVA_READ = 1, IOVA_WRITE = 2 };

struct iova_region {
    uint64_t start; /* first byte, IOVA */
    uint64_t last;  /* last byte, inclusive as in the uapi */
    uint64_t host;  /* where `start` is mapped in this process */
    uint32_t access;
    uint32_t flags; /* enum iova_flags */
};

/*
 * PINNED: the pages under the region stay the same as long as a table has it, whatever is done to the memory elsewhere. Queues
 * may have the kernel hold them. Two tables that follow one another must agree about a region they share, or the later one
 * must drain.
 */
enum iova_flags { IOVA_PINNED = 1 };

/* Sorted by start, no overlap; immutable once published to a queue. */
struct iova_table {
    uint32_t count;
    uint32_t generation; /* of the publisher; a later table has a larger one */
    uint32_t drain;      /* the table lacks something its predecessor had: adopt it only with nothing in flight */
    uint32_t reserved;
    struct iova_region regions[];
};

/* Same layout as struct iovec (asserted), declared here so that Python can read it. */
struct vb_iov {
    void *base;
    size_t length;
};

/* 0, or -EINVAL if the table is not sorted, overlaps, is empty somewhere or wraps the host address space. */
int iova_table_check(const struct iova_table *table);

/*
 * Translate [iova, iova+length) into at most `room` pieces. Returns their number, or -EFAULT (some byte is not
 * mapped), -EACCES (mapped, but not with `access`), -ENOBUFS (more pieces than room). length 0 gives 0 pieces.
 */
int iova_translate(const struct iova_table *table, uint64_t iova, uint64_t length, uint32_t access,
                   struct vb_iov *out, uint32_t room);

/* ---- vring_split.c: a split virtqueue, device side ------------------------------------------------------------- */

enum { VRING_CHAIN_MAX = 260, VRING_NUM_MAX = 32768 };

enum vring_pop_result { VRING_EMPTY = 0, VRING_CHAIN = 1, VRING_BROKEN = -1, VRING_UNMAPPED = -2 };

/* Why a ring was declared broken; the worker turns it into a sentence. */
enum vring_fault {
    VRING_OK = 0,
    VRING_FAULT_AVAIL_IDX,    /* avail.idx ran further ahead than the ring is long */
    VRING_FAULT_HEAD,         /* a head beyond the ring, or one that is still in flight */
    VRING_FAULT_NEXT,         /* a `next` beyond the table */
    VRING_FAULT_LOOP,         /* a chain longer than its table */
    VRING_FAULT_LONG,         /* a chain of more than VRING_CHAIN_MAX buffers */
    VRING_FAULT_ORDER,        /* a device-readable buffer behind a device-writable one */
    VRING_FAULT_INDIRECT,     /* an indirect table that is nested, chained, empty, ragged or not negotiated */
    VRING_FAULT_INDIRECT_MAP, /* an indirect table in memory that is not mapped */
    VRING_FAULT_RING_MAP,     /* the ring itself is not mapped, misaligned or in pieces */
    VRING_FAULT_MEMORY,       /* touching mapped memory raised SIGBUS */
    VRING_FAULT_ENGINE        /* io_uring refused to go on; the view's error says why */
};

struct vring_seg {
    uint64_t iova;
    uint32_t length;
    uint32_t writable;
};

struct vring_chain {
    uint16_t head;
    uint16_t count;
    uint16_t readable; /* the first `readable` segments are device-readable, the rest device-writable */
    uint16_t reserved;
    struct vring_seg segs[260];
};

/* ---- inflight.c: the crash log --------------------------------------------------------------------------------- */

/* Bytes of the log of a queue: INFLIGHT_HEADER_BYTES + entries * INFLIGHT_DESC_BYTES. All zeros: fresh. */
enum { INFLIGHT_HEADER_BYTES = 16, INFLIGHT_DESC_BYTES = 16 };

/* ---- dirty.c: the log of pages written -------------------------------------------------------------------------- */

enum { DIRTY_PAGE = 4096 };

/* ---- vblk.c: virtio-blk requests ------------------------------------------------------------------------------- */

enum vblk_op {
    VBLK_READ = 0,
    VBLK_WRITE,
    VBLK_FLUSH,
    VBLK_DISCARD,
    VBLK_WRITE_ZEROES,
    VBLK_GET_ID,
    VBLK_OTHER, /* unknown or malformed: only counted */
    VBLK_OPS
};

enum vblk_status { VBLK_S_OK = 0, VBLK_S_IOERR = 1, VBLK_S_UNSUPP = 2 };

enum { VBLK_SERIAL_SIZE = 20, VBLK_RANGES_MAX = 32, VBLK_SECTOR = 512 };

/* What the disk accepts. `capacity` and `writethrough` are stored by control and loaded by queue atomically; the rest is
 * constant. */
struct vblk_rules {
    uint64_t capacity;   /* bytes */
    uint32_t block_size; /* logical block, bytes */
    uint8_t read_only;
    uint8_t discard;
    uint8_t write_zeroes;
    uint8_t writethrough; /* what is written is durable when the request is answered */
    uint32_t max_discard_sectors;      /* per range */
    uint32_t max_write_zeroes_sectors; /* per range */
    uint32_t max_ranges;               /* per request, <= VBLK_RANGES_MAX */
    char serial[20];
};

struct vblk_range {
    uint64_t offset; /* bytes */
    uint64_t length; /* bytes */
    uint32_t unmap;
    uint32_t reserved;
};

/* ---- queue.c, engine.c: serving a virtqueue -------------------------------------------------------------------- */

enum vb_target_kind { VB_TARGET_NONE = 0, VB_TARGET_FILE, VB_TARGET_MEMORY, VB_TARGET_NULL };
/* EVENTFD: the file is shared with the driver, who may have made it blocking, and full. */
enum vb_notify_kind { VB_NOTIFY_EVENTFD = 0, VB_NOTIFY_VDUSE };
enum { VB_RESUME = 0x10000 };
/* URING_COOP, URING_PLAIN: io_uring as kernels before 6.1 and before 5.19 have it. */
enum vb_io_mode { VB_IO_AUTO = 0, VB_IO_URING, VB_IO_SYNC, VB_IO_URING_COOP, VB_IO_URING_PLAIN };
enum vb_spin { VB_SPIN_AUTO = 0, VB_SPIN_NEVER, VB_SPIN_ALWAYS };

/* How C serves the storage without Python. The file descriptor stays the caller's and must outlive the queue. */
struct vb_target {
    uint32_t kind;            /* enum vb_target_kind */
    int32_t fd;               /* FILE */
    uint32_t is_block_device; /* FILE */
    uint32_t io_mode;         /* FILE: enum vb_io_mode */
    uint32_t spin;            /* enum vb_spin: whether the queue looks for work before it sleeps */
    uint64_t address;         /* MEMORY: host address of byte 0 */
    uint64_t size;            /* MEMORY: bytes */
    uint8_t *lost;            /* FILE: shared by all queues of the disk; not 0 once a flush has failed. NULL = may be retried */
};

/*
 * What becomes of a request that storage fails with an error that may pass: it is tried again for so many nanoseconds after
 * its first error, 0 = not at all, UINT64_MAX = for ever. One per disk, shared by its queues. Control stores both words
 * with vb_policy_set and wakes the queues; the rest is constant. Zeroed: everything fails at once.
 */
enum { VB_ERRORS = 192 }; /* errno values from 0 */
struct vb_policy {
    uint64_t error_ns;
    uint64_t full_ns;       /* for errors in `full` */
    uint64_t temporary[3];  /* a bit per errno value */
    uint64_t full[3];
    int32_t event_fd;       /* eventfd: requests of a queue begin or cease to wait (see the view); -1 = none */
    int32_t reserved;
};

struct vb_queue_config {
    uint32_t index;
    uint32_t num; /* ring entries, a power of two */
    uint64_t desc_iova;
    uint64_t avail_iova;
    uint64_t used_iova;
    uint32_t last_avail; /* where to start popping; VB_RESUME: where a dead server stopped, see `inflight` */
    uint8_t event_idx;   /* VIRTIO_F_EVENT_IDX negotiated */
    uint8_t indirect;    /* VIRTIO_F_INDIRECT_DESC negotiated */
    uint16_t seg_max;    /* data segments per request the device promised to accept */
    int32_t kick_fd;     /* eventfd, driver -> device */
    int32_t notify_fd;   /* eventfd or VDUSE device, device -> driver */
    uint32_t notify_kind;
    int32_t event_fd; /* eventfd, queue -> control: look at state, miss_*, table_generation */
    /* Crash log of at least `num` entries, aligned to 8 bytes; NULL = none. With one that was used before, the queue begins
     * behind what it and the used ring know of, whatever last_avail says, after doing again what was popped and not
     * answered. */
    void *inflight;
    /* Log of the pages written, a bit per DIRTY_PAGE bytes of IOVA from 0; NULL = none. Where log_used is not 0, changes to
     * the used ring are marked as if the ring began at dirty_used. */
    uint8_t *dirty;
    uint64_t dirty_bytes;
    uint64_t dirty_used;
    uint64_t log_used;
    const struct vb_policy *policy; /* native queues; outlives them. NULL = everything fails at once */
};

enum vb_state { VB_IDLE = 0, VB_RUNNING, VB_BROKEN, VB_STOPPED };

/* One writer, the queue; read by anybody at any time, each field on its own. */
struct vb_counters {
    uint64_t ops[7];     /* completed, by enum vblk_op */
    uint64_t bytes[7];   /* of requests completed with OK, by enum vblk_op */
    uint64_t errors[7];  /* completed with IOERR, by enum vblk_op */
    uint64_t unsupported;
    uint64_t retries;    /* attempts after the first */
    uint64_t malformed;  /* requests whose framing broke the rules */
    uint64_t wakeups;    /* returns from sleep */
    uint64_t spin_hits;  /* sleeps saved by looking a little longer */
    uint64_t submits;    /* io_uring_enter or equivalent */
    uint64_t publishes;  /* used.idx updates */
    uint64_t notifies;   /* interrupts raised */
    uint64_t misses;     /* IOVA ranges asked of control */
    uint64_t inflight;   /* popped and not yet pushed */
};

struct vb_queue; /* opaque */

/* What control may ask a queue: a consistent enough picture for events, exact for each field. */
struct vb_view {
    uint32_t state;            /* enum vb_state */
    uint32_t fault;            /* enum vring_fault */
    uint32_t table_generation; /* the newest table the queue has adopted */
    uint32_t missing;          /* nonzero: the queue waits for [miss_start, miss_last] to be looked up */
    uint64_t miss_start;
    uint64_t miss_last;
    int32_t error; /* errno of an engine failure, 0 = none */
    uint32_t last_avail; /* next avail entry to pop, as of the last publish; exact once the queue has stopped */
    uint32_t replayed;   /* heads taken over from the in-flight log */
    uint32_t waiting;    /* requests that storage has failed and that are not finished */
    int32_t pin_error;   /* errno why pages under IOVA_PINNED regions are not all held, 0 = they are, or need not be */
    uint64_t pinned;     /* bytes of memory whose pages the kernel holds for the queue */
    int32_t wait_error;  /* the last errno of one; meaningless with none waiting */
    uint64_t wait_since; /* CLOCK_MONOTONIC, ns: since when there is one */
};

/* NULL with *error = errno. `rules` and every published table must outlive the queue. */
struct vb_queue *vb_queue_new(const struct vb_queue_config *config, struct vblk_rules *rules,
                              const struct iova_table *table, int *error);
void vb_queue_free(struct vb_queue *queue);
const struct vb_counters *vb_queue_counters(const struct vb_queue *queue);
void vb_queue_view(const struct vb_queue *queue, struct vb_view *view);

/* Control: publish a table; the queue adopts it at its next chunk. */
void vb_queue_set_table(struct vb_queue *queue, const struct iova_table *table);
/* Control: the range of the view's `missing` has been looked up; what was found is in a table published before this call. */
void vb_queue_answer_miss(struct vb_queue *queue);
/* Control: look again (after new table, or to rescan the ring). */
void vb_queue_wake(struct vb_queue *queue);
/* Control: pop nothing new until it is let go again; what is in flight goes on, and may wait for storage as ever. */
void vb_queue_hold(struct vb_queue *queue, int on);
/* Control: not 0 once a queue that is held has nothing in flight. It stays so until it is let go. */
int vb_queue_is_quiet(const struct vb_queue *queue);
/* Control: change the size of the disk, in bytes; seen by every request popped afterwards. */
void vblk_set_capacity(struct vblk_rules *rules, uint64_t capacity);
/* Control: whether writes must be durable when they are answered; holds for every request popped afterwards. */
void vblk_set_writethrough(struct vblk_rules *rules, int on);

/* Control: change what waits, from the next error on; queues learn of it when woken. */
void vb_policy_set(struct vb_policy *policy, uint64_t error_ns, uint64_t full_ns);

/* Native: a C thread serves the queue. 0 or -errno. */
int vb_engine_start(struct vb_queue *queue, const struct vb_target *target);
/* Native: pop nothing more, wait until nothing is in flight, join. Never returns early: memory may be unmapped afterwards. */
void vb_engine_stop(struct vb_queue *queue);

/* Plugin: one request as Python sees it. */
struct vb_item {
    uint16_t head;
    uint8_t op;  /* enum vblk_op: READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES */
    uint8_t fua; /* WRITE, WRITE_ZEROES: durable when answered */
    uint32_t iov_count;
    uint64_t offset;
    uint64_t length;
    const struct vb_iov *iov;         /* READ, WRITE */
    const struct vblk_range *ranges;  /* DISCARD, WRITE_ZEROES */
    uint64_t range_count;
};
struct vb_done {
    uint16_t head;
    uint16_t status; /* enum vblk_status */
};

/* Queue: not 0 while requests found in the crash log are still to be popped, and can be. Whoever stops a queue pops them
 * first: the next avail index says that they were. */
int vb_queue_replaying(const struct vb_queue *queue);

/*
 * Plugin: pop and parse up to `room` requests; those that need no storage are answered on the way. Returns their
 * number; 0 = nothing to do and kicks are enabled again (or the queue waits for a table, or is broken: see the view).
 */
int vb_queue_poll(struct vb_queue *queue, struct vb_item *items, uint32_t room);
/* Plugin: answer, publish once, notify at most once. 0, or -EINVAL for a head that is not in flight (nothing is done for it). */
int vb_queue_complete(struct vb_queue *queue, const struct vb_done *done, uint32_t count);

/* ---- batch.c: what one vb_queue_poll gave, for storage that takes many requests at once ------------------------- */

/* Result of a request of a batch: this, 0, or an errno. */
enum { VB_BATCH_OPEN = -1 };

/* What a batch may contain: reads and writes within these. */
struct vb_batch_limits {
    uint64_t size;         /* of the disk, bytes */
    uint64_t max_transfer; /* bytes per request, 0 = any */
    uint32_t block_size;   /* offset and length are multiples; 0 = nothing is admitted */
    uint8_t writes;
    uint8_t fua;           /* writes that must be durable when answered */
    uint16_t reserved;
};

/* What a settled batch did: requests that succeeded, their bytes, requests that failed. */
struct vb_batch_totals {
    uint64_t reads;
    uint64_t read_bytes;
    uint64_t writes;
    uint64_t write_bytes;
    uint64_t errors;
};

/*
 * Put what may be in the batch first, in its order, and open their results (room for count). Returns how many; the order of
 * the others is lost.
 */
uint32_t vb_batch_admit(struct vb_item *items, int32_t *results, uint32_t count, const struct vb_batch_limits *limits);
/*
 * Serve every open request that lies in bytes [start, start+size) of the disk by copying from or to `memory`, which holds
 * them; writes only if `writable`. The others stay open.
 */
void vb_batch_copy(const struct vb_item *items, int32_t *results, uint32_t count, uint8_t *memory, uint64_t start,
                   uint64_t size, int writable);
/*
 * Write an answer for each request that has a result into `done` (room for count), sum up, and put the open ones first.
 * Returns the number of answers; count minus that are open.
 */
uint32_t vb_batch_settle(struct vb_item *items, const int32_t *results, uint32_t count, struct vb_done *done,
                         struct vb_batch_totals *totals);

/* ---- mapping.c -------------------------------------------------------------------------------------------------- */

/* Map `length` bytes of fd from `offset` (page-aligned), shared, and guard the range. NULL with *error = errno. */
void *mapping_map(int fd, uint64_t offset, uint64_t length, int writable, int *error);
void mapping_unmap(void *address, uint64_t length);
/* Install the SIGBUS guard of this process, once. 0 or -errno. */
int mapping_guard_install(void);
/* SIGBUSes survived since the start; a queue that sees it change declares itself broken. */
uint64_t mapping_faults(void);

/* 1 if io_uring works in this process, else the negative errno that says why not. */
int vb_uring_probe(void);
