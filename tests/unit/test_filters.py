"""Filters: every one keeps the contract, and ``faults`` does what it is told, live."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from vduse_blk import registry
from vduse_blk.block.contract import Backend, PassthroughFilter, Segments
from vduse_blk.block.errors import UserError
from vduse_blk.block.options import make_options, write_values
from vduse_blk.block.stack import Stack
from vduse_blk.filters.faults import FaultsFilter
from vduse_blk.source import open_source, parse_filter
from vduse_blk.testing.filter import check_filter
from vduse_blk.testing.recorder import Recorder

SIZE = 1 << 20
BLOCK = bytes(4096)


def faults(below: Backend | None = None, **options: object) -> FaultsFilter:
    return FaultsFilter(below or Recorder(SIZE), make_options("faults", FaultsFilter.Options, options))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def errors_of(filter: FaultsFilter, times: int, at: int = 0) -> list[int]:
    """Which of so many writes fail, with errno; 0: it succeeds."""
    result = []
    for _ in range(times):
        try:
            await filter.write(at, [memoryview(BLOCK)])
            result.append(0)
        except OSError as error:
            result.append(error.errno or -1)
    return result


class TestKit:
    @pytest.mark.parametrize("name", registry.names("filter"))
    def test_every_filter_of_ours_is_a_conforming_layer(self, name: str) -> None:
        kind = registry.filter(name)
        check_filter(lambda below: kind(below, make_options(name, kind.Options, {})))

    def test_faults_that_strike_nothing_conform(self) -> None:
        check_filter(lambda below: faults(below, error="EIO", on="read", offset=1 << 40))

    def test_a_filter_that_swallows_an_operation_is_caught(self) -> None:
        class NoFlush(PassthroughFilter):
            async def flush(self) -> None: ...

        class NoFua(PassthroughFilter):
            async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
                await super().write(offset, data)

        class NoAbandon(PassthroughFilter):
            async def abandon(self) -> None:
                await self.close()

        class NoErrors(PassthroughFilter):
            async def discard(self, offset: int, length: int) -> None:
                try:
                    await super().discard(offset, length)
                except OSError:
                    pass

        class Deaf(PassthroughFilter):
            def let_go(self, leaving: bool) -> None: ...

        for kind, rule in (
            (NoFlush, "an_error_below"),
            (NoFua, "a_passthrough_hands_down"),
            (NoAbandon, "opens_and_closes"),
            (NoErrors, "an_error_below"),
            (Deaf, "says_below"),
        ):
            with pytest.raises(AssertionError, match=f"^{rule}"):
                check_filter(lambda below, kind=kind: kind(below, None))  # type: ignore[misc]


class TestNaming:
    def test_filters_are_stacked_bottom_to_top_and_numbered(self) -> None:
        stack = open_source("memory:1M", filters=["faults?error=EIO", "faults?on=read,flush&delay=1s"])
        assert list(stack.filters) == ["faults", "faults2"]
        assert stack.filters["faults"].options.error == "EIO"
        assert stack.filters["faults2"].options.delay == 1.0
        assert stack.filters["faults2"].below is stack.filters["faults"]

    def test_a_filter_makes_the_disk_run_in_python(self) -> None:
        async def work() -> None:
            stack = open_source("memory:1M", filters=["faults"])
            await stack.open()
            assert stack.native_target() is None
            await stack.close()

        run(work())

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("nope", "filter: 'nope' does not exist; accepted are faults"),
            ("faults?speed=1", "speed: 'faults' has no such option; accepted are count, delay, error, hang, .*"),
            ("faults?on=read,fly", "on: 'fly' is no operation; accepted are read, write, flush, discard, write_zeroes"),
            ("faults?error=oops", "error: 'oops' is no error; accepted are names as in errno"),
            ("faults?error=E2", "error: 'E2' is no error"),
            ("faults?delay=1d", "delay: '1d' is not usable; accepted are seconds"),
            ("faults?delay=1e999", "delay: '1e999' is not usable"),
            ("faults?probability=1.5", "probability: '1.5' is not usable; accepted are numbers from 0 to 1"),
            ("faults?probability=nan", "probability: 'nan' is not usable"),
            ("faults?count=-1", "count: '-1' is not usable; accepted are whole numbers from 0"),
            ("faults?hang", "hang: has no value; accepted is hang=VALUE"),
        ],
    )
    def test_what_cannot_be_is_one_sentence(self, text: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            open_source("memory:1M", filters=[text])
        assert caught.value.exit_code == 2

    def test_options_survive_being_written_down(self) -> None:
        text = "on=read%2Cflush&offset=4096&length=1M&probability=0.25&count=3&seed=7&delay=250ms&hang=yes&error=EIO&torn=1"
        name, options = parse_filter(f"faults?{text}")
        assert parse_filter(f"{name}?{write_values(options)}") == (name, options)
        assert write_values(make_options("faults", FaultsFilter.Options, {})) == ""

    @pytest.mark.parametrize(
        "text", ["delay=0.01ms", "delay=0.00000012", "probability=0.00001", "probability=0.1234567890123"]
    )
    def test_small_numbers_survive_it_too(self, text: str) -> None:
        """As text, for the next server, and as numbers, where another option changes: neither knows an exponent."""
        name, options = parse_filter(f"faults?{text}")
        written = write_values(options)
        assert "e" not in written.partition("=")[2], written
        assert parse_filter(f"{name}?{written}") == (name, options)
        numbers = {"delay": options.delay, "probability": options.probability}
        assert make_options(name, FaultsFilter.Options, numbers) == options


class TestFaults:
    def test_errors_by_operation_range_and_count(self) -> None:
        async def work() -> None:
            filter = faults(error="ENOSPC", on="write,flush", offset="64K", length="4K", count="3")
            await filter.open()
            assert await errors_of(filter, 2, at=0) == [0, 0]
            assert await errors_of(filter, 1, at=(64 << 10) + 4096) == [0]
            assert await errors_of(filter, 1, at=(64 << 10) - 4096) == [0]
            assert await errors_of(filter, 2, at=64 << 10) == [errno.ENOSPC] * 2
            await filter.read(64 << 10, [memoryview(bytearray(4096))])
            with pytest.raises(OSError, match="struck"):
                await filter.flush()  # has no range
            assert await errors_of(filter, 2, at=64 << 10) == [0, 0]
            assert filter.facts()["struck"] == {"write": 2, "flush": 1}
            await filter.close()

        run(work())

    def test_a_seed_makes_a_run_repeatable_and_is_shown(self) -> None:
        async def pattern(**options: object) -> tuple[list[int], int]:
            filter = faults(error="EIO", probability="0.5", **options)
            await filter.open()
            result = await errors_of(filter, 200)
            await filter.close()
            return result, filter.facts()["seed"]

        async def work() -> None:
            first, seed = await pattern()
            assert 50 < sum(map(bool, first)) < 150
            assert await pattern(seed=str(seed)) == (first, seed)
            assert await pattern(seed=str(seed + 1)) != (first, seed)

        run(work())

    def test_a_delayed_operation_takes_longer_and_succeeds(self) -> None:
        async def work() -> None:
            filter = faults(delay="500ms", on="read")
            await filter.open()
            began = time.monotonic()
            await filter.write(0, [memoryview(BLOCK)])
            assert time.monotonic() - began < 0.5
            await filter.read(0, [memoryview(bytearray(4096))])
            assert time.monotonic() - began >= 0.5
            await filter.close()

        run(work())

    @pytest.mark.parametrize(("then", "result"), [({}, 0), ({"error": "ETIMEDOUT"}, errno.ETIMEDOUT)])
    def test_what_hangs_follows_new_options_at_once(self, then: dict[str, object], result: int) -> None:
        async def work() -> None:
            filter = faults(hang="1")
            await filter.open()
            task = asyncio.ensure_future(errors_of(filter, 1))
            done, _ = await asyncio.wait([task], timeout=0.05)
            assert not done
            filter.change(make_options("faults", FaultsFilter.Options, then))
            assert await asyncio.wait_for(task, 5) == [result]
            await filter.close()

        run(work())

    def test_what_hangs_ends_when_the_disk_goes_or_it_is_cancelled(self) -> None:
        async def work() -> None:
            filter = faults(hang="1")
            await filter.open()
            cancelled = asyncio.ensure_future(filter.flush())
            task = asyncio.ensure_future(errors_of(filter, 1))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert not task.done()
            filter.let_go(True)
            assert await asyncio.wait_for(task, 5) == [errno.EIO]
            assert await asyncio.wait_for(errors_of(filter, 1), 5) == [errno.EIO]
            await filter.close()

        run(work())

    def test_a_torn_write_stores_a_beginning_of_whole_blocks_and_fails(self) -> None:
        """Never all of it, never a part of a block, nothing behind it; and it differs."""

        async def work() -> None:
            below = Recorder(SIZE)
            filter = faults(below, torn="1", seed="1")
            await filter.open()
            kept = set()
            for _ in range(40):
                await below.write(0, [memoryview(bytes(8192))])
                data = os.urandom(1000), os.urandom(3096)
                with pytest.raises(OSError, match="torn"):
                    await filter.write(0, [memoryview(part) for part in data])
                found = bytearray(8192)
                await below.read(0, [memoryview(found)])
                length = next(i for i in range(0, 4097, 512) if found[i:] == bytes(8192 - i))
                assert found[:length] == b"".join(data)[:length]
                kept.add(length)
            assert kept <= set(range(0, 4096, 512))
            assert len(kept) > 4
            await filter.close()

        run(work())

    def test_options_that_cannot_be_change_nothing(self) -> None:
        async def work() -> None:
            filter = faults(error="EIO")
            await filter.open()
            with pytest.raises(UserError, match="'fly' is no operation"):
                filter.change(make_options("faults", FaultsFilter.Options, {"on": "fly"}))
            assert await errors_of(filter, 1) == [errno.EIO]
            await filter.close()

        run(work())

    @pytest.mark.parametrize(("name", "temporary"), [("EIO", True), ("ENOSPC", False), ("EINVAL", False), ("EROFS", False)])
    def test_its_errors_are_as_temporary_as_real_ones(self, name: str, temporary: bool) -> None:
        """Also over storage whose own errors never are."""

        async def work() -> None:
            filter = faults(error=name)
            await filter.open()
            with pytest.raises(OSError, match="struck") as caught:
                await filter.flush()
            assert filter.is_temporary(caught.value) is temporary
            assert not filter.is_temporary(OSError(errno.EIO, "of the memory below"))
            await filter.close()

        run(work())

    def test_through_the_stack_errors_are_those_of_the_storage(self) -> None:
        async def work() -> None:
            stack = Stack(faults(error="ENXIO", on="write"))
            await stack.open()
            with pytest.raises(OSError, match="struck") as caught:
                await stack.write(0, [memoryview(BLOCK)])
            assert caught.value.errno == errno.ENXIO
            assert stack.counters.errors == 1
            await stack.close()

        run(work())


def test_a_page_of_documentation_names_every_option() -> None:
    from pathlib import Path

    for name in registry.names("filter"):
        page = (Path(__file__).parents[2] / f"docs/filters/{name}.md").read_text()
        for key in registry.filter(name).Options.__dataclass_fields__:
            assert f"`{key}`" in page, f"docs/filters/{name}.md does not mention {key}"
