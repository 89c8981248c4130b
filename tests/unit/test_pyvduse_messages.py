"""Control messages without a kernel: bytes to requests, answers to bytes, the steps of the status."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvduse import (
    GetVqState,
    PackedState,
    SetStatus,
    SetVqGroupAsid,
    Status,
    StatusMachine,
    Transition,
    UnknownRequest,
    UpdateIotlb,
    VduseError,
    check_name,
    decode_request,
    encode_response,
)

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))


def raw(kind: int, number: int, payload: bytes) -> bytes:
    return struct.pack("<II16x", kind, number) + payload.ljust(128, b"\0")


@given(u32, st.integers(0, 255))
def test_set_status(number: int, status: int) -> None:
    """Type 1 carries one byte of status."""
    assert decode_request(raw(1, number, bytes([status]))) == SetStatus(number, Status(status))


@given(u32, u64, u64, u32, u32)
def test_the_other_requests(number: int, a: int, b: int, c: int, d: int) -> None:
    """Types 0, 2 and 3; anything else is unknown, and keeps its id so that it can be refused."""
    assert decode_request(raw(0, number, struct.pack("<I", c))) == GetVqState(number, c)
    assert decode_request(raw(2, number, struct.pack("<QQI", a, b, c))) == UpdateIotlb(number, a, b, c)
    assert decode_request(raw(3, number, struct.pack("<II", c, d))) == SetVqGroupAsid(number, c, d)
    assert decode_request(raw(4 + c % 1000, number, b"")) == UnknownRequest(number, 4 + c % 1000)


@pytest.mark.parametrize("length", [0, 1, 151, 153])
def test_a_request_has_152_bytes(length: int) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="152 bytes"):
        decode_request(bytes(length))


@given(u32, st.booleans())
def test_response(number: int, ok: bool) -> None:
    """152 bytes: id, 0 or 1, zeros (the kernel refuses anything in the reserved fields)."""
    assert encode_response(number, ok) == struct.pack("<II", number, 0 if ok else 1).ljust(152, b"\0")


@given(u32, u16, u32)
def test_response_with_queue_state(number: int, avail: int, index: int) -> None:
    """Split: one index behind the queue's; packed: two counters, two indices."""
    split = encode_response(number, True, vq_state=avail, vq_index=index)
    assert split[24:].startswith(struct.pack("<IH", index, avail))
    packed = encode_response(number, True, vq_state=PackedState(1, avail, 0, 7), vq_index=index)
    assert packed[24:].startswith(struct.pack("<IHHHH", index, 1, avail, 0, 7))


def test_status_of_an_attach() -> None:
    """The statuses of an attach, and of the detach behind it, name their steps."""
    machine = StatusMachine()
    steps = [machine.on_status(Status(status)) for status in (0, 1, 3, 0x0B, 0x0F, 0, 1)]
    assert steps == [
        Transition.RESET,
        Transition.ACKNOWLEDGED,
        Transition.DRIVER_BOUND,
        Transition.FEATURES_OK,
        Transition.DRIVER_OK,
        Transition.RESET,
        Transition.ACKNOWLEDGED,
    ]


@given(st.lists(st.integers(0, 255), max_size=8))
def test_a_redelivered_status_changes_nothing(statuses: list[int]) -> None:
    """The same status twice: the second is no step, but a reset is always one."""
    machine = StatusMachine()
    for status in statuses:
        machine.on_status(Status(status))
        again = machine.on_status(Status(status))
        assert again is (Transition.RESET if status == 0 else Transition.UNCHANGED)


def test_errors_say_what_was_asked_of_what_and_why() -> None:
    """The sentence has the operation, the object, the kernel's word and the usual cause."""
    text = str(VduseError("DESTROY_DEV", "device 'a'", errno.EBUSY))
    assert text.startswith("DESTROY_DEV of device 'a': Device or resource busy; its vdpa device still exists")
    broken = VduseError("VQ_INJECT_IRQ", "device 'a', queue 0", errno.EPERM)
    assert "given the device up" in str(broken)
    assert broken.errno == errno.EPERM
    assert str(VduseError("CREATE_DEV", "x", errno.EFAULT)) == "CREATE_DEV of x: Bad address"


@pytest.mark.parametrize("name", ["", ".", "..", "control", "a/b", "a b", "-x", "@x", "a" * 128, "\u00e9"])
def test_names_the_kernel_takes_and_we_do_not(name: str) -> None:
    """A device's name becomes a file name in /dev and /sys."""
    with pytest.raises(ValueError, match="no usable device name"):
        check_name(name)
