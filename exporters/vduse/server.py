"""The thread that answers the kernel for one VDUSE device.

It reads control messages, maps what the queues need, starts and stops them, and does nothing else: a message left
unanswered for ``msg_timeout`` seconds makes the device unusable for good, and while one waits the kernel holds all
generic netlink of the host. So nothing here sends netlink, and nothing here waits for storage except at a reset,
which the kernel sends only after the last request has been answered.

Owner of: the device's descriptor, IovaMap, event descriptor and kick descriptors. Other threads use ``start``,
``stop``, ``resize`` and ``status``.

Rules kept here, each learnt from the kernel's drivers/vdpa/vdpa_user/vduse_dev.c and drivers/virtio/virtio_vdpa.c:
  * DRIVER_OK is never refused: the driver does not look at the answer and its partition scan would wait for ever. A queue
    that cannot serve the storage is started without storage and fails every request instead; one whose memory cannot
    be had just now (no descriptors, no memory) is tried again every second.
  * FEATURES_OK is the one place to refuse.
  * A reset drops kick descriptors and frees the rings after our reply: queues stop and every mapping goes first.
  * Messages are redelivered with the same id to the next server, so starting twice must be harmless.
  * The bounce area appears with the first request: a queue's miss is looked up then. It is put into memory of ours if the
    kernel lets us (``umem``), else the kernel's pages are mapped.
  * The device node is read without blocking; POLLERR means the kernel has given the device up.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import select
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from vduse_blk.exporters.vduse import kernel
from vduse_blk.exporters.vduse.umem import BounceMemory

from pyvduse.device import Device
from pyvduse.errors import VduseError
from pyvduse.messages import (
    GetVqState,
    SetStatus,
    Status,
    UpdateIotlb,
    decode_request,
    encode_response,
)
from vduse_blk.exporter import add_counters
from vduse_blk.queue import InflightLog, IovaMap, Queue, QueueSetup, QueueState, Region
from vduse_blk.virtio import Feature, VirtioBlkDevice, feature_names

log = logging.getLogger("vduse_blk.disk")

INFLIGHT_FILE = "inflight"
"""In the disk's directory: what a successor needs to know. Made by a server, read by whoever takes over or cleans up."""
_RETRY_MS = 1000

MakeQueue = Callable[[int, bool], Queue]
"""(index, failing) → a queue; ``failing``: one that answers every request with an error."""


class DeviceServer:
    """Serve ``device`` as ``virtio``. ``make_queue`` supplies queue drivers. From this thread, ``on_failure`` is called with
    a sentence when the device or a queue is lost, and ``on_reset`` after a driver has let go. ``inflight``: where queues
    note what they have in flight, and where ``start(adopt=True)`` finds what a dead server had; it stays the caller's.
    ``counted``: what ``counters`` begin with."""

    def __init__(
        self,
        device: Device,
        virtio: VirtioBlkDevice,
        make_queue: MakeQueue,
        on_failure: Callable[[str], None],
        on_reset: Callable[[], None] = lambda: None,
        inflight: InflightLog | None = None,
        counted: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        self._device = device
        self._on_reset = on_reset
        self._inflight = inflight
        self._virtio = virtio
        self._make_queue = make_queue
        self._on_failure = on_failure
        self._iova = IovaMap()
        self._bounce: BounceMemory | None = None
        self._bounce_refusal: str | None = None
        self._queues: dict[int, Queue] = {}
        self._setups: dict[int, QueueSetup] = {}
        self._unserved: set[int] = set()
        self._kicks: dict[int, int] = {}
        self._reported: set[tuple[int, str]] = set()
        self._past_counters = {index: dict(past) for index, past in (counted or {}).items()}
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="vduse-messages", daemon=True)
        self._status = 0
        self._started = False
        self._attends = True
        self._on_trial = False
        self._stopped = False
        self._taken_over = threading.Event()
        self.negotiated = 0
        """Driver features, 0 before FEATURES_OK."""
        self.refusal: str | None = None
        """Why FEATURES_OK was refused last."""
        self.broken: str | None = None
        """Why the kernel or a queue gave up, or None."""
        self.trouble: str | None = None
        """Why a queue is not served yet, or None. It is tried again."""
        self.replayed = 0
        """Requests of a dead server that were done again, or failed, by ``start(adopt=True)``."""

    # ------------------------------------------------------------------------------------------- other threads

    def start(self, *, adopt: bool = False, on_trial: bool = False) -> None:
        """Begin to answer. ``adopt``: the device was served before by somebody who died; take over its queues, completing
        what nobody has completed. ``on_trial``: serve a queue from the storage or not at all, and read no message before
        ``attend``; the kernel gives one that was read and not answered to nobody else as long as the old server has the
        device open, too."""
        self._adopt = adopt
        self._attends = not on_trial
        self._on_trial = on_trial
        self._started = True
        self._thread.start()

    def attend(self) -> None:
        """After a start on trial: the device is ours."""
        self._on_trial, self._attends = False, True
        os.eventfd_write(self._event_fd, 1)

    def wait_until_taken_over(self) -> None:
        """After ``start(adopt=True)``: returns once every queue is served or tried again; ``broken`` says what is wrong, on
        trial of any queue that is not served."""
        self._taken_over.wait()

    def stop(self) -> None:
        """Stop answering, stop the queues, unmap. The device stays open; its owner closes it. Harmless if it is stopped."""
        if self._stopped:
            return
        self._stopped = True
        if self._started:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
        os.close(self._event_fd)
        os.close(self._stop_fd)

    def hold(self, on: bool) -> None:
        """Have the queues begin nothing new, or go on."""
        for queue in list(self._queues.values()):
            queue.hold(on)

    def is_quiet(self) -> bool:
        """They are held and have nothing in flight."""
        return all(queue.is_quiet() for queue in list(self._queues.values()))

    def resize(self, config: bytes) -> None:
        """Write ``config`` at offset 0 of the configuration space and tell the driver, if there is one yet."""
        self._device.set_config(0, config)
        try:
            self._device.inject_config_irq()
        except VduseError as error:
            if error.errno != errno.EINVAL:  # EINVAL: no DRIVER_OK yet; the driver will read the new size
                raise

    def counters(self) -> dict[int, dict[str, int]]:
        """Per queue, since the device exists: queues come and go with every reset, their counts stay."""
        result = {index: dict(past) for index, past in list(self._past_counters.items())}
        for index, queue in list(self._queues.items()):
            add_counters(result.setdefault(index, {}), queue.counters())
        return result

    # --------------------------------------------------------------------------------------------- this thread

    def _run(self) -> None:
        poll = select.poll()
        attending = False
        poll.register(self._event_fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        if self._adopt:
            self._adopt_queues()
            self._taken_over.set()
        while True:
            if self._attends and not attending:
                poll.register(self._device.fd, select.POLLIN)
                attending = True
            if self._unserved and not self._on_trial:
                self._start_queues()
            for fd, events in poll.poll(_RETRY_MS if self._unserved else None):
                try:
                    if fd == self._stop_fd:
                        self._reset()
                        self._iova.close()
                        return
                    if fd == self._event_fd:
                        os.eventfd_read(self._event_fd)
                        self._look_at_queues()
                    elif events & select.POLLIN:
                        self._answer()
                    else:
                        # Level-triggered and for ever: leave it, or this loop never sleeps again.
                        poll.unregister(fd)
                        self._fail(kernel.given_up(self._device.name))
                except Exception:
                    log.exception("%s: bug while serving the kernel", self._device.name)

    def _answer(self) -> None:
        raw = self._device.read_message()
        if raw is None:
            return
        request = decode_request(raw)
        ok, vq_state = True, None
        try:
            match request:
                case SetStatus():
                    ok = self._set_status(int(request.status))
                case UpdateIotlb():
                    self._forget(request.start, request.last)
                case GetVqState():
                    vq_state = self._pause(request.index)
                case _:
                    ok = False
        except Exception:
            log.exception("%s: bug while handling %s", self._device.name, request)
            # What was not done is not confirmed; only DRIVER_OK is never refused, see the module's rules.
            ok = isinstance(request, SetStatus) and bool(int(request.status) & Status.DRIVER_OK)
        self._device.write_response(encode_response(request.request_id, ok, vq_state=vq_state))
        if isinstance(request, SetStatus) and int(request.status) & Status.DRIVER_OK:
            self._interrupt_all()

    def _set_status(self, status: int) -> bool:
        log.debug("%s: status %#04x", self._device.name, status)
        if status == 0:
            served = bool(self._status & Status.DRIVER_OK)
            self._reset()
            self._status = 0
            if served:
                self._on_reset()
            return True
        # Not at DRIVER_OK, which a successor may get first: the message of a predecessor that died over it.
        if status & Status.FEATURES_OK and not (status | self._status) & Status.DRIVER_OK:
            driver_features = self._device.features()
            self.refusal = self._virtio.refusal(driver_features)
            if self.refusal is not None:
                log.error("%s: %s", self._device.name, self.refusal)
                return False
            self.negotiated = driver_features
        if status & Status.DRIVER_OK and not self._queues:
            self._find_queues(resume=False)
            self._start_queues()
        self._status = status
        return True

    # --- queues ---

    def _find_queues(self, *, resume: bool) -> None:
        """Which queues the driver uses, and how."""
        self.negotiated = self._device.features()
        for index in range(self._virtio.num_queues):
            info = self._device.vq_info(index)
            if not info.ready:
                continue
            self._unserved.add(index)
            if self._inflight is not None and not resume and index < self._inflight.queues:
                self._inflight.forget(index)
            self._setups[index] = QueueSetup(
                index=index,
                num=info.num,
                desc=info.desc_addr,
                avail=info.driver_addr,
                used=info.device_addr,
                last_avail=None if resume else info.avail_index,
                kick_fd=-1,
                notify_fd=self._device.fd,
                notify_vduse=True,
                event_fd=self._event_fd,
                event_idx=bool(self.negotiated & Feature.EVENT_IDX.mask),
                indirect=bool(self.negotiated & Feature.INDIRECT_DESC.mask),
                seg_max=self._virtio.limits.seg_max,
                inflight=self._inflight.address(index, info.num) if self._inflight is not None else 0,
            )

    def _start_queues(self) -> None:
        """Serve the queues that nobody serves yet."""
        for index in sorted(self._unserved):
            try:
                self._start_queue(index)
            except (OSError, VduseError) as error:
                if self._on_trial:
                    raise
                sentence = f"queue {index} cannot be served yet: {error}"
                if self.trouble is None:
                    log.error("%s: %s", self._device.name, sentence)
                self.trouble = sentence
            else:
                self._unserved.discard(index)
        if not self._unserved and self.trouble is not None:
            log.info("%s: all queues are served", self._device.name)
            self.trouble = None

    def _start_queue(self, index: int) -> None:
        setup = self._setups[index]
        num = setup.num
        for start, length in ((setup.desc, 16 * num), (setup.avail, 6 + 2 * num), (setup.used, 6 + 8 * num)):
            self._resolve(start, start + length - 1)
        if index not in self._kicks:
            self._kicks[index] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        setup = dataclasses.replace(setup, kick_fd=self._kicks[index])
        queue = self._make_queue(index, False)
        try:
            queue.start(setup, self._iova)
        except Exception as error:
            if self._on_trial:
                raise
            self._fail(f"queue {index} cannot serve the storage ({error}); its requests fail")
            queue = self._make_queue(index, True)
            queue.start(setup, self._iova)
        self._queues[index] = queue
        self.replayed += queue.view().replayed
        # Kicks that came before this were latched by the kernel, if nobody served the queue before, and come now ...
        try:
            self._device.set_kickfd(index, self._kicks[index])
        except VduseError:
            self._setups[index] = dataclasses.replace(setup, last_avail=self._stop_queue(index))
            raise
        # ... or went to a dead server's descriptor, which the kernel kept until now: look at the ring once more.
        os.eventfd_write(self._kicks[index], 1)
        # A dead server may have published and died before it could say so.
        self._interrupt(index)
        self._settle_interrupts(index)

    def _settle_interrupts(self, index: int) -> None:
        """One CPU for the queue's interrupts, of those the driver left it: the kernel takes them in turn, and then every
        other completion wakes a CPU that sleeps, and finds cold caches. Spread by name, or all disks would share one."""
        try:
            allowed = self._device.irq_affinity(index)
            cpus = sorted(allowed & os.sched_getaffinity(0)) or sorted(allowed)
            if len(cpus) > 1:
                self._device.set_irq_affinity(index, {cpus[(zlib.crc32(self._device.name.encode()) + index) % len(cpus)]})
        except VduseError as error:
            log.debug("%s: %s", self._device.name, error)  # before 6.4, or sysfs is read-only here: slower, nothing else

    def _serve_without_storage(self, index: int) -> None:
        """A queue that may not touch the storage's data any more: its requests fail, and users and `detach` go on."""
        setup = dataclasses.replace(self._setups[index], last_avail=self._stop_queue(index), kick_fd=self._kicks[index])
        queue = self._make_queue(index, True)
        queue.start(setup, self._iova)
        self._queues[index] = queue

    def _stop_queue(self, index: int) -> int:
        """Returns the next avail index."""
        queue = self._queues.pop(index)
        avail = queue.stop()
        add_counters(self._past_counters.setdefault(index, {}), queue.counters())
        return avail

    def _pause(self, index: int) -> int:
        if index in self._queues:
            return self._stop_queue(index)
        return int(self._device.vq_info(index).avail_index)

    def _reset(self) -> None:
        self._unserved.clear()
        self.trouble = None
        self._setups.clear()
        try:
            for index in list(self._queues):
                self._stop_queue(index)
            for index, fd in self._kicks.items():
                try:
                    self._device.set_kickfd(index, None)
                except VduseError as error:
                    log.debug("%s: %s", self._device.name, error)  # a broken device refuses everything
                os.close(fd)
        finally:
            # Whatever happened: the next driver's rings are elsewhere.
            self._kicks.clear()
            self._forget()
        self.negotiated = 0
        self._reported.clear()

    def _adopt_queues(self) -> None:
        try:
            if self._device.features():
                self._find_queues(resume=True)
                if self._setups:
                    self._status = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
                self._start_queues()
        except Exception as error:
            log.exception("%s: bug while taking over", self._device.name)
            self._fail(f"the queues of another server cannot be taken over: {error}")

    def _interrupt_all(self) -> None:
        """Used entries may have been published before the device could interrupt: one more interrupt costs nothing."""
        for index in self._queues:
            self._interrupt(index)

    def _interrupt(self, index: int) -> None:
        try:
            self._device.inject_irq(index)
        except VduseError as error:
            log.debug("%s: %s", self._device.name, error)  # before DRIVER_OK: see _answer

    # --- memory ---

    def _resolve(self, start: int, last: int) -> None:
        """Map what the kernel has of [start, last] and we do not."""
        at = start
        while at <= last:
            known = self._iova.find(at) or self._own_bounce_area(at, last)
            if known is not None:
                at = known.last + 1
                continue
            region = self._device.iotlb_fd(at, last)
            if region is None:
                break
            try:
                if self._iova.overlaps(region.start, region.last):
                    break
                self._iova.add_fd(
                    region.fd,
                    start=region.start,
                    last=region.last,
                    offset=region.offset,
                    access=int(region.perm),
                )
            finally:
                os.close(region.fd)
            at = region.last + 1

    def _own_bounce_area(self, start: int, last: int) -> Region | None:
        """Where memory of ours was registered as the bounce area, which no queue knew before."""
        try:
            area = self._device.iotlb_info(start, last)
            if area is None or not area.umem or self._iova.overlaps(area.start, area.last):
                return None
            bounce = BounceMemory(self._device, area)
        except OSError as error:
            if self._bounce_refusal is None:
                log.info("%s: the bounce area stays in the kernel's memory: %s", self._device.name, error)
            self._bounce_refusal = str(error)
            return None
        self._bounce, self._bounce_refusal = bounce, None
        return self._iova.add_memory(start=area.start, last=area.last, host=bounce.host, pinned=True)

    def _forget(self, start: int = 0, last: int = 2**64 - 1) -> None:
        """Unmap [start, last]."""
        self._iova.remove(start, last)
        bounce = self._bounce
        if bounce is not None and self._iova.find(bounce.area.start) is None:
            self._bounce = None
            bounce.close()

    def _look_at_queues(self) -> None:
        for index, queue in list(self._queues.items()):
            view = queue.view()
            if view.missing is not None:
                try:
                    self._resolve(*view.missing)
                except OSError as error:
                    self._report(index, f"queue {index}: memory cannot be mapped: {error}")
                queue.answer_miss()
            if view.state is QueueState.BROKEN:
                because = f" ({os.strerror(view.error)})" if view.error else ""
                self._report(index, f"queue {index} stopped: {view.fault}{because}")
                if view.memory_lost:
                    self._serve_without_storage(index)
            elif view.error and view.error != errno.EINVAL:
                self._report(index, f"queue {index}: interrupts fail: {os.strerror(view.error)}")

    def _report(self, index: int, sentence: str) -> None:
        if (index, sentence) not in self._reported:
            self._reported.add((index, sentence))
            self._fail(sentence)

    def _fail(self, sentence: str) -> None:
        self.broken = sentence
        log.error("%s: %s", self._device.name, sentence)
        self._on_failure(sentence)

    def describe(self) -> dict[str, Any]:
        """For ``info``: JSON types only. Any thread."""
        counters = self.counters()
        queues = []
        for index in range(self._virtio.num_queues):
            queue = self._queues.get(index)
            queues.append(
                {
                    "index": index,
                    "size": self._virtio.queue_size,
                    "ready": queue is not None,
                    "state": queue.view().state.name.lower() if queue is not None else "unused",
                    "counters": counters.get(index, {}),
                }
            )
        return {
            "queues": queues,
            "features_offered": feature_names(self._virtio.offered),
            "features_negotiated": feature_names(self.negotiated),
            "bounce": self._describe_bounce(),
            "broken": self.broken or self.trouble,
        }

    def _describe_bounce(self) -> dict[str, Any] | None:
        """Whose memory the bounce area is; None: there is none as yet."""
        bounce, refusal = self._bounce, self._bounce_refusal
        if bounce is not None:
            unheld = next((error for queue in tuple(self._queues.values()) if (error := queue.view().pin_error)), 0)
            found = {"memory": "server", "size": bounce.size}
            return found | ({"not_held": os.strerror(unheld)} if unheld else {})
        return None if refusal is None else {"memory": "kernel", "because": refusal}
