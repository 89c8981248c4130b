"""A small share of ``make torture``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kernel.host import assert_nothing_left, run

TOP = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(400)
def test_killed_at_random_instants() -> None:
    """Two disks, one raw and one with a file system, whose servers are killed at instants that differ from run to run: fio
    sees no error and reads what it wrote. The seed of a failure is in its output."""
    done = run(sys.executable, "-m", "tests.torture.guest", "--kills", 6, cwd=TOP, timeout=360)
    assert done.stdout.splitlines()[-1] == "torture: ok"
    assert_nothing_left()
