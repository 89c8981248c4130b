"""One disk, from its specification to its end.

Phases: starting → serving → detaching → (gone); ``broken`` instead of serving when the kernel or a queue gave up; ``left``
when the server was asked to end while the disk was in use: the next server takes it over.
Everything here runs on the event loop; what blocks (netlink, scanning /proc) runs on threads of its own.

The order of a start: lock the disk's directory, open the storage, export it, say so. The end undoes that in reverse. The
directory is removed last and only if all else is gone: as long as something is left, ``detach`` must find it.

Taking over. What a dead server left in the kernel has users who wait. Its successor must be the same disk (``record``), and
nothing the dead one had under way may land any more (``contract.Fence``): both are made sure of before the export starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vduse_blk import __version__, control, record
from vduse_blk.block.contract import Fence
from vduse_blk.block.errors import UserError
from vduse_blk.block.holders import Holder, holders_of
from vduse_blk.block.options import write_values
from vduse_blk.block.stack import Stack
from vduse_blk.control import ControlError, Exit, WorkerSpec
from vduse_blk.exporter import Endpoint, Exporter, ExportOptions, HandOver, reached
from vduse_blk.exports import ExportSpec, parse_exports
from vduse_blk.record import DiskRecord
from vduse_blk.source import open_source, parse_source
from vduse_blk.worker import settings
from vduse_blk.worker.handover import VERSION, Line, Successor
from vduse_blk.worker.notify import ReadyPipe, notify_systemd
from vduse_blk.worker.process import harden
from vduse_blk.worker.remains import Remains, settings_of

log = logging.getLogger("vduse_blk.disk")

_GLANCE = 1.0
"""Seconds during which a mere open descriptor does not count as use: programs look at every new disk for an instant."""
_UDEV_LOOKS = 10.0
"""Seconds during which udev's does not: it looks at every disk that was written to, and slow disks are slow for it, too."""
_MARGIN = 10.0
"""Seconds, at most, that are left of the starter's patience for undoing a start and saying why it failed."""
_TAKING_OVER = 10.0
"""Seconds a new server may take to serve the disk that the old one has handed over."""
_DRAINING = 5.0
"""Seconds that what is in flight may take to end before an upgrade, and before a server leaves a disk that is used; nothing
new is begun meanwhile."""
_LOOK = 0.0005
_REOPEN = 0.1
_FENCE = 60.0
"""Seconds, at most, that the storage is waited for when a dead server may have I/O under way."""


@dataclass(frozen=True, slots=True)
class _Export:
    """One way in which the disk is presented now. ``text`` is what the user calls it."""

    text: str
    exporter: Exporter
    endpoint: Endpoint


class _NotDrained(ControlError):
    """Something in flight has not ended."""


class Worker:
    """Serve the disk of ``spec`` until it is detached."""

    def __init__(self, spec: WorkerSpec, ready: ReadyPipe) -> None:
        self._spec = spec
        self._ready = ready
        self._phase = "starting"
        self._started_at = time.time()
        self._began = time.monotonic()
        self._stack: Stack | None = None
        self._exports: list[_Export] = []
        self._changing = asyncio.Lock()  # one resize or detach at a time
        self._finished = asyncio.Event()
        self._undone = asyncio.Event()  # a start that failed
        self._loss: Exception | None = None
        self._start: asyncio.Task[None] | None = None
        self._given_up: str | None = None
        self._predecessor: DiskRecord | None = None
        self._record: DiskRecord | None = None
        self._end = Exit.OK
        self._lock = -1
        self._was_open = False
        """The disk was served before, by this server or another."""
        self._remains: Remains | None = None
        self._keeps = True
        self._kept = False
        """The directory stays for the next server: what an earlier one left, since this start failed (unless the user has
        the disk detached); or what this one leaves, while a front-end waits."""
        self._inode: int | None = None
        """Of the file that is the storage, when it was opened."""
        self._replaced = False
        """The disk is another server's."""
        self._successor: int | None = None
        self._monitor: int | None = None

    async def run(self) -> Exit:
        """Returns when the disk is gone, or left to the next server (``Exit.LEFT``), or served by another one. Raises
        UserError if it could not be started (and nothing is left that was not there before), or if the disk is gone and its
        storage could not be closed."""
        wanted = parse_exports(self._spec.exports)
        if self._spec.upgrade_fd is not None:
            return await self._run_as_successor(wanted, Line(socket.socket(fileno=self._spec.upgrade_fd)))
        lock = await self._lock_directory()
        if lock is None:
            return Exit.OK
        self._lock = lock
        try:
            async with AsyncExitStack() as undo:
                self._predecessor = self._find_predecessor(wanted)
                self._remains = Remains(self._spec.name, self._spec.source)
                self._was_open |= self._remains.was_served
                self._write_state()
                reached("locked")
                if any(export.exporter.for_this_host for export in wanted):
                    for problem in harden():
                        log.warning("%s", problem)
                undo.push_async_callback(self._close_storage)
                await self._listen(undo)
                self._catch_signals()
                self._ready.watch(lambda: self._give_up("nobody waits for the disk any more"))
                await self._run_start(wanted)
                return await self._run_to_the_end()
        finally:
            self._leave_directory()

    async def _lock_directory(self) -> int | None:
        """None: the disk that was to be served again has been removed. Raises ControlError."""
        opened, self._spec = self._spec.directory_fd, replace(self._spec, directory_fd=None)
        try:
            if opened is None:
                return await self._lock_after_the_dying()
            return control.lock_directory(self._spec.name, opened_fd=opened)
        except ControlError as error:
            if opened is None or error.exit_code != Exit.NOT_FOUND:
                raise
            log.info("%s", error)
            return None
        finally:
            if opened is not None:
                os.close(opened)

    async def _lock_after_the_dying(self) -> int:
        """A killed server has the lock until its last thread leaves the kernel, which may wait there for storage. Raises
        ControlError."""
        name = self._spec.name
        if not control.is_dying(name):
            return control.lock_directory(name)
        log.info("disk '%s': waiting for the last I/O of the dead server, whose process has not ended", name)
        self._ready.watch(lambda: self._give_up("nobody waits for the disk any more"))
        deadline = time.monotonic() + self._patience().get("timeout", _FENCE)
        directory = control.open_directory(name)
        try:
            while control.is_dying(name):
                if self._given_up is not None:
                    raise ControlError(f"the start was given up: {self._given_up}", Exit.FAILED)
                if time.monotonic() >= deadline:
                    raise ControlError(
                        f"disk '{name}' cannot be taken over yet: its dead server hangs in the kernel, and its I/O may land "
                        f"any time; `vduse-blk detach {name} --force` fails the disk's requests and removes it",
                        Exit.BUSY,
                    )
                await asyncio.sleep(0.1)
            return control.lock_directory(name, opened_fd=directory)  # removed meanwhile, it is not made again
        finally:
            os.close(directory)

    async def _run_to_the_end(self) -> Exit:
        await self._finished.wait()
        if self._loss is not None:
            raise ControlError(str(self._loss), Exit.FAILED) from self._loss
        return self._end

    def _leave_directory(self) -> None:
        if not self._replaced and not self._kept and not self._is_left():
            control.remove_directory(self._spec.name, locked_fd=self._lock)
            reached("gone")

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    # --------------------------------------------------------------------------------------------------- start

    async def _run_start(self, wanted: list[ExportSpec]) -> None:
        self._start = asyncio.get_running_loop().create_task(self._bring_up(wanted))
        try:
            await self._start
        except BaseException as error:
            # An export undoes what its own start did; from then on it is ours to undo.
            try:
                if self._predecessor is not None:
                    for export in self._exports:
                        await export.exporter.leave()
                    self._phase = "failed"
                    self._note_state()
                elif self._exports:
                    await self._stop_exports()
                if not self._is_left():
                    await self._close_storage(abandon=True)
                if self._was_open and self._keeps:
                    self._kept = True
                    self._phase = "failed"
                    self._note_state()
            except Exception:
                # What went wrong first is what the user hears.
                log.exception("undoing the start of disk '%s' failed", self._spec.name)
            finally:
                self._undone.set()
            if isinstance(error, asyncio.CancelledError) and self._given_up is not None:
                raise UserError(f"the start was given up: {self._given_up}", exit_code=Exit.FAILED) from None
            raise
        finally:
            self._start = None

    async def _bring_up(self, wanted: list[ExportSpec]) -> None:
        spec = self._spec
        if self._given_up is not None:
            raise asyncio.CancelledError
        self._stack = stack = await self._open_storage()
        assert self._remains is not None
        spec = settings.restore(stack, spec, self._remains.settings)
        self._spec = spec = settings.change(stack, spec, control.read_settings(spec.name))
        reached("opened")
        self._remains.write()
        for text, export in zip(spec.exports, wanted, strict=True):
            before = self._predecessor if export.exporter.for_this_host else None
            queues = spec.queues or (before.queue_count if before is not None else 0)
            exporter = self._make_exporter(export, stack, queues, adopt=before is not None)
            self._inode = self._describe(stack, exporter).inode
            if exporter.for_this_host:
                self._put_on_record(exporter)
            self._add_export(text, exporter, await exporter.start())
        if self._predecessor is not None:
            replayed = sum(export.exporter.replayed for export in self._exports)
            log.info("disk '%s' is taken over; requests done again: %d", spec.name, replayed)
            control.add_event(spec.name, event="taken over", pid=os.getpid(), replayed=replayed)
        if self._given_up is not None:
            raise asyncio.CancelledError  # it came too late to interrupt the export's start
        self._phase = "serving"
        self._write_state()
        reached("serving")
        places = ", ".join(export.endpoint.path for export in self._exports)
        log.info("disk '%s' is %s", spec.name, places)
        facts = self._summary()
        if not self._ready.write(control.ready_line(facts.pop("device"), **facts)):
            self._given_up = "nobody waits for the disk any more"
            raise asyncio.CancelledError
        notify_systemd(f"READY=1\nSTATUS=serving {places}")

    def _make_exporter(self, export: ExportSpec, stack: Stack, queues: int, *, adopt: bool) -> Exporter:
        spec = self._spec
        return export.exporter(
            stack,
            spec.name,
            ExportOptions(
                queues=queues,
                queue_size=spec.queue_size,
                path=spec.path,
                read_only=export.read_only,
                own=export.own,
                directory=control.DiskPaths.of(spec.name).directory,
                adopt=adopt,
                **self._patience(),
            ),
        )

    def _add_export(self, text: str, exporter: Exporter, endpoint: Endpoint) -> None:
        self._exports.append(_Export(text, exporter, endpoint))
        exporter.failed.add_done_callback(self._on_failed)

    def _find_predecessor(self, wanted: list[ExportSpec]) -> DiskRecord | None:
        """What a dead server left to be taken over. Raises ControlError if it cannot be."""
        name = self._spec.name
        if not any(export.exporter.is_left(name) for export in wanted):
            return None
        found = record.read(name)
        if found is None:
            raise self._not_taken_over("what it is was not recorded, or the record is lost")
        difference = found.difference_of_source(self._spec)
        if difference is not None:
            raise self._not_taken_over(difference)
        self._was_open = True
        return found

    def _not_taken_over(self, why: str, code: Exit = Exit.BUSY) -> ControlError:
        name = self._spec.name
        return ControlError(
            f"disk '{name}' has lost its server and is not taken over: {why}; "
            f"`vduse-blk detach {name} --force` fails its requests and removes it",
            code,
        )

    async def _open_storage(self) -> Stack:
        stack = self._make_stack()
        if self._predecessor is None:
            await stack.open()
            return stack
        if stack.fence is Fence.LOST:
            # Its users are told now rather than never; what they would find otherwise are zeros.
            name, directory = self._spec.name, control.DiskPaths.of(self._spec.name).directory
            for export in parse_exports(self._spec.exports):
                if export.exporter.is_left(name):
                    await export.exporter.fail_left(name, directory)
            self._keeps = False
            raise ControlError(
                f"the contents of disk '{self._spec.name}' died with its server: its requests were failed and it was "
                "removed; attach it again for an empty one",
                Exit.FAILED,
            )
        if stack.fence is Fence.UNKNOWN:
            raise self._not_taken_over(f"{stack} does not say how writes of a dead server are kept from landing later")
        deadline = time.monotonic() + self._patience().get("timeout", _FENCE)
        waited = False
        while True:
            try:
                await stack.open()
                return stack
            except UserError as error:
                if error.exit_code != Exit.BUSY:
                    raise
                if time.monotonic() >= deadline:
                    raise ControlError(
                        f"disk '{self._spec.name}' cannot be taken over yet: I/O of its dead server may still be under way, "
                        f"or somebody else uses the storage ({error})",
                        Exit.BUSY,
                    ) from error
                if not waited:
                    log.info("disk '%s': waiting for the last I/O of the dead server (%s)", self._spec.name, error)
                    waited = True
            await asyncio.sleep(0.1)
            stack = self._make_stack()

    def _make_stack(self) -> Stack:
        spec = self._spec
        assert self._remains is not None
        stack = open_source(
            spec.source,
            dict(spec.options),
            read_only=spec.read_only,
            block_size=spec.block_size,
            size=spec.size,
            made=self._was_open,
            serial=spec.serial if spec.serial is not None else spec.name[: control.MAX_SERIAL],
            filters=spec.filters,
            on_error=spec.on_error,
            on_full=spec.on_full,
        )
        stack.remember_losses(self._remains.lost(keep=self._was_open))
        return stack

    def _put_on_record(self, exporter: Exporter) -> None:
        """Before the kernel is asked for anything that outlives us. Raises ControlError: it is another disk."""
        assert self._stack is not None
        found = self._describe(self._stack, exporter)
        if self._predecessor is not None:
            difference = self._predecessor.difference(found)
            if difference is not None:
                raise self._not_taken_over(difference)
            if found.made_with is None and self._predecessor.made_with is not None:  # the next one may say it again
                self._spec = replace(self._spec, size=self._predecessor.made_with)
                found = replace(found, spec=self._spec)
        record.write(found)
        self._record = found

    def _describe(self, stack: Stack, exporter: Exporter) -> DiskRecord:
        source = parse_source(self._spec.source)
        path = source.options.get("path", self._spec.options.get("path"))
        return DiskRecord.of(self._spec, stack.info, exporter.queue_count, path)

    def _patience(self) -> dict[str, float]:
        """How long the export may wait, so that its own explanation comes before whoever started us gives up."""
        if self._spec.timeout is None:
            return {}
        spent = time.monotonic() - self._began
        return {"timeout": max(0.0, self._spec.timeout - min(_MARGIN, self._spec.timeout / 4) - spent)}

    def _give_up(self, reason: str) -> None:
        """Before or during the start."""
        if self._given_up is None:
            log.warning("giving up: %s", reason)
            self._given_up = reason
            if self._start is not None:
                self._start.cancel()

    def _on_failed(self, failed: asyncio.Future[str]) -> None:
        if failed.cancelled():
            return
        if self._phase == "serving":
            self._phase = "broken"
            self._note_state()
            notify_systemd(f"STATUS=broken: {failed.result()}")

    # ----------------------------------------------------------------------------------------------------- end

    def _on_signal(self, number: int) -> None:
        if self._start is not None:
            self._give_up(f"interrupted by {signal.Signals(number).name}")
        else:
            self._signal_task = asyncio.get_running_loop().create_task(self._detach_on_signal(number))

    def _on_hangup(self) -> None:
        self._hangup_task = asyncio.get_running_loop().create_task(self._read_settings())

    async def _read_settings(self) -> None:
        """The administrator's, of the disk. Nothing of them is taken if one is wrong."""
        name = self._spec.name
        async with self._changing:  # the disk may be about to be another server's
            if self._replaced and self._successor is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._successor, signal.SIGHUP)
                return
        try:
            values = control.read_settings(name)
            if not values:
                log.info("SIGHUP: no settings in %s", control.settings_file(name))
                return
            self._set(values)
        except (UserError, OSError) as error:
            log.error("SIGHUP: the settings of disk '%s' are as before: %s", name, error)

    async def _detach_on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        try:
            try:
                await self._detach(force=False, signalled=True)
            except ControlError as error:
                if self._replaced and self._successor is not None:
                    log.info("%s: passed on to process %d, which serves the disk now", name, self._successor)
                    os.kill(self._successor, number)
                    return
                if error.exit_code != Exit.BUSY or not self._exports or self._finished.is_set():
                    raise
                await self._leave(name, error)
        except Exception as error:
            if self._finished.is_set():
                return  # the disk is gone, and run() says what went wrong
            if isinstance(error, UserError):
                log.error("%s: still serving: %s", name, error)
            else:
                log.exception("%s: detach failed, still serving", name)

    async def _leave(self, signal_name: str, why: ControlError) -> None:
        """End, and let the disk's users wait for the next server. Raises ControlError if there is nothing to take over."""
        async with self._changing:
            assert self._stack is not None
            if self._stack.fence is not Fence.OPEN:
                raise ControlError(f"{why}; nobody could take it over: {self._stack} ends with its server", why.exit_code)
            self._phase = "left"
            notify_systemd("STOPPING=1")
            try:
                if isinstance(why, _NotDrained):
                    raise why
                await self._drain(self._exports)
            except ControlError as error:
                # To stop the queues would be to fail it. It is marked in the in-flight log, and done by the next server.
                log.warning("%s: %s; left to the next server as it is: %s", signal_name, why, error)
                self._note_state()
                logging.shutdown()
                os._exit(Exit.LEFT)
            for export in self._exports:
                await export.exporter.leave()
            await self._close_storage()
            self._note_state()
            reached("left")
            log.warning(
                "%s: %s. The server ends; users of the disk wait until the next `serve` or `attach` of '%s' takes it over, "
                "with the same options, or `detach --force` removes it",
                signal_name,
                why,
                self._spec.name,
            )
            self._end = Exit.LEFT
            self._finished.set()

    async def _detach(self, *, force: bool, signalled: bool = False) -> None:
        """Returns when the disk is gone. Raises what kept it from going, and then it is served as before: a later call
        tries again. Raises, too, if it went and the storage could not be closed; then the server ends all the same.

        ``signalled``: whoever manages this process wants it to end; a front-end waits for the next server.
        """
        async with self._changing:
            if self._replaced:
                raise ControlError(f"disk '{self._spec.name}' is process {self._successor}'s now; try again", Exit.BUSY)
            if self._finished.is_set():
                return
            self._kept = signalled and self._is_to_be_remembered()
            if self._start is not None or not self._exports:
                self._keeps = False
                self._give_up("detach")
                await self._undone.wait()
                if self._is_left():
                    raise ControlError(f"disk '{self._spec.name}' was not removed completely; detach it again", Exit.FAILED)
                return
            claims: list[int] = []
            stack = self._stack
            assert stack is not None
            try:
                if not force:
                    for export in self._exports:
                        if export.endpoint.kind == "block":
                            claims += await self._claim(export.endpoint.path)
                        elif not signalled or self._is_waiting():
                            self._check_unused(export)
                        elif export.exporter.users() and stack.fence is Fence.OPEN:
                            await self._drain_for_good(export)
                await self._stop_exports()
            except BaseException:
                for export in self._exports:
                    if export.exporter.hands_over:
                        export.exporter.hold(False)
                raise
            finally:
                for claim in claims:
                    os.close(claim)
            try:
                await self._close_storage()
            except Exception as error:
                log.exception("the storage of disk '%s' could not be closed", self._spec.name)
                self._loss = ControlError(
                    f"disk '{self._spec.name}' is removed, but its storage could not be closed: {error}", Exit.FAILED
                )
                raise self._loss from error
            finally:
                self._finished.set()

    async def _drain_for_good(self, export: _Export) -> None:
        """Before the end of an export whose users wait for the next server. The others go on: a disk of this host writes
        until it is gone. Raises _NotDrained; the export is held."""
        try:
            await self._drain([export])
        except ControlError as error:
            raise _NotDrained(str(error), Exit.BUSY) from error

    async def _stop_exports(self) -> None:
        before = self._phase
        self._phase = "detaching"
        if self._stack is not None:
            self._stack.let_go(True)
        self._note_state()
        notify_systemd("STATUS=detaching")
        try:
            while self._exports:
                await self._exports[-1].exporter.stop()
                self._exports.pop()
        except BaseException:
            self._phase = "broken" if any(export.exporter.failed.done() for export in self._exports) else before
            if self._stack is not None:
                self._stack.let_go(False)
            self._note_state()
            notify_systemd(f"STATUS={self._phase}: detach failed")
            raise
        notify_systemd("STOPPING=1")  # not before: it cannot be taken back

    async def _close_storage(self, *, abandon: bool = False) -> None:
        """``abandon``: and remove a file that was created for the disk, which nobody ever had."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            await (stack.abandon() if abandon else stack.close())

    def _is_to_be_remembered(self) -> bool:
        """Whether users wait for the next server to whom it matters what this one was told and has lost."""
        if self._remains is None or not self._remains.matter:
            return False
        return any(export.endpoint.kind != "block" and export.exporter.users() for export in self._exports)

    def _is_left(self) -> bool:
        """Whether something of the disk still exists in the kernel, so that its directory must stay."""
        return any(export.exporter.is_there(self._spec.name) for export in parse_exports(self._spec.exports))

    async def _claim(self, path: str) -> list[int]:
        """Refuse if the device is in use; otherwise open it exclusively, so that nobody can mount it meanwhile."""
        began = time.monotonic()
        while True:
            holders = await asyncio.to_thread(self._holders, path)
            if not holders:
                break
            patience = _UDEV_LOOKS if all(holder.is_udev for holder in holders) else _GLANCE
            if time.monotonic() - began > patience or any(holder.kind != "open" for holder in holders):
                raise self._in_use(path, holders)
            await asyncio.sleep(0.1)
        try:
            return [os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ControlError(
                f"disk '{self._spec.name}' ({path}) is held by the kernel: {error.strerror}", Exit.BUSY
            ) from error

    def _check_unused(self, export: _Export) -> None:
        users = export.exporter.users()
        if users:
            raise self._in_use(export.endpoint.path, users)

    def _in_use(self, path: str, holders: list[Holder]) -> ControlError:
        return ControlError(
            f"disk '{self._spec.name}' ({path}) is in use: {'; '.join(map(str, holders))}",
            Exit.BUSY,
            [asdict(holder) for holder in holders],
        )

    @staticmethod
    def _holders(path: str) -> list[Holder]:
        try:
            number = os.stat(path).st_rdev
        except FileNotFoundError:
            return []
        return holders_of(os.major(number), os.minor(number))

    # ----------------------------------------------------------------------------------------------- live upgrade

    async def _upgrade(self, command: object, patience: object) -> dict[str, Any]:
        """Have another server go on with the disk (see ``handover``); returns facts about it, and then this one ends. Raises
        ControlError, and then this one serves on."""
        if not isinstance(command, list) or not command or not all(isinstance(word, str) and word for word in command):
            raise ControlError(f"command: {command!r} is not usable; accepted are lists of texts", Exit.USAGE)
        if not isinstance(patience, int | float) or not 0 < patience <= control.MAX_TIMEOUT:
            raise ControlError(f"patience: {patience!r} is not usable; accepted are {control.TIMEOUT_RULE}", Exit.USAGE)
        async with self._changing:
            stack, name = self._stack, self._spec.name
            if stack is None or self._phase != "serving":
                raise ControlError(f"disk '{name}' is {self._phase}; it cannot be upgraded", Exit.BUSY)
            if stack.fence is not Fence.OPEN:
                raise ControlError(f"disk '{name}' cannot be upgraded: {stack} ends with its server", Exit.UNSUPPORTED)
            for export in self._exports:
                if not export.exporter.hands_over:
                    why = f"the export {export.text} cannot be handed over"
                    raise ControlError(f"disk '{name}' cannot be upgraded: {why}", Exit.UNSUPPORTED)
            disk = self._describe(stack, self._exports[0].exporter)
            if self._inode != disk.inode:  # nobody could open it again
                raise ControlError(f"disk '{name}' cannot be upgraded: {stack} is not the same file any more", Exit.BUSY)
            reached("upgrade-asked")
            new = await asyncio.to_thread(Successor, command, self._spec)
            at_rest: list[Exporter] = []
            started = False
            try:
                self._successor = new.process.pid
                self._note_state()
                version = (await asyncio.to_thread(new.expect, ["ready"], patience)).get("program")
                reached("upgrade-ready")
                began = time.monotonic()
                await self._drain(self._exports)
                handed = []
                for export in self._exports:
                    at_rest.append(export.exporter)
                    handed.append(await export.exporter.hand_over())
                reached("drained")
                await self._close_storage()
                reached("let-go")
                await asyncio.to_thread(self._hand_over, new, disk.facts(), handed)
                reached("sent")
                until = time.monotonic() + _TAKING_OVER
                step = ""
                while step != "serving":
                    left = max(0.0, until - time.monotonic())
                    said = await asyncio.to_thread(new.expect, ["starting", "serving"], left)
                    started, step = True, said["step"]
                await asyncio.to_thread(self._tell, new, {"step": "yours"})
            except BaseException as error:
                started = await asyncio.to_thread(new.end) or started
                await self._go_on(at_rest, started)
                if isinstance(error, UserError):
                    raise ControlError(f"{error}; disk '{name}' is served as before", error.exit_code) from error
                raise
            self._replaced = True
            reached("replaced")
            notify_systemd(f"MAINPID={new.process.pid}")
            unsettled = None
            try:
                await asyncio.to_thread(new.expect, ["settled"], _TAKING_OVER)
            except ControlError as error:
                log.error("%s", error)
                unsettled = error
            new.line.close()
            for export in self._exports:
                await export.exporter.release()
            self._exports.clear()
            self._finished.set()
            log.info("disk '%s' is served by process %d", name, new.process.pid)
            if unsettled is not None:
                sentence = f"disk '{name}' is process {new.process.pid}'s now, which cannot be asked: {unsettled}"
                raise ControlError(sentence, unsettled.exit_code) from unsettled
            return {"pid": new.process.pid, "version": version, "pause": said["at"] - began}

    async def _drain(self, exports: list[_Export]) -> None:
        """Begin nothing new, and wait until nothing is in flight. Raises ControlError."""
        deadline = time.monotonic() + _DRAINING
        exporters = [export.exporter for export in exports if export.exporter.hands_over]
        while True:
            for exporter in exporters:
                exporter.hold(True)  # again and again: drivers start queues meanwhile
            if all(exporter.is_quiet() for exporter in exporters):
                return
            if self._is_waiting():
                raise ControlError("requests wait for storage, and would fail", Exit.BUSY)
            if time.monotonic() > deadline:
                raise ControlError(f"what is in flight has not ended within {_DRAINING:g} seconds", Exit.TIMEOUT)
            await asyncio.sleep(_LOOK)

    def _hand_over(self, new: Successor, disk: dict[str, Any], handed: list[HandOver]) -> None:
        fds = [self._lock]
        exports = []
        for export, given in zip(self._exports, handed, strict=True):
            facts = {"queue_count": export.exporter.queue_count, "facts": given.facts, "fds": [len(fds), len(given.fds)]}
            exports.append(facts)
            fds += given.fds
        monitor = (self._monitor or os.getppid()) if self._spec.restart != "no" else None
        changed = {} if self._remains is None else self._remains.settings  # the new one's specification is older
        message = {"version": VERSION, "disk": disk, "monitor": monitor, "exports": exports, "settings": changed}
        self._tell(new, message, fds)

    @staticmethod
    def _tell(new: Successor, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            new.line.send(message, fds)
        except OSError as error:
            raise ControlError(f"the new server is gone: {error.strerror}", Exit.FAILED) from error

    async def _go_on(self, at_rest: list[Exporter], started: bool) -> None:
        """After a new server that failed, and has ended. The disk's users wait, so this does not give up."""
        self._successor = None
        self._was_open = True
        said = ""
        while self._stack is None:
            try:
                stack = self._make_stack()
                await stack.open()
                self._stack = stack
            except UserError as error:
                if str(error) != said:
                    log.error("disk '%s': its storage cannot be opened again, its users wait: %s", self._spec.name, error)
                    said = str(error)
                await asyncio.sleep(_REOPEN)
        for export in self._exports:
            try:
                if export.exporter in at_rest:
                    await export.exporter.resume(self._stack, touched=started)
                export.exporter.hold(False)
            except Exception as error:
                log.exception("disk '%s': the export %s does not go on", self._spec.name, export.text)
                export.exporter.fail(f"not served any more since an upgrade failed: {error}")
        self._note_state()

    async def _run_as_successor(self, wanted: list[ExportSpec], line: Line) -> Exit:
        os.set_inheritable(line.fileno(), False)
        self._spec = replace(self._spec, upgrade_fd=None)
        async with self._changing:
            try:
                listening = await self._bind(self._socket_for_later())
                await self._succeed(wanted, line)
            except BaseException as error:
                is_bug = not isinstance(error, UserError)
                log.error("disk '%s' is not taken over: %s", self._spec.name, error, exc_info=is_bug)
                code = error.exit_code if isinstance(error, UserError) else Exit.FAILED
                with contextlib.suppress(OSError):
                    line.send({"error": str(error) or type(error).__name__, "code": int(code)})
                # Nothing is undone: all of it is the old server's again, as soon as this process is no more.
                logging.shutdown()
                os._exit(code)
            try:
                undo = AsyncExitStack()
                undo.push_async_callback(self._close_storage)
                undo.callback(listening.close)
                message: dict[str, Any] = {"step": "settled"}
                try:
                    os.replace(self._socket_for_later(), control.DiskPaths.of(self._spec.name).socket)
                except OSError as error:  # the disk is served all the same, and ends by a signal
                    why = f"it has no control socket: {error.strerror}"
                    log.error("disk '%s': %s", self._spec.name, why)
                    message = {"error": why}
                self._note_state()
                with contextlib.suppress(OSError):
                    line.send(message)
                self._tell_systemd_after(line)
            except BaseException:
                log.exception("disk '%s': after it was taken over", self._spec.name)
                logging.shutdown()
                os._exit(Exit.FAILED)  # as a crash: the disk waits for the next server
        try:
            async with undo:
                return await self._run_to_the_end()
        finally:
            self._leave_directory()

    def _tell_systemd_after(self, line: Line) -> None:
        """When the old server is through: systemd listens to the main process only, and to who is it now first."""
        loop = asyncio.get_running_loop()
        places = ", ".join(export.endpoint.path for export in self._exports)

        def tell() -> None:
            loop.remove_reader(line.fileno())
            line.close()
            notify_systemd(f"READY=1\nSTATUS=serving {places}")

        loop.add_reader(line.fileno(), tell)

    async def _succeed(self, wanted: list[ExportSpec], line: Line) -> None:
        """Returns when the disk is served by this process. Raises anything, and then it must end."""
        self._was_open = True
        self._remains = Remains(self._spec.name, self._spec.source)
        stack = self._make_stack()
        if any(export.exporter.for_this_host for export in wanted):
            for problem in harden():
                log.warning("%s", problem)
        self._catch_signals()
        reached("prepared")
        line.send({"step": "ready", "version": VERSION, "program": __version__})
        try:
            message, fds = await asyncio.to_thread(line.receive)
        except (EOFError, ValueError, OSError) as error:
            raise ControlError(f"the old server has not handed the disk over ({error or 'it is gone'})") from error
        if message.get("version") != VERSION:
            raise ControlError(f"it is handed over in version {message.get('version')}; accepted is {VERSION}")
        self._lock, self._monitor = fds[0], message["monitor"]
        reached("received")
        await stack.open()
        if "settings" in message:
            self._remains.settings = settings_of(message["settings"])
        self._spec = settings.restore(stack, self._spec, self._remains.settings)
        self._stack = stack
        reached("reopened")
        exporters: list[Exporter] = []
        for export, facts in zip(wanted, message["exports"], strict=True):
            exporter = self._make_exporter(export, stack, facts["queue_count"], adopt=True)
            if not exporters:
                found = self._describe(stack, exporter)
                difference = DiskRecord(spec=self._spec, **message["disk"]).difference(found)
                if difference is not None:
                    raise ControlError(difference, Exit.BUSY)
                self._inode = found.inode
            if exporter.for_this_host:
                self._record = found
            first, count = facts["fds"]
            await exporter.receive(HandOver(facts["facts"], fds[first : first + count]))
            exporters.append(exporter)
        with contextlib.suppress(OSError):  # the old server's death, from here on to the end
            line.send({"step": "starting"})
        for text, exporter in zip(self._spec.exports, exporters, strict=True):
            self._add_export(text, exporter, await exporter.resume(stack))
        reached("restarted")
        self._phase = "serving"
        at = time.monotonic()
        with contextlib.suppress(OSError):
            line.send({"step": "serving", "at": at})
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(line.receive)
        for present in self._exports:
            present.exporter.attend()
        reached("took-over")
        log.info("disk '%s' is taken over from a server that runs, version %s", self._spec.name, __version__)
        control.add_event(self._spec.name, event="upgraded", pid=os.getpid(), version=__version__)

    # ------------------------------------------------------------------------------------------ control socket

    async def _listen(self, undo: AsyncExitStack) -> None:
        path = control.DiskPaths.of(self._spec.name).socket
        new = path.with_name("control.new")  # no longer than the final name, which has been checked
        server = await self._bind(new)
        os.replace(new, path)
        undo.callback(server.close)

    def _socket_for_later(self) -> Path:
        """Where a new server listens before the disk is its own: later there may be no room for it any more."""
        return control.DiskPaths.of(self._spec.name).socket.with_name("control.next")

    async def _bind(self, path: Path) -> asyncio.Server:
        """Raises ControlError."""
        try:
            path.unlink(missing_ok=True)  # of a dead predecessor: we hold the lock, or the only line to who does
            server = await asyncio.start_unix_server(self._converse, path, limit=control.MAX_MESSAGE)
            os.chmod(path, 0o600)
        except OSError as error:
            raise ControlError(f"no control socket can be made at {path}: {error.strerror}", Exit.FAILED) from error
        return server

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(await self._reply(line))
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # gone in the middle, a line beyond the limit, or the server ends: nothing to answer
        finally:
            writer.close()

    async def _reply(self, line: bytes) -> bytes:
        try:
            request = control.decode_message(line)
            match request.get("op"):
                case "ping":
                    return control.ok_reply(phase=self._phase)
                case "info":
                    return control.ok_reply(**self._info())
                case "resize":
                    return control.ok_reply(size=await self._resize(request.get("size")))
                case "set":
                    return control.ok_reply(**self._set(request.get("values")))
                case "detach":
                    await self._detach(force=request.get("force") is True)
                    return control.ok_reply()
                case "upgrade":
                    return control.ok_reply(**await self._upgrade(request.get("command"), request.get("patience")))
                case other:
                    raise ControlError(
                        f"op: {other!r} is not known; accepted are ping, info, resize, set, detach, upgrade", Exit.USAGE
                    )
        except ControlError as error:
            return control.error_reply(str(error), error.exit_code, error.holders)
        except UserError as error:
            return control.error_reply(str(error), error.exit_code)
        except ValueError as error:
            return control.error_reply(f"the request is not usable: {error}", Exit.USAGE)
        except OSError as error:
            log.error("%s", error)
            return control.error_reply(str(error), Exit.FAILED)
        except Exception as error:
            log.exception("bug while answering %r", line[:200])
            return control.error_reply(f"bug in the server: {error!r}; its log has more", Exit.FAILED)

    def _set(self, values: object) -> dict[str, Any]:
        """Change settings; returns those of the disk now."""
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise ControlError(f"values: {values!r} is not usable; accepted is an object of texts", Exit.USAGE)
        if self._stack is None or self._remains is None or not self._exports:
            phase = self._phase if self._successor is None else "being upgraded"
            raise ControlError(f"disk '{self._spec.name}' is {phase}; nothing of it can be set", Exit.BUSY)
        self._spec = settings.change(self._stack, self._spec, values)
        self._remains.settings |= values  # a successor goes on with them
        self._remains.write()
        self._write_state()
        log.info("disk '%s' has settings %s", self._spec.name, " ".join(f"{key}={value}" for key, value in values.items()))
        return self._settings(self._stack)

    @staticmethod
    def _settings(stack: Stack) -> dict[str, Any]:
        return {
            "policy": stack.patience.policy.facts(),
            "filters": [
                {"name": name, "options": write_values(layer.options), **layer.facts()}
                for name, layer in stack.filters.items()
            ],
        }

    async def _resize(self, size: object) -> int:
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ControlError(f"size: {size!r} is not usable; accepted are positive numbers of bytes", Exit.USAGE)
        async with self._changing:
            if self._stack is None or not self._exports:
                raise ControlError(f"disk '{self._spec.name}' is {self._phase}; it cannot be resized", Exit.BUSY)
            reached("resizing")
            info = await self._stack.resize(size)
            reached("resized")
            if self._record is not None:
                self._record = replace(self._record, size=info.size)
                try:
                    record.write(self._record)
                except ControlError as error:
                    log.warning("%s", error)  # the old size is as good: a disk that has grown may be taken over
            for export in self._exports:
                await export.exporter.resized(info)
                await self._seen_by_host(export.endpoint.path, info.size)
            self._note_state()
            return info.size

    @staticmethod
    async def _seen_by_host(path: str, size: int) -> None:
        """The driver re-reads the capacity on an interrupt, a few milliseconds later."""
        sysfs = Path("/sys/class/block", Path(path).name, "size")
        deadline = time.monotonic() + 10
        while sysfs.exists() and int(sysfs.read_text()) * 512 != size:
            if time.monotonic() > deadline:
                raise ControlError(f"the storage has {size} bytes now, but {path} does not show it", Exit.TIMEOUT)
            await asyncio.sleep(0.005)

    # --------------------------------------------------------------------------------------------------- facts

    def _summary(self) -> dict[str, Any]:
        """What ``state.json``, the ready line and ``info`` share."""
        spec = self._spec
        facts: dict[str, Any] = {
            "name": spec.name,
            "pid": os.getpid(),
            "source": spec.source,
            "phase": self._phase,
            "started_at": self._started_at,
        }
        if self._exports:
            facts["device"] = self._exports[0].endpoint.path
        if self._stack is not None:
            info = self._stack.info
            facts |= {
                "size": info.size,
                "block_size": info.logical_block_size,
                "read_only": info.read_only,
                "serial": info.serial,
            }
            facts |= self._settings(self._stack)
            facts |= self._waiting(self._stack)
        if self._exports:
            exporter = self._exports[0].exporter
            facts |= {"path": exporter.path, "queue_count": exporter.queue_count}
        if self._predecessor is not None:
            facts["taken_over"] = True
        if spec.restart != "no":
            facts["monitor"] = self._monitor or os.getppid()
        if self._successor is not None:
            facts["successor"] = self._successor
        return facts

    def _is_waiting(self) -> bool:
        return self._stack is not None and self._stack.patience.waiting() is not None

    def _waiting(self, stack: Stack) -> dict[str, Any]:
        """``phase`` and ``waiting`` of a disk some of whose requests wait for its storage; nothing if none does."""
        waiting = stack.patience.waiting()
        if waiting is None or self._phase != "serving":
            return {}
        since = time.time() - (time.monotonic() - waiting.since)
        error = os.strerror(waiting.error)
        return {"phase": "waiting", "waiting": {"requests": waiting.requests, "since": since, "error": error}}

    def _write_state(self) -> None:
        control.write_state(self._spec.name, self._summary() | {"spec": asdict(self._spec)})

    def _note_state(self) -> None:
        """While the disk is served: it goes on whatever becomes of the run directory."""
        try:
            self._write_state()
        except ControlError as error:
            log.warning("%s", error)

    def _info(self) -> dict[str, Any]:
        facts = self._summary()
        if not self._exports:
            return facts
        # The first export's facts are the disk's; those of all are in "exports".
        exports = [{"export": export.text, **export.exporter.status()} for export in self._exports]
        totals: dict[str, int] = {}
        for queue in (queue for export in exports for queue in export["queues"]):
            for key, value in queue["counters"].items():
                totals[key] = totals.get(key, 0) + value
        return facts | exports[0] | {"counters": totals} | ({"exports": exports} if len(exports) > 1 else {})
