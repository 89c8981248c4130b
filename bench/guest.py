"""The part of ``make compare`` that runs as root on the kernel with VDUSE: measure, and leave the figures in a file.

All servers of a place stay attached on images of the same kind and take turns: in every round each case is run on each of
them, one right after the other, in an order that turns with the round. Rounds are short and many, so that whatever else the
machine does meanwhile slows all of them alike.

    python -m bench.guest RESULT --rounds N --seconds S [--place tmpfs|ext4] [--case PATTERN]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.host_load import Gauge
from bench.report import MIN_ROUNDS, in_turn
from bench.servers import QSD, Server, ours, qsd, run

TOP = Path(__file__).resolve().parent.parent
HOST_LOAD = TOP / "build/bench/host-load"
"""Where bench/compare.py on the host says how busy others keep it."""
IMAGE_BYTES = 256 << 20
WARM_SECONDS = 1.0
IDLE_SECONDS = 10.0
IDLE_ROUNDS = 3
SETTLE_SECONDS = 12.0
"""The peer's worker threads end 10 seconds after their last request."""
DISTURBED = 0.15
"""Share of the host's CPU time above which a run is repeated."""
TRIES = 4
PATIENCE_SECONDS = 300.0
"""Of repeating at one place."""
COUNTERS = ("wakeups", "submits", "publishes", "notifies")
"""What our server counts per I/O besides I/O: returns from sleep, io_uring_enter, updates of the ring, interrupts."""
_MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One kind of load. ``unit`` is the figure it is judged by, a key of what blkgen prints."""

    name: str
    direction: str
    pattern: str
    block: int
    depth: int
    unit: str
    least: float = 1.0
    """Ratio to the peer's best that is demanded where there is a block device under the file; 1 is where there is none."""

    def run(self, blkgen: Path, device: str, seconds: float) -> dict[str, float]:
        words = (self.direction, self.pattern, self.block, self.depth, seconds)
        result: dict[str, float] = json.loads(run(blkgen, device, *words))
        return result


CASES = (
    Case("randread 4k QD1", "read", "random", 4096, 1, "iops"),
    Case("randwrite 4k QD1", "write", "random", 4096, 1, "iops"),
    Case("randread 4k QD32", "read", "random", 4096, 32, "iops", least=1.4),
    Case("randwrite 4k QD32", "write", "random", 4096, 32, "iops", least=1.6),
    Case("randread 4k QD128", "read", "random", 4096, 128, "iops", least=1.7),
    Case("read 1M QD8", "read", "sequential", _MIB, 8, "mib_s"),
    Case("write 1M QD8", "write", "sequential", _MIB, 8, "mib_s"),
)


@dataclass(frozen=True)
class Place:
    """Where images lie, our source options there, and every way of the peer's that may be its best there."""

    name: str
    description: str
    options: str
    ways: tuple[str, ...]


DEVICE = "ext4"
PLACES = (
    Place(
        "tmpfs",
        "a file in memory",
        "",
        # Of five ways tried the two that win cases. Files in memory are done inside io_submit, so "native" needs no other
        # thread: nearly twice as fast as the others at depth 1. Threads never won.
        ("aio=io_uring,cache.direct=on", "aio=native,cache.direct=on"),
    ),
    Place(
        DEVICE,
        "a file on ext4 on a null_blk device with memory behind it, past the page cache",
        "?direct=1",
        ("aio=io_uring,cache.direct=on", "aio=native,cache.direct=on"),
    ),
)


def say(sentence: str) -> None:
    print(f"compare: {sentence}", flush=True)


@contextlib.contextmanager
def folder_of(place: Place) -> Iterator[Path]:
    """An empty directory of that kind."""
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        folder = Path(name)
        if place.name == "tmpfs":
            assert run("stat", "-f", "-c", "%T", folder).strip() == "tmpfs", f"{folder} is not in memory"
            yield folder
            return
        with _memory_disk((1 + len(place.ways)) * (IMAGE_BYTES >> 20) + 128) as device:
            run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard", device)
            run("mount", device, folder)
            try:
                yield folder
            finally:
                run("umount", folder)


@contextlib.contextmanager
def _memory_disk(mebibytes: int) -> Iterator[str]:
    """A null_blk device that keeps what is written. Its requests complete in an interrupt, as a real disk's do."""
    settings = Path("/sys/kernel/config/nullb/compare")
    if not settings.parent.exists():
        run("modprobe", "null_blk")
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")
    settings.mkdir()
    try:
        for key, value in {"size": mebibytes, "memory_backed": 1, "power": 1}.items():
            (settings / key).write_text(str(value))
        index = (settings / "index").read_text().strip()
        names = [name for name in ("compare", f"nullb{index}") if Path("/dev", name).exists()]
        yield f"/dev/{names[0]}"
    finally:
        settings.rmdir()


def write_image(path: Path) -> Path:
    """Every block allocated and written once."""
    piece = os.urandom(_MIB)
    with path.open("wb") as image:
        for _ in range(IMAGE_BYTES // _MIB):
            image.write(piece)
        os.fsync(image.fileno())
    return path


def measure_once(case: Case, blkgen: Path, server: Server, seconds: float, gauge: Gauge) -> dict[str, Any]:
    """One run of a case on a server's disk, with what it cost the server and how much others disturbed it."""
    counted, cpu, since = server.counters(), server.cpu_ns(), gauge.look()
    result = case.run(blkgen, server.device, seconds)
    disturbed, cpu = gauge.share(since), server.cpu_ns() - cpu
    events = {key: value - counted[key] for key, value in server.counters().items() if key in COUNTERS}
    return {
        **result,
        "server_cpu_us_per_io": cpu / 1000 / result["ios"],
        "per_io": {key: round(value / result["ios"], 4) for key, value in events.items()},
        "disturbed": round(disturbed, 3),
    }


class Patience:
    """Runs that others disturbed are repeated, whatever came out, as long as there is time for it."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def measure(self, case: Case, blkgen: Path, server: Server, seconds: float, gauge: Gauge) -> dict[str, Any]:
        """The least disturbed of up to ``TRIES`` runs."""
        began = time.monotonic()
        tries = [measure_once(case, blkgen, server, seconds, gauge)]
        once = time.monotonic() - began
        while tries[-1]["disturbed"] > DISTURBED and len(tries) < TRIES and self._left > 0:
            tries.append(measure_once(case, blkgen, server, seconds, gauge))
            self._left -= once
        return {**min(tries, key=lambda run: float(run["disturbed"])), "tries": len(tries)}


def idle(servers: Sequence[Server]) -> dict[str, list[float]]:
    """CPU milliseconds each server uses while nobody uses its disk, once it has come to rest; one value per round. If a host
    takes an emulated CPU away while a kernel thread looks whether it is still needed, that thread is charged for it."""
    found: dict[str, list[float]] = {server.name: [] for server in servers}
    time.sleep(SETTLE_SECONDS)
    for _ in range(IDLE_ROUNDS):
        before = [server.cpu_ns() for server in servers]
        time.sleep(IDLE_SECONDS)
        for server, then in zip(servers, before, strict=True):
            found[server.name].append((server.cpu_ns() - then) / 1e6)
    return found


def described(server: Server) -> dict[str, Any]:
    resident, unshared = server.memory_kib()
    return {"way": server.way, "command": list(server.command), "resident_kib": resident, "unshared_kib": unshared}


def compare_at(
    place: Place, cases: Sequence[Case], blkgen: Path, rounds: int, seconds: float, gauge: Gauge
) -> dict[str, Any]:
    """All cases at one place, round by round."""
    say(f"{place.name}: {place.description}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(folder_of(place))
        images = [write_image(folder / f"{number}.img") for number in range(1 + len(place.ways))]
        servers = [stack.enter_context(ours("ours", f"file:{images[0]}{place.options}"))]
        for number, (way, image) in enumerate(zip(place.ways, images[1:], strict=True), 1):
            servers.append(stack.enter_context(qsd(f"peer{number}", image, way)))
        for server in servers:
            say(f"{server.name} is {server.device}: {' '.join(server.command)}")
            for direction in ("write", "read"):
                Case("", direction, "random", 4096, 32, "").run(blkgen, server.device, WARM_SECONDS)
        patience = Patience(PATIENCE_SECONDS)
        runs: list[dict[str, Any]] = []
        for number in range(rounds):
            for case in cases:
                order = in_turn(servers, number)
                done = {server.name: patience.measure(case, blkgen, server, seconds, gauge) for server in order}
                runs += [{"case": case.name, "round": number, "server": name, **result} for name, result in done.items()]
                figures = ", ".join(f"{server.name} {done[server.name][case.unit]:.0f}" for server in servers)
                say(f"{place.name}, round {number + 1} of {rounds}, {case.name}: {figures}")
        return {
            "place": place.name,
            "description": place.description,
            "servers": {server.name: described(server) for server in servers},
            "runs": runs,
            "idle_ms": idle(servers),
        }


def ceilings(cases: Sequence[Case], blkgen: Path, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """What the client reaches on a device that does nothing, in the kernel and behind VDUSE: no server can be faster."""
    found: dict[str, dict[str, Any]] = {case.name: {"unit": case.unit, "client": [], "kernel": []} for case in cases}
    with ours("nothing", f"null:{IMAGE_BYTES}") as server:
        for _ in range(rounds):
            for case in cases:
                for what, device in (("client", "/dev/nullb0"), ("kernel", server.device)):
                    found[case.name][what].append(case.run(blkgen, device, seconds)[case.unit])
    say("no storage: measured")
    return found


def machine() -> str:
    """This machine in a few words."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    model = {key.strip(): value.strip() for key, value in facts.items()}.get("model name", platform.machine())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return f"{os.cpu_count()} x {model}, {memory} GiB"


def version_of_qsd() -> str:
    first = run(QSD, "--version").splitlines()[0]
    return first.partition("version ")[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.guest")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--place", choices=[place.name for place in PLACES])
    parser.add_argument("--case", default="*")
    arguments = parser.parse_args()
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, arguments.case)]
    places = [place for place in PLACES if arguments.place in (None, place.name)]
    if not cases:
        parser.error(f"no such case: {arguments.case}; there are {', '.join(case.name for case in CASES)}")
    say(f"kernel {platform.release()}")
    gauge = Gauge(HOST_LOAD)
    # Copied: a program on the guest's network file system is read page by page.
    blkgen = Path(shutil.copy(TOP / "build/bench/blkgen", tempfile.mkdtemp(prefix="blkgen-")))
    try:
        found = {
            "machine": machine(),
            "kernel": platform.release(),
            "qsd": version_of_qsd(),
            "ceilings": ceilings(cases, blkgen, min(MIN_ROUNDS, arguments.rounds), arguments.seconds),
            "places": [compare_at(place, cases, blkgen, arguments.rounds, arguments.seconds, gauge) for place in places],
        }
    finally:
        shutil.rmtree(blkgen.parent)
    arguments.result.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        say(f"failed: {error}")
        sys.exit(3)
