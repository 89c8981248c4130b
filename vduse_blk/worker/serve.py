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
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vduse_blk import __version__, record
from vduse_blk.block.contract import Fence
from vduse_blk.block.errors import UserError
from vduse_blk.block.holders import Holder, holders_of
from vduse_blk.block.options import write_values
from vduse_blk.block.stack import Stack
from vduse_blk.control import messages, notes, rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.messages import MAX_MESSAGE
from vduse_blk.control.process import is_dying
from vduse_blk.control.settings import read_settings, settings_file
from vduse_blk.control.spec import MAX_SERIAL, MAX_TIMEOUT, TIMEOUT_RULE, WorkerSpec
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

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Gives the values of the reply to a request. What it raises is the client's to read: ControlError with its exit code and
holders; UserError; ValueError, a request that is not usable; OSError. Anything else is a bug, and logged as one."""

_GLANCE = 1.0
"""Seconds during which a mere open descriptor does not count as use: programs look at every new disk for an instant."""
_UDEV_LOOKS = 10.0
"""Seconds during which udev's does not: it looks at every disk that was written to, and slow disks are slow for it, too."""
_MARGIN = 10.0
"""Seconds, at most, that are left of the starter's patience for undoing a start and saying why it failed."""
_DRAINING = 5.0
"""Seconds that what is in flight may take to end before an upgrade, and before a server leaves a disk that is used; nothing
new is begun meanwhile."""
_LOOK = 0.0005
_TAKING_OVER = 10.0
"""Seconds a new server may take to serve the disk that the old one has handed over."""
_REOPEN = 0.1
_FENCE = 60.0
"""Seconds, at most, that the storage is waited for when a dead server may have I/O under way."""


@dataclass(frozen=True, slots=True)
class Export:
    """One way in which the disk is presented now. ``text`` is what the user calls it."""

    text: str
    exporter: Exporter
    endpoint: Endpoint


class _NotDrained(ControlError):
    """Something in flight has not ended."""


class Worker:
    """Serve the disk of ``spec`` until it is detached."""

    def __init__(self, spec: WorkerSpec, ready: ReadyPipe) -> None:
        self._disk = Disk(spec)
        self._ready = ready
        self._undone = asyncio.Event()  # a start that failed
        self._loss: Exception | None = None
        self._start: asyncio.Task[None] | None = None
        self._given_up: str | None = None
        self._end = Exit.OK
        self._keeps = True
        self._kept = False
        """The directory stays for the next server: what an earlier one left, since this start failed (unless the user has
        the disk detached); or what this one leaves, while a front-end waits."""

    async def run(self) -> Exit:
        """Returns when the disk is gone, or left to the next server (``Exit.LEFT``), or served by another one. Raises
        UserError if it could not be started (and nothing is left that was not there before), or if the disk is gone and its
        storage could not be closed."""
        disk = self._disk
        wanted = parse_exports(disk.spec.exports)
        if disk.spec.upgrade_fd is not None:
            return await self._run_as_successor(wanted)
        lock = await self._lock_directory()
        if lock is None:
            return Exit.OK
        disk.lock = lock
        try:
            async with AsyncExitStack() as undo:
                disk.predecessor = self._find_predecessor(wanted)
                disk.remains = Remains(disk.name, disk.spec.source)
                disk.was_open |= disk.remains.was_served
                disk.write_state()
                reached("locked")
                if any(export.exporter.for_this_host for export in wanted):
                    for problem in harden():
                        log.warning("%s", problem)
                undo.push_async_callback(disk.close_storage)
                listening = await listen(rundir.DiskPaths.of(disk.name).socket, self._answer)
                undo.callback(listening.close)
                self._catch_signals()
                self._ready.watch(lambda: self._give_up("nobody waits for the disk any more"))
                await self._run_start(wanted)
                return await self._run_to_the_end()
        finally:
            self._leave_directory()

    async def _run_as_successor(self, wanted: list[ExportSpec]) -> Exit:
        listening = await take(self._disk, wanted, self._answer, self._catch_signals)
        try:
            async with AsyncExitStack() as undo:
                undo.push_async_callback(self._disk.close_storage)
                undo.callback(listening.close)
                return await self._run_to_the_end()
        finally:
            self._leave_directory()

    async def _lock_directory(self) -> int | None:
        """None: the disk that was to be served again has been removed. Raises ControlError."""
        disk = self._disk
        opened, disk.spec = disk.spec.directory_fd, replace(disk.spec, directory_fd=None)
        try:
            if opened is None:
                return await self._lock_after_the_dying()
            return rundir.lock_directory(disk.name, opened_fd=opened)
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
        name = self._disk.name
        if not is_dying(name):
            return rundir.lock_directory(name)
        log.info("disk '%s': waiting for the last I/O of the dead server, whose process has not ended", name)
        self._ready.watch(lambda: self._give_up("nobody waits for the disk any more"))
        deadline = time.monotonic() + self._disk.patience().get("timeout", _FENCE)
        directory = rundir.open_directory(name)
        try:
            while is_dying(name):
                if self._given_up is not None:
                    raise ControlError(f"the start was given up: {self._given_up}", Exit.FAILED)
                if time.monotonic() >= deadline:
                    raise ControlError(
                        f"disk '{name}' cannot be taken over yet: its dead server hangs in the kernel, and its I/O may land "
                        f"any time; `vduse-blk detach {name} --force` fails the disk's requests and removes it",
                        Exit.BUSY,
                    )
                await asyncio.sleep(0.1)
            return rundir.lock_directory(name, opened_fd=directory)  # removed meanwhile, it is not made again
        finally:
            os.close(directory)

    async def _run_to_the_end(self) -> Exit:
        await self._disk.finished.wait()
        if self._loss is not None:
            raise ControlError(str(self._loss), Exit.FAILED) from self._loss
        return self._end

    def _leave_directory(self) -> None:
        disk = self._disk
        if not disk.replaced and not self._kept and not disk.is_left():
            rundir.remove_directory(disk.name, locked_fd=disk.lock)
            reached("gone")

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    # ---------------------------------------------------------------------------------------------------------- start

    async def _run_start(self, wanted: list[ExportSpec]) -> None:
        disk = self._disk
        self._start = asyncio.get_running_loop().create_task(self._bring_up(wanted))
        try:
            await self._start
        except BaseException as error:
            # An export undoes what its own start did; from then on it is ours to undo.
            try:
                if disk.predecessor is not None:
                    for export in disk.exports:
                        await export.exporter.leave()
                    disk.phase = "failed"
                    disk.note_state()
                elif disk.exports:
                    await self._stop_exports()
                if not disk.is_left():
                    await disk.close_storage(abandon=True)
                if disk.was_open and self._keeps:
                    self._kept = True
                    disk.phase = "failed"
                    disk.note_state()
            except Exception:
                # What went wrong first is what the user hears.
                log.exception("undoing the start of disk '%s' failed", disk.name)
            finally:
                self._undone.set()
            if isinstance(error, asyncio.CancelledError) and self._given_up is not None:
                raise UserError(f"the start was given up: {self._given_up}", exit_code=Exit.FAILED) from None
            raise
        finally:
            self._start = None

    async def _bring_up(self, wanted: list[ExportSpec]) -> None:
        disk = self._disk
        spec = disk.spec
        if self._given_up is not None:
            raise asyncio.CancelledError
        disk.stack = stack = await self._open_storage()
        assert disk.remains is not None
        spec = settings.restore(stack, spec, disk.remains.settings)
        disk.spec = spec = settings.change(stack, spec, read_settings(spec.name))
        reached("opened")
        disk.remains.write()
        for text, export in zip(spec.exports, wanted, strict=True):
            before = disk.predecessor if export.exporter.for_this_host else None
            queues = spec.queues or (before.queue_count if before is not None else 0)
            exporter = disk.make_exporter(export, stack, queues, adopt=before is not None)
            disk.inode = disk.describe(stack, exporter).inode
            if exporter.for_this_host:
                self._put_on_record(exporter)
            disk.add_export(text, exporter, await exporter.start())
        if disk.predecessor is not None:
            replayed = sum(export.exporter.replayed for export in disk.exports)
            log.info("disk '%s' is taken over; requests done again: %d", spec.name, replayed)
            notes.add_event(spec.name, event="taken over", pid=os.getpid(), replayed=replayed)
        if self._given_up is not None:
            raise asyncio.CancelledError  # it came too late to interrupt the export's start
        disk.phase = "serving"
        disk.write_state()
        reached("serving")
        log.info("disk '%s' is %s", spec.name, disk.places())
        facts = disk.summary()
        if not self._ready.write(messages.ready_line(facts.pop("device"), **facts)):
            self._given_up = "nobody waits for the disk any more"
            raise asyncio.CancelledError
        notify_systemd(f"READY=1\nSTATUS=serving {disk.places()}")

    def _find_predecessor(self, wanted: list[ExportSpec]) -> DiskRecord | None:
        """What a dead server left to be taken over. Raises ControlError if it cannot be."""
        disk = self._disk
        name = disk.name
        if not any(export.exporter.is_left(name) for export in wanted):
            return None
        found = record.read(name)
        if found is None:
            raise self._not_taken_over("what it is was not recorded, or the record is lost")
        if found.spec.source != disk.spec.source:
            raise self._not_taken_over(f"source: it has {found.spec.source!r}, not {disk.spec.source!r}")
        disk.was_open = True
        return found

    def _not_taken_over(self, why: str) -> ControlError:
        name = self._disk.name
        return ControlError(
            f"disk '{name}' has lost its server and is not taken over: {why}; "
            f"`vduse-blk detach {name} --force` fails its requests and removes it",
            Exit.BUSY,
        )

    async def _open_storage(self) -> Stack:
        disk = self._disk
        stack = disk.make_stack()
        if disk.predecessor is None:
            await stack.open()
            return stack
        if stack.fence is Fence.LOST:
            # Its users are told now rather than never; what they would find otherwise are zeros.
            name, directory = disk.name, rundir.DiskPaths.of(disk.name).directory
            for export in parse_exports(disk.spec.exports):
                if export.exporter.is_left(name):
                    await export.exporter.fail_left(name, directory)
            self._keeps = False
            raise ControlError(
                f"the contents of disk '{disk.name}' died with its server: its requests were failed and it was "
                "removed; attach it again for an empty one",
                Exit.FAILED,
            )
        if stack.fence is Fence.UNKNOWN:
            raise self._not_taken_over(f"{stack} does not say how writes of a dead server are kept from landing later")
        deadline = time.monotonic() + disk.patience().get("timeout", _FENCE)
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
                        f"disk '{disk.name}' cannot be taken over yet: I/O of its dead server may still be under way, "
                        f"or somebody else uses the storage ({error})",
                        Exit.BUSY,
                    ) from error
                if not waited:
                    log.info("disk '%s': waiting for the last I/O of the dead server (%s)", disk.name, error)
                    waited = True
            await asyncio.sleep(0.1)
            stack = disk.make_stack()

    def _put_on_record(self, exporter: Exporter) -> None:
        """Before the kernel is asked for anything that outlives us. Raises ControlError: it is another disk."""
        disk = self._disk
        assert disk.stack is not None
        found = disk.describe(disk.stack, exporter)
        if disk.predecessor is not None:
            difference = disk.predecessor.difference(found)
            if difference is not None:
                raise self._not_taken_over(difference)
        record.write(found)
        disk.record = found

    def _give_up(self, reason: str) -> None:
        """Before or during the start."""
        if self._given_up is None:
            log.warning("giving up: %s", reason)
            self._given_up = reason
            if self._start is not None:
                self._start.cancel()

    # ---------------------------------------------------------------------------------------------------------- serve

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What is asked on the control socket."""
        disk = self._disk
        match request.get("op"):
            case "ping":
                return {"phase": disk.phase}
            case "info":
                return disk.info()
            case "resize":
                return {"size": await resize(disk, request.get("size"))}
            case "set":
                return set_values(disk, request.get("values"))
            case "detach":
                await self._detach(force=request.get("force") is True)
                return {}
            case "upgrade":
                return await give(disk, request.get("command"), request.get("patience"))
            case other:
                raise ControlError(
                    f"op: {other!r} is not known; accepted are ping, info, resize, set, detach, upgrade", Exit.USAGE
                )

    def _on_signal(self, number: int) -> None:
        if self._start is not None:
            self._give_up(f"interrupted by {signal.Signals(number).name}")
        else:
            self._signal_task = asyncio.get_running_loop().create_task(self._detach_on_signal(number))

    def _on_hangup(self) -> None:
        self._hangup_task = asyncio.get_running_loop().create_task(self._read_settings())

    async def _read_settings(self) -> None:
        """The administrator's, of the disk. Nothing of them is taken if one is wrong."""
        disk, name = self._disk, self._disk.name
        async with disk.changing:  # the disk may be about to be another server's
            if self._pass_on(signal.SIGHUP):
                return
        try:
            values = read_settings(name)
            if not values:
                log.info("SIGHUP: no settings in %s", settings_file(name))
                return
            set_values(disk, values)
        except (UserError, OSError) as error:
            log.error("SIGHUP: the settings of disk '%s' are as before: %s", name, error)

    def _pass_on(self, number: int) -> bool:
        """A signal to whoever serves the disk now; False: that is still this server."""
        disk = self._disk
        if not disk.replaced or disk.successor is None:
            return False
        log.info("%s: passed on to process %d, which serves the disk now", signal.Signals(number).name, disk.successor)
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile: there is nobody to end, or to read settings
            os.kill(disk.successor, number)
        return True

    # ------------------------------------------------------------------------------------------------------------ end

    async def _detach_on_signal(self, number: int) -> None:
        disk = self._disk
        name = signal.Signals(number).name
        try:
            try:
                await self._detach(force=False, signalled=True)
            except ControlError as error:
                if self._pass_on(number):
                    return
                if error.exit_code != Exit.BUSY or not disk.exports or disk.finished.is_set():
                    raise
                await self._leave(name, error)
        except Exception as error:
            if disk.finished.is_set():
                return  # the disk is gone, and run() says what went wrong
            if isinstance(error, UserError):
                log.error("%s: still serving: %s", name, error)
            else:
                log.exception("%s: detach failed, still serving", name)

    async def _leave(self, signal_name: str, why: ControlError) -> None:
        """End, and let the disk's users wait for the next server. Raises ControlError if there is nothing to take over."""
        disk = self._disk
        async with disk.changing:
            assert disk.stack is not None
            if disk.stack.fence is not Fence.OPEN:
                raise ControlError(f"{why}; nobody could take it over: {disk.stack} ends with its server", why.exit_code)
            disk.phase = "left"
            notify_systemd("STOPPING=1")
            try:
                if isinstance(why, _NotDrained):
                    raise why
                await disk.drain(disk.exports)
            except ControlError as error:
                # To stop the queues would be to fail it. It is marked in the in-flight log, and done by the next server.
                log.warning("%s: %s; left to the next server as it is: %s", signal_name, why, error)
                disk.note_state()
                logging.shutdown()
                os._exit(Exit.LEFT)
            for export in disk.exports:
                await export.exporter.leave()
            await disk.close_storage()
            disk.note_state()
            reached("left")
            log.warning(
                "%s: %s. The server ends; users of the disk wait until the next `serve` or `attach` of '%s' takes it over, "
                "with the same options, or `detach --force` removes it",
                signal_name,
                why,
                disk.name,
            )
            self._end = Exit.LEFT
            disk.finished.set()

    async def _detach(self, *, force: bool, signalled: bool = False) -> None:
        """Returns when the disk is gone. Raises what kept it from going, and then it is served as before: a later call
        tries again. Raises, too, if it went and the storage could not be closed; then the server ends all the same.

        ``signalled``: whoever manages this process wants it to end; a front-end waits for the next server.
        """
        disk = self._disk
        async with disk.changing:
            if disk.replaced:
                raise ControlError(f"disk '{disk.name}' is process {disk.successor}'s now; try again", Exit.BUSY)
            if disk.finished.is_set():
                return
            self._kept = signalled and self._is_to_be_remembered()
            if self._start is not None or not disk.exports:
                self._keeps = False
                self._give_up("detach")
                await self._undone.wait()
                if disk.is_left():
                    raise ControlError(f"disk '{disk.name}' was not removed completely; detach it again", Exit.FAILED)
                return
            claims: list[int] = []
            stack = disk.stack
            assert stack is not None
            try:
                if not force:
                    for export in disk.exports:
                        if export.endpoint.kind == "block":
                            claims += await claim(disk.name, export.endpoint.path)
                        elif not signalled or disk.is_waiting():
                            check_unused(disk.name, export)
                        elif export.exporter.users() and stack.fence is Fence.OPEN:
                            await self._drain_for_good(export)
                await self._stop_exports()
            except BaseException:
                for export in disk.exports:
                    if export.exporter.hands_over:
                        export.exporter.hold(False)
                raise
            finally:
                for fd in claims:
                    os.close(fd)
            try:
                await disk.close_storage()
            except Exception as error:
                log.exception("the storage of disk '%s' could not be closed", disk.name)
                self._loss = ControlError(
                    f"disk '{disk.name}' is removed, but its storage could not be closed: {error}", Exit.FAILED
                )
                raise self._loss from error
            finally:
                disk.finished.set()

    async def _drain_for_good(self, export: Export) -> None:
        """Before the end of an export whose users wait for the next server. The others go on: a disk of this host writes
        until it is gone. Raises _NotDrained; the export is held."""
        try:
            await self._disk.drain([export])
        except ControlError as error:
            raise _NotDrained(str(error), Exit.BUSY) from error

    async def _stop_exports(self) -> None:
        disk = self._disk
        before = disk.phase
        disk.phase = "detaching"
        if disk.stack is not None:
            disk.stack.let_go(True)
        disk.note_state()
        notify_systemd("STATUS=detaching")
        try:
            while disk.exports:
                await disk.exports[-1].exporter.stop()
                disk.exports.pop()
        except BaseException:
            disk.phase = "broken" if any(export.exporter.failed.done() for export in disk.exports) else before
            if disk.stack is not None:
                disk.stack.let_go(False)
            disk.note_state()
            notify_systemd(f"STATUS={disk.phase}: detach failed")
            raise
        notify_systemd("STOPPING=1")  # not before: it cannot be taken back

    def _is_to_be_remembered(self) -> bool:
        """Whether users wait for the next server to whom it matters what this one was told and has lost."""
        disk = self._disk
        if disk.remains is None or not disk.remains.matter:
            return False
        return any(export.endpoint.kind != "block" and export.exporter.users() for export in disk.exports)


# ------------------------------------------------------------------------------------------------------------- in use


async def claim(name: str, path: str) -> list[int]:
    """Open the block device of disk ``name`` exclusively, so that nobody can mount it meanwhile; returns the descriptor, or
    nothing if there is no device. Raises ControlError (exit 4): it is in use. Looking at /proc is done on another thread."""
    began = time.monotonic()
    while True:
        holders = await asyncio.to_thread(_holders, path)
        if not holders:
            break
        patience = _UDEV_LOOKS if all(holder.is_udev for holder in holders) else _GLANCE
        if time.monotonic() - began > patience or any(holder.kind != "open" for holder in holders):
            raise _refusal(name, path, holders)
        await asyncio.sleep(0.1)
    try:
        return [os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ControlError(f"disk '{name}' ({path}) is held by the kernel: {error.strerror}", Exit.BUSY) from error


def check_unused(name: str, export: Export) -> None:
    """Raises ControlError (exit 4): the export has users."""
    users = export.exporter.users()
    if users:
        raise _refusal(name, export.endpoint.path, users)


def _refusal(name: str, path: str, holders: list[Holder]) -> ControlError:
    return ControlError(
        f"disk '{name}' ({path}) is in use: {'; '.join(map(str, holders))}",
        Exit.BUSY,
        [asdict(holder) for holder in holders],
    )


def _holders(path: str) -> list[Holder]:
    try:
        number = os.stat(path).st_rdev
    except FileNotFoundError:
        return []
    return holders_of(os.major(number), os.minor(number))


# ------------------------------------------------------------------------------------------------------- live upgrade


async def give(disk: Disk, command: object, patience: object) -> dict[str, Any]:
    """Have another server, started by ``command``, go on with the disk; returns facts about it, and then this one ends.
    ``patience``: seconds until it must be ready. Raises ControlError, and then this one serves on."""
    if not isinstance(command, list) or not command or not all(isinstance(word, str) and word for word in command):
        raise ControlError(f"command: {command!r} is not usable; accepted are lists of texts", Exit.USAGE)
    if not isinstance(patience, int | float) or not 0 < patience <= MAX_TIMEOUT:
        raise ControlError(f"patience: {patience!r} is not usable; accepted are {TIMEOUT_RULE}", Exit.USAGE)
    async with disk.changing:
        stack, name = disk.stack, disk.name
        if stack is None or disk.phase != "serving":
            raise ControlError(f"disk '{name}' is {disk.phase}; it cannot be upgraded", Exit.BUSY)
        if stack.fence is not Fence.OPEN:
            raise ControlError(f"disk '{name}' cannot be upgraded: {stack} ends with its server", Exit.UNSUPPORTED)
        for export in disk.exports:
            if not export.exporter.hands_over:
                why = f"the export {export.text} cannot be handed over"
                raise ControlError(f"disk '{name}' cannot be upgraded: {why}", Exit.UNSUPPORTED)
        described = disk.describe(stack, disk.exports[0].exporter)
        if disk.inode != described.inode:  # nobody could open it again
            raise ControlError(f"disk '{name}' cannot be upgraded: {stack} is not the same file any more", Exit.BUSY)
        reached("upgrade-asked")
        new = await asyncio.to_thread(Successor, command, disk.spec)
        at_rest: list[Exporter] = []
        started = False
        try:
            disk.successor = new.process.pid
            disk.note_state()
            version = (await asyncio.to_thread(new.expect, ["ready"], patience)).get("program")
            reached("upgrade-ready")
            began = time.monotonic()
            await disk.drain(disk.exports)
            handed = []
            for export in disk.exports:
                at_rest.append(export.exporter)
                handed.append(await export.exporter.hand_over())
            reached("drained")
            await disk.close_storage()
            reached("let-go")
            await asyncio.to_thread(_hand_over, disk, new, described.facts(), handed)
            reached("sent")
            until = time.monotonic() + _TAKING_OVER
            step = ""
            while step != "serving":
                left = max(0.0, until - time.monotonic())
                said = await asyncio.to_thread(new.expect, ["starting", "serving"], left)
                started, step = True, said["step"]
            await asyncio.to_thread(_tell, new, {"step": "yours"})
        except BaseException as error:
            started = await asyncio.to_thread(new.end) or started
            await _go_on(disk, at_rest, started)
            if isinstance(error, UserError):
                raise ControlError(f"{error}; disk '{name}' is served as before", error.exit_code) from error
            raise
        disk.replaced = True
        reached("replaced")
        notify_systemd(f"MAINPID={new.process.pid}")
        unsettled = None
        try:
            await asyncio.to_thread(new.expect, ["settled"], _TAKING_OVER)
        except ControlError as error:
            log.error("%s", error)
            unsettled = error
        for export in disk.exports:
            await export.exporter.release()
        disk.exports.clear()
        disk.finished.set()
        log.info("disk '%s' is served by process %d", name, new.process.pid)
        if unsettled is not None:
            sentence = f"disk '{name}' is process {new.process.pid}'s now, which cannot be asked: {unsettled}"
            raise ControlError(sentence, unsettled.exit_code) from unsettled
        return {"pid": new.process.pid, "version": version, "pause": said["at"] - began}


def _hand_over(disk: Disk, new: Successor, described: dict[str, Any], handed: list[HandOver]) -> None:
    fds = [disk.lock]
    exports = []
    for export, given in zip(disk.exports, handed, strict=True):
        facts = {"queue_count": export.exporter.queue_count, "facts": given.facts, "fds": [len(fds), len(given.fds)]}
        exports.append(facts)
        fds += given.fds
    changed = {} if disk.remains is None else disk.remains.settings  # the new one's specification is older
    message = {"version": VERSION, "disk": described, "monitor": disk.monitor_pid(), "exports": exports, "settings": changed}
    _tell(new, message, fds)


def _tell(new: Successor, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    try:
        new.line.send(message, fds)
    except OSError as error:
        raise ControlError(f"the new server is gone: {error.strerror}", Exit.FAILED) from error


async def _go_on(disk: Disk, at_rest: list[Exporter], started: bool) -> None:
    """After a new server that failed, and has ended. The disk's users wait, so this does not give up."""
    disk.successor = None
    disk.was_open = True
    said = ""
    while disk.stack is None:
        try:
            stack = disk.make_stack()
            await stack.open()
            disk.stack = stack
        except UserError as error:
            if str(error) != said:
                log.error("disk '%s': its storage cannot be opened again, its users wait: %s", disk.name, error)
                said = str(error)
            await asyncio.sleep(_REOPEN)
    for export in disk.exports:
        try:
            if export.exporter in at_rest:
                await export.exporter.resume(disk.stack, touched=started)
            export.exporter.hold(False)
        except Exception as error:
            log.exception("disk '%s': the export %s does not go on", disk.name, export.text)
            export.exporter.fail(f"not served any more since an upgrade failed: {error}")
    disk.note_state()


async def take(disk: Disk, wanted: list[ExportSpec], answer: Handler, catch_signals: Callable[[], None]) -> asyncio.Server:
    """Have the disk, which another server serves and hands over on ``spec.upgrade_fd``; returns the control socket, on which
    ``answer`` is asked. A failure ends this process, and then the disk is the old server's as before, or waits for the next
    one if that has ended. ``catch_signals`` is called when everything is prepared: before, a signal ends this process."""
    assert disk.spec.upgrade_fd is not None
    line = Line(socket.socket(fileno=disk.spec.upgrade_fd))
    os.set_inheritable(line.fileno(), False)
    disk.spec = replace(disk.spec, upgrade_fd=None)
    async with disk.changing:
        try:
            listening = await bind(_socket_for_later(disk.name), answer)
            await _succeed(disk, wanted, line, catch_signals)
        except BaseException as error:
            is_bug = not isinstance(error, UserError)
            log.error("disk '%s' is not taken over: %s", disk.name, error, exc_info=is_bug)
            code = error.exit_code if isinstance(error, UserError) else Exit.FAILED
            with contextlib.suppress(OSError):
                line.send({"error": str(error) or type(error).__name__, "code": int(code)})
            # Nothing is undone: all of it is the old server's again, as soon as this process is no more.
            logging.shutdown()
            os._exit(code)
        try:
            message: dict[str, Any] = {"step": "settled"}
            try:
                os.replace(_socket_for_later(disk.name), rundir.DiskPaths.of(disk.name).socket)
            except OSError as error:  # the disk is served all the same, and ends by a signal
                why = f"it has no control socket: {error.strerror}"
                log.error("disk '%s': %s", disk.name, why)
                message = {"error": why}
            disk.note_state()
            with contextlib.suppress(OSError):
                line.send(message)
            line.close()
            notify_systemd(f"READY=1\nSTATUS=serving {disk.places()}")
        except BaseException:
            log.exception("disk '%s': after it was taken over", disk.name)
            logging.shutdown()
            os._exit(Exit.FAILED)  # as a crash: the disk waits for the next server
    return listening


async def _succeed(disk: Disk, wanted: list[ExportSpec], line: Line, catch_signals: Callable[[], None]) -> None:
    """Returns when the disk is served by this process. Raises anything, and then it must end."""
    disk.was_open = True
    disk.remains = Remains(disk.name, disk.spec.source)
    stack = disk.make_stack()
    if any(export.exporter.for_this_host for export in wanted):
        for problem in harden():
            log.warning("%s", problem)
    catch_signals()
    reached("prepared")
    line.send({"step": "ready", "version": VERSION, "program": __version__})
    try:
        message, fds = await asyncio.to_thread(line.receive)
    except (EOFError, ValueError, OSError) as error:
        raise ControlError(f"the old server has not handed the disk over ({error or 'it is gone'})") from error
    if message.get("version") != VERSION:
        raise ControlError(f"it is handed over in version {message.get('version')}; accepted is {VERSION}")
    disk.lock, disk.monitor = fds[0], message["monitor"]
    reached("received")
    await stack.open()
    if "settings" in message:
        disk.remains.settings = settings_of(message["settings"])
    disk.spec = settings.restore(stack, disk.spec, disk.remains.settings)
    disk.stack = stack
    reached("reopened")
    exporters: list[Exporter] = []
    for export, facts in zip(wanted, message["exports"], strict=True):
        exporter = disk.make_exporter(export, stack, facts["queue_count"], adopt=True)
        if not exporters:
            found = disk.describe(stack, exporter)
            difference = DiskRecord(spec=disk.spec, **message["disk"]).difference(found)
            if difference is not None:
                raise ControlError(difference, Exit.BUSY)
            disk.inode = found.inode
        if exporter.for_this_host:
            disk.record = found
        first, count = facts["fds"]
        await exporter.receive(HandOver(facts["facts"], fds[first : first + count]))
        exporters.append(exporter)
    with contextlib.suppress(OSError):  # the old server's death, from here on to the end
        line.send({"step": "starting"})
    for text, exporter in zip(disk.spec.exports, exporters, strict=True):
        disk.add_export(text, exporter, await exporter.resume(stack))
    reached("restarted")
    disk.phase = "serving"
    at = time.monotonic()
    with contextlib.suppress(OSError):
        line.send({"step": "serving", "at": at})
    with contextlib.suppress(EOFError):
        await asyncio.to_thread(line.receive)
    for present in disk.exports:
        present.exporter.attend()
    reached("took-over")
    log.info("disk '%s' is taken over from a server that runs, version %s", disk.name, __version__)
    notes.add_event(disk.name, event="upgraded", pid=os.getpid(), version=__version__)


def _socket_for_later(name: str) -> Path:
    """Where a new server listens before the disk is its own: later there may be no room for it any more."""
    return rundir.DiskPaths.of(name).socket.with_name("control.next")


# ----------------------------------------------------------------------------------------------------- control socket


async def listen(path: Path, answer: Handler) -> asyncio.Server:
    """Serve the control socket at ``path``, where a dead server may have left one. Raises ControlError."""
    new = path.with_name("control.new")  # no longer than the final name, which has been checked
    server = await bind(new, answer)
    os.replace(new, path)
    return server


async def bind(path: Path, answer: Handler) -> asyncio.Server:
    """Serve a socket at ``path``, to be renamed later: it answers under any name. Raises ControlError."""
    try:
        path.unlink(missing_ok=True)  # of a dead predecessor: we hold the lock, or the only line to who does
        server = await asyncio.start_unix_server(partial(_converse, answer), path, limit=MAX_MESSAGE)
        os.chmod(path, 0o600)
    except OSError as error:
        raise ControlError(f"no control socket can be made at {path}: {error.strerror}", Exit.FAILED) from error
    return server


async def _converse(answer: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(await _reply(answer, line))
            await writer.drain()
    except (ConnectionError, ValueError, asyncio.CancelledError):
        pass  # gone in the middle, a line beyond the limit, or the server ends: nothing to answer
    finally:
        writer.close()


async def _reply(answer: Handler, line: bytes) -> bytes:
    try:
        return messages.ok_reply(**await answer(messages.decode_message(line)))
    except ControlError as error:
        return messages.error_reply(str(error), error.exit_code, error.holders)
    except UserError as error:
        return messages.error_reply(str(error), error.exit_code)
    except ValueError as error:
        return messages.error_reply(f"the request is not usable: {error}", Exit.USAGE)
    except OSError as error:
        log.error("%s", error)
        return messages.error_reply(str(error), Exit.FAILED)
    except Exception as error:
        log.exception("bug while answering %r", line[:200])
        return messages.error_reply(f"bug in the server: {error!r}; its log has more", Exit.FAILED)


# --------------------------------------------------------------------------------------------------------------- live


def set_values(disk: Disk, values: object) -> dict[str, Any]:
    """Change settings (``settings.change``); returns those of the disk now. Raises UserError with nothing changed."""
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ControlError(f"values: {values!r} is not usable; accepted is an object of texts", Exit.USAGE)
    if disk.stack is None or disk.remains is None or not disk.exports:
        phase = disk.phase if disk.successor is None else "being upgraded"
        raise ControlError(f"disk '{disk.name}' is {phase}; nothing of it can be set", Exit.BUSY)
    disk.spec = settings.change(disk.stack, disk.spec, values)
    disk.remains.settings |= values  # a successor goes on with them
    disk.remains.write()
    disk.write_state()
    log.info("disk '%s' has settings %s", disk.name, " ".join(f"{key}={value}" for key, value in values.items()))
    return _settings(disk.stack)


async def resize(disk: Disk, size: object) -> int:
    """Change the size to so many bytes; returns it when the host sees it. Raises UserError, OSError."""
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ControlError(f"size: {size!r} is not usable; accepted are positive numbers of bytes", Exit.USAGE)
    async with disk.changing:
        if disk.stack is None or not disk.exports:
            raise ControlError(f"disk '{disk.name}' is {disk.phase}; it cannot be resized", Exit.BUSY)
        reached("resizing")
        info = await disk.stack.resize(size)
        reached("resized")
        if disk.record is not None:
            disk.record = replace(disk.record, size=info.size)
            try:
                record.write(disk.record)
            except ControlError as error:
                log.warning("%s", error)  # the old size is as good: a disk that has grown may be taken over
        for export in disk.exports:
            await export.exporter.resized(info)
            await _seen_by_host(export.endpoint.path, info.size)
        disk.note_state()
        return info.size


async def _seen_by_host(path: str, size: int) -> None:
    """The driver re-reads the capacity on an interrupt, a few milliseconds later."""
    sysfs = Path("/sys/class/block", Path(path).name, "size")
    deadline = time.monotonic() + 10
    while sysfs.exists() and int(sysfs.read_text()) * 512 != size:
        if time.monotonic() > deadline:
            raise ControlError(f"the storage has {size} bytes now, but {path} does not show it", Exit.TIMEOUT)
        await asyncio.sleep(0.005)


def _settings(stack: Stack) -> dict[str, Any]:
    """For ``info``: what is set now."""
    return {
        "policy": stack.patience.policy.facts(),
        "filters": [
            {"name": name, "options": write_values(layer.options), **layer.facts()}
            for name, layer in stack.filters.items()
        ],
    }


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
            facts |= _settings(self.stack)
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
            for key, value in queue["counters"].items():
                totals[key] = totals.get(key, 0) + value
        return facts | exports[0] | {"counters": totals} | ({"exports": exports} if len(exports) > 1 else {})
