"""Telling whoever started the server how the start went: a pipe (``attach``) and systemd (``Type=notify``)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

log = logging.getLogger("vduse_blk.disk")


class ReadyPipe:
    """The pipe on which ``attach`` waits for one line; a no-op when nobody waits (``fd`` None).

    If ``attach`` goes away before the line, the disk was never promised to anybody: ``on_gone`` is called (on the loop),
    and the start is undone.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Call from the loop's thread."""
        if self._fd is not None:

            def gone() -> None:
                self._forget()
                on_gone()

            asyncio.get_running_loop().add_reader(self._fd, gone)

    def write(self, line: bytes) -> bool:
        """Write the line and close. False: the reader was gone."""
        if self._fd is None:
            return True
        fd = self._fd
        try:
            os.write(fd, line)
        except BrokenPipeError:
            return False
        finally:
            self._forget()
        return True

    def _forget(self) -> None:
        if self._fd is not None:
            try:
                asyncio.get_running_loop().remove_reader(self._fd)
            except RuntimeError:
                pass  # the loop has ended
            os.close(self._fd)
            self._fd = None


def notify_systemd(message: str) -> None:
    """sd_notify(3): one datagram to $NOTIFY_SOCKET, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(message.encode(), address)
    except OSError as error:
        log.warning("systemd was not told %r: %s", message, error)
