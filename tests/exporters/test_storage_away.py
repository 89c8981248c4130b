"""Storage that is away, seen through a real server: the driver waits, the user is told, and everything ends as asked."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import SIZE, Machine, Server

from vduse_blk.control.errors import Exit
from vduse_blk.control.process import server_process
from vduse_blk.control.status import all_disks
from vduse_blk.testing.driver import IN, IOERR, OK, Request
from vduse_blk.testing.frontend import FakeFrontend


class Away:
    """A served disk whose storage can be taken away: ``native``: its file is cut; ``plugin``: by the faults filter."""

    def __init__(self, folder: Path, path: str) -> None:
        self.path = path
        more: dict[str, Any] = {"filters": ["faults"]} if path == "plugin" else {}
        self.server = Server(folder, on_error="wait", **more)
        self.machine = Machine()
        self.frontend = self.machine.boot(self.server)

    def leave(self) -> None:
        if self.path == "native":
            os.truncate(self.server.image, 0)
        else:
            self.server.call("set", values={"faults.error": "EIO"})

    def come_back(self) -> None:
        if self.path == "native":
            os.truncate(self.server.image, SIZE)
        else:
            self.server.call("set", values={"faults.error": ""})

    def reads(self, count: int) -> list[Request]:
        requests = [self.machine.queue.request(IN, 8 * i, into=4096) for i in range(count)]
        self.machine.queue.kick()
        return requests

    def until(self, state: str) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        while (info := self.server.call("info"))["phase"] != state:
            assert time.monotonic() < deadline, info
            time.sleep(0.01)
        return info


@pytest.fixture(params=["native", "plugin"])
def away(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Away]:
    away = Away(tmp_path, request.param)
    yield away
    away.frontend.close()
    away.machine.close()
    away.server.kill()


def test_a_waiting_disk_says_so_and_goes_on_by_itself(away: Away) -> None:
    """In info, in list, in the log; no request fails."""
    assert away.server.call("info")["path"] == away.path
    away.leave()
    began = time.time()
    requests = away.reads(16)
    waiting = away.until("waiting")["waiting"]
    assert waiting["error"] == "Input/output error"
    assert abs(waiting["since"] - began) < 5
    assert [disk.state for disk in all_disks()] == ["waiting"]
    while away.server.call("info")["waiting"]["requests"] < 16:
        time.sleep(0.01)
    said = r"requests wait for it: \d+, for 0\.\d seconds by now; the last error: Input/output error"
    assert re.search(said, away.server.text())
    away.come_back()
    away.machine.queue.run(*requests)
    assert [request.status for request in requests] == [OK] * 16
    info = away.until("serving")
    assert "waiting" not in info
    assert info["counters"]["read_errors"] == 0
    assert "no request waits for it any more" in away.server.text()


def test_from_wait_to_fail_the_requests_end_and_back_they_wait(away: Away) -> None:
    away.leave()
    requests = away.reads(16)
    away.until("waiting")
    began = time.monotonic()
    away.server.call("set", values={"on-error": "fail"})
    away.machine.queue.run(*requests)
    assert time.monotonic() - began < 1
    assert {request.status for request in requests} == {IOERR}
    assert away.machine.queue.read(0, 4096)[0] == IOERR
    away.server.call("set", values={"on-error": "wait"})
    requests = away.reads(4)
    away.until("waiting")
    away.come_back()
    away.machine.queue.run(*requests)
    assert {request.status for request in requests} == {OK}


def test_a_setting_outlives_the_server(tmp_path: Path) -> None:
    """Requests that wait because of a setting made during the outage, wait on at the next server: nothing of it is in the
    words the server is started with. What a server is not given any more, a filter, is not in its way."""
    server, machine = Server(tmp_path, filters=["faults"]), Machine()
    frontend = FakeFrontend.connect(server.socket)
    frontend.negotiate()
    area = frontend.get_inflight(1, machine.queue.num)
    assert frontend.set_inflight(area) == 0
    assert frontend.set_memory(machine.queue.region) == 0
    frontend.start_queue(0, machine.queue)
    server.call("set", values={"on-error": "wait", "faults.error": "EIO"})
    requests = [machine.queue.request(IN, 8 * i, into=4096) for i in range(4)]
    machine.queue.kick()

    def until_waiting() -> None:
        deadline = time.monotonic() + 10
        while (info := server.call("info"))["phase"] != "waiting" or info["waiting"]["requests"] < 4:
            assert time.monotonic() < deadline, info
            time.sleep(0.01)

    until_waiting()
    server.kill()
    frontend.close()
    server.start()
    frontend = machine.boot(server, inflight=area)
    until_waiting()
    server.call("set", values={"faults.error": ""})
    machine.queue.run(*requests)
    assert [request.status for request in requests] == [OK] * 4
    server.kill()
    frontend.close()
    server._spec["filters"] = []
    server.start()
    info = server.call("info")
    assert (info["policy"]["on_error"], info["filters"]) == ("wait", [])
    assert "what was set before, faults.error=, is not any more" in server.text()
    server.call("detach")
    assert server.process.wait(10) == 0
    server.start()
    assert server.call("info")["policy"]["on_error"] == "fail"  # detached is detached
    assert server.stop() == Exit.OK
    area.close()
    machine.close()


@pytest.mark.parametrize("end", ["detach", "term"])
@pytest.mark.parametrize("hangs", [False, True], ids=["waiting", "hanging"])
def test_a_disk_that_waits_or_hangs_can_be_removed(away: Away, end: str, hangs: bool) -> None:
    """Soon. Detached, what is in flight fails; ended by a signal, it waits for the next server."""
    if hangs and away.path == "plugin":  # nothing hangs on purpose in C: there it waits both times
        away.server.call("set", values={"faults.hang": "1"})
        requests = away.reads(16)
    else:
        away.leave()
        requests = away.reads(16)
        away.until("waiting")
    began = time.monotonic()
    if end == "detach":
        away.server.call("detach", force=True)
    else:
        away.server.process.send_signal(signal.SIGTERM)
    is_left = end == "term"
    assert away.server.process.wait(20) == (Exit.LEFT if is_left else Exit.OK)
    # What hangs is given five seconds to end.
    assert time.monotonic() - began < (10 if is_left and hangs else 5)
    statuses = {away.machine.queue.get(request.status_iova, 1)[0] for request in requests}
    assert statuses.isdisjoint({OK, IOERR}) if is_left else statuses == {IOERR}


@pytest.mark.parametrize("away", ["plugin"], indirect=True)
@pytest.mark.parametrize("fails", [False, True], ids=["well", "fails"])
def test_what_is_in_flight_at_a_signal_ends_or_waits(away: Away, fails: bool) -> None:
    """A request that fails when the server has been asked to end waits as any other, at the next server; one that ends well
    is answered."""
    away.server.call("set", values={"faults.delay": "300ms", "faults.error": "EIO" if fails else ""})
    requests = away.reads(4)
    while away.server.call("info")["counters"].get("inflight") != 4:
        assert not any(away.machine.queue.get(request.status_iova, 1)[0] == IOERR for request in requests)
    away.server.process.send_signal(signal.SIGTERM)
    assert away.server.process.wait(10) == (Exit.LEFT if fails else Exit.OK)
    statuses = {away.machine.queue.get(request.status_iova, 1)[0] for request in requests}
    assert statuses.isdisjoint({OK, IOERR}) if fails else statuses == {OK}


@pytest.mark.parametrize("on_error", ["wait", "retry=2m"])
def test_the_way_out_of_a_dead_disk_is_the_same_disk(tmp_path: Path, on_error: str) -> None:
    """`info` says the whole command: policies, filters and the monitor included. Without them waiting requests would fail,
    and nobody would start the next server. What it says, typed, serves the disk as before."""
    image, path = tmp_path / "it's mine.img", tmp_path / "socket"
    image.write_bytes(bytes(1 << 20))
    environment = os.environ | {"VDUSE_BLK_RUN": str(tmp_path / "run")}

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "vduse_blk.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)

    def look() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cli("info", "d", "--json").stdout)
        return found

    options = [
        "--on-error",
        on_error,
        "--on-full",
        "wait",
        "--filter",
        "faults?on=read&delay=1ms",
        "--restart",
        "on-failure",
    ]
    made = cli("attach", str(image), "--name", "d", "--export", f"vhost-user:{path}", *options)
    assert made.returncode == 0, made.stderr
    try:
        before = look()
        assert re.search(r"^queues +\d+, unused$", cli("info", "d").stdout, re.MULTILINE)  # nobody has connected
        for key in ("monitor", "pid"):
            with server_process(before[key]) as end:
                assert end is not None
                os.kill(before[key], signal.SIGKILL)
                assert select.select([end], [], [], 10)[0]
        dead = look()
        assert dead["log"] == str(tmp_path / "run/d/log")
        assert dead["monitor"] is None
        found = re.search("`vduse-blk ([^`]*)` serves it again", dead["way_out"])
        assert found is not None
        assert cli(*shlex.split(found[1])).returncode == 0
        after = look()
        assert (after["state"], after["policy"]) == ("serving", before["policy"])
        assert after["filters"][0]["options"] == before["filters"][0]["options"] != ""
        assert after["monitor"] != before["monitor"]
    finally:
        assert cli("detach", "d", "--force").returncode == 0


@pytest.mark.parametrize("how", ["replaced", "cut", "options", "source", "memory", "damaged", "forgotten"])
def test_front_ends_find_the_same_disk_or_none(tmp_path: Path, how: str) -> None:
    """A server that was killed is followed by none that would show its front-ends another disk under the old name: another
    file, lost blocks, zeros for what was in memory. What is known of the disk stays, and `detach` frees the name."""
    server = Server(tmp_path, source="memory:1M" if how == "memory" else "")
    server.kill()
    if how == "replaced":
        server.image.rename(tmp_path / "old.img")
        server.image.write_bytes(bytes(SIZE))
    elif how == "cut":
        os.truncate(server.image, SIZE // 2)
    elif how == "options":
        server._spec["serial"] = "another"
    elif how == "source":
        server._spec["source"] = f"file:{tmp_path / 'other.img'}?size=1M"
    elif how == "damaged":
        (tmp_path / "run/d/disk.json").write_text("{")
    elif how == "forgotten":
        (tmp_path / "run/d/served.json").write_text("{")
        server._spec["serial"] = "another"
    known = sorted(path.name for path in (tmp_path / "run/d").iterdir())
    state = (tmp_path / "run/d/state.json").read_text()
    sentence = {
        "replaced": "not the same file",
        "cut": "its storage only",
        "options": "serial: the disk has",
        "source": "source: the disk has",
        "memory": "died with",
        "damaged": "cannot be trusted",
        "forgotten": "serial: the disk has",
    }
    with pytest.raises(AssertionError, match=sentence[how]):
        server.start()
    assert server.process.wait(10) != 0
    if how != "memory":
        assert sorted(path.name for path in (tmp_path / "run/d").iterdir()) == known
        assert (tmp_path / "run/d/state.json").read_text() == state
    assert not (tmp_path / "other.img").exists()
    command = [sys.executable, "-P", "-m", "vduse_blk.cli", "detach", "d"]
    removed = subprocess.run(command, env=os.environ | {"VDUSE_BLK_RUN": str(tmp_path / "run")}, check=False)
    assert removed.returncode == (Exit.NOT_FOUND if how == "memory" else Exit.OK)  # it was removed, and that was said
    server.start()
    assert server.stop() == Exit.OK


def test_a_dead_disk_keeps_its_socket(tmp_path: Path) -> None:
    """Front-ends of a disk that has lost its server connect again to its socket, so no other disk gets that, however
    the path is written, until the dead one is detached."""
    server = Server(tmp_path)
    server.kill()
    other = {"name": "e", "source": "null:1M", "exports": [f"vhost-user:{tmp_path}/../{tmp_path.name}/socket"]}
    mine, server._spec = server._spec, server._spec | other
    with pytest.raises(AssertionError, match="front-ends wait for disk 'd'"):
        server.start()
    assert server.process.wait(10) == Exit.BUSY
    assert not (tmp_path / "run/e").exists()
    command = [sys.executable, "-P", "-m", "vduse_blk.cli", "detach", "d"]
    assert subprocess.run(command, env=os.environ | {"VDUSE_BLK_RUN": str(tmp_path / "run")}, check=False).returncode == 0
    server.start()
    server.kill()
    server._spec = mine
    with pytest.raises(AssertionError, match="front-ends wait for disk 'e'"):
        server.start()


def test_a_socket_goes_with_its_disk(tmp_path: Path) -> None:
    """`detach` of a dead disk whose state.json is lost removes the socket all the same, so that the path is free."""
    server = Server(tmp_path)
    server.kill()
    (tmp_path / "run/d/state.json").unlink()
    assert server.socket.exists()
    command = [sys.executable, "-P", "-m", "vduse_blk.cli", "detach", "d"]
    assert subprocess.run(command, env=os.environ | {"VDUSE_BLK_RUN": str(tmp_path / "run")}, check=False).returncode == 0
    assert not server.socket.exists()
