"""The memory in which requests in flight outlive this process: made by us, kept by the front-end, given to the next server.

One crash log per queue, each on cache lines of its own, and behind them a page of ours: what else a server must know of its
predecessor. The logs have the specification's layout; where each begins is up to whoever made the area.
"""

from __future__ import annotations

import fcntl
import os
import struct

from vduse_blk.queue import SharedArea, inflight_log_bytes

_LINE = 64
_TRAILER = struct.Struct("<8sB")
_MAGIC = b"vduseblk"
_TRAILER_BYTES = 64


def _stride(queue_size: int) -> int:
    return (inflight_log_bytes(queue_size) + _LINE - 1) // _LINE * _LINE


def area_bytes(num_queues: int, queue_size: int) -> int:
    """Size of the area for ``num_queues`` queues of at most ``queue_size`` entries."""
    return num_queues * _stride(queue_size) + _TRAILER_BYTES


def create_area(num_queues: int, queue_size: int) -> int:
    """A descriptor of a fresh area: a file that nobody can cut short."""
    fd = os.memfd_create("vhost-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, area_bytes(num_queues, queue_size))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class InflightArea:
    """An area that is in use. ``fd`` may be closed afterwards. Raises OSError, ValueError if it is too small."""

    def __init__(self, fd: int, *, size: int, offset: int, num_queues: int, queue_size: int) -> None:
        if num_queues * _stride(queue_size) > size or offset + size > os.fstat(fd).st_size:
            raise ValueError(f"{size} bytes for {num_queues} queues of {queue_size} entries")
        self._num_queues, self._queue_size = num_queues, queue_size
        self._area = SharedArea(fd, offset, size)
        self._trailer = num_queues * _stride(queue_size)
        self._has_trailer = size >= area_bytes(num_queues, queue_size)

    def address(self, index: int, num: int) -> int:
        """Of the crash log of queue ``index`` with ``num`` entries; 0: there is none for it."""
        if index >= self._num_queues or num > self._queue_size:
            return 0
        return self._area.address(index * _stride(self._queue_size))

    @property
    def writeback(self) -> bool:
        """The cache mode a predecessor has left, write-back if there was none."""
        if not self._has_trailer:
            return True
        magic, writethrough = _TRAILER.unpack_from(self._area.view, self._trailer)
        return magic != _MAGIC or not writethrough

    @writeback.setter
    def writeback(self, on: bool) -> None:
        if self._has_trailer:
            _TRAILER.pack_into(self._area.view, self._trailer, _MAGIC, not on)

    def close(self) -> None:
        """Only when no queue uses it."""
        self._area.close()
