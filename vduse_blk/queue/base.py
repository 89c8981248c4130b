"""What every queue driver takes, promises and shows."""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from vduse_blk.block.contract import BlockInfo, Support
from vduse_blk.block.policy import Waiting
from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.iova import IovaMap

_OPS = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "other")
"""Names of ``enum vblk_op``, in its order."""

_FAULTS = {
    lib.VRING_FAULT_AVAIL_IDX: "avail.idx runs further ahead than the ring is long",
    lib.VRING_FAULT_HEAD: "a head beyond the ring, or one that is in flight already",
    lib.VRING_FAULT_NEXT: "a descriptor's next field points beyond its table",
    lib.VRING_FAULT_LOOP: "a descriptor chain longer than its table",
    lib.VRING_FAULT_LONG: "a descriptor chain of more buffers than the device accepts",
    lib.VRING_FAULT_ORDER: "a device-readable buffer behind a device-writable one",
    lib.VRING_FAULT_INDIRECT: "an indirect descriptor table that breaks the rules",
    lib.VRING_FAULT_INDIRECT_MAP: "an indirect descriptor table in unmapped memory",
    lib.VRING_FAULT_RING_MAP: "the ring's memory is not mapped, or misaligned",
    lib.VRING_FAULT_MEMORY: "mapped memory vanished (SIGBUS)",
    lib.VRING_FAULT_ENGINE: "io_uring refused to go on",
}


class QueueState(enum.IntEnum):
    """Mirror of ``enum vb_state``."""

    IDLE = lib.VB_IDLE
    RUNNING = lib.VB_RUNNING
    BROKEN = lib.VB_BROKEN
    STOPPED = lib.VB_STOPPED


@dataclass(frozen=True, slots=True)
class QueueSetup:
    """A virtqueue as the transport learnt it. ``num`` entries; addresses are IOVAs; the descriptors stay the caller's.

    ``notify_vduse``: ``notify_fd`` is a VDUSE device (inject an interrupt), otherwise an eventfd.
    ``event_fd``: eventfd the queue signals when it needs control: a miss, a broken ring, a table adopted.
    ``last_avail``: the avail entry to begin with; None: where the used ring stands (everything older is answered).
    ``inflight``: address in this process of the queue's in-flight log (``inflight_log_bytes``), which outlives the queue;
    with one that was used before ``last_avail`` counts for nothing, and requests that it knows are done again.
    ``dirty``: (address in this process, bytes) of the log of pages written; changes of the used ring are marked as if it
    began at IOVA ``dirty_used`` (None: not at all).
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    kick_fd: int
    notify_fd: int
    notify_vduse: bool
    event_fd: int
    event_idx: bool
    indirect: bool
    seg_max: int
    last_avail: int | None = 0
    inflight: int = 0
    dirty: tuple[int, int] | None = None
    dirty_used: int | None = None


def inflight_log_bytes(num: int) -> int:
    """Bytes of the crash log of a queue of ``num`` entries."""
    return int(lib.INFLIGHT_HEADER_BYTES + num * lib.INFLIGHT_DESC_BYTES)


@dataclass(frozen=True, slots=True)
class QueueView:
    """A queue's condition at one moment. ``missing`` is the IOVA range (start, last) it waits for; ``replayed`` is how many
    requests of a dead server it took over."""

    state: QueueState
    fault: str | None
    missing: tuple[int, int] | None
    table_generation: int
    error: int
    replayed: int = 0
    waiting: Waiting | None = None
    """Requests that storage has failed, and that will be tried again."""
    pinned: int = 0
    """Bytes of the driver's memory whose pages the kernel holds for it."""
    pin_error: int = 0
    """errno why that is not all that may be held (``IOVA_PINNED``); 0: it is, or the queue has no use for it."""
    memory_lost: bool = False
    """It stopped because mapped memory vanished: the ring itself is sound."""


class DiskRules:
    """What requests a disk accepts: the C side's ``struct vblk_rules``, shared by all its queues."""

    def __init__(
        self, info: BlockInfo, *, max_discard: int, max_write_zeroes: int, max_ranges: int
    ) -> None:
        """``max_discard``, ``max_write_zeroes``: bytes per range; ``max_ranges``: ranges per request."""
        self.c: Any = ffi.new("struct vblk_rules *")
        self.c.capacity = info.size
        self.c.block_size = info.logical_block_size
        self.c.read_only = info.read_only
        self.c.discard = info.discard is not Support.NONE
        self.c.write_zeroes = info.write_zeroes is not Support.NONE
        self.c.max_discard_sectors = max_discard // lib.VBLK_SECTOR
        self.c.max_write_zeroes_sectors = max_write_zeroes // lib.VBLK_SECTOR
        self.c.max_ranges = max_ranges
        serial = info.serial.encode("ascii", "replace")[: lib.VBLK_SERIAL_SIZE]
        ffi.memmove(self.c.serial, serial, len(serial))

    def set_capacity(self, size: int) -> None:
        """Bytes; seen by every request popped afterwards. Any thread."""
        lib.vblk_set_capacity(self.c, size)

    def set_writethrough(self, on: bool) -> None:
        """Whether writes must be durable when they are answered; for every request popped afterwards. Any thread."""
        lib.vblk_set_writethrough(self.c, int(on))


class Queue(Protocol):
    """Start, stop, look. All calls come from the control thread of the device unless they say otherwise."""

    index: int

    def start(self, setup: QueueSetup, iova: IovaMap) -> None:
        """Serve the virtqueue. Raises OSError if the engine cannot start."""

    def stop(self) -> int:
        """Pop nothing more; returns, when nothing is in flight and no memory of the driver is touched any more, the next
        avail index."""

    def set_table(self, table: Any) -> None:
        """A new IOVA table is published."""

    def answer_miss(self) -> None:
        """The view's ``missing`` range has been looked up, and what was found is published. If it is still not there, the
        request that needs it fails."""

    def hold(self, on: bool) -> None:
        """Pop nothing new until it is let go again (``on`` False); what is in flight goes on, however long that takes. Any
        thread."""

    def is_quiet(self) -> bool:
        """It is held and has nothing in flight, or does not run. Any thread."""

    def is_running(self) -> bool:
        """Between start and stop. Any thread."""

    def view(self) -> QueueView:
        """Any thread."""

    def counters(self) -> dict[str, int]:
        """Any thread. Keys: see docs; all are totals since start but ``inflight``."""


class CoreQueue:
    """The part both drivers share: the C queue object's life and what can be read off it."""

    def __init__(self, index: int, rules: DiskRules) -> None:
        self.index = index
        self._rules = rules
        self._c: Any = None
        self._iova: IovaMap | None = None
        self._running = False
        self._lock = threading.Lock()  # other threads look (view, counters) while control frees
        self._last_counters: dict[str, int] = {}

    def _create(self, setup: QueueSetup, iova: IovaMap, policy: Any = ffi.NULL) -> None:
        config = ffi.new("struct vb_queue_config *")
        config.index, config.num = setup.index, setup.num
        config.desc_iova, config.avail_iova, config.used_iova = setup.desc, setup.avail, setup.used
        config.last_avail = lib.VB_RESUME if setup.last_avail is None else setup.last_avail
        config.event_idx, config.indirect = setup.event_idx, setup.indirect
        config.seg_max = setup.seg_max
        config.kick_fd, config.notify_fd, config.event_fd = setup.kick_fd, setup.notify_fd, setup.event_fd
        config.notify_kind = lib.VB_NOTIFY_VDUSE if setup.notify_vduse else lib.VB_NOTIFY_EVENTFD
        config.policy = policy
        config.inflight = ffi.cast("void *", setup.inflight)
        if setup.dirty is not None:
            config.dirty, config.dirty_bytes = ffi.cast("uint8_t *", setup.dirty[0]), setup.dirty[1]
        if setup.dirty_used is not None:
            config.dirty_used, config.log_used = setup.dirty_used, 1
        error = ffi.new("int *")
        created = lib.vb_queue_new(config, self._rules.c, iova.table, error)
        if not created:
            raise OSError(error[0], f"queue {setup.index} of {setup.num} entries cannot be set up")
        self._c = created
        self._iova = iova

    def _destroy(self) -> int:
        """Free the C queue; returns its next avail index. Counters stay readable."""
        view = ffi.new("struct vb_view *")
        with self._lock:
            lib.vb_queue_view(self._c, view)
            self._last_counters = self._read_counters()
            lib.vb_queue_free(self._c)
            self._c = self._iova = None
        return int(view.last_avail)

    def is_running(self) -> bool:
        return self._running

    def set_table(self, table: Any) -> None:
        lib.vb_queue_set_table(self._c, table)

    def answer_miss(self) -> None:
        lib.vb_queue_answer_miss(self._c)

    def wake(self) -> None:
        """Look again at what others have changed. Any thread."""
        with self._lock:
            if self._c is not None:
                lib.vb_queue_wake(self._c)

    def hold(self, on: bool) -> None:
        with self._lock:
            if self._c is not None:
                lib.vb_queue_hold(self._c, on)

    def is_quiet(self) -> bool:
        with self._lock:
            return self._c is None or bool(lib.vb_queue_is_quiet(self._c))

    def view(self) -> QueueView:
        view = ffi.new("struct vb_view *")
        with self._lock:
            if self._c is None:
                return QueueView(QueueState.STOPPED, None, None, 0, 0)
            lib.vb_queue_view(self._c, view)
        return QueueView(
            state=QueueState(view.state),
            fault=_FAULTS.get(view.fault),
            missing=(view.miss_start, view.miss_last) if view.missing else None,
            table_generation=view.table_generation,
            error=view.error,
            replayed=view.replayed,
            waiting=Waiting(view.waiting, view.wait_since / 1e9, view.wait_error) if view.waiting else None,
            pinned=view.pinned,
            pin_error=view.pin_error,
            memory_lost=view.fault == lib.VRING_FAULT_MEMORY,
        )

    def counters(self) -> dict[str, int]:
        with self._lock:
            return self._read_counters() if self._c is not None else dict(self._last_counters)

    def _read_counters(self) -> dict[str, int]:
        c = lib.vb_queue_counters(self._c)
        result: dict[str, int] = {}
        for i, op in enumerate(_OPS):
            result[f"{op}_ops"] = c.ops[i]
            result[f"{op}_errors"] = c.errors[i]
        for op in ("read", "write", "discard", "write_zeroes"):
            result[f"{op}_bytes"] = c.bytes[_OPS.index(op)]
        for name in ("unsupported", "retries", "malformed", "wakeups", "spin_hits", "submits"):
            result[name] = getattr(c, name)
        for name in ("publishes", "notifies", "misses", "inflight"):
            result[name] = getattr(c, name)
        return result
