"""The server in the foreground, as a service manager runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

from tests.kernel.host import CLI, assert_nothing_left, cli, image, run

MIB = 1 << 20


def test_serve_tells_systemd_and_ends_clean(tmp_path: Path) -> None:
    """serve says READY=1 when the disk can be used. SIGTERM while it is mounted leaves it to the next serve, which finds the
    file system as it was; SIGTERM while nobody uses it leaves nothing."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        command = [*CLI, "serve", str(image(tmp_path / "disk.img", 64 * MIB)), "--name", "unit"]
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        try:
            with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
                assert b"READY=1" in systemd.recv(4096)
                device = os.path.realpath("/dev/vduse-blk/unit")
                run("mkfs.ext4", "-q", device)
                run("mount", device, mount)
                (mount / "before").write_text("x" * 100000)
                server.send_signal(signal.SIGTERM)
                _, said = server.communicate(timeout=60)
                assert server.returncode == 8, said
                assert str(mount) in said
            disk = json.loads(cli("info", "unit", "--json").stdout)
            assert disk["state"] == "dead"
            with subprocess.Popen(command, env=environment) as server:
                while b"READY=1" not in systemd.recv(4096):
                    pass
                (mount / "after").write_text("y")
                run("umount", mount)
                run("e2fsck", "-fn", device)
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
        finally:
            run("umount", mount, check=False)
            cli("detach", "unit", "--force", check=False)
    assert_nothing_left()
