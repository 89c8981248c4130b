"""``python -m vduse_blk.worker.monitor``: start the server of one disk, and start it again when it dies.

Takes the place of ``vduse_blk.worker`` in whoever starts it: the same specification on standard input, the same line on
``ready_fd`` (written by the server itself), the same exit status for a start that fails. Only a disk that was served once is
served again: the next server takes it over, and what became of the last one is noted (``control.notes.add_event``).

    server ends with     0, LEFT          as it was asked to: so do we
                         anything else    pause, start again; pauses grow while servers do not last
                         … too often      given up: the disk stays as it is, its users wait

A server that was replaced (``handover``) leaves its successor to us: whoever loses his parent below us becomes our child.

It holds nothing of the disk. A duplicate of the device's descriptor would keep the kernel from giving a message that the
dead server had read and not answered to the next one; whoever needs the descriptor of a server that hangs takes it from
there (``block.holders.take_from``). It ends when the disk's directory is gone or another server has it; in the first case
its server may have hung in the kernel, and what that kept is removed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vduse_blk.block.errors import UserError
from vduse_blk.control import notes, rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.spec import WorkerSpec

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LASTING: Final = 60.0
"""Seconds after which a server has lasted: the one before it is forgotten."""
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 30.0
_LIMIT: Final = 10
"""Servers in a row that did not last."""


class Monitor:
    """Its signals are blocked and waited for: nothing can come between a look and a sleep."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_ENDING})
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(self) -> int:
        """Exit status."""
        name = self._spec.name
        directory = rundir.open_directory(name)
        in_a_row, served = 0, False
        while True:
            began = time.monotonic()
            pid = self._start(directory if served else None)
            status = self._wait(pid)
            while (successor := _successor(name, pid)) is not None:
                pid, served, began = successor, True, time.monotonic()
                status = self._wait(pid)
            if status in (Exit.OK, Exit.LEFT):
                return status
            removed = not rundir.is_directory(name, directory)  # by somebody, perhaps long ago
            if removed:
                _sweep(self._spec.exports)
            if not served and not _has_served(name, pid):
                return status if status >= 0 else 128 - status
            served = True
            if removed or rundir.is_locked(name):
                return Exit.OK  # or somebody serves it
            notes.add_event(name, event="ended", pid=pid, **({"signal": -status} if status < 0 else {"status": status}))
            in_a_row = 1 if time.monotonic() - began > _LASTING else in_a_row + 1
            if in_a_row >= _LIMIT:
                notes.add_event(name, event="given up", servers=in_a_row)
                print(f"disk '{name}': {in_a_row} servers in a row have ended; no other is started", file=sys.stderr)
                return Exit.FAILED
            if not self._pause(min(_LONGEST_PAUSE, _PAUSE * 2 ** (in_a_row - 1))):
                return Exit.LEFT
            if not rundir.is_directory(name, directory):
                return Exit.OK

    def _start(self, directory: int | None) -> int:
        """The server's process id. Its specification is handed over as ``attach`` does it. ``directory``: serve only the
        disk it is of, which somebody may remove before the server has locked it."""
        spec, ready = replace(self._spec, directory_fd=directory), self._spec.ready_fd
        file = os.memfd_create("vduse-blk-spec", os.MFD_CLOEXEC)
        try:
            os.write(file, spec.to_json().encode())
            os.lseek(file, 0, os.SEEK_SET)
            if directory is not None:
                os.set_inheritable(directory, True)  # our children are servers, and there is no thread to start others
            return os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-m", "vduse_blk.worker"],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, file, 0)],
                setsigmask=[],
            )
        finally:
            os.close(file)
            if ready is not None:
                os.close(ready)  # the server's alone: its death must be an end of file
                self._spec = replace(self._spec, ready_fd=None, timeout=None)

    @staticmethod
    def _wait(pid: int) -> int:
        """Exit status of the server, or minus the signal that ended it. A request to end is the server's to decide."""
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            number = signal.sigwait({signal.SIGCHLD, *_ENDING})
            if number != signal.SIGCHLD:
                os.kill(pid, number)

    @staticmethod
    def _pause(seconds: float) -> bool:
        """False: we are to end."""
        return signal.sigtimedwait(_ENDING, seconds) is None


def _sweep(exports: Sequence[str]) -> None:
    """A server that hung in the kernel while its disk was removed has kept its device; it has ended, and only we know."""
    try:
        from vduse_blk.exports import parse_exports  # here: a monitor lives as long as its disk, and seldom gets so far

        for export in parse_exports(exports):
            export.exporter.sweep()
    except (ImportError, OSError, UserError) as error:  # the program was replaced meanwhile: the next disk does it
        print(f"remnants were not removed: {error}", file=sys.stderr)


def _successor(name: str, pid: int) -> int | None:
    """Process id of the server that has replaced ``pid``, or is about to, if there is one."""
    try:
        state = notes.read_state(name)
    except ControlError:
        return None
    for candidate in (state.get("pid"), state.get("successor")):
        if type(candidate) is int and candidate not in (0, pid):
            try:
                os.waitid(os.P_PID, candidate, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except (ChildProcessError, OverflowError):
                continue
            return candidate
    return None


def _has_served(name: str, pid: int) -> bool:
    try:
        state = notes.read_state(name)
    except ControlError:
        return False
    return state.get("pid") == pid and state.get("phase") not in ("starting", "failed", None)


def main() -> int:
    spec = WorkerSpec.from_json(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir("/")
    return Monitor(spec).run()


if __name__ == "__main__":
    sys.exit(main())
