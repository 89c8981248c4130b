"""A server whose start fails leaves the host as it was."""

from __future__ import annotations

import json
import os
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
