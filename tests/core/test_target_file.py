"""The file target of the C core: what it promises beyond moving bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vduse_blk.backends.file import FileBackend
from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.native import FileTarget
from vduse_blk.block.stack import Stack
from vduse_blk.queue import IovaMap
from vduse_blk.queue.base import DiskRules
from vduse_blk.queue.native import NativeQueue
from vduse_blk.testing.driver import IOERR, OK, WRITE_ZEROES, FakeDriver

MIB = 1 << 20
_OFD_SETLK = 37  # linux/fcntl.h; Python 3.11 has no name for it


@contextlib.contextmanager
def queue(info: BlockInfo, target: FileTarget, io_mode: str) -> Iterator[FakeDriver]:
    """The driver of a queue that serves ``target``."""
    driver, iova = FakeDriver(), IovaMap()
    driver.map(iova)
    served = NativeQueue(0, DiskRules(info, max_discard=MIB, max_write_zeroes=MIB, max_ranges=4), target, io_mode=io_mode)
    try:
        served.start(driver.setup(), iova)
    except OSError as error:
        pytest.skip(f"{io_mode}: {error}")
    try:
        yield driver
    finally:
        served.stop()
        driver.close()


@pytest.fixture
def losing_device(tmp_path: Path) -> Iterator[str]:
    """A block device that takes writes into the page cache and has no room for them: a loop device on a full tmpfs."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("losetup") is None:
        pytest.skip("needs root, loop devices and losetup")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode != 0:
        pytest.skip("cannot mount here")
    try:
        image = tmp_path / "disk.img"
        image.touch()
        os.truncate(image, 16 * MIB)
        done = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no loop device: {done.stderr.strip()}")
        try:
            yield done.stdout.strip()
        finally:
            subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("io_mode", ["sync", "uring"])
def test_a_failed_flush_is_never_forgotten(io_mode: str, losing_device: str) -> None:
    """Not on the same queue, not on another one, not on one that starts later, not by Python: the kernel says once that it
    dropped pages."""
    stack = Stack(FileBackend(FileBackend.Options(path=losing_device)))

    async def flush() -> None:
        await stack.flush()

    async def run() -> None:
        info = await stack.open()
        try:
            target = stack.native_target()
            assert isinstance(target, FileTarget)
            with queue(info, target, io_mode) as first, queue(info, target, io_mode) as second:
                for i in range(16):
                    assert first.write(i * 512, os.urandom(256 * 1024)) == OK
                assert [first.flush(), first.flush(), second.flush(), second.flush()] == [IOERR] * 4
            with queue(info, target, io_mode) as later:
                assert later.flush() == IOERR
            with pytest.raises(OSError, match="lost data"):
                await flush()
        finally:
            await stack.close()

    asyncio.run(run())


@pytest.mark.parametrize("direct", [False, True])
def test_a_failed_flush_is_remembered_with_direct_io_too(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata, and data where a file system falls back to the page cache, is lost as silently as without; so Python and C
    share one memory of it."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    stack = Stack(FileBackend(FileBackend.Options(path=str(path), direct=direct)))

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def run() -> None:
        info = await stack.open()
        target = stack.native_target()
        assert isinstance(target, FileTarget)
        with queue(info, target, "sync") as driver:
            assert driver.flush() == OK
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                with pytest.raises(OSError, match="Input/output"):
                    await stack.flush()
            assert driver.flush() == IOERR
        with pytest.raises(OSError, match="lost data"):
            await stack.flush()
        await stack.close()

    asyncio.run(run())


@pytest.mark.parametrize("io_mode", ["sync", "uring"])
def test_a_failed_flush_is_noted_where_it_outlives_the_process(io_mode: str, tmp_path: Path) -> None:
    """The mark may be a mapped file: it is set when the driver hears of the error, without anybody's help. /dev/null cannot
    be flushed."""
    path = tmp_path / "lost"
    path.write_bytes(bytes(4))
    fd = os.open("/dev/null", os.O_RDWR)
    with path.open("r+b") as file:
        mark = memoryview(mmap.mmap(file.fileno(), 4))
    info = BlockInfo(size=MIB, volatile_cache=True)
    try:
        with queue(info, FileTarget(fd, False, mark), io_mode) as driver:
            assert driver.flush() == IOERR
            assert path.read_bytes() == b"\1\0\0\0"
        with open(tmp_path / "disk.img", "w+b") as image:  # which can
            image.truncate(MIB)
            with queue(info, FileTarget(image.fileno(), False, mark), io_mode) as driver:
                assert driver.flush() == IOERR
    finally:
        os.close(fd)


@pytest.mark.parametrize("unmap", [0, 1])
@pytest.mark.parametrize(("sync", "syncs"), [(True, 1), (False, 0)])
def test_zeros_are_durable_where_no_flush_follows(sync: bool, syncs: int, unmap: int, tmp_path: Path) -> None:
    """A disk of ``sync=1`` offers no flush, and O_DSYNC is about writes: fallocate alone leaves zeros in the cache."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    path, trace = tmp_path / "disk.img", tmp_path / "trace"
    path.write_bytes(os.urandom(MIB))
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_target_file import zero
asyncio.run(zero({str(path)!r}, {sync}, {unmap}))
"""
    traced = ["strace", "-f", "-qq", "-e", "trace=fallocate,fdatasync", "-o", str(trace)]
    done = subprocess.run([*traced, "python3", "-c", "pass"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"strace: {done.stderr.strip()}")
    subprocess.run([*traced, sys.executable, "-c", code], check=True)
    calls = [line.split(maxsplit=1)[1].partition("(")[0] for line in trace.read_text().splitlines() if "(" in line]
    zeroing = calls[-1 - syncs :]
    assert zeroing == ["fallocate"] + ["fdatasync"] * syncs, calls
    assert path.read_bytes()[:65536] == bytes(65536)


async def zero(path: str, sync: bool, unmap: int) -> None:
    """Runs in a process of its own, under strace."""
    stack = Stack(FileBackend(FileBackend.Options(path=path, sync=sync)))
    info = await stack.open()
    target = stack.native_target()
    assert isinstance(target, FileTarget)
    with queue(info, target, "sync") as driver:
        assert driver.ranges(WRITE_ZEROES, (0, 128, unmap)) == OK
    await stack.close()


@pytest.mark.parametrize("io_mode", ["sync", "uring"])
def test_a_queue_that_stopped_has_let_go_of_the_file(io_mode: str, tmp_path: Path) -> None:
    """The lock on the file ends with its descriptor, not some milliseconds later."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    whole_file = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    for _ in range(5):
        fd, other = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
        fcntl.fcntl(fd, _OFD_SETLK, whole_file)
        with queue(BlockInfo(size=MIB), FileTarget(fd, False), io_mode) as driver:
            assert driver.write(0, bytes(4096)) == OK
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(other, _OFD_SETLK, whole_file)
        os.close(fd)
        fcntl.fcntl(other, _OFD_SETLK, whole_file)
        os.close(other)
