"""The file in which an administrator may keep settings of a disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vduse_blk.block.errors import UserError
from vduse_blk.control.errors import Exit
from vduse_blk.control.messages import MAX_MESSAGE
from vduse_blk.control.rundir import check_name, directory_of

SETTINGS_ENV: Final = "VDUSE_BLK_ETC"
"""Environment variable that moves ``/etc/vduse-blk`` elsewhere."""
DEFAULT_SETTINGS_ROOT: Final = "/etc/vduse-blk"


def parse_settings(items: Iterable[str]) -> dict[str, str]:
    """``KEY=VALUE`` each, as ``vduse-blk set`` and a settings file have them. Raises ``UserError`` (exit 2)."""
    result: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item}: is no setting; accepted is KEY=VALUE", Exit.USAGE)
        if key in result:
            raise UserError(f"{key}: given twice; leave one out", Exit.USAGE)
        result[key] = value
    return result


def settings_file(name: str) -> Path:
    """Where an administrator may keep settings of a disk, for its server to read on SIGHUP. Raises ``UserError``."""
    return directory_of(SETTINGS_ENV, DEFAULT_SETTINGS_ROOT) / f"{check_name(name)}.settings"


def read_settings(name: str) -> dict[str, str]:
    """Of ``settings_file``: lines ``KEY=VALUE``, empty ones, and ``#`` comments. Empty if there is no such file. Raises
    ``UserError`` (exit 2) and ``OSError``."""
    try:
        with settings_file(name).open(encoding="utf-8") as file:
            text = file.read(MAX_MESSAGE)
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as e:
        raise UserError(f"{settings_file(name)} is not UTF-8", Exit.USAGE) from e
    lines = (line.strip() for line in text.splitlines())
    return parse_settings(line for line in lines if line and not line.startswith("#"))
