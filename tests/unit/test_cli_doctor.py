"""doctor's checks, each shown the files of a host that has the trouble and of one that has not."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from vduse_blk.exporters.vduse import doctor
from vduse_blk.exporters.vduse.doctor import Finding

from vduse_blk.control import rundir
from vduse_blk.control.errors import ControlError

RELEASE = "6.12.1-test"
ALL_CAPABILITIES = "000001ffffffffff"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system of a host on which everything is well and nothing is loaded yet."""
    write(tmp_path, "proc/self/status", f"Name:\tx\nCapEff:\t{ALL_CAPABILITIES}\n")
    write(tmp_path, "proc/self/uid_map", "         0          0 4294967295\n")
    write(tmp_path, "proc/self/mounts", "udev /dev devtmpfs rw 0 0\nproc /proc proc rw 0 0\n")
    write(tmp_path, "proc/sys/kernel/modules_disabled", "0\n")
    for who in ("self", "1"):
        (tmp_path / "proc" / who / "ns").mkdir(parents=True)
        (tmp_path / "proc" / who / "ns/net").symlink_to("net:[4026531840]")
    modules = "kernel/drivers/{}.ko.xz: kernel/drivers/virtio/virtio.ko.xz\n"
    names = ("vdpa/vdpa_user/vduse", "virtio/virtio_vdpa", "block/virtio-blk")
    write(tmp_path, f"lib/modules/{RELEASE}/modules.dep", "".join(map(modules.format, names)))
    write(tmp_path, f"lib/modules/{RELEASE}/modules.builtin", "kernel/fs/ext4/ext4.ko\n")
    write(tmp_path, "sbin/modprobe", "")
    write(tmp_path, "run/udev/control", "")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def check_trouble(finding: Finding, level: str, *words: str) -> None:
    """The finding has the level, names the trouble and offers a remedy."""
    assert finding.level == level
    assert all(word in finding.detail for word in words), finding.detail
    assert finding.remedy


@pytest.mark.parametrize(
    ("mask", "missing"),
    [(0, ("CAP_NET_ADMIN", "CAP_SYS_ADMIN")), (1 << 12, ("CAP_SYS_ADMIN",)), (1 << 21, ("CAP_NET_ADMIN",))],
)
def test_missing_capabilities_are_named(root: Path, mask: int, missing: tuple[str, ...]) -> None:
    """Without the capabilities of the kernel's interfaces no disk can be made."""
    write(root, "proc/self/status", f"CapEff:\t{mask:016x}\n")
    check_trouble(doctor.check_privileges(root), "fail", *missing)


def test_root_has_what_it_takes(root: Path) -> None:
    """All capabilities are enough."""
    assert doctor.check_privileges(root).level == "ok"


@pytest.mark.parametrize(
    ("release", "level"),
    [
        ("5.10.0-28-amd64", "fail"), ("5.15.0", "warn"), ("6.1.0-18-amd64", "warn"), ("6.12.117+deb12", "ok"),
        ("6.18.0", "ok"), ("7.2.13+deb14-amd64", "warn"), ("7.3.1", "ok"), ("weird", "fail"),
    ],
)  # fmt: skip
def test_kernels(release: str, level: str) -> None:
    """Too old fails, untested and leaking ones warn."""
    finding = doctor.check_kernel(release)
    assert finding.level == level
    assert release in finding.detail
    assert bool(finding.remedy) == (level != "ok")


class TestModules:
    def test_available(self, root: Path) -> None:
        """A module depmod knows, with '-' or '_' and compressed or not, will be loaded."""
        for module in doctor.MODULES:
            assert doctor.check_module(module, RELEASE, root).level == "ok"

    def test_loaded(self, root: Path) -> None:
        """A loaded module needs no files."""
        (root / "sys/module/vduse").mkdir(parents=True)
        assert "loaded" in doctor.check_module("vduse", "other", root).detail

    def test_built_in(self, root: Path) -> None:
        """So does one in the kernel itself, which modules.builtin lists."""
        write(root, f"lib/modules/{RELEASE}/modules.builtin", "kernel/drivers/block/virtio_blk.ko\n")
        write(root, f"lib/modules/{RELEASE}/modules.dep", "")
        assert "built into" in doctor.check_module("virtio_blk", RELEASE, root).detail

    def test_kernel_without_it(self, root: Path) -> None:
        """A kernel built without the module needs another kernel."""
        write(root, f"lib/modules/{RELEASE}/modules.dep", "kernel/x/notvduse.ko:\n")
        check_trouble(doctor.check_module("vduse", RELEASE, root), "fail", "no such module")

    def test_no_modules_installed(self, root: Path) -> None:
        """A container, say, does not see the host's modules."""
        check_trouble(doctor.check_module("vduse", "6.99", root), "fail", "6.99", "does not exist")

    def test_loading_is_disabled(self, root: Path) -> None:
        """A locked-down boot has to load it early."""
        write(root, "proc/sys/kernel/modules_disabled", "1\n")
        check_trouble(doctor.check_module("vduse", RELEASE, root), "fail", "modules_disabled")

    def test_no_capability_to_load(self, root: Path) -> None:
        """Only CAP_SYS_MODULE loads modules."""
        write(root, "proc/self/status", "CapEff:\t0000000000201000\n")
        check_trouble(doctor.check_module("vduse", RELEASE, root), "fail", "CAP_SYS_MODULE")

    def test_no_modprobe(self, root: Path) -> None:
        """A minimal image has no kmod."""
        (root / "sbin/modprobe").unlink()
        check_trouble(doctor.check_module("vduse", RELEASE, root), "fail", "modprobe")


class TestControlNode:
    def test_expected_later(self, root: Path) -> None:
        """Before the module is loaded its absence is no trouble."""
        assert doctor.check_control_node(root, loaded=False).level == "ok"

    def test_missing(self, root: Path) -> None:
        """After that it is."""
        check_trouble(doctor.check_control_node(root, loaded=True), "fail", "missing")

    def test_there(self, root: Path) -> None:
        """A node that can be opened is fine."""
        write(root, "dev/vduse/control", "")
        assert doctor.check_control_node(root, loaded=True).level == "ok"

    def test_cannot_be_opened(self, root: Path) -> None:
        """What the kernel says about opening it is passed on (a directory cannot be opened for writing)."""
        (root / "dev/vduse/control").mkdir(parents=True)
        check_trouble(doctor.check_control_node(root, loaded=True), "fail", "Is a directory")


def test_api_of_something_that_is_no_control_node(root: Path) -> None:
    """A file in the place of the node does not answer the version ioctl."""
    write(root, "dev/vduse/control", "")
    check_trouble(doctor.check_api(root), "fail")


class TestNamespaces:
    def test_initial(self, root: Path) -> None:
        """The whole range of user ids mapped to itself, and the network of process 1."""
        assert doctor.check_namespaces(root).level == "ok"

    def test_user_namespace(self, root: Path) -> None:
        """Root of a user namespace is nobody to the host."""
        write(root, "proc/self/uid_map", "0 100000 65536\n")
        check_trouble(doctor.check_namespaces(root), "fail", "user namespace")

    def test_network_namespace(self, root: Path) -> None:
        """Another network than that of process 1 has no vdpa family."""
        link = root / "proc/self/ns/net"
        link.unlink()
        link.symlink_to("net:[4026532000]")
        check_trouble(doctor.check_namespaces(root), "fail", "network namespace")

    def test_unknown(self, root: Path) -> None:
        """Who may not look at process 1 is not certain."""
        (root / "proc/1/ns/net").unlink()
        check_trouble(doctor.check_namespaces(root), "warn", "cannot tell")


@pytest.mark.parametrize(
    ("mounts", "level"),
    [
        ("udev /dev devtmpfs rw 0 0\n", "ok"),
        ("tmpfs /dev tmpfs rw 0 0\n", "fail"),
        ("udev /dev devtmpfs rw 0 0\ntmpfs /dev tmpfs rw 0 0\n", "fail"),
        ("tmpfs /dev tmpfs rw 0 0\nudev /dev devtmpfs rw 0 0\n", "ok"),
        ("proc /proc proc rw 0 0\n", "fail"),
    ],
)
def test_device_nodes(root: Path, mounts: str, level: str) -> None:
    """Only devtmpfs, mounted last, shows the node of a new disk."""
    write(root, "proc/self/mounts", mounts)
    assert doctor.check_device_nodes(root).level == level


def test_io_uring_is_asked_of_the_kernel(root: Path) -> None:
    """Whatever this machine allows, the finding is 'ok' or a warning with a remedy, and no descriptor is lost."""
    before = len(os.listdir("/proc/self/fd"))
    finding = doctor.check_io_uring(root)
    assert finding.level in ("ok", "warn")
    assert (finding.level == "ok") == (not finding.remedy)
    assert len(os.listdir("/proc/self/fd")) == before


def test_page_size() -> None:
    """Anything but 4096 is untested."""
    assert doctor.check_page_size(4096).level == "ok"
    check_trouble(doctor.check_page_size(65536), "warn", "65536")


@pytest.mark.parametrize(
    ("capabilities", "hard", "level"),
    [
        (ALL_CAPABILITIES, 0, "ok"),
        ("1004000", 0, "ok"),
        ("0", resource.RLIM_INFINITY, "ok"),
        ("0", doctor.MEMLOCK_WANTED, "ok"),
        ("0", 8 << 20, "warn"),
        ("4000", 8 << 20, "warn"),
        ("1000000", 8 << 20, "warn"),
    ],
)
def test_locked_memory(root: Path, capabilities: str, hard: int, level: str) -> None:
    """A high limit is wanted, or the capabilities to pass it by and to raise it."""
    write(root, "proc/self/status", f"CapEff:\t{capabilities}\n")
    assert doctor.check_memlock(root, 65536, hard).level == level


def test_run_directory(tmp_path: Path) -> None:
    """It is there, or can be made; a file in the way is a failure."""
    assert doctor.check_run_dir(tmp_path, rundir.check_run_root).level == "ok"
    assert doctor.check_run_dir(tmp_path / "a" / "b", rundir.check_run_root).level == "ok"
    (tmp_path / "file").write_text("")
    check_trouble(doctor.check_run_dir(tmp_path / "file" / "b", rundir.check_run_root), "fail", "file")


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "open"])
def test_run_directory_that_attach_refuses(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """doctor says what attach says."""
    place = tmp_path / "run"
    match kind:
        case "file":
            place.touch()
        case "link":
            place.symlink_to(tmp_path)
        case "dangling":
            place.symlink_to("nowhere")
        case "open":
            place.mkdir()
            place.chmod(0o777)
    monkeypatch.setenv(rundir.RUN_ENV, str(place))
    with pytest.raises(ControlError) as caught:
        rundir.make_directory("a")
    check_trouble(doctor.check_run_dir(place, rundir.check_run_root), "fail", str(caught.value))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_run_directory_of_somebody_else(tmp_path: Path) -> None:
    """It is not enough that root may write there."""
    os.chown(tmp_path, 65534, 65534)
    check_trouble(doctor.check_run_dir(tmp_path, rundir.check_run_root), "fail", "65534")


def test_udev(root: Path) -> None:
    """Without udev disks work, but have no links by serial."""
    assert doctor.check_udev(root).level == "ok"
    (root / "run/udev/control").unlink()
    check_trouble(doctor.check_udev(root), "warn", "by-id")


def test_all_at_once(tmp_path: Path) -> None:
    """On this very machine every check comes to a finding, and each name appears once."""
    findings = doctor.examine(tmp_path, rundir.check_run_root)
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    assert {"privileges", "kernel", "module vduse", "io_uring", "page size", "run directory"} <= set(names)
    assert all(finding.remedy for finding in findings if finding.level != "ok")


def test_remnants_of_killed_servers_are_named(root: Path) -> None:
    """And where there are none, nothing is said of them."""
    write(root, "sys/class/vduse/a/msg_timeout", "120\n")
    assert list(doctor.check_remnants(root)) == []
    write(root, "sys/class/vduse/b@2/msg_timeout", f"{0x76626C6B}\n")
    (finding,) = doctor.check_remnants(root)
    check_trouble(finding, "warn", "b@2")
    assert "a," not in finding.detail
