"""A small share of ``make torture-native``, and the proof that it can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def torture(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.torture.native", *map(str, words)]
    return subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=100, check=False)


def test_killed_at_random_instants() -> None:
    """Every acknowledged write is there, every request is answered once, over 80 deaths at instants that differ from run to
    run; some of them after requests had overtaken each other. The seed of a failure is in its output."""
    done = torture("--kills", 80)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "torture: ok"


def test_without_the_log_the_torture_fails() -> None:
    """The same servers, with the log of what is in flight withheld from each successor: the torture notices."""
    done = torture("--kills", 200, "--server", "forgetful")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("torture: failed")
