"""Where the driver's memory is in this process.

An ``IovaMap`` owns the mappings of one device and publishes immutable tables of them to the device's queues. It
has one owner thread, the *control* thread of the device (for VDUSE the thread that answers the kernel); queues only ever
see tables.

Adding is free: a queue adopts the larger table when it next looks. Removing is a hand-over: the new table is
marked "drain", each queue adopts it only with nothing in flight, and only when all have done so is the memory unmapped.
Violating that order would let an I/O in flight land in memory that is gone, or is somebody else's by then.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vduse_blk.core._core import ffi, lib

if TYPE_CHECKING:
    from vduse_blk.queue.base import Queue

READ = int(lib.IOVA_READ)
WRITE = int(lib.IOVA_WRITE)


@dataclass(frozen=True, slots=True)
class Region:
    """IOVA bytes ``start`` to ``last`` inclusive, mapped at address ``host``; ``access`` is READ | WRITE. ``pinned``: its
    pages stay the same as long as it is in a table, so queues may have the kernel hold them; they do so with one region."""

    start: int
    last: int
    host: int
    access: int
    pinned: bool = False
    owned: bool = False
    map_address: int = 0
    map_length: int = 0

    @property
    def length(self) -> int:
        return self.last - self.start + 1


@dataclass(frozen=True, slots=True)
class FdRange:
    """IOVA bytes ``start`` to ``last`` inclusive, ``offset`` bytes into the file ``fd``."""

    fd: int
    start: int
    last: int
    offset: int
    access: int


class SharedArea:
    """``size`` bytes of the file ``fd`` from ``offset``, mapped into this process for queues to write to, and guarded like
    the driver's memory. Raises OSError. The descriptor may be closed afterwards."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self.size = size
        self._region = _map(FdRange(fd, 0, size - 1, offset, READ | WRITE))
        self.view = memoryview(ffi.buffer(ffi.cast("void *", self._region.host), size))
        """The bytes themselves. Dead after ``close``."""

    def address(self, offset: int) -> int:
        """Where byte ``offset`` is in this process."""
        if not 0 <= offset < self.size:
            raise ValueError(f"{offset} of {self.size}")
        return self._region.host + offset

    def close(self) -> None:
        """Only when no queue uses it."""
        self.view.release()
        _unmap(self._region)


class IovaMap:
    """The mappings of one device. Control thread only."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._queues: list[Queue] = []
        self._generation = 0
        self._tables: list[Any] = []  # every table a queue may still look at
        self._publish(drain=False)
        if lib.mapping_guard_install() < 0:
            raise OSError(errno.EINVAL, "cannot install the SIGBUS guard")

    @property
    def regions(self) -> tuple[Region, ...]:
        """Sorted by ``start``."""
        return tuple(self._regions[start] for start in sorted(self._regions))

    @property
    def table(self) -> Any:
        """The present table, ``struct iova_table *``."""
        return self._tables[-1]

    @property
    def generation(self) -> int:
        """Of the present table; grows with every change."""
        return self._generation

    def find(self, iova: int) -> Region | None:
        """The region that holds ``iova``."""
        for region in self._regions.values():
            if region.start <= iova <= region.last:
                return region
        return None

    def overlaps(self, start: int, last: int) -> bool:
        """Whether any byte of [start, last] is mapped."""
        return any(r.start <= last and start <= r.last for r in self._regions.values())

    def add_fd(self, fd: int, *, start: int, last: int, offset: int, access: int) -> Region:
        """Map [start, last] from ``offset`` of ``fd`` (which the caller may close afterwards) and publish it.

        Raises OSError: EEXIST for an overlap, or what mmap said.
        """
        (region,) = self.change(add=[FdRange(fd, start, last, offset, access)])
        return region

    def change(self, *, add: Sequence[FdRange] = (), remove: Collection[Region] = ()) -> list[Region]:
        """Unmap some regions and map others in one step: no queue sees a state between. Returns the new ones, in order, when
        nothing in flight can touch the old ones any more.

        Raises OSError as ``add_fd`` does; then nothing has changed.
        """
        gone = {region.start for region in remove}
        kept = [region for region in self._regions.values() if region.start not in gone]
        added: list[Region] = []
        try:
            for new in add:
                self._check_free(new.start, new.last, [*kept, *added])
                added.append(_map(new))
        except BaseException:
            for region in added:
                _unmap(region)
            raise
        self._regions = {region.start: region for region in (*kept, *added)}
        self._publish(drain=bool(gone))
        if gone:
            self._wait(None)
            for region in remove:
                _unmap(region)
        return added

    def add_memory(
        self, *, start: int, last: int, host: int, access: int = READ | WRITE, pinned: bool = False
    ) -> Region:
        """Publish memory of this process at address ``host``; it stays the caller's. Raises OSError(EEXIST)."""
        self._check_free(start, last, self._regions.values())
        region = Region(start, last, host, access, pinned)
        self._regions[start] = region
        self._publish(drain=False)
        return region

    def remove(self, start: int = 0, last: int = 2**64 - 1, *, timeout: float | None = None) -> None:
        """Unmap every region that overlaps [start, last]; returns when nothing in flight can touch it.

        Raises TimeoutError (with everything still mapped) if a queue does not let go within ``timeout`` seconds.
        """
        gone = [r for r in self._regions.values() if r.start <= last and start <= r.last]
        if not gone:
            return
        for region in gone:
            del self._regions[region.start]
        self._publish(drain=True)
        try:
            self._wait(timeout)
        except TimeoutError:
            for region in gone:
                self._regions[region.start] = region
            self._publish(drain=False)
            raise
        for region in gone:
            _unmap(region)

    def close(self) -> None:
        """Unmap everything. Every queue must have been detached by then."""
        if self._queues:
            raise RuntimeError("queues still use the map")
        for region in self._regions.values():
            _unmap(region)
        self._regions.clear()
        self._publish(drain=False)
        del self._tables[:-1]

    def attach(self, queue: Queue) -> None:
        """Publish future tables to ``queue`` (it starts with the present one)."""
        self._queues.append(queue)

    def detach(self, queue: Queue) -> None:
        """The queue has stopped and looks at no table any more."""
        self._queues.remove(queue)
        if not self._queues:
            del self._tables[:-1]

    @staticmethod
    def _check_free(start: int, last: int, regions: Iterable[Region]) -> None:
        if not 0 <= start <= last < 2**64:
            raise OSError(errno.EINVAL, f"IOVA {start:#x}-{last:#x} is no range")
        if any(region.start <= last and start <= region.last for region in regions):
            raise OSError(errno.EEXIST, f"IOVA {start:#x}-{last:#x} overlaps a mapping")

    def _publish(self, *, drain: bool) -> None:
        regions = self.regions
        self._generation += 1
        table = ffi.new("struct iova_table *", {"regions": len(regions)})
        table.count = len(regions)
        table.generation = self._generation
        table.drain = int(drain)
        for slot, region in zip(table.regions, regions, strict=False):
            slot.start, slot.last, slot.host, slot.access = region.start, region.last, region.host, region.access
            slot.flags = lib.IOVA_PINNED if region.pinned else 0
        if lib.iova_table_check(table) != 0:
            raise OSError(errno.EINVAL, "inconsistent IOVA table")
        self._tables.append(table)
        oldest = self._generation
        for queue in self._queues:
            queue.set_table(table)
            oldest = min(oldest, queue.view().table_generation)
        self._tables = [known for known in self._tables if known.generation >= oldest]

    def _wait(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.0002
        for queue in self._queues:
            while queue.view().table_generation < self._generation and queue.is_running():
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"queue {queue.index} still has requests in flight")
                # A hand-over happens a few times in a device's life and ends within microseconds of its last I/O.
                time.sleep(pause)
                pause = min(pause * 2, 0.02)


def _map(new: FdRange) -> Region:
    # Huge pages of hugetlbfs are mapped and unmapped whole; st_blksize is their size there.
    page = max(os.sysconf("SC_PAGESIZE"), os.fstat(new.fd).st_blksize)
    skip = new.offset % page
    length = min((new.last - new.start + 1 + skip + page - 1) // page * page, 2**64 - 1)
    error = ffi.new("int *")
    address = lib.mapping_map(new.fd, new.offset - skip, length, int(bool(new.access & WRITE)), error)
    if not address:
        raise OSError(error[0], f"mmap of IOVA {new.start:#x}-{new.last:#x}: {os.strerror(error[0])}")
    base = int(ffi.cast("uintptr_t", address))
    return Region(new.start, new.last, base + skip, new.access, False, True, base, length)


def _unmap(region: Region) -> None:
    if region.owned:
        lib.mapping_unmap(ffi.cast("void *", region.map_address), region.map_length)
