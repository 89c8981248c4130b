"""The directory of a disk: its name, its files, and the lock that means that the disk is served.

Every disk has a directory ``/run/vduse-blk/NAME/`` (0700) with ``state.json``, ``log`` and
``control.sock``. Its server holds ``flock()`` on the directory itself for as long as it lives, so "is it
served?" has one answer which the kernel keeps right through any death: the lock. The directory is made before
anything else of a disk and removed after everything else; whoever removes it does so under that lock, and
whoever takes the lock checks that the path still leads to what was locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vduse_blk.block.errors import UserError
from vduse_blk.control.errors import ControlError, Exit, Served, unusable

RUN_ENV: Final = "VDUSE_BLK_RUN"
"""Environment variable that moves ``/run/vduse-blk`` elsewhere (tests, unprivileged experiments)."""

DEFAULT_RUN_ROOT: Final = "/run/vduse-blk"
_SOCKET_PATH_MAX: Final = 107  # sizeof(sockaddr_un.sun_path) - 1 for the terminating NUL


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", re.ASCII)


def check_name(name: str) -> str:
    """Return ``name`` if it can be a disk's name; raise ``UserError`` (exit 2) saying the rule otherwise.

    The name becomes a file name in ``/dev/vduse``, ``/dev/vduse-blk`` and the run directory. The kernel
    accepts almost anything, including ``..`` and ``/``, so the rule is ours. ``control`` is the kernel's own
    node.
    """
    if _NAME.fullmatch(name) is None or name == "control":
        raise unusable(
            "name",
            name,
            "1 to 63 of letters, digits, '_', '.', '-', starting with a letter, a digit or '_', and not 'control'",
        )
    return name


def run_root() -> Path:
    """Directory that holds one directory per disk. Raises ``UserError`` (exit 2)."""
    return directory_of(RUN_ENV, DEFAULT_RUN_ROOT)


def directory_of(variable: str, default: str) -> Path:
    """What an environment variable names. Raises ``UserError`` (exit 2) for a relative path, which would be another
    directory for every process: servers work in ``/``."""
    path = Path(os.environ.get(variable) or default)
    if not path.is_absolute():
        raise unusable(variable, str(path), "absolute paths")
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


def disk_names() -> list[str]:
    """Names that have a directory, sorted. Empty if the run directory does not exist. Raises ``ControlError`` if it
    is not a directory (exit 4) or cannot be read (exit 5)."""
    try:
        with os.scandir(run_root()) as entries:
            found = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise in_the_way(run_root()) from None
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
        while not _found_or_made(paths.directory, exclusive):
            pass
    except PermissionError as e:
        raise ControlError(f"cannot create {paths.directory}: no permission; run as root", Exit.DENIED) from e
    except FileExistsError:  # the name is taken
        raise
    except OSError as e:
        raise ControlError(f"cannot create {paths.directory}: {e.strerror}", Exit.FAILED) from e
    return paths


def _found_or_made(directory: Path, exclusive: bool) -> bool:
    """False: somebody has removed it meanwhile. Raises FileExistsError only if ``exclusive``."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if exclusive:
            raise
    try:
        _check_owned(directory, 0o077)
    except FileNotFoundError:
        return False
    return True


def _make_run_root(root: Path) -> None:
    try:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
    except FileExistsError:  # not the disk's name, which would be "taken"
        raise in_the_way(root) from None
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


def no_such_disk(name: str) -> ControlError:
    """The error (exit 3) of a name that has no directory."""
    return ControlError(f"no disk is called '{name}'; `vduse-blk list` shows all", Exit.NOT_FOUND)


def in_the_way(path: Path) -> ControlError:
    """The error (exit 4) of a path that should be a directory."""
    return ControlError(f"{path} is in the way: it is not a directory", Exit.BUSY)


def _check_owned(directory: Path, forbidden: int) -> None:
    """Refuse a directory that is not ours alone: what we write there a root process reads and obeys."""
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise in_the_way(directory)
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


def remove_directory(
    name: str, *, locked_fd: int | None = None, opened_fd: int | None = None, patience: float = 1.0
) -> bool:
    """Remove the disk's directory and the files in it, under its lock.

    Whoever has the lock passes its descriptor as ``locked_fd`` (which stays open: the lock ends with it).
    Anybody else leaves it out; then False is returned, and nothing is touched, if a server lives, which is
    certain only after ``patience`` seconds (see ``lock_directory``). With ``opened_fd`` (of
    ``open_directory``; it stays open) a directory made since under the same name is left alone. Raises
    ``ControlError`` (exit 4), with nothing touched, if there is a directory in it; (exit 1) if it cannot be removed.
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
        try:
            for entry in entries:
                os.unlink(entry, dir_fd=fd)
            os.rmdir(paths.directory)
        except OSError as e:
            raise ControlError(f"cannot remove {paths.directory}: {e.strerror}", Exit.FAILED) from e
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
            raise in_the_way(paths.directory) from e
        raise


def _leads_to(path: Path, fd: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd)) and stat.S_ISDIR(there.st_mode)
