"""Many disks at once."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernel.host import assert_nothing_left, cli, fio, run

COUNT = 20


@pytest.mark.timeout(900)
def test_twenty_disks_attached_at_once_and_detached_in_any_order() -> None:
    """Attached in parallel and under load, detached in random order: each works, and nothing is left of any."""
    names = [f"many{i}" for i in range(COUNT)]
    with ThreadPoolExecutor(COUNT) as pool:

        def attach(name: str) -> str:
            device = str(cli("attach", "memory:16M", "--name", name, "--timeout", 600, timeout=700).stdout.strip())
            # Load on the first disks while the others are still being attached.
            fio(device, rw="randrw", bs="4k", direct=1, ioengine="libaio", iodepth=8, io_size="512k", verify="crc32c")
            return device

        devices = list(pool.map(attach, names))
        assert len(set(devices)) == COUNT
        listed = json.loads(run("vdpa", "-j", "dev", "show").stdout)["dev"]
        assert set(names) <= set(listed)
        random.Random(2).shuffle(names)

        def detach(name: str) -> int:
            return int(cli("detach", name, "--timeout", 600, check=False, timeout=700).returncode)

        assert list(pool.map(detach, names)) == [0] * COUNT
    assert json.loads(run("vdpa", "-j", "dev", "show").stdout)["dev"] == {}
    assert [p.name for p in Path("/dev/vduse").iterdir()] == ["control"]
    assert_nothing_left()
