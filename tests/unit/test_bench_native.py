"""What ``make bench`` makes of measurements: rows that demand what they say."""

from __future__ import annotations

from bench.native import CASES, HOLES, LIMIT_LEAST, Case, rows_of

RUN = {"iops": 300.0, "mib_s": 9.0, "p50_us": 2.0, "p99_us": 4.0, "server_cpu_us_per_io": 1.0}


def slower(by: float) -> dict[str, float]:
    return {key: value / by if key in ("iops", "mib_s") else value * by for key, value in RUN.items()}


def test_what_a_case_demands() -> None:
    """The throughput's ratio and the CPU's; rows without a demand are never short."""
    case = Case("a case", HOLES, (), least=2.0, cpu_least=2.0)
    rows = {row.case: row for row in rows_of(case, [RUN] * 5, [slower(3.0)] * 5, "aio=x", [])}
    assert {row.ratio for row in rows.values()} == {3.0}
    assert not [row for row in rows.values() if row.short]
    rows = {row.case: row for row in rows_of(case, [RUN] * 5, [slower(1.5)] * 5, "aio=x", [])}
    assert {name for name, row in rows.items() if row.short} == {
        "file of holes: a case",
        "file of holes: a case: CPU of the server per I/O",
    }


def test_the_limit_is_a_row_of_its_own() -> None:
    """Against fio straight on the file a little may be lost, and no more."""
    case = Case("a case", HOLES, ())
    for limit, short in ((300.0, False), (300.0 / (LIMIT_LEAST - 0.01), True)):
        (row,) = (row for row in rows_of(case, [RUN] * 5, [RUN] * 5, "", [limit] * 5) if "fio" in row.case)
        assert bool(row.short) == short


def test_too_few_rounds_show_nothing() -> None:
    """Four turns are no proof."""
    case = Case("a case", HOLES, (), least=1.0)
    assert next(iter(rows_of(case, [RUN] * 4, [slower(9.0)] * 4, "", []))).short


def test_cases_can_be_told_apart() -> None:
    """No two of a place share a name."""
    assert len({(case.place, case.name) for case in CASES}) == len(CASES)
