"""Can this host present disks through VDUSE? One check per fact, each with the remedy.

The checks only look: no module is loaded and no device is made. Levels: ``fail`` = no disk can be attached;
``warn`` = it works, with the drawback that ``detail`` names; ``ok``. ``root`` in the checks is where the file
system begins, so that tests can show a check the files of another host.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from vduse_blk.exporters.vduse import names

from vduse_blk.block.errors import UserError

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found. ``remedy`` is one sentence, empty for ``ok``."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


MODULES: Final = {
    "vduse": "gives /dev/vduse",
    "virtio_vdpa": "binds a vDPA device to the host's virtio drivers",
    "virtio_blk": "makes the disk",
}

OLDEST_KERNEL: Final = (5, 15)  # first release with VDUSE
TESTED_KERNEL: Final = (6, 12)  # oldest release the test suite runs on
LEAKY_KERNELS: Final = ((7, 0), (7, 2))  # seen on 7.2; the code that leaks came with ABI v1 in 7.0
BLOCK_CAPABILITIES: Final = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}
MEMLOCK_WANTED: Final = 256 << 20
NETLINK_SECONDS: Final = 60

_IO_URING_SETUP: Final = 425  # the same number on every architecture
_KERNEL_REMEDY: Final = (
    "boot a kernel built with CONFIG_VDPA_USER, CONFIG_VIRTIO_VDPA and CONFIG_VIRTIO_BLK; on Debian 12 that "
    "is the package linux-image-6.12-amd64 (its 6.1 kernel has no vDPA)"
)


def examine(run_dir: Path, check_existing: Callable[[Path], None], root: Path = Path("/")) -> list[Finding]:
    """Run every check; about a tenth of a second, at most ``NETLINK_SECONDS`` more if the kernel does not
    answer.

    ``run_dir``: where the state of disks is kept. ``check_existing`` raises UserError for one that exists and that attach
    would refuse.
    """
    return list(_examine(run_dir, check_existing, root))


def _examine(run_dir: Path, check_existing: Callable[[Path], None], root: Path) -> Iterator[Finding]:
    yield check_privileges(root)
    yield check_kernel(platform.release())
    modules = [check_module(name, platform.release(), root) for name in MODULES]
    yield from modules
    loaded = is_loaded("vduse", root)
    yield check_control_node(root, loaded=loaded)
    if loaded:
        yield check_api(root)
        yield check_netlink()
    yield from check_remnants(root)
    yield check_namespaces(root)
    yield check_device_nodes(root)
    yield check_io_uring(root)
    yield check_page_size(os.sysconf("SC_PAGE_SIZE"))
    yield check_memlock(root, *resource.getrlimit(resource.RLIMIT_MEMLOCK))
    yield check_run_dir(run_dir, check_existing)
    yield check_udev(root)


def check_privileges(root: Path) -> Finding:
    """Netlink's DEV_NEW wants CAP_NET_ADMIN, loading modules and the swap list want root; we ask for both."""
    have = effective_capabilities(root)
    missing = [name for bit, name in BLOCK_CAPABILITIES.items() if not have >> bit & 1]
    if not missing:
        return Finding("privileges", "ok", "all that is needed")
    return Finding(
        "privileges",
        "fail",
        f"{' and '.join(missing)} missing (user id {os.geteuid()})",
        "run vduse-blk as root, in a container with --privileged",
    )


def effective_capabilities(root: Path) -> int:
    """Bit mask of the capabilities this process can use now."""
    status = (root / "proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return int(found[1], 16) if found else 0


def kernel_version(release: str) -> tuple[int, int]:
    """'6.12.117+deb12-amd64' → (6, 12); (0, 0) if it does not begin like that."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_kernel(release: str) -> Finding:
    version = kernel_version(release)
    if version < OLDEST_KERNEL:
        return Finding("kernel", "fail", f"{release} is older than VDUSE (5.15)", _KERNEL_REMEDY)
    if LEAKY_KERNELS[0] <= version <= LEAKY_KERNELS[1]:
        return Finding(
            "kernel",
            "warn",
            f"{release} leaks memory whenever one VDUSE device is added to vDPA again (`vdpa dev add`)",
            "let only vduse-blk attach and detach its disks: each time it makes a new device, none leaks",
        )
    if version < TESTED_KERNEL:
        return Finding(
            "kernel",
            "warn",
            f"{release} is older than the oldest tested release (6.12)",
            "prefer a kernel of 6.12 or newer",
        )
    return Finding("kernel", "ok", release)


def is_loaded(module: str, root: Path) -> bool:
    """Whether a module is in the running kernel, loaded or (with parameters) built in."""
    return (root / "sys/module" / module).is_dir()


def check_module(module: str, release: str, root: Path) -> Finding:
    name = f"module {module}"
    if is_loaded(module, root):
        return Finding(name, "ok", f"loaded ({MODULES[module]})")
    directory = root / "lib/modules" / release
    if _is_listed(module, directory / "modules.builtin"):
        return Finding(name, "ok", f"built into the kernel ({MODULES[module]})")
    if not _is_listed(module, directory / "modules.dep"):
        if not directory.is_dir():
            return Finding(
                name,
                "fail",
                f"neither in the running kernel nor to be found: {directory} does not exist",
                f"install the modules of kernel {release} there (container: mount the host's), or " + _KERNEL_REMEDY,
            )
        return Finding(name, "fail", f"kernel {release} has no such module", _KERNEL_REMEDY)
    if _first_line(root / "proc/sys/kernel/modules_disabled") == "1":
        return Finding(
            name,
            "fail",
            "not loaded, and this boot refuses to load modules (kernel.modules_disabled)",
            f"load {module} early at boot, for instance by a line in /etc/modules-load.d/vduse-blk.conf",
        )
    if not effective_capabilities(root) >> 16 & 1:  # CAP_SYS_MODULE
        return Finding(
            name,
            "fail",
            "not loaded, and CAP_SYS_MODULE to load it is missing",
            f"run `modprobe {module}` as root",
        )
    if not any((root / place / "modprobe").exists() for place in ("sbin", "usr/sbin", "bin", "usr/bin")):
        return Finding(
            name,
            "fail",
            "not loaded, and there is no modprobe to load it",
            f"install kmod, or run `modprobe {module}` outside of this container",
        )
    return Finding(name, "ok", f"available, will be loaded when a disk is attached ({MODULES[module]})")


def _is_listed(module: str, index: Path) -> bool:
    """Whether depmod's ``index`` names the module: 'kernel/drivers/x/virtio-vdpa.ko.xz: …'; '-' equals
    '_'."""
    try:
        text = index.read_text()
    except OSError:
        return False
    files = (line.split(":", 1)[0].rsplit("/", 1)[-1] for line in text.splitlines())
    return any(file.split(".ko", 1)[0].replace("-", "_") == module for file in files)


def check_control_node(root: Path, *, loaded: bool) -> Finding:
    node = root / "dev/vduse/control"
    if not node.exists():
        if not loaded:
            return Finding("/dev/vduse/control", "ok", "appears when module vduse is loaded")
        return Finding(
            "/dev/vduse/control",
            "fail",
            "missing, although module vduse is loaded",
            "mount devtmpfs on /dev; in a container add --device /dev/vduse/control or run it --privileged",
        )
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return Finding(
            "/dev/vduse/control",
            "fail",
            f"cannot be opened: {e.strerror}",
            "run as root; in a container allow the device (--device /dev/vduse/control, or --privileged)",
        )
    return Finding("/dev/vduse/control", "ok", "can be opened for reading and writing")


def check_api(root: Path) -> Finding:
    """ABI v0 is what a block device needs; it is asked for explicitly because asking for the newest changes
    it."""
    from pyvduse.control import Control

    try:
        with Control.open(str(root / "dev/vduse/control"), api_version=0):
            return Finding("VDUSE API", "ok", "version 0 accepted")
    except OSError as e:
        return Finding("VDUSE API", "fail", str(e), _KERNEL_REMEDY)


def check_netlink() -> Finding:
    """In a process of its own: the kernel blocks all generic netlink, uninterruptibly, while a VDUSE device
    owes it an answer, and a process that waits there cannot be killed."""
    name = "netlink family vdpa"
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pyvduse.vdpa", "list"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as e:
        return Finding(name, "warn", f"not asked: cannot run {sys.executable}: {e.strerror}", "run doctor as root")
    try:
        _, errors = child.communicate(timeout=NETLINK_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()  # not waited for: in the kernel it may stay for as long as the answer is missing
        return Finding(
            name,
            "fail",
            f"silent for {NETLINK_SECONDS} seconds: the server of some VDUSE device leaves a message of "
            "the kernel unanswered",
            "look for a hung attach or detach in `vduse-blk list` and end its server",
        )
    if child.returncode == 0:
        return Finding(name, "ok", "answers")
    said = errors.strip().splitlines()
    return Finding(
        name,
        "fail",
        said[-1] if said else f"cannot be asked (exit status {child.returncode})",
        "run in the initial network namespace (a container: --network host); the family exists nowhere else",
    )


def check_remnants(root: Path) -> Iterator[Finding]:
    """Says nothing if there are none."""
    found = names.remnants(root / "sys/class/vduse")
    if found:
        yield Finding(
            "remnants",
            "warn",
            f"without a disk: {', '.join(found)}; the killed servers that had them wait in the kernel, or have ended since",
            "make the storage of these servers answer; the devices go when any disk is attached or detached after that",
        )


def check_namespaces(root: Path) -> Finding:
    """Netlink's vdpa family exists in the initial network namespace only and wants the initial user
    namespace."""
    try:
        uid_map = (root / "proc/self/uid_map").read_text().split()
    except OSError:
        uid_map = []
    if uid_map and uid_map != ["0", "0", "4294967295"]:
        return Finding(
            "namespaces",
            "fail",
            "in a user namespace, where no privilege over the host's devices exists",
            "run outside of user namespaces (no rootless container, no --userns)",
        )
    try:
        ours, first = (os.readlink(root / "proc" / who / "ns/net") for who in ("self", "1"))
    except OSError:
        return Finding(
            "namespaces",
            "warn",
            "cannot tell whether this is the initial network namespace",
            "make sure that it is: elsewhere the vdpa family does not exist",
        )
    if ours != first:
        return Finding(
            "namespaces",
            "fail",
            "in a network namespace other than that of process 1, where the vdpa family does not exist",
            "run in the initial network namespace (`nsenter -t 1 -n`, a container with --network host)",
        )
    return Finding("namespaces", "ok", "initial user namespace, network namespace of process 1")


def check_device_nodes(root: Path) -> Finding:
    """Without devtmpfs nobody makes /dev/vdX and /dev/vduse/NAME."""
    try:
        mounts = (root / "proc/self/mounts").read_text().splitlines()
    except OSError:
        mounts = []
    kinds = [fields[2] for fields in map(str.split, mounts) if len(fields) > 2 and fields[1] == "/dev"]
    if kinds and kinds[-1] == "devtmpfs":
        return Finding("/dev", "ok", "devtmpfs: device nodes appear by themselves")
    return Finding(
        "/dev",
        "fail",
        f"a {kinds[-1] if kinds else 'directory'}, in which the nodes of new disks do not appear",
        "mount the kernel's devtmpfs on /dev (in a container: -v /dev:/dev)",
    )


def check_io_uring(root: Path) -> Finding:
    """Ask the kernel itself: the sysctl, seccomp, a security module or the build may forbid it."""
    remedy = "allow io_uring (sysctl kernel.io_uring_disabled=0; a seccomp profile that permits it)"
    disabled = _first_line(root / "proc/sys/kernel/io_uring_disabled")
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params, all zero
    fd = libc.syscall(_IO_URING_SETUP, 1, parameters)
    if fd >= 0:
        os.close(fd)
        return Finding("io_uring", "ok", "allowed")
    number = ctypes.get_errno()
    why = {
        errno.ENOSYS: "this kernel or its seccomp filter has none",
        errno.EPERM: f"forbidden (kernel.io_uring_disabled = {disabled})"
        if disabled not in ("", "0")
        else "forbidden by a seccomp filter or a security module",
        errno.ENOMEM: "the limit of locked memory is too small for it",
    }.get(number, os.strerror(number))
    return Finding("io_uring", "warn", f"not usable: {why}; threads do the I/O instead, more slowly", remedy)


def check_page_size(size: int) -> Finding:
    if size == 4096:
        return Finding("page size", "ok", "4096 bytes")
    return Finding(
        "page size",
        "warn",
        f"{size} bytes; only 4096 is tested",
        "prefer a kernel with 4096-byte pages",
    )


def check_memlock(root: Path, soft: int, hard: int) -> Finding:
    """A server locks its memory so that it never waits for a disk it serves, and gives the kernel some as bounce area, for
    which the limit counts whatever the server is allowed otherwise."""
    have = effective_capabilities(root)
    may_lock, may_raise = have >> 14 & 1, have >> 24 & 1  # CAP_IPC_LOCK, CAP_SYS_RESOURCE
    if may_lock and may_raise:
        return Finding("locked memory", "ok", "unlimited (CAP_IPC_LOCK and CAP_SYS_RESOURCE)")
    limit = hard if hard == resource.RLIM_INFINITY else max(soft, hard)
    if limit == resource.RLIM_INFINITY or limit >= MEMLOCK_WANTED:
        return Finding("locked memory", "ok", "limit is high enough")
    what = (
        "data passes through the kernel's memory instead of the server's, more slowly"
        if may_lock
        else "under memory pressure a server may wait for its own disk"
    )
    return Finding(
        "locked memory",
        "warn",
        f"limited to {limit >> 10} KiB: {what}",
        f"raise the limit (`ulimit -l {MEMLOCK_WANTED >> 10}`, a unit's LimitMEMLOCK=), or grant CAP_IPC_LOCK and "
        "CAP_SYS_RESOURCE",
    )


def check_run_dir(run_dir: Path, check_existing: Callable[[Path], None]) -> Finding:
    if os.path.lexists(run_dir):
        try:
            check_existing(run_dir)
        except UserError as e:
            remedy = f"run as root, and have {run_dir} removed, or made a directory of root's that nobody else may write to"
            return Finding("run directory", "fail", str(e), remedy)
    place = run_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Finding("run directory", "ok", f"{run_dir} " + ("is writable" if place == run_dir else "can be made"))
    return Finding(
        "run directory",
        "fail",
        f"{run_dir} cannot be written" if place == run_dir else f"{run_dir} cannot be made in {place}",
        f"run as root, and have {run_dir.parent} mounted read-write",
    )


def check_udev(root: Path) -> Finding:
    if (root / "run/udev/control").exists():
        return Finding("udev", "ok", "running: /dev/disk/by-id shows disks by their serial")
    return Finding(
        "udev",
        "warn",
        "not running: no links in /dev/disk/by-id",
        "start systemd-udevd, or use /dev/vdX and /dev/vduse-blk/NAME",
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text().split("\n", 1)[0].strip()
    except OSError:
        return ""
