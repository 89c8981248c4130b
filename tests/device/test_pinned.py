"""Pages of the driver's memory that the kernel holds for a queue: requests use them, and nothing is held that was removed.

Which way a request goes is told by memory that breaks the promise: a hole is punched into a file whose pages are held. What
goes by held pages then lands in the old ones, everything else in what has taken their place.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import BY_NAME, MIB, Disk

from vduse_blk.testing.driver import IN, OK, STALE, Buffer, FakeDriver

PLAIN = BY_NAME["native-file-direct"]
PINNED = BY_NAME["native-file-direct-pinned"]
BASE = 1 << 40
FALLOC_PUNCH = 0x03  # KEEP_SIZE | PUNCH_HOLE
CAP_IPC_LOCK = 14
DATA = bytes(range(1, 251)) * 33  # no zeros


class Memory:
    """Memory of a driver beside its ring, which others can punch holes into."""

    def __init__(self, disk: Disk, size: int = MIB, *, pinned: bool = True) -> None:
        self.fd = os.memfd_create("driver", os.MFD_CLOEXEC)
        os.truncate(self.fd, size)
        self.size = size
        self._pinned = pinned
        self._memory = mmap.mmap(self.fd, size)
        self._iova = disk.iova
        self.map()

    def map(self) -> None:
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._iova.add_memory(start=BASE, last=BASE + self.size - 1, host=host, pinned=self._pinned)

    def unmap(self) -> None:
        self._iova.remove(BASE, BASE + self.size - 1)

    def close(self) -> None:
        self.unmap()
        self._memory.close()
        os.close(self.fd)

    def punch(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(self.fd, FALLOC_PUNCH, ctypes.c_long(0), ctypes.c_long(self.size)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")

    def content(self, at: int, length: int) -> bytes:
        return os.pread(self.fd, length, at)


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    """Its driver's own memory is not held; with the parameter PINNED it is."""
    disk = Disk(getattr(request, "param", PLAIN))
    assert disk.driver.write(0, DATA[:8192]) == OK
    yield disk
    disk.close()


def read_into(disk: Disk, *pieces: tuple[int, int]) -> None:
    """Read the disk's first bytes into (offset, length) of a ``Memory``."""
    driver: FakeDriver = disk.driver
    head = driver.alloc(16)
    driver.put(head, bytes(16))
    status = Buffer(driver.alloc(1), 1, True)
    assert driver.get(status.iova, 1)[0] == STALE
    data = [Buffer(BASE + at, length, True) for at, length in pieces]
    driver.offer(driver.add_chain([Buffer(head, 16), *data, status]))
    driver.kick()
    driver.wait()
    assert driver.get(status.iova, 1)[0] == OK


def adopted(disk: Disk) -> None:
    disk.until(lambda view: view.table_generation == disk.iova.generation)


def pinned_pages() -> int:
    """KiB of pages that rings of this process hold."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmPin:")))


def test_one_piece_goes_by_held_pages(disk: Disk) -> None:
    """A request whose data is one piece, in one buffer or in several that touch, uses held pages; one in pieces apart does
    not; memory that is mapped anew is held anew."""
    memory = Memory(disk)
    adopted(disk)
    expected = disk.content(0, 4096)
    read_into(disk, (0, 4096))
    assert memory.content(0, 4096) == expected
    memory.punch()
    read_into(disk, (0, 4096))
    read_into(disk, (8192, 512), (8704, 3584))
    read_into(disk, (16384, 512), (32768, 3584))
    assert memory.content(0, 4096) == memory.content(8192, 4096) == bytes(4096)
    assert memory.content(16384, 512) + memory.content(32768, 3584) == expected
    memory.unmap()
    memory.map()
    adopted(disk)
    read_into(disk, (0, 4096))
    assert memory.content(0, 4096) == expected
    memory.close()


@pytest.mark.parametrize(
    ("disk", "pinned"), [(PLAIN, False), (PINNED, True)], indirect=["disk"], ids=["no-promise", "second"]
)
def test_other_memory_is_not_held(disk: Disk, pinned: bool) -> None:
    """Without the promise, and beside a region that is held already, a hole is no harm: what is read afterwards is there."""
    before = disk.queue.view().pinned
    assert before == (len(disk.driver.memory) if pinned else 0)
    memory = Memory(disk, pinned=pinned)
    adopted(disk)
    read_into(disk, (0, 4096))
    memory.punch()
    read_into(disk, (0, 4096))
    assert memory.content(0, 4096) == disk.content(0, 4096)
    assert disk.queue.view().pinned == before
    memory.close()


def test_what_is_removed_is_not_held_any_more(disk: Disk) -> None:
    """Memory comes and goes under load. When its removal is acknowledged the kernel holds none of it, and what was in flight
    has been answered."""
    driver = disk.driver
    before = pinned_pages()
    for turn in range(20):
        driver.reset_heap()
        memory = Memory(disk)
        adopted(disk)
        assert pinned_pages() == before + MIB // 1024
        assert disk.queue.view().pinned == MIB
        requests = [driver.request(IN, 8 * i, into=4096) for i in range(16)]
        driver.kick()
        memory.unmap()
        assert pinned_pages() == before, turn
        assert disk.queue.view().pinned == 0
        driver.run(*requests)
        assert [driver.data(request) for request in requests] == [disk.content(4096 * i, 4096) for i in range(16)]
        memory.map()
        adopted(disk)
        memory.close()
    memory = Memory(disk)
    adopted(disk)
    disk.queue.stop()
    assert pinned_pages() == before


def without_locking(work: threading.Thread, limit: int) -> None:
    """Run ``work`` while this process may lock ``limit`` bytes; it has to give its own thread's privilege up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, hard))
    try:
        work.start()
        work.join(60)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def drop_ipc_lock() -> None:
    """Of the calling thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for i in (0, 1):
        sets[i] &= ~(1 << CAP_IPC_LOCK)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def test_what_may_not_be_held_goes_the_ordinary_way() -> None:
    """Where the limit of locked memory is too low requests are served all the same; the view says why nothing is held."""
    found: list[object] = []

    def serve() -> None:
        drop_ipc_lock()
        disk = Disk(PINNED)
        try:
            found.append(disk.driver.write(8, DATA[:4096]))
            found.append(disk.driver.read(8, 4096) == (OK, DATA[:4096]))
            view = disk.queue.view()
            found.extend((view.pinned, view.pin_error))
        finally:
            disk.close()

    without_locking(threading.Thread(target=serve), 64 * 1024)
    assert found == [OK, True, 0, errno.ENOMEM]


@pytest.mark.parametrize("name", ["native-file-uring", "native-file-direct-sync", "native-tmpfs", "native-memory"])
def test_who_has_no_use_for_it_holds_nothing(name: str) -> None:
    """Files that are copied from, and engines without io_uring, hold no pages and have nothing to complain about."""
    disk = Disk(BY_NAME[name], start=False)
    try:
        disk.iova.remove()
        disk.driver.map(disk.iova, pinned=True)
        disk.start()
        assert disk.driver.write(0, DATA[:4096]) == OK
        view = disk.queue.view()
        assert (view.pinned, view.pin_error) == (0, 0)
    finally:
        disk.close()
