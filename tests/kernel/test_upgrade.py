"""A live upgrade of a disk of this host: the device node is passed on, its users notice nothing but a pause."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faulty import AFTER, BEFORE, NEW, WITHOUT_THREADS
from tests.kernel.host import Stuck, assert_nothing_left, cli, image, info, run, servers, tree_digest, wait_until
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError
from vduse_blk.control.status import disk_status
from vduse_blk.exporter import KILL_ENV

MIB = 1 << 20
UPGRADES = int(os.environ.get("UPGRADES", "5"))
"""How many under load. 50 take some minutes, so they are for a run by hand (docs/recovery.md)."""
DD = ("bs=16k", "count=1000", "oflag=direct", "status=none")


def load(device: str) -> list[str]:
    """fio: random 4 KiB writes at queue depth 32, each verified, until it is interrupted."""
    options = {
        "rw": "randwrite", "bs": "4k", "direct": 1, "ioengine": "libaio", "iodepth": 32, "verify": "crc32c", "size": "32M",
        "verify_state_save": 0, "verify_backlog": 256, "time_based": 1, "runtime": 300 + 60 * UPGRADES,
    }  # fmt: skip
    return ["fio", "--name=t", f"--filename={device}", *(f"--{key}={value}" for key, value in options.items())]


def served(name: str, since: int = 0) -> None:
    """Wait until requests are served, more than ``since``: counters go along from server to server."""
    wait_until(lambda: writes(name) > since + 50, "requests are served")


def writes(name: str) -> int:
    return counter(name, "write_ops")


def counter(name: str, key: str) -> int:
    """Asked here and now: a command takes a second to start."""
    return int(disk_status(name).info.get("counters", {}).get(key, 0))


@pytest.mark.timeout(300 + 60 * UPGRADES)
def test_upgrades_under_load(tmp_path: Path) -> None:
    """Some servers, one after another, watched by one monitor, while fio verifies: no error; then the last one is killed,
    and the monitor starts the next."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    device = cli("attach", disk, "--name", "a", "--restart", "on-failure").stdout.strip()
    monitor = info("a")["monitor"]
    pauses = []
    with subprocess.Popen(load(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        counted = 0
        for _ in range(UPGRADES):
            served("a", counted)
            assert fio.poll() is None
            counted = writes("a")
            said = json.loads(cli("upgrade", "a", "--json").stdout)
            pauses.append(said["pause_ms"])
            assert info("a")["pid"] == said["pid"]
            assert writes("a") >= counted
        served("a", writes("a"))
        fio.send_signal(signal.SIGINT)
        output, _ = fio.communicate(timeout=120)
        assert fio.returncode in (0, 128), output  # by version; 128: it was interrupted
        assert re.search(r"err= *0[:,\s]", output), output
    print(f"\nupgrade: {UPGRADES} upgrades, pause median {statistics.median(pauses):.0f} ms, maximum {max(pauses):.0f} ms")
    wait_until(lambda: servers() == [said["pid"]], "the old servers end")
    assert info("a")["monitor"] == monitor
    os.kill(said["pid"], signal.SIGKILL)
    wait_until(lambda: info("a")["events"][-1]["event"] == "taken over", "the monitor starts another", 60)
    assert info("a")["monitor"] == monitor
    cli("detach", "a")
    wait_until(lambda: not Path(f"/proc/{monitor}").exists(), "the monitor ends")
    assert_nothing_left()


def test_new_servers_that_die(tmp_path: Path) -> None:
    """Killed at each step before the disk is its own: the old one goes on under a load that verifies. Killed when it is:
    whoever attaches the disk takes it over, as after any crash."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    device = cli("attach", disk, "--name", "a").stdout.strip()
    pid = info("a")["pid"]
    with subprocess.Popen(load(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        for step in (*NEW, "took-over"):
            served("a", writes("a"))
            assert info("a")["pid"] == pid
            command = ["env", f"{KILL_ENV}={step}", sys.executable, "-P", "-m", "vduse_blk.worker"]
            text = r"process \d+'s now.*ended by signal 9" if step == "took-over" else r"signal 9.*served as before"
            with Client("a", 60) as client, pytest.raises(ControlError, match=text):
                client.call("upgrade", command=command, patience=30)
        wait_until(lambda: not servers(), "the old server ends")
        assert cli("attach", disk, "--name", "a").stdout.strip() == device
        served("a")
        fio.send_signal(signal.SIGINT)
        output, _ = fio.communicate(timeout=120)
        assert fio.returncode in (0, 128), output
        assert re.search(r"err= *0[:,\s]", output), output
    cli("detach", "a")
    assert_nothing_left()


def test_a_new_server_that_gets_no_queue_leaves_the_old_one(tmp_path: Path) -> None:
    """The old one goes on under a load that verifies, every queue of it, and the next upgrade succeeds."""
    device = cli("attach", image(tmp_path / "disk.img", 64 * MIB), "--name", "a", "--queues", "2").stdout.strip()
    pid = info("a")["pid"]
    with subprocess.Popen(load(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        served("a")
        command = [sys.executable, "-P", "-c", WITHOUT_THREADS]
        with Client("a", 60) as client, pytest.raises(ControlError, match=r"no thread.*served as before"):
            client.call("upgrade", command=command, patience=30)
        facts = disk_status("a").info
        assert facts["pid"] == pid
        assert {queue["state"] for queue in facts["queues"]} == {"running"}
        served("a", writes("a"))
        cli("upgrade", "a")
        served("a", writes("a"))
        fio.send_signal(signal.SIGINT)
        output, _ = fio.communicate(timeout=120)
        assert fio.returncode in (0, 128), output
        assert re.search(r"err= *0[:,\s]", output), output
    cli("detach", "a")
    assert_nothing_left()


def test_what_does_not_end_on_a_mounted_disk_is_waited_for_by_no_upgrade(tmp_path: Path) -> None:
    """Its storage hangs: the upgrade is refused after its time, and when the storage answers the file system has everything
    that was written to it."""
    stuck = Stuck(image(tmp_path / "stuck.img", 64 * MIB))
    mount = tmp_path / "mnt"
    mount.mkdir()
    try:
        device = cli("attach", f"file:{stuck.path}?direct=1", "--name", "a").stdout.strip()
        run("mkfs.ext4", "-q", device)
        run("mount", device, mount)
        pid = info("a")["pid"]
        stuck.stop()
        words = ["dd", "if=/dev/urandom", f"of={mount}/file", "bs=64k", "count=16", "conv=fsync", "status=none"]
        with subprocess.Popen(words) as dd:
            wait_until(lambda: counter("a", "inflight") > 0, "a write hangs")
            refused = cli("upgrade", "a", check=False)
            assert refused.returncode == 7, refused.stderr
            assert "what is in flight has not ended within 5 seconds; disk 'a' is served as before" in refused.stderr
            assert info("a")["pid"] == pid
            assert dd.poll() is None
            stuck.go_on()
            assert dd.wait(60) == 0
        written = tree_digest(mount)
        cli("upgrade", "a")
        run("umount", mount)
        run("fsck.ext4", "-f", "-n", device)
        run("mount", device, mount)
        assert tree_digest(mount) == written
        run("umount", mount)
        cli("detach", "a")
    finally:
        stuck.remove()
    assert_nothing_left()


@pytest.mark.parametrize("step", [*BEFORE, *AFTER])
def test_an_old_server_that_dies(tmp_path: Path, step: str) -> None:
    """Killed before it has handed the disk over: whoever attaches it takes it over. After: the new one goes on."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    device = cli("attach", disk, "--name", "a", env={KILL_ENV: step}).stdout.strip()
    with subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", *DD]) as dd:
        served("a")
        assert cli("upgrade", "a", check=False).returncode == 1
        if step in BEFORE:
            wait_until(lambda: not servers(), "the new server ends")
            assert cli("attach", disk, "--name", "a").stdout.strip() == device
        wait_until(lambda: info("a").get("state") == "serving", "it is served")
        assert dd.wait(60) == 0
    cli("detach", "a")
    assert_nothing_left()
