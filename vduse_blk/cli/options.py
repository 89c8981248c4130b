"""Options that more than one command has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``, which every command has; the parameter is ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, also for a failure.")(command)


def timeout_option(help: str) -> Decorator:
    """``--timeout SECONDS``, 60 unless given."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help=help,
    )
