"""The servers that are compared, as processes of the guest: start one on an image, find its disk, look at what it costs.

Runs as root on a kernel with VDUSE. Every server here is a context: when the block ends its disk and its process are gone.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vduse_blk.control.status import disk_status

QUEUES = 1
QUEUE_SIZE = 256
QSD = "qemu-storage-daemon"
_CLI = (sys.executable, "-P", "-m", "vduse_blk.cli")
_WAIT = 60.0
"""Seconds for anything to appear; an emulated machine is slow."""


@dataclass(frozen=True)
class Server:
    """One that serves a disk. ``way`` is how it was told to do its I/O, as the report names it."""

    name: str
    way: str
    pid: int
    disk: str
    command: tuple[str, ...]
    is_ours: bool

    @property
    def device(self) -> str:
        return f"/dev/{self.disk}"

    def cpu_ns(self) -> int:
        """CPU time of the process in nanoseconds, threads that have ended included."""
        # The clock that clock_getcpuclockid(3) names: the process, by what the scheduler counted.
        return time.clock_gettime_ns((~self.pid << 3) | 2)

    def memory_kib(self) -> tuple[int, int]:
        """Resident memory, and what of it no other process shares."""
        unshared = resident = 0
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, value = line.split()[:2]
            if key.startswith("Private_"):
                unshared += int(value)
            elif key == "Rss:":
                resident = int(value)
        return resident, unshared

    def counters(self) -> dict[str, int]:
        """What our own server counts; nothing for another."""
        if not self.is_ours:
            return {}
        found: dict[str, int] = disk_status(self.name, timeout=10).info["counters"]
        return found


def run(*words: object) -> str:
    """A command's standard output; a failure shows all it said."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def ours(name: str, source: str) -> Iterator[Server]:
    """``vduse-blk attach SOURCE``, as a user types it but for the queues."""
    options = ("--queues", str(QUEUES), "--queue-size", str(QUEUE_SIZE))
    run(*_CLI, "attach", source, "--name", name, *options)
    try:
        disk = _find_disk(name)
        _same_queue_settings(disk)
        pid = int(disk_status(name, timeout=10).info["pid"])
        yield Server(name, source.partition("?")[2], pid, disk, ("vduse-blk", "attach", source, *options), True)
    finally:
        run(*_CLI, "detach", name, "--force")


@contextlib.contextmanager
def qsd(name: str, image: Path, way: str) -> Iterator[Server]:
    """qemu-storage-daemon with a VDUSE export; ``way`` is what its file driver is told: ``aio=io_uring,cache.direct=on``."""
    command = (
        QSD,
        "--object",
        "iothread,id=thread",
        "--blockdev",
        f"driver=file,node-name=image,filename={image},{way}",
        "--export",
        f"type=vduse-blk,id=export,node-name=image,name={name},num-queues={QUEUES},queue-size={QUEUE_SIZE},"
        "writable=on,iothread=thread",
    )
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        _wait(lambda: Path("/dev/vduse", name).exists() or process.poll() is not None, f"{QSD} to make {name}")
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
        run("vdpa", "dev", "add", "name", name, "mgmtdev", "vduse")
        try:
            disk = _find_disk(name)
            _same_queue_settings(disk)
            yield Server(name, way, process.pid, disk, command, False)
        finally:
            # While it lives: it has to answer the driver that lets go.
            run("vdpa", "dev", "del", name)
    finally:
        process.terminate()
        process.wait(_WAIT)


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _WAIT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {_WAIT:.0f} s for {what}")
        time.sleep(0.05)


def _disks_of(name: str) -> Sequence[Path]:
    found = Path("/sys/bus/vdpa/devices", name).glob("virtio*/block/*")
    return [path for path in found if int((path / "size").read_text()) > 0]


def _find_disk(name: str) -> str:
    _wait(lambda: _disks_of(name), f"the disk of {name}")
    disk = _disks_of(name)[0].name
    _wait(lambda: Path("/dev", disk).exists(), f"/dev/{disk}")
    return disk


def _same_queue_settings(disk: str) -> None:
    """No scheduler and no merging on either side: what is asked for is what the server gets."""
    queue = Path("/sys/block", disk, "queue")
    (queue / "scheduler").write_text("none")
    (queue / "nomerges").write_text("2")
