"""Each way in which C serves files, under a kernel's driver: what `auto` takes depends on the storage and on what the host
allows, so most tests see one way only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.host import attached, fio, image, info, run, servers

MIB = 1 << 20
_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_NEVER_SPINS = """
from vduse_blk.queue.native import NativeQueue
NativeQueue.__init__.__kwdefaults__["spin"] = "never"
"""


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """io_uring, for everybody."""
    before = _DISABLED.read_text()
    _DISABLED.write_text("2")
    try:
        yield
    finally:
        _DISABLED.write_text(before)


@contextlib.contextmanager
def block_device(path: Path) -> Iterator[str]:
    run("modprobe", "loop")
    device = run("losetup", "--find", "--show", path).stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


def check(device: str) -> None:
    """Four jobs, requests of any size at once, each block verified."""
    fio(
        device, rw="randwrite", bsrange="512-64k", blockalign=512, direct=1, ioengine="libaio", iodepth=16, numjobs=4,
        size="2M", offset_increment="4M", verify="crc32c", do_verify=1, verify_fatal=1, group_reporting=1,
    )  # fmt: skip


def of_server(what: str) -> list[str]:
    """What the server's threads are called, or what its descriptors lead to."""
    (pid,) = servers()
    process = Path("/proc", str(pid))
    if what == "threads":
        return [(task / "comm").read_text().strip() for task in (process / "task").iterdir()]
    return [os.readlink(fd) for fd in (process / "fd").iterdir()]


def has_ring() -> bool:
    return "anon_inode:[io_uring]" in of_server("descriptors")


def test_io_uring(tmp_path: Path) -> None:
    """A block device: all through the ring, which is its queue's, and no thread."""
    with block_device(image(tmp_path / "disk.img", 16 * MIB)) as storage, attached(f"file:{storage}?direct=1") as device:
        check(device)
        assert has_ring()
        assert "vq-file" not in of_server("threads")


def test_a_pool_of_threads(tmp_path: Path) -> None:
    """The same where io_uring is forbidden."""
    with (
        forbidden(),
        block_device(image(tmp_path / "disk.img", 16 * MIB)) as storage,
        attached(f"file:{storage}?direct=1") as device,
    ):
        check(device)
        assert not has_ring()
        assert "vq-file" in of_server("threads")


def test_a_file_in_memory_by_the_queue_itself(tmp_path: Path) -> None:
    """Where io_uring is forbidden there is nobody else."""
    with forbidden(), attached(image(tmp_path / "disk.img", 16 * MIB)) as device:
        check(device)
        assert not has_ring()
        assert "vq-file" not in of_server("threads")


def test_without_spinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues that always sleep when there is nothing to do miss no kick."""
    (tmp_path / "sitecustomize.py").write_text(_NEVER_SPINS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with attached(image(tmp_path / "disk.img", 16 * MIB)) as device:
        monkeypatch.delenv("PYTHONPATH")
        check(device)
        counters = info("t")["counters"]
        assert counters["wakeups"] > 0
        assert counters["spin_hits"] == 0
