"""What the kernel calls a disk: by its name, unless a *remnant* has that name.

VDUSE destroys no device that a process has open, and a killed server one of whose threads waits in the kernel for its
storage keeps its device open. The disk is gone by then, its users were told; what is left is a VDUSE device without a vdpa
device, good for nothing. The next disk of the name is NAME@2 in the kernel, NAME@3 if there are two remnants, and so on; no
disk's name has an '@', so these are nobody else's.

Which device is a remnant the kernel itself says, so that no file can be lost or be wrong: ``msg_timeout`` is ours to set at
any time, matters to a remnant no more, and ends with the device. A disk's device is the one of these names that is no
remnant; there is at most one, because who makes it has the lock of the disk's directory and has looked.

Remnants go with the next disk that is attached or detached after the process has ended, whatever that disk's name, or when
the process's monitor sees it end.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvduse.control import Control

DEVICES = Path("/sys/class/vduse")
VDPA_DEVICES = Path("/sys/bus/vdpa/devices")
CONTROL = Path("/dev/vduse/control")
_REMNANT = 0x76626C6B
"""Seconds, 62 years: nobody else sets that. Any 32-bit number is accepted (vduse_dev.c, msg_timeout_store)."""


def device_of(name: str) -> str | None:
    """The VDUSE device of disk ``name``, dead or alive; None if the kernel has none. A device of another program that is
    called ``name`` counts as the disk's, as long as the disk has none of its own: it is in the way, and is refused."""
    found = {}
    for device in _listed(DEVICES):
        number = re.fullmatch(rf"{re.escape(name)}(?:@([1-9][0-9]*))?", device, re.ASCII)
        if number is not None and not _is_remnant(device, DEVICES):
            found[int(number[1] or 1)] = device
    return found[max(found)] if found else None


def is_taken(name: str) -> bool:
    """Whether there is a VDUSE or vdpa device in the way of a new disk ``name``; a remnant is not."""
    return device_of(name) is not None or os.path.lexists(VDPA_DEVICES / name)


def free_device(name: str) -> str:
    """What to call the device of a new disk ``name``, which has none. Call with the lock of the disk's directory."""
    numbered = (f"{name}@{number}" for number in itertools.count(2))
    return next(device for device in itertools.chain([name], numbered) if not (DEVICES / device).exists())


def disk_of(device: str) -> str:
    """The name of the disk that ``device`` is or was."""
    return device.partition("@")[0]


def mark_remnant(device: str) -> None:
    """From now on it is nobody's. Call when its vdpa device is deleted and it cannot be destroyed. Raises OSError."""
    (DEVICES / device / "msg_timeout").write_text(str(_REMNANT))


def remnants(devices: Path | None = None) -> list[str]:
    """Names of all remnants."""
    place = DEVICES if devices is None else devices
    return [device for device in _listed(place) if _is_remnant(device, place)]


def sweep(control: Control) -> None:
    """Destroy the remnants whose process has ended."""
    if not remnants():
        return
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)  # which nobody but root can, and lock
    try:
        # One at a time: between the look and the destruction another one could destroy it, and make a device of that name.
        fcntl.flock(fd, fcntl.LOCK_EX)
        for device in remnants():
            with suppress(OSError):  # EBUSY: not yet
                control.destroy(device)
    finally:
        os.close(fd)


def _listed(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _is_remnant(device: str, devices: Path) -> bool:
    try:
        return (devices / device / "msg_timeout").read_text().strip() == str(_REMNANT)
    except OSError:
        return False  # it has gone
