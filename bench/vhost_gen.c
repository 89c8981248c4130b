/*
 * A load generator that is a vhost-user-blk front-end: what a virtual machine would do to an export, without the machine.
 *
 *   vhost_gen SOCKET [--queues N] [--depth D] [--size BYTES] [--seconds S] [--op read|write] [--sequential] [--poll]
 *                   [--inflight] [--rate R] [--begin T]
 *
 * One thread per queue keeps D requests of BYTES in flight on a split ring of 256 entries with indirect descriptors and
 * EVENT_IDX. A sleeping client waits for interrupts like a Linux driver; a polling one (--poll) never asks for any.
 * --inflight: the back-end notes requests in flight in memory that we keep (INFLIGHT_SHMFD). --rate: R requests per second
 * from each queue instead of as many as come back, evenly spaced, as long as no more than D are in flight; how long one takes
 * counts from when it was due. --begin: the load starts when CLOCK_MONOTONIC is T seconds, so that several generators start
 * at once; one that is not ready by then fails. Prints one JSON object. Exit status 1: a request failed, or the back-end
 * broke the protocol.
 *
 * It trusts the back-end's lengths: it measures programs on this machine, it does not defend itself against them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { RING = 256, QUEUES_MAX = 16, BUCKETS = 64 * 16, PAGE = 4096 };
enum { /* vhost-user requests */
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18, GET_CONFIG = 24, GET_INFLIGHT_FD = 31, SET_INFLIGHT_FD = 32,
};
enum { PROTOCOL_MQ = 1 << 0, PROTOCOL_CONFIG = 1 << 9, PROTOCOL_INFLIGHT = 1 << 12 };
#define F_INDIRECT (1ULL << 28)
#define F_EVENT_IDX (1ULL << 29)
#define F_PROTOCOL (1ULL << 30)
#define F_VERSION_1 (1ULL << 32)
#define F_MQ (1ULL << 12)

struct message {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
    union {
        uint64_t u64;
        struct { uint32_t index, num; } state;
        struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addr;
        struct { uint32_t count, padding; struct { uint64_t gpa, size, uva, offset; } region; } memory;
        struct { uint32_t offset, size, flags; uint8_t bytes[60]; } config;
        struct { uint64_t size, offset; uint16_t queues, entries; uint32_t padding; } inflight;
    } p;
} __attribute__((packed));

struct area { /* of one queue, in the shared memory */
    struct vring_desc desc[RING];
    struct { uint16_t flags, idx, ring[RING], used_event; } avail __attribute__((aligned(PAGE)));
    struct { uint16_t flags, idx; struct vring_used_elem ring[RING]; uint16_t avail_event; } used __attribute__((aligned(PAGE)));
    struct { struct vring_desc d[3]; struct virtio_blk_outhdr header; uint8_t status; } slot[RING] __attribute__((aligned(PAGE)));
};

struct client {
    struct area *area;
    uint8_t *data;
    int kick_fd, call_fd;
    pthread_t thread;
    unsigned index;
    uint16_t avail_idx, used_seen, kicked_at;
    uint64_t next, random;
    uint64_t started[RING]; /* ns, per slot */
    uint64_t ios, failed, interrupts, kicks, cpu_ns;
    uint64_t histogram[BUCKETS];
};

static unsigned queues = 1, depth = 32, size = 4096;
static double seconds = 3;
static bool writing, sequential, polling, inflight_log;
static unsigned rate;  /* requests per second and queue; 0 = as many as come back */
static unsigned begin; /* seconds of CLOCK_MONOTONIC */
static uint64_t capacity; /* bytes */
static uint8_t *shared;
static atomic_bool stop;
static int sock;

static void die(const char *what)
{
    fprintf(stderr, "vhost_gen: %s: %s\n", what, errno ? strerror(errno) : "protocol error");
    exit(1);
}

static uint64_t now_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the protocol ---- */

static void send_message(struct message *m, uint32_t payload, int fd)
{
    m->flags = 1;
    m->size = payload;
    struct iovec iov = {m, 12 + (size_t)payload};
    union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {.space = {0}};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        h.msg_control = &control;
        h.msg_controllen = sizeof(control);
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    }
    if (sendmsg(sock, &h, 0) != (ssize_t)(12 + payload))
        die("sendmsg");
}

static int receive(struct message *m) /* the descriptor that came with it, or -1 */
{
    struct iovec iov = {m, 12};
    union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {.space = {0}};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    int fd = -1;
    errno = 0;
    if (recvmsg(sock, &h, MSG_WAITALL | MSG_CMSG_CLOEXEC) != 12 || m->size > sizeof(m->p) || recv(sock, &m->p, m->size, MSG_WAITALL) != (ssize_t)m->size)
        die("recv");
    struct cmsghdr *c = CMSG_FIRSTHDR(&h);
    if (c != NULL && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    return fd;
}

static uint64_t ask(uint32_t request)
{
    struct message m = {.request = request};
    send_message(&m, 0, -1);
    receive(&m);
    return m.p.u64;
}

static void tell(uint32_t request, uint64_t value)
{
    struct message m = {.request = request, .p.u64 = value};
    send_message(&m, 8, -1);
}

static void tell_state(uint32_t request, uint32_t index, uint32_t num)
{
    struct message m = {.request = request, .p.state = {index, num}};
    send_message(&m, 8, -1);
}

static void connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        die("the socket's path is too long");
    strcpy(address.sun_path, path);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof(address)) < 0)
        die(path);
}

static void set_up(size_t memory_size, int memory_fd)
{
    struct message m;
    uint64_t offered = ask(GET_FEATURES), protocol;
    uint64_t wanted = F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1 | (queues > 1 ? F_MQ : 0);
    errno = 0;
    if ((offered & wanted) != wanted)
        die("the back-end lacks features");
    tell(SET_OWNER, 0);
    protocol = ask(GET_PROTOCOL_FEATURES);
    if (!(protocol & PROTOCOL_CONFIG))
        die("the back-end has no configuration space");
    if (inflight_log && !(protocol & PROTOCOL_INFLIGHT))
        die("the back-end keeps no log of requests in flight");
    tell(SET_PROTOCOL_FEATURES, protocol & (PROTOCOL_MQ | PROTOCOL_CONFIG | (inflight_log ? PROTOCOL_INFLIGHT : 0)));
    tell(SET_FEATURES, wanted);
    memset(&m, 0, sizeof(m));
    m.request = GET_CONFIG;
    m.p.config.size = 60;
    send_message(&m, 72, -1);
    receive(&m);
    memcpy(&capacity, m.p.config.bytes, 8);
    capacity *= 512;
    memset(&m, 0, sizeof(m));
    m.request = SET_MEM_TABLE;
    m.p.memory.count = 1;
    m.p.memory.region.size = memory_size;
    m.p.memory.region.uva = (uintptr_t)shared;
    send_message(&m, 40, memory_fd);
    if (inflight_log) {
        memset(&m, 0, sizeof(m));
        m.request = GET_INFLIGHT_FD;
        m.p.inflight.queues = (uint16_t)queues;
        m.p.inflight.entries = RING;
        send_message(&m, 24, -1);
        int log_fd = receive(&m);
        errno = 0;
        if (log_fd < 0 || m.p.inflight.size == 0)
            die("the back-end gives no memory for its log");
        m.request = SET_INFLIGHT_FD;
        send_message(&m, 24, log_fd);
        close(log_fd);
    }
}

static uint64_t gpa(const volatile void *p)
{
    return (uint64_t)((const volatile uint8_t *)p - shared);
}

static void set_up_queue(struct client *c)
{
    struct area *a = c->area;
    struct message m;
    tell_state(SET_VRING_NUM, c->index, RING);
    tell_state(SET_VRING_BASE, c->index, 0);
    memset(&m, 0, sizeof(m));
    m.request = SET_VRING_ADDR;
    m.p.addr.index = c->index;
    m.p.addr.desc = (uintptr_t)a->desc;
    m.p.addr.avail = (uintptr_t)&a->avail;
    m.p.addr.used = (uintptr_t)&a->used;
    send_message(&m, 40, -1);
    memset(&m, 0, sizeof(m));
    m.request = SET_VRING_CALL;
    m.p.u64 = c->index;
    send_message(&m, 8, c->call_fd);
    m.request = SET_VRING_KICK;
    m.p.u64 = c->index;
    send_message(&m, 8, c->kick_fd);
    tell_state(SET_VRING_ENABLE, c->index, 1);
    for (unsigned i = 0; i < depth; i++) {
        uint8_t *data = c->data + (size_t)i * size;
        uint16_t direction = writing ? 0 : VRING_DESC_F_WRITE;
        a->slot[i].d[0] = (struct vring_desc){gpa(&a->slot[i].header), 16, VRING_DESC_F_NEXT, 1};
        a->slot[i].d[1] = (struct vring_desc){gpa(data), size, (uint16_t)(direction | VRING_DESC_F_NEXT), 2};
        a->slot[i].d[2] = (struct vring_desc){gpa(&a->slot[i].status), 1, VRING_DESC_F_WRITE, 0};
        a->slot[i].header.type = writing ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
        a->desc[i] = (struct vring_desc){gpa(a->slot[i].d), sizeof(a->slot[i].d), VRING_DESC_F_INDIRECT, 0};
        memset(data, (int)i + 1, size);
    }
}

/* ---- the load ---- */

static unsigned bucket_of(uint64_t ns)
{
    if (ns < 16)
        return (unsigned)ns;
    unsigned log = 63 - (unsigned)__builtin_clzll(ns);
    return log * 16 + (unsigned)((ns >> (log - 4)) & 15);
}

static double bucket_us(unsigned bucket)
{
    unsigned log = bucket / 16;
    return log < 4 ? bucket / 1e3 : (double)((16ULL + bucket % 16) << (log - 4)) / 1e3;
}

static uint64_t next_sector(struct client *c)
{
    uint64_t slots = capacity / size;
    uint64_t slot;
    if (sequential) {
        slot = (slots / queues * c->index + c->next++ % (slots / queues)) % slots;
    } else {
        c->random ^= c->random << 13; /* xorshift64 */
        c->random ^= c->random >> 7;
        c->random ^= c->random << 17;
        slot = c->random % slots;
    }
    return slot * size / 512;
}

static void offer(struct client *c, uint16_t slot, uint64_t now)
{
    struct area *a = c->area;
    a->slot[slot].header.sector = next_sector(c);
    a->slot[slot].status = 0xff;
    c->started[slot] = now;
    a->avail.ring[c->avail_idx % RING] = slot;
    c->avail_idx++;
}

static void publish(struct client *c)
{
    struct area *a = c->area;
    uint16_t old = c->kicked_at;
    __atomic_store_n(&a->avail.idx, c->avail_idx, __ATOMIC_RELEASE);
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t event = __atomic_load_n(&a->used.avail_event, __ATOMIC_RELAXED);
    c->kicked_at = c->avail_idx;
    if (vring_need_event(event, c->avail_idx, old)) {
        c->kicks++;
        eventfd_write(c->kick_fd, 1);
    }
}

static void sleep_for_interrupt(struct client *c)
{
    struct area *a = c->area;
    uint64_t count;
    if (polling) {
        __builtin_ia32_pause();
        return;
    }
    __atomic_store_n(&a->avail.used_event, c->used_seen, __ATOMIC_RELAXED);
    atomic_thread_fence(memory_order_seq_cst);
    if (__atomic_load_n(&a->used.idx, __ATOMIC_ACQUIRE) != c->used_seen)
        return;
    /* Ten seconds without a completion are a hang, and worth a message instead of a benchmark that never ends. */
    struct pollfd p = {.fd = c->call_fd, .events = POLLIN};
    if (read(c->call_fd, &count, 8) < 0 && (errno != EAGAIN || poll(&p, 1, 10000) == 0))
        die("no completion");
    c->interrupts++;
}

static void *run(void *argument)
{
    struct client *c = argument;
    struct area *a = c->area;
    unsigned inflight = 0;
    uint64_t now = now_ns(CLOCK_MONOTONIC);
    for (uint16_t i = 0; i < depth; i++, inflight++)
        offer(c, i, now);
    publish(c);
    while (inflight != 0) {
        uint16_t used = __atomic_load_n(&a->used.idx, __ATOMIC_ACQUIRE);
        if (used == c->used_seen) {
            sleep_for_interrupt(c);
            continue;
        }
        now = now_ns(CLOCK_MONOTONIC);
        bool again = !atomic_load_explicit(&stop, memory_order_relaxed);
        for (; c->used_seen != used; c->used_seen++) {
            uint16_t slot = (uint16_t)a->used.ring[c->used_seen % RING].id;
            c->failed += a->slot[slot].status != 0;
            c->histogram[bucket_of(now - c->started[slot])]++;
            c->ios++;
            if (again)
                offer(c, slot, now);
            else
                inflight--;
        }
        publish(c);
    }
    c->cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
    return NULL;
}

/* As run, but a request is sent when it is due. */
static void *run_paced(void *argument)
{
    struct client *c = argument;
    struct area *a = c->area;
    uint16_t idle[RING]; /* slots */
    unsigned count = 0;
    uint64_t period = 1000000000u / rate, due = now_ns(CLOCK_MONOTONIC) + c->random % period;
    while (count < depth)
        idle[count] = (uint16_t)count, count++;
    for (;;) {
        bool again = !atomic_load_explicit(&stop, memory_order_relaxed);
        uint64_t now = now_ns(CLOCK_MONOTONIC);
        uint16_t used = __atomic_load_n(&a->used.idx, __ATOMIC_ACQUIRE);
        for (; c->used_seen != used; c->used_seen++) {
            uint16_t slot = (uint16_t)a->used.ring[c->used_seen % RING].id;
            c->failed += a->slot[slot].status != 0;
            c->histogram[bucket_of(now - c->started[slot])]++;
            c->ios++;
            idle[count++] = slot;
        }
        if (!again && count == depth)
            break;
        bool offered = false;
        for (; again && count != 0 && due <= now; due += period, offered = true)
            offer(c, idle[--count], due);
        if (offered)
            publish(c);
        __atomic_store_n(&a->avail.used_event, c->used_seen, __ATOMIC_RELAXED);
        atomic_thread_fence(memory_order_seq_cst);
        if (__atomic_load_n(&a->used.idx, __ATOMIC_ACQUIRE) != c->used_seen)
            continue;
        bool until_due = again && count != 0;
        uint64_t sleep = !until_due ? 10000000000u : due > now ? due - now : 0;
        struct timespec time = {(time_t)(sleep / 1000000000u), (long)(sleep % 1000000000u)};
        struct pollfd p = {.fd = c->call_fd, .events = POLLIN};
        if (ppoll(&p, 1, &time, NULL) > 0) {
            uint64_t events;
            c->interrupts += read(c->call_fd, &events, 8) == 8;
        } else if (!until_due) {
            die("no completion");
        }
    }
    c->cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
    return NULL;
}

static double percentile(const uint64_t *histogram, uint64_t total, double share)
{
    uint64_t seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if ((double)seen >= share * (double)total)
            return bucket_us(i);
    }
    return 0;
}

static void report(struct client *clients, double elapsed)
{
    uint64_t histogram[BUCKETS] = {0}, ios = 0, failed = 0, interrupts = 0, kicks = 0, cpu = 0;
    for (unsigned q = 0; q < queues; q++) {
        ios += clients[q].ios;
        failed += clients[q].failed;
        interrupts += clients[q].interrupts;
        kicks += clients[q].kicks;
        cpu += clients[q].cpu_ns;
        for (unsigned i = 0; i < BUCKETS; i++)
            histogram[i] += clients[q].histogram[i];
    }
    printf("{\"ios\": %llu, \"failed\": %llu, \"seconds\": %.6f, \"iops\": %.1f, \"mib_s\": %.2f, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"p999_us\": %.2f, \"interrupts\": %llu, \"kicks\": %llu, \"client_cpu_us_per_io\": %.3f}\n",
           (unsigned long long)ios, (unsigned long long)failed, elapsed, (double)ios / elapsed,
           (double)ios * size / elapsed / 1048576, percentile(histogram, ios, 0.5), percentile(histogram, ios, 0.99),
           percentile(histogram, ios, 0.999), (unsigned long long)interrupts, (unsigned long long)kicks,
           (double)cpu / 1e3 / (double)ios);
    if (failed != 0)
        exit(1);
}

static unsigned number(const char *name, const char *text, unsigned least, unsigned most)
{
    char *end;
    unsigned long value = text ? strtoul(text, &end, 10) : 0;
    if (text == NULL || *text == 0 || *end != 0 || value < least || value > most) {
        fprintf(stderr, "vhost_gen: %s: a number from %u to %u\n", name, least, most);
        exit(2);
    }
    return (unsigned)value;
}

static const char *parse(int argc, char **argv)
{
    const char *path = NULL;
    for (int i = 1; i < argc; i++) {
        const char *o = argv[i], *v = argv[i + 1]; /* argv[argc] is NULL */
        if (strcmp(o, "--queues") == 0)
            queues = number(o, v, 1, QUEUES_MAX), i++;
        else if (strcmp(o, "--depth") == 0)
            depth = number(o, v, 1, RING), i++;
        else if (strcmp(o, "--size") == 0)
            size = number(o, v, 512, 4 << 20), i++;
        else if (strcmp(o, "--seconds") == 0)
            seconds = number(o, v, 1, 600), i++;
        else if (strcmp(o, "--op") == 0 && v)
            writing = strcmp(v, "write") == 0, i++;
        else if (strcmp(o, "--sequential") == 0)
            sequential = true;
        else if (strcmp(o, "--poll") == 0)
            polling = true;
        else if (strcmp(o, "--inflight") == 0)
            inflight_log = true;
        else if (strcmp(o, "--rate") == 0)
            rate = number(o, v, 1, 1000000), i++;
        else if (strcmp(o, "--begin") == 0)
            begin = number(o, v, 1, INT32_MAX), i++;
        else if (o[0] != '-' && path == NULL)
            path = o;
        else
            path = NULL, i = argc;
    }
    if (path == NULL || size % 512 != 0 || (rate != 0 && polling)) {
        fprintf(stderr, "usage: vhost_gen SOCKET [--queues N] [--depth D] [--size BYTES] [--seconds S] [--op read|write] "
                        "[--sequential] [--poll] [--inflight] [--rate R] [--begin T]\n");
        exit(2);
    }
    return path;
}

int main(int argc, char **argv)
{
    static struct client clients[QUEUES_MAX];
    const char *path = parse(argc, argv);
    size_t areas = (sizeof(struct area) + PAGE - 1) / PAGE * PAGE * queues;
    size_t total = areas + (size_t)queues * depth * size;
    int memory_fd = memfd_create("vhost_gen", MFD_CLOEXEC);
    if (memory_fd < 0 || ftruncate(memory_fd, (off_t)total) < 0)
        die("memfd");
    shared = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory_fd, 0);
    if (shared == MAP_FAILED)
        die("mmap");
    connect_to(path);
    set_up(total, memory_fd);
    errno = 0;
    if (capacity < (uint64_t)size * queues)
        die("the disk is too small");
    for (unsigned q = 0; q < queues; q++) {
        struct client *c = &clients[q];
        c->index = q;
        c->random = 88172645463325252ULL + q + (uint64_t)getpid() * 7919; /* generators do not send all at once */
        c->area = (struct area *)(void *)(shared + areas / queues * q);
        c->data = shared + areas + (size_t)q * depth * size;
        c->kick_fd = eventfd(0, EFD_CLOEXEC);
        c->call_fd = eventfd(0, EFD_CLOEXEC);
        set_up_queue(c);
    }
    (void)ask(GET_FEATURES); /* the back-end has taken in everything before */
    for (unsigned q = 0; q < queues; q++) /* some back-ends make a shared description non-blocking; a driver sleeps */
        (void)fcntl(clients[q].call_fd, F_SETFL, fcntl(clients[q].call_fd, F_GETFL) & ~O_NONBLOCK);
    struct timespec at = {(time_t)begin, 0};
    if (begin != 0 && now_ns(CLOCK_MONOTONIC) > begin * 1000000000ULL) {
        fprintf(stderr, "vhost_gen: not ready when the load was to begin\n");
        exit(1);
    }
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR) {
    }
    uint64_t began = now_ns(CLOCK_MONOTONIC);
    for (unsigned q = 0; q < queues; q++)
        if (pthread_create(&clients[q].thread, NULL, rate != 0 ? run_paced : run, &clients[q]) != 0)
            die("pthread_create");
    struct timespec duration = {(time_t)seconds, 0};
    nanosleep(&duration, NULL);
    atomic_store(&stop, true);
    for (unsigned q = 0; q < queues; q++)
        pthread_join(clients[q].thread, NULL);
    uint64_t end = now_ns(CLOCK_MONOTONIC);
    for (unsigned q = 0; q < queues; q++) { /* so that the back-end lets go of the ring before we do */
        struct message m = {.request = GET_VRING_BASE, .p.state = {q, 0}};
        send_message(&m, 8, -1);
        receive(&m);
    }
    report(clients, (double)(end - began) / 1e9);
    return 0;
}
