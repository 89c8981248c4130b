"""No acknowledged flush or durable write is lost, wherever the power is cut: on both paths, with errors that wait."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import durability
import pytest
from disks import BY_NAME, SIZE, Disk
from durability import BLOCK, Change, Flush, Half, check, drive

from vduse_blk.block.contract import Segments, Support
from vduse_blk.block.policy import Policy
from vduse_blk.block.stack import Stack
from vduse_blk.testing.recorder import Call, Recorder

SEED = int(os.environ.get("SEED", "20"))
CUTS = 500  # each of two modes: 1000 a path
REQUESTS = 1500
AT_STAKE = {False: 1000, True: 50}
"""Blocks that some cut could lose, by whether every write is durable: then only those under way, fewer on a busy machine."""


class Slow(Recorder):
    """Takes its time with everything, in any order, and fails sometimes."""

    def __init__(self, fua: Support) -> None:
        super().__init__(SIZE, fua=fua)
        self._chance = random.Random(SEED)
        self.failures = 0

    def tick(self) -> int:
        return time.monotonic_ns()

    async def pause(self, call: Call) -> None:
        for _ in range(self._chance.randrange(12)):
            await asyncio.sleep(0)
        if call.operation != "read" and self._chance.random() < 0.02:
            self.failures += 1
            raise OSError(errno.EIO, "now and then")

    def is_temporary(self, error: OSError) -> bool:
        return True

    def half(self) -> Half:
        """What it was asked."""
        half = Half()
        for call in self.calls:
            if call.operation == "flush" and call.ended is not None:
                half.flushes.append(Flush(call.began, call.ended))
            elif call.operation in ("write", "write_zeroes", "discard") and call.ended is not None:
                data = call.data or bytes(call.length)
                values = [int.from_bytes(data[at : at + 8], "little") for at in range(0, call.length, BLOCK)]
                half.changes.append(Change(call.offset // BLOCK, values, call.began, call.ended, call.fua))
        return half


class Hasty(Stack):
    """Answers a flush before the storage has done it."""

    async def flush(self) -> None:
        self._late = asyncio.ensure_future(super().flush())


class Forgetful(Stack):
    """Takes a durable write for an ordinary one."""

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        await super().write(offset, data)


def run_plugin(fua: Support, *, writethrough: bool, stack: type[Stack] = Stack) -> tuple[int, Slow]:
    """Load a disk served by Python, and cut; returns how many blocks could differ from the newest."""
    backend = Slow(fua)
    disk = Disk(BY_NAME["plugin-memory"], backend=backend, num=128, policy=Policy(on_error=60.0), stack=stack)
    try:
        driver = drive(disk, REQUESTS, SEED, writethrough=writethrough, discards=True)
    finally:
        disk.close()
    return check(backend.half(), driver, CUTS, SEED), backend


@pytest.mark.parametrize("fua", [Support.NATIVE, Support.EMULATE])
@pytest.mark.parametrize("writethrough", [False, True])
def test_the_plugin_path_loses_nothing_acknowledged(fua: Support, writethrough: bool) -> None:
    unsure, backend = run_plugin(fua, writethrough=writethrough)
    assert backend.failures > 10
    assert unsure > AT_STAKE[writethrough]  # there was something to lose


@pytest.mark.parametrize(("stack", "writethrough"), [(Hasty, False), (Forgetful, True)])
def test_a_stack_that_lies_is_caught(stack: type[Stack], writethrough: bool) -> None:
    with pytest.raises(AssertionError, match="the driver was promised one of"):
        run_plugin(Support.NATIVE, writethrough=writethrough, stack=stack)


ENGINES = pytest.mark.parametrize("kind", ["native-file-uring", "native-file-sync"])


def run_native(kind: str, mode: str, mutant: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        pytest.skip("needs gcc")
    durability.build()
    folder = Path(durability.__file__).parent
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": f"{folder}:{durability.ROOT}", "VDUSE_BLK_TEST_MUTANT": mutant}
    return subprocess.run(
        [sys.executable, durability.__file__, str(SEED), str(REQUESTS), mode, str(CUTS), kind],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@ENGINES
@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
def test_the_native_path_loses_nothing_acknowledged(kind: str, mode: str) -> None:
    """The engine over an io_uring, or with threads over system calls, that reorder, cut and fail what they are asked."""
    done = run_native(kind, mode)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    numbers = re.fullmatch(r"kept: (\d+) cuts, (\d+) changes, (\d+) flushes, (\d+) retries, (\d+) unsure\n", done.stdout)
    assert numbers is not None, done.stdout
    cuts, changes, flushes, retries, unsure = map(int, numbers.groups())
    assert cuts == CUTS
    assert changes > REQUESTS / 2
    assert flushes > REQUESTS / 20
    assert retries > 10
    assert unsure > AT_STAKE[mode == "writethrough"]


@ENGINES
@pytest.mark.parametrize(("mode", "mutant"), [("writeback", "flush"), ("writethrough", "fua")])
def test_an_engine_that_lies_is_caught(kind: str, mode: str, mutant: str) -> None:
    done = run_native(kind, mode, mutant)
    assert done.returncode == 1, done.stdout + done.stderr[-4000:]
    assert "the driver was promised one of" in done.stdout


def test_the_model_knows_what_may_be_lost() -> None:
    """By hand: a write that was not flushed may be lost, one that was may not, and nothing is there that nobody wrote."""
    driver = Half([Change(0, [1], 10, 20), Change(0, [2], 50, 60)], [Flush(30, 40)])

    def verdict(changes: list[Change], flushes: list[Flush]) -> None:
        for seed in range(8):
            check(Half(changes, flushes), driver, 30, seed)

    verdict([Change(0, [1], 12, 18), Change(0, [2], 52, 58)], [Flush(32, 38)])
    verdict([Change(0, [1], 12, 18, True), Change(0, [2], 52, 58)], [])
    for changes, flushes in (
        ([Change(0, [1], 12, 18), Change(0, [2], 52, 58)], []),  # never flushed
        ([Change(0, [1], 12, 35), Change(0, [2], 52, 58)], [Flush(32, 38)]),  # flushed before it was written
        ([Change(0, [1], 12, 18), Change(0, [2], 52, 58)], [Flush(32, 10000000)]),  # answered before it was flushed
        ([Change(0, [1], 12, 18), Change(0, [3], 52, 58)], [Flush(32, 38)]),  # something else
        ([Change(0, [1], 12, 18), Change(1, [2], 52, 58)], [Flush(32, 38)]),  # somewhere else
    ):
        with pytest.raises(AssertionError, match="promised"):
            verdict(changes, flushes)
