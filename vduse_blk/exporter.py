"""The contract of an exporter: one way a disk is presented.

The worker opens a stack, picks exporters by name, and starts each with the stack. An exporter turns it into
something users can open (its *endpoint*) and owns everything that takes, down to the last kernel object. ``start`` and
``stop`` are transactions: what ``start`` has done when it raises is undone again, what ``stop`` could not undo it
says.
"""

from __future__ import annotations

import asyncio
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.holders import Holder
from vduse_blk.block.options import about
from vduse_blk.block.stack import Stack

KILL_ENV = "VDUSE_BLK_TEST_KILL"


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What may stand behind the name of every exporter; as ``block.options`` describes. Exporters add to it."""

    writable: bool | None = field(
        default=None,
        metadata=about("whether this export may write; of several exports of a disk only the first does by default"),
    )


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a user may choose about an export. ``queues`` virtqueues of ``queue_size`` entries (0: the exporter's own
    choice); ``path`` is "native", "plugin" or "auto" (native where the stack can be served by C). ``timeout``: seconds
    ``start`` may wait for others. ``read_only``: this export refuses writes, whatever the stack does; ``own`` is an instance
    of the exporter's ``Options``. ``directory``: the disk's own, private one, where what outlives the server is kept;
    None: nothing is."""

    queues: int = 0
    queue_size: int = 256
    path: str = "auto"
    timeout: float = 60.0
    read_only: bool = False
    own: Any = CommonOptions()
    directory: Path | None = None
    adopt: bool = False
    """Take over what a dead server of this disk left, instead of making it anew. The storage's fence has been passed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where users find the disk: ``kind`` "block" with the device's ``path``, or "socket"."""

    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class HandOver:
    """An export at rest, as one server gives it to the next. ``facts`` are JSON values; numbers called ``fd`` or ``…_fd`` in
    them are places in ``fds``, which stay the giver's."""

    facts: dict[str, Any]
    fds: list[int]


class Exporter(ABC):
    """One export of one stack. All coroutines run on the worker's loop."""

    Options: ClassVar[type[CommonOptions]] = CommonOptions
    """What may stand behind the exporter's name in ``--export``."""
    for_this_host: ClassVar[bool] = False
    """The disk is this host's own: the kernel may need it to free the memory we ask for."""

    hands_over: ClassVar[bool] = False
    """It can be passed from server to server while it is in use: ``hold`` and what follows it."""

    def __init__(self, stack: Stack, name: str, options: ExportOptions) -> None:
        self.stack = stack
        self.name = name
        self.options = options
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[str] = self._loop.create_future()
        """Set to a sentence when the export dies under a running disk."""
        self.queue_count = options.queues
        """Virtqueues the disk's users may use."""
        self.path = "plugin"
        """Who serves requests: "native" (C) or "plugin" (the event loop)."""

    @abstractmethod
    async def start(self) -> Endpoint:
        """Present the disk. Raises UserError, with nothing left behind."""

    @classmethod
    def is_left(cls, name: str) -> bool:
        """Whether a dead server left a disk of this name that has users, or may have: the next one must take it over."""
        return False

    @classmethod
    def is_there(cls, name: str) -> bool:
        """Whether anything is left of a disk of this name, if only half of what a start makes or a stop removes."""
        return cls.is_left(name)

    @classmethod
    async def fail_left(cls, name: str, directory: Path) -> None:
        """Answer everything that such a disk has in flight with errors, and remove it. Raises UserError."""
        raise NotImplementedError(f"{cls.__name__} leaves nothing")

    @classmethod  # noqa: B027 - most leave nothing
    def sweep(cls) -> None:
        """Remove what servers kept that hung in the kernel while their disks were removed, and that have ended since. Raises
        OSError."""

    async def leave(self) -> None:
        """End with nothing in flight, and leave the disk for the next server, which its users wait for."""
        await self.stop()

    # A live upgrade. The old server: hold, is_quiet … hand_over, release; the new one: receive, resume, attend. If it fails
    # before that, the old one resumes what it handed over. The exporters of different versions meet here: facts are only
    # ever added to.

    def hold(self, on: bool) -> None:
        """Begin no request any more, until the export is let go (``on`` False); what is in flight goes on. Harmless if it is
        so already."""
        raise NotImplementedError

    def is_quiet(self) -> bool:
        """The export is held and nothing is in flight."""
        raise NotImplementedError

    async def hand_over(self) -> HandOver:
        """Let go of the storage and answer nobody any more, with the export's users connected. Call when it is quiet. Raises
        UserError if that cannot be just now; ``resume`` follows in any case, or ``release``."""
        raise NotImplementedError

    async def receive(self, handed: HandOver) -> None:
        """Instead of ``start``: what another server has handed over. The descriptors are ours from now on. Nothing is served
        yet. Raises UserError."""
        raise NotImplementedError

    async def resume(self, stack: Stack, *, touched: bool = False) -> Endpoint:
        """Serve what was handed over or received, from ``stack``, which is open. ``touched``: another server may have begun
        to serve it, and died. What was received is on trial until ``attend``: its requests are served, but nothing is read
        of what its users say otherwise, which nobody could say again to the old server. It raises UserError if any queue is
        not served; what was handed over is then served as well as it can be."""
        raise NotImplementedError

    def attend(self) -> None:
        """After ``resume`` of what was received: it is this server's for good."""
        raise NotImplementedError

    async def release(self) -> None:
        """What was handed over is another server's: close what is ours without touching the disk."""
        raise NotImplementedError

    @property
    def replayed(self) -> int:
        """How many requests of a dead server were done again when this one took over."""
        return 0

    @property
    def info(self) -> BlockInfo:
        """The disk as this export shows it."""
        return replace(self.stack.info, read_only=True) if self.options.read_only else self.stack.info

    def fail(self, sentence: str) -> None:
        """Set ``failed``, unless it is. Any thread."""

        def set_failed() -> None:
            if not self.failed.done():
                self.failed.set_result(sentence)

        self._loop.call_soon_threadsafe(set_failed)

    def users(self) -> list[Holder]:
        """Who uses the disk through this export, where the kernel does not know."""
        return []

    @abstractmethod
    async def resized(self, info: BlockInfo) -> None:
        """The stack's size has changed; tell the users of the disk."""

    @abstractmethod
    async def stop(self) -> None:
        """Take the disk away. Whether somebody still uses it is the caller's question, not this one's."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """For ``info``: queues, features, counters; JSON types only."""


def add_counters(total: dict[str, int], more: Mapping[str, int]) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0) + value


def counters_of(facts: Mapping[str, Any]) -> dict[int, dict[str, int]]:
    """What the queues of an export had counted, by index, when it was handed over: ``counters`` of ``HandOver.facts``, which
    older servers do not tell. Nothing of what cannot be any."""
    given = facts.get("counters")
    result: dict[int, dict[str, int]] = {}
    for index, counted in given.items() if isinstance(given, dict) else ():
        if str(index).isdecimal() and isinstance(counted, dict):  # an object of JSON has no numbers as keys
            result[int(index)] = {key: value for key, value in counted.items() if type(value) is int and value >= 0}
    return result


def reached(step: str) -> None:
    """Mark a step of a transaction. Tests kill the process here to prove that every step can be recovered from."""
    if os.environ.get(KILL_ENV) == step:
        os.kill(os.getpid(), signal.SIGKILL)
