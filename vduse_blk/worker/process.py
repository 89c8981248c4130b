"""What a process must do to itself before it serves a disk of the host it runs on.

Such a process may be needed to free the very memory it waits for: the kernel writes dirty pages to the disk, the disk needs
the server, the server needs a page. So its pages stay in memory, its allocations never wait for write-back, and the
out-of-memory killer looks elsewhere first. Each step is best effort: an unprivileged container may forbid some of them,
and a disk without them beats no disk.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable

log = logging.getLogger("vduse_blk.disk")

_PR_SET_IO_FLUSHER = 57  # linux/prctl.h, since 5.6
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # sys/mman.h on every architecture but alpha, powerpc and sparc
_OOM_SCORE = -900  # below everything ordinary, above what the administrator exempted completely


def harden() -> list[str]:
    """Lock memory, mark the process as an I/O flusher, lower its OOM score. Returns what did not work, as sentences."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps: list[tuple[str, Callable[[], object]]] = [
        # ON_FAULT: lock what is used, instead of faulting in every reserved page (a memory disk's, say).
        ("memory is not locked", lambda: _check(libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))),
        ("allocations may wait for write-back", lambda: _check(libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))),
        ("the out-of-memory killer may choose this process", _lower_oom_score),
    ]
    problems = []
    for consequence, step in steps:
        try:
            step()
        except OSError as error:
            problems.append(f"{consequence}: {error.strerror}")
    return problems


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _lower_oom_score() -> None:
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(_OOM_SCORE))
