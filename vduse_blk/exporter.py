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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.stack import Stack

KILL_ENV = "VDUSE_BLK_TEST_KILL"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a user may choose about an export. ``queues`` virtqueues of ``queue_size`` entries; ``path`` is "native",
    "plugin" or "auto" (native where the stack can be served by C). ``timeout``: seconds ``start`` may wait for others.
    ``directory``: the disk's own, private one, where what outlives the server is kept; None: nothing is."""

    queues: int
    queue_size: int = 256
    path: str = "auto"
    timeout: float = 60.0
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where users find the disk: ``kind`` "block" with the device's ``path``, or another kind with its own path."""

    kind: str
    path: str


class Exporter(ABC):
    """One export of one stack. All coroutines run on the worker's loop."""

    def __init__(self, stack: Stack, name: str, options: ExportOptions) -> None:
        self.stack = stack
        self.name = name
        self.options = options
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to a sentence when the export dies under a running disk."""
        self.path = "plugin"
        """Who serves requests: "native" (C) or "plugin" (the event loop)."""

    @abstractmethod
    async def start(self) -> Endpoint:
        """Present the disk. Raises UserError, with nothing left behind."""

    @abstractmethod
    async def resized(self, info: BlockInfo) -> None:
        """The stack's size has changed; tell the users of the disk."""

    @abstractmethod
    async def stop(self) -> None:
        """Take the disk away. Whether somebody still uses it is the caller's question, not this one's."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """For ``info``: queues, features, counters; JSON types only."""


def reached(step: str) -> None:
    """Mark a step of a transaction. Tests kill the process here to prove that every step can be recovered from."""
    if os.environ.get(KILL_ENV) == step:
        os.kill(os.getpid(), signal.SIGKILL)
