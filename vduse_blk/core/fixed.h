/*
 * A registered buffer: pages of the driver's memory that the kernel holds for one io_uring, so that it need not look them up
 * for every request. One region that the publisher of the table vouches for (IOVA_PINNED), whole: it is the bounce area of
 * VDUSE, which is no larger than the kernel takes as one buffer (1 GiB).
 */
#ifndef VDUSE_BLK_FIXED_H
#define VDUSE_BLK_FIXED_H

#include "core.h"
#include "uring.h"

struct fixed { /* owner: the queue thread. Zeroed: nothing is held */
    struct uring *ring;
    uint64_t host;
    uint64_t length; /* bytes held from `host` on; 0 = none */
    int error;       /* errno why what is to be held is not, 0 = it is */
    bool reserved;
};

/* Hold what is to be held of `table`, and let go of what is gone from it, for which it drains, with nothing in flight. */
void fixed_adopt(struct fixed *fixed, const struct iova_table *table);
/* Whether all of [address, address+length) is held. */
bool fixed_holds(const struct fixed *fixed, const void *address, size_t length);

#endif
