"""How C can serve a stack without Python: a closed union, mirrored by ``struct vb_target`` of the C core."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileTarget:
    """Bytes of the disk are bytes of ``fd``. The descriptor stays the backend's and is valid until it is closed.

    ``lost``: 4 bytes, zero until a flush fails, by whichever thread or language; from then on every flush fails. None, only
    where a flush that failed loses nothing: it may be tried again.
    ``temporary``: errno values after which the same request may succeed later, but for a flush that sets ``lost``.
    """

    fd: int
    is_block_device: bool
    lost: bytearray | memoryview | None = None
    temporary: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class MemoryTarget:
    """``size`` bytes at ``address`` of this process; valid until the backend is closed."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class NullTarget:
    """Reads give zeros, everything else succeeds and does nothing."""


NativeTarget = FileTarget | MemoryTarget | NullTarget
