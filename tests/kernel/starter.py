"""The command line without the start of its interpreter, which takes a second on an emulated machine.

A process (``python -m tests.kernel.starter``) has the command line's modules imported and forks for each call. The child
gets the caller's words, environment, working directory and output files, and knows as little of earlier calls as a process
just started; only what the interpreter itself reads of its environment is not changed any more. It ends with the one that
started it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache

_COMMANDS = ("attach", "detach", "launch", "resize", "settings", "show", "upgrade")
_MODULES = (*(f"cli.{command}" for command in _COMMANDS), "control.status", "exports", "exporters.vduse.export")


def call(words: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """``vduse-blk WORDS``. Raises TimeoutError; the call itself then goes on."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(timeout)
            connection.connect(_started())
            request = json.dumps([words, environment, os.getcwd()]).encode()
            socket.send_fds(connection, [request], [out.fileno(), err.fileno()])
            status = connection.recv(100)
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(["vduse-blk", *words], int(status or -1), out.read(), err.read())
        assert status, f"{done}: ended without a status"
        return done


@cache
def _started() -> bytes:
    """The address of the process, which is started by the first call."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # the kernel chooses a name, and no file
        listener.listen(64)
        address: bytes = listener.getsockname()
        words = [sys.executable, "-m", __name__, str(listener.fileno())]
        _started_process.append(subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]))
    return address


_started_process: list[subprocess.Popen[bytes]] = []  # kept, as its standard input is to end with us and not before


def _serve(listener: socket.socket) -> None:
    for name in _MODULES:
        importlib.import_module(f"vduse_blk.{name}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _run(connection)
        connection.close()


def _run(connection: socket.socket) -> None:
    """One command line, in a process of its own. Does not return."""
    from vduse_blk.cli.main import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        request, fds, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        words, environment, directory = json.loads(request)
        for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *fds)):
            os.dup2(fd, number)
            os.close(fd)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["vduse-blk", *words]
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    connection.send(str(status).encode())
    os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
