"""Options that more than one command has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vduse_blk.block.errors import UserError
from vduse_blk.control.errors import Exit
from vduse_blk.control.spec import MAX_TIMEOUT, TIMEOUT_RULE

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``, which every command has; the parameter is ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, also for a failure.")(command)


def timeout_option(help: str) -> Decorator:
    """``--timeout SECONDS``, 60 unless given. What cannot be waited for (nan, infinity) is bad usage."""
    return click.option(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help=f"{help}  [default: 60]",  # click would print 60.0
    )


def _seconds(text: str | float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= MAX_TIMEOUT:  # not so for nan, either
        raise UserError(f"timeout: {str(text)!r} is not usable; accepted are {TIMEOUT_RULE}", Exit.USAGE)
    return seconds
