"""The vhost-user wire format without I/O (QEMU's docs/interop/vhost-user.rst is the specification).

A message is a header of three u32 (request, flags, size), ``size`` bytes of payload, and descriptors that travel beside
the bytes. ``Assembler`` says how many bytes to read next and never asks for one beyond the present message, so descriptors
that arrive meanwhile belong to it. ``decode`` checks everything the bytes themselves can tell: length, ranges, reserved
bits, the number of descriptors. What depends on the state of the session is the session's to check.

All numbers are in native byte order, which is little-endian wherever this program runs.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

VERSION: Final = 1
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3
_VERSION_MASK: Final = 3

HEADER: Final = struct.Struct("<III")
MAX_PAYLOAD: Final = 4096
"""Longest payload that is read. The longest legal one is a memory table, 8 + 32 * MAX_REGIONS bytes."""
MAX_REGIONS: Final = 64
"""Regions in one SET_MEM_TABLE. Front-ends send at most 8 there; those with more use ADD_MEM_REG."""
MAX_FDS: Final = MAX_REGIONS
CONFIG_MAX: Final = 256
"""Bytes of a configuration space, at most (the specification's limit)."""
VRING_LOG: Final = 1
"""VringAddr.flags: writes to the used ring are logged."""
_NO_FD: Final = 1 << 8


class ProtocolError(Exception):
    """The front-end sent something that is no message of the protocol. The conversation cannot go on."""


class Refused(Exception):
    """The message was understood and cannot be obeyed. The front-end is told so if it asked to be, else it is left."""


class Request(enum.IntEnum):
    """Front-end to back-end. Absent ones belong to other devices (RARP, MTU, crypto, GPU) or to features that are never
    offered (IOMMU, post-copy, in-band kicks)."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(enum.IntEnum):
    """Back-end to front-end, over the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE = 2


class ProtocolFeature(enum.IntEnum):
    """Bit numbers of the protocol features that are offered."""

    MQ = 0
    LOG_SHMFD = 1
    REPLY_ACK = 3
    BACKEND_REQ = 5
    CONFIG = 9
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16

    @property
    def mask(self) -> int:
        return 1 << self.value


PROTOCOL_FEATURES: Final = 30
"""Feature bit: protocol features can be negotiated, and queues start disabled."""
LOG_ALL: Final = 26
"""Feature bit: mark what is written to the driver's memory in the log."""


# ------------------------------------------------------------------------------------------------- payloads


@dataclass(frozen=True, slots=True)
class Message:
    """A request; the base is that of those without payload."""

    request: Request
    need_reply: bool


@dataclass(frozen=True, slots=True)
class Number(Message):
    value: int


@dataclass(frozen=True, slots=True)
class VringState(Message):
    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr(Message):
    """Addresses are the front-end's own ("user addresses"), but ``log``, which is a guest address."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True, slots=True)
class VringFd(Message):
    """``has_fd`` False: there is no descriptor, whoever waits must look by himself."""

    index: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """``size`` bytes which the guest knows at ``guest`` and the front-end at ``user``, ``offset`` bytes into the file."""

    guest: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True, slots=True)
class MemTable(Message):
    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class MemReg(Message):
    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class Log(Message):
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Config(Message):
    offset: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Inflight(Message):
    """``padding``: bytes behind the fields. QEMU pads the structure to 8 bytes and wants the answer so, others do not."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    padding: int


_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDR = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_TABLE = struct.Struct("<II")
_LOG = struct.Struct("<QQ")
_CONFIG = struct.Struct("<III")
_INFLIGHT = struct.Struct("<QQHH")
_INFLIGHT_PADDING = 4


# -------------------------------------------------------------------------------------------------- decoding


class Assembler:
    """Cuts a byte stream into messages: read exactly ``wanted`` bytes (or fewer), feed them, repeat."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._size: int | None = None

    @property
    def wanted(self) -> int:
        """Bytes still missing of the header, or of the payload behind it. Never 0."""
        size = HEADER.size if self._size is None else HEADER.size + self._size
        return size - len(self._data)

    @property
    def idle(self) -> bool:
        """Between two messages."""
        return not self._data

    def feed(self, data: bytes) -> tuple[int, int, bytes] | None:
        """(request, flags, payload) if a message is complete now. Raises ProtocolError for a header that cannot be one."""
        if len(data) > self.wanted:
            raise ValueError("more than was asked for")
        self._data += data
        if self._size is None and len(self._data) == HEADER.size:
            request, flags, size = HEADER.unpack(self._data)
            if flags & _VERSION_MASK != VERSION:
                raise ProtocolError(f"message {request} is of version {flags & _VERSION_MASK}; accepted is {VERSION}")
            if flags & REPLY:
                raise ProtocolError(f"message {request} is a reply to nothing")
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"message {request} says it has {size} bytes; accepted are up to {MAX_PAYLOAD}")
            self._size = size
        if self._size is None or len(self._data) < HEADER.size + self._size:
            return None
        request, flags, _ = HEADER.unpack_from(self._data)
        payload = bytes(self._data[HEADER.size :])
        self._data.clear()
        self._size = None
        return request, flags, payload


def decode(number: int, flags: int, payload: bytes, fds: int) -> Message:
    """The message, which came with ``fds`` descriptors. Raises ProtocolError."""
    try:
        request = Request(number)
    except ValueError:
        raise ProtocolError(f"message {number} is not known, or of a feature that was not offered") from None
    message = _DECODERS[request](request, bool(flags & NEED_REPLY), payload)
    fewest, most = _fds_of(message)
    if not fewest <= fds <= most:
        accepted = f"{fewest}" if fewest == most else f"{fewest} or {most}"
        raise ProtocolError(f"{request.name} came with {fds} descriptors; accepted are {accepted}")
    return message


def _unpack(request: Request, layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"{request.name} has {len(payload)} bytes; accepted are {layout.size}")
    return layout.unpack(payload)


def _empty(request: Request, need_reply: bool, payload: bytes) -> Message:
    # Front-ends pad some of these with a structure they also use elsewhere; nobody reads it.
    if len(payload) > 64:
        raise ProtocolError(f"{request.name} has {len(payload)} bytes; accepted are none")
    return Message(request, need_reply)


def _number(request: Request, need_reply: bool, payload: bytes) -> Message:
    return Number(request, need_reply, *_unpack(request, _U64, payload))


def _vring_state(request: Request, need_reply: bool, payload: bytes) -> Message:
    return VringState(request, need_reply, *_unpack(request, _STATE, payload))


def _vring_addr(request: Request, need_reply: bool, payload: bytes) -> Message:
    return VringAddr(request, need_reply, *_unpack(request, _ADDR, payload))


def _vring_fd(request: Request, need_reply: bool, payload: bytes) -> Message:
    (value,) = _unpack(request, _U64, payload)
    if value & ~0x1FF:
        raise ProtocolError(f"{request.name}: {value:#x} has reserved bits set")
    return VringFd(request, need_reply, value & 0xFF, not value & _NO_FD)


def _check_region(request: Request, region: MemoryRegion) -> MemoryRegion:
    if region.size == 0:
        raise ProtocolError(f"{request.name}: a region of no bytes")
    for what, start in (("guest", region.guest), ("user", region.user), ("file", region.offset)):
        if start + region.size > 1 << 64:
            raise ProtocolError(f"{request.name}: {region.size:#x} bytes at {what} address {start:#x} wrap around")
    return region


def _mem_table(request: Request, need_reply: bool, payload: bytes) -> Message:
    if len(payload) < _TABLE.size:
        raise ProtocolError(f"{request.name} has {len(payload)} bytes; accepted are at least {_TABLE.size}")
    count, _ = _TABLE.unpack_from(payload)
    if count > MAX_REGIONS:
        raise ProtocolError(f"{request.name} has {count} regions; accepted are up to {MAX_REGIONS}")
    if len(payload) < _TABLE.size + count * _REGION.size:
        raise ProtocolError(f"{request.name} has {len(payload)} bytes, too few for {count} regions")
    regions = (MemoryRegion(*_REGION.unpack_from(payload, _TABLE.size + i * _REGION.size)) for i in range(count))
    return MemTable(request, need_reply, tuple(_check_region(request, region) for region in regions))


def _mem_reg(request: Request, need_reply: bool, payload: bytes) -> Message:
    if len(payload) != 8 + _REGION.size:
        raise ProtocolError(f"{request.name} has {len(payload)} bytes; accepted are {8 + _REGION.size}")
    return MemReg(request, need_reply, _check_region(request, MemoryRegion(*_REGION.unpack_from(payload, 8))))


def _log(request: Request, need_reply: bool, payload: bytes) -> Message:
    size, offset = _unpack(request, _LOG, payload)
    if size == 0 or size + offset > 1 << 63:
        raise ProtocolError(f"{request.name}: a log of {size:#x} bytes at {offset:#x}")
    return Log(request, need_reply, size, offset)


def _config(request: Request, need_reply: bool, payload: bytes) -> Message:
    if len(payload) < _CONFIG.size:
        raise ProtocolError(f"{request.name} has {len(payload)} bytes; accepted are at least {_CONFIG.size}")
    offset, size, flags = _CONFIG.unpack_from(payload)
    if offset + size > CONFIG_MAX or len(payload) != _CONFIG.size + size:
        raise ProtocolError(f"{request.name}: {size} bytes at {offset} in a message of {len(payload)}")
    return Config(request, need_reply, offset, flags, payload[_CONFIG.size :])


def _inflight(request: Request, need_reply: bool, payload: bytes) -> Message:
    padding = len(payload) - _INFLIGHT.size
    if padding not in (0, _INFLIGHT_PADDING):
        raise ProtocolError(f"{request.name} has {len(payload)} bytes; accepted are {_INFLIGHT.size + _INFLIGHT_PADDING}")
    size, offset, num_queues, queue_size = _INFLIGHT.unpack_from(payload)
    return Inflight(request, need_reply, size, offset, num_queues, queue_size, padding)


_DECODERS: Final[dict[Request, Callable[[Request, bool, bytes], Message]]] = {
    Request.GET_FEATURES: _empty,
    Request.SET_FEATURES: _number,
    Request.SET_OWNER: _empty,
    Request.RESET_OWNER: _empty,
    Request.SET_MEM_TABLE: _mem_table,
    Request.SET_LOG_BASE: _log,
    Request.SET_LOG_FD: _empty,
    Request.SET_VRING_NUM: _vring_state,
    Request.SET_VRING_ADDR: _vring_addr,
    Request.SET_VRING_BASE: _vring_state,
    Request.GET_VRING_BASE: _vring_state,
    Request.SET_VRING_KICK: _vring_fd,
    Request.SET_VRING_CALL: _vring_fd,
    Request.SET_VRING_ERR: _vring_fd,
    Request.GET_PROTOCOL_FEATURES: _empty,
    Request.SET_PROTOCOL_FEATURES: _number,
    Request.GET_QUEUE_NUM: _empty,
    Request.SET_VRING_ENABLE: _vring_state,
    Request.SET_BACKEND_REQ_FD: _empty,
    Request.GET_CONFIG: _config,
    Request.SET_CONFIG: _config,
    Request.GET_INFLIGHT_FD: _inflight,
    Request.SET_INFLIGHT_FD: _inflight,
    Request.RESET_DEVICE: _empty,
    Request.GET_MAX_MEM_SLOTS: _empty,
    Request.ADD_MEM_REG: _mem_reg,
    Request.REM_MEM_REG: _mem_reg,
    Request.SET_STATUS: _number,
    Request.GET_STATUS: _empty,
}

_ONE_FD = (
    Request.SET_LOG_BASE,
    Request.SET_LOG_FD,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_INFLIGHT_FD,
    Request.ADD_MEM_REG,
)


def _fds_of(message: Message) -> tuple[int, int]:
    """The fewest and the most descriptors a message may bring."""
    match message:
        case MemTable():
            return len(message.regions), len(message.regions)
        case VringFd():
            return int(message.has_fd), int(message.has_fd)
        case _ if message.request in _ONE_FD:
            return 1, 1
        case _ if message.request is Request.REM_MEM_REG:
            return 0, 1  # "for compatibility with existing incorrect implementations"
    return 0, 0


# -------------------------------------------------------------------------------------------------- encoding


def encode(number: int, flags: int, payload: bytes) -> bytes:
    """A whole message."""
    return HEADER.pack(number, flags | VERSION, len(payload)) + payload


def _reply(request: Request, payload: bytes) -> bytes:
    return encode(request, REPLY, payload)


def number_reply(request: Request, value: int) -> bytes:
    """The answer to a question for a number, and with 0 or 1 the acknowledgement of anything."""
    return _reply(request, _U64.pack(value))


def vring_base_reply(index: int, avail: int) -> bytes:
    return _reply(Request.GET_VRING_BASE, _STATE.pack(index, avail))


def config_reply(offset: int, flags: int, data: bytes) -> bytes:
    """Empty ``data`` says that the question cannot be answered."""
    return _reply(Request.GET_CONFIG, _CONFIG.pack(offset, len(data), flags) + data)


def inflight_reply(asked: Inflight, mmap_size: int) -> bytes:
    """Travels with the descriptor of the area, which begins at offset 0 of it."""
    fields = _INFLIGHT.pack(mmap_size, 0, asked.num_queues, asked.queue_size)
    return _reply(Request.GET_INFLIGHT_FD, fields + bytes(asked.padding))


def config_change() -> bytes:
    """The back-end's own message: ask for the configuration again."""
    return encode(BackendRequest.CONFIG_CHANGE, 0, b"")
