"""The part of ``make bench`` that demands nothing: what more queues, more disks, other block sizes and the log cost.

All on files of holes with direct I/O. The peer is qemu-storage-daemon with an iothread and io_uring, or nobody.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.report import Row, best_peer, in_turn
from bench.vhost_servers import MIB, Qsd, Server, make_image, our_words, ours, qsd, qsd_of_many, started, turn

WAY = "aio=io_uring,cache.direct=on"
QUEUES = (1, 2, 4)
DISKS = (1, 8, 64)
IN_FLIGHT = 64
"""Requests in flight on all disks together."""
OFFERED = 64000
"""Requests per second to all disks together."""
DISK_BYTES = 64 * MIB
SIZES = (512, 4096, 16384, 65536, 262144, MIB, 4 * MIB)
ROUNDS = 3
LOG_ROUNDS = 40
LOG_SECONDS = 1
"""Many short ones: the difference is smaller than what two turns on the same machine differ by."""
MEMORY_AIM = "aim: at most 25 MiB"
LOG_AIM = "peer: ourselves without the log; aim: a ratio of at least 0.98"
_4K = ("--size", "4096")


def measure(generator: Path, program: Qsd, seconds: int) -> Iterator[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="bench", dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        images = [make_image(folder / f"{number}.img", filled=False) for number in range(2)]
        us = stack.enter_context(ours(f"file:{images[0]}?direct=1", folder, max(QUEUES)))
        peer = stack.enter_context(qsd(program, WAY, 0, images[1], folder, max(QUEUES)))
        yield from by_queues(generator, us, peer, seconds)
        yield from by_size(generator, us, peer, seconds)
        yield from log_cost(generator, us)
    yield from by_disks(generator, program, seconds)


def in_turns(
    generator: Path, us: Server, peer: Server, words: Sequence[str], unit: str, seconds: int
) -> tuple[list[float], list[float]]:
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(ROUNDS):
        for server, found in in_turn([(us, mine), (peer, theirs)], number):
            found.append(turn(generator, server, words, seconds)[unit])
    return mine, theirs


def by_queues(generator: Path, us: Server, peer: Server, seconds: int) -> Iterator[Row]:
    """The same load on each of some queues."""
    for number in QUEUES:
        words = (*_4K, "--depth", "32", "--queues", str(number))
        mine, theirs = in_turns(generator, us, peer, words, "iops", seconds)
        yield Row(
            f"scaling: 4k randread QD32 on each of {number} queues", "IOPS", mine, theirs, notes=(f"peer: {peer.way}",)
        )


def by_size(generator: Path, us: Server, peer: Server, seconds: int) -> Iterator[Row]:
    """Random reads of every size at queue depth 8: no cliff."""
    for size in SIZES:
        mine, theirs = in_turns(generator, us, peer, ("--size", str(size), "--depth", "8"), "mib_s", seconds)
        yield Row(f"block size: {size_name(size)} randread QD8", "MiB/s", mine, theirs, notes=(f"peer: {peer.way}",))


def size_name(size: int) -> str:
    """As people write it."""
    if size >= MIB:
        return f"{size // MIB} MiB"
    return f"{size // 1024} KiB" if size >= 1024 else f"{size} B"


def log_cost(generator: Path, us: Server) -> Iterator[Row]:
    """A front-end that keeps the log of requests in flight for us against one that does not, in pairs of either order."""
    words = (*_4K, "--depth", "32")
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(LOG_ROUNDS):
        for log in in_turn([True, False], number):
            runs[log].append(turn(generator, us, (*words, "--inflight") if log else words, LOG_SECONDS))
    for key, what, unit in (("iops", "", "IOPS"), ("server_cpu_us_per_io", ": CPU of the server per I/O", "us")):
        with_it, without = ([run[key] for run in runs[log]] for log in (True, False))
        title = f"in-flight log: 4k randread QD32 with it{what}"
        yield Row(title, unit, with_it, without, less_is_better=unit == "us", notes=(LOG_AIM,))


def by_disks(generator: Path, program: Qsd, seconds: int) -> Iterator[Row]:
    """Up to 64 disks, a server for each; the peer has a server for each as well, or one for all. As many requests in flight
    as ever, spread over some of the disks; then as many per second.
    """
    with tempfile.TemporaryDirectory(prefix="bench", dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        images = [folder / f"{number}.img" for number in range(max(DISKS))]
        for image in images:
            with image.open("wb") as file:
                file.truncate(DISK_BYTES)
        mine = [
            stack.enter_context(started(*our_words(f"file:{image}?direct=1", folder, 1, name=f"disk{number}")))
            for number, image in enumerate(images)
        ]
        for server in mine:
            server.wait()
        each = [stack.enter_context(qsd(program, WAY, number, image, folder, 1)) for number, image in enumerate(images)]
        one = stack.enter_context(qsd_of_many(program, WAY, images, folder))
        ways = {"a process for each disk": each, "one process": one}
        one_disk: list[float] = []
        for number in DISKS:
            words = ("--depth", str(IN_FLIGHT // number))
            runs, peers = spread_in_turns(generator, mine, ways, number, words, seconds)
            title = f"disks: 4k randread, {IN_FLIGHT} in flight on {number}"
            yield from rows_of_disks(title, runs, peers, program.number)
            one_disk = one_disk or [run["iops"] for run in runs]
            if number > 1:
                yield Row(
                    f"{title}, against one disk", "IOPS", [run["iops"] for run in runs], one_disk, notes=("peer: ourselves",)
                )
        for number in DISKS:
            paced = ("--depth", str(IN_FLIGHT), "--rate", str(OFFERED // number))
            runs, peers = spread_in_turns(generator, mine, ways, number, paced, seconds)
            yield from rows_of_disks(f"disks: 4k randread, {OFFERED} a second on {number}", runs, peers, program.number)
        memory = [server.memory_mib() for server in mine]
        yield Row("disks: unshared memory of each", "MiB", memory, less_is_better=True, notes=(MEMORY_AIM,))
        for server in (*mine, *each):  # all at once: one after the other takes long
            server.process.terminate()


def spread_in_turns(
    generator: Path,
    mine: Sequence[Server],
    ways: Mapping[str, Sequence[Server]],
    number: int,
    words: Sequence[str],
    seconds: int,
) -> tuple[list[dict[str, float]], dict[str, list[dict[str, float]]]]:
    """Rounds of the load on the first ``number`` disks of us, and of each way to run the peer."""
    runs: list[dict[str, float]] = []
    peers: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    entrants = [(mine, runs), *((servers, peers[way]) for way, servers in ways.items())]
    for turn_number in range(ROUNDS):
        for servers, found in in_turn(entrants, turn_number):
            found.append(spread(generator, servers[:number], words, seconds))
    return runs, peers


def rows_of_disks(
    title: str, runs: Sequence[dict[str, float]], peers: Mapping[str, Sequence[dict[str, float]]], version: str
) -> Iterator[Row]:
    """Throughput first; the peer, QSD of that version, is the way that was best at that."""
    way, _ = best_peer({way: [run["iops"] for run in rounds] for way, rounds in peers.items()})
    for key, what, unit in (
        ("iops", "", "IOPS"),
        ("cpu", ": CPU of the servers per I/O", "us"),
        ("p99_us", ": 99 % of the I/Os within", "us"),
    ):
        ours, theirs = ([run[key] for run in rounds] for rounds in (runs, peers[way]))
        yield Row(
            f"{title}{what}", unit, ours, theirs, less_is_better=unit == "us", notes=(f"peer: {version}, {WAY}, {way}",)
        )


def spread(generator: Path, servers: Sequence[Server], words: Sequence[str], seconds: int) -> dict[str, float]:
    """One generator for each, which begin at one moment. ``iops``: of all together; ``cpu``: microseconds of the servers per
    I/O; ``p99_us``: of the disk where it is the longest.
    """
    begin = math.ceil(time.monotonic()) + 1 + len(servers) // 6  # when all have connected
    more = ("--seconds", str(seconds), *_4K, *words, "--begin", str(begin))
    processes = {server.pid: server for server in servers}.values()
    with contextlib.ExitStack() as stack:
        running = []
        for server in servers:
            command = [str(generator), str(server.socket), *more]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            running.append(process)
        time.sleep(max(0.0, begin - time.monotonic()))  # what follows is the load, not the connecting
        cpu = sum(server.cpu_ns() for server in processes)
        found = []
        for process in running:
            said, _ = process.communicate(timeout=seconds + 60)
            if process.returncode != 0:
                raise RuntimeError(f"vhost_gen: exit {process.returncode} with {len(servers)} disks")
            found.append(json.loads(said))
        cpu = sum(server.cpu_ns() for server in processes) - cpu
    return {
        "iops": sum(one["iops"] for one in found),
        "cpu": cpu / 1000 / sum(one["ios"] for one in found),
        "p99_us": max(one["p99_us"] for one in found),
    }
