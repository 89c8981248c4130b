"""What a failed test says besides: the logs of its servers."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))
from servers import Server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    used = item.funcargs.values()
    logs = [server.log for server in used if isinstance(server, Server)]
    logs += [folder / "log" for folder in used if isinstance(folder, Path)]
    for log in logs if report.failed else ():
        if log.exists():
            report.sections.append((f"log in {log.parent.name}", log.read_text(errors="replace")))
    return report
