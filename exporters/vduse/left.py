"""What a dead server left of a disk, seen by whoever takes over, cleans up, or only looks."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from vduse_blk.exporters.vduse import kernel, names
from vduse_blk.exporters.vduse.server import INFLIGHT_FILE

from pyvduse.device import Device
from pyvduse.errors import VduseError
from vduse_blk.block.errors import UserError
from vduse_blk.queue import InflightLog


def open_inflight(directory: Path, device: Device) -> InflightLog:
    """The log of what the dead server had in flight. Raises UserError: without it nobody may take over."""
    path = directory / INFLIGHT_FILE
    try:
        log = InflightLog.open(path)
    except OSError as error:
        why = "is lost" if error.errno == errno.ENOENT else f"cannot be used ({error.strerror or error})"
        raise _no_log(names.disk_of(device.name), path, why) from error
    try:
        queues = [device.vq_info(index) for index in range(device.vq_count())]
        if log.queues != len(queues) or any(queue.num > log.entries for queue in queues):
            raise _no_log(names.disk_of(device.name), path, "is of another disk")
    except BaseException:
        log.close()
        raise
    return log


def _no_log(name: str, path: Path, why: str) -> UserError:
    return UserError(
        f"{path}, which says what the dead server of disk '{name}' had in flight, {why}; `vduse-blk detach {name} --force` "
        "fails its requests and removes it",
        exit_code=1,
    )


def look(name: str) -> dict[str, Any]:
    """For ``info`` of a disk without a server: ``waiting`` requests, and ``broken``: a sentence if the kernel has given it
    up. Empty if the kernel has no such disk. The node is opened for an instant: a successor waits that long."""
    known = names.device_of(name)
    disk = kernel.find_disk(known) if known is not None else None
    if known is None or disk is None:
        return {}
    found: dict[str, Any] = {"device": f"/dev/{disk}", "waiting": kernel.in_flight(disk)}
    if known != name:
        found["kernel_name"] = known
    try:
        with Device.open(known) as device:
            if device.is_broken():
                found["broken"] = kernel.given_up(known)
    except VduseError:
        pass  # somebody has it open: it is being taken over, or its server's last thread hangs in the kernel
    return found
