"""The kernel's VDUSE and vdpa interfaces: virtio devices in user space, of any class. See docs/pyvduse.md.

``Control`` makes devices, ``Device`` serves one, ``messages`` is the protocol without I/O; ``pyvduse.vdpa`` (imported only
when asked for, as it brings a netlink library) attaches devices to the kernel's drivers.
"""

from pyvduse.control import Control, DeviceConfig, check_name
from pyvduse.device import Device, IotlbRegion, IovaInfo, VqInfo
from pyvduse.errors import VduseError
from pyvduse.messages import (
    GetVqState,
    PackedState,
    SetStatus,
    SetVqGroupAsid,
    Status,
    StatusMachine,
    Transition,
    UnknownRequest,
    UpdateIotlb,
    decode_request,
    encode_response,
)

__all__ = [
    "Control",
    "Device",
    "DeviceConfig",
    "GetVqState",
    "IotlbRegion",
    "IovaInfo",
    "PackedState",
    "SetStatus",
    "SetVqGroupAsid",
    "Status",
    "StatusMachine",
    "Transition",
    "UnknownRequest",
    "UpdateIotlb",
    "VduseError",
    "VqInfo",
    "check_name",
    "decode_request",
    "encode_response",
]
