"""The form of benchmark results: what a ratio is, when a row is short, what is printed and written, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import compare
from bench.host_load import Feed, Gauge, cpu_seconds
from bench.report import MIN_ROUNDS, Report, Row, best_peer, in_turn
from bench.servers import run

TOP = Path(__file__).resolve().parents[2]


def report(*rows: Row) -> Report:
    return Report("compare", "a machine", "6.12", {"peer": "7.2"}, rows, {"how": "so"})


def test_the_ratio_is_of_the_medians() -> None:
    """One wild round changes neither side's figure."""
    row = Row("read", "IOPS", [100, 110, 9000, 105, 108], [50, 54, 55, 1, 60], least=1.0)
    assert (row.our_median, row.peer_median, row.ratio) == (108, 54, 2.0)
    assert row.spread == (108 / 60, 9000 / 55)
    assert row.short is None


def test_above_one_is_better_for_costs_too() -> None:
    """CPU time of 2 against 5 is a ratio of 2.5."""
    row = Row("cpu", "us", [2.0], [5.0], less_is_better=True)
    assert row.ratio == 2.5


@pytest.mark.parametrize(("ours", "short"), [(100.0, False), (99.9, True), (101.0, False)])
def test_a_row_is_short_below_its_least_ratio(ours: float, short: bool) -> None:
    """The limit itself is enough; a ratio that only rounds to it is not."""
    row = Row("read", "IOPS", [ours] * MIN_ROUNDS, [100.0] * MIN_ROUNDS, least=1.0)
    assert (row.short is not None) == short


def test_too_few_rounds_of_either_side_are_short() -> None:
    """A demand is not met by luck of four."""
    enough, few = [2.0] * MIN_ROUNDS, [1.0] * (MIN_ROUNDS - 1)
    assert Row("read", "IOPS", enough, few, least=1.0).short == "only 4 rounds"
    assert Row("read", "IOPS", enough, few).short is None


def test_an_upper_limit_of_our_own_figure() -> None:
    """An idle server is judged by what it uses, not by what the peer does."""
    assert Row("idle", "ms", [0.0], [0.0], less_is_better=True, most=1.0).short is None
    assert Row("idle", "ms", [0.0], [0.0], less_is_better=True, most=1.0).ratio is None
    assert Row("idle", "ms", [1.5], [90.0], less_is_better=True, most=1.0).short == "more than 1 ms"


def test_a_row_that_cannot_be_judged_is_refused() -> None:
    """Nothing measured, or a ratio demanded without a peer, is a mistake of the benchmark and no result."""
    with pytest.raises(ValueError, match="nothing was measured"):
        Row("read", "IOPS", [])
    with pytest.raises(ValueError, match="no peer"):
        Row("read", "IOPS", [1.0], least=1.0)


def test_the_end_says_how_many_rows_are_short() -> None:
    """The last line and the exit status."""
    good = Row("good", "IOPS", [2.0] * 5, [1.0] * 5, least=1.0)
    bad = Row("bad", "IOPS", [1.0] * 5, [2.0] * 5, least=1.0)
    facts = Row("fact", "us", [9.0], [1.0], less_is_better=True)
    assert (report(good, facts).last_line, report(good, facts).exit_status) == ("compare: ok", 0)
    assert (report(bad, good, bad).last_line, report(bad, good, bad).exit_status) == ("compare: short 2", 1)
    assert report(bad).text().splitlines()[-1] == "compare: short 1"


def test_the_table_shows_every_row_and_why_it_is_short() -> None:
    """Figures, ratio to three places, the demand and the reason."""
    lines = report(Row("read", "IOPS", [999.0] * 5, [1000.0] * 5, least=1.0, notes=("peer: fast",))).text().splitlines()
    (line,) = [line for line in lines if line.startswith("read")]
    assert line.split()[:7] == ["read", "IOPS", "999.0", "1000", "0.999", "1", "5"]
    assert line.endswith("SHORT: ratio below 1; peer: fast")


def test_the_files_hold_the_same(tmp_path: Path) -> None:
    """JSON for programs with each round in it, Markdown for people."""
    made = report(Row("a|b", "IOPS", [3.0, 1.0, 2.0, 2.0, 2.0], [1.0] * 5, least=1.0))
    made.write(tmp_path / "results")
    found = json.loads((tmp_path / "results/compare.json").read_text())
    row = found["rows"][0]
    assert (found["ok"], found["machine"], found["kernel"]) == (True, "a machine", "6.12")
    assert found["versions"] == {"peer": "7.2"}
    keys = ("case", "unit", "ours", "peer", "ratio", "least", "rounds")
    assert tuple(row[key] for key in keys) == ("a|b", "IOPS", 2.0, 1.0, 2.0, 1.0, 5)
    assert row["our_rounds"] == [3.0, 1.0, 2.0, 2.0, 2.0]
    page = (tmp_path / "results/compare.md").read_text()
    assert "a\\|b" in page
    assert page.endswith("`compare: ok`\n")


def test_the_peer_is_taken_at_its_best() -> None:
    """Of several ways to run it, the one with the best median counts."""
    ways = {"threads": [5.0, 1.0, 1.0], "io_uring": [2.0, 2.0, 2.0]}
    assert best_peer(ways)[0] == "io_uring"
    assert best_peer(ways, less_is_better=True)[0] == "threads"


def measured(ours: float, idle: float = 0.0) -> dict[str, object]:
    """What bench/guest.py leaves, of one case at one place with two ways of the peer."""
    case = "randread 4k QD32"
    speed = {"ours": ours, "peer1": 100.0, "peer2": 120.0}
    same = {"server_cpu_us_per_io": 10.0, "p99_us": 50.0, "tries": 2, "disturbed": 0.1}
    runs = [{"case": case, "server": server, "iops": iops, **same} for number in range(5) for server, iops in speed.items()]
    cost = {"command": ["server"], "resident_kib": 2048, "unshared_kib": 1024}
    servers = {server: {"way": f"way of {server}", **cost} for server in speed}
    idle_ms = {"ours": [idle, idle, 90.0], "peer1": [5.0, 5.0, 5.0], "peer2": [0.0, 0.0, 9.0]}
    return {
        "machine": "m",
        "kernel": "k",
        "qsd": "7.2",
        "ceilings": {case: {"unit": "iops", "client": [1000.0], "kernel": [140.0]}},
        "places": [{"place": "tmpfs", "servers": servers, "runs": runs, "idle_ms": idle_ms}],
    }


def test_compare_demands_the_peers_best_and_an_idle_server() -> None:
    """Faster than one way of the peer and slower than another is short; so is CPU time of an idle disk."""
    assert compare.report_of(measured(121.0), {}).last_line == "compare: ok"
    assert compare.report_of(measured(110.0), {}).last_line == "compare: short 1"
    assert compare.report_of(measured(110.0, idle=50.0), {}).last_line == "compare: short 2"


def test_compare_says_what_limits_a_figure() -> None:
    """Near what the client reaches alone, or what the kernel lets through, the servers are not what is compared."""
    client = {"client": [100.0], "kernel": [90.0]}
    assert list(compare.limits(client, [50.0], [81.0])) == ["the client is the limit"]
    assert list(compare.limits(client, [50.0], [73.0])) == ["virtio and VDUSE in the kernel are the limit"]
    assert list(compare.limits(client, [50.0], [20.0])) == []


@pytest.fixture(scope="module")
def blkgen() -> Iterator[Path]:
    """The load generator, in a directory of the checkout: a /tmp in memory may not do direct I/O."""
    (TOP / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOP / "build") as folder:
        compare.build_blkgen(Path(folder, "blkgen"))
        yield Path(folder, "blkgen")


@pytest.mark.parametrize(
    ("direction", "pattern", "size", "depth"), [("read", "random", 4096, 32), ("write", "sequential", 1 << 20, 8)]
)
def test_the_client_counts_what_it_did(blkgen: Path, direction: str, pattern: str, size: int, depth: int) -> None:
    """Requests, rate and times agree with each other, and writes arrive everywhere."""
    image = blkgen.parent / "image"
    image.write_bytes(bytes(16 << 20))
    found = json.loads(run(blkgen, image, direction, pattern, size, depth, 0.3))
    assert found["ios"] >= depth
    assert found["iops"] == pytest.approx(found["ios"] / found["seconds"], rel=1e-3)
    assert found["mib_s"] == pytest.approx(found["iops"] * size / 2**20, rel=1e-2)
    # By Little's law the mean time of a request is depth over rate; draining at the end makes it a little less.
    assert found["mean_us"] == pytest.approx(depth / found["iops"] * 1e6, rel=0.3)
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["max_us"] * 1.04
    if direction == "write" and found["ios"] > 16:
        assert 0 not in image.read_bytes()


def test_the_client_fails_on_what_is_no_disk(blkgen: Path) -> None:
    """No figure without I/O."""
    with pytest.raises(RuntimeError, match="blkgen"):
        run(blkgen, "/dev/full", "read", "random", 4096, 1, 0.1)
    with pytest.raises(RuntimeError, match="usage"):
        run(blkgen, "/dev/null", "read", "backwards", 4096, 1, 0.1)


def test_others_load_reaches_the_guest(tmp_path: Path) -> None:
    """What a process outside the benchmark's own uses is seen through the file; what its own uses is not."""
    all_but_sleep, all_but_spin = Gauge(tmp_path / "sleep"), Gauge(tmp_path / "spin")
    assert all_but_sleep.share(all_but_sleep.look()) == 0.0
    spin = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(["sleep", "60"]) as sleep, subprocess.Popen(spin) as spinner:
        try:
            with Feed(tmp_path / "sleep", sleep.pid), Feed(tmp_path / "spin", spinner.pid):
                time.sleep(0.5)
                looks, used = (all_but_sleep.look(), all_but_spin.look()), cpu_seconds(spinner.pid)
                time.sleep(2.0)
                seen = all_but_sleep.share(looks[0]) - all_but_spin.share(looks[1])
                used = cpu_seconds(spinner.pid) - used
        finally:
            sleep.kill()
            spinner.kill()
    assert used > 0
    assert seen == pytest.approx(used / 2.0 / (os.cpu_count() or 1), rel=0.35)
    assert not (tmp_path / "spin").exists()


def test_everybody_takes_every_turn() -> None:
    """Of two each begins as often; of five everybody begins twice in ten rounds and ends twice, and who comes right after
    whom is turned about in every second round."""
    assert [in_turn("ab", number) for number in range(4)] == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]
    orders = [in_turn("abcde", number) for number in range(10)]
    assert all(sorted(order) == list("abcde") for order in orders)
    assert sorted(order[0] for order in orders) == sorted(order[-1] for order in orders) == sorted("abcde" * 2)
    assert all(orders[number + 1] == orders[number][::-1] for number in range(0, 10, 2))
