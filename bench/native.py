"""``make bench``: our vhost-user-blk export against qemu-storage-daemon's, natively, taking turns on like images.

The load generator (vhost_gen.c) is a front-end without a machine around it, so what is measured is the servers and the
kernel's file I/O. Ends with ``bench: ok`` and 0, ``bench: short N`` and 1, as bench/report.py says.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.compare import BUILD, CFLAGS, RESULTS, TOP
from bench.report import Report, Row, best_peer
from vduse_blk import __version__, control

QSD = "qemu-storage-daemon"
IMAGE_BYTES = 1 << 30
QUEUES = 2
MIB = 1 << 20
_WAIT = 30.0


@dataclass(frozen=True)
class Case:
    """A load on the servers of one place. ``words`` go to vhost_gen; ``least`` ratio and ``most`` CPU share are demanded."""

    name: str
    place: str
    words: tuple[str, ...]
    unit: str = "iops"
    least: float | None = None
    cpu_least: float | None = None


HOLES, TMPFS, PYTHON = "file of holes", "tmpfs", "Python backend"
_4K = ("--size", "4096")
_1M = ("--size", str(MIB), "--sequential", "--depth", "8")
CASES = (
    Case("4k randread QD1", HOLES, (*_4K, "--depth", "1"), least=2.5),
    Case("4k randread QD32", HOLES, (*_4K, "--depth", "32"), least=2.3, cpu_least=2.0),
    Case("4k randread QD128", HOLES, (*_4K, "--depth", "128"), least=2.7, cpu_least=2.0),
    Case("4k randread QD32, polling client", HOLES, (*_4K, "--depth", "32", "--poll")),
    Case("4k randread QD32 on each of 2 queues", HOLES, (*_4K, "--depth", "32", "--queues", "2"), least=3.5),
    Case("4k randread QD32", TMPFS, (*_4K, "--depth", "32"), least=2.0),
    Case("4k randwrite QD32", TMPFS, (*_4K, "--depth", "32", "--op", "write"), least=2.0),
    Case("1 MiB read QD8", TMPFS, _1M, unit="mib_s", least=1.0),
    Case("1 MiB write QD8", TMPFS, (*_1M, "--op", "write"), unit="mib_s", least=1.0),
    Case("4k randread QD32, against QSD on tmpfs", PYTHON, (*_4K, "--depth", "32"), least=1.2),
)
UNITS = {"iops": "IOPS", "mib_s": "MiB/s"}
# How each side is told to do its I/O. QSD: every way that could be its best.
OURS = {HOLES: "file:{image}?direct=1", TMPFS: "file:{image}", PYTHON: "memory:1G"}
PEERS = {
    HOLES: ("aio=io_uring,cache.direct=on",),
    TMPFS: ("aio=io_uring,cache.direct=on", "aio=threads", "aio=threads,cache.direct=on"),
    PYTHON: ("aio=io_uring,cache.direct=on", "aio=threads"),
}
LIMIT_LEAST = 0.9


@dataclass(frozen=True)
class Server:
    """A running export. ``way``: how it does its I/O; ``command``: how it was started."""

    way: str
    pid: int
    socket: Path
    command: tuple[str, ...]

    def cpu_ns(self) -> int:
        """CPU time of the process, as clock_getcpuclockid(3) names it."""
        return time.clock_gettime_ns((~self.pid << 3) | 2)

    def memory_mib(self) -> float:
        """What no other process shares."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@contextlib.contextmanager
def running(way: str, socket: Path, command: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """A server for the length of a block."""
    env = os.environ | environment
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, env=env, stdout=said, stderr=said, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            deadline = time.monotonic() + _WAIT
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"{' '.join(command)}: no {socket}\n{said.read()}")
                time.sleep(0.02)
            yield Server(way, process.pid, socket, tuple(command))
        finally:
            process.send_signal(signal.SIGTERM)


def ours(place: str, image: Path, folder: Path) -> contextlib.AbstractContextManager[Server]:
    source = OURS[place].format(image=image)
    socket = folder / "ours.sock"
    words = [sys.executable, "-P", "-m", "vduse_blk.cli", "serve", source, "--name", "bench", "--queues", str(QUEUES)]
    words += ["--export", f"vhost-user:{socket}", "--path", "plugin" if place == PYTHON else "native"]
    return running(source.partition("?")[2], socket, words, {control.RUN_ENV: str(folder / "run")})


def qsd(way: str, number: int, image: Path, folder: Path) -> contextlib.AbstractContextManager[Server]:
    socket = folder / f"qsd{number}.sock"
    words = [QSD, "--object", "iothread,id=thread"]
    words += ["--blockdev", f"driver=file,node-name=image,filename={image},{way}"]
    words += ["--export", f"type=vhost-user-blk,id=export,node-name=image,addr.type=unix,addr.path={socket},"
              f"writable=on,num-queues={QUEUES},iothread=thread"]  # fmt: skip
    return running(way, socket, words, {})


def make_image(path: Path, filled: bool) -> Path:
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
        for _ in range(IMAGE_BYTES // MIB if filled else 0):
            file.write(bytes(MIB))
    return path


def load(generator: Path, server: Server, case: Case, seconds: int) -> dict[str, float]:
    """One turn: what the generator prints, and the server's CPU microseconds per I/O."""
    before = server.cpu_ns()
    words = [str(generator), str(server.socket), "--seconds", str(seconds), *case.words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    found["server_cpu_us_per_io"] = (server.cpu_ns() - before) / 1000 / found["ios"]
    return found


def fio(image: Path, seconds: int) -> float:
    """IOPS of 4 KiB random reads at QD32 straight on the file: what the kernel can do without anybody between."""
    words = ["fio", "--name=limit", f"--filename={image}", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring"]
    words += ["--iodepth=32", "--iodepth_batch_submit=8", "--iodepth_batch_complete_min=1"]
    words += ["--iodepth_batch_complete_max=8", "--registerfiles", "--norandommap", "--randrepeat=0", "--gtod_reduce=1"]
    words += ["--time_based", f"--runtime={seconds}"]
    done = subprocess.run([*words, "--output-format=json"], capture_output=True, text=True, check=True, timeout=seconds + 60)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])


def measure(place: str, cases: Sequence[Case], rounds: int, seconds: int, generator: Path) -> Iterator[Row]:
    """All rows of one place: its servers run all the time and take turns."""
    parent = "/var/tmp" if place == HOLES else "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="bench", dir=parent) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        image = make_image(folder / "0.img", filled=place != HOLES)
        us = stack.enter_context(ours(place, image, folder))
        peers = []
        for number, way in enumerate(PEERS[place]):
            peer_image = make_image(folder / f"{number + 1}.img", filled=place != HOLES)
            peers.append(stack.enter_context(qsd(way, number, peer_image, folder)))
        for case in cases:
            results: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *(peer.way for peer in peers))}
            limit: list[float] = []
            for _ in range(rounds):
                results["ours"].append(load(generator, us, case, seconds))
                for peer in peers:
                    results[peer.way].append(load(generator, peer, case, seconds))
                if case.name == "4k randread QD32" and place == HOLES:
                    limit.append(fio(image, seconds))
            best, _ = best_peer({peer.way: [run[case.unit] for run in results[peer.way]] for peer in peers})
            yield from rows_of(case, results["ours"], results[best], best, limit)
        memory = min(peer.memory_mib() for peer in peers)
        yield Row(f"{place}: unshared memory", "MiB", [us.memory_mib()], [memory], less_is_better=True)


def rows_of(
    case: Case, mine: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], way: str, limit: Sequence[float]
) -> Iterator[Row]:
    """What one case says: its throughput first."""

    def rounds(runs: Sequence[dict[str, float]], key: str) -> list[float]:
        return [run[key] for run in runs]

    title = f"{case.place}: {case.name}"
    ours, peer = rounds(mine, case.unit), rounds(theirs, case.unit)
    yield Row(title, UNITS[case.unit], ours, peer, least=case.least, notes=(f"peer: {way}",))
    if limit:
        yield Row(f"{title}, against fio on the file", "IOPS", ours, limit, least=LIMIT_LEAST)
    for key, what, least in (
        ("server_cpu_us_per_io", "CPU of the server per I/O", case.cpu_least),
        ("p50_us", "half of the I/Os within", None),
        ("p99_us", "99 % of the I/Os within", None),
    ):
        yield Row(f"{title}: {what}", "us", rounds(mine, key), rounds(theirs, key), less_is_better=True, least=least)


def machine() -> str:
    """Processor, number of them, memory."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} x {model[1] if model else platform.machine()}, {pages / 2**30:.0f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/native", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each server in each case (%(default)s)")
    parser.add_argument("--seconds", type=int, default=1, help="length of a turn (%(default)s)")
    parser.add_argument("--case", default="*", help="only these cases: a name or a pattern, '*QD32'")
    arguments = parser.parse_args()
    generator = BUILD / "vhost_gen"
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", *CFLAGS, "-pthread", TOP / "bench/vhost_gen.c", "-o", generator], check=True)
    rows: list[Row] = []
    for place in (HOLES, TMPFS, PYTHON):
        cases = [case for case in CASES if case.place == place and fnmatch.fnmatch(case.name, arguments.case)]
        if cases:
            print(f"bench: {place}: {len(cases)} cases", flush=True)
            rows += measure(place, cases, arguments.rounds, arguments.seconds, generator)
    version = subprocess.run([QSD, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    report = Report(
        name="bench",
        machine=machine(),
        kernel=platform.release(),
        versions={"vduse-blk": __version__, "qemu-storage-daemon": version.rpartition("version ")[2]},
        rows=rows,
        facts={
            "peer": f"{QSD} with an iothread; of several ways to do its I/O the best in each case",
            "file of holes": "direct I/O that never reaches a device: what the software costs",
            "client": "vhost_gen, a sleeping front-end where not said otherwise, split ring of 256, indirect, EVENT_IDX",
        },
    )
    report.write(RESULTS if arguments.case == "*" else BUILD)
    print(report.text())
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
