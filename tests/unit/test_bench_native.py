"""What ``make bench`` makes of measurements: rows that demand what they say."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.compare import LIMIT_SHARE
from bench.native import CASES, HOLES, LIMIT_NOTE, Case, rows_of, rows_of_other
from bench.vhost_servers import END_SECONDS, cpu_each, running, started

RUN = {"iops": 300.0, "mib_s": 9.0, "p50_us": 2.0, "p99_us": 4.0, "server_cpu_us_per_io": 1.0, "interrupts_per_io": 0.5}

FAST = [1e9]
"""A client that is never the limit."""


def slower(by: float) -> dict[str, float]:
    return {key: value / by if key in ("iops", "mib_s") else value * by for key, value in RUN.items()}


def test_what_a_case_demands() -> None:
    """The throughput's ratio and the CPU's; rows without a demand are never short."""
    case = Case("a case", HOLES, (), least=2.0, cpu_least=2.0)
    rows = {row.case: row for row in rows_of(case, [RUN] * 5, [slower(3.0)] * 5, "aio=x", [], FAST)}
    assert {row.ratio for row in rows.values() if row.peer} == {3.0}
    assert not [row for row in rows.values() if row.short]
    rows = {row.case: row for row in rows_of(case, [RUN] * 5, [slower(1.5)] * 5, "aio=x", [], FAST)}
    assert {name for name, row in rows.items() if row.short} == {
        "file of holes: a case",
        "file of holes: a case: CPU of the server per I/O",
    }


def test_the_limit_is_a_row_of_its_own() -> None:
    """Against fio straight on the file a little may be lost, and no more."""
    case = Case("a case", HOLES, (), straight=True, straight_least=0.9)
    for limit, short in ((300.0, False), (300.0 / 0.89, True)):
        (row,) = (row for row in rows_of(case, [RUN] * 5, [RUN] * 5, "", [limit] * 5, FAST) if "fio" in row.case)
        assert bool(row.short) == short


def test_another_version_of_the_peer_is_shown_and_demands_nothing() -> None:
    case = Case("a case", HOLES, (), least=9.0, cpu_least=9.0)
    rows = list(rows_of_other(case, [RUN] * 5, [slower(3.0)] * 5, "7.2", "aio=x"))
    assert [row.ratio for row in rows] == [3.0, 3.0]
    assert all("7.2" in row.case for row in rows)
    assert not [row for row in rows if row.short]


def test_too_few_rounds_show_nothing() -> None:
    """Four turns are no proof."""
    case = Case("a case", HOLES, (), least=1.0)
    assert next(iter(rows_of(case, [RUN] * 4, [slower(9.0)] * 4, "", [], FAST))).short


def test_cases_can_be_told_apart() -> None:
    """No two of a place share a name."""
    assert len({(case.place, case.name) for case in CASES}) == len(CASES)


def test_a_row_says_when_the_client_is_the_limit() -> None:
    """Whoever of the two comes near what the client reaches without storage, the row says so; below it does not."""
    case = Case("a case", HOLES, ())
    near, far = [300.0 / (LIMIT_SHARE + 0.01)], [300.0 / (LIMIT_SHARE - 0.01)]
    for ours, peer in ((RUN, slower(2.0)), (slower(2.0), RUN)):
        assert LIMIT_NOTE not in next(rows_of(case, [ours], [peer], "", [], far)).notes
        assert LIMIT_NOTE in next(rows_of(case, [ours], [peer], "", [], near)).notes


STUBBORN = """
import signal, sys, time, pathlib
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """Two seconds after it was asked to end, and by its number."""
    with running("", tmp_path / "socket", [sys.executable, "-c", STUBBORN, str(tmp_path / "socket")], {}) as server:
        began = time.monotonic()
    assert server.process.returncode == -signal.SIGKILL
    assert END_SECONDS <= time.monotonic() - began < END_SECONDS + 5


def test_a_server_does_not_outlive_a_benchmark(tmp_path: Path) -> None:
    """Neither one that is told to end nor one that is killed leaves a server, were it deaf to SIGTERM."""
    program = f"""
import sys, time, pathlib
from bench.vhost_servers import end_on_signals, running
end_on_signals()
with running("", pathlib.Path(sys.argv[1]), [sys.executable, "-c", {STUBBORN!r}, sys.argv[1]], {{}}) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""
    for number in (signal.SIGTERM, signal.SIGKILL):
        words = [sys.executable, "-c", program, str(tmp_path / f"socket{number}")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as bench:
            assert bench.stdout is not None
            watch = os.pidfd_open(int(bench.stdout.readline()))
            bench.send_signal(number)
            bench.wait()
            assert select.select([watch], [], [], 10)[0], f"the server outlives signal {number}"
            os.close(watch)


def test_server_and_client_get_a_cpu_each(tmp_path: Path) -> None:
    """Within the block the server may run on the last CPU only; afterwards on those from before."""
    cpus = os.sched_getaffinity(0)
    with started("", tmp_path / "socket", [sys.executable, "-c", "import time; time.sleep(600)"], {}) as server:
        with cpu_each([server]) as before:
            assert os.sched_getaffinity(server.pid) == {max(cpus)}
            client = [*before, sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
            assert subprocess.run(client, capture_output=True, text=True, check=True).stdout.strip() == str({min(cpus)})
        assert os.sched_getaffinity(server.pid) == cpus
