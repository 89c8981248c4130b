"""The bounce area in memory of ours (the kernel's word: UMEM) instead of in the kernel's.

All data of a VDUSE disk passes through the bounce area: the driver's side copies it there and back. The kernel's own pages
of it come into being one by one, and are touched through a mapping in which the others are holes. Ours are all there, and
stay where they are, so that whoever does I/O with them may register them once instead of having them pinned per request.

Owner: the device's message thread. Rules, from the kernel's drivers/vdpa/vdpa_user/vduse_dev.c and iova_domain.c:
  * The area exists from the driver's first request to its reset: nothing can be registered before a queue misses it. It is
    registered whole.
  * What requests in flight have in it is copied when memory is registered and when it is given back. What a queue writes to
    the pages that were left is lost. So both happen only while no queue has the area in its table.
  * While memory is registered the kernel's pages cannot be touched. The registration ends with the last descriptor of the
    device node, which a server may share with one that died while it took over: what somebody left goes first.
  * The pages count against RLIMIT_MEMLOCK, of root, too.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import resource

from pyvduse.device import Device, IovaInfo
from pyvduse.errors import VduseError

log = logging.getLogger("vduse_blk.disk")


class BounceMemory:
    """Memory of this process that is the bounce area ``area`` of ``device``. ``host`` is its address."""

    def __init__(self, device: Device, area: IovaInfo) -> None:
        """Raises OSError; then the area is in the kernel's memory."""
        self._device = device
        self.area = area
        self.size = area.last - area.start + 1
        self._give_back()
        # Shared: what forks and executes must not leave copies of pages that the kernel writes to.
        self._memory = mmap.mmap(-1, self.size)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        try:
            self._memory.madvise(mmap.MADV_DONTDUMP)  # users' data
            _raise_memlock_limit()
            device.register_umem(area.start, self.size, self.host)
        except BaseException:
            self._memory.close()
            raise

    def close(self) -> None:
        """The area is in the kernel's memory again. No queue has it in its table."""
        self._give_back()
        self._memory.close()  # the kernel holds the pages themselves for as long as it uses them

    def _give_back(self) -> None:
        try:
            self._device.deregister_umem(self.area.start, self.size)
        except VduseError as error:
            if error.errno != errno.ENOENT:
                log.debug("%s: %s", self._device.name, error)  # a broken device refuses everything


def _raise_memlock_limit() -> None:
    """As far as it goes: registered buffers of io_uring count once more, and those of rings that were closed for a while."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):  # without CAP_SYS_RESOURCE
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
