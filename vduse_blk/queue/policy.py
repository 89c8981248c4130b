"""The failure policy of a disk as its C queues read it (core/retry.c)."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from vduse_blk.block.errors import FULL
from vduse_blk.block.patience import Patience
from vduse_blk.block.policy import Waiting
from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.base import CoreQueue

_NANO = 1_000_000_000
_FOR_EVER = (1 << 64) - 1


class NativePolicy:
    """``c`` is the ``struct vb_policy`` that queues share; ``temporary`` are the errors that may pass. Made on the loop."""

    def __init__(self, patience: Patience, temporary: Iterable[int]) -> None:
        self.c: Any = ffi.new("struct vb_policy *")
        for bits, numbers in ((self.c.temporary, temporary), (self.c.full, FULL)):
            for number in numbers:
                bits[number // 64] |= 1 << number % 64
        self._queues: weakref.WeakSet[CoreQueue] = weakref.WeakSet()
        self._lock = threading.Lock()  # control makes queues, the loop changes the policy
        self.c.event_fd = patience.join(self)

    def add(self, queue: CoreQueue) -> None:
        """A queue that is to obey. Any thread."""
        with self._lock:
            self._queues.add(queue)

    def apply(self, on_error: float, on_full: float) -> None:
        lib.vb_policy_set(self.c, _nanoseconds(on_error), _nanoseconds(on_full))
        for queue in self._all():
            queue.wake()

    def waiting(self) -> Waiting | None:
        found = [waiting for queue in self._all() if (waiting := queue.view().waiting) is not None]
        if not found:
            return None
        first = min(found, key=lambda waiting: waiting.since)
        return Waiting(sum(waiting.requests for waiting in found), first.since, first.error)

    def _all(self) -> list[CoreQueue]:
        with self._lock:
            return list(self._queues)


def _nanoseconds(seconds: float) -> int:
    return _FOR_EVER if seconds == math.inf else int(seconds * _NANO)
