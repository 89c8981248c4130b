"""Attach and detach cut off by SIGKILL at every step: one documented command leads out of it, no reboot."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faulty import AFTER, BEFORE, NEW
from tests.kernel.host import CLI, RUN, assert_nothing_left, cli, image, info, leftovers, servers, wait_until
from vduse_blk.exporter import KILL_ENV

TOP = Path(__file__).resolve().parents[2]
MIB = 1 << 20

ATTACH = ("locked", "opened", "created", "configured", "served", "added", "found", "linked", "serving")
ADOPT = ("taken", "adopted")  # test_adopt.py
LEAVE = ("left",)  # tests/unit/test_worker.py
UPGRADE = (*BEFORE, *AFTER, *NEW, "took-over")  # test_upgrade.py, here and in tests/exporters
DETACH = ("detaching", "deleted", "closed", "destroyed", "gone")
RESIZE = ("resizing", "resized")


def size_of(device: str) -> int:
    """Bytes, as the host sees them."""
    return int(Path("/sys/class/block", Path(device).name, "size").read_text()) * 512


def test_every_step_is_in_a_list() -> None:
    """The steps marked in the code are the ones killed here."""
    marked = set()
    for folder in ("vduse_blk", "exporters"):
        for path in (TOP / folder).rglob("*.py"):
            marked |= set(re.findall(r'(?:reached\(|_after, \w+\.\w+, )"([\w-]+)"\)', path.read_text()))
    assert marked == {*ATTACH, *ADOPT, *LEAVE, *UPGRADE, *DETACH, *RESIZE}


@pytest.mark.parametrize("step", ATTACH)
def test_server_killed_while_attaching(tmp_path: Path, step: str) -> None:
    """attach cleans up after its server, says so, and the next attach of the name works."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    failed = cli("attach", disk, "--name", "k", check=False, env={KILL_ENV: step})
    assert failed.returncode == 1, failed.stderr
    assert "nothing is left" in failed.stderr
    assert_nothing_left("k")
    device = cli("attach", disk, "--name", "k").stdout.strip()
    assert os.path.exists(device)
    cli("detach", "k")
    assert_nothing_left()


@pytest.mark.parametrize("step", ["created", "served", "added", "linked"])
def test_attach_and_server_killed(tmp_path: Path, step: str) -> None:
    """Both die: one attach of the same name succeeds."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    with subprocess.Popen([*CLI, "attach", str(disk), "--name", "k"], env=os.environ | {KILL_ENV: step}) as attach:
        wait_until(lambda: (RUN / "k/state.json").exists() or attach.poll() is not None, "the server runs", 60)
        attach.send_signal(signal.SIGSTOP)
        wait_until(lambda: not servers(), f"the server is killed at {step}", 60)
        attach.kill()
    assert leftovers("k")
    cli("attach", disk, "--name", "k")
    cli("detach", "k")
    assert_nothing_left()


@pytest.mark.parametrize("step", DETACH)
def test_server_killed_while_detaching(tmp_path: Path, step: str) -> None:
    """A second detach, if there is anything left for it to do, removes the rest."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    cli("attach", disk, "--name", "k", env={KILL_ENV: step})
    cli("detach", "k", check=False)
    wait_until(lambda: not servers(), "the server is dead")
    if leftovers("k"):
        cli("detach", "k")
    assert_nothing_left()


@pytest.mark.parametrize("step", RESIZE)
def test_server_killed_while_resizing(tmp_path: Path, step: str) -> None:
    """The image has the old size or the new one; attached again the disk has it, too, and can be resized."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    device = cli("attach", disk, "--name", "k", env={KILL_ENV: step}).stdout.strip()
    assert cli("resize", "k", "32M", check=False).returncode != 0
    wait_until(lambda: not servers(), "the server is dead")
    size = (16 if step == "resizing" else 32) * MIB
    assert disk.stat().st_size == size
    assert cli("attach", disk, "--name", "k").stdout.strip() == device
    assert info("k")["size"] == size_of(device) == size
    cli("resize", "k", "48M")
    assert disk.stat().st_size == size_of(device) == 48 * MIB
    cli("detach", "k")
    assert_nothing_left()


def test_killed_in_the_middle_of_io(tmp_path: Path) -> None:
    """A server killed under load leaves a disk whose users wait; detach --force fails their requests and removes it."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    device = cli("attach", disk, "--name", "k").stdout.strip()
    (pid,) = servers()
    with subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={device}", "bs=4k", "oflag=direct"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as writer:
        wait_until(lambda: disk.stat().st_blocks > 100, "writes arrive")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not servers(), "the server is dead")
        time.sleep(0.5)  # the writer runs into the silence
        assert writer.poll() is None
        refused = cli("detach", "k", check=False)
        assert (refused.returncode, str(writer.pid) in refused.stderr) == (4, True), refused.stderr
        assert cli("detach", "k", "--force").returncode == 0
        assert writer.wait(30) != 0
    assert_nothing_left()


def test_killed_with_many_requests_in_flight(tmp_path: Path) -> None:
    """Requests overtake each other, the server dies: none is answered twice, none is forgotten, the disk can be removed."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    for _ in range(3):
        device = cli("attach", disk, "--name", "k").stdout.strip()
        (pid,) = servers()
        words = ["fio", "--name=t", f"--filename={device}", "--rw=randrw", "--bsrange=512-64k", "--direct=1"]
        words += ["--ioengine=libaio", "--iodepth=32", "--time_based", "--runtime=60"]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as load:
            wait_until(lambda: info("k")["counters"]["write_ops"] > 200, "requests are served")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not servers(), "the server is dead")
            assert cli("detach", "k", "--force").returncode == 0
            assert load.wait(30) != 0
        assert_nothing_left()
