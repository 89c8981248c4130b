"""The server in the foreground, as a service manager runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from tests.kernel.host import CLI, assert_nothing_left, cli, image, run

MIB = 1 << 20


def test_serve_tells_systemd_and_ends_clean(tmp_path: Path) -> None:
    """serve says READY=1 when the disk can be used, refuses to end while it is mounted, and leaves nothing at SIGTERM."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        command = [*CLI, "serve", str(image(tmp_path / "disk.img", 64 * MIB)), "--name", "unit"]
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert b"READY=1" in systemd.recv(4096)
                device = os.path.realpath("/dev/vduse-blk/unit")
                run("mkfs.ext4", "-q", device)
                run("mount", device, mount)
                server.send_signal(signal.SIGTERM)
                assert server.stderr is not None
                assert any(str(mount) in line for line in server.stderr)
                assert server.poll() is None
                run("umount", mount)
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
            finally:
                server.kill()
                cli("detach", "unit", "--force", check=False)
    assert_nothing_left()
