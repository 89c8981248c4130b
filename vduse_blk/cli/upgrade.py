"""``upgrade``: have the installed version serve a disk that an older one serves."""

from __future__ import annotations

import click

from vduse_blk.cli import launch, output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option, timeout_option
from vduse_blk.control.client import Client

_MORE = 60.0
"""Seconds beyond the new server's start that a hand-over may take: its own limits are shorter."""


@click.command(short_help="Replace a disk's server while the disk is in use.")
@click.argument("name", shell_complete=complete_names)
@timeout_option("Longest wait for the new server to start; the disk is served as before meanwhile.")
@json_option
def upgrade(name: str, timeout: float, as_json: bool) -> None:
    """Replace the server of the disk NAME by one of the installed version.

    Users of the disk notice a pause of some milliseconds, whose length is printed. If the new server
    fails, the old one goes on.
    """
    with Client(name, timeout) as client:
        client.call("ping")  # one that is stopped would begin when it goes on, though nobody waits for it by then
        reply = client.call("upgrade", timeout=timeout + _MORE, command=launch.worker_command(), patience=timeout)
    pause = round(reply["pause"] * 1000, 3)
    if as_json:
        output.print_json({"ok": True, "name": name, "pid": reply["pid"], "version": reply["version"], "pause_ms": pause})
    else:
        who = f"version {reply['version']} (process {reply['pid']})"
        output.say(f"disk '{name}' is served by {who}; its users waited {pause:g} ms")
