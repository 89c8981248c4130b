"""Nothing: reads give zeros, writes vanish. For measuring everything but storage."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final

from vduse_blk.block.contract import Backend, BlockInfo, Fence, Segments, Support
from vduse_blk.block.native import NullTarget
from vduse_blk.block.options import Size, about, check_disk_size

_ZEROS: Final = memoryview(bytes(1 << 16))


class NullBackend(Backend):
    """Holds nothing."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        size: Size = field(metadata=about("size of the disk", place=True))

    options: Options
    fence = Fence.OPEN  # nothing ever lands

    async def open(self) -> BlockInfo:
        check_disk_size(self.options.size)
        return await self.refresh()

    async def close(self) -> None:
        pass

    async def read(self, offset: int, into: Segments) -> None:
        for segment in into:
            for at in range(0, len(segment), len(_ZEROS)):
                here = min(len(_ZEROS), len(segment) - at)
                segment[at : at + here] = _ZEROS[:here]

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        pass

    async def flush(self) -> None:
        pass

    async def discard(self, offset: int, length: int) -> None:
        pass

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        pass

    async def refresh(self) -> BlockInfo:
        return BlockInfo(
            size=self.options.size,
            fua=Support.NATIVE,
            discard=Support.NATIVE,
            write_zeroes=Support.NATIVE,
        )

    async def resize(self, size: int) -> BlockInfo:
        raise OSError(errno.EOPNOTSUPP, "the size of null storage is given when it is attached")

    def native_target(self) -> NullTarget:
        return NullTarget()
