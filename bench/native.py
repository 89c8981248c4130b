"""``make bench``: our vhost-user-blk export against qemu-storage-daemon's, natively, taking turns on like images.

The load generator (vhost_gen.c) is a front-end without a machine around it, so what is measured is the servers and the
kernel's file I/O. Ends with ``bench: ok`` and 0, ``bench: short N`` and 1, as bench/report.py says.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import libblkio, readme, scaling
from bench.compare import BUILD, CFLAGS, LIMIT_SHARE, RESULTS, TOP
from bench.report import MIN_ROUNDS, Report, Row, best_peer, in_turn
from bench.vhost_servers import (
    IMAGE_BYTES,
    MIB,
    QSD,
    Qsd,
    Server,
    cpu_each,
    end_on_signals,
    make_image,
    ours,
    qsd,
    qsds,
    syscalls_per_io,
    turn,
)
from vduse_blk import __version__

QUEUES = 2
LIMIT_ROUNDS = 2
LIMIT_NOTE = "client and ring are the limit: without storage it is hardly faster"


@dataclass(frozen=True)
class Case:
    """A load on the servers of one place. ``words`` go to vhost_gen; the ratios ``least`` and ``cpu_least`` are demanded.

    ``cpu_each``: server and client are bound to a CPU each. ``straight``: fio on the file itself takes turns, too,
    with 4 KiB random reads at queue depth 32, and ``straight_least`` of its IOPS is demanded.
    """

    name: str
    place: str
    words: tuple[str, ...]
    unit: str = "iops"
    least: float | None = None
    cpu_least: float | None = None
    cpu_each: bool = False
    straight: bool = False
    straight_least: float | None = None


HOLES, TMPFS, PYTHON = "file of holes", "tmpfs", "Python backend"
_4K = ("--size", "4096")
_1M = ("--size", str(MIB), "--sequential", "--depth", "8")
CASES = (
    # With the scheduler free a queue depth of 1 has two outcomes, both on one CPU or on two: a factor of four.
    Case("4k randread QD1", HOLES, (*_4K, "--depth", "1"), least=2.5, cpu_each=True),
    Case("4k randread QD1, scheduler free", HOLES, (*_4K, "--depth", "1")),
    Case("4k randread QD32", HOLES, (*_4K, "--depth", "32"), least=2.3, cpu_least=2.0, straight=True),
    Case("4k randread QD128", HOLES, (*_4K, "--depth", "128"), least=2.7, cpu_least=2.0),
    # fio never sleeps: whoever is to reach its rate must not wait to be woken either.
    Case("4k randread QD32, polling client", HOLES, (*_4K, "--depth", "32", "--poll"), straight=True, straight_least=0.9),
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
    HOLES: ("aio=io_uring,cache.direct=on", "aio=native,cache.direct=on"),
    TMPFS: ("aio=io_uring,cache.direct=on", "aio=threads", "aio=threads,cache.direct=on"),
    PYTHON: ("aio=io_uring,cache.direct=on", "aio=threads"),
}


def fio(image: Path, seconds: int) -> float:
    """IOPS of 4 KiB random reads at QD32 straight on the file: what the kernel can do without anybody between."""
    words = ["fio", "--name=limit", f"--filename={image}", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring"]
    words += ["--iodepth=32", "--iodepth_batch_submit=8", "--iodepth_batch_complete_min=1"]
    words += ["--iodepth_batch_complete_max=8", "--registerfiles", "--norandommap", "--randrepeat=0", "--gtod_reduce=1"]
    words += ["--time_based", f"--runtime={seconds}"]
    done = subprocess.run([*words, "--output-format=json"], capture_output=True, text=True, check=True, timeout=seconds + 60)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])


def measure(
    place: str, cases: Sequence[Case], programs: Sequence[Qsd], rounds: int, seconds: int, generator: Path
) -> Iterator[Row]:
    """All rows of one place: its servers run all the time and take turns."""
    parent = "/var/tmp" if place == HOLES else "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="bench", dir=parent) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        image = make_image(folder / "0.img", filled=place != HOLES)
        path = "plugin" if place == PYTHON else "native"
        us = stack.enter_context(ours(OURS[place].format(image=image), folder, QUEUES, path=path))
        nothing = stack.enter_context(ours(f"null:{IMAGE_BYTES}", folder, QUEUES, name="nothing"))
        peers: dict[str, list[Server]] = {program.number: [] for program in programs}
        for way_number, way in enumerate(PEERS[place], 1):
            peer_image = make_image(folder / f"{way_number}.img", filled=place != HOLES)
            for program in programs:
                socket_folder = folder / program.number
                socket_folder.mkdir(exist_ok=True)
                server = stack.enter_context(qsd(program, way, way_number, peer_image, socket_folder, QUEUES))
                peers[program.number].append(server)
        if place == PYTHON:
            fill(generator, us)
        every = [us, nothing, *itertools.chain(*peers.values())]
        for case in cases:
            with cpu_each(every) if case.cpu_each else contextlib.nullcontext(()) as before:
                yield from measure_case(case, us, nothing, peers, rounds, seconds, generator, before, image)
        reference = peers[programs[0].number]
        if place == HOLES and len(cases) > 1:
            yield from by_qemu_img(us, reference, min(rounds, MIN_ROUNDS))
        if place != PYTHON:  # there the disk itself is our memory
            memory = min(peer.memory_mib() for peer in reference)
            yield Row(f"{place}: unshared memory", "MiB", [us.memory_mib()], [memory], less_is_better=True)


def fill(generator: Path, us: Server) -> None:
    """Write every block of a disk in memory, as the peers' images are: reads of what was never written are page faults."""
    seconds = 10
    written = turn(generator, us, (*_1M, "--op", "write"), seconds)["ios"] * MIB
    if written < IMAGE_BYTES:
        raise RuntimeError(f"{seconds} seconds are too short to fill the disk: {written / MIB:.0f} MiB were written")


def measure_case(
    case: Case,
    us: Server,
    nothing: Server,
    peers: Mapping[str, Sequence[Server]],
    rounds: int,
    seconds: int,
    generator: Path,
    before: Sequence[str],
    image: Path,
) -> Iterator[Row]:
    """One case, round by round. ``peers``: by version, first the one that what is demanded refers to. ``nothing``: our
    server of a disk without storage, which shows the client's limit.
    """
    runs: dict[Path, list[dict[str, float]]] = {server.socket: [] for server in (us, *itertools.chain(*peers.values()))}
    straight: list[float] = []
    ceiling = [turn(generator, nothing, case.words, seconds, before)[case.unit] for _ in range(LIMIT_ROUNDS)]
    entrants: list[Server | None] = [us, *([None] if case.straight else []), *itertools.chain(*peers.values())]
    for number in range(rounds):
        for entrant in in_turn(entrants, number):
            if entrant is None:
                straight.append(fio(image, seconds))
            else:
                runs[entrant.socket].append(turn(generator, entrant, case.words, seconds, before))
    mine = runs[us.socket]
    results = {version: {server.way: runs[server.socket] for server in servers} for version, servers in peers.items()}
    best = {
        version: best_peer({way: of_rounds(of_way, case.unit) for way, of_way in ways.items()})[0]
        for version, ways in results.items()
    }
    (reference, way), *others = best.items()
    yield from rows_of(case, mine, results[reference][way], way, straight, ceiling)
    for version, way_of_other in others:
        yield from rows_of_other(case, mine, results[version][way_of_other], version, way_of_other)
    peer = next(peer for peer in peers[reference] if peer.way == way)
    ours, theirs = (syscalls_per_io(generator, server, case.words) for server in (us, peer))
    if ours is not None and theirs is not None:
        title = f"{case.place}: {case.name}: system calls per I/O"
        yield Row(title, "", [ours], [theirs], less_is_better=True, notes=("one turn, counted by perf",))


def rows_of(
    case: Case,
    mine: Sequence[dict[str, float]],
    theirs: Sequence[dict[str, float]],
    way: str,
    straight: Sequence[float],
    ceiling: Sequence[float],
) -> Iterator[Row]:
    """What one case says: its throughput first. ``straight``: fio on the file; ``ceiling``: a disk without storage."""

    title = f"{case.place}: {case.name}"
    ours, peer = of_rounds(mine, case.unit), of_rounds(theirs, case.unit)
    notes = [f"peer: {way}"]
    if case.cpu_each:
        notes.append("server and client bound to a CPU each")
    if max(map(statistics.median, (ours, peer))) > LIMIT_SHARE * statistics.median(ceiling):
        notes.append(LIMIT_NOTE)
    yield Row(title, UNITS[case.unit], ours, peer, least=case.least, notes=tuple(notes))
    if straight:
        yield Row(f"{title}, against fio on the file", "IOPS", ours, straight, least=case.straight_least)
    for key, what, unit, least in (
        ("server_cpu_us_per_io", "CPU of the server per I/O", "us", case.cpu_least),
        ("p50_us", "half of the I/Os within", "us", None),
        ("p99_us", "99 % of the I/Os within", "us", None),
        ("interrupts_per_io", "interrupts per I/O", "", None),
    ):
        yield Row(f"{title}: {what}", unit, of_rounds(mine, key), of_rounds(theirs, key), less_is_better=True, least=least)
    yield Row(f"{title}: our server without storage", UNITS[case.unit], ceiling)


def rows_of_other(
    case: Case, mine: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], version: str, way: str
) -> Iterator[Row]:
    """The same rounds beside another version of the peer; demands nothing."""
    title, other, notes = f"{case.place}: {case.name}", readme.against(f"{QSD} {version}"), (f"peer: {way}",)
    yield Row(f"{title}{other}", UNITS[case.unit], of_rounds(mine, case.unit), of_rounds(theirs, case.unit), notes=notes)
    ours, peer = of_rounds(mine, "server_cpu_us_per_io"), of_rounds(theirs, "server_cpu_us_per_io")
    yield Row(f"{title}: CPU of the server per I/O{other}", "us", ours, peer, less_is_better=True, notes=notes)


def of_rounds(runs: Sequence[dict[str, float]], key: str) -> list[float]:
    return [run[key] for run in runs]


def by_qemu_img(us: Server, peers: Sequence[Server], rounds: int) -> Iterator[Row]:
    """Another client than ours: QEMU's, which polls."""
    for depth in (1, 32):
        mine: list[float] = []
        theirs: dict[str, list[float]] = {peer.way: [] for peer in peers}
        for number in range(rounds):
            for server in in_turn([us, *peers], number):
                of_server = mine if server is us else theirs[server.way]
                of_server.append(libblkio.iops(server.socket, depth))
        way, best = best_peer(theirs)
        yield Row(
            f"{HOLES}: 4k read QD{depth} by qemu-img bench",
            "IOPS",
            mine,
            best,
            notes=(f"peer: {way}", "libblkio"),
        )


def machine() -> str:
    """Processor, number of them, memory."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} x {model[1] if model else platform.machine()}, {pages / 2**30:.0f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/native", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each server in each case (%(default)s)")
    parser.add_argument("--seconds", type=int, default=1, help="length of a turn (%(default)s)")
    parser.add_argument(
        "--part", choices=("demanded", "scaling"), help="only what is demanded, or only what is shown beside it"
    )
    parser.add_argument("--case", help="only these cases of what is demanded: a name or a pattern, '*QD32'")
    arguments = parser.parse_args()
    if not libblkio.is_there():
        parser.error("it needs QEMU's tools of Debian 13: tools/setup libblkio unpacks them")
    end_on_signals()
    generator = BUILD / "vhost_gen"
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", *CFLAGS, "-pthread", TOP / "bench/vhost_gen.c", "-o", generator], check=True)
    part = "demanded" if arguments.case else arguments.part
    rows: list[Row] = []
    programs = qsds()
    for place in (HOLES, TMPFS, PYTHON) if part != "scaling" else ():
        cases = [case for case in CASES if case.place == place and fnmatch.fnmatch(case.name, arguments.case or "*")]
        if cases:
            print(f"bench: {place}: {len(cases)} cases", flush=True)
            rows += measure(place, cases, programs, arguments.rounds, arguments.seconds, generator)
    if part != "demanded":
        print("bench: queues, sizes, the log, disks", flush=True)
        rows += scaling.measure(generator, programs[0], arguments.seconds)
    if not rows:
        parser.error(f"no such case: {arguments.case}")
    report = Report(
        name="bench",
        machine=machine(),
        kernel=platform.release(),
        versions={"vduse-blk": __version__, QSD: " and ".join(program.version for program in programs)},
        rows=rows,
        facts={
            "peer": f"{QSD} {programs[0].number} with an iothread; of several ways to do its I/O the best in each case",
            "file of holes": "direct I/O that never reaches a device: what the software costs",
            "client": "vhost_gen, a sleeping front-end where not said otherwise, split ring of 256, indirect, EVENT_IDX",
        },
    )
    # What was measured in part does not replace what was measured whole.
    report.write(BUILD if part else RESULTS)
    if not part:
        readme.main()
    print(report.text())
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
