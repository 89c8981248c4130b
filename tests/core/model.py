"""What the C core is meant to do, in plain Python: the split virtqueue seen from the device, and virtio-blk requests.

The oracle of test_model.py, and the documentation of intent. Numbers in brackets are sections of virtio 1.3. Nothing is
shared with C: memory is one bytearray, a host address is an offset in it, and a driver's address is translated through a
``Table`` as in ``iova.c``.

Reading order: ``translate`` (memory), ``SplitRing`` (entries), ``parse`` and ``Request.finish`` (requests), ``Queue``
(what becomes of them).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum

READ, WRITE = 1, 2  # what the device may do with a region

# ------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Region:
    """IOVA bytes ``start`` to ``last`` inclusive; byte ``start`` is ``host`` in memory."""

    start: int
    last: int
    host: int
    access: int = READ | WRITE


@dataclass(frozen=True)
class Table:
    """Regions sorted by ``start`` without overlap. ``drain``: something is gone, adopt it with nothing in flight."""

    regions: tuple[Region, ...]
    generation: int
    drain: bool = False


@dataclass(frozen=True)
class Piece:
    """``length`` bytes at ``host``."""

    host: int
    length: int


class UnmappedError(Exception):
    """Some byte of [iova, iova+length) is in no region."""

    def __init__(self, iova: int, length: int) -> None:
        super().__init__(f"{iova:#x}+{length:#x}")
        self.iova, self.length = iova, length


class DeniedError(Exception):
    """Mapped, but not for this access."""


class FragmentedError(Exception):
    """More pieces than there is room for."""


def translate(table: Table, iova: int, length: int, access: int, room: int) -> list[Piece]:
    """The pieces of memory behind a range, neighbours joined. The first byte that makes trouble says which."""
    if iova + length > 2**64:
        raise UnmappedError(iova, length)
    pieces: list[Piece] = []
    at, end = iova, iova + length
    while at < end:
        region = next((r for r in table.regions if r.start <= at <= r.last), None)
        if region is None:
            raise UnmappedError(iova, length)
        if region.access & access != access:
            raise DeniedError
        here = min(end, region.last + 1) - at
        host = region.host + at - region.start
        if pieces and pieces[-1].host + pieces[-1].length == host:
            pieces[-1] = Piece(pieces[-1].host, pieces[-1].length + here)
        elif len(pieces) == room:
            raise FragmentedError
        else:
            pieces.append(Piece(host, here))
        at += here
    return pieces


def load(memory: bytearray, pieces: list[Piece]) -> bytes:
    """The bytes of some pieces, one after the other."""
    return b"".join(memory[p.host : p.host + p.length] for p in pieces)


# --------------------------------------------------------------------------------------------------- split ring

NEXT, WRITABLE, INDIRECT = 1, 2, 4  # [2.7.5] descriptor flags
NO_INTERRUPT = 1  # [2.7.6] avail.flags, without EVENT_IDX
NO_NOTIFY = 1  # [2.7.8] used.flags, without EVENT_IDX
CHAIN_MAX = 260

_DESC = struct.Struct("<QIHH")


class Fault(Enum):
    """Rules a driver can break. After one nothing more is popped."""

    AVAIL_IDX = "avail.idx is further ahead than the ring is long"
    HEAD = "a head beyond the ring, or one in flight"
    NEXT = "next beyond the table"
    LOOP = "a chain longer than its table"
    LONG = "more than CHAIN_MAX buffers"
    ORDER = "a device-readable buffer behind a device-writable one"
    INDIRECT = "an indirect table that breaks the rules"
    INDIRECT_MAP = "an indirect table in memory that is not there"
    RING_MAP = "the ring itself is not there"


class BrokenError(Exception):
    """The driver broke a rule."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.value)
        self.fault = fault


@dataclass(frozen=True)
class Buffer:
    iova: int
    length: int
    writable: bool


@dataclass
class Chain:
    """``buffers``: the device-readable ones first [2.7.4.2]."""

    head: int
    buffers: list[Buffer] = field(default_factory=list)

    def append(self, iova: int, length: int, flags: int) -> None:
        writable = bool(flags & WRITABLE)
        if len(self.buffers) == CHAIN_MAX:
            raise BrokenError(Fault.LONG)
        if not writable and self.buffers and self.buffers[-1].writable:
            raise BrokenError(Fault.ORDER)
        self.buffers.append(Buffer(iova, length, writable))

    def stream(self, writable: bool) -> list[Buffer]:
        return [b for b in self.buffers if b.writable is writable]


class SplitRing:
    """[2.7] seen from the device. ``desc``, ``avail``, ``used`` are host addresses. Indices run freely modulo 2^16."""

    def __init__(self, memory: bytearray, config: Config, desc: int, avail: int, used: int, last_avail: int) -> None:
        self.memory = memory
        self.num = config.num
        self.desc, self.avail, self.used = desc, avail, used
        self.event_idx, self.indirect = config.event_idx, config.indirect
        self.last_avail = last_avail  # next entry to pop
        self.seen_avail = last_avail  # avail.idx when we last looked
        self.used_idx = self._u16(used + 2)  # next slot to fill
        self.published = self.used_idx  # used.idx as the driver sees it
        self.notified: int | None = None  # used.idx when we last decided about an interrupt

    def _u16(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 2], "little")

    def _put_u16(self, at: int, value: int) -> None:
        self.memory[at : at + 2] = value.to_bytes(2, "little")

    def pop(self, table: Table) -> Chain | None:
        """The next chain, or None. Raises BrokenError, or UnmappedError for an indirect table (the entry stays)."""
        if self.seen_avail == self.last_avail:
            self.seen_avail = self._u16(self.avail + 2)
        pending = (self.seen_avail - self.last_avail) & 0xFFFF
        if pending == 0:
            return None
        if pending > self.num:
            raise BrokenError(Fault.AVAIL_IDX)
        head = self._u16(self.avail + 4 + 2 * (self.last_avail % self.num))
        if head >= self.num:
            raise BrokenError(Fault.HEAD)
        chain = Chain(head)
        self._walk(chain, table)
        self.last_avail = (self.last_avail + 1) & 0xFFFF
        return chain

    def _walk(self, chain: Chain, table: Table) -> None:
        """[2.7.5] Descriptors of the ring from ``chain.head`` on."""
        slot = chain.head
        for _ in range(self.num):
            at = self.desc + 16 * slot
            iova, length, flags, slot = _DESC.unpack(self.memory[at : at + 16])
            if flags & INDIRECT:
                # [2.7.5.3.1] not with NEXT; [2.7.5.3.2] may end a chain of normal ones, and WRITE means nothing.
                if not self.indirect or flags & NEXT:
                    raise BrokenError(Fault.INDIRECT)
                self._walk_indirect(chain, table, iova, length)
                return
            chain.append(iova, length, flags)
            if not flags & NEXT:
                return
            if slot >= self.num:
                raise BrokenError(Fault.NEXT)
        raise BrokenError(Fault.LOOP)

    def _walk_indirect(self, chain: Chain, table: Table, iova: int, length: int) -> None:
        """[2.7.5.3] A table elsewhere; it may lie anywhere, straddle regions and be unaligned."""
        if length == 0 or length % 16:
            raise BrokenError(Fault.INDIRECT)
        slot = 0
        for _ in range(length // 16):
            try:
                content = load(self.memory, translate(table, iova + 16 * slot, 16, READ, room=16))
            except (UnmappedError, DeniedError):
                raise UnmappedError(iova, length) from None  # entries behind the chain's end may be missing
            entry, size, flags, slot = _DESC.unpack(content)
            if flags & INDIRECT:
                raise BrokenError(Fault.INDIRECT)
            chain.append(entry, size, flags)
            if not flags & NEXT:
                return
            if slot >= length // 16:
                raise BrokenError(Fault.NEXT)
        raise BrokenError(Fault.LOOP)

    def unpop(self) -> None:
        """The entry just popped comes again."""
        self.last_avail = (self.last_avail - 1) & 0xFFFF

    def push(self, head: int, length: int) -> None:
        """[2.7.8] Fill a used slot; the driver does not see it yet."""
        at = self.used + 4 + 8 * (self.used_idx % self.num)
        self.memory[at : at + 8] = struct.pack("<II", head, length)
        self.used_idx = (self.used_idx + 1) & 0xFFFF

    def publish(self) -> int:
        """Show the driver what was pushed; how many."""
        count = (self.used_idx - self.published) & 0xFFFF
        if count:
            self._put_u16(self.used + 2, self.used_idx)
            self.published = self.used_idx
        return count

    def must_notify(self) -> bool:
        """[2.7.7] After a publish: does the driver want an interrupt?"""
        new = self.published
        old, self.notified = self.notified, new
        if not self.event_idx:
            return not self._u16(self.avail) & NO_INTERRUPT
        if old is None:
            return True  # nobody knows what it was told before us
        event = self._u16(self.avail + 4 + 2 * self.num)
        # [2.7.7.2] If and only if used_event is among the entries old, old+1, ... new-1.
        return (event - old) & 0xFFFF < (new - old) & 0xFFFF

    def enable_kick(self) -> bool:
        """[2.7.10] Ask for kicks; True: entries came meanwhile."""
        if self.event_idx:
            self._put_u16(self.used + 4 + 8 * self.num, self.last_avail)  # kick when this entry appears
        else:
            self._put_u16(self.used, 0)
        self.seen_avail = self._u16(self.avail + 2)
        return self.seen_avail != self.last_avail

    def disable_kick(self) -> None:
        """[2.7.10] With EVENT_IDX the entry asked for is simply left behind."""
        if not self.event_idx:
            self._put_u16(self.used, NO_NOTIFY)


# ----------------------------------------------------------------------------------------------------- requests

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13  # [5.2.6]
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTOR = 512
TRANSFER_MAX = 0x7FFFF000


class Op(Enum):
    """In the order of ``enum vblk_op``."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
    GET_ID = 5
    OTHER = 6


@dataclass
class Rules:
    """What the disk accepts. Bytes, but for the two limits of a range."""

    capacity: int
    block_size: int = 512
    read_only: bool = False
    discard: bool = True
    write_zeroes: bool = True
    max_discard_sectors: int = 128
    max_write_zeroes_sectors: int = 128
    max_ranges: int = 8
    serial: bytes = b""


@dataclass(frozen=True)
class Range:
    offset: int
    length: int
    unmap: bool


@dataclass
class Request:
    """``answer`` is the status if storage need not be asked, else None."""

    head: int
    op: Op = Op.OTHER
    answer: int | None = None
    malformed: bool = False
    offset: int = 0
    length: int = 0
    pieces: list[Piece] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    status_at: int | None = None
    used_length: int = 0

    def finish(self, memory: bytearray, status: int) -> int:
        """Zero what a failed read left, write the status [5.2.6], return the used length [2.7.8]."""
        if self.op is Op.READ and status != OK:
            for piece in self.pieces:
                memory[piece.host : piece.host + piece.length] = bytes(piece.length)
        if self.status_at is None:
            return 0
        memory[self.status_at] = status
        return self.used_length


class MalformedError(Exception):
    """The framing is wrong."""


class RefusedError(Exception):
    """Answered at once."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def gather(chain: Chain, table: Table, writable: bool, skip: int, length: int, room: int) -> list[Piece]:
    """Bytes [skip, skip+length) of the readable (writable) stream [2.7.4.1: the framing means nothing].

    Each buffer is translated with the room its predecessors left, then joined to them.
    """
    pieces: list[Piece] = []
    for buffer in chain.stream(writable):
        if length == 0:
            break
        if skip >= buffer.length:
            skip -= buffer.length
            continue
        here = min(buffer.length - skip, length)
        if buffer.iova + skip >= 2**64:
            raise MalformedError
        try:
            more = translate(table, buffer.iova + skip, here, WRITE if writable else READ, room - len(pieces))
        except (DeniedError, FragmentedError):
            raise MalformedError from None
        if pieces and pieces[-1].host + pieces[-1].length == more[0].host:
            pieces[-1] = Piece(pieces[-1].host, pieces[-1].length + more[0].length)
            more = more[1:]
        pieces += more
        length -= here
        skip = 0
    return pieces


def parse(memory: bytearray, rules: Rules, chain: Chain, table: Table, room: int, request: Request) -> None:
    """[5.2.6] Fill in ``request``, all pieces of which have at most ``room`` parts. Raises UnmappedError."""
    try:
        _parse(memory, rules, chain, table, room, request)
    except RefusedError as refused:
        request.answer = refused.status
    except MalformedError:
        request.op, request.answer, request.malformed, request.pieces = Op.OTHER, IOERR, True, []


def _parse(memory: bytearray, rules: Rules, chain: Chain, table: Table, room: int, request: Request) -> None:
    readable = sum(b.length for b in chain.stream(False))
    writable = sum(b.length for b in chain.stream(True))
    if writable == 0:
        raise MalformedError  # nowhere to answer
    [status] = gather(chain, table, True, writable - 1, 1, 1)
    request.status_at = status.host
    request.used_length = min(writable, 2**32 - 1)
    if readable < 16:
        raise MalformedError
    header = load(memory, gather(chain, table, False, 0, 16, 16))
    kind, _ioprio, sector = struct.unpack("<IIQ", header)
    to_driver, from_driver = writable - 1, readable - 16
    if kind == IN:
        if from_driver:
            raise MalformedError
        request.op = Op.READ
        request.pieces = gather(chain, table, True, 0, to_driver, room)
        _check_transfer(rules, request, sector, to_driver)
    elif kind == OUT:
        request.op = Op.WRITE
        request.pieces = gather(chain, table, False, 16, from_driver, room)
        _check_transfer(rules, request, sector, from_driver)
    elif kind == FLUSH:
        request.op = Op.FLUSH
    elif kind == GET_ID:
        request.op = Op.GET_ID
        pieces = gather(chain, table, True, 0, to_driver, room)
        answer = rules.serial[:20].ljust(to_driver, b"\0")
        for piece in pieces:
            memory[piece.host : piece.host + piece.length] = answer[: piece.length]
            answer = answer[piece.length :]
        raise RefusedError(OK)
    elif kind in (DISCARD, WRITE_ZEROES):
        request.op = Op.DISCARD if kind == DISCARD else Op.WRITE_ZEROES
        _parse_ranges(memory, rules, chain, table, room, request, from_driver)
    else:
        raise RefusedError(UNSUPP)


def _in_disk(rules: Rules, sector: int, length: int) -> bool:
    return sector + length // SECTOR <= rules.capacity // SECTOR


def _check_transfer(rules: Rules, request: Request, sector: int, length: int) -> None:
    request.offset, request.length = sector * SECTOR % 2**64, length
    if request.op is Op.WRITE and rules.read_only:
        raise RefusedError(IOERR)
    aligned = length % rules.block_size == 0 and sector * SECTOR % rules.block_size == 0
    if length > TRANSFER_MAX or not aligned or not _in_disk(rules, sector, length):
        raise RefusedError(IOERR)
    if length == 0:
        request.pieces = []
        raise RefusedError(OK)


def _parse_ranges(
    memory: bytearray, rules: Rules, chain: Chain, table: Table, room: int, request: Request, length: int
) -> None:
    discard = request.op is Op.DISCARD
    if not (rules.discard if discard else rules.write_zeroes):
        raise RefusedError(UNSUPP)
    if rules.read_only or length == 0 or length % 16 or length // 16 > rules.max_ranges:
        raise RefusedError(IOERR)
    content = load(memory, gather(chain, table, False, 16, length, room))
    ranges = []
    for sector, sectors, flags in struct.iter_unpack("<QII", content):
        # [5.2.6.2] An unknown flag, or UNMAP on a discard.
        if flags & ~UNMAP or (discard and flags):
            raise RefusedError(UNSUPP)
        limit = rules.max_discard_sectors if discard else rules.max_write_zeroes_sectors
        if sectors > limit or not _in_disk(rules, sector, sectors * SECTOR):
            raise RefusedError(IOERR)
        offset, end, block = sector * SECTOR, (sector + sectors) * SECTOR, rules.block_size
        if discard:
            # Alignment is a hint to Linux: the whole blocks inside, which may be none.
            offset, end = -(-offset // block) * block, end // block * block
            end = max(offset, end)
        elif offset % block or end % block:
            raise RefusedError(IOERR)
        ranges.append(Range(offset, end - offset, discard or bool(flags & UNMAP)))
    request.ranges = ranges
    request.length = sum(r.length for r in ranges)


# -------------------------------------------------------------------------------------------------------- queue


@dataclass(frozen=True)
class Config:
    """Ring addresses are IOVAs. ``last_avail`` None: where the used ring stands."""

    num: int
    desc: int
    avail: int
    used: int
    event_idx: bool
    indirect: bool
    seg_max: int
    last_avail: int | None = 0


class Queue:
    """``queue.c``: fetch, ask for memory that is not mapped, finish, publish, notify. Served like a plugin queue."""

    def __init__(self, memory: bytearray, config: Config, rules: Rules, table: Table) -> None:
        self.memory = memory
        self.config = config
        self.rules = rules
        self.table = self.next_table = table
        self.ring: SplitRing | None = None
        self.fault: Fault | None = None
        self.inflight: dict[int, Request] = {}
        self.missing: tuple[int, int] | None = None  # what control is asked to map: first and last byte
        self._missed: tuple[int, int] | None = None  # what we asked for last
        self.answered = False  # control has looked it up
        self.ops = dict.fromkeys(Op, 0)
        self.bytes = dict.fromkeys(Op, 0)
        self.errors = dict.fromkeys(Op, 0)
        self.unsupported = self.malformed = self.wakeups = self.publishes = self.notifies = self.misses = 0
        self.bound = self._bind()

    def set_table(self, table: Table) -> None:
        self.next_table = table

    def answer_miss(self) -> None:
        self.answered = True

    def poll(self, room: int) -> list[Request]:
        """Up to ``room`` requests for storage; what can be answered without it is answered."""
        self.wakeups += 1
        popped: list[Request] = []
        if not self._ready():
            return popped
        assert self.ring is not None
        self.ring.disable_kick()
        while len(popped) < room:
            request = self._fetch()
            if request is None:
                # Kicks only when there is nothing at all to do, and then one more look.
                if popped or self.fault or self.missing or not self.ring.enable_kick():
                    break
                self.ring.disable_kick()
            elif request.answer is None:
                popped.append(request)
            else:
                self._finish(request, request.answer)
        self._publish()
        return popped

    def complete(self, answers: list[tuple[int, int]]) -> bool:
        """Answer (head, status) pairs; False if one of the heads is not in flight (the others are answered)."""
        known = True
        for head, status in answers:
            if head in self.inflight:
                self._finish(self.inflight[head], status)
            else:
                known = False
        self._publish()
        return known

    def _ready(self) -> bool:
        """Adopt a new table, unless it takes memory away from what is in flight. A broken queue lets go, too."""
        if self.next_table is not self.table:
            if self.next_table.drain:
                if self.inflight:
                    return False
                self.bound = False
            self.table = self.next_table
        if self.fault:
            return False
        if not self.bound:
            self.bound = self._bind()
            if not self.bound and self.ring is None:
                self.fault = Fault.RING_MAP
        return self.bound

    def _bind(self) -> bool:
        """[2.7] Alignment and size of the three areas, each in one piece, event index included."""
        config, num = self.config, self.config.num
        areas = []
        for iova, length, access, align in (
            (config.desc, 16 * num, READ, 16),
            (config.avail, 6 + 2 * num, READ, 2),
            (config.used, 6 + 8 * num, READ | WRITE, 4),
        ):
            try:
                [piece] = translate(self.table, iova, length, access, 1)
            except (UnmappedError, DeniedError, FragmentedError):
                return False
            if iova % align or piece.host % align:
                return False
            areas.append(piece.host)
        if self.ring is not None:
            self.ring.desc, self.ring.avail, self.ring.used = areas
            return True
        desc, avail, used = areas
        last_avail = config.last_avail
        if last_avail is None:
            last_avail = int.from_bytes(self.memory[used + 2 : used + 4], "little")
        self.ring = SplitRing(self.memory, config, desc, avail, used, last_avail)
        return True

    def _fetch(self) -> Request | None:
        """One request, in flight from now on; None: nothing there, broken, or waiting for control."""
        assert self.ring is not None
        if self.missing is not None:
            if not self.answered or self.next_table is not self.table:
                return None
            self.missing = None
        try:
            chain = self.ring.pop(self.table)
        except UnmappedError as error:
            if not self._ask(error):
                self.fault = Fault.INDIRECT_MAP
            return None
        except BrokenError as error:
            self.fault = error.fault
            return None
        if chain is None:
            return None
        if chain.head in self.inflight:
            self.fault = Fault.HEAD
            return None
        request = Request(chain.head)
        try:
            parse(self.memory, self.rules, chain, self.table, self.config.seg_max + 2, request)
        except UnmappedError as error:
            if self._ask(error):
                self.ring.unpop()
                return None
            # Control has had its chance: the memory does not exist.
            request.op, request.answer, request.malformed, request.pieces = Op.OTHER, IOERR, True, []
        self._missed = None
        self.inflight[chain.head] = request
        return request

    def _ask(self, error: UnmappedError) -> bool:
        """False: this very range was asked for already."""
        if self._missed == (error.iova, error.length):
            return False
        self._missed = (error.iova, error.length)
        self.answered = False
        self.missing = (error.iova, min(error.iova + error.length, 2**64) - 1)
        self.misses += 1
        return True

    def _finish(self, request: Request, status: int) -> None:
        assert self.ring is not None
        self.malformed += request.malformed
        self.ops[request.op] += 1
        if status == OK:
            self.bytes[request.op] += request.length
        elif status == IOERR:
            self.errors[request.op] += 1
        else:
            self.unsupported += 1
        del self.inflight[request.head]
        self.ring.push(request.head, request.finish(self.memory, status))

    def _publish(self) -> None:
        if self.ring is not None and self.ring.publish():
            self.publishes += 1
            self.notifies += self.ring.must_notify()
