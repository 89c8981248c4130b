"""Many requests at once, for backends that would rather have one call than a coroutine per request.

A ``Batch`` holds reads and writes that arrived together and need nothing but storage: the stack has checked that each lies
inside the disk, is aligned, not longer than ``max_transfer``, not a write to a read-only disk, and "fua" only where the
backend has it NATIVE. All else, flushes, discards, zeros, refusals, never gets here and goes through the coroutines.

Each request has a result: ``OPEN`` until the backend sets 0 (done) or an errno. What is still open when ``Backend.batch``
returns goes through the coroutines too, so a backend takes what it can do fast and leaves the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

OPEN: Final = -1
"""The result of a request that nobody has answered."""

READ: Final = 0
WRITE: Final = 1
"""Values of ``op`` in a record."""

RECORD: Final[dict[str, Any]] = {
    "names": ["op", "fua", "offset", "length"],
    "formats": ["u1", "u1", "<u8", "<u8"],
    "offsets": [2, 3, 8, 16],
    "itemsize": 48,
}
"""One of ``Batch.records``, as ``numpy.dtype`` takes it."""


class BatchRequest(NamedTuple):
    """``offset`` and ``length`` in bytes. ``number`` is its index in ``Batch.results``."""

    number: int
    is_write: bool
    fua: bool
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch may contain, for the stack. Bytes; ``max_transfer`` 0: any length."""

    size: int
    block_size: int
    max_transfer: int
    writes: bool
    fua: bool


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """What became of a batch: requests that succeeded, their bytes, requests that failed."""

    reads: int
    read_bytes: int
    writes: int
    write_bytes: int
    errors: int


class Batch(ABC):
    """Requests being served. The backend's only until its ``batch`` returns, with all memory it gives out."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of requests."""

    @abstractmethod
    def __iter__(self) -> Iterator[BatchRequest]:
        """The requests, answered or not."""

    @property
    @abstractmethod
    def records(self) -> memoryview:
        """All requests as an array, not to be written: ``numpy.frombuffer(batch.records, numpy.dtype(RECORD))``."""

    @property
    @abstractmethod
    def results(self) -> memoryview:
        """A result per request, to be written, of format 'i': ``OPEN``, 0, or an errno."""

    @abstractmethod
    def memory(self, number: int) -> list[memoryview]:
        """The segments of a request, read-only for a write; for numpy ``frombuffer(segment, "u1")``. No copy."""

    @abstractmethod
    def copy(self, storage: Any, start: int = 0) -> None:
        """Serve, in one call of C, every open request that lies in ``storage``: a buffer that holds the bytes of the disk
        from ``start`` on. Reads are copied out of it, writes into it unless it is read-only; the others stay open."""

    # For the stack.

    @abstractmethod
    def admit(self, limits: BatchLimits) -> None:
        """Drop every request that may not be in a batch; the queue serves it otherwise."""

    @abstractmethod
    def fail(self, error: int) -> None:
        """Give every open request this errno."""

    @abstractmethod
    def settle(self) -> BatchTotals:
        """No result changes any more: count them. All memory given out is taken back. Called once, on the loop."""
