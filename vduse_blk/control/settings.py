"""The file in which an administrator may keep settings of a disk."""

from __future__ import annotations

import os
import stat
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
    ``UserError`` (exit 2)."""
    path = settings_file(name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # the server would wait in a FIFO
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UserError(f"{path} is in the way: it is not a regular file", Exit.USAGE)
            with open(fd, encoding="utf-8", closefd=False) as file:
                text = file.read(MAX_MESSAGE)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}", Exit.USAGE) from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8", Exit.USAGE) from e
    lines = (line.strip() for line in text.splitlines())
    return parse_settings(line for line in lines if line and not line.startswith("#"))
