"""Blocking calls for backends whose storage has no asynchronous interface."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class Threads:
    """At most ``limit`` threads, started when needed. Owned by the event loop."""

    def __init__(self, name: str, limit: int) -> None:
        self.limit = limit
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix=name)

    def start(self, call: Callable[..., object], *arguments: object) -> bool:
        """Have a call made on a thread, as soon as one is free; nobody waits for it. False: it will not be made, because
        no thread can be had."""
        turn = threading.Lock()

        def once() -> None:
            if turn.acquire(blocking=False):
                call(*arguments)

        try:
            self._pool.submit(once)
        except RuntimeError:
            # The pool queues the call before it asks for a new thread: an older one may be making it by now.
            return not turn.acquire(blocking=False)
        return True

    async def run(self, call: Callable[..., _T], *arguments: object) -> _T:
        """Call on a thread and return its result.

        Ends only when the call has ended: a thread cannot be cancelled, and it uses memory of our caller, who may
        unmap it when we end. So a cancellation is delivered after the call.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait((future,))
                except asyncio.CancelledError:
                    continue
            future.exception()  # seen: nobody else will ask
            raise

    def close(self) -> None:
        """End the threads. Only with no call under way, so that nothing is closed under a thread."""
        self._pool.shutdown()
