/*
 * Memory that belongs to somebody else: mapping it, and surviving what happens when it is not there.
 *
 * A page of VDUSE's bounce area exists only once some request used it, and the kernel may take a whole mapping away
 * (device removed, file truncated). Touching such a page raises SIGBUS. The handler puts a private page of zeros under the
 * faulting address and counts; the queue sees the count change, answers what it touched with an error and declares itself
 * broken. So a fault costs a queue, never the process. Faults outside the guarded ranges keep their old meaning.
 *
 * Process-wide by nature: signal handlers are.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GUARDS_MAX = 4096 };

struct guard { /* start == 0: free. Written under guard_lock, read by the handler without it. */
    _Atomic uintptr_t start;
    _Atomic uintptr_t end;
};

static struct guard guards[GUARDS_MAX];
static _Atomic uint32_t guards_used; /* high-water mark */
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t faults;
static struct sigaction previous;
static uintptr_t page_size;

uint64_t mapping_faults(void)
{
    return atomic_load_explicit(&faults, memory_order_acquire);
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
    uintptr_t address = (uintptr_t)info->si_addr;
    uint32_t used = atomic_load(&guards_used);
    for (uint32_t i = 0; i < used; i++) {
        uintptr_t start = atomic_load(&guards[i].start);
        if (start == 0 || address < start || address >= atomic_load(&guards[i].end))
            continue;
        int saved = errno;
        void *page = (void *)(address & ~(page_size - 1)); /* NOLINT: an address from the kernel */
        void *got = mmap(page, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        errno = saved;
        if (got == MAP_FAILED)
            break;
        atomic_fetch_add(&faults, 1);
        return;
    }
    if ((previous.sa_flags & SA_SIGINFO) && previous.sa_sigaction) {
        previous.sa_sigaction(signal, info, context);
        return;
    }
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN && previous.sa_handler) {
        previous.sa_handler(signal);
        return;
    }
    /* Not ours: die of it, as without us. The instruction runs again and faults again. */
    struct sigaction restore = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, &restore, NULL);
}

int mapping_guard_install(void)
{
    static bool installed;
    int result = 0;
    pthread_mutex_lock(&guard_lock);
    if (!installed) {
        struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
        page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, &action, &previous) < 0)
            result = -errno;
        else
            installed = true;
    }
    pthread_mutex_unlock(&guard_lock);
    return result;
}

static bool guard_add(uintptr_t start, uintptr_t length)
{
    bool added = false;
    pthread_mutex_lock(&guard_lock);
    for (uint32_t i = 0; i < GUARDS_MAX && !added; i++) {
        if (atomic_load(&guards[i].start) != 0)
            continue;
        atomic_store(&guards[i].end, start + length);
        atomic_store(&guards[i].start, start);
        if (atomic_load(&guards_used) < i + 1)
            atomic_store(&guards_used, i + 1);
        added = true;
    }
    pthread_mutex_unlock(&guard_lock);
    return added;
}

static void guard_remove(uintptr_t start)
{
    pthread_mutex_lock(&guard_lock);
    for (uint32_t i = 0; i < atomic_load(&guards_used); i++)
        if (atomic_load(&guards[i].start) == start)
            atomic_store(&guards[i].start, 0);
    pthread_mutex_unlock(&guard_lock);
}

void *mapping_map(int fd, uint64_t offset, uint64_t length, int writable, int *error)
{
    if (length == 0 || length > PTRDIFF_MAX || offset > INT64_MAX) {
        *error = EINVAL;
        return NULL;
    }
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *address = mmap(NULL, length, protection, MAP_SHARED, fd, (off_t)offset);
    if (address == MAP_FAILED) {
        *error = errno;
        return NULL;
    }
    if (!guard_add((uintptr_t)address, length)) {
        munmap(address, length);
        *error = ENOSPC;
        return NULL;
    }
    *error = 0;
    return address;
}

void mapping_unmap(void *address, uint64_t length)
{
    guard_remove((uintptr_t)address);
    munmap(address, length);
}
