"""``attach`` and ``serve``: make a disk, with its server in the background or in the foreground."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import click

from vduse_blk.block.errors import UserError
from vduse_blk.block.options import parse_size
from vduse_blk.cli import launch, output
from vduse_blk.cli.options import json_option, timeout_option
from vduse_blk.control import rundir
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.spec import BLOCK_SIZES, PATHS, RESTARTS, WorkerSpec
from vduse_blk.exports import absolute_export
from vduse_blk.source import absolute_source, parse_filter, parse_source

_Command = Callable[..., Any]


def disk_options(command: _Command) -> _Command:
    """Everything that says what disk is wanted. Values are checked by WorkerSpec, as for everybody who makes
    one."""
    parameters = (
        click.argument("source"),
        click.option("--name", metavar="N", help="Name of the disk.  [default: made from SOURCE]"),
        click.option("--read-only", is_flag=True, help="Refuse writes; the storage is opened for reading only."),
        click.option("--queues", type=int, metavar="K", help="Queues.  [default: as many as CPUs, at most 8]"),
        click.option(
            "--queue-size",
            type=int,
            default=256,
            show_default=True,
            metavar="Q",
            help="Descriptors per queue, a power of two from 4 to 32768.",
        ),
        click.option("--serial", metavar="S", help="Serial number of the disk, at most 20 ASCII characters."),
        click.option(
            "--block-size",
            type=int,
            metavar="B",
            help=f"Logical block size: {', '.join(map(str, BLOCK_SIZES))}.  [default: the storage's own]",
        ),
        click.option(
            "--size",
            type=parse_size,
            metavar="SIZE",
            help="Size of the disk; creates a file that does not exist.",
        ),
        click.option(
            "--path",
            type=click.Choice(PATHS),
            default="auto",
            show_default=True,
            help="Who serves requests: native (C threads), plugin (Python), auto (native where possible).",
        ),
        click.option(
            "--on-error",
            metavar="POLICY",
            help="Requests with errors that may pass: fail, wait, or retry=DURATION.  [default: the storage's own]",
        ),
        click.option(
            "--on-full",
            default="fail",
            show_default=True,
            metavar="POLICY",
            help="Requests for which the storage has no space: fail, or wait.",
        ),
        click.option(
            "--filter",
            "filters",
            multiple=True,
            metavar="FILTER",
            help="A layer over the storage: NAME or NAME?OPTION=VALUE&…. May be given several times, the lowest first.",
        ),
        click.option(
            "--export",
            "exports",
            multiple=True,
            default=("vduse",),
            show_default=True,
            metavar="EXPORT",
            help="How to present the disk: vduse, or vhost-user:SOCKET for virtual machines. May be given several times.",
        ),
    )
    for parameter in reversed(parameters):
        command = parameter(command)
    return command


@click.command(short_help="Make a disk and print its path.")
@disk_options
@click.option(
    "--restart",
    type=click.Choice(RESTARTS),
    default="no",
    show_default=True,
    help="Whether a server that dies is started again.",
)
@timeout_option("Longest wait for the disk; then everything is undone.")
@json_option
def attach(source: str, name: str | None, as_json: bool, timeout: float, **options: Any) -> None:
    """Make a disk whose storage is SOURCE, and print its path (/dev/vdX, or the socket's).

    SOURCE is a path (./disk.img, /dev/sdb) or KIND:PLACE?OPTION=VALUE (file:/x?direct=1, memory:1G,
    null:10G). The disk's server runs in the background; its log and state are in /run/vduse-blk/N/. Either
    the disk exists when this returns, or nothing is left behind. A disk that has lost its server is taken over: give the
    same SOURCE, --name and options.
    """
    spec = specification(source, name, **options)
    ready = launch.start(spec, timeout, unique=name is None)
    try:
        if as_json:
            output.print_json({"ok": True} | {key: value for key, value in ready.items() if key != "ready"})
        else:
            click.echo(ready["device"])
    except OSError as e:
        if ready.get("taken_over"):
            raise  # somebody uses it
        # A disk that nobody was told of would be left behind.
        with Client(ready["name"], timeout) as client:
            client.call("detach", force=True)
        raise ControlError(f"cannot print the path of the disk ({e.strerror}); it was removed", Exit.FAILED) from e
    if not as_json:
        came = "taken over" if ready.get("taken_over") else "ready"
        output.say(f"disk '{ready['name']}' is {came}; `vduse-blk detach {ready['name']}` removes it")


@click.command(short_help="Make a disk and serve it in the foreground.")
@disk_options
@json_option
def serve(source: str, name: str | None, as_json: bool, **options: Any) -> None:
    """Make a disk whose storage is SOURCE, and serve it in the foreground: for units and containers.

    Logs to standard error and tells systemd when the disk is ready (Type=notify). SIGTERM and SIGINT
    remove the disk and end the server, unless the disk is in use; SIGHUP reads /etc/vduse-blk/N.settings. SOURCE
    and options are those of attach; --json concerns only a failure to start.
    """
    spec = specification(source, name, **options)
    launch.check_descriptors()
    claimed, made = launch.claim_directory(spec.name, unique=name is None)
    try:
        os.dup2(launch.specification_file(dataclasses.replace(spec, name=claimed)), 0)  # which makes it inheritable
        command = launch.worker_command()
        os.execv(command[0], command)
    except BaseException:
        if made:
            rundir.remove_directory(claimed)
        raise


def specification(
    source: str,
    name: str | None,
    *,
    exports: tuple[str, ...] = ("vduse",),
    filters: tuple[str, ...] = (),
    **options: Any,
) -> WorkerSpec:
    """What to hand to the server. Raises ``UserError`` (exit 2) for what no server could serve."""
    parsed = parse_source(source)
    for text in filters:
        parse_filter(text)
    try:
        absolute, presented = absolute_source(source), tuple(absolute_export(export) for export in exports)
    except FileNotFoundError as e:
        raise UserError("a relative path leads nowhere: the current directory was deleted", Exit.USAGE) from e
    return WorkerSpec(
        name=default_name(str(parsed.options.get("path", parsed.backend))) if name is None else name,
        source=absolute,
        exports=presented,
        filters=filters,
        **options,
    )


def default_name(place: str) -> str:
    """A name made from a path or from a backend's name: './my disk.img' → 'my-disk', 'memory' → 'memory'."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePath(place).stem).strip(".-")[:63]
    return name if name and name != "control" else "disk"
