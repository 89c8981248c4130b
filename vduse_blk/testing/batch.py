"""Batches without a virtqueue, for tests of backends that take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.batch import RingBatch


@dataclass(slots=True)
class BatchMember:
    """A read or a write of the bytes from ``offset`` on, of or into ``segments``, which are writable memory either way."""

    is_write: bool
    offset: int
    segments: Sequence[memoryview]
    fua: bool = False
    kept: list[Any] = field(default_factory=list)
    """What holds the memory while C has its address."""

    @property
    def length(self) -> int:
        return sum(map(len, self.segments))


def make_batch(members: Sequence[BatchMember]) -> RingBatch:
    """A batch of all ``members``, admitted to nothing yet. Member i is the one with head i; the members must outlive it."""
    batch = RingBatch(max(1, len(members)))
    for head, (item, member) in enumerate(zip(batch.items, members, strict=False)):
        pieces = [segment for segment in member.segments if len(segment)]
        iov = ffi.new("struct vb_iov[]", len(pieces))
        member.kept[:] = [iov]
        for slot, piece in zip(iov, pieces, strict=True):
            memory = ffi.from_buffer("uint8_t[]", piece, require_writable=True)
            member.kept.append(memory)
            slot.base, slot.length = memory, len(piece)
        item.head, item.op, item.fua = head, lib.VBLK_WRITE if member.is_write else lib.VBLK_READ, member.fua
        item.offset, item.length = member.offset, member.length
        item.iov, item.iov_count = iov, len(pieces)
    batch.begin(len(members))
    return batch


def results_of(batch: RingBatch, count: int) -> list[int | None]:
    """Statuses (``vblk_status``) of the members of a settled batch; None: open, or never admitted."""
    found: list[int | None] = [None] * count
    for i in range(batch.answered):
        found[batch.answers[i].head] = batch.answers[i].status
    return found
