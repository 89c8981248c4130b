"""Build description of the C core for cffi: the declarations Python sees are the text of ``api.h`` itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "iova.c",
    "vring_split.c",
    "dirty.c",
    "vblk.c",
    "inflight.c",
    "queue.c",
    "batch.c",
    "mapping.c",
    "uring.c",
    "fixed.c",
    "target_file.c",
    "target_memory.c",
    "pool.c",
    "retry.c",
    "pace.c",
    "engine.c",
)


def declarations() -> str:
    """``api.h`` without its preprocessor lines."""
    text = (HERE / "api.h").read_text(encoding="ascii")
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "vduse_blk.core._core",
    '#include "api.h"\n',
    # Relative: setuptools wants sources inside the tree, and builds run from its top.
    sources=[os.path.relpath(HERE / name) for name in SOURCES],
    include_dirs=[os.path.relpath(HERE)],
    depends=[os.path.relpath(HERE / name) for name in ("api.h", "core.h", "uring.h", "fixed.h", "pace.h", "pool.h")],
    # Hidden: calls between the sources need not be open to replacement, and go straight.
    extra_compile_args=[
        "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-pthread", "-fno-strict-aliasing", "-fvisibility=hidden",
    ],
    extra_link_args=["-pthread"],
    py_limited_api=True,
)
