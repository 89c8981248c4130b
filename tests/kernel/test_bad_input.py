"""Bad input gets one sentence with a remedy and the documented exit code, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.host import CLI, assert_nothing_left, attached, cli, image, run, wait_until

MIB = 1 << 20


def missing(tmp_path: Path) -> list[object]:
    return [tmp_path / "none.img"]


def directory(tmp_path: Path) -> list[object]:
    return [tmp_path]


def odd_size(tmp_path: Path) -> list[object]:
    return [image(tmp_path / "odd.img", MIB + 512), "--block-size", 4096]


def empty(tmp_path: Path) -> list[object]:
    return [image(tmp_path / "empty.img", 0)]


def absurd_queue_size(tmp_path: Path) -> list[object]:
    return [image(tmp_path / "a.img", MIB), "--queue-size", 100]


def absurd_queues(tmp_path: Path) -> list[object]:
    return [image(tmp_path / "a.img", MIB), "--queues", 100000]


def bad_name(tmp_path: Path) -> list[object]:
    return [image(tmp_path / "a.img", MIB), "--name", "../x"]


def unknown_backend(tmp_path: Path) -> list[object]:
    return ["nosuch:1G"]


def too_much_memory(tmp_path: Path) -> list[object]:
    return ["memory:7E"]


CASES: list[tuple[Callable[[Path], list[object]], int]] = [
    (missing, 2),
    (directory, 2),
    (odd_size, 2),
    (empty, 2),
    (absurd_queue_size, 2),
    (absurd_queues, 2),
    (bad_name, 2),
    (unknown_backend, 2),
    (too_much_memory, 1),
]


@pytest.mark.parametrize(("case", "code"), CASES)
def test_refused(tmp_path: Path, case: Callable[[Path], list[object]], code: int) -> None:
    """The exit code, and one sentence without a traceback."""
    done = cli("attach", *case(tmp_path), check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("vduse-blk:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_left()


def test_a_file_in_use_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    """A second disk on the same file, and a file that qemu-storage-daemon has open: exit 4, and who it is."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    with attached(disk, name="one"):
        refused = cli("attach", disk, "--name", "two", check=False)
        assert refused.returncode == 4
        assert "python" in refused.stderr or "vduse" in refused.stderr
        taken = cli("attach", "memory:16M", "--name", "one", check=False)
        assert taken.returncode == 4
    blockdev = f"driver=file,node-name=f,filename={disk},locking=on"
    with subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", blockdev, "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd",
         "--export", "nbd,id=e,node-name=f,writable=on"]
    ) as qemu:  # fmt: skip
        try:
            wait_until(lambda: (tmp_path / "nbd").exists() or qemu.poll() is not None, "qemu-storage-daemon listens")
            assert qemu.poll() is None
            refused = cli("attach", disk, "--name", "two", check=False)
            assert refused.returncode == 4
            assert str(qemu.pid) in refused.stderr
        finally:
            qemu.terminate()
    assert_nothing_left()


def test_a_run_directory_without_room_for_the_in_flight_log(tmp_path: Path) -> None:
    """One sentence with the path, after the kernel device was made: it is gone again."""
    small = tmp_path / "run"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "nr_inodes=8,mode=755", "none", small)
    try:
        refused = cli("attach", "memory:16M", "--name", "i", check=False, env={"VDUSE_BLK_RUN": str(small)})
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1] == f"vduse-blk: cannot write {small}/i/inflight: No space left on device"
        assert list(small.iterdir()) == []
    finally:
        run("umount", small)
    assert_nothing_left()


def test_without_root(tmp_path: Path) -> None:
    """Not root: exit 5 and the remedy."""
    # Able to read, because our files may lie in a directory of root's own.
    readable = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    refused = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *readable, *CLI, "attach", "memory:16M", "--name", "u"],
        capture_output=True, text=True, check=False, env=os.environ | {"HOME": "/tmp"},
    )  # fmt: skip
    assert refused.returncode == 5, refused.stderr
    assert "root" in refused.stderr


def test_without_the_module() -> None:
    """No module to load: exit 6 from attach and doctor, naming it."""
    run("modprobe", "-r", "vduse")
    without = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /lib/modules && exec "$@"', "sh", *CLI]
    refused = run(*without, "attach", "memory:16M", "--name", "u", check=False)
    assert refused.returncode == 6, refused.stderr
    assert "vduse" in refused.stderr
    assert run(*without, "doctor", check=False).returncode == 6
    # With modules to be had, attach loads what is missing.
    with attached("memory:16M", name="u"):
        assert cli("doctor", check=False).returncode == 0
    assert_nothing_left()
