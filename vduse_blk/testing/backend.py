"""The conformance kit for storage: run every rule of ``block.contract`` against a backend.

``check_backend(make)`` takes a function that makes a new, unopened backend over writable storage of at least 1 MiB whose
content may be destroyed. Each check opens one, twice: bare, as the contract has it, and through a ``Stack``. Raises
AssertionError saying which rule is broken. ``CHECKS`` and ``run_check`` are for runners that want them one by one.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vduse_blk.block.batch import OPEN, BatchLimits
from vduse_blk.block.contract import Backend, BlockInfo, Support
from vduse_blk.block.native import FileTarget, MemoryTarget
from vduse_blk.block.stack import Stack
from vduse_blk.queue.batch import RingBatch
from vduse_blk.testing.batch import BatchMember, make_batch

MakeBackend = Callable[[], Backend]
MIN_SIZE: Final = 1 << 20


@dataclass(slots=True)
class Opened:
    """A disk under test. ``disk`` is the backend itself or a stack over it."""

    disk: Backend | Stack
    info: BlockInfo
    keeps_data: bool
    """Reads give what was written; without, zeros."""
    random: random.Random

    @property
    def block(self) -> int:
        return self.info.logical_block_size

    def data(self, length: int) -> bytes:
        """Random bytes."""
        return self.random.randbytes(length)

    async def read(self, offset: int, length: int) -> bytes:
        into = bytearray(length)
        await self.disk.read(offset, [memoryview(into)])
        return bytes(into)

    async def write(self, offset: int, data: bytes) -> None:
        await self.disk.write(offset, [memoryview(data)])

    async def expect(self, offset: int, data: bytes, what: str) -> None:
        """The disk holds ``data`` at ``offset``."""
        found = await self.read(offset, len(data))
        wanted = data if self.keeps_data else bytes(len(data))
        if found != wanted:
            at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            raise AssertionError(f"{what}: byte {offset + at} is {found[at]:#04x}, not {wanted[at]:#04x}")


    async def batch(self, members: Sequence[BatchMember]) -> list[int]:
        """Have the disk serve a batch of ``members``; the results, ``OPEN`` where it has left one to the coroutines."""
        disk, batch = self.disk, _WatchedBatch.of(members)
        if isinstance(disk, Stack):
            disk.admit(batch)
        else:
            batch.admit(BatchLimits(self.info.size, self.block, 0, writes=True, fua=False))
        assert len(batch) == len(members), "the kit's own batch is refused"
        serve = disk.serve if isinstance(disk, Stack) else disk.batch
        if disk.batch_threads is None:
            serve(batch)
        else:
            await disk.batch_threads.run(serve, batch)
        results = list(batch.results)
        for result in results:
            assert result == OPEN or 0 <= result < 4096, f"{result} is no result: neither OPEN, 0 nor an errno"
        if isinstance(disk, Stack):
            disk.settle(batch)
        else:
            batch.settle()
        # By the list, the loop and the call; a view of a view (numpy makes such) is one more, and no release takes it away.
        for owner in batch.owners:
            assert sys.getrefcount(owner) <= 3, "memory of a batch is kept in use after it"
        return results


class _WatchedBatch(RingBatch):
    """Remembers what memory it gave out."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.owners: list[object] = []

    @classmethod
    def of(cls, members: Sequence[BatchMember]) -> _WatchedBatch:
        plain, watched = make_batch(members), cls(len(members))
        for i in range(len(members)):
            watched.items[i] = plain.items[i]
        watched.begin(len(members))
        return watched

    def memory(self, number: int) -> list[memoryview]:
        views = super().memory(number)
        self.owners += [view.obj for view in views]
        return views


Check = Callable[[Opened], Awaitable[None]]


def check_backend(make: MakeBackend, *, keeps_data: bool = True) -> None:
    """Run all checks. ``keeps_data`` False: the storage takes writes and gives zeros."""
    for name in CHECKS:
        for through_stack in (False, True):
            run_check(make, name, through_stack=through_stack, keeps_data=keeps_data)


def run_check(make: MakeBackend, name: str, *, through_stack: bool, keeps_data: bool = True) -> None:
    """Run one of ``CHECKS`` on a loop of its own. Raises AssertionError."""
    try:
        asyncio.run(_run(make, CHECKS[name], through_stack, keeps_data))
    except AssertionError as error:
        raise AssertionError(f"{name} ({'through the stack' if through_stack else 'bare'}): {error}") from error


async def _run(make: MakeBackend, check: Check, through_stack: bool, keeps_data: bool) -> None:
    backend = make()
    disk = Stack(backend) if through_stack else backend
    descriptors, threads = _descriptors(), threading.active_count()
    info = await disk.open()
    try:
        assert info.size >= MIN_SIZE, f"the kit needs at least {MIN_SIZE} bytes, not {info.size}"
        assert not info.read_only, "the kit needs storage that can be written"
        await check(Opened(disk, info, keeps_data, random.Random(0)))
    finally:
        await disk.close()
    assert _descriptors() == descriptors, "close leaves descriptors open, or closes those of others"
    assert threading.active_count() == threads, "close leaves threads behind"


def _descriptors() -> list[tuple[str, str]]:
    result = []
    for number in os.listdir("/proc/self/fd"):
        try:
            result.append((number, os.readlink(f"/proc/self/fd/{number}")))
        except OSError:
            continue  # of the listing itself
    return sorted(result)


# ------------------------------------------------------------------------------------------------------- checks


async def _tells_the_truth(t: Opened) -> None:
    info = t.info
    assert info.size % info.logical_block_size == 0, f"size {info.size} is no multiple of {info.logical_block_size}"
    assert str(t.disk), "messages need a name: str() is empty"
    assert await t.disk.refresh() == info, "refresh differs from open though nothing has changed"


async def _reads_what_was_written(t: Opened) -> None:
    block, size = t.block, t.info.size
    for offset, length in (
        (0, block),
        (size - block, block),
        (block, 3 * block),
        (0, MIN_SIZE),
        (size - MIN_SIZE, MIN_SIZE),
        ((size // 2) // block * block, 65536),
    ):
        data = t.data(length)
        await t.write(offset, data)
        await t.expect(offset, data, f"{length} bytes at {offset}, just written")


async def _changes_only_the_range(t: Opened) -> None:
    block = t.block
    old = t.data(64 * block)
    await t.write(0, old)
    for first, count in ((1, 1), (7, 2), (20, 30), (63, 1)):
        new = t.data(count * block)
        await t.write(first * block, new)
        old = old[: first * block] + new + old[(first + count) * block :]
        await t.expect(0, old, f"around a write of blocks {first} to {first + count - 1}")


async def _takes_any_segments(t: Opened) -> None:
    """Odd lengths, odd addresses, empty ones, more than one system call takes; nothing around them is touched."""
    block = t.block
    odd = [1, 0, 511, 3 * block - 512, 17, block - 17, 0]
    for lengths in (odd, [1] * (4 * block), [block] * 5, [16] * (block // 16) * 40):
        total = sum(lengths)
        data = t.data(total)
        memory = bytearray(b"\xa5" * (total + 3 * len(lengths)))
        views, at, taken = [], 1, 0
        for length in lengths:
            memory[at : at + length] = data[taken : taken + length]
            views.append(memoryview(memory)[at : at + length])
            at, taken = at + length + 3, taken + length
        before = bytes(memory)
        await t.disk.write(block, [view.toreadonly() for view in views])
        assert bytes(memory) == before, "write changes the memory it writes from"
        await t.expect(block, data, f"{len(lengths)} segments written")
        for view in views:
            view[:] = b"\x5a" * len(view)
        await t.disk.read(block, views)
        if t.keeps_data:
            assert bytes(memory) == before, f"{len(lengths)} segments read: other bytes, or bytes beside the segments"
        else:
            assert not any(map(any, views)), "zeros are expected"


async def _zeroes(t: Opened) -> None:
    """Both kinds, small and large, leave zeros inside and nothing else outside."""
    block = t.block
    size = 1 << 19
    for unmap in (False, True):
        for offset, length in ((block, block), (4096, 8192), (3 * block, 40960 + block), (65536, 393216)):
            data = t.data(size)
            await t.write(0, data)
            try:
                await t.disk.write_zeroes(offset, length, unmap=unmap)
            except OSError as error:
                _allow_unsupported(t, error, t.info.write_zeroes)
                continue
            expected = data[:offset] + bytes(length) + data[offset + length :]
            await t.expect(0, expected, f"write_zeroes of {length} bytes at {offset}, unmap={unmap}")


async def _discards(t: Opened) -> None:
    """Neighbours stay, and the range can be written again."""
    block = t.block
    size = 1 << 19
    for offset, length in ((block, block), (4096, 8192), (3 * block, 40960 + block), (65536, 393216)):
        data = t.data(size)
        await t.write(0, data)
        try:
            await t.disk.discard(offset, length)
        except OSError as error:
            _allow_unsupported(t, error, t.info.discard)
            return
        await t.expect(0, data[:offset], f"before {length} discarded bytes at {offset}")
        await t.expect(offset + length, data[offset + length :], f"behind {length} discarded bytes at {offset}")
        await t.read(offset, length)
        await t.write(offset, data[offset : offset + length])
        await t.expect(0, data, "after writing what was discarded")


async def _flushes(t: Opened) -> None:
    """With nothing written, after writes, twice, and beside other requests."""
    await t.disk.flush()
    data = t.data(16 * t.block)
    await t.write(0, data)
    await t.disk.flush()
    await t.disk.flush()
    await asyncio.gather(t.disk.flush(), t.write(0, data), t.disk.flush(), t.read(0, len(data)))
    await t.expect(0, data, "after flushes")


async def _forces_writes(t: Opened) -> None:
    """FUA changes nothing but durability."""
    if t.info.fua is not Support.NATIVE and isinstance(t.disk, Backend):
        return
    data = t.data(8 * t.block)
    await t.disk.write(0, [memoryview(data)], fua=True)
    await t.expect(0, data, "written with fua")
    try:
        await t.disk.write_zeroes(t.block, t.block, unmap=False, fua=True)
    except OSError as error:
        _allow_unsupported(t, error, t.info.write_zeroes)
        return
    await t.expect(0, data[: t.block] + bytes(t.block) + data[2 * t.block :], "zeroes written with fua")


async def _serves_many_at_once(t: Opened) -> None:
    length = MIN_SIZE // 128
    length -= length % t.block
    pieces = [t.data(length) for _ in range(128)]

    async def one(i: int) -> None:
        for _ in range(3):
            await t.write(i * length, pieces[i])
            if i % 16 == 0:
                await t.disk.flush()
            await t.expect(i * length, pieces[i], f"piece {i} of 128 served at once")

    await asyncio.gather(*(one(i) for i in range(len(pieces))))
    await t.expect(0, b"".join(pieces), "after 128 at once")


async def _leaves_memory_alone_when_cancelled(t: Opened) -> None:
    """Once a cancelled request has ended nobody touches its memory; it did all, some or nothing of its work."""
    old, new, mark = t.data(65536), t.data(65536), b"\xa5" * 65536
    await t.write(0, old)
    buffers = [bytearray(65536) for _ in range(64)]
    tasks = [asyncio.ensure_future(t.disk.read(0, [memoryview(buffer)])) for buffer in buffers]
    tasks.append(asyncio.ensure_future(t.disk.write(0, [memoryview(new)])))
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        assert end is None or isinstance(end, asyncio.CancelledError), f"a cancelled request ends with {end!r}"
    for buffer in buffers:
        buffer[:] = mark
    await t.write(0, old)
    await t.expect(0, old, "after cancelled requests")
    assert all(buffer == mark for buffer in buffers), "a cancelled read goes on writing to its memory"


async def _serves_batches(t: Opened) -> None:
    """Reads and writes in one call, of any segments, do what the coroutines do, or are left to them; nothing beside their
    memory is touched, then or later."""
    if not t.disk.takes_batches:
        return
    block = t.block
    old = t.data(128 * block)
    await t.write(0, old)
    expected = bytearray(old)
    members: list[BatchMember] = []
    memories: list[bytearray] = []
    for i in range(32):
        length = block * t.random.choice([1, 1, 2, 4])
        memory = bytearray(t.data(length + 64))
        memories.append(memory)
        cuts = sorted(t.random.choices(range(length + 1), k=t.random.choice([0, 0, 1, 5])))
        views = [memoryview(memory)[32 + a : 32 + b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        members.append(BatchMember(i % 2 == 1, 4 * i * block, views))
    before = [bytes(memory) for memory in memories]
    results = await t.batch(members)
    for member, memory, was, result in zip(members, memories, before, results, strict=True):
        what = f"the {'write' if member.is_write else 'read'} of {member.length} bytes at {member.offset} in a batch"
        start, end = member.offset, member.offset + member.length
        assert result in (0, OPEN), f"{what}: {os.strerror(result)}"
        assert memory[:32] == was[:32], f"{what} changes memory before its own"
        assert memory[-32:] == was[-32:], f"{what} changes memory behind its own"
        if member.is_write:
            assert memory == was, f"{what} changes the memory it writes from"
            if result == OPEN:
                await t.disk.write(start, member.segments)
            expected[start:end] = was[32:-32]
        elif result == 0:
            wanted = old[start:end] if t.keeps_data else bytes(end - start)
            assert memory[32:-32] == wanted, f"{what} gives other bytes"
    await t.expect(0, bytes(expected), "after a batch of reads and writes")
    marks = [t.data(len(memory)) for memory in memories]
    for memory, mark in zip(memories, marks, strict=True):
        memory[:] = mark
    await t.write(0, old)
    await t.disk.flush()
    await t.expect(0, old, "some time after a batch")
    assert all(a == b for a, b in zip(memories, marks, strict=True)), "the memory of a batch is written after it"


async def _serves_batches_beside_others(t: Opened) -> None:
    """Several batches at once where they have threads, and coroutines beside them."""
    if not t.disk.takes_batches:
        return
    block = t.block
    data = [t.data(block) for _ in range(128)]

    async def batch(first: int) -> None:
        members = [BatchMember(True, i * block, [memoryview(bytearray(data[i]))]) for i in range(first, first + 16)]
        for member, result in zip(members, await t.batch(members), strict=True):
            if result == OPEN:
                await t.disk.write(member.offset, member.segments)

    await asyncio.gather(
        *(batch(first) for first in range(0, 96, 16)),
        *(t.write(i * block, data[i]) for i in range(96, 128)),
        t.disk.flush(),
    )
    await t.expect(0, b"".join(data), "after batches and single writes at once")


async def _is_the_same_in_c(t: Opened) -> None:
    """What C is given leads to the same bytes."""
    target = t.disk.native_target()
    if not isinstance(target, FileTarget | MemoryTarget):
        return
    data = t.data(8192)
    await t.write(4096, data)
    if isinstance(target, MemoryTarget):
        assert target.size == t.info.size, f"{target.size} bytes of memory for a disk of {t.info.size}"
        found = ctypes.string_at(target.address + 4096, len(data))
    else:
        # Another description of the same file: the one given may want aligned memory.
        fd = os.open(f"/proc/self/fd/{target.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.pread(fd, len(data), 4096)
        finally:
            os.close(fd)
    assert found == data, "the native target holds other bytes"


async def _refuses_what_is_wrong(t: Opened) -> None:
    """Through the stack: outside the disk, not aligned, negative. No backend has to check that."""
    if not isinstance(t.disk, Stack):
        return
    block, size = t.block, t.info.size
    await t.write(0, bytes(2 * block))
    for offset, length in (
        (size, block),
        (size - block, 2 * block),
        (-block, block),
        (1, block),
        (0, 1),
        (block, block - 1),
    ):
        for attempt in (
            t.read(offset, length),
            t.write(offset, b"\xff" * length),
            t.disk.discard(offset, length),
            t.disk.write_zeroes(offset, length, unmap=True),
        ):
            answer = (await asyncio.gather(attempt, return_exceptions=True))[0]
            refused = isinstance(answer, OSError) and answer.errno == errno.EINVAL
            assert refused, f"{length} bytes at {offset} are answered with {answer!r}, not with EINVAL"
    await t.expect(0, bytes(2 * block), "after refused requests")


def _allow_unsupported(t: Opened, error: OSError, support: Support) -> None:
    """EOPNOTSUPP is an answer of a backend that does not do it all by itself; a stack makes up for it."""
    if error.errno != errno.EOPNOTSUPP:
        raise error
    if isinstance(t.disk, Stack) and support is not Support.NONE:
        raise AssertionError(f"the disk says {support.name} and then: {error}")


CHECKS: Final[dict[str, Check]] = {
    "tells_the_truth": _tells_the_truth,
    "reads_what_was_written": _reads_what_was_written,
    "changes_only_the_range": _changes_only_the_range,
    "takes_any_segments": _takes_any_segments,
    "zeroes": _zeroes,
    "discards": _discards,
    "flushes": _flushes,
    "forces_writes": _forces_writes,
    "serves_many_at_once": _serves_many_at_once,
    "leaves_memory_alone_when_cancelled": _leaves_memory_alone_when_cancelled,
    "serves_batches": _serves_batches,
    "serves_batches_beside_others": _serves_batches_beside_others,
    "is_the_same_in_c": _is_the_same_in_c,
    "refuses_what_is_wrong": _refuses_what_is_wrong,
}
"""Name → one rule."""
