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
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.report import Row
from bench.vhost_servers import MIB, Server, make_image, our_words, ours, qsd, started, turn

WAY = "aio=io_uring,cache.direct=on"
QUEUES = (1, 2, 4)
DISKS = (1, 8, 64)
IN_FLIGHT = 64
"""Requests in flight on all disks together."""
DISK_BYTES = 64 * MIB
SIZES = (512, 4096, 16384, 65536, 262144, MIB, 4 * MIB)
ROUNDS = 3
LOG_ROUNDS = 8
MEMORY_AIM = "aim: at most 25 MiB"
LOG_AIM = "peer: ourselves without the log; aim: a ratio of at least 0.98"
_4K = ("--size", "4096")


def measure(generator: Path, seconds: int) -> Iterator[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="bench", dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        images = [make_image(folder / f"{number}.img", filled=False) for number in range(2)]
        us = stack.enter_context(ours(f"file:{images[0]}?direct=1", folder, max(QUEUES)))
        peer = stack.enter_context(qsd(WAY, 0, images[1], folder, max(QUEUES)))
        yield from by_queues(generator, us, peer, seconds)
        yield from by_size(generator, us, peer, seconds)
        yield from log_cost(generator, us, seconds)
    yield from by_disks(generator, seconds)


def in_turns(
    generator: Path, us: Server, peer: Server, words: Sequence[str], unit: str, seconds: int
) -> tuple[list[float], list[float]]:
    mine, theirs = [], []
    for _ in range(ROUNDS):
        mine.append(turn(generator, us, words, seconds)[unit])
        theirs.append(turn(generator, peer, words, seconds)[unit])
    return mine, theirs


def by_queues(generator: Path, us: Server, peer: Server, seconds: int) -> Iterator[Row]:
    """The same load on each of some queues."""
    for number in QUEUES:
        words = (*_4K, "--depth", "32", "--queues", str(number))
        mine, theirs = in_turns(generator, us, peer, words, "iops", seconds)
        yield Row(f"scaling: 4k randread QD32 on each of {number} queues", "IOPS", mine, theirs, notes=(f"peer: {WAY}",))


def by_size(generator: Path, us: Server, peer: Server, seconds: int) -> Iterator[Row]:
    """Random reads of every size at queue depth 8: no cliff."""
    for size in SIZES:
        mine, theirs = in_turns(generator, us, peer, ("--size", str(size), "--depth", "8"), "mib_s", seconds)
        yield Row(f"block size: {size_name(size)} randread QD8", "MiB/s", mine, theirs, notes=(f"peer: {WAY}",))


def size_name(size: int) -> str:
    """As people write it."""
    if size >= MIB:
        return f"{size // MIB} MiB"
    return f"{size // 1024} KiB" if size >= 1024 else f"{size} B"


def log_cost(generator: Path, us: Server, seconds: int) -> Iterator[Row]:
    """A front-end that keeps the log of requests in flight for us against one that does not, in pairs of either order."""
    words = (*_4K, "--depth", "32")
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(LOG_ROUNDS):
        for log in (True, False) if number % 2 else (False, True):
            runs[log].append(turn(generator, us, (*words, "--inflight") if log else words, seconds))
    for key, what, unit in (("iops", "", "IOPS"), ("server_cpu_us_per_io", ": CPU of the server per I/O", "us")):
        with_it, without = ([run[key] for run in runs[log]] for log in (True, False))
        title = f"in-flight log: 4k randread QD32 with it{what}"
        yield Row(title, unit, with_it, without, less_is_better=unit == "us", notes=(LOG_AIM,))


def by_disks(generator: Path, seconds: int) -> Iterator[Row]:
    """One server for each of 64 disks; as many requests in flight as ever, spread over some of them."""
    with tempfile.TemporaryDirectory(prefix="bench", dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        servers = []
        for number in range(max(DISKS)):
            image = folder / f"{number}.img"
            with image.open("wb") as file:
                file.truncate(DISK_BYTES)
            words = our_words(f"file:{image}?direct=1", folder, 1, name=f"disk{number}")
            servers.append(stack.enter_context(started(*words)))
        for server in servers:
            server.wait()
        flat: list[float] = []
        for number in DISKS:
            runs = [spread(generator, servers[:number], IN_FLIGHT // number, seconds) for _ in range(ROUNDS)]
            flat = flat or runs
            title = f"disks: 4k randread, {IN_FLIGHT} in flight on {number}"
            yield Row(title, "IOPS", runs, flat, notes=("peer: ourselves with one disk",))
        memory = [server.memory_mib() for server in servers]
        yield Row("disks: unshared memory of each", "MiB", memory, less_is_better=True, notes=(MEMORY_AIM,))
        for server in servers:  # all at once: one after the other takes long
            server.process.terminate()


def spread(generator: Path, servers: Sequence[Server], depth: int, seconds: int) -> float:
    """IOPS of all together, one generator for each, which begin at one moment."""
    begin = math.ceil(time.monotonic()) + len(servers) // 20  # when all have connected
    words = ("--seconds", str(seconds), *_4K, "--depth", str(depth), "--begin", str(begin))
    with contextlib.ExitStack() as stack:
        running = []
        for server in servers:
            command = [str(generator), str(server.socket), *words]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            running.append(process)
        total = 0.0
        for process in running:
            said, _ = process.communicate(timeout=seconds + 60)
            if process.returncode != 0:
                raise RuntimeError(f"vhost_gen: exit {process.returncode} with {len(servers)} disks")
            total += json.loads(said)["iops"]
        return total
