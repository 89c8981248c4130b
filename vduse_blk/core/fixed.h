/*
 * Registered buffers: pages of the driver's memory that the kernel holds for one io_uring, so that it need not look them up
 * for every request. Only regions that the publisher of the table vouches for (IOVA_PINNED).
 */
#ifndef VDUSE_BLK_FIXED_H
#define VDUSE_BLK_FIXED_H

#include "core.h"
#include "uring.h"

/* Pieces of a table that can be held: 256 GiB. What does not fit goes the ordinary way. */
enum { FIXED_PIECES = 256 };
#ifndef FIXED_PIECE_BYTES
#define FIXED_PIECE_BYTES (1ull << 30) /* what the kernel takes as one buffer */
#endif

struct fixed_piece {
    uint64_t host;
    uint64_t length;
    uint32_t slot; /* index of the buffer */
};

struct fixed { /* owner: the queue thread. Zeroed: nothing is held */
    struct uring *ring;
    uint64_t bytes; /* held */
    int error;      /* errno why something of the table is not held, 0 = all is */
    bool reserved;
    bool used[FIXED_PIECES]; /* slots */
    uint32_t count;
    uint32_t last; /* where the last request was found */
    struct fixed_piece pieces[FIXED_PIECES]; /* sorted by host */
};

/* Hold what is to be held of `table`, and if it drains, with nothing in flight, let go of the rest. */
void fixed_adopt(struct fixed *fixed, const struct iova_table *table);
/* The index of the buffer that holds all of [address, address+length), or -1. */
int fixed_find(struct fixed *fixed, const void *address, size_t length);

#endif
