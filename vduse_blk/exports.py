"""How a user names the ways to present a disk: each ``KIND``, or ``KIND:PLACE?OPTION=VALUE&…``.

``KIND`` is an exporter's name, with '-' for '_'; the rest is as in sources (``block.options.parse_uri``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vduse_blk import registry
from vduse_blk.block.errors import UserError
from vduse_blk.block.options import make_options, parse_uri, place_of, quote_place
from vduse_blk.exporter import CommonOptions, Exporter


@dataclass(frozen=True)
class ExportSpec:
    """An exporter and what was asked of it."""

    kind: str
    exporter: type[Exporter]
    own: CommonOptions
    read_only: bool

    @property
    def place(self) -> tuple[str, str]:
        """Two exports that have the same cannot be there at once."""
        name = place_of(self.exporter.Options)
        place = "" if name is None else str(getattr(self.own, name))
        return self.kind, os.path.realpath(place) if name == "path" else place


def parse_exports(texts: Sequence[str]) -> list[ExportSpec]:
    """Understand the exports of one disk. The first may write, the others not, unless they say so. Raises UserError."""
    specs: list[ExportSpec] = []
    places: set[tuple[str, str]] = set()
    for text in texts:
        kind, colon, rest = text.partition(":")
        exporter = registry.exporter(_name_of(kind))
        own = make_options(kind, exporter.Options, parse_uri("export", kind, exporter.Options, rest) if colon else {})
        writable = own.writable if own.writable is not None else not specs
        spec = ExportSpec(kind, exporter, own, not writable)
        if spec.place in places:
            raise UserError(f"export: '{text}' is given twice; leave one out")
        places.add(spec.place)
        specs.append(spec)
    return specs


def absolute_export(text: str) -> str:
    """The same export, named so that it does not depend on the working directory. Raises UserError for one there is not."""
    kind, colon, rest = text.partition(":")
    name = _name_of(kind)
    if not colon:
        if not registry.exists("exporter", name):
            registry.exporter(name)  # raises, naming those there are
        return text  # and the exporter is not loaded: that takes longer than all else the command does
    options = registry.exporter(name).Options
    parse_uri("export", kind, options, rest)
    if place_of(options) != "path" or rest.startswith("/"):
        return text
    return f"{kind}:{quote_place(os.getcwd())}/{rest}"


def _name_of(kind: str) -> str:
    return kind.replace("-", "_")
