"""Talking to the server of a disk."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from vduse_blk.control.errors import ControlError, Exit, Hangup, NotServed
from vduse_blk.control.messages import MAX_MESSAGE, decode_message, encode_message
from vduse_blk.control.rundir import DiskPaths, in_the_way, no_such_disk


class Client:
    """One connection to the server of one disk. Not for use by several threads at once.

    ``timeout`` is the longest wait in seconds for connecting and for each reply.
    """

    def __init__(self, name: str, timeout: float = 10.0) -> None:
        """Connect. Raises ``ControlError`` (exit 3: no such disk; 5: no access; 7: no answer) and
        ``NotServed``."""
        self.name = name
        self._timeout = timeout
        paths = DiskPaths.of(name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        self._buffer = b""
        try:
            self._socket.connect(str(paths.socket))
        except OSError as e:
            self._socket.close()
            raise _connect_error(name, paths, e) from e

    @property
    def server_pid(self) -> int:
        """Process id of the server, as the kernel recorded it when the server began to listen."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], "little")

    def call(self, op: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send one request, return the successful reply. Raises ``ControlError`` with the server's own
        sentence."""
        wait = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + wait
        try:
            self._socket.settimeout(wait)
            self._socket.sendall(encode_message({"op": op, **arguments}))
            reply = decode_message(self._read_line(deadline))
        except TimeoutError as e:
            raise ControlError(
                f"the server of disk '{self.name}' did not answer '{op}' within {wait:g} seconds",
                Exit.TIMEOUT,
            ) from e
        except (OSError, ValueError, EOFError) as e:
            raise Hangup(
                f"the server of disk '{self.name}' broke the conversation during '{op}' "
                f"({str(e) or type(e).__name__}); its log: {DiskPaths.of(self.name).log}",
                Exit.FAILED,
            ) from e
        if reply.get("ok") is not True:
            raise ControlError(
                str(reply.get("error", f"the server refused '{op}' without a reason")),
                int(reply.get("code", Exit.FAILED)),
                list(reply.get("holders", [])),
            )
        return reply

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) >= MAX_MESSAGE:
                raise ValueError(f"reply longer than {MAX_MESSAGE} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            if not data:
                raise EOFError("connection closed")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect_error(name: str, paths: DiskPaths, error: OSError) -> ControlError:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        root = paths.directory.parent
        if os.path.lexists(root) and not root.is_dir():
            return in_the_way(root)
        if not paths.directory.is_dir():
            return no_such_disk(name)
        return NotServed(f"disk '{name}' has no server; `vduse-blk info {name}` says what leads out of that", Exit.FAILED)
    if isinstance(error, PermissionError):
        return ControlError(f"{paths.socket}: no permission; run as root", Exit.DENIED)
    if isinstance(error, TimeoutError | BlockingIOError):  # EAGAIN: the backlog of a hung server is full
        return ControlError(f"the server of disk '{name}' does not accept connections", Exit.TIMEOUT)
    return ControlError(f"{paths.socket}: {error.strerror}", Exit.FAILED)
