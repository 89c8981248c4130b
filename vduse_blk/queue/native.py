"""A virtqueue served by a C thread. Python sleeps while it runs."""

from __future__ import annotations

import os

from vduse_blk.block.native import FileTarget, MemoryTarget, NativeTarget, NullTarget
from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.base import CoreQueue, DiskRules, QueueSetup
from vduse_blk.queue.iova import IovaMap
from vduse_blk.queue.policy import NativePolicy

_IO_MODES = {
    "auto": lib.VB_IO_AUTO,
    "uring": lib.VB_IO_URING,
    "uring-coop": lib.VB_IO_URING_COOP,
    "uring-plain": lib.VB_IO_URING_PLAIN,
    "sync": lib.VB_IO_SYNC,
}
_SPINS = {"auto": lib.VB_SPIN_AUTO, "never": lib.VB_SPIN_NEVER, "always": lib.VB_SPIN_ALWAYS}


class NativeQueue(CoreQueue):
    """``target`` None: every request is answered with an error.

    ``policy`` None: every error is an answer. ``io_mode``: "auto" takes io_uring where it is allowed and pays; the others
    insist, "uring-coop" and "uring-plain" on what older kernels have of it. ``spin``: "auto" looks for work before it sleeps
    where that pays; "never" and "always" insist. Only tests insist.
    """

    def __init__(
        self,
        index: int,
        rules: DiskRules,
        target: NativeTarget | None,
        *,
        io_mode: str = "auto",
        spin: str = "auto",
        policy: NativePolicy | None = None,
    ) -> None:
        super().__init__(index, rules)
        self._policy = policy
        if policy is not None:
            policy.add(self)
        self._target = ffi.new("struct vb_target *")
        self._target.spin = _SPINS[spin]
        match target:
            case FileTarget():
                self._target.kind = lib.VB_TARGET_FILE
                self._target.fd = target.fd
                self._target.is_block_device = target.is_block_device
                self._target.io_mode = _IO_MODES[io_mode]
                if target.lost is not None:
                    self._lost = ffi.from_buffer("uint8_t[]", target.lost)  # keeps the memory
                    self._target.lost = self._lost
            case MemoryTarget():
                self._target.kind = lib.VB_TARGET_MEMORY
                self._target.address, self._target.size = target.address, target.size
            case NullTarget():
                self._target.kind = lib.VB_TARGET_NULL
            case None:
                self._target.kind = lib.VB_TARGET_NONE

    def start(self, setup: QueueSetup, iova: IovaMap) -> None:
        self._create(setup, iova, ffi.NULL if self._policy is None else self._policy.c)
        error = lib.vb_engine_start(self._c, self._target)
        if error < 0:
            self._destroy()
            raise OSError(-error, f"queue {setup.index}: the engine cannot start: {os.strerror(-error)}")
        self._running = True
        iova.attach(self)

    def stop(self) -> int:
        assert self._iova is not None
        lib.vb_engine_stop(self._c)
        self._running = False
        self._iova.detach(self)
        return self._destroy()
