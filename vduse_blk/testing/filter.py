"""The conformance kit for filters: what every layer owes to what lies below and above it.

``check_filter(make)`` takes a function that puts a new filter over a given backend, with options under which it changes
nothing a user can see. All of ``check_backend`` must hold then, and the rules here. Raises AssertionError.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from vduse_blk.block.contract import Backend, BlockInfo, Filter, PassthroughFilter
from vduse_blk.block.errors import UserError
from vduse_blk.testing.backend import MIN_SIZE, check_backend
from vduse_blk.testing.recorder import Recorder

MakeFilter = Callable[[Backend], Filter]
Check = Callable[[MakeFilter], Coroutine[Any, Any, None]]


def check_filter(make: MakeFilter) -> None:
    """Run all checks."""
    check_backend(lambda: make(Recorder(MIN_SIZE)))
    for name, check in CHECKS.items():
        try:
            asyncio.run(check(make))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


async def _opens_and_closes_what_is_below(make: MakeFilter) -> None:
    """Once each, and abandon where the disk never came to be."""
    for end in ("close", "abandon"):
        below = Recorder(MIN_SIZE)
        filter = make(below)
        assert below.lifetime == [], "the constructor touches the storage"
        await filter.open()
        await getattr(filter, end)()
        assert below.lifetime == ["open", end], f"open and {end} become {below.lifetime}"


async def _a_failed_open_leaves_nothing_open(make: MakeFilter) -> None:
    class Shut(Recorder):
        async def open(self) -> BlockInfo:
            raise UserError("it is shut")

    below = Shut(MIN_SIZE)
    (answer,) = await asyncio.gather(make(below).open(), return_exceptions=True)
    assert isinstance(answer, UserError), f"over storage that could not be opened open ends with {answer!r}"
    assert str(answer) == "it is shut", f"the reason becomes {answer}"
    assert below.lifetime == [], f"storage that was never open sees {below.lifetime}"


async def _an_error_below_is_an_error_above(make: MakeFilter) -> None:
    """Of every operation, and whether it is temporary is for the storage to say; a request before it and one behind it
    succeed."""
    failing = False

    class Sick(Recorder):
        async def pause(self, call: object) -> None:
            if failing:
                raise OSError(errno.ESTALE, "sick")

        def is_temporary(self, error: OSError) -> bool:
            return error.errno == errno.ESTALE

    filter = make(Sick(MIN_SIZE))
    await filter.open()
    block = memoryview(bytearray(4096))
    operations: dict[str, Callable[[], Awaitable[None]]] = {
        "write": lambda: filter.write(0, [block]),
        "read": lambda: filter.read(0, [block]),
        "flush": lambda: filter.flush(),
        "discard": lambda: filter.discard(0, 4096),
        "write_zeroes": lambda: filter.write_zeroes(0, 4096, unmap=False),
    }
    for name, operation in operations.items():
        for failing in (False, True, False):
            (answer,) = await asyncio.gather(operation(), return_exceptions=True)
            if not failing:
                assert answer is None or _is_errno(answer, errno.EOPNOTSUPP), f"{name} ends with {answer!r}"
            elif name == "write" or isinstance(filter, PassthroughFilter):
                assert _is_errno(answer, errno.ESTALE), f"{name} failed below and ends with {answer!r}"
            if isinstance(answer, OSError) and answer.errno == errno.ESTALE:
                assert filter.is_temporary(answer), f"an error of {name} that is temporary below is not above"
    await filter.close()


async def _a_passthrough_hands_down_what_it_gets(make: MakeFilter) -> None:
    """Range, fua, unmap: the same calls, in the same order, nothing more. And never native."""
    below = Recorder(MIN_SIZE)
    filter = make(below)
    info = await filter.open()
    if isinstance(filter, PassthroughFilter):
        assert info == await below.refresh(), "a passthrough changes what the storage says of itself"
        assert filter.native_target() is None, "C would go past it"
        block = memoryview(bytearray(4096))
        await filter.write(8192, [block, block], fua=True)
        await filter.write(0, [block])
        await filter.read(4096, [block])
        await filter.flush()
        await filter.discard(4096, 8192)
        await filter.write_zeroes(512, 1024, unmap=True, fua=False)
        await filter.write_zeroes(0, 512, unmap=False, fua=True)
        found = [call.what for call in below.calls]
        assert found == [
            ("write", 8192, 8192, True, False),
            ("write", 0, 4096, False, False),
            ("read", 4096, 4096, False, False),
            ("flush", 0, 0, False, False),
            ("discard", 4096, 8192, False, False),
            ("write_zeroes", 512, 1024, False, True),
            ("write_zeroes", 0, 512, True, False),
        ], f"below arrives {found}"
    await filter.close()


async def _a_flush_above_is_a_flush_below(make: MakeFilter) -> None:
    """Or what was written is not durable."""
    below = Recorder(MIN_SIZE)
    filter = make(below)
    await filter.open()
    await filter.write(0, [memoryview(bytes(4096))])
    await filter.flush()
    written = [i for i, call in enumerate(below.calls) if call.operation == "write" and call.ended is not None]
    flushed = [i for i, call in enumerate(below.calls) if call.operation == "flush" and call.ended is not None]
    assert not written or (flushed and flushed[-1] > written[-1]), "flush ends before what was written is flushed below"
    await filter.close()


async def _says_below_when_the_disk_goes(make: MakeFilter) -> None:
    below = Recorder(MIN_SIZE)
    filter = make(below)
    await filter.open()
    filter.let_go(True)
    filter.let_go(False)
    await filter.close()
    assert below.lifetime == ["open", "let go", "stay", "close"], f"the storage hears {below.lifetime}"


def _is_errno(answer: object, number: int) -> bool:
    return isinstance(answer, OSError) and answer.errno == number


CHECKS: Final[dict[str, Check]] = {
    "opens_and_closes_what_is_below": _opens_and_closes_what_is_below,
    "a_failed_open_leaves_nothing_open": _a_failed_open_leaves_nothing_open,
    "an_error_below_is_an_error_above": _an_error_below_is_an_error_above,
    "a_passthrough_hands_down_what_it_gets": _a_passthrough_hands_down_what_it_gets,
    "a_flush_above_is_a_flush_below": _a_flush_above_is_a_flush_below,
    "says_below_when_the_disk_goes": _says_below_when_the_disk_goes,
}
"""Name → one rule."""
