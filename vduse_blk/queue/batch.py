"""A ``Batch`` over the C core's parsed requests, without copying any of them.

``vb_queue_poll`` fills ``items``; ``admit`` puts what belongs to the batch first; after ``settle`` the ``answers`` are ready
for ``vb_queue_complete``, and ``rest`` is what single requests are made of: what was not admitted and what was left open.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from vduse_blk.block.batch import OPEN, READ, RECORD, WRITE, Batch, BatchLimits, BatchRequest, BatchTotals
from vduse_blk.core._core import ffi, lib

_ITEM: Final = struct.Struct("<HBBIQQQQQ")
assert _ITEM.size == ffi.sizeof("struct vb_item") == RECORD["itemsize"]
assert [ffi.offsetof("struct vb_item", name) for name in RECORD["names"]] == RECORD["offsets"]
assert (lib.VBLK_READ, lib.VBLK_WRITE, lib.VB_BATCH_OPEN) == (READ, WRITE, OPEN)


class Item(NamedTuple):
    """A ``struct vb_item``; ``iov`` and ``ranges`` are addresses."""

    head: int
    op: int
    fua: int
    iov_count: int
    offset: int
    length: int
    iov: int
    ranges: int
    range_count: int


class RingBatch(Batch):
    """``room`` requests at most. To be used again and again: ``begin``, then as a stack does, then ``rest``.

    Owned by the loop, but between ``begin`` and ``settle`` by whoever serves it.
    """

    def __init__(self, room: int) -> None:
        self.items = ffi.new("struct vb_item[]", room)
        self.answers = ffi.new("struct vb_done[]", room)
        self.answered = 0
        self._results = ffi.new("int32_t[]", room)
        self._limits = ffi.new("struct vb_batch_limits *")
        self._totals = ffi.new("struct vb_batch_totals *")
        self._total = 0  # in items
        self._count = 0  # of them in the batch
        self._open = 0  # of those without an answer after settle
        self._given: list[memoryview] = []
        self._results_view: memoryview | None = None

    # ------------------------------------------------------------------------------------------------- the queue

    def begin(self, count: int) -> None:
        """``items`` holds ``count`` requests, none of which may be in the batch as yet."""
        self._total, self._count, self._open, self.answered = count, 0, 0, 0

    def split(self, parts: int) -> list[RingBatch]:
        """An admitted batch as at most ``parts`` of about equal size. What was not admitted stays here."""
        shares = []
        first = 0
        for left in range(min(parts, self._count), 0, -1):
            count = -(-(self._count - first) // left)
            share = RingBatch(count)
            ffi.memmove(share.items, self.items + first, count * _ITEM.size)
            ffi.memmove(share._results, self._results + first, count * 4)
            share._total = share._count = count
            shares.append(share)
            first += count
        ffi.memmove(self.items, self.items + first, (self._total - first) * _ITEM.size)
        self.begin(self._total - first)
        return shares

    def rest(self) -> list[Item]:
        """What is to be served otherwise. Settled, or never admitted."""
        if self._open == 0 and self._total == self._count:
            return []
        data = ffi.buffer(self.items, self._total * _ITEM.size)
        items = [Item(*fields) for fields in _ITEM.iter_unpack(data)]
        return items[: self._open] + items[self._count :]

    # --------------------------------------------------------------------------------------------------- a Batch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[BatchRequest]:
        for number, item in enumerate(_ITEM.iter_unpack(self.records)):
            yield BatchRequest(number, item[1] == WRITE, bool(item[2]), item[4], item[5])

    @property
    def records(self) -> memoryview:
        view = memoryview(ffi.buffer(self.items, self._count * _ITEM.size)).toreadonly()
        self._given.append(view)
        return view

    @property
    def results(self) -> memoryview:
        if self._results_view is None:  # asked for once per request, mostly
            self._results_view = memoryview(ffi.buffer(self._results, self._count * 4)).cast("i")
            self._given.append(self._results_view)
        return self._results_view

    def memory(self, number: int) -> list[memoryview]:
        if not 0 <= number < self._count:
            raise IndexError(f"request {number} of {self._count}")
        item = self.items[number]
        views = views_of(item.iov, item.iov_count, writable=item.op == lib.VBLK_READ)
        self._given += views
        return views

    def copy(self, storage: Any, start: int = 0) -> None:
        with memoryview(storage) as view:
            memory = ffi.from_buffer("uint8_t[]", view)
            lib.vb_batch_copy(
                self.items, self._results, self._count, memory, start, view.nbytes, not view.readonly
            )
            ffi.release(memory)

    # --------------------------------------------------------------------------------------------------- a stack

    def admit(self, limits: BatchLimits) -> None:
        c = self._limits
        c.size, c.max_transfer, c.block_size = limits.size, limits.max_transfer, limits.block_size
        c.writes, c.fua = limits.writes, limits.fua
        self._count = lib.vb_batch_admit(self.items, self._results, self._total, c)

    def fail(self, error: int) -> None:
        for index in range(self._count):
            if self._results[index] == OPEN:
                self._results[index] = error

    def settle(self) -> BatchTotals:
        release(self._given)
        self._given.clear()
        self._results_view = None
        c = self._totals
        self.answered = lib.vb_batch_settle(self.items, self._results, self._count, self.answers, c)
        self._open = self._count - self.answered
        return BatchTotals(c.reads, c.read_bytes, c.writes, c.write_bytes, c.errors)


def views_of(iov: Any, count: int, *, writable: bool) -> list[memoryview]:
    """The memory of ``struct vb_iov[count]``, without a copy. To be given back with ``release``."""
    views = [memoryview(ffi.buffer(iov[i].base, iov[i].length)) for i in range(count)]
    return views if writable else [view.toreadonly() for view in views]


def release(views: list[memoryview]) -> None:
    """A backend that keeps a view beyond its request would touch another's data; make that an exception.

    What was made from a view (a slice, ctypes, numpy) is out of reach, and one that is exported at this moment cannot be
    released: then the backend has broken the contract, and nothing here protects it. The conformance kit looks for it.
    """
    for view in views:
        try:
            view.release()
        except BufferError:
            pass
