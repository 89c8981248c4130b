"""``/dev/vduse/NAME``: one VDUSE device, from its server's side."""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyvduse._uapi import ffi, lib
from pyvduse.control import check_name
from pyvduse.errors import VduseError
from pyvduse.messages import REQUEST_SIZE, PackedState


@dataclass(frozen=True, slots=True)
class VqInfo:
    """VDUSE_VQ_GET_INFO. ``num`` entries; addresses are IOVAs; ``ready``: the driver uses the queue.

    ``avail_index`` (split) and ``packed`` are where the driver *started* the queue: the kernel does not follow progress.
    """

    index: int
    num: int
    desc_addr: int
    driver_addr: int
    device_addr: int
    avail_index: int
    packed: PackedState
    ready: bool


@dataclass(frozen=True, slots=True)
class IotlbRegion:
    """IOVA ``start`` to ``last`` inclusive lies at ``offset`` of file ``fd``; ``perm`` is VDUSE_ACCESS_*.

    ``fd`` is a new descriptor of the caller's, close-on-exec; close it once mapped.
    """

    fd: int
    offset: int
    start: int
    last: int
    perm: int


@dataclass(frozen=True, slots=True)
class IovaInfo:
    """VDUSE_IOTLB_GET_INFO: a region, and whether user memory can be registered for it (``umem``)."""

    start: int
    last: int
    umem: bool


class Device:
    """An open device node: exclusive, so there is one server. ioctls may be called from any thread; reading messages and
    answering them belongs to one thread, which must never wait for netlink or storage (see docs/pyvduse.md)."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd
        self._sysfs = Path("/sys/class/vduse", name)

    @classmethod
    def open(cls, name: str, dev_dir: str = "/dev/vduse") -> Self:
        """Open for serving: not blocking (a blocking read never returns once the kernel has given the device up) and
        close-on-exec (a child that inherits the descriptor keeps the device busy). Raises VduseError (EBUSY: somebody
        serves it)."""
        path = f"{dev_dir}/{check_name(name)}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise VduseError("open", path, error.errno or 0) from error
        return cls(name, fd)

    @classmethod
    def from_fd(cls, name: str, fd: int) -> Self:
        """Take over a descriptor that was passed in: it carries no credential checks, so a server needs no privilege."""
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        return cls(name, fd)

    def close(self) -> None:
        """Idempotent. Registered user memory is given back by this; unanswered messages go to the next server."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- messages

    def read_message(self) -> bytes | None:
        """One request, or None if there is none (also once the device is broken: poll for POLLERR)."""
        try:
            return os.read(self.fd, REQUEST_SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise VduseError("read of a request", self._me, error.errno or 0) from error

    def write_response(self, response: bytes) -> bool:
        """Answer. False: nobody waits any more (the asker was killed, or the time was up), which is harmless."""
        try:
            os.write(self.fd, response)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise VduseError("write of a response", self._me, error.errno or 0) from error
        return True

    def is_broken(self) -> bool:
        """Whether the kernel has given the device up for good: a message was not answered within ``msg_timeout``."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    # ------------------------------------------------------------------------------------------- device and queues

    def features(self) -> int:
        """Driver features; 0 before the driver has chosen and after a reset."""
        data = ffi.new("uint64_t *")
        self._ioctl("DEV_GET_FEATURES", self._me, lib.VDUSE_DEV_GET_FEATURES, data)
        return int(data[0])

    def set_config(self, offset: int, data: bytes) -> None:
        """Overwrite part of the configuration space. Not atomic to a driver that reads meanwhile."""
        c = ffi.new("struct vduse_config_data *", {"buffer": len(data)})
        c.offset, c.length = offset, len(data)
        ffi.memmove(c.buffer, data, len(data))
        buffer = bytearray(ffi.buffer(c, ffi.sizeof("struct vduse_config_data") + len(data)))
        of = f"{self._me}, {len(data)} bytes at {offset}"
        self._ioctl("DEV_SET_CONFIG", of, lib.VDUSE_DEV_SET_CONFIG, buffer)

    def inject_config_irq(self) -> None:
        """Tell the driver to read the configuration space again."""
        self._ioctl("DEV_INJECT_CONFIG_IRQ", self._me, lib.VDUSE_DEV_INJECT_CONFIG_IRQ, None)

    def vq_setup(self, index: int, max_size: int, group: int = 0) -> None:
        """Announce a virtqueue of at most ``max_size`` entries, which the kernel does not check: use a power of two."""
        c = ffi.new("struct vduse_vq_config *")
        c.index, c.max_size, c.group = index, max_size, group
        self._ioctl("VQ_SETUP", self._queue(index), lib.VDUSE_VQ_SETUP, c)

    def vq_info(self, index: int) -> VqInfo:
        """What the driver made of a virtqueue; complete at DRIVER_OK."""
        c = ffi.new("struct vduse_vq_info *")
        c.index = index
        self._ioctl("VQ_GET_INFO", self._queue(index), lib.VDUSE_VQ_GET_INFO, c)
        packed = c.packed
        return VqInfo(
            index=index,
            num=int(c.num),
            desc_addr=int(c.desc_addr),
            driver_addr=int(c.driver_addr),
            device_addr=int(c.device_addr),
            avail_index=int(c.split.avail_index),
            packed=PackedState(
                int(packed.last_avail_counter),
                int(packed.last_avail_idx),
                int(packed.last_used_counter),
                int(packed.last_used_idx),
            ),
            ready=bool(c.ready),
        )

    def set_kickfd(self, index: int, fd: int | None) -> None:
        """The eventfd the driver's kicks arrive on; None takes it away. A reset takes it away, too."""
        if fd is not None and fd < 0:
            raise ValueError(f"kick descriptor {fd}: not a descriptor (the kernel would ignore it silently)")
        c = ffi.new("struct vduse_vq_eventfd *")
        c.index, c.fd = index, -1 if fd is None else fd
        self._ioctl("VQ_SETUP_KICKFD", self._queue(index), lib.VDUSE_VQ_SETUP_KICKFD, c)

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for a virtqueue. Returns at once; pending interrupts coalesce."""
        data = ffi.new("uint32_t *", index)
        self._ioctl("VQ_INJECT_IRQ", self._queue(index), lib.VDUSE_VQ_INJECT_IRQ, data)

    def vq_count(self) -> int:
        """Virtqueues of the device (from sysfs: no ioctl tells)."""
        return len([entry for entry in self._sysfs.iterdir() if entry.name[:2] == "vq" and entry.name[2:].isdigit()])

    # ---------------------------------------------------------------------------------------------------- memory

    def iotlb_fd(self, start: int, last: int) -> IotlbRegion | None:
        """The first region that overlaps IOVA [start, last], or None if nothing is mapped there."""
        c = ffi.new("struct vduse_iotlb_entry *")
        c.start, c.last = start, last
        try:
            fd = self._ioctl("IOTLB_GET_FD", self._range(start, last), lib.VDUSE_IOTLB_GET_FD, c)
        except VduseError as error:
            if error.errno == errno.EINVAL:
                return None
            raise
        os.set_inheritable(fd, False)  # the kernel hands it out inheritable
        return IotlbRegion(fd, int(c.offset), int(c.start), int(c.last), int(c.perm))

    def iotlb_fd2(self, start: int, last: int, asid: int) -> IotlbRegion | None:
        """The same in address space ``asid``, for devices of API version 1 (VDUSE_IOTLB_GET_FD2)."""
        c = ffi.new("struct vduse_iotlb_entry_v2 *")
        c.start, c.last, c.asid = start, last, asid
        try:
            fd = self._ioctl("IOTLB_GET_FD2", self._range(start, last), lib.VDUSE_IOTLB_GET_FD2, c)
        except VduseError as error:
            if error.errno == errno.EINVAL:
                return None
            raise
        os.set_inheritable(fd, False)
        return IotlbRegion(fd, int(c.offset), int(c.start), int(c.last), int(c.perm))

    def iotlb_info(self, start: int, last: int, asid: int = 0) -> IovaInfo | None:
        """The first region that overlaps IOVA [start, last], or None."""
        c = ffi.new("struct vduse_iova_info *")
        c.start, c.last, c.asid = start, last, asid
        try:
            self._ioctl("IOTLB_GET_INFO", self._range(start, last), lib.VDUSE_IOTLB_GET_INFO, c)
        except VduseError as error:
            if error.errno == errno.EINVAL:
                return None
            raise
        return IovaInfo(int(c.start), int(c.last), bool(c.capability & lib.VDUSE_IOVA_CAP_UMEM))

    def register_umem(self, iova: int, size: int, uaddr: int, asid: int = 0) -> None:
        """Let memory of this process at ``uaddr`` replace the kernel's bounce pages. Possible from the first request on, for
        the whole bounce area only; the pages are pinned and count against RLIMIT_MEMLOCK."""
        self._umem("IOTLB_REG_UMEM", lib.VDUSE_IOTLB_REG_UMEM, iova, size, uaddr, asid)

    def deregister_umem(self, iova: int, size: int, asid: int = 0) -> None:
        """Give the bounce area back to the kernel; what is in flight is copied."""
        self._umem("IOTLB_DEREG_UMEM", lib.VDUSE_IOTLB_DEREG_UMEM, iova, size, 0, asid)

    def _umem(self, asked: str, request: int, iova: int, size: int, uaddr: int, asid: int) -> None:
        c = ffi.new("struct vduse_iova_umem *")
        c.iova, c.size, c.uaddr, c.asid = iova, size, uaddr, asid
        self._ioctl(asked, f"{self._me}, {size} bytes at IOVA {iova:#x}", request, c)

    # ----------------------------------------------------------------------------------------------------- sysfs

    @property
    def msg_timeout(self) -> int:
        """Seconds the kernel waits for an answer before it gives the device up; 0 = for ever. Holds for later messages."""
        return int(self._read("msg_timeout"))

    @msg_timeout.setter
    def msg_timeout(self, seconds: int) -> None:
        self._write("msg_timeout", str(seconds))

    @property
    def bounce_size(self) -> int:
        """Bytes of bounce buffer. Settable only before the first attach, from 1 MiB to 1 GiB."""
        return int(self._read("bounce_size"))

    @bounce_size.setter
    def bounce_size(self, size: int) -> None:
        self._write("bounce_size", str(size))

    def irq_affinity(self, index: int) -> set[int]:
        """CPUs that may run a virtqueue's interrupt callback; the kernel takes them in turn."""
        mask = int(self._read(f"vq{index}/irq_cb_affinity").replace(",", ""), 16)
        return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}

    def set_irq_affinity(self, index: int, cpus: Iterable[int]) -> None:
        """The driver overwrites this at every attach when it has several queues: set it after."""
        mask = f"{sum(1 << cpu for cpu in cpus):x}"
        groups = [mask[max(0, end - 8) : end] for end in range(len(mask), 0, -8)]
        self._write(f"vq{index}/irq_cb_affinity", ",".join(reversed(groups)))

    def _read(self, attribute: str) -> str:
        try:
            return (self._sysfs / attribute).read_text(encoding="ascii").strip()
        except OSError as error:
            raise VduseError(attribute.rsplit("/", 1)[-1], self._me, error.errno or 0) from error

    def _write(self, attribute: str, value: str) -> None:
        try:
            (self._sysfs / attribute).write_text(value, encoding="ascii")
        except OSError as error:
            of = f"{self._me} (to {value})"
            raise VduseError(attribute.rsplit("/", 1)[-1], of, error.errno or 0) from error

    # --------------------------------------------------------------------------------------------------- plumbing

    @property
    def _me(self) -> str:
        return f"device '{self.name}'"

    def _queue(self, index: int) -> str:
        return f"{self._me}, queue {index}"

    def _range(self, start: int, last: int) -> str:
        return f"{self._me}, IOVA {start:#x}-{last:#x}"

    def _ioctl(self, asked: str, of: str, request: int, argument: Any) -> int:
        """``argument``: None, a bytearray, or cdata whose memory is read and written back."""
        try:
            if argument is None:
                return int(fcntl.ioctl(self.fd, request))
            if isinstance(argument, bytearray):
                return int(fcntl.ioctl(self.fd, request, argument))
            data = bytearray(ffi.buffer(argument))
            result = int(fcntl.ioctl(self.fd, request, data))
            ffi.memmove(argument, data, len(data))
            return result
        except OSError as error:
            raise VduseError(asked, of, error.errno or 0) from error
