"""System calls that the standard library of Python 3.11 lacks, through the C library."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from typing import Final, NamedTuple

KEEP_SIZE: Final = 1  # linux/falloc.h
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_PIDFD_THREAD: Final = os.O_EXCL  # linux/pidfd.h, since 6.9
_SYS_PIDFD_OPEN: Final = 434  # the numbers are the same on every architecture but alpha
_SYS_PIDFD_GETFD: Final = 438
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_TYPE: Final = 1
_STATX_INO: Final = 0x100
_STATX_DIOALIGN: Final = 0x2000  # answered since Linux 6.1
_STATX: Final = struct.Struct("=I24xHxxQ88xIIIIQII96x")  # struct statx of linux/stat.h
assert _STATX.size == 256


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.syscall.restype = ctypes.c_long
    libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    return libc


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Any thread; other threads run meanwhile. Raises OSError."""
    while _libc().fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def munlock(address: int, length: int) -> None:
    """munlock(2): pages of this range may be swapped out and given back again. Raises OSError."""
    if _libc().munlock(address, length) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def take_descriptor(task: int, number: int) -> int:
    """A duplicate, of the same open file, of descriptor ``number`` of process or thread ``task``; close-on-exec.

    The task need not cooperate: it may be stopped, or killed and waiting in the kernel, where its files stay open. For a
    thread that is not its process's first, Linux 6.9. Raises OSError: EPERM without the right to trace it; ESRCH and EBADF
    if it or the descriptor is gone; EINVAL for a thread before 6.9.
    """
    libc = _libc()
    pidfd = -1
    for flags in (_PIDFD_THREAD, 0):  # a kernel that does not know the flag says EINVAL
        pidfd = libc.syscall(_SYS_PIDFD_OPEN, ctypes.c_int(task), ctypes.c_uint(flags))
        if pidfd >= 0 or ctypes.get_errno() != errno.EINVAL:
            break
    if pidfd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    try:
        taken = libc.syscall(_SYS_PIDFD_GETFD, ctypes.c_int(pidfd), ctypes.c_int(number), ctypes.c_uint(0))
        if taken < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return int(taken)
    finally:
        os.close(pidfd)


class Statx(NamedTuple):
    """``dio_align``: what offset and length of direct I/O must be multiples of; 0: the kernel does not say."""

    mode: int
    ino: int
    rdev: int
    dev: int
    dio_align: int


def statx(where: str | int) -> Statx:
    """statx(2) of a path (followed) or descriptor, from what the kernel knows without asking a server.

    Unlike ``os.stat`` it cannot hang on a dead network file system. Raises OSError.
    """
    fd, path = (where, b"") if isinstance(where, int) else (_AT_FDCWD, os.fsencode(where))
    flags = _AT_STATX_DONT_SYNC | (_AT_EMPTY_PATH if not path else 0)
    buffer = ctypes.create_string_buffer(_STATX.size)
    if _libc().statx(fd, path, flags, _STATX_TYPE | _STATX_INO | _STATX_DIOALIGN, buffer) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), where)
    mask, mode, ino, rdev_major, rdev_minor, dev_major, dev_minor, _mount, _memory, offset = _STATX.unpack(buffer.raw)
    return Statx(
        mode=mode,
        ino=ino,
        rdev=os.makedev(rdev_major, rdev_minor),
        dev=os.makedev(dev_major, dev_minor),
        dio_align=offset if mask & _STATX_DIOALIGN else 0,
    )
