"""An exporter and a backend that fail as they are told, for a real server (see test_worker.py).

``FAKE_STOPS``: how many times ``stop`` fails before it succeeds. ``FAKE_CLOSE``: "fail": closing the storage does.
``FAKE_START``: "slow": the start does not end by itself; files "begun" and "undone" beside the disk's directory tell.
"fail": it does.

``FAKE_LIFE``: "short": it dies as soon as it serves.

``Kept`` is an export that outlives its server, as a kernel device does: it exists while there is a file "kept" beside the
disk's directory. ``FAKE_USED``: it has users. ``Durable`` is storage that may be taken over, but not while there is a file
"under-way".
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.contract import BlockInfo, Fence
from vduse_blk.block.errors import UserError
from vduse_blk.control import rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.exporter import Endpoint, Exporter


class Export(Exporter):
    """Presents nothing to nobody."""

    _failures = int(os.environ.get("FAKE_STOPS", "0"))

    async def start(self) -> Endpoint:
        if os.environ.get("FAKE_START") == "fail":
            raise UserError("the kernel does not want it", 6)
        if os.environ.get("FAKE_START") == "slow":
            assert self.options.directory is not None
            marks = self.options.directory.parent
            (marks / "begun").touch()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.2)  # undoing takes its time
                (marks / "undone").touch()
        return Endpoint("nothing", "/nowhere")

    async def resized(self, info: BlockInfo) -> None: ...

    async def stop(self) -> None:
        if self._failures:
            self._failures -= 1
            raise OSError(errno.EBUSY, "the kernel holds on to it")

    def status(self) -> dict[str, Any]:
        return {"queues": [], "options": asdict(self.options) | {"directory": str(self.options.directory)}}


class Storage(MemoryBackend):
    """Memory that may not be let go of."""

    async def close(self) -> None:
        await super().close()
        if os.environ.get("FAKE_CLOSE") == "fail":
            raise OSError(errno.EIO, "the last write was lost")


class Durable(Storage):
    """Memory that passes for a file."""

    fence = Fence.OPEN

    async def open(self) -> BlockInfo:
        if (rundir.run_root() / "under-way").exists():
            raise UserError("a write of somebody dead is under way", 4)
        return await super().open()


class Careless(Storage):
    """Storage that does not say how it fences."""

    fence = Fence.UNKNOWN


class Kept(Export):
    """Stays without its server."""

    for_this_host = True
    hands_over = True

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.queue_count = self.options.queues or 3
        self._held = False
        self._mark = rundir.run_root() / "kept"

    @classmethod
    def is_left(cls, name: str) -> bool:
        return (rundir.run_root() / "kept").exists()

    @classmethod
    async def fail_left(cls, name: str, directory: Path) -> None:
        (rundir.run_root() / "kept").rename(rundir.run_root() / "failed")

    @property
    def replayed(self) -> int:
        return 17 if self.options.adopt else 0

    async def start(self) -> Endpoint:
        if os.environ.get("FAKE_LIFE") == "short":
            self._loop.call_later(0.1, os.abort)
        assert self.options.adopt is self._mark.exists()
        endpoint = await super().start()
        self._mark.touch()
        return endpoint

    async def stop(self) -> None:
        if os.environ.get("FAKE_USED"):
            raise ControlError("it is mounted on /mnt", Exit.BUSY)
        await super().stop()
        self._mark.unlink()

    def hold(self, on: bool) -> None:
        self._held = on

    def is_quiet(self) -> bool:
        return self._held and not os.environ.get("FAKE_HANGS")

    async def leave(self) -> None:
        """The mark stays."""
        assert self.is_quiet()
