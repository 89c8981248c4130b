"""Processes of servers, as the kernel shows them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vduse_blk.control.notes import read_state
from vduse_blk.control.rundir import is_locked

_PF_EXITING: Final = 0x4  # linux/sched.h


def read_stat(process: Path) -> tuple[str, int, int]:
    """State (a letter), parent and flags (``PF_…`` of linux/sched.h) of a process or thread, as proc_pid_stat(5) has them;
    ``process`` is its directory in ``/proc``. Raises OSError: there is none."""
    words = (process / "stat").read_bytes().rpartition(b") ")[2].split()  # before that a name, which may be anything
    return words[0].decode("ascii"), int(words[1]), int(words[6])


def is_running(pid: object) -> bool:
    """Whether a process that was noted has not ended; one that nobody has waited for yet has. ``pid``: as it was read from
    a disk's directory, anything."""
    if type(pid) is not int or pid <= 0:
        return False
    try:
        return read_stat(Path(f"/proc/{pid}"))[0] not in "ZX"
    except OSError:
        return False


def is_dying(name: str) -> bool:
    """Whether the disk's last server was killed and has not ended: a thread of it waits in the kernel, probably for storage,
    and keeps all it had open, the lock of the disk's directory included."""
    pid = read_state(name).get("pid")
    if type(pid) is not int or pid <= 0 or not is_locked(name):
        return False
    try:
        state, _, flags = read_stat(Path(f"/proc/{pid}"))
        if flags & _PF_EXITING:
            return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    pending = re.search(r"^SigPnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) >> (signal.SIGKILL - 1) & 1)


@contextmanager
def server_process(pid: int) -> Iterator[int | None]:
    """A descriptor that becomes readable when the process ends; None if it has ended already."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
