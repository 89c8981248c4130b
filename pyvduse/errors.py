"""The one exception of this package: what was asked, of what, what the kernel said, and what usually causes it."""

from __future__ import annotations

import errno
import os

_BROKEN = (
    "the kernel has given the device up, because a control message was not answered within msg_timeout; "
    "delete the vdpa device, close the node, destroy and create anew"
)

_CAUSES: dict[tuple[str, int], str] = {
    ("open", errno.ENOENT): "the module 'vduse' is not loaded, or there is no such device",
    ("open", errno.EBUSY): "another process has the node open (it is exclusive; a forked child may have inherited it)",
    ("open", errno.EACCES): "the nodes belong to root (0600)",
    ("SET_API_VERSION", errno.EINVAL): "this kernel does not know that version",
    ("CREATE_DEV", errno.EEXIST): "a VDUSE device of that name exists",
    ("CREATE_DEV", errno.EINVAL): (
        "the kernel does not allow this device id, a feature is forbidden (for block CONFIG_WCE) or missing "
        "(ACCESS_PLATFORM is mandatory), vq_align is not a power of two from 4 to a page, or ngroups and nas do not "
        "fit the API version"
    ),
    ("CREATE_DEV", errno.EPERM): "this class of device needs CAP_NET_ADMIN",
    ("DESTROY_DEV", errno.EBUSY): "its vdpa device still exists, or its node is open in some process",
    ("DESTROY_DEV", errno.EINVAL): "there is no VDUSE device of that name",
    ("VQ_SETUP", errno.EINVAL): "no such virtqueue, a group that does not exist, or (version 1) the driver is running",
    ("VQ_GET_INFO", errno.EINVAL): "no such virtqueue",
    ("VQ_SETUP_KICKFD", errno.EINVAL): "no such virtqueue, or the descriptor is not an eventfd",
    ("VQ_SETUP_KICKFD", errno.EBADF): "the descriptor is not open",
    ("VQ_INJECT_IRQ", errno.EINVAL): "no such virtqueue, or the driver has not reached DRIVER_OK",
    ("DEV_INJECT_CONFIG_IRQ", errno.EINVAL): "the driver has not reached DRIVER_OK",
    ("DEV_SET_CONFIG", errno.EINVAL): "the range is empty or reaches beyond the configuration space",
    ("IOTLB_GET_FD", errno.EINVAL): "nothing is mapped in that range",
    ("IOTLB_GET_INFO", errno.EINVAL): "nothing is mapped in that range, or the device was never attached",
    ("IOTLB_GET_INFO", errno.ENOTTY): "Linux before 6.0 does not have it",
    ("IOTLB_REG_UMEM", errno.EINVAL): (
        "the memory must cover exactly the bounce area (IOVA 0, bounce_size bytes, page-aligned), which exists only "
        "once the driver has sent a request"
    ),
    ("IOTLB_REG_UMEM", errno.EEXIST): "memory is registered already",
    ("IOTLB_REG_UMEM", errno.ENOMEM): "RLIMIT_MEMLOCK is too small (it holds for root, too)",
    ("IOTLB_REG_UMEM", errno.EFAULT): "the address is not mapped",
    ("IOTLB_DEREG_UMEM", errno.ENOENT): "no memory is registered",
    ("IOTLB_DEREG_UMEM", errno.EINVAL): "the range is not the one that was registered",
    ("write of a response", errno.EINVAL): "reserved fields must be zero",
    ("bounce_size", errno.EPERM): "it can be set only before the device is attached for the first time",
    ("bounce_size", errno.EINVAL): "accepted are 1 MiB to 1 GiB",
    ("irq_cb_affinity", errno.EINVAL): "none of these CPUs is online",
    ("irq_cb_affinity", errno.EOVERFLOW): "there is no such CPU",
    ("DEV_NEW", errno.EINVAL): "there is no VDUSE device of that name, or one of its virtqueues was never set up",
    ("DEV_NEW", errno.EEXIST): "a vdpa device of that name exists",
    ("DEV_NEW", errno.ENODEV): "there is no such management device; is the module 'vduse' loaded?",
    ("DEV_NEW", errno.EPERM): "CAP_NET_ADMIN in the initial user namespace is needed",
    ("DEV_DEL", errno.EPERM): "CAP_NET_ADMIN in the initial user namespace is needed",
    ("DEV_DEL", errno.ENODEV): "there is no vdpa device of that name",
    ("DEV_GET", errno.ENODEV): "there is no vdpa device of that name",
    ("DEV_CONFIG_GET", errno.ENODEV): "there is no vdpa device of that name",
    ("netlink", errno.ENOENT): (
        "the family 'vdpa' is not there: the module 'vdpa' is not loaded, or this is not the initial network namespace"
    ),
}

_ON_DEVICE_NODE = ("VQ_", "DEV_GET_FEATURES", "DEV_SET_CONFIG", "DEV_INJECT", "IOTLB_")


class VduseError(OSError):
    """``asked``: the operation ("VQ_SETUP"); ``of``: its object ("device 'a', queue 1"); ``detail``: the kernel's own words.

    ``errno`` is the kernel's.
    """

    def __init__(self, asked: str, of: str, error: int, *, detail: str | None = None) -> None:
        super().__init__(error, os.strerror(error))
        self.asked = asked
        self.of = of
        self.detail = detail

    @property
    def cause(self) -> str | None:
        """What usually causes this, if that is known."""
        if self.errno == errno.EPERM and self.asked.startswith(_ON_DEVICE_NODE):
            return _BROKEN
        return _CAUSES.get((self.asked, self.errno or 0))

    def __str__(self) -> str:
        parts = [f"{self.asked} of {self.of}: {self.strerror}"]
        if self.detail:
            parts.append(f" ({self.detail})")
        if self.cause:
            parts.append(f"; {self.cause}")
        return "".join(parts)
