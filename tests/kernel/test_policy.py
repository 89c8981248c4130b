"""Storage that goes away, is full, and comes back, under a disk in use: who waits, who gets errors, and after how long."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.kernel.host import assert_nothing_left, attached, cli, image, info, run, wait_until

MIB = 1 << 20
both_paths = pytest.mark.parametrize("path", ["native", "plugin"])


class Storage:
    """A block device whose storage can be taken away: every request on it fails, as on a disk that was pulled."""

    def __init__(self, path: Path) -> None:
        run("modprobe", "-a", "loop", "dm-mod")
        self._sectors = path.stat().st_size // 512
        self._loop = run("losetup", "--find", "--show", path).stdout.strip()
        self.path = "/dev/mapper/away"
        run("dmsetup", "create", "away", "--table", self._here())

    def _here(self) -> str:
        return f"0 {self._sectors} linear {self._loop} 0"

    def go(self) -> None:
        self._become(f"0 {self._sectors} error")

    def come_back(self) -> None:
        self._become(self._here())

    def _become(self, table: str) -> None:
        run("dmsetup", "load", "away", "--table", table)
        run("dmsetup", "resume", "--noudevsync", "away")

    def remove(self) -> None:
        run("dmsetup", "remove", "--retry", "away", check=False)
        run("losetup", "-d", self._loop, check=False)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    made = Storage(image(tmp_path / "disk.img", 32 * MIB))
    yield made
    made.remove()


def writer(device: str) -> subprocess.Popen[str]:
    """One write of 4 KiB past the page cache."""
    words = ["dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "oflag=direct", "status=none"]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def wait_for_error(process: subprocess.Popen[str], stream: IO[str] | None) -> None:
    """Until the process says that it got one. Not until it has ended: udev scans a disk for partitions as soon as somebody
    closes it who might have written, the scan reads a dozen blocks one after the other, and the close waits for it
    (bdev_release); without storage each of them takes as long as the policy says."""
    assert stream is not None
    said = []
    for line in stream:
        said.append(line)
        if "Input/output error" in line:
            return
    raise AssertionError(f"exit {process.wait()} and no error; it said: {''.join(said)}")


def waiting() -> int:
    return int((info("t").get("waiting") or {"requests": 0})["requests"])


@pytest.mark.parametrize(("path", "seconds"), [("native", 60), ("plugin", 5)])
def test_a_minute_without_storage(storage: Storage, path: str, seconds: float) -> None:
    """``wait``: whoever uses the disk sees no error, `info` and `list` say what is going on, and all goes on by itself."""
    with attached(f"file:{storage.path}?direct=1", "--path", path, "--on-error", "wait") as device:
        load = ["fio", "--name=t", f"--filename={device}", "--rw=randrw", "--bs=4k", "--direct=1", "--ioengine=libaio"]
        load += ["--iodepth=16", "--verify=crc32c", "--verify_backlog=64", "--verify_state_save=0", "--size=16M"]
        load += ["--time_based", "--runtime=600"]
        with subprocess.Popen(load, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
            wait_until(lambda: info("t")["counters"].get("write_ops", 0) > 50, "requests are served")
            storage.go()
            gone = time.monotonic()
            wait_until(lambda: waiting() > 0, "requests wait")
            assert "waiting" in cli("list").stdout
            assert "Input/output error" in cli("info", "t").stdout
            time.sleep(max(0.0, gone + seconds - time.monotonic()))
            assert fio.poll() is None
            before = info("t")["counters"]["write_ops"]
            storage.come_back()
            wait_until(lambda: waiting() == 0, "nothing waits")
            wait_until(lambda: info("t")["counters"]["write_ops"] > before + 50, "requests are served again")
            assert fio.poll() is None
            fio.send_signal(signal.SIGINT)
            said, _ = fio.communicate(timeout=120)
        assert fio.returncode in (0, 128), said  # by version; 128: it was interrupted
        assert "err= 0" in said, said
    assert_nothing_left()


@both_paths
def test_errors_come_after_the_time_given_and_not_before(storage: Storage, path: str) -> None:
    """``retry=5s``: a write fails 5 seconds after it was begun, one that finds its storage again in time does not."""
    with attached(f"file:{storage.path}?direct=1", "--path", path, "--on-error", "retry=5s") as device:
        storage.go()
        began = time.monotonic()
        with writer(device) as dd:
            wait_for_error(dd, dd.stderr)
            assert 5 < time.monotonic() - began < 20
            storage.come_back()
            assert dd.wait(60) == 1
        run("udevadm", "settle")  # what waits from here on is the write, not udev's scan
        storage.go()
        with writer(device) as dd:
            wait_until(lambda: waiting() > 0, "it waits")
            storage.come_back()
            assert dd.wait(60) == 0


def test_under_load_errors_come_in_time(storage: Storage) -> None:
    """``retry=5s`` under fio: no error while the storage is away for less, the first one after 5 seconds and soon after,
    and then the load has ended."""
    load = ["fio", "--name=t", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--size=16M"]
    with attached(f"file:{storage.path}?direct=1", "--on-error", "retry=5s") as device:
        load += [f"--filename={device}", "--time_based", "--runtime=600"]
        with subprocess.Popen(load, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
            wait_until(lambda: info("t")["counters"].get("write_ops", 0) > 50, "requests are served")
            storage.go()
            wait_until(lambda: waiting() > 0, "requests wait")
            storage.come_back()
            wait_until(lambda: waiting() == 0, "nothing waits")
            before = info("t")["counters"]["write_ops"]
            wait_until(lambda: info("t")["counters"]["write_ops"] > before + 50, "requests are served again")
            began = time.monotonic()
            storage.go()
            wait_for_error(fio, fio.stdout)
            assert 4.5 < time.monotonic() - began < 20  # what was in flight then had begun before
            storage.come_back()
            fio.communicate(timeout=60)
        assert fio.returncode != 0


@both_paths
def test_the_policy_is_changed_while_requests_wait(storage: Storage, path: str) -> None:
    """From ``wait`` to ``fail`` and back."""
    with attached(f"file:{storage.path}?direct=1", "--path", path, "--on-error", "wait") as device:
        storage.go()
        with writer(device) as dd:
            wait_until(lambda: waiting() > 0, "it waits")
            cli("set", "t", "on-error=fail")
            assert dd.wait(30) == 1
        with writer(device) as dd:
            assert dd.wait(30) == 1
        cli("set", "t", "on-error=wait")
        with writer(device) as dd:
            wait_until(lambda: waiting() > 0, "it waits")
            storage.come_back()
            assert dd.wait(30) == 0


@both_paths
def test_a_thin_file_on_a_full_file_system(tmp_path: Path, path: str) -> None:
    """``--on-full wait``: writes wait until there is space; without it they fail with ENOSPC."""
    small = tmp_path / "small"
    small.mkdir()
    run("mkfs.ext4", "-q", image(tmp_path / "small.img", 64 * MIB))
    run("mount", "-o", "loop", tmp_path / "small.img", small)
    with contextlib.ExitStack() as undo:
        undo.callback(run, "umount", "-l", small)
        ballast = small / "ballast"
        disk = image(small / "disk.img", 128 * MIB)
        run("dd", "if=/dev/zero", f"of={ballast}", "bs=1M", "status=none", check=False)
        words = ["dd", "if=/dev/zero", "bs=1M", "count=16", "oflag=direct", "status=none"]
        with attached(f"file:{disk}?direct=1", "--path", path) as device:
            failed = run(*words, f"of={device}", check=False)
            assert failed.returncode == 1
            assert "No space left" in failed.stderr or "Input/output error" in failed.stderr
            cli("set", "t", "on-full=wait")
            with subprocess.Popen([*words, f"of={device}"]) as dd:
                wait_until(lambda: waiting() > 0, "it waits")
                assert "No space left" in cli("info", "t").stdout
                ballast.unlink()
                assert dd.wait(120) == 0
