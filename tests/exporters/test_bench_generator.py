"""bench/vhost_gen.c as a front-end of our own server."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.compare import CFLAGS, TOP
from bench.vhost_servers import Server, ours, turn

LOAD = ("--size", "4096", "--depth", "32")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In the checkout: a /tmp in memory may not do direct I/O."""
    (TOP / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOP / "build") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Path:
    subprocess.run(["gcc", *CFLAGS, "-pthread", TOP / "bench/vhost_gen.c", "-o", folder / "vhost_gen"], check=True)
    return folder / "vhost_gen"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Of a file of holes."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    with ours(f"file:{image}?direct=1", folder, 2) as server:
        yield server


def test_it_is_cheaper_than_what_it_measures(generator: Path, server: Server) -> None:
    """A request costs it less CPU time than the server: with a CPU each, it is the server that is measured."""
    found = turn(generator, server, LOAD, 1)
    assert found["failed"] == 0
    assert found["client_cpu_us_per_io"] < found["server_cpu_us_per_io"]


def test_it_agrees_with_itself(generator: Path, server: Server) -> None:
    """Rate, count and time fit each other, and times come in order."""
    found = turn(generator, server, (*LOAD, "--queues", "2"), 1)
    assert found["iops"] == pytest.approx(found["ios"] / found["seconds"], rel=1e-3)
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["p999_us"]


def test_it_keeps_the_log_of_requests_in_flight(generator: Path, server: Server) -> None:
    """With --inflight the server maps a file that only this front-end made it share; without, it does not."""

    def maps_log() -> bool:
        return "vhost-inflight" in Path(f"/proc/{server.pid}/maps").read_text()

    seen = {}
    for words in (LOAD, (*LOAD, "--inflight")):
        command = [generator, server.socket, "--seconds", "1", *words]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            seen[len(words)] = False
            while process.poll() is None:
                seen[len(words)] |= maps_log()
                time.sleep(0.02)
        assert process.returncode == 0
    assert seen == {len(LOAD): False, len(LOAD) + 1: True}


def test_it_begins_when_told(generator: Path, server: Server) -> None:
    """The load starts at that second of the monotonic clock, not before."""
    begin = int(time.monotonic()) + 2
    turn(generator, server, (*LOAD, "--begin", str(begin)), 1)
    assert time.monotonic() >= begin + 1


def test_it_keeps_to_a_rate(generator: Path, server: Server) -> None:
    """With --rate it sends that many a second from each queue, though many more would come back."""
    found = turn(generator, server, (*LOAD, "--queues", "2", "--rate", "1000"), 2)
    assert found["failed"] == 0
    assert 3000 <= found["ios"] <= 4002


def test_it_says_when_it_was_not_ready(generator: Path, server: Server) -> None:
    """A moment that has passed is no moment to begin at."""
    command = [generator, server.socket, "--begin", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "vhost_gen: not ready when the load was to begin\n")
