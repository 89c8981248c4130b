"""One front-end: what it has told us, and the queues that follow from it.

The front-end tells things in any order and changes them under running queues: memory may come after the queues that use
it, kick and call descriptors are replaced at any time. So no message starts a queue. Messages change the wishes
(``_Vring``), and ``_settle`` makes the queue what the wishes say:

    runs   when it has a kick descriptor, a size, addresses in known memory, and is enabled
    stops  otherwise; ``base`` then holds the next avail entry
    starts again, at the entry where it stopped, when what it was started with has changed

Rules kept here:
  * Received descriptors are files which the front-end shares. Their flags are never changed, they are never read, each is
    closed exactly once.
  * The call descriptor changes most often (a guest that masks an interrupt is enough), so that needs no restart: the queue
    has a descriptor of its own, ``notify``, and dup2 puts the new file behind it, in one step, whoever writes just then.
  * Stopping a ring drops its kick descriptor: the specification restarts it with a new one.
  * What was received with descriptors is kept with descriptors: another server can be given the whole session (``give``,
    ``take``) while the front-end notices nothing but a pause.
  * A reset of the device keeps memory, protocol features and the owner: QEMU does not send them again.

Owner: the thread of ``server``; ``describe`` and ``counters`` may be called by others.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from dataclasses import dataclass, field
from typing import Any

from vduse_blk.exporters.vhost_user import messages
from vduse_blk.exporters.vhost_user.eventfd import is_eventfd, kept_writable, wake
from vduse_blk.exporters.vhost_user.inflight import InflightArea, area_bytes, create_area
from vduse_blk.exporters.vhost_user.log import FrontendLog
from vduse_blk.exporters.vhost_user.memory import MAX_MEM_SLOTS, FrontendMemory
from vduse_blk.exporters.vhost_user.messages import MemoryRegion, ProtocolError, ProtocolFeature, Refused, Request

from vduse_blk.exporter import HandOver, add_counters
from vduse_blk.queue import Queue, QueueFactory, QueueSetup, QueueState, SharedArea
from vduse_blk.virtio import CONFIG_WCE_OFFSET, Feature, VirtioBlkDevice, feature_names

_RING_MAX = 32768
_ADDRESS = ("flags", "desc", "used", "avail", "log")
"""What a ``VringAddr`` says of a queue."""


@dataclass(slots=True)
class Reply:
    """Bytes to send, and a descriptor to send with them and then to close."""

    data: bytes
    fd: int | None = None


@dataclass(slots=True)
class _Vring:
    """The wishes of the front-end for one queue. Descriptors are ours to close."""

    index: int
    notify: int
    num: int = 0
    base: int = 0
    addr: messages.VringAddr | None = None
    enabled: bool = False
    kick: int | None = None
    err: int | None = None
    queue: Queue | None = None
    setup: QueueSetup | None = None
    """With which ``queue`` runs."""
    reported: str | None = None


@dataclass(slots=True)
class Totals:
    """Counters of queues that are gone, by index. They outlive sessions. Under ``lock`` a queue is either here or runs."""

    past: dict[int, dict[str, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Session:
    """``event_fd`` is the eventfd queues signal when they need ``look_at_queues``."""

    def __init__(
        self, log: FrontendLog, virtio: VirtioBlkDevice, factory: QueueFactory, event_fd: int, totals: Totals
    ) -> None:
        self._log = log
        self._virtio = virtio
        self._factory = factory
        self._event_fd = event_fd
        self._totals = totals
        self._memory = FrontendMemory()
        self._vrings = [
            _Vring(index, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for index in range(virtio.num_queues)
        ]
        self._features = 0
        self._protocol = 0
        self._status = 0
        self._backend: socket.socket | None = None
        self._inflight: InflightArea | None = None
        self._dirty: SharedArea | None = None
        self._strict = False
        self._areas: dict[str, tuple[int, dict[str, int]]] = {}
        """Of ``_inflight`` and ``_dirty``: a descriptor, and what was said of them."""

    # ------------------------------------------------------------------------------------------ what it is told

    @property
    def features(self) -> int:
        """Feature bits that are offered: the device's, and vhost-user's own."""
        return self._virtio.offered | 1 << messages.PROTOCOL_FEATURES | 1 << messages.LOG_ALL

    @property
    def protocol_features(self) -> int:
        """Protocol feature bits that are offered."""
        return sum(feature.mask for feature in ProtocolFeature)

    @property
    def negotiated(self) -> int:
        """The device's features that the driver took."""
        return self._features & self._virtio.offered

    def handle(self, message: messages.Message, fds: list[int]) -> Reply | None:
        """Obey. What is kept of ``fds`` is taken out of the list; the rest is the caller's to close.

        Raises Refused, ProtocolError.
        """
        reply = self._handle(message, fds)
        if reply is None and message.need_reply and self._protocol & ProtocolFeature.REPLY_ACK.mask:
            return Reply(messages.number_reply(message.request, 0))
        return reply

    def refusal(self, message: messages.Message) -> Reply | None:
        """How to say no to ``message``; None: it cannot be said."""
        if not message.need_reply or not self._protocol & ProtocolFeature.REPLY_ACK.mask:
            return None
        return Reply(messages.number_reply(message.request, 1))

    def _handle(self, message: messages.Message, fds: list[int]) -> Reply | None:
        match message:
            case messages.MemTable():
                self._memory.replace(list(zip(message.regions, fds, strict=True)))
                self._settle_all()
            case messages.MemReg() if message.request is Request.ADD_MEM_REG:
                self._memory.add(message.region, fds[0])
                self._settle_all()
            case messages.MemReg():
                self._memory.remove(message.region)
                self._settle_all()
            case messages.VringState():
                return self._vring_state(message)
            case messages.VringAddr():
                vring = self._vring(message.index)
                vring.addr = message
                self._settle(vring)
            case messages.VringFd():
                self._vring_fd(message, fds)
            case messages.Config() if message.request is Request.GET_CONFIG:
                return self._get_config(message)
            case messages.Config():
                self._set_config(message)
            case messages.Inflight() if message.request is Request.GET_INFLIGHT_FD:
                return self._get_inflight(message)
            case messages.Inflight():
                self._set_inflight(message, fds)
            case messages.Log():
                return self._set_log(message, fds)
            case messages.Number():
                self._set_number(message.request, message.value)
            case _:
                return self._plain(message.request, fds)
        return None

    def _set_number(self, request: Request, value: int) -> None:
        match request:
            case Request.SET_FEATURES:
                unknown = value & ~self.features
                if unknown:
                    raise Refused(f"features that were not offered: {', '.join(feature_names(unknown))}")
                self._features = value
                self._set_cache_mode()
                self._settle_all()
            case Request.SET_PROTOCOL_FEATURES:
                unknown = value & ~self.protocol_features
                if unknown:
                    raise Refused(f"protocol features that were not offered: {unknown:#x}")
                self._protocol = value
            case Request.SET_STATUS:
                self._status = value & 0xFF
                if self._status == 0:
                    self._disable_all()

    def _plain(self, request: Request, fds: list[int]) -> Reply | None:
        match request:
            case Request.GET_FEATURES:
                return Reply(messages.number_reply(request, self.features))
            case Request.GET_PROTOCOL_FEATURES:
                return Reply(messages.number_reply(request, self.protocol_features))
            case Request.GET_QUEUE_NUM:
                return Reply(messages.number_reply(request, self._virtio.num_queues))
            case Request.GET_MAX_MEM_SLOTS:
                return Reply(messages.number_reply(request, MAX_MEM_SLOTS))
            case Request.GET_STATUS:
                return Reply(messages.number_reply(request, self._status))
            case Request.SET_OWNER:
                pass  # whoever has the connection is the owner
            case Request.RESET_OWNER:
                self._disable_all()
            case Request.RESET_DEVICE:
                self._reset_device()
            case Request.SET_BACKEND_REQ_FD:
                self._set_backend(fds)
            case Request.SET_LOG_FD:
                pass  # an eventfd for every page marked: front-ends look at the log when they want to know
            case _:
                raise Refused("not supported")
        return None

    # ------------------------------------------------------------------------------------------------- queues

    def _vring(self, index: int) -> _Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"queue {index} of {len(self._vrings)}")
        return self._vrings[index]

    def _vring_state(self, message: messages.VringState) -> Reply | None:
        vring = self._vring(message.index)
        num = message.num
        match message.request:
            case Request.SET_VRING_NUM:
                if not 2 <= num <= _RING_MAX or num & (num - 1):
                    raise Refused(f"a queue of {num} entries; accepted are powers of two from 2 to {_RING_MAX}")
                vring.num = num
                self._settle(vring)
            case Request.SET_VRING_BASE:
                if num > 0xFFFF:
                    raise Refused(f"avail index {num:#x}")
                if vring.queue is None:  # the index of a running queue is the queue's
                    vring.base = num
            case Request.SET_VRING_ENABLE:
                vring.enabled = num != 0
                self._settle(vring)
            case Request.GET_VRING_BASE:
                self._stop(vring)
                self._drop_kick(vring)
                return Reply(messages.vring_base_reply(vring.index, vring.base))
        return None

    def _vring_fd(self, message: messages.VringFd, fds: list[int]) -> None:
        vring = self._vring(message.index)
        if fds and not is_eventfd(fds[0]):
            raise Refused(f"queue {vring.index}: {message.request.name} with something that is no eventfd")
        match message.request:
            case Request.SET_VRING_KICK:
                self._stop(vring)
                self._drop_kick(vring)
                if message.has_fd:
                    vring.kick = fds.pop()
                else:
                    self._log.warning("queue %d has no kick descriptor and is not served", vring.index)
                self._settle(vring)
            case Request.SET_VRING_CALL:
                self._set_call(vring, fds)
            case Request.SET_VRING_ERR:
                if vring.err is not None:
                    os.close(vring.err)
                vring.err = fds.pop() if message.has_fd else None

    def _set_call(self, vring: _Vring, fds: list[int]) -> None:
        """Put another file behind the queue's descriptor. Who polls instead gets an eventfd nobody reads."""
        if fds:
            os.dup2(fds[0], vring.notify, inheritable=False)
            wake(vring.notify)  # what was signalled to the old one may have been lost with it
            return
        nobody = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        os.dup2(nobody, vring.notify, inheritable=False)
        os.close(nobody)

    def _settle(self, vring: _Vring) -> None:
        """Make the queue what the wishes say."""
        wanted = self._wanted(vring)
        if vring.queue is not None and wanted != vring.setup:
            self._stop(vring)
            wanted = self._wanted(vring)  # from where it has stopped
        if vring.queue is None and wanted is not None:
            self._start(vring, wanted)

    def _settle_all(self) -> None:
        for vring in self._vrings:
            self._settle(vring)

    def _wanted(self, vring: _Vring) -> QueueSetup | None:
        """What the queue must run with; None: it must not run."""
        enabled = vring.enabled or not self._features >> messages.PROTOCOL_FEATURES & 1
        if vring.kick is None or not enabled or vring.num == 0 or vring.addr is None:
            return None
        desc = self._memory.guest_address(vring.addr.desc)
        avail = self._memory.guest_address(vring.addr.avail)
        used = self._memory.guest_address(vring.addr.used)
        if desc is None or avail is None or used is None:
            return None
        return QueueSetup(
            index=vring.index,
            num=vring.num,
            desc=desc,
            avail=avail,
            used=used,
            last_avail=vring.setup.last_avail if vring.setup is not None else vring.base,
            kick_fd=vring.kick,
            notify_fd=vring.notify,
            notify_vduse=False,
            event_fd=self._event_fd,
            event_idx=bool(self._features & Feature.EVENT_IDX.mask),
            indirect=bool(self._features & Feature.INDIRECT_DESC.mask),
            seg_max=self._virtio.limits.seg_max,
            inflight=0 if self._inflight is None else self._inflight.address(vring.index, vring.num),
            dirty=self._dirty_log(),
            dirty_used=vring.addr.log if vring.addr.flags & messages.VRING_LOG else None,
        )

    def _start(self, vring: _Vring, setup: QueueSetup) -> None:
        queue = self._factory.make(vring.index, False)
        try:
            queue.start(setup, self._memory.iova)
        except OSError as error:
            if self._strict:
                raise
            self._log.error("queue %d cannot serve the storage (%s); its requests fail", vring.index, error)
            queue = self._factory.make(vring.index, True)
            queue.start(setup, self._memory.iova)
        vring.queue, vring.setup, vring.reported = queue, setup, None
        wake(vring.notify)  # a predecessor may have published and died before it could say so

    def _stop(self, vring: _Vring) -> None:
        queue = vring.queue
        if queue is None:
            return
        with kept_writable(vring.notify):
            vring.base = queue.stop()
        with self._totals.lock:
            add_counters(self._totals.past.setdefault(vring.index, {}), queue.counters())
            vring.queue = vring.setup = None

    @staticmethod
    def _drop_kick(vring: _Vring) -> None:
        if vring.kick is not None:
            os.close(vring.kick)
            vring.kick = None

    def _disable_all(self) -> None:
        for vring in self._vrings:
            self._stop(vring)
            self._drop_kick(vring)
            vring.enabled = False

    def _reset_device(self) -> None:
        self._disable_all()
        for vring in self._vrings:
            vring.num = vring.base = 0
            vring.addr = None
        self._features = self._status = 0

    def look_at_queues(self, *, memory_may_come: bool) -> bool:
        """Answer what queues have asked. ``memory_may_come``: leave the question of missing memory open. Returns whether one
        is open."""
        waiting = False
        for vring in self._vrings:
            if vring.queue is None:
                continue
            view = vring.queue.view()
            if view.missing is not None:
                if memory_may_come:
                    waiting = True
                else:
                    vring.queue.answer_miss()
            if view.state is QueueState.BROKEN:
                self._report(vring, f"queue {vring.index} stopped: {view.fault}")
            elif view.error:
                self._report(vring, f"queue {vring.index}: {os.strerror(view.error)}")
        return waiting

    def _report(self, vring: _Vring, sentence: str) -> None:
        if vring.reported != sentence:
            vring.reported = sentence
            self._log.error("%s", sentence)
            if vring.err is not None:
                wake(vring.err)

    # -------------------------------------------------------------------------------------------------- config

    def _get_config(self, message: messages.Config) -> Reply:
        space = self._virtio.config().ljust(messages.CONFIG_MAX, b"\0")
        data = space[message.offset : message.offset + len(message.data)]
        return Reply(messages.config_reply(message.offset, message.flags, data))

    def _set_config(self, message: messages.Config) -> None:
        """The driver may write one byte, and a front-end that has migrated gives us the same one back."""
        is_wce = (message.offset, len(message.data)) == (CONFIG_WCE_OFFSET, 1)
        if not is_wce or not self._virtio.offered & Feature.CONFIG_WCE.mask:
            raise Refused(f"{len(message.data)} bytes at {message.offset} of the configuration space are read-only")
        if message.data[0] > 1:
            raise Refused(f"wce: {message.data[0]}; accepted are 0 and 1")
        self._virtio.writeback = message.data[0] == 1
        if self._inflight is not None:
            self._inflight.writeback = self._virtio.writeback
        self._set_cache_mode()

    def _set_cache_mode(self) -> None:
        """Firmware and old drivers know no flush: to them a completed write is durable, so it must be."""
        self._factory.rules.set_writethrough(self._virtio.is_writethrough(self.negotiated))

    # ------------------------------------------------------------------------------------------- pages written

    def _dirty_log(self) -> tuple[int, int] | None:
        """Where queues mark pages, if they are to do so."""
        if self._dirty is None or not self._features >> messages.LOG_ALL & 1:
            return None
        return self._dirty.address(0), self._dirty.size

    def _set_log(self, message: messages.Log, fds: list[int]) -> Reply:
        """Answered always, and when nothing is marked in the old log any more: the front-end then reads it a last time."""
        said = {"offset": message.offset, "size": message.size}
        try:
            area = SharedArea(fds[0], **said)
        except OSError as error:
            raise Refused(f"the log of pages cannot be mapped: {error}") from error
        old, self._dirty = self._dirty, area
        self._keep("dirty", fds.pop(0), said)
        self._settle_all()
        if old is not None:
            old.close()
        return Reply(messages.number_reply(message.request, 0))

    # ----------------------------------------------------------------------------------------- requests in flight

    def _get_inflight(self, message: messages.Inflight) -> Reply:
        """A fresh area, for a driver that starts anew."""
        if not 1 <= message.num_queues <= len(self._vrings) or not 1 <= message.queue_size <= _RING_MAX:
            raise Refused(f"{message.num_queues} queues of {message.queue_size} entries")
        self._virtio.writeback = True
        self._set_cache_mode()
        fd = create_area(message.num_queues, message.queue_size)
        size = area_bytes(message.num_queues, message.queue_size)
        return Reply(messages.inflight_reply(message, size), fd)

    def _set_inflight(self, message: messages.Inflight, fds: list[int]) -> None:
        """The area to use, perhaps with what a dead server has left in it."""
        said = {
            "size": message.mmap_size,
            "offset": message.mmap_offset,
            "num_queues": message.num_queues,
            "queue_size": message.queue_size,
        }
        try:
            area = InflightArea(fds[0], **said)
        except (OSError, ValueError) as error:
            raise Refused(f"the area for requests in flight cannot be used: {error}") from error
        for vring in self._vrings:
            self._stop(vring)
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = area
        self._keep("inflight", fds.pop(0), said)
        self._virtio.writeback = area.writeback
        self._set_cache_mode()
        self._settle_all()

    def _keep(self, name: str, fd: int, said: dict[str, int]) -> None:
        old = self._areas.pop(name, None)
        self._areas[name] = fd, said
        if old is not None:
            os.close(old[0])

    def _set_backend(self, fds: list[int]) -> None:
        if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            raise Refused("the back-end channel is no socket")
        channel = socket.socket(fileno=fds[0])
        fds.pop()
        if self._backend is not None:
            self._backend.close()
        self._backend = channel

    def config_changed(self) -> None:
        """Tell the front-end that the configuration space is another now, if it can be told."""
        wanted = ProtocolFeature.CONFIG.mask | ProtocolFeature.BACKEND_REQ.mask
        if self._backend is None or self._protocol & wanted != wanted:
            self._log.warning("the front-end cannot be told of the new size; it sees it when it asks again")
            return
        try:
            self._backend.send(messages.config_change(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            self._log.warning("the front-end was not told of the new size: %s", error)

    # ------------------------------------------------------------------------------------------------ hand-over

    def rest(self) -> None:
        """Stop the queues; they stand where they have stopped. Any thread, when the owner's has ended."""
        for vring in self._vrings:
            self._stop(vring)

    def resume(self, factory: QueueFactory, *, strict: bool = False) -> None:
        """Serve again what is at rest. Any thread, before the owner's begins. ``strict``: raises OSError if a queue cannot
        be served from the storage; otherwise its requests fail."""
        self._factory, self._strict = factory, strict
        try:
            self._set_cache_mode()
            self._settle_all()
        finally:
            self._strict = False

    @property
    def has_inflight(self) -> bool:
        """Whether it is known what another server of this session had in flight."""
        return self._inflight is not None

    def give(self) -> HandOver:
        """All there is to know of a session at rest."""
        fds: list[int] = []

        def put(fd: int | None) -> int | None:
            if fd is not None:
                fds.append(fd)
            return None if fd is None else len(fds) - 1

        facts: dict[str, Any] = {
            "features": self._features,
            "protocol_features": self._protocol,
            "status": self._status,
            "writeback": self._virtio.writeback,
            "backend_fd": put(None if self._backend is None else self._backend.fileno()),
            "memory": [
                {"guest": region.guest, "size": region.size, "user": region.user, "offset": region.offset, "fd": put(fd)}
                for region, fd in self._memory.regions()
            ],
            "queues": [
                {
                    "index": vring.index,
                    "num": vring.num,
                    "base": vring.base,
                    "enabled": vring.enabled,
                    "address": None if vring.addr is None else {key: getattr(vring.addr, key) for key in _ADDRESS},
                    "kick_fd": put(vring.kick),
                    "call_fd": put(vring.notify),
                    "error_fd": put(vring.err),
                }
                for vring in self._vrings
            ],
        }
        for name, (fd, said) in self._areas.items():
            facts[name] = said | {"fd": put(fd)}
        return HandOver(facts, fds)

    def take(self, handed: HandOver) -> None:
        """Become the session that another server has given: at rest, in a session that is new. Raises Refused, KeyError,
        OSError and ValueError. Copies what it keeps of the descriptors."""
        facts, fds = handed.facts, handed.fds
        unknown = facts["features"] & ~self.features or facts["protocol_features"] & ~self.protocol_features
        if unknown:
            raise Refused(f"the front-end uses features {unknown:#x}, which this version does not offer")
        for name, kind in (("inflight", InflightArea), ("dirty", SharedArea)):
            if name in facts:
                said = {key: value for key, value in facts[name].items() if key != "fd"}
                fd = fds[facts[name]["fd"]]
                setattr(self, f"_{name}", kind(fd, **said))
                self._keep(name, os.dup(fd), said)
        if facts["backend_fd"] is not None:
            self._backend = socket.socket(fileno=os.dup(fds[facts["backend_fd"]]))
        regions = [(MemoryRegion(m["guest"], m["size"], m["user"], m["offset"]), fds[m["fd"]]) for m in facts["memory"]]
        self._memory.replace(regions)
        self._features, self._protocol, self._status = facts["features"], facts["protocol_features"], facts["status"]
        self._virtio.writeback = facts["writeback"]
        for queue in facts["queues"]:
            vring = self._vring(queue["index"])
            vring.num, vring.base, vring.enabled = queue["num"], queue["base"], queue["enabled"]
            if queue["address"] is not None:
                vring.addr = messages.VringAddr(Request.SET_VRING_ADDR, False, index=vring.index, **queue["address"])
            os.dup2(fds[queue["call_fd"]], vring.notify, inheritable=False)
            vring.kick, vring.err = (
                None if queue[key] is None else os.dup(fds[queue[key]]) for key in ("kick_fd", "error_fd")
            )

    # ---------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Stop the queues, unmap, close every descriptor."""
        for vring in self._vrings:
            self._stop(vring)
            self._drop_kick(vring)
            os.close(vring.notify)
            if vring.err is not None:
                os.close(vring.err)
        self._memory.close()
        for fd, _ in self._areas.values():
            os.close(fd)
        self._areas.clear()
        if self._inflight is not None:
            self._inflight.close()
        if self._dirty is not None:
            self._dirty.close()
        if self._backend is not None:
            self._backend.close()

    # ----------------------------------------------------------------------------------------------- any thread

    def running(self) -> list[Queue]:
        """Queues that run."""
        return [vring.queue for vring in self._vrings if vring.queue is not None]

    def queue_states(self) -> list[dict[str, Any]]:
        """For ``info``: index, size and state of every queue the front-end may use; how many requests it took over."""
        states = []
        for vring in self._vrings:
            queue = vring.queue
            view = None if queue is None else queue.view()
            states.append(
                {
                    "index": vring.index,
                    "size": vring.num,
                    "ready": view is not None,
                    "state": "unused" if view is None else view.state.name.lower(),
                    "replayed": 0 if view is None else view.replayed,
                }
            )
        return states


