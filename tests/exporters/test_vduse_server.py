"""The VDUSE message thread when things go wrong that no real kernel can be made to do: no descriptors left, odd memory.

The other side speaks the kernel's messages over a socket with packet boundaries; what is an ioctl there is a method here.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vduse_blk.exporters.vduse.server import DeviceServer

from pyvduse._uapi import ffi, lib
from pyvduse.device import Device, IotlbRegion, IovaInfo
from pyvduse.errors import VduseError
from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.native import NullTarget
from vduse_blk.cli import show
from vduse_blk.queue import DiskRules, NativeQueue
from vduse_blk.queue.native import lib as core
from vduse_blk.testing.driver import FLUSH, IN, IOERR, OK, Buffer, FakeDriver
from vduse_blk.virtio import Feature, VirtioBlkDevice

MIB = 1 << 20
REGION = 1 << 24
"""IOVA distance of the queues' memory."""
DEAD = 0xDEAD0000
"""Address of memory that a dead server registered."""
_RESPONSE = struct.Struct("<II")


@dataclass
class Kernel:
    """The kernel's side: sends messages, has the drivers of two queues."""

    virtio: VirtioBlkDevice
    drivers: list[FakeDriver]
    memories: list[int]
    name: str = "x"
    refuse: Callable[[int], OSError | None] = lambda start: None
    kicks: dict[int, int] = field(default_factory=dict)
    affinity: dict[int, set[int]] = field(default_factory=dict)
    """What a driver with several queues sets at every attach; all CPUs of a kernel that knows of it, else nothing."""
    interrupted: set[int] = field(default_factory=set)
    registered: list[tuple[int, int, int]] = field(default_factory=list)
    """(IOVA, size, address) of memory that is the bounce area; one at most."""
    refuse_memory: VduseError | None = None

    def __post_init__(self) -> None:
        self.end, self._device_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._device_end.setblocking(False)
        self.end.settimeout(20)
        self.fd = self._device_end.fileno()
        self.bounce = os.memfd_create("bounce")
        os.ftruncate(self.bounce, MIB)

    # ---- what Device does by ioctl, read and write

    def features(self) -> int:
        return self.virtio.offered

    def vq_info(self, index: int) -> Any:
        driver = self.drivers[index]
        return SimpleNamespace(
            ready=True, num=driver.num, avail_index=0,
            desc_addr=driver.desc, driver_addr=driver.avail, device_addr=driver.used,
        )  # fmt: skip

    def iotlb_fd(self, start: int, last: int) -> IotlbRegion | None:
        error = self.refuse(start)
        if error is not None:
            raise error
        if start < MIB:
            return IotlbRegion(os.dup(self.bounce), 0, 0, MIB - 1, lib.VDUSE_ACCESS_RW)
        index = start // REGION - 1
        base = (index + 1) * REGION
        return IotlbRegion(os.dup(self.memories[index]), 0, base, base + MIB - 1, lib.VDUSE_ACCESS_RW)

    def iotlb_info(self, start: int, last: int) -> IovaInfo | None:
        if self.refuse_memory is not None and self.refuse_memory.asked == "IOTLB_GET_INFO":
            raise self.refuse_memory
        return IovaInfo(0, MIB - 1, umem=True) if start < MIB else IovaInfo(start, last, umem=False)

    def register_umem(self, iova: int, size: int, uaddr: int) -> None:
        if self.refuse_memory is not None:
            raise self.refuse_memory
        if self.registered:
            raise VduseError("IOTLB_REG_UMEM", self.name, errno.EEXIST)
        self.registered.append((iova, size, uaddr))

    def deregister_umem(self, iova: int, size: int) -> None:
        if not self.registered:
            raise VduseError("IOTLB_DEREG_UMEM", self.name, errno.ENOENT)
        assert self.registered.pop()[:2] == (iova, size)

    def set_kickfd(self, index: int, fd: int | None) -> None:
        if fd is None:
            self.kicks.pop(index, None)
        else:
            self.kicks[index] = fd
            os.eventfd_write(fd, 1)  # kicks that came before were kept

    def inject_irq(self, index: int) -> None:
        self.interrupted.add(index)

    def irq_affinity(self, index: int) -> set[int]:
        if index not in self.affinity:
            raise VduseError("irq_cb_affinity", self.name, errno.ENOENT)
        return self.affinity[index]

    def set_irq_affinity(self, index: int, cpus: set[int]) -> None:
        self.affinity[index] = cpus

    def read_message(self) -> bytes | None:
        try:
            return self._device_end.recv(4096)
        except BlockingIOError:
            return None

    def write_response(self, data: bytes) -> bool:
        self._device_end.send(data)
        return True

    # ---- what the kernel does

    def message(self, kind: int, status: int = 0) -> bool:
        """Send one and wait for the answer; whether it was OK."""
        request = ffi.new("struct vduse_dev_request *")
        request.request_id, request.type = 7, kind
        request.s.status = status
        self.end.send(bytes(ffi.buffer(request)))
        _, result = _RESPONSE.unpack_from(self.end.recv(4096))
        return bool(result == lib.VDUSE_REQ_RESULT_OK)

    def drive(self) -> None:
        """The driver takes the device, up to DRIVER_OK."""
        for status in (0, 1, 3, 0xB):
            assert self.message(lib.VDUSE_SET_STATUS, status)

    def clears_bounced_page(self) -> bool:
        """A page of the bounce area is filled, and read into from a disk that is all zeros: whether zeros arrive there."""
        driver = self.drivers[0]
        header, status = Buffer(driver.alloc(16), 16), Buffer(driver.alloc(1), 1, True)
        driver.put(header.iova, struct.pack("<IIQ", IN, 0, 0))
        page = slice(0x4000, 0x5000)
        os.pwrite(self.bounce, b"x" * 0x1000, page.start)
        for memory in self.own_memory():
            memory[page] = b"x" * 0x1000
        driver.offer(driver.add_chain([header, Buffer(page.start, 0x1000, True), status], indirect=False))
        os.eventfd_write(self.kicks[0], 1)
        assert driver.wait()
        assert driver.get(status.iova, 1)[0] == OK
        mine = self.own_memory()
        found = mine[0][page] if mine else os.pread(self.bounce, 0x1000, page.start)
        return bytes(found) == bytes(0x1000)

    def own_memory(self) -> list[Any]:
        """What is registered by a server that lives."""
        return [ffi.buffer(ffi.cast("char *", host), size) for _, size, host in self.registered if host != DEAD]

    def flush(self, index: int, timeout: float = 10) -> int | None:
        """One request on a queue, from its driver."""
        driver = self.drivers[index]
        request = driver.request(FLUSH)
        if index in self.kicks:
            os.eventfd_write(self.kicks[index], 1)
        driver.run(request, timeout=timeout)
        return request.status


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    virtio = VirtioBlkDevice(
        BlockInfo(size=MIB, volatile_cache=True), num_queues=2, queue_size=64, transport=Feature.ACCESS_PLATFORM.mask
    )
    memories = [os.memfd_create(f"queue{index}") for index in range(2)]
    drivers = []
    for index, fd in enumerate(memories):
        os.ftruncate(fd, MIB)
        drivers.append(FakeDriver(64, memory=MIB, base=(index + 1) * REGION, memory_fd=fd))
    kernel = Kernel(virtio, drivers, memories)
    yield kernel
    os.close(kernel.bounce)
    for driver in drivers:
        driver.close()
    for fd in memories:
        os.close(fd)


class Served:
    """A DeviceServer over the stand-in, with interrupts as eventfds so that the drivers hear them."""

    def __init__(self, kernel: Kernel, **how: bool) -> None:
        limits = kernel.virtio.limits
        rules = DiskRules(
            kernel.virtio.info, max_discard=limits.max_discard, max_write_zeroes=limits.max_write_zeroes, max_ranges=1
        )
        self.failures: list[str] = []

        def queue(index: int, failing: bool) -> NativeQueue:
            return NativeQueue(index, rules, None if failing else NullTarget())

        self.server = DeviceServer(cast(Device, kernel), kernel.virtio, queue, self.failures.append)
        self.server.start(**how)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def ready(self) -> list[bool]:
        return [queue["ready"] for queue in self.server.describe()["queues"]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def no_descriptors(index: int) -> Callable[[int], OSError | None]:
    """Nothing of queue ``index`` can be mapped."""
    return lambda start: OSError(errno.EMFILE, "Too many open files") if start // REGION - 1 == index else None


def test_a_queue_without_memory_is_tried_again(kernel: Kernel) -> None:
    """DRIVER_OK is not refused, the trouble is told, the other queue works; with descriptors back the queue works, too, and
    the trouble is over."""
    kernel.refuse = no_descriptors(1)
    with Served(kernel) as served:
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert served.ready() == [True, False]
        assert "queue 1" in served.server.describe()["broken"]
        assert kernel.flush(0) == OK
        kernel.refuse = lambda start: None
        assert kernel.flush(1) == OK
        until(lambda: served.ready() == [True, True])
        until(lambda: served.server.trouble is None)
        assert not any("served" in failure for failure in served.failures)


def test_taking_over_without_memory(kernel: Kernel) -> None:
    """The same for who takes over a dead server's device: it answers messages meanwhile, and the queue's driver is
    interrupted when the queue is served at last: the dead server may have had no time for that."""
    kernel.refuse = no_descriptors(0)
    with Served(kernel, adopt=True) as served:
        served.server.wait_until_taken_over()
        assert "queue 0" in (served.server.trouble or "")
        assert kernel.interrupted == {1}
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        kernel.refuse = lambda start: None
        until(lambda: served.ready() == [True, True])
        until(lambda: kernel.interrupted == {0, 1})
        assert not any("served" in failure for failure in served.failures)
        assert kernel.flush(0) == OK


def test_a_server_on_trial_reads_no_message(kernel: Kernel) -> None:
    """It serves the queues; a message waits until the device is its own. The kernel gives none twice while the old server
    has the device open."""
    with Served(kernel, adopt=True, on_trial=True) as served:
        served.server.wait_until_taken_over()
        assert kernel.flush(0) == kernel.flush(1) == OK
        request = ffi.new("struct vduse_dev_request *")
        request.type = lib.VDUSE_UPDATE_IOTLB
        kernel.end.send(bytes(ffi.buffer(request)))
        assert not select.select([kernel.end], [], [], 0.2)[0]
        assert kernel.read_message() is not None  # it is all there for another one
        served.server.attend()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)


@pytest.mark.parametrize("what", ["memory", "threads"])
def test_a_server_on_trial_serves_every_queue_or_says_so(kernel: Kernel, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not try again and fails no request: the old server can do better."""
    start = NativeQueue.start

    def refuse(queue: NativeQueue, setup: Any, iova: Any) -> None:
        if what == "threads" and setup.index == 1 and queue._target.kind == core.VB_TARGET_NULL:
            raise OSError(errno.EAGAIN, "no thread")
        start(queue, setup, iova)

    monkeypatch.setattr(NativeQueue, "start", refuse)
    if what == "memory":
        kernel.refuse = no_descriptors(1)
    with Served(kernel, adopt=True, on_trial=True) as served:
        served.server.wait_until_taken_over()
        assert served.server.broken is not None
        assert ("no thread" if what == "threads" else "Too many open files") in served.server.broken
        assert served.ready() == [True, False]


def test_a_kick_that_went_to_the_dead_server_is_not_missed(kernel: Kernel) -> None:
    """The kernel keeps a dead server's kick descriptor until the next one sets its own. What the driver makes available
    after the successor's first look at the ring, and before that, is kicked there, and the driver will not kick again."""
    requests = []

    def set_kickfd(index: int, fd: int | None) -> None:
        if fd is not None:
            time.sleep(0.1)  # the queue has looked, and sleeps
            requests.append(kernel.drivers[index].request(FLUSH))

    kernel.set_kickfd = set_kickfd  # type: ignore[method-assign]
    with Served(kernel, adopt=True) as served:
        served.server.wait_until_taken_over()
        for driver in kernel.drivers:
            driver.collect()
        assert [request.status for request in requests] == [OK, OK]


def test_a_bug_in_taking_over_leaves_somebody_who_answers(kernel: Kernel) -> None:
    """Whatever goes wrong, the message thread lives."""
    kernel.features = lambda: 1 // 0  # type: ignore[method-assign]
    with Served(kernel, adopt=True) as served:
        until(lambda: bool(served.failures))
        del kernel.features  # type: ignore[method-assign]
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.flush(0) == OK


def test_driver_ok_of_a_dead_server_is_confirmed_whatever_was_agreed(kernel: Kernel) -> None:
    """A server that died over DRIVER_OK: whoever cleans up gets the message again, offers nothing the driver has accepted,
    and says yes all the same; a refusal would leave the driver waiting with a kernel lock held."""
    accepted = kernel.virtio.offered
    kernel.features = lambda: accepted  # type: ignore[method-assign]
    kernel.virtio = VirtioBlkDevice(BlockInfo(size=0), num_queues=2, queue_size=64, transport=Feature.ACCESS_PLATFORM.mask)
    assert kernel.virtio.refusal(accepted)
    with Served(kernel, adopt=True) as served:
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.flush(0) == kernel.flush(1) == OK
        assert served.ready() == [True, True]


def test_who_took_over_hears_of_the_reset(kernel: Kernel) -> None:
    """The driver's going is the successor's business as it would have been the dead server's."""
    resets: list[None] = []
    with Served(kernel, adopt=True) as served:
        served.server.wait_until_taken_over()
        served.server._on_reset = lambda: resets.append(None)
        assert kernel.message(lib.VDUSE_SET_STATUS, 0)
        assert len(resets) == 1


def test_what_was_not_done_is_not_confirmed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmapping or a reset that fails is answered so, and the next driver gets fresh mappings."""
    with Served(kernel) as served:
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.flush(0) == OK
        iova = served.server._iova

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "no")

        with monkeypatch.context() as patch:
            patch.setattr(iova, "remove", fail)
            assert not kernel.message(lib.VDUSE_UPDATE_IOTLB)
            assert not kernel.message(lib.VDUSE_SET_STATUS, 0)
        assert served.ready() == [False, False]


def test_reset_and_a_new_driver(kernel: Kernel) -> None:
    """A driver that lets go and comes back is served with a new kick descriptor and nothing of the old mappings."""
    with Served(kernel) as served:
        for _ in range(3):
            kernel.drive()
            assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
            assert kernel.flush(0) == kernel.flush(1) == OK
            assert len(served.server._iova.regions) == 2
            assert kernel.message(lib.VDUSE_SET_STATUS, 0)
            assert kernel.kicks == {}
            assert served.server._iova.regions == ()
            for driver in kernel.drivers:
                driver.reset_ring()


def test_interrupts_of_a_queue_go_to_one_cpu(kernel: Kernel) -> None:
    """Of those the driver allows one that we may use ourselves; what the driver narrowed to one CPU stays."""
    mine = os.sched_getaffinity(0)
    kernel.affinity = {0: mine | {4000}, 1: {4000}}
    with Served(kernel):
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
    assert len(kernel.affinity[0]) == 1
    assert kernel.affinity[0] <= mine
    assert kernel.affinity[1] == {4000}


def test_memory_that_vanishes_fails_requests_and_no_more(kernel: Kernel) -> None:
    """A file cut under the mapping: the queue that touches it answers with errors from then on, and goes on answering."""
    with Served(kernel) as served:
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        driver = kernel.drivers[0]
        header, status = Buffer(driver.alloc(16), 16), Buffer(driver.alloc(1), 1, True)
        driver.put(header.iova, struct.pack("<IIQ", IN, 0, 0))
        beyond = Buffer(driver.base + MIB // 2, 4096, True)
        driver.offer(driver.add_chain([header, beyond, status], indirect=False))
        os.ftruncate(kernel.memories[0], MIB // 2)
        os.eventfd_write(kernel.kicks[0], 1)
        assert driver.wait()
        assert driver.get(status.iova, 1)[0] == IOERR
        until(lambda: any("SIGBUS" in failure for failure in served.failures))
        assert kernel.flush(0) == IOERR
        assert kernel.message(lib.VDUSE_SET_STATUS, 0)


def test_the_bounce_area_is_the_servers_memory(kernel: Kernel) -> None:
    """Registered at the first request that touches it and not before, given back when the driver lets go, and by a server
    that stops."""
    with Served(kernel) as served:
        for _ in range(3):
            kernel.drive()
            assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
            assert kernel.flush(0) == OK
            assert (kernel.registered, served.server.describe()["bounce"]) == ([], None)
            assert kernel.clears_bounced_page()
            assert [known[:2] for known in kernel.registered] == [(0, MIB)]
            assert served.server.describe()["bounce"] == {"memory": "server", "size": MIB}
            assert kernel.message(lib.VDUSE_SET_STATUS, 0)
            assert kernel.registered == []
            assert served.server._iova.regions == ()
            for driver in kernel.drivers:
                driver.reset_ring()
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.clears_bounced_page()
    assert kernel.registered == []


def test_pages_that_rings_may_not_hold_are_told_of(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk works as well, more slowly; the reason is shown."""
    view = NativeQueue.view
    monkeypatch.setattr(NativeQueue, "view", lambda queue: replace(view(queue), pin_error=errno.ENOMEM))
    with Served(kernel) as served:
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.clears_bounced_page()
        bounce = {"memory": "server", "size": MIB, "not_held": "Cannot allocate memory"}
        assert served.server.describe()["bounce"] == bounce
        text = "1 MiB of the server's memory, looked up for every request: Cannot allocate memory"
        assert show._bounce_text(bounce) == text


def test_memory_that_somebody_left_registered_goes_first(kernel: Kernel) -> None:
    """A server that was killed on trial leaves its registration behind, because the old one has the node open, too."""
    kernel.registered.append((0, MIB, DEAD))
    with Served(kernel, adopt=True) as served:
        served.server.wait_until_taken_over()
        assert kernel.clears_bounced_page()
        assert kernel.registered[0][2] != DEAD


def test_a_bounce_area_that_is_unmapped_is_given_back(kernel: Kernel) -> None:
    """The kernel announces that the range goes; whoever uses it again gets memory registered anew."""
    with Served(kernel):
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.clears_bounced_page()
        assert kernel.message(lib.VDUSE_UPDATE_IOTLB)
        assert kernel.registered == []
        assert kernel.clears_bounced_page()
        assert len(kernel.registered) == 1


@pytest.mark.parametrize(
    ("asked", "error", "why"),
    [("IOTLB_REG_UMEM", errno.ENOMEM, "RLIMIT_MEMLOCK"), ("IOTLB_GET_INFO", errno.ENOTTY, "before 6.0")],
)
def test_without_memory_of_its_own(kernel: Kernel, asked: str, error: int, why: str) -> None:
    """The kernel refuses, what a dead server registered included: its own pages are mapped, and `info` has the reason. The
    next driver finds it tried again."""
    if asked == "IOTLB_REG_UMEM":
        kernel.registered.append((0, MIB, DEAD))
    kernel.refuse_memory = VduseError(asked, kernel.name, error)
    with Served(kernel) as served:
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.clears_bounced_page()
        assert kernel.registered == []
        bounce = served.server.describe()["bounce"]
        assert (bounce["memory"], why in bounce["because"]) == ("kernel", True), bounce
        assert kernel.message(lib.VDUSE_SET_STATUS, 0)
        for driver in kernel.drivers:
            driver.reset_ring()
        kernel.refuse_memory = None
        kernel.drive()
        assert kernel.message(lib.VDUSE_SET_STATUS, 0xF)
        assert kernel.clears_bounced_page()
        assert served.server.describe()["bounce"]["memory"] == "server"
