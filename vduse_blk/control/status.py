"""Disks as seen from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, NotServed
from vduse_blk.control.notes import read_events, read_state
from vduse_blk.control.process import is_dying
from vduse_blk.control.rundir import DiskPaths, disk_names, is_locked, no_such_disk

_SHOWN_EVENTS: Final = 10
_CLAIM_SECONDS: Final = 5.0
"""How long after ``attach`` has made a directory, or put a log into it, its server may take to lock it; then the start is
taken for one that failed."""


@dataclass(frozen=True)
class DiskStatus:
    """One disk as seen from outside.

    ``state``: the server's own phase ('starting', 'serving', 'detaching' …); 'starting' also for a server
    that lives and does not listen yet, and for a name that was claimed a moment ago; 'dead': no server;
    'dying': see ``is_dying``; 'silent': a server that lives and does not answer; 'unreadable': no access to
    its directory.
    ``info``: reply to ``info`` where there is a server to ask, else what ``state.json`` says.
    """

    name: str
    state: str
    info: Mapping[str, Any]


def disk_status(name: str, timeout: float = 2.0) -> DiskStatus:
    """Ask one disk's server. Raises ``ControlError`` only if there is no such disk, no access, or something in the
    way of its directory."""
    if is_dying(name):  # it would not answer, and we would wait for that
        return _unanswered(name, "dying")
    try:
        with Client(name, timeout) as client:
            info = client.call("info")
            return DiskStatus(name, str(info.get("phase", "serving")), info | _past(name))
    except NotServed:
        return _unserved(name)
    except ControlError as e:
        if e.exit_code in (Exit.NOT_FOUND, Exit.DENIED, Exit.BUSY):
            raise
        # The conversation ended in the middle: the server is leaving, has left, or hangs.
        if is_dying(name):
            return _unanswered(name, "dying")
        return _unanswered(name, "silent") if is_locked(name) else _unserved(name)


def _unserved(name: str) -> DiskStatus:
    """Nobody listens. Raises ``ControlError`` (exit 3) if the disk has gone while we looked."""
    paths = DiskPaths.of(name)
    was_served = paths.state.exists()  # looked at before the lock: a server takes that, then writes the state
    if is_locked(name):
        return _unanswered(name, "starting")
    try:
        changed = paths.directory.stat().st_mtime
    except FileNotFoundError:
        raise no_such_disk(name) from None
    is_claimed = not was_served and abs(time.time() - changed) < _CLAIM_SECONDS
    return _unanswered(name, "starting" if is_claimed else "dead")


def _unanswered(name: str, state: str) -> DiskStatus:
    return DiskStatus(name, state, _sound(read_state(name)) | _past(name))


def _sound(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state can be one that a server has written; a damaged one is no reason to know nothing."""
    return {
        key: value
        for key, value in state.items()
        if (_SHAPES[key](value) if key in _SHAPES else isinstance(value, str | bool))
    }


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_SHAPES: Final[Mapping[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("size", "block_size", "queue_count", "pid", "monitor", "successor"), _is_count),
    **dict.fromkeys(("policy", "waiting", "spec"), _is_object),
    "started_at": lambda value: type(value) in (int, float),
    "filters": lambda value: isinstance(value, list) and all(map(_is_object, value)),
}
"""Of what a state holds besides texts and truths (``worker.disk.Disk.summary``)."""


def _past(name: str) -> dict[str, Any]:
    events = read_events(name)
    return {"events": events[-_SHOWN_EVENTS:]} if events else {}


def all_disks(timeout: float = 2.0) -> Iterator[DiskStatus]:
    """Every disk, by name. One that vanishes meanwhile is left out; one whose directory cannot be looked into is
    'unreadable'."""
    for name in disk_names():
        try:
            yield disk_status(name, timeout)
        except ControlError as e:
            if e.exit_code != Exit.NOT_FOUND:
                yield DiskStatus(name, "unreadable", {})
