"""What a disk is that outlives its server: written before the kernel is asked to make it, read by whoever takes it over.

``disk.json`` in the disk's directory: the specification it was attached with, and what that came to. Users of the disk rely
on every word of it, so a successor that would serve another one is refused, and so is one that finds a description which
is damaged or not ours.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.errors import UserError
from vduse_blk.control import notes
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.messages import MAX_MESSAGE
from vduse_blk.control.rundir import DiskPaths
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.source import gather

_FILE: Final = "disk.json"
_VERSION: Final = 1
_PER_SERVER: Final = ("ready_fd", "timeout", "restart", "upgrade_fd", "directory_fd")
"""Keys of a specification that are about one start of one server."""


@dataclass(frozen=True, kw_only=True)
class DiskRecord:
    """``size`` and ``block_size`` in bytes; ``inode`` of the file that is the storage, None if it is no regular file."""

    spec: WorkerSpec
    size: int
    block_size: int
    read_only: bool
    serial: str
    queue_count: int
    inode: int | None

    @classmethod
    def of(cls, spec: WorkerSpec, info: BlockInfo, queue_count: int, path: object) -> Self:
        """``path``: of the storage, if it has one."""
        return cls(
            spec=spec,
            size=info.size,
            block_size=info.logical_block_size,
            read_only=info.read_only,
            serial=info.serial,
            queue_count=queue_count,
            inode=_inode(path),
        )

    def facts(self) -> dict[str, Any]:
        """All but ``spec``: JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "spec"}

    def difference(self, other: DiskRecord) -> str | None:
        """What of the disk ``other`` would change under its users, as a sentence's end; None: nothing. It may have grown."""
        difference = self.difference_of_source(other.spec)
        if difference is not None:
            return difference
        for key, was, wanted in (
            ("export", ", ".join(self.spec.exports), ", ".join(other.spec.exports)),
            ("block-size", self.block_size, other.block_size),
            ("queues", self.queue_count, other.queue_count),
            ("queue-size", self.spec.queue_size, other.spec.queue_size),
            ("serial", self.serial, other.serial),
            ("read-only", self.read_only, other.read_only),
        ):
            if was != wanted:
                return _sentence(key, was, wanted)
        if other.inode != self.inode:
            return f"source: {self.spec.source} is not the same file any more"
        if other.size < self.size:
            return f"size: the disk has {self.size} bytes, and its storage only {other.size}"
        given = _given_size(other.spec)
        if given not in (None, self.made_with, self.size, other.size):
            return f"size: the disk has {self.size} bytes, not {given}"
        return None

    def difference_of_source(self, spec: WorkerSpec) -> str | None:
        """As ``difference``, as far as it can be seen without opening the storage. What sources mean is compared: a path may
        be spelled otherwise, and a size that the storage was made with be left out. Raises ``UserError``."""
        if (self.spec.source, self.spec.options, self.spec.size) == (spec.source, spec.options, spec.size):
            return None
        wanted = gather(spec.source, spec.options, spec.size)
        try:
            was = gather(self.spec.source, self.spec.options, self.spec.size)
            is_same = was.is_same_storage(wanted)
        except UserError:  # of another version, or the name of a file that is gone
            is_same = False
        if not is_same:
            return _sentence("source", self.spec.source, spec.source)
        difference = was.difference(wanted)
        return None if difference is None else _sentence(*difference)

    @property
    def made_with(self) -> int | None:
        """Bytes that the storage was to be made with, if that was said."""
        return _given_size(self.spec)


def write(record: DiskRecord) -> None:
    """Raises ``ControlError`` (exit 1), with the old description in place."""
    facts = asdict(record)
    for key in _PER_SERVER:
        del facts["spec"][key]
    notes.replace_json(_path(record.spec.name), {"version": _VERSION} | facts)


def read(name: str) -> DiskRecord | None:
    """None if there is none. Raises ``ControlError`` (exit 1) for one that cannot be trusted."""
    path = _path(name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                raise _distrust(path, "it is not a private file of this user")
            return _decode(name, json.loads(file.read(MAX_MESSAGE)))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # says nothing of the disk
            raise
        raise _distrust(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise _distrust(path, f"it is damaged ({error})") from error
    except UserError as error:
        if isinstance(error, ControlError):
            raise
        raise _distrust(path, f"it is damaged ({error})") from error


def _decode(name: str, value: Any) -> DiskRecord:
    if not isinstance(value, dict) or value.pop("version", None) != _VERSION:
        raise ValueError(f"no description of version {_VERSION}")
    if value.keys() != {field.name for field in fields(DiskRecord)}:
        raise ValueError("its keys are others")
    spec = WorkerSpec.from_json(json.dumps(value.pop("spec")))
    if spec.name != name:
        raise ValueError(f"it is of disk '{spec.name}'")
    _check(value)
    return DiskRecord(spec=spec, **value)


def _check(value: Mapping[str, Any]) -> None:
    for key in ("size", "block_size", "queue_count", "inode"):
        if not (type(value[key]) is int and value[key] > 0) and not (key == "inode" and value[key] is None):
            raise ValueError(f"{key} is {value[key]!r}")
    if type(value["read_only"]) is not bool or type(value["serial"]) is not str:
        raise ValueError("read_only or serial is of another type")


def _path(name: str) -> Path:
    return DiskPaths.of(name).directory / _FILE


def _distrust(path: Path, why: str) -> ControlError:
    return ControlError(f"{path}, which says what the disk is, cannot be trusted: {why}", Exit.FAILED)


def _inode(path: object) -> int | None:
    try:
        facts = os.stat(path) if isinstance(path, str) else None
    except OSError:
        return None
    return facts.st_ino if facts is not None and stat.S_ISREG(facts.st_mode) else None


def _given_size(spec: WorkerSpec) -> int | None:
    """Raises ``UserError``."""
    gathered = gather(spec.source, spec.options, spec.size)
    size = gathered.options.get("size") if gathered.size_is_for_making else None
    return size if isinstance(size, int) else None


def _sentence(key: str, was: object, wanted: object) -> str:
    return f"{key}: the disk has {_word(was)}, not {_word(wanted)}"


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else repr(value)
