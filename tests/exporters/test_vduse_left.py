"""What a dead server had in flight is trusted only if its log is whole, ours, and of that device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from vduse_blk.exporters.vduse import kernel, names
from vduse_blk.exporters.vduse.left import look, open_inflight
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


@pytest.mark.parametrize("waiting", [0, 3])
def test_a_device_that_the_kernel_has_given_up(monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    """`info` says plainly what it means, and the one way out: with requests in flight there is none but a reboot."""

    class GivenUp(Kernel):
        def __enter__(self) -> GivenUp:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def is_broken(self) -> bool:
            return True

    monkeypatch.setattr(names, "device_of", lambda name: name)
    monkeypatch.setattr(kernel, "find_disk", lambda device: "vdz")
    monkeypatch.setattr(kernel, "in_flight", lambda disk: waiting)
    monkeypatch.setattr(Device, "open", lambda name: GivenUp())
    found = look("d")
    assert (found["device"], found["waiting"]) == ("/dev/vdz", waiting)
    assert "a control message was not answered in time" in found["broken"]
    if waiting:
        assert "3 requests are in flight that nobody can answer any more" in found["broken"]
        assert "reboot" in found["broken"]
    else:
        assert "`vduse-blk detach d --force` removes it" in found["broken"]
