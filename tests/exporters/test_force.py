"""detach --force of a disk for virtual machines: done within 5 seconds whatever its server does, and its name and its
socket are free afterwards. Of disks of this host: tests/kernel/test_force.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import Machine, Server

from tests.faulty import install_spinning
from vduse_blk.block.linux import take_descriptor
from vduse_blk.testing.driver import IOERR, OK, OUT, STALE


def force(server: Server) -> None:
    """As a user."""
    command = [sys.executable, "-P", "-m", "vduse_blk.cli", "detach", "d", "--force"]
    environment = os.environ | {"VDUSE_BLK_RUN": str(server.folder / "run")}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 5
    assert not (server.folder / "run/d").exists()
    assert not server.socket.exists()


def sockets_of(pid: int) -> list[int]:
    """Duplicates of all that a process has, kept open after its death as by a thread that hangs in the kernel."""
    links = {int(fd.name): os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return [take_descriptor(pid, fd) for fd, link in links.items() if link.startswith("socket:")]


@pytest.mark.parametrize("how", ["stopped", "dead", "hanging", "spinning", "hangs-in-kernel"])
def test_whatever_the_server_does(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """With requests in flight; the front-end sees its connection end, and the next disk of the name and the socket works."""
    more = {"source": "spinning:?size=8M"} if how == "spinning" else {}
    if how == "spinning":
        install_spinning(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server = Server(tmp_path, filters=["faults"] if how == "hanging" else [], **more)
    frontend = machine.boot(server)
    if how == "hanging":
        server.call("set", values={"faults.hang": "1"})
    elif how != "spinning":
        server.process.send_signal(signal.SIGSTOP)
    kept = sockets_of(server.process.pid) if how == "hangs-in-kernel" else []
    requests = [machine.queue.request(OUT, 8 * i, out=bytes(4096)) for i in range(4)]
    machine.queue.kick(force=True)
    if how == "dead":
        server.kill()
    force(server)
    server.process.wait(10)
    assert frontend.gone()
    frontend.close()
    statuses = {machine.queue.get(request.status_iova, 1)[0] for request in requests}
    assert statuses == {IOERR if how == "hanging" else STALE}  # a server that was killed answers nothing
    if how == "spinning":
        server._spec["source"] = f"file:{tmp_path}/next.img?size=8M"
    server.start()
    other = Machine()
    frontend = other.boot(server)
    assert other.queue.write(0, bytes(4096)) == OK
    frontend.close()
    other.close()
    for fd in kept:
        os.close(fd)
    assert server.stop() == 0
