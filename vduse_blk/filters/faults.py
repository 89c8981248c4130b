"""Storage that is slow, fails, hangs or tears writes, as it is told: for tests, and for drills of those who run disks.

An operation that fits (kind, range, probability, and fewer than ``count`` before it) is struck: it is delayed first, then
hangs, then fails. Everything else goes through. Options change while the disk is in use; what hangs or is delayed at that
moment follows the new ones at once.
"""

from __future__ import annotations

import asyncio
import errno
import random
from dataclasses import dataclass, field
from typing import Any, Final

from vduse_blk.block.contract import Backend, BlockInfo, PassthroughFilter, Segments
from vduse_blk.block.errors import TEMPORARY, UserError
from vduse_blk.block.options import Count, Duration, Share, Size, about

_OPERATIONS: Final = ("read", "write", "flush", "discard", "write_zeroes")
_SEEDS: Final = 1 << 32


class FaultsFilter(PassthroughFilter):
    """Owned by the event loop."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        on: str | None = field(
            default=None, metadata=about(f"operations to strike, of {','.join(_OPERATIONS)}, with commas; not given: all")
        )
        offset: Size = field(default=0, metadata=about("strike only what touches bytes from here (flush: always)"))
        length: Size | None = field(default=None, metadata=about("strike only what touches so many bytes from there"))
        probability: Share = field(default=1.0, metadata=about("how many of those that fit are struck"))
        count: Count | None = field(default=None, metadata=about("how many are struck at most"))
        seed: Count | None = field(
            default=None, metadata=about("makes a run repeatable; not given: a new one, which info shows")
        )
        delay: Duration = field(default=0.0, metadata=about("how long they take longer"))
        hang: bool = field(default=False, metadata=about("they do not end until this is 0 again, or the disk goes"))
        error: str | None = field(default=None, metadata=about("they fail with this error (EIO, ENOSPC, …)"))
        torn: bool = field(default=False, metadata=about("writes store only some of their first blocks, then fail"))

    options: Options

    def __init__(self, below: Backend, options: Options) -> None:
        super().__init__(below, options)
        self._block = 512
        self._struck = dict.fromkeys(_OPERATIONS, 0)
        self._leaving = False
        self._changed = asyncio.Event()  # replaced by a new one each time
        self._seed = -1
        self._take(options)

    async def open(self) -> BlockInfo:
        info = await super().open()
        self._block = info.logical_block_size
        return info

    def change(self, options: Options) -> None:
        self._take(options)
        self._wake()

    def facts(self) -> dict[str, Any]:
        return {"seed": self._seed, "struck": {key: count for key, count in self._struck.items() if count}}

    def let_go(self, leaving: bool) -> None:
        self._leaving = leaving
        self._wake()
        super().let_go(leaving)

    def is_temporary(self, error: OSError) -> bool:
        if isinstance(error, _InjectedError):
            return error.errno in TEMPORARY
        return super().is_temporary(error)

    async def read(self, offset: int, into: Segments) -> None:
        await self._strike("read", offset, sum(map(len, into)))
        await super().read(offset, into)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        length = sum(map(len, data))
        if await self._strike("write", offset, length):
            kept = self._random.randrange(-(-length // self._block)) * self._block if length else 0
            if kept:
                await super().write(offset, _beginning(data, kept))
            raise _InjectedError(self._errno or errno.EIO, f"faults: a write of {length} bytes was torn after {kept}")
        await super().write(offset, data, fua=fua)

    async def flush(self) -> None:
        await self._strike("flush", 0, 0)
        await super().flush()

    async def discard(self, offset: int, length: int) -> None:
        await self._strike("discard", offset, length)
        await super().discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        await self._strike("write_zeroes", offset, length)
        await super().write_zeroes(offset, length, unmap=unmap, fua=fua)

    # ------------------------------------------------------------------------------------------------------- own

    def _take(self, options: Options) -> None:
        """Check and adopt. Raises UserError with nothing changed."""
        operations = _OPERATIONS if options.on is None else tuple(options.on.split(","))
        for operation in operations:
            if operation not in _OPERATIONS:
                raise UserError(f"on: '{operation}' is no operation; accepted are {', '.join(_OPERATIONS)}")
        number = getattr(errno, options.error, None) if options.error and options.error.startswith("E") else None
        if options.error is not None and not isinstance(number, int):
            raise UserError(f"error: '{options.error}' is no error; accepted are names as in errno(3): EIO, ENOSPC …")
        if self._seed < 0 or (options.seed is not None and options.seed != self.options.seed):
            self._seed = random.SystemRandom().randrange(_SEEDS) if options.seed is None else options.seed
            self._random = random.Random(self._seed)
        self.options = options
        self._errno = number
        self._operations = operations
        self._left = options.count

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _strike(self, operation: str, offset: int, length: int) -> bool:
        """Do to the operation what fits it. True: it is to be torn. Raises OSError."""
        if not self._fits(operation, offset, length):
            return False
        self._struck[operation] += 1
        if self.options.delay and not self._leaving:
            try:
                async with asyncio.timeout(self.options.delay):
                    await self._changed.wait()
            except TimeoutError:
                pass
        while self.options.hang:
            if self._leaving:
                raise _InjectedError(errno.EIO, f"faults: a {operation} that hung, and the disk goes")
            await self._changed.wait()
        if self.options.torn and operation == "write":
            return True
        if self._errno is not None:
            raise _InjectedError(self._errno, f"faults: a {operation} was struck")
        return False

    def _fits(self, operation: str, offset: int, length: int) -> bool:
        options = self.options
        if operation not in self._operations:
            return False
        if operation != "flush":
            if offset + length <= options.offset:
                return False
            if options.length is not None and offset >= options.offset + options.length:
                return False
        if self._left == 0 or self._random.random() >= options.probability:
            return False
        if self._left is not None:
            self._left -= 1
        return True


class _InjectedError(OSError):
    """Ours, not one of the storage below."""


def _beginning(data: Segments, length: int) -> list[memoryview]:
    result = []
    for segment in data:
        part = segment[:length]
        result.append(part)
        length -= len(part)
        if length == 0:
            break
    return result
