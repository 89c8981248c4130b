/*
 * The pace of a queue thread: rules about numbers, and one count that all queue threads of the process share.
 *
 * The chunk is the most important number here: without it the whole queue moves in lock step (fetch all, wait for all),
 * with a chunk of one every request pays its own system calls and interrupt. Half of what there is, within CHUNK_LEAST and
 * CHUNK_MOST (docs/performance.md has what was measured). All of it where the queue threads leave no CPU to the sender: then
 * nothing overlaps anyway.
 *
 * A driver that sleeps takes time to come. If everything was done before it came, it is woken earlier the next time, by a
 * chunk of its own of half as many requests, down to FIRST_LEAST; if it came before, by one request more. Where a wake-up
 * takes as long as many requests the two sides overlap so; where it does not, nothing is woken more often than need be.
 *
 * Before it sleeps, a thread whose last sleeps were short looks at the ring for a while (at most SPIN_MAX_NS): a wake-up
 * from another CPU costs more than most requests. One long sleep ends that, so an idle disk costs nothing. How long a sleep
 * was is seen by who has woken up, and in a virtual machine both sides may take longer to wake than is ever looked for: so
 * a sleep that only the driver could end is short up to SHORT_SLEEP_NS, or one request missed would end the looking for
 * good. Storage that takes longer than is ever looked for ends it, and the driver's next wait with it: what could be gained
 * is little beside what storage takes, and a driver on the same CPU would have to move. It is only done while the queue
 * threads that are awake leave a CPU to who sends the requests. Whoever looked as long as is allowed, saw nothing, and then
 * slept for a moment only, stood in the way of that very sender, who waited for this CPU, or looks too early; whoever
 * looked and then slept long looked for nothing. The more often in a row, the longer before it looks again.
 */
#include "pace.h"

#include <unistd.h>

enum { CHUNK_LEAST = 4, CHUNK_MOST = 32, FIRST_LEAST = 2 };
enum { SPIN_FIRST_NS = 10000, SPIN_MAX_NS = 50000, SPIN_PAUSE_MOST = 1024 };
enum { SHORT_SLEEP_NS = 4 * SPIN_MAX_NS };

static atomic_uint awake; /* queue threads of this process that do not sleep */

void pace_init(struct pace *pace, uint32_t spin, uint32_t cpus)
{
    memset(pace, 0, sizeof(*pace));
    pace->spin = spin;
    pace->first = CHUNK_MOST;
    pace->spin_ns = spin == VB_SPIN_ALWAYS ? SPIN_MAX_NS : 0;
    /* Where there are CPUs that we may not use, they are the sender's. */
    pace->crowd = cpus + ((long)cpus < sysconf(_SC_NPROCESSORS_ONLN) ? 1 : 0);
    if (spin == VB_SPIN_ALWAYS)
        pace->crowd = UINT32_MAX;
}

void pace_awake(void)
{
    atomic_fetch_add_explicit(&awake, 1, memory_order_relaxed);
}

void pace_asleep(void)
{
    atomic_fetch_sub_explicit(&awake, 1, memory_order_relaxed);
}

static bool overlaps(const struct pace *pace)
{
    return atomic_load_explicit(&awake, memory_order_relaxed) < pace->crowd;
}

/* ---- chunks ---- */

/*
 * Half of what there is, so that one half is with the storage or the sender while the other is with us; fewer if they wake
 * a driver that would come too late otherwise, and storage has answered all it was asked.
 */
uint32_t pace_chunk(const struct pace *pace, struct vb_queue *queue)
{
    uint32_t count = queue->inflight + vring_pending(&queue->ring);
    bool halves = overlaps(pace);
    if (halves)
        count /= 2;
    count = count < CHUNK_LEAST ? CHUNK_LEAST : count > CHUNK_MOST ? CHUNK_MOST : count;
    if (halves && pace->first < count && queue->inflight == 0 && vring_driver_sleeps(&queue->ring))
        return pace->first;
    return count;
}

/* The driver came while we had something to do, so it might have slept a little longer. */
static void came_early(struct pace *pace)
{
    if (pace->first < CHUNK_MOST)
        pace->first++;
}

void pace_told(struct pace *pace, uint16_t avail_idx)
{
    if (pace->wakes++ != 0)
        came_early(pace);
    pace->woken_at = avail_idx;
}

void pace_ran_out(struct pace *pace, uint16_t popped)
{
    if (pace->wakes == 0)
        return;
    if (popped != pace->woken_at)
        came_early(pace);
    else if (pace->wakes == 1)
        pace->first = pace->first / 2 > FIRST_LEAST ? pace->first / 2 : FIRST_LEAST;
    pace->wakes = 0;
}

/* ---- looking before sleeping ---- */

uint32_t pace_look_ns(const struct pace *pace)
{
    return overlaps(pace) ? pace->spin_ns : 0;
}

bool pace_may_look(const struct pace *pace)
{
    return pace->spin_ns != 0;
}

void pace_seen(struct pace *pace)
{
    pace->spin_pause /= 2;
}

static void leave_off(struct pace *pace)
{
    if (pace->spin_pause < SPIN_PAUSE_MOST)
        pace->spin_pause = pace->spin_pause == 0 ? 1 : pace->spin_pause * 2;
    pace->spin_after = pace->spin_pause;
    pace->spin_ns = 0;
}

void pace_in_vain(struct pace *pace)
{
    if (pace->spin == VB_SPIN_AUTO && pace->spin_ns == SPIN_MAX_NS)
        leave_off(pace);
}

void pace_slept(struct pace *pace, uint64_t ns, bool busy, bool began_io)
{
    if (pace->spin != VB_SPIN_AUTO)
        return;
    bool slow = busy ? ns > SPIN_MAX_NS : pace->slow;
    pace->slow = busy && (slow || pace->slow);
    bool is_long = slow || ns > SHORT_SLEEP_NS;
    if (is_long && pace->spin_ns != 0)
        leave_off(pace); /* it looked less long than is allowed, in vain as well */
    else if (is_long || began_io)
        return;
    else if (pace->spin_after != 0)
        pace->spin_after--;
    else if (pace->spin_ns == 0)
        pace->spin_ns = SPIN_FIRST_NS;
    else if (pace->spin_ns < SPIN_MAX_NS)
        pace->spin_ns = pace->spin_ns * 2 < SPIN_MAX_NS ? pace->spin_ns * 2 : SPIN_MAX_NS;
}
