"""What can be changed of a disk that is served: its settings and its size. Runs on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vduse_blk import record
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.exporter import reached
from vduse_blk.worker import settings
from vduse_blk.worker.disk import Disk

log = logging.getLogger("vduse_blk.disk")


def set_values(disk: Disk, values: object) -> dict[str, Any]:
    """Change settings (``settings.change``); returns those of the disk now. Raises UserError with nothing
    changed, or with all of it changed if that cannot be noted."""
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ControlError(f"values: {values!r} is not usable; accepted is an object of texts", Exit.USAGE)
    if disk.stack is None or disk.remains is None or not disk.exports:
        raise ControlError(f"disk '{disk.name}' is {disk.doing}; nothing of it can be set", Exit.BUSY)
    disk.spec = settings.change(disk.stack, disk.spec, values)
    disk.remains.settings |= values  # a successor goes on with them
    try:
        disk.remains.write()
        disk.write_state()
    except ControlError as error:
        raise ControlError(f"it is set, but the disk's next server will not know it: {error}", error.exit_code) from error
    log.info("disk '%s' has settings %s", disk.name, " ".join(f"{key}={value}" for key, value in values.items()))
    return settings.facts(disk.stack)


async def resize(disk: Disk, size: object) -> int:
    """Change the size to so many bytes; returns it when the host sees it. Raises UserError, OSError."""
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ControlError(f"size: {size!r} is not usable; accepted are positive numbers of bytes", Exit.USAGE)
    async with disk.changing:
        if disk.stack is None or not disk.exports:
            raise ControlError(f"disk '{disk.name}' is {disk.doing}; it cannot be resized", Exit.BUSY)
        reached("resizing")
        info = await disk.stack.resize(size)
        reached("resized")
        if disk.record is not None:
            disk.record = replace(disk.record, size=info.size)
            try:
                record.write(disk.record)
            except ControlError as error:
                log.warning("%s", error)  # the old size is as good: a disk that has grown may be taken over
        for export in disk.exports:
            await export.exporter.resized(info)
            await _seen_by_host(export.endpoint.path, info.size)
        disk.note_state()
        return info.size


async def _seen_by_host(path: str, size: int) -> None:
    """The driver re-reads the capacity on an interrupt, a few milliseconds later."""
    sysfs = Path("/sys/class/block", Path(path).name, "size")
    deadline = time.monotonic() + 10
    while sysfs.exists() and int(sysfs.read_text()) * 512 != size:
        if time.monotonic() > deadline:
            raise ControlError(f"the storage has {size} bytes now, but {path} does not show it", Exit.TIMEOUT)
        await asyncio.sleep(0.005)
