"""How many requests the queue thread does before it tells the driver."""

from __future__ import annotations

import os
import time

import pytest
from disks import Disk, Kind

from vduse_blk.testing.driver import IN, OK

BATCH = 32


def turn(disk: Disk) -> int:
    """A driver that offers a batch at once and comes when all of it is done; returns how often the ring was updated."""
    driver = disk.driver
    driver.reset_heap()
    published = disk.counters()["publishes"]
    done = driver.used_idx() + BATCH
    requests = [driver.request(IN, 8 * number, into=4096, offer=False) for number in range(BATCH)]
    for request in requests:
        driver.offer(request.head)  # unseen: the queue sleeps until the kick
    driver.kick()
    while driver.used_idx() != done & 0xFFFF:
        pass
    driver.run(*requests)
    time.sleep(0.005)  # an update is counted after it is seen
    assert [request.status for request in requests] == [OK] * BATCH
    return disk.counters()["publishes"] - published


@pytest.mark.parametrize("event_idx", [True, False])
def test_a_driver_that_comes_late_is_woken_by_the_first_few(event_idx: bool) -> None:
    """Halves of what there is: 16, 8, 4 and 4. If the queue has nothing to do before the driver comes, it wakes it with 2,
    and goes on as before: 2, 15, 7, 4 and 4. Without EVENT_IDX it does not know who sleeps."""
    overlaps = len(os.sched_getaffinity(0)) > 1
    disk = Disk(Kind("memory", "memory", True, spin="never"), event_idx=event_idx)
    try:
        assert turn(disk) == (4 if overlaps else 1)
        updates = [turn(disk) for _ in range(12)]
    finally:
        disk.close()
    assert updates[-6:] == [(5 if event_idx else 4) if overlaps else 1] * 6
