"""The ABI's constants and structures for Python: names and values come from ``vduse_abi.h``, nothing is written twice.

``constants()`` gives every ``VDUSE_*`` value; ``ffi`` and ``lib`` are cffi's for code that needs the structures themselves.
"""

from __future__ import annotations

from pyvduse._uapi import ffi, lib

__all__ = ["constants", "ffi", "lib", "struct_size"]


def constants() -> dict[str, int]:
    """All constants of the ABI by name, request codes included."""
    return {name: int(getattr(lib, name)) for name in dir(lib)}


def struct_size(name: str) -> int:
    """Bytes of ``struct NAME`` without a flexible tail."""
    return int(ffi.sizeof(f"struct {name}"))
