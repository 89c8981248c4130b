"""vhost-user-blk end to end: a real server process, a front-end that speaks the protocol over its socket."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from servers import SIZE, Machine, Server

from vduse_blk.testing.driver import OK, FakeDriver

Serve = Callable[..., Server]


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def image(server: Server, offset: int, length: int) -> bytes:
    """What the storage holds."""
    with open(server.image, "rb") as file:
        return os.pread(file.fileno(), length, offset)


def exercise(queue: FakeDriver, server: Server, seed: int = 1) -> None:
    """Write and read, and look at the storage."""
    data = noise(128 * 1024, seed)
    assert queue.write(64, data, pieces=8) == OK
    assert image(server, 64 * 512, len(data)) == data
    assert queue.read(64, len(data), pieces=5) == (OK, data)
    assert queue.flush() == OK


@pytest.mark.parametrize("path", ["native", "plugin"])
def test_a_disk_is_read_and_written(serve: Serve, machine: Machine, path: str) -> None:
    """A front-end negotiates, starts a queue, and what it writes is in the storage and comes back, along both paths."""
    server = serve(path=path)
    frontend = machine.boot(server)
    assert frontend.capacity() == SIZE
    exercise(machine.queue, server)
    assert machine.queue.serial() == (OK, b"d".ljust(20, b"\0"))
    info = server.call("info")
    assert info["path"] == path
    assert info["device"] == str(server.socket)
    assert info["counters"]["write_ops"] == 1
    frontend.close()
