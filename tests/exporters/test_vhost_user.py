"""vhost-user-blk end to end: a real server process, a front-end that speaks the protocol over its socket."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import BASE, GAP, MIB, SIZE, Machine, Server
from vduse_blk.exporters.vhost_user.messages import MAX_PAYLOAD, ProtocolFeature, Request

from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, Hangup
from vduse_blk.exporter import KILL_ENV
from vduse_blk.testing.driver import IN, IOERR, OK, OUT, Buffer, FakeDriver
from vduse_blk.testing.frontend import LOG_ALL, USER_OFFSET, DirtyLog, FakeFrontend, FrontendQueue, GuestMemory, InflightFile
from vduse_blk.virtio import Feature

Serve = Callable[..., Server]
PROTOCOL_FEATURES = 1 << 30


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def image(server: Server, offset: int, length: int) -> bytes:
    """What the storage holds."""
    with open(server.image, "rb") as file:
        return os.pread(file.fileno(), length, offset)


def exercise(queue: FakeDriver, server: Server, seed: int = 1, sector: int = 64) -> None:
    """Write and read, and look at the storage."""
    data = noise(128 * 1024, seed)
    assert queue.write(sector, data, pieces=8) == OK
    assert image(server, sector * 512, len(data)) == data
    assert queue.read(sector, len(data), pieces=5) == (OK, data)
    assert queue.flush() == OK
    queue.reset_heap()


def frontend_of(server: Server) -> int | None:
    """Process id of the front-end the server says it has."""
    pid = server.call("info")["frontend"]
    assert pid is None or isinstance(pid, int)
    return pid


def until_alone(server: Server) -> None:
    """Wait until the server has noticed that its front-end is gone."""
    deadline = time.monotonic() + 10
    while frontend_of(server) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


both_paths = pytest.mark.parametrize("path", ["native", "plugin"])


# ---------------------------------------------------------------------------------------------------- plain use


@both_paths
def test_a_disk_is_read_and_written(serve: Serve, machine: Machine, path: str) -> None:
    """A front-end negotiates, starts a queue, and what it writes is in the storage and comes back, along both paths."""
    server = serve(path=path)
    frontend = machine.boot(server)
    assert frontend.capacity() == SIZE
    exercise(machine.queue, server)
    assert machine.queue.serial() == (OK, b"d".ljust(20, b"\0"))
    info = server.call("info")
    assert info["path"] == path
    assert info["device"] == str(server.socket)
    assert info["frontend"] == os.getpid()
    assert info["counters"]["write_ops"] == 1
    frontend.close()


@both_paths
def test_queues_work_side_by_side(serve: Serve, path: str) -> None:
    """Four queues of one front-end, loaded at once, each with its own data."""
    server = serve(path=path, queues=4)
    machine = Machine(queues=4)
    frontend = machine.boot(server)
    assert frontend.ask_number(Request.GET_QUEUE_NUM) == 4
    failures: list[BaseException] = []

    def load(index: int) -> None:
        try:
            queue = machine.queues[index]
            for turn in range(20):
                sector = (index * 4 + turn % 4) * 512
                data = noise(64 * 1024, index * 100 + turn)
                assert queue.write(sector, data, pieces=4) == OK
                assert queue.read(sector, len(data)) == (OK, data)
                queue.reset_heap()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [queue["counters"]["read_ops"] for queue in server.call("info")["queues"]] == [20] * 4
    frontend.close()
    machine.close()


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("indirect", [True, False])
def test_every_ring_layout(serve: Serve, event_idx: bool, indirect: bool) -> None:
    """The queue does what the driver took, not what was offered; a legacy driver without VERSION_1 is served, too."""
    server = serve()
    machine = Machine(event_idx=event_idx, indirect=indirect)
    without = [Feature.EVENT_IDX] * (not event_idx) + [Feature.INDIRECT_DESC] * (not indirect)
    frontend = machine.boot(server, without=[*without, Feature.VERSION_1])
    exercise(machine.queue, server)
    negotiated = server.call("info")["features_negotiated"]
    assert ("EVENT_IDX" in negotiated, "INDIRECT_DESC" in negotiated) == (event_idx, indirect)
    frontend.close()
    machine.close()


def test_an_old_front_end_needs_no_enabling(serve: Serve, machine: Machine) -> None:
    """Without protocol features a queue runs as soon as it has its kick descriptor."""
    server = serve()
    frontend = machine.boot(server, protocol_features=False)
    assert not frontend.features & PROTOCOL_FEATURES
    exercise(machine.queue, server)
    frontend.close()


def test_with_protocol_features_a_queue_waits_to_be_enabled(serve: Serve, machine: Machine) -> None:
    """Nothing is popped before SET_VRING_ENABLE, and nothing while it is off; what was kicked meanwhile is not lost."""
    server = serve()
    queue = machine.queue
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    frontend.set_memory(queue.region)
    frontend.set_num(0, queue.num)
    frontend.set_addr(0, queue)
    frontend.set_kick(0, queue.kick_fd)
    frontend.set_call(0, queue.call_fd)
    for turn in range(3):
        request = queue.request(IN, 0, into=512)
        queue.kick(force=True)
        with pytest.raises(TimeoutError):
            queue.wait(0.1)
        frontend.enable(0)
        queue.run(request)
        assert request.status == OK, turn
        frontend.enable(0, False)
    frontend.close()


def test_the_order_of_messages_does_not_matter(serve: Serve, machine: Machine) -> None:
    """Enabled, kicked and addressed before there is memory: the queue starts when the last of it has come."""
    server = serve()
    queue = machine.queue
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    frontend.enable(0)
    frontend.set_call(0, queue.call_fd)
    frontend.set_kick(0, queue.kick_fd)
    frontend.set_addr(0, queue)
    frontend.set_num(0, queue.num)
    assert not server.call("info")["queues"][0]["ready"]
    assert frontend.add_memory(queue.region) == 0
    exercise(queue, server)
    frontend.close()


def test_stop_and_start_loses_nothing(serve: Serve, machine: Machine) -> None:
    """GET_VRING_BASE finishes what was popped and says where to go on; a start at that index goes on there."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    done = 0
    for turn in range(5):
        requests = [queue.request(OUT, 8 * i, out=noise(4096, turn * 10 + i)) for i in range(7)]
        queue.kick()
        base = frontend.stop_queue(0)
        done += sum(len(queue.poll_used()) for _ in range(1))
        assert base == done  # popped is answered
        frontend.start_queue(0, queue, base=base)
        while done < 7 * (turn + 1):
            done += len(queue.wait())
        assert image(server, 0, 4096) == noise(4096, turn * 10)
        assert len(requests) == 7
    frontend.close()


def test_a_queue_without_a_kick_descriptor_does_not_run(serve: Serve, machine: Machine) -> None:
    """The back-end does not poll; it says so and takes the descriptor that comes later."""
    server = serve()
    frontend = machine.boot(server)
    assert frontend.set_kick(0, None) == 0
    assert "has no kick descriptor" in server.text()
    assert not server.call("info")["queues"][0]["ready"]
    assert frontend.set_kick(0, machine.queue.kick_fd) == 0
    exercise(machine.queue, server)
    frontend.close()


# ------------------------------------------------------------------------------------------------ descriptors


@both_paths
def test_call_and_kick_are_replaced_under_load(serve: Serve, machine: Machine, path: str) -> None:
    """New eventfds at any moment, with requests in flight: every request is answered and every sleep ends."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server)
    chance = random.Random(3)
    spare: list[int] = []
    for turn in range(60):
        requests = [queue.request(IN, 8 * i, into=4096) for i in range(chance.randrange(1, 12))]
        queue.kick()
        fresh = os.eventfd(0, os.EFD_CLOEXEC)
        spare.append(fresh)
        if turn % 2:
            assert frontend.set_call(0, fresh) == 0
            fresh, queue.call_fd = queue.call_fd, fresh
        else:
            assert frontend.set_kick(0, fresh) == 0
            fresh, queue.kick_fd = queue.kick_fd, fresh
        for request in requests:
            while request.status is None:
                queue.collect()
            assert request.status == OK
        queue.reset_heap()
        spare[-1] = fresh
    for fd in spare:
        os.close(fd)
    frontend.close()


def test_a_driver_that_polls_needs_no_call_descriptor(serve: Serve, machine: Machine) -> None:
    """SET_VRING_CALL without a descriptor: requests are answered all the same, and the old eventfd is not touched again."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    exercise(queue, server)
    assert frontend.set_call(0, None) == 0
    while select.select([queue.call_fd], [], [], 0)[0]:
        os.eventfd_read(queue.call_fd)
    exercise(queue, server, seed=2)
    assert not select.select([queue.call_fd], [], [], 0)[0]
    frontend.close()


@both_paths
def test_shared_descriptors_stay_as_they_are(serve: Serve, machine: Machine, path: str) -> None:
    """The flags of a received file are the front-end's: blocking eventfds stay blocking, a kick is never read."""
    server = serve(path=path)
    queue = machine.queue
    for name in ("kick_fd", "call_fd"):
        os.close(getattr(queue, name))
        setattr(queue, name, os.eventfd(0, os.EFD_CLOEXEC))
    frontend = machine.boot(server)
    exercise(queue, server)
    assert queue.kicks > 0
    for fd in (queue.kick_fd, queue.call_fd):
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    assert os.eventfd_read(queue.kick_fd) == queue.kicks
    frontend.close()


@both_paths
def test_a_full_call_eventfd_stops_nobody(serve: Serve, machine: Machine, path: str) -> None:
    """A write to a blocking eventfd at its limit would wait for its reader; the server answers, and ends, without."""
    server = serve(path=path)
    queue = machine.queue
    os.close(queue.call_fd)
    queue.call_fd = os.eventfd(0, os.EFD_CLOEXEC)
    frontend = machine.boot(server)
    exercise(queue, server)
    while select.select([queue.call_fd], [], [], 0)[0]:
        os.eventfd_read(queue.call_fd)
    os.eventfd_write(queue.call_fd, 2**64 - 2)
    request = queue.request(IN, 0, into=512)
    queue.kick()
    deadline = time.monotonic() + 10
    while not queue.poll_used():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert request.head >= 0
    assert server.stop() == 0
    frontend.close()


def test_only_eventfds_are_taken(serve: Serve, machine: Machine) -> None:
    """A file, a pipe or a timer would be waited for in other ways; the front-end is told no and may go on."""
    server = serve()
    frontend = machine.boot(server)
    with tempfile.TemporaryFile() as file:
        assert frontend.set_kick(0, file.fileno()) == 1
        assert frontend.set_call(0, file.fileno()) == 1
    exercise(machine.queue, server)
    frontend.close()


def test_descriptors_are_closed(serve: Serve) -> None:
    """Every front-end leaves the server with as many descriptors and mappings as it found, whatever it has sent."""
    server = serve(queues=2)
    counts = []
    for _ in range(5):
        machine = Machine(queues=2)
        frontend = machine.boot(server)
        err = os.eventfd(0, os.EFD_CLOEXEC)
        for index, queue in enumerate(machine.queues):
            frontend.set_err(index, err)
            frontend.set_call(index, queue.call_fd)
            frontend.set_kick(index, queue.kick_fd)
            exercise(queue, server)
        frontend.set_memory(*(queue.region for queue in machine.queues))
        frontend.close()
        machine.close()
        os.close(err)
        until_alone(server)
        counts.append(server.open_fds())
        assert "memfd:guest" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    assert len(set(counts)) == 1, counts


# ----------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def extra() -> Iterator[GuestMemory]:
    """A second region of the machine's memory."""
    region = GuestMemory(BASE + GAP, 4 * MIB)
    yield region
    region.close()


def read_into(queue: FakeDriver, buffer: Buffer) -> Callable[[], int | None]:
    """Offer a read of sector 0 into ``buffer``; returns what fetches its status."""
    header = queue.alloc(16, 16)
    queue.put(header, struct.pack("<IIQ", IN, 0, 0))
    status = queue.alloc(1)
    queue.offer(queue.add_chain([Buffer(header, 16), buffer, Buffer(status, 1, True)], indirect=False))

    def fetch() -> int | None:
        queue.wait()
        return queue.get(status, 1)[0]

    return fetch


@both_paths
def test_memory_may_come_after_the_queue(serve: Serve, machine: Machine, extra: GuestMemory, path: str) -> None:
    """A region is added to a running queue and used at once, without waiting for an acknowledgement."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server, protocol=~ProtocolFeature.REPLY_ACK.mask)
    data = noise(4096)
    assert queue.write(0, data) == OK
    frontend.add_memory(extra)
    fetch = read_into(queue, Buffer(extra.base + 8192, 4096, True))
    queue.kick()
    assert fetch() == OK
    assert os.pread(extra.fd, 4096, 8192) == data
    frontend.close()


@both_paths
def test_a_request_waits_for_memory_that_is_on_its_way(
    serve: Serve, machine: Machine, extra: GuestMemory, path: str
) -> None:
    """The kick overtakes the message that brings the memory: the request waits for it and succeeds."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server)
    data = noise(4096)
    assert queue.write(0, data) == OK
    fetch = read_into(queue, Buffer(extra.base, 4096, True))
    queue.kick()
    time.sleep(0.05)
    assert frontend.add_memory(extra) == 0
    assert fetch() == OK
    assert os.pread(extra.fd, 4096, 0) == data
    frontend.close()


@both_paths
def test_a_request_for_memory_that_never_comes_fails(serve: Serve, machine: Machine, extra: GuestMemory, path: str) -> None:
    """An I/O error for that request, and the queue goes on."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server)
    fetch = read_into(queue, Buffer(extra.base, 4096, True))
    queue.kick()
    assert fetch() == IOERR
    exercise(queue, server)
    frontend.close()


@both_paths
def test_removed_memory_is_gone_when_it_is_acknowledged(
    serve: Serve, machine: Machine, extra: GuestMemory, path: str
) -> None:
    """After REM_MEM_REG nothing maps the region any more, requests that name it fail, others do not notice."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server)
    maps = Path(f"/proc/{server.process.pid}/maps")
    before = maps.read_text().count("memfd:guest")
    assert frontend.add_memory(extra) == 0
    fetch = read_into(queue, Buffer(extra.base, 4096, True))
    queue.kick()
    assert fetch() == OK
    assert frontend.remove_memory(extra) == 0
    assert maps.read_text().count("memfd:guest") == before
    fetch = read_into(queue, Buffer(extra.base, 4096, True))
    queue.kick()
    assert fetch() == IOERR
    assert frontend.remove_memory(extra) == 1  # it is gone
    exercise(queue, server)
    frontend.close()


def test_a_ring_waits_while_its_memory_is_away(serve: Serve, machine: Machine) -> None:
    """Without the ring's region the queue does not run; when it comes back, it goes on where it was."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    exercise(queue, server)
    assert frontend.remove_memory(queue.region) == 0
    assert not server.call("info")["queues"][0]["ready"]
    request = queue.request(IN, 0, into=512)
    queue.kick(force=True)
    with pytest.raises(TimeoutError):
        queue.wait(0.1)
    assert frontend.add_memory(queue.region) == 0
    queue.run(request)
    assert request.status == OK
    exercise(queue, server, seed=2)
    frontend.close()


@both_paths
def test_a_new_memory_table_under_load(serve: Serve, machine: Machine, extra: GuestMemory, path: str) -> None:
    """SET_MEM_TABLE again and again, with a region more and less, while requests fly: what stays is not disturbed."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server)
    stop = threading.Event()
    failures: list[BaseException] = []

    def change() -> None:
        try:
            while not stop.is_set():
                assert frontend.set_memory(extra, queue.region) == 0
                assert frontend.set_memory(queue.region) == 0
        except BaseException as error:
            failures.append(error)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for turn in range(30):
            exercise(queue, server, seed=turn)
    finally:
        stop.set()
        changer.join()
    assert failures == []
    frontend.close()


def test_a_region_may_begin_anywhere_in_its_file(serve: Serve) -> None:
    """The offset of a region, page-aligned or not, is where its first byte is."""
    server = serve()
    region = GuestMemory(BASE, offset=3 * 4096)
    queue = FrontendQueue(region)
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    assert frontend.set_memory(region) == 0
    frontend.start_queue(0, queue)
    exercise(queue, server)
    odd = GuestMemory(BASE + GAP, 8192)
    odd.offset, odd.length = 100, 4096
    assert frontend.add_memory(odd) == 0
    assert queue.write(0, noise(512)) == OK
    fetch = read_into(queue, Buffer(odd.base, 512, True))
    queue.kick()
    assert fetch() == OK
    assert os.pread(odd.fd, 512, 100) == noise(512)
    odd.close()
    frontend.close()
    queue.close()


def test_overlapping_memory_is_refused_whole(serve: Serve, machine: Machine) -> None:
    """Neither guest nor user addresses may mean two things; a refused table leaves the old one in force."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    guest = GuestMemory(BASE + MIB)
    guest.user += 1 << 40
    user = GuestMemory(BASE + GAP)
    user.user = queue.region.user + MIB
    for region in (guest, user):
        assert frontend.add_memory(region) == 1
        assert frontend.set_memory(queue.region, region) == 1
        region.close()
    exercise(queue, server)
    frontend.close()


def test_memory_of_a_truncated_file_costs_the_queue_only(serve: Serve, machine: Machine) -> None:
    """A front-end that cuts its memory file short raises SIGBUS in the server: its queue stops, the next one is served."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    exercise(queue, server)
    victim = GuestMemory(BASE + GAP, MIB)
    assert frontend.add_memory(victim) == 0
    os.truncate(victim.fd, 0)
    # Serial numbers are written by the server itself; file data would go through the kernel, which gives EFAULT.
    header, status = queue.alloc(16, 16), queue.alloc(1)
    queue.put(header, struct.pack("<IIQ", 8, 0, 0))
    queue.offer(queue.add_chain([Buffer(header, 16), Buffer(victim.base, 20, True), Buffer(status, 1, True)]))
    queue.kick()
    queue.wait()
    assert queue.get(status, 1)[0] == IOERR
    frontend.close()
    victim.close()
    until_alone(server)
    again = Machine()
    frontend = again.boot(server)
    exercise(again.queue, server)
    frontend.close()
    again.close()


# ------------------------------------------------------------------------------------------------- front-ends


@both_paths
def test_front_ends_come_one_after_another(serve: Serve, path: str) -> None:
    """Each starts from nothing; the storage keeps what the last has written."""
    server = serve(path=path)
    for turn in range(4):
        machine = Machine(num=32 << turn)
        frontend = machine.boot(server)
        if turn:
            assert machine.queue.read(64, 128 * 1024) == (OK, noise(128 * 1024, turn - 1))
        exercise(machine.queue, server, seed=turn)
        frontend.close()
        machine.close()
    assert server.call("info")["counters"]["write_ops"] == 4


def test_the_next_front_end_waits_for_its_turn(serve: Serve, machine: Machine) -> None:
    """A second connection is served when the first has ended, not beside it."""
    server = serve()
    first = machine.boot(server)
    other = Machine()
    second = FakeFrontend.connect(server.socket)
    second.send(Request.GET_FEATURES)
    second.connection.settimeout(0.2)
    with pytest.raises(TimeoutError):
        second.receive()
    exercise(machine.queue, server)
    first.close()
    second.connection.settimeout(20)
    assert second.receive()[0] == Request.GET_FEATURES
    second.negotiate()
    second.set_memory(other.queue.region)
    second.start_queue(0, other.queue)
    exercise(other.queue, server, seed=2)
    second.close()
    other.close()


@both_paths
def test_a_front_end_that_vanishes_mid_io(serve: Serve, path: str) -> None:
    """Connections cut with requests in flight, again and again: each time the server finishes them and takes the next."""
    server = serve(path=path)
    for turn in range(10):
        machine = Machine()
        frontend = machine.boot(server)
        for i in range(16):
            machine.queue.request(OUT if i % 2 else IN, 8 * i, out=noise(4096) * (i % 2), into=4096 * (1 - i % 2))
        machine.queue.kick()
        if turn % 2:
            frontend.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        frontend.close()
        machine.close()
    machine = Machine()
    frontend = machine.boot(server)
    exercise(machine.queue, server)
    frontend.close()
    machine.close()


def test_a_front_end_may_listen(serve: Serve, machine: Machine, tmp_path: Path) -> None:
    """With client=1 the server connects to the front-end, waits for one that is not there yet, and comes back after a
    disconnection."""
    server = serve(export="?client=1")
    for seed in range(2):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(server.socket))
            listener.listen()
            listener.settimeout(20)
            frontend = FakeFrontend(listener.accept()[0])
        frontend.negotiate()
        frontend.set_memory(machine.queue.region)
        if seed:
            frontend.start_queue(0, machine.queue, base=3)
        else:
            frontend.start_queue(0, machine.queue)
        exercise(machine.queue, server, seed=seed)
        frontend.close()
        server.socket.unlink()
        until_alone(server)


def test_a_reset_device_starts_over(serve: Serve, machine: Machine) -> None:
    """RESET_DEVICE stops the queues and forgets them and the features, but not the memory: QEMU does not send it again."""
    server = serve()
    frontend = machine.boot(server)
    exercise(machine.queue, server)
    assert frontend.tell(Request.RESET_DEVICE) == 0
    info = server.call("info")
    assert info["features_negotiated"] == []
    assert not info["queues"][0]["ready"]
    other = FrontendQueue(machine.queue.region)
    other.put(other.desc, bytes(other.used + 6 + 8 * other.num - other.desc))
    frontend.set_features(frontend.features)
    frontend.start_queue(0, other)
    exercise(other, server, seed=2)
    frontend.close()
    for fd in (other.kick_fd, other.call_fd, other.event_fd):
        os.close(fd)


@pytest.mark.parametrize("how", ["status", "owner"])
def test_a_reset_status_or_owner_stops_the_queues(serve: Serve, machine: Machine, how: str) -> None:
    """The queues stop and say where, so that a front-end which asks afterwards can go on there."""
    server = serve()
    frontend = machine.boot(server)
    assert frontend.tell(Request.SET_STATUS, struct.pack("=Q", 15)) == 0
    assert frontend.ask_number(Request.GET_STATUS) == 15
    exercise(machine.queue, server)
    if how == "status":
        assert frontend.tell(Request.SET_STATUS, struct.pack("=Q", 0)) == 0
        assert frontend.ask_number(Request.GET_STATUS) == 0
    else:
        assert frontend.tell(Request.RESET_OWNER) == 0
    assert not server.call("info")["queues"][0]["ready"]
    base = frontend.stop_queue(0)
    assert base == 3
    frontend.start_queue(0, machine.queue, base=base)
    exercise(machine.queue, server, seed=2)
    frontend.close()


# ------------------------------------------------------------------------------------------- crash and successor


def marks(area: InflightFile) -> int:
    """Requests in flight of all queues, as the specification's layout has them."""
    stride = (16 + 16 * area.queue_size + 63) // 64 * 64
    content = os.pread(area.fd, area.size, area.offset)
    return sum(
        content[queue * stride + 16 + 16 * head] for queue in range(area.num_queues) for head in range(area.queue_size)
    )


@pytest.mark.parametrize(("path", "ring"), [("native", True), ("native", False), ("plugin", True)])
def test_a_killed_server_loses_nothing(serve: Serve, tmp_path: Path, path: str, ring: bool) -> None:
    """Killed again and again under load on two queues; each time the next server finishes what was in flight. Every request
    is answered once and with success, and the storage holds what was written. So it is where io_uring is forbidden."""
    (tmp_path / "sitecustomize.py").write_text("import tests.faulty; tests.faulty.forbid_io_uring()")
    without_ring = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}"}
    server = serve(path=path, queues=2, environment={} if ring else without_ring)
    machine = Machine(queues=2)
    frontend = machine.boot(server)
    area = frontend.get_inflight(2, 128)
    frontend.close()
    until_alone(server)
    frontend = machine.boot(server, inflight=area)
    links = [os.readlink(fd) for fd in Path(f"/proc/{server.process.pid}/fd").iterdir()]
    assert ("anon_inode:[io_uring]" in links) == (ring and path == "native")
    chance = random.Random(9)
    turns = found = 0
    written: dict[int, bytes] = {}
    while turns < 8 or found == 0:
        turns += 1
        assert turns < 200, "no death has found a request in flight"
        requests = []
        before = machine.queues[1].used_idx()
        for number, queue in enumerate(machine.queues):
            for i in range(14):
                sector = (number * 16 + i) * 128
                written[sector] = noise(65536, turns * 100 + number * 50 + i)
                requests.append((queue, queue.request(OUT, sector, out=written[sector], pieces=3)))
            queue.kick(force=True)
        if turns % 2:
            time.sleep(chance.random() * 0.003)
        else:  # a fast machine has done all of them by then
            deadline = time.monotonic() + 10
            while machine.queues[1].used_idx() == before and time.monotonic() < deadline:
                pass
        server.kill()
        found += marks(area)
        frontend.close()
        server.start()
        frontend = machine.boot(server, inflight=area)
        for queue, request in requests:
            while request.status is None:
                queue.collect(20)
            assert request.status == OK
        for queue in machine.queues:
            queue.reset_heap()
        for sector, data in written.items():
            assert image(server, sector * 512, len(data)) == data
    assert marks(area) == 0
    frontend.close()
    area.close()
    machine.close()


@both_paths
def test_a_disconnection_finishes_what_was_in_flight(serve: Serve, machine: Machine, path: str) -> None:
    """The server lives and the connection is cut: nothing is left to do again, and the next connection goes on."""
    server = serve(path=path)
    frontend = machine.boot(server)
    area = frontend.get_inflight(1, machine.queue.num)
    assert frontend.set_inflight(area) == 0
    for turn in range(5):
        requests = [machine.queue.request(IN, 8 * i, into=4096) for i in range(10)]
        machine.queue.kick(force=True)
        frontend.close()
        until_alone(server)
        assert marks(area) == 0
        frontend = machine.boot(server, inflight=area)
        machine.queue.run(*requests)
        assert [request.status for request in requests] == [OK] * 10, turn
        machine.queue.reset_heap()
    frontend.close()
    area.close()


@both_paths
def test_a_successor_that_is_stopped_at_once_has_done_its_duty(serve: Serve, path: str) -> None:
    """A dead server had popped everything. The next is started and stopped in one breath: when it says where the queue
    stands, what was popped is answered, and there was more of it than the plugin path takes at a time."""
    server = serve(path=path)
    machine = Machine(num=512)
    queue = machine.queue
    frontend = machine.boot(server)
    area = frontend.get_inflight(1, 512)
    frontend.close()
    until_alone(server)
    heads = [queue.request(IN, 8 * i, into=4096).head for i in range(120)]
    os.pwrite(area.fd, struct.pack("=QHHHH", 0, 1, 512, 0, 0), 0)
    for counter, head in enumerate(heads):
        os.pwrite(area.fd, struct.pack("=B5xHQ", 1, 0, counter), 16 + 16 * head)
    frontend = machine.boot(server, inflight=area)
    assert frontend.stop_queue(0) == 120
    assert sorted(head for head, _ in queue.poll_used()) == sorted(heads)
    assert marks(area) == 0
    frontend.close()
    area.close()
    machine.close()


def test_a_successor_keeps_the_cache_mode(serve: Serve, machine: Machine) -> None:
    """A driver that has switched the cache off does not flush; a server that did not know would lose its data."""
    server = serve()
    frontend = machine.boot(server)
    area = frontend.get_inflight(1, machine.queue.num)
    assert frontend.set_inflight(area) == 0
    assert frontend.set_config(32, b"\0") == 0
    server.kill()
    frontend.close()
    server.start()
    frontend = machine.boot(server, inflight=area)
    assert frontend.config(32, 1) == b"\0"
    fresh = frontend.get_inflight(1, machine.queue.num)  # a machine that was reset
    assert frontend.set_inflight(fresh) == 0
    assert frontend.config(32, 1) == b"\1"
    frontend.close()
    area.close()
    fresh.close()


def test_areas_that_cannot_be_are_refused(serve: Serve, machine: Machine) -> None:
    """Too small, beyond the file, no memory at all; the queue goes on with what it had."""
    server = serve()
    frontend = machine.boot(server)
    area = frontend.get_inflight(1, 64)
    assert frontend.set_inflight(area) == 0
    exercise(machine.queue, server)
    for changes in ({"size": 64}, {"offset": 4096}, {"num_queues": 100}, {"queue_size": 32768}, {"size": 2**63}):
        bad = InflightFile(area.fd, area.size, area.offset, area.num_queues, area.queue_size)
        for name, value in changes.items():
            setattr(bad, name, value)
        assert frontend.set_inflight(bad) == 1, changes
    exercise(machine.queue, server, seed=2)
    with pytest.raises(OSError, match="Operation not permitted"):
        os.ftruncate(area.fd, 0)
    frontend.close()
    area.close()


# ----------------------------------------------------------------------------------------------------- migration


def pages_of(*buffers: tuple[int, int]) -> set[int]:
    """Guest addresses of the pages that (address, length) pieces touch."""
    return {page for start, length in buffers for page in range(start // 4096 * 4096, start + length, 4096)}


@both_paths
def test_every_page_written_is_logged(serve: Serve, machine: Machine, path: str) -> None:
    """With F_LOG_ALL the pages of read data, status bytes and the used ring are marked, and no other; without, none is."""
    server = serve(path=path)
    queue = machine.queue
    frontend = machine.boot(server)
    log = DirtyLog(BASE + GAP, offset=4096)
    chance = random.Random(4)

    def load() -> tuple[set[int], set[int]]:
        """Pages that have changed although the driver did not write there; pages which the device may write."""
        queue.reset_heap()
        requests = []
        for i in range(8):
            data = noise(20000 // 512 * 512, chance.getrandbits(30))
            queue.alloc(1, 4096)  # nothing that is read shares a page with what is written
            requests.append(queue.request(OUT, 64 * i, out=data, pieces=3, offer=False))
            queue.alloc(1, 4096)
            requests.append(queue.request(IN, 64 * i + 3, into=chance.randrange(1, 80) * 512, pieces=4, offer=False))
        before = queue.get(queue.base, len(queue.memory))
        for request in requests:
            queue.offer(request.head)
        queue.kick()
        for request in requests:
            while request.status is None:
                queue.collect()
            assert request.status == OK
        after = queue.get(queue.base, len(queue.memory))
        changed = {
            queue.base + at for at in range(0, len(after), 4096) if before[at : at + 4096] != after[at : at + 4096]
        } - pages_of((queue.avail, 6 + 2 * queue.num))
        buffers = [(buffer.iova, buffer.length) for request in requests for buffer in request.data]
        statuses = [(request.status_iova, 1) for request in requests]
        return changed, pages_of(*buffers, *statuses, (queue.used, 6 + 8 * queue.num))

    load()
    frontend.set_log(log)
    load()
    assert log.take() == set()
    assert frontend.set_features(frontend.features | LOG_ALL) == 0
    assert frontend.set_addr(0, queue, flags=1) == 0
    for _ in range(4):
        changed, may = load()
        marked = log.take()
        assert changed <= marked <= may
        assert len(changed) > 20

    other = DirtyLog(BASE + GAP)
    frontend.set_log(other)
    changed, may = load()
    assert log.take() == set()
    assert changed <= other.take() <= may

    assert frontend.set_features(frontend.features & ~LOG_ALL) == 0
    assert frontend.set_addr(0, queue) == 0
    load()
    assert other.take() == set()
    frontend.close()
    log.close()
    other.close()


def test_the_used_ring_is_logged_where_the_front_end_says(serve: Serve, machine: Machine) -> None:
    """The log address of a ring need not be its guest address; without the ring's flag its changes are not marked."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    log = DirtyLog(BASE + GAP)
    frontend.set_log(log)
    frontend.set_features(frontend.features | LOG_ALL)
    request = queue.request(IN, 0, into=512)
    queue.run(request)
    data = pages_of((request.data[0].iova, 512), (request.status_iova, 1))
    assert log.take() == data
    addresses = (queue.desc + USER_OFFSET, queue.used + USER_OFFSET, queue.avail + USER_OFFSET, 0x5000)
    payload = struct.pack("=IIQQQQ", 0, 1, *addresses)
    assert frontend.tell(Request.SET_VRING_ADDR, payload) == 0
    request = queue.request(IN, 0, into=512)
    queue.run(request)
    assert log.take() == pages_of((request.data[0].iova, 512), (request.status_iova, 1), (0x5000, 1))
    frontend.close()
    log.close()


def test_a_log_that_is_too_short_is_not_overrun(serve: Serve, machine: Machine) -> None:
    """Pages beyond the log are not marked; nothing is written behind it."""
    server = serve()
    frontend = machine.boot(server)
    log = DirtyLog(BASE + 8 * 4096)
    os.truncate(log.fd, log.size + 65536)
    frontend.set_log(log)
    frontend.set_features(frontend.features | LOG_ALL)
    frontend.set_addr(0, machine.queue, flags=1)
    exercise(machine.queue, server)
    assert os.pread(log.fd, 65536, log.size) == bytes(65536)
    assert log.take()
    frontend.close()
    log.close()


# --------------------------------------------------------------------------------------------- configuration


def test_the_configuration_space_is_read_in_any_piece(serve: Serve, machine: Machine) -> None:
    """Any range of the 256 bytes, longer than what there is included; the answer is as long as the question."""
    server = serve(queues=3, block_size=4096)
    frontend = machine.boot(server)
    whole = frontend.config(0, 256)
    assert struct.unpack_from("<Q", whole)[0] * 512 == SIZE
    assert struct.unpack_from("<I", whole, 20)[0] == 4096
    assert struct.unpack_from("<H", whole, 34)[0] == 3
    for offset, size in ((0, 8), (20, 4), (33, 7), (60, 36), (255, 1), (256, 0)):
        assert frontend.config(offset, size) == whole[offset : offset + size]
    frontend.close()


@both_paths
def test_a_resize_reaches_the_front_end(serve: Serve, machine: Machine, path: str) -> None:
    """The disk grows while it is used: the front-end is told, asks, and can use the new end."""
    server = serve(path=path)
    frontend = machine.boot(server)
    assert machine.queue.read(SIZE // 512, 512)[0] == IOERR
    assert server.call("resize", size=2 * SIZE)["size"] == 2 * SIZE
    assert frontend.backend_message() == 2
    assert frontend.capacity() == 2 * SIZE
    exercise(machine.queue, server, sector=SIZE // 512)
    frontend.close()


@pytest.mark.parametrize("step", ["resizing", "resized"])
def test_a_server_that_dies_over_a_resize(tmp_path: Path, machine: Machine, step: str) -> None:
    """Served again with the same words the disk has the old size or the new one and its data, and can be resized; then
    nothing of it is left."""
    server = Server(tmp_path, environment={KILL_ENV: step})
    frontend = machine.boot(server)
    assert machine.queue.write(0, b"x" * 4096) == OK
    with pytest.raises(Hangup):
        server.call("resize", size=2 * SIZE)
    assert server.process.wait(10) == -9
    frontend.close()
    server.environment.clear()
    server.start()
    size = SIZE if step == "resizing" else 2 * SIZE
    assert server.image.stat().st_size == server.call("info")["size"] == size
    machine.queue.reset_ring()
    frontend = machine.boot(server)
    assert frontend.capacity() == size
    assert machine.queue.read(0, 4096) == (OK, b"x" * 4096)
    assert server.call("resize", size=4 * SIZE)["size"] == 4 * SIZE
    frontend.close()
    assert server.stop() == 0
    assert not (tmp_path / "run/d").exists()


@pytest.mark.parametrize("step", ["locked", "opened", "serving"])
def test_servers_that_die_one_after_another(tmp_path: Path, machine: Machine, step: str) -> None:
    """One while it serves, the next at each step of its start: the third, with the same words, serves the same disk."""
    server = Server(tmp_path)
    frontend = machine.boot(server)
    assert machine.queue.write(0, b"x" * 4096) == OK
    server.kill()
    frontend.close()
    server.environment[KILL_ENV] = step
    with pytest.raises(AssertionError):
        server.start()
    assert server.process.wait(10) == -9
    server.environment.clear()
    server.start()
    machine.queue.reset_ring()
    frontend = machine.boot(server)
    assert machine.queue.read(0, 4096) == (OK, b"x" * 4096)
    frontend.close()
    assert server.stop() == 0
    assert not (tmp_path / "run/d").exists()


def test_a_server_that_dies_when_all_is_gone(tmp_path: Path, machine: Machine) -> None:
    """At the only step of a detach: nothing of the disk is left, and the next one has name and socket."""
    server = Server(tmp_path, environment={KILL_ENV: "gone"})
    with contextlib.suppress(Hangup):  # or the reply was faster
        server.call("detach", force=False)
    assert server.process.wait(10) == -9
    assert not (tmp_path / "run/d").exists()
    assert not server.socket.exists()
    server.environment.clear()
    server.start()
    frontend = machine.boot(server)
    assert machine.queue.write(0, b"x" * 4096) == OK
    frontend.close()
    assert server.stop() == 0


def test_a_front_end_without_a_channel_sees_the_new_size_when_it_asks(serve: Serve, machine: Machine) -> None:
    """No back-end channel, no message; the resize succeeds all the same, and without any front-end, too."""
    server = serve()
    server.call("resize", size=2 * SIZE)
    frontend = machine.boot(server, protocol=~ProtocolFeature.BACKEND_REQ.mask)
    assert frontend.capacity() == 2 * SIZE
    server.call("resize", size=3 * SIZE)
    deadline = time.monotonic() + 5
    while "cannot be told" not in server.text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert frontend.capacity() == 3 * SIZE
    frontend.close()


def test_only_the_cache_mode_can_be_written(serve: Serve, machine: Machine) -> None:
    """SET_CONFIG takes the byte wce, 0 or 1, and refuses everything else of the configuration space."""
    server = serve()
    frontend = machine.boot(server)
    assert frontend.config(32, 1) == b"\1"
    assert frontend.set_config(32, b"\0") == 0
    assert frontend.config(32, 1) == b"\0"
    for offset, data in ((0, bytes(8)), (31, b"\0\0"), (32, b"\0\0"), (32, b"\2"), (255, b"\0"), (32, b"")):
        assert frontend.set_config(offset, data) == 1
    assert frontend.set_config(32, b"\1", flags=1) == 0  # as after a migration
    assert frontend.config(32, 1) == b"\1"
    frontend.close()


@both_paths
@pytest.mark.parametrize("mode", ["writeback", "wce off", "no flush", "no wce"])
def test_what_a_driver_takes_for_durable_is_durable(serve: Serve, machine: Machine, path: str, mode: str) -> None:
    """A driver that knows no flush, or has switched the cache off, gets its write answered only after it is on the medium;
    seen by the server's system calls."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # in memory files are served by plain calls, not io_uring
        disk = Path(folder) / "disk.img"
        disk.write_bytes(bytes(SIZE))
        server = serve(path=path, source=str(disk))
        without = {"no flush": [Feature.FLUSH, Feature.CONFIG_WCE], "no wce": [Feature.CONFIG_WCE]}.get(mode, [])
        frontend = machine.boot(server, without=without)
        if mode == "wce off":
            assert frontend.set_config(32, b"\0") == 0
        trace = server.folder / "trace"
        with subprocess.Popen(
            ["strace", "-f", "-e", "trace=pwritev,pwritev2,pwrite64,fdatasync", "-o", trace, "-p", str(server.process.pid)],
            stderr=subprocess.PIPE,
        ) as strace:
            assert strace.stderr is not None
            assert b"attached" in strace.stderr.readline()
            assert machine.queue.write(0, noise(4096)) == OK
            assert machine.queue.read(0, 4096) == (OK, noise(4096))
            strace.terminate()
        text = trace.read_text()
        assert "pwrite" in text
        durable = "RWF_DSYNC" in text or "fdatasync" in text
        assert durable == (mode in ("wce off", "no flush")), text
        frontend.close()
        assert server.stop() == 0


# ------------------------------------------------------------------------------------------------ refusals


def test_unknown_features_are_refused(serve: Serve, machine: Machine) -> None:
    """A bit that was not offered is no; with REPLY_ACK the front-end hears it, without it is left."""
    server = serve()
    frontend = machine.boot(server)
    assert frontend.set_features(frontend.features | 1 << 40) == 1
    exercise(machine.queue, server)
    frontend.close()
    frontend = FakeFrontend.connect(server.socket)
    frontend.send(Request.SET_FEATURES, struct.pack("=Q", 1 << 40))
    assert frontend.gone()
    frontend.close()
    frontend = FakeFrontend.connect(server.socket)
    frontend.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", 1 << 8))
    assert frontend.gone()
    frontend.close()


NASTY = {
    "unknown": (4711, b"", 0),
    "wrong size": (Request.SET_FEATURES, b"x", 0),
    "queue 255": (Request.SET_VRING_NUM, struct.pack("=II", 255, 128), 0),
    "queue 2^32-1": (Request.SET_VRING_BASE, struct.pack("=II", 0xFFFFFFFF, 0), 0),
    "enable nothing": (Request.SET_VRING_ENABLE, struct.pack("=II", 200, 1), 0),
    "kick nothing": (Request.SET_VRING_KICK, struct.pack("=Q", 254), 1),
    "no descriptor": (Request.SET_VRING_CALL, struct.pack("=Q", 0), 0),
    "63 descriptors": (Request.GET_FEATURES, b"", 63),
    "200 descriptors": (Request.GET_FEATURES, b"", 200),
    "endless memory": (Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 0, 2**64 - 1, 0, 0), 1),
    "a region of a directory": (Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 0, 4096, 0, 0), -1),
    "config beyond": (Request.GET_CONFIG, struct.pack("=III", 200, 100, 0) + bytes(100), 0),
}


@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY.keys())
def test_nonsense_ends_the_conversation_only(serve: Serve, machine: Machine, nasty: tuple[int, bytes, int]) -> None:
    """A front-end that breaks the rules is left, with its descriptors closed; the next is served."""
    server = serve(queues=1)
    before = server.open_fds()
    request, payload, count = nasty
    frontend = FakeFrontend.connect(server.socket)
    directory = os.open("/", os.O_RDONLY)
    eventfd = os.eventfd(0)
    frontend.send(request, payload, [directory] * -count if count < 0 else [eventfd] * count)
    assert frontend.gone()
    frontend.close()
    os.close(directory)
    os.close(eventfd)
    until_alone(server)
    assert server.open_fds() == before
    frontend = machine.boot(server)
    exercise(machine.queue, server)
    frontend.close()


@pytest.mark.parametrize("num", [0, 1, 3, 65536, 0xFFFFFFFF])
def test_a_queue_has_a_size_that_can_be(serve: Serve, machine: Machine, num: int) -> None:
    """Powers of two up to 32768; the old size stays in force."""
    server = serve()
    frontend = machine.boot(server)
    assert frontend.set_num(0, num) == 1
    assert frontend.set_base(0, 65536) == 1
    exercise(machine.queue, server)
    frontend.close()


def test_a_slow_front_end_is_waited_for(serve: Serve, machine: Machine) -> None:
    """A message that arrives byte by byte is a message; half of one, with descriptors, is closed with the connection."""
    server = serve()
    before = server.open_fds()
    frontend = FakeFrontend.connect(server.socket)
    for byte in struct.pack("=III", Request.GET_FEATURES, 1, 0):
        frontend.send_raw(bytes([byte]))
        time.sleep(0.002)
    assert frontend.receive()[0] == Request.GET_FEATURES
    eventfd = os.eventfd(0)
    frontend.send_raw(struct.pack("=III", Request.SET_VRING_KICK, 1, 8) + b"\0", [eventfd])
    frontend.close()
    os.close(eventfd)
    until_alone(server)
    assert server.open_fds() == before
    assert "in the middle of a message" in server.text()


def test_one_who_does_not_read_is_left(serve: Serve, machine: Machine) -> None:
    """Questions without end and no answer taken: the server does not wait for room in the socket."""
    server = serve()
    frontend = FakeFrontend.connect(server.socket)
    question = struct.pack("=III", Request.GET_FEATURES, 1, 0)

    def ask_for_ever() -> None:
        for _ in range(100000):
            frontend.send_raw(question * 100)

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        ask_for_ever()
    frontend.close()
    frontend = machine.boot(server)
    exercise(machine.queue, server)
    frontend.close()


def test_random_messages_end_no_server(serve: Serve, machine: Machine) -> None:
    """Hundreds of conversations of random messages, many of them nearly right; afterwards the server serves as before."""
    server = serve(queues=2)
    chance = random.Random(20)
    region = GuestMemory(BASE, MIB)
    eventfd = os.eventfd(0)
    before = server.open_fds()

    def number() -> int:
        large = [BASE, BASE + USER_OFFSET, 2**31, 2**32 - 1, chance.getrandbits(64)]
        return chance.choice([0, 1, 2, 3, 128, 256, 0xFFFF, *large])

    for _ in range(300):
        frontend = FakeFrontend.connect(server.socket)
        frontend.connection.setblocking(False)
        try:
            for _ in range(chance.randrange(1, 30)):
                request = chance.choice([*Request, chance.randrange(64)])
                words = b"".join(struct.pack("=Q", number() % 2**64) for _ in range(chance.randrange(0, 8)))
                payload = chance.choice(
                    [
                        words,
                        struct.pack("=II", chance.randrange(3), number() % 2**32),
                        struct.pack("=Q", chance.randrange(2)),
                        bytes(8) + region.wire(),
                        struct.pack("=II", 1, 0) + region.wire(),
                        struct.pack("=IIQQQQ", chance.randrange(2), 0, *[region.user + 4096 * number() % MIB] * 3, 0),
                        struct.pack("=III", number() % 64, number() % 64, 0) + bytes(chance.randrange(64)),
                        chance.randbytes(chance.randrange(100)),
                    ]
                )
                fds = chance.choice([[], [], [eventfd], [region.fd], [eventfd, region.fd]])
                size = len(payload) if chance.random() < 0.95 else chance.choice([0, MAX_PAYLOAD, 2**32 - 1])
                frontend.send_raw(struct.pack("=III", request, chance.choice([1, 1, 1, 9, 0]), size) + payload, fds)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            pass
        frontend.close()
    region.close()
    os.close(eventfd)
    frontend = machine.boot(server)
    exercise(machine.queue, server)
    frontend.close()
    until_alone(server)
    assert server.open_fds() == before
    assert "bug" not in server.text(), server.text()


def test_a_front_end_cannot_fill_the_log(serve: Serve) -> None:
    """Nonsense a thousand times is some lines, and one that says how many were left out."""
    server = serve()
    for _ in range(1000):
        frontend = FakeFrontend.connect(server.socket)
        frontend.send(4711)
        assert frontend.gone()
        frontend.close()
    assert 10 < len(server.text().splitlines()) < 100


def test_a_broken_ring_is_reported_and_forgotten(serve: Serve, machine: Machine) -> None:
    """A driver that breaks the ring's rules stops its queue; the error descriptor says so, and the next start works."""
    server = serve()
    queue = machine.queue
    frontend = machine.boot(server)
    err = os.eventfd(0, os.EFD_CLOEXEC)
    assert frontend.set_err(0, err) == 0
    queue.put_u16(queue.avail + 2, 30000)
    os.eventfd_write(queue.kick_fd, 1)
    assert select.select([err], [], [], 10)[0]
    assert server.call("info")["queues"][0]["state"] == "broken"
    assert "avail.idx" in server.text()
    assert server.call("ping")["phase"] == "serving"
    frontend.close()
    os.close(err)
    until_alone(server)
    other = Machine()
    frontend = other.boot(server)
    exercise(other.queue, server)
    frontend.close()
    other.close()


# ------------------------------------------------------------------------------------------- socket, lifetime


def test_a_socket_somebody_listens_on_is_left_alone(serve: Serve, machine: Machine, tmp_path: Path) -> None:
    """A second server at the same path is refused; a dead server's socket is replaced; another file is not."""
    server = serve("one")
    with pytest.raises(AssertionError, match="somebody listens"):
        serve("two", exports=[f"vhost-user:{server.socket}"])
    server.kill()
    assert server.socket.exists()
    server.start()
    frontend = machine.boot(server)
    exercise(machine.queue, server)
    frontend.close()
    assert server.stop() == 0
    assert not server.socket.exists()
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(AssertionError, match="no socket"):
        serve("three", exports=[f"vhost-user:{plain}"])
    assert plain.read_text() == "precious"
    assert [path.name for path in server.folder.iterdir() if path.name.startswith(".")] == []


def test_a_disk_in_use_is_not_detached(serve: Serve, machine: Machine) -> None:
    """`detach` names the front-end's process; with force, or when the service manager says so, the server ends."""
    server = serve()
    frontend = machine.boot(server)
    with pytest.raises(ControlError, match=f"process {os.getpid()}") as caught:
        server.call("detach", force=False)
    assert caught.value.exit_code == Exit.BUSY
    exercise(machine.queue, server)
    assert server.stop() == 0
    assert frontend.gone()
    frontend.close()
    server.start()
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    server.call("detach", force=True)
    assert server.process.wait(10) == 0
    assert not server.socket.exists()
    frontend.close()


def test_one_writer_by_default(serve: Serve, tmp_path: Path) -> None:
    """Of two exports of a disk only the first may write; the other shows what is written; writable=1 is obeyed."""
    sockets = [tmp_path / name for name in ("first", "second", "third")]
    uris = [f"vhost-user:{socket}" for socket in sockets]
    uris[2] += "?writable=1"
    server = serve(exports=uris)
    machines = [Machine() for _ in sockets]
    frontends = []
    for machine, path in zip(machines, sockets, strict=True):
        frontend = FakeFrontend.connect(path)
        frontend.negotiate()
        frontend.set_memory(machine.queue.region)
        frontend.start_queue(0, machine.queue)
        frontends.append(frontend)
    assert [bool(frontend.features & Feature.RO.mask) for frontend in frontends] == [False, True, False]
    assert machines[0].queue.write(0, noise(4096)) == OK
    assert machines[1].queue.write(0, noise(4096, 2)) == IOERR
    assert machines[1].queue.read(0, 4096) == (OK, noise(4096))
    assert machines[2].queue.write(8, noise(4096, 3)) == OK
    assert machines[1].queue.read(8, 4096) == (OK, noise(4096, 3))
    server.call("resize", size=2 * SIZE)
    assert [frontend.capacity() for frontend in frontends] == [2 * SIZE] * 3
    info = server.call("info")
    assert [export["device"] for export in info["exports"]] == list(map(str, sockets))
    assert info["counters"]["write_ops"] == 3
    for frontend, machine in zip(frontends, machines, strict=True):
        frontend.close()
        machine.close()


def test_the_socket_is_for_whom_it_is_meant(serve: Serve) -> None:
    """0600, or 0660 and the group that was named; an unknown group is bad input."""
    server = serve("mine")
    assert server.socket.stat().st_mode & 0o777 == 0o600
    name = "daemon"
    server = serve("theirs", export=f"?group={name}")
    status = server.socket.stat()
    assert status.st_mode & 0o777 == 0o660
    assert status.st_gid == 1
    with pytest.raises(AssertionError, match="does not exist"):
        serve("nobody", export="?group=no-such-group")


def test_serve_and_attach_take_the_export(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`attach --export vhost-user:SOCKET` prints the socket, made absolute; `detach` removes it, a dead server's, too."""
    monkeypatch.setenv("VDUSE_BLK_RUN", str(tmp_path / "run"))
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    command = [sys.executable, "-m", "vduse_blk.cli"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("attach", "disk.img", "--export", "vhost-user:disk.sock")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/disk.sock\n"), done.stderr
    frontend = FakeFrontend.connect(tmp_path / "disk.sock")
    frontend.negotiate()
    frontend.set_memory(machine.queue.region)
    frontend.start_queue(0, machine.queue)
    assert machine.queue.write(0, noise(4096)) == OK
    assert str(tmp_path / "disk.sock") in run("list").stdout
    assert run("detach", "disk").returncode == Exit.BUSY
    frontend.close()
    deadline = time.monotonic() + 10
    while run("detach", "disk").returncode != 0:
        assert time.monotonic() < deadline
    assert not (tmp_path / "disk.sock").exists()
    assert run("attach", "disk.img", "--export", "vhost-user:disk.sock").returncode == 0
    with Client("disk") as client:
        os.kill(client.server_pid, signal.SIGKILL)
    assert (tmp_path / "disk.sock").exists()
    assert run("detach", "disk").returncode == 0
    assert not (tmp_path / "disk.sock").exists()
    for export, sentence in (
        ("nope", "'nope' does not exist"),
        ("vhost-user", "needs it"),
        ("vhost-user:", "needs a path"),
        ("vhost-user:x?colour=1", "no such option"),
        ("vduse:?client=1", "no such option"),
    ):
        done = run("attach", "disk.img", "--export", export)
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr
    assert list((tmp_path / "run").iterdir()) == []
