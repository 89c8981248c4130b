"""What becomes of a request when its storage fails with an error that may pass.

``policy.Policy`` is what the user chose, ``Patience`` applies it: to the requests of a stack itself, and to whoever serves
the disk past it (C queues), which read the same two numbers. A request waits from its first such error until it succeeds,
fails with another error, or has waited as long as the policy has it; meanwhile it is tried again and again. Requests wait
each by itself: the order of overlapping ones is open, and a flush covers what was completed before it, not what still waits.

While something waits the log says so: when it begins, once a minute, and when it ends, and never more than one wait in
a minute. Owned by one event loop; times are those of ``time.monotonic``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from vduse_blk.block.errors import FULL, PermanentError
from vduse_blk.block.policy import Policy, Waiting

log = logging.getLogger("vduse_blk.disk")

_FIRST: Final = 0.01
_MOST: Final = 1.0
"""Seconds between two attempts: doubled each time, up to this; a quarter more or less at random."""
_REMINDER: Final = 60.0
"""Seconds."""


class Reader(Protocol):
    """Somebody who applies the policy by itself."""

    def apply(self, on_error: float, on_full: float) -> None:
        """From now on, for requests that wait already, too. Seconds as in ``Policy``."""

    def waiting(self) -> Waiting | None:
        """What waits there."""


class Patience:
    """The policy of one disk, applied. ``name`` is what the log calls the storage, ``is_temporary`` its own answer."""

    def __init__(self, policy: Policy, name: Callable[[], str], is_temporary: Callable[[OSError], bool]) -> None:
        self.policy = policy
        self._name = name
        self._is_temporary = is_temporary
        self._leaving = False
        self._hurrying = 0
        self._changed = asyncio.Event()  # replaced each time
        self._readers: list[Reader] = []
        self._own: dict[object, tuple[float, int]] = {}  # request → since, errno
        self._event_fd = -1
        self._reminder: asyncio.TimerHandle | None = None
        self._said: Waiting | None = None
        self._said_at = -math.inf

    # -------------------------------------------------------------------------------------------------- control

    def change(self, policy: Policy) -> None:
        """What waits longer than the new one allows fails at once."""
        self.policy = policy
        self._announce()

    def let_go(self, leaving: bool) -> None:
        """``leaving``: what waits fails at once, and nothing waits from now on; until it is said that the disk stays."""
        self._leaving = leaving
        self._announce()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Within, nothing waits: a queue that stops must not wait for storage."""
        self._hurrying += 1
        self._announce()
        try:
            yield
        finally:
            self._hurrying -= 1
            self._announce()

    def join(self, reader: Reader) -> int:
        """From now on ``reader`` is told of changes and asked what waits; it signals the eventfd returned when that begins
        or ends. Call on the loop, with the disk open."""
        if self._event_fd < 0:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            asyncio.get_running_loop().add_reader(self._event_fd, self._on_event)
        self._readers.append(reader)
        reader.apply(*self._limits())
        return self._event_fd

    def close(self) -> None:
        """Nobody waits any more, and every reader has stopped."""
        self._readers.clear()
        if self._event_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._event_fd)
            os.close(self._event_fd)
            self._event_fd = -1
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None

    def waiting(self) -> Waiting | None:
        """All that waits, wherever it is."""
        found = [waiting for reader in self._readers if (waiting := reader.waiting()) is not None]
        if self._own:
            since, error = min(self._own.values())
            found.append(Waiting(len(self._own), since, error))
        if not found:
            return None
        first = min(found, key=lambda waiting: waiting.since)
        return Waiting(sum(waiting.requests for waiting in found), first.since, first.error)

    def _limits(self) -> tuple[float, float]:
        if self._leaving or self._hurrying:
            return 0.0, 0.0
        return self.policy.on_error, self.policy.on_full

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for reader in self._readers:
            reader.apply(*self._limits())

    # ------------------------------------------------------------------------------------------------- requests

    def limit(self, error: OSError) -> float:
        """How many seconds a request that failed so may wait from its first error."""
        if isinstance(error, PermanentError):
            return 0.0
        on_error, on_full = self._limits()
        if error.errno in FULL:
            return on_full
        return on_error if on_error and self._is_temporary(error) else 0.0

    @contextmanager
    def request(self, error: OSError) -> Iterator[Attempts]:
        """A request has failed so. Within, it waits."""
        attempts = Attempts(self)
        self._own[attempts] = (attempts.since, error.errno or 0)
        self._look()
        try:
            yield attempts
        finally:
            del self._own[attempts]
            self._look()

    async def pause(self, seconds: float) -> bool:
        """False: something changed meanwhile."""
        changed = self._changed
        try:
            async with asyncio.timeout(seconds):
                await changed.wait()
        except TimeoutError:
            return True
        return False

    # ------------------------------------------------------------------------------------------------------ log

    def _on_event(self) -> None:
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass
        self._look()

    def _look(self, *, reminding: bool = False) -> None:
        now = time.monotonic()
        waiting = self.waiting()
        if waiting is None:
            if self._said is not None:
                log.warning("%s: no request waits for it any more, after %.1f seconds", self._name(), now - self._said.since)
                self._said = None
            if self._reminder is not None:
                self._reminder.cancel()
                self._reminder = None
            return
        if reminding or (self._said is None and now - self._said_at >= _REMINDER):
            self._said, self._said_at = waiting, now
            log.warning(
                "%s: requests wait for it: %d, for %.1f seconds by now; the last error: %s (on-error %s, on-full %s)",
                self._name(),
                waiting.requests,
                now - waiting.since,
                os.strerror(waiting.error),
                *self.policy.facts().values(),
            )
        if self._reminder is None:
            self._reminder = asyncio.get_running_loop().call_later(_REMINDER, self._remind)

    def _remind(self) -> None:
        self._reminder = None
        self._look(reminding=True)


class Attempts:
    """One request that waits: how long it has, and how long until the next attempt."""

    def __init__(self, patience: Patience) -> None:
        self.since = time.monotonic()
        self._patience = patience
        self._pause = _FIRST

    async def wait(self, error: OSError) -> None:
        """Returns when the request should be tried again. Raises ``error``, its last, when it has waited enough."""
        # Not all at the same moment.
        due = time.monotonic() + self._pause * random.uniform(0.75, 1.25)
        self._pause = min(2 * self._pause, _MOST)
        while True:
            now = time.monotonic()
            left = self.since + self._patience.limit(error) - now
            if left <= 0:
                raise error
            if now >= due:
                return
            await self._patience.pause(min(due - now, left))
