"""What the kernel tests stand on: the kernel, its modules, the programs."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.kernel.host import run

TOP = Path(__file__).resolve().parents[2]
in_vm = pytest.mark.skipif("VDUSE_BLK_IN_VM" not in os.environ, reason="about the virtual machine, and this is a host")


def file_system(path: str | Path) -> str:
    """Type of the file system a path lies on."""
    return run("findmnt", "-n", "-o", "FSTYPE", "--target", path).stdout.split()[-1]


def test_vduse_is_there_and_untouched() -> None:
    """The control node exists and the vduse management device can make block devices."""
    assert stat.S_ISCHR(os.stat("/dev/vduse/control").st_mode)
    shown = json.loads(run("vdpa", "-j", "mgmtdev", "show").stdout)["mgmtdev"]
    assert "block" in shown["vduse"]["supported_classes"]


@pytest.mark.parametrize("program", ["fio", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "losetup", "blkdiscard", "vdpa"])
def test_programs_the_tests_use_are_installed(program: str) -> None:
    """tools/setup installs what the kernel tests call."""
    assert shutil.which(program) is not None


def test_the_program_is_in_the_path() -> None:
    """`vduse-blk` is this checkout's."""
    found = shutil.which("vduse-blk")
    assert found == str(TOP / ".venv/bin/vduse-blk")
    assert run("vduse-blk", "--version").stdout.startswith("vduse-blk")


@in_vm
def test_the_machine_is_as_promised() -> None:
    """Two processors; /tmp, /run and /dev/shm in memory; the modules loaded; the checkout's build/ writable."""
    assert os.cpu_count() == 2
    for path in ("/tmp", "/run", "/dev/shm"):
        assert file_system(path) == "tmpfs"
    for module in ("vduse", "virtio_vdpa", "virtio_blk", "loop", "null_blk"):
        assert Path("/sys/module", module).is_dir(), module
    mark = TOP / "build/vm/written-by-guest"
    mark.write_text("x")
    mark.unlink()


@in_vm
def test_python_does_not_come_over_the_network_file_system() -> None:
    """The standard library, the environment and the sources are mounts of their own."""
    (venv,) = (TOP / ".venv/lib").glob("python3*")
    for path in (os.path.dirname(os.__file__), venv, TOP / "vduse_blk", TOP / "pyvduse"):
        assert file_system(path) in ("ext4", "tmpfs"), path


def test_no_server_of_an_earlier_run_lives() -> None:
    """The suite starts with no disk of ours."""
    listed = subprocess.run(["vduse-blk", "list", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(listed.stdout)["disks"] == []
