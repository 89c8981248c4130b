"""Threads: a call that has begun is waited for, whatever happens to whoever waits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vduse_blk.block.threads import Threads


def test_results_and_errors_come_back() -> None:
    async def run() -> None:
        threads = Threads("test", 2)
        assert await threads.run(pow, 2, 10) == 1024
        with pytest.raises(OSError, match="no luck"):
            await threads.run(_raise)
        threads.close()

    asyncio.run(run())


def _raise() -> None:
    raise OSError(5, "no luck")


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_call_ends_only_with_its_thread(fails: bool) -> None:
    """The thread uses the caller's memory: until it is done the caller must not have it back, however often it is
    cancelled. An error of the call is not reported as lost."""

    async def run() -> None:
        problems: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        threads = Threads("test", 1)
        begun, go = threading.Event(), threading.Event()

        def call() -> None:
            begun.set()
            go.wait()
            if fails:
                _raise()

        task = asyncio.ensure_future(threads.run(call))
        await asyncio.to_thread(begun.wait)
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        threads.close()
        del task
        await asyncio.sleep(0)
        assert not problems

    asyncio.run(run())


def test_no_more_threads_than_allowed() -> None:
    async def run() -> None:
        threads = Threads("bounded", 3)
        barrier = threading.Barrier(3)  # passes only if three run at once
        seen: set[str] = set()

        def call() -> None:
            seen.add(threading.current_thread().name)
            barrier.wait(10)

        await asyncio.gather(*(threads.run(call) for _ in range(12)))
        assert len(seen) == 3
        threads.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("bounded")]

    asyncio.run(run())
