"""``doctor``: can this host do it, and if not, what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Final

import click

from vduse_blk.cli import output
from vduse_blk.cli.options import json_option
from vduse_blk.control import rundir
from vduse_blk.control.errors import Exit

LEVEL_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command(short_help="Say whether this host can do it, and the remedy if not.")
@json_option
def doctor(as_json: bool) -> int:
    """Check whether this host can serve disks: kernel, modules, permissions, io_uring, page size and more.

    Each finding comes with its remedy. Exit status 0 if disks can be attached (warnings included), 6 if not.
    Nothing is changed and no module is loaded.
    """
    examine = import_module("vduse_blk.exporters.vduse.doctor").examine
    findings = examine(rundir.run_root(), rundir.check_run_root)
    able = all(finding.level != "fail" for finding in findings)
    if as_json:
        report = {"ok": able, "findings": [asdict(finding) for finding in findings]}
        if not able:
            report |= {
                "error": "this host cannot serve disks: " + "; ".join(f.name for f in findings if f.level == "fail"),
                "code": int(Exit.UNSUPPORTED),
            }
        output.print_json(report)
    else:
        output.print_table(("CHECK", "", "FINDING"), [(f.name, f.level, f.detail) for f in findings], LEVEL_STYLES)
        for finding in findings:
            if finding.level != "ok":
                click.echo(f"\n{finding.name}: {finding.remedy}")
    return Exit.OK if able else Exit.UNSUPPORTED
