/*
 * Requests that storage failed with an error that may pass: they wait here and are tried again, as long as the policy of the
 * disk has it.
 *
 *   never failed (failed_ns 0) --error--> parked --due--> in flight again --error--> parked ... --> finished
 *
 * A request counts as waiting from its first error until it is finished, so storage that is away is one wait, not one per
 * attempt. What it has done already stays done: the target goes on with the step that failed.
 *
 * Nothing waits while the queue stops, while memory is to be taken away, or once the ring is broken: whoever wants that must
 * not wait for storage.
 *
 * The policy belongs to all queues of a disk and changes under them; each change is followed by a wake. Times are those of
 * CLOCK_MONOTONIC. Everything runs on the queue thread but vb_policy_set.
 */
#include "core.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

enum { FIRST_NS = 10 * 1000 * 1000, DOUBLINGS = 7 };
static const uint64_t MOST_NS = 1000 * 1000 * 1000;

void vb_policy_set(struct vb_policy *policy, uint64_t error_ns, uint64_t full_ns)
{
    GUEST_STORE(&policy->error_ns, error_ns);
    GUEST_STORE(&policy->full_ns, full_ns);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool has_bit(const uint64_t *bits, int error)
{
    return error >= 0 && error < VB_ERRORS && (bits[error / 64] >> (error % 64) & 1) != 0;
}

/* How long a request may wait with this error, from its first. */
static uint64_t limit_of(const struct vb_queue *queue, int error)
{
    const struct vb_policy *policy = queue->config.policy;
    if (policy == NULL)
        return 0;
    if (has_bit(policy->full, error))
        return GUEST_LOAD(&policy->full_ns);
    return has_bit(policy->temporary, error) ? GUEST_LOAD(&policy->error_ns) : 0;
}

static bool in_a_hurry(struct vb_queue *queue)
{
    const struct iova_table *next = atomic_load_explicit(&queue->table_next, memory_order_acquire);
    return atomic_load(&queue->stopping) || (next != queue->table && next->drain) ||
           atomic_load_explicit(&queue->state, memory_order_relaxed) == VB_BROKEN;
}

static void tell(const struct vb_queue *queue)
{
    uint64_t one = 1;
    /* EAGAIN: the counter is full, so whoever waits for it is awake. */
    while (queue->config.policy->event_fd >= 0 && write(queue->config.policy->event_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

/* Twice as long each time, and not all at the same moment. */
static uint64_t pause_ns(struct retry *retry, uint32_t tries)
{
    uint64_t pause = tries < DOUBLINGS ? (uint64_t)FIRST_NS << tries : MOST_NS;
    retry->random = retry->random * 6364136223846793005u + 1442695040888963407u;
    return pause - pause / 4 + (retry->random >> 33) % (pause / 2);
}

bool retry_park(struct vb_queue *queue, struct vblk_req *req, int error)
{
    struct retry *retry = &queue->retry;
    uint64_t limit = limit_of(queue, error);
    if (limit == 0 || in_a_hurry(queue))
        return false;
    uint64_t now = now_ns();
    uint64_t since = req->failed_ns != 0 ? req->failed_ns : now;
    if (now - since >= limit)
        return false;
    atomic_store(&retry->error, error);
    if (req->failed_ns == 0) {
        req->failed_ns = now;
        if (atomic_load(&retry->waiting) == 0)
            atomic_store(&retry->since_ns, now);
        if (atomic_fetch_add(&retry->waiting, 1) == 0)
            tell(queue);
    }
    req->error = error;
    req->due_ns = now + pause_ns(retry, req->tries);
    if (limit - (now - since) < req->due_ns - now)
        req->due_ns = since + limit;
    req->tries += req->tries < DOUBLINGS;
    req->next_parked = retry->first;
    if (retry->first == NULL || req->due_ns < retry->due_ns)
        retry->due_ns = req->due_ns;
    retry->first = req;
    return true;
}

void retry_ended(struct vb_queue *queue, struct vblk_req *req)
{
    if (req->failed_ns == 0)
        return;
    req->failed_ns = 0;
    req->tries = 0;
    if (atomic_fetch_sub(&queue->retry.waiting, 1) == 1)
        tell(queue);
}

struct vblk_req *retry_take(struct vb_queue *queue)
{
    struct retry *retry = &queue->retry;
    struct vblk_req *taken = NULL;
    if (retry->first == NULL)
        return NULL;
    bool hurry = in_a_hurry(queue);
    uint64_t error_ns = GUEST_LOAD(&queue->config.policy->error_ns);
    uint64_t full_ns = GUEST_LOAD(&queue->config.policy->full_ns);
    uint64_t now = now_ns();
    if (!hurry && now < retry->due_ns && error_ns == retry->error_ns && full_ns == retry->full_ns)
        return NULL;
    retry->error_ns = error_ns;
    retry->full_ns = full_ns;

    struct vblk_req *req = retry->first;
    retry->first = NULL;
    retry->due_ns = UINT64_MAX;
    while (req != NULL) {
        struct vblk_req *next = req->next_parked;
        uint64_t waited = now - req->failed_ns;
        uint64_t limit = limit_of(queue, req->error);
        req->over = hurry || waited >= limit;
        if (req->over || now >= req->due_ns) {
            COUNT(queue->counters.retries, !req->over);
            req->next_parked = taken;
            taken = req;
        } else {
            if (limit - waited < req->due_ns - now)
                req->due_ns = now + (limit - waited); /* the policy has become shorter */
            if (req->due_ns < retry->due_ns)
                retry->due_ns = req->due_ns;
            req->next_parked = retry->first;
            retry->first = req;
        }
        req = next;
    }
    return taken;
}

uint64_t retry_sleep_ns(const struct vb_queue *queue)
{
    if (queue->retry.first == NULL)
        return UINT64_MAX;
    uint64_t now = now_ns();
    return queue->retry.due_ns > now ? queue->retry.due_ns - now : 0;
}
