"""The C core does what model.py says, under drivers that are sane, sloppy or hostile.

Each example is a disk (rules, regions, ring) and a story: the driver writes requests, the device polls and completes,
control changes tables and size. After each step everything the C side shows is compared with the model, and all of memory
byte for byte: ring, status bytes, zero fill, and the guard bytes around the regions.

``CORE_EXAMPLES=n`` runs n times as many examples, with fresh randomness each time.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from typing import Any

import model
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import READ, WRITE, Fault, Op, Region, Table

from vduse_blk.core._core import ffi, lib

_FACTOR = int(os.environ.get("CORE_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """The same examples each time, or more and different ones where asked for."""
    return settings(
        max_examples=count * max(1, _FACTOR),
        derandomize=not _FACTOR,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ------------------------------------------------------------------------------------------------------ translation


def c_table(table: Table, base: int) -> Any:
    """``struct iova_table`` of a model's table; ``base`` is the address of byte 0 of its memory."""
    c = ffi.new("struct iova_table *", {"regions": len(table.regions)})
    c.count, c.generation, c.drain = len(table.regions), table.generation, table.drain
    for slot, region in zip(c.regions, table.regions, strict=True):
        slot.start, slot.last, slot.host, slot.access = region.start, region.last, base + region.host, region.access
    return c


def linear_translate(table: Table, iova: int, length: int, access: int, room: int) -> Any:
    """The same question answered byte by byte."""
    pieces: list[list[int]] = []
    for at in range(iova, iova + length):
        region = next((r for r in table.regions if r.start <= at <= r.last), None)
        if region is None or at >= 2**64 or iova + length > 2**64:
            return "unmapped"
        if region.access & access != access:
            return "denied"
        host = region.host + at - region.start
        if pieces and pieces[-1][0] + pieces[-1][1] == host:
            pieces[-1][1] += 1
        elif len(pieces) == room:
            return "fragmented"
        else:
            pieces.append([host, 1])
    return [tuple(piece) for piece in pieces]


def c_translate(table: Any, base: int, iova: int, length: int, access: int, room: int) -> Any:
    out = ffi.new("struct vb_iov[]", max(1, room))
    count = lib.iova_translate(table, iova, length, access, out, room)
    if count < 0:
        return {-14: "unmapped", -13: "denied", -105: "fragmented"}[count]
    return [(int(ffi.cast("uintptr_t", out[i].base)) - base, out[i].length) for i in range(count)]


_TOP = 2**64


@st.composite
def region_tables(draw: st.DrawFn) -> Table:
    """Up to eight small regions anywhere in 64 bits, often touching each other, in IOVA and in memory."""
    at = draw(st.sampled_from([0, 1, 4096, _TOP - 200, _TOP - 64]))
    host = 4096
    regions = []
    for _ in range(draw(st.integers(0, 8))):
        at += draw(st.sampled_from([0, 0, 1, 7]))
        length = draw(st.integers(1, 20))
        if at + length > _TOP:
            break
        host += draw(st.sampled_from([0, 0, 5, 64]))
        regions.append(Region(at, at + length - 1, host, draw(st.sampled_from([READ, WRITE, 3, 3, 3]))))
        at += length
        host += length
    return Table(tuple(regions), 1)


@examples(400)
@given(region_tables(), st.data())
def test_translate_is_linear(table: Table, data: st.DataObject) -> None:
    """iova_translate says for each range what looking at every byte of it says."""
    base = 1 << 32
    start = min((r.start for r in table.regions), default=0)
    iova = max(0, min(_TOP - 1, start + data.draw(st.integers(-3, 180))))
    length = data.draw(st.one_of(st.integers(0, 100), st.sampled_from([_TOP - 1 - iova, _TOP - 1])))
    access = data.draw(st.sampled_from([READ, WRITE, 3]))
    room = data.draw(st.integers(0, 9))
    expected = linear_translate(table, iova, min(length, 300), access, room) if iova + length <= _TOP else "unmapped"
    assert c_translate(c_table(table, base), base, iova, length, access, room) == expected
    try:
        pieces = [(p.host, p.length) for p in model.translate(table, iova, length, access, room)]
    except model.UnmappedError:
        assert expected == "unmapped"
    except model.DeniedError:
        assert expected == "denied"
    except model.FragmentedError:
        assert expected == "fragmented"
    else:
        assert expected == pieces


@examples(300)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 1, 2**64 - 20])), max_size=6))
def test_table_check_is_the_invariant(rows: list[tuple[int, int, int]]) -> None:
    """iova_table_check accepts a table if and only if it is sorted, disjoint, not empty anywhere and does not wrap."""
    c = ffi.new("struct iova_table *", {"regions": len(rows)})
    c.count = len(rows)
    for slot, (start, last, host) in zip(c.regions, rows, strict=True):
        slot.start, slot.last, slot.host, slot.access = start, last, host, 3
    good = all(start <= last and host != 0 and host + last - start + 1 < 2**64 for start, last, host in rows)
    good = good and all(rows[i][1] < rows[i + 1][0] for i in range(len(rows) - 1))
    assert (lib.iova_table_check(c) == 0) is good


def test_table_check_refuses_all_of_the_address_space() -> None:
    """A region of 2^64 bytes, whose length is no 64-bit number, is refused whatever its host address."""
    for host in (0, 1, 4096):
        table = Table((Region(0, _TOP - 1, host),), 1)
        assert lib.iova_table_check(c_table(table, 0)) != 0


# ------------------------------------------------------------------------------------------------------------ queue

_MEMORY = 56 << 10
_FAR = 48 << 10
_RING = 4096  # host address of the ring's memory: aligned like a page
_DATA = 12 << 10
_GUARD = 0xEE
_STALE = 0x5A
_FAULTS = {fault: getattr(lib, f"VRING_FAULT_{fault.name}") for fault in Fault}


class World:
    """One memory twice: ``arena`` belongs to the C core, ``memory`` to the model. The driver writes to both."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, _MEMORY)
        self.arena = memoryview(self.map)
        self.view = ffi.from_buffer(self.map)
        self.base = int(ffi.cast("uintptr_t", self.view))
        self.memory = bytearray()
        self.notify_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def reset(self, regions: tuple[Region, ...]) -> None:
        self.memory = bytearray([_GUARD]) * _MEMORY
        for region in regions:
            length = region.last - region.start + 1
            self.memory[region.host : region.host + length] = bytes([_STALE]) * length
        self.arena[:] = self.memory
        for fd in (self.notify_fd, self.event_fd):
            self.take(fd)

    @staticmethod
    def take(fd: int) -> int:
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def put(self, host: int, data: bytes) -> None:
        self.memory[host : host + len(data)] = data
        self.arena[host : host + len(data)] = data

    def differences(self) -> list[int]:
        if self.arena == self.memory:
            return []
        return [i for i in range(_MEMORY) if self.arena[i] != self.memory[i]]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


class Rig:
    """A queue in C and its model, side by side."""

    def __init__(self, world: World, config: model.Config, rules: model.Rules, table: Table) -> None:
        self.world = world
        self.model = model.Queue(world.memory, config, rules, table)
        self.rules = ffi.new("struct vblk_rules *")
        c = self.rules
        c.capacity, c.block_size, c.read_only = rules.capacity, rules.block_size, rules.read_only
        c.discard, c.write_zeroes, c.max_ranges = rules.discard, rules.write_zeroes, rules.max_ranges
        c.max_discard_sectors, c.max_write_zeroes_sectors = rules.max_discard_sectors, rules.max_write_zeroes_sectors
        ffi.memmove(c.serial, rules.serial, len(rules.serial))
        self.tables = [c_table(table, world.base)]
        made = ffi.new("struct vb_queue_config *")
        made.num, made.desc_iova, made.avail_iova, made.used_iova = config.num, config.desc, config.avail, config.used
        made.last_avail = lib.VB_RESUME if config.last_avail is None else config.last_avail
        made.event_idx, made.indirect, made.seg_max = config.event_idx, config.indirect, config.seg_max
        made.kick_fd, made.notify_fd, made.event_fd = -1, world.notify_fd, world.event_fd
        error = ffi.new("int *")
        self.queue = lib.vb_queue_new(made, self.rules, self.tables[0], error)
        assert self.queue, error[0]
        self.items = ffi.new("struct vb_item[]", 64)
        self.inflight: list[int] = []

    def close(self) -> None:
        lib.vb_queue_free(self.queue)

    def set_table(self, table: Table) -> None:
        self.tables.append(c_table(table, self.world.base))
        lib.vb_queue_set_table(self.queue, self.tables[-1])
        self.model.set_table(table)

    def answer_miss(self) -> None:
        lib.vb_queue_answer_miss(self.queue)
        self.model.answer_miss()

    def set_capacity(self, size: int) -> None:
        lib.vblk_set_capacity(self.rules, size)
        self.model.rules.capacity = size

    def poll(self, room: int) -> list[model.Request]:
        was_broken = self.model.fault is not None
        expected = self.model.poll(room)
        count = lib.vb_queue_poll(self.queue, self.items, room)
        found = [self._item(self.items[i]) for i in range(count)]
        assert found == [self._request(request) for request in expected]
        assert not (was_broken and found), "popped after the ring was broken"
        self.inflight += [request.head for request in expected]
        self.compare()
        return expected

    def complete(self, answers: list[tuple[int, int]]) -> None:
        done = ffi.new("struct vb_done[]", [{"head": head, "status": status} for head, status in answers])
        known = self.model.complete(answers)
        assert lib.vb_queue_complete(self.queue, done, len(answers)) == (0 if known else -22)
        for head, _status in answers:
            if head in self.inflight:
                self.inflight.remove(head)
        self.compare()

    def _item(self, item: Any) -> tuple[Any, ...]:
        base = self.world.base
        pieces = [(int(ffi.cast("uintptr_t", item.iov[i].base)) - base, item.iov[i].length) for i in range(item.iov_count)]
        ranges = [(r.offset, r.length, bool(r.unmap)) for r in item.ranges[0 : item.range_count]]
        return item.head, item.op, item.offset, item.length, pieces, ranges

    @staticmethod
    def _request(request: model.Request) -> tuple[Any, ...]:
        pieces = [(p.host, p.length) for p in request.pieces]
        ranges = [(r.offset, r.length, r.unmap) for r in request.ranges]
        return request.head, request.op.value, request.offset, request.length, pieces, ranges

    def compare(self) -> None:
        assert self.world.differences() == []
        view = ffi.new("struct vb_view *")
        lib.vb_queue_view(self.queue, view)
        expected = self.model
        broken = expected.fault is not None
        assert view.fault == (_FAULTS[expected.fault] if expected.fault else 0)
        assert (view.state == lib.VB_BROKEN) is broken
        assert ((view.miss_start, view.miss_last) if view.missing else None) == (
            None if expected.answered else expected.missing
        )
        assert view.table_generation == expected.table.generation
        counters = lib.vb_queue_counters(self.queue)
        for op in Op:
            found = (counters.ops[op.value], counters.bytes[op.value], counters.errors[op.value])
            assert found == (expected.ops[op], expected.bytes[op], expected.errors[op]), op
        for name in ("unsupported", "malformed", "wakeups", "publishes", "notifies", "misses"):
            assert getattr(counters, name) == getattr(expected, name), name
        assert counters.inflight == len(expected.inflight)
        assert counters.notifies <= counters.publishes <= sum(expected.ops.values())


# ------------------------------------------------------------------------------------------------------------ driver

_KINDS = [model.IN, model.IN, model.OUT, model.OUT, model.FLUSH, model.GET_ID, model.DISCARD, model.WRITE_ZEROES]
_HOSTILE_ADDRESSES = [0, 1, 0xFFF, 2**63, _TOP - 1, _TOP - 16, _TOP - 512, 0x7FFF_FFFF_F000]


class Driver:
    """Writes requests into a world: mostly right, sometimes not, by ``random``."""

    def __init__(self, random: random.Random, world: World) -> None:
        self.random = random
        self.world = world
        self.num = 2 ** random.randrange(1, 6)
        self.event_idx, self.indirect = random.random() < 0.5, random.random() < 0.75
        self.nasty = random.choice([0.0, 0.0, 0.02, 0.1, 0.4])
        start = random.choice([0, 0, 1, 0xFFFD, 0xFFFF, random.randrange(0x10000)])
        self.avail_idx = start
        self.used_seen = start if self.chance(0.9) else random.randrange(0x10000)
        self.chains: dict[int, list[int]] = {}
        self.free = list(range(self.num))
        random.shuffle(self.free)
        self.desc, self.avail, self.used = self._place_ring()
        self.absent: list[Region] = []
        regions = [*self.ring_regions, *self._place_data()]
        if self.chance(0.3) and len(regions) > 1:
            # A region that control will find only when asked for.
            self.absent.append(regions.pop(random.randrange(len(self.ring_regions), len(regions))))
        self.regions = tuple(sorted(regions, key=lambda r: r.start))
        self.generation = random.randrange(1, 5)
        world.reset((*self.regions, *self.absent))
        world.put(self.avail_host + 2, struct.pack("<H", self.avail_idx))
        world.put(self.avail_host, struct.pack("<H", random.choice([0, 0, 1])))
        world.put(self.used_host, struct.pack("<HH", 0, self.used_seen))
        if self.event_idx:
            self.set_used_event(self.used_seen)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # ---- places ----

    def _place_ring(self) -> tuple[int, int, int]:
        """One region or three; read-only where that is enough."""
        num, random = self.num, self.random
        self.desc_host = _RING
        self.avail_host = _RING + 16 * num
        self.used_host = (self.avail_host + 6 + 2 * num + 3) // 4 * 4
        end = self.used_host + 6 + 8 * num
        iova = 0x10000
        if self.chance(0.6):
            self.ring_regions = [Region(iova, iova + end - _RING - 1, _RING)]
            if self.chance(0.1):
                # In two regions that touch in memory: still one piece.
                cut = random.randrange(1, end - _RING - 1)
                [whole] = self.ring_regions
                self.ring_regions = [Region(iova, iova + cut - 1, _RING), Region(iova + cut, whole.last, _RING + cut)]
            shift = 1 if self.chance(self.nasty / 10) else 0
            return iova + shift, iova + self.avail_host - _RING, iova + self.used_host - _RING
        self.ring_regions = [
            Region(iova, iova + 16 * num - 1, self.desc_host, READ),
            Region(iova + 0x1000, iova + 0x1000 + 5 + 2 * num, self.avail_host, READ),
            Region(iova + 0x2000, iova + 0x2000 + 5 + 8 * num, self.used_host, READ if self.chance(0.02) else READ | WRITE),
        ]
        return iova, iova + 0x1000, iova + 0x2000

    def _place_data(self) -> list[Region]:
        """Regions of any length behind each other, with or without gaps in either space."""
        random = self.random
        count = random.randrange(1, 6)
        iova, host = random.choice([0x100000, 0x100000, 0x1000, _TOP - 0x8000]), _DATA
        placed = []
        for _ in range(count):
            length = min(random.choice([1, 100, 512, 1024, 4096, 4096, 4096, 6000]), _TOP - iova)
            access = random.choice([READ, WRITE] + [READ | WRITE] * 6)
            placed.append(Region(iova, iova + length - 1, host, access))
            iova += length + random.choice([0, 0, 16, 4096])
            host += length + random.choice([0, 0, 0, 16, 64])
            if iova >= _TOP:
                break
        if len(placed) > 1 and self.chance(0.2):
            # Neighbours in IOVA far from each other in memory.
            moved = placed[1]
            placed[1] = Region(moved.start, moved.last, _FAR, moved.access)
        assert host <= _FAR
        return placed

    def table(self, *, drain: bool = False) -> Table:
        self.generation += 1
        return Table(self.regions, self.generation, drain)

    def address(self, length: int, access: int) -> int:
        """Where ``length`` bytes are mapped for ``access``, or nearly."""
        random = self.random
        if self.chance(self.nasty / 4):
            return random.choice(_HOSTILE_ADDRESSES)
        regions = [r for r in (*self.regions, *self.absent) if r not in self.ring_regions] or [self.regions[0]]
        good = [r for r in regions if r.last - r.start + 1 >= length and r.access & access]
        if good and not self.chance(self.nasty):
            region = random.choice(good)
            room = region.last - region.start + 1 - length
            return region.start + random.choice([0, room, random.randrange(room + 1)])
        region = random.choice(regions)
        return region.start + random.randrange(region.last - region.start + 1)

    def scatter(self, buffers: list[list[int]], stream: bytes) -> None:
        """Write ``stream`` where the buffers are; what is nowhere is lost."""
        for iova, length in buffers:
            part, stream = stream[:length], stream[length:]
            for region in (*self.regions, *self.absent):
                first, end = max(iova, region.start), min(iova + len(part), region.last + 1)
                if first < end:
                    self.world.put(region.host + first - region.start, part[first - iova : end - iova])

    # ---- requests ----

    def request(self, rules: model.Rules) -> tuple[bytes, int]:
        """What the device reads, and how many bytes it may write (status included)."""
        random = self.random
        kind = random.choice(_KINDS)
        if self.chance(self.nasty):
            kind = random.choice([2, 6, 14, 16, 0x80000000, random.randrange(2**32)])
        sectors, per_block = rules.capacity // 512, rules.block_size // 512
        blocks = random.choice([1, 1, 1, 2, 3, 8])
        sector = random.randrange(0, max(1, sectors)) // per_block * per_block
        if self.chance(self.nasty):
            sector = random.choice([sectors - 1, sectors, sectors + 1, 2**55, 2**64 - 1, 2**64 - 8, sector + 1])
        size = blocks * rules.block_size
        if self.chance(self.nasty):
            size = max(0, size + random.choice([-1, 1, 7, -512, 512, -size]))
        out, into = b"", 0
        if kind == model.IN:
            into = size
        elif kind == model.OUT:
            out = random.randbytes(8) * (size // 8) + b"x" * (size % 8)
        elif kind == model.GET_ID:
            into = random.choice([20, 20, 20, 0, 1, 19, 21, 64])
        elif kind in (model.DISCARD, model.WRITE_ZEROES):
            out = b"".join(self.range(rules, sectors) for _ in range(random.choice([1, 1, 1, 2, rules.max_ranges])))
            if self.chance(self.nasty):
                out = out[: random.randrange(len(out) + 1)] or out * (rules.max_ranges + 1)
        if self.chance(self.nasty):
            out += bytes(random.choice([1, 16, 512]))
        if self.chance(self.nasty):
            into += random.choice([1, 16, 512])
        header = struct.pack("<IIQ", kind, random.choice([0, 5]), sector % 2**64) + out
        if self.chance(self.nasty / 2):
            header = header[: random.randrange(17)]
        return header, 0 if self.chance(self.nasty / 4) else into + 1

    def range(self, rules: model.Rules, sectors: int) -> bytes:
        random = self.random
        start, count = random.randrange(max(1, sectors)), random.choice([0, 1, 8, 16, 24])
        if not self.chance(self.nasty + 0.2):
            start, count = start // 8 * 8, count // 8 * 8
        flags = random.choice([0, 0, 0, 1])
        if self.chance(self.nasty):
            flags = random.choice([2, 3, 2**31])
        if self.chance(self.nasty):
            too_many = rules.max_discard_sectors + 1
            start, count = random.choice([(sectors, 1), (2**64 - 1, 2), (0, 2**32 - 1), (2**55, 8), (0, too_many)])
        return struct.pack("<QII", start, count, flags)

    def cut(self, total: int, access: int) -> list[list[int]]:
        """``total`` bytes as buffers [iova, length], often few, sometimes many, sometimes empty ones between."""
        random = self.random
        buffers = []
        most = random.choice([1, 1, 2, 3, 8])
        while total > 0:
            length = min(total, 4096)
            if len(buffers) + 1 < most:
                length = random.choice([length, min(512, total), min(16, total), random.randrange(1, total + 1)])
            buffers.append([self.address(length, access), length])
            total -= length
            if self.chance(self.nasty / 4):
                buffers.append([self.address(0, access), 0])
        return buffers

    def offer(self, rules: model.Rules) -> bool:
        """One more request, if there are descriptors for it."""
        random = self.random
        readable, into = self.request(rules)
        out_buffers = self.cut(len(readable), READ)
        self.scatter(out_buffers, readable)
        rows = [[iova, length, 0] for iova, length in out_buffers]
        rows += [[iova, length, model.WRITABLE] for iova, length in self.cut(into, WRITE)]
        if not rows or not self.free:
            return False
        if self.chance(self.nasty / 4):
            random.shuffle(rows)
        if self.chance(self.nasty / 4):
            rows[random.randrange(len(rows))][1] = random.choice([0, 2**32 - 1, 2**31, 0x7FFFF000])
        if self.indirect and len(rows) > 1 and self.chance(0.6):
            direct = random.randrange(0, min(3, len(rows), len(self.free))) if self.chance(0.2) else 0
            slots = self._indirect(rows, direct)
        elif len(rows) <= len(self.free):
            slots = [self.free.pop() for _ in rows]
            for slot, row, following in zip(slots, rows, [*slots[1:], None], strict=True):
                flags = row[2] | (0 if following is None else model.NEXT)
                self.desc_at(_RING + 16 * slot, row[0], row[1], flags, following or 0)
        else:
            return False
        self.chains[slots[0]] = slots
        head = slots[0]
        if self.chance(self.nasty / 10):
            head = random.choice([self.num, 0xFFFF, random.randrange(self.num)])
        self.show(head)
        return True

    def _indirect(self, rows: list[list[int]], direct: int) -> list[int]:
        """The first ``direct`` buffers in the ring, the rest in a table."""
        random = self.random
        slots = [self.free.pop() for _ in range(direct + 1)]
        for i in range(direct):
            self.desc_at(_RING + 16 * slots[i], rows[i][0], rows[i][1], rows[i][2] | model.NEXT, slots[i + 1])
        entries = rows[direct:]
        order = list(range(len(entries)))
        if self.chance(0.2):
            order[1:] = random.sample(order[1:], len(order) - 1)
        length = 16 * len(entries)
        table = self.address(length, READ)
        content = bytearray(length)
        for i, (slot, row) in enumerate(zip(order, entries, strict=True)):
            last = i == len(entries) - 1
            flags, following = row[2] | (0 if last else model.NEXT), 0 if last else order[i + 1]
            row_bytes = self.spoil(row[0], row[1], flags, following)
            content[16 * slot : 16 * slot + 16] = row_bytes
        self.scatter([[table, length]], bytes(content))
        if self.chance(self.nasty / 4):
            length = random.choice([0, length + 16, length - 16, length + 1, 2**32 - 16])
        flags = model.INDIRECT
        flags |= model.WRITABLE if self.chance(0.05) else 0
        flags |= model.NEXT if self.chance(self.nasty / 10) else 0
        self.desc_at(_RING + 16 * slots[direct], table, length, flags, random.randrange(self.num))
        return slots

    def spoil(self, iova: int, length: int, flags: int, following: int) -> bytes:
        if self.chance(self.nasty / 20):
            flags ^= self.random.choice([model.NEXT, model.WRITABLE, model.INDIRECT, 0x8000])
        if self.chance(self.nasty / 20):
            following = self.random.choice([0xFFFF, 0, following + 1, self.num])
        return struct.pack("<QIHH", iova % _TOP, length, flags, following % 0x10000)

    def desc_at(self, host: int, iova: int, length: int, flags: int, following: int) -> None:
        self.world.put(host, self.spoil(iova, length, flags, following))

    def show(self, head: int) -> None:
        self.world.put(self.avail_host + 4 + 2 * (self.avail_idx % self.num), struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        ahead = self.random.choice([self.num, self.num + 1, 0x8000]) if self.chance(self.nasty / 20) else 0
        self.world.put(self.avail_host + 2, struct.pack("<H", (self.avail_idx + ahead) & 0xFFFF))

    def set_used_event(self, value: int) -> None:
        self.world.put(self.avail_host + 4 + 2 * self.num, struct.pack("<H", value & 0xFFFF))

    def collect(self) -> int:
        """Free the descriptors of what is newly in the used ring; how much that is. used.idx must only ever grow."""
        [used_idx] = struct.unpack_from("<H", self.world.memory, self.used_host + 2)
        count = (used_idx - self.used_seen) & 0xFFFF
        assert count <= self.num, "used.idx went back, or ran ahead of what was offered"
        for _ in range(count):
            [head] = struct.unpack_from("<I", self.world.memory, self.used_host + 4 + 8 * (self.used_seen % self.num))
            self.free += self.chains.pop(head, [])
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        if self.event_idx and self.chance(0.7):
            self.set_used_event(self.used_seen + self.random.choice([0, 0, 1, 2, -1, 0x7FFF]))
        elif self.chance(0.2):
            self.world.put(self.avail_host, struct.pack("<H", self.random.choice([0, 1])))
        return count


def make_rules(random: random.Random) -> model.Rules:
    block = random.choice([512, 512, 512, 1024, 4096])
    return model.Rules(
        capacity=random.choice([block, 8 * block, 64 * block, 2**40, 2**62]),
        block_size=block,
        read_only=random.random() < 0.1,
        discard=random.random() < 0.9,
        write_zeroes=random.random() < 0.9,
        max_discard_sectors=random.choice([16, 128]),
        max_write_zeroes_sectors=random.choice([16, 128]),
        max_ranges=random.choice([1, 2, 8, 32]),
        serial=random.choice([b"", b"disk-1", b"x" * 20]),
    )


def tell(random: random.Random, world: World, steps: int) -> model.Queue:
    """One story, compared at each step; returns the model at its end."""
    rules = make_rules(random)
    driver = Driver(random, world)
    resume = driver.used_seen == driver.avail_idx and driver.chance(0.2)
    config = model.Config(
        num=driver.num, desc=driver.desc, avail=driver.avail, used=driver.used, event_idx=driver.event_idx,
        indirect=driver.indirect, seg_max=random.choice([1, 2, 8, 254]), last_avail=None if resume else driver.avail_idx,
    )  # fmt: skip
    rig = Rig(world, config, rules, driver.table())
    try:
        pushed = 0
        for _ in range(steps):
            turn = random.randrange(10)
            if turn < 6:
                for _ in range(random.choice([1, 1, 2, 5])):
                    driver.offer(rules)
            rig.poll(random.choice([1, 2, 8, 64]))
            if rig.inflight and turn < 8:
                heads = random.sample(rig.inflight, random.randrange(1, len(rig.inflight) + 1))
                answers = [(head, random.choice([0, 0, 0, 1, 2])) for head in heads]
                stranger = random.choice([0, driver.num - 1, driver.num, 0xFFFF])
                if stranger not in rig.inflight and driver.chance(0.05):
                    answers.append((stranger, 0))
                rig.complete(answers)
            pushed += driver.collect()
            if rig.model.missing is not None and driver.chance(0.7):
                if driver.absent and driver.chance(0.7):
                    driver.regions = tuple(sorted((*driver.regions, driver.absent.pop()), key=lambda r: r.start))
                rig.set_table(driver.table())
                if driver.chance(0.7):
                    rig.answer_miss()
            elif turn == 8:
                rig.set_table(driver.table(drain=driver.chance(0.5)))
            elif turn == 9:
                rig.set_capacity(random.choice([rules.block_size, 128 * rules.block_size]))
        rig.poll(64)
        rig.complete([(head, 0) for head in rig.inflight])
        pushed += driver.collect()
        assert pushed == sum(rig.model.ops.values()), "each popped head is pushed exactly once"
    finally:
        rig.close()
    return rig.model


@examples(3000)
@given(st.randoms(use_true_random=True), st.integers(1, 12))
def test_queue_is_the_model(world: World, random: random.Random, steps: int) -> None:
    """Whatever the driver does, the C queue and the model agree on every outcome and every byte."""
    tell(random, world, steps)
