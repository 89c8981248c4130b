"""The bounce area in the server's memory: on a real kernel, through everything that makes it change hands."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.kernel.host import (
    CLI,
    assert_nothing_left,
    attached,
    cli,
    fio,
    image,
    info,
    run,
    servers,
    uneven,
    wait_until,
)
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError
from vduse_blk.control.status import disk_status
from vduse_blk.exporter import KILL_ENV

MIB = 1 << 20
LIMITED = ("prlimit", f"--memlock={MIB}:{MIB}", "setpriv", "--bounding-set=-sys_resource")
"""A process that may pin next to nothing, and not raise that."""
WORKER = (sys.executable, "-P", "-m", "vduse_blk.worker")


def bounce(name: str = "t") -> str:
    """Whose memory it is: "server" or "kernel"."""
    return str(disk_status(name).info["bounce"]["memory"])


def pinned(pid: int) -> int:
    """Bytes of a process that the kernel has pinned."""
    found = re.search(r"VmPin:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def disks_of(name: str) -> list[str]:
    """Nodes of the disks that a driver has made of a device."""
    found = Path("/sys/bus/vdpa/devices", name).glob("virtio*/block/*")
    return [f"/dev/{path.name}" for path in found if Path("/dev", path.name).exists()]


@contextlib.contextmanager
def verified_load(device: str) -> Iterator[subprocess.Popen[str]]:
    """fio for the length of a block, which must not end before: random writes, mixed sizes, each verified, no error."""
    options = {
        "rw": "randwrite", "bsrange": "512-64k", "direct": 1, "ioengine": "libaio", "iodepth": 16, "verify": "crc32c",
        "numjobs": 2, "size": "16M", "offset_increment": "16M", "verify_state_save": 0, "fsync": 64,
        "verify_backlog": 256, "time_based": 1, "runtime": 600,
    }  # fmt: skip
    words = ["fio", "--name=t", f"--filename={device}", *(f"--{key}={value}" for key, value in options.items())]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as load:
        try:
            yield load
            assert load.poll() is None
            load.send_signal(signal.SIGINT)
            said, _ = load.communicate(timeout=300)
        finally:
            load.kill()
    assert load.returncode in (0, 128), said  # by version; 128: it was interrupted
    assert said.count("err= 0") == 2, said


def served(name: str = "t") -> None:
    """Wait until some more writes are done, from storage and back."""
    before = writes(name)
    wait_until(lambda: writes(name) > before + 100, "requests are served")


def writes(name: str) -> int:
    return int(disk_status(name).info.get("counters", {}).get("write_ops", 0))


@pytest.mark.parametrize("path", ["native", "plugin"])
def test_registered_and_anew_for_the_next_driver(tmp_path: Path, path: str) -> None:
    """The whole area is pinned while a driver has the disk, nothing of it after the driver has let go, and the next driver
    finds what was written."""
    with attached(image(tmp_path / "disk.img", 64 * MIB), "--queues", "2", "--path", path) as device:
        size, (pid,) = info("t")["bounce"]["size"], servers()
        assert size == int(Path("/sys/class/vduse/t/bounce_size").read_text())
        assert pinned(pid) >= size
        fio(device, rw="randwrite", bs="4k", size="1M", direct=1, ioengine="libaio", iodepth=32, verify="crc32c")
        (virtio,) = Path("/sys/bus/vdpa/devices/t").glob("virtio*")
        driver = Path("/sys/bus/virtio/drivers/virtio_blk")
        for _ in range(2):
            (driver / "unbind").write_text(virtio.name)
            assert (pinned(pid), info("t")["bounce"]) == (0, None)
            (driver / "bind").write_text(virtio.name)
            wait_until(lambda: disks_of("t"), "the disk is there again")
            (device,) = disks_of("t")  # the kernel may have called it anew
            # Read back what the first driver wrote.
            fio(
                device, rw="randwrite", bs="4k", size="1M", direct=1, ioengine="libaio", iodepth=32, verify="crc32c",
                verify_only=1,
            )  # fmt: skip
            assert (bounce(), pinned(pid) >= size) == ("server", True)


@pytest.mark.parametrize("path", ["native", "plugin"])
def test_refused(tmp_path: Path, path: str) -> None:
    """A server that may not pin memory serves the disk through the kernel's pages, and says why."""
    words = ("attach", image(tmp_path / "disk.img", 64 * MIB), "--name", "t", "--path", path)
    device = run(*LIMITED, *CLI, *words).stdout.strip()
    facts, (pid,) = info("t")["bounce"], servers()
    assert (facts["memory"], "RLIMIT_MEMLOCK" in facts["because"]) == ("kernel", True), facts
    assert "kernel's memory: IOTLB_REG_UMEM" in cli("info", "t").stdout
    assert pinned(pid) == 0
    fio(device, rw="randwrite", bsrange="512-256k", size="8M", direct=1, ioengine="libaio", iodepth=32, verify="crc32c")
    cli("detach", "t")
    assert_nothing_left()


def test_killed_with_data_in_flight(tmp_path: Path) -> None:
    """What a driver has put into memory of a server that is killed reaches the storage through its successor, whether that
    gets memory or not; fio verifies every block."""
    replayed = 0
    with uneven(image(tmp_path / "disk.img", 64 * MIB)) as storage:
        words = (*CLI, "attach", f"file:{storage}?direct=1", "--name", "t", "--queues", "2")
        device = run(*words).stdout.strip()
        with verified_load(device):
            for prefix, memory in (((), "server"), (LIMITED, "kernel"), ((), "server"), ((), "server")):
                served()
                (pid,) = servers()
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not servers(), "the server is dead")
                assert run(*prefix, *words).stdout.strip() == device
                replayed += info("t")["events"][-1]["replayed"]
                served()
                assert bounce() == memory
                # By the device, and by the ring of each queue.
                (pid,) = servers()
                expected = 3 * info("t")["bounce"]["size"] if memory == "server" else 0
                wait_until(lambda pid=pid, expected=expected: pinned(pid) == expected, "pages are held")
        assert replayed > 0
        cli("detach", "t")
    assert_nothing_left()


def upgrade(command: Sequence[str]) -> None:
    with Client("t", 60) as client:
        client.call("upgrade", command=list(command), patience=30)


def test_upgraded_under_load(tmp_path: Path) -> None:
    """The area changes hands while fio verifies: to a server that is killed when it serves already, and back; to one that
    gets memory; to one that gets none."""
    device = cli("attach", image(tmp_path / "disk.img", 64 * MIB), "--name", "t", "--queues", "2").stdout.strip()
    with verified_load(device):
        served()
        pid = info("t")["pid"]
        with pytest.raises(ControlError, match=r"signal 9.*served as before"):
            upgrade(["env", f"{KILL_ENV}=restarted", *WORKER])
        served()
        assert (info("t")["pid"], bounce()) == (pid, "server")
        for command, memory in ((WORKER, "server"), ((*LIMITED, *WORKER), "kernel")):
            upgrade(command)
            served()
            assert bounce() == memory
    cli("detach", "t")
    assert_nothing_left()


def test_more_in_flight_than_the_area_holds(tmp_path: Path) -> None:
    """What finds no room waits for some, and is as right as the rest."""
    with attached(image(tmp_path / "disk.img", 64 * MIB)) as device:
        fio(device, rw="randwrite", bs="1M", size="48M", direct=1, ioengine="libaio", iodepth=32, verify="crc32c")
        assert info("t")["bounce"]["size"] < 32 * MIB
