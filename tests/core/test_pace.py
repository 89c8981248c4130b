"""When a queue thread looks before it sleeps, by the times it is told: nobody waits here."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ExtensionFileLoader
from typing import Any

import pytest
from cffi import FFI

from vduse_blk.core import build
from vduse_blk.core._core import lib as core

US = 1000


@pytest.fixture(scope="module")
def pace_lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The rules, compiled by themselves; what they ask of a ring comes along."""
    folder = tmp_path_factory.mktemp("pace")
    ffi = FFI()
    ffi.cdef("""
        struct pace { ...; };
        void pace_init(struct pace *pace, uint32_t spin, uint32_t cpus);
        void pace_awake(void);
        void pace_asleep(void);
        uint32_t pace_look_ns(const struct pace *pace);
        void pace_seen(struct pace *pace);
        void pace_in_vain(struct pace *pace);
        void pace_slept(struct pace *pace, uint64_t ns, bool busy, bool began_io);
    """)
    sources = [str(build.HERE / name) for name in ("pace.c", "vring_split.c", "iova.c")]
    ffi.set_source(
        "_pace", '#include "pace.h"', sources=sources, include_dirs=[str(build.HERE)], extra_compile_args=["-std=gnu11"]
    )
    path = ffi.compile(tmpdir=str(folder))
    loader = ExtensionFileLoader("_pace", path)
    spec = importlib.util.spec_from_loader("_pace", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Thread:
    """A queue thread that sleeps and looks as told. As many CPUs as it wants are there."""

    def __init__(self, module: Any, spin: int = core.VB_SPIN_AUTO) -> None:
        self.lib = module.lib
        self.pace = module.ffi.new("struct pace *")
        self.lib.pace_init(self.pace, spin, 1024)

    def looks(self) -> int:
        """Microseconds it would look now."""
        return int(self.lib.pace_look_ns(self.pace)) // US

    def waits(self, until: float, wake_up: float, *, busy: bool = False) -> bool:
        """Something comes after so many microseconds, and a wake-up takes so many. ``busy``: storage has requests. Whether
        looking saw it."""
        looked = self.looks()
        if looked:
            if until <= looked:
                self.lib.pace_seen(self.pace)
                return True
            self.lib.pace_in_vain(self.pace)
        self.lib.pace_slept(self.pace, int((until - looked + wake_up) * US), busy, False)
        return False

    def begins_io(self, us: float) -> None:
        """It hands requests over and sleeps, in one."""
        self.lib.pace_slept(self.pace, int(us * US), True, True)


def looking(module: Any) -> Thread:
    """A thread that has learnt to look."""
    thread = Thread(module)
    assert any(thread.waits(40, 5) for _ in range(20))
    return thread


def test_waits_within_what_is_looked_for_are_seen(pace_lib: Any) -> None:
    """It looks longer and longer, until that is long enough."""
    thread = Thread(pace_lib)
    seen = [thread.waits(30, 5) for _ in range(20)]
    assert seen == [False] * 3 + [True] * 17  # 0, 10, 20, 40 us


def test_a_slow_wake_up_does_not_end_the_looking(pace_lib: Any) -> None:
    """The request comes within what is looked for, but who sleeps learns of it so late that the sleep was longer."""
    thread = looking(pace_lib)
    assert not thread.waits(90, 60)  # one that was late
    seen = [thread.waits(40, 60) for _ in range(20)]
    assert seen[-10:] == [True] * 10


def test_with_slow_storage_nobody_looks(pace_lib: Any) -> None:
    """Neither for it nor for the driver, whose sleeps would be short enough."""
    thread = looking(pace_lib)
    assert not thread.waits(120, 5, busy=True)
    for _ in range(100):
        assert not thread.waits(30, 30)
        assert not thread.waits(80, 30, busy=True)
        assert thread.looks() == 0


def test_storage_that_was_slow_once_is_forgotten(pace_lib: Any) -> None:
    """Flushes, say, or large transfers; then requests that are done at once."""
    thread = Thread(pace_lib)
    thread.waits(1000, 30, busy=True)
    seen = [thread.waits(20, 30) for _ in range(20)]
    assert seen[-10:] == [True] * 10


def test_fast_storage_is_looked_for(pace_lib: Any) -> None:
    """As the driver is."""
    thread = Thread(pace_lib)
    seen = [thread.waits(15, 5, busy=True) and thread.waits(30, 5) for _ in range(20)]
    assert seen[-10:] == [True] * 10


def test_a_short_sleep_that_began_with_io_says_nothing(pace_lib: Any) -> None:
    """What was handed over may have been done at once."""
    thread = Thread(pace_lib)
    for _ in range(10):
        thread.begins_io(5)
    assert thread.looks() == 0
    assert any(thread.waits(15, 5) for _ in range(20))
    before = thread.looks()
    thread.begins_io(5)
    assert thread.looks() == before != 0
    thread.begins_io(80)
    assert thread.looks() == 0


def test_a_long_sleep_ends_the_looking(pace_lib: Any) -> None:
    """An idle disk costs nothing."""
    thread = looking(pace_lib)
    assert not thread.waits(1000, 30)
    assert thread.looks() == 0
    assert not any(thread.waits(1000, 30) or thread.looks() for _ in range(1000))


def test_looking_in_vain_becomes_rare(pace_lib: Any) -> None:
    """Requests that always come a little too late: of 10000 sleeps at most one in 500 begins with looking to no end."""
    thread = Thread(pace_lib)
    looked = 0
    for _ in range(10000):
        looked += thread.looks() == 50
        assert not thread.waits(80, 40)
    assert 0 < looked <= 20


def test_looking_before_long_sleeps_becomes_rare(pace_lib: Any) -> None:
    """Where many share the CPUs some waits are short, and the next is not: looking after those costs the others."""
    thread = Thread(pace_lib)
    looked = 0
    for _ in range(5000):
        for until in (150, 400):
            looked += thread.looks() != 0
            assert not thread.waits(until, 20)
    assert 0 < looked <= 40


def test_looking_pays_again_when_requests_come_soon_again(pace_lib: Any) -> None:
    """However often it was in vain before."""
    thread = Thread(pace_lib)
    for _ in range(200):
        thread.waits(80, 40)
    seen = [thread.waits(20, 40) for _ in range(2000)]
    assert seen[-100:] == [True] * 100


def test_nobody_looks_where_no_cpu_is_left_to_the_sender(pace_lib: Any) -> None:
    """As many queue threads run as there are CPUs."""
    thread = looking(pace_lib)
    for _ in range(1025):  # one CPU more than there are
        pace_lib.lib.pace_awake()
    crowded = thread.looks()
    for _ in range(1025):
        pace_lib.lib.pace_asleep()
    assert crowded == 0
    assert thread.looks() != 0


@pytest.mark.parametrize(("spin", "looks"), [(core.VB_SPIN_ALWAYS, 50), (core.VB_SPIN_NEVER, 0)])
def test_told_what_to_do_it_learns_nothing(pace_lib: Any, spin: int, looks: int) -> None:
    """Always and never are just that."""
    thread = Thread(pace_lib, spin)
    for until in (10, 100, 1000, 10):
        assert thread.looks() == looks
        thread.waits(until, 5)
    assert thread.looks() == looks
