"""The form every benchmark reports in: rows, their medians and ratios, a table, JSON, a last line and an exit status.

A row compares one figure of ours with the same figure of a peer, or of nobody. The ratio of the medians is turned so that
above 1 ours is better, whatever the unit. A row may demand something: ``least`` a ratio, ``most`` an upper limit of our own
figure. The benchmark is short by the number of rows that do not get what they demand.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_Entrant = TypeVar("_Entrant")

MIN_ROUNDS = 5
"""A demand on a ratio is not met by fewer measurements of each side."""

HEADINGS = ("case", "unit", "ours", "peer", "ratio", "least", "rounds", "spread", "")


def in_turn(entrants: Sequence[_Entrant], number: int) -> list[_Entrant]:
    """Who is measured when in round ``number``: every second round goes the other way about, and then another one begins.
    Whoever always came after the same one would be measured on the machine that one leaves behind."""
    first = number // 2 % len(entrants)
    order = [*entrants[first:], *entrants[:first]]
    return order[::-1] if number % 2 else order


@dataclass(frozen=True)
class Row:
    """One figure. ``ours`` and ``peer`` hold one value per round, in the order measured; no peer is an empty ``peer``."""

    case: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    less_is_better: bool = False
    least: float | None = None
    most: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ours:
            raise ValueError(f"{self.case}: nothing was measured")
        if self.least is not None and not self.peer:
            raise ValueError(f"{self.case}: a ratio is demanded and there is no peer")

    @property
    def rounds(self) -> int:
        """How many measurements there are of the side that has fewer."""
        return min(len(self.ours), len(self.peer)) if self.peer else len(self.ours)

    @property
    def our_median(self) -> float:
        return statistics.median(self.ours)

    @property
    def peer_median(self) -> float | None:
        return statistics.median(self.peer) if self.peer else None

    @property
    def ratio(self) -> float | None:
        """Of the medians; None without a peer, or where it would be a division by zero."""
        peer = self.peer_median
        return None if peer is None else self._ratio(self.our_median, peer)

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and the greatest ratio within one round: how far to trust the ratio."""
        ratios = [self._ratio(ours, peer) for ours, peer in zip(self.ours, self.peer, strict=False)]
        known = [ratio for ratio in ratios if ratio is not None]
        return (min(known), max(known)) if known else None

    @property
    def short(self) -> str | None:
        """Why the row does not get what it demands; None if it does."""
        if self.least is not None:
            if self.rounds < MIN_ROUNDS:
                return f"only {self.rounds} rounds"
            if self.ratio is None or self.ratio < self.least:
                return f"ratio below {self.least:g}"
        if self.most is not None and self.our_median > self.most:
            return f"more than {self.most:g} {self.unit}"
        return None

    def _ratio(self, ours: float, peer: float) -> float | None:
        above, below = (peer, ours) if self.less_is_better else (ours, peer)
        return above / below if below else None

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "unit": self.unit,
            "ours": self.our_median,
            "peer": self.peer_median,
            "ratio": self.ratio,
            "least": self.least,
            "most": self.most,
            "rounds": self.rounds,
            "less_is_better": self.less_is_better,
            "short": self.short,
            "notes": list(self.notes),
            "our_rounds": list(self.ours),
            "peer_rounds": list(self.peer),
        }

    def cells(self) -> tuple[str, ...]:
        """What the table shows, under ``HEADINGS``."""
        least = number_text(self.least) if self.most is None else f"at most {number_text(self.most)}"
        spread = "" if self.spread is None else f"{self.spread[0]:.2f}-{self.spread[1]:.2f}"
        remarks = self.notes if self.short is None else (f"SHORT: {self.short}", *self.notes)
        return (
            self.case,
            self.unit,
            number_text(self.our_median),
            number_text(self.peer_median),
            "" if self.ratio is None else f"{self.ratio:.3f}",
            least,
            str(self.rounds),
            spread,
            "; ".join(remarks),
        )


@dataclass(frozen=True)
class Report:
    """A benchmark's result. ``facts`` are short sentences about it, by topic: machine, kernel, how the peer was run."""

    name: str
    machine: str
    kernel: str
    versions: Mapping[str, str]
    rows: Sequence[Row]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def short(self) -> list[Row]:
        return [row for row in self.rows if row.short is not None]

    @property
    def last_line(self) -> str:
        return f"{self.name}: short {len(self.short)}" if self.short else f"{self.name}: ok"

    @property
    def exit_status(self) -> int:
        return 1 if self.short else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "ok": not self.short,
            "machine": self.machine,
            "kernel": self.kernel,
            "versions": dict(self.versions),
            "facts": dict(self.facts),
            "rows": [row.as_json() for row in self.rows],
        }

    def _preamble(self) -> list[tuple[str, str]]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [("machine", self.machine), ("kernel", self.kernel), ("versions", versions), *self.facts.items()]

    def text(self) -> str:
        """For a terminal, with the last line."""
        width = max(len(topic) for topic, _ in self._preamble())
        lines = [f"{topic:<{width}}  {sentence}" for topic, sentence in self._preamble()]
        return "\n".join([*lines, "", *_aligned([HEADINGS, *(row.cells() for row in self.rows)]), "", self.last_line])

    def markdown(self) -> str:
        """The same as a page."""
        cells = [HEADINGS, tuple("---" for _ in HEADINGS), *(row.cells() for row in self.rows)]
        table = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
        facts = [f"* {topic}: {sentence}" for topic, sentence in self._preamble()]
        return "\n".join([f"# {self.name}", "", *facts, "", *table, "", f"`{self.last_line}`", ""])

    def write(self, folder: Path) -> None:
        """``NAME.json`` and ``NAME.md`` in a folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(self.markdown())


def best_peer(peers: Mapping[str, Sequence[float]], less_is_better: bool = False) -> tuple[str, Sequence[float]]:
    """Of several ways to run a peer, the name and the rounds of the one with the best median."""

    def median(name: str) -> float:
        return statistics.median(peers[name])

    name = min(peers, key=median) if less_is_better else max(peers, key=median)
    return name, peers[name]


def number_text(value: float | None) -> str:
    """A figure as people read it; nothing for None."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Text to the left in the first two columns and the last, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", "<", *[">"] * (len(widths) - 3), "<"]
    forms = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    return ["  ".join(form.format(cell) for form, cell in zip(forms, row, strict=True)).rstrip() for row in rows]
