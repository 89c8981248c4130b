"""The failure policy of a disk, as a user writes it. ``block.patience`` applies it; the command line imports only this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from vduse_blk.block.errors import UserError
from vduse_blk.block.options import parse_duration

ON_ERROR: Final = "fail, wait, retry=DURATION (retry=5s)"
ON_FULL: Final = "fail, wait"


@dataclass(frozen=True, slots=True)
class Policy:
    """How many seconds a request may wait from its first error: 0 not at all, infinity for ever."""

    on_error: float = 0.0
    on_full: float = 0.0
    """For ENOSPC and EDQUOT."""

    @classmethod
    def parse(cls, on_error: str, on_full: str) -> Policy:
        """``fail``, ``wait``, and for ``on_error`` ``retry=DURATION``. Raises UserError."""
        return cls(_parse("on-error", on_error, ON_ERROR), _parse("on-full", on_full, ON_FULL))

    @property
    def waits(self) -> bool:
        """Whether any error is waited for."""
        return self.on_error > 0 or self.on_full > 0

    def facts(self) -> dict[str, str]:
        """As a user writes it."""
        return {"on_error": _text(self.on_error), "on_full": _text(self.on_full)}


def _parse(key: str, text: str, accepted: str) -> float:
    if text == "fail":
        return 0.0
    if text == "wait":
        return math.inf
    word, _, duration = text.partition("=")
    try:
        seconds = parse_duration(duration) if word == "retry" and "retry" in accepted else 0.0
    except UserError:
        seconds = 0.0
    if seconds == 0:
        raise UserError(f"{key}: {text!r} is not usable; accepted are {accepted}")
    return seconds


def _text(seconds: float) -> str:
    return "fail" if seconds == 0 else "wait" if seconds == math.inf else f"retry={seconds:g}s"


@dataclass(frozen=True, slots=True)
class Waiting:
    """Requests that wait: how many, since when (``time.monotonic``) there are any, and the errno of the last error."""

    requests: int
    since: float
    error: int
