"""What the kernel shows about a VDUSE device outside its own node: modules, sysfs, driver binding, the disk.

``device`` is what the kernel calls it (``names``).

Success of an attach is judged here, by the disk, because netlink reports success in many failures.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from vduse_blk.exporters.vduse import names

from pyvduse.control import Control
from vduse_blk.block.errors import UserError

MODULES = ("vduse", "virtio_vdpa", "virtio_blk")
LINKS = Path("/dev/vduse-blk")
_BLKGETSIZE64 = 0x80081272  # linux/fs.h; size_t is 8 bytes on every host this runs on
_BUSY = 4
_DENIED = 5
_UNSUPPORTED = 6


def load_modules() -> None:
    """Load what is missing; nothing else would (there is no alias for /dev/vduse/control nor for virtio_vdpa).

    Raises UserError (exit 6) naming the module.
    """
    for module in MODULES:
        if Path("/sys/module", module).exists():
            continue
        try:
            done = subprocess.run(["modprobe", module], capture_output=True, text=True, check=False)
            problem = done.stderr.strip() if done.returncode else None
        except FileNotFoundError:
            problem = "there is no 'modprobe' (package kmod)"
        if problem is not None:
            raise UserError(
                f"the kernel module '{module}' cannot be loaded ({problem}); `vduse-blk doctor` says more",
                exit_code=_UNSUPPORTED,
            )
    if not names.CONTROL.exists():
        raise UserError(
            f"{names.CONTROL} does not exist although the module 'vduse' is loaded; in a container, pass the host's "
            "/dev/vduse in",
            exit_code=_UNSUPPORTED,
        )
    if not os.access(names.CONTROL, os.R_OK | os.W_OK):
        raise UserError(f"{names.CONTROL}: no permission; run as root", exit_code=_DENIED)


async def netlink(verb: str, device: str) -> None:
    """``verb`` "add" or "del": the vdpa device ``device``. Returns when the driver has probed, or let go.

    In a process of its own: it may sit in the kernel for as long as a driver takes, and the netlink library would weigh on a
    server that needs it twice in its life. Raises UserError with the kernel's reason.
    """
    await _run_module("pyvduse.vdpa", verb, device)


async def remove_leftover(name: str, directory: Path | None, *, force: bool = False) -> None:
    """What a dead server of this name left goes, in a process of its own. Raises UserError: it is in use (unless ``force``),
    or served."""
    words = [str(directory)] if directory is not None else []
    await _run_module("vduse_blk.exporters.vduse.cleanup", *(["--force"] if force else []), name, *words)


async def _run_module(module: str, *words: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        module,
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # an interrupt from the terminal is for the server, which decides
    )
    try:
        _, said = await child.communicate()
    except asyncio.CancelledError:
        # Whoever undoes next must know what the kernel was asked. The kernel may hold the child until we have answered.
        if child.returncode is None:
            child.kill()
            await child.wait()
        raise
    status = child.returncode
    if status:
        lines = said.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"{module} ended with status {status}"
        raise UserError(reason, exit_code=status if status in (_BUSY, _DENIED) else 1)


def vdpa_device(device: str) -> Path:
    """The vdpa device's directory in sysfs; it exists while the device is attached."""
    return names.VDPA_DEVICES / device


def find_disk(device: str) -> str | None:
    """Kernel name ("vda") of the disk on top of vdpa device ``device``, if it exists."""
    for found in sorted(vdpa_device(device).glob("virtio*/block/*")):
        return found.name
    return None


def disk_size(disk: str) -> int:
    """Bytes, as the driver knows it."""
    return int(Path("/sys/class/block", disk, "size").read_text()) * 512


def in_flight(disk: str) -> int:
    """Requests that the driver has given out and that are not answered."""
    return sum(map(int, Path("/sys/class/block", disk, "inflight").read_text().split()))


def given_up(device: str) -> str:
    """Of a device that the kernel has declared broken: what can still be done, as a sentence."""
    disk, name = find_disk(device), names.disk_of(device)
    waiting = in_flight(disk) if disk is not None else 0
    why = f"the kernel has given disk '{name}' up, because a control message was not answered in time"
    if waiting:
        return (
            f"{why}; {waiting} requests are in flight that nobody can answer any more: it cannot be saved, and goes only "
            "with a reboot"
        )
    return f"{why}; `vduse-blk detach {name} --force` removes it"


def bound_driver(device: str) -> str | None:
    """Bus driver of the vdpa device: "virtio_vdpa", "vhost_vdpa" or None."""
    link = vdpa_device(device) / "driver"
    return link.resolve().name if link.is_symlink() else None


def bind_virtio_vdpa(device: str) -> None:
    """Give the vdpa device to virtio_vdpa. The first bus driver that was loaded wins otherwise, which may be vhost_vdpa.

    Blocks while the driver probes, like DEV_NEW: not on the thread that answers the kernel.
    """
    if bound_driver(device) == "virtio_vdpa":
        return
    (vdpa_device(device) / "driver_override").write_text("virtio_vdpa")
    if bound_driver(device) is not None:
        (vdpa_device(device) / "driver" / "unbind").write_text(device)
    Path("/sys/bus/vdpa/drivers_probe").write_text(device)


def is_usable(disk: str, size: int) -> bool:
    """Whether ``/dev/DISK`` can be opened and has ``size`` bytes."""
    try:
        fd = os.open(f"/dev/{disk}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        buffer = bytearray(8)
        fcntl.ioctl(fd, _BLKGETSIZE64, buffer)
        return bool(struct.unpack("=Q", buffer)[0] == size)
    except OSError:
        return False
    finally:
        os.close(fd)


def why_no_disk(device: str) -> str:
    """The most likely reason, for an error message."""
    if not vdpa_device(device).exists():
        return "the vdpa device is gone"
    driver = bound_driver(device)
    if driver != "virtio_vdpa":
        return f"the vdpa device is bound to {driver or 'no driver'} instead of virtio_vdpa"
    if not any(vdpa_device(device).glob("virtio*")):
        return "virtio_vdpa did not accept the device; see the kernel log"
    if not any(vdpa_device(device).glob("virtio*/driver")):
        return "virtio_blk did not accept the device; see the kernel log"
    return "virtio_blk did not make a disk; see the kernel log"


def disk_numbers(disk: str) -> tuple[int, int]:
    """(major, minor) of a whole disk."""
    major, minor = Path("/sys/class/block", disk, "dev").read_text().strip().split(":")
    return int(major), int(minor)


def add_link(name: str, disk: str) -> str:
    """Make the stable name ``/dev/vduse-blk/NAME`` → ``../DISK``; returns it. Raises UserError."""
    link = LINKS / name
    try:
        _make_link(link, f"../{disk}")
    except OSError as error:
        raise UserError(f"cannot make {link}: {error.strerror}", exit_code=1) from error
    return str(link)


def _make_link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.new")
    while True:
        with suppress(FileExistsError):
            os.mkdir(link.parent, mode=0o755)
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
        except FileNotFoundError:
            continue  # another disk was the last one just now, and took the directory with it
        os.replace(temporary, link)  # what is not empty stays
        return


def remove_link(name: str) -> None:
    """The stable name goes, and with the last one their directory. Raises OSError if the name stays."""
    (LINKS / name).unlink(missing_ok=True)
    (LINKS / f".{name}.new").unlink(missing_ok=True)
    with suppress(OSError):  # not empty, gone, or mounted into a container
        LINKS.rmdir()


def sweep() -> None:
    """Destroy the remnants whose process has ended. Raises VduseError."""
    if names.remnants():
        with Control.open() as control:
            names.sweep(control)
