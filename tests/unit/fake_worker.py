"""A server of a disk that has no disk: a real process with the real start, lock, files and control socket.

``FAKE_WORKER`` says what it does: 'ready' (default), 'refuse' (a failure line with code 4), 'broken' (the
same with code 1, after writing to its log), 'die' (ends without a line), 'crash' (a signal ends it), 'slow'
(never ready; undoes everything when nobody waits for it any more), 'heir' (the same, and leaves what an earlier server
left), 'stuck' (never ready and does not notice), 'late' (ready only when its reader is gone: the line is lost), 'busy'
(ready; detach only with force), 'mute' (ready; answers nothing), 'mortal' (ready; dies on detach and resize without a
reply), 'untidy' (ready; leaves its directory behind), 'leaving' (ready; is detached while it resizes).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from typing import Any

from vduse_blk.control import messages, notes, rundir
from vduse_blk.control.spec import WorkerSpec

HOLDERS = [{"kind": "mounted", "what": "/mnt"}, {"kind": "open", "pid": 42, "command": "dd"}]
IN_USE = "is in use: mounted on /mnt; open in process 42 (dd)"


def main() -> None:
    mode = os.environ.get("FAKE_WORKER", "ready")
    spec = WorkerSpec.from_json(sys.stdin.buffer.read())
    listed = map(int, os.listdir("/proc/self/fd"))
    descriptors = sorted(fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}"))  # not listdir's own
    lock = rundir.lock_directory(spec.name)
    print(f"fake worker: {mode}", file=sys.stderr, flush=True)

    def tell(line: bytes) -> None:
        if spec.ready_fd is not None:
            os.write(spec.ready_fd, line)
            os.close(spec.ready_fd)

    def undo() -> None:
        rundir.remove_directory(spec.name, locked_fd=lock)

    if mode == "die":
        sys.exit(3)
    if mode == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode in ("refuse", "broken"):
        undo()
        if mode == "broken":
            print("the reason is here", file=sys.stderr, flush=True)
            tell(messages.failure_line("the kernel said no", 1))
        else:
            tell(messages.failure_line("the file is in use", 4, HOLDERS))
        sys.exit(4)
    if mode in ("slow", "heir", "late", "stuck"):
        assert spec.ready_fd is not None
        poll = select.poll()
        if mode != "stuck":
            poll.register(spec.ready_fd, 0)  # POLLERR only: nobody reads any more
        poll.poll(None)
        if mode in ("slow", "heir"):
            if mode == "slow":
                undo()
            sys.exit(1)
        os.close(spec.ready_fd)
    state = {
        "name": spec.name, "pid": os.getpid(), "source": spec.source, "options": dict(spec.options),
        "device": "/dev/vdz", "phase": "serving", "started_at": 1700000000.0,
    }  # fmt: skip
    notes.write_state(spec.name, state)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(rundir.DiskPaths.of(spec.name).socket))
    listener.listen(8)
    if mode != "late":
        tell(messages.ready_line("/dev/vdz", size=spec.size))
    seen = {
        "cwd": os.getcwd(), "descriptors": descriptors, "session_leader": os.getsid(0) == os.getpid(),
        "ready_fd": spec.ready_fd, "timeout": spec.timeout, "notify": "NOTIFY_SOCKET" in os.environ,
    }  # fmt: skip
    info: dict[str, Any] = state | {
        "queue_count": 2, "size": spec.size or 1 << 30, "block_size": spec.block_size or 512,
        "read_only": spec.read_only,
        "serial": spec.serial or "fake", "path": "native", "seen": seen,
        "queues": [
            {"index": 0, "size": spec.queue_size, "ready": True, "state": "running", "counters": {"read_ops": 7}},
            {"index": 1, "size": spec.queue_size, "ready": False, "state": "unused", "counters": {}},
        ],
        "features_offered": ["flush", "discard"], "features_negotiated": ["flush"],
        "bounce": {"memory": "server", "size": 12 << 20},
        "counters": {"read_ops": 7, "write_ops": 0},
    }  # fmt: skip
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                request = messages.decode_message(line)
                if mode == "mute":
                    continue
                if mode == "mortal" and request["op"] in ("detach", "resize"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if mode == "leaving" and request["op"] == "resize":
                    undo()
                    sys.exit(0)
                if request["op"] == "detach" and mode == "busy" and not request["force"]:
                    connection.sendall(messages.error_reply(f"disk '{spec.name}' {IN_USE}", 4, HOLDERS))
                elif request["op"] == "detach":
                    if mode != "untidy":
                        undo()
                    connection.sendall(messages.ok_reply())
                    sys.exit(0)
                elif request["op"] == "resize":
                    info["size"] = request["size"]
                    connection.sendall(messages.ok_reply(size=request["size"]))
                elif request["op"] == "set":
                    connection.sendall(messages.ok_reply(policy={"on_error": "wait"}, filters=[], given=request["values"]))
                elif request["op"] == "info":
                    connection.sendall(messages.ok_reply(**info))
                else:
                    connection.sendall(messages.ok_reply(phase="serving"))


if __name__ == "__main__":
    main()
