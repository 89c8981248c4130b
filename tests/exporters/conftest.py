"""Fixtures that make servers and machines, and end them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Machine, Server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes a server, in a folder of the test. Those that still run at the end are stopped, and must end well."""
    servers: list[Server] = []

    def make(name: str = ".", **options: Any) -> Server:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        servers.append(Server(folder, **options))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            assert server.stop() == 0, server.text()
        assert "Traceback" not in server.text(), server.text()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine of one queue."""
    made = Machine()
    yield made
    made.close()
