"""QEMU, the front-end most virtual machines have, against a real server: a Linux guest that lives on the disk.

Real here: QEMU's vhost-user-blk device, Linux's virtio_blk, our server process and its file. Emulated: the guest's CPU. The
requests that file systems seldom send are sent by tests/interop/verify.c inside the guest.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Guest, fill, make_root, requirements, verify

sys.path.append(str(Path(__file__).resolve().parent.parent / "exporters"))
from servers import MIB, Server

SIZE = 96 * MIB
DATA_SIZE = 32 * MIB
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a disk with a root file system. The log is shown at the end, and has no traceback."""
    requirements()
    folder = tmp_path_factory.mktemp("qemu")
    make_root(folder / "disk.img", SIZE)
    made = Server(folder, queues=4, serial="root-disk-1")
    yield made
    assert made.stop() == 0
    print(made.text())
    assert "Traceback" not in made.text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Server]:
    """A server of a second disk, empty."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "disk.img").write_bytes(b"")
    os.truncate(folder / "disk.img", DATA_SIZE)
    made = Server(folder, queues=2, serial="data-disk-1")
    yield made
    assert made.stop() == 0
    assert "Traceback" not in made.text()


@pytest.fixture(scope="module")
def guest(server: Server, data: Server) -> Iterator[Guest]:
    """A machine that has booted from the disk. At the end it is shut down, and the file system must be clean."""
    made = Guest(server.folder, [server.socket, data.socket], device=",num-queues=2")
    try:
        made.wait_ready()
        yield made
        made.run("mount -o remount,ro /")
        made.run("dmesg | grep -i -E 'I/O error|EXT4-fs error|hung' && exit 1; true")
    finally:
        made.close()
    subprocess.run(["e2fsck", "-f", "-n", server.image], check=True)


def test_a_guest_boots_from_the_disk(guest: Guest, server: Server) -> None:
    """Its root is /dev/vda, with our serial number, queues and cache mode."""
    assert "/dev/vda on / type ext4" in guest.run("mount")
    assert guest.run("cat /sys/block/vda/serial") == "root-disk-1"
    assert guest.run("cat /sys/block/vda/queue/write_cache") == "write back"
    assert guest.run("cat /sys/block/vda/size") == str(SIZE // 512)
    assert guest.run("ls /sys/block/vda/mq | wc -l") == "2"
    negotiated = server.call("info")["features_negotiated"]
    assert {"VERSION_1", "EVENT_IDX", "INDIRECT_DESC", "MQ", "FLUSH", "DISCARD"} <= set(negotiated)


def test_what_the_guest_writes_it_reads(guest: Guest) -> None:
    """Files through the page cache and past it, and space given back."""
    done = fill(guest, "plain", 20)
    assert b"BAD" not in guest.expect(done, 120)
    guest.expect(b"]", 5)
    verify(guest, "plain", 20)
    guest.run("dd if=/data/plain/3 of=/data/direct bs=4k iflag=direct oflag=direct && cmp /data/plain/3 /data/direct")
    guest.run("fstrim /")


def test_every_request_is_verified(guest: Guest, data: Server) -> None:
    """Reads, writes, flushes, discards and zeroes of both kinds, random, on two queues at once: each read gives what was
    written last, none failed, all kinds came as such to the server, and the image holds what the guest sees."""
    half = DATA_SIZE // 2
    device = "/dev/$(grep -l data-disk-1 /sys/block/vd*/serial | cut -d/ -f4)"
    programs = [f"verify {device} {i * half} {half} 600 {i + 1} >/run/v{i} 2>&1" for i in range(2)]
    guest.run(f"{programs[0]} & {programs[1]}; wait", 120)
    assert guest.run("cat /run/v0 /run/v1") == "verified 600\nverified 600"
    seen = guest.run(f"md5sum <{device}").split()[0]
    assert seen == hashlib.md5(data.image.read_bytes()).hexdigest()
    counters = data.call("info")["counters"]
    for operation in ("read", "write", "flush", "discard", "write_zeroes"):
        assert counters[f"{operation}_ops"] > 20
        assert counters[f"{operation}_errors"] == 0


def test_the_cache_mode_is_the_guests(guest: Guest, server: Server) -> None:
    """Write-through is chosen through the configuration space."""
    guest.run("echo 'write through' >/sys/block/vda/cache_type")
    assert guest.run("cat /sys/block/vda/cache_type") == "write through"
    done = fill(guest, "through", 3)
    assert b"BAD" not in guest.expect(done, 60)
    guest.expect(b"]", 5)
    guest.run("echo 'write back' >/sys/block/vda/cache_type")
    verify(guest, "through", 3)


def test_the_guest_sees_the_disk_grow(guest: Guest, server: Server) -> None:
    """Resized while mounted: the new capacity is there within moments, and the new end can be written."""
    new = SIZE + 32 * MIB
    server.call("resize", size=new)
    deadline = time.monotonic() + 20
    while guest.run("cat /sys/block/vda/size") != str(new // 512):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    guest.run(f"dd if=/data/plain/1 of=/dev/vda bs=4k count=16 seek={(new - 16 * 4096) // 4096} conv=fsync")
    with open(server.image, "rb") as file:
        file.seek(new - 16 * 4096)
        written = file.read()
    guest.run("dd if=/data/plain/1 bs=4k count=16 of=/run/head")
    assert guest.run("md5sum </run/head").split()[0] == hashlib.md5(written).hexdigest()


def test_a_server_killed_under_load_loses_nothing(guest: Guest, server: Server) -> None:
    """Killed five times while the guest writes, and started again: no I/O error, every byte is there."""
    done = fill(guest, "killed", 60)
    for _ in range(5):
        time.sleep(1.0)
        server.kill()
        time.sleep(0.3)
        server.start()
    assert b"BAD" not in guest.expect(done, 240)
    guest.expect(b"]", 5)
    verify(guest, "killed", 60)
    assert server.call("info")["frontend"] == guest.process.pid


def test_a_paused_machine_goes_on(guest: Guest) -> None:
    """Stopped and continued while it writes: QEMU stops every queue, asks where it stands, and starts it there."""
    done = fill(guest, "paused", 20)
    for _ in range(5):
        guest.monitor("stop")
        time.sleep(0.2)
        guest.monitor("cont")
        time.sleep(0.3)
    assert b"BAD" not in guest.expect(done, 120)
    guest.expect(b"]", 5)
    verify(guest, "paused", 20)
