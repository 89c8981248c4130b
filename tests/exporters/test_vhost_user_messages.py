"""The vhost-user codec: what is legal is understood, and nothing else is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vduse_blk.exporters.vhost_user import messages
from vduse_blk.exporters.vhost_user.messages import (
    Assembler,
    Config,
    Inflight,
    Log,
    MemoryRegion,
    MemReg,
    MemTable,
    Message,
    Number,
    ProtocolError,
    Request,
    VringAddr,
    VringFd,
    VringState,
    decode,
)

REGION = struct.pack("=QQQQ", 0x1000, 0x2000, 0x7F0000001000, 0x3000)
WIRE_REGION = MemoryRegion(0x1000, 0x2000, 0x7F0000001000, 0x3000)

LEGAL = [  # (request, payload, descriptors, what it says)
    (Request.GET_FEATURES, b"", 0, Message(Request.GET_FEATURES, False)),
    (Request.SET_FEATURES, struct.pack("=Q", 5), 0, Number(Request.SET_FEATURES, False, 5)),
    (Request.SET_MEM_TABLE, struct.pack("=II", 0, 0), 0, MemTable(Request.SET_MEM_TABLE, False, ())),
    (
        Request.SET_MEM_TABLE,
        struct.pack("=II", 2, 0) + 2 * REGION,
        2,
        MemTable(Request.SET_MEM_TABLE, False, (WIRE_REGION, WIRE_REGION)),
    ),
    (  # a front-end that always sends the whole structure of eight regions
        Request.SET_MEM_TABLE,
        struct.pack("=II", 1, 0) + REGION + bytes(7 * 32),
        1,
        MemTable(Request.SET_MEM_TABLE, False, (WIRE_REGION,)),
    ),
    (Request.ADD_MEM_REG, bytes(8) + REGION, 1, MemReg(Request.ADD_MEM_REG, False, WIRE_REGION)),
    (Request.REM_MEM_REG, bytes(8) + REGION, 0, MemReg(Request.REM_MEM_REG, False, WIRE_REGION)),
    (Request.REM_MEM_REG, bytes(8) + REGION, 1, MemReg(Request.REM_MEM_REG, False, WIRE_REGION)),
    (Request.SET_LOG_BASE, struct.pack("=QQ", 4096, 8), 1, Log(Request.SET_LOG_BASE, False, 4096, 8)),
    (Request.SET_LOG_FD, b"", 1, Message(Request.SET_LOG_FD, False)),
    (Request.SET_VRING_NUM, struct.pack("=II", 3, 256), 0, VringState(Request.SET_VRING_NUM, False, 3, 256)),
    (
        Request.SET_VRING_ADDR,
        struct.pack("=IIQQQQ", 1, 1, 10, 20, 30, 40),
        0,
        VringAddr(Request.SET_VRING_ADDR, False, 1, 1, 10, 20, 30, 40),
    ),
    (Request.SET_VRING_KICK, struct.pack("=Q", 7), 1, VringFd(Request.SET_VRING_KICK, False, 7, True)),
    (Request.SET_VRING_CALL, struct.pack("=Q", 0x107), 0, VringFd(Request.SET_VRING_CALL, False, 7, False)),
    (
        Request.GET_CONFIG,
        struct.pack("=III", 4, 3, 0) + b"abc",
        0,
        Config(Request.GET_CONFIG, False, 4, 0, b"abc"),
    ),
    (
        Request.GET_INFLIGHT_FD,
        struct.pack("=QQHH", 0, 0, 4, 128),
        0,
        Inflight(Request.GET_INFLIGHT_FD, False, 0, 0, 4, 128, 0),
    ),
    (
        Request.SET_INFLIGHT_FD,
        struct.pack("=QQHH4x", 4096, 0, 4, 128),
        1,
        Inflight(Request.SET_INFLIGHT_FD, False, 4096, 0, 4, 128, 4),
    ),
]


@pytest.mark.parametrize(("request_", "payload", "fds", "meaning"), LEGAL, ids=lambda v: getattr(v, "name", None))
def test_legal_messages_say_what_the_specification_means(
    request_: Request, payload: bytes, fds: int, meaning: Message
) -> None:
    """Every layout is understood field by field."""
    assert decode(request_, messages.VERSION, payload, fds) == meaning


def test_the_wish_for_a_reply_is_heard() -> None:
    """Flag 3 of the header."""
    assert decode(Request.SET_OWNER, messages.VERSION | messages.NEED_REPLY, b"", 0).need_reply


ILLEGAL = [  # (why, request, payload, descriptors)
    ("not known", 0, b"", 0),
    ("not known", 22, bytes(32), 0),  # IOTLB: not offered
    ("not known", 4711, b"", 0),
    ("bytes", Request.SET_FEATURES, b"", 0),
    ("bytes", Request.SET_FEATURES, bytes(9), 0),
    ("bytes", Request.SET_VRING_ADDR, bytes(8), 0),
    ("bytes", Request.GET_FEATURES, bytes(65), 0),
    ("bytes", Request.SET_MEM_TABLE, b"", 0),
    ("too few", Request.SET_MEM_TABLE, struct.pack("=II", 2, 0) + REGION, 2),
    ("regions", Request.SET_MEM_TABLE, struct.pack("=II", 0xFFFFFFFF, 0), 0),
    ("descriptors", Request.SET_MEM_TABLE, struct.pack("=II", 1, 0) + REGION, 0),
    ("descriptors", Request.SET_MEM_TABLE, struct.pack("=II", 1, 0) + REGION, 2),
    ("no bytes", Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 1, 0, 1, 1), 1),
    ("wrap", Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 2**64 - 1, 2, 1, 1), 1),
    ("wrap", Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 1, 2, 2**64 - 1, 1), 1),
    ("wrap", Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 1, 2, 1, 2**64 - 1), 1),
    ("descriptors", Request.ADD_MEM_REG, bytes(8) + REGION, 0),
    ("reserved", Request.SET_VRING_KICK, struct.pack("=Q", 1 << 9), 1),
    ("descriptors", Request.SET_VRING_KICK, struct.pack("=Q", 0), 0),
    ("descriptors", Request.SET_VRING_KICK, struct.pack("=Q", 1 << 8), 1),
    ("descriptors", Request.GET_FEATURES, b"", 1),
    ("descriptors", Request.SET_BACKEND_REQ_FD, b"", 0),
    ("log", Request.SET_LOG_BASE, struct.pack("=QQ", 0, 0), 1),
    ("log", Request.SET_LOG_BASE, struct.pack("=QQ", 2**64 - 1, 2**64 - 1), 1),
    ("at 250", Request.GET_CONFIG, struct.pack("=III", 250, 7, 0) + bytes(7), 0),
    ("at 0", Request.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(7), 0),
    ("at 4294967295", Request.SET_CONFIG, struct.pack("=III", 0xFFFFFFFF, 1, 0) + bytes(1), 0),
    ("bytes", Request.GET_INFLIGHT_FD, bytes(19), 0),
]


@pytest.mark.parametrize(("why", "number", "payload", "fds"), ILLEGAL)
def test_what_cannot_be_is_refused_by_name(why: str, number: int, payload: bytes, fds: int) -> None:
    """Wrong lengths, wrapping ranges, reserved bits, descriptors too few or too many."""
    with pytest.raises(ProtocolError, match=why):
        decode(number, messages.VERSION, payload, fds)


def test_an_assembler_asks_for_one_message_at_a_time() -> None:
    """It never wants a byte of the next message: descriptors that come meanwhile are this one's."""
    first = messages.HEADER.pack(Request.SET_FEATURES, 1, 8) + bytes(8)
    stream = first + messages.HEADER.pack(Request.GET_FEATURES, 1, 0)
    assembler, complete = Assembler(), []
    at = 0
    while at < len(stream):
        assert at + assembler.wanted <= (len(first) if at < len(first) else len(stream))
        whole = assembler.feed(stream[at : at + 1])
        at += 1
        if whole is not None:
            complete.append((at, whole))
    assert complete == [(20, (Request.SET_FEATURES, 1, bytes(8))), (32, (Request.GET_FEATURES, 1, b""))]
    assert assembler.idle


@pytest.mark.parametrize(
    ("why", "header"),
    [
        ("version", (1, 0, 0)),
        ("version", (1, 2, 0)),
        ("reply", (1, 1 | 4, 0)),
        ("bytes", (5, 1, messages.MAX_PAYLOAD + 1)),
        ("bytes", (5, 1, 0xFFFFFFFF)),
    ],
)
def test_a_header_that_cannot_be_is_refused_before_its_payload(why: str, header: tuple[int, int, int]) -> None:
    """Nobody waits for four gigabytes that were announced."""
    with pytest.raises(ProtocolError, match=why):
        Assembler().feed(messages.HEADER.pack(*header))


@given(
    number=st.one_of(st.sampled_from(list(Request)), st.integers(0, 2**32 - 1)),
    flags=st.integers(0, 2**32 - 1),
    payload=st.binary(max_size=400),
    fds=st.integers(0, 66),
)
@example(number=Request.SET_MEM_TABLE, flags=1, payload=struct.pack("=II", 64, 0) + 64 * REGION, fds=64)
def test_any_bytes_give_a_message_or_a_refusal(number: int, flags: int, payload: bytes, fds: int) -> None:
    """No payload raises anything but ProtocolError, and what is understood is within its bounds."""
    try:
        message = decode(number, flags, payload, fds)
    except ProtocolError:
        return
    assert message.request == number
    match message:
        case MemTable():
            assert len(message.regions) == fds
            regions: tuple[MemoryRegion, ...] = message.regions
        case MemReg():
            regions = (message.region,)
        case Config():
            assert message.offset + len(message.data) <= messages.CONFIG_MAX
            regions = ()
        case _:
            regions = ()
    for region in regions:
        assert region.size > 0
        assert max(region.guest, region.user, region.offset) + region.size <= 2**64


@given(st.lists(st.binary(min_size=1, max_size=40)))
def test_any_stream_gives_messages_or_a_refusal(chunks: list[bytes]) -> None:
    """However a stream is cut, the assembler takes it or says no, and never waits for nothing."""
    stream, assembler = b"".join(chunks), Assembler()
    try:
        while stream:
            assert 0 < assembler.wanted <= messages.MAX_PAYLOAD
            piece, stream = stream[: assembler.wanted], stream[assembler.wanted :]
            whole = assembler.feed(piece)
            assert whole is None or len(whole[2]) <= messages.MAX_PAYLOAD
    except ProtocolError:
        pass


def test_replies_have_the_layouts_of_the_specification() -> None:
    """Version 1 and the reply flag, the request's number, the payload front-ends check the length of."""
    head = struct.Struct("=III")
    assert messages.number_reply(Request.GET_FEATURES, 7) == head.pack(1, 5, 8) + struct.pack("=Q", 7)
    assert messages.vring_base_reply(2, 300) == head.pack(11, 5, 8) + struct.pack("=II", 2, 300)
    assert messages.config_reply(8, 0, b"ab") == head.pack(24, 5, 14) + struct.pack("=III", 8, 2, 0) + b"ab"
    for padding in (0, 4):
        asked = Inflight(Request.GET_INFLIGHT_FD, False, 0, 0, 2, 64, padding)
        wanted = head.pack(31, 5, 20 + padding) + struct.pack("=QQHH", 4096, 0, 2, 64) + bytes(padding)
        assert messages.inflight_reply(asked, 4096) == wanted
    assert messages.config_change() == head.pack(2, 1, 0)
