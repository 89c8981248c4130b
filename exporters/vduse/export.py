"""Attach and detach as transactions.

Attach:  modules → created (node exists) → configured → served (messages are answered) → added (DEV_NEW done) → bound →
disk found and usable → linked. Each step registers its undoing before the next begins; a failure anywhere undoes all, last
first. Detach runs the same undoings in the same order.
Adopt:  taken (the node is ours) → adopted (queues run, what was in flight is done again) → linked. A failure, and
``leave``, undo only what is of this process; the disk stays for the next server. A live upgrade is an adoption whose node is
not opened, which is exclusive, but passed on. The words are also the names at which tests
kill the process (see ``reached``); ``cleanup`` then removes what is left, from any of them.

DEV_NEW and DEV_DEL block until the driver has probed or let go, which needs our own answers: they are sent by a process of
their own, never by the thread that answers nor by the loop that serves plugin queues.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from vduse_blk.exporters.vduse import kernel, names
from vduse_blk.exporters.vduse.left import open_inflight
from vduse_blk.exporters.vduse.server import INFLIGHT_FILE, DeviceServer

from pyvduse.control import Control, DeviceConfig
from pyvduse.device import Device
from pyvduse.errors import VduseError
from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.errors import UserError
from vduse_blk.block.stack import Stack
from vduse_blk.exporter import Endpoint, Exporter, ExportOptions, HandOver, counters_of, reached
from vduse_blk.queue import InflightLog, QueueFactory
from vduse_blk.virtio import Feature, VirtioBlkDevice

log = logging.getLogger("vduse_blk.disk")

_DEVICE_ID_BLOCK = 2
_MSG_TIMEOUT = 120
"""Seconds the kernel waits for an answer. Long, because running into it loses the device for good; finite, because a host
with a dead server must still be able to shut down."""
_RESET_SECONDS = 1.0
_MIB = 1 << 20
_QUEUES_DEFAULT = 8
"""At most; one per CPU below that."""


_BOUNCE_LEAST = 20 * _MIB
_BOUNCE_MOST = 1024 * _MIB
_BOUNCE_PER_ENTRY = 8 * 1024


def bounce_size(queues: int, queue_size: int) -> int:
    """Bytes of bounce area, all of which the server keeps in memory. Room for 8 requests of 1 MiB at once (the kernel aligns
    pieces to their size, and keeps freed ones back for each CPU, so much of it is out of reach), and for half of what all
    queues can hold of 4 KiB (each takes four pages: data, header, status, table). A driver that finds no room goes on later,
    in a worker of the kernel that takes the CPU from our queue thread. A single request must fit by itself, or it is tried
    for ever: the largest that anybody has without asking for it is 4 MiB (Linux 7)."""
    return max(_BOUNCE_LEAST, min(_BOUNCE_MOST, queues * queue_size * _BOUNCE_PER_ENTRY))


def set_bounce_size(device: Device, size: int) -> None:
    """Kernels that know no size have 64 MiB. Raises VduseError."""
    try:
        device.bounce_size = size
    except VduseError as error:
        if error.errno != errno.ENOENT:
            raise


class VduseExporter(Exporter):
    """The disk as ``/dev/vdX`` of this host."""

    for_this_host = True
    hands_over = True

    def __init__(self, stack: Stack, name: str, options: ExportOptions) -> None:
        super().__init__(stack, name, options)
        self._here = AsyncExitStack()  # what is of this process: threads, descriptors
        self._there = AsyncExitStack()  # what the kernel keeps without us
        self._disk: str | None = None
        self._leaving = False
        self._received = False
        self._server: DeviceServer | None = None
        self._device: Device | None = None
        self._inflight: InflightLog | None = None
        self._counted: dict[int, dict[str, int]] = {}
        """By earlier servers of the device: another process's, or this one's before an upgrade that failed."""
        self.queue_count = options.queues or min(len(os.sched_getaffinity(0)), _QUEUES_DEFAULT)
        self._virtio = VirtioBlkDevice(
            self.info,
            num_queues=self.queue_count,
            queue_size=options.queue_size,
            transport=Feature.ACCESS_PLATFORM.mask,
        )
        self._factory = self._make_factory()
        self.path = self._factory.path

    def _make_factory(self) -> QueueFactory:
        limits = self._virtio.limits
        return QueueFactory(
            self.stack,
            self.info,
            path=self.options.path,
            max_discard=limits.max_discard,
            max_write_zeroes=limits.max_write_zeroes,
            max_ranges=limits.max_ranges,
        )

    # ------------------------------------------------------------------------------------------------ contract

    @classmethod
    def is_left(cls, name: str) -> bool:
        device = names.device_of(name)
        return device is not None and kernel.find_disk(device) is not None

    @classmethod
    def is_there(cls, name: str) -> bool:
        return names.device_of(name) is not None

    @classmethod
    async def fail_left(cls, name: str, directory: Path) -> None:
        await kernel.remove_leftover(name, directory, force=True)

    @classmethod
    def sweep(cls) -> None:
        kernel.sweep()

    async def start(self) -> Endpoint:
        try:
            await (self._adopt() if self.options.adopt else self._attach())
        except BaseException as error:
            # What went wrong first is what the user hears; whoever comes next finds what could not be undone.
            if not self.options.adopt:
                await self._try_to_undo(self._delete)
            await self._try_to_undo(self._here.aclose)
            if not self.options.adopt:
                await self._try_to_undo(self._there.aclose)
            if isinstance(error, OSError):
                raise UserError(str(error), exit_code=5 if error.errno in (errno.EPERM, errno.EACCES) else 1) from error
            raise
        return Endpoint("block", f"/dev/{self._disk}")

    async def _try_to_undo(self, undo: Callable[[], Awaitable[None]]) -> None:
        try:
            await undo()
        except (UserError, OSError):
            log.exception("%s: undoing", self.name)

    async def resized(self, info: BlockInfo) -> None:
        self._factory.rules.set_capacity(info.size)
        assert self._server is not None
        self._server.resize(self._virtio.resize(self.info))

    async def stop(self) -> None:
        await self._delete()
        await self._here.aclose()
        await self._there.aclose()

    async def leave(self) -> None:
        await self._here.aclose()

    def hold(self, on: bool) -> None:
        assert self._server is not None
        self._server.hold(on)

    def is_quiet(self) -> bool:
        assert self._server is not None
        return self._server.is_quiet()

    async def hand_over(self) -> HandOver:
        assert self._server is not None
        assert self._device is not None
        # Between two messages: none is read and not answered. What comes now waits in the kernel for the next reader.
        await asyncio.to_thread(self._server.stop)
        self._counted = self._server.counters()
        return HandOver({"node_fd": 0, "counters": self._counted}, [self._device.fd])

    async def receive(self, handed: HandOver) -> None:
        device = Device.from_fd(self._left_device(), handed.fds[handed.facts["node_fd"]])
        self._here.callback(self._after, device.close, "closed")
        self._prepare(device)
        self._counted = counters_of(handed.facts)
        self._received = True

    async def resume(self, stack: Stack, *, touched: bool = False) -> Endpoint:
        if stack is not self.stack:
            self.stack = stack
            self._factory = self._make_factory()
        received, self._received = self._received, False
        await self._go_on(on_trial=received)
        return Endpoint("block", f"/dev/{self._disk}")

    def attend(self) -> None:
        assert self._server is not None
        self._server.attend()

    async def release(self) -> None:
        await self._here.aclose()

    @property
    def replayed(self) -> int:
        return self._server.replayed if self._server is not None else 0

    def status(self) -> dict[str, Any]:
        assert self._server is not None
        assert self._device is not None
        other_name = {"kernel_name": self._device.name} if self._device.name != self.name else {}
        return {"device": f"/dev/{self._disk}", **other_name, "path": self.path, **self._server.describe()}

    # ---------------------------------------------------------------------------------------------------- steps

    async def _attach(self) -> None:
        await asyncio.to_thread(kernel.load_modules)
        control = Control.open()
        self._there.callback(control.close)
        names.sweep(control)
        if self.is_there(self.name):
            await kernel.remove_leftover(self.name, self.options.directory)
        device = self._create(control, names.free_device(self.name))
        inflight = None
        if self.options.directory is not None:
            path = self.options.directory / INFLIGHT_FILE
            try:
                inflight = InflightLog.create(path, self.queue_count, self.options.queue_size)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}", exit_code=1) from error
            self._here.callback(inflight.close)
        self._serve(device, inflight).start()
        reached("served")
        # From here on a driver may be on top: it goes before anything is undone, see _delete.
        await kernel.netlink("add", device.name)
        reached("added")
        await asyncio.to_thread(kernel.bind_virtio_vdpa, device.name)
        self._disk = await self._wait_for_disk(device.name)
        reached("found")
        kernel.add_link(self.name, self._disk)
        reached("linked")

    def _serve(self, device: Device, inflight: InflightLog | None) -> DeviceServer:
        """A server that is not started, and stopped before its device is closed."""
        make, fail, after_reset = self._factory.make, self.fail, self._look_after_reset
        server = DeviceServer(device, self._virtio, make, fail, after_reset, inflight, self._counted)
        self._device, self._inflight, self._server = device, inflight, server
        self._here.push_async_callback(asyncio.to_thread, server.stop)
        return server

    async def _adopt(self) -> None:
        """Raises UserError with the disk as it was."""
        device = await self._open_node()
        self._here.callback(self._after, device.close, "closed")
        reached("taken")
        self._prepare(device)
        await self._go_on()
        reached("adopted")
        assert self._disk is not None
        kernel.add_link(self.name, self._disk)
        reached("linked")

    def _prepare(self, device: Device) -> None:
        """What can be done before the queues run. Raises UserError."""
        disk = kernel.find_disk(device.name)
        if disk is None or self.options.directory is None:
            raise self._vanished()
        control = Control.open()
        self._there.callback(control.close)
        self._there.callback(self._destroy, control, device.name)
        if device.is_broken():
            raise UserError(kernel.given_up(device.name), exit_code=1)
        refusal = self._virtio.refusal(device.features())
        if refusal is not None:
            raise UserError(f"disk '{self.name}' cannot be taken over: {refusal}", exit_code=1)
        self._disk, self._device = disk, device
        self._inflight = open_inflight(self.options.directory, device)
        self._here.callback(self._inflight.close)

    def _left_device(self) -> str:
        device = names.device_of(self.name)
        if device is None:
            raise self._vanished()
        return device

    def _vanished(self) -> UserError:
        return UserError(f"disk '{self.name}' vanished while it was taken over", exit_code=1)

    async def _go_on(self, *, on_trial: bool = False) -> None:
        """Serve a device that another server, or this one before, has served."""
        assert self._device is not None
        assert self._disk is not None
        server = self._serve(self._device, self._inflight)
        server.start(adopt=True, on_trial=on_trial)
        await asyncio.to_thread(server.wait_until_taken_over)
        if on_trial and server.broken is not None:
            raise UserError(server.broken, exit_code=1)
        if self.info.size > kernel.disk_size(self._disk):
            server.resize(self._virtio.config()[:8])

    async def _open_node(self) -> Device:
        """A dead server's threads that hang in the kernel keep it open, perhaps only for a moment."""
        deadline = time.monotonic() + self.options.timeout
        while True:
            try:
                return Device.open(self._left_device())
            except VduseError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(0.05)

    def _create(self, control: Control, name: str) -> Device:
        options = self.options
        try:
            control.create(
                DeviceConfig(
                    name=name,
                    device_id=_DEVICE_ID_BLOCK,
                    features=self._virtio.offered,
                    config=self._virtio.config(),
                    vq_num=self.queue_count,
                )
            )
        except VduseError as error:
            if error.errno == errno.EEXIST:
                raise UserError(
                    f"name: a VDUSE device '{name}' exists already; choose another name or "
                    f"`vduse-blk detach {self.name}` first",
                    exit_code=4,
                ) from error
            raise
        self._there.callback(self._destroy, control, name)
        reached("created")
        # Open from now on: the node is exclusive, and nobody can take the device for a dead server's.
        device = Device.open(name)
        self._here.callback(self._after, device.close, "closed")
        for index in range(self.queue_count):
            device.vq_setup(index, options.queue_size)
        set_bounce_size(device, bounce_size(self.queue_count, options.queue_size))
        device.msg_timeout = _MSG_TIMEOUT
        reached("configured")
        return device

    async def _wait_for_disk(self, device: str) -> str:
        """DEV_NEW said yes; only the disk itself proves it."""
        server = self._server
        assert server is not None
        deadline = time.monotonic() + self.options.timeout
        while True:
            disk = kernel.find_disk(device)
            # Opening waits for storage that this loop may have to serve.
            if disk is not None and await asyncio.to_thread(kernel.is_usable, disk, self.stack.info.size):
                return disk
            problem = server.refusal or server.broken or server.trouble
            if problem is None and time.monotonic() > deadline:
                problem = kernel.why_no_disk(device) if disk is None else f"/dev/{disk} cannot be used"
            if problem is not None:
                raise UserError(f"no disk appeared for '{self.name}': {problem}", exit_code=1)
            await asyncio.sleep(0.02)

    def _look_after_reset(self) -> None:
        """Any thread. A driver that is bound anew resets the device, too; one that is gone for good has been deleted."""
        self._loop.call_soon_threadsafe(self._loop.call_later, _RESET_SECONDS, self._look_whether_deleted)

    def _look_whether_deleted(self) -> None:
        assert self._device is not None
        if self._disk is not None and not self._leaving and not kernel.vdpa_device(self._device.name).exists():
            # The kernel may give the same /dev/vdX to the next disk.
            kernel.remove_link(self.name)
            self.fail("somebody else has deleted the vdpa device, and the disk with it; detach it")

    async def _delete(self) -> None:
        """The driver lets go. Raises UserError with everything as it was: the disk is still served."""
        if self._server is None:
            return
        self._leaving = True
        try:
            await self._delete_vdpa_device()
        except BaseException:
            self._leaving = False
            raise

    async def _delete_vdpa_device(self) -> None:
        reached("detaching")
        assert self._device is not None
        device = self._device.name
        if kernel.vdpa_device(device).exists():
            try:
                await kernel.netlink("del", device)
            except UserError:
                if kernel.vdpa_device(device).exists():
                    raise
        kernel.remove_link(self.name)  # the kernel may give the same /dev/vdX to the next disk
        reached("deleted")

    @staticmethod
    def _after(action: Any, step: str) -> None:
        action()
        reached(step)

    @staticmethod
    def _destroy(control: Control, device: str) -> None:
        control.destroy(device)
        reached("destroyed")
        names.sweep(control)
