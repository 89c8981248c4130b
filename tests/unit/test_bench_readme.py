"""What ``bench/readme`` makes of recorded results, and that the pages hold nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.report import Report, Row


def recorded(folder: Path, name: str) -> dict[str, Any]:
    """A result as a benchmark writes it: one demand met, one not, an upper limit, and what is only shown."""
    rows = [
        Row("fast", "IOPS", [200.0] * 5, [100.0] * 5, least=1.5),
        Row("slow", "IOPS", [100.0] * 5, [200.0] * 5, least=1.0),
        Row("idle", "ms", [0.5], [9.0], less_is_better=True, most=1.0),
        Row("detail", "us", [12345.0], [6.0]),
        Row("slow, against other 2", "IOPS", [100.0] * 5, [50.0] * 5, notes=("peer: other 2",)),
        Row("fast, against other 2", "IOPS", [200.0] * 5, [180.0] * 5, notes=("peer: other 2",)),
        Row("fast, against a limit", "IOPS", [200.0] * 5, [400.0] * 5),
        Row("detail, against other 2", "us", [12345.0], [6.0], notes=("peer: other 2",)),
        Row("block size: 4 KiB randread QD8", "MiB/s", [777.0], [6.0]),
        Row("disks: unshared memory of each", "MiB", [13.0]),
    ]
    Report(name, "a machine", "6.12", {"peer": "7.2"}, rows).write(folder)
    found = readme.load(folder)[name]
    assert found is not None
    return dict(found)


def test_the_pages_say_what_was_recorded() -> None:
    """README.md and docs/benchmarks.md are, to the letter, what bench/readme makes of bench/results."""
    for path, text in readme.pages(readme.load(readme.RESULTS)).items():
        assert path.read_text() == text, f"{path.name}: run bench/readme"


def test_the_pictures_of_the_pages_exist() -> None:
    """Every picture the pages show is one bench/readme makes of the recorded results, and lies in docs/images."""
    results = readme.load(readme.RESULTS)
    made = set(readme.pictures(results))
    assert made == {path.name for path in readme.IMAGES.glob("*.svg")}
    said = readme.readme_part(results) + readme.page_part(results)
    assert made == {word.split(")")[0] for word in said.split("images/")[1:]}


def test_a_demand_is_shown_with_its_mark(tmp_path: Path) -> None:
    """Met, not met and why, and an upper limit. What demands nothing is in the README only beside what does."""
    text = readme.readme_part({"compare": None, "bench": recorded(tmp_path, "bench")})
    assert "| fast | IOPS | 200.0 | 100.0 | 2.00 | 1.5 | ✓ |" in text
    assert "| slow | IOPS | 100.0 | 200.0 | 0.50 | 1 | ✗ ratio below 1 |" in text
    assert "| idle | ms | 0.5 | 9 | 18.00 | at most 1 ms | ✓ |" in text
    assert "12345" not in text
    assert "Measured on a machine, kernel 6.12, with peer 7.2. 2 of 3 demands met. Against other 2 1 of 2 would be." in text
    fast, beside, limit = (
        "| fast | ",
        "| fast, against other 2 | IOPS | 200.0 | 180.0 | 1.11 |  |  |",
        "| fast, against a limit |",
    )
    assert text.index(fast) < text.index(beside) < text.index(limit) < text.index("| slow |")


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    """A missing file is a sentence, not an error and not silence."""
    results = readme.load(tmp_path)
    assert "No run of `make compare` is recorded." in readme.readme_part(results)
    assert "No run of `make bench` is recorded." in readme.readme_part(results)
    assert readme.page_part(results) == "No run of `make bench` is recorded."
    assert readme.pictures(results) == {}


def test_what_is_shown_beside_stands_in_the_documentation(tmp_path: Path) -> None:
    """With a peer or without one."""
    text = readme.page_part({"compare": None, "bench": recorded(tmp_path, "bench")})
    assert "| block size: 4 KiB randread QD8 | MiB/s | 777.0 | 6 | 129.50 |  |" in text
    assert "| disks: unshared memory of each | MiB | 13 |  |  |  |" in text
    assert "detail" not in text


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    """No date and no random names: a picture changes when a figure does."""
    results = {"compare": recorded(tmp_path, "compare"), "bench": recorded(tmp_path, "bench")}
    first = readme.pictures(results)
    assert set(first) == {"compare.svg", "bench.svg", "bench-sizes.svg"}
    assert readme.pictures(results) == first
    results["bench"]["rows"][0]["ratio"] = 3.0
    assert readme.pictures(results)["bench.svg"] != first["bench.svg"]


def test_only_what_is_between_the_marks_is_replaced() -> None:
    """And a page without them is refused instead of spoilt."""
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.put(page, "new") == page.replace("old", "new")
    for spoilt in ("", readme.BEGIN, f"{readme.END}{readme.BEGIN}", page * 2):
        with pytest.raises(ValueError, match="a page needs"):
            readme.put(spoilt, "new")
