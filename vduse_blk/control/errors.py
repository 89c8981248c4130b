"""Exit codes, and the errors that carry one."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from vduse_blk.block.errors import UserError


class Exit(IntEnum):
    """Exit status of the command line and of the server, and ``code`` in a failed reply."""

    OK = 0
    FAILED = 1  # unexpected: a bug, or the kernel said no
    USAGE = 2  # bad options, source, size or name syntax
    NOT_FOUND = 3  # no such disk
    BUSY = 4  # name taken, file in use, disk mounted or held
    DENIED = 5  # not root, or no access
    UNSUPPORTED = 6  # the host cannot do it: `vduse-blk doctor` explains
    TIMEOUT = 7
    LEFT = 8  # of a server: ended as asked, and its disk waits for the next one


class ControlError(UserError):
    """A request that was refused or could not be delivered. ``holders`` names who keeps a busy disk open."""

    def __init__(self, message: str, exit_code: int = Exit.FAILED, holders: list[Any] | None = None) -> None:
        super().__init__(message, exit_code)
        self.holders: list[Any] = holders or []


class NotServed(ControlError):
    """The disk's directory exists, its server does not (or does not listen yet)."""


class Served(ControlError):
    """The disk's directory is locked by another process: its server lives."""


class Hangup(ControlError):
    """The server ended the conversation, or spoke nonsense, instead of a reply; perhaps it died."""


def unusable(key: str, value: object, accepted: str) -> UserError:
    """The error (exit 2) of a value that ``key`` cannot have; ``accepted`` says in the plural which it can."""
    return UserError(f"{key}: {value!r} is not usable; accepted are {accepted}", Exit.USAGE)
