"""The disk that a server serves: its storage, how that is presented, and what is said of both.

Phases: starting → serving → detaching → (gone); ``broken`` instead of serving when the kernel or a queue gave up; ``left``
when the server was asked to end while the disk was in use: the next server takes it over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from vduse_blk.block.stack import Stack
from vduse_blk.control import notes, rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.spec import MAX_SERIAL, WorkerSpec
from vduse_blk.exporter import Endpoint, Exporter, ExportOptions, add_counters
from vduse_blk.exports import ExportSpec, parse_exports
from vduse_blk.record import DiskRecord
from vduse_blk.source import open_source, parse_source
from vduse_blk.worker import settings
from vduse_blk.worker.notify import notify_systemd
from vduse_blk.worker.remains import Remains

log = logging.getLogger("vduse_blk.disk")

_MARGIN = 10.0
"""Seconds, at most, that are left of the starter's patience for undoing a start and saying why it failed."""
_DRAINING = 5.0
"""Seconds that what is in flight may take to end before an upgrade, and before a server leaves a disk that is used; nothing
new is begun meanwhile."""
_LOOK = 0.0005


@dataclass(frozen=True, slots=True)
class Export:
    """One way in which the disk is presented now. ``text`` is what the user calls it."""

    text: str
    exporter: Exporter
    endpoint: Endpoint


class Disk:
    """The disk of ``spec``. Owned by the event loop; whoever is about to change what is served, or to end it, holds
    ``changing`` for as long as that takes."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.phase = "starting"
        self.changing = asyncio.Lock()
        self.finished = asyncio.Event()
        """The disk is not this server's any more: it is gone, left, or another server's."""
        self.stack: Stack | None = None
        """None: the storage is not open."""
        self.exports: list[Export] = []
        """Those that have started."""
        self.remains: Remains | None = None
        """None: the disk's directory is not locked yet."""
        self.predecessor: DiskRecord | None = None
        """What was left by a dead server, and is taken over."""
        self.record: DiskRecord | None = None
        """What is written down of the disk, if it is one of this host's."""
        self.inode: int | None = None
        """Of the file that is the storage, when it was opened."""
        self.was_open = False
        """The disk was served before, by this server or another."""
        self.lock = -1
        """Descriptor of the disk's directory, locked."""
        self.monitor: int | None = None
        """Process id of the monitor; None: the parent, if the disk has one."""
        self.successor: int | None = None
        """Process id of the server to which the disk is handed over."""
        self.replaced = False
        """The disk is the successor's."""
        self._began = time.monotonic()
        self._started_at = time.time()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def doing(self) -> str:
        """The phase, for people."""
        return self.phase if self.successor is None else "being upgraded"

    def make_stack(self) -> Stack:
        """The disk's storage, not open. Raises UserError."""
        spec = self.spec
        assert self.remains is not None
        stack = open_source(
            spec.source,
            dict(spec.options),
            read_only=spec.read_only,
            block_size=spec.block_size,
            size=spec.size,
            made=self.was_open,
            serial=spec.serial if spec.serial is not None else spec.name[:MAX_SERIAL],
            filters=spec.filters,
            on_error=spec.on_error,
            on_full=spec.on_full,
        )
        stack.remember_losses(self.remains.lost(keep=self.was_open))
        return stack

    def describe(self, stack: Stack, exporter: Exporter) -> DiskRecord:
        """What the disk is, whoever serves it, over ``stack``, which is open."""
        source = parse_source(self.spec.source)
        path = source.options.get("path", self.spec.options.get("path"))
        return DiskRecord.of(self.spec, stack.info, exporter.queue_count, path)

    def make_exporter(self, export: ExportSpec, stack: Stack, queues: int, *, adopt: bool) -> Exporter:
        """Not started. ``adopt``: what it exports is there already, left or handed over by another server."""
        spec = self.spec
        return export.exporter(
            stack,
            spec.name,
            ExportOptions(
                queues=queues,
                queue_size=spec.queue_size,
                path=spec.path,
                read_only=export.read_only,
                own=export.own,
                directory=rundir.DiskPaths.of(spec.name).directory,
                adopt=adopt,
                **self.patience(),
            ),
        )

    def add_export(self, text: str, exporter: Exporter, endpoint: Endpoint) -> None:
        """One that has started."""
        self.exports.append(Export(text, exporter, endpoint))
        exporter.failed.add_done_callback(self._on_failed)

    def patience(self) -> dict[str, float]:
        """How long the export may wait, so that its own explanation comes before whoever started us gives up."""
        if self.spec.timeout is None:
            return {}
        spent = time.monotonic() - self._began
        return {"timeout": max(0.0, self.spec.timeout - min(_MARGIN, self.spec.timeout / 4) - spent)}

    def places(self) -> str:
        """Where the disk is, for people."""
        return ", ".join(export.endpoint.path for export in self.exports)

    def monitor_pid(self) -> int | None:
        """Of whoever starts another server when this one dies; None: nobody does."""
        return (self.monitor or os.getppid()) if self.spec.restart != "no" else None

    def is_left(self) -> bool:
        """Whether something of the disk still exists in the kernel, so that its directory must stay."""
        return any(export.exporter.is_there(self.name) for export in parse_exports(self.spec.exports))

    def is_waiting(self) -> bool:
        """Whether requests wait for storage."""
        return self.stack is not None and self.stack.patience.waiting() is not None

    async def drain(self, exports: list[Export]) -> None:
        """Begin nothing new, and wait until nothing is in flight. Raises ControlError; the exports are held all
        the same."""
        deadline = time.monotonic() + _DRAINING
        exporters = [export.exporter for export in exports if export.exporter.hands_over]
        while True:
            for exporter in exporters:
                exporter.hold(True)  # again and again: drivers start queues meanwhile
            if all(exporter.is_quiet() for exporter in exporters):
                return
            if self.is_waiting():
                raise ControlError("requests wait for storage, and would fail", Exit.BUSY)
            if time.monotonic() > deadline:
                raise ControlError(f"what is in flight has not ended within {_DRAINING:g} seconds", Exit.TIMEOUT)
            await asyncio.sleep(_LOOK)

    async def close_storage(self, *, abandon: bool = False) -> None:
        """``abandon``: and remove a file that was created for the disk, which nobody ever had."""
        if self.stack is not None:
            stack, self.stack = self.stack, None
            await (stack.abandon() if abandon else stack.close())

    def _on_failed(self, failed: asyncio.Future[str]) -> None:
        if failed.cancelled():
            return
        if self.phase == "serving":
            self.phase = "broken"
            self.note_state()
            notify_systemd(f"STATUS=broken: {failed.result()}")

    # --------------------------------------------------------------------------------------------------- facts

    def summary(self) -> dict[str, Any]:
        """What ``state.json``, the ready line and ``info`` share."""
        spec = self.spec
        facts: dict[str, Any] = {
            "name": spec.name,
            "pid": os.getpid(),
            "source": spec.source,
            "phase": self.phase,
            "started_at": self._started_at,
        }
        if self.exports:
            facts["device"] = self.exports[0].endpoint.path
        if self.stack is not None:
            info = self.stack.info
            facts |= {
                "size": info.size,
                "block_size": info.logical_block_size,
                "read_only": info.read_only,
                "serial": info.serial,
            }
            facts |= settings.facts(self.stack)
            facts |= self._waiting(self.stack)
        if self.exports:
            exporter = self.exports[0].exporter
            facts |= {"path": exporter.path, "queue_count": exporter.queue_count}
        if self.predecessor is not None:
            facts["taken_over"] = True
        if (monitor := self.monitor_pid()) is not None:
            facts["monitor"] = monitor
        if self.successor is not None:
            facts["successor"] = self.successor
        return facts

    def _waiting(self, stack: Stack) -> dict[str, Any]:
        """``phase`` and ``waiting`` of a disk some of whose requests wait for its storage; nothing if none does."""
        waiting = stack.patience.waiting()
        if waiting is None or self.phase != "serving":
            return {}
        since = time.time() - (time.monotonic() - waiting.since)
        error = os.strerror(waiting.error)
        return {"phase": "waiting", "waiting": {"requests": waiting.requests, "since": since, "error": error}}

    def write_state(self) -> None:
        """For others to read when they cannot ask. Raises ControlError."""
        notes.write_state(self.name, self.summary() | {"spec": asdict(self.spec)})

    def note_state(self) -> None:
        """``write_state`` while the disk is served: it goes on whatever becomes of the run directory."""
        try:
            self.write_state()
        except ControlError as error:
            log.warning("%s", error)

    def info(self) -> dict[str, Any]:
        """``summary``, and what the exports say of themselves."""
        facts = self.summary()
        if not self.exports:
            return facts
        # The first export's facts are the disk's; those of all are in "exports".
        exports = [{"export": export.text, **export.exporter.status()} for export in self.exports]
        totals: dict[str, int] = {}
        for queue in (queue for export in exports for queue in export["queues"]):
            add_counters(totals, queue["counters"])
        return facts | exports[0] | {"counters": totals} | ({"exports": exports} if len(exports) > 1 else {})
