"""The plugin path where storage is slow, wrong or gone: what only storage in Python can do to a queue."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from disks import BY_NAME, MIB, SIZE, Disk

from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.batch import Batch
from vduse_blk.block.contract import Backend, BlockInfo, Segments, Support
from vduse_blk.block.errors import UserError
from vduse_blk.block.threads import Threads
from vduse_blk.testing.driver import DISCARD, FLUSH, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES, FakeDriver

RANGE = struct.pack("<QII", 8, 8, 0)


class Gated(Backend):
    """Storage that finishes a request when ``gate`` is open, and then does what ``behaviour`` says."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        pass

    def __init__(self) -> None:
        super().__init__(self.Options())
        self.gate = asyncio.Event()
        self.gate.set()
        self.behaviour: Callable[[str], None] = lambda operation: None
        self.under_way = 0
        self.most = 0
        self.kept: list[memoryview] = []

    async def open(self) -> BlockInfo:
        return await self.refresh()

    async def close(self) -> None:
        assert self.under_way == 0

    async def refresh(self) -> BlockInfo:
        return BlockInfo(size=SIZE, discard=Support.NATIVE, write_zeroes=Support.NATIVE, volatile_cache=True)

    async def _do(self, operation: str) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.gate.wait()
            self.behaviour(operation)
        finally:
            self.under_way -= 1

    async def read(self, offset: int, into: Segments) -> None:
        await self._do("read")
        for segment in into:
            segment[:] = b"R" * len(segment)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        self.kept = list(data)
        assert all(segment.readonly for segment in data)
        await self._do("write")

    async def flush(self) -> None:
        await self._do("flush")

    async def discard(self, offset: int, length: int) -> None:
        await self._do("discard")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        await self._do("write_zeroes")


def close_gate(disk: Disk, backend: Gated) -> None:
    disk.loop.loop.call_soon_threadsafe(backend.gate.clear)
    disk.loop.run(asyncio.sleep(0))


def open_gate(disk: Disk, backend: Gated) -> None:
    disk.loop.loop.call_soon_threadsafe(backend.gate.set)


@pytest.fixture
def gated() -> Iterator[tuple[Disk, Gated]]:
    backend = Gated()
    disk = Disk(BY_NAME["plugin-null"], backend=backend, num=256)
    yield disk, backend
    open_gate(disk, backend)
    disk.close()


def test_slow_requests_do_not_hold_up_others(gated: tuple[Disk, Gated]) -> None:
    """Requests of storage that waits fly together, at most 64 at a time, and all are answered when it goes on."""
    disk, backend = gated
    close_gate(disk, backend)
    driver = disk.driver
    requests = [driver.request(OUT, 8 * i, out=bytes(512)) for i in range(100)]
    unknown = driver.request(99)
    driver.kick()
    disk.until(lambda _view: disk.counters()["inflight"] == 64)
    assert driver.poll_used() == []
    open_gate(disk, backend)
    driver.run(*requests, unknown)
    assert backend.most == 64
    assert {r.status for r in requests} == {OK}
    assert unknown.status == UNSUPP


def test_remove_waits_for_what_flies(gated: tuple[Disk, Gated]) -> None:
    """Memory that a request uses is removed when the request has ended, not earlier; too late is a TimeoutError that
    changes nothing."""
    disk, backend = gated
    close_gate(disk, backend)
    driver = disk.driver
    other = FakeDriver(memory=MIB, base=driver.base + (1 << 32))
    other.map(disk.iova)
    request = driver.request(IN, 0, into=4096)
    driver.kick()
    disk.until(lambda _view: disk.counters()["inflight"] == 1)
    with pytest.raises(TimeoutError):
        disk.iova.remove(other.base, other.base + MIB - 1, timeout=0.05)
    assert len(disk.iova.regions) == 2
    disk.loop.loop.call_soon_threadsafe(disk.loop.loop.call_later, 0.05, backend.gate.set)
    disk.iova.remove(other.base, other.base + MIB - 1, timeout=10)
    assert backend.under_way == 0
    assert len(disk.iova.regions) == 1
    driver.run(request)
    assert (request.status, driver.data(request)) == (OK, b"R" * 4096)
    other.close()


def test_stop_waits_for_what_flies(gated: tuple[Disk, Gated]) -> None:
    """stop pops nothing more and returns when storage has answered what it had; the rest stays in the ring."""
    disk, backend = gated
    close_gate(disk, backend)
    driver = disk.driver
    requests = [driver.request(FLUSH) for _ in range(100)]
    driver.kick()
    disk.until(lambda _view: disk.counters()["inflight"] == 64)
    disk.loop.loop.call_soon_threadsafe(disk.loop.loop.call_later, 0.05, backend.gate.set)
    assert disk.queue.stop() == 64
    assert backend.under_way == 0
    assert len(driver.poll_used()) == 64
    disk.start(last_avail=64)
    while driver._chains:
        driver.wait()
    assert len(requests) == disk.counters()["flush_ops"] + 64


def test_errors_become_statuses(gated: tuple[Disk, Gated]) -> None:
    """EOPNOTSUPP is UNSUPP, any other OSError IOERR, a bug IOERR too; the disk goes on."""
    disk, backend = gated
    driver = disk.driver

    def fail(error: BaseException) -> Callable[[str], None]:
        def behave(_operation: str) -> None:
            raise error

        return behave

    for error, status in (
        (OSError(errno.ENOSPC, "full"), IOERR),
        (OSError(errno.EOPNOTSUPP, "cannot"), UNSUPP),
        (OSError("no number at all"), IOERR),
        (ValueError("a bug"), IOERR),
        (KeyError("another"), IOERR),
        (UserError("a sentence for nobody"), IOERR),
    ):
        backend.behaviour = fail(error)
        assert driver.write(0, bytes(512)) == status
        assert driver.read(0, 512) == (status, bytes(512))
        assert driver.flush() == status
        assert driver.ranges(DISCARD, (0, 8, 0)) == status
    backend.behaviour = lambda _operation: None
    assert driver.read(0, 512) == (OK, b"R" * 512)
    assert driver.ranges(WRITE_ZEROES, (0, 8, 0), (8, 8, 1)) == OK


def test_a_cancelled_request_is_answered(gated: tuple[Disk, Gated]) -> None:
    """Storage that is cancelled from within (a library's doing) costs an error, not a worker."""
    disk, backend = gated

    def cancelled(_operation: str) -> None:
        raise asyncio.CancelledError

    backend.behaviour = cancelled
    requests: list[Any] = []
    for _ in range(70):  # more than there are workers
        request = disk.driver.request(FLUSH)
        disk.driver.run(request)
        requests.append(request)
    assert {r.status for r in requests} == {IOERR}
    backend.behaviour = lambda _operation: None
    assert disk.driver.flush() == OK


def test_a_bug_of_ours_is_answered(
    gated: tuple[Disk, Gated], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the stack lets through costs an error, not a worker, and stop returns; it is logged once."""
    disk, _backend = gated

    async def broken() -> None:
        raise RuntimeError("a bug in the stack")

    monkeypatch.setattr(disk.stack, "flush", broken)
    for _ in range(70):  # more than there are workers
        request = disk.driver.request(FLUSH)
        disk.driver.run(request)
        assert request.status == IOERR
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert disk.queue.stop() == 70


def test_views_end_with_their_request(gated: tuple[Disk, Gated]) -> None:
    """A view that storage keeps beyond its request can be used no longer."""
    disk, backend = gated
    assert disk.driver.write(0, bytes(4096)) == OK
    [view] = backend.kept
    with pytest.raises(ValueError, match="released"):
        bytes(view)


# ------------------------------------------------------------------------------------------------------------ batches


class Batching(MemoryBackend):
    """Memory whose batches do what ``behaviour`` says first. ``threads``: batches block, on so many."""

    def __init__(self, threads: int = 0) -> None:
        super().__init__(self.Options(size=SIZE))
        self.behaviour: Callable[[Batch], None] = lambda batch: None
        self.sizes: list[int] = []
        self.single = 0
        self.is_volatile = False
        self.gate = threading.Event()
        self.gate.set()
        self.under_way = 0
        self.lock = threading.Lock()
        if threads:
            self.batch_threads = Threads("batching", threads)

    async def refresh(self) -> BlockInfo:
        return dataclasses.replace(await super().refresh(), volatile_cache=self.is_volatile, fua=Support.EMULATE)

    async def close(self) -> None:
        if self.batch_threads is not None:
            self.batch_threads.close()
        await super().close()

    async def read(self, offset: int, into: Segments) -> None:
        self.single += 1
        await super().read(offset, into)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        self.single += 1
        await super().write(offset, data)

    def batch(self, batch: Batch) -> None:
        with self.lock:
            self.sizes.append(len(batch))
            self.under_way += len(batch)
        if self.batch_threads is not None:
            assert self.gate.wait(20)
        try:
            self.behaviour(batch)
            super().batch(batch)
        finally:
            with self.lock:
                self.under_way -= len(batch)


@pytest.fixture(params=[0, 3], ids=["loop", "threads"])
def batching(request: pytest.FixtureRequest) -> Iterator[tuple[Disk, Batching]]:
    backend = Batching(request.param)
    disk = Disk(BY_NAME["plugin-memory"], backend=backend, num=256)
    yield disk, backend
    backend.gate.set()
    disk.close()


def test_a_full_ring_comes_in_few_batches(batching: tuple[Disk, Batching]) -> None:
    """What is in the ring is served in batches, not one by one, and each request gets its own data."""
    disk, backend = batching
    driver = disk.driver
    data = [bytes([i + 1]) * 4096 for i in range(100)]
    driver.run(*(driver.request(OUT, 8 * i, out=data[i]) for i in range(100)))
    reads = [driver.request(IN, 8 * i, into=4096) for i in range(100)]
    driver.run(*reads)
    assert [driver.data(read) for read in reads] == data
    assert {read.status for read in reads} == {OK}
    assert backend.single == 0
    assert sum(backend.sizes) == 200
    assert len(backend.sizes) < 80
    assert disk.stack.counters.reads == disk.stack.counters.writes == 100
    assert disk.stack.counters.read_bytes == disk.stack.counters.write_bytes == 409600
    assert disk.counters()["inflight"] == 0


def test_what_is_no_plain_transfer_goes_its_own_way(batching: tuple[Disk, Batching]) -> None:
    """Flushes, ranges, identity and writes that must be durable are no part of a batch; reads beside them are."""
    disk, backend = batching
    driver = disk.driver
    disk.rules.set_writethrough(True)
    assert driver.write(0, b"w" * 4096) == OK
    assert (backend.single, backend.sizes) == (1, [])
    requests = [driver.request(FLUSH), driver.request(IN, 0, into=4096), driver.request(WRITE_ZEROES, out=RANGE)]
    driver.run(*requests)
    assert [request.status for request in requests] == [OK, OK, OK]
    assert driver.data(requests[1]) == b"w" * 4096
    assert (backend.single, backend.sizes) == (1, [1])
    assert driver.read(8, 4096) == (OK, bytes(4096))


def test_results_of_a_batch_become_statuses(batching: tuple[Disk, Batching]) -> None:
    """Each request has the status of its own result; one left open is served by its coroutine; a failed read is zeros."""
    disk, backend = batching
    driver = disk.driver
    driver.run(*(driver.request(OUT, 8 * i, out=b"d" * 4096) for i in range(8)))
    answers = {0: errno.ENOSPC, 1: errno.EOPNOTSUPP, 2: -99, 3: 0}

    def behave(batch: Batch) -> None:
        for request in batch:
            number = request.offset // 4096
            if number in answers:
                batch.memory(request.number)[0][:4] = b"some"
                batch.results[request.number] = answers[number]
        raise OSError(errno.EIO, "the others")

    backend.behaviour = behave
    reads = [driver.request(IN, 8 * i, into=4096) for i in range(8)]
    driver.run(*reads)
    assert [read.status for read in reads] == [IOERR, UNSUPP, IOERR, OK, IOERR, IOERR, IOERR, IOERR]
    assert driver.data(reads[3])[:4] == b"some"
    assert all(driver.data(read) == bytes(4096) for read in reads if read.status != OK)
    assert disk.stack.counters.errors == 7

    def leave(batch: Batch) -> None:
        for request in batch:
            if request.offset % 8192 == 0:
                batch.results[request.number] = 0
        batch.copy = lambda *_: None  # type: ignore[method-assign]

    backend.behaviour = leave
    reads = [driver.request(IN, 8 * i, into=4096) for i in range(8)]
    driver.run(*reads)
    assert {read.status for read in reads} == {OK}
    assert backend.single == 4
    assert [driver.data(read)[:1] for read in reads[1::2]] == [b"d"] * 4


def test_a_bug_in_a_batch_is_answered(batching: tuple[Disk, Batching], caplog: pytest.LogCaptureFixture) -> None:
    """It costs the requests an error, is logged once, and the disk goes on."""
    disk, backend = batching

    def bug(_batch: Batch) -> None:
        raise ZeroDivisionError

    backend.behaviour = bug
    for _ in range(70):
        assert disk.driver.read(0, 512) == (IOERR, bytes(512))
    assert len([record for record in caplog.records if record.exc_info]) == 1
    backend.behaviour = lambda _batch: None
    assert disk.driver.read(0, 512)[0] == OK


def test_memory_of_a_batch_ends_with_it(batching: tuple[Disk, Batching]) -> None:
    """Views a backend keeps are of no use afterwards."""
    disk, backend = batching
    kept: list[memoryview] = []

    def keep(batch: Batch) -> None:
        kept.extend([*batch.memory(0), batch.results, batch.records])

    backend.behaviour = keep
    assert disk.driver.write(0, bytes(4096)) == OK
    assert len(kept) == 3
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            bytes(view)


@pytest.fixture
def blocked() -> Iterator[tuple[Disk, Batching]]:
    """Three threads, all of which wait."""
    backend = Batching(3)
    disk = Disk(BY_NAME["plugin-memory"], backend=backend, num=256)
    backend.gate.clear()
    yield disk, backend
    backend.gate.set()
    disk.close()


def test_threads_share_what_arrives(blocked: tuple[Disk, Batching]) -> None:
    """Every free thread gets its share at once; what comes while all are busy waits in the ring, and then comes together."""
    disk, backend = blocked
    driver = disk.driver
    first = [driver.request(IN, 8 * i, into=4096) for i in range(9)]
    driver.kick()
    disk.until(lambda _view: backend.under_way == 9)
    assert backend.sizes == [3, 3, 3]
    second = [driver.request(IN, 8 * i, into=4096) for i in range(30)]
    driver.kick()
    backend.gate.set()
    driver.run(*first, *second)
    assert {request.status for request in (*first, *second)} == {OK}
    assert sum(backend.sizes) == 39
    assert len(backend.sizes) <= 12


def test_stop_and_remove_wait_for_threads(blocked: tuple[Disk, Batching]) -> None:
    """Memory that a thread may touch is not removed, and stop does not return, before the thread is done."""
    disk, backend = blocked
    driver = disk.driver
    other = FakeDriver(memory=MIB, base=driver.base + (1 << 32))
    other.map(disk.iova)
    requests = [driver.request(IN, 8 * i, into=4096) for i in range(100)]
    driver.kick()
    disk.until(lambda _view: backend.under_way > 0)
    popped = disk.counters()["inflight"]
    assert 0 < popped <= 64
    with pytest.raises(TimeoutError):
        disk.iova.remove(other.base, other.base + MIB - 1, timeout=0.05)
    disk.loop.loop.call_soon_threadsafe(disk.loop.loop.call_later, 0.05, backend.gate.set)
    assert disk.queue.stop() == popped
    assert backend.under_way == 0
    assert len(driver.poll_used()) == popped
    assert len(requests) == 100
    other.close()


def test_without_threads_requests_are_served(blocked: tuple[Disk, Batching], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be had the coroutines do it."""
    disk, backend = blocked
    assert backend.batch_threads is not None
    monkeypatch.setattr(backend.batch_threads, "start", lambda *_: False)
    driver = disk.driver
    requests = [driver.request(IN, 8 * i, into=4096) for i in range(100)]
    driver.run(*requests)
    assert {request.status for request in requests} == {OK}
    assert backend.single == 100
