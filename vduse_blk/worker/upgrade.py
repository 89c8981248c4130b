"""Live upgrade: the server of a disk is replaced by another one while the disk is used.

``handover`` has the line between the two and what is said on it in which order; here is what each of them does. Runs on
their event loops; what blocks runs on threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vduse_blk import __version__
from vduse_blk.block.contract import Fence
from vduse_blk.block.errors import UserError
from vduse_blk.control import notes, rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.spec import MAX_TIMEOUT, TIMEOUT_RULE
from vduse_blk.exporter import Exporter, HandOver, reached
from vduse_blk.exports import ExportSpec
from vduse_blk.record import DiskRecord
from vduse_blk.worker import control_socket, settings
from vduse_blk.worker.control_socket import Handler
from vduse_blk.worker.disk import Disk
from vduse_blk.worker.handover import VERSION, Line, Successor
from vduse_blk.worker.notify import notify_systemd
from vduse_blk.worker.process import harden
from vduse_blk.worker.remains import Remains, settings_of

log = logging.getLogger("vduse_blk.disk")

_TAKING_OVER = 10.0
"""Seconds a new server may take to serve the disk that the old one has handed over."""
_REOPEN = 0.1


# ----------------------------------------------------------------------------------------------------- the old server


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
            raise ControlError(f"disk '{name}' is {disk.doing}; it cannot be upgraded", Exit.BUSY)
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
            disk.write_state()  # or not at all: the monitor, and `detach --force`, know the new server from there
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
        new.line.close()
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


# ----------------------------------------------------------------------------------------------------- the new server


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
            listening = await control_socket.bind(_socket_for_later(disk.name), answer)
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
            _tell_systemd_after(line, disk.places())
        except BaseException:
            log.exception("disk '%s': after it was taken over", disk.name)
            logging.shutdown()
            os._exit(Exit.FAILED)  # as a crash: the disk waits for the next server
    return listening


def _tell_systemd_after(line: Line, places: str) -> None:
    """When the old server is through: systemd listens to the main process only, and to who is it now first."""
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.remove_reader(line.fileno())
        line.close()
        notify_systemd(f"READY=1\nSTATUS=serving {places}")

    loop.add_reader(line.fileno(), tell)


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
    try:
        line.send({"step": "ready", "version": VERSION, "program": __version__})
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
