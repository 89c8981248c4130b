"""Servers for the exporter tests: real worker processes, without root and without a kernel's help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from vduse_blk.control.client import Client
from vduse_blk.testing.frontend import FakeFrontend, FrontendQueue, GuestMemory, InflightFile

MIB = 1 << 20
SIZE = 8 * MIB
BASE = 0x10000000
GAP = 0x10000000
"""Between the guest addresses of two queues' memory."""


_SOCKETS = 4
"""Of a server that talks to nobody: two that listen, and the pair with which its event loop wakes itself."""


class Server:
    """One disk over ``image``, exported at ``socket``."""

    def __init__(
        self,
        folder: Path,
        *,
        export: str = "",
        source: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
        **spec: Any,
    ) -> None:
        """``export`` stands behind the socket's path; ``source`` instead of an image of SIZE bytes; ``environment`` beside
        ours, of those that are started until it is changed."""
        self.folder = folder
        self.image = folder / "disk.img"
        self.socket = folder / "socket"
        if not source:
            if not self.image.exists():
                self.image.write_bytes(bytes(SIZE))
            source = str(self.image)
        self._spec = {"name": "d", "source": source, "exports": [f"vhost-user:{self.socket}{export}"]} | spec
        self.environment = dict(environment)
        self.log = folder / "log"
        self.start()

    def start(self) -> None:
        """Start the process, or start it again."""
        ready, theirs = os.pipe()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vduse_blk.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"VDUSE_BLK_RUN": str(self.folder / "run")} | self.environment,
                pass_fds=(theirs,),
            )
        os.close(theirs)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self._spec | {"ready_fd": theirs}).encode())
        self.process.stdin.close()
        with open(ready, "rb") as pipe:
            line = pipe.readline()
        said = json.loads(line or "{}")
        assert said.get("ready") is True, f"{said} {self.text()}"
        self.device = said["device"]

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Ask the control socket."""
        os.environ["VDUSE_BLK_RUN"] = str(self.folder / "run")
        with Client(str(self._spec["name"])) as client:
            return client.call(op, **arguments)

    def text(self) -> str:
        """Its log."""
        return self.log.read_text()

    def kill(self) -> None:
        """As a crash."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 20) -> int:
        """As a service manager would; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def open_fds(self) -> int:
        """Descriptors the process has open, when the ready pipe and the control socket's conversations are closed."""
        deadline = time.monotonic() + 5
        while True:
            links = list(self._links())
            sockets = sum(link.startswith("socket:") for link in links)
            pipes = sum(link.startswith("pipe:") for link in links)
            if (sockets <= _SOCKETS and pipes == 0) or time.monotonic() > deadline:
                return len(links)
            time.sleep(0.01)

    def _links(self) -> Iterator[str]:
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                yield os.readlink(fd)
            except FileNotFoundError:
                pass


class Listener(Protocol):
    """Who has a disk's socket."""

    socket: Path


class Machine:
    """A virtual machine of the tests: memory and queues, which survive any number of front-ends."""

    def __init__(self, queues: int = 1, num: int = 64, **options: Any) -> None:
        self.queues = [FrontendQueue(GuestMemory(BASE + i * GAP), num, **options) for i in range(queues)]

    @property
    def queue(self) -> FrontendQueue:
        return self.queues[0]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()

    def boot(self, server: Listener, *, inflight: InflightFile | None = None, **negotiate: Any) -> FakeFrontend:
        """Connect and start all queues. ``inflight``: they ran before, with another server; as QEMU, which knows where the
        used ring stands and nothing else."""
        frontend = FakeFrontend.connect(server.socket)
        frontend.negotiate(**negotiate)
        if inflight is not None:
            assert frontend.set_inflight(inflight) == 0
        assert frontend.set_memory(*(queue.region for queue in self.queues)) == 0
        for index, queue in enumerate(self.queues):
            frontend.start_queue(index, queue, base=0 if inflight is None else queue.used_idx())
        return frontend


Undo = list[Callable[[], object]]
