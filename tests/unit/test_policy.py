"""The failure policy where Python serves the disk: what waits, for how long, and what is said about it."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from vduse_blk.block import patience as patience_module
from vduse_blk.block.errors import PermanentError, UserError
from vduse_blk.block.policy import Policy
from vduse_blk.block.stack import Stack
from vduse_blk.source import open_source
from vduse_blk.testing.recorder import Call, Recorder

BLOCK = memoryview(bytes(4096))
WAIT = Policy(on_error=math.inf)


class Away(Recorder):
    """Storage that fails with ``error`` while it is set; EINVAL is permanent. ``attempts`` counts operations."""

    def __init__(self, error: int = 0, **info: Any) -> None:
        super().__init__(1 << 20, **info)
        self.error: int | Exception = error
        self.attempts = 0

    async def pause(self, call: Call) -> None:
        self.attempts += 1
        if isinstance(self.error, Exception):
            raise self.error
        if self.error:
            raise OSError(self.error, "away")

    def is_temporary(self, error: OSError) -> bool:
        return error.errno != errno.EINVAL


async def opened(below: Recorder, policy: Policy) -> Stack:
    stack = Stack(below, policy=policy)
    await stack.open()
    return stack


async def until_waiting(stack: Stack, requests: int) -> None:
    while (waiting := stack.patience.waiting()) is None or waiting.requests < requests:
        await asyncio.sleep(0.001)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


class TestWords:
    @pytest.mark.parametrize(
        ("on_error", "on_full", "policy"),
        [
            ("fail", "fail", Policy()),
            ("wait", "fail", Policy(on_error=math.inf)),
            ("retry=250ms", "wait", Policy(on_error=0.25, on_full=math.inf)),
            ("retry=2m", "fail", Policy(on_error=120)),
        ],
    )
    def test_what_is_written_is_what_is_shown(self, on_error: str, on_full: str, policy: Policy) -> None:
        assert Policy.parse(on_error, on_full) == policy
        assert Policy.parse(**policy.facts()) == policy

    @pytest.mark.parametrize(
        ("on_error", "on_full", "sentence"),
        [
            ("retry", "fail", "on-error: 'retry' is not usable; accepted are fail, wait, retry=DURATION"),
            ("retry=", "fail", "on-error: 'retry=' is not usable"),
            ("retry=0", "fail", "on-error: 'retry=0' is not usable"),
            ("retry=-1", "fail", "on-error: 'retry=-1' is not usable"),
            ("WAIT", "fail", "on-error: 'WAIT' is not usable"),
            ("fail", "retry=5s", "on-full: 'retry=5s' is not usable; accepted are fail, wait$"),
        ],
    )
    def test_anything_else_is_one_sentence(self, on_error: str, on_full: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            Policy.parse(on_error, on_full)

    def test_local_storage_fails_unless_told_otherwise(self) -> None:
        for source in ("memory:1M", "null:1M", "/nowhere"):
            assert open_source(source).patience.policy == Policy()
        assert open_source("memory:1M", on_error="wait", on_full="wait").patience.policy == Policy(math.inf, math.inf)


class TestRequests:
    def test_without_a_policy_the_first_error_is_the_answer(self) -> None:
        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, Policy())
            with pytest.raises(OSError, match="away"):
                await stack.write(0, [BLOCK])
            assert below.attempts == 1
            await stack.close()

        run(work())

    @pytest.mark.parametrize("operation", ["read", "write", "flush", "discard", "write_zeroes", "fua"])
    def test_what_waits_goes_on_by_itself_when_the_storage_is_back(self, operation: str) -> None:
        """Every operation, with its arguments, once it can be done, and done once."""

        async def work() -> None:
            below = Away(errno.ETIMEDOUT)
            stack = await opened(below, WAIT)
            buffer = memoryview(bytearray(4096))
            task = asyncio.ensure_future(
                {
                    "read": lambda: stack.read(512, [buffer]),
                    "write": lambda: stack.write(512, [BLOCK]),
                    "flush": lambda: stack.flush(),
                    "discard": lambda: stack.discard(512, 1024),
                    "write_zeroes": lambda: stack.write_zeroes(512, 1024, unmap=True),
                    "fua": lambda: stack.write(512, [BLOCK], fua=True),
                }[operation]()
            )
            while below.attempts < 4:
                await asyncio.sleep(0.005)
            waiting = stack.patience.waiting()
            assert waiting is not None
            assert (waiting.requests, waiting.error) == (1, errno.ETIMEDOUT)
            assert not task.done()
            below.error = 0
            await asyncio.wait_for(task, 5)
            assert stack.patience.waiting() is None
            ended = [call.what for call in below.calls if call.ended is not None]
            assert ended == [below.calls[0].what]
            assert stack.counters.errors == 0
            await stack.close()

        run(work())

    def test_a_retry_of_a_second_ends_after_a_second_and_not_before(self) -> None:
        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, Policy(on_error=1.0))
            began = time.monotonic()
            with pytest.raises(OSError, match="away"):
                await stack.write(0, [BLOCK])
            assert 1.0 <= time.monotonic() - began < 10
            assert 5 < below.attempts < 15  # 10 ms, doubled each time
            await stack.close()

        run(work())

    @pytest.mark.parametrize(
        ("error", "limit"),
        [
            (OSError(errno.EINVAL, "about the request"), 0),
            (PermanentError(errno.EIO, "data is lost"), 0),
            (OSError(errno.ENOSPC, "full"), 7),
            (OSError(errno.EDQUOT, "full"), 7),
            (OSError(errno.EIO, "away"), 3),
        ],
    )
    def test_errors_are_told_apart(self, error: OSError, limit: float) -> None:
        async def work() -> None:
            stack = await opened(Away(), Policy(on_error=3, on_full=7))
            assert stack.patience.limit(error) == limit
            await stack.close()

        run(work())

    def test_a_bug_of_a_backend_never_waits(self) -> None:
        async def work() -> None:
            below = Away()
            below.error = KeyError("bug")
            stack = await opened(below, WAIT)
            with pytest.raises(OSError, match="bug in"):
                await asyncio.wait_for(stack.write(0, [BLOCK]), 5)
            await stack.close()

        run(work())

    def test_another_error_while_it_waits_ends_it(self) -> None:
        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, WAIT)
            task = asyncio.ensure_future(stack.flush())
            await until_waiting(stack, 1)
            below.error = errno.EINVAL
            with pytest.raises(OSError, match="away") as caught:
                await asyncio.wait_for(task, 5)
            assert caught.value.errno == errno.EINVAL
            await stack.close()

        run(work())

    def test_a_flush_covers_a_write_that_waited(self) -> None:
        """A flush that follows it reaches the storage after it, not before."""

        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, WAIT)
            task = asyncio.ensure_future(stack.write(0, [BLOCK]))
            await until_waiting(stack, 1)
            below.error = 0
            await task
            await stack.flush()
            write, flush = (call for call in below.calls if call.ended is not None)
            assert (write.operation, flush.operation) == ("write", "flush")
            assert write.ended is not None
            assert write.ended < flush.began
            await stack.close()

        run(work())


class TestLive:
    @pytest.mark.parametrize("how", ["change", "let go", "hurry"])
    def test_what_waits_ends_at_once(self, how: str) -> None:
        """By another policy, because the disk goes, because a queue stops: errors at once, not at the next attempt."""

        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, WAIT)
            tasks = [asyncio.ensure_future(stack.write(i * 4096, [BLOCK])) for i in range(8)]
            while below.attempts < 8 * 8:  # the next attempts are a second away
                await asyncio.sleep(0.01)
            attempts, began = below.attempts, time.monotonic()
            if how == "change":
                stack.patience.change(Policy())
                answers = await asyncio.gather(*tasks, return_exceptions=True)
            elif how == "let go":
                stack.let_go(True)
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                assert below.lifetime[-1] == "let go"
            else:
                with stack.patience.hurry():
                    answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - began < 0.6
            assert [type(answer) for answer in answers] == [OSError] * 8
            assert below.attempts == attempts
            if how == "hurry":
                task = asyncio.ensure_future(stack.flush())
                await until_waiting(stack, 1)  # it is over: requests wait again
                stack.patience.change(Policy())
                with pytest.raises(OSError, match="away"):
                    await task
            await stack.close()

        run(work())

    def test_from_fail_to_wait_and_to_a_shorter_time(self) -> None:
        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, Policy())
            stack.patience.change(WAIT)
            task = asyncio.ensure_future(stack.flush())
            await until_waiting(stack, 1)
            await asyncio.sleep(1.0)
            began = time.monotonic()
            stack.patience.change(Policy(on_error=2.0))
            with pytest.raises(OSError, match="away"):
                await task
            assert time.monotonic() - began < 1.9  # two seconds from its first error
            await stack.close()

        run(work())

    def test_space_has_its_own_choice(self) -> None:
        async def work() -> None:
            below = Away(errno.ENOSPC)
            stack = await opened(below, WAIT)
            with pytest.raises(OSError, match="away"):
                await stack.write(0, [BLOCK])
            stack.patience.change(Policy(on_full=math.inf))
            task = asyncio.ensure_future(stack.write(0, [BLOCK]))
            await until_waiting(stack, 1)
            below.error = 0
            await asyncio.wait_for(task, 5)
            await stack.close()

        run(work())


class TestLog:
    def test_a_wait_is_said_when_it_begins_now_and_then_and_when_it_ends(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(patience_module, "_REMINDER", 0.2)
        caplog.set_level(logging.INFO)

        async def work() -> None:
            below = Away(errno.ESTALE)
            stack = await opened(below, WAIT)
            tasks = [asyncio.ensure_future(stack.write(i * 4096, [BLOCK])) for i in range(3)]
            await asyncio.sleep(0.5)
            below.error = 0
            await asyncio.gather(*tasks)
            await stack.close()

        run(work())
        said = [record.getMessage() for record in caplog.records]
        assert 4 <= len(said) <= 6, said
        assert said[0].startswith("test_policy: requests wait for it: 1, for 0.0 seconds by now; ")
        assert said[0].endswith("the last error: Stale file handle (on-error wait, on-full fail)")
        assert said[1].startswith("test_policy: requests wait for it: 3, for 0.2 seconds by now; ")
        assert said[2].startswith("test_policy: requests wait for it: 3, for 0.4 seconds by now; ")
        assert said[-1].startswith("test_policy: no request waits for it any more, after 0.")

    def test_storage_that_comes_and_goes_fills_no_log(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)

        async def work() -> None:
            below = Away()
            stack = await opened(below, WAIT)
            for _ in range(20):
                below.error = errno.EIO
                task = asyncio.ensure_future(stack.flush())
                await until_waiting(stack, 1)
                below.error = 0
                await task
            await stack.close()

        run(work())
        assert len(caplog.records) == 2

    def test_a_disk_that_is_closed_leaves_no_timer(self) -> None:
        async def work() -> None:
            below = Away(errno.EIO)
            stack = await opened(below, WAIT)
            task = asyncio.ensure_future(stack.flush())
            await until_waiting(stack, 1)
            stack.let_go(True)
            with pytest.raises(OSError, match="away"):
                await task
            await stack.close()
            loop = asyncio.get_running_loop()
            assert not [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]

        run(work())
