"""Build description of ``pyvduse._uapi``: the ABI header compiled as it stands, declared to cffi from the same text."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def declarations() -> str:
    """The structures as they stand; every ``#define NAME value`` as a constant whose value the compiler supplies."""
    text = (HERE / "vduse_abi.h").read_text(encoding="ascii")
    names = re.findall(r"^#define (VDUSE_\w+) ", text, flags=re.MULTILINE)
    structures = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    return structures + "".join(f"#define {name} ...\n" for name in names)


ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "pyvduse._uapi",
    '#include "vduse_abi.h"\n',
    include_dirs=[os.path.relpath(HERE)],
    depends=[os.path.relpath(HERE / "vduse_abi.h")],
    py_limited_api=True,
)
