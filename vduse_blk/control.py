"""What the server of a disk and the programs that talk to it share: names, places, messages, exit codes.

Places. Every disk has a directory ``/run/vduse-blk/NAME/`` (0700) with ``state.json``, ``log`` and
``control.sock``. Its server holds ``flock()`` on the directory itself for as long as it lives, so "is it
served?" has one answer which the kernel keeps right through any death: the lock. The directory is made before
anything else of a disk and removed after everything else; whoever removes it does so under that lock, and
whoever takes the lock checks that the path still leads to what was locked.

Messages. A unix stream socket; one JSON object per line in each direction, one reply per request, in order::

    {"op": "detach", "force": false}
    {"ok": true}  |  {"ok": false, "error": "one sentence", "code": 4, "holders": [...]}

Start. ``attach`` hands a server its ``WorkerSpec`` as JSON on standard input, and in ``ready_fd`` the number
of an inherited pipe. The server writes exactly one line there and closes it: ``ready_line`` or
``failure_line``. Before that line either side may give up: a reader that closes its end asks the server to
undo everything and exit; an end of file without a line means that the server died.

Standard library only: the command line, the server and the node daemon all import this.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from vduse_blk.block.errors import UserError
from vduse_blk.block.policy import Policy

RUN_ENV: Final = "VDUSE_BLK_RUN"
"""Environment variable that moves ``/run/vduse-blk`` elsewhere (tests, unprivileged experiments)."""

DEFAULT_RUN_ROOT: Final = "/run/vduse-blk"
SETTINGS_ENV: Final = "VDUSE_BLK_ETC"
"""Environment variable that moves ``/etc/vduse-blk`` elsewhere."""
DEFAULT_SETTINGS_ROOT: Final = "/etc/vduse-blk"
MAX_MESSAGE: Final = 1 << 20
"""Longest message in bytes, newline included. ``info`` of 64 queues is about 20 KiB."""

_SOCKET_PATH_MAX: Final = 107  # sizeof(sockaddr_un.sun_path) - 1 for the terminating NUL


class Exit(IntEnum):
    """Exit status of the command line and of the server, and ``code`` in a failed reply."""

    OK = 0
    FAILED = 1  # unexpected: a bug, or the kernel said no
    USAGE = 2  # bad options, source, size or name syntax
    NOT_FOUND = 3  # no such disk
    BUSY = 4  # name taken, file in use, disk mounted or held
    DENIED = 5  # not root, or no access
    UNSUPPORTED = 6  # the host cannot do it: `vduse-blk doctor` explains
    TIMEOUT = 7
    LEFT = 8  # of a server: ended as asked, and its disk waits for the next one


class ControlError(UserError):
    """A request that was refused or could not be delivered. ``holders`` names who keeps a busy disk open."""

    def __init__(self, message: str, exit_code: int = Exit.FAILED, holders: list[Any] | None = None) -> None:
        super().__init__(message, exit_code)
        self.holders: list[Any] = holders or []


class NotServed(ControlError):
    """The disk's directory exists, its server does not (or does not listen yet)."""


class Served(ControlError):
    """The disk's directory is locked by another process: its server lives."""


class Hangup(ControlError):
    """The server ended the conversation, or spoke nonsense, instead of a reply; perhaps it died."""


# ---------------------------------------------------------------------------------------------------- names

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", re.ASCII)


def check_name(name: str) -> str:
    """Return ``name`` if it can be a disk's name; raise ``UserError`` (exit 2) saying the rule otherwise.

    The name becomes a file name in ``/dev/vduse``, ``/dev/vduse-blk`` and the run directory. The kernel
    accepts almost anything, including ``..`` and ``/``, so the rule is ours. ``control`` is the kernel's own
    node.
    """
    if _NAME.fullmatch(name) is None or name == "control":
        raise _unusable(
            "name",
            name,
            "1 to 63 of letters, digits, '_', '.', '-', starting with a letter, a digit or '_', and not 'control'",
        )
    return name


# --------------------------------------------------------------------------------------------------- places


def run_root() -> Path:
    """Directory that holds one directory per disk. Raises ``UserError`` (exit 2)."""
    return _directory_of(RUN_ENV, DEFAULT_RUN_ROOT)


def _directory_of(variable: str, default: str) -> Path:
    """Relative, it would be another directory for every process: servers work in ``/``."""
    path = Path(os.environ.get(variable) or default)
    if not path.is_absolute():
        raise UserError(f"{variable}: {str(path)!r} is not usable; accepted are absolute paths", Exit.USAGE)
    return path


@dataclass(frozen=True)
class DiskPaths:
    """The files of one disk. Construct with ``DiskPaths.of(name)``."""

    directory: Path
    state: Path
    log: Path
    socket: Path

    @classmethod
    def of(cls, name: str) -> DiskPaths:
        directory = run_root() / check_name(name)
        control = directory / "control.sock"
        if len(os.fsencode(control)) > _SOCKET_PATH_MAX:
            raise UserError(
                f"{RUN_ENV}: {control} is longer than the {_SOCKET_PATH_MAX} bytes of a socket's path; "
                "use a shorter directory",
                Exit.USAGE,
            )
        return cls(directory, directory / "state.json", directory / "log", control)


def parse_settings(items: Iterable[str]) -> dict[str, str]:
    """``KEY=VALUE`` each, as ``vduse-blk set`` and a settings file have them. Raises ``UserError`` (exit 2)."""
    result: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item}: is no setting; accepted is KEY=VALUE", Exit.USAGE)
        if key in result:
            raise UserError(f"{key}: given twice; leave one out", Exit.USAGE)
        result[key] = value
    return result


def settings_file(name: str) -> Path:
    """Where an administrator may keep settings of a disk, for its server to read on SIGHUP. Raises ``UserError``."""
    return _directory_of(SETTINGS_ENV, DEFAULT_SETTINGS_ROOT) / f"{check_name(name)}.settings"


def read_settings(name: str) -> dict[str, str]:
    """Of ``settings_file``: lines ``KEY=VALUE``, empty ones, and ``#`` comments. Empty if there is no such file. Raises
    ``UserError`` (exit 2) and ``OSError``."""
    try:
        with settings_file(name).open(encoding="utf-8") as file:
            text = file.read(MAX_MESSAGE)
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as e:
        raise UserError(f"{settings_file(name)} is not UTF-8", Exit.USAGE) from e
    lines = (line.strip() for line in text.splitlines())
    return parse_settings(line for line in lines if line and not line.startswith("#"))


def disk_names() -> list[str]:
    """Names that have a directory, sorted. Empty if the run directory does not exist. Raises ``ControlError`` if it
    is not a directory (exit 4) or cannot be read (exit 5)."""
    try:
        with os.scandir(run_root()) as entries:
            found = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise _in_the_way(run_root()) from None
    except PermissionError as e:
        raise ControlError(f"{run_root()}: no permission; run as root", Exit.DENIED) from e
    return sorted(name for name in found if _NAME.fullmatch(name) and name != "control")


def make_directory(name: str, *, exclusive: bool = False) -> DiskPaths:
    """Make the disk's directory (0700) and the run directory above it (0755).

    With ``exclusive`` an existing one raises ``FileExistsError``: that is how a name is claimed. No access, and
    existing ones that others could meddle with, raise ``ControlError`` (exit 5).
    """
    paths = DiskPaths.of(name)
    root = paths.directory.parent
    try:
        _make_run_root(root)
        paths.directory.mkdir(mode=0o700, exist_ok=not exclusive)
        _check_owned(paths.directory, 0o077)
    except PermissionError as e:
        raise ControlError(f"cannot create {paths.directory}: no permission; run as root", Exit.DENIED) from e
    except FileExistsError:
        if exclusive:
            raise
        raise _in_the_way(paths.directory) from None
    except OSError as e:
        raise ControlError(f"cannot create {paths.directory}: {e.strerror}", Exit.FAILED) from e
    return paths


def _make_run_root(root: Path) -> None:
    try:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
    except FileExistsError:  # not the disk's name, which would be "taken"
        raise _in_the_way(root) from None
    check_run_root(root)


def check_run_root(root: Path) -> None:
    """Refuse a run directory that others could meddle with. Raises ``ControlError``: exit 4, no directory; exit 5,
    of others or open to them."""
    _check_owned(root, 0o022)  # the list of names is no secret


def check_directory(name: str) -> None:
    """Refuse a disk's directory that others could meddle with; one that does not exist is none. Raises
    ``ControlError`` as ``check_run_root`` does."""
    try:
        _check_owned(DiskPaths.of(name).directory, 0o077)
    except FileNotFoundError:
        pass


def _in_the_way(path: Path, wanted: str = "a directory") -> ControlError:
    return ControlError(f"{path} is in the way: it is not {wanted}", Exit.BUSY)


def _check_owned(directory: Path, forbidden: int) -> None:
    """Refuse a directory that is not ours alone: what we write there a root process reads and obeys."""
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise _in_the_way(directory)
    if found.st_uid == 0 != os.geteuid():  # nothing is wrong with it
        raise ControlError(f"{directory}: no permission; run as root", Exit.DENIED)
    if found.st_uid != os.geteuid() or found.st_mode & forbidden:
        raise ControlError(
            f"{directory} is not safe to use: it belongs to user {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):04o}, and must belong to user {os.geteuid()} with none of "
            f"{forbidden:04o}; remove it or correct it",
            Exit.DENIED,
        )


def lock_directory(name: str, *, opened_fd: int | None = None, patience: float = 1.0) -> int:
    """Take the lock that means "this process serves the disk"; return its descriptor, which the caller keeps
    open.

    Makes the directory if needed; with ``opened_fd`` (of ``open_directory``; it stays open) raises ``ControlError`` (exit 3)
    if it is not that very one any more. ``is_locked`` holds the lock for an instant and another program may be
    removing the directory, so a refusal is final only after ``patience`` seconds. Raises ``Served``
    (exit 4) if another process serves the disk. The descriptor is close-on-exec.
    """
    deadline = time.monotonic() + patience
    while True:
        if opened_fd is not None and not is_directory(name, opened_fd):
            raise _removed(name)
        paths = DiskPaths.of(name) if opened_fd is not None else make_directory(name)
        fd = _open_directory(paths)
        if fd is None:
            continue
        if not _flock(fd, deadline):
            os.close(fd)
            raise Served(f"disk '{name}' is already served by another process", Exit.BUSY)
        if _leads_to(paths.directory, fd) and (opened_fd is None or is_directory(name, opened_fd)):
            return fd
        os.close(fd)  # removed (and perhaps made again) between open and flock


def _flock(fd: int, deadline: float) -> bool:
    """Take the lock alone; False if somebody else has it at ``deadline`` (of ``time.monotonic``)."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.02)


def is_locked(name: str) -> bool:
    """Whether a server of this disk lives. False if it has no directory."""
    fd = _open_directory(DiskPaths.of(name))
    if fd is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


_PF_EXITING: Final = 0x4  # linux/sched.h


def is_dying(name: str) -> bool:
    """Whether the disk's last server was killed and has not ended: a thread of it waits in the kernel, probably for storage,
    and keeps all it had open, the lock of the disk's directory included."""
    pid = read_state(name).get("pid")
    if type(pid) is not int or pid <= 0 or not is_locked(name):
        return False
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
        if int(words[6]) & _PF_EXITING:
            return words[0] != b"Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (OSError, ValueError, IndexError):
        return False
    pending = re.search(r"^SigPnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) >> (signal.SIGKILL - 1) & 1)


def remove_directory(
    name: str, *, locked_fd: int | None = None, opened_fd: int | None = None, patience: float = 1.0
) -> bool:
    """Remove the disk's directory and the files in it, under its lock.

    Whoever has the lock passes its descriptor as ``locked_fd`` (which stays open: the lock ends with it).
    Anybody else leaves it out; then False is returned, and nothing is touched, if a server lives, which is
    certain only after ``patience`` seconds (see ``lock_directory``). With ``opened_fd`` (of
    ``open_directory``; it stays open) a directory made since under the same name is left alone. Raises
    ``ControlError`` (exit 4), with nothing touched, if there is a directory in it.
    """
    paths = DiskPaths.of(name)
    given = locked_fd if locked_fd is not None else opened_fd
    fd = given if given is not None else _open_directory(paths)
    if fd is None:
        return True
    try:
        if locked_fd is None and not _flock(fd, time.monotonic() + patience):
            return False
        if not _leads_to(paths.directory, fd):
            return True
        entries = os.listdir(fd)
        for entry in entries:
            if stat.S_ISDIR(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
                raise ControlError(
                    f"{paths.directory / entry} is in the way: no server makes a directory there; remove it", Exit.BUSY
                )
        for entry in entries:
            os.unlink(entry, dir_fd=fd)
        os.rmdir(paths.directory)
    finally:
        if given is None:
            os.close(fd)
    return True


def open_directory(name: str) -> int:
    """A close-on-exec descriptor of the disk's directory, to know that very directory by."""
    fd = _open_directory(DiskPaths.of(name))
    if fd is None:
        raise _removed(name)
    return fd


def _removed(name: str) -> ControlError:
    return ControlError(f"disk '{name}' was removed meanwhile", Exit.NOT_FOUND)


def is_directory(name: str, opened_fd: int) -> bool:
    """Whether the disk's directory is still the one of ``open_directory``."""
    return _leads_to(DiskPaths.of(name).directory, opened_fd)


def _open_directory(paths: DiskPaths) -> int | None:
    """None if there is no such directory."""
    try:
        return os.open(paths.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError as e:
        raise ControlError(f"{paths.directory}: no permission; run as root", Exit.DENIED) from e
    except OSError as e:
        if e.errno in (errno.ENOTDIR, errno.ELOOP):
            raise _in_the_way(paths.directory) from e
        raise


def _leads_to(path: Path, fd: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd)) and stat.S_ISDIR(there.st_mode)


def read_state(name: str) -> dict[str, Any]:
    """``state.json`` of a disk; empty if there is none yet. The server writes it with ``write_state``."""
    path = DiskPaths.of(name).state
    # write_state replaces the file whole, so anything but an object is damage; a disk must be removable all the same.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # a FIFO would keep us waiting
        with open(fd, "rb") as file:
            state = json.loads(file.read(MAX_MESSAGE)) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except PermissionError as e:
        raise ControlError(f"{path}: no permission; run as root", Exit.DENIED) from e
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):  # says nothing of the disk
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(name: str, state: Mapping[str, Any]) -> None:
    """Replace ``state.json`` (0600) in one step: a reader sees the old text or the new one, never half. Raises
    ``ControlError`` (exit 1) with the path, for instance if the file system is full."""
    replace_json(DiskPaths.of(name).state, state)


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """As ``write_state``, for any file of a disk's directory."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)  # of a server that died over it, or a FIFO in which we would wait
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file takes room, too
        raise ControlError(f"cannot write {path}: {e.strerror}", Exit.FAILED) from e


_EVENTS: Final = "events"
_MAX_EVENTS: Final = 1 << 16
"""Bytes of the file after which its older half goes."""
_SHOWN_EVENTS: Final = 10


def add_event(name: str, **facts: Any) -> None:
    """Note in the disk's directory what became of a server; ``facts`` are JSON values. Best effort: a disk goes on whatever
    becomes of the run directory."""
    path = DiskPaths.of(name).directory / _EVENTS
    line = encode_message({"time": time.time(), **facts})
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        with open(fd, "rb+", buffering=0) as file:
            size = os.fstat(fd).st_size
            if size > _MAX_EVENTS:
                kept = os.pread(fd, _MAX_EVENTS // 2, size - _MAX_EVENTS // 2)
                file.truncate(0)
                line = kept[kept.index(b"\n") + 1 :] + line
            file.write(line)
    except (OSError, ValueError):
        pass


def read_events(name: str) -> list[dict[str, Any]]:
    """What ``add_event`` has noted, oldest first; lines that are damaged are left out."""
    try:
        fd = os.open(DiskPaths.of(name).directory / _EVENTS, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            lines = file.read(2 * _MAX_EVENTS).splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError):
            events.append(decode_message(line))
    return events


# ----------------------------------------------------------------------------------------------- WorkerSpec

PATHS: Final = ("auto", "native", "plugin")
RESTARTS: Final = ("no", "on-failure")
BLOCK_SIZES: Final = (512, 1024, 2048, 4096)
MIN_QUEUE_SIZE: Final = 4  # header, one data segment, status, and one to spare, as one chain without indirect
MAX_QUEUE_SIZE: Final = 32768  # virtio 1.2, 2.7: the largest split queue
MAX_QUEUES: Final = 64
MAX_SERIAL: Final = 20  # VIRTIO_BLK_ID_BYTES
MAX_TIMEOUT: Final = 1e6
"""Seconds, eleven days. The system calls that wait take milliseconds in 32 bits, or refuse infinity."""
TIMEOUT_RULE: Final = f"positive numbers of seconds up to {MAX_TIMEOUT:.0f}"


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a server needs to know to serve one disk. Construction checks every field (``UserError``,
    exit 2)."""

    name: str
    source: str
    """As the user wrote it, except that a relative path was made absolute (a server's working directory is
    ``/``)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the backend beyond those in ``source``."""
    read_only: bool = False
    queues: int | None = None
    """None: the export's own choice; for VDUSE as many as the host has CPUs, at most 8."""
    queue_size: int = 256
    """Descriptors per queue."""
    serial: str | None = None
    """None: the server chooses."""
    block_size: int | None = None
    """Logical block size in bytes; None: the storage's own."""
    size: int | None = None
    """Bytes; None: the storage's own."""
    path: str = "auto"
    """Who serves requests: ``native`` (C), ``plugin`` (asyncio), or ``auto``: native where the storage
    can."""
    ready_fd: int | None = None
    """Inherited pipe for the one line that says how the start went; None: nobody waits (``serve``)."""
    exports: tuple[str, ...] = ("vduse",)
    """Ways to present the disk, as ``vduse_blk.exports`` understands them."""
    timeout: float | None = None
    """Seconds after which whoever waits gives up; None: nobody does."""
    on_error: str | None = None
    """What becomes of requests with temporary errors, as ``vduse_blk.block.policy`` has it; None: the storage's default."""
    on_full: str = "fail"
    """The same for lack of space."""
    filters: tuple[str, ...] = ()
    """Layers over the storage, the lowest first, as ``vduse_blk.source.parse_filter`` understands them."""
    restart: str = "no"
    """``on-failure``: a monitor starts a server that dies again."""
    upgrade_fd: int | None = None
    """Inherited socket on which the server that serves the disk hands it over (``vduse_blk.worker.handover``)."""
    directory_fd: int | None = None
    """Inherited descriptor of the disk's directory, without which there is nothing to serve any more; None: it is made."""

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        check_name(self.name)
        if not self.source:
            raise UserError("source: must not be empty", Exit.USAGE)
        if self.queues is not None and not 1 <= self.queues <= MAX_QUEUES:
            raise _unusable("queues", self.queues, f"1 to {MAX_QUEUES}")
        if not MIN_QUEUE_SIZE <= self.queue_size <= MAX_QUEUE_SIZE or self.queue_size & (self.queue_size - 1):
            raise _unusable("queue-size", self.queue_size, f"powers of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}")
        if self.serial is not None and not (
            self.serial.isascii() and self.serial.isprintable() and 1 <= len(self.serial) <= MAX_SERIAL
        ):
            raise _unusable("serial", self.serial, f"1 to {MAX_SERIAL} printable ASCII characters")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise _unusable("block-size", self.block_size, ", ".join(map(str, BLOCK_SIZES)))
        unit = self.block_size or BLOCK_SIZES[0]
        if self.size is not None and (self.size <= 0 or self.size % unit):
            raise _unusable("size", self.size, f"positive multiples of the block size, {unit} bytes")
        if not self.exports or not all(isinstance(export, str) and export for export in self.exports):
            raise _unusable("exports", self.exports, "lists of at least one way to present the disk")
        if not all(isinstance(text, str) and text for text in self.filters):
            raise _unusable("filters", self.filters, "lists of filters")
        Policy.parse("fail" if self.on_error is None else self.on_error, self.on_full)
        if self.path not in PATHS:
            raise _unusable("path", self.path, ", ".join(PATHS))
        if self.restart not in RESTARTS:
            raise _unusable("restart", self.restart, ", ".join(RESTARTS))
        if self.timeout is not None and not 0 < self.timeout <= MAX_TIMEOUT:
            raise _unusable("timeout", self.timeout, TIMEOUT_RULE)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerSpec:
        """Decode and check. Raises ``UserError`` (exit 2) naming the key that is wrong, missing or
        unknown."""
        try:
            decoded = json.loads(text)
        except ValueError as e:
            raise UserError(f"the disk's specification is not JSON: {e}", Exit.USAGE) from e
        if not isinstance(decoded, dict):
            raise UserError("the disk's specification is not a JSON object", Exit.USAGE)
        known = {f.name for f in fields(cls)}
        unknown = sorted(decoded.keys() - known)
        if unknown:
            raise UserError(
                f"{unknown[0]}: unknown key in the disk's specification; accepted are " + ", ".join(sorted(known)),
                Exit.USAGE,
            )
        for key in ("name", "source"):
            if key not in decoded:
                raise UserError(f"{key}: missing in the disk's specification", Exit.USAGE)
        for key in ("exports", "filters"):
            if isinstance(decoded.get(key), list):
                decoded[key] = tuple(decoded[key])
        return cls(**decoded)


_SPEC_TYPES: Final[Mapping[str, tuple[type, bool]]] = {  # key → (type, may be null)
    "name": (str, False),
    "source": (str, False),
    "options": (dict, False),
    "read_only": (bool, False),
    "queues": (int, True),
    "queue_size": (int, False),
    "serial": (str, True),
    "block_size": (int, True),
    "size": (int, True),
    "path": (str, False),
    "ready_fd": (int, True),
    "exports": (tuple, False),
    "timeout": (float, True),
    "on_error": (str, True),
    "on_full": (str, False),
    "filters": (tuple, False),
    "restart": (str, False),
    "upgrade_fd": (int, True),
    "directory_fd": (int, True),
}


def _check_type(key: str, value: object) -> None:
    wanted, optional = _SPEC_TYPES[key]
    if value is None and optional:
        return
    accepted = (int, float) if wanted is float else wanted
    if not isinstance(value, accepted) or (wanted is not bool and isinstance(value, bool)):
        raise _unusable(key, value, f"values of type {wanted.__name__}")


def _unusable(key: str, value: object, accepted: str) -> UserError:
    return UserError(f"{key}: {value!r} is not usable; accepted are {accepted}", Exit.USAGE)


# ------------------------------------------------------------------------------------------------- messages


def encode_message(message: Mapping[str, Any]) -> bytes:
    """One line, newline included."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode_message(line: bytes) -> dict[str, Any]:
    """Inverse of ``encode_message``. Raises ``ValueError`` for anything but one JSON object, and for one whose ``force``
    is not true or false: what it would allow must not be a matter of interpretation."""
    try:
        message = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    if not isinstance(message.get("force", False), bool):
        raise ValueError(f"force: {message['force']!r} is not usable; accepted are true and false")
    return message


def ok_reply(**values: Any) -> bytes:
    return encode_message({"ok": True, **values})


def error_reply(error: str, code: int, holders: list[Any] | None = None) -> bytes:
    reply: dict[str, Any] = {"ok": False, "error": error, "code": int(code)}
    if holders:
        reply["holders"] = holders
    return encode_message(reply)


def ready_line(device: str, **values: Any) -> bytes:
    """What a server writes to ``ready_fd`` when its disk is usable. ``device`` is the node, ``/dev/vda``."""
    return encode_message({"ready": True, "device": device, **values})


def failure_line(error: str, code: int, holders: list[Any] | None = None) -> bytes:
    """What a server writes to ``ready_fd`` after it undid everything."""
    line: dict[str, Any] = {"error": error, "code": int(code)}
    if holders:
        line["holders"] = holders
    return encode_message(line)


# --------------------------------------------------------------------------------------------------- client


class Client:
    """One connection to the server of one disk. Not for use by several threads at once.

    ``timeout`` is the longest wait in seconds for connecting and for each reply.
    """

    def __init__(self, name: str, timeout: float = 10.0) -> None:
        """Connect. Raises ``ControlError`` (exit 3: no such disk; 5: no access; 7: no answer) and
        ``NotServed``."""
        self.name = name
        self._timeout = timeout
        paths = DiskPaths.of(name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        self._buffer = b""
        try:
            self._socket.connect(str(paths.socket))
        except OSError as e:
            self._socket.close()
            raise _connect_error(name, paths, e) from e

    @property
    def server_pid(self) -> int:
        """Process id of the server, as the kernel recorded it when the server began to listen."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], "little")

    def call(self, op: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send one request, return the successful reply. Raises ``ControlError`` with the server's own
        sentence."""
        wait = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + wait
        try:
            self._socket.settimeout(wait)
            self._socket.sendall(encode_message({"op": op, **arguments}))
            reply = decode_message(self._read_line(deadline))
        except TimeoutError as e:
            raise ControlError(
                f"the server of disk '{self.name}' did not answer '{op}' within {wait:g} seconds",
                Exit.TIMEOUT,
            ) from e
        except (OSError, ValueError, EOFError) as e:
            raise Hangup(
                f"the server of disk '{self.name}' broke the conversation during '{op}' "
                f"({str(e) or type(e).__name__}); its log: {DiskPaths.of(self.name).log}",
                Exit.FAILED,
            ) from e
        if reply.get("ok") is not True:
            raise ControlError(
                str(reply.get("error", f"the server refused '{op}' without a reason")),
                int(reply.get("code", Exit.FAILED)),
                list(reply.get("holders", [])),
            )
        return reply

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) >= MAX_MESSAGE:
                raise ValueError(f"reply longer than {MAX_MESSAGE} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            if not data:
                raise EOFError("connection closed")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect_error(name: str, paths: DiskPaths, error: OSError) -> ControlError:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        root = paths.directory.parent
        if os.path.lexists(root) and not root.is_dir():
            return _in_the_way(root)
        if not paths.directory.is_dir():
            return ControlError(f"no disk is called '{name}'; `vduse-blk list` shows all", Exit.NOT_FOUND)
        return NotServed(f"disk '{name}' has no server; its log: {paths.log}", Exit.FAILED)
    if isinstance(error, PermissionError):
        return ControlError(f"{paths.socket}: no permission; run as root", Exit.DENIED)
    if isinstance(error, TimeoutError | BlockingIOError):  # EAGAIN: the backlog of a hung server is full
        return ControlError(f"the server of disk '{name}' does not accept connections", Exit.TIMEOUT)
    return ControlError(f"{paths.socket}: {error.strerror}", Exit.FAILED)


@dataclass(frozen=True)
class DiskStatus:
    """One disk as seen from outside.

    ``state``: the server's own phase ('starting', 'serving', 'detaching' …); 'starting' also for a server
    that lives and does not listen yet; 'dead': no server; 'dying': see ``is_dying``; 'silent': a server that lives and
    does not answer;
    'unreadable': no access to its directory.
    ``info``: reply to ``info`` where there is a server to ask, else what ``state.json`` says.
    """

    name: str
    state: str
    info: Mapping[str, Any]


def disk_status(name: str, timeout: float = 2.0) -> DiskStatus:
    """Ask one disk's server. Raises ``ControlError`` only if there is no such disk, no access, or something in the
    way of its directory."""
    if is_dying(name):  # it would not answer, and we would wait for that
        return _unanswered(name, "dying")
    try:
        with Client(name, timeout) as client:
            info = client.call("info")
            return DiskStatus(name, str(info.get("phase", "serving")), info | _past(name))
    except NotServed:
        return _unanswered(name, "starting" if is_locked(name) else "dead")
    except ControlError as e:
        if e.exit_code in (Exit.NOT_FOUND, Exit.DENIED, Exit.BUSY):
            raise
        # The conversation ended in the middle: the server is leaving, has left, or hangs.
        if is_dying(name):
            return _unanswered(name, "dying")
        return _unanswered(name, "silent" if is_locked(name) else "dead")


def _unanswered(name: str, state: str) -> DiskStatus:
    return DiskStatus(name, state, read_state(name) | _past(name))


def _past(name: str) -> dict[str, Any]:
    events = read_events(name)
    return {"events": events[-_SHOWN_EVENTS:]} if events else {}


def all_disks(timeout: float = 2.0) -> Iterator[DiskStatus]:
    """Every disk, by name. One that vanishes meanwhile is left out; one whose directory cannot be looked into is
    'unreadable'."""
    for name in disk_names():
        try:
            yield disk_status(name, timeout)
        except ControlError as e:
            if e.exit_code != Exit.NOT_FOUND:
                yield DiskStatus(name, "unreadable", {})


@contextmanager
def server_process(pid: int) -> Iterator[int | None]:
    """A descriptor that becomes readable when the process ends; None if it has ended already."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
