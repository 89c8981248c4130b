"""How large the bounce area of a VDUSE device is made."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from vduse_blk.exporters.vduse.export import bounce_size, set_bounce_size

from pyvduse.device import Device
from pyvduse.errors import VduseError

MIB = 1 << 20


def device_of(sysfs: Path) -> Device:
    device = Device("x", -1)
    device._sysfs = sysfs
    return device


def test_the_size_follows_the_queues() -> None:
    """A server with a few queues keeps 20 MiB, many deep queues get more, and nobody what the kernel would refuse."""
    assert bounce_size(1, 2) == bounce_size(2, 256) == 20 * MIB
    assert bounce_size(8, 512) == 32 * MIB
    assert bounce_size(64, 32768) == 1024 * MIB


def test_kernels_without_a_size_keep_theirs(tmp_path: Path) -> None:
    """The attribute came later than VDUSE; any other refusal is an error."""
    set_bounce_size(device_of(tmp_path / "gone"), 12 * MIB)
    set_bounce_size(device_of(tmp_path), 12 * MIB)
    assert (tmp_path / "bounce_size").read_text() == str(12 * MIB)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/bounce_size").mkdir()
    with pytest.raises(VduseError) as caught:
        set_bounce_size(device_of(tmp_path / "busy"), 12 * MIB)
    assert caught.value.errno == errno.EISDIR
