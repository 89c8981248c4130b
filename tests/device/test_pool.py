"""Files where io_uring is forbidden: threads wait for the device, the queue does not."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import BLOCK, BY_NAME, DISK_FS, MIB, Disk, Kind, LoopDevice

from tests.faulty import forbid_io_uring
from vduse_blk.core._core import lib
from vduse_blk.testing.driver import FLUSH, IN, OK, OUT

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h


def threads() -> int:
    """Threads of pools in this process."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            count += (task / "comm").read_text() == "vq-file\n"
        except (FileNotFoundError, ProcessLookupError):
            pass
    return count


class FrozenFileSystem:
    """A file system of its own that can be made to hold up whoever writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "mounted"
        self.folder.mkdir()
        image = folder / "image"
        with open(image, "wb") as file:
            file.truncate(64 * MIB)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
        self._device = LoopDevice(image)
        mounted = subprocess.run(["mount", self._device.path, self.folder], capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            self._device.close()
            pytest.skip(f"needs mount: {mounted.stderr.strip()}")
        self._fd = os.open(self.folder, os.O_RDONLY)
        self._frozen = False

    def freeze(self) -> None:
        fcntl.ioctl(self._fd, FIFREEZE, 0)
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            fcntl.ioctl(self._fd, FITHAW, 0)

    def close(self) -> None:
        self.thaw()
        os.close(self._fd)
        subprocess.run(["umount", self.folder], check=True)
        self._device.close()


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrozenFileSystem]:
    made = FrozenFileSystem(tmp_path)
    monkeypatch.setenv("TMPDIR", str(made.folder))
    yield made
    made.close()


def test_a_request_that_waits_holds_up_no_other(frozen: FrozenFileSystem) -> None:
    """While writes hang in the file system reads are answered, and so is each write once it can go on. Stopping waits for
    what hangs."""
    disk = Disk(BY_NAME["native-file-sync"])
    try:
        driver = disk.driver
        assert driver.write(0, bytes(range(256)) * 16) == OK
        frozen.freeze()
        writes = [driver.request(OUT, 64 + 8 * i, out=bytes([i]) * 4096) for i in range(4)]
        driver.kick()
        for _ in range(20):
            assert driver.read(0, 4096) == (OK, bytes(range(256)) * 16)
        assert [write.status for write in writes] == [None] * 4
        stopping = threading.Thread(target=disk.queue.stop)
        stopping.start()
        frozen.thaw()
        stopping.join(20)
        assert len(driver.poll_used()) == 4
        for i in range(4):
            assert disk.content(64 * 512 + 4096 * i, 4096) == bytes([i]) * 4096
    finally:
        frozen.thaw()
        disk.close()


@pytest.mark.parametrize("io_mode", ["auto", "sync"])
def test_a_block_device_is_no_file_in_memory(frozen: FrozenFileSystem, io_mode: str) -> None:
    """Its node is in one, which says nothing of what it is made of: while a flush hangs, reads are answered, with io_uring
    and without."""
    disk = Disk(Kind("native-block", "file", True, io_mode, BLOCK))
    try:
        driver = disk.driver
        assert driver.read(0, 4096) == (OK, bytes(4096))
        frozen.freeze()
        assert driver.write(64, bytes([1]) * 4096) == OK
        flush = driver.request(FLUSH)
        driver.kick()
        for _ in range(5):
            assert driver.read(0, 4096) == (OK, bytes(4096))
        assert flush.status is None
        frozen.thaw()
        driver.run(flush)
        assert flush.status == OK
    finally:
        frozen.thaw()
        disk.close()


def test_what_the_page_cache_holds_needs_no_thread() -> None:
    """Reads of cached data are answered by the queue itself; direct ones are not, and its threads end with the queue."""
    disk = Disk(BY_NAME["native-file-sync"])
    try:
        disk.content(0, MIB)
        for i in range(50):
            assert disk.driver.read(8 * i, 4096) == (OK, bytes(4096))
        assert threads() == 0
    finally:
        disk.close()
    disk = Disk(BY_NAME["native-file-direct-sync"])
    try:
        disk.driver.run(*[disk.driver.request(IN, 8 * i, into=4096) for i in range(16)])
        assert 1 <= threads() <= 16
    finally:
        disk.close()
    deadline = time.monotonic() + 5
    while threads() != 0:
        assert time.monotonic() < deadline


def serve_without_io_uring() -> None:
    """In a process of its own."""
    forbid_io_uring()
    assert lib.vb_uring_probe() == -1
    disk = Disk(Kind("auto", "file", True, "auto", DISK_FS, direct=True))
    try:
        writes = [disk.driver.request(OUT, 8 * i, out=bytes([i]) * 4096) for i in range(16)]
        disk.driver.run(*writes)
        assert {write.status for write in writes} == {OK}
        assert disk.content(15 * 4096, 4096) == bytes([15]) * 4096
        assert threads() > 0
    finally:
        disk.close()
    try:
        Disk(BY_NAME["native-file-uring"]).close()
    except PermissionError:
        print("served without io_uring")


def test_where_io_uring_is_forbidden_threads_are_chosen() -> None:
    """Nobody has to say so: a process that may not use io_uring serves files, unless it insists."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_pool; test_pool.serve_without_io_uring()"
    done = subprocess.run(
        [sys.executable, "-c", script, Path(__file__).parent], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "served without io_uring\n", done.stdout + done.stderr
