"""The line between a server and the one that is about to replace it: messages, each a JSON object and descriptors.

The old server starts the new one with one end of a socket pair (``WorkerSpec.upgrade_fd``); either one's death is an end of
file to the other. In order:

    new → old   ready      everything is imported; the disk is served by the old one
    old → new   (the disk) at rest, its storage closed: the lock of its directory, its exports, what was set live
    new → old   starting   the storage is open and what came is understood: from here on requests may be begun
    new → old   serving    its requests are served
    old → new   yours      or its end: only now may anything be taken that could not be given back
    new → old   settled    it answers the control socket
    old → new   (end)      systemd knows who is the main process; only now does the new one talk to it
    new → old   error      instead of any of these: the disk is the old one's again

Until ``yours`` a new one that is not well is killed, and has ended before the old one goes on: two servers of one disk
cannot be. A new one that has got the disk needs the old one no more.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from vduse_blk.block.errors import UserError
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.spec import WorkerSpec

VERSION: Final = 1
"""Of the messages. A version that means something else by them has another number, and is refused."""
_FDS: Final = 200
"""Descriptors in one packet; the kernel takes 253."""
_LIMIT: Final = 16 << 20
"""Bytes of a message."""


class Line:
    """One end. Blocking; one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(True)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Raises OSError: the other one is gone."""
        text = os.memfd_create("vduse-blk-message", os.MFD_CLOEXEC)
        try:
            with open(text, "wb", closefd=False) as file:
                file.write(json.dumps(message).encode())
            left = [text, *fds]
            while left:
                now, left = left[:_FDS], left[_FDS:]
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", now))
                self._socket.sendmsg([b"+" if left else b"."], [rights], socket.MSG_NOSIGNAL)
        finally:
            os.close(text)

    def receive(self, seconds: float | None = None) -> tuple[dict[str, Any], list[int]]:
        """A message and its descriptors, which are the caller's. Raises EOFError: the other one is gone; TimeoutError;
        ValueError: it is no message."""
        fds: list[int] = []
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([self._socket], [], [], left)[0]:
                    raise TimeoutError
                try:
                    data, ancillary, flags, _ = self._socket.recvmsg(1, socket.CMSG_SPACE(_FDS * 4), socket.MSG_CMSG_CLOEXEC)
                except ConnectionResetError:
                    data, ancillary, flags = b"", [], 0
                for level, kind, content in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        got = array.array("i")
                        got.frombytes(content[: len(content) // 4 * 4])
                        fds += got
                if not data:
                    raise EOFError("it is gone")
                if flags & socket.MSG_CTRUNC:
                    raise ValueError("descriptors were lost: more are open than may be (`ulimit -n`)")
                if data == b".":
                    break
            message = json.loads(os.pread(fds[0], _LIMIT, 0))
            if not isinstance(message, dict):
                raise ValueError("a message that is no JSON object")
            os.close(fds.pop(0))
            return message, fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class Successor:
    """The process of the new server, seen from the old one. Blocking; one thread at a time."""

    def __init__(self, command: Sequence[str], spec: WorkerSpec) -> None:
        """Raises UserError if it cannot be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line = Line(ours)
        stdin = os.memfd_create("vduse-blk-spec", os.MFD_CLOEXEC)
        try:
            wanted = replace(spec, upgrade_fd=theirs.fileno(), ready_fd=None, timeout=None)
            os.write(stdin, wanted.to_json().encode())
            os.lseek(stdin, 0, os.SEEK_SET)
            # From here, not from the command line: so it is where this one is, with its log, its service and its monitor.
            self.process = subprocess.Popen(command, stdin=stdin, pass_fds=[theirs.fileno()], cwd="/")
        except OSError as error:
            ours.close()
            raise UserError(f"the new server cannot be started: {command[0]}: {error.strerror}", exit_code=1) from error
        finally:
            os.close(stdin)
            theirs.close()

    def expect(self, steps: Sequence[str], seconds: float) -> dict[str, Any]:
        """Its next message, which is one of ``steps``. Raises ControlError."""
        try:
            message, fds = self.line.receive(seconds)
        except TimeoutError:
            sentence = f"the new server did not say '{steps[-1]}' within {seconds:g} seconds"
            raise ControlError(sentence, Exit.TIMEOUT) from None
        except EOFError:
            raise ControlError(f"the new server {self._end_text()} before it was '{steps[-1]}'", Exit.FAILED) from None
        except (ValueError, OSError) as error:
            raise ControlError(f"the new server is not understood: {error}", Exit.FAILED) from error
        for fd in fds:
            os.close(fd)
        if "error" in message:
            raise ControlError(f"the new server: {message['error']}", int(message.get("code", Exit.FAILED)))
        if message.get("step") not in steps:
            raise ControlError(f"the new server says {message!r}, not '{steps[-1]}'", Exit.FAILED)
        return message

    def end(self) -> bool:
        """Kill it, and wait until nothing of it runs. Returns whether it was ``starting`` or further, as far as it has not
        been asked."""
        self.process.kill()
        self.process.wait()
        started = False
        while True:
            try:
                message, fds = self.line.receive(0)
            except (EOFError, TimeoutError, ValueError, OSError):
                self.line.close()
                return started
            for fd in fds:
                os.close(fd)
            started |= message.get("step") in ("starting", "serving")

    def _end_text(self) -> str:
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed the line"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
