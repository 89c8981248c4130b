"""The failure policy where C serves the disk: requests wait in the queue thread, and end when they must.

Storage that fails and recovers without privileges: a file that is cut under the disk. Reads behind its end are EIO until it
is extended again. For lack of space: /dev/full.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Iterator

import pytest
from disks import BY_NAME, SIZE, Disk

from vduse_blk.block.contract import BlockInfo, Support
from vduse_blk.block.native import FileTarget
from vduse_blk.block.policy import Policy
from vduse_blk.queue import NativeQueue
from vduse_blk.testing.driver import IN, IOERR, OK, OUT, Request
from vduse_blk.testing.recorder import Recorder

WAIT, FAIL = Policy(on_error=math.inf), Policy()
WAYS = ["native-file-uring", "native-file-sync", "native-tmpfs"]


class Patient(Disk):
    """A native disk with a failure policy."""

    def set(self, policy: Policy) -> None:
        async def change() -> None:
            self.stack.patience.change(policy)

        self.loop.run(change())

    def cut(self) -> None:
        assert self.image is not None
        os.truncate(self.image, 0)

    def mend(self) -> None:
        assert self.image is not None
        os.truncate(self.image, SIZE)

    def reads(self, count: int) -> list[Request]:
        requests = [self.driver.request(IN, 8 * i, into=4096) for i in range(count)]
        self.driver.kick()
        return requests

    def until_waiting(self, requests: int) -> None:
        deadline = time.monotonic() + 10
        while (waiting := self.queue.view().waiting) is None or waiting.requests != requests:
            assert time.monotonic() < deadline, waiting
            time.sleep(0.001)


@pytest.fixture(params=WAYS)
def disk(request: pytest.FixtureRequest) -> Iterator[Patient]:
    disk = Patient(BY_NAME[request.param], policy=WAIT)
    yield disk
    disk.close()


class TestWaiting:
    def test_requests_go_on_by_themselves_when_the_storage_is_back(self, disk: Patient) -> None:
        """With the right data; they count as waiting in the view, and for the disk, while they do."""
        assert disk.driver.write(0, b"\x77" * 65536) == OK
        disk.cut()
        requests = disk.reads(8)
        disk.until_waiting(8)
        waiting = disk.stack.patience.waiting()
        assert waiting is not None
        assert (waiting.requests, waiting.error) == (8, errno.EIO)
        assert 0 <= time.monotonic() - waiting.since < 10
        assert disk.driver.flush() == OK  # others are served meanwhile
        assert all(request.status is None for request in requests)
        disk.mend()
        disk.driver.run(*requests)
        assert [request.status for request in requests] == [OK] * 8
        assert disk.driver.data(requests[0]) == bytes(4096)  # the cut took the data
        assert disk.queue.view().waiting is None
        assert disk.stack.patience.waiting() is None
        assert disk.counters()["read_errors"] == 0
        assert disk.counters()["retries"] >= 8

    def test_a_transfer_goes_on_where_it_stopped(self, disk: Patient) -> None:
        """Half of it was there before the error."""
        content = os.urandom(65536)
        assert disk.driver.write(0, content) == OK
        assert disk.image is not None
        os.truncate(disk.image, 32768)
        request = disk.driver.request(IN, 0, into=65536, pieces=4)
        disk.driver.kick()
        disk.until_waiting(1)
        disk.mend()
        disk.driver.run(request)
        assert request.status == OK
        assert disk.driver.data(request) == content[:32768] + bytes(32768)

    def test_a_limited_time_ends_with_errors_and_not_before(self, disk: Patient) -> None:
        disk.set(Policy(on_error=1.0))
        disk.cut()
        began = time.monotonic()
        requests = disk.reads(4)
        disk.driver.run(*requests)
        assert 1.0 <= time.monotonic() - began < 10
        assert [request.status for request in requests] == [IOERR] * 4
        assert disk.counters()["read_errors"] == 4

    def test_permanent_errors_do_not_wait(self, disk: Patient) -> None:
        """An errno that the storage does not call temporary: a descriptor that cannot be written to."""
        assert disk.image is not None
        fd = os.open(disk.image, os.O_RDONLY)
        try:
            queue = NativeQueue(0, disk.rules, FileTarget(fd, False), io_mode=disk.kind.io_mode, policy=disk.policy)
            disk.queue.stop()
            disk.driver.reset_ring()
            queue.start(disk.setup, disk.iova)
            try:
                assert disk.driver.write(0, bytes(512)) == IOERR
                assert queue.view().waiting is None
            finally:
                queue.stop()
        finally:
            os.close(fd)


class TestEnding:
    @pytest.mark.parametrize("how", ["policy", "let go", "stop", "drain", "shorter"])
    def test_what_waits_fails_at_once(self, disk: Patient, how: str) -> None:
        """By another policy, because the disk goes, because the queue stops, because its memory is taken away; not at the
        next attempt."""
        disk.cut()
        requests = disk.reads(8)
        disk.until_waiting(8)
        while (tries := disk.counters()["retries"]) < 8 * 7:  # the next attempts are a second away
            time.sleep(0.05)
        if how == "policy":
            disk.set(FAIL)
        elif how == "let go":

            async def let_go() -> None:
                disk.stack.let_go(True)

            disk.loop.run(let_go())
        elif how == "shorter":
            disk.set(Policy(on_error=0.5))
        elif how == "stop":
            disk.queue.stop()
        else:
            # Removing a range returns when no request can touch it any more.
            disk.iova.remove(disk.driver.base, disk.driver.base + len(disk.driver.memory) - 1)
        assert disk.driver.wait(10), "nothing was answered"
        assert disk.counters()["retries"] < tries + 8  # some may have been just about to be tried
        statuses = [disk.driver.get(request.status_iova, 1)[0] for request in requests]
        assert statuses == [IOERR] * 8
        if how != "stop":
            assert disk.queue.view().waiting is None

    def test_nothing_waits_while_the_disk_goes(self, disk: Patient) -> None:
        """And again if it stays after all."""

        async def let_go(leaving: bool) -> None:
            disk.stack.let_go(leaving)

        disk.cut()
        disk.loop.run(let_go(True))
        assert disk.driver.read(0, 4096)[0] == IOERR
        disk.loop.run(let_go(False))
        requests = disk.reads(1)
        disk.until_waiting(1)
        disk.mend()
        disk.driver.run(*requests)
        assert requests[0].status == OK

    def test_stopping_and_starting_over_and_over_under_waiting_requests(self, disk: Patient) -> None:
        """Every stop returns, and every request is answered."""
        disk.cut()
        for round in range(20):
            requests = disk.reads(16)
            if round % 2:
                disk.until_waiting(16)
            last = disk.queue.stop()
            disk.driver.poll_used()
            answered = sum(disk.driver.get(request.status_iova, 1)[0] == IOERR for request in requests)
            disk.start(last_avail=last)
            disk.set(FAIL)
            while answered < 16:
                answered += len(disk.driver.wait())
            disk.set(WAIT)
            disk.driver._requests.clear()
            disk.driver.reset_heap()


class TestFlush:
    def test_a_flush_that_failed_never_waits_and_never_succeeds(self) -> None:
        """What it lost is lost: the kernel would say yes the second time."""
        disk = Patient(BY_NAME["native-file-sync"], policy=WAIT, start=False)
        try:
            target = disk.stack.native_target()
            assert isinstance(target, FileTarget)
            assert target.lost is not None
            disk.start()
            target.lost[0] = 1
            assert disk.driver.flush() == IOERR
            assert disk.queue.view().waiting is None
        finally:
            disk.close()


class Full(Recorder):
    """/dev/full: reads give zeros, writes fail with ENOSPC."""

    def __init__(self) -> None:
        super().__init__(SIZE, write_zeroes=Support.NONE)
        self.fd = -1

    async def open(self) -> BlockInfo:
        self.fd = os.open("/dev/full", os.O_RDWR)
        return await super().open()

    async def close(self) -> None:
        os.close(self.fd)
        await super().close()

    def native_target(self) -> FileTarget:  # type: ignore[override]
        return FileTarget(self.fd, False, None, frozenset({errno.EIO}))


class TestFull:
    @pytest.mark.parametrize("kind", ["native-file-uring", "native-file-sync"])
    def test_no_space_has_its_own_choice(self, kind: str) -> None:
        """It fails under on-error=wait, waits under on-full=wait, and is written where there is room again."""
        backend = Full()
        disk = Patient(BY_NAME[kind], backend=backend, policy=WAIT)
        try:
            assert disk.driver.write(0, bytes(4096)) == IOERR
            disk.set(Policy(on_full=math.inf))
            request = disk.driver.request(OUT, 8, out=b"\x55" * 4096)
            disk.driver.kick()
            disk.until_waiting(1)
            waiting = disk.queue.view().waiting
            assert waiting is not None
            assert waiting.error == errno.ENOSPC
            if kind == "native-file-uring":  # which has the file by itself
                disk.set(FAIL)
                disk.driver.run(request)
                assert request.status == IOERR
                return
            room = os.memfd_create("room")
            os.ftruncate(room, SIZE)
            os.dup2(room, backend.fd)
            disk.driver.run(request)
            assert request.status == OK
            assert os.pread(room, 4096, 4096) == b"\x55" * 4096
            os.close(room)
        finally:
            disk.close()


def test_waiting_costs_no_time_of_a_cpu(disk: Patient) -> None:
    """A thread with parked requests sleeps between attempts, of which there is one a second each."""
    disk.cut()
    requests = disk.reads(16)
    disk.until_waiting(16)
    time.sleep(1.5)
    before, thread = time.process_time(), threading.active_count()
    time.sleep(1.0)
    assert time.process_time() - before < 0.1
    assert threading.active_count() == thread
    disk.mend()
    disk.driver.run(*requests)
