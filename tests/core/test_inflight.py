"""A server killed at any moment leaves a log from which its successor answers every request exactly once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vduse_blk.block.contract import BlockInfo, Support
from vduse_blk.core._core import ffi, lib
from vduse_blk.queue import DiskRules, InflightLog, IovaMap, QueueSetup
from vduse_blk.testing.driver import IN, OK, FakeDriver

MIB = 1 << 20
INFO = BlockInfo(size=MIB, discard=Support.NATIVE, write_zeroes=Support.NATIVE)
HEADER, ENTRY = 16, 16  # bytes of the log's head and of an entry: flag, padding, next (u16 at 6), counter (u64 at 8)


class Server:
    """A queue without a thread, so that a test can stop it between any two steps."""

    def __init__(self, driver: FakeDriver, iova: IovaMap, setup: QueueSetup) -> None:
        self.rules = DiskRules(INFO, max_discard=MIB, max_write_zeroes=MIB, max_ranges=1)
        self.config = ffi.new("struct vb_queue_config *")
        for key in ("index", "num", "kick_fd", "notify_fd", "event_fd", "event_idx", "indirect", "seg_max"):
            setattr(self.config, key, getattr(setup, key))
        self.config.desc_iova, self.config.avail_iova, self.config.used_iova = setup.desc, setup.avail, setup.used
        self.config.notify_kind = lib.VB_NOTIFY_EVENTFD
        self.config.last_avail = lib.VB_RESUME if setup.last_avail is None else setup.last_avail
        self.config.inflight = ffi.cast("void *", setup.inflight)
        error = ffi.new("int *")
        self.queue = lib.vb_queue_new(self.config, self.rules.c, iova.table, error)
        assert self.queue
        self.items = ffi.new("struct vb_item[]", 64)

    def pop(self, room: int) -> list[int]:
        """Heads popped, in order."""
        return [self.items[i].head for i in range(lib.vb_queue_poll(self.queue, self.items, room))]

    def answer(self, heads: list[int]) -> None:
        done: Any = ffi.new("struct vb_done[]", len(heads))
        for slot, head in zip(done, heads, strict=True):
            slot.head, slot.status = head, 0
        assert lib.vb_queue_complete(self.queue, done, len(heads)) == 0

    def view(self) -> Any:
        view = ffi.new("struct vb_view *")
        lib.vb_queue_view(self.queue, view)
        return view

    def die(self) -> None:
        """Forgets everything it had in flight."""
        lib.vb_queue_free(self.queue)


def uncleared(log: Any, heads: list[int], used_before: int) -> None:
    """Turn a log back to the moment when ``used.idx`` had moved and no flag was cleared yet."""
    for head in heads:
        log[HEADER + ENTRY * head] = b"\x01"
    log[14:16] = (used_before & 0xFFFF).to_bytes(2, "little")


@given(st.randoms(use_true_random=True), st.integers(1, 6), st.sampled_from([0, 3, 65530]))
def test_every_request_is_answered_exactly_once(random: random.Random, lives: int, begin: int) -> None:
    """Popped in order, answered in any order, killed at any step, several times, across the wrap of the indices."""
    driver, iova = FakeDriver(num=16, memory=MIB), IovaMap()
    memory = ffi.new("char[]", lib.inflight_size(16) + 64)
    address = (int(ffi.cast("uintptr_t", memory)) + 63) // 64 * 64
    log = ffi.buffer(ffi.cast("char *", address), lib.inflight_size(16))
    try:
        driver.map(iova)
        for at in (driver.avail + 2, driver.used + 2):
            driver.put_u16(at, begin)
        driver._avail_idx = driver._used_seen = begin
        server = Server(driver, iova, driver.setup(last_avail=begin, inflight=address))
        waiting: dict[int, Any] = {}
        offered = answered = 0
        open_heads: list[int] = []  # popped by anybody and not answered, oldest first
        mine: list[int] = []  # of those, popped by the present server
        for _ in range(lives * 10):
            while driver.free and random.random() < 0.5:
                if not waiting:
                    driver.reset_heap()
                request = driver.request(IN, into=512)
                waiting[request.head] = request
                offered += 1
            again = [head for head in open_heads if head not in mine]
            popped = server.pop(random.choice([1, 2, 64]))
            assert popped[: len(again)] == again[: len(popped)], "what a dead server had popped comes first, oldest first"
            open_heads += popped[len(again) :]
            mine += popped
            now: list[int] = []
            if mine and random.random() < 0.6:
                now = random.sample(mine, random.randrange(1, len(mine) + 1))
                mine = [head for head in mine if head not in now]
                open_heads = [head for head in open_heads if head not in now]
                used_before = int.from_bytes(log[14:16], "little")
                server.answer(now)
            for head, _used in driver.poll_used():  # fails for a head that is not in flight
                del waiting[head], driver._requests[head]
                answered += 1
            if random.random() < 0.3:
                if now and random.random() < 0.5:
                    uncleared(log, now, used_before)
                server.die()
                mine = []
                server = Server(driver, iova, driver.setup(last_avail=None, inflight=address))
                assert server.view().replayed == len(open_heads)
                assert sorted(marked(log)) == sorted(open_heads)
        server.answer(mine)
        while heads := server.pop(64):
            server.answer(heads)
        for head, _used in driver.poll_used():
            del waiting[head], driver._requests[head]
            answered += 1
        assert not waiting
        assert answered == offered
        assert marked(log) == []
        server.die()
    finally:
        iova.close()
        driver.close()


def marked(log: Any) -> list[int]:
    return [head for head in range(16) if log[HEADER + ENTRY * head] != b"\0"]


@given(st.binary(min_size=16 + 16 * 16, max_size=16 + 16 * 16), st.booleans())
def test_a_hostile_log_harms_nobody(content: bytes, valid_header: bool) -> None:
    """Whatever it holds, nothing outside of the ring is touched, and the queue ends served or broken."""
    driver, iova = FakeDriver(num=16, memory=MIB), IovaMap()
    memory = ffi.new("char[]", len(content) + 64)
    address = (int(ffi.cast("uintptr_t", memory)) + 63) // 64 * 64
    log = ffi.buffer(ffi.cast("char *", address), len(content))
    log[:] = content
    if valid_header:
        log[8:12] = (1).to_bytes(2, "little") + (16).to_bytes(2, "little")
    try:
        driver.map(iova)
        for _ in range(3):
            driver.request(IN, into=512)
        server = Server(driver, iova, driver.setup(last_avail=None, inflight=address))
        while heads := server.pop(64):
            server.answer(heads)
        server.die()
    finally:
        iova.close()
        driver.close()


def test_the_file_is_checked(tmp_path: Path) -> None:
    """What create made, open takes; what is damaged, foreign or open to others is refused with a sentence."""
    path = tmp_path / "inflight"
    log = InflightLog.create(path, 2, 64)
    assert log.address(0, 64) % 64 == 0
    assert log.address(1, 64) - log.address(0, 64) >= lib.inflight_size(64)
    assert log.address(2, 64) == log.address(0, 128) == 0
    log.close()
    InflightLog.open(path).close()
    good = path.read_bytes()
    for damaged in (b"", good[:20], good[:-1], good + b"\0", b"x" + good[1:], good[:12] + b"\xff" + good[13:]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="inflight"):
            InflightLog.open(path)
    path.write_bytes(good)
    path.chmod(0o644)
    with pytest.raises(OSError, match="private"):
        InflightLog.open(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        InflightLog.open(link)


def test_a_killed_servers_disk_goes_on(tmp_path: Path) -> None:
    """With real queues: what was answered is not answered again, what was not, is; and the log ends empty."""
    driver, iova = FakeDriver(num=64, memory=MIB), IovaMap()
    log = InflightLog.create(tmp_path / "inflight", 1, 64)
    try:
        driver.map(iova)
        first = Server(driver, iova, driver.setup(inflight=log.address(0, 64)))
        requests = [driver.request(IN, into=512) for _ in range(5)]
        heads = first.pop(64)
        first.answer([heads[3], heads[1]])
        first.die()
        second = Server(driver, iova, driver.setup(last_avail=None, inflight=log.address(0, 64)))
        assert second.pop(64) == [heads[0], heads[2], heads[4]]
        second.answer([heads[4], heads[0], heads[2]])
        driver.run(*requests)
        assert [request.status for request in requests] == [OK] * 5
        second.die()
    finally:
        iova.close()
        log.close()
        driver.close()
