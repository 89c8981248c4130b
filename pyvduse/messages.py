"""Control messages without I/O: bytes in, typed requests out; answers in, bytes out.

The kernel sends one ``struct vduse_dev_request`` per read() and takes one ``struct vduse_dev_response`` per write().
What each status means to a device, and when it comes, is in docs/pyvduse.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from pyvduse._uapi import ffi, lib

REQUEST_SIZE = int(ffi.sizeof("struct vduse_dev_request"))
RESPONSE_SIZE = int(ffi.sizeof("struct vduse_dev_response"))


class Status(enum.IntFlag):
    """Virtio device status (virtio 1.3, 2.1)."""

    ACKNOWLEDGE = 0x01
    DRIVER = 0x02
    DRIVER_OK = 0x04
    FEATURES_OK = 0x08
    NEEDS_RESET = 0x40
    FAILED = 0x80


@dataclass(frozen=True, slots=True)
class SetStatus:
    """The driver writes the device status; 0 is a reset. The kernel takes it over only if the answer is OK."""

    request_id: int
    status: Status


@dataclass(frozen=True, slots=True)
class GetVqState:
    """Stop virtqueue ``index`` and say where it stands (vhost-vdpa only)."""

    request_id: int
    index: int


@dataclass(frozen=True, slots=True)
class UpdateIotlb:
    """Forget every mapping in IOVA [start, last] of address space ``asid`` before answering (vhost-vdpa only)."""

    request_id: int
    start: int
    last: int
    asid: int = 0


@dataclass(frozen=True, slots=True)
class SetVqGroupAsid:
    """Version 1: virtqueue group ``group`` uses address space ``asid`` from now on."""

    request_id: int
    group: int
    asid: int


@dataclass(frozen=True, slots=True)
class UnknownRequest:
    """A type this package does not know. Answer "failed"."""

    request_id: int
    type: int


Request = SetStatus | GetVqState | UpdateIotlb | SetVqGroupAsid | UnknownRequest


@dataclass(frozen=True, slots=True)
class PackedState:
    """Where a packed virtqueue stands: wrap counters (0 or 1) and indices."""

    last_avail_counter: int
    last_avail_idx: int
    last_used_counter: int
    last_used_idx: int


def decode_request(raw: bytes) -> Request:
    """Decode what one read() gave. Raises ValueError if it is not REQUEST_SIZE bytes."""
    if len(raw) != REQUEST_SIZE:
        raise ValueError(f"a VDUSE request has {REQUEST_SIZE} bytes, not {len(raw)}")
    c: Any = ffi.cast("struct vduse_dev_request *", ffi.from_buffer(raw))
    number = int(c.request_id)
    kind = int(c.type)
    if kind == lib.VDUSE_SET_STATUS:
        return SetStatus(number, Status(c.s.status))
    if kind == lib.VDUSE_GET_VQ_STATE:
        return GetVqState(number, int(c.vq_state.index))
    if kind == lib.VDUSE_UPDATE_IOTLB:
        return UpdateIotlb(number, int(c.iova_v2.start), int(c.iova_v2.last), int(c.iova_v2.asid))
    if kind == lib.VDUSE_SET_VQ_GROUP_ASID:
        return SetVqGroupAsid(number, int(c.vq_group_asid.group), int(c.vq_group_asid.asid))
    return UnknownRequest(number, kind)


def encode_response(
    request_id: int, ok: bool, *, vq_state: int | PackedState | None = None, vq_index: int = 0
) -> bytes:
    """The bytes for one write(). ``vq_state`` answers GetVqState: the next avail index of a split ring, or PackedState."""
    c: Any = ffi.new("struct vduse_dev_response *")
    c.request_id = request_id
    c.result = lib.VDUSE_REQ_RESULT_OK if ok else lib.VDUSE_REQ_RESULT_FAILED
    if vq_state is not None:
        c.vq_state.index = vq_index
    if isinstance(vq_state, PackedState):
        packed = c.vq_state.packed
        packed.last_avail_counter, packed.last_avail_idx = vq_state.last_avail_counter, vq_state.last_avail_idx
        packed.last_used_counter, packed.last_used_idx = vq_state.last_used_counter, vq_state.last_used_idx
    elif vq_state is not None:
        c.vq_state.split.avail_index = vq_state
    return bytes(ffi.buffer(c))


class Transition(enum.Enum):
    """What a new status means for the device."""

    RESET = "reset"
    ACKNOWLEDGED = "acknowledged"
    DRIVER_BOUND = "driver bound"
    FEATURES_OK = "features ok"
    DRIVER_OK = "driver ok"
    FAILED = "failed"
    UNCHANGED = "unchanged"


class StatusMachine:
    """Names the step a device takes with each status. Steps are idempotent: the kernel redelivers an unanswered message,
    with its old id, to the next process that opens the device."""

    def __init__(self) -> None:
        self.status = Status(0)

    def on_status(self, new: Status) -> Transition:
        """Take over ``new`` (which is about to be answered OK) and name the highest step it adds."""
        old, self.status = self.status, new
        if new == 0:
            return Transition.RESET
        added = new & ~old
        for flag, step in (
            (Status.FAILED, Transition.FAILED),
            (Status.DRIVER_OK, Transition.DRIVER_OK),
            (Status.FEATURES_OK, Transition.FEATURES_OK),
            (Status.DRIVER, Transition.DRIVER_BOUND),
            (Status.ACKNOWLEDGE, Transition.ACKNOWLEDGED),
        ):
            if added & flag:
                return step
        return Transition.UNCHANGED
