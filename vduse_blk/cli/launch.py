"""Start the server of a disk in the background and see it through until it is ready, or gone with nothing
left.

Who undoes what: the server undoes what it did before it writes a failure line. If it cannot (it died, or
hangs), we remove what is left in the kernel. The disk's directory is ours to remove when we made it.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

from vduse_blk.block.errors import UserError
from vduse_blk.cli import output
from vduse_blk.control import messages, notes, rundir
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, Served
from vduse_blk.control.process import is_dying, server_process
from vduse_blk.control.rundir import DiskPaths
from vduse_blk.control.spec import WorkerSpec

ROLLBACK_SECONDS: Final = 60
"""How long a server that was asked to give up may take before it is killed. Undoing takes a second or two; one that
waits longer waits for the kernel, which may mean minutes (the limit for one VDUSE message), and cleaning up after it is
quicker."""
LOG_LINES: Final = 20
MAX_CANDIDATES: Final = 9999
"""How many names are tried before the user has to choose one."""

_MANAGED_ENV: Final = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)
"""Variables meant for the process that systemd started, which a background server is not."""


SPARE_DESCRIPTORS: Final = 32
"""How many files we, and a server before it knows what it needs, must be able to open. With fewer, undoing fails as
well."""


def check_descriptors() -> None:
    """Raise ``ControlError`` (exit 1) if too few files can be opened to start a server, before anything is made."""
    opened: list[int] = []
    try:
        while len(opened) < SPARE_DESCRIPTORS:
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as e:
        raise ControlError(
            f"starting a disk takes {SPARE_DESCRIPTORS} open files: {e.strerror}; raise the limit (`ulimit -n`)",
            Exit.FAILED,
        ) from e
    finally:
        for fd in opened:
            os.close(fd)


def worker_command() -> list[str]:
    """The server of one disk; its specification comes on standard input.

    ``-P``: a file in the working directory must not stand in for a module of a program that runs as root.
    """
    return [sys.executable, "-P", "-m", "vduse_blk.worker"]


def monitor_command() -> list[str]:
    """The same, started again when it dies."""
    return [sys.executable, "-P", "-m", "vduse_blk.worker.monitor"]


def specification_file(spec: WorkerSpec) -> int:
    """Descriptor of an anonymous file that holds the specification, at its start, close-on-exec."""
    fd = os.memfd_create("vduse-blk-spec", os.MFD_CLOEXEC)
    os.write(fd, spec.to_json().encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def remove_leftover(name: str, *, force: bool, node: int | None = None) -> None:
    """Remove what a dead server of this disk left in the kernel. Raises ``ControlError`` (exit 4: in use). ``node``: the
    server's descriptor of the device, see ``cleanup``; it is closed."""
    try:
        import_module("vduse_blk.exporters.vduse.cleanup").remove_leftover(
            name, rundir.DiskPaths.of(name).directory, force=force, node=node
        )
    except UserError as e:
        holders = [dataclasses.asdict(holder) for holder in getattr(e, "holders", ())]
        raise ControlError(str(e), e.exit_code, holders) from e
    except OSError as e:
        raise ControlError(f"cannot remove what the dead server of disk '{name}' left: {e}", Exit.FAILED) from e


def claim_directory(name: str, *, unique: bool) -> tuple[str, bool]:
    """Make a disk's directory; return the name and whether it was made just now.

    With ``unique`` the name is only a wish: the first of NAME, NAME-2, NAME-3 … is taken that no disk and no
    VDUSE or vDPA device has. Without, a directory without a server, or with one that is dying, stays as it is (its
    next server decides what to do with what it finds), and one with a server raises ``ControlError`` (exit 4), as does
    one that is not safe to use (exit 5).
    """
    for candidate in _candidates(name) if unique else (name,):
        if unique and _kernel_knows(candidate):
            continue
        try:
            rundir.make_directory(candidate, exclusive=True)
        except FileExistsError:
            if unique:
                continue
            rundir.check_directory(name)  # before anything is written to it
            if rundir.is_locked(name) and not is_dying(name):
                raise ControlError(
                    f"name: a disk called '{name}' exists; choose another or `vduse-blk detach {name}` first",
                    Exit.BUSY,
                ) from None
            return name, False
        if not unique and _kernel_knows(name):
            rundir.remove_directory(name)
            raise ControlError(
                f"name: another program has a VDUSE or vDPA device called '{name}'; choose another name",
                Exit.BUSY,
            )
        return candidate, True
    raise ControlError(
        f"name: '{name}' and all of '{name}-2' to '{name}-{MAX_CANDIDATES}' are taken; choose one with --name", Exit.BUSY
    )


def _kernel_knows(name: str) -> bool:
    return bool(import_module("vduse_blk.exporters.vduse.names").is_taken(name))


def _candidates(name: str) -> Iterator[str]:
    yield name
    for number in range(2, MAX_CANDIDATES + 1):
        suffix = f"-{number}"
        yield name[: 63 - len(suffix)] + suffix


def start(spec: WorkerSpec, timeout: float, *, unique: bool) -> dict[str, Any]:
    """Run a server for ``spec`` in the background; return its ready line (``device`` and more) and the disk's
    name.

    ``unique``: see ``claim_directory``. Raises ``ControlError``: what the server said; exit 7 after
    ``timeout`` seconds; exit 1 if the server died; exit 128 + N if signal N asked us to give up. In each case
    the server has ended and nothing is left, except where the message says otherwise.
    """
    check_descriptors()
    with _signals_as_bytes() as signals:
        name, made = claim_directory(spec.name, unique=unique)
        directory = rundir.open_directory(name)
        attempt = None
        try:
            wanted = dataclasses.replace(spec, name=name, timeout=timeout)
            attempt = _Attempt(wanted, signals, directory, made)
            return {"name": name} | attempt.outcome(timeout)
        except LeftBehind:
            raise
        except BaseException:
            if attempt is not None:
                attempt.discard()
            elif made:
                rundir.remove_directory(name, opened_fd=directory)
            raise
        finally:
            os.close(directory)


class LeftBehind(ControlError):
    """A failed start that could not be undone: the directory stays, so that ``detach`` can finish the job."""


class _Attempt:
    """One server being started. Owned by the main thread."""

    def __init__(self, spec: WorkerSpec, signals: int, directory: int, made: bool) -> None:
        """Start the process. ``signals``: a descriptor with one byte per signal that asks us to give up. ``directory``: of
        the disk, which stays the caller's. ``made``: the name was free before, so whatever the kernel has of it is this
        server's."""
        import subprocess

        self._name = spec.name
        self._signals = signals
        self._directory = directory
        self._made = made
        # Kept open for reading: a server that undoes everything may remove the file before we show its end.
        self._log = _open_log(DiskPaths.of(spec.name).log)
        self._log_start = os.fstat(self._log).st_size
        self._ready, theirs = os.pipe2(os.O_CLOEXEC)
        stdin = specification_file(dataclasses.replace(spec, ready_fd=theirs))
        try:
            self._process = subprocess.Popen(
                worker_command() if spec.restart == "no" else monitor_command(),
                stdin=stdin,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs,),
                cwd="/",
                start_new_session=True,  # out of reach of this terminal's Ctrl-C and hang-up
                env={key: value for key, value in os.environ.items() if key not in _MANAGED_ENV},
            )
        finally:
            os.close(stdin)
            os.close(theirs)

    def outcome(self, timeout: float) -> dict[str, Any]:
        """Wait at most ``timeout`` seconds for the server's line, and act on it. Call once."""
        try:
            line, why = self._read_line(time.monotonic() + timeout)
        finally:
            os.close(self._ready)  # a server that has not written its line by now undoes everything
        if line is None:
            if why == "end of file":
                self._died()
            self._give_up(why, timeout)
        try:
            said = messages.decode_message(line)
        except ValueError:
            said = {"error": f"the server of disk '{self._name}' said something odd: {line[:80]!r}"}
        if said.get("ready") is True:
            return said
        if self._wait(ROLLBACK_SECONDS) is None:
            self._kill()  # it has undone everything, that is what the line means
            self._wait(5)
        code = int(said.get("code", Exit.FAILED))
        if code == Exit.FAILED:
            self._show_log()
        error = str(said.get("error", "the server gave no reason"))
        if self._made and _kernel_knows(self._name):
            self._clean_up(error, code)
        raise ControlError(error, code, list(said.get("holders", [])))

    def _kill(self) -> None:
        """The server, and the monitor that would start another."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_line(self, deadline: float) -> tuple[bytes | None, str]:
        """The server's line, or None and why there is none: 'end of file', 'timeout', or a signal's name."""
        poll = select.poll()
        poll.register(self._ready, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        line = b""
        while True:
            left = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(max(0, left * 1000))}
            # The line first: a disk that is ready is reported even if Ctrl-C came in the same instant.
            if self._ready in ready:
                data = os.read(self._ready, 65536)
                line += data
                if b"\n" in data:
                    return line.split(b"\n", 1)[0], ""
                if not data:
                    return None, "end of file"
            elif self._signals in ready:
                return None, signal.Signals(os.read(self._signals, 1)[0]).name
            elif not ready and left <= 0:
                return None, "timeout"

    def _died(self) -> NoReturn:
        status = self._wait(5)
        if status is None:
            self._kill()
            self._wait(5)
        self._show_log()
        sentence = f"the server of disk '{self._name}' {_end_text(status)} before the disk was ready"
        self._clean_up(sentence, Exit.FAILED)
        raise ControlError(f"{sentence}; {self._what_is_left()}", Exit.FAILED)

    def _give_up(self, why: str, timeout: float) -> NoReturn:
        """Let the server undo everything, and wait until it has."""
        if why == "timeout":
            code: int = Exit.TIMEOUT
            sentence = f"disk '{self._name}' was not ready within {timeout:g} seconds"
        else:
            code = 128 + signal.Signals[why]
            sentence = f"attaching disk '{self._name}' was interrupted by {why}"
        output.say(f"{sentence}; its server is undoing what it did (interrupt to kill it)")
        status = self._wait(ROLLBACK_SECONDS, detach=True)
        if status is None:
            self._kill()
            if self._wait(5) is None:
                raise LeftBehind(
                    f"{sentence}, and its server (process {self._process.pid}) hangs in the kernel; "
                    f"`vduse-blk detach {self._name}` cleans up once it has ended",
                    code,
                )
        if status is None or status < 0 or (self._made and _kernel_knows(self._name)):
            self._clean_up(sentence, code)  # it did not get to the end of undoing
        raise ControlError(f"{sentence}; {self._what_is_left()}", code)

    def _what_is_left(self) -> str:
        """Of the disk, when the server has ended and is cleaned up after: a sentence's end."""
        if self._made:
            self.discard()
        if not rundir.is_directory(self._name, self._directory):
            return "nothing is left of it"
        whose = "another attach" if self._made else "an earlier server"
        return f"the disk '{self._name}' that is there is {whose}'s (`vduse-blk info {self._name}` says more)"

    def discard(self) -> None:
        """Remove the directory if it was made for this server, which has ended, and nobody else has used it."""
        lock = self._lock() if self._made else None
        if lock is None:
            return
        try:
            if self._is_ours():
                rundir.remove_directory(self._name, locked_fd=lock)
        finally:
            os.close(lock)

    def _lock(self) -> int | None:
        """The lock of the directory; None: another server has it, or the directory is gone."""
        try:
            return rundir.lock_directory(self._name, opened_fd=self._directory)
        except ControlError as e:
            if isinstance(e, Served) or e.exit_code == Exit.NOT_FOUND:
                return None
            raise

    def _is_ours(self) -> bool:
        """Of a directory that was made for this server. Another attach of the name may have been faster, and its server left
        its state: its disk was promised to somebody."""
        state = notes.read_state(self._name)
        return bool(state.get("monitor", state.get("pid", self._process.pid)) == self._process.pid)

    def _clean_up(self, sentence: str, code: int) -> None:
        """Remove what the dead server left in the kernel. Raises ``LeftBehind`` if that fails.

        Another attach of that name may have been faster. What is there then is not ours to remove.
        """
        lock = self._lock()
        if lock is None:
            return
        try:
            if not self._made:
                raise ControlError("it was there before, with a dead server", Exit.BUSY)
            if self._is_ours():
                remove_leftover(self._name, force=True)  # it was promised to nobody; udev may be looking at it
                rundir.remove_directory(self._name, locked_fd=lock)
        except ControlError as e:
            raise LeftBehind(
                f"{sentence}, and what is left was not removed ({e}); `vduse-blk detach {self._name}` will",
                code,
            ) from e
        finally:
            os.close(lock)

    def _wait(self, seconds: float, *, detach: bool = False) -> int | None:
        """Exit status of the server (negative: the signal that ended it), or None if it still runs after
        ``seconds``.

        A further signal to us ends the wait. With ``detach`` a server that turns out to have made its disk
        ready just before we closed the pipe is asked to remove it again.
        """
        deadline = time.monotonic() + seconds
        with server_process(self._process.pid) as end:
            poll = select.poll()
            poll.register(self._signals, select.POLLIN)
            if end is not None:
                poll.register(end, select.POLLIN)
            while self._process.poll() is None and time.monotonic() < deadline:
                ready = {fd for fd, _ in poll.poll(min(1.0, max(0.0, deadline - time.monotonic())) * 1000)}
                if self._signals in ready:
                    os.read(self._signals, 1)
                    break
                if detach and not ready:
                    try:
                        with Client(self._name, timeout=max(1.0, deadline - time.monotonic())) as client:
                            if client.call("ping").get("phase") == "serving":
                                client.call("detach", force=False)
                    except ControlError:
                        pass  # not listening: it is still undoing, as asked
        return self._process.poll()

    def _show_log(self) -> None:
        size = os.fstat(self._log).st_size
        start = max(self._log_start, size - 16384)
        text = os.pread(self._log, size - start, start).decode(errors="replace")
        for line in text.splitlines()[-LOG_LINES:]:
            output.say(f"log: {line}")


def _open_log(path: Path) -> int:
    """Raises ``ControlError`` (exit 4: not a regular file; 1: the system said no) with the path."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ControlError(f"{path} is in the way: it is not a regular file", Exit.BUSY) from e
        raise ControlError(f"cannot write {path}: {e.strerror}", Exit.FAILED) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # a FIFO would stop the server when it is full
        os.close(fd)
        raise ControlError(f"{path} is in the way: it is not a regular file", Exit.BUSY)
    return fd


def _end_text(status: int | None) -> str:
    if status is None:
        return "closed the pipe without a word"
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


@contextmanager
def _signals_as_bytes() -> Iterator[int]:
    """Within, SIGINT, SIGTERM and SIGHUP do nothing but arrive as bytes on the descriptor given.

    An exception raised at an arbitrary instruction could lose a server between its birth and the first note
    of it.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    previous_wakeup = signal.set_wakeup_fd(write_end)
    previous = {
        number: signal.signal(number, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # nohup
    }
    try:
        yield read_end
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_wakeup)
        os.close(read_end)
        os.close(write_end)
