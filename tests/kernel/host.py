"""What the kernel tests do to the host they run on, as a user would: through the command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kernel import starter

CLI = [sys.executable, "-P", "-m", "vduse_blk.cli"]
RUN = Path("/run/vduse-blk")
_STRETCH = 1 << 20
_SLOW_MS = 50


def run(*command: object, check: bool = True, timeout: float = 300, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """A command with its output captured; a failure shows that output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)
    return checked(done) if check else done


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(done.args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def cli(*words: object, check: bool = True, env: dict[str, str] | None = None, timeout: float = 300) -> Any:
    """``vduse-blk WORDS``, with ``env`` added to its environment. Returns the CompletedProcess."""
    done = starter.call([str(word) for word in words], os.environ | (env or {}), timeout)
    return checked(done) if check else done


def info(name: str) -> dict[str, Any]:
    """``vduse-blk info NAME --json``."""
    found: dict[str, Any] = json.loads(cli("info", name, "--json").stdout)
    return found


@contextlib.contextmanager
def attached(source: object, *options: object, name: str = "t") -> Iterator[str]:
    """A disk for the length of a block; its device path."""
    device = cli("attach", source, "--name", name, *options).stdout.strip()
    try:
        yield device
    finally:
        cli("detach", name, "--force", check=False)
    assert_nothing_left(name)


def image(path: Path, size: int) -> Path:
    """A sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextlib.contextmanager
def uneven(path: Path, name: str = "uneven") -> Iterator[Path]:
    """A block device over a file, of stretches that are fast and slow by turns: something is always in flight, and requests
    overtake each other. Only with direct I/O; nothing is slow in the page cache."""
    run("modprobe", "-a", "loop", "dm-delay")
    loop = run("losetup", "--find", "--show", path).stdout.strip()
    try:
        table = []
        for number, start in enumerate(range(0, path.stat().st_size, _STRETCH)):
            way, more = ("delay", f" {_SLOW_MS}") if number % 2 else ("linear", "")
            table.append(f"{start // 512} {_STRETCH // 512} {way} {loop} {start // 512}{more}")
        run("dmsetup", "create", name, input="\n".join(table))
        try:
            yield Path("/dev/mapper", name)
        finally:
            run("dmsetup", "remove", "--retry", name, check=False)
    finally:
        run("losetup", "-d", loop, check=False)


class Stuck:
    """A block device over a file that can stop to answer: whoever does direct I/O on it waits in the kernel, and no signal
    ends that."""

    def __init__(self, path: Path) -> None:
        run("modprobe", "-a", "loop", "dm-mod")
        self._loop = run("losetup", "--find", "--show", path).stdout.strip()
        self.path = "/dev/mapper/stuck"
        run("dmsetup", "create", "stuck", "--table", f"0 {path.stat().st_size // 512} linear {self._loop} 0")

    def stop(self) -> None:
        run("dmsetup", "suspend", "--nolockfs", "--noflush", "stuck")

    def go_on(self) -> None:
        run("dmsetup", "resume", "--noudevsync", "stuck")

    def remove(self) -> None:
        self.go_on()
        run("dmsetup", "remove", "--retry", "stuck", check=False)
        run("losetup", "-d", self._loop, check=False)


def allocated(path: Path) -> int:
    """Bytes a file really occupies."""
    os.sync()
    return path.stat().st_blocks * 512


def leftovers(name: str | None = None) -> list[str]:
    """Everything of our disks (or of one) that is still there."""
    found = []
    for directory in ("/dev/vduse", "/sys/class/vduse", "/sys/bus/vdpa/devices", "/run/vduse-blk", "/dev/vduse-blk"):
        with contextlib.suppress(FileNotFoundError):
            found += [f"{directory}/{entry}" for entry in os.listdir(directory) if entry != "control"]
    return [path for path in found if name is None or Path(path).name.partition("@")[0] == name]


def assert_nothing_left(name: str | None = None) -> None:
    """No kernel object, no process, no file of a disk."""
    assert leftovers(name) == []
    assert name is not None or servers() == []
    assert name is not None or not os.path.exists("/dev/vduse-blk")


def servers() -> list[int]:
    """Processes that serve disks."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and b"vduse_blk.worker\0" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def tree_digest(root: Path) -> str:
    """One digest over names and contents of a tree."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def fio(device: str, **options: object) -> dict[str, Any]:
    """Run fio on a device; its JSON. Fails on any I/O or verify error."""
    words = [f"--{key}={value}" for key, value in options.items()]
    # Without the last option, fio leaves a file per job in the working directory.
    fixed = ("--name=t", f"--filename={device}", "--output-format=json", "--verify_state_save=0")
    done = run("fio", *fixed, *words, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert all(job["error"] == 0 for job in result["jobs"]), done.stdout
    return result


def wait_until(condition: Any, what: str, timeout: float = 120) -> None:
    """Wait for a fact of the system; the kernel gives no event for most of them."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.05)


def in_flight(device: str) -> int:
    """Requests of a disk that nobody has answered."""
    return sum(map(int, Path("/sys/class/block", Path(device).name, "inflight").read_text().split()))
