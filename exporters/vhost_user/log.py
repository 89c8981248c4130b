"""The disk's log, as far as a front-end can cause lines in it: some at a time, then a few, and how many were left out."""

from __future__ import annotations

import logging
import time

_log = logging.getLogger("vduse_blk.disk")

_BURST = 40
_SECONDS = 10.0
"""Per line, once the burst is used up."""


class FrontendLog:
    """Lines that begin with the disk's ``name``. One thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokens = float(_BURST)
        self._at = time.monotonic()
        self._left_out = 0

    def say(self, level: int, text: str, *arguments: object, exc_info: bool = False) -> None:
        """As ``Logger.log``."""
        if not _log.isEnabledFor(level):
            return
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._at) / _SECONDS)
        self._at = now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        if self._left_out:
            _log.warning("%s: %d lines about front-ends were left out", self._name, self._left_out)
            self._left_out = 0
        _log.log(level, f"%s: {text}", self._name, *arguments, exc_info=exc_info)

    def error(self, text: str, *arguments: object) -> None:
        self.say(logging.ERROR, text, *arguments)

    def warning(self, text: str, *arguments: object) -> None:
        self.say(logging.WARNING, text, *arguments)

    def info(self, text: str, *arguments: object) -> None:
        self.say(logging.INFO, text, *arguments)

    def debug(self, text: str, *arguments: object) -> None:
        self.say(logging.DEBUG, text, *arguments)

    def bug(self, text: str, *arguments: object) -> None:
        """With the traceback of the exception being handled."""
        self.say(logging.ERROR, text, *arguments, exc_info=True)
