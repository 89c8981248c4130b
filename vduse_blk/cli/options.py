"""Kinds of option values that more than one command takes."""

from __future__ import annotations

from typing import Final

import click

from vduse_blk.block.options import parse_size


class SizeType(click.ParamType):
    """A number of bytes, with a suffix K, M, G … if wanted."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_size(str(value))


SIZE: Final = SizeType()
SECONDS: Final = click.FloatRange(min=0, min_open=True)
