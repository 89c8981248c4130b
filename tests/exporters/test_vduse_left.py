"""What a dead server had in flight is trusted only if its log is whole, ours, and of that device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from vduse_blk.exporters.vduse.left import open_inflight
from vduse_blk.exporters.vduse.server import INFLIGHT_FILE

from pyvduse.device import Device
from vduse_blk.block.errors import UserError
from vduse_blk.queue import InflightLog


@dataclass
class Queue:
    num: int


class Kernel:
    """The device of disk "d" with two queues of 64 entries."""

    name = "d"

    def vq_count(self) -> int:
        return 2

    def vq_info(self, index: int) -> Queue:
        return Queue(64)


def damage(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


def replace(path: Path, queues: int, entries: int) -> None:
    InflightLog.create(path, queues, entries).close()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (Path.unlink, "is lost"),
        (damage, "is not an in-flight log of this version"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
        (lambda path: path.chmod(0o644), "is not a private file"),
        (lambda path: replace(path, 1, 64), "is of another disk"),
        (lambda path: replace(path, 2, 32), "is of another disk"),
    ],
)
def test_a_log_that_cannot_be_trusted_is_not(tmp_path: Path, spoil: Callable[[Path], Any], why: str) -> None:
    """The sentence says why, and what leads out."""
    device = cast(Device, Kernel())
    path = tmp_path / INFLIGHT_FILE
    replace(path, 2, 64)
    open_inflight(tmp_path, device).close()
    spoil(path)
    with pytest.raises(UserError, match=f"{why}.*`vduse-blk detach d --force`"):
        open_inflight(tmp_path, device)
