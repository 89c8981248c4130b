"""Storage that notes what it is asked, over memory: what a filter, a queue or a stack really does to storage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vduse_blk.backends.memory import MemoryBackend
from vduse_blk.block.contract import BlockInfo, Segments, Support


@dataclass(slots=True)
class Call:
    """One operation. ``began`` and ``ended`` are steps of the recorder's clock; ``ended`` None: it has not."""

    operation: str
    offset: int = 0
    length: int = 0
    fua: bool = False
    unmap: bool = False
    data: bytes = b""
    began: int = 0
    ended: int | None = None

    @property
    def what(self) -> tuple[str, int, int, bool, bool]:
        """All but content and time."""
        return self.operation, self.offset, self.length, self.fua, self.unmap


class Recorder(MemoryBackend):
    """``calls`` in the order in which they began. ``info`` changes what the storage says of itself."""

    def __init__(self, size: int, **info: Any) -> None:
        super().__init__(self.Options(size=size))
        self.calls: list[Call] = []
        self.lifetime: list[str] = []
        self.now = 0
        self._changes: dict[str, Any] = {"volatile_cache": True, "fua": Support.NATIVE} | info

    def tick(self) -> int:
        """The next step of the clock, which whoever compares with other events shares."""
        self.now += 1
        return self.now

    async def pause(self, call: Call) -> None:
        """Between the beginning of an operation and its effect; for subclasses."""

    async def open(self) -> BlockInfo:
        self.lifetime.append("open")
        return await super().open()

    async def close(self) -> None:
        self.lifetime.append("close")
        await super().close()

    async def abandon(self) -> None:
        self.lifetime.append("abandon")
        await super().close()

    def let_go(self, leaving: bool) -> None:
        self.lifetime.append("let go" if leaving else "stay")

    async def refresh(self) -> BlockInfo:
        return dataclasses.replace(await super().refresh(), **self._changes)

    async def read(self, offset: int, into: Segments) -> None:
        call = await self._begin(Call("read", offset, sum(map(len, into))))
        await super().read(offset, into)
        call.ended = self.tick()

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        content = b"".join(data)
        call = await self._begin(Call("write", offset, len(content), fua, data=content))
        await super().write(offset, data, fua=fua)
        call.ended = self.tick()

    async def flush(self) -> None:
        call = await self._begin(Call("flush"))
        call.ended = self.tick()

    async def discard(self, offset: int, length: int) -> None:
        call = await self._begin(Call("discard", offset, length))
        await super().discard(offset, length)
        call.ended = self.tick()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        call = await self._begin(Call("write_zeroes", offset, length, fua, unmap, bytes(length)))
        await super().write_zeroes(offset, length, unmap=unmap, fua=fua)
        call.ended = self.tick()

    async def _begin(self, call: Call) -> Call:
        call.began = self.tick()
        self.calls.append(call)
        await self.pause(call)
        return call
