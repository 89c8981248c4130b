"""What one server of a disk leaves to the next, whatever the disk's exports: that it was served, what was
set while it was in use, and that data is lost.

``served.json`` in the disk's directory: written before anybody can use the disk, gone with the directory when it is
detached. It speaks of storage. Who finds it and is to serve other storage under the same name has nothing to do with it.

``lost`` beside it: 4 bytes, not 0 after a flush that failed. The kernel tells of lost data once, to one open file, and the
next fdatasync succeeds; so the backend's own memory of it is this file, mapped: it is there in the instant in which a
thread sets it, however the server ends, and a full run directory cannot keep it from being noted.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import stat
from pathlib import Path
from typing import Final

from vduse_blk.block.errors import UserError
from vduse_blk.control import notes
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.messages import MAX_MESSAGE
from vduse_blk.control.rundir import DiskPaths
from vduse_blk.source import parse_source

log = logging.getLogger("vduse_blk.disk")

_FILE: Final = "served.json"
_VERSION: Final = 1
_LOST: Final = "lost"
_LOST_BYTES: Final = 4  # block.native.FileTarget.lost


class Remains:
    """Of the disk ``name`` over ``source``. Owned by whoever has the lock of the disk's directory."""

    def __init__(self, name: str, source: str) -> None:
        """Reads what there is. Damage costs what was noted, not the disk: it is said in the log."""
        self.was_served = False
        """Of the storage as a disk of this name, by a server that is gone or about to be."""
        self.settings: dict[str, str] = {}
        """As ``settings.change`` takes them; whoever changes them calls ``write``."""
        self._lost: memoryview | None = None
        self._name = name
        self._source = source
        self._path = DiskPaths.of(name).directory / _FILE
        try:
            found = _read(self._path)
        except (OSError, ValueError, RecursionError) as error:
            log.error("disk '%s': what %s says is lost: %s", name, self._path, error)
            return
        if found is not None and _is_same_storage(str(found.get("source")), source):
            self.was_served = True
            self.settings = settings_of(found.get("settings"))

    def lost(self, *, keep: bool) -> memoryview:
        """The mark of lost data, which the disk's storage is opened with. Without ``keep`` what is there is of another
        disk. Raises ControlError (exit 1) if there can be none: a server without it could not be told from one that lost
        nothing."""
        if self._lost is None:
            path = self._path.with_name(_LOST)
            try:
                if not keep:
                    path.unlink(missing_ok=True)
                self._lost = _map(path)
            except OSError as error:
                raise ControlError(f"cannot write {path}: {error.strerror}", Exit.FAILED) from error
            if self._lost[0]:
                log.error(
                    "disk '%s': a flush has failed before, so data is lost; every flush fails until the disk is detached",
                    self._name,
                )
        return self._lost

    @property
    def matter(self) -> bool:
        """Whether there is more than that the disk was served."""
        return bool(self.settings) or (self._lost is not None and self._lost[0] != 0)

    def write(self) -> None:
        """Raises ControlError (exit 1), with the old ones in place."""
        notes.replace_json(self._path, {"version": _VERSION, "source": self._source, "settings": self.settings})


def settings_of(value: object) -> dict[str, str]:
    """What another server has written down as settings; nothing of what cannot be any."""
    items = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in items if isinstance(key, str) and isinstance(text, str)}


def _map(path: Path) -> memoryview:
    """Raises OSError. What is no mark, or not ours, is taken for one of lost data: it says the less harmful thing."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        if not _is_ours(fd) or size not in (0, _LOST_BYTES):
            return memoryview(bytearray(b"\1" * _LOST_BYTES))
        if size == 0:
            os.pwrite(fd, bytes(_LOST_BYTES), 0)  # written, not only sized: a page that has no room yet could not be set
        return memoryview(mmap.mmap(fd, _LOST_BYTES))
    finally:
        os.close(fd)


def _is_ours(fd: int) -> bool:
    facts = os.fstat(fd)
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077


def _read(path: Path) -> dict[str, object] | None:
    """Raises OSError, ValueError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if not _is_ours(fd):
            raise ValueError("it is not a private file of this user")
        found = json.loads(file.read(MAX_MESSAGE))
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    return found


def _is_same_storage(one: str, other: str) -> bool:
    """However they are written."""
    try:
        return parse_source(one).is_same_storage(parse_source(other))
    except (UserError, ValueError):  # the latter: a name that no file can have
        return False
