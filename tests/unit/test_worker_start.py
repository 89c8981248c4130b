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


READ_ONLY = """
run=$1 python=$2
vduse_blk() { "$python" -P -m vduse_blk.cli "$@" 2>&1; echo "= $?"; }
disk="$run-disk --name d --export vhost-user:$run-socket"
truncate -s 1M "$run-disk"
mount -t tmpfs -o mode=755 none "$run" || exit 99
vduse_blk attach $disk > /dev/null
kill -9 "$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["pid"])' "$run/d/state.json")"
for try in {1..100}; do  # until the killed process has closed its log
    mount -o remount,ro "$run" 2> /dev/null && break
    sleep 0.05
done
touch "$run/file" 2> /dev/null && exit 99
for words in "attach memory:1M --name e" "attach $disk" "serve $disk" "detach d"; do
    vduse_blk $words
done
mount -o remount,rw "$run"
vduse_blk attach $disk > /dev/null
vduse_blk detach d
ls -A "$run"
"""
"""A disk whose server was killed, while the run directory cannot be written to and afterwards. What was said, and the exit
status, of each command that matters is on standard output."""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_run_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    """For a new disk, for whoever takes over and for `detach`; and when it can be written again all is as it was."""
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", READ_ONLY, "bash", run, sys.executable],
        env=os.environ | {"VDUSE_BLK_RUN": str(run)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    why = "Read-only file system\n= 1\n"
    assert done.stdout == (
        f"vduse-blk: cannot create {run}/e: {why}"
        f"vduse-blk: cannot write {run}/d/log: {why}"
        f"vduse-blk: cannot write {run}/d/state.json: {why}"
        f"vduse-blk: cannot remove {run}/d: {why}"
        "= 0\n"
    )
