"""An exporter and a backend that fail as they are told, for a real server (see test_worker.py).

``FAKE_STOPS``: how many times ``stop`` fails before it succeeds. ``FAKE_CLOSE``: "fail": closing the storage does.
``FAKE_START``: "slow": the start does not end by itself; files "begun" and "undone" beside the disk's directory tell.
"fail": it does.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import asdict
from typing import Any

from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.errors import UserError
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
