"""What the servers of a disk note in its directory for others to read: its state now, and what became of them."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.messages import MAX_MESSAGE, decode_message, encode_message
from vduse_blk.control.rundir import DiskPaths

_EVENTS: Final = "events"
_MAX_EVENTS: Final = 1 << 16
"""Bytes of the file after which its older half goes."""


def read_state(name: str) -> dict[str, Any]:
    """``state.json`` of a disk; empty if there is none yet. The server writes it with ``write_state``."""
    path = DiskPaths.of(name).state
    # write_state replaces the file whole, so anything but an object is damage; a disk must be removable all the same.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # a FIFO would keep us waiting
        with open(fd, "rb") as file:
            state = json.loads(file.read(MAX_MESSAGE)) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except PermissionError as e:
        raise ControlError(f"{path}: no permission; run as root", Exit.DENIED) from e
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):  # says nothing of the disk
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(name: str, state: Mapping[str, Any]) -> None:
    """Replace ``state.json`` (0600) in one step: a reader sees the old text or the new one, never half. Raises
    ``ControlError`` (exit 1) with the path, for instance if the file system is full."""
    replace_json(DiskPaths.of(name).state, state)


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """As ``write_state``, for any file of a disk's directory."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)  # of a server that died over it, or a FIFO in which we would wait
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file takes room, too
        raise ControlError(f"cannot write {path}: {e.strerror}", Exit.FAILED) from e


def add_event(name: str, **facts: Any) -> None:
    """Note in the disk's directory what became of a server; ``facts`` are JSON values. Best effort: a disk goes on whatever
    becomes of the run directory."""
    path = DiskPaths.of(name).directory / _EVENTS
    line = encode_message({"time": time.time(), **facts})
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        with open(fd, "rb+", buffering=0) as file:
            size = os.fstat(fd).st_size
            if size > _MAX_EVENTS:
                kept = os.pread(fd, _MAX_EVENTS // 2, size - _MAX_EVENTS // 2)
                file.truncate(0)
                line = kept[kept.index(b"\n") + 1 :] + line
            file.write(line)
    except (OSError, ValueError):
        pass


def read_events(name: str) -> list[dict[str, Any]]:
    """What ``add_event`` has noted, oldest first; lines that are damaged are left out."""
    try:
        fd = os.open(DiskPaths.of(name).directory / _EVENTS, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            lines = file.read(2 * _MAX_EVENTS).splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError):
            events.append(decode_message(line))
    return events
