"""Who uses a block device or keeps a lock on a file: read from /proc and /sys, for refusals that name somebody.

Of a block device (a whole disk with its partitions, or a partition): mounts in every mount namespace, swap, device-mapper
and md devices on top, loop devices over it, open descriptors. About 4 microseconds per open descriptor of the host.

Not seen: processes in /proc that we may not look at (run as root), mount namespaces that live without any process, and
mappings whose descriptor is closed. An exclusive open (O_EXCL) is the kernel's own word on all but the last and decides;
this module says why.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from vduse_blk.block.linux import statx, take_descriptor

_ROOT: Final = Path("/")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")

HolderKind = Literal["mount", "swap", "device", "loop", "open", "lock"]


@dataclass(frozen=True, slots=True)
class Holder:
    """One user. ``detail``: mount point, swap's path, name of the device on top, or the process's command.

    ``pid``: the process of an "open" or a "lock" (None: it is not visible here); of a "mount" one that sees it, None if
    we do ourselves. ``str()`` completes "it is in use: …".
    """

    kind: HolderKind
    detail: str
    pid: int | None = None

    @property
    def is_udev(self) -> bool:
        """Whether it is somebody who looks at every disk that has changed, and soon goes."""
        return self.kind == "open" and self.detail in ("(udev-worker)", "systemd-udevd")

    def __str__(self) -> str:
        match self.kind:
            case "mount":
                where = "" if self.pid is None else f" in the mount namespace of process {self.pid}"
                return f"mounted on {self.detail}{where}"
            case "swap":
                return f"used for swap ({self.detail})"
            case "device":
                return f"held by block device {self.detail}"
            case "loop":
                return f"used by loop device {self.detail}"
            case "open":
                return f"open in process {self.pid} ({self.detail})"
            case "lock":
                who = "a process not visible here" if self.pid is None else f"process {self.pid} ({self.detail})"
                return f"locked by {who}"


class _Disk(NamedTuple):
    """A device and its partitions."""

    names: frozenset[str]
    """As in /sys/class/block."""
    numbers: frozenset[str]
    """MAJOR:MINOR."""


def holders_of(major: int, minor: int, *, root: Path = _ROOT) -> list[Holder]:
    """Everybody who uses block device ``major:minor`` or a partition of it, kernel users first; empty if nobody or
    if there is no such device. ``root`` holds the ``proc`` and ``sys`` to look at."""
    disk = _disk_of(major, minor, root)
    return list(
        dict.fromkeys(
            [
                *_mounts(disk, root),
                *_swaps(disk, root),
                *_stacked(disk, root),
                *_loops(lambda path: _number_of(path, root) in disk.numbers, root),
                *_openers(disk, root),
            ]
        )
    )


def loops_over(fd: int, *, writable_only: bool, root: Path = _ROOT) -> list[Holder]:
    """Loop devices whose backing file is that of ``fd``; with ``writable_only`` those that may change it."""
    wanted = os.fstat(fd)

    def is_it(backing: str) -> bool:
        try:
            return os.path.samestat(os.stat(backing), wanted)
        except OSError:
            return False

    return list(_loops(is_it, root, writable_only=writable_only))


def locks_on(fd: int, *, root: Path = _ROOT) -> list[Holder]:
    """Who holds record locks (fcntl) on the file of ``fd`` through other open descriptions; processes only that we may
    look at. Locks of open descriptions have no process in /proc/locks; the description's fdinfo shows them."""
    inode = os.fstat(fd).st_ino
    own = (os.getpid(), fd)
    found = []
    for pid, descriptors in _processes(root):
        for number in descriptors:
            if (pid, int(number)) == own:
                continue
            directory = f"{root}/proc/{pid}"
            text = _read(f"{directory}/fdinfo/{number}")
            if not any(
                line.startswith("lock:") and line.split()[-3].rpartition(":")[2] == str(inode) for line in text.splitlines()
            ):
                continue
            # The line's device number is the superblock's, which is not what stat() says on btrfs and overlays.
            try:
                if not os.path.samestat(os.stat(f"{directory}/fd/{number}"), os.fstat(fd)):
                    continue
            except OSError:
                continue
            found.append(Holder("lock", command_of(pid, root=root), pid))
    return list(dict.fromkeys(found))


def take_from(pid: int, path: str, *, root: Path = _ROOT) -> int | None:
    """A duplicate of the descriptor through which process ``pid`` has the file at ``path`` open, its locks included; None if
    it has it not, or not any more. Any of its threads will do: of a process that was killed only those are left that wait
    in the kernel. Raises OSError as ``linux.take_descriptor``."""
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return None
    tasks = {pid: f"{root}/proc/{pid}"} | {int(task): f"{root}/proc/{pid}/task/{task}" for task in _tasks(pid, root)}
    refused: OSError | None = None
    for task, directory in tasks.items():
        for number in _list(f"{directory}/fd"):
            try:
                found = statx(f"{directory}/fd/{number}")
                if (found.dev, found.ino) != (wanted.st_dev, wanted.st_ino):
                    continue
                return take_descriptor(task, int(number))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EBADF):
                    refused = error
    if refused is not None:
        raise refused
    return None


def take_sockets(pid: int, *, root: Path = _ROOT) -> list[socket.socket]:
    """Duplicates of the unix sockets at which process ``pid`` listens and of the connections made there; not of those it was
    given by whoever started it, or has connected. Raises OSError as ``linux.take_descriptor``."""
    taken = []
    for task in (pid, *map(int, _tasks(pid, root))):
        numbers = _list(f"{root}/proc/{task}/fd")
        for number in numbers:
            try:
                if not os.readlink(f"{root}/proc/{task}/fd/{number}").startswith("socket:"):
                    continue
                one = socket.socket(fileno=take_descriptor(task, int(number)))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EBADF):
                    raise
                continue
            if one.family == socket.AF_UNIX and one.getsockname():
                taken.append(one)
            else:
                one.close()
        if numbers:  # threads share them; one that has ended has none
            break
    return taken


def command_of(pid: int, *, root: Path = _ROOT) -> str:
    """A process's name, at most 15 characters; '?' if it is gone."""
    return _read(f"{root}/proc/{pid}/comm").strip() or "?"


# ------------------------------------------------------------------------------------------------- kernel users


def _disk_of(major: int, minor: int, root: Path) -> _Disk:
    number = f"{major}:{minor}"
    directory = os.path.realpath(f"{root}/sys/dev/block/{number}")
    if not os.path.isdir(directory):
        return _Disk(frozenset(), frozenset())
    names, numbers = {os.path.basename(directory)}, {number}
    for entry in os.listdir(directory):
        if os.path.exists(f"{directory}/{entry}/partition"):
            names.add(entry)
            numbers.add(_read(f"{directory}/{entry}/dev").strip())
    return _Disk(frozenset(names), frozenset(numbers))


def _mounts(disk: _Disk, root: Path) -> Iterator[Holder]:
    """File systems on the disk. btrfs has device numbers of its own and names one of its devices, perhaps another."""
    members: dict[str, set[str]] = {}  # of the btrfs file systems the disk belongs to, by UUID
    for uuid in _list(f"{root}/sys/fs/btrfs"):
        names = _list(f"{root}/sys/fs/btrfs/{uuid}/devices")
        numbers = {_read(f"{root}/sys/class/block/{name}/dev").strip() for name in names}
        if numbers & disk.numbers:
            members[uuid] = numbers
    unseen = set(members)
    seen: set[str] = set()
    for pid, text in _mount_tables(root):
        for line in text.splitlines():
            before, _, after = line.partition(" - ")
            fields, source = before.split(" "), after.split(" ")
            if len(fields) < 5 or len(source) < 2:
                continue
            where = _unescape(fields[4])
            if fields[2] not in disk.numbers:
                if source[0] != "btrfs":
                    continue
                number = _number_of(_unescape(source[1]), root)
                of = [uuid for uuid, numbers in members.items() if number in numbers]
                if not of:
                    continue
                unseen.difference_update(of)
            if where not in seen:  # most namespaces are copies of ours
                seen.add(where)
                yield Holder("mount", where, pid)
    for uuid in unseen:
        yield Holder("mount", f"a place not visible here (btrfs {uuid})")


def _mount_tables(root: Path) -> Iterator[tuple[int | None, str]]:
    """The mount table of every mount namespace, ours (None) first, with a process that lives in it."""
    seen = {_link(f"{root}/proc/self/ns/mnt")}
    yield None, _read(f"{root}/proc/self/mountinfo")
    for pid in _pids(root):
        namespace = _link(f"{root}/proc/{pid}/ns/mnt")
        if namespace and namespace not in seen:
            text = _read(f"{root}/proc/{pid}/mountinfo")
            if text:
                seen.add(namespace)
                yield pid, text


def _swaps(disk: _Disk, root: Path) -> Iterator[Holder]:
    for line in _read(f"{root}/proc/swaps").splitlines()[1:]:
        path = _unescape(line.split()[0])
        if _number_of(path, root) in disk.numbers:
            yield Holder("swap", path)


def _stacked(disk: _Disk, root: Path) -> Iterator[Holder]:
    for name in sorted(disk.names):
        for holder in _list(f"{root}/sys/class/block/{name}/holders"):
            label = _read(f"{root}/sys/class/block/{holder}/dm/name").strip()
            yield Holder("device", f"/dev/{holder} ({label})" if label else f"/dev/{holder}")


def _loops(is_it: Callable[[str], bool], root: Path, *, writable_only: bool = False) -> Iterator[Holder]:
    for name in _list(f"{root}/sys/block"):
        if not name.startswith("loop"):
            continue
        backing = _read(f"{root}/sys/block/{name}/loop/backing_file").removesuffix("\n").removesuffix(" (deleted)")
        if not backing or not is_it(backing):
            continue
        if writable_only and _read(f"{root}/sys/block/{name}/ro").strip() == "1":
            continue
        yield Holder("loop", f"/dev/{name}")


# ---------------------------------------------------------------------------------------------------- processes


def _openers(disk: _Disk, root: Path) -> Iterator[Holder]:
    numbers = {os.makedev(*map(int, number.split(":"))) for number in disk.numbers}
    if not numbers:
        return
    for pid, descriptors in _processes(root):
        for number in descriptors:
            try:
                # Of the open file itself, not of a name: nodes of the disk may be anywhere.
                found = statx(f"{root}/proc/{pid}/fd/{number}")
            except OSError:
                continue
            if found.rdev in numbers and stat.S_ISBLK(found.mode):
                yield Holder("open", command_of(pid, root=root), pid)
                break


def _processes(root: Path) -> Iterator[tuple[int, list[str]]]:
    for pid in _pids(root):
        descriptors = _list(f"{root}/proc/{pid}/fd")
        if descriptors:
            yield pid, descriptors


def _tasks(pid: int, root: Path) -> list[str]:
    return [entry for entry in _list(f"{root}/proc/{pid}/task") if entry.isdecimal()]


def _pids(root: Path) -> Iterable[int]:
    return sorted(int(entry) for entry in _list(f"{root}/proc") if entry.isdecimal())


# ------------------------------------------------------------------------------------------------------- reading


def _number_of(path: str, root: Path) -> str:
    """MAJOR:MINOR of the device a path leads to, or, if there is nothing, of the device of that name: the path may be
    one of another namespace. '' if it is something else."""
    real = os.path.realpath(f"{root}/{path}")
    try:
        found = statx(real)
    except OSError:
        return _read(f"{root}/sys/class/block/{os.path.basename(real)}/dev").strip()
    return f"{os.major(found.rdev)}:{os.minor(found.rdev)}" if stat.S_ISBLK(found.mode) else ""


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def _list(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
