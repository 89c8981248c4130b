"""The durability checker: what storage was asked and what the driver was told, cut at any moment.

A *history* has two halves on one clock. The storage's: writes, with the moment each began and ended, and flushes. The
driver's: requests, with the moment each was offered and its answer seen. After a cut the storage holds, of every block, the
content of some write that it had begun, but none older than the newest that was durable: forced, or ended before a flush
began that had ended. The driver was promised: of every block the content of some write that it had offered, but none older
than the newest whose durability was acknowledged. Each image the storage may hold must keep the promise.

No two writes to one block are under way at once, as with every file system: so a block's writes have an order.

As a program (for the native path, in a process of its own, because the core is another one; see ``build``)::

    durability.py SEED REQUESTS writeback|writethrough CUTS KIND    exit status 0: every promise kept, 1: broken, and which

where KIND is one of disks.py, of files with io_uring or with threads.
"""

from __future__ import annotations

import importlib.util
import os
import random
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vduse_blk.core.build import ffi

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "vduse_blk" / "core"
PROGRAM = ROOT / "build" / "durability" / "_core.abi3.so"

WRAPPED = ("pwritev2", "fdatasync", "fallocate", "target_file_prepare", "target_file_sync")
"""What fake_storage.c puts itself before."""

BLOCK = 4096
BLOCKS = 256
DEPTH = 24
ANYTHING = -1
"""Value of a block after a discard."""


@dataclass(slots=True)
class Change:
    """Blocks [first, first + len(values)) get values. On the storage's side: ``began``, ``ended`` (None: never); on the
    driver's: offered, answered. ``forced``: durable when it has ended."""

    first: int
    values: list[int]
    began: int
    ended: int | None = None
    forced: bool = False


@dataclass(slots=True)
class Flush:
    began: int
    ended: int | None = None


@dataclass(slots=True)
class Half:
    """One side's view of what happened, each list in the order of beginnings."""

    changes: list[Change] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)

    def choices(self, cut: int) -> list[list[int]]:
        """Of every block the values it may have at ``cut``, the oldest first."""
        flushed = max((f.began for f in self.flushes if f.ended is not None and f.ended < cut), default=-1)
        result: list[list[int]] = [[0] for _ in range(BLOCKS)]
        for change in self.changes:
            if change.began >= cut:
                continue
            ended = change.ended is not None and change.ended < cut
            durable = ended and (change.forced or (change.ended or 0) < flushed)
            for block, value in enumerate(change.values, change.first):
                if durable:
                    result[block] = [value]
                else:
                    result[block].append(value)
        return result


def check(storage: Half, driver: Half, cuts: int, seed: int) -> int:
    """Cut at ``cuts`` random moments; returns how many blocks could differ from the newest. Raises AssertionError."""
    chance = random.Random(seed)
    # The order of beginnings is a block's order, for both, as none of its writes overlap.
    for half in (storage, driver):
        half.changes.sort(key=lambda change: change.began)
    moments = [change.began for change in driver.changes] + [f.ended for f in driver.flushes if f.ended is not None]
    moments += [change.ended for change in driver.changes if change.ended is not None]
    open_blocks = 0
    for number in range(cuts):
        cut = chance.choice(moments) + chance.choice((-1, 1, 1, 2000, 20000))
        may, must = storage.choices(cut), driver.choices(cut)
        pick = ("oldest", "newest", "any")[number % 3]
        for block in range(BLOCKS):
            options = may[block]
            open_blocks += len(options) > 1
            found = options[0] if pick == "oldest" else options[-1] if pick == "newest" else chance.choice(options)
            if ANYTHING in must[block] or found == ANYTHING:
                continue
            assert found in must[block], (
                f"cut {number} (seed {seed}) at {cut}: block {block} holds {found}, {pick} of what may be left,"
                f" and the driver was promised one of {must[block]}"
            )
    return open_blocks


def content(value: int) -> bytes:
    return struct.pack("<Q", value) * (BLOCK // 8)


def drive(disk: Any, requests: int, seed: int, *, writethrough: bool, discards: bool) -> Half:
    """Load a queue with writes, zeros, discards and flushes at depth; returns the driver's half."""
    from vduse_blk.testing.driver import DISCARD, FLUSH, OK, OUT, UNSUPP, WRITE_ZEROES

    chance = random.Random(seed)
    disk.rules.set_writethrough(writethrough)
    half = Half()
    busy: set[int] = set()
    flying: dict[int, Change | Flush] = {}
    value = 0
    driver = disk.driver
    offered = 0
    while offered < requests or flying:
        while offered < requests and len(flying) < DEPTH and driver.free > 8:
            kind = chance.choices((OUT, WRITE_ZEROES, DISCARD if discards else OUT, FLUSH), (20, 2, 1, 3))[0]
            count = chance.choice((1, 1, 1, 2, 4, 8))
            first = chance.randrange(BLOCKS - count)
            blocks = set(range(first, first + count))
            if kind != FLUSH and blocks & busy:
                if len(flying) > DEPTH // 2:
                    break
                continue
            entry: Change | Flush
            if kind == FLUSH:
                entry = Flush(time.monotonic_ns())
                half.flushes.append(entry)
                request = driver.request(FLUSH)
            else:
                busy |= blocks
                values = [0] * count
                if kind == OUT:
                    values = [value := value + 1 for _ in range(count)]
                elif kind == DISCARD:
                    values = [ANYTHING] * count
                entry = Change(first, values, time.monotonic_ns(), forced=writethrough and kind != DISCARD)
                half.changes.append(entry)
                if kind == OUT:
                    data = b"".join(map(content, values))
                    request = driver.request(OUT, first * BLOCK // 512, out=data, pieces=chance.choice((1, 3)))
                else:
                    unmap = chance.randrange(2) if kind == WRITE_ZEROES else 0
                    ranges = struct.pack("<QII", first * BLOCK // 512, count * BLOCK // 512, unmap)
                    request = driver.request(kind, 0, out=ranges)
            flying[id(request)] = entry
            offered += 1
        driver.kick()
        for request in driver.collect(30):
            entry = flying.pop(id(request))
            assert request.status == OK or (request.status == UNSUPP and isinstance(entry, Change)), request
            if isinstance(entry, Change):
                busy -= set(range(entry.first, entry.first + len(entry.values)))
            entry.ended = time.monotonic_ns()
        if not flying:
            driver.reset_heap()
    return half


# --------------------------------------------------------------------------------------------------- native path


def build() -> Path:
    """The core as an extension module on the storage of tests/fuzz/fake_storage.c, unless that is up to date."""
    sources = [path for path in CORE.glob("*.c") if path.name not in ("uring.c", "_core.c")]
    fakes = ROOT / "tests" / "fuzz"
    sources += [fakes / "fake_uring.c", fakes / "fake_storage.c"]
    made_from = [*sources, *CORE.glob("*.h"), fakes / "fake_storage.h", CORE / "build.py", Path(__file__)]
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > max(path.stat().st_mtime for path in made_from):
        return PROGRAM
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    fresh = PROGRAM.with_suffix(f".{os.getpid()}")
    glue = PROGRAM.with_name("_core.c")
    ffi.emit_c_code(str(glue))
    command = [
        os.environ.get("CC", "gcc"), "-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-fno-strict-aliasing",
        *(f"-Wl,--wrap={name}" for name in WRAPPED), f"-I{CORE}", f"-I{sysconfig.get_paths()['include']}",
        str(glue), *map(str, sources), "-o", str(fresh),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    fresh.rename(PROGRAM)
    return PROGRAM


def load(program: Path) -> None:
    """Make ``program`` the C core of this process."""
    spec = importlib.util.spec_from_file_location("vduse_blk.core._core", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def storage_half(log: Path) -> Half:
    """What fake_storage.c has written down."""
    half = Half()
    for line in log.read_text().splitlines():
        what, *numbers = line.split()
        offset, length, forced, began, ended, *values = map(int, numbers)
        if what == "f":
            half.flushes.append(Flush(began, ended))
            continue
        blocks = length // BLOCK
        if what == "w" and len(values) != blocks:
            raise AssertionError(line)
        half.changes.append(Change(offset // BLOCK, values if what == "w" else [0] * blocks, began, ended, bool(forced)))
    return half


def main() -> int:
    seed, requests, mode, cuts, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
    load(PROGRAM)
    from disks import BY_NAME, Disk

    from vduse_blk.block.policy import Policy

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        os.environ["VDUSE_BLK_TEST_LOG"], os.environ["VDUSE_BLK_TEST_SEED"] = str(log), str(seed)
        disk = Disk(BY_NAME[kind], policy=Policy(on_error=60.0), num=128)
        try:
            driver = drive(disk, requests, seed, writethrough=mode == "writethrough", discards=True)
            retries = disk.counters()["retries"]
        finally:
            disk.close()
        storage = storage_half(log)
        try:
            unsure = check(storage, driver, cuts, seed)
        except AssertionError as error:
            print(f"broken: {error}")
            return 1
    changes, flushes = len(storage.changes), len(storage.flushes)
    print(f"kept: {cuts} cuts, {changes} changes, {flushes} flushes, {retries} retries, {unsure} unsure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
