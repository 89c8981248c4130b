"""Batches do what single requests do: the C side against a model of a few lines, and a stack against its own coroutines."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.batch import OPEN, RECORD, Batch, BatchLimits
from vduse_blk.block.contract import BlockInfo, Support
from vduse_blk.block.stack import Counters, Stack
from vduse_blk.core._core import lib
from vduse_blk.queue.batch import RingBatch
from vduse_blk.testing.batch import BatchMember, make_batch, results_of

BLOCK = 512
BLOCKS = 64
STATUS = {None: lib.VBLK_S_OK, errno.EOPNOTSUPP: lib.VBLK_S_UNSUPP}

examples = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Wish:
    """A request of any kind, sound or not. ``cuts`` are where its memory is cut."""

    is_write: bool
    offset: int
    length: int
    fua: bool
    cuts: tuple[int, ...]
    seed: int

    def member(self, memory: bytearray) -> BatchMember:
        ends = [0, *sorted(min(cut, self.length) for cut in self.cuts), self.length]
        views = [memoryview(memory)[8 + a : 8 + b] for a, b in itertools.pairwise(ends)]
        return BatchMember(self.is_write, self.offset, views, self.fua)

    def memory(self) -> bytearray:
        return bytearray((self.seed + i) % 251 for i in range(self.length + 16))


blocks = st.integers(0, BLOCKS + 2).map(lambda n: n * BLOCK)
offsets = st.one_of(blocks, blocks, blocks, st.sampled_from([1, 511, 2**63, 2**64 - BLOCK, 2**64 - 1]))
lengths = st.one_of(st.integers(1, 6).map(lambda n: n * BLOCK), st.sampled_from([BLOCK, 0, 1, 513, 40 * BLOCK]))
wishes = st.builds(
    Wish,
    is_write=st.booleans(),
    offset=offsets,
    length=lengths,
    fua=st.sampled_from([False, False, True]),
    cuts=st.lists(st.integers(0, 6 * BLOCK), max_size=4).map(tuple),
    seed=st.integers(0, 250),
)


@examples
@given(
    st.lists(wishes, max_size=12),
    st.builds(
        BatchLimits,
        size=blocks,
        block_size=st.sampled_from([0, 512, 1024]),
        max_transfer=st.sampled_from([0, 1024]),
        writes=st.booleans(),
        fua=st.booleans(),
    ),
    st.tuples(blocks, st.integers(0, BLOCKS), st.booleans()),
    st.lists(st.sampled_from([None, None, 0, OPEN, errno.EIO, errno.EOPNOTSUPP, -7, 2**31 - 1]), min_size=12, max_size=12),
)
def test_c_does_what_the_words_say(
    wanted: list[Wish], limits: BatchLimits, window: tuple[int, int, bool], results: list[int | None]
) -> None:
    """admit takes exactly what is inside the limits, copy serves exactly what lies in the window and touches nothing else,
    settle answers exactly what has a result, with the sums that belong to it."""
    memories = [wish.memory() for wish in wanted]
    members = [wish.member(memory) for wish, memory in zip(wanted, memories, strict=True)]
    batch = make_batch(members)
    batch.admit(limits)
    inside = [
        i
        for i, w in enumerate(wanted)
        if limits.block_size
        and w.length
        and w.offset + w.length <= limits.size
        and w.offset % limits.block_size == w.length % limits.block_size == 0
        and (not limits.max_transfer or w.length <= limits.max_transfer)
        and (not w.is_write or (limits.writes and (limits.fua or not w.fua)))
    ]
    assert [(r.is_write, r.fua, r.offset, r.length) for r in batch] == [
        (wanted[i].is_write, wanted[i].fua, wanted[i].offset, wanted[i].length) for i in inside
    ]
    records = numpy.frombuffer(batch.records, numpy.dtype(RECORD))
    assert records["offset"].tolist() == [wanted[i].offset for i in inside]
    assert records["op"].tolist() == [int(wanted[i].is_write) for i in inside]
    del records

    start, count, is_writable = window
    storage = bytearray(i % 241 for i in range(count * BLOCK))
    expected, expected_memories = bytearray(storage), [bytearray(memory) for memory in memories]
    expected_results = []
    for i in inside:
        w = wanted[i]
        at = w.offset - start
        if at < 0 or at + w.length > len(storage) or (w.is_write and not is_writable):
            expected_results.append(OPEN)
        else:
            expected_results.append(0)
            if w.is_write:
                expected[at : at + w.length] = memories[i][8:-8]
            else:
                expected_memories[i][8:-8] = expected[at : at + w.length]
    batch.copy(storage if is_writable else memoryview(storage).toreadonly(), start)
    assert list(batch.results) == expected_results
    assert (storage, memories) == (expected, expected_memories)

    for index, (i, result) in enumerate(zip(inside, results, strict=False)):
        assert all(view.readonly == wanted[i].is_write for view in batch.memory(index))
        if result is not None:
            batch.results[index] = expected_results[index] = result
    totals = batch.settle()
    good = [i for i, result in zip(inside, expected_results, strict=True) if result == 0]
    assert (totals.reads, totals.writes) == (
        sum(not wanted[i].is_write for i in good),
        sum(wanted[i].is_write for i in good),
    )
    assert totals.read_bytes + totals.write_bytes == sum(wanted[i].length for i in good)
    answers = {i: r for i, r in zip(inside, expected_results, strict=True) if r != OPEN}
    assert totals.errors == len(answers) - len(good)
    assert results_of(batch, len(wanted)) == [
        None
        if i not in answers
        else {0: lib.VBLK_S_OK, errno.EOPNOTSUPP: lib.VBLK_S_UNSUPP}.get(answers[i], lib.VBLK_S_IOERR)
        for i in range(len(wanted))
    ]
    assert sorted(item.head for item in batch.rest()) == [i for i in range(len(wanted)) if i not in answers]


class _Moody(MemoryBackend):
    """Memory that says of itself what it is told to, and that leaves some requests open, fails some, and sometimes fails."""

    facts: dict[str, Any]
    moods: Sequence[str]

    def batch(self, batch: Batch) -> None:
        for request, mood in zip(batch, self.moods, strict=False):
            if mood == "raise":
                raise OSError(errno.ENOSPC, "full")
            if mood == "bug":
                raise ValueError("a bug")
            if mood == "leave":
                continue
            if mood == "fail":
                batch.results[request.number] = errno.EOPNOTSUPP
        if "leave" not in self.moods:
            batch.copy(self._bytes)

    async def refresh(self) -> BlockInfo:
        return BlockInfo(size=self.options.size, **self.facts)


async def _one_by_one(stack: Stack, members: Sequence[BatchMember]) -> list[int | None]:
    """The simple path, errno or None for each."""
    found: list[int | None] = []
    for member in members:
        try:
            if member.is_write:
                await stack.write(member.offset, member.segments, fua=member.fua)
            else:
                await stack.read(member.offset, member.segments)
            found.append(None)
        except OSError as error:
            found.append(error.errno)
    return found


async def _in_a_batch(stack: Stack, members: Sequence[BatchMember]) -> list[int | None]:
    """As a queue does it: a batch, then the rest one by one. errno or None for each."""
    batch = make_batch(members)
    stack.admit(batch)
    stack.serve(batch)
    stack.settle(batch)
    found: list[int | None] = list(results_of(batch, len(members)))
    for head in [item.head for item in batch.rest()]:
        [error] = await _one_by_one(stack, [members[head]])
        found[head] = STATUS.get(error, lib.VBLK_S_IOERR)
    return found


@examples
@given(
    st.lists(wishes, max_size=10, unique_by=lambda wish: wish.offset // (6 * BLOCK)),
    st.fixed_dictionaries(
        {
            "max_transfer": st.sampled_from([0, BLOCK, 4 * BLOCK]),
            "read_only": st.booleans(),
            "fua": st.sampled_from(list(Support)),
            "volatile_cache": st.booleans(),
        }
    ),
    st.sampled_from([512, 1024]),
)
def test_a_batch_is_single_requests(wanted: list[Wish], facts: dict[str, Any], block_size: int) -> None:
    """Whatever is asked, and whatever the storage says of itself: statuses, memory, storage and the stack's counters are
    those of the coroutines."""
    # Requests that touch each other have no order; single requests one after another have.
    apart = [w for i, w in enumerate(wanted) if not any(_touch(w, other) for other in wanted[:i])]

    async def run(is_batch: bool) -> tuple[list[int | None], list[bytearray], bytes, Counters]:
        backend = _Moody(_Moody.Options(size=BLOCKS * BLOCK))
        backend.facts, backend.moods = facts, ()
        stack = Stack(backend, block_size=block_size)
        await stack.open()
        try:
            backend._bytes[:] = bytes(i % 239 for i in range(BLOCKS * BLOCK))
            memories = [wish.memory() for wish in apart]
            members = [wish.member(memory) for wish, memory in zip(apart, memories, strict=True)]
            if is_batch:
                found = await _in_a_batch(stack, members)
            else:
                found = [STATUS.get(error, lib.VBLK_S_IOERR) for error in await _one_by_one(stack, members)]
            return found, memories, bytes(backend._bytes), stack.counters
        finally:
            await stack.close()

    assert asyncio.run(run(True)) == asyncio.run(run(False))


def _touch(a: Wish, b: Wish) -> bool:
    return a.offset < b.offset + b.length and b.offset < a.offset + a.length


@pytest.mark.parametrize(
    ("moods", "statuses", "counted"),
    [
        (("", "", ""), (0, 0, 0), (2, 1, 0)),
        (("", "fail", ""), (0, 2, 0), (2, 0, 1)),
        (("leave", "fail", "leave"), (0, 2, 0), (2, 0, 1)),
        (("fail", "raise", ""), (2, 1, 1), (0, 0, 3)),
        (("", "bug", ""), (1, 1, 1), (0, 0, 3)),
    ],
)
def test_errors_of_a_batch(
    moods: Sequence[str], statuses: tuple[int, ...], counted: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A result fails its request, an exception all that have none; what is left open is served; a bug is logged once."""

    async def run() -> None:
        backend = _Moody(_Moody.Options(size=BLOCKS * BLOCK))
        backend.facts, backend.moods = {}, moods
        stack = Stack(backend)
        await stack.open()
        try:
            for turn in (1, 2):
                members = [BatchMember(i == 1, i * BLOCK, [memoryview(bytearray(BLOCK))]) for i in range(3)]
                assert tuple(await _in_a_batch(stack, members)) == statuses
                counters = stack.counters
                assert (counters.reads, counters.writes, counters.errors) == tuple(turn * count for count in counted)
        finally:
            await stack.close()

    asyncio.run(run())
    assert len([record for record in caplog.records if record.exc_info]) == ("bug" in moods)


def test_a_closed_stack_admits_nothing() -> None:
    """Then every request gets the refusal of the coroutines."""
    members = [BatchMember(False, 0, [memoryview(bytearray(BLOCK))])]
    batch = make_batch(members)
    Stack(MemoryBackend(MemoryBackend.Options(size=BLOCKS * BLOCK))).admit(batch)
    assert len(batch) == 0
    assert [item.head for item in batch.rest()] == [0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("parts", [1, 2, 5, 16])
def test_split_loses_nothing(count: int, parts: int) -> None:
    """Shares are as equal as can be, hold every admitted request once, and the rest stays behind."""
    members = [BatchMember(False, i * BLOCK, [memoryview(bytearray(BLOCK))]) for i in range(count)]
    refused = BatchMember(False, 1, [memoryview(bytearray(BLOCK))])
    batch = make_batch([*members[: count // 2], refused, *members[count // 2 :]])
    batch.admit(BatchLimits(BLOCKS * BLOCK, BLOCK, 0, writes=True, fua=False))
    shares = batch.split(parts)
    assert len(shares) == min(parts, count)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [request.offset for share in shares for request in share] == [i * BLOCK for i in range(count)]
    assert [item.head for item in batch.rest()] == [count // 2]
    for share in shares:
        share.settle()
    assert sum(len(share.rest()) for share in shares) == count


def test_memory_of_no_request() -> None:
    """An index beyond the batch is an error of Python, not of memory."""
    batch = RingBatch(4)
    batch.begin(0)
    for index in (-1, 0, 4):
        with pytest.raises(IndexError):
            batch.memory(index)
