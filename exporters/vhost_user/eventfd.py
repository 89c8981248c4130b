"""Event descriptors that a front-end shares: it may have made them blocking, and fill or empty them at any time.

Their flags are the front-end's, too, and are never changed. So whoever writes looks first, and nobody reads, but to free one
who is stuck.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STUCK_SECONDS = 0.5


def is_eventfd(fd: int) -> bool:
    """Anything else could be waited for in other ways than we do, or for ever."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def _is_writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def wake(fd: int) -> None:
    """Add one to an eventfd that somebody else may have made blocking, and full: then its reader is awake anyway."""
    try:
        if _is_writable(fd):
            os.eventfd_write(fd, 1)
    except BlockingIOError:
        pass


@contextmanager
def kept_writable(fd: int) -> Iterator[None]:
    """While a queue stops. A front-end may fill its blocking eventfd just when the queue writes to it, and the queue's
    thread would wait for ever. A full eventfd has woken its reader, so nothing is lost by emptying it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_STUCK_SECONDS):
            try:
                if not _is_writable(fd):
                    os.eventfd_read(fd)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise

    watcher = threading.Thread(target=watch, name="call-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(_STUCK_SECONDS)
        while watcher.is_alive():  # it wanted to read what the front-end has just read
            wake(fd)
            watcher.join(_STUCK_SECONDS)
