"""``bench/readme``: what the last recorded runs say, written into README.md, docs/benchmarks.md and docs/images/.

All of it is made of bench/results/*.json: a figure that no run printed cannot get into these pages: a test sees to it.
`make bench` and `make compare` end with this after a whole run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import number_text

TOP = Path(__file__).resolve().parent.parent
RESULTS = TOP / "bench/results"
IMAGES = TOP / "docs/images"
BEGIN, END = "<!-- begin of what bench/readme writes -->", "<!-- end of what bench/readme writes -->"
CURVES = (
    ("block size: ", "Random reads at queue depth 8", "sizes"),
    ("scaling: ", "More queues, 32 in flight on each", "queues"),
)
"""Rows that make a picture of two lines: how their cases begin, its title, its name."""


@dataclass(frozen=True)
class Benchmark:
    """One that records a result. ``title`` heads its part of the page."""

    name: str
    title: str


BENCHMARKS = (
    Benchmark("compare", "As a disk of the host (VDUSE), in a virtual machine"),
    Benchmark("bench", "As a disk of virtual machines (vhost-user), natively"),
)

Result = Mapping[str, Any]
RowOf = Mapping[str, Any]


def load(folder: Path) -> dict[str, Result | None]:
    """The recorded results by name; None for what was not recorded."""
    found: dict[str, Result | None] = {}
    for benchmark in BENCHMARKS:
        path = folder / f"{benchmark.name}.json"
        found[benchmark.name] = json.loads(path.read_text()) if path.exists() else None
    return found


def is_demanded(row: RowOf) -> bool:
    return row["least"] is not None or row["most"] is not None


def against(other: str) -> str:
    """How the name of a row goes on that compares another peer than the one that a demand is about."""
    return f", against {other}"


def shown(rows: Sequence[RowOf]) -> list[RowOf]:
    """What is demanded, and behind each such row the same against others."""
    found = []
    for row in rows:
        if is_demanded(row):
            found += [row, *(other for other in rows if is_beside(other, row))]
    return found


def is_beside(other: RowOf, row: RowOf) -> bool:
    return not is_demanded(other) and other["case"].startswith(row["case"] + against(""))


def met_against_others(rows: Sequence[RowOf]) -> list[str]:
    """A sentence for each other peer: how many demands would be met if they were about that."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        for other in rows:
            if row["least"] is not None and is_beside(other, row) and "peer: " in str(other["notes"]):
                name = other["case"].removeprefix(row["case"] + against(""))
                found.setdefault(name, []).append(other["ratio"] >= row["least"])
    return [f"Against {name} {sum(met)} of {len(met)} would be." for name, met in found.items()]


def demand_of(row: RowOf) -> str:
    if not is_demanded(row):
        return ""
    return f"at most {number_text(row['most'])} {row['unit']}" if row["most"] is not None else f"{row['least']:g}"


def provenance(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Measured on {result['machine']}, kernel {result['kernel']}, with {versions}."


def table(rows: Sequence[RowOf]) -> list[str]:
    lines = ["| case | unit | ours | peer | ratio | demanded | |", "|---|---|--:|--:|--:|--:|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        mark = "" if not is_demanded(row) else "✓" if row["short"] is None else f"✗ {row['short']}"
        cells = (row["case"], row["unit"], number_text(row["ours"]), number_text(row["peer"]), ratio, demand_of(row), mark)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def readme_part(results: Mapping[str, Result | None]) -> str:
    """README.md's part: what was demanded, whether it was reached, and the same against somebody else."""
    lines: list[str] = []
    for benchmark in BENCHMARKS:
        result = results[benchmark.name]
        lines += [f"### {benchmark.title}", ""]
        if result is None:
            lines += [f"No run of `make {benchmark.name}` is recorded.", ""]
            continue
        rows = [row for row in result["rows"] if is_demanded(row)]
        met = sum(row["short"] is None for row in rows)
        said = [provenance(result), f"{met} of {len(rows)} demands met.", *met_against_others(result["rows"])]
        lines += [" ".join(said), ""]
        lines += [
            f"![ratio of each demanded row](docs/images/{benchmark.name}.svg)",
            "",
            *table(shown(result["rows"])),
            "",
        ]
    return "\n".join(lines).strip()


def page_part(results: Mapping[str, Result | None]) -> str:
    """docs/benchmarks.md's part: what is shown and not demanded, of the native run."""
    result = results["bench"]
    if result is None:
        return "No run of `make bench` is recorded."
    shown = ("scaling", "block size", "in-flight log", "disks")
    rows = [row for row in result["rows"] if row["case"].startswith(shown)]
    lines = [provenance(result), "", "| case | unit | ours | peer | ratio | |", "|---|---|--:|--:|--:|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = (
            row["case"],
            row["unit"],
            number_text(row["ours"]),
            number_text(row["peer"]),
            ratio,
            "; ".join(row["notes"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    pictures = [f"![{title}](images/bench-{name}.svg)" for start, title, name in CURVES if curve(result, start)]
    return "\n".join([*lines, "", *pictures]).strip()


def curve(result: Result, start: str) -> list[RowOf]:
    return [row for row in result["rows"] if row["case"].startswith(start) and row["peer"] is not None]


def pictures(results: Mapping[str, Result | None]) -> dict[str, str]:
    """SVG by file name. The same results give the same text."""
    import matplotlib

    matplotlib.use("svg")
    with matplotlib.rc_context({"svg.hashsalt": "vduse-blk", "svg.fonttype": "none", "font.size": 9}):
        found = {}
        for name, result in results.items():
            if result is None:
                continue
            rows = [row for row in result["rows"] if row["least"] is not None and row["ratio"] is not None]
            if rows:
                found[f"{name}.svg"] = bars(rows)
        result = results["bench"]
        for start, title, name in CURVES if result is not None else ():
            rows = curve(result, start) if result is not None else []
            if rows:
                found[f"bench-{name}.svg"] = lines(rows, title, start)
    return found


def svg_of(figure: Any) -> str:
    from io import StringIO

    from matplotlib import pyplot

    text = StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def bars(rows: Sequence[RowOf]) -> str:
    """A bar for each ratio, with a mark where the demand lies."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.32 * len(rows)))
    ratios = [row["ratio"] for row in rows]
    places = range(len(rows))
    axes.barh(places, ratios, color=["#3b7a57" if row["short"] is None else "#b5482f" for row in rows], height=0.6)
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["least"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axes.text(max(row["ratio"], row["least"]), place, f"  {row['ratio']:.2f}", va="center")
    axes.set_yticks(list(places), [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(*ratios, *(row["least"] for row in rows)))
    axes.set_xlabel("ratio, above 1 ours is better; black: what is demanded")
    axes.spines[["top", "right"]].set_visible(False)
    return svg_of(figure)


def lines(rows: Sequence[RowOf], title: str, start: str) -> str:
    """Ours and the peer's over the cases."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3))
    names = [re.sub(r" randread.*|4k randread QD32 on each of ", "", row["case"].removeprefix(start)) for row in rows]
    for key, label, colour in (("ours", "vduse-blk", "#3b7a57"), ("peer", "qemu-storage-daemon", "#777777")):
        axes.plot(names, [row[key] for row in rows], marker="o", label=label, color=colour)
    axes.set_title(title)
    axes.set_ylabel(rows[0]["unit"])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return svg_of(figure)


def put(page: str, part: str) -> str:
    """The page with ``part`` between its two marks. Raises ValueError if it has not exactly one pair."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise ValueError(f"a page needs one line {BEGIN} and after it one line {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"


def pages(results: Mapping[str, Result | None]) -> dict[Path, str]:
    """What the two pages must contain."""
    parts = {TOP / "README.md": readme_part(results), TOP / "docs/benchmarks.md": page_part(results)}
    return {path: put(path.read_text(), part) for path, part in parts.items()}


def main() -> int:
    results = load(RESULTS)
    for path, text in pages(results).items():
        path.write_text(text)
    IMAGES.mkdir(parents=True, exist_ok=True)
    made = pictures(results)
    for old in IMAGES.glob("*.svg"):
        if old.name.split(".")[0].split("-")[0] in results and old.name not in made:
            old.unlink()
    for name, text in made.items():
        (IMAGES / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
