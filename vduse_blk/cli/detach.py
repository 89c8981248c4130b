"""``detach``: remove a disk, with its server's help or without."""

from __future__ import annotations

import os
import select
import time
from importlib import import_module
from typing import Final

import click

from vduse_blk import control
from vduse_blk.block.errors import UserError
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option, timeout_option
from vduse_blk.control import ControlError, Exit, Hangup, NotServed, Served
from vduse_blk.exports import parse_exports

DYING_SECONDS: Final = 5.0
"""How long the process of a server that broke the conversation may take to end."""


@click.command(short_help="Remove a disk.")
@click.argument("name", shell_complete=complete_names)
@click.option("--force", is_flag=True, help="Remove it even while it is mounted or held; its users get I/O errors.")
@timeout_option("Longest wait for the disk to be gone.")
@json_option
def detach(name: str, force: bool, timeout: float, as_json: bool) -> None:
    """Remove the disk NAME and end its server.

    A disk that is mounted, swapped on, or held by a process or another block device is left alone (exit
    status 4) and its users are named, unless --force is given. What a server that died left behind is
    removed, too.
    """
    deadline = time.monotonic() + timeout
    try:
        with control.Client(name, timeout) as client, control.server_process(client.server_pid) as end:
            directory = control.open_directory(name)
            try:
                _by_server(client, end, deadline, timeout, force)
                # A server that could undo everything has removed it. Another disk may have the name by now.
                if control.is_directory(name, directory):
                    _without_server(name, force)
            finally:
                os.close(directory)
    except NotServed:
        _without_server(name, force)
    except ControlError as e:
        if e.exit_code != Exit.NOT_FOUND or not os.path.lexists(f"/sys/class/vduse/{name}"):
            raise
        if os.geteuid() != 0:
            raise ControlError(f"/sys/class/vduse/{name}: no permission; run as root", Exit.DENIED) from e
        if not force:
            raise ControlError(
                f"no disk is called '{name}', but a VDUSE device is: it belongs to another program, or the "
                f"disk's directory was removed; --force removes it unless a program has it open",
                Exit.NOT_FOUND,
            ) from e
        _without_server(name, force)
    if as_json:
        output.print_json({"ok": True, "name": name})


def _by_server(client: control.Client, end: int | None, deadline: float, timeout: float, force: bool) -> None:
    """Have the server remove the disk, and wait until it has ended, or has died over it."""
    try:
        client.call("detach", timeout=timeout, force=force)
    except Hangup:
        # It may be dying: whether it is gone or stays decides what happens next.
        if not ended(end, min(DYING_SECONDS, deadline - time.monotonic())):
            raise
    else:
        if not ended(end, deadline - time.monotonic()):
            raise ControlError(
                f"disk '{client.name}' is removed, but its server (process {client.server_pid}) has not ended "
                f"within {timeout:g} seconds",
                Exit.TIMEOUT,
            )


def ended(process: int | None, seconds: float) -> bool:
    """Whether the process behind a pidfd (None: it had ended before) ends within ``seconds``."""
    return process is None or bool(select.select([process], [], [], max(0.0, seconds))[0])


def _without_server(name: str, force: bool) -> None:
    """Remove what is left of a disk that has no server, under its lock: an attach of that name starts afterwards, or has
    the lock, and then what is there is its own."""
    from vduse_blk.cli import launch

    had_directory = name in control.disk_names()
    try:
        lock = control.lock_directory(name)
    except Served as e:
        raise ControlError(f"disk '{name}' is being attached or detached just now; try again", Exit.BUSY) from e
    try:
        try:
            launch.remove_leftover(name, force=force)
        except BaseException:
            if not had_directory:
                control.remove_directory(name, locked_fd=lock)
            raise
        _remove_sockets(name)
        control.remove_directory(name, locked_fd=lock)
    finally:
        os.close(lock)


def _remove_sockets(name: str) -> None:
    """Those of the dead server's exports that are sockets; not one behind which somebody listens."""
    specification = control.read_state(name).get("spec")
    exports = specification.get("exports") if isinstance(specification, dict) else None
    for export in exports if isinstance(exports, list) else []:
        if not str(export).startswith("vhost-user:"):
            continue
        try:
            (parsed,) = parse_exports([str(export)])
        except UserError:
            continue  # a damaged state names no socket
        import_module("vduse_blk.exporters.vhost_user.export").remove_leftover(parsed.own)
