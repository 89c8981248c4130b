"""Only on a kernel with VDUSE, as root; every test begins and ends with no disk, and the kernel log says which test ran."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.host import cli, leftovers

KERNEL_LOG = Path("/dev/kmsg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Elsewhere these tests are no failure and no skip but a mistake of the caller. An emulated machine may be slow."""
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in mine:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
    if mine and (os.geteuid() != 0 or not os.path.exists("/dev/vduse/control")):
        raise pytest.UsageError("tests/kernel needs root and a kernel with VDUSE loaded: run tests/kernel/run")


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a disk fails; the next ones find none of it."""
    KERNEL_LOG.write_text(f"vduse-blk: test {request.node.nodeid}\n")
    yield
    left = leftovers()
    for name in {os.path.basename(path).partition("@")[0] for path in left}:
        cli("detach", name, "--force", check=False)
    assert left == [], "the test left something behind"
