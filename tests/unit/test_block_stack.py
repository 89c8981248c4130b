"""The stack: every request is checked, counted, cut and emulated, whatever is below."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import inspect
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.contract import Backend, BlockInfo, PassthroughFilter, Segments, Support, TransformFilter
from vduse_blk.block.errors import UserError
from vduse_blk.block.native import MemoryTarget
from vduse_blk.block.stack import Stack
from vduse_blk.testing.backend import check_backend

_T = TypeVar("_T")
KIB = 1024


class Strict(PassthroughFilter):
    """Holds its caller to the contract and notes what it was asked; ``facts`` replace what the storage below says."""

    def __init__(self, below: Backend, **facts: Any) -> None:
        super().__init__(below, None)
        self.facts = facts
        self.asked: list[str] = []

    def _note(self, what: str, offset: int, length: int, *, limited: bool = False) -> None:
        self.asked.append(what)
        block = self.info.logical_block_size
        assert 0 <= offset <= offset + length <= self.info.size
        assert length > 0
        assert offset % block == length % block == 0
        assert not limited or not self.info.max_transfer or length <= self.info.max_transfer

    async def open(self) -> BlockInfo:
        self.info = dataclasses.replace(await super().open(), **self.facts)
        return self.info

    async def refresh(self) -> BlockInfo:
        return dataclasses.replace(await super().refresh(), **self.facts)

    async def read(self, offset: int, into: Segments) -> None:
        self._note("read", offset, sum(map(len, into)), limited=True)
        await super().read(offset, into)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        self._note("write fua" if fua else "write", offset, sum(map(len, data)), limited=True)
        assert not fua or self.info.fua is Support.NATIVE
        assert not self.info.read_only
        await super().write(offset, data, fua=fua)

    async def flush(self) -> None:
        self.asked.append("flush")
        await super().flush()

    async def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)
        assert self.info.discard is Support.NATIVE
        await super().discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        self._note("write_zeroes fua" if fua else "write_zeroes", offset, length)
        assert self.info.write_zeroes is Support.NATIVE
        assert not fua or self.info.fua is Support.NATIVE
        await super().write_zeroes(offset, length, unmap=unmap, fua=fua)


def memory(size: int = 64 * KIB) -> MemoryBackend:
    return MemoryBackend(MemoryBackend.Options(size=size))


def with_stack(backend: Backend, work: Callable[[Stack], Awaitable[_T]], **options: Any) -> _T:
    async def run() -> _T:
        stack = Stack(backend, **options)
        await stack.open()
        try:
            return await work(stack)
        finally:
            await stack.close()

    return asyncio.run(run())


async def fails(request: Awaitable[object], number: int) -> None:
    with pytest.raises(OSError, match=rf"\[Errno {number}\]"):
        await request


SUPPORT = st.sampled_from(list(Support))
SIZE = 16 * KIB


class Model(RuleBasedStateMachine):
    """A stack over memory behaves as a bytearray does, whatever the storage below can do by itself and however small
    the pieces it takes. ``known`` marks what no discard has made undefined."""

    @initialize(
        block=st.sampled_from([512, 4096]),
        pieces=st.sampled_from([0, 1, 3]),
        fua=SUPPORT,
        discard=SUPPORT,
        write_zeroes=SUPPORT,
        volatile=st.booleans(),
    )
    def start(self, block: int, pieces: int, fua: Support, discard: Support, write_zeroes: Support, volatile: bool) -> None:
        self.block = block
        self.strict = Strict(
            memory(SIZE),
            logical_block_size=block,
            max_transfer=pieces * block,
            fua=fua,
            discard=discard,
            write_zeroes=write_zeroes,
            volatile_cache=volatile,
        )
        self.stack = Stack(self.strict)
        self.runner = asyncio.Runner()
        self.runner.run(self.stack.open())
        self.model = bytearray(SIZE)
        self.known = bytearray(b"\1" * SIZE)
        self.errors = 0

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.stack.close())
            self.runner.close()

    def _segments(self, memory: bytearray, cuts: list[int]) -> list[memoryview]:
        """All of ``memory`` in pieces cut anywhere."""
        edges = [0, *sorted(cut % (len(memory) + 1) for cut in cuts), len(memory)]
        return [memoryview(memory)[a:b] for a, b in itertools.pairwise(edges)]

    def _expected_error(self, offset: int, length: int) -> int | None:
        if offset + length > SIZE or offset % self.block or length % self.block:
            return errno.EINVAL
        return None

    def _run(self, request: Awaitable[None], expected: int | None) -> bool:
        found = None
        try:
            self.runner.run(_await(request))
        except OSError as error:
            found = error.errno
            self.errors += 1
        assert found == expected
        return found is None

    ranges = st.tuples(st.integers(0, 34), st.integers(0, 34), st.sampled_from([0, 0, 0, 0, 1, 17]))
    cuts = st.lists(st.integers(0, SIZE), max_size=5)

    @rule(where=ranges, cuts=cuts)
    def read(self, where: tuple[int, int, int], cuts: list[int]) -> None:
        offset, length = where[0] * 512 + where[2], where[1] * 512
        into = bytearray(b"\xa5" * length)
        if self._run(self.stack.read(offset, self._segments(into, cuts)), self._expected_error(offset, length)):
            for i in range(length):
                if self.known[offset + i]:
                    assert into[i] == self.model[offset + i]
            self.model[offset : offset + length] = into
            self.known[offset : offset + length] = b"\1" * length

    @rule(where=ranges, cuts=cuts, fill=st.binary(min_size=1, max_size=9), fua=st.booleans())
    def write(self, where: tuple[int, int, int], cuts: list[int], fill: bytes, fua: bool) -> None:
        offset, length = where[0] * 512 + where[2], where[1] * 512
        data = bytearray((fill * length)[:length])
        expected = self._expected_error(offset, length)
        if expected is None and fua and self.strict.info.fua is Support.NONE:
            expected = errno.EOPNOTSUPP
        asked = len(self.strict.asked)
        segments = [view.toreadonly() for view in self._segments(data, cuts)]
        if self._run(self.stack.write(offset, segments, fua=fua), expected):
            self.model[offset : offset + length] = data
            self.known[offset : offset + length] = b"\1" * length
            self._check_durable(fua, self.strict.asked[asked:])

    @rule(where=ranges, unmap=st.booleans(), fua=st.booleans())
    def write_zeroes(self, where: tuple[int, int, int], unmap: bool, fua: bool) -> None:
        offset, length = where[0] * 512 + where[2], where[1] * 512
        expected = self._expected_error(offset, length)
        info = self.strict.info
        if expected is None and (info.write_zeroes is Support.NONE or (fua and info.fua is Support.NONE)):
            expected = errno.EOPNOTSUPP
        asked = len(self.strict.asked)
        if self._run(self.stack.write_zeroes(offset, length, unmap=unmap, fua=fua), expected):
            self.model[offset : offset + length] = bytes(length)
            self.known[offset : offset + length] = b"\1" * length
            self._check_durable(fua, self.strict.asked[asked:])

    def _check_durable(self, fua: bool, asked: list[str]) -> None:
        """A forced write is either forced below in every piece, or followed by a flush of a volatile cache."""
        if fua and self.strict.info.fua is Support.EMULATE:
            assert ("flush" in asked[-1:]) is self.strict.info.volatile_cache
        elif fua:
            assert all(what.endswith(" fua") for what in asked)

    @rule(where=ranges)
    def discard(self, where: tuple[int, int, int]) -> None:
        offset, length = where[0] * 512 + where[2], where[1] * 512
        expected = self._expected_error(offset, length)
        if expected is None and self.strict.info.discard is Support.NONE:
            expected = errno.EOPNOTSUPP
        if self._run(self.stack.discard(offset, length), expected):
            self.known[offset : offset + length] = bytes(length)

    @rule()
    def flush(self) -> None:
        asked = len(self.strict.asked)
        assert self._run(self.stack.flush(), None)
        assert (self.strict.asked[asked:] == ["flush"]) is self.strict.info.volatile_cache

    @invariant()
    @precondition(lambda self: hasattr(self, "stack"))
    def failures_are_counted(self) -> None:
        assert self.stack.counters.errors == self.errors


async def _await(request: Awaitable[None]) -> None:
    await request


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class TestBugs:
    """A backend that breaks the contract costs requests, never the disk."""

    class Buggy(MemoryBackend):
        async def read(self, offset: int, into: Segments) -> None:
            raise ValueError(f"at {offset}")

        async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
            raise KeyError(offset)

    def test_an_exception_that_must_not_be_becomes_an_io_error(self, caplog: pytest.LogCaptureFixture) -> None:
        """With its traceback in the log, once per kind and operation."""
        buffer = bytearray(512)

        async def work(stack: Stack) -> None:
            for _ in range(3):
                await fails(stack.read(0, [memoryview(buffer)]), errno.EIO)
            for _ in range(3):
                await fails(stack.write(0, [memoryview(buffer)]), errno.EIO)
            await stack.flush()
            assert stack.counters.errors == 6

        with caplog.at_level(logging.ERROR):
            with_stack(self.Buggy(MemoryBackend.Options(size=4096)), work)
        assert [record.exc_info is not None and record.exc_info[0] for record in caplog.records] == [ValueError, KeyError]
        assert "read failed in a way it must not" in caplog.text

    def test_only_a_user_is_told_a_users_error(self, caplog: pytest.LogCaptureFixture) -> None:
        """resize and refresh have somebody who reads its sentence; to a guest it is an I/O error as any bug."""

        async def refuse(*_: object, **__: object) -> None:
            raise UserError("the quota is used up")

        async def work(stack: Stack) -> None:
            data = [memoryview(bytearray(512))]
            await fails(stack.read(0, data), errno.EIO)
            await fails(stack.write(0, data), errno.EIO)
            await fails(stack.flush(), errno.EIO)
            await fails(stack.discard(0, 512), errno.EIO)
            await fails(stack.write_zeroes(0, 512, unmap=False), errno.EIO)
            for asked in (stack.resize(8192), stack.refresh()):
                with pytest.raises(UserError, match="quota"):
                    await asked
            assert stack.counters.errors == 5

        backend = Strict(memory(4096), volatile_cache=True, discard=Support.NATIVE, write_zeroes=Support.NATIVE)
        opened = backend.open

        async def open_and_then_refuse() -> BlockInfo:
            info = await opened()
            for name in ("read", "write", "flush", "discard", "write_zeroes", "resize", "refresh"):
                setattr(backend, name, refuse)
            return info

        backend.open = open_and_then_refuse  # type: ignore[method-assign]
        with caplog.at_level(logging.ERROR):
            with_stack(backend, work)
        assert "read failed in a way it must not" in caplog.text

    def test_a_cancellation_passes_through(self) -> None:
        """It is no bug and no I/O error."""

        class Slow(MemoryBackend):
            async def read(self, offset: int, into: Segments) -> None:
                await asyncio.get_running_loop().create_future()

        async def work(stack: Stack) -> None:
            task = asyncio.ensure_future(stack.read(0, [memoryview(bytearray(512))]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        with_stack(Slow(MemoryBackend.Options(size=4096)), work)

    def test_a_failed_open_is_an_error_for_the_user(self) -> None:
        class Broken(MemoryBackend):
            async def open(self) -> BlockInfo:
                raise OSError(errno.EHOSTUNREACH, "No route to host")

        with pytest.raises(UserError, match=r"cannot be opened: No route to host") as caught:
            asyncio.run(Stack(Broken(MemoryBackend.Options(size=4096))).open())
        assert caught.value.exit_code == 1


class TestEmulation:
    def test_zeros_are_written_where_the_storage_turns_out_not_to_know_how(self) -> None:
        """A backend may say NATIVE and find out later."""

        class Refuses(Strict):
            async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
                raise OSError(errno.EOPNOTSUPP, "not here")

        size = 4 << 20
        backend = Refuses(memory(size), max_transfer=256 * KIB)

        async def work(stack: Stack) -> None:
            await stack.write(0, [memoryview(b"x" * size)])
            await stack.write_zeroes(512, size - 1024, unmap=True)
            into = bytearray(size)
            await stack.read(0, [memoryview(into)])
            assert into == b"x" * 512 + bytes(size - 1024) + b"x" * 512
            assert stack.counters.errors == 0
            assert stack.counters.write_zeroes_bytes == size - 1024

        with_stack(backend, work)

    def test_other_errors_of_write_zeroes_are_errors(self) -> None:
        class Fails(Strict):
            async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
                raise OSError(errno.ENOSPC, "full")

        backend = Fails(memory())

        async def work(stack: Stack) -> None:
            await fails(stack.write_zeroes(0, 4096, unmap=False), errno.ENOSPC)
            assert "write" not in backend.asked

        with_stack(backend, work)

    def test_a_discard_that_is_emulated_is_ignored(self) -> None:
        backend = Strict(memory(), discard=Support.EMULATE)

        async def work(stack: Stack) -> None:
            await stack.discard(0, 4096)
            assert backend.asked == []
            assert stack.info.discard is Support.EMULATE

        with_stack(backend, work)


class TestPresentation:
    def test_the_disk_is_what_the_options_make_of_the_storage(self) -> None:
        async def work(stack: Stack) -> None:
            info = stack.info
            assert (info.logical_block_size, info.physical_block_size, info.serial) == (4096, 4096, "S1")
            assert (info.read_only, info.volatile_cache, info.max_transfer) == (True, False, 0)
            for request in (
                stack.write(0, [memoryview(bytes(4096))]),
                stack.discard(0, 4096),
                stack.write_zeroes(0, 4096, unmap=True),
            ):
                await fails(request, errno.EROFS)
            await fails(stack.read(512, [memoryview(bytearray(4096))]), errno.EINVAL)

        with_stack(Strict(memory(), volatile_cache=True), work, block_size=4096, serial="S1", read_only=True)

    @pytest.mark.parametrize(
        ("size", "block", "says"),
        [
            (4608, 4096, "4608 bytes, no multiple of the block size 4096; the next size is 8192, a block size of 512 fits$"),
            (512, 4096, "has 512 bytes, less than one block of 4096; the next size is 4096, a block size of 512 fits$"),
            (0, None, "is empty"),
        ],
    )
    def test_a_size_that_makes_no_disk_is_refused(self, size: int, block: int | None, says: str) -> None:
        """And the storage is closed again."""
        backend = Strict(memory(8192), size=size)
        with pytest.raises(UserError, match=says):
            asyncio.run(Stack(backend, block_size=block).open())
        below = backend.below
        assert isinstance(below, MemoryBackend)
        with pytest.raises(ValueError, match="released"):
            below._bytes[0]

    def test_counters_tell_what_was_done(self) -> None:
        async def work(stack: Stack) -> None:
            await stack.write(0, [memoryview(bytes(1024)), memoryview(bytes(1024))])
            await stack.read(0, [memoryview(bytearray(512))])
            await stack.read(0, [memoryview(bytearray(512))])
            await stack.flush()
            await stack.discard(0, 4096)
            await stack.write_zeroes(0, 8192, unmap=False)
            await fails(stack.read(0, [memoryview(bytearray(1))]), errno.EINVAL)
            assert dataclasses.asdict(stack.counters) == {
                "reads": 2, "writes": 1, "flushes": 1, "discards": 1, "write_zeroes": 1, "read_bytes": 1024,
                "write_bytes": 2048, "discard_bytes": 4096, "write_zeroes_bytes": 8192, "errors": 1,
            }  # fmt: skip

        with_stack(memory(), work)

    def test_a_closed_stack_answers_with_errors(self) -> None:
        async def run() -> None:
            stack = Stack(memory())
            await fails(stack.read(0, [memoryview(bytearray(512))]), errno.EBADF)
            await stack.open()
            target = stack.native_target()
            assert isinstance(target, MemoryTarget)
            await stack.close()
            await stack.close()
            await stack.abandon()
            for request in (stack.read(0, [memoryview(bytearray(512))]), stack.flush(), stack.refresh(), stack.resize(512)):
                await fails(request, errno.EBADF)
            with pytest.raises(OSError, match="is not open"):
                stack.native_target()

        asyncio.run(run())

    @pytest.mark.parametrize(
        "wrong",
        [
            {"size": -1},
            {"logical_block_size": 256},
            {"logical_block_size": 1000},
            {"max_transfer": 100},
            {"max_transfer": -512},
        ],
    )
    def test_impossible_facts_are_a_bug(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(BlockInfo(size=4096), **wrong)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 3000), max_size=12), st.integers(1, 6))
def test_long_requests_are_cut_without_losing_a_byte(lengths: list[int], limit: int) -> None:
    """Whatever the segments are; every piece but the last is as long as the storage takes."""
    lengths.append(-sum(lengths) % 512)
    total = sum(lengths)
    seen: list[tuple[int, int]] = []

    class Noting(Strict):
        async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
            seen.append((offset, sum(map(len, data))))
            await super().write(offset, data, fua=fua)

    source = bytearray(i * 7 % 251 for i in range(total))
    views, at = [], 0
    for length in lengths:
        views.append(memoryview(source)[at : at + length])
        at += length

    async def work(stack: Stack) -> None:
        await stack.write(1024, views)
        into = bytearray(total)
        await stack.read(1024, [memoryview(into)])
        assert into == source

    with_stack(Noting(memory(), max_transfer=limit * 512), work)
    assert seen == [(1024 + at, min(limit * 512, total - at)) for at in range(0, total, limit * 512)]


class TestFilters:
    def test_a_passthrough_filter_keeps_every_rule(self) -> None:
        check_backend(lambda: PassthroughFilter(memory(1 << 20), None))

    def test_a_passthrough_filter_is_never_native(self) -> None:
        """C would go past it."""

        async def work(stack: Stack) -> None:
            assert stack.native_target() is None
            with pytest.raises(UserError, match="is given when it is attached"):
                await stack.resize(128 * KIB)

        with_stack(PassthroughFilter(memory(), None), work)

    def test_a_transform_that_forgets_an_operation_cannot_be_made(self) -> None:
        """Every operation of the contract is abstract in it, those with a default included."""
        operations = {
            name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")
        }
        assert TransformFilter.__abstractmethods__ == operations - {"batch"}

        class Forgetful(TransformFilter):
            async def read(self, offset: int, into: Segments) -> None: ...

        with pytest.raises(TypeError, match="abstract"):
            Forgetful(memory(), None)  # type: ignore[abstract]

    def test_a_passthrough_filter_hands_every_operation_down(self) -> None:
        """When the contract grows, so must this filter."""
        operations = {
            name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")
        }
        assert operations - {"native_target", "batch"} <= vars(PassthroughFilter).keys()
