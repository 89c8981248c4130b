"""``resize``: grow a disk in use."""

from __future__ import annotations

import os

import click

from vduse_blk.block.options import parse_size
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.detach import DYING_SECONDS, ended
from vduse_blk.cli.options import json_option, timeout_option
from vduse_blk.control import rundir
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, Hangup
from vduse_blk.control.process import server_process


@click.command(short_help="Grow a disk in use.")
@click.argument("name", shell_complete=complete_names)
@click.argument("size", type=parse_size)
@timeout_option("Longest wait for the storage to change its size.")
@json_option
def resize(name: str, size: int, timeout: float, as_json: bool) -> None:
    """Grow the disk NAME to SIZE bytes (suffixes K, M, G, T: powers of 1024).

    The storage is grown and the host sees the new size at once; growing the file system on it is up to its
    own tool.
    """
    with Client(name, timeout) as client, server_process(client.server_pid) as end:
        directory = rundir.open_directory(name)
        try:
            reply = client.call("resize", size=size)
        except Hangup as e:
            # It may be a detach that ended the server: whether the disk is gone decides what to say.
            if ended(end, DYING_SECONDS) and not rundir.is_directory(name, directory):
                raise ControlError(f"disk '{name}' was removed meanwhile", Exit.NOT_FOUND) from e
            raise
        finally:
            os.close(directory)
    now = int(reply.get("size", size))
    if as_json:
        output.print_json({"ok": True, "name": name, "size": now})
    else:
        output.say(f"disk '{name}' has {output.size_text(now)} ({now} bytes)")
