"""Real file systems on the disk, with a real tree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.kernel.host import allocated, attached, image, run, tree_digest

MIB = 1 << 20
TOP = Path(__file__).resolve().parents[2]
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}
MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


def copy_tree(target: Path) -> None:
    """A tree with many small files and one large one."""
    for name in ("vduse_blk", "pyvduse", "tests"):
        shutil.copytree(TOP / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "large").write_bytes(os.urandom(24 * MIB))


@pytest.mark.parametrize(("kind", "path"), [("ext4", "native"), ("ext4", "plugin"), ("xfs", "native"), ("btrfs", "native")])
def test_a_tree_survives(tmp_path: Path, kind: str, path: str) -> None:
    """mkfs, mount, copy, unmount, fsck clean, mount again, checksums equal; punched and zeroed ranges reach the image."""
    disk = image(tmp_path / "disk.img", 512 * MIB)
    mount = tmp_path / "mnt"
    mount.mkdir()
    with attached(disk, "--path", path, "--queues", 2) as device:
        run(*MKFS[kind], device)
        run("mount", "-t", kind, device, mount)
        try:
            copy_tree(mount)
            digest = tree_digest(mount)
        finally:
            run("umount", mount)
        run(*CHECK[kind], device)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        run("mount", "-t", kind, device, mount)
        try:
            assert tree_digest(mount) == digest
            full = allocated(disk)
            # All of the file: btrfs keeps an extent as long as any part of it is used.
            run("fallocate", "-z", "-o", 0, "-l", MIB, mount / "large")
            run("fallocate", "-p", "-o", MIB, "-l", 23 * MIB, mount / "large")
            os.sync()
            run("fstrim", mount)
            assert allocated(disk) <= full - 16 * MIB
            assert (mount / "large").read_bytes() == bytes(24 * MIB)
        finally:
            run("umount", mount)
        run(*CHECK[kind], device)
