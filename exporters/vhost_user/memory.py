"""The memory a front-end shares: what of it is mapped, and where its own addresses lead.

  * Addresses of rings are the front-end's user addresses, those in descriptors are guest addresses. Queues know guest
    addresses only.
  * Memory that is removed is unmapped, and only then acknowledged, when nothing in flight can touch it (IovaMap.change).

Owner: the thread of ``server``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vduse_blk.exporters.vhost_user.messages import MemoryRegion, Refused

from vduse_blk.queue import FdRange, IovaMap, Region

MAX_MEM_SLOTS = 509
"""Regions at a time; what the kernel's vhost accepts."""
_READ_WRITE = 3


@dataclass(frozen=True, slots=True)
class _Shared:
    """A region as the front-end described it, which file it is (``fd`` leads there), and where it is mapped."""

    wire: MemoryRegion
    file: tuple[int, int]
    fd: int
    mapped: Region


class FrontendMemory:
    """The regions it shares; ``iova`` has them under their guest addresses. ``add``, ``remove`` and ``replace`` copy the
    descriptors they keep, and raise Refused with nothing changed."""

    def __init__(self) -> None:
        self.iova = IovaMap()
        self._shared: list[_Shared] = []

    def replace(self, wanted: list[tuple[MemoryRegion, int]]) -> None:
        """Make the memory what the table says. What stays the same stays mapped: queues do not notice."""
        known = {(shared.wire, shared.file): shared for shared in self._shared}
        kept: list[_Shared] = []
        added: list[tuple[MemoryRegion, int]] = []
        for region, fd in wanted:
            shared = known.pop((region, _file(fd)), None)
            if shared is not None:
                kept.append(shared)
            else:
                added.append((region, fd))
        self._change(kept, added, list(known.values()))

    def add(self, region: MemoryRegion, fd: int) -> None:
        """A region more."""
        if len(self._shared) >= MAX_MEM_SLOTS:
            raise Refused(f"more than {MAX_MEM_SLOTS} regions")
        self._change(self._shared, [(region, fd)], [])

    def remove(self, region: MemoryRegion) -> None:
        """Returns when nothing in flight can touch it and it is unmapped."""
        for shared in self._shared:
            wire = shared.wire
            if (wire.guest, wire.user, wire.size) == (region.guest, region.user, region.size):
                self._change([other for other in self._shared if other is not shared], [], [shared])
                return
        raise Refused(f"there is no region of {region.size:#x} bytes at {region.guest:#x}")

    def _change(self, kept: list[_Shared], added: list[tuple[MemoryRegion, int]], removed: list[_Shared]) -> None:
        """Raises Refused, with nothing changed."""
        users = [shared.wire for shared in kept]
        for region, _ in added:
            if any(region.user < other.user + other.size and other.user < region.user + region.size for other in users):
                raise Refused(f"the region at user address {region.user:#x} overlaps another")
            users.append(region)
        ranges = [
            FdRange(fd, region.guest, region.guest + region.size - 1, region.offset, _READ_WRITE)
            for region, fd in added
        ]
        own: list[int] = []
        try:
            own += (os.dup(fd) for _, fd in added)
            mapped = self.iova.change(add=ranges, remove=[shared.mapped for shared in removed])
        except OSError as error:
            for fd in own:
                os.close(fd)
            raise Refused(f"memory cannot be mapped: {error}") from error
        for shared in removed:
            os.close(shared.fd)
        self._shared = kept + [
            _Shared(region, _file(fd), fd, place) for (region, _), fd, place in zip(added, own, mapped, strict=True)
        ]

    def guest_address(self, user: int) -> int | None:
        """Of the front-end's address ``user``; None: it is in no region."""
        for shared in self._shared:
            if 0 <= user - shared.wire.user < shared.wire.size:
                return user - shared.wire.user + shared.wire.guest
        return None

    def regions(self) -> list[tuple[MemoryRegion, int]]:
        """As ``replace`` takes them; the descriptors stay this object's."""
        return [(shared.wire, shared.fd) for shared in self._shared]

    def close(self) -> None:
        """Unmap, and close every descriptor. No queue runs."""
        self.iova.close()
        for shared in self._shared:
            os.close(shared.fd)
        self._shared.clear()


def _file(fd: int) -> tuple[int, int]:
    """Which file a descriptor leads to."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
