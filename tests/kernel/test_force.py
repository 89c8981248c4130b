"""detach --force is done soon whatever the server does, and the name is free afterwards.

The 5 seconds that are promised are held to where nothing is emulated, by the unit tests of the command. An emulated machine
may need as many just to start an interpreter, so what that takes here and now is allowed on top.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvduse.control import Control, DeviceConfig
from pyvduse.device import Device
from pyvduse.messages import SetStatus, decode_request, encode_response
from tests.exporters.servers import Machine
from tests.faulty import install_spinning
from tests.kernel.host import (
    CLI,
    RUN,
    Stuck,
    assert_nothing_left,
    cli,
    image,
    in_flight,
    info,
    leftovers,
    run,
    servers,
    wait_until,
)
from vduse_blk.control import notes
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError
from vduse_blk.control.process import read_stat
from vduse_blk.testing.driver import OK, OUT

MIB = 1 << 20
_STARTS = 4
"""A command that removes a disk by force imports this many times what `list` does."""


def remove_soon() -> None:
    """Remove disk k by force, within 5 seconds and what starting commands takes on this machine as it is now."""
    began = time.monotonic()
    run(*CLI, "list")
    most = 5 + _STARTS * (time.monotonic() - began)
    began = time.monotonic()
    done = cli("detach", "k", "--force")
    assert time.monotonic() - began < most, done.stderr


@contextmanager
def writer(device: str) -> Iterator[None]:
    """Somebody whose write waits; it fails in the end."""
    command = ["dd", "if=/dev/zero", f"of={device}", "bs=64k", "oflag=direct"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as dd:
        wait_until(lambda: in_flight(device) > 0, "a write is under way")
        yield
        assert dd.wait(60) != 0


def force(tmp_path: Path) -> None:
    """Remove disk k, in time, and attach another of its name."""
    remove_soon()
    assert_nothing_left("k")
    cli("attach", image(tmp_path / "other.img", 16 * MIB), "--name", "k")
    cli("detach", "k")
    assert_nothing_left("k")


def test_a_stopped_server(tmp_path: Path) -> None:
    """SIGSTOP, with a write that waits."""
    device = cli("attach", image(tmp_path / "disk.img", 16 * MIB), "--name", "k").stdout.strip()
    os.kill(servers()[0], signal.SIGSTOP)
    with writer(device):
        force(tmp_path)


def test_a_plugin_that_spins(tmp_path: Path) -> None:
    """Storage in Python that never gives the interpreter back."""
    install_spinning(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    device = run(*CLI, "attach", "spinning:?size=16M", "--name", "k", env=environment).stdout.strip()
    with writer(device):
        force(tmp_path)


def state_of(process: Path) -> str | None:
    """Of a process or thread, by its directory in ``/proc``; None if it has ended, which it may at any time."""
    try:
        return read_stat(process)[0]
    except OSError:
        return None


def hangs(pid: int) -> bool:
    """Whether a thread of the process waits uninterruptibly."""
    return any(state_of(thread) == "D" for thread in Path(f"/proc/{pid}/task").iterdir())


def is_open(device: str) -> bool:
    """Whether a process has the node of a VDUSE device open."""
    try:
        os.close(os.open(f"/dev/vduse/{device}", os.O_RDWR | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


def check_contents(device: str, disk: Path, text: bytes) -> None:
    """The disk is that file's."""
    fd = os.open(device, os.O_RDWR)
    try:
        os.pwrite(fd, text.ljust(4096, b"."), MIB)
        os.fsync(fd)
    finally:
        os.close(fd)
    with disk.open("rb") as file:
        file.seek(MIB)
        assert file.read(4096).rstrip(b".") == text


def test_a_server_that_hangs_in_the_kernel(tmp_path: Path) -> None:
    """On storage that does not answer, in a call that no signal ends. The disk goes, and the next one of its name is served,
    taken over, upgraded, shown and detached as any other, although the dead one's device cannot be destroyed. That goes with
    the next disk after the storage has answered."""
    disk = image(tmp_path / "other.img", 16 * MIB)
    stuck = Stuck(image(tmp_path / "stuck.img", 16 * MIB))
    try:
        device = cli("attach", f"file:{stuck.path}?direct=1", "--name", "k", "--path", "plugin").stdout.strip()
        (first,) = servers()
        stuck.stop()
        with writer(device):
            wait_until(lambda: hangs(first), "the server hangs")
            remove_soon()
        remnant = ["/dev/vduse/k", "/sys/class/vduse/k"]
        assert leftovers("k") == remnant
        assert is_open("k")
        assert cli("info", "k", check=False).returncode == cli("detach", "k", check=False).returncode == 3
        device = cli("attach", disk, "--name", "k").stdout.strip()
        assert os.path.realpath("/dev/vduse-blk/k") == device
        check_contents(device, disk, b"first")
        assert (info("k")["kernel_name"], info("k")["device"], info("k")["size"]) == ("k@2", device, 16 * MIB)
        assert "k@2" in cli("info", "k").stdout
        assert device in cli("list").stdout
        second = info("k")["pid"]
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: not is_open("k@2"), "the second server has ended")
        assert (info("k")["state"], info("k")["kernel_name"]) == ("dead", "k@2")
        assert cli("attach", disk, "--name", "k").stdout.strip() == device
        check_contents(device, disk, b"second")
        cli("upgrade", "k")
        check_contents(device, disk, b"third")
        assert "remnants" in cli("doctor", check=False).stdout
        cli("detach", "k")
        assert leftovers("k") == remnant
        assert is_open("k"), "it took too long to prove anything"
        stuck.go_on()
        wait_until(lambda: not is_open("k"), "the killed server has ended")
        cli("attach", disk, "--name", "k")
        assert "kernel_name" not in info("k")
        cli("detach", "k")
    finally:
        stuck.remove()
    assert_nothing_left()


def test_a_machine_whose_server_hangs_in_the_kernel(tmp_path: Path) -> None:
    """A disk for virtual machines, with a request that waits for storage: its front-end is hung up on in time, and the next
    disk of the name at the same socket is served while the killed server still hangs."""
    stuck = Stuck(image(tmp_path / "stuck.img", 16 * MIB))
    where = SimpleNamespace(socket=tmp_path / "socket")
    words = ("--name", "k", "--path", "plugin", "--export", f"vhost-user:{where.socket}")
    machine, other = Machine(), Machine()
    try:
        cli("attach", f"file:{stuck.path}?direct=1", *words)
        (first,) = servers()
        frontend = machine.boot(where)
        stuck.stop()
        machine.queue.request(OUT, out=bytes(4096))
        machine.queue.kick()
        wait_until(lambda: hangs(first), "the server hangs")
        remove_soon()
        assert hangs(first), "it took too long to prove anything"
        assert frontend.gone()
        frontend.close()
        assert leftovers("k") == []
        assert not where.socket.exists()
        cli("attach", image(tmp_path / "other.img", 16 * MIB), *words)
        frontend = other.boot(where)
        assert other.queue.write(0, b"next".ljust(4096)) == OK
        frontend.close()
        assert hangs(first), "it took too long to prove anything"
        cli("detach", "k")
        stuck.go_on()
        wait_until(lambda: servers() == [], "the killed server has ended")
    finally:
        stuck.remove()
        machine.close()
        other.close()
    assert_nothing_left()


def test_a_dead_server_whose_log_is_lost(tmp_path: Path) -> None:
    """Nobody may take such a disk over, but it goes, with what it has in flight."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    device = cli("attach", disk, "--name", "k").stdout.strip()
    (server,) = servers()
    os.kill(server, signal.SIGSTOP)
    with writer(device):
        (RUN / "k/inflight").unlink()
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: info("k")["state"] == "dead", "the server has ended")
        refused = cli("attach", disk, "--name", "k", check=False)
        assert refused.returncode == 1
        assert "inflight" in refused.stderr
        assert "detach k --force" in refused.stderr
        force(tmp_path)


def test_a_deletion_that_waits_for_an_answer(tmp_path: Path) -> None:
    """Its server has ended between two answers to the kernel, which deletes the disk for somebody who lives: the device is
    reset and out of sysfs. Whoever removes it by force answers in the server's place."""
    cli("attach", image(tmp_path / "disk.img", 16 * MIB), "--name", "k")
    os.kill(servers()[0], signal.SIGKILL)
    wait_until(lambda: info("k")["state"] == "dead", "the server has ended")
    with Device.open("k") as device, subprocess.Popen([sys.executable, "-P", "-m", "pyvduse.vdpa", "del", "k"]) as asking:
        reset = False
        while not reset:
            assert select.select([device.fd], [], [], 60)[0]
            raw = device.read_message()
            assert raw is not None
            request = decode_request(raw)
            device.write_response(encode_response(request.request_id, True))
            reset = isinstance(request, SetStatus) and request.status == 0
        assert select.select([device.fd], [], [], 60)[0]  # it asks once more
        device.close()
        assert not Path("/sys/bus/vdpa/devices/k").exists()
        force(tmp_path)
        assert asking.wait(60) == 0


def test_a_monitor_removes_what_its_hanging_server_kept(tmp_path: Path) -> None:
    """As soon as that has ended: no other disk has to come."""
    stuck = Stuck(image(tmp_path / "stuck.img", 16 * MIB))
    try:
        words = ("attach", f"file:{stuck.path}?direct=1", "--name", "k", "--path", "plugin", "--restart", "on-failure")
        device = cli(*words).stdout.strip()
        server = info("k")["pid"]
        stuck.stop()
        with writer(device):
            wait_until(lambda: hangs(server), "the server hangs")
            remove_soon()
        assert leftovers("k") == ["/dev/vduse/k", "/sys/class/vduse/k"]
        stuck.go_on()
        wait_until(lambda: leftovers("k") == [], "the remnant is removed")
    finally:
        stuck.remove()
    assert_nothing_left()


AT_RECEIVED = """
import mmap, os, runpy, signal, sys
import vduse_blk.exporter as exporter
def reached(step):
    if step == "received" and len(sys.argv) > 1:
        os.preadv(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], 0)
    elif step == "received":
        os.kill(os.getpid(), signal.SIGSTOP)
exporter.reached = reached
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""The new server of an upgrade, which stops when it has got everything, or reads from a device that does not answer."""


def opens(pid: int, path: str) -> bool:
    wanted = os.path.realpath(path)
    return any(os.path.realpath(fd) == wanted for fd in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize("state", ["T", "D"])
def test_the_new_server_of_an_upgrade_hangs(tmp_path: Path, state: str) -> None:
    """With all that was handed over, stopped or in a call that no signal ends: both servers are killed, and what the new one
    keeps in the kernel is a remnant until that call has ended."""
    stuck = Stuck(image(tmp_path / "stuck.img", MIB))
    failures: list[ControlError] = []

    def upgrade() -> None:
        command = [sys.executable, "-P", "-c", AT_RECEIVED, *([stuck.path] if state == "D" else [])]
        with Client("k", 120) as client, pytest.raises(ControlError) as failed:
            client.call("upgrade", command=command, patience=60)
        failures.append(failed.value)

    try:
        device = cli("attach", image(tmp_path / "disk.img", 16 * MIB), "--name", "k").stdout.strip()
        stuck.stop()
        asking = threading.Thread(target=upgrade)
        asking.start()
        wait_until(lambda: notes.read_state("k").get("successor") is not None, "the new server is started")
        successor = notes.read_state("k")["successor"]
        if state == "D":  # not because it reads a module
            wait_until(lambda: opens(successor, stuck.path), "the new server opens what does not answer")
        wait_until(lambda: state_of(Path(f"/proc/{successor}")) == state, "the new server hangs")
        with writer(device):
            remove_soon()
        asking.join(60)
        assert failures
        remnant = ["/dev/vduse/k", "/sys/class/vduse/k"] if state == "D" else []
        assert leftovers("k") == remnant
        device = cli("attach", image(tmp_path / "other.img", 16 * MIB), "--name", "k").stdout.strip()
        check_contents(device, tmp_path / "other.img", b"next")
        stuck.go_on()
        wait_until(lambda: state_of(Path(f"/proc/{successor}")) in (None, "Z"), "the new server has ended")
        cli("detach", "k")
    finally:
        stuck.remove()
    assert_nothing_left()


def test_another_programs_device_is_not_taken_for_a_remnant(tmp_path: Path) -> None:
    """Without a vdpa device and open, as a remnant is: an attach of its name is refused, and it stays."""
    disk = image(tmp_path / "disk.img", MIB)
    with Control.open() as control:
        config = DeviceConfig(name="k", device_id=2, features=1 << 32 | 1 << 33, config=bytes(60), vq_num=1)
        control.create(config)
        try:
            with Device.open("k"):
                refused = cli("attach", disk, "--name", "k", check=False)
                assert refused.returncode == 4
                assert "another program" in refused.stderr
                assert is_open("k")
        finally:
            control.destroy("k")
    assert_nothing_left()


@contextmanager
def waiting_successor(
    folder: Path, path: str, has_begun: Callable[[int], bool]
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A killed server, and an ``attach`` that waits for its I/O. ``has_begun``: the server has some under way. After the
    block the storage goes on, and so must the successor, and a write that the first one had begun."""
    stuck = Stuck(image(folder / "stuck.img", 16 * MIB))
    words = [*CLI, "attach", f"file:{stuck.path}?direct=1", "--name", "k", "--path", path]
    try:
        device = run(*words).stdout.strip()
        (first,) = servers()
        stuck.stop()
        write = ["dd", "if=/dev/zero", f"of={device}", "bs=64k", "count=4", "oflag=direct", "status=none"]
        with subprocess.Popen(write) as dd:
            wait_until(lambda: has_begun(first), "the server has begun")
            os.kill(first, signal.SIGKILL)
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as attach:
                wait_until(lambda: "waiting for the last I/O" in (RUN / "k/log").read_text(), "the successor waits")
                yield first, attach
                stuck.go_on()
                said, _ = attach.communicate(timeout=120)
            assert (attach.returncode, said.strip()) == (0, device)
            assert dd.wait(60) == 0
        cli("detach", "k")
    finally:
        stuck.remove()
    assert_nothing_left()


def test_a_successor_waits_for_a_server_that_hangs_in_the_kernel(tmp_path: Path) -> None:
    """One that was killed: what it has under way lands before anything of the next one, which starts when it has ended."""
    with waiting_successor(tmp_path, "plugin", hangs):
        assert is_open("k")
        assert info("k")["state"] == "dying"


def test_a_successor_waits_for_io_that_no_thread_waits_for(tmp_path: Path) -> None:
    """What io_uring has under way on a device outlives the killed server without a trace among the processes: the successor
    starts when it has landed."""
    with waiting_successor(tmp_path, "native", lambda _: info("k")["counters"]["inflight"] > 0) as (first, attach):
        wait_until(lambda: first not in servers(), "the server has ended")
        assert attach.poll() is None
