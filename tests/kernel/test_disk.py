"""A source becomes a disk and goes again, with everything a user can see about it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.kernel.host import allocated, assert_nothing_left, attached, cli, fio, image, info, run, wait_until

MIB = 1 << 20


def test_attach_prints_a_disk_that_works_and_detach_leaves_nothing(tmp_path: Path) -> None:
    """attach prints /dev/vdX; size, serial, link, state and counters are right; detach removes all of it."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    done = cli("attach", disk, "--name", "first", "--serial", "SER-1", "--queues", "2")
    device = done.stdout.strip()
    try:
        assert stat.S_ISBLK(os.stat(device).st_mode)
        name = Path(device).name
        assert int(Path("/sys/class/block", name, "size").read_text()) == 64 * MIB // 512
        assert Path("/sys/class/block", name, "serial").read_text().strip() == "SER-1"
        assert os.path.realpath("/dev/vduse-blk/first") == device
        assert stat.S_IMODE(os.stat("/run/vduse-blk/first").st_mode) == 0o700
        facts = info("first")
        assert (facts["device"], facts["size"], facts["path"]) == (device, 64 * MIB, "native")
        assert [q["ready"] for q in facts["queues"]] == [True, True]
        assert facts["counters"]["get_id_ops"] >= 1
        for queue in range(2):  # taken in turn, every other interrupt would wake a CPU that sleeps
            mask = Path(f"/sys/class/vduse/first/vq{queue}/irq_cb_affinity").read_text()
            assert int(mask.replace(",", ""), 16).bit_count() == 1
        assert "VERSION_1" in facts["features_negotiated"]
        listed = json.loads(cli("list", "--json").stdout)
        assert "first" in json.dumps(listed)
        assert cli("attach", disk, "--name", "first", check=False).returncode == 4
    finally:
        cli("detach", "first")
    assert not os.path.exists(device)
    assert_nothing_left()


def test_interrupts_of_one_queue_go_to_one_cpu() -> None:
    """With one queue the driver allows all CPUs, and the kernel would take them in turn."""
    with attached("null:64M", "--queues", "1", name="one"):
        mask = Path("/sys/class/vduse/one/vq0/irq_cb_affinity").read_text()
        assert int(mask.replace(",", ""), 16).bit_count() == 1


@pytest.mark.parametrize("source", ["memory:64M", "null:64M"])
def test_memory_and_null(source: str) -> None:
    """memory: keeps what is written, null: gives zeros; both paths."""
    for path in ("native", "plugin"):
        with attached(source, "--path", path) as device:
            data = os.urandom(MIB)
            with open(device, "r+b", buffering=0) as disk:
                disk.write(data)
                os.fsync(disk.fileno())
            Path("/proc/sys/vm/drop_caches").write_text("1")
            with open(device, "rb", buffering=0) as disk:
                os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                run("blockdev", "--flushbufs", device)
                assert disk.read(MIB) == (data if source.startswith("memory") else bytes(MIB))


@pytest.mark.parametrize("path", ["native", "plugin"])
def test_fio_verifies_random_block_sizes(tmp_path: Path, path: str) -> None:
    """Four jobs, queue depth 16, random block sizes, crc32c: no error, and the data is in the image."""
    disk = image(tmp_path / "disk.img", 128 * MIB)
    with attached(disk, "--path", path) as device:
        fio(
            device, rw="randwrite", bsrange="512-64k", blockalign=512, direct=1, ioengine="libaio", iodepth=16, numjobs=4,
            size="16M", offset_increment="32M", verify="crc32c", do_verify=1,
            verify_fatal=1, group_reporting=1,
        )  # fmt: skip
        counters = info("t")["counters"]
        assert counters["write_ops"] > 0
        assert counters["read_ops"] > 0
        assert not any(value for key, value in counters.items() if key.endswith("_errors"))
        assert counters["malformed"] == 0
    assert allocated(disk) >= 60 * MIB


def test_direct_io_aligned_to_512(tmp_path: Path) -> None:
    """A disk of 512-byte blocks takes O_DIRECT requests of 512 bytes at 512-byte offsets."""
    with attached(image(tmp_path / "disk.img", 16 * MIB)) as device:
        assert run("blockdev", "--getss", device).stdout.strip() == "512"
        fio(device, rw="randrw", bs=512, direct=1, ioengine="libaio", iodepth=8, size="4M", io_size="1M", verify="crc32c")


def test_blocks_of_4096(tmp_path: Path) -> None:
    """A disk of 4096-byte blocks says so, refuses less, and works."""
    with attached(image(tmp_path / "disk.img", 64 * MIB), "--block-size", 4096) as device:
        assert run("blockdev", "--getss", device).stdout.strip() == "4096"
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        try:
            with pytest.raises(OSError, match="Invalid argument"):
                os.pread(fd, 512, 0)
        finally:
            os.close(fd)
        fio(device, rw="randrw", bs=4096, direct=1, ioengine="libaio", iodepth=8, size="16M", io_size="4M", verify="crc32c")


def test_read_only_disk_refuses_writes(tmp_path: Path) -> None:
    """A read-only disk is read-only to the kernel, and its image is not touched."""
    disk = image(tmp_path / "disk.img", 16 * MIB)
    disk.chmod(0o400)
    before = disk.stat().st_mtime_ns
    with attached(disk, "--read-only") as device:
        assert run("blockdev", "--getro", device).stdout.strip() == "1"
        assert run("dd", "if=/dev/zero", f"of={device}", "count=1", "oflag=direct", check=False).returncode != 0
        run("dd", f"if={device}", "of=/dev/null", "bs=1M", "iflag=direct")
    assert disk.stat().st_mtime_ns == before


def test_discard_and_zeroes_reach_the_image(tmp_path: Path) -> None:
    """blkdiscard and blkdiscard -z shrink the image's allocated blocks, or zero it."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    with attached(disk) as device:
        run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=32", "oflag=direct")
        assert allocated(disk) >= 32 * MIB
        run("blkdiscard", "--offset", 0, "--length", 16 * MIB, device)
        assert allocated(disk) <= 17 * MIB
        run("blkdiscard", "--zeroout", "--offset", 16 * MIB, "--length", 8 * MIB, device)
        run("cmp", "--bytes", 8 * MIB, f"--ignore-initial={16 * MIB}:0", device, "/dev/zero")
        counters = info("t")["counters"]
        assert counters["discard_ops"] > 0
        assert counters["write_zeroes_ops"] > 0


def test_resize_is_seen_at_once(tmp_path: Path) -> None:
    """resize grows the file and the disk, under a mounted file system; a shrink and an odd size are refused."""
    disk = image(tmp_path / "disk.img", 64 * MIB)
    mount = tmp_path / "mnt"
    mount.mkdir()
    with attached(disk) as device:
        run("mkfs.ext4", "-q", device)
        run("mount", device, mount)
        try:
            cli("resize", "t", "128M")
            assert int(Path("/sys/class/block", Path(device).name, "size").read_text()) == 128 * MIB // 512
            assert disk.stat().st_size == 128 * MIB
            run("resize2fs", device)
            assert os.statvfs(mount).f_blocks * os.statvfs(mount).f_frsize > 100 * MIB
            assert cli("resize", "t", "64M", check=False).returncode == 2
            assert cli("resize", "t", str(128 * MIB + 100), check=False).returncode == 2
        finally:
            run("umount", mount)


def test_detach_refuses_a_disk_in_use_and_names_the_holder(tmp_path: Path) -> None:
    """Mounted or opened: exit 4 and the holder's name; --force does it anyway."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    with attached(image(tmp_path / "disk.img", 64 * MIB)) as device:
        run("mkfs.ext4", "-q", device)
        run("mount", device, mount)
        refused = cli("detach", "t", check=False)
        assert refused.returncode == 4
        assert str(mount) in refused.stderr
        run("umount", mount)
        with subprocess.Popen(["sleep", "1000"], stdin=open(device, "rb")) as sleeper:
            try:
                refused = cli("detach", "t", check=False)
                assert (refused.returncode, str(sleeper.pid) in refused.stderr) == (4, True), refused.stderr
            finally:
                sleeper.kill()
        run("mount", device, mount)
        assert cli("detach", "t", "--force").returncode == 0
        wait_until(lambda: not os.path.exists(device), "the disk is gone")
        run("umount", "-l", mount)


def test_by_id_where_udev_runs(tmp_path: Path) -> None:
    """The serial number makes /dev/disk/by-id/virtio-SERIAL."""
    daemon = next(p for p in ("/lib/systemd/systemd-udevd", "/usr/lib/systemd/systemd-udevd") if os.path.exists(p))
    with subprocess.Popen([daemon], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as udevd:
        try:
            wait_until(lambda: os.path.exists("/run/udev/control"), "udevd listens")
            with attached(image(tmp_path / "disk.img", 16 * MIB), "--serial", "BY-ID-1") as device:
                run("udevadm", "settle", "--timeout=30")
                assert os.path.realpath("/dev/disk/by-id/virtio-BY-ID-1") == device
        finally:
            udevd.terminate()
            udevd.wait(30)


def test_an_idle_disk_costs_nothing(tmp_path: Path) -> None:
    """Ten seconds without I/O: the server's threads use no CPU time at all."""
    with attached(image(tmp_path / "disk.img", 16 * MIB)):
        pid = info("t")["pid"]

        def spent() -> int:
            return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())

        wait_until(lambda: info("t")["counters"]["inflight"] == 0, "the scan is over")
        before = spent()
        run("sleep", 10)
        assert spent() == before
