"""docs/backends/python.md: what it shows works."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vduse_blk.testing.backend import check_backend

PAGE = Path(__file__).resolve().parents[2] / "docs/backends/python.md"


def test_the_example_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the page, as it stands there, passes the conformance kit."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    example = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)  # dataclasses look there
    exec(compile(code, str(PAGE), "exec"), example.__dict__)
    check_backend(lambda: example.Scratch(example.Scratch.Options(size=1 << 20)))
