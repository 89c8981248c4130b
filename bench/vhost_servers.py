"""The vhost-user servers that ``make bench`` compares, as processes of this machine, and a turn of the load on one of them.

Nothing outlives the benchmark: a server that does not end within two seconds of being asked is killed, and one whose
benchmark was killed gets a SIGKILL from the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from bench import libblkio
from vduse_blk.control import rundir

QSD = "qemu-storage-daemon"
IMAGE_BYTES = 1 << 30
MIB = 1 << 20
START_SECONDS = 30.0
END_SECONDS = 2.0
SYSCALLS = "raw_syscalls:sys_enter"


@dataclass(frozen=True)
class Server:
    """A running export. ``way``: how it does its I/O, and QSD's version; ``command``: how it was started."""

    way: str
    pid: int
    socket: Path
    command: tuple[str, ...]
    process: subprocess.Popen[bytes] = field(repr=False)
    said: IO[str] = field(repr=False)

    def wait(self) -> None:
        """Until it can be reached. Raises RuntimeError with all it said if it cannot."""
        deadline = time.monotonic() + START_SECONDS
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.said.seek(0)
                raise RuntimeError(f"{' '.join(self.command)}: no {self.socket}\n{self.said.read()}")
            time.sleep(0.02)

    def cpu_ns(self) -> int:
        """CPU time of the process, as clock_getcpuclockid(3) names it."""
        return time.clock_gettime_ns((~self.pid << 3) | 2)

    def memory_mib(self) -> float:
        """What no other process shares."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

    def move_to(self, cpus: set[int]) -> None:
        """Bind all its threads, and so those that they start."""
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                os.sched_setaffinity(int(thread.name), cpus)
            except OSError as error:
                # ESRCH: it has ended; EINVAL: a worker of the kernel's, which nobody may bind.
                if error.errno not in (errno.ESRCH, errno.EINVAL):
                    raise


@contextlib.contextmanager
def started(way: str, socket: Path, command: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """A server for the length of a block, which begins before it can be reached."""
    # setpriv only arranges for the SIGKILL and becomes the command: the process is the server's. The signal comes when the
    # thread that started it ends, so this is for the main thread.
    words = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    with (socket.parent / f"{socket.name}.log").open("w+") as said:
        process = subprocess.Popen(words, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            yield Server(way, process.pid, socket, tuple(command), process, said)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running(way: str, socket: Path, command: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """A server that can be reached, for the length of a block."""
    with started(way, socket, command, environment) as server:
        server.wait()
        yield server


def our_words(
    source: str, folder: Path, queues: int, path: str = "native", name: str = "ours"
) -> tuple[str, Path, list[str], dict[str, str]]:
    """What ``started`` and ``running`` are told for our server of a source."""
    socket = folder / f"{name}.sock"
    words = [sys.executable, "-P", "-m", "vduse_blk.cli", "serve", source, "--name", name, "--queues", str(queues)]
    words += ["--export", f"vhost-user:{socket}", "--path", path]
    return source.partition("?")[2], socket, words, {rundir.RUN_ENV: str(folder / "run")}


def ours(
    source: str, folder: Path, queues: int, *, path: str = "native", name: str = "ours"
) -> contextlib.AbstractContextManager[Server]:
    """Our server of a source."""
    return running(*our_words(source, folder, queues, path, name))


@dataclass(frozen=True)
class Qsd:
    """A qemu-storage-daemon that this host can run. ``version``: as it says itself."""

    version: str
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> str:
        """The version without the packager's."""
        return self.version.partition(" ")[0]


def qsds() -> tuple[Qsd, ...]:
    """Debian 13's, which what is demanded refers to, whatever the host; then the host's own, if it has another."""
    reference = _qsd_of(*libblkio.command(QSD))
    own = _qsd_of((QSD,), {}) if shutil.which(QSD) else reference
    return (reference,) if own.number == reference.number else (reference, own)


def _qsd_of(words: tuple[str, ...], environment: dict[str, str]) -> Qsd:
    said = subprocess.run([*words, "--version"], env=os.environ | environment, capture_output=True, text=True, check=True)
    return Qsd(said.stdout.split("\n")[0].rpartition("version ")[2], words, environment)


def qsd(
    program: Qsd, way: str, number: int, image: Path, folder: Path, queues: int
) -> contextlib.AbstractContextManager[Server]:
    """qemu-storage-daemon with an iothread. ``way``: what its file driver is told."""
    socket = folder / f"qsd{number}.sock"
    words = [*program.words, "--object", "iothread,id=thread", *_qsd_export(way, 0, image, socket, queues)]
    return running(f"{program.number}, {way}", socket, words, program.environment)


@contextlib.contextmanager
def qsd_of_many(program: Qsd, way: str, images: Sequence[Path], folder: Path) -> Iterator[list[Server]]:
    """One qemu-storage-daemon with one iothread that exports all the images, a queue each: a Server for each export."""
    sockets = [folder / f"many{number}.sock" for number in range(len(images))]
    words = [*program.words, "--object", "iothread,id=thread"]
    for number, (image, socket) in enumerate(zip(images, sockets, strict=True)):
        words += _qsd_export(way, number, image, socket, 1)
    with running(f"{program.number}, {way}", sockets[-1], words, program.environment) as server:  # it makes them in turn
        yield [replace(server, socket=socket) for socket in sockets]


def _qsd_export(way: str, number: int, image: Path, socket: Path, queues: int) -> list[str]:
    # Without its locks on the file: the same one may be served by more than one of those that are compared.
    return ["--blockdev", f"driver=file,node-name=image{number},filename={image},locking=off,{way}",
            "--export", f"type=vhost-user-blk,id=export{number},node-name=image{number},addr.type=unix,addr.path={socket},"
            f"writable=on,num-queues={queues},iothread=thread"]  # fmt: skip


def make_image(path: Path, *, filled: bool) -> Path:
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
        for _ in range(IMAGE_BYTES // MIB if filled else 0):
            file.write(bytes(MIB))
    return path


@contextlib.contextmanager
def cpu_each(servers: Sequence[Server]) -> Iterator[tuple[str, ...]]:
    """Binds the servers to this process's last CPU for the length of a block; yields what binds a command to the first."""
    cpus = sorted(os.sched_getaffinity(0))
    try:
        for server in servers:
            server.move_to({cpus[-1]})
        yield ("taskset", "-c", str(cpus[0]))
    finally:
        for server in servers:
            server.move_to(set(cpus))


def turn(
    generator: Path, server: Server, words: Sequence[str], seconds: int, before: Sequence[str] = ()
) -> dict[str, float]:
    """What the generator prints, and the server's CPU microseconds per I/O. ``before``: the command to run it under."""
    cpu = server.cpu_ns()
    command = [*before, str(generator), str(server.socket), "--seconds", str(seconds), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    found["server_cpu_us_per_io"] = (server.cpu_ns() - cpu) / 1000 / found["ios"]
    found["interrupts_per_io"] = found["interrupts"] / found["ios"]
    return found


def syscalls_per_io(generator: Path, server: Server, words: Sequence[str]) -> float | None:
    """System calls of the server per I/O, counted by perf in a turn of its own; None where perf cannot."""
    log = server.socket.parent / "perf.csv"
    perf = ("perf", "stat", "-x", ",", "-e", SYSCALLS, "-p", str(server.pid), "-o", str(log), "--")
    try:
        found = turn(generator, server, words, 1, perf)
    except (OSError, RuntimeError):
        return None
    counted = re.search(rf"^(\d+),.*{SYSCALLS}", log.read_text(), re.MULTILINE)
    return int(counted[1]) / found["ios"] if counted else None


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end the program like an exception does, so that the servers end first."""

    def end(number: int, _frame: object) -> None:
        for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, end)
