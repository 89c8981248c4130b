"""QEMU's tools through libblkio, a front-end without a machine, against a real server (bench/libblkio.py)."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import libblkio

sys.path.append(str(Path(__file__).resolve().parent.parent / "exporters"))
from servers import MIB, Server

SIZE = 32 * MIB
KIB = 1024


def tool(name: str, *words: str) -> str:
    """Run one of QEMU's tools; returns what it prints."""
    if not libblkio.is_there():
        pytest.skip("needs the tools of `tools/setup libblkio`")
    done = libblkio.run(name, *words)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(params=("native", "plugin"))
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Of a disk full of 0x11, served by either path."""
    (tmp_path / "disk.img").write_bytes(b"\x11" * SIZE)
    made = Server(tmp_path, queues=2, path=request.param)
    yield made
    assert made.stop() == 0
    assert "Traceback" not in made.text()


def test_every_request_does_what_it_says(server: Server) -> None:
    """Writes, also of one sector and of many pieces, several at once, write-zeroes, with unmap and without, discard, flush:
    what is read back through the disk, and what is in the file, is what was asked for."""
    requests = (
        ("write", "-P 0x5a 0 1M", 0, MIB, 0x5A),
        ("write", "-P 7 4608 512", 4608, 512, 7),
        ("writev", "-P 8 2M 4k 64k 512 8k", 2 * MIB, 4 * KIB + 64 * KIB + 512 + 8 * KIB, 8),
        ("aio_write", "-P 9 3M 128k", 3 * MIB, 128 * KIB, 9),
        ("aio_write", "-P 10 4M 1M", 4 * MIB, MIB, 10),
        ("aio_flush", "", 0, 0, 0),
        ("write", "-z 64k 64k", 64 * KIB, 64 * KIB, 0),
        ("write", "-z -u 256k 64k", 256 * KIB, 64 * KIB, 0),
        ("write", f"-P 11 {SIZE - 4096} 4096", SIZE - 4096, 4096, 11),
        ("discard", "8M 1M", 8 * MIB, MIB, 0),  # a file's hole reads as zeros
        ("flush", "", 0, 0, 0),
    )
    wanted = bytearray(b"\x11" * SIZE)
    commands = []
    for verb, words, offset, length, byte in requests:
        commands += ["-c", f"{verb} {words}"]
        wanted[offset : offset + length] = bytes([byte]) * length
    for _, _, offset, length, byte in requests:
        if length and offset:  # the first one was written to in between
            commands += ["-c", f"read -P {byte} {offset} {length}"]
    commands += ["-c", "read -P 0x5a 512k 512k", "-c", "read -P 0x11 16M 8M"]
    said = tool("qemu-io", "--image-opts", libblkio.disk(server.socket), *commands)
    assert "failed" not in said
    assert server.image.read_bytes() == wanted


def test_an_image_is_copied_whole(server: Server, tmp_path: Path) -> None:
    """What qemu-img copies to the disk is what it finds there afterwards, and what is in the file."""
    source = tmp_path / "source.img"
    chance = random.Random(5)
    with source.open("wb") as file:
        for _ in range(SIZE // MIB):
            file.write(chance.randbytes(MIB) if chance.random() < 0.7 else bytes(MIB))
    tool(
        "qemu-img",
        "convert",
        "-n",
        "-f",
        "raw",
        "--target-image-opts",
        "-t",
        "none",
        str(source),
        libblkio.disk(server.socket),
    )
    compared = tool(
        "qemu-img", "compare", "--image-opts", f"driver=raw,file.filename={source}", libblkio.disk(server.socket)
    )
    assert "Images are identical" in compared
    assert server.image.read_bytes() == source.read_bytes()
