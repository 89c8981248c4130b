"""A new server takes a disk over from one that runs; the front-end keeps its connection and notices nothing but a pause."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import MIB, SIZE, Machine, Server
from vduse_blk.exporters.vhost_user.messages import Request

from tests.faulty import AFTER, BEFORE, NEW, WITHOUT_THREADS
from vduse_blk.cli import detach as detach_command
from vduse_blk.control import notes, rundir
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, Hangup
from vduse_blk.control.process import read_stat, server_process
from vduse_blk.control.settings import SETTINGS_ENV
from vduse_blk.control.status import disk_status
from vduse_blk.exporter import KILL_ENV, counters_of
from vduse_blk.testing.driver import IOERR, OK
from vduse_blk.testing.frontend import FakeFrontend

Serve = Callable[..., Server]
COMMAND = [sys.executable, "-P", "-m", "vduse_blk.worker"]
both_paths = pytest.mark.parametrize("path", ["native", "plugin"])


class Load:
    """Writes and reads back, on a thread of its own, as fast as it can; remembers the longest wait for an answer."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ending = threading.Event()
        self._turned = threading.Condition()
        self.turns = 0
        self.longest = 0.0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        queue = self._machine.queue
        source = random.Random(1)
        try:
            while not self._ending.is_set():
                began = time.monotonic()
                sector = source.randrange(0, 8192, 8)
                data = source.randbytes(16384)
                assert queue.write(sector, data, pieces=4) == OK
                assert queue.read(sector, len(data)) == (OK, data)
                queue.reset_heap()
                with self._turned:
                    self.longest = max(self.longest, time.monotonic() - began)
                    self.turns += 1
                    self._turned.notify_all()
        except BaseException as error:
            with self._turned:
                self.failure = error
                self._turned.notify_all()

    def wait(self, turns: int = 20) -> None:
        """Until so many more have been answered."""
        with self._turned:
            goal = self.turns + turns
            assert self._turned.wait_for(lambda: self.turns >= goal or self.failure is not None, 30)
        assert self.failure is None, self.failure

    def end(self) -> None:
        self._ending.set()
        self._thread.join(30)
        assert self.failure is None, self.failure


def upgrade(server: Server, *command: str, environment: str = "") -> dict[str, Any]:
    words = list(command) or (["env", environment, *COMMAND] if environment else COMMAND)
    return server.call("upgrade", command=words, patience=20)


def owner(server: Server) -> int:
    return int(server.call("info")["pid"])


def detach(server: Server) -> None:
    """And wait for the end of whoever serves it."""
    server.process.wait(10)
    with Client("d") as client, server_process(client.server_pid) as end:
        assert client.server_pid == client.call("info")["pid"]
        client.call("detach", force=True)
        if end is not None:
            assert select.select([end], [], [], 10)[0]
    assert not (server.folder / "run" / "d").exists()
    assert not server.socket.exists()


@both_paths
def test_fifty_upgrades_under_load(serve: Serve, machine: Machine, path: str) -> None:
    """Fifty servers, one after another, under a load that checks what it reads: no error, one connection, short pauses."""
    server = serve(path=path)
    frontend = machine.boot(server)
    load = Load(machine)
    pauses, pids = [], {server.process.pid}
    for _ in range(50):
        load.wait()
        said = upgrade(server)
        pauses.append(said["pause"] * 1000)
        pids.add(said["pid"])
        assert owner(server) == said["pid"]
    load.wait()
    load.end()
    assert len(pids) == 51
    assert server.process.wait(10) == 0
    assert server.call("info")["frontend"] == os.getpid()
    print(
        f"\nupgrade, {path}: pause median {statistics.median(pauses):.1f} ms, maximum {max(pauses):.1f} ms; "
        f"longest request {load.longest * 1000:.1f} ms"
    )
    assert statistics.median(pauses) < 500
    frontend.close()
    detach(server)


def test_everything_of_a_session_goes_along(serve: Serve) -> None:
    """Several queues, a log of requests in flight, the size and the back-end's channel: all work as before afterwards, and
    others may connect when the front-end has left."""
    server = serve(queues=4)
    machine = Machine(queues=4)
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    inflight = frontend.get_inflight(4, 64)
    assert frontend.set_inflight(inflight) == 0
    assert frontend.set_memory(*(queue.region for queue in machine.queues)) == 0
    for index, queue in enumerate(machine.queues):
        frontend.start_queue(index, queue)
    for turn in range(3):
        for index, queue in enumerate(machine.queues):
            data = random.Random(turn * 4 + index).randbytes(65536)
            assert queue.write(index * 512, data) == OK
            upgraded = upgrade(server) if index == turn else None
            assert queue.read(index * 512, len(data)) == (OK, data)
            assert upgraded is None or owner(server) == upgraded["pid"]
            queue.reset_heap()
    server.call("resize", size=16 * MIB)
    frontend.backend_message()
    assert frontend.capacity() == 16 * MIB
    frontend.close()
    inflight.close()
    machine.close()
    second = Machine()
    frontend = second.boot(server)
    assert second.queue.write(0, bytes(4096)) == OK
    upgrade(server)
    assert second.queue.read(0, 4096) == (OK, bytes(4096))
    frontend.close()
    second.close()
    detach(server)


OF_AN_OLDER_VERSION = """
import runpy
from vduse_blk.exporters.vhost_user.server import FrontendServer
receive = FrontendServer.receive
def receive_less(self, handed):
    del handed.facts["counters"]
    receive(self, handed)
FrontendServer.receive = receive_less
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""A new server that is told what older ones tell."""


@both_paths
def test_counters_go_along(serve: Serve, path: str) -> None:
    """Of each queue, of operations, bytes and errors: through an upgrade, one that failed, and of queues that are stopped. A
    server that is not told begins anew."""
    server = serve(queues=2, path=path, export="?writable=1")
    machine = Machine(queues=2)
    frontend = machine.boot(server)

    def count() -> list[dict[str, int]]:
        return [queue["counters"] for queue in server.call("info")["queues"]]

    def use() -> None:
        assert machine.queues[0].write(0, bytes(4096)) == OK
        assert machine.queues[1].read(8, 512) == (OK, bytes(512))
        assert machine.queues[1].write(SIZE // 512, bytes(512)) == IOERR

    def check(times: int) -> None:
        first, second = count()
        assert (first["write_ops"], first["write_bytes"], first["read_ops"]) == (times, 4096 * times, 0)
        assert (second["read_ops"], second["read_bytes"], second["write_errors"]) == (times, 512 * times, times)
        assert server.call("info")["counters"]["write_bytes"] == 4096 * times
        assert first["inflight"] == second["inflight"] == 0

    use()
    check(1)
    upgrade(server)
    check(1)
    use()
    check(2)
    with pytest.raises(ControlError, match="signal 9"):
        upgrade(server, environment=f"{KILL_ENV}=received")
    check(2)
    use()
    frontend.close()
    while server.call("info")["frontend"] is not None:
        time.sleep(0.01)
    upgrade(server)
    check(3)
    for queue in machine.queues:
        queue.reset_ring()
    frontend = machine.boot(server)
    use()
    check(4)
    upgrade(server, sys.executable, "-P", "-c", OF_AN_OLDER_VERSION)
    use()
    check(1)
    frontend.close()
    machine.close()
    detach(server)


@pytest.mark.parametrize("said", [None, [], {"0": 5}, {"x": {"read_ops": 1}}, {"-1": {"read_ops": 1}}])
def test_counters_that_cannot_be_any_count_nothing(said: object) -> None:
    assert not any(counters_of({"counters": said}).values())
    assert counters_of({"counters": {"1": {"read_ops": 1, "read_bytes": "x", "write_ops": -1}}}) == {1: {"read_ops": 1}}


def test_without_a_front_end(serve: Serve, machine: Machine) -> None:
    """The socket itself is handed over."""
    server = serve()
    upgrade(server)
    upgrade(server)
    frontend = machine.boot(server)
    assert machine.queue.write(0, bytes(4096)) == OK
    frontend.close()
    detach(server)


def check_goes_on(server: Server, load: Load, pid: int) -> None:
    load.wait()
    assert owner(server) == pid
    assert Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("inflight", [False, True], ids=["plain", "inflight"])
def test_a_new_server_that_fails_changes_nothing(serve: Serve, machine: Machine, inflight: bool) -> None:
    """It cannot be started, dies at any step, is another program, or finds other storage: the old one serves on, under load,
    and the next upgrade works."""
    server = serve()
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    area = frontend.get_inflight(1, 64) if inflight else None
    if area is not None:
        assert frontend.set_inflight(area) == 0
    assert frontend.set_memory(machine.queue.region) == 0
    frontend.start_queue(0, machine.queue)
    load = Load(machine)
    pid = server.process.pid
    failures = [
        (("/nowhere/python",), "", "cannot be started"),
        (("/bin/false",), "", "ended with status 1"),
        ((sys.executable, "-c", "import socket; raise SystemExit(3)"), "", "ended with status 3"),
        (("env", "VDUSE_BLK_RUN=/" + 200 * "x", *COMMAND), "", ""),
    ]
    # Without the log nobody could tell what a server that was killed after its start had in flight.
    steps = NEW if inflight else NEW[:-1]
    failures += [((), f"{KILL_ENV}={step}", "signal 9") for step in steps]
    for command, environment, text in failures:
        with pytest.raises(ControlError, match=r"served as before|cannot be started") as failure:
            upgrade(server, *command, environment=environment)
        assert text in str(failure.value)
        check_goes_on(server, load, pid)
    os.rename(server.image, server.folder / "old")
    server.image.write_bytes(bytes(SIZE))
    with pytest.raises(ControlError, match="not the same file any more"):
        upgrade(server)
    os.rename(server.folder / "old", server.image)
    assert upgrade(server)["pid"] != pid
    load.wait()
    load.end()
    frontend.close()
    if area is not None:
        area.close()
    detach(server)


def test_a_front_end_without_a_log_is_left_when_nobody_knows(serve: Serve, machine: Machine) -> None:
    """A new server dies just after it began, and a front-end has no log: as after any crash it must connect again."""
    server = serve()
    frontend = machine.boot(server)
    with pytest.raises(ControlError, match="served as before"):
        upgrade(server, environment=f"{KILL_ENV}=restarted")
    assert frontend.gone()
    frontend.close()
    again = machine.boot(server)
    again.close()


@pytest.mark.parametrize("step", AFTER)
def test_a_new_server_with_everything_needs_the_old_one_no_more(tmp_path: Path, machine: Machine, step: str) -> None:
    """The old one is killed when it has handed the disk over: the load goes on with the new one."""
    server = Server(tmp_path, environment={KILL_ENV: step})
    frontend = machine.boot(server)
    load = Load(machine)
    load.wait()
    with pytest.raises(Hangup):
        upgrade(server)
    assert server.process.wait(10) == -9
    load.wait()
    deadline = time.monotonic() + 10
    while disk_status("d").state != "serving":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert owner(server) != server.process.pid
    load.end()
    frontend.close()
    detach(server)


@pytest.mark.parametrize("step", BEFORE)
def test_an_old_server_that_dies_early_is_as_dead_as_any(tmp_path: Path, machine: Machine, step: str) -> None:
    """The new one has nothing yet and ends; the disk is attached again as after any crash."""
    server = Server(tmp_path, environment={KILL_ENV: step})
    with pytest.raises(Hangup):
        upgrade(server)
    assert server.process.wait(10) == -9
    server.environment.clear()
    server.start()
    frontend = machine.boot(server)
    assert machine.queue.write(0, bytes(4096)) == OK
    frontend.close()
    assert server.stop() == Exit.OK


def test_a_new_server_whose_old_one_has_ended_says_so(tmp_path: Path) -> None:
    """An old server that is killed while the new one imports everything is no bug of the new one's."""
    (tmp_path / "run/d").mkdir(mode=0o700, parents=True)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    ours, theirs = socket.socketpair()
    ours.close()
    export = f"vhost-user:{tmp_path / 'socket'}"
    spec = {"name": "d", "source": str(image), "exports": [export], "upgrade_fd": theirs.fileno()}
    new = subprocess.run(
        COMMAND,
        input=json.dumps(spec),
        env=os.environ | {"VDUSE_BLK_RUN": str(tmp_path / "run")},
        pass_fds=(theirs.fileno(),),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    theirs.close()
    assert new.returncode == Exit.FAILED
    assert "the old server has not handed the disk over" in new.stderr
    assert "Traceback" not in new.stderr


def test_a_new_server_that_dies_when_the_disk_is_its_own(tmp_path: Path, machine: Machine) -> None:
    """The old one has ended by then or does; the disk is attached again as after any crash."""
    server = Server(tmp_path)
    frontend = machine.boot(server)
    assert machine.queue.write(0, b"x" * 4096) == OK
    with pytest.raises(ControlError, match=r"process \d+'s now.*ended by signal 9"):
        upgrade(server, environment=f"{KILL_ENV}=took-over")
    assert server.process.wait(10) == Exit.OK
    assert frontend.gone()
    frontend.close()
    server.start()
    machine.queue.reset_ring()
    frontend = machine.boot(server)
    assert machine.queue.read(0, 4096) == (OK, b"x" * 4096)
    frontend.close()
    assert server.stop() == Exit.OK


def test_what_does_not_end_is_not_upgraded(serve: Serve, machine: Machine) -> None:
    """A request hangs in the storage: the upgrade is refused, the request does not fail, and the disk serves on."""
    server = serve(filters=["faults?on=write&hang=1"])
    frontend = machine.boot(server)
    answers: list[int] = []
    writer = threading.Thread(target=lambda: answers.append(machine.queue.write(0, bytes(4096))))
    writer.start()
    while not server.call("info")["counters"].get("inflight"):
        assert writer.is_alive()
    with pytest.raises(ControlError, match="has not ended within") as refused:
        upgrade(server)
    assert refused.value.exit_code == Exit.TIMEOUT
    server.call("set", values={"faults.hang": "0"})
    writer.join(10)
    assert answers == [OK]
    upgrade(server)
    assert machine.queue.read(0, 4096) == (OK, bytes(4096))
    frontend.close()
    detach(server)


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_what_is_set_during_an_upgrade_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The new server was started with the settings of before. What is set while it imports everything, and what SIGHUP
    reads, are those of whoever serves the disk afterwards, and of the one after that."""
    monkeypatch.setenv(SETTINGS_ENV, str(tmp_path))
    server = Server(tmp_path, filters=["faults"])
    environment = f"{KILL_ENV}=reopened" if fails else "NOTHING=1"
    script = 'while ! [ -e "$0" ]; do sleep 0.02; done; exec "$@"'
    command = ["sh", "-c", script, str(tmp_path / "go"), "env", environment, *COMMAND]
    said: list[object] = []

    def ask() -> None:
        try:
            said.append(upgrade(server, *command)["pid"])
        except ControlError as error:
            said.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 10
    while "successor" not in notes.read_state("d"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.call("set", values={"on-error": "wait", "faults.delay": "0.01ms"})
    (tmp_path / "d.settings").write_text("on-full=wait\n")
    server.process.send_signal(signal.SIGHUP)
    server.call("ping")  # the signal has come: it was sent before
    (tmp_path / "go").touch()
    asking.join(30)
    pid = owner(server)
    assert said == [pid] if not fails else pid == server.process.pid

    def check() -> None:
        deadline = time.monotonic() + 10
        while (info := server.call("info"))["policy"] != {"on_error": "wait", "on_full": "wait"}:
            assert time.monotonic() < deadline, info
            time.sleep(0.01)
        assert info["filters"][0]["options"] == "delay=0.00001"

    check()
    (tmp_path / "d.settings").unlink()
    assert upgrade(server)["pid"] == owner(server)
    check()
    detach(server)


@both_paths
def test_lost_data_stays_lost(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The kernel tells of lost data once. Every flush after it fails: after an upgrade that failed, one that was done, a
    death, a start whose storage was away, and a restart of the service; until the disk is detached. What C notes is in
    tests/core/test_target_file.py; here the mark is set for it, in the memory it shares with whoever looks."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "real = os.fdatasync\n"
        "def once(fd):\n"
        f"    if os.path.exists({str(tmp_path / 'fail')!r}):\n"
        f"        os.unlink({str(tmp_path / 'fail')!r})\n"
        "        raise OSError(5, 'Input/output error')\n"
        "    real(fd)\n"
        "os.fdatasync = once\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server = Server(tmp_path, path=path)
    frontend = machine.boot(server)

    def check(*, lost: bool) -> None:
        assert machine.queue.write(0, bytes(4096)) == OK
        assert machine.queue.flush() == (IOERR if lost else OK)

    def start_again() -> None:
        nonlocal frontend
        frontend.close()
        server.start()
        machine.queue.reset_ring()
        frontend = machine.boot(server)

    check(lost=False)
    mark = tmp_path / "run" / "d" / "lost"
    if path == "plugin":
        (tmp_path / "fail").touch()
        check(lost=True)
        assert not (tmp_path / "fail").exists()
    else:
        with mark.open("r+b") as file:
            file.write(b"\1")
    check(lost=True)
    assert mark.read_bytes() == b"\1\0\0\0"
    with pytest.raises(ControlError, match="signal 9"):
        upgrade(server, environment=f"{KILL_ENV}=reopened")
    check(lost=True)
    said = upgrade(server)
    assert server.process.wait(10) == 0
    check(lost=True)
    with server_process(said["pid"]) as end:
        os.kill(said["pid"], signal.SIGKILL)
        assert end is not None
        assert select.select([end], [], [], 10)[0]
    server.image.rename(tmp_path / "away")
    with pytest.raises(AssertionError, match="does not exist"):
        server.start()
    (tmp_path / "away").rename(server.image)
    start_again()
    check(lost=True)
    assert "data is lost; every flush fails until the disk is detached" in server.text()
    server.call("set", values={"on-error": "wait"})
    assert server.stop() == Exit.OK  # a restart, under a front-end that connects again
    start_again()
    check(lost=True)
    assert server.call("info")["policy"]["on_error"] == "wait"
    server.call("detach", force=True)
    assert server.process.wait(10) == 0
    start_again()
    check(lost=False)
    frontend.close()
    assert server.stop() == Exit.OK


def test_a_mark_of_lost_data_is_the_storages(tmp_path: Path, machine: Machine) -> None:
    """Other storage under the name of a disk that died, and of which nothing else is known, has lost nothing."""
    server = Server(tmp_path)
    server.kill()
    (tmp_path / "run/d/disk.json").unlink()
    (tmp_path / "run" / "d" / "lost").write_bytes(b"\1\0\0\0")
    server._spec["source"] = f"file:{tmp_path / 'other.img'}?size=8M"
    server.start()
    frontend = machine.boot(server)
    assert machine.queue.flush() == OK
    frontend.close()
    assert server.stop() == Exit.OK


@pytest.mark.parametrize("words", ["source", "option"])
def test_a_size_was_for_making_the_disk(tmp_path: Path, words: str) -> None:
    """A disk that was made with a size and has grown is upgraded, served on after an upgrade that failed, and served again
    after its server was killed, with the words it was made with."""
    image = tmp_path / "made.img"
    given = {"source": f"file:{image}?size=1M"} if words == "source" else {"source": str(image), "size": MIB}
    server = Server(tmp_path, **given)
    server.call("resize", size=2 * MIB)
    with pytest.raises(ControlError, match="signal 9"):
        upgrade(server, environment=f"{KILL_ENV}=reopened")
    assert server.call("info")["size"] == 2 * MIB
    said = upgrade(server)
    assert owner(server) == said["pid"]
    assert server.process.wait(10) == 0
    assert server.call("info")["size"] == 2 * MIB
    with server_process(said["pid"]) as end:
        os.kill(said["pid"], signal.SIGKILL)
        assert end is not None
        assert select.select([end], [], [], 10)[0]
    server.start()
    assert server.call("info")["size"] == 2 * MIB
    assert server.stop() == Exit.OK


def test_a_start_that_fails_leaves_what_was_left(tmp_path: Path) -> None:
    """A disk whose server died, and whose storage is away when the next one starts, is still known as one that was served:
    its file is not made anew, and the one after that serves it, or it is detached."""
    image = tmp_path / "made.img"
    server = Server(tmp_path, source=f"file:{image}?size=1M")
    server.call("resize", size=2 * MIB)
    server.kill()
    image.rename(tmp_path / "away")
    with pytest.raises(AssertionError, match="does not exist"):
        server.start()
    assert server.process.wait(10) != 0
    assert not image.exists()
    assert disk_status("d").state == "dead"
    (tmp_path / "away").rename(image)
    in_the_way = tmp_path / "run" / "d" / "state.json.new"  # no room for the state
    in_the_way.mkdir()
    with pytest.raises(AssertionError, match=r"cannot write .*state.json"):
        server.start()
    in_the_way.rmdir()
    assert (tmp_path / "run" / "d" / "served.json").exists()
    server.start()
    assert server.call("info")["size"] == 2 * MIB
    server.call("detach")
    assert server.process.wait(10) == 0
    assert not (tmp_path / "run" / "d").exists()


def test_storage_that_ends_with_its_server_is_refused(serve: Serve) -> None:
    """Memory cannot be handed over: the sentence says so."""
    server = serve(source="memory:1M")
    with pytest.raises(ControlError, match="ends with its server") as refused:
        upgrade(server)
    assert refused.value.exit_code == Exit.UNSUPPORTED


def test_the_command_and_the_monitor(tmp_path: Path, machine: Machine) -> None:
    """`upgrade` says who serves and how long users waited; the monitor watches the new server from then on, and starts
    another when it dies; `detach` ends them all; a disk that is not there is exit 3."""
    environment = os.environ | {rundir.RUN_ENV: str(tmp_path / "run")}
    os.environ[rundir.RUN_ENV] = environment[rundir.RUN_ENV]
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "vduse_blk.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)

    assert cli("upgrade", "d").returncode == Exit.NOT_FOUND
    path = tmp_path / "socket"
    options = ("--name", "d", "--restart", "on-failure", "--export", f"vhost-user:{path}")
    made = cli("attach", str(tmp_path / "disk.img"), *options)
    assert made.returncode == 0, made.stderr
    before = disk_status("d").info
    said = json.loads(cli("upgrade", "d", "--json").stdout)
    assert said.keys() == {"ok", "name", "pid", "version", "pause_ms"}
    assert cli("upgrade", "d").stderr.startswith("vduse-blk: disk 'd' is served by version ")
    now = disk_status("d").info
    assert now["monitor"] == before["monitor"]
    assert len({before["pid"], said["pid"], now["pid"]}) == 3
    assert [event["event"] for event in now["events"]] == ["upgraded", "upgraded"]
    with server_process(now["pid"]) as end:
        os.kill(now["pid"], signal.SIGKILL)
        assert end is not None
        assert select.select([end], [], [], 10)[0]
    deadline = time.monotonic() + 30
    while (after := disk_status("d")).state != "serving":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert after.info["pid"] != now["pid"]
    assert after.info["monitor"] == before["monitor"]
    assert after.info["events"][-1]["signal"] == 9
    with server_process(before["monitor"]) as end:
        assert cli("detach", "d").returncode == 0
        assert end is None or select.select([end], [], [], 10)[0]


def test_a_stopped_server_is_not_upgraded_later(serve: Serve) -> None:
    """`upgrade --timeout` is kept, and what nobody waits for any more does not happen when the server goes on: it would die
    of it."""
    server = serve(environment={KILL_ENV: "upgrade-asked"})
    assert server.call("info")["phase"] == "serving"
    server.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        command = [sys.executable, "-P", "-m", "vduse_blk.cli", "upgrade", "d", "--timeout", "1"]
        assert subprocess.run(command, check=False, timeout=60).returncode == Exit.TIMEOUT
        assert time.monotonic() - began < 20
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert server.call("info")["phase"] == "serving"  # it has heard all that came before this
    assert notes.read_events("d") == []
    assert server.process.poll() is None


class Systemd:
    """Who reads $NOTIFY_SOCKET: datagrams, each with the process that has sent it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.settimeout(30)
        self._socket.bind(str(path))

    def message(self) -> tuple[int, str]:
        text, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
        ((level, kind, credentials),) = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        return int(struct.unpack("=iII", credentials)[0]), text.decode()

    def is_silent(self) -> bool:
        return not select.select([self._socket], [], [], 0)[0]

    def close(self) -> None:
        self._socket.close()


AT_REPLACED = """
import os, signal
import vduse_blk.exporter as exporter
reached = exporter.reached
def stop(step):
    reached(step)
    if step == "replaced":
        os.kill(os.getpid(), signal.SIGSTOP)
exporter.reached = stop
"""
"""For sitecustomize: an old server stops when the disk is the new one's, before it has told anybody."""


def test_what_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old server, which is the unit's main process, says who is it now; only then does the new one say anything, for
    systemd does not listen to others. An upgrade that fails is nobody's business but the command's."""
    (tmp_path / "sitecustomize.py").write_text(AT_REPLACED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    systemd = Systemd(tmp_path / "notify")
    server = Server(tmp_path)
    old = server.process.pid
    serving = f"READY=1\nSTATUS=serving {server.socket}"
    assert systemd.message() == (old, serving)
    with pytest.raises(ControlError, match="served as before"):
        upgrade(server, environment=f"{KILL_ENV}=reopened")
    said: list[int] = []
    asking = threading.Thread(target=lambda: said.append(upgrade(server)["pid"]))
    asking.start()
    deadline = time.monotonic() + 30
    while read_stat(Path(f"/proc/{old}"))[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while (new := owner(server)) == old:
        assert time.monotonic() < deadline
    assert systemd.is_silent()
    server.process.send_signal(signal.SIGCONT)
    assert systemd.message() == (old, f"MAINPID={new}")
    assert systemd.message() == (new, serving)
    asking.join(30)
    assert said == [new]
    assert server.process.wait(10) == 0
    with server_process(new) as end:
        os.kill(new, signal.SIGTERM)
        assert end is not None
        assert select.select([end], [], [], 10)[0]
    assert [systemd.message() for _ in range(2)] == [(new, "STATUS=detaching"), (new, "STOPPING=1")]
    assert systemd.is_silent()
    systemd.close()


def test_no_room_for_a_control_socket(serve: Serve, machine: Machine) -> None:
    """A new server whose socket cannot be made is refused while the old one can go on; one whose socket cannot be put into
    its place serves the disk without, says so, and ends by a signal."""
    server = serve()
    frontend = machine.boot(server)
    load = Load(machine)
    run = server.folder / "run" / "d"
    for name in ("control.new", "control.next"):
        (run / name).mkdir()
    with pytest.raises(ControlError, match=r"directory.*served as before"):
        upgrade(server)
    check_goes_on(server, load, server.process.pid)
    for name in ("control.new", "control.next"):
        (run / name).rmdir()
    (run / "state.json.new").mkdir()  # a monitor would not know the new server
    with pytest.raises(ControlError, match=r"cannot write .*state.json.*served as before"):
        upgrade(server)
    check_goes_on(server, load, server.process.pid)
    (run / "state.json.new").rmdir()
    with Client("d") as client:
        (run / "control.sock").unlink()
        (run / "control.sock").mkdir()
        with pytest.raises(ControlError, match=r"process \d+'s now.*no control socket"):
            client.call("upgrade", command=COMMAND, patience=20)
    assert server.process.wait(10) == Exit.OK
    load.wait()
    load.end()
    frontend.close()
    (run / "control.sock").rmdir()
    pid = notes.read_state("d")["pid"]
    with server_process(pid) as end:
        os.kill(pid, signal.SIGTERM)
        assert end is not None
        assert select.select([end], [], [], 10)[0]
    assert not run.exists()


STOPPED = """
import os, runpy, signal, sys
import vduse_blk.worker.upgrade as upgrade
def reached(step):
    if step == "received":
        os.kill(os.getpid(), signal.SIGSTOP)
upgrade.reached = reached
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""A new server that hangs when it has got everything but opened nothing."""


def test_force_ends_both_servers_of_an_upgrade(serve: Serve, machine: Machine) -> None:
    """A new server that hangs with all that was handed over goes with the old one; nothing of the disk is left."""
    server = serve()
    frontend = machine.boot(server)

    def ask() -> None:
        with pytest.raises(ControlError):
            upgrade(server, sys.executable, "-P", "-c", STOPPED)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 20
    while (pid := notes.read_state("d").get("successor")) is None or read_stat(Path(f"/proc/{pid}"))[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with server_process(pid) as end:
        assert end is not None
        command = [sys.executable, "-P", "-m", "vduse_blk.cli", "detach", "d", "--force"]
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        try:
            assert made.returncode == 0, made.stderr
            assert select.select([end], [], [], 5)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
    asking.join(30)
    assert server.process.wait(10) == -9
    assert not (server.folder / "run" / "d").exists()
    assert not server.socket.exists()
    assert frontend.gone()
    frontend.close()


UNSETTLED = """
import os, runpy, signal
import vduse_blk.worker.disk as disk
noted = disk.Disk.note_state
def note_state(self):
    noted(self)
    os.kill(os.getpid(), signal.SIGSTOP)
disk.Disk.note_state = note_state
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""A new server that hangs when the disk is its own and noted as such, and the old one waits to hear that it is settled."""


@pytest.mark.parametrize("settles", [True, False])
def test_force_that_an_upgrade_overtakes_ends_the_new_server(serve: Serve, settles: bool) -> None:
    """`detach --force` has reached the old server when the disk becomes the new one's: that one is killed or asked, too, and
    does not serve on with nobody knowing it."""
    server = serve()
    old = server.process.pid

    def ask() -> None:
        with contextlib.suppress(ControlError):
            upgrade(server, *(COMMAND if settles else (sys.executable, "-P", "-c", UNSETTLED)))

    assert owner(server) == old
    with Client("d") as client, server_process(old) as end:
        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 20
        while (pid := notes.read_state("d")["pid"]) == old or (not settles and read_stat(Path(f"/proc/{pid}"))[0] != "T"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with server_process(pid) as its_end:
            assert its_end is not None
            try:
                taken = detach_command._by_force(client, end, 1.5)
                assert select.select([its_end], [], [], 5)[0]
            finally:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(its_end, signal.SIGKILL)
    if taken.lock is not None:
        os.close(taken.lock)
    asking.join(30)
    server.process.wait(10)


def test_who_is_asked_to_end_during_an_upgrade_passes_it_on(serve: Serve, machine: Machine, tmp_path: Path) -> None:
    """A signal ends the new server; a `detach` that came to the old one is refused, not said to be done."""
    server = serve()
    frontend = machine.boot(server)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    said: list[dict[str, Any]] = []
    waiting = AT_RESTARTED.replace("os.kill(os.getpid(), 9)", "pass")
    asking = threading.Thread(target=lambda: said.append(upgrade(server, sys.executable, "-P", "-c", waiting, str(fifo))))
    asking.start()
    fifo.read_bytes()
    detaching = socket.socket(socket.AF_UNIX)
    detaching.settimeout(30)
    detaching.connect(str(server.folder / "run" / "d" / "control.sock"))
    detaching.sendall(b'{"op": "detach", "force": true}\n')
    assert server.call("ping")["phase"] == "serving"  # it has read what came before
    server.process.send_signal(signal.SIGTERM)
    assert server.call("ping")["phase"] == "serving"
    pid = notes.read_state("d")["successor"]
    with server_process(pid) as end:
        fifo.write_bytes(b"")
        asking.join(30)
        assert said[0]["pid"] == pid
        assert server.process.wait(10) == Exit.OK
        assert end is not None
        assert select.select([end], [], [], 10)[0]
    assert frontend.gone()
    frontend.close()
    with detaching, detaching.makefile() as replies:
        reply = json.loads(replies.readline())
    assert reply["code"] == Exit.BUSY
    assert f"process {pid}'s now" in reply["error"]
    assert not (server.folder / "run" / "d").exists()


AT_RESTARTED = """
import os, runpy, sys
import vduse_blk.worker.upgrade as upgrade
def reached(step):
    if step == "restarted":
        open(sys.argv[1], "w").close()
        open(sys.argv[1]).read()
        os.kill(os.getpid(), 9)
upgrade.reached = reached
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""A new server that serves the queues, says so through a FIFO, and dies when somebody opens that again."""


def test_a_server_that_cannot_serve_every_queue_gets_none(serve: Serve) -> None:
    """The old one serves on, and the sentence says why; no request fails."""
    server = serve(queues=2)
    machine = Machine(queues=2)
    frontend = machine.boot(server)
    pid = server.process.pid
    with pytest.raises(ControlError, match=r"cannot serve the storage.*no thread.*served as before"):
        upgrade(server, sys.executable, "-P", "-c", WITHOUT_THREADS)
    assert owner(server) == pid
    assert frontend.gone()  # it has no log, and queue 0 was begun
    frontend.close()
    machine.close()
    machine = Machine(queues=2)
    frontend = machine.boot(server)
    for queue in machine.queues:
        assert queue.write(0, bytes(4096)) == OK
    upgrade(server)
    frontend.close()
    machine.close()
    detach(server)


def test_a_server_on_trial_hears_no_front_end(serve: Serve, machine: Machine, tmp_path: Path) -> None:
    """What a front-end says before the disk is the new server's is answered by the old one when the new one dies: nothing
    of it is lost, not even half a message."""
    server = serve()
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    area = frontend.get_inflight(1, 64)
    assert frontend.set_inflight(area) == 0
    assert frontend.set_memory(machine.queue.region) == 0
    frontend.start_queue(0, machine.queue)
    count = frontend.ask_number(Request.GET_QUEUE_NUM)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    failures: list[ControlError] = []

    def fail() -> None:
        with pytest.raises(ControlError, match="signal 9") as failure:
            upgrade(server, sys.executable, "-P", "-c", AT_RESTARTED, str(fifo))
        failures.append(failure.value)

    asking = threading.Thread(target=fail)
    asking.start()
    fifo.read_bytes()
    assert machine.queue.write(0, b"x" * 4096) == OK  # it serves
    message = struct.pack("=III", Request.GET_QUEUE_NUM, 1, 0)
    frontend.send_raw(message + message[:6])
    assert not select.select([frontend.connection], [], [], 0.3)[0]
    fifo.write_bytes(b"")
    asking.join(30)
    assert "served as before" in str(failures[0])
    frontend.send_raw(message[6:])
    for _ in range(2):
        assert frontend.receive()[:2] == (Request.GET_QUEUE_NUM, struct.pack("=Q", count))
    assert machine.queue.read(0, 4096) == (OK, b"x" * 4096)
    upgrade(server)
    assert frontend.ask_number(Request.GET_QUEUE_NUM) == count
    frontend.close()
    area.close()
    detach(server)
