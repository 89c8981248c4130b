"""The generic netlink family ``vdpa``: list, add and delete vdpa devices (kernel: drivers/vdpa/vdpa.c).

DEV_NEW and DEV_DEL return only when the driver on top has probed or let go, and that needs answers from the device's server.
Until then the kernel holds its vdpa lock and *all* generic netlink of the host. So never call ``dev_add`` or ``dev_del`` on
the thread that answers the device; and a success of ``dev_add`` does not mean that a driver took the device: look for what
the driver should have made (a disk, a network interface).

The family exists in the initial network namespace only. As a program: ``python -m pyvduse.vdpa list|add NAME|del NAME``;
exit status 0, 1, 2 (usage) or 5 (not permitted).
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

if __name__ == "__main__":
    # As a program this is started for a single request. The library's top-level module would import every tool it has, ten
    # times as much as the one needed here; an empty package of the same name in its place leaves only that one.
    _library = importlib.util.find_spec("pyroute2")
    if _library is not None and _library.submodule_search_locations:
        _package = types.ModuleType("pyroute2")
        _package.__path__ = list(_library.submodule_search_locations)
        sys.modules.setdefault("pyroute2", _package)

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from pyvduse.errors import VduseError

_MGMTDEV_GET, _DEV_NEW, _DEV_DEL, _DEV_GET, _DEV_CONFIG_GET = 2, 3, 4, 5, 6
_VERSION = 1


class _Message(genlmsg):  # type: ignore[misc]  # pyroute2 carries no types
    """enum vdpa_attr of include/uapi/linux/vdpa.h, in its order."""

    prefix = "VDPA_ATTR_"
    nla_map = (
        ("VDPA_ATTR_UNSPEC", "none"),
        ("VDPA_ATTR_MGMTDEV_BUS_NAME", "asciiz"),
        ("VDPA_ATTR_MGMTDEV_DEV_NAME", "asciiz"),
        ("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES", "uint64"),
        ("VDPA_ATTR_DEV_NAME", "asciiz"),
        ("VDPA_ATTR_DEV_ID", "uint32"),
        ("VDPA_ATTR_DEV_VENDOR_ID", "uint32"),
        ("VDPA_ATTR_DEV_MAX_VQS", "uint32"),
        ("VDPA_ATTR_DEV_MAX_VQ_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_MIN_VQ_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MACADDR", "l2addr"),
        ("VDPA_ATTR_DEV_NET_STATUS", "uint8"),
        ("VDPA_ATTR_DEV_NET_CFG_MAX_VQP", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MTU", "uint16"),
        ("VDPA_ATTR_DEV_NEGOTIATED_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_MGMTDEV_MAX_VQS", "uint32"),
        ("VDPA_ATTR_DEV_SUPPORTED_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_QUEUE_INDEX", "uint32"),
        ("VDPA_ATTR_DEV_VENDOR_ATTR_NAME", "asciiz"),
        ("VDPA_ATTR_DEV_VENDOR_ATTR_VALUE", "uint64"),
        ("VDPA_ATTR_DEV_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_BLK_CFG_CAPACITY", "uint64"),
        ("VDPA_ATTR_DEV_BLK_CFG_SIZE_MAX", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_BLK_SIZE", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_SEG_MAX", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_NUM_QUEUES", "uint16"),
        ("VDPA_ATTR_DEV_BLK_CFG_PHY_BLK_EXP", "uint8"),
        ("VDPA_ATTR_DEV_BLK_CFG_ALIGN_OFFSET", "uint8"),
        ("VDPA_ATTR_DEV_BLK_CFG_MIN_IO_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_BLK_CFG_OPT_IO_SIZE", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEC", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEG", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_DISCARD_SEC_ALIGN", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEC", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEG", "uint32"),
        ("VDPA_ATTR_DEV_BLK_READ_ONLY", "uint8"),
        ("VDPA_ATTR_DEV_BLK_FLUSH", "uint8"),
    )


@dataclass(frozen=True, slots=True)
class MgmtDev:
    """Something that can make vdpa devices. ``classes``: virtio device ids, as a bit mask. ``bus`` is None for VDUSE."""

    name: str
    bus: str | None
    classes: int


@dataclass(frozen=True, slots=True)
class VdpaDevice:
    """A vdpa device as the kernel lists it."""

    name: str
    mgmtdev: str
    device_id: int
    vendor_id: int
    max_vqs: int
    max_vq_size: int


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """Configuration of a vdpa block device as the kernel reads it; None where the gating feature is not offered.

    ``capacity`` in 512-byte sectors; ``features`` offered, ``negotiated`` (None before FEATURES_OK); the rest as in
    struct virtio_blk_config.
    """

    name: str
    features: int
    negotiated: int | None
    capacity: int | None
    block_size: int | None
    seg_max: int | None
    num_queues: int | None
    max_discard_sectors: int | None
    max_write_zeroes_sectors: int | None
    read_only: bool
    flush: bool


class Vdpa:
    """A socket of the family. One per thread. Raises VduseError everywhere; ENOENT: no such family here."""

    def __init__(self) -> None:
        self._socket = GenericNetlinkSocket(ext_ack=True)
        self._socket.module_err_level = "debug"  # we raise, the library need not shout
        try:
            self._socket.bind("vdpa", _Message)
        except NetlinkError as error:
            self._socket.close()
            raise VduseError("netlink", "family 'vdpa'", error.code) from error

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def mgmtdevs(self) -> list[MgmtDev]:
        """All management devices; VDUSE's is called "vduse"."""
        return [
            MgmtDev(
                name=m.get_attr("VDPA_ATTR_MGMTDEV_DEV_NAME"),
                bus=m.get_attr("VDPA_ATTR_MGMTDEV_BUS_NAME"),
                classes=m.get_attr("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES") or 0,
            )
            for m in self._request("MGMTDEV_GET", "all", _MGMTDEV_GET, dump=True)
        ]

    def dev_add(self, name: str, mgmtdev: str = "vduse") -> None:
        """DEV_NEW: attach. Blocks until the driver has probed; see the module's warning about what success means."""
        self._request("DEV_NEW", f"'{name}' on '{mgmtdev}'", _DEV_NEW, DEV_NAME=name, MGMTDEV_DEV_NAME=mgmtdev)

    def dev_del(self, name: str) -> None:
        """DEV_DEL: detach. Does not ask whether anybody uses what the driver made of it."""
        self._request("DEV_DEL", f"'{name}'", _DEV_DEL, DEV_NAME=name)

    def dev_list(self) -> list[VdpaDevice]:
        """All vdpa devices of the host."""
        return [self._device(m) for m in self._request("DEV_GET", "all", _DEV_GET, dump=True)]

    def dev_get(self, name: str) -> VdpaDevice:
        """One device. Raises VduseError(ENODEV)."""
        (message,) = self._request("DEV_GET", f"'{name}'", _DEV_GET, DEV_NAME=name)
        return self._device(message)

    def dev_config(self, name: str) -> BlockConfig:
        """What the kernel reads from a block device's configuration space (iproute2 6.1 shows nothing of it)."""
        (m,) = self._request("DEV_CONFIG_GET", f"'{name}'", _DEV_CONFIG_GET, DEV_NAME=name)
        return BlockConfig(
            name=m.get_attr("VDPA_ATTR_DEV_NAME"),
            features=m.get_attr("VDPA_ATTR_DEV_FEATURES") or 0,
            negotiated=m.get_attr("VDPA_ATTR_DEV_NEGOTIATED_FEATURES"),
            capacity=m.get_attr("VDPA_ATTR_DEV_BLK_CFG_CAPACITY"),
            block_size=m.get_attr("VDPA_ATTR_DEV_BLK_CFG_BLK_SIZE"),
            seg_max=m.get_attr("VDPA_ATTR_DEV_BLK_CFG_SEG_MAX"),
            num_queues=m.get_attr("VDPA_ATTR_DEV_BLK_CFG_NUM_QUEUES"),
            max_discard_sectors=m.get_attr("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEC"),
            max_write_zeroes_sectors=m.get_attr("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEC"),
            read_only=bool(m.get_attr("VDPA_ATTR_DEV_BLK_READ_ONLY")),
            flush=bool(m.get_attr("VDPA_ATTR_DEV_BLK_FLUSH")),
        )

    @staticmethod
    def _device(m: Any) -> VdpaDevice:
        return VdpaDevice(
            name=m.get_attr("VDPA_ATTR_DEV_NAME"),
            mgmtdev=m.get_attr("VDPA_ATTR_MGMTDEV_DEV_NAME"),
            device_id=m.get_attr("VDPA_ATTR_DEV_ID"),
            vendor_id=m.get_attr("VDPA_ATTR_DEV_VENDOR_ID"),
            max_vqs=m.get_attr("VDPA_ATTR_DEV_MAX_VQS"),
            max_vq_size=m.get_attr("VDPA_ATTR_DEV_MAX_VQ_SIZE"),
        )

    def _request(self, asked: str, of: str, command: int, *, dump: bool = False, **attributes: str) -> list[Any]:
        message = _Message()
        message["cmd"] = command
        message["version"] = _VERSION
        message["attrs"] = [(f"VDPA_ATTR_{key}", value) for key, value in attributes.items()]
        flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else NLM_F_ACK)
        try:
            replies = self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=flags)
            return [reply for reply in replies if isinstance(reply, _Message)]
        except NetlinkError as error:
            raise VduseError(asked, of, error.code, detail=_kernel_words(error)) from error


def _kernel_words(error: NetlinkError) -> str | None:
    """The extended acknowledgement, if the kernel sent one."""
    text = error.args[1] if len(error.args) > 1 else None
    return text if isinstance(text, str) and text != os.strerror(error.code) else None


def _lines(words: list[str]) -> Iterator[str]:
    with Vdpa() as vdpa:
        match words:
            case ["list"]:
                for device in vdpa.dev_list():
                    yield json.dumps(asdict(device))
            case ["add", name]:
                vdpa.dev_add(name)
            case ["del", name]:
                vdpa.dev_del(name)


def main(words: list[str]) -> int:
    """``list``: one JSON object per device and line."""
    if words[:1] not in (["list"], ["add"], ["del"]) or len(words) != (1 if words[0] == "list" else 2):
        print("usage: python -m pyvduse.vdpa list | add NAME | del NAME", file=sys.stderr)
        return 2
    try:
        for line in _lines(words):
            print(line)
    except VduseError as error:
        print(error, file=sys.stderr)
        return 5 if error.errno in (errno.EPERM, errno.EACCES) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
