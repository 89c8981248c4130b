"""The crash log: whenever a server dies, its successor does what was popped and not answered, once, in order."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.iova import READ, WRITE
from vduse_blk.testing.driver import IN, OUT, FakeDriver, Request

HEADER, DESC = 16, 16
SIZE = 1 << 20


class Log:
    """The log as the specification lays it out: ``QueueRegionSplit``."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.memory = ffi.new("uint64_t[]", (HEADER + num * DESC) // 8)
        self.bytes = memoryview(ffi.buffer(self.memory))

    def marked(self) -> list[int]:
        """Heads in flight, in the order of their counters."""
        found = []
        for head in range(self.num):
            inflight, _, _, counter = struct.unpack_from("<B5sHQ", self.bytes, HEADER + head * DESC)
            if inflight:
                found.append((counter, head))
        assert len({counter for counter, _ in found}) == len(found)
        return [head for _, head in sorted(found)]

    def mark(self, head: int, on: bool) -> None:
        self.bytes[HEADER + head * DESC] = on

    @property
    def used_idx(self) -> int:
        return int(struct.unpack_from("<H", self.bytes, 14)[0])

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        struct.pack_into("<H", self.bytes, 14, value)

    @property
    def version(self) -> int:
        return int(struct.unpack_from("<H", self.bytes, 8)[0])


class Server:
    """One life of a server, over a driver's memory and a log. ``die`` ends it like SIGKILL: without another store."""

    def __init__(self, driver: FakeDriver, log: Log, *, last_avail: int = 0) -> None:
        self.rules = ffi.new("struct vblk_rules *", {"capacity": SIZE, "block_size": 512, "max_ranges": 1})
        self.table = ffi.new("struct iova_table *", {"regions": 1, "count": 1, "generation": 1})
        self.table.regions[0] = {
            "start": driver.base, "last": driver.base + len(driver.memory) - 1, "host": driver.host, "access": READ | WRITE,
        }  # fmt: skip
        config = ffi.new(
            "struct vb_queue_config *",
            {
                "num": driver.num, "desc_iova": driver.desc, "avail_iova": driver.avail, "used_iova": driver.used,
                "last_avail": last_avail, "event_idx": driver.event_idx, "indirect": driver.indirect, "seg_max": 64,
                "kick_fd": -1, "notify_fd": driver.call_fd, "event_fd": -1, "inflight": log.memory,
            },
        )  # fmt: skip
        error = ffi.new("int *")
        self._queue: Any = lib.vb_queue_new(config, self.rules, self.table, error)
        assert self._queue, error[0]
        self._items = ffi.new("struct vb_item[]", driver.num)

    def poll(self, room: int) -> list[int]:
        """Heads of the requests popped."""
        count = lib.vb_queue_poll(self._queue, self._items, room)
        return [self._items[i].head for i in range(count)]

    def complete(self, *heads: int) -> None:
        done = ffi.new("struct vb_done[]", [{"head": head, "status": 0} for head in heads])
        assert lib.vb_queue_complete(self._queue, done, len(heads)) == 0

    def last_avail(self) -> int:
        view = ffi.new("struct vb_view *")
        lib.vb_queue_view(self._queue, view)
        return int(view.last_avail)

    def replaying(self) -> bool:
        return bool(lib.vb_queue_replaying(self._queue))

    def die(self) -> None:
        lib.vb_queue_free(self._queue)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    made = FakeDriver(16, memory=1 << 20)
    yield made
    made.close()


def offer(driver: FakeDriver, count: int) -> list[int]:
    return [driver.request(IN, 8 * i, into=512).head for i in range(count)]


def test_a_fresh_log_is_made_valid(driver: FakeDriver) -> None:
    """Version 1, nothing in flight, the used ring's index; whatever stood behind a version of 0 counts for nothing."""
    log = Log(driver.num)
    log.mark(3, True)
    server = Server(driver, log)
    assert (log.version, log.marked(), log.used_idx) == (1, [], 0)
    server.die()


def test_a_fresh_log_does_not_say_where_to_begin(driver: FakeDriver) -> None:
    """A queue that ran elsewhere, and whose log stayed there, begins at the index it is told."""
    heads = offer(driver, 4)
    driver.put_u16(driver.used + 2, 2)
    log = Log(driver.num)
    server = Server(driver, log, last_avail=2)
    assert server.poll(16) == heads[2:]
    assert log.marked() == heads[2:]
    server.die()


def test_marks_follow_the_requests(driver: FakeDriver) -> None:
    """Popped: marked, in order. Answered and published: not marked, and the log knows the used index."""
    log = Log(driver.num)
    server = Server(driver, log)
    heads = offer(driver, 6)
    assert server.poll(4) == heads[:4]
    assert log.marked() == heads[:4]
    server.complete(heads[2], heads[0])
    assert log.marked() == [heads[1], heads[3]]
    assert log.used_idx == 2
    assert server.poll(4) == heads[4:]
    assert log.marked() == [heads[1], heads[3], *heads[4:]]
    server.complete(*log.marked())
    assert log.marked() == []
    assert [head for head, _ in driver.poll_used()] == [heads[2], heads[0], heads[1], heads[3], *heads[4:]]
    server.die()


def test_a_successor_goes_on_where_the_dead_one_stood(driver: FakeDriver) -> None:
    """First what was in flight, in the order of popping, then what nobody has popped; whatever index it is told."""
    log = Log(driver.num)
    first = Server(driver, log)
    heads = offer(driver, 8)
    first.poll(5)
    first.complete(heads[3], heads[1])
    first.die()
    second = Server(driver, log, last_avail=12345)
    assert second.replaying()
    assert second.poll(2) == [heads[0], heads[2]]
    assert second.replaying()
    assert second.poll(16) == [heads[4], *heads[5:]]
    assert not second.replaying()
    second.complete(*log.marked())
    assert second.last_avail() == 8
    assert sorted(head for head, _ in driver.poll_used()) == sorted(heads)
    second.die()


def test_a_death_during_the_second_life_keeps_the_order(driver: FakeDriver) -> None:
    """What is replayed keeps its place: a third server finds the same order."""
    log = Log(driver.num)
    first = Server(driver, log)
    heads = offer(driver, 5)
    first.poll(4)
    first.die()
    second = Server(driver, log)
    assert second.poll(2) == heads[:2]
    second.complete(heads[1])
    second.die()
    third = Server(driver, log)
    assert third.poll(16) == [heads[0], heads[2], heads[3], heads[4]]
    third.die()


@pytest.mark.parametrize("cleared", [0, 1, 2, 3])
def test_a_death_between_publishing_and_unmarking(driver: FakeDriver, cleared: int) -> None:
    """used.idx has moved, some of the batch's marks are still there: those heads were answered and are not done again."""
    log = Log(driver.num)
    first = Server(driver, log)
    heads = offer(driver, 6)
    first.poll(6)
    first.complete(heads[5])
    batch = [heads[4], heads[0], heads[2]]
    first.complete(*batch)
    first.die()
    for head in batch[: 3 - cleared]:  # undone: the last in the list is cleared first
        log.mark(head, True)
    log.used_idx = 1
    driver.poll_used()
    second = Server(driver, log)
    assert second.poll(16) == [heads[1], heads[3]]
    assert log.used_idx == 4
    second.die()


def test_a_death_between_answering_and_publishing(driver: FakeDriver) -> None:
    """Linked into the batch's list, used.idx not moved: the driver has seen nothing, so it is done again."""
    log = Log(driver.num)
    first = Server(driver, log)
    heads = offer(driver, 3)
    first.poll(3)
    first.complete(heads[0])
    first.die()
    struct.pack_into("<H", log.bytes, HEADER + heads[2] * DESC + 6, heads[0])  # desc.next
    struct.pack_into("<H", log.bytes, 12, heads[2])  # last_batch_head
    second = Server(driver, log)
    assert second.poll(16) == [heads[1], heads[2]]
    second.die()


def test_any_life_and_any_death(driver: FakeDriver) -> None:
    """Hundreds of servers, each dying at a random step: every request is answered once, and none is lost."""
    chance = random.Random(5)
    log = Log(driver.num)
    pending: set[int] = set()
    requests: dict[int, Request] = {}
    answered = offered = replayed = 0
    for _ in range(400):
        server = Server(driver, log, last_avail=chance.randrange(65536))
        replayed += len(log.marked())
        inflight = set()
        for _ in range(chance.randrange(1, 12)):
            match chance.randrange(3):
                case 0:
                    while driver.free > 3 and chance.random() < 0.7:
                        request = driver.request(OUT, 8, out=bytes(512), indirect=False)
                        requests[request.head] = request
                        pending.add(request.head)
                        offered += 1
                case 1:
                    popped = server.poll(chance.randrange(1, 8))
                    assert not inflight & set(popped)
                    assert set(popped) <= pending
                    inflight |= set(popped)
                case 2:
                    done = chance.sample(sorted(inflight), chance.randrange(len(inflight) + 1))
                    if done:
                        server.complete(*done)
                        inflight -= set(done)
                        for head, _ in driver.poll_used():
                            assert head in done
                            pending.remove(head)
                            driver._requests.pop(head)
                            answered += 1
        server.die()
        if not pending:
            driver.reset_heap()
    server = Server(driver, log)
    while heads := server.poll(16):
        server.complete(*heads)
    for head, _ in driver.poll_used():
        pending.remove(head)
        answered += 1
    assert (pending, answered) == (set(), offered)
    assert offered > 500
    assert replayed > 200
    server.die()


def test_a_log_of_nonsense_harms_nobody(driver: FakeDriver) -> None:
    """The log is shared with the front-end. Random bytes in it, also while a server runs: its own driver may be hurt, the
    server is not; whatever it pops is within the ring."""
    chance = random.Random(6)
    for _ in range(300):
        log = Log(driver.num)
        log.bytes[:] = chance.randbytes(len(log.bytes))
        if chance.random() < 0.9:
            struct.pack_into("<H", log.bytes, 8, 1)
        server = Server(driver, log)
        for _ in range(5):
            heads = server.poll(16)
            assert all(head < driver.num for head in heads)
            if chance.random() < 0.5:
                log.bytes[:] = chance.randbytes(len(log.bytes))
            if heads:
                server.complete(*heads)
        server.die()
