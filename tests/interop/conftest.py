"""What a failed test says besides: the server's log."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    log = Path(getattr(item, "funcargs", {}).get("tmp_path", "/nowhere"), "log")
    if report.failed and log.exists():
        report.sections.append(("the server's log", log.read_text(errors="replace")))
    return report
