"""``/dev/vduse/control``: API version, creating and destroying VDUSE devices."""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from typing import Any, Self

from pyvduse._uapi import ffi, lib
from pyvduse.errors import VduseError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,126}", re.ASCII)


def check_name(name: str) -> str:
    """Return a name that is safe as a device name, else raise ValueError.

    The kernel itself accepts almost anything, '..', '/' and 255 bytes of spaces included (and turns '/' into '!').
    """
    if _NAME.fullmatch(name) is None or name == "control":
        raise ValueError(
            f"{name!r} is no usable device name: 1 to 127 of letters, digits, '_', '.', '-', '@', not starting with one "
            "of the last three, and not 'control'"
        )
    return name


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """A device to create. ``config``: the configuration space, at most a page; ``features``: device features, of which
    ACCESS_PLATFORM (bit 33) is mandatory; ``vq_num``: virtqueues, each to be set up (``Device.vq_setup``) before attaching;
    ``vq_align``: bytes, for the used area of split rings; ``ngroups`` and ``nas``: version 1 only, then at least 1."""

    name: str
    device_id: int
    features: int
    config: bytes
    vq_num: int
    vendor_id: int = 0
    vq_align: int = 4096
    ngroups: int = 0
    nas: int = 0


class Control:
    """An open control node. The API version belongs to this descriptor, and to each device created through it.

    Devices it creates outlive it. Not for use by several threads at once.
    """

    def __init__(self, fd: int, api_version: int) -> None:
        self._fd = fd
        self._api_version = api_version

    @classmethod
    def open(cls, path: str = "/dev/vduse/control", api_version: int = 0) -> Self:
        """Open, and say which version is meant.

        The version is always set: only asking for it (VDUSE_GET_API_VERSION) would silently switch the
        descriptor to the newest one, under which a version 0 CREATE fails (vduse_dev.c, vduse_ioctl).
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise VduseError("open", path, error.errno or 0) from error
        self = cls(fd, api_version)
        try:
            version = ffi.new("uint64_t *", api_version)
            self._ioctl("SET_API_VERSION", f"{path} to {api_version}", lib.VDUSE_SET_API_VERSION, version)
        except BaseException:
            os.close(fd)
            raise
        return self

    @property
    def api_version(self) -> int:
        """The version devices are created with."""
        return self._api_version

    def create(self, config: DeviceConfig) -> None:
        """VDUSE_CREATE_DEV. Raises VduseError (EEXIST: the name is taken), ValueError for an unusable name."""
        check_name(config.name)
        size = ffi.sizeof("struct vduse_dev_config") + len(config.config)
        buffer = bytearray(size)  # the whole argument is longer than the size the request code says
        c: Any = ffi.cast("struct vduse_dev_config *", ffi.from_buffer(buffer))
        c.name = config.name.encode("ascii")
        c.vendor_id, c.device_id, c.features = config.vendor_id, config.device_id, config.features
        c.vq_num, c.vq_align = config.vq_num, config.vq_align
        c.ngroups, c.nas = config.ngroups, config.nas
        c.config_size = len(config.config)
        buffer[lib.VDUSE_CONFIG_OFFSET :] = config.config
        self._ioctl("CREATE_DEV", f"device '{config.name}'", lib.VDUSE_CREATE_DEV, buffer)

    def destroy(self, name: str) -> None:
        """VDUSE_DESTROY_DEV. Raises VduseError (EBUSY: attached, or its node is open)."""
        buffer = bytearray(check_name(name).encode("ascii").ljust(lib.VDUSE_NAME_MAX, b"\0"))
        self._ioctl("DESTROY_DEV", f"device '{name}'", lib.VDUSE_DESTROY_DEV, buffer)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ioctl(self, asked: str, of: str, request: int, argument: Any) -> None:
        data = argument if isinstance(argument, bytearray) else bytearray(ffi.buffer(argument))
        try:
            fcntl.ioctl(self._fd, request, data)
        except OSError as error:
            raise VduseError(asked, of, error.errno or 0) from error
