"""QEMU as the front-end: a small Linux guest whose root disk is a vhost-user-blk device, and a shell in it.

The kernel is the one the virtual machine of the kernel tests boots; the initial file system has its virtio_blk and busybox,
mounts /dev/vda and goes there. The guest's console is a pipe: ``run`` sends a line and returns what came back.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import queue
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

KERNEL = Path("/var/lib/vduse-blk/kernel")
LOCK = Path("/tmp/vduse-blk-vm.lock")
"""As of tools/vm: one emulated machine at a time."""

_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules); do insmod $module; done
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 /dev/vda /root && exec switch_root /root /init
echo GUEST-LOST
"""
_ROOT_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
stty -F /dev/ttyS0 -echo
export PS1= PS2=
echo GUEST-READY
exec sh </dev/ttyS0 >/dev/ttyS0 2>&1
"""


def requirements() -> None:
    """Skip where the programs or the kernel are not there."""
    for program in ("qemu-system-x86_64", "busybox", "mke2fs", "gcc"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if not (KERNEL / "ready").exists():
        pytest.skip("needs the kernel of `tools/setup vm`")


def _modules() -> list[Path]:
    """virtio_blk, ext4 and what they need, said or not, in the order in which they load."""
    version = (KERNEL / "version").read_text().strip()
    folder = KERNEL / "lib/modules" / version
    depends: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        module, _, needs = line.partition(":")
        depends[module] = needs.split()
    wanted: list[str] = []
    for name in ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4"):
        for module, needs in depends.items():
            if Path(module).name == f"{name}.ko":
                wanted += [*reversed(needs), module]
    return [folder / module for module in dict.fromkeys(wanted)]


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive (newc) of path → (mode, content)."""
    out = io.BytesIO()
    for number, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        encoded = name.encode() + b"\0"
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0]
        out.write(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)
        out.write(bytes(-out.tell() % 4))
        out.write(content)
        out.write(bytes(-out.tell() % 4))
    return out.getvalue()


def make_initrd(path: Path) -> None:
    busybox = Path("/bin/busybox").read_bytes()
    files: dict[str, tuple[int, bytes]] = dict.fromkeys(("bin", "dev", "proc", "sys", "root", "lib"), (16877, b""))
    files["bin/busybox"] = (0o100755, busybox)
    for applet in ("sh", "mount", "insmod", "sleep", "switch_root", "cat", "echo"):
        files[f"bin/{applet}"] = (0o120777, b"busybox")
    names = []
    for module in _modules():
        files[f"lib/{module.name}"] = (0o100644, module.read_bytes())
        names.append(f"/lib/{module.name}")
    files["modules"] = (0o100644, " ".join(names).encode())
    files["init"] = (0o100755, _INIT.encode())
    path.write_bytes(_archive(files))


def make_root(image: Path, size: int) -> None:
    """An ext4 file system with busybox in it, and verify.c."""
    tree = image.parent / "root"
    for name in ("bin", "dev", "proc", "sys", "run", "data"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in listed:
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    compiler = ["gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Werror"]
    subprocess.run([*compiler, Path(__file__).with_name("verify.c"), "-o", tree / "bin/verify"], check=True)
    (tree / "init").write_text(_ROOT_INIT)
    (tree / "init").chmod(0o755)
    with open(image, "wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image], check=True)
    shutil.rmtree(tree)


class Guest:
    """A running machine. ``disks`` are sockets of back-ends; the first is the root disk."""

    def __init__(
        self,
        folder: Path,
        disks: list[Path],
        *,
        device: str = "",
        memory: int = 256,
        extra: list[str] | None = None,
        beside: Guest | None = None,
    ) -> None:
        """``device`` is added to the options of each disk. ``beside``: a machine that runs, and has the lock."""
        self._lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if beside is None:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._commands = 0 if beside is None else beside._commands
        initrd = folder / "initrd"
        if not initrd.exists():
            make_initrd(initrd)
        version = (KERNEL / "version").read_text().strip()
        self._monitor_path = folder / ("qmp" if beside is None else "qmp2")
        command = [
            "qemu-system-x86_64", "-M", "q35,memory-backend=memory", "-accel", "tcg", "-m", f"{memory}M", "-smp", "2",
            "-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on",
            "-kernel", str(KERNEL / f"boot/vmlinuz-{version}"), "-initrd", str(initrd),
            "-append", "console=ttyS0 quiet loglevel=4 panic=-1 tsc=unstable no_timer_check",
            "-display", "none", "-serial", "stdio", "-no-reboot", "-nodefaults",
            "-qmp", f"unix:{self._monitor_path},server=on,wait=off",
        ]  # fmt: skip
        for i, path in enumerate(disks):
            command += ["-chardev", f"socket,id=c{i},path={path},reconnect=1"]
            command += ["-device", f"vhost-user-blk-pci,id=d{i},chardev=c{i}{device}"]
        self.process = subprocess.Popen(
            [*command, *(extra or [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.console = b""
        self._bytes: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            self._bytes.put(data)
        self._bytes.put(b"")

    def expect(self, marker: bytes, seconds: float) -> bytes:
        """Console output up to ``marker``."""
        deadline = time.monotonic() + seconds
        while marker not in self.console:
            try:
                data = self._bytes.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {marker!r}; the console: {self.console[-3000:].decode(errors='replace')}") from None
            if not data:
                raise EOFError(f"the machine ended; {self._last_words()}")
            self.console += data
        before, _, self.console = self.console.partition(marker)
        return before

    def _last_words(self) -> str:
        """How QEMU ended, if it did within a second, and the end of what it and its guest said. Takes all there is."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self._reader.join(1)
        while not self._bytes.empty():
            self.console += self._bytes.get()
        return f"status {self.process.returncode}; the console: {self.console[-3000:].decode(errors='replace')}"

    def wait_ready(self, seconds: float = 150) -> None:
        self.expect(b"GUEST-READY", seconds)

    def send(self, command: str) -> bytes:
        """Start a command; returns the marker that will follow its output and status."""
        self._commands += 1
        marker = f"[done {self._commands} "
        assert self.process.stdin is not None
        # Cut in two, so that an echo of the line is no marker.
        self.process.stdin.write(f"{command}; echo '[done' {self._commands} $?']'\n".encode())
        self.process.stdin.flush()
        return marker.encode()

    def run(self, command: str, seconds: float = 60, *, check: bool = True) -> str:
        """What a command has printed."""
        marker = self.send(command)
        output = self.expect(marker, seconds).decode(errors="replace").replace("\r", "")
        status = self.expect(b"]", 5)
        if check:
            assert status == b"0", f"{command}: {status!r} {output}"
        return output.strip()

    def monitor(self, command: str, **arguments: Any) -> Any:
        """One QMP command."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            try:
                connection.connect(str(self._monitor_path))
                with connection.makefile("rwb") as stream:
                    stream.readline()
                    for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                        stream.write(json.dumps(request).encode() + b"\n")
                        stream.flush()
                        while "event" in (answer := json.loads(stream.readline())):
                            pass
            except (OSError, ValueError) as e:
                raise EOFError(f"no answer from the monitor ({e}); {self._last_words()}") from e
        assert "return" in answer, answer
        return answer["return"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._lock)


def fill(guest: Guest, name: str, count: int, *, kib: int = 256) -> bytes:
    """Start writing ``count`` files of random content, synced, their sums in memory; returns what ``send`` does."""
    return guest.send(
        f"mkdir -p /data/{name}; i=0; "
        f"while [ $i -lt {count} ]; do "
        f"head -c {kib * 1024} /dev/urandom >/run/x; "
        f'echo "$(md5sum </run/x | cut -c1-32)  /data/{name}/$i" >>/run/{name}.md5; '
        f"dd if=/run/x of=/data/{name}/$i bs=64k conv=fsync 2>/dev/null || echo BAD; "
        "i=$((i+1)); done"
    )


def verify(guest: Guest, name: str, count: int) -> None:
    """Read the files back from the disk."""
    guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    result = guest.run(f"md5sum -c /run/{name}.md5 | grep -c OK", 120)
    assert result == str(count)
