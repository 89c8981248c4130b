"""What storage is: a ``Backend``, and what it says about itself, ``BlockInfo``.

Rules that hold for every method of every backend and filter:

* All coroutines run on one event loop. Any number of reads, writes, flushes, discards and write_zeroes may be under way
  at once; the order of overlapping ones is open. ``open``, ``refresh``, ``resize``, ``close`` and ``abandon`` come one
  at a time, ``close`` and ``abandon`` with nothing else under way.
* Callers (that is: the stack) keep every range inside the size, and offset and length multiples of the logical block
  size. Segments may have any length and address; only their sum is a multiple of the block size.
* The segments are the backend's only until its coroutine ends, **also when that is by cancellation**: guest memory is
  unmapped afterwards, and a thread that still copies would write into somebody else's.
* A request ends by returning or by ``OSError``; ``EOPNOTSUPP`` means "never ask this again". ``open`` and ``resize`` may
  also raise ``UserError``. Anything else is a bug.
* Offsets and lengths are bytes.

A backend that ``takes_batches`` gets reads and writes also, and mostly, many at a time in ``batch``: see ``block.batch``. It
keeps its coroutines, which serve everything else.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from vduse_blk.block.batch import Batch
from vduse_blk.block.errors import UserError
from vduse_blk.block.native import NativeTarget
from vduse_blk.block.threads import Threads

Segments = Sequence[memoryview]
"""Pieces of memory of one request, in order; each of format 'B', one dimension, contiguous."""


class Support(Enum):
    """Who does an operation: nobody (refused with EOPNOTSUPP), the stack, or the backend."""

    NONE = "none"
    EMULATE = "emulate"
    NATIVE = "native"


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What a disk is. Sizes in bytes. Raises ValueError if it cannot be true."""

    size: int
    logical_block_size: int = 512
    """Every offset and length is a multiple. A power of two, at least 512."""
    physical_block_size: int = 512
    """Smallest write that does not make the storage read first."""
    optimal_io_size: int = 0
    """0: unknown."""
    max_transfer: int = 0
    """Longest read or write the backend takes; the stack cuts. 0: no limit."""
    read_only: bool = False
    rotational: bool = False
    volatile_cache: bool = False
    """Completed writes may be lost before a flush."""
    fua: Support = Support.EMULATE
    """EMULATE: a flush after the write."""
    discard: Support = Support.NONE
    """EMULATE: accepted and ignored, which is what discard allows."""
    write_zeroes: Support = Support.EMULATE
    """EMULATE: zeros are written. A NATIVE backend may still raise EOPNOTSUPP: then they are, too."""
    serial: str = ""
    """At most 20 ASCII characters."""

    def __post_init__(self) -> None:
        block = self.logical_block_size
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative")
        if block < 512 or block & (block - 1):
            raise ValueError(f"logical_block_size {block} is no power of two from 512")
        if self.max_transfer < 0 or self.max_transfer % block:
            raise ValueError(f"max_transfer {self.max_transfer} is no multiple of {block}")


class Fence(Enum):
    """Why no write of a server that died can land once its successor has answered it: what makes taking over safe."""

    OPEN = "open"
    """``open`` fails with UserError, exit code 4, for as long as anything of a dead process may still land."""
    LOST = "lost"
    """The contents died with the server: there is nothing to take over."""
    UNKNOWN = "unknown"
    """Nobody has thought about it: a disk on this storage is not taken over."""


class Backend(ABC):
    """A leaf of storage, or a filter over one. ``str()`` of it is what messages call it."""

    default_on_error: ClassVar[str] = "fail"
    """What becomes of requests with temporary errors unless the user says otherwise; as ``--on-error`` has it."""
    Options: ClassVar[type]
    """Frozen dataclass as ``block.options`` describes: generates URI parsing, help and JSON schema."""
    fence: Fence = Fence.UNKNOWN
    """A filter that keeps nothing of its own has the fence of what is below it; one that does thinks for itself."""

    takes_batches: bool = False
    """Whether ``batch`` may be called. Constant while the backend is open. A subclass that has a ``read`` or ``write`` of
    its own and no ``batch`` starts from False again: batches would go past them."""

    batch_threads: Threads | None = None
    """Threads of the backend, for a ``batch`` that blocks: it is called on several at a time, each with its share of what
    arrived. None: ``batch`` never blocks, and is called on the event loop. Constant while the backend is open."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.keys()
        if own & {"read", "write"} and not own & {"batch", "takes_batches"}:
            cls.takes_batches = False

    def __init__(self, options: Any) -> None:
        """``options`` is an instance of ``Options``. Touches nothing."""
        self.options = options

    def __str__(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    async def open(self) -> BlockInfo:
        """Make the storage ready. Called once. A failure leaves nothing open and nothing created.

        Raises UserError for what the user can mend.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything ``open`` took. Flushes nothing. Called once, after a successful ``open``."""

    async def abandon(self) -> None:
        """``close``, and remove what ``open`` has created: the disk was never given to anybody."""
        await self.close()

    @abstractmethod
    async def read(self, offset: int, into: Segments) -> None:
        """Fill all of ``into``; a part that cannot be read is an OSError, never silent zeros."""

    @abstractmethod
    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        """Write all of ``data``, perhaps read-only memory. ``fua``, asked only if it is NATIVE: durable on return."""

    @abstractmethod
    async def flush(self) -> None:
        """Make durable everything completed before the call. An error means that something may be lost; a later flush
        must not make it look as if it were not."""

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is needed no longer; what it reads as afterwards is open. Only if NATIVE."""

    @abstractmethod
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        """The range reads as zeros afterwards; ``unmap``: its space may be given back. Only if NATIVE, ``fua`` as in
        ``write``. EOPNOTSUPP: nothing was changed, or some of it is zero already."""

    @abstractmethod
    async def refresh(self) -> BlockInfo:
        """Look again: the size may have changed."""

    async def resize(self, size: int) -> BlockInfo:
        """Grow to ``size`` bytes (the stack has checked that it is growth, and the alignment), durably.

        Raises UserError for what the user can mend, OSError(EOPNOTSUPP) where it can never be done.
        """
        raise OSError(errno.EOPNOTSUPP, f"{self} has a fixed size")

    def batch(self, batch: Batch) -> None:
        """Serve what it can of ``batch``, finished when it returns. Only if ``takes_batches``.

        An OSError fails every request still open, so an error of one request belongs into its result. Other requests, also
        coroutines, may be under way meanwhile; the order of overlapping ones is open.
        """
        raise NotImplementedError

    def native_target(self) -> NativeTarget | None:
        """How C can serve this without Python, from ``open`` to ``close``; None: it cannot."""
        return None

    def is_temporary(self, error: OSError) -> bool:
        """Whether the same request may succeed later. Never asked about a ``PermanentError``."""
        return False

    def remember_losses(self, mark: memoryview) -> None:
        """``mark``, 4 bytes, is not zero once a flush has lost data, and outlives this process: who opens the storage again,
        for the same disk, is given it, and fails every flush. Called before ``open``, if at all; storage whose flushes lose
        nothing when they fail, or that remembers by itself, has no use for it."""
        return

    def let_go(self, leaving: bool) -> None:
        """The disk is about to go, or (``leaving`` False) stays after all: meanwhile nothing may wait without a limit."""
        return


class Filter(Backend):
    """A layer over ``below``. A module of ``vduse_blk.filters`` has one, made from one of the two below."""

    def __init__(self, below: Backend, options: Any) -> None:
        super().__init__(options)
        self.below = below
        self.fence = below.fence

    def __str__(self) -> str:
        return str(self.below)

    @property
    def kind(self) -> str:
        """The filter's name."""
        return type(self).__module__.rpartition(".")[2]

    def change(self, options: Any) -> None:
        """Take other options while the disk is in use. Raises UserError, with nothing changed, for what cannot be."""
        raise UserError(f"filter: '{self.kind}' cannot be changed while the disk is in use")

    def facts(self) -> dict[str, Any]:
        """What ``info`` shows of it beyond its options; JSON types only."""
        return {}


class PassthroughFilter(Filter):
    """A layer that hands everything to ``below``; subclasses change what they are about (throttle, readonly, faults).

    Never native: a request served in C would go past the filter.
    """

    async def open(self) -> BlockInfo:
        return await self.below.open()

    async def close(self) -> None:
        await self.below.close()

    async def abandon(self) -> None:
        await self.below.abandon()

    async def read(self, offset: int, into: Segments) -> None:
        await self.below.read(offset, into)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        await self.below.write(offset, data, fua=fua)

    async def flush(self) -> None:
        await self.below.flush()

    async def discard(self, offset: int, length: int) -> None:
        await self.below.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        await self.below.write_zeroes(offset, length, unmap=unmap, fua=fua)

    async def refresh(self) -> BlockInfo:
        return await self.below.refresh()

    async def resize(self, size: int) -> BlockInfo:
        return await self.below.resize(size)

    def is_temporary(self, error: OSError) -> bool:
        return self.below.is_temporary(error)

    def remember_losses(self, mark: memoryview) -> None:
        self.below.remember_losses(mark)

    def let_go(self, leaving: bool) -> None:
        self.below.let_go(leaving)


class TransformFilter(Filter):
    """A layer over ``below`` that changes what the bytes mean (cow, cache, crypt).

    Every operation stays abstract, those with a default in ``Backend`` too: when the contract grows, a transform that
    forgot the new operation cannot be instantiated, instead of corrupting data. ``batch`` is none: without
    ``takes_batches`` nobody calls it.
    """

    @abstractmethod
    async def abandon(self) -> None: ...

    @abstractmethod
    async def resize(self, size: int) -> BlockInfo: ...

    @abstractmethod
    def native_target(self) -> NativeTarget | None: ...

    @abstractmethod
    def is_temporary(self, error: OSError) -> bool: ...

    @abstractmethod
    def remember_losses(self, mark: memoryview) -> None: ...

    @abstractmethod
    def let_go(self, leaving: bool) -> None: ...
