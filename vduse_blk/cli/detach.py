"""``detach``: remove a disk, with its server's help or without."""

from __future__ import annotations

import os
import select
import time
from typing import Final

import click

from vduse_blk import control
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option, timeout_option
from vduse_blk.control import ControlError, Exit, Hangup, NotServed

_DYING_SECONDS: Final = 5.0


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
            try:
                client.call("detach", timeout=timeout, force=force)
            except Hangup:
                # It may be dying: whether it is gone or stays decides what happens next.
                if not _ended(end, min(_DYING_SECONDS, deadline - time.monotonic())):
                    raise
                _without_server(name, force)
            else:
                if not _ended(end, deadline - time.monotonic()):
                    raise ControlError(
                        f"disk '{name}' is removed, but its server (process {client.server_pid}) has not ended "
                        f"within {timeout:g} seconds",
                        Exit.TIMEOUT,
                    )
    except NotServed as e:
        if control.is_locked(name):
            raise ControlError(f"disk '{name}' is being attached or detached just now; try again", Exit.BUSY) from e
        _without_server(name, force)
    except ControlError as e:
        if e.exit_code != Exit.NOT_FOUND or not os.path.lexists(f"/sys/class/vduse/{name}"):
            raise
        if not force:
            raise ControlError(
                f"no disk is called '{name}', but a VDUSE device is: it belongs to another program, or the "
                f"disk's directory was removed; --force removes it unless a program has it open",
                Exit.NOT_FOUND,
            ) from e
        _without_server(name, force)
    control.remove_directory(name)
    if as_json:
        output.print_json({"ok": True, "name": name})


def _ended(process: int | None, seconds: float) -> bool:
    """Whether the process behind a pidfd (None: it had ended before) ends within ``seconds``."""
    return process is None or bool(select.select([process], [], [], max(0.0, seconds))[0])


def _without_server(name: str, force: bool) -> None:
    """Remove what is left in the kernel of a disk that has no server."""
    from vduse_blk.cli import launch

    launch.remove_leftover(name, force=force)
