"""A disk outlives its server: whoever comes next takes it over, and its users notice nothing but a pause."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.kernel.host import (
    assert_nothing_left,
    cli,
    image,
    info,
    servers,
    uneven,
    wait_until,
)
from vduse_blk.exporter import KILL_ENV

MIB = 1 << 20
ADOPT = ("locked", "opened", "taken", "adopted", "linked", "serving")


def kill_server() -> None:
    """And wait until it is gone."""
    (pid,) = servers()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers(), "the server is dead")


def load(device: str) -> list[str]:
    """fio until it is interrupted: random verified writes, jobs on regions of their own, mixed sizes, deep queues."""
    options = {
        "rw": "randwrite", "bsrange": "512-64k", "direct": 1, "ioengine": "libaio", "iodepth": 16, "verify": "crc32c",
        "numjobs": 2, "size": "16M", "offset_increment": "16M", "verify_state_save": 0, "fsync": 64,
        "verify_backlog": 256, "time_based": 1, "runtime": 600,
    }  # fmt: skip
    return ["fio", "--name=t", f"--filename={device}", *(f"--{key}={value}" for key, value in options.items())]


def test_killed_and_taken_over_under_load(tmp_path: Path) -> None:
    """No I/O error, nothing lost, nothing stale: fio verifies every block while servers whose storage is in Python die and
    come again. The others are the torture's."""
    replayed = 0
    with uneven(image(tmp_path / "disk.img", 64 * MIB)) as storage:
        words = ("attach", f"file:{storage}?direct=1", "--name", "a", "--path", "plugin")
        device = cli(*words).stdout.strip()
        with subprocess.Popen(load(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
            for _ in range(3):
                wait_until(lambda: info("a")["counters"]["write_ops"] > 100, "requests are served")
                assert fio.poll() is None
                kill_server()
                assert cli(*words).stdout.strip() == device
                replayed += info("a")["events"][-1]["replayed"]
            fio.send_signal(signal.SIGINT)
            said, _ = fio.communicate(timeout=300)
            assert fio.returncode in (0, 128), said  # by version; 128: it was interrupted
            assert said.count("err= 0") == 2, said
        assert replayed > 0
        cli("detach", "a")
    assert_nothing_left()


def test_killed_at_every_step_of_taking_over(tmp_path: Path) -> None:
    """Successors that are killed, each a step further; a writer that waits through it all ends well with the last one."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    device = cli("attach", disk, "--name", "a").stdout.strip()
    kill_server()
    with subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", "bs=64k", "count=64", "oflag=direct", "status=none"]) as dd:
        for step in ADOPT:
            failed = cli("attach", disk, "--name", "a", check=False, env={KILL_ENV: step})
            assert failed.returncode == 1, (step, failed.stderr)
        assert cli("attach", disk, "--name", "a").stdout.strip() == device
        assert dd.wait(60) == 0
    refused = cli("attach", disk, "--name", "a", check=False)
    assert refused.returncode == 4
    cli("detach", "a")
    assert_nothing_left()


def test_a_monitor_keeps_the_disk_served(tmp_path: Path) -> None:
    """A writer notices nothing of two dead servers; info tells of them; detach ends the monitor, too."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    device = cli("attach", disk, "--name", "a", "--restart", "on-failure").stdout.strip()
    with subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", "bs=4k", "oflag=direct", "status=none"]) as dd:
        for number in (1, 2):
            wait_until(lambda: info("a").get("counters", {}).get("write_ops", 0) > 100, "writes are served", 60)
            os.kill(servers()[0], signal.SIGKILL)
            wait_until(lambda number=number: len(info("a").get("events", [])) == 2 * number, "it is taken over", 60)
        dd.terminate()
    what = cli("info", "a").stdout
    assert what.count("was ended by signal 9") == 2
    assert what.count("took over") == 2
    monitor = info("a")["monitor"]
    cli("detach", "a")
    wait_until(lambda: not Path(f"/proc/{monitor}").exists(), "the monitor ends")
    assert_nothing_left()
