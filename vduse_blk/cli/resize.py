"""``resize``: change the size of a disk in use."""

from __future__ import annotations

import click

from vduse_blk import control
from vduse_blk.block.options import parse_size
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option, timeout_option


@click.command(short_help="Change the size of a disk in use.")
@click.argument("name", shell_complete=complete_names)
@click.argument("size", type=parse_size)
@timeout_option("Longest wait for the storage to change its size.")
@json_option
def resize(name: str, size: int, timeout: float, as_json: bool) -> None:
    """Make the disk NAME SIZE bytes large (suffixes K, M, G, T: powers of 1024).

    The storage is grown and the host sees the new size at once; growing the file system on it is up to its
    own tool.
    """
    with control.Client(name, timeout) as client:
        reply = client.call("resize", size=size)
    now = int(reply.get("size", size))
    if as_json:
        output.print_json({"ok": True, "name": name, "size": now})
    else:
        output.say(f"disk '{name}' has {output.size_text(now)} ({now} bytes)")
