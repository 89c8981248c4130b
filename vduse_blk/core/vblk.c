/*
 * virtio-blk requests (virtio 1.3, 5.2.6). Pure.
 *
 * A chain is a stream of device-readable bytes followed by a stream of device-writable bytes; how they are cut into
 * buffers is the driver's affair. Header = the first 16 readable bytes, status = the last writable byte, data = the rest.
 *
 * vblk_parse checks everything the driver says before storage is asked; vblk_finish is the only place that writes a
 * status byte. A read that fails is zero-filled: the buffer may hold an older request's data, and Linux copies it back to
 * the reader whatever the status says.
 *
 * Not handled: SECURE_ERASE (never offered: Linux maps its range list in the wrong direction on VDUSE), zoned requests.
 */
#include "core.h"

#include <errno.h>

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { RANGE_UNMAP = 1 };

struct header {
    uint32_t type;
    uint32_t ioprio;
    uint64_t sector;
};
struct wire_range {
    uint64_t sector;
    uint32_t num_sectors;
    uint32_t flags;
};
_Static_assert(sizeof(struct header) == 16 && sizeof(struct wire_range) == 16, "wire layouts");

/* Transfers above this are refused: the kernel caps a single read or write there too (MAX_RW_COUNT). */
static const uint64_t TRANSFER_MAX = 0x7ffff000;

void vblk_set_capacity(struct vblk_rules *rules, uint64_t capacity)
{
    __atomic_store_n(&rules->capacity, capacity, __ATOMIC_RELEASE);
}

void vblk_set_writethrough(struct vblk_rules *rules, int on)
{
    __atomic_store_n(&rules->writethrough, (uint8_t)(on != 0), __ATOMIC_RELEASE);
}

enum vblk_status vblk_status_of_errno(int error)
{
    if (error == 0)
        return VBLK_S_OK;
    return error == EOPNOTSUPP ? VBLK_S_UNSUPP : VBLK_S_IOERR;
}

/*
 * Translate bytes [skip, skip+length) of the readable (or writable) stream into req->iov from piece `at` on. Returns the
 * number of pieces, VBLK_UNMAPPED with *unmapped set, or -ENOBUFS.
 */
static int gather(const struct vring_chain *chain, const struct iova_table *table, bool writable, uint64_t skip,
                  uint64_t length, struct vb_iov *out, uint32_t room, struct vring_seg *unmapped)
{
    uint32_t count = 0;
    uint16_t first = writable ? chain->readable : 0;
    uint16_t end = writable ? chain->count : chain->readable;
    for (uint16_t i = first; i < end && length != 0; i++) {
        uint64_t here = chain->segs[i].length;
        if (skip >= here) {
            skip -= here;
            continue;
        }
        here -= skip;
        if (here > length)
            here = length;
        if (chain->segs[i].iova > UINT64_MAX - skip)
            return -ENOBUFS; /* an address that wraps can never be mapped */
        uint64_t iova = chain->segs[i].iova + skip;
        uint32_t access = writable ? IOVA_WRITE : IOVA_READ;
        int pieces = iova_translate(table, iova, here, access, out + count, room - count);
        if (pieces == -EFAULT) {
            unmapped->iova = iova;
            unmapped->length = (uint32_t)here;
            unmapped->writable = writable;
            return -EFAULT;
        }
        if (pieces < 0)
            return -ENOBUFS;
        uint32_t added = (uint32_t)pieces;
        /* Neighbours in memory become one piece: fewer, larger vectors for the kernel. */
        if (count > 0 && added > 0 &&
            (uint8_t *)out[count - 1].base + out[count - 1].length == (uint8_t *)out[count].base) {
            out[count - 1].length += out[count].length;
            memmove(&out[count], &out[count + 1], (added - 1) * sizeof(*out));
            added--;
        }
        count += added;
        length -= here;
        skip = 0;
    }
    return length == 0 ? (int)count : -ENOBUFS;
}

static void copy_out(void *to, const struct vb_iov *iov, int count)
{
    uint8_t *at = to;
    for (int i = 0; i < count; i++) {
        memcpy(at, iov[i].base, iov[i].length);
        at += iov[i].length;
    }
}

static enum vblk_verdict answer(struct vblk_req *req, enum vblk_status status)
{
    req->status = (uint8_t)status;
    req->iov_count = 0;
    return VBLK_ANSWERED;
}

/* A request whose framing is wrong: counted apart, answered with an error if the status byte can be reached. */
static enum vblk_verdict malformed(struct vblk_req *req)
{
    req->op = VBLK_OTHER;
    return answer(req, VBLK_S_IOERR);
}

bool vblk_malformed(const struct vblk_req *req)
{
    return req->op == VBLK_OTHER && req->status == VBLK_S_IOERR;
}

/* Sector range -> byte range inside the disk. */
static bool in_disk(const struct vblk_rules *rules, uint64_t sector, uint64_t length)
{
    uint64_t sectors = __atomic_load_n(&rules->capacity, __ATOMIC_ACQUIRE) / VBLK_SECTOR;
    uint64_t wanted = length / VBLK_SECTOR;
    return wanted <= sectors && sector <= sectors - wanted;
}

static enum vblk_verdict parse_transfer(const struct vblk_rules *rules, const struct vring_chain *chain,
                                        const struct iova_table *table, struct vblk_req *req, uint64_t sector,
                                        uint64_t skip, uint64_t length, struct vring_seg *unmapped)
{
    bool reading = req->op == VBLK_READ;
    /* Translate first: a refused read is zero-filled like any other failed one. */
    int count = gather(chain, table, reading, skip, length, req->iov, req->iov_room, unmapped);
    if (count == -EFAULT)
        return VBLK_UNMAPPED;
    if (count < 0)
        return malformed(req);
    req->iov_count = (uint16_t)count;
    req->offset = sector * VBLK_SECTOR;
    req->length = length;
    req->status = VBLK_S_IOERR;
    if (!reading && rules->read_only)
        return VBLK_ANSWERED;
    if (length > TRANSFER_MAX || length % rules->block_size != 0 ||
        sector % (rules->block_size / VBLK_SECTOR) != 0 || !in_disk(rules, sector, length))
        return VBLK_ANSWERED;
    return length == 0 ? answer(req, VBLK_S_OK) : VBLK_SUBMIT;
}

static enum vblk_verdict parse_ranges(const struct vblk_rules *rules, const struct vring_chain *chain,
                                      const struct iova_table *table, struct vblk_req *req, uint64_t length,
                                      struct vring_seg *unmapped)
{
    bool discard = req->op == VBLK_DISCARD;
    uint32_t limit = discard ? rules->max_discard_sectors : rules->max_write_zeroes_sectors;
    if (!(discard ? rules->discard : rules->write_zeroes))
        return answer(req, VBLK_S_UNSUPP);
    if (rules->read_only)
        return answer(req, VBLK_S_IOERR);
    uint64_t wanted = length / sizeof(struct wire_range);
    if (wanted == 0 || length % sizeof(struct wire_range) != 0 || wanted > rules->max_ranges)
        return answer(req, VBLK_S_IOERR);
    struct wire_range wire[VBLK_RANGES_MAX];
    int count = gather(chain, table, false, sizeof(struct header), length, req->iov, req->iov_room, unmapped);
    if (count == -EFAULT)
        return VBLK_UNMAPPED;
    if (count < 0)
        return malformed(req);
    copy_out(wire, req->iov, count);
    __asm__ volatile("" : "+m"(wire));
    for (uint32_t i = 0; i < wanted; i++) {
        /* 5.2.6.2: unknown flags, and UNMAP on a discard, are UNSUPP. */
        if ((wire[i].flags & ~(uint32_t)RANGE_UNMAP) != 0 || (discard && wire[i].flags != 0))
            return answer(req, VBLK_S_UNSUPP);
        uint64_t bytes = (uint64_t)wire[i].num_sectors * VBLK_SECTOR;
        if (wire[i].num_sectors > limit || !in_disk(rules, wire[i].sector, bytes))
            return answer(req, VBLK_S_IOERR);
        uint64_t offset = wire[i].sector * VBLK_SECTOR;
        uint64_t end = offset + bytes; /* cannot overflow: in_disk */
        if (discard) {
            /* The alignment we announce is advisory to Linux: round inward, a discard may do less than asked. */
            uint64_t block = rules->block_size;
            offset += (block - offset % block) % block;
            end -= end % block;
            if (offset > end)
                end = offset;
        } else if (offset % rules->block_size != 0 || bytes % rules->block_size != 0) {
            return answer(req, VBLK_S_IOERR);
        }
        req->ranges[i].offset = offset;
        req->ranges[i].length = end - offset;
        req->ranges[i].unmap = discard || (wire[i].flags & RANGE_UNMAP);
        req->length += end - offset;
    }
    req->iov_count = 0;
    req->range_count = (uint32_t)wanted;
    return VBLK_SUBMIT;
}

static enum vblk_verdict parse_id(const struct vblk_rules *rules, const struct vring_chain *chain,
                                  const struct iova_table *table, struct vblk_req *req, uint64_t length,
                                  struct vring_seg *unmapped)
{
    /* 5.2.6.1: 20 bytes, padded with NULs. A shorter buffer gets what fits, a longer one zeros behind. */
    int count = gather(chain, table, true, 0, length, req->iov, req->iov_room, unmapped);
    if (count == -EFAULT)
        return VBLK_UNMAPPED;
    if (count < 0)
        return malformed(req);
    size_t done = 0;
    for (int i = 0; i < count; i++) {
        uint8_t *to = req->iov[i].base;
        size_t here = req->iov[i].length;
        size_t part = done < VBLK_SERIAL_SIZE ? VBLK_SERIAL_SIZE - done : 0;
        if (part > here)
            part = here;
        memcpy(to, rules->serial + (part ? done : 0), part);
        memset(to + part, 0, here - part);
        done += here;
    }
    return answer(req, VBLK_S_OK);
}

enum vblk_verdict vblk_parse(const struct vblk_rules *rules, const struct vring_chain *chain,
                             const struct iova_table *table, struct vblk_req *req, struct vring_seg *unmapped)
{
    uint64_t readable = 0;
    uint64_t writable = 0;
    /* Cannot overflow: at most VRING_CHAIN_MAX lengths of 32 bits. */
    for (uint16_t i = 0; i < chain->count; i++) {
        if (chain->segs[i].writable)
            writable += chain->segs[i].length;
        else
            readable += chain->segs[i].length;
    }
    req->head = chain->head;
    req->op = VBLK_OTHER;
    req->status = VBLK_S_IOERR;
    req->iov_count = 0;
    req->range_count = 0;
    req->offset = 0;
    req->length = 0;
    req->status_byte = NULL;
    req->used_length = 0;
    req->step = 0;
    req->progress = 0;
    req->phase = 0;
    req->fua = __atomic_load_n(&rules->writethrough, __ATOMIC_ACQUIRE) != 0;

    if (writable == 0)
        return malformed(req); /* nowhere to put a status */
    struct vb_iov piece[2];
    int count = gather(chain, table, true, writable - 1, 1, piece, 1, unmapped);
    if (count == -EFAULT)
        return VBLK_UNMAPPED;
    if (count != 1)
        return malformed(req);
    req->status_byte = piece[0].base;
    req->used_length = writable > UINT32_MAX ? UINT32_MAX : (uint32_t)writable;

    if (readable < sizeof(struct header))
        return malformed(req);
    struct header header;
    struct vb_iov parts[sizeof(struct header)];
    count = gather(chain, table, false, 0, sizeof(header), parts, sizeof(header), unmapped);
    if (count == -EFAULT)
        return VBLK_UNMAPPED;
    if (count < 0)
        return malformed(req);
    copy_out(&header, parts, count);
    __asm__ volatile("" : "+m"(header));

    uint64_t out_bytes = readable - sizeof(header);
    uint64_t in_bytes = writable - 1;
    switch (header.type) {
    case T_IN:
        if (out_bytes != 0)
            return malformed(req);
        req->op = VBLK_READ;
        return parse_transfer(rules, chain, table, req, header.sector, 0, in_bytes, unmapped);
    case T_OUT:
        req->op = VBLK_WRITE;
        return parse_transfer(rules, chain, table, req, header.sector, sizeof(header), out_bytes, unmapped);
    case T_FLUSH:
        req->op = VBLK_FLUSH;
        return VBLK_SUBMIT;
    case T_GET_ID:
        req->op = VBLK_GET_ID;
        return parse_id(rules, chain, table, req, in_bytes, unmapped);
    case T_DISCARD:
    case T_WRITE_ZEROES:
        req->op = header.type == T_DISCARD ? VBLK_DISCARD : VBLK_WRITE_ZEROES;
        return parse_ranges(rules, chain, table, req, out_bytes, unmapped);
    default:
        return answer(req, VBLK_S_UNSUPP);
    }
}

uint32_t vblk_finish(struct vblk_req *req, enum vblk_status status)
{
    req->status = (uint8_t)status;
    if (req->op == VBLK_READ && status != VBLK_S_OK)
        for (uint16_t i = 0; i < req->iov_count; i++)
            memset(req->iov[i].base, 0, req->iov[i].length);
    if (req->status_byte == NULL)
        return 0;
    GUEST_STORE(req->status_byte, (uint8_t)status);
    return req->used_length;
}
