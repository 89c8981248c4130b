"""A disk as its driver sees it: every path and kind of storage answers the same requests the same way."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from disks import BLOCK, BY_NAME, KINDS, MIB, SIZE, Disk, Kind

from vduse_blk.core._core import ffi
from vduse_blk.queue import QueueView
from vduse_blk.queue.base import inflight_log_bytes
from vduse_blk.testing.driver import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    STALE,
    UNSUPP,
    WRITE_ZEROES,
    Buffer,
    FakeDriver,
    Request,
)

RINGS = [(event_idx, indirect) for event_idx in (True, False) for indirect in (True, False)]
PATHS = [BY_NAME[f"native-{name}"] for name in ("memory", "file-uring", "file-direct-pinned", "file-sync", "tmpfs")] + [
    BY_NAME[name] for name in ("plugin-memory", "plugin-memory-single", "plugin-memory-threads")
]
"""One of each engine, for what does not depend on storage."""


def ring_name(ring: tuple[bool, bool]) -> str:
    return f"{'event' if ring[0] else 'flags'}-{'indirect' if ring[1] else 'direct'}"


Make = Callable[..., Disk]


@pytest.fixture
def make() -> Iterator[Make]:
    """Disks that are closed at the end of the test."""
    disks: list[Disk] = []

    def make(kind: Kind, **options: Any) -> Disk:
        disks.append(Disk(kind, **options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture(params=RINGS, ids=ring_name)
def ring(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"event_idx": request.param[0], "indirect": request.param[1]}


every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_path = pytest.mark.parametrize("kind", PATHS, ids=str)
every_file = pytest.mark.parametrize("kind", [k for k in KINDS if k.is_file and k.place != BLOCK], ids=str)


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


# ---------------------------------------------------------------------------------------------------- transfers


@every_kind
def test_what_is_written_is_read(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """Writes of any size and cut arrive in the storage, reads of any size and cut give them back, statuses are OK."""
    disk = make(kind, **ring)
    driver = disk.driver
    chance = random.Random(7)
    shadow = bytearray(disk.content(0, SIZE))
    assert not any(shadow)
    for i in range(60):
        driver.reset_heap()
        length = chance.choice([512, 4096, 4096, 12288, 65536, MIB])
        sector = chance.randrange((SIZE - length) // 512 + 1)
        pieces = chance.choice([1, 1, 2, 5, 20])
        if chance.random() < 0.5:
            data = noise(length, i)
            assert driver.write(sector, data, pieces=pieces) == OK
            if kind.keeps:
                shadow[sector * 512 : sector * 512 + length] = data
        else:
            status, data = driver.read(sector, length, pieces=pieces)
            assert status == OK
            assert data == shadow[sector * 512 : sector * 512 + length]
    assert disk.content(0, SIZE) == shadow
    counters = disk.counters()
    assert counters["read_ops"] + counters["write_ops"] == 60
    assert counters["read_errors"] == counters["write_errors"] == counters["malformed"] == counters["inflight"] == 0


@every_kind
def test_many_at_once(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """A full ring of requests to different places completes, each with its own data."""
    disk = make(kind, **ring)
    driver = disk.driver
    for turn in range(4):
        driver.reset_heap()
        data = {i: noise(4096, 100 * turn + i) for i in range(16)}
        writes = [driver.request(OUT, 16 * i + 128 * turn, out=data[i]) for i in data]
        driver.run(*writes)
        reads = [driver.request(IN, 16 * i + 128 * turn, into=4096) for i in data]
        driver.run(*reads)
        assert {r.status for r in (*writes, *reads)} == {OK}
        for i, read in enumerate(reads):
            assert driver.data(read) == (data[i] if kind.keeps else bytes(4096))
            assert read.used == 4097
        assert {r.used for r in writes} == {1}


@every_kind
def test_used_length_is_what_may_be_written(make: Make, kind: Kind) -> None:
    """The used length covers data and status of a read, the status alone otherwise."""
    driver = make(kind).driver
    requests = [driver.request(IN, 0, into=1024), driver.request(OUT, 8, out=bytes(1024)), driver.request(GET_ID, into=20)]
    driver.run(*requests)
    assert [r.used for r in requests] == [1025, 1, 21]


@every_kind
def test_header_cut_in_two(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """Header and data may share a buffer, at any address; the framing means nothing (virtio 1.3, 2.7.4.1)."""
    driver = make(kind, **ring).driver
    data = noise(4096)
    assert driver.write(8, data, split_header=True) == OK
    status, found = driver.read(8, 4096, split_header=True)
    assert status == OK
    if kind.keeps:
        assert found == data


@every_kind
def test_pieces_of_odd_length(make: Make, kind: Kind) -> None:
    """Pieces need no alignment and no size, only their sum does."""
    driver = make(kind).driver
    data = noise(4096)
    for cut in ([1, 4095], [511, 513, 3072], [4093, 1, 1, 1], [1000, 1000, 1000, 1096]):
        driver.reset_heap()
        out = driver.alloc(4096 + 8, 8) + 3
        driver.put(out, data)
        buffers = [header(driver, OUT, 16)]
        for part in cut:
            buffers.append(Buffer(out, part))
            out += part
        assert transact(driver, [*buffers, status_of(driver)])[0] == OK
        into = driver.alloc(4096 + 8, 8) + 5
        parts = []
        at = into
        for part in cut:
            parts.append(Buffer(at, part, True))
            at += part
        assert transact(driver, [header(driver, IN, 16), *parts, status_of(driver)])[0] == OK
        if kind.keeps:
            assert driver.get(into, 4096) == data


@every_kind
def test_longest_chain(make: Make, kind: Kind) -> None:
    """seg_max segments of a page each, as file systems send them."""
    disk = make(kind, num=256)
    pieces = disk.setup.seg_max
    assert pieces == 254
    data = noise(pieces * 4096)
    assert disk.driver.write(0, data, pieces=pieces) == OK
    status, found = disk.driver.read(0, len(data), pieces=pieces)
    assert status == OK
    if kind.keeps:
        assert found == data


# ----------------------------------------------------------------------------------------------------- refusals


@every_path
def test_outside_the_disk(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """The last sector is part of the disk, the next is not, whatever the numbers; a refused read gives zeros."""
    disk = make(kind, **ring)
    driver = disk.driver
    sectors = SIZE // 512
    assert driver.write(sectors - 1, noise(512)) == OK
    assert driver.read(sectors - 1, 512) == (OK, noise(512))
    for sector, length in ((sectors, 512), (sectors - 1, 1024), (2**55 - 1, 512), (2**64 - 1, 512), (2**64 - 8, 4096)):
        assert driver.read(sector, length) == (IOERR, bytes(length))
        assert driver.write(sector, noise(length)) == IOERR
    assert driver.read(sectors - 1, 512) == (OK, noise(512))
    assert os.path.getsize(disk.image or "/dev/null") in (0, SIZE)


@every_path
def test_not_aligned(make: Make, kind: Kind) -> None:
    """A disk of 4096-byte blocks takes whole blocks only; no disk takes part of a sector."""
    driver = make(kind, block_size=4096).driver
    data = noise(4096)
    assert driver.write(8, data) == OK
    assert driver.write(9, data) == IOERR
    assert driver.write(8, data[:512]) == IOERR
    assert driver.read(4, 4096) == (IOERR, bytes(4096))
    assert driver.read(8, 2048) == (IOERR, bytes(2048))
    assert driver.read(8, 4095) == (IOERR, bytes(4095))
    assert driver.read(8, 4096) == (OK, data)


@every_kind
def test_read_only(make: Make, kind: Kind) -> None:
    """A read-only disk refuses everything that changes it, and reads and flushes."""
    disk = make(kind, read_only=True)
    driver = disk.driver
    assert driver.write(0, noise(512)) == IOERR
    assert driver.ranges(WRITE_ZEROES, (0, 8, 0)) == IOERR
    assert driver.ranges(DISCARD, (0, 8, 0)) in (IOERR, UNSUPP)
    assert driver.read(0, 512) == (OK, bytes(512))
    assert driver.flush() == OK
    assert not any(disk.content(0, SIZE))


@every_path
def test_unknown_type(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """A type nobody knows is UNSUPP, and the disk goes on."""
    driver = make(kind, **ring).driver
    for number in (2, 5, 14, 16, 99, 0x80000000):
        request = driver.request(number, into=512)
        driver.run(request)
        assert request.status == UNSUPP
    assert driver.flush() == OK


def header(driver: FakeDriver, kind: int, sector: int = 0) -> Buffer:
    iova = driver.alloc(16)
    driver.put(iova, struct.pack("<IIQ", kind, 0, sector))
    return Buffer(iova, 16)


def status_of(driver: FakeDriver) -> Buffer:
    return Buffer(driver.alloc(1), 1, True)


def transact(driver: FakeDriver, buffers: list[Buffer]) -> tuple[int, int]:
    """Run a chain; returns the last byte of its last buffer and the used length."""
    driver.offer(driver.add_chain(buffers))
    driver.kick()
    [(_head, used)] = driver.wait()
    last = buffers[-1]
    return driver.get(last.iova, last.length)[-1], used


@every_path
def test_malformed(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """Requests whose framing is wrong are answered with an error where there is room for an answer, counted, and cost
    nobody else anything."""
    disk = make(kind, **ring)
    driver = disk.driver
    page = Buffer(driver.alloc(512), 512)
    writable = Buffer(driver.alloc(512), 512, True)
    cases = [
        [header(driver, IN)],  # no status
        [Buffer(driver.alloc(15), 15), status_of(driver)],  # no whole header
        [status_of(driver)],
        [header(driver, IN), page, writable, status_of(driver)],  # a read with data to write
        [header(driver, GET_ID), Buffer(driver.base - 4096, 20, True), status_of(driver)],
    ]
    for number, buffers in enumerate(cases[:-1], 1):
        status, used = transact(driver, buffers)
        if buffers[-1].writable:
            assert status == IOERR
        else:
            assert used == 0
        assert disk.counters()["malformed"] == number
    assert driver.flush() == OK


@every_path
def test_memory_that_is_not_there(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """A request into unmapped memory waits for control; if control finds nothing it fails, and the disk goes on."""
    disk = make(kind, **ring)
    driver = disk.driver
    hole = driver.base - 65536
    answer = status_of(driver)
    driver.offer(driver.add_chain([header(driver, IN), Buffer(hole, 512, True), answer]))
    behind = driver.request(FLUSH)
    driver.kick()
    assert disk.until(lambda view: view.missing is not None).missing == (hole, hole + 511)
    assert driver.poll_used() == []
    assert behind.status is None
    disk.queue.set_table(disk.iova.table)  # of another queue's miss: no answer to this one
    assert driver.poll_used() == []
    assert disk.queue.view().missing is not None
    disk.queue.answer_miss()
    while driver.get(answer.iova, 1)[0] == STALE or behind.status is None:
        for head, _used in driver.wait():
            if head == behind.head:
                behind.status = driver.get(behind.status_iova, 1)[0]
    assert driver.get(answer.iova, 1)[0] == IOERR
    assert behind.status == OK
    assert disk.counters()["misses"] == 1


@every_path
def test_memory_that_control_finds(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """A request into memory that control maps when asked is served as if nothing had happened."""
    disk = make(kind, **ring)
    other = FakeDriver(memory=MIB, base=disk.driver.base + (1 << 32))
    try:
        into = other.alloc(4096, 512)
        driver = disk.driver
        assert driver.write(0, noise(4096)) == OK
        driver.offer(driver.add_chain([header(driver, IN), Buffer(into, 4096, True), status_of(driver)]))
        driver.kick()
        assert disk.until(lambda view: view.missing is not None).missing == (into, into + 4095)
        other.map(disk.iova)
        disk.queue.answer_miss()
        [(_head, used)] = driver.wait()
        assert used == 4097
        assert other.get(into, 4096) == noise(4096)
        disk.iova.remove(other.base, other.base + MIB - 1)
        assert [region.start for region in disk.iova.regions] == [driver.base]
    finally:
        other.close()


@every_path
def test_a_broken_ring_stops_and_lets_go(make: Make, kind: Kind) -> None:
    """After the driver broke the rules nothing more is served, control is told why, and memory can be removed."""
    disk = make(kind)
    driver = disk.driver
    assert driver.flush() == OK
    driver.put_u16(driver.avail + 2, 1000)
    driver.kick(force=True)
    view = disk.until(lambda view: view.fault is not None)
    assert view.fault == "avail.idx runs further ahead than the ring is long"
    disk.iova.remove(timeout=10)
    assert disk.iova.regions == ()
    assert driver.poll_used() == []
    disk.queue.stop()


# ------------------------------------------------------------------------------------------ other request types


@every_kind
def test_flush(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """FLUSH is OK and counted, alone and between writes."""
    disk = make(kind, **ring)
    driver = disk.driver
    assert driver.flush() == OK
    mixed = [driver.request(OUT, 8 * i, out=noise(4096, i)) if i % 2 else driver.request(FLUSH) for i in range(10)]
    driver.run(*mixed)
    assert {r.status for r in mixed} == {OK}
    assert disk.counters()["flush_ops"] == 6


@every_kind
def test_discard(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """DISCARD gives space back, touches nothing else, and takes several ranges."""
    disk = make(kind, **ring)
    driver = disk.driver
    data = noise(2 * MIB)
    for at in range(0, len(data), MIB):
        driver.reset_heap()
        assert driver.write(at // 512, data[at : at + MIB]) == OK
    assert driver.flush() == OK
    before = disk.allocated() if disk.image else 0
    assert driver.ranges(DISCARD, (256, 512, 0), (1024, 1024, 0), (3000, 0, 0)) == OK
    if disk.image:
        assert before - disk.allocated() >= 700 * 1024
    if kind.keeps:
        kept = disk.content(0, 2 * MIB)
        assert kept[: 256 * 512] == data[: 256 * 512]
        assert kept[768 * 512 : 1024 * 512] == data[768 * 512 : 1024 * 512]
        assert kept[2048 * 512 :] == data[2048 * 512 :]
    assert driver.ranges(DISCARD, (0, 8, 1)) == UNSUPP  # the unmap flag is for WRITE_ZEROES
    assert driver.ranges(DISCARD, (SIZE // 512 - 4, 8, 0)) == IOERR
    assert driver.ranges(DISCARD, *[(0, 8, 0)] * 33) == IOERR


@every_kind
@pytest.mark.parametrize("unmap", [0, 1], ids=["keep", "unmap"])
def test_write_zeroes(make: Make, kind: Kind, ring: dict[str, bool], unmap: int) -> None:
    """WRITE_ZEROES makes exactly its ranges zero, gives space back if and only if that is allowed, odd edges included."""
    disk = make(kind, **ring)
    driver = disk.driver
    data = noise(MIB)
    assert driver.write(0, data) == OK
    assert driver.flush() == OK
    before = disk.allocated() if disk.image else 0
    assert driver.ranges(WRITE_ZEROES, (3, 1000, unmap), (1500, 1, unmap), (1600, 0, unmap)) == OK
    expected = bytearray(data)
    expected[3 * 512 : 1003 * 512] = bytes(1000 * 512)
    expected[1500 * 512 : 1501 * 512] = bytes(512)
    if kind.keeps:
        assert disk.content(0, MIB) == expected
        assert driver.read(0, MIB) == (OK, bytes(expected))
    if disk.image and kind.place != BLOCK:
        given_back = before - disk.allocated()
        assert given_back >= 480 * 1024 if unmap else given_back == 0
    assert driver.ranges(WRITE_ZEROES, (0, 8, 2)) == UNSUPP
    assert driver.ranges(WRITE_ZEROES, (SIZE // 512, 1, 0)) == IOERR
    if kind.keeps:
        assert disk.content(0, MIB) == expected


@every_kind
def test_zeroes_over_all_of_it(make: Make, kind: Kind) -> None:
    """One range as long as the disk, which may have to be written out in many steps."""
    disk = make(kind)
    for at in range(0, SIZE, MIB):
        disk.driver.reset_heap()
        assert disk.driver.write(at // 512, noise(MIB, at)) == OK
    assert disk.driver.ranges(WRITE_ZEROES, (0, SIZE // 512, 0)) == OK
    assert not any(disk.content(0, SIZE))


def test_what_storage_lacks_is_learnt_right(make: Make) -> None:
    """Many requests find out at once that ZERO_RANGE is missing; none of them takes away PUNCH_HOLE from the others."""
    disk = make(BY_NAME["native-tmpfs-uring"])
    driver = disk.driver
    assert driver.write(0, noise(MIB)) == OK
    before = disk.allocated()
    for unmap in (0, 1):
        requests = [driver.request(WRITE_ZEROES, out=struct.pack("<QII", 128 * i, 128, unmap)) for i in range(16)]
        driver.run(*requests)
        assert {r.status for r in requests} == {OK}
        assert before - disk.allocated() == (MIB if unmap else 0)
    assert not any(disk.content(0, MIB))


@every_path
@pytest.mark.parametrize("serial", ["", "disk-1", "exactly-20-letters-ok"])
def test_serial(make: Make, kind: Kind, serial: str) -> None:
    """GET_ID gives the serial padded with NULs to 20 bytes; a shorter buffer gets what fits, a longer one zeros."""
    serial = serial[:20]
    driver = make(kind, serial=serial).driver
    padded = serial.encode().ljust(20, b"\0")
    assert driver.serial() == (OK, padded)
    for length in (1, 19, 21, 64):
        request = driver.request(GET_ID, into=length, pieces=2)
        driver.run(request)
        assert (request.status, driver.data(request)) == (OK, padded[:length].ljust(length, b"\0"))


# ------------------------------------------------------------------------------------------------------ storage


@every_file
def test_storage_that_shrinks(make: Make, kind: Kind) -> None:
    """A read where the file has ended is an error and gives no bytes that were in the buffer before."""
    disk = make(kind)
    driver = disk.driver
    assert disk.image is not None
    for at in range(0, 2 * MIB, MIB):
        assert driver.write(at // 512, noise(MIB, at)) == OK
    os.truncate(disk.image, MIB)
    status, data = driver.read(MIB // 512, 65536, pieces=3)
    assert (status, data) == (IOERR, bytes(65536))
    status, data = driver.read(MIB // 512 - 8, 8192, pieces=2)
    assert status == IOERR
    assert data[4096:] == bytes(4096)
    assert data[:4096] in (bytes(4096), noise(MIB, 0)[-4096:])
    assert driver.read(0, 4096) == (OK, noise(MIB, 0)[:4096])
    assert disk.counters()["read_errors"] == 2


@every_path
def test_growing(make: Make, kind: Kind) -> None:
    """After set_capacity requests beyond the old end are served."""
    disk = make(kind, size=SIZE)
    driver = disk.driver
    disk.rules.set_capacity(SIZE // 2)
    assert driver.write(SIZE // 1024, noise(512)) == IOERR
    disk.rules.set_capacity(SIZE)
    assert driver.write(SIZE // 1024, noise(512)) == OK
    assert driver.read(SIZE // 1024, 512) == (OK, noise(512))


@pytest.mark.parametrize("name", ["native-file-uring", "native-tmpfs", "plugin-file"])
def test_a_file_grows(make: Make, name: str) -> None:
    """resize of the stack and set_capacity together make room that keeps data."""
    disk = make(BY_NAME[name])
    info = disk.loop.run(disk.stack.resize(2 * SIZE))
    disk.rules.set_capacity(info.size)
    assert disk.driver.write(2 * SIZE // 512 - 8, noise(4096)) == OK
    assert disk.content(2 * SIZE - 4096, 4096) == noise(4096)


@pytest.mark.parametrize("name", ["native-file-uring", "native-file-sync"])
def test_storage_that_refuses(make: Make, name: str) -> None:
    """A descriptor that may not be written gives IOERR for each write, and reads go on."""
    disk = make(BY_NAME[name], start=False)
    assert disk.image is not None
    fd = os.open(disk.image, os.O_RDONLY)
    try:
        disk.kind = Kind(name, "file", True, disk.kind.io_mode)
        disk.queue = disk.make_queue()
        disk.queue._target.fd = fd  # type: ignore[attr-defined]
        disk.queue.start(disk.setup, disk.iova)
        assert disk.driver.write(0, noise(4096)) == IOERR
        assert disk.driver.read(0, 4096) == (OK, bytes(4096))
        disk.queue.stop()
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------- kicks and interrupts


@every_path
def test_interrupts_are_not_more_than_needed(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """At most one interrupt per publish and one publish per completion; a driver that waits is always woken."""
    disk = make(kind, **ring)
    driver = disk.driver
    total = 0
    for turn in range(30):
        driver.reset_heap()
        batch = [driver.request(OUT, 8 * i, out=bytes(4096)) for i in range(1 + turn % 12)]
        driver.run(*batch)
        total += len(batch)
    counters = disk.counters()
    assert counters["write_ops"] == total
    assert counters["notifies"] <= counters["publishes"] <= total
    assert driver.interrupts <= counters["notifies"]


@every_path
def test_a_driver_that_polls_is_left_alone(make: Make, kind: Kind) -> None:
    """With used_event far away (or NO_INTERRUPT set) completions raise no interrupt."""
    for event_idx in (True, False):
        disk = make(kind, event_idx=event_idx)
        driver = disk.driver
        driver.run(driver.request(FLUSH))  # the first interrupt is always raised: nobody knows what was before
        first = disk.counters()["notifies"]
        if event_idx:
            driver.put_u16(driver.avail + 4 + 2 * driver.num, driver._used_seen + 0x7FFF)
        else:
            driver.put_u16(driver.avail, 1)
        for _ in range(20):
            for _ in range(4):
                driver.request(FLUSH)
            driver.kick()
            seen = 0
            while seen < 4:
                seen += used_without_asking(driver)
        assert disk.counters()["notifies"] == first
        assert disk.counters()["flush_ops"] == 81


def used_without_asking(driver: FakeDriver) -> int:
    """``poll_used`` that leaves used_event alone."""
    event_idx, driver.event_idx = driver.event_idx, False
    try:
        return len(driver.poll_used())
    finally:
        driver.event_idx = event_idx


@every_path
def test_kicks_are_not_more_than_needed(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """A sleeping device asks for a kick; a kick that was not asked for is not needed."""
    disk = make(kind, **ring)
    driver = disk.driver
    for i in range(50):
        driver.reset_heap()
        requests: list[Request] = []
        for k in range(8):
            requests.append(driver.request(OUT, 8 * k, out=noise(4096, i)))
            driver.kick()
        driver.run(*requests)
    assert disk.counters()["write_ops"] == 400
    assert 1 <= driver.kicks <= 450


@every_path
@pytest.mark.parametrize("event_idx", [True, False])
def test_more_than_65536_requests(make: Make, kind: Kind, event_idx: bool) -> None:
    """The 16-bit indices wrap around and nothing is lost or done twice."""
    disk = make(kind, num=256, memory=MIB, event_idx=event_idx, indirect=False)
    driver = disk.driver
    # Every chain is the same: the driver's bookkeeping is what is slow here.
    chain = [header(driver, IN, 8), Buffer(driver.alloc(512), 512, True), status_of(driver)]
    done = offered = 0
    total = 66_000
    while done < total:
        while offered < total and driver.free >= 3 and offered - done < 80:
            driver.offer(driver.add_chain(chain))
            offered += 1
        driver.kick()
        finished = driver.wait()
        assert {used for _head, used in finished} == {513}
        done += len(finished)
    assert disk.counters()["read_ops"] == total
    assert disk.counters()["read_errors"] == 0
    assert disk.queue.stop() == total % 65536


@every_kind
def test_just_before_the_wrap(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """The same for every kind of storage: a queue that begins at 65530 goes on through 0."""
    disk = make(kind, start=False, **ring)
    driver = disk.driver
    begin_at(driver, 65530)
    disk.start(last_avail=65530)
    for i in range(20):
        driver.reset_heap()
        assert driver.write(8 * i, noise(4096, i)) == OK
        status, data = driver.read(8 * i, 4096)
        assert status == OK
        assert data == (noise(4096, i) if kind.keeps else bytes(4096))
    assert disk.queue.stop() == (65530 + 40) % 65536


def begin_at(driver: FakeDriver, index: int) -> None:
    """A driver whose ring has been used before."""
    driver._avail_idx = driver._used_seen = driver._kicked_at = index
    driver.put_u16(driver.avail + 2, index)
    driver.put_u16(driver.used + 2, index)
    driver.put_u16(driver.avail + 4 + 2 * driver.num, index)


# --------------------------------------------------------------------------------------------------------- life


@every_kind
def test_stop_in_flight_and_go_on(make: Make, kind: Kind, ring: dict[str, bool]) -> None:
    """stop returns with nothing in flight; a queue that goes on from there serves the rest, each request once."""
    disk = make(kind, **ring)
    driver = disk.driver
    for turn in range(6):
        driver.reset_heap()
        data = [noise(16384, 10 * turn + i) for i in range(16)]
        requests = [driver.request(OUT, 32 * i, out=data[i]) for i in range(16)]
        driver.kick()
        following = disk.queue.stop()
        assert disk.counters()["inflight"] == 0
        finished = driver.poll_used()  # raises if one is completed twice
        snapshot = driver.memory[:]
        used_idx = driver._used_seen
        assert following == used_idx
        assert driver.memory[:] == snapshot
        for head, _used in finished:
            request = driver._requests.pop(head)
            request.status = driver.get(request.status_iova, 1)[0]
        # Half of the time by the index that stop returned, half by the used ring.
        disk.start(last_avail=following if turn % 2 else None)
        driver.run(*requests)
        assert {r.status for r in requests} == {OK}
        if kind.keeps:
            assert disk.content(0, 16 * 16384) == b"".join(data)


@every_kind
def test_memory_comes_and_goes_under_load(make: Make, kind: Kind) -> None:
    """Regions are added and removed while requests fly; remove returns only when nothing uses the region any more."""
    disk = make(kind)
    driver = disk.driver
    other = FakeDriver(memory=MIB, base=driver.base + (1 << 32))

    def has_popped(view: QueueView, count: int) -> bool:
        if view.missing is not None:  # it took the table from before and the chain from after: as control does
            disk.queue.answer_miss()
        counters = disk.counters()
        return counters["read_ops"] + counters["inflight"] > count

    try:
        into = other.alloc(65536, 512)
        for turn in range(10):
            driver.reset_heap()
            other.map(disk.iova)
            chain = [header(driver, IN, 0), Buffer(into, 65536, True), status_of(driver)]
            driver.offer(driver.add_chain(chain))
            mine = [driver.request(OUT, 256 + 8 * i, out=noise(4096, turn)) for i in range(8)]
            driver.kick()
            # The read was offered first: it is popped.
            disk.until(lambda view, turn=turn: has_popped(view, turn))
            disk.iova.remove(other.base, other.base + MIB - 1, timeout=10)
            # From here on nobody may touch it.
            other.put(into, bytes([STALE]) * 65536)
            collect_all(driver, mine)
            assert {r.status for r in mine} == {OK}
            assert driver.get(chain[-1].iova, 1)[0] == OK
            assert other.get(into, 65536) == bytes([STALE]) * 65536
        assert len(disk.iova.regions) == 1
    finally:
        other.close()


def collect_all(driver: FakeDriver, requests: list[Request]) -> None:
    """Like ``run``, with a chain of our own among them."""
    while driver._chains:
        for head, _used in driver.wait():
            request = driver._requests.pop(head, None)
            if request is not None:
                request.status = driver.get(request.status_iova, 1)[0]
    assert all(request.status is not None for request in requests)


@every_path
def test_the_ring_itself_moves_away(make: Make, kind: Kind) -> None:
    """When all memory is removed the queue sleeps; when it is back, it goes on where it was."""
    disk = make(kind)
    driver = disk.driver
    assert driver.write(0, noise(4096)) == OK
    disk.iova.remove(timeout=10)
    request = driver.request(IN, 0, into=4096)
    driver.kick(force=True)
    assert driver.poll_used() == []
    driver.map(disk.iova)
    driver.run(request)
    assert (request.status, driver.data(request)) == (OK, noise(4096))
    assert disk.queue.view().fault is None


@every_path
def test_a_ring_that_is_not_there(make: Make, kind: Kind) -> None:
    """A queue whose ring is not mapped, or misaligned, says so and can be stopped."""
    for changes in ({"desc": 0x1000}, {"used": 0x1000}, {"desc": 0x10000001}):
        disk = make(kind, start=False)
        disk.start(**changes)
        view = disk.until(lambda view: view.fault is not None)
        assert view.fault == "the ring's memory is not mapped, or misaligned"
        disk.queue.stop()


def test_no_storage_answers_errors() -> None:
    """A native queue without a target answers every request with an error and goes on."""
    from vduse_blk.queue import NativeQueue

    disk = Disk(BY_NAME["native-null"], start=False)
    try:
        disk.queue = NativeQueue(0, disk.rules, None)
        disk.queue.start(disk.setup, disk.iova)
        assert disk.driver.read(0, 512) == (IOERR, bytes(512))
        assert disk.driver.write(0, noise(512)) == IOERR
        assert disk.driver.flush() == IOERR
        assert disk.driver.serial()[0] == OK
    finally:
        disk.close()


def test_small_and_large_requests_on_files_in_memory() -> None:
    """Small ones are done on the spot, large ones by other threads: all of them at once, each gets its own data."""
    disk = Disk(BY_NAME["native-tmpfs"])
    try:
        driver = disk.driver
        sizes = [512, MIB, 4096, 256 * 1024, 127 * 1024, 128 * 1024, MIB]
        data = [noise(size, number) for number, size in enumerate(sizes)]
        sectors = [number * MIB // 512 for number in range(len(sizes))]
        writes = [driver.request(OUT, at, out=part, pieces=4) for at, part in zip(sectors, data, strict=True)]
        driver.run(*writes)
        assert [request.status for request in writes] == [OK] * len(sizes)
        driver.reset_heap()
        reads = [driver.request(IN, at, into=len(part), pieces=3) for at, part in zip(sectors, data, strict=True)]
        driver.run(*reads)
        assert [driver.data(request) for request in reads] == data
    finally:
        disk.close()


# ------------------------------------------------------------------------------------------------------ tables


@every_path
def test_old_tables_are_let_go(make: Make, kind: Kind) -> None:
    """Memory that changes a thousand times under a running queue leaves a handful of tables behind."""
    disk = make(kind)
    for i in range(1000):
        region = disk.iova.add_memory(start=1 << 40, last=(1 << 40) + 4095, host=disk.driver.host)
        disk.iova.change(remove=[region])
        if i % 100 == 0:
            assert disk.driver.read(0, 4096)[0] == OK
            disk.driver.reset_heap()
    assert len(disk.iova._tables) < 10


@pytest.mark.parametrize("name", ["native-memory", "native-file-sync", "native-file-uring", "native-tmpfs"])
def test_stopped_while_it_takes_over(make: Make, name: str) -> None:
    """Stopped at once, with requests of a dead server to do again of which the last names memory that nobody has mapped: it
    answers the others and stops, although nobody will tell it of that memory."""
    disk = make(BY_NAME[name], start=False, num=256)
    driver = disk.driver
    heads = [driver.request(IN, 8 * i, into=4096).head for i in range(60)]
    lost = driver.add_chain([header(driver, IN), Buffer(driver.base - 65536, 512, True), status_of(driver)])
    driver.offer(lost)
    memory = bytearray(inflight_log_bytes(256))
    struct.pack_into("=QHHHH", memory, 0, 0, 1, 256, 0, 0)
    for counter, head in enumerate([*heads, lost]):
        struct.pack_into("=B5xHQ", memory, 16 + 16 * head, 1, 0, counter)
    log = ffi.new("uint64_t[]", inflight_log_bytes(256) // 8)
    ffi.memmove(log, memory, len(memory))
    disk.start(inflight=int(ffi.cast("uintptr_t", log)))
    assert disk.queue.stop() == 61
    assert sorted(head for head, _used in driver.poll_used()) == sorted(heads)
