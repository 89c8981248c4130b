"""Removing what a dead server left behind, at whatever step it died.

What may be there: the VDUSE device; on it a vdpa device with a disk, perhaps with requests nobody will ever answer and with
control messages nobody has answered; the stable link. A vdpa device cannot be deleted while its driver waits for
answers, so somebody has to answer first: a ``DeviceServer`` whose queues fail every request.

Runs in the process of whoever cleans up (``detach``, ``attach`` after a failure), never in a server: a server that finds
leftovers of its name has ``python -m vduse_blk.exporters.vduse.cleanup NAME`` remove them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import sys
import threading
import time
from pathlib import Path

from vduse_blk.exporters.vduse import kernel, names
from vduse_blk.exporters.vduse.server import INFLIGHT_FILE, DeviceServer

from pyvduse.control import Control
from pyvduse.device import Device
from pyvduse.errors import VduseError
from pyvduse.messages import decode_request, encode_response
from pyvduse.vdpa import Vdpa
from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.errors import UserError
from vduse_blk.block.holders import Holder, holders_of
from vduse_blk.queue import DiskRules, InflightLog, NativeQueue, Queue
from vduse_blk.virtio import Feature, VirtioBlkDevice

log = logging.getLogger("vduse_blk.disk")

_BUSY = 4
_IDLE_SECONDS = 3.0


class DiskInUse(UserError):
    """``holders`` says by whom."""

    def __init__(self, message: str, holders: list[Holder]) -> None:
        super().__init__(message, exit_code=_BUSY)
        self.holders = holders


def check_unused(device: str) -> None:
    """Raise DiskInUse if the disk of ``device`` is mounted or held by anybody."""
    disk = kernel.find_disk(device)
    if disk is None:
        return
    holders = holders_of(*kernel.disk_numbers(disk))
    if holders:
        raise DiskInUse(f"disk '{names.disk_of(device)}' (/dev/{disk}) is in use: {'; '.join(map(str, holders))}", holders)


def remove_leftover(
    name: str, directory: Path | None = None, *, force: bool = False, node: int | None = None
) -> bool:
    """Remove the kernel objects of a disk whose server is dead; returns whether there were any. ``directory``: where that
    server kept its in-flight log. ``node``: its descriptor of the device, which is ours now: it may hang in the kernel with
    the node open, and then nobody can open it anew, and the device stays as a remnant (``names``).

    Raises DiskInUse (exit 4) unless ``force``; UserError (exit 4) if a server still holds the device.
    """
    try:
        return _remove_leftover(name, directory, force, node)
    except VduseError as error:
        code = 5 if error.errno in (errno.EPERM, errno.EACCES) else 1
        raise UserError(str(error), exit_code=code) from error


def _remove_leftover(name: str, directory: Path | None, force: bool, node: int | None) -> bool:
    known = names.device_of(name)
    if known is None:
        kernel.remove_link(name)
        kernel.sweep()
        return False
    if not force:
        check_unused(known)
    try:
        device = Device.open(known) if node is None else Device.from_fd(known, node)
    except VduseError as error:
        if error.errno == errno.EBUSY:
            raise UserError(
                f"device '{known}' is still open in another process, which serves it or inherited its descriptor",
                exit_code=_BUSY,
            ) from error
        raise
    with device:
        if device.is_broken() and (disk := kernel.find_disk(known)) is not None and kernel.in_flight(disk):
            raise UserError(kernel.given_up(known), exit_code=1)  # DEV_DEL would wait for ever, with a kernel lock held
        # A DEV_DEL under way has taken the device out of sysfs, and waits for its requests all the same: the driver knows.
        if kernel.vdpa_device(known).exists() or (not device.is_broken() and device.features()):
            inflight = _inflight(directory)
            try:
                _delete(device, inflight)
            finally:
                if inflight is not None:
                    inflight.close()
    with Control.open() as control:
        try:
            control.destroy(known)
        except VduseError as error:
            if error.errno != errno.EBUSY or kernel.vdpa_device(known).exists():
                raise
            if node is not None:
                names.mark_remnant(known)
            else:
                _see_off(known)
                control.destroy(known)
        names.sweep(control)
    kernel.remove_link(name)
    return True


def _inflight(directory: Path | None) -> InflightLog | None:
    """What the dead server had in flight. Without it requests are counted off where the used ring stands, which may miss one
    that was overtaken; then the kernel waits for it for ever."""
    if directory is None:
        return None
    try:
        return InflightLog.open(directory / INFLIGHT_FILE)
    except FileNotFoundError:
        return None  # it died before it had any
    except OSError as error:
        log.error("the in-flight log cannot be trusted: %s", error)
        return None


def _delete(device: Device, inflight: InflightLog | None) -> None:
    nothing = BlockInfo(size=0)
    virtio = VirtioBlkDevice(
        nothing, num_queues=device.vq_count(), queue_size=256, transport=Feature.ACCESS_PLATFORM.mask
    )
    limits = virtio.limits
    rules = DiskRules(
        nothing,
        max_discard=limits.max_discard,
        max_write_zeroes=limits.max_write_zeroes,
        max_ranges=limits.max_ranges,
    )

    def failing_queue(index: int, failing: bool) -> Queue:
        return NativeQueue(index, rules, None)

    server = DeviceServer(device, virtio, failing_queue, lambda sentence: None, inflight=inflight)
    server.start(adopt=True)
    try:
        server.wait_until_taken_over()
        if inflight is None:
            _wait_until_idle(device.name)
        with Vdpa() as vdpa:
            vdpa.dev_del(device.name)
    except VduseError as error:
        # The dead server may have asked before us, and the kernel has gone on with it as soon as somebody answered.
        if error.errno != errno.ENODEV:
            raise
    finally:
        server.stop()


def _see_off(name: str) -> None:
    """A DEV_DEL under way, whose asker has outlived the server, has reset the device and taken it out of sysfs, and waits
    for one more answer. There is no driver left to care which."""

    def ask_again() -> None:
        with contextlib.suppress(VduseError), Vdpa() as vdpa:
            vdpa.dev_del(name)  # waits for the other, and finds nothing

    asking = threading.Thread(target=ask_again)
    with Device.open(name) as device:
        asking.start()
        while asking.is_alive():
            select.select([device.fd], [], [], 0.05)
            while (raw := device.read_message()) is not None:
                device.write_response(encode_response(decode_request(raw).request_id, True))


def _wait_until_idle(device: str) -> None:
    """DEV_DEL waits for every request, with a kernel lock held: better not asked than for ever. Raises UserError."""
    disk = kernel.find_disk(device)
    deadline = time.monotonic() + _IDLE_SECONDS
    while disk is not None and kernel.in_flight(disk):
        if time.monotonic() >= deadline:
            raise UserError(
                f"the record of what the dead server of disk '{names.disk_of(device)}' had in flight is lost, and "
                f"{kernel.in_flight(disk)} requests wait that nobody knows how to answer: it goes only with a reboot",
                exit_code=1,
            )
        time.sleep(0.001)


def main(*words: str) -> int:
    """``[--force] NAME [DIRECTORY]``. Exit status as ``UserError.exit_code``; the reason is the last line on standard
    error."""
    force = words[0] == "--force"
    name, *directory = words[force:]
    try:
        remove_leftover(name, Path(directory[0]) if directory else None, force=force)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
