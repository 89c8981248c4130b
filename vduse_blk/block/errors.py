"""What goes wrong, and what the driver or the user is told about it."""

from __future__ import annotations

import errno
from enum import Enum
from typing import Final


class UserError(Exception):
    """Something the user asked for cannot be: one sentence with the key and the accepted values or the remedy.

    ``exit_code`` is the command's exit status: 2 bad input, 3 no such disk, 4 busy, 5 not permitted, 6 the host
    cannot do it, 7 timed out, 1 anything else. Never a bug: bugs keep their tracebacks.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PermanentError(OSError):
    """No repetition can mend it, whatever its errno usually means: data is lost already, or a program is wrong."""


TEMPORARY: Final = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.EINTR,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EBUSY,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOLINK,
        errno.EREMOTEIO,
        errno.ETIMEDOUT,
        errno.ESTALE,
        errno.ESHUTDOWN,
        errno.EPIPE,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
    }
)
"""What storage that is away for a while says; it may be back. Not so: EINVAL, EBADF, EROFS, EFBIG, EOPNOTSUPP and others
that are about the request itself."""

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""No room, until somebody makes some."""


class Status(Enum):
    """How a request ended, by the names virtio-blk has for it (virtio 1.3, 5.2.6)."""

    OK = "OK"
    IOERR = "IOERR"
    UNSUPP = "UNSUPP"


_STATUS: Final = {
    errno.EOPNOTSUPP: Status.UNSUPP,  # the driver stops asking; ENOTSUP is the same number on Linux
}


def status_of(error: OSError) -> Status:
    """What the driver is told. virtio-blk has no finer words, so nearly everything is an I/O error."""
    return _STATUS.get(error.errno or 0, Status.IOERR)
