"""Whether somebody uses a disk that is to be removed. Runs on the event loop; /proc is looked at on another thread."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import asdict

from vduse_blk.block.holders import Holder, holders_of
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.worker.disk import Export

_GLANCE = 1.0
"""Seconds during which a mere open descriptor does not count as use: programs look at every new disk for an instant."""
_UDEV_LOOKS = 10.0
"""Seconds during which udev's does not: it looks at every disk that was written to, and slow disks are slow for it, too."""


async def claim(name: str, path: str) -> list[int]:
    """Open the block device of disk ``name`` exclusively, so that nobody can mount it meanwhile; returns the descriptor, or
    nothing if there is no device. Raises ControlError (exit 4): it is in use."""
    began = time.monotonic()
    while True:
        holders = await asyncio.to_thread(_holders, path)
        if not holders:
            break
        patience = _UDEV_LOOKS if all(holder.is_udev for holder in holders) else _GLANCE
        if time.monotonic() - began > patience or any(holder.kind != "open" for holder in holders):
            raise _refusal(name, path, holders)
        await asyncio.sleep(0.1)
    try:
        return [os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ControlError(f"disk '{name}' ({path}) is held by the kernel: {error.strerror}", Exit.BUSY) from error


def check_unused(name: str, export: Export) -> None:
    """Raises ControlError (exit 4): the export has users."""
    users = export.exporter.users()
    if users:
        raise _refusal(name, export.endpoint.path, users)


def _refusal(name: str, path: str, holders: list[Holder]) -> ControlError:
    return ControlError(
        f"disk '{name}' ({path}) is in use: {'; '.join(map(str, holders))}",
        Exit.BUSY,
        [asdict(holder) for holder in holders],
    )


def _holders(path: str) -> list[Holder]:
    try:
        number = os.stat(path).st_rdev
    except FileNotFoundError:
        return []
    return holders_of(os.major(number), os.minor(number))
