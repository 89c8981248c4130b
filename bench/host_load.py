"""How busy others keep the host while a guest of it measures: the host writes it to a file, the guest reads it there.

A virtual machine's figures are worth little while something else uses the processors it runs on, and from inside that
cannot be seen. The file holds two numbers that only grow: seconds, and CPU seconds used by all processes of the host but
ours, per CPU.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

PERIOD = 0.1
"""Seconds between two updates."""
_TICKS = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> set[int]:
    """A process and all that came from it and still have a living line of parents."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads; 0 if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / _TICKS


def busy_seconds() -> float:
    """CPU time of everything on this host, and what its own host took away."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS


class Feed:
    """The writing side, on a thread of its own for the length of a ``with`` block. ``root`` is the process that is ours,
    with the descendants it has when the block begins."""

    def __init__(self, path: Path, root: int) -> None:
        self._path = path
        self._own = descendants(root)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host load")

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _foreign(self) -> float:
        return busy_seconds() - sum(map(cpu_seconds, self._own))

    def _run(self) -> None:
        began, before = time.monotonic(), self._foreign()
        new = self._path.with_suffix(".new")
        while not self._end.wait(PERIOD):
            new.write_text(f"{time.monotonic() - began:.3f} {(self._foreign() - before) / (os.cpu_count() or 1):.4f}\n")
            new.rename(self._path)


class Gauge:
    """The reading side. Without a file nothing is known and nothing counts as disturbed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def look(self) -> tuple[float, float] | None:
        try:
            seconds, foreign = self._path.read_text().split()
        except (OSError, ValueError):
            return None
        return float(seconds), float(foreign)

    def share(self, since: tuple[float, float] | None) -> float:
        """The part of the host's CPU time that others used since a look, 0 to 1."""
        now = self.look()
        if since is None or now is None or now[0] <= since[0]:
            return 0.0
        return max(0.0, (now[1] - since[1]) / (now[0] - since[0]))
