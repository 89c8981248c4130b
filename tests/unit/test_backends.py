"""file, memory and null: the conformance kit over each, and what each promises beyond the contract."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy
import pytest

from vduse_blk.backends import file as file_module
from vduse_blk.backends.file import FileBackend
from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.backends.null import NullBackend
from vduse_blk.block.batch import OPEN, Batch
from vduse_blk.block.contract import Backend, Support
from vduse_blk.block.errors import UserError
from vduse_blk.block.native import FileTarget
from vduse_blk.block.stack import Stack
from vduse_blk.testing.backend import CHECKS, check_backend, run_check

MIB = 1 << 20
_T = TypeVar("_T")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of who waits set this back."""
    monkeypatch.setattr(file_module, "_PATIENCE", 0.0)


def image(path: Path, size: int = 2 * MIB) -> Path:
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


def file(path: Path | str, **options: Any) -> FileBackend:
    return FileBackend(FileBackend.Options(path=str(path), **options))


def with_stack(backend: Backend, work: Callable[[Stack], Awaitable[_T]], **options: Any) -> _T:
    """Open a stack, do ``work``, close it."""

    async def run() -> _T:
        stack = Stack(backend, **options)
        await stack.open()
        try:
            return await work(stack)
        finally:
            await stack.close()

    return asyncio.run(run())


def refusal(backend: Backend, **options: Any) -> UserError:
    """What ``open`` says no with; nothing stays open."""

    async def nothing(stack: Stack) -> None: ...

    before = os.listdir("/proc/self/fd")
    with pytest.raises(UserError) as caught:
        with_stack(backend, nothing, **options)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    return caught.value


def refusal_of_loser(backend: FileBackend) -> UserError:
    with pytest.raises(UserError) as caught:
        asyncio.run(backend.open())
    return caught.value


async def read(stack: Stack, offset: int, length: int) -> bytes:
    into = bytearray(length)
    await stack.read(offset, [memoryview(into)])
    return bytes(into)


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A directory on tmpfs, which has no ZERO_RANGE."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """A loop device over ``path``; skips where there are none."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("losetup") is None:
        pytest.skip("loop devices need root, /dev/loop-control and losetup")
    done = subprocess.run(["losetup", "-f", "--show", *options, path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


# ------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("through_stack", [False, True], ids=["bare", "stack"])
@pytest.mark.parametrize("check", CHECKS)
class TestConformance:
    """Every backend keeps every rule, by itself and behind the stack."""

    def test_file(self, check: str, through_stack: bool, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")
        run_check(lambda: file(path), check, through_stack=through_stack)

    def test_file_direct(self, check: str, through_stack: bool, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")
        run_check(lambda: file(path, direct=True), check, through_stack=through_stack)

    def test_file_sync(self, check: str, through_stack: bool, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")
        run_check(lambda: file(path, sync=True), check, through_stack=through_stack)

    def test_file_without_zero_range(self, check: str, through_stack: bool, tmpfs: Path) -> None:
        path = image(tmpfs / "disk.img")
        run_check(lambda: file(path), check, through_stack=through_stack)

    def test_memory(self, check: str, through_stack: bool) -> None:
        run_check(lambda: MemoryBackend(MemoryBackend.Options(size=2 * MIB)), check, through_stack=through_stack)

    def test_null(self, check: str, through_stack: bool) -> None:
        make = lambda: NullBackend(NullBackend.Options(size=2 * MIB))  # noqa: E731
        run_check(make, check, through_stack=through_stack, keeps_data=False)


@pytest.mark.parametrize("options", [{}, {"direct": True}], ids=["buffered", "direct"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device_keeps_every_rule(sector: int, options: dict[str, bool], tmp_path: Path) -> None:
    """Also one of 4096-byte sectors."""
    with loop_device(image(tmp_path / "disk.img"), "--sector-size", str(sector)) as device:
        check_backend(lambda: file(device, **options))


class TestKit:
    """The kit notices what it is there to notice."""

    @pytest.mark.parametrize(
        ("broken", "check"),
        [
            ("short_read", "reads_what_was_written"),
            ("first_segment_only", "takes_any_segments"),
            ("write_too_far", "changes_only_the_range"),
            ("ones_for_zeros", "zeroes"),
            ("late_read", "leaves_memory_alone_when_cancelled"),
            ("leak", "flushes"),
            ("wrong_size", "tells_the_truth"),
            ("discard_too_much", "discards"),
            ("batch_reads_short", "serves_batches"),
            ("batch_writes_nothing", "serves_batches"),
            ("batch_keeps_memory", "serves_batches"),
            ("batch_writes_late", "serves_batches"),
            ("batch_invents_results", "serves_batches"),
        ],
    )
    def test_a_broken_rule_is_found(self, broken: str, check: str) -> None:
        """Each way of being broken fails the check of its rule, bare and through the stack."""
        for through_stack in (False, True):
            with pytest.raises(AssertionError, match=check):
                run_check(lambda: _BROKEN[broken](MemoryBackend.Options(size=2 * MIB)), check, through_stack=through_stack)

    def test_a_sound_backend_passes_whole(self) -> None:
        check_backend(lambda: MemoryBackend(MemoryBackend.Options(size=MIB)))


class _ShortRead(MemoryBackend):
    async def read(self, offset: int, into: Any) -> None:
        await super().read(offset, [view[: max(0, len(view) - 1)] for view in into])


class _FirstSegmentOnly(MemoryBackend):
    async def write(self, offset: int, data: Any, *, fua: bool = False) -> None:
        await super().write(offset, data[:1])


class _WriteTooFar(MemoryBackend):
    async def write(self, offset: int, data: Any, *, fua: bool = False) -> None:
        await super().write(offset, [*data, memoryview(b"\xff")] if offset + sum(map(len, data)) < MIB else data)


class _OnesForZeros(MemoryBackend):
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        await self.write(offset, [memoryview(b"\1" * length)])


class _LateRead(MemoryBackend):
    """Copies after its coroutine has ended."""

    async def read(self, offset: int, into: Any) -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def copy() -> None:
            self.late = asyncio.ensure_future(MemoryBackend.read(self, offset, into))
            if not done.done():
                done.set_result(None)

        loop.call_later(0, loop.call_soon, loop.call_soon, copy)
        await done
        await asyncio.sleep(0)


class _Leak(MemoryBackend):
    async def open(self) -> Any:
        os.open(os.devnull, os.O_RDONLY)
        return await super().open()


class _WrongSize(MemoryBackend):
    async def refresh(self) -> Any:
        self.told = getattr(self, "told", 0) + 1
        info = await super().refresh()
        return info if self.told == 1 else type(info)(size=info.size + 512)


class _DiscardTooMuch(MemoryBackend):
    async def discard(self, offset: int, length: int) -> None:
        await super().discard(offset, length + 1)


class _BatchReadsShort(MemoryBackend):
    def batch(self, batch: Batch) -> None:
        for request in batch:
            if not request.is_write:
                view = batch.memory(request.number)[0]
                view[:-1] = self._bytes[request.offset : request.offset + len(view) - 1]
                batch.results[request.number] = 0


class _BatchWritesNothing(MemoryBackend):
    def batch(self, batch: Batch) -> None:
        for request in batch:
            batch.results[request.number] = OPEN if not request.is_write else 0


class _BatchKeepsMemory(MemoryBackend):
    def batch(self, batch: Batch) -> None:
        self.kept = numpy.frombuffer(batch.memory(0)[0], "u1")
        batch.copy(self._bytes)

    async def close(self) -> None:
        del self.kept
        await super().close()


class _BatchWritesLate(MemoryBackend):
    """Through an address, which no release takes away."""

    def batch(self, batch: Batch) -> None:
        batch.copy(self._bytes)
        for request in batch:
            if not request.is_write and not hasattr(self, "late"):
                self.late = ctypes.addressof(ctypes.c_char.from_buffer(batch.memory(request.number)[0]))

    async def flush(self) -> None:
        if hasattr(self, "late"):
            ctypes.memset(self.late, 0, 8)

    async def refresh(self) -> Any:
        return dataclasses.replace(await super().refresh(), volatile_cache=True)


class _BatchInventsResults(MemoryBackend):
    def batch(self, batch: Batch) -> None:
        batch.copy(self._bytes)
        batch.results[0] = -5


_BROKEN: dict[str, type[MemoryBackend]] = {
    "batch_reads_short": _BatchReadsShort,
    "batch_writes_nothing": _BatchWritesNothing,
    "batch_keeps_memory": _BatchKeepsMemory,
    "batch_writes_late": _BatchWritesLate,
    "batch_invents_results": _BatchInventsResults,
    "short_read": _ShortRead,
    "first_segment_only": _FirstSegmentOnly,
    "write_too_far": _WriteTooFar,
    "ones_for_zeros": _OnesForZeros,
    "late_read": _LateRead,
    "leak": _Leak,
    "wrong_size": _WrongSize,
    "discard_too_much": _DiscardTooMuch,
}


# -------------------------------------------------------------------------------------------------------- file


class TestFileOpen:
    def test_a_missing_file_is_created_sparse(self, tmp_path: Path) -> None:
        """With a size; readable by its owner only; it takes no space."""
        path = tmp_path / "new.img"

        async def look(stack: Stack) -> None:
            assert stack.info.size == 1 << 30

        with_stack(file(path, size=1 << 30), look)
        found = path.stat()
        assert (found.st_size, stat.S_IMODE(found.st_mode)) == (1 << 30, 0o600)
        assert found.st_blocks * 512 < MIB

    def test_an_empty_file_gets_the_size(self, tmp_path: Path) -> None:
        """It is what a creation that was killed halfway leaves."""
        path = image(tmp_path / "new.img", 0)

        async def look(stack: Stack) -> int:
            return stack.info.size

        assert with_stack(file(path, size=MIB), look) == MIB

    def test_a_created_file_goes_when_the_start_fails(self, tmp_path: Path) -> None:
        """Whatever fails after the creation: the size, the block size, the whole start of the disk."""
        path = tmp_path / "new.img"
        assert "no files of" in str(refusal(file(path, size=(1 << 63) - 1)))
        assert not path.exists()
        assert "no multiple" in str(refusal(file(path, size=MIB + 512), block_size=4096))
        assert not path.exists()

        async def abandon() -> None:
            stack = Stack(file(path, size=MIB))
            await stack.open()
            assert path.exists()
            await stack.abandon()

        asyncio.run(abandon())
        assert not path.exists()

    def test_a_found_file_stays_when_the_start_fails(self, tmp_path: Path) -> None:
        path = image(tmp_path / "old.img", MIB + 512)
        refusal(file(path), block_size=4096)
        assert path.stat().st_size == MIB + 512

    def test_a_replaced_file_is_not_removed(self, tmp_path: Path) -> None:
        """Only what was created is removed, not what has its name by then."""
        path = tmp_path / "new.img"

        async def abandon() -> None:
            stack = Stack(file(path, size=MIB))
            await stack.open()
            path.unlink()
            path.write_text("somebody else's")
            await stack.abandon()

        asyncio.run(abandon())
        assert path.read_text() == "somebody else's"

    def test_the_loser_of_a_race_leaves_the_winners_file(self, tmp_path: Path) -> None:
        """Both create it: one makes the file, the other locks it first and has it; the maker is refused and removes
        nothing."""
        path = tmp_path / "new.img"
        winner = file(path, size=MIB)

        class Overtaken(FileBackend):
            def _lock(self, deadline: float) -> None:
                asyncio.run(winner.open())
                super()._lock(deadline)

        error = refusal_of_loser(Overtaken(FileBackend.Options(path=str(path), size=MIB)))
        target = winner.native_target()
        assert "is in use: locked by process" in str(error)
        assert os.path.samestat(path.stat(), os.fstat(target.fd))
        assert path.stat().st_size == MIB
        asyncio.run(winner.close())

    def test_a_file_that_another_has_used_is_no_longer_the_makers(self, tmp_path: Path) -> None:
        """Between the making and the lock of one, another disk came and went: its data stays whatever fails then."""
        path = tmp_path / "new.img"

        class Overtaken(FileBackend):
            def _lock(self, deadline: float) -> None:
                path.write_bytes(b"x" * MIB)
                super()._lock(deadline)

        refusal_of_loser(Overtaken(FileBackend.Options(path=str(path), size=2 * MIB)))
        assert path.read_bytes() == b"x" * MIB

    def test_a_file_removed_while_its_lock_was_waited_for_is_not_served(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk that created it failed and removed it: the one that waited makes its own."""
        monkeypatch.setattr(file_module, "_PATIENCE", 10.0)
        path = tmp_path / "new.img"

        async def run() -> None:
            first, second = Stack(file(path, size=MIB)), file(path, size=MIB)
            await first.open()
            opening = asyncio.ensure_future(second.open())
            await asyncio.sleep(0.1)
            assert not opening.done()
            await first.abandon()
            await opening
            assert os.path.samestat(path.stat(), os.fstat(second.native_target().fd))
            await second.abandon()

        asyncio.run(run())
        assert not path.exists()

    def test_the_size_of_an_existing_file_must_be_the_one_given(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img", MIB)
        error = refusal(file(path, size=2 * MIB))
        assert (error.exit_code, path.stat().st_size) == (2, MIB)
        assert str(MIB) in str(error)
        assert str(2 * MIB) in str(error)

    @pytest.mark.parametrize(
        ("make", "says", "exit_code"),
        [
            (lambda p: None, "does not exist; a size creates it", 2),
            (lambda p: p.mkdir(), "is a directory", 2),
            (lambda p: os.mkfifo(p), "is a fifo", 2),
            (lambda p: socket.socket(socket.AF_UNIX).bind(str(p)), "is a socket", 2),
            (lambda p: image(p, 0), "is empty; a file gets a size with `truncate -s SIZE FILE`", 2),
            (
                lambda p: image(p, 1000),
                "has 1000 bytes, no multiple of the block size 512; `truncate -s %512 FILE` rounds a file up to 1024",
                2,
            ),
            (
                lambda p: image(p, 100),
                "has 100 bytes, less than one block of 512; `truncate -s %512 FILE` rounds a file up to 512",
                2,
            ),
            (lambda p: p.symlink_to(p), "is a symbolic link that leads to itself", 2),
            (lambda p: p.symlink_to("/dev/null"), "is a character device", 2),
        ],
        ids=["missing", "directory", "fifo", "socket", "empty", "ragged", "small", "link", "character device"],
    )
    def test_what_is_no_storage_is_refused(
        self, make: Callable[[Path], object], says: str, exit_code: int, tmp_path: Path
    ) -> None:
        """In one sentence with the path and the remedy; it does not block either."""
        path = tmp_path / "disk.img"
        make(path)
        error = refusal(file(path))
        assert says in str(error)
        assert str(path) in str(error)
        assert error.exit_code == exit_code
        assert "\n" not in str(error)

    def test_what_cannot_be_created_is_refused(self, tmp_path: Path) -> None:
        for options in ({}, {"size": MIB}, {"read_only": True}):
            says = str(refusal(file(tmp_path / "none" / "disk.img", **options)))
            assert f"create {tmp_path / 'none'} first" in says, options
        (tmp_path / "plain").touch()
        assert "something in it is no directory" in str(refusal(file(tmp_path / "plain" / "disk.img", size=MIB)))
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
        assert "a symbolic link to nothing" in str(refusal(file(tmp_path / "dangling", size=MIB)))
        assert "read-only disk cannot create it" in str(refusal(file(tmp_path / "new", size=MIB, read_only=True)))
        assert "is longer than a path can be" in str(refusal(file(tmp_path / ("x" * 300))))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "plain"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives up root for a moment")
    def test_no_permission_is_said_so(self) -> None:
        """Exit code 5, as not being root."""
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o755)
            path = image(Path(directory, "disk.img"))
            path.chmod(0o600)
            os.seteuid(65534)
            try:
                error = refusal(file(path))
            finally:
                os.seteuid(0)
        assert (error.exit_code, "no permission" in str(error)) == (5, True)

    def test_a_smaller_block_than_the_device_has_is_refused(self, tmp_path: Path) -> None:
        with loop_device(image(tmp_path / "disk.img"), "--sector-size", "4096") as device:
            error = refusal(file(device), block_size=512)
        assert "accepted are powers of two from 4096" in str(error)


class TestFileFacts:
    def test_a_read_only_disk_opens_for_reading_only(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")

        async def look(stack: Stack) -> None:
            target = stack.native_target()
            assert isinstance(target, FileTarget)
            assert fcntl.fcntl(target.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            info = stack.info
            assert (info.read_only, info.discard, info.volatile_cache) == (True, Support.NONE, False)
            with pytest.raises(OSError, match=rf"\[Errno {errno.EROFS}\]"):
                await stack.write(0, [memoryview(bytes(512))])

        with_stack(file(path, read_only=True), look)

    def test_the_cache_is_what_was_asked_for(self, tmp_path: Path) -> None:
        """The flags are on the descriptor C gets; a sync disk has no volatile cache."""
        path = image(tmp_path / "disk.img")
        for options, flags, volatile in (
            ({}, 0, True),
            ({"direct": True}, os.O_DIRECT, True),
            ({"sync": True}, os.O_DSYNC, False),
            ({"direct": True, "sync": True}, os.O_DIRECT | os.O_DSYNC, False),
        ):

            async def look(stack: Stack, flags: int = flags, volatile: bool = volatile) -> None:
                target = stack.native_target()
                assert isinstance(target, FileTarget)
                assert fcntl.fcntl(target.fd, fcntl.F_GETFL) & (os.O_DIRECT | os.O_DSYNC) == flags
                assert stack.info.volatile_cache is volatile

            with_stack(file(path, **options), look)

    def test_a_block_device_tells_its_own_facts(self, tmp_path: Path) -> None:
        with loop_device(image(tmp_path / "disk.img", 8 * MIB), "--sector-size", "4096") as device:

            async def look(stack: Stack) -> None:
                info = stack.info
                assert (info.size, info.logical_block_size, info.physical_block_size) == (8 * MIB, 4096, 4096)
                assert info.discard is Support.NATIVE
                target = stack.native_target()
                assert isinstance(target, FileTarget)
                assert target.is_block_device

            with_stack(file(device), look)

    def test_discard_gives_space_back(self, tmp_path: Path) -> None:
        """And so does write_zeroes with unmap; without, the space stays."""
        path = image(tmp_path / "disk.img")

        async def work(stack: Stack) -> None:
            async def freed_by(operation: Callable[[], Awaitable[None]]) -> int:
                await stack.write(0, [memoryview(b"x" * MIB)])
                await stack.flush()
                full = path.stat().st_blocks
                await operation()
                return (full - path.stat().st_blocks) * 512

            assert await freed_by(lambda: stack.discard(0, MIB)) >= MIB // 2
            assert await freed_by(lambda: stack.write_zeroes(0, MIB, unmap=True)) >= MIB // 2
            assert await freed_by(lambda: stack.write_zeroes(0, MIB, unmap=False)) <= 0

        with_stack(file(path), work)

    def test_a_discard_of_a_block_device_reaches_it(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")
        with loop_device(path) as device:

            async def work(stack: Stack) -> None:
                await stack.write(0, [memoryview(b"x" * MIB)])
                await stack.flush()
                full = path.stat().st_blocks
                await stack.discard(0, MIB)
                assert path.stat().st_blocks < full - 1000

            with_stack(file(device), work)


class TestFileSize:
    def test_growth_reaches_the_file(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img", MIB)

        async def work(stack: Stack) -> None:
            assert (await stack.resize(4 * MIB)).size == 4 * MIB
            assert path.stat().st_size == 4 * MIB
            await stack.write(4 * MIB - 512, [memoryview(b"e" * 512)])
            assert await read(stack, 4 * MIB - 512, 512) == b"e" * 512
            os.truncate(path, 8 * MIB)
            assert stack.info.size == 4 * MIB
            assert (await stack.refresh()).size == stack.info.size == 8 * MIB

        with_stack(file(path), work)

    def test_shrinking_and_ragged_sizes_are_refused(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img", 4 * MIB)

        async def work(stack: Stack) -> None:
            for size, says in ((MIB, "can only grow"), (8 * MIB + 1, "multiples of 512"), ((1 << 63) - 512, "no files of")):
                with pytest.raises(UserError, match=says) as caught:
                    await stack.resize(size)
                assert caught.value.exit_code == 2
            assert path.stat().st_size == stack.info.size == 4 * MIB

        with_stack(file(path), work)

    def test_what_is_open_for_reading_is_not_grown(self, tmp_path: Path) -> None:
        """It says why; what its owner has grown is taken."""
        path = image(tmp_path / "disk.img", MIB)

        async def work(stack: Stack) -> None:
            with pytest.raises(UserError, match="open for reading only"):
                await stack.resize(2 * MIB)
            os.truncate(path, 2 * MIB)
            assert (await stack.refresh()).size == (await stack.resize(2 * MIB)).size == 2 * MIB

        with_stack(file(path), work, read_only=True)

    def test_a_block_device_is_not_grown_by_us(self, tmp_path: Path) -> None:
        """It says how; afterwards the new size is taken, whether or not somebody has looked at the device since."""
        path = image(tmp_path / "disk.img", MIB)
        with loop_device(path) as device:

            async def work(stack: Stack) -> None:
                with pytest.raises(UserError, match="grow the device itself"):
                    await stack.resize(2 * MIB)
                os.truncate(path, 2 * MIB)
                await asyncio.to_thread(subprocess.run, ["losetup", "-c", device], check=True)
                assert (await stack.resize(2 * MIB)).size == 2 * MIB
                assert (await stack.refresh()).size == 2 * MIB

            with_stack(file(device), work)

    def test_a_file_that_was_cut_gives_errors_not_zeros(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img", 2 * MIB)

        async def work(stack: Stack) -> None:
            os.truncate(path, MIB + 100)
            for offset, length in ((MIB + 4096, 512), (MIB, 512), (0, 2 * MIB)):
                with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
                    await read(stack, offset, length)

        with_stack(file(path), work)


class TestFileErrors:
    def test_a_failed_flush_is_never_forgotten(self, tmp_path: Path) -> None:
        """The kernel drops the pages it could not write and reports that once; we go on reporting it."""
        if os.geteuid() != 0:
            pytest.skip("mounts a small file system")
        small = tmp_path / "small"
        small.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True)
        if done.returncode != 0:
            pytest.skip("cannot mount here")
        try:
            with loop_device(image(small / "disk.img", 16 * MIB)) as device:

                async def work(stack: Stack) -> None:
                    await stack.write(0, [memoryview(os.urandom(4 * MIB))])
                    for _ in range(3):
                        with pytest.raises(OSError, match="Errno"):  # EIO or ENOSPC, as the kernel likes
                            await stack.flush()

                with_stack(file(device), work)
        finally:
            subprocess.run(["umount", small], check=True)

    def test_a_short_write_is_continued_or_reported(self, tmp_path: Path) -> None:
        """At the limit of a file's size pwritev writes a part: the rest is an error, not silence."""
        path = image(tmp_path / "disk.img", 2 * MIB)
        code = (
            "import asyncio, resource, signal, sys\n"
            "from vduse_blk.backends.file import FileBackend\n"
            "from vduse_blk.block.stack import Stack\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "async def main():\n"
            "    stack = Stack(FileBackend(FileBackend.Options(path=sys.argv[1])))\n"
            "    await stack.open()\n"
            f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))\n"
            "    try:\n"
            f"        await stack.write({MIB} - 4096, [memoryview(b'x' * 8192)])\n"
            "    except OSError as error:\n"
            "        print(error.errno)\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert int(done.stdout) == errno.EFBIG
        assert path.read_bytes()[MIB - 4096 : MIB + 1] == b"x" * 4096 + b"\0"

    def test_direct_takes_memory_of_any_address(self, tmp_path: Path) -> None:
        """Pieces a device would refuse go through memory it takes; more than a mebibyte, too."""
        path = image(tmp_path / "disk.img", 4 * MIB)
        data = os.urandom(2 * MIB + 512)

        async def work(stack: Stack) -> None:
            memory = bytearray(b"\0" + data)
            cut = [1, 511, 4096, MIB - 1, len(data) - 4608 - MIB + 1]
            views, at = [], 1
            for length in cut:
                views.append(memoryview(memory)[at : at + length])
                at += length
            await stack.write(512, views)
            memory[1:] = bytes(len(data))
            await stack.read(512, views)
            assert memory[1:] == data

        with_stack(file(path, direct=True), work)
        assert path.read_bytes()[512 : 512 + len(data)] == data


# ------------------------------------------------------------------------------------------------------- locks


HOLD = """
import asyncio, sys
from vduse_blk.backends.file import FileBackend
async def main():
    backend = FileBackend(FileBackend.Options(path=sys.argv[1], read_only=sys.argv[2] == "ro"))
    await backend.open()
    print("open", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


@contextlib.contextmanager
def held_by(*command: str, says: str = "") -> Iterator[int]:
    """A process that has something open once its output begins with ``says``; its pid."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode()
        assert line.startswith(says), line
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def another_of_us(path: Path | str, mode: str) -> contextlib.AbstractContextManager[int]:
    return held_by(sys.executable, "-c", HOLD, str(path), mode, says="open")


class TestLocks:
    def test_a_second_writer_is_refused_by_name(self, tmp_path: Path) -> None:
        """Exit code 4, with the process that has it."""
        path = image(tmp_path / "disk.img")
        with another_of_us(path, "rw") as pid:
            for options in ({}, {"read_only": True}):
                error = refusal(file(path, **options))
                assert error.exit_code == 4
                assert f"is in use: locked by process {pid} (python" in str(error)
        with_stack(file(path), Stack.flush)

    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_lock_that_ends_late_is_waited_for(
        self, read_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`detach X && attach X`: the kernel lets go of a file some time after the process that had it has ended. The
        event loop goes on meanwhile."""
        monkeypatch.setattr(file_module, "_PATIENCE", 10.0)
        path = image(tmp_path / "disk.img")

        async def run() -> None:
            first, second = Stack(file(path)), Stack(file(path, read_only=read_only))
            await first.open()
            opening = asyncio.ensure_future(second.open())
            await asyncio.sleep(0.1)
            assert not opening.done()
            await first.close()
            await opening
            await second.close()

        asyncio.run(run())

    def test_a_device_that_is_let_go_late_is_waited_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same for the exclusive open of a block device."""
        monkeypatch.setattr(file_module, "_PATIENCE", 10.0)

        async def run(device: str) -> None:
            first, second = Stack(file(device)), Stack(file(device))
            await first.open()
            opening = asyncio.ensure_future(second.open())
            await asyncio.sleep(0.1)
            assert not opening.done()
            await first.close()
            await opening
            await second.close()

        with loop_device(image(tmp_path / "disk.img")) as device:
            asyncio.run(run(device))

    def test_readers_share_and_keep_writers_away(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")
        with another_of_us(path, "ro") as pid:
            with_stack(file(path, read_only=True), Stack.flush)
            error = refusal(file(path))
        assert (error.exit_code, f"process {pid}" in str(error)) == (4, True)

    def test_the_lock_is_the_descriptions_own(self, tmp_path: Path) -> None:
        """Not the process's: a second disk of the same process is refused, and closing another descriptor of the file
        lets go of nothing."""
        path = image(tmp_path / "disk.img")

        async def work(stack: Stack) -> None:
            os.close(os.open(path, os.O_RDWR))
            with pytest.raises(UserError, match=f"locked by process {os.getpid()}"):
                await Stack(file(path)).open()

        with_stack(file(path), work)

    def test_a_loop_device_over_a_file_in_use_is_refused(self, tmp_path: Path) -> None:
        """It would be a second writer of the same bytes; the holder of the file is named."""
        path = image(tmp_path / "disk.img", MIB)

        async def nothing(stack: Stack) -> None: ...

        with loop_device(path) as device:
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))  # F_OFD_SETLK
                error = refusal(file(device))
                assert error.exit_code == 4
                assert f"{path}, which it is made of, is locked by process {os.getpid()}" in str(error)
            finally:
                os.close(fd)
            with_stack(file(device), nothing)

    def test_a_posix_lock_is_respected(self, tmp_path: Path) -> None:
        """Programs that use the older kind, on one byte, keep us away, too."""
        path = image(tmp_path / "disk.img")
        code = (
            "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1); "
            "print('locked', flush=True); sys.stdin.read()"
        )
        with held_by(sys.executable, "-c", code, str(path), says="locked") as pid:
            for options in ({}, {"read_only": True}):
                assert f"process {pid}" in str(refusal(file(path, **options)))

    def test_a_loop_device_counts_as_a_user(self, tmp_path: Path) -> None:
        """It takes no lock; one that only reads does not disturb readers."""
        path = image(tmp_path / "disk.img")
        with loop_device(path) as device:
            for options in ({}, {"read_only": True}):
                assert f"is in use: used by loop device {device}" in str(refusal(file(path, **options)))
        with loop_device(path, "-r") as device:
            assert f"is in use: used by loop device {device}" in str(refusal(file(path)))
            with_stack(file(path, read_only=True), Stack.flush)

    def test_a_mounted_device_is_refused_with_its_mount_point(self, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img", 16 * MIB)
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("no mkfs.ext4")
        subprocess.run(["mkfs.ext4", "-q", path], check=True)
        mount_point = tmp_path / "mnt"
        mount_point.mkdir()
        with loop_device(path) as device:
            if subprocess.run(["mount", device, mount_point], capture_output=True).returncode != 0:
                pytest.skip("cannot mount here")
            try:
                error = refusal(file(device))
            finally:
                subprocess.run(["umount", mount_point], check=True)
        assert (error.exit_code, f"is in use: mounted on {mount_point}" in str(error)) == (4, True)

    def test_a_device_held_by_another_server_is_refused_with_its_pid(self, tmp_path: Path) -> None:
        with loop_device(image(tmp_path / "disk.img")) as device, another_of_us(device, "rw") as pid:
            error = refusal(file(device))
        assert (error.exit_code, f"is in use: open in process {pid} (python" in str(error)) == (4, True)


QEMU_IO = shutil.which("qemu-io")


@pytest.mark.skipif(QEMU_IO is None, reason="no qemu-io")
class TestLocksWithQemu:
    """QEMU locks single bytes; whoever comes second is refused, in every combination that could do harm."""

    @pytest.mark.parametrize(
        ("ours", "theirs", "both"),
        [("rw", "rw", False), ("rw", "ro", False), ("ro", "rw", False), ("ro", "ro", True)],
    )
    def test_we_are_first(self, ours: str, theirs: str, both: bool, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")

        async def work(stack: Stack) -> None:
            command = [str(QEMU_IO), "-f", "raw", *(["-r"] if theirs == "ro" else []), "-c", "read 0 512", str(path)]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            assert (done.returncode == 0) is both, done.stderr
            assert ("lock" in done.stderr) is not both

        with_stack(file(path, read_only=ours == "ro"), work)

    @pytest.mark.parametrize(
        ("ours", "theirs", "both"),
        [("rw", "rw", False), ("rw", "ro", False), ("ro", "rw", False), ("ro", "ro", True)],
    )
    def test_qemu_is_first(self, ours: str, theirs: str, both: bool, tmp_path: Path) -> None:
        path = image(tmp_path / "disk.img")
        read_only = ours == "ro"
        with _qemu_io("-f", "raw", *(["-r"] if theirs == "ro" else []), str(path)) as pid:
            if both:
                with_stack(file(path, read_only=read_only), Stack.flush)
                return
            error = refusal(file(path, read_only=read_only))
            assert error.exit_code == 4
            assert f"locked by process {pid} (qemu-io" in str(error)


@contextlib.contextmanager
def _qemu_io(*arguments: str) -> Iterator[int]:
    """A qemu-io that has the file open, waiting for its next command; its pid."""
    process = subprocess.Popen([str(QEMU_IO), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"read 0 512\n")
        process.stdin.flush()
        while b"read 512/512" not in (line := process.stdout.readline()):
            assert line, "qemu-io ended"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


# ---------------------------------------------------------------------------------------------- memory and null


class TestMemory:
    def test_it_begins_with_zeros_and_takes_no_memory_before_it_is_used(self) -> None:
        async def work(stack: Stack) -> None:
            before = _resident()
            assert await read(stack, 512 * MIB, 65536) == bytes(65536)
            assert _resident() - before < 4 * MIB

        with_stack(MemoryBackend(MemoryBackend.Options(size=1024 * MIB)), work)

    @pytest.mark.parametrize("locked", [False, True], ids=["plain", "locked"])
    def test_discard_gives_memory_back(self, locked: bool) -> None:
        """Also in a process whose memory is locked, as the server's is."""
        libc = ctypes.CDLL(None, use_errno=True)
        if locked and libc.mlockall(7) != 0:  # CURRENT, FUTURE, ONFAULT
            pytest.skip("memory cannot be locked here")
        try:

            async def work(stack: Stack) -> None:
                await stack.write(0, [memoryview(b"x" * (32 * MIB))])
                full = _shared()
                await stack.discard(0, 16 * MIB)
                await stack.write_zeroes(16 * MIB, 16 * MIB, unmap=True)
                assert full - _shared() > 31 * MIB
                assert await read(stack, 0, MIB) == bytes(MIB)

            with_stack(MemoryBackend(MemoryBackend.Options(size=64 * MIB)), work)
        finally:
            if locked:
                libc.munlockall()

    def test_more_than_the_host_has_is_refused(self) -> None:
        """When it is attached, not by the out-of-memory killer."""
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
            pytest.skip("this host promises any amount")
        error = refusal(MemoryBackend(MemoryBackend.Options(size=1 << 50)))
        assert (error.exit_code, "no 1125899906842624 bytes" in str(error)) == (1, True)

    def test_it_cannot_be_resized(self) -> None:
        async def work(stack: Stack) -> None:
            with pytest.raises(UserError, match="is given when it is attached"):
                await stack.resize(4 * MIB)

        with_stack(MemoryBackend(MemoryBackend.Options(size=MIB)), work)


def test_null_is_as_large_as_wanted() -> None:
    """And takes nothing for it."""

    async def work(stack: Stack) -> None:
        assert stack.info.size == 1 << 60
        assert await read(stack, (1 << 60) - MIB, MIB) == bytes(MIB)
        with pytest.raises(UserError, match="is given when it is attached"):
            await stack.resize(1 << 61)

    with_stack(NullBackend(NullBackend.Options(size=1 << 60)), work)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _shared() -> int:
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


@pytest.mark.parametrize("kind", [MemoryBackend, NullBackend])
@pytest.mark.parametrize("size", [0, 1000])
def test_sizes_that_no_disk_has(kind: type[MemoryBackend] | type[NullBackend], size: int) -> None:
    """Refused without a word of files, which these are not."""
    error = refusal(kind(kind.Options(size=size)))
    assert (str(error), error.exit_code) == (f"size: {size} is not usable; accepted are positive multiples of 512 bytes", 2)


def test_a_read_of_ones_own_is_not_gone_past() -> None:
    """A subclass of a backend that takes batches, with a ``read`` or ``write`` and no ``batch``, takes none."""

    class Own(MemoryBackend):
        async def read(self, offset: int, into: Any) -> None:
            await super().read(offset, into)

    class Again(Own):
        takes_batches = True

    assert [kind.takes_batches for kind in (MemoryBackend, Own, Again)] == [True, False, True]
