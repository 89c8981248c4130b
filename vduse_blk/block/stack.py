"""The checked chokepoint between everything that presents a disk and its storage.

Every request is held against ``BlockInfo``, counted, cut to what the backend takes, and where the backend lacks an
operation it is made from others. What a backend raises becomes an ``OSError`` whatever it is: a bug in a backend costs
a request, not the disk.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from vduse_blk.block.batch import OPEN, Batch, BatchLimits
from vduse_blk.block.contract import Backend, BlockInfo, Fence, Filter, Segments, Support
from vduse_blk.block.errors import PermanentError, UserError
from vduse_blk.block.native import NativeTarget
from vduse_blk.block.options import place_of
from vduse_blk.block.patience import Patience
from vduse_blk.block.policy import Policy
from vduse_blk.block.threads import Threads

log = logging.getLogger("vduse_blk.disk")

_T = TypeVar("_T")

_ZEROS: Final = memoryview(bytes(1 << 18))
_ZEROS_AT_ONCE: Final = 1 << 20
"""Bytes per write of emulated zeros: long enough to stream, short enough not to delay others."""

_MAX_SERIAL: Final = 20  # VIRTIO_BLK_ID_BYTES

_ASKED_BY_A_USER: Final = frozenset({"open", "resize", "refresh"})
"""Operations whose caller expects UserError; a guest's request knows only OSError."""


@dataclass(slots=True)
class Counters:
    """Requests that succeeded, their bytes, and requests that failed, since the stack exists."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    write_zeroes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    discard_bytes: int = 0
    write_zeroes_bytes: int = 0
    errors: int = 0


class Stack:
    """A backend (or the outermost filter over one) as a disk. Owned by one event loop.

    ``block_size`` is the logical block size of the disk, None: the storage's own; ``read_only`` refuses changes
    whatever the storage allows; ``serial`` as in ``BlockInfo``, "": the storage's own; ``policy`` is where ``patience``
    begins, None: every error is an answer.

    Requests raise OSError: EINVAL outside the disk or not aligned, EROFS, EOPNOTSUPP, and what the storage raises.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        block_size: int | None = None,
        serial: str = "",
        read_only: bool = False,
        policy: Policy | None = None,
    ) -> None:
        if len(serial) > _MAX_SERIAL or not all(" " <= c <= "~" for c in serial):
            raise UserError(f"serial: {serial!r} is not usable; accepted are up to 20 printable ASCII characters")
        if block_size is not None and (block_size < 512 or block_size & (block_size - 1)):
            raise UserError(f"block_size: {block_size} is not usable; accepted are powers of two from 512")
        self.counters = Counters()
        self.patience = Patience(policy or Policy(), backend.__str__, backend.is_temporary)
        self._backend = backend
        self._block_size = block_size
        self._serial = serial
        self._read_only = read_only
        self._open = False
        self._info = BlockInfo(size=0)
        self._leaf = self._info  # what the backend said of itself
        self._bugs: set[tuple[str, type[Exception]]] = set()

    def __str__(self) -> str:
        return str(self._backend)

    @property
    def info(self) -> BlockInfo:
        """The disk as it is now."""
        return self._info

    @property
    def default_on_error(self) -> str:
        """What the storage itself has its users do about temporary errors, as they write it."""
        return self._storage.default_on_error

    @property
    def _storage(self) -> Backend:
        """Below all filters."""
        found = self._backend
        while isinstance(found, Filter):
            found = found.below
        return found

    @property
    def filters(self) -> dict[str, Filter]:
        """The layers over the storage, the lowest first, by what a user calls them: ``faults``, a second one ``faults2``."""
        layers: list[Filter] = []
        backend = self._backend
        while isinstance(backend, Filter):
            layers.append(backend)
            backend = backend.below
        result: dict[str, Filter] = {}
        for layer in reversed(layers):
            number = sum(other.kind == layer.kind for other in result.values()) + 1
            result[layer.kind if number == 1 else f"{layer.kind}{number}"] = layer
        return result

    @property
    def fence(self) -> Fence:
        """What makes taking this disk over from a dead server safe."""
        return self._backend.fence

    # ----------------------------------------------------------------------------------------------- lifetime

    async def open(self) -> BlockInfo:
        """Open the storage. Raises UserError, with nothing left open or created."""
        try:
            leaf = await self._guard("open", self._backend.open())
        except OSError as error:
            raise UserError(f"{self}: cannot be opened: {error.strerror or error}", exit_code=1) from error
        self._open = True
        try:
            self._info = self._presented(leaf)
        except UserError:
            await self.abandon()
            raise
        return self._info

    async def close(self) -> None:
        """Flush nothing, let go of the storage. Nothing may be under way. Harmless if it is closed."""
        if self._open:
            self._open = False
            self.patience.close()
            await self._guard("close", self._backend.close())

    async def abandon(self) -> None:
        """``close``, and remove a file that ``open`` created: the disk never came to be."""
        if self._open:
            self._open = False
            self.patience.close()
            await self._guard("abandon", self._backend.abandon())

    def remember_losses(self, mark: memoryview) -> None:
        """See ``Backend.remember_losses``."""
        self._backend.remember_losses(mark)

    def let_go(self, leaving: bool) -> None:
        """The disk is about to go, so requests that wait fail at once; or (``leaving`` False) it stays after all."""
        self.patience.let_go(leaving)
        self._backend.let_go(leaving)

    async def refresh(self) -> BlockInfo:
        """Look at the storage again: its size may have changed. Raises UserError if it cannot be a disk any more."""
        self._check_open()
        self._info = self._presented(await self._guard("refresh", self._backend.refresh()))
        return self._info

    async def resize(self, size: int) -> BlockInfo:
        """Grow the disk to ``size`` bytes, and the storage unless its owner has. Raises UserError; then the disk is as it
        was, even if the storage is not."""
        self._check_open()
        info = self._info
        if size <= 0 or size % info.logical_block_size:
            raise UserError(f"size: {size} is not usable; accepted are multiples of {info.logical_block_size}")
        if size < info.size:
            raise UserError(f"size: {size} is less than the {info.size} bytes of {self}; a disk in use can only grow")
        found = self._presented(await self._guard("refresh", self._backend.refresh()))
        if found.size > size:
            raise UserError(f"size: {self} has {found.size} bytes by now, more than {size}; resize to what it has")
        if found.size < size:
            if info.read_only:
                raise UserError(f"size: {self} is open for reading only; grow it by other means, then resize to its size")
            try:
                found = self._presented(await self._guard("resize", self._backend.resize(size)))
            except OSError as error:
                raise UserError(f"size: {self} cannot grow: {error.strerror or error}", exit_code=1) from error
        self._info = found
        return found

    def native_target(self) -> NativeTarget | None:
        """How C can serve this disk, under the rules of ``info``; None: it cannot."""
        self._check_open()
        return self._backend.native_target()

    @property
    def takes_batches(self) -> bool:
        """Whether ``admit`` and what follows it make sense. Constant while the stack is open."""
        return self._backend.takes_batches

    @property
    def batch_threads(self) -> Threads | None:
        """Where ``serve`` must be called, because it blocks; None: on the event loop. Constant while the stack is open."""
        return self._backend.batch_threads

    def _presented(self, leaf: BlockInfo) -> BlockInfo:
        """The disk that the storage makes. Raises UserError if it makes none."""
        block = self._block_size or leaf.logical_block_size
        if block < leaf.logical_block_size:
            raise UserError(
                f"block_size: {block} is smaller than the {leaf.logical_block_size} of {self}; "
                f"accepted are powers of two from {leaf.logical_block_size}"
            )
        if leaf.size == 0:
            raise UserError(f"size: {self} is empty; a file gets a size with `truncate -s SIZE FILE`")
        if leaf.size % block:
            raise self._uneven(leaf, block)
        read_only = self._read_only or leaf.read_only
        self._leaf = leaf
        return dataclasses.replace(
            leaf,
            logical_block_size=block,
            physical_block_size=max(block, leaf.physical_block_size),
            max_transfer=0,
            read_only=read_only,
            volatile_cache=leaf.volatile_cache and not read_only,
            serial=self._serial or leaf.serial,
        )

    def _uneven(self, leaf: BlockInfo, block: int) -> UserError:
        """What is wrong with a size that is not one of whole blocks, and each way to mend it that there is."""
        what = f"less than one block of {block}" if leaf.size < block else f"no multiple of the block size {block}"
        next_size = leaf.size + -leaf.size % block
        # Of a source whose place is a path, the size is the file's; otherwise its user gives it.
        is_file = place_of(self._storage.Options) == "path"
        truncate = f"`truncate -s %{block} FILE` rounds a file up to {next_size}"
        ways = [truncate if is_file else f"the next size is {next_size}"]
        if leaf.size % leaf.logical_block_size == 0:
            ways.append(f"a block size of {leaf.logical_block_size} fits")
        return UserError(f"size: {self} has {leaf.size} bytes, {what}; {', '.join(ways)}")

    # ----------------------------------------------------------------------------------------------- requests

    async def read(self, offset: int, into: Segments) -> None:
        """Fill all of ``into``."""
        try:
            length = _length_of(into)
            self._check_range(offset, length)
            for at, segments in self._pieces(offset, length, into):
                await self._persist("read", partial(self._backend.read, at, segments))
        except OSError:
            self.counters.errors += 1
            raise
        self.counters.reads += 1
        self.counters.read_bytes += length

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        """Write all of ``data``; with ``fua`` it is durable on return."""
        try:
            length = _length_of(data)
            self._check_change(offset, length)
            native_fua = fua and self._has_native_fua()
            await self._write(offset, length, data, native_fua)
            if fua and not native_fua:
                await self._flush()
        except OSError:
            self.counters.errors += 1
            raise
        self.counters.writes += 1
        self.counters.write_bytes += length

    async def flush(self) -> None:
        """Make durable everything completed before."""
        try:
            self._check_open()
            await self._flush()
        except OSError:
            self.counters.errors += 1
            raise
        self.counters.flushes += 1

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is needed no longer."""
        try:
            self._check_change(offset, length)
            if self._leaf.discard is Support.NONE:
                raise OSError(errno.EOPNOTSUPP, f"{self} cannot discard")
            if length and self._leaf.discard is Support.NATIVE:
                await self._persist("discard", partial(self._backend.discard, offset, length))
        except OSError:
            self.counters.errors += 1
            raise
        self.counters.discards += 1
        self.counters.discard_bytes += length

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        """The range reads as zeros afterwards; with ``unmap`` its space may be given back."""
        try:
            self._check_change(offset, length)
            support = self._leaf.write_zeroes
            if support is Support.NONE:
                raise OSError(errno.EOPNOTSUPP, f"{self} cannot write zeroes")
            native_fua = fua and self._has_native_fua()
            if length and not (
                support is Support.NATIVE and await self._zeroed_by_backend(offset, length, unmap, native_fua)
            ):
                for at in range(offset, offset + length, _ZEROS_AT_ONCE):
                    here = min(_ZEROS_AT_ONCE, offset + length - at)
                    zeros = [_ZEROS[: min(len(_ZEROS), here - done)] for done in range(0, here, len(_ZEROS))]
                    await self._write(at, here, zeros, native_fua)
            if fua and not native_fua:
                await self._flush()
        except OSError:
            self.counters.errors += 1
            raise
        self.counters.write_zeroes += 1
        self.counters.write_zeroes_bytes += length

    # A batch goes through admit, serve and settle; what it drops and what it leaves open goes through the coroutines above.

    def admit(self, batch: Batch) -> None:
        """Leave in a batch only what the backend can be given without a refusal, a cut or an emulation."""
        info, leaf = self._info, self._leaf
        batch.admit(
            BatchLimits(
                size=info.size if self._open else 0,
                block_size=info.logical_block_size,
                max_transfer=leaf.max_transfer,
                writes=not info.read_only,
                fua=leaf.fua is Support.NATIVE,
            )
        )

    def serve(self, batch: Batch) -> None:
        """Have the backend serve an admitted batch. Raises nothing. On one of ``batch_threads``, if there are such."""
        try:
            self._backend.batch(batch)
        except OSError as error:
            if not self.patience.limit(error):
                batch.fail(error.errno or errno.EIO)
        except Exception as error:
            self._complain("batch", error)
            batch.fail(errno.EIO)
            return
        if self.patience.policy.waits:
            # What may wait does so by itself, as a single request.
            results = batch.results
            for number, result in enumerate(results):
                if result > 0 and self.patience.limit(OSError(result, "")):
                    results[number] = OPEN

    def settle(self, batch: Batch) -> None:
        """Count what became of a batch."""
        totals, counters = batch.settle(), self.counters
        counters.reads += totals.reads
        counters.read_bytes += totals.read_bytes
        counters.writes += totals.writes
        counters.write_bytes += totals.write_bytes
        counters.errors += totals.errors

    async def _write(self, offset: int, length: int, data: Segments, native_fua: bool) -> None:
        for at, segments in self._pieces(offset, length, data):
            await self._persist("write", partial(self._backend.write, at, segments, fua=native_fua))

    async def _flush(self) -> None:
        if self._info.volatile_cache:
            await self._persist("flush", self._backend.flush)

    async def _zeroed_by_backend(self, offset: int, length: int, unmap: bool, native_fua: bool) -> bool:
        """False: it turns out not to know how."""
        try:
            zero = partial(self._backend.write_zeroes, offset, length, unmap=unmap, fua=native_fua)
            await self._persist("write_zeroes", zero)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    # ------------------------------------------------------------------------------------------------- checks

    def _check_open(self) -> None:
        if not self._open:
            raise OSError(errno.EBADF, f"{self} is not open")

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        info = self._info
        if offset < 0 or length < 0 or offset + length > info.size:
            raise OSError(errno.EINVAL, f"{length} bytes at {offset} are not inside the {info.size} bytes of the disk")
        if (offset | length) & (info.logical_block_size - 1):
            raise OSError(errno.EINVAL, f"{length} bytes at {offset} are no multiple of {info.logical_block_size}")

    def _check_change(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if self._info.read_only:
            raise OSError(errno.EROFS, f"{self} is read-only")

    def _has_native_fua(self) -> bool:
        """Whether the backend does it; if not, a flush does."""
        if self._leaf.fua is Support.NONE:
            raise OSError(errno.EOPNOTSUPP, f"{self} cannot force a write to be durable")
        return self._leaf.fua is Support.NATIVE

    def _pieces(self, offset: int, length: int, segments: Segments) -> Iterable[tuple[int, Segments]]:
        """What the backend takes at once, none for no bytes."""
        limit = self._leaf.max_transfer
        if length == 0:
            return ()
        if limit == 0 or length <= limit:
            return ((offset, segments),)
        return _cut(offset, limit, segments)

    async def _persist(self, operation: str, work: Callable[[], Awaitable[None]]) -> None:
        """``_guard``, again and again while the failure policy has it."""
        try:
            return await self._guard(operation, work())
        except OSError as error:
            if not self.patience.limit(error):
                raise
            failure = error
        with self.patience.request(failure) as attempts:
            while True:
                await attempts.wait(failure)
                try:
                    return await self._guard(operation, work())
                except OSError as error:
                    failure = error

    async def _guard(self, operation: str, work: Awaitable[_T]) -> _T:
        """Let OSError pass, and UserError where a user waits for an answer; anything else is a bug of the backend and
        costs one request."""
        try:
            return await work
        except OSError:
            raise
        except Exception as error:
            if isinstance(error, UserError) and operation in _ASKED_BY_A_USER:
                raise
            self._complain(operation, error)
            raise PermanentError(errno.EIO, f"bug in {self}: {error!r}") from error

    def _complain(self, operation: str, error: Exception) -> None:
        """Log a bug of the backend once. In the handler of ``error``; any thread."""
        kind = (operation, type(error))
        if kind not in self._bugs:
            self._bugs.add(kind)
            log.exception("bug in the storage %s: %s failed in a way it must not (said once)", self, operation)


def _length_of(segments: Segments) -> int:
    return len(segments[0]) if len(segments) == 1 else sum(map(len, segments))


def _cut(offset: int, limit: int, segments: Segments) -> Iterator[tuple[int, Segments]]:
    """Pieces of ``limit`` bytes, the last perhaps shorter, without copying."""
    piece: list[memoryview] = []
    room = limit
    for segment in segments:
        while len(segment):
            part, segment = segment[:room], segment[room:]
            piece.append(part)
            room -= len(part)
            if room == 0:
                yield offset, piece
                offset += limit
                piece, room = [], limit
    if piece:
        yield offset, piece
