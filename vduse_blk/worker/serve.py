"""One disk, from its specification to its end.

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
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from vduse_blk import record
from vduse_blk.block.contract import Fence
from vduse_blk.block.errors import UserError
from vduse_blk.block.stack import Stack
from vduse_blk.control import messages, notes, rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.process import is_dying
from vduse_blk.control.settings import read_settings, settings_file
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.exporter import Exporter, reached
from vduse_blk.exports import ExportSpec, parse_exports
from vduse_blk.record import DiskRecord
from vduse_blk.worker import control_socket, in_use, live, settings, upgrade
from vduse_blk.worker.disk import Disk, Export
from vduse_blk.worker.notify import ReadyPipe, notify_systemd
from vduse_blk.worker.process import harden
from vduse_blk.worker.remains import Remains

log = logging.getLogger("vduse_blk.disk")

_FENCE = 60.0
"""Seconds, at most, that the storage is waited for when a dead server may have I/O under way."""


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
        self._before: dict[str, Any] = {}
        """State of a disk that has lost its server, until it is served again."""
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
                disk.remains = Remains(disk.name, disk.spec.source)
                disk.was_open = disk.remains.was_served
                self._kept = True  # what an earlier server left is not ours to remove, readable or not
                disk.predecessor = self._find_predecessor(wanted)
                self._kept = disk.was_open  # until it is served again
                if disk.predecessor is None:
                    self._check_places(wanted)
                self._before = notes.read_state(disk.name) if disk.was_open else {}
                disk.write_state()
                reached("locked")
                if any(export.exporter.for_this_host for export in wanted):
                    for problem in harden():
                        log.warning("%s", problem)
                undo.push_async_callback(disk.close_storage)
                listening = await control_socket.listen(rundir.DiskPaths.of(disk.name).socket, self._answer)
                undo.callback(listening.close)
                self._catch_signals()
                self._ready.watch(lambda: self._give_up("nobody waits for the disk any more"))
                await self._run_start(wanted)
                self._kept, self._before = False, {}
                return await self._run_to_the_end()
        finally:
            self._leave_directory()

    async def _run_as_successor(self, wanted: list[ExportSpec]) -> Exit:
        listening = await upgrade.take(self._disk, wanted, self._answer, self._catch_signals)
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
        if self._before and (self._kept or disk.is_left()):
            with contextlib.suppress(ControlError):  # it is the old one yet, or nothing can be written
                notes.write_state(disk.name, self._before)  # what our start would have made of it never was
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
                self._kept = disk.was_open and self._keeps
                if self._kept:
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
            if exporter.for_this_host or not (disk.exports or any(other.exporter.for_this_host for other in wanted)):
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
            self._check_front_ends()
            return None
        found = record.read(name)
        if found is None:
            raise self._not_taken_over("what it is was not recorded, or the record is lost")
        difference = found.difference_of_source(disk.spec)
        if difference is not None:
            raise self._not_taken_over(difference)
        disk.was_open = True
        return found

    def _check_front_ends(self) -> None:
        """Those of a dead server connect again to whoever has its name and socket. Raises ControlError: they would find
        other storage."""
        disk = self._disk
        found = record.read(disk.name)
        if found is None or all(export.exporter.for_this_host for export in parse_exports(found.spec.exports)):
            return
        difference = found.difference_of_source(disk.spec)
        if difference is not None:
            raise self._not_taken_over(difference)
        disk.was_open = True

    def _check_places(self, wanted: list[ExportSpec]) -> None:
        """Front-ends of another dead disk wait at its sockets: no other name may have those. Raises ControlError."""
        places = {export.place for export in wanted if not export.exporter.for_this_host}
        for name in rundir.disk_names() if places else []:
            if name == self._disk.name or rundir.is_locked(name):  # who listens is seen when the export starts
                continue
            try:
                found = record.read(name)
                theirs = [] if found is None else parse_exports(found.spec.exports)
            except UserError:
                continue  # nobody knows where it was
            for export in theirs:
                if export.place in places:
                    raise ControlError(
                        f"export: {export.place[1]} is where front-ends wait for disk '{name}', which has lost its server; "
                        f"choose another, or `vduse-blk detach {name}` first",
                        Exit.BUSY,
                    )

    def _not_taken_over(self, why: str) -> ControlError:
        name, wanted = self._disk.name, parse_exports(self._disk.spec.exports)
        is_left = any(export.exporter.is_left(name) for export in wanted)
        way_out = f"{name} --force` fails its requests and removes it" if is_left else f"{name}` removes it"
        return ControlError(
            f"disk '{name}' has lost its server and is not taken over: {why}; `vduse-blk detach {way_out}", Exit.BUSY
        )

    async def _open_storage(self) -> Stack:
        disk = self._disk
        stack = disk.make_stack()
        if disk.predecessor is None and not (disk.was_open and stack.fence is Fence.LOST):
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
        # Front-ends, of which nothing is left here, connect again to whoever serves the storage under this name.
        before = record.read(disk.name) if disk.predecessor is None and disk.was_open else disk.predecessor
        if before is not None:
            difference = before.difference(found)
            if difference is not None:
                raise self._not_taken_over(difference)
            if found.made_with is None and before.made_with is not None:  # the next one may say it again
                disk.spec = replace(disk.spec, size=before.made_with)
                found = replace(found, spec=disk.spec)
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
                return {"size": await live.resize(disk, request.get("size"))}
            case "set":
                return live.set_values(disk, request.get("values"))
            case "detach":
                await self._detach(force=request.get("force") is True)
                return {}
            case "upgrade":
                return await upgrade.give(disk, request.get("command"), request.get("patience"))
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
            live.set_values(disk, values)
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
                            claims += await in_use.claim(disk.name, export.endpoint.path)
                        elif not signalled or disk.is_waiting():
                            in_use.check_unused(disk.name, export)
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
