"""Who uses a block device: on hosts made up of files, and on this one where loop devices and mounts are to be had."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vduse_blk.block.holders import Holder, command_of, holders_of, locks_on, take_sockets

ROOT_MOUNT = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"


class Host:
    """A ``/proc`` and a ``/sys`` with disks and processes as a test wants them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for directory in ("proc", "sys/dev/block", "sys/class/block", "sys/block", "sys/fs/btrfs", "dev/mapper"):
            (root / directory).mkdir(parents=True)
        self.write("proc/swaps", "Filename Type Size Used Priority\n")
        self.process(1, "init")
        (root / "proc/self").symlink_to("1")

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def disk(self, name: str, number: str, partitions: dict[str, str] | None = None) -> None:
        directory = self.root / "sys/devices" / name
        for part, part_number, where in (
            (name, number, directory),
            *((part, part_number, directory / part) for part, part_number in (partitions or {}).items()),
        ):
            (where / "holders").mkdir(parents=True)
            (where / "dev").write_text(f"{part_number}\n")
            if part != name:
                (where / "partition").write_text("1\n")
            (self.root / "sys/dev/block" / part_number).symlink_to(where)
            (self.root / "sys/class/block" / part).symlink_to(where)
        (self.root / "sys/block" / name).symlink_to(directory)

    def process(
        self, pid: int, command: str, mounts: str = ROOT_MOUNT, namespace: int = 1, fds: tuple[str, ...] = ()
    ) -> None:
        self.write(f"proc/{pid}/comm", f"{command}\n")
        self.write(f"proc/{pid}/mountinfo", f"{mounts}\n")
        ns = self.root / f"proc/{pid}/ns"
        ns.mkdir()
        (ns / "mnt").symlink_to(f"mnt:[{namespace}]")
        fd = self.root / f"proc/{pid}/fd"
        fd.mkdir()
        for number, target in enumerate(fds):
            (fd / str(number)).symlink_to(target)

    def mount(self, line: str) -> None:
        path = self.root / "proc/1/mountinfo"
        path.write_text(path.read_text() + line + "\n")

    def holders(self, major: int, minor: int) -> list[Holder]:
        return holders_of(major, minor, root=self.root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.disk("vda", "253:0", {"vda1": "253:1", "vda2": "253:2"})
    made.disk("vdb", "253:16")
    return made


class TestMounts:
    def test_an_unused_disk_has_no_holders(self, host: Host) -> None:
        assert host.holders(253, 0) == []

    def test_a_disk_that_does_not_exist_has_no_holders(self, host: Host) -> None:
        host.mount("30 22 9:9 / /mnt rw - ext4 /dev/gone rw")
        assert host.holders(9, 9) == []

    def test_a_mounted_partition_holds_the_disk(self, host: Host) -> None:
        """The whole disk and the partition, but not its sibling nor another disk."""
        host.mount("30 22 253:1 / /mnt rw - ext4 /dev/vda1 rw")
        holder = Holder("mount", "/mnt")
        assert (host.holders(253, 0), host.holders(253, 1)) == ([holder], [holder])
        assert (host.holders(253, 2), host.holders(253, 16)) == ([], [])
        assert str(holder) == "mounted on /mnt"

    def test_a_mount_point_is_shown_as_it_is_written(self, host: Host) -> None:
        host.mount(r"30 22 253:0 / /a\040b\134c rw shared:5 master:3 - xfs /dev/vda rw")
        assert host.holders(253, 0) == [Holder("mount", "/a b\\c")]

    def test_a_mount_in_another_namespace_is_found(self, host: Host) -> None:
        """With a process that sees it; a namespace of many processes is read once, and a copy of a mount of ours is not
        another holder."""
        host.mount("30 22 253:0 / /mnt rw - ext4 /dev/vda rw")
        host.process(70, "shell", "30 22 253:0 / /mnt rw - ext4 /dev/vda rw", namespace=2)
        there = "30 22 253:0 / /inside rw - ext4 /dev/vda rw"
        host.process(80, "container", there, namespace=3)
        host.process(81, "container", there, namespace=3)
        found = host.holders(253, 0)
        assert found == [Holder("mount", "/mnt"), Holder("mount", "/inside", 80)]
        assert str(found[1]) == "mounted on /inside in the mount namespace of process 80"

    def test_a_process_that_is_going_does_not_hide_its_namespace(self, host: Host) -> None:
        """One that has ended has no mount table any more; the next of the namespace has."""
        host.process(80, "dying", namespace=3)
        (host.root / "proc/80/mountinfo").unlink()
        host.process(81, "living", "30 22 253:0 / /inside rw - ext4 /dev/vda rw", namespace=3)
        assert host.holders(253, 0) == [Holder("mount", "/inside", 81)]

    def test_btrfs_is_found_by_its_members(self, host: Host) -> None:
        """It has a device number of its own and names one of its devices, whichever."""
        for name in ("vda1", "vdb"):
            host.write(f"sys/fs/btrfs/11-22/devices/{name}", "")
        host.write("sys/fs/btrfs/features/raid1", "")
        host.mount("31 22 0:45 / /pool rw - btrfs /dev/vdb rw")
        assert host.holders(253, 0) == host.holders(253, 16) == [Holder("mount", "/pool")]
        assert host.holders(253, 2) == []

    def test_another_btrfs_does_not_count(self, host: Host) -> None:
        host.write("sys/fs/btrfs/11-22/devices/vdb", "")
        host.mount("31 22 0:45 / /pool rw - btrfs /dev/vdb rw")
        assert host.holders(253, 0) == []

    def test_btrfs_mounted_out_of_sight_is_found(self, host: Host) -> None:
        host.write("sys/fs/btrfs/11-22/devices/vda", "")
        assert [str(holder) for holder in host.holders(253, 0)] == ["mounted on a place not visible here (btrfs 11-22)"]


class TestKernelUsers:
    def test_swap_is_found_by_any_name_of_the_device(self, host: Host) -> None:
        (host.root / "dev/by-label").symlink_to("vda2")
        host.write(
            "proc/swaps",
            "Filename Type\n/dev/by-label partition 1 0 -2\n/dev/vdb partition 1 0 -3\n/swap\\040file file 1 0 -4\n",
        )
        assert [str(holder) for holder in host.holders(253, 0)] == ["used for swap (/dev/by-label)"]

    def test_devices_on_top_are_found_with_their_names(self, host: Host) -> None:
        (host.root / "sys/devices/vda/vda1/holders/dm-3").touch()
        (host.root / "sys/devices/vda/holders/md0").touch()
        host.write("sys/class/block/dm-3/dm/name", "data-home\n")
        assert [str(holder) for holder in host.holders(253, 0)] == [
            "held by block device /dev/md0",
            "held by block device /dev/dm-3 (data-home)",
        ]

    def test_a_loop_device_over_a_partition_is_found(self, host: Host) -> None:
        host.write("sys/block/loop0/loop/backing_file", "/dev/vda1\n")
        host.write("sys/block/loop1/loop/backing_file", "/images/vda1\n")
        host.write("sys/block/loop2/size", "0\n")
        host.write("images/vda1", "a file that is only called so")
        (holder,) = host.holders(253, 0)
        assert str(holder) == "used by loop device /dev/loop0"

    def test_kernel_users_come_first(self, host: Host) -> None:
        host.write("proc/swaps", "Filename Type\n/dev/vda1 partition 1 0 -2\n")
        (host.root / "sys/devices/vda/holders/md0").touch()
        host.mount("30 22 253:2 / /mnt rw - ext4 /dev/vda2 rw")
        assert [holder.kind for holder in host.holders(253, 0)] == ["mount", "swap", "device"]


def test_udev_is_known_by_its_names() -> None:
    """It alone is waited for, and only where it merely looks."""
    assert Holder("open", "(udev-worker)", 7).is_udev
    assert Holder("open", "systemd-udevd", 7).is_udev
    assert not Holder("open", "fio", 7).is_udev
    assert not Holder("mount", "(udev-worker)").is_udev


def test_a_name_of_bytes_that_are_no_text_does_not_hurt(host: Host) -> None:
    path = host.root / "proc/1/mountinfo"
    path.write_bytes(b"30 22 253:0 / /mnt\xff rw - ext4 /dev/vda rw\nshort\n\n")
    (holder,) = host.holders(253, 0)
    assert os.fsencode(holder.detail) == b"/mnt\xff"


def test_a_thousand_processes_are_looked_at_in_no_time(host: Host) -> None:
    """20 descriptors each, in 1,000 mount namespaces."""
    for pid in range(100, 1100):
        host.process(pid, "many", namespace=pid, fds=("/dev/null",) * 20)
    begun = time.process_time()
    assert host.holders(253, 0) == []
    assert time.process_time() - begun < 20  # a quadratic search takes minutes


# ----------------------------------------------------------------------------------------------- on this very host


def number_of(device: str) -> tuple[int, int]:
    rdev = os.stat(device).st_rdev
    return os.major(rdev), os.minor(rdev)


def users_of(device: str) -> list[Holder]:
    """But udev, which looks at every device that changes, for an instant."""
    return [holder for holder in holders_of(*number_of(device)) if not holder.is_udev]


def image(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def run(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A loop device of 128 MiB."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("losetup") is None:
        pytest.skip("loop devices need root, /dev/loop-control and losetup")
    path = image(tmp_path / "disk.img", 128 << 20)
    try:
        device = run("losetup", "-f", "--show", path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device: {error.stderr.strip()}")
    yield device
    run("losetup", "-d", device)


@contextlib.contextmanager
def mounted(device: str, file_system: str, where: Path) -> Iterator[str]:
    maker = shutil.which(f"mkfs.{file_system}")
    if maker is None or f"\t{file_system}\n" not in Path("/proc/filesystems").read_text():
        pytest.skip(f"no {file_system} here")
    run(maker, "-q", device)
    where.mkdir()
    if subprocess.run(["mount", "-t", file_system, device, str(where)], capture_output=True).returncode != 0:
        pytest.skip("cannot mount here")
    try:
        yield str(where)
    finally:
        run("umount", where)


@pytest.mark.root
class TestHere:
    @pytest.mark.parametrize("file_system", ["ext4", "xfs", "btrfs"])
    def test_a_mounted_file_system(self, file_system: str, loop: str, tmp_path: Path) -> None:
        if file_system == "xfs":
            os.truncate(tmp_path / "disk.img", 512 << 20)
            run("losetup", "-c", loop)
        with mounted(loop, file_system, tmp_path / "a mount") as where:
            assert users_of(loop) == [Holder("mount", where)]
        assert [holder for holder in holders_of(*number_of(loop)) if holder.kind != "open"] == []

    def test_a_mount_in_a_namespace_of_its_own(self, loop: str, tmp_path: Path) -> None:
        """Not visible in ours."""
        run("mkfs.ext4", "-q", loop)
        (tmp_path / "mnt").mkdir()
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", 'mount "$0" "$1" && echo ok && exec cat']
        process = subprocess.Popen(
            [*command, loop, str(tmp_path / "mnt")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ok\n":
                pytest.skip("cannot make mount namespaces here")
            assert users_of(loop) == [Holder("mount", str(tmp_path / "mnt"), process.pid)]
        finally:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()

    def test_swap(self, loop: str) -> None:
        run("mkswap", loop)
        if subprocess.run(["swapon", loop], capture_output=True).returncode != 0:
            pytest.skip("no swap here")
        try:
            assert Holder("swap", loop) in holders_of(*number_of(loop))
        finally:
            run("swapoff", loop)

    def test_a_loop_device_on_top(self, loop: str) -> None:
        above = run("losetup", "-f", "--show", loop)
        try:
            assert Holder("loop", above) in holders_of(*number_of(loop))
        finally:
            run("losetup", "-d", above)

    def test_a_device_mapper_device_on_top(self, loop: str) -> None:
        if shutil.which("dmsetup") is None or not os.path.exists("/dev/mapper/control"):
            pytest.skip("no device-mapper here")
        name = f"vduse-blk-test-{os.getpid()}"
        table = f"0 2048 linear {loop} 0"
        if subprocess.run(["dmsetup", "create", name, "--table", table], capture_output=True).returncode != 0:
            pytest.skip("no device-mapper here")
        try:
            (holder,) = (holder for holder in holders_of(*number_of(loop)) if holder.kind == "device")
            assert holder.detail.endswith(f"({name})")
        finally:
            run("dmsetup", "remove", "--retry", name)

    def test_an_open_descriptor_under_any_name(self, loop: str, tmp_path: Path) -> None:
        """A node of the device anywhere leads to it; who has it open twice is one holder."""
        node = tmp_path / "node"
        os.mknod(node, 0o60600, os.makedev(*number_of(loop)))
        try:
            os.close(os.open(node, os.O_RDONLY))
        except OSError:
            pytest.skip("device nodes cannot be used here")
        code = "import sys; a, b = open(sys.argv[1]), open(sys.argv[1]); print(flush=True); sys.stdin.read()"
        process = subprocess.Popen([sys.executable, "-c", code, node], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"\n"
            command = command_of(process.pid)
            found = [holder for holder in holders_of(*number_of(loop)) if holder.pid == process.pid]
            assert found == [Holder("open", command, process.pid)]
            assert str(found[0]) == f"open in process {process.pid} ({command})"
        finally:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()


def test_locks_of_others_are_found_and_our_own_is_not(tmp_path: Path) -> None:
    """Whatever their kind; a process that merely has the file open is none."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); g = open(sys.argv[1]); fcntl.lockf(f, fcntl.LOCK_EX, 1, 7);"
        "print(flush=True); sys.stdin.read()"
    )
    with open(path, "rb") as file, open(path, "rb"):
        assert locks_on(file.fileno()) == []
        process = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"\n"
            (holder,) = locks_on(file.fileno())
            assert (holder.kind, holder.pid) == ("lock", process.pid)
            assert str(holder) == f"locked by process {process.pid} ({command_of(process.pid)})"
        finally:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()


def test_sockets_that_a_process_was_given_are_not_its_own(tmp_path: Path) -> None:
    """Where it listens, and who has come there; not its standard output, nor whom it has connected to."""
    given, ours = socket.socketpair()
    with given, ours, socket.socket(socket.AF_UNIX) as elsewhere:
        elsewhere.bind(str(tmp_path / "elsewhere"))
        elsewhere.listen()
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
            "c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[2]); u = socket.socket();"
            "print(flush=True); a = s.accept(); print(flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, tmp_path / "own", elsewhere.getsockname()]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=given)
        assert process.stdin is not None
        with socket.socket(socket.AF_UNIX) as guest:
            assert ours.recv(1) == b"\n"
            guest.connect(str(tmp_path / "own"))
            assert ours.recv(1) == b"\n"
            taken = take_sockets(process.pid)
            assert {one.getsockname() for one in taken} == {str(tmp_path / "own")}
            assert len(taken) == 2
            for one in taken:
                with one:
                    one.shutdown(socket.SHUT_RDWR)
            assert guest.recv(1) == b""
        process.stdin.close()
        assert process.wait(10) == 0
        assert take_sockets(process.pid) == []


def test_a_process_that_is_gone_has_no_name() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert command_of(process.pid) == "?"
