/* How many requests at once, when to wake the driver, whether to look before sleeping: what a queue thread learns. */
#ifndef VDUSE_BLK_PACE_H
#define VDUSE_BLK_PACE_H

#include "core.h"

struct pace { /* owner: the queue thread */
    uint32_t spin;       /* VB_SPIN_... */
    uint32_t crowd;      /* as many queue threads awake leave no CPU to who sends the requests */
    uint32_t first;      /* requests of the chunk that wakes the driver, if that is less than others have */
    uint16_t woken_at;   /* avail.idx when the driver was woken last */
    uint32_t wakes;      /* how often it was since everything was done last; more than once: it came, and slept again */
    uint32_t spin_ns;    /* how long to look before sleeping; 0 = not at all */
    uint32_t spin_pause; /* short sleeps to let pass when looking was in vain; doubled each time, halved when it was not */
    uint32_t spin_after; /* of these, how many are left */
    bool slow;           /* storage took long since only the driver could end a sleep */
};

/* `cpus`: how many this process may run on. */
void pace_init(struct pace *pace, uint32_t spin, uint32_t cpus);
/* A queue thread of this process runs, or does not. */
void pace_awake(void);
void pace_asleep(void);
/* Requests of the next chunk. */
uint32_t pace_chunk(const struct pace *pace, struct vb_queue *queue);
/* The driver was woken, when avail.idx was this. */
void pace_told(struct pace *pace, uint16_t avail_idx);
/* Everything is done that the driver has made available, up to `popped`. */
void pace_ran_out(struct pace *pace, uint16_t popped);
/* How long to look for something to do before sleeping; 0: do not, or not now because there is no CPU for it. */
uint32_t pace_look_ns(const struct pace *pace);
/* Whether it looks before sleeping at all. */
bool pace_may_look(const struct pace *pace);
/* Looking found something, or nothing in all that time. */
void pace_seen(struct pace *pace);
void pace_in_vain(struct pace *pace);
/*
 * It slept so long. `busy`: storage had requests, and may have ended it. `began_io`: the call also handed requests over, so if
 * it was short that says nothing about when the next one comes.
 */
void pace_slept(struct pace *pace, uint64_t ns, bool busy, bool began_io);

#endif
