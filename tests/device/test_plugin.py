"""The plugin path where storage is slow, wrong or gone: what only storage in Python can do to a queue."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from disks import BY_NAME, MIB, SIZE, Disk

from vduse_blk.block.contract import Backend, BlockInfo, Segments, Support
from vduse_blk.block.errors import UserError
from vduse_blk.testing.driver import DISCARD, FLUSH, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES, FakeDriver


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
