"""``detach``: remove a disk, with its server's help or without."""

from __future__ import annotations

import os
import select
import time

import click

from vduse_blk import control
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.control import ControlError, Exit, NotServed


@click.command(short_help="Remove a disk.")
@click.argument("name", shell_complete=complete_names)
@click.option(
    "--force", is_flag=True, help="Remove it even while it is mounted or held; its users get I/O errors."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait for the disk to be gone.",
)
@output.json_option
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
            finally:
                # Also after a broken conversation: whether the server goes or stays decides what happens
                # next.
                gone = end is None or _ended(end, 0)
            if not gone and end is not None and not _ended(end, max(0.0, deadline - time.monotonic())):
                raise ControlError(
                    f"disk '{name}' is removed, but its server (process {client.server_pid}) has not ended "
                    f"within {timeout:g} seconds",
                    Exit.TIMEOUT,
                )
    except ControlError as e:
        _without_server(name, force, e)
    control.remove_directory(name)
    if as_json:
        output.print_json({"ok": True, "name": name})


def _ended(process: int, seconds: float) -> bool:
    """Whether the process behind a pidfd ends within ``seconds``."""
    return bool(select.select([process], [], [], seconds)[0])


def _without_server(name: str, force: bool, error: ControlError) -> None:
    """Remove what is left of a disk whose server is not there (any more); raise ``error`` if it is."""
    if error.exit_code == Exit.NOT_FOUND:
        if not os.path.lexists(f"/sys/class/vduse/{name}"):
            raise error
        if not force:
            raise ControlError(
                f"no disk is called '{name}', but a VDUSE device is: it belongs to another program, or the "
                f"disk's directory was removed; --force removes it unless a program has it open",
                Exit.NOT_FOUND,
            ) from error
    elif isinstance(error, NotServed):
        if control.is_locked(name):
            raise ControlError(
                f"disk '{name}' is being attached or detached just now; try again", Exit.BUSY
            ) from error
    elif error.exit_code != Exit.FAILED or control.is_locked(name):
        raise error
    elif not control.DiskPaths.of(name).directory.is_dir():
        return  # it removed everything, and only its last word got lost
    from vduse_blk.cli import launch

    launch.remove_leftover(name, force=force)
