"""The file that tells a successor what a dead server had in flight: one log per queue, as ``core/inflight.c`` keeps it.

    bytes 0-31   magic, layout version, number of queues, entries per queue, all little-endian
    then         per queue ``inflight_log_bytes(entries)`` bytes, each on a cache line of its own

It lies in the disk's private directory, in memory (/run), is mapped shared, and is written by the queue threads.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
from pathlib import Path

from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.base import inflight_log_bytes

_MAGIC = b"vdusblk1"
_HEADER = struct.Struct("<8sIII12x")
_VERSION = 1
_LINE = 64
assert _HEADER.size == 32


def _layout(queues: int, entries: int) -> tuple[int, int]:
    """Bytes per queue, bytes of the file."""
    step = (inflight_log_bytes(entries) + _LINE - 1) // _LINE * _LINE
    return step, _LINE + queues * step


class InflightLog:
    """The mapped file. ``queues`` logs for rings of up to ``entries`` entries. Close it after every queue has stopped."""

    def __init__(self, fd: int, queues: int, entries: int) -> None:
        """Takes the mapping, not the descriptor."""
        self.queues = queues
        self.entries = entries
        self._step, size = _layout(queues, entries)
        self._memory = mmap.mmap(fd, size)
        self._view = ffi.from_buffer(self._memory)
        self._base = int(ffi.cast("uintptr_t", self._view))

    @classmethod
    def create(cls, path: Path, queues: int, entries: int) -> InflightLog:
        """A new, empty log in the place of any old one. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # Reserved now: a queue thread that finds /run full would take a SIGBUS.
            os.posix_fallocate(fd, 0, _layout(queues, entries)[1])
            os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, queues, entries), 0)
            return cls(fd, queues, entries)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path) -> InflightLog:
        """The log a dead server left. Raises OSError; EINVAL with a sentence for what is damaged or not ours."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                raise OSError(errno.EINVAL, f"{path} is not a private file of this user")
            header = os.pread(fd, _HEADER.size, 0)
            if len(header) < _HEADER.size:
                raise OSError(errno.EINVAL, f"{path} is cut short")
            magic, version, queues, entries = _HEADER.unpack(header)
            if magic != _MAGIC or version != _VERSION:
                raise OSError(errno.EINVAL, f"{path} is not an in-flight log of this version")
            sane = 1 <= queues <= 64 and 2 <= entries <= lib.VRING_NUM_MAX and entries & (entries - 1) == 0
            if not sane or facts.st_size != _layout(queues, entries)[1]:
                raise OSError(errno.EINVAL, f"{path} is damaged")
            return cls(fd, queues, entries)
        finally:
            os.close(fd)

    def address(self, index: int, num: int) -> int:
        """Where the log of queue ``index`` with ``num`` entries is; 0 if there is none for it."""
        if index >= self.queues or num > self.entries:
            return 0
        return self._base + _LINE + index * self._step

    def forget(self, index: int) -> None:
        """Queue ``index`` begins anew: nothing is in flight."""
        at = _LINE + index * self._step
        self._memory[at : at + self._step] = bytes(self._step)

    def close(self) -> None:
        """No queue may use it any more."""
        ffi.release(self._view)
        self._memory.close()
