"""How many requests the queue thread does before it tells the driver."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import MEMORY_FS, Disk, Kind

from vduse_blk.testing.driver import IN, OK, OUT

MEMORY = Kind("memory", "memory", True, spin="never")
IN_MEMORY_FILE = Kind("native-tmpfs", "file", True, "auto", MEMORY_FS, spin="never")
BATCH = 32
SIZE = 16384


def settle() -> None:
    """Until the queue sleeps: then it has counted all it did, and sees nothing before the kick."""
    deadline = time.monotonic() + 10
    while True:
        states = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another test's thread, which ends
                name, _, rest = (task / "stat").read_text().rpartition(")")
                states += [rest.split()[0]] if name.endswith("(vq0") else []
        if states == ["S"]:
            return
        assert time.monotonic() < deadline
        time.sleep(0.001)


def turn(disk: Disk, *, count: int = BATCH, op: int = IN, size: int = SIZE, prompt: bool = False) -> int:
    """A driver that offers ``count`` requests of ``size`` bytes at once and comes when all of it is done, or (``prompt``)
    sees at once whatever is done and sleeps again; returns how often the ring was updated."""
    driver = disk.driver
    driver.reset_heap()
    settle()
    published = disk.counters()["publishes"]
    done = driver.used_idx() + count & 0xFFFF
    out, into = (b"", size) if op == IN else (bytes(size), 0)
    sectors = size // 512
    requests = [driver.request(op, sectors * number, out=out, into=into, offer=False) for number in range(count)]
    for request in requests:
        driver.offer(request.head)  # unseen until the kick
    driver.kick()
    deadline = time.monotonic() + 10
    while (used := driver.used_idx()) != done:
        if prompt and driver.event_idx:
            driver.put_u16(driver.avail + 4 + 2 * driver.num, used)
        assert time.monotonic() < deadline
    finished = driver.collect()
    assert [request.status for request in finished] == [OK] * count
    settle()
    return disk.counters()["publishes"] - published


@pytest.fixture
def _before_others() -> Iterator[None]:
    """Driver and queue thread, which inherits it, run when they have something to do: on a machine at work they might take
    turns on one CPU for long, and neither ever meets the other. Where that is not allowed they have to be lucky."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.usefixtures("_before_others")
@pytest.mark.parametrize("event_idx", [True, False])
def test_a_driver_that_comes_late_is_woken_by_the_first_few(event_idx: bool) -> None:
    """Halves of what there is: 16, 8, 4 and 4. If the queue has nothing to do before the driver comes, it wakes it with 2,
    and goes on as before: 2, 15, 7, 4 and 4. Without EVENT_IDX it does not know who sleeps. A driver that is there at once
    puts it back, also if it has nothing to add."""
    cpus = len(os.sched_getaffinity(0))
    overlaps = cpus > 1 or cpus < (os.cpu_count() or 1)
    disk = Disk(MEMORY, event_idx=event_idx)
    try:
        assert turn(disk) == (4 if overlaps else 1)
        late = [turn(disk) for _ in range(12)]
        # With one CPU nobody is there at once; with others at work on them, not always.
        recovered = cpus == 1 or any(turn(disk, prompt=True) == 4 for _ in range(2000))
    finally:
        disk.close()
    assert late[-6:] == [(5 if event_idx else 4) if overlaps else 1] * 6
    assert recovered


@pytest.mark.parametrize("kind", [MEMORY, IN_MEMORY_FILE], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("count", "published"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 5)])
def test_large_writes_go_in_pairs_where_more_wait(kind: Kind, count: int, published: int) -> None:
    """Of eight two, two, two, and the rest one by one."""
    disk = Disk(kind)
    try:
        assert turn(disk, count=count, op=OUT, size=256 * 1024) == published
    finally:
        disk.close()


def test_larger_ones_do_not() -> None:
    """Who waits for the first of two would wait for long."""
    disk = Disk(MEMORY)
    try:
        assert turn(disk, count=4, op=OUT, size=1024 * 1024 + 4096) == 4
    finally:
        disk.close()
