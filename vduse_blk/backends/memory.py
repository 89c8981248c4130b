"""Memory of the server: as fast as storage gets, gone with the server.

Pages are taken when they are first written and given back when whole pages are discarded. The mapping is shared, so that
MADV_REMOVE frees them for good; private pages would have to be unlocked first.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from dataclasses import dataclass, field
from typing import Final

from vduse_blk.block.batch import Batch
from vduse_blk.block.contract import Backend, BlockInfo, Fence, Segments, Support
from vduse_blk.block.errors import UserError
from vduse_blk.block.linux import munlock
from vduse_blk.block.native import MemoryTarget
from vduse_blk.block.options import Size, about, check_disk_size

_ZEROS: Final = memoryview(bytes(1 << 16))


class MemoryBackend(Backend):
    """Owns one mapping, of which ``_bytes`` and ``_anchor`` are views."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        size: Size = field(metadata=about("size of the disk", place=True))

    options: Options
    takes_batches = True
    fence = Fence.LOST

    async def open(self) -> BlockInfo:
        size = self.options.size
        check_disk_size(size)
        try:
            # The default, without MAP_NORESERVE: a size beyond what the host has is refused here, not killed for later.
            self._map = mmap.mmap(-1, size)
        except (OSError, OverflowError, ValueError) as error:
            raise UserError(f"size: the host has no {size} bytes of memory to give ({error})", exit_code=1) from error
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._bytes = memoryview(self._map)
        self._address = ctypes.addressof(self._anchor)
        # The server locks its memory; MADV_REMOVE refuses locked pages (madvise(2)), and a disk full of memory must not
        # be exempt from swapping either. Pages of the disk are no part of what serves it.
        munlock(self._address, size)
        return await self.refresh()

    async def close(self) -> None:
        self._bytes.release()
        del self._anchor
        self._map.close()

    async def read(self, offset: int, into: Segments) -> None:
        for segment in into:
            segment[:] = self._bytes[offset : offset + len(segment)]
            offset += len(segment)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        for segment in data:
            self._bytes[offset : offset + len(segment)] = segment
            offset += len(segment)

    def batch(self, batch: Batch) -> None:
        batch.copy(self._bytes)

    async def flush(self) -> None:
        pass

    async def discard(self, offset: int, length: int) -> None:
        self._clear(offset, offset + length, give_back=True)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        self._clear(offset, offset + length, give_back=unmap)

    async def refresh(self) -> BlockInfo:
        return BlockInfo(
            size=self.options.size,
            physical_block_size=mmap.PAGESIZE,  # what a discard can free
            fua=Support.NATIVE,
            discard=Support.NATIVE,
            write_zeroes=Support.NATIVE,
        )

    async def resize(self, size: int) -> BlockInfo:
        # Growing may move the mapping, and C serves requests from its address at this moment.
        raise OSError(errno.EOPNOTSUPP, "the size of memory storage is given when it is attached")

    def native_target(self) -> MemoryTarget:
        return MemoryTarget(self._address, self.options.size)

    def _clear(self, start: int, end: int, *, give_back: bool) -> None:
        """Zero [start, end); with ``give_back`` free the whole pages in it."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if give_back and first < last:
            self._map.madvise(mmap.MADV_REMOVE, first, last - first)
            self._fill(start, first)
            self._fill(last, end)
        else:
            self._fill(start, end)

    def _fill(self, start: int, end: int) -> None:
        for at in range(start, end, len(_ZEROS)):
            here = min(len(_ZEROS), end - at)
            self._bytes[at : at + here] = _ZEROS[:here]
