"""Disks for the device tests: storage of every kind, served along every path, with a driver in this process.

``Disk`` plays control: it opens the stack on an event loop of its own thread (as a worker has it), owns the ``IovaMap``
and the queue, and answers misses.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vduse_blk import registry
from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.contract import Backend
from vduse_blk.block.native import FileTarget
from vduse_blk.block.stack import Stack
from vduse_blk.block.threads import Threads
from vduse_blk.queue import DiskRules, IovaMap, NativePolicy, NativeQueue, PluginQueue, QueueView
from vduse_blk.queue.base import CoreQueue
from vduse_blk.testing.driver import FakeDriver
from vduse_blk.virtio import VirtioBlkDevice

MIB = 1 << 20
SIZE = 8 * MIB

_T = TypeVar("_T")


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass(frozen=True)
class Kind:
    """A way to serve a kind of storage. ``options`` go to the backend; ``place`` is where a file lies."""

    name: str
    backend: str
    native: bool
    io_mode: str = "auto"
    place: str = ""
    direct: bool = False
    sync: bool = False
    batches: str = ""
    """"no": without batches; "threads": on threads; "": as the backend has it."""
    spin: str = "auto"
    pinned: bool = False
    """The kernel may hold the driver's memory."""

    def __str__(self) -> str:
        return self.name

    @property
    def keeps(self) -> bool:
        """Whether what is written can be read."""
        return self.backend != "null"

    @property
    def is_file(self) -> bool:
        return self.backend == "file"


DISK_FS, MEMORY_FS, BLOCK = "disk", "memory", "block"

KINDS = [
    Kind("native-memory", "memory", True),
    Kind("native-memory-spinning", "memory", True, spin="always"),
    Kind("native-null", "null", True),
    Kind("native-file-uring", "file", True, "uring", DISK_FS),
    Kind("native-file-uring-spinning", "file", True, "uring", DISK_FS, spin="always"),
    Kind("native-file-uring-sleeping", "file", True, "uring", DISK_FS, spin="never"),
    Kind("native-file-uring-coop", "file", True, "uring-coop", DISK_FS),
    Kind("native-file-uring-plain", "file", True, "uring-plain", DISK_FS),
    Kind("native-file-sync", "file", True, "sync", DISK_FS),
    Kind("native-file-sync-spinning", "file", True, "sync", DISK_FS, spin="always"),
    Kind("native-file-direct", "file", True, "uring", DISK_FS, direct=True),
    Kind("native-file-direct-pinned", "file", True, "uring", DISK_FS, direct=True, pinned=True),
    Kind("native-file-direct-sync", "file", True, "sync", DISK_FS, direct=True),
    Kind("native-file-dsync", "file", True, "uring", DISK_FS, sync=True),
    Kind("native-tmpfs", "file", True, "auto", MEMORY_FS),
    Kind("native-tmpfs-uring", "file", True, "uring", MEMORY_FS),
    Kind("native-block", "file", True, "auto", BLOCK, direct=True),
    Kind("native-block-uring", "file", True, "uring", BLOCK),
    Kind("native-block-sync", "file", True, "sync", BLOCK),
    Kind("native-block-direct-sync", "file", True, "sync", BLOCK, direct=True),
    Kind("plugin-memory", "memory", False),
    Kind("plugin-memory-single", "memory", False, batches="no"),
    Kind("plugin-memory-threads", "memory", False, batches="threads"),
    Kind("plugin-null", "null", False),
    Kind("plugin-file", "file", False, "auto", DISK_FS),
    Kind("plugin-file-direct", "file", False, "auto", DISK_FS, direct=True),
    Kind("plugin-tmpfs", "file", False, "auto", MEMORY_FS),
    Kind("plugin-block", "file", False, "auto", BLOCK),
]
BY_NAME = {kind.name: kind for kind in KINDS}


class SingleMemory(MemoryBackend):
    """Every request is a coroutine's."""

    takes_batches = False


class ThreadedMemory(MemoryBackend):
    """As if it blocked."""

    def __init__(self, options: MemoryBackend.Options) -> None:
        super().__init__(options)
        self.batch_threads = Threads("memory", 3)

    async def close(self) -> None:
        assert self.batch_threads is not None
        self.batch_threads.close()
        await super().close()


class LoopDevice:
    """A block device over a file. Skips the test where there are none."""

    def __init__(self, image: Path) -> None:
        if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
            pytest.skip("needs root and loop devices")
        found = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
        if found.returncode != 0:
            pytest.skip(f"needs loop devices: {found.stderr.strip()}")
        self.path = found.stdout.strip()

    def close(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=True)


class Disk:
    """A queue under test. Attributes: ``driver``, ``iova``, ``queue``, ``stack``, ``rules``; ``image`` for files."""

    def __init__(
        self,
        kind: Kind,
        *,
        event_idx: bool = True,
        indirect: bool = True,
        size: int = SIZE,
        num: int = 64,
        memory: int = 16 * MIB,
        backend: Backend | None = None,
        start: bool = True,
        setup: dict[str, Any] | None = None,
        stack: type[Stack] = Stack,
        **stack_options: Any,
    ) -> None:
        """``backend`` replaces the one of ``kind``; ``setup`` changes the QueueSetup."""
        self.kind = kind
        self.size = size
        self.image: Path | None = None
        self._undo: list[Callable[[], object]] = []
        try:
            self.loop = Loop()
            self._undo.append(self.loop.close)
            self.stack = stack(backend or self._backend(), **stack_options)
            info = self.loop.run(self.stack.open())
            self._undo.append(lambda: self.loop.run(self.stack.close()))
            limits = VirtioBlkDevice(info, num_queues=1, queue_size=num, transport=0).limits
            self.rules = DiskRules(
                info,
                max_discard=limits.max_discard,
                max_write_zeroes=limits.max_write_zeroes,
                max_ranges=limits.max_ranges,
            )
            self.policy = self.loop.run(self._native_policy())
            self.driver = FakeDriver(num, event_idx=event_idx, indirect=indirect, memory=memory)
            self._undo.append(self.driver.close)
            self.iova = IovaMap()
            self._undo.append(self.iova.close)
            self.driver.map(self.iova, pinned=kind.pinned)
            self.setup = self.driver.setup(seg_max=limits.seg_max, **(setup or {}))
            self.queue: CoreQueue = self.make_queue()
            if start:
                self.start()
        except BaseException:
            self.close()
            raise

    def _backend(self) -> Backend:
        kind = self.kind
        cls = {"no": SingleMemory, "threads": ThreadedMemory}.get(kind.batches) or registry.backend(kind.backend)
        if not kind.is_file:
            return cls(cls.Options(size=self.size))
        folder = tempfile.mkdtemp(dir="/dev/shm" if kind.place == MEMORY_FS else os.environ.get("TMPDIR", "/var/tmp"))
        self._undo.append(lambda: os.rmdir(folder))
        self.image = Path(folder) / "disk.img"
        self.image.touch()
        self._undo.append(self.image.unlink)
        os.truncate(self.image, self.size)
        path = str(self.image)
        if kind.place == BLOCK:
            device = LoopDevice(self.image)
            self._undo.append(device.close)
            path = device.path
        return cls(cls.Options(path=path, direct=kind.direct, sync=kind.sync))

    def make_queue(self) -> CoreQueue:
        if not self.kind.native:
            return PluginQueue(0, self.rules, self.stack, self.loop.loop)
        target = self.stack.native_target()
        assert target is not None
        return NativeQueue(0, self.rules, target, io_mode=self.kind.io_mode, spin=self.kind.spin, policy=self.policy)

    async def _native_policy(self) -> NativePolicy | None:
        target = self.stack.native_target() if self.kind.native else None
        return NativePolicy(self.stack.patience, target.temporary) if isinstance(target, FileTarget) else None

    def start(self, **changes: Any) -> None:
        """Start the queue, or start it again."""
        if self.queue.is_running():
            raise AssertionError("it runs")
        self.setup = self.driver.setup(seg_max=self.setup.seg_max, **changes) if changes else self.setup
        self.queue = self.make_queue()
        self.queue.start(self.setup, self.iova)

    def close(self) -> None:
        if hasattr(self, "queue") and self.queue.is_running():
            self.queue.stop()
        while self._undo:
            self._undo.pop()()

    # ---- looking past the queue ----

    def content(self, offset: int, length: int) -> bytes:
        """What the storage holds."""
        if self.image is not None and self.kind.place != BLOCK:
            with open(self.image, "rb") as file:
                return os.pread(file.fileno(), length, offset)
        buffer = bytearray(length)

        async def read() -> None:
            await self.stack.read(offset, [memoryview(buffer)])

        self.loop.run(read())
        return bytes(buffer)

    def allocated(self) -> int:
        """Bytes of the file system that the image takes."""
        assert self.image is not None
        with open(self.image, "rb") as file:
            os.fsync(file.fileno())
        return os.stat(self.image).st_blocks * 512

    # ---- control ----

    def until(self, wanted: Callable[[QueueView], bool]) -> QueueView:
        """Sleep on the queue's events until its view is as wanted."""
        deadline = time.monotonic() + 10
        while not wanted(view := self.queue.view()):
            assert time.monotonic() < deadline, view
            if select.select([self.driver.event_fd], [], [], 0.2)[0]:
                os.eventfd_read(self.driver.event_fd)
        return view

    def counters(self) -> dict[str, int]:
        return self.queue.counters()
