"""A guest moves from one QEMU to another while it writes to a vhost-user disk."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import Guest, fill, make_root, requirements, verify

sys.path.append(str(Path(__file__).resolve().parent.parent / "exporters"))
from servers import MIB, Server

SIZE = 96 * MIB
pytestmark = pytest.mark.timeout(200)


def test_a_guest_migrates_while_it_writes(tmp_path: Path) -> None:
    """From one QEMU to another on this host, each with an export of its own: the guest goes on writing, and everything is
    there."""
    requirements()
    make_root(tmp_path / "disk.img", SIZE)
    second = tmp_path / "second"
    server = Server(tmp_path, exports=[f"vhost-user:{tmp_path}/socket", f"vhost-user:{second}?writable=1"], queues=2)
    source = Guest(tmp_path, [server.socket], device=",num-queues=2")
    try:
        source.wait_ready()
        incoming = ["-incoming", f"unix:{tmp_path}/migrate"]
        target = Guest(tmp_path, [second], device=",num-queues=2", extra=incoming, beside=source)
        try:
            done = fill(source, "moving", 60)
            time.sleep(2)
            source.monitor("migrate-set-parameters", **{"max-bandwidth": 256 << 20, "downtime-limit": 2000})
            source.monitor("migrate", uri=f"unix:{tmp_path}/migrate")
            deadline = time.monotonic() + 240
            while (state := source.monitor("query-migrate").get("status")) != "completed":
                assert state not in ("failed", "cancelled"), source.monitor("query-migrate")
                assert time.monotonic() < deadline, source.monitor("query-migrate")
                time.sleep(0.5)
            assert b"BAD" not in target.expect(done, 240)
            target.expect(b"]", 5)
            verify(target, "moving", 60)
            target.run("mount -o remount,ro /")
            assert "I/O error" not in target.run("dmesg")
        finally:
            target.close()
    finally:
        source.close()
    assert server.stop() == 0
    subprocess.run(["e2fsck", "-f", "-n", server.image], check=True)
