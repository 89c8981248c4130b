/*
 * The crash log and the log of pages written, over memory that somebody else scribbles into.
 *
 * Input: number of entries, used.idx, whether the log begins as random bytes; then steps: scribble, pop, answer, publish, die
 * and begin again, mark pages. While nobody scribbles an exact model holds: what a new life finds is what was popped and
 * not published, in the order of popping.
 */
#include "core.h"
#include "input.h"

enum { NUM_MAX = 32, LOG_PAGES = 64, PAGE = DIRTY_PAGE };

struct world {
    uint16_t num;
    uint16_t used_idx;
    uint8_t *memory; /* the log: exactly as long as promised, so an overrun is seen */
    size_t bytes;
    struct inflight log;
    uint16_t order[NUM_MAX]; /* heads popped and not published, in order */
    uint16_t count;
    uint16_t batch[NUM_MAX]; /* answered, not yet published */
    uint16_t batched;
    bool honest; /* nobody has scribbled */
};

static bool holds(const uint16_t *list, uint16_t count, uint16_t head)
{
    for (uint16_t i = 0; i < count; i++)
        if (list[i] == head)
            return true;
    return false;
}

static void drop(uint16_t *list, uint16_t *count, uint16_t head)
{
    uint16_t kept = 0;
    for (uint16_t i = 0; i < *count; i++)
        if (list[i] != head)
            list[kept++] = list[i];
    *count = kept;
}

static void begin(struct world *w)
{
    uint16_t *heads = malloc(w->num * sizeof(*heads));
    uint16_t found = inflight_recover(&w->log, w->memory, w->num, w->used_idx, heads);
    MUST(found <= w->num);
    for (uint16_t i = 0; i < found; i++) {
        MUST(heads[i] < w->num);
        MUST(!holds(heads, i, heads[i]));
        if (w->honest)
            MUST(heads[i] == w->order[i]);
    }
    if (w->honest)
        MUST(found == w->count);
    memcpy(w->order, heads, found * sizeof(*heads));
    w->count = found;
    w->batched = 0;
    free(heads);
}

static void publish(struct world *w, bool dies)
{
    w->used_idx = (uint16_t)(w->used_idx + w->batched);
    if (!dies)
        inflight_commit(&w->log, w->batched, w->used_idx);
    for (uint16_t i = 0; i < w->batched; i++)
        drop(w->order, &w->count, w->batch[i]);
    w->batched = 0;
    if (dies)
        begin(w);
}

static void mark_pages(struct input *in)
{
    uint64_t bytes = in8(in) % (LOG_PAGES / 8 + 1);
    uint8_t *bits = calloc(1, bytes ? bytes : 1);
    struct dirty_log log = {.bits = bits, .bytes = bytes};
    uint8_t how = in8(in);
    uint64_t address = (how & 1) ? in64(in) : (uint64_t)(in32(in) % (LOG_PAGES * PAGE));
    uint64_t length = (how & 2) ? in64(in) : in16(in);
    dirty_mark(&log, address, length);
    for (uint64_t page = 0; page < bytes * 8; page++) {
        uint64_t last = length == 0 || address + (length - 1) < address ? UINT64_MAX : address + (length - 1);
        bool expected = length != 0 && page >= address / PAGE && page <= last / PAGE;
        MUST(((bits[page / 8] >> (page % 8)) & 1) == expected);
    }
    free(bits);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct world w = {.num = (uint16_t)(2 + in8(&in) % (NUM_MAX - 1)), .used_idx = in16(&in)};
    w.bytes = INFLIGHT_HEADER_BYTES + (size_t)w.num * INFLIGHT_DESC_BYTES;
    w.memory = calloc(1, w.bytes);
    w.honest = in8(&in) % 2 == 0;
    if (!w.honest)
        for (size_t i = 0; i < w.bytes; i++)
            w.memory[i] = in8(&in);
    begin(&w);
    while (in.left > 0) {
        uint16_t head = (uint16_t)(in8(&in) % w.num);
        switch (in8(&in) % 8) {
        case 0:
        case 1:
        case 2:
            if (!holds(w.order, w.count, head)) {
                inflight_mark(&w.log, head);
                w.order[w.count++] = head;
            }
            break;
        case 3:
        case 4:
            if (holds(w.order, w.count, head) && !holds(w.batch, w.batched, head)) {
                inflight_push(&w.log, head);
                w.batch[w.batched++] = head;
            }
            break;
        case 5:
            publish(&w, in8(&in) % 4 == 0);
            break;
        case 6:
            if (in8(&in) % 8 == 0) {
                w.memory[in16(&in) % w.bytes] = in8(&in);
                w.honest = false;
            } else {
                begin(&w);
            }
            break;
        default:
            mark_pages(&in);
            break;
        }
    }
    free(w.memory);
    return 0;
}
