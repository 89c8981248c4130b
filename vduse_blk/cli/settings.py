"""``set``: change how a disk behaves while it is in use."""

from __future__ import annotations

import click

from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option
from vduse_blk.control.client import Client
from vduse_blk.control.settings import parse_settings


@click.command("set", short_help="Change how a disk in use behaves.")
@click.argument("name", shell_complete=complete_names)
@click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...")
@json_option
def set_values(name: str, values: tuple[str, ...], as_json: bool) -> None:
    """Change how the disk NAME behaves, at once and until it is detached. All of it is changed, or nothing.

    \b
    on-error=fail|wait|retry=DURATION   what becomes of requests with errors that may pass
    on-full=fail|wait                   the same for lack of space
    FILTER.OPTION=VALUE                 an option of a filter (faults.error=EIO)

    An empty value puts the default back.
    """
    given = parse_settings(values)
    with Client(name) as client:
        reply = client.call("set", values=given)
    if as_json:
        output.print_json({"ok": True, "name": name} | {key: reply[key] for key in ("policy", "filters") if key in reply})
    else:
        policy = reply.get("policy", {})
        now = [f"{key}={value or policy.get(key.replace('-', '_'), '')}" for key, value in given.items()]
        output.say(f"disk '{name}' has {' '.join(now)}")
