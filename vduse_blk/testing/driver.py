"""The driver side of a split virtqueue, in memory of this process: what a kernel or a guest would do, one step at a time.

Used by the device tests, by the fuzzers' seeds, and by anybody who writes an exporter or a queue. It can also do what no
sane driver does: every ring field is open to the test.

Pure Python has no store-load fence, so the sleeping side never trusts a single look: ``wait`` looks again every few
milliseconds. That makes it a correct driver, not a fast one.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vduse_blk.core._core import ffi
from vduse_blk.queue import IovaMap, QueueSetup
from vduse_blk.queue.iova import READ, WRITE

NEXT, WRITABLE, INDIRECT = 1, 2, 4
NO_INTERRUPT, NO_NOTIFY = 1, 1

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
STALE = 0x5A
"""What fresh buffers are filled with, status byte included: nobody may take it for an answer."""

_DESC = struct.Struct("<QIHH")
_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")


@dataclass(frozen=True)
class Buffer:
    """Part of a chain: ``length`` bytes at ``iova``."""

    iova: int
    length: int
    writable: bool = False


@dataclass
class Request:
    """A virtio-blk request on its way. ``status`` and ``used`` are None until it is completed."""

    head: int
    data: list[Buffer]
    status_iova: int
    status: int | None = None
    used: int | None = None


class FakeDriver:
    """A queue of ``num`` entries whose ring and data live in ``memory`` bytes at IOVA ``base``: of ``memory_fd``, or
    of nobody else."""

    def __init__(
        self,
        num: int = 64,
        *,
        event_idx: bool = True,
        indirect: bool = True,
        memory: int | mmap.mmap = 16 << 20,
        base: int = 0x10000000,
        memory_fd: int = -1,
    ) -> None:
        """``memory``: how many bytes, or the mapping to use, which this object closes."""
        self.num = num
        self.event_idx = event_idx
        self.indirect = indirect
        self.base = base
        self.memory = mmap.mmap(memory_fd, memory) if isinstance(memory, int) else memory
        self._view = ffi.from_buffer(self.memory)
        self._halfwords = memoryview(self.memory).cast("H")
        self.host = int(ffi.cast("uintptr_t", self._view))
        self.desc = base
        self.avail = base + 16 * num
        self.used = (self.avail + 6 + 2 * num + 4095) // 4096 * 4096
        self._heap = (self.used + 6 + 8 * num + 4095) // 4096 * 4096
        self._heap_start = self._heap
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._free = list(range(num - 1, -1, -1))
        self._chains: dict[int, list[int]] = {}
        self._requests: dict[int, Request] = {}
        self._avail_idx = 0
        self._used_seen = 0
        self._kicked_at = 0
        self.interrupts = 0
        self.kicks = 0

    def close(self) -> None:
        """Only after the device side has stopped."""
        for fd in (self.kick_fd, self.call_fd, self.event_fd):
            os.close(fd)
        ffi.release(self._view)
        self._halfwords.release()
        self.memory.close()

    # ---- memory ----

    def map(self, iova: IovaMap, *, pinned: bool = False) -> None:
        """Give the device the whole memory, readable and writable. ``pinned``: as of a Region."""
        last = self.base + len(self.memory) - 1
        iova.add_memory(start=self.base, last=last, host=self.host, access=READ | WRITE, pinned=pinned)

    def setup(self, index: int = 0, *, seg_max: int = 254, **changes: Any) -> QueueSetup:
        """What the device needs to serve the queue."""
        values: dict[str, Any] = {
            "index": index,
            "num": self.num,
            "desc": self.desc,
            "avail": self.avail,
            "used": self.used,
            "kick_fd": self.kick_fd,
            "notify_fd": self.call_fd,
            "notify_vduse": False,
            "event_fd": self.event_fd,
            "event_idx": self.event_idx,
            "indirect": self.indirect,
            "seg_max": seg_max,
        }
        return QueueSetup(**(values | changes))

    def alloc(self, length: int, align: int = 1) -> int:
        """IOVA of ``length`` fresh bytes full of STALE. Never freed; ``reset_heap`` starts over."""
        at = (self._heap + align - 1) // align * align
        if at + length > self.base + len(self.memory):
            raise MemoryError("the fake driver's memory is full")
        self._heap = at + length
        self.put(at, bytes([STALE]) * length)
        return at

    def reset_heap(self) -> None:
        """Reuse all data memory. Only with nothing in flight."""
        assert not self._requests
        self._heap = self._heap_start

    def put(self, iova: int, data: bytes) -> None:
        at = iova - self.base
        self.memory[at : at + len(data)] = data

    def get(self, iova: int, length: int) -> bytes:
        at = iova - self.base
        return self.memory[at : at + length]

    def _u16(self, iova: int) -> int:
        return self._halfwords[(iova - self.base) // 2]

    def put_u16(self, iova: int, value: int) -> None:
        """In one piece, which ``put`` does not promise: the device may see one of two bytes stored singly."""
        self._halfwords[(iova - self.base) // 2] = value & 0xFFFF

    # ---- ring ----

    def used_idx(self) -> int:
        """The used ring's index, as it is in memory."""
        return self._u16(self.used + 2)

    def reset_ring(self) -> None:
        """As after a reset of the device: an empty ring, nothing in flight."""
        self.put(self.desc, bytes(self._heap_start - self.desc))
        self._free = list(range(self.num - 1, -1, -1))
        self._chains.clear()
        self._requests.clear()
        self._avail_idx = self._used_seen = self._kicked_at = 0
        self.reset_heap()

    @property
    def free(self) -> int:
        """Descriptors not in use."""
        return len(self._free)

    def put_desc(
        self, slot: int, iova: int, length: int, flags: int, following: int = 0, *, table: int | None = None
    ) -> None:
        """Write descriptor ``slot`` of the ring, or of the indirect table at IOVA ``table``."""
        self.put((self.desc if table is None else table) + 16 * slot, _DESC.pack(iova, length, flags, following))

    def add_chain(self, buffers: Sequence[Buffer], *, indirect: bool | None = None) -> int:
        """Write a chain and return its head; the device does not see it before ``offer``."""
        if indirect is None:
            indirect = self.indirect and len(buffers) > 1
        if indirect:
            table = self.alloc(16 * len(buffers), 16)
            self._write_chain(buffers, range(len(buffers)), table)
            head = self._free.pop()
            self.put_desc(head, table, 16 * len(buffers), INDIRECT)
            self._chains[head] = [head]
            return head
        slots = [self._free.pop() for _ in buffers]
        self._write_chain(buffers, slots, None)
        self._chains[slots[0]] = slots
        return slots[0]

    def _write_chain(self, buffers: Sequence[Buffer], slots: Sequence[int], table: int | None) -> None:
        for i, buffer in enumerate(buffers):
            last = i == len(buffers) - 1
            flags = (WRITABLE if buffer.writable else 0) | (0 if last else NEXT)
            self.put_desc(slots[i], buffer.iova, buffer.length, flags, 0 if last else slots[i + 1], table=table)

    def offer(self, head: int) -> None:
        """Make a chain available (without a kick)."""
        self.put_u16(self.avail + 4 + 2 * (self._avail_idx % self.num), head)
        self._avail_idx = (self._avail_idx + 1) & 0xFFFF
        self.put_u16(self.avail + 2, self._avail_idx)

    def kick(self, *, force: bool = False) -> bool:
        """Kick if the device asked for it (or ``force``); returns whether it was done."""
        if self.event_idx:
            event = self._u16(self.used + 4 + 8 * self.num)
            wanted = (self._avail_idx - event - 1) & 0xFFFF < (self._avail_idx - self._kicked_at) & 0xFFFF
        else:
            wanted = not self._u16(self.used) & NO_NOTIFY
        self._kicked_at = self._avail_idx
        if wanted or force:
            self.kicks += 1
            os.eventfd_write(self.kick_fd, 1)
        return wanted

    def poll_used(self) -> list[tuple[int, int]]:
        """Completed (head, length) since the last call; their descriptors are free again."""
        done = []
        while self._used_seen != self._u16(self.used + 2):
            at = self.used + 4 + 8 * (self._used_seen % self.num)
            head, length = struct.unpack("<II", self.get(at, 8))
            self._used_seen = (self._used_seen + 1) & 0xFFFF
            if head not in self._chains:
                raise AssertionError(f"head {head} was completed but is not in flight")
            self._free.extend(self._chains.pop(head))
            done.append((head, length))
        if self.event_idx:
            self.put_u16(self.avail + 4 + 2 * self.num, self._used_seen)
        return done

    def wait(self, timeout: float = 10.0) -> list[tuple[int, int]]:
        """At least one completion, or TimeoutError. Sleeps on the interrupt like a driver."""
        deadline = time.monotonic() + timeout
        while not (done := self.poll_used()):
            if time.monotonic() > deadline:
                raise TimeoutError("no completion")
            if select.select([self.call_fd], [], [], 0.005)[0]:
                self.interrupts += os.eventfd_read(self.call_fd)
        return done

    # ---- virtio-blk ----

    def request(
        self,
        kind: int,
        sector: int = 0,
        *,
        out: bytes = b"",
        into: int = 0,
        pieces: int = 1,
        split_header: bool = False,
        indirect: bool | None = None,
        offer: bool = True,
    ) -> Request:
        """Build and offer a request: ``out`` bytes to the device, ``into`` bytes from it, data cut into ``pieces`` buffers.
        ``split_header`` cuts the header in two and lets the data begin in the second half's buffer."""
        header = _HEADER.pack(kind, 0, sector)
        readable: list[Buffer] = []
        if split_header:
            joined = header[5:] + out
            readable = [self._filled(header[:5]), self._filled(joined)]
        else:
            readable = [self._filled(header), *(self._filled(part) for part in _cut(out, pieces))]
        writable = [Buffer(self.alloc(length, 512), length, True) for length in _cut_length(into, pieces)]
        status = Buffer(self.alloc(1), 1, True)
        head = self.add_chain([*readable, *writable, status], indirect=indirect)
        request = Request(head, writable, status.iova)
        self._requests[head] = request
        if offer:
            self.offer(head)
        return request

    def _filled(self, data: bytes) -> Buffer:
        iova = self.alloc(len(data), 512)
        self.put(iova, data)
        return Buffer(iova, len(data))

    def collect(self, timeout: float = 10.0) -> list[Request]:
        """Wait for at least one completion; returns the requests completed."""
        finished = []
        for head, used in self.wait(timeout):
            request = self._requests.pop(head)
            request.used = used
            request.status = self.get(request.status_iova, 1)[0]
            finished.append(request)
        return finished

    def run(self, *requests: Request, timeout: float = 10.0) -> None:
        """Kick and wait until all of ``requests`` are completed."""
        self.kick()
        deadline = time.monotonic() + timeout
        while any(request.status is None for request in requests):
            self.collect(max(0.0, deadline - time.monotonic()))

    def data(self, request: Request) -> bytes:
        """What the device wrote into a request's buffers."""
        return b"".join(self.get(buffer.iova, buffer.length) for buffer in request.data)

    def read(self, sector: int, length: int, **how: Any) -> tuple[int | None, bytes]:
        """One read, start to end: (status, data)."""
        request = self.request(IN, sector, into=length, **how)
        self.run(request)
        return request.status, self.data(request)

    def write(self, sector: int, data: bytes, **how: Any) -> int | None:
        """One write, start to end: status."""
        request = self.request(OUT, sector, out=data, **how)
        self.run(request)
        return request.status

    def ranges(self, kind: int, *ranges: tuple[int, int, int], **how: Any) -> int | None:
        """One DISCARD or WRITE_ZEROES of (sector, sectors, flags) ranges: status."""
        request = self.request(kind, 0, out=b"".join(_RANGE.pack(*r) for r in ranges), **how)
        self.run(request)
        return request.status

    def flush(self) -> int | None:
        """One FLUSH: status."""
        request = self.request(FLUSH)
        self.run(request)
        return request.status

    def serial(self) -> tuple[int | None, bytes]:
        """One GET_ID: (status, the 20 bytes)."""
        request = self.request(GET_ID, into=20)
        self.run(request)
        return request.status, self.data(request)


def _cut_length(total: int, pieces: int) -> list[int]:
    """``total`` bytes in at most ``pieces`` parts, multiples of 512 but for the last."""
    if total == 0:
        return []
    step = max(512, total // pieces // 512 * 512)
    parts = [step] * (min(pieces, max(1, total // step)) - 1)
    return [*parts, total - sum(parts)]


def _cut(data: bytes, pieces: int) -> list[bytes]:
    parts = []
    for length in _cut_length(len(data), pieces):
        parts.append(data[:length])
        data = data[length:]
    return parts
