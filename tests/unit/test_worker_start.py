"""A server whose start fails leaves the host as it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_start_takes_back_only_what_it_created(existed: bool, tmp_path: Path) -> None:
    """The storage opens and the export does not begin: a new file goes, one that was there stays, no directory is left."""
    path, run = tmp_path / "disk.img", tmp_path / "run"
    run.mkdir()
    if existed:
        path.write_bytes(bytes(MIB))
    spec = {"name": "d", "source": str(path), "size": MIB, "exports": [f"vhost-user:{tmp_path}/nowhere/socket"]}
    done = subprocess.run(
        [sys.executable, "-m", "vduse_blk.worker"],
        input=json.dumps(spec),
        env=os.environ | {"VDUSE_BLK_RUN": str(run)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "no socket can be made" in done.stderr
    assert path.exists() == existed
    assert list(run.iterdir()) == []


SMALL = """
mount -t tmpfs -o "nr_inodes=$2,mode=755" none "$1" || exit 99
"$3" -P -m vduse_blk.cli attach memory:1M --name d --export "vhost-user:$1-socket" >&2
status=$?
[ $status = 0 ] && "$3" -P -m vduse_blk.cli detach d
ls -A "$1"
exit $status
"""
"""Attach a disk with a file system of few inodes as run directory; what stays there is on standard output."""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_each_lack_of_an_inode_is_one_sentence(tmp_path: Path) -> None:
    """However far the start comes: no traceback, and nothing is left, until there are enough."""
    run = tmp_path / "run"
    run.mkdir()
    lacking = []
    for inodes in range(1, 20):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", SMALL, "sh", run, str(inodes), sys.executable],
            env=os.environ | {"VDUSE_BLK_RUN": str(run)},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            break
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        *log, said = done.stderr.splitlines()
        assert all(line.startswith("vduse-blk: log: ") and "WARNING" in line for line in log)
        found = re.fullmatch(rf"vduse-blk: [a-z ]* {run}/(\S+): No space left on device", said)
        assert found is not None, said
        lacking.append(found[1])
    wanted = ("", "/log", "/state.json", "/control.new", "/lost", "/served.json", "/disk.json", "/state.json")
    assert lacking == [f"d{file}" for file in wanted]
