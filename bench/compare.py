"""``make compare``: our native path against qemu-storage-daemon's vduse-blk export, in one boot of the virtual machine.

Builds the load generator, runs bench/guest.py where VDUSE is, turns its figures into a report (bench/report.py), prints it
and keeps it in bench/results/compare.json and .md. Ends with ``compare: ok`` and 0, ``compare: short N`` and 1 when N rows
do not get what they demand, or ``compare: failed`` and 3 when there is nothing to report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import readme
from bench.guest import CASES, DEVICE, DISTURBED, HOST_LOAD
from bench.host_load import Feed
from bench.report import Report, Row, best_peer
from vduse_blk import __version__

TOP = Path(__file__).resolve().parent.parent
BUILD = TOP / "build/bench"
RESULTS = TOP / "bench/results"
CPU_LEAST = {"randread 4k QD32": 1.67, "randwrite 4k QD32": 1.67}
"""How many times our CPU time per I/O the peer's must be."""
IDLE_MOST = 1.0
"""CPU milliseconds of ten idle seconds: less than one wake-up of the interpreter costs on an emulated machine."""
LIMIT_SHARE = 0.8
"""A figure above this share of what is possible without storage says more about the limit than about the servers."""
UNITS = {"iops": "IOPS", "mib_s": "MiB/s"}
CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wvla", "-Werror")


def build_blkgen(target: Path) -> None:
    """The load generator, over the core's own io_uring calls."""
    target.parent.mkdir(parents=True, exist_ok=True)
    core = TOP / "vduse_blk/core"
    subprocess.run(["gcc", *CFLAGS, f"-I{core}", TOP / "bench/blkgen.c", core / "uring.c", "-o", target], check=True)


def run_guest(result: Path, words: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Run the guest's part, show its output while it comes. Its exit status, and facts that only the host knows."""
    facts: dict[str, str] = {}
    result.unlink(missing_ok=True)
    command = [str(TOP / "tools/vm"), ".venv/bin/python", "-m", "bench.guest", str(result), *words]
    feed: Feed | None = None
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True, bufsize=1))
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("vm: "):
                facts["virtual machine"] = line.removeprefix("vm: ").strip()
            # The guest speaks: all processes of its machine are there.
            elif line.startswith("compare: ") and feed is None and os.environ.get("HOST") != "1":
                feed = stack.enter_context(Feed(HOST_LOAD, os.getpid()))
    return process.returncode, facts


def values(runs: Sequence[Mapping[str, Any]], server: str, case: str, key: str) -> list[float]:
    """One figure of one server and case, by round."""
    return [float(run[key]) for run in runs if run["server"] == server and run["case"] == case]


def limits(ceiling: Mapping[str, Any], ours: Sequence[float], peer: Sequence[float]) -> Iterator[str]:
    """What the faster of the two comes close to."""
    fastest = max(statistics.median(ours), statistics.median(peer))
    if fastest > LIMIT_SHARE * statistics.median(ceiling["client"]):
        yield "the client is the limit"
    elif fastest > LIMIT_SHARE * statistics.median(ceiling["kernel"]):
        yield "virtio and VDUSE in the kernel are the limit"


def rows_of(found: Mapping[str, Any]) -> Iterator[Row]:
    """All rows of the report: what is demanded first."""
    details: list[Row] = []
    for place in found["places"]:
        name, runs = place["place"], place["runs"]
        peers = [server for server in place["servers"] if server != "ours"]
        for case in dict.fromkeys(run["case"] for run in runs):
            ceiling = found["ceilings"][case]
            unit = ceiling["unit"]
            ours = values(runs, "ours", case, unit)
            best, peer = best_peer({server: values(runs, server, case, unit) for server in peers})
            way = place["servers"][best]["way"]
            title = f"{name} {case}"
            notes = (f"peer: {way}", *limits(ceiling, ours, peer))
            least = next(known.least for known in CASES if known.name == case) if name == DEVICE else 1.0
            yield Row(title, UNITS[unit], ours, peer, least=least, notes=notes)
            for key, what, detail_unit in (
                ("server_cpu_us_per_io", "CPU of the server per I/O", "us"),
                ("p99_us", "99 % of I/Os within", "us"),
            ):
                mine, theirs = (values(runs, server, case, key) for server in ("ours", best))
                demanded = CPU_LEAST.get(case) if name == DEVICE and key == "server_cpu_us_per_io" else None
                details.append(Row(f"{title}: {what}", detail_unit, mine, theirs, less_is_better=True, least=demanded))
        for key, what in (("resident_kib", "resident memory"), ("unshared_kib", "of it unshared")):
            memory = {server: place["servers"][server][key] / 1024 for server in place["servers"]}
            least = min(memory[server] for server in peers)
            details.append(Row(f"{name}: {what}", "MiB", [memory["ours"]], [least], less_is_better=True))
        idle = place["idle_ms"]
        best = min((idle[server] for server in peers), key=statistics.median)
        yield Row(f"{name}: CPU of 10 idle seconds", "ms", idle["ours"], best, less_is_better=True, most=IDLE_MOST)
    yield from details
    for case, ceiling in found["ceilings"].items():
        unit = UNITS[ceiling["unit"]]
        yield Row(f"no storage, {case}: the client alone", unit, ceiling["client"])
        yield Row(f"no storage, {case}: with virtio and VDUSE", unit, ceiling["kernel"])


def disturbance(found: Mapping[str, Any]) -> str:
    """A sentence on what else the host did."""
    runs = [run for place in found["places"] for run in place["runs"]]
    shares = [run["disturbed"] for run in runs]
    repeated = sum(run["tries"] - 1 for run in runs)
    above = sum(share > DISTURBED for share in shares)
    return (
        f"others used {100 * statistics.mean(shares):.0f} % of the host's CPU time; {repeated} runs were repeated for it, "
        f"and {above} of {len(runs)} stayed above {100 * DISTURBED:.0f} %"
    )


def report_of(found: Mapping[str, Any], facts: Mapping[str, str]) -> Report:
    """The report of what the guest measured."""
    commands = {}
    for place in found["places"]:
        name = place["place"]
        for server, what in place["servers"].items():
            way = "ours" if server == "ours" else what["way"]
            commands[f"{name}, {way}"] = " ".join(what["command"])
    return Report(
        name="compare",
        machine=found["machine"],
        kernel=found["kernel"],
        versions={"vduse-blk": __version__, "qemu-storage-daemon": found["qsd"]},
        rows=list(rows_of(found)),
        facts={**facts, "disturbance": disturbance(found), **commands},
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each server in each case (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.6, help="length of a turn (%(default)s)")
    parser.add_argument("--place", help="only images there: tmpfs, ext4")
    parser.add_argument("--case", help="only these cases: a name or a pattern, 'randread*'")
    arguments = parser.parse_args()
    words = ["--rounds", str(arguments.rounds), "--seconds", str(arguments.seconds)]
    for option in ("place", "case"):
        if getattr(arguments, option) is not None:
            words += [f"--{option}", getattr(arguments, option)]
    part = arguments.place is not None or arguments.case is not None

    build_blkgen(BUILD / "blkgen")
    measured = BUILD / "measured.json"
    status, facts = run_guest(measured, words)
    if not measured.exists():
        print("compare: failed")
        return 3
    report = report_of(json.loads(measured.read_text()), facts)
    # What was measured in part does not replace what was measured whole.
    report.write(BUILD if part else RESULTS)
    if not part:
        readme.main()
    print(report.text() if status == 0 else f"{report.text()}\ncompare: failed: see the kernel's log above")
    return report.exit_status if status == 0 else 3


if __name__ == "__main__":
    sys.exit(main())
