"""detach --force is done soon whatever the server does, and the name is free afterwards.

The 5 seconds that are promised are held to where nothing is emulated, by the unit tests of the command; an emulated
machine needs several just to start an interpreter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernel.host import assert_nothing_left, cli, image, in_flight, servers, wait_until

MIB = 1 << 20
_SOON = 20.0


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
    began = time.monotonic()
    done = cli("detach", "k", "--force")
    took = time.monotonic() - began
    assert took < _SOON, done.stderr
    (tmp_path / "took").write_text(f"{took:.1f}")
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
    parts = tmp_path / "spinning-1.dist-info"
    parts.mkdir()
    (parts / "METADATA").write_text("Metadata-Version: 2.1\nName: spinning\nVersion: 1\n")
    (parts / "entry_points.txt").write_text("[vduse_blk.backends]\nspinning = spinning:Spinning\n")
    (tmp_path / "spinning.py").write_text(
        "from vduse_blk.backends.memory import MemoryBackend\n"
        "class Spinning(MemoryBackend):\n"
        "    def native_target(self): return None\n"
        "    async def write(self, offset, data, *, fua=False):\n"
        "        while True: pass\n"
    )
    device = cli("attach", "spinning:?size=16M", "--name", "k", env={"PYTHONPATH": str(tmp_path)}).stdout.strip()
    with writer(device):
        force(tmp_path)
