"""What the commands print: results on standard output, everything said to a person on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as of a program that SIGINT ends."""


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` is among the arguments, so that even a usage error is reported as JSON."""
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2))


def say(sentence: str) -> None:
    """Tell the person at the terminal. If that cannot be, what the command does goes on all the same."""
    try:
        click.echo(f"vduse-blk: {printable(sentence)}", err=True)
    except OSError:
        pass


def printable(text: str) -> str:
    """One line that no file's name can make two of, or send to the terminal as commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fail(error: str, code: int, as_json: bool, holders: Sequence[Any] | None = None) -> None:
    """Report a failure: one sentence on standard error, with ``as_json`` an object on standard output, too.

    ``holders`` are those who keep a busy disk open; the sentence names them already.
    """
    say(error)
    if as_json:
        report: dict[str, Any] = {"ok": False, "error": error, "code": int(code)}
        if holders:
            report["holders"] = list(holders)
        try:
            print_json(report)
        except OSError:
            sys.stdout = None  # the interpreter must not try to flush what is left


def size_text(size: int | None) -> str:
    """1610612736 → '1.5 GiB'. Binary units, as disks of virtual machines are usually spoken of."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Print a table: drawn to the width of a terminal, or plain aligned text where standard output is not
    one.

    A pipe gets whole cells on one line each (a drawn table folds them), and does not pay for importing rich.
    ``styles`` maps a cell's text to its colour.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        for row in [columns, *rows]:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    Console().print(table)
