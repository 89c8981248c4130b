"""What keeps a server from being well."""

import ctypes
import struct
from pathlib import Path

BEFORE = ("upgrade-asked", "upgrade-ready", "drained", "let-go")
"""Steps of the old server of an upgrade at which the new one has nothing yet."""
AFTER = ("sent", "replaced")
"""Steps at which the new one has everything."""
NEW = ("prepared", "received", "reopened", "restarted")
"""Steps of the new server before the disk is its own."""


def forbid_io_uring() -> None:
    """For this process and for good, with EPERM, as the seccomp profile of a container does."""
    errno_eperm, allow = 0x00050001, 0x7FFF0000
    program = [  # load the number; 425 to 427 are io_uring's on every architecture
        (0x20, 0, 0, 0), (0x35, 0, 2, 425), (0x25, 1, 0, 427), (0x06, 0, 0, errno_eperm), (0x06, 0, 0, allow),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filter_program = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for words in ((38, 1, 0, 0, 0), (22, 2, filter_program, 0, 0)):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


WITHOUT_THREADS = """
import errno, runpy
from vduse_blk.queue.native import NativeQueue, lib
start = NativeQueue.start
def refuse(self, setup, iova):
    if setup.index == 1 and self._target.kind != lib.VB_TARGET_NONE:
        raise OSError(errno.EAGAIN, "no thread")
    start(self, setup, iova)
NativeQueue.start = refuse
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""For ``python -c``: a new server that gets no thread for its second queue."""

_SPINNING = """
from vduse_blk.backends.memory import MemoryBackend
class Spinning(MemoryBackend):
    def native_target(self): return None
    async def write(self, offset, data, *, fua=False):
        while True: pass
"""


def install_spinning(folder: Path) -> None:
    """The backend ``spinning``, storage in Python that never gives the interpreter back, for who has ``folder`` in its
    PYTHONPATH."""
    parts = folder / "spinning-1.dist-info"
    parts.mkdir()
    (parts / "METADATA").write_text("Metadata-Version: 2.1\nName: spinning\nVersion: 1\n")
    (parts / "entry_points.txt").write_text("[vduse_blk.backends]\nspinning = spinning:Spinning\n")
    (folder / "spinning.py").write_text(_SPINNING)
