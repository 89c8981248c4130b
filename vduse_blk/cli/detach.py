"""``detach``: remove a disk, with its server's help or without."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import click

from vduse_blk.block.errors import UserError
from vduse_blk.block.holders import take_from, take_sockets
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option, timeout_option
from vduse_blk.control import notes, rundir
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, Hangup, NotServed, Served
from vduse_blk.control.process import is_dying, read_stat, server_process
from vduse_blk.exports import parse_exports

DYING_SECONDS: Final = 5.0
"""How long the process of a server that broke the conversation, or was killed, may take to end."""
FORCE_SECONDS: Final = 1.5
"""How long a server that is well may take to remove a disk by force; after that it is not asked any more."""
KILL_SECONDS: Final = 0.5
"""How long a killed process takes to end, if none of its threads waits in the kernel."""


@dataclass
class Taken:
    """What was a server's and is ours now, as descriptors: ``lock`` of the disk's directory, ``node`` of its device."""

    lock: int | None = None
    node: int | None = None


@click.command(short_help="Remove a disk.")
@click.argument("name", shell_complete=complete_names)
@click.option("--force", is_flag=True, help="Remove it even while it is mounted or held; its users get I/O errors.")
@timeout_option("Longest wait for the disk to be gone.")
@json_option
def detach(name: str, force: bool, timeout: float, as_json: bool) -> None:
    """Remove the disk NAME and end its server.

    A disk that is mounted, swapped on, or held by a process or another block device is left alone (exit
    status 4) and its users are named, unless --force is given. What a server that died left behind is
    removed, too. With --force it is gone within seconds, whatever its server or its storage does.
    """
    deadline = time.monotonic() + timeout
    if not force:
        _wait_for_the_dying(name, min(DYING_SECONDS, timeout))
    try:
        with Client(name, timeout) as client, server_process(client.server_pid) as end:
            directory = rundir.open_directory(name)
            try:
                taken = Taken()
                if force:
                    taken = _by_force(client, end, min(timeout, FORCE_SECONDS))
                else:
                    _by_server(client, end, deadline, timeout)
                # A server that could undo everything has removed it. Another disk may have the name by now.
                if rundir.is_directory(name, directory):
                    _without_server(name, force, taken)
            finally:
                os.close(directory)
    except NotServed:
        _without_server(name, force)
    except ControlError as e:
        device = _device_of(name)
        if e.exit_code != Exit.NOT_FOUND or device is None:
            raise
        if os.geteuid() != 0:
            raise ControlError(f"/sys/class/vduse/{device}: no permission; run as root", Exit.DENIED) from e
        if not force:
            raise ControlError(
                f"no disk is called '{name}', but a VDUSE device is: it belongs to another program, or the "
                f"disk's directory was removed; --force removes it unless a program has it open",
                Exit.NOT_FOUND,
            ) from e
        _without_server(name, force)
    if as_json:
        output.print_json({"ok": True, "name": name})


def _wait_for_the_dying(name: str, seconds: float) -> None:
    """A killed server ends soon, or waits in the kernel for as long as its storage likes: that one is not asked anything."""
    until = time.monotonic() + seconds
    while is_dying(name):
        if time.monotonic() > until:
            raise ControlError(
                f"the server of disk '{name}' was killed and waits in the kernel, probably for storage; "
                f"`vduse-blk info {name}` says what leads out of that; --force does not wait for it",
                Exit.BUSY,
            )
        time.sleep(0.02)


def _by_server(client: Client, end: int | None, deadline: float, timeout: float) -> None:
    """Have the server remove the disk, and wait until it has ended, or has died over it."""
    try:
        client.call("detach", timeout=timeout, force=False)
    except Hangup:
        # It may be dying: whether it is gone or stays decides what happens next.
        if not ended(end, min(DYING_SECONDS, deadline - time.monotonic())):
            raise
    except ControlError as e:
        if e.exit_code == Exit.TIMEOUT:
            raise ControlError(f"{e}; it goes on; --force does not wait for it", e.exit_code) from e
        raise
    else:
        if not ended(end, deadline - time.monotonic()):
            raise ControlError(
                f"disk '{client.name}' is removed, but its server (process {client.server_pid}) has not ended "
                f"within {timeout:g} seconds",
                Exit.TIMEOUT,
            )


def _by_force(client: Client, end: int | None, patience: float) -> Taken:
    """Have the server remove the disk if it does so soon. If not, it is killed: it may be stopped, or busy with itself, or
    wait for storage that does not answer. What it held is returned; the caller answers the disk's users in its place."""
    try:
        client.call("detach", timeout=patience, force=True)
        if ended(end, patience):
            return Taken()
    except ControlError as e:
        if e.exit_code != Exit.TIMEOUT and ended(end, KILL_SECONDS):
            with suppress(ControlError), Client(client.name, patience) as other, server_process(other.server_pid) as its_end:
                return _by_force(other, its_end, patience)  # an upgrade was faster: the disk is another server's now
    if end is None:
        return Taken()
    # Before it is killed: a thread that waits in the kernel would keep both for as long as it waits, without an owner.
    paths, pid, device = rundir.DiskPaths.of(client.name), client.server_pid, _device_of(client.name)
    sockets: list[socket.socket] = []
    try:
        taken = Taken(lock=take_from(pid, str(paths.directory)))
        if device is not None:
            taken.node = take_from(pid, f"/dev/vduse/{device}")
        sockets = take_sockets(pid)
    except PermissionError:
        taken = Taken()  # a host that lets nobody trace: then it must end by itself
    with _successor(client.name, pid) as successor:
        output.say(f"the server of disk '{client.name}' (process {pid}) is killed")
        # The new one of an upgrade first: the old one, alive, would only start to wait for its end.
        servers = [process for process in (successor, end) if process is not None]
        for process in servers:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                signal.pidfd_send_signal(process, signal.SIGKILL)
        until = time.monotonic() + KILL_SECONDS
        all_ended = all(ended(process, until - time.monotonic()) for process in servers)
    for one in sockets:  # if it has not ended, front-ends would wait for its answers, and nobody could listen there
        with one, suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    if not all_ended:
        output.say("it has not ended yet: it waits in the kernel, probably for its storage")
    elif taken.node is not None:
        # The kernel gives messages that were read and not answered to whoever opens the node next, not to a duplicate.
        os.close(taken.node)
        taken.node = None
    return taken


def _device_of(name: str) -> str | None:
    """What the kernel calls the VDUSE device of a disk, if it has one."""
    device: str | None = import_module("vduse_blk.exporters.vduse.names").device_of(name)
    return device


@contextmanager
def _successor(name: str, pid: int) -> Iterator[int | None]:
    """A pidfd of the server that is about to replace ``pid``, or has just done so while that one still lives, and may hold
    what that one held; None: there is none."""
    state = notes.read_state(name)
    successor = state.get("successor") if state.get("pid") == pid else state.get("pid")
    if type(successor) is not int or successor <= 0:
        yield None
        return
    with server_process(successor) as process:
        yield process if process is not None and _parent(successor) == pid else None


def _parent(pid: int) -> int | None:
    try:
        return read_stat(Path(f"/proc/{pid}"))[1]
    except OSError:
        return None


def ended(process: int | None, seconds: float) -> bool:
    """Whether the process behind a pidfd (None: it had ended before) ends within ``seconds``."""
    return process is None or bool(select.select([process], [], [], max(0.0, seconds))[0])


def _without_server(name: str, force: bool, taken: Taken | None = None) -> None:
    """Remove what is left of a disk that has no server, under its lock: an attach of that name starts afterwards, or has
    the lock, and then what is there is its own."""
    from vduse_blk.cli import launch

    taken = taken or Taken()
    had_directory = name in rundir.disk_names()
    lock = taken.lock
    if lock is None:
        try:
            lock = rundir.lock_directory(name)
        except Served as e:
            raise ControlError(f"disk '{name}' is being attached or detached just now; try again", Exit.BUSY) from e
    try:
        try:
            launch.remove_leftover(name, force=force, node=taken.node)
        except BaseException:
            if not had_directory:
                rundir.remove_directory(name, locked_fd=lock)
            raise
        _remove_sockets(name)
        rundir.remove_directory(name, locked_fd=lock)
    finally:
        os.close(lock)


def _remove_sockets(name: str) -> None:
    """Those of the dead server's exports that are sockets; not one behind which somebody listens."""
    from vduse_blk import record

    known = None
    with suppress(ControlError):
        known = record.read(name)
    specification = notes.read_state(name).get("spec") if known is None else {"exports": list(known.spec.exports)}
    exports = specification.get("exports") if isinstance(specification, dict) else None
    for export in exports if isinstance(exports, list) else ():
        if not str(export).startswith("vhost-user:"):
            continue
        try:
            (parsed,) = parse_exports([str(export)])
        except UserError:
            continue  # a damaged state names no socket
        import_module("vduse_blk.exporters.vhost_user.export").remove_leftover(parsed.own)
