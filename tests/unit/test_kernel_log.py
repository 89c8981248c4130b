"""A kernel log with trouble fails a run in the virtual machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/kernel-log"
CLEAN = """[ 1.0] WARNING: the boot's own
[ 2.0] vduse-blk: tests begin
[ 3.0] vduse-blk: test kernel::one
[ 4.0] vda: detected
"""


def check(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    log = tmp_path / "dmesg"
    log.write_text(text)
    return subprocess.run([sys.executable, TOOL, log], capture_output=True, text=True, check=False)


def test_a_clean_log_passes_in_silence(tmp_path: Path) -> None:
    """What the boot said before the tests does not count."""
    done = check(tmp_path, CLEAN)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: CPU: 0 PID: 12 at drivers/vdpa/vduse/vduse_dev.c:1 vduse_x+0x1/0x2",
        "BUG: kernel NULL pointer dereference, address: 0000000000000010",
        "Oops: 0002 [#1] PREEMPT SMP",
        "INFO: task fio:77 blocked for more than 120 seconds.",
        "virtio_blk virtio8: requests:id 5 is not a head!",
        "virtio_blk virtio8: requests:id 999 out of range",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks: stall",
        "watchdog: BUG: soft lockup - CPU#1 stuck for 22s!",
        "WARNING: possible circular locking dependency detected",
        "refcount_t: underflow; use-after-free.",
    ],
)
def test_trouble_fails_and_names_the_test(tmp_path: Path, line: str) -> None:
    """Each kind of trouble is found, and said with the test during which it came."""
    done = check(tmp_path, f"{CLEAN}[ 5.0] {line}\n")
    assert done.returncode == 1
    assert f"kernel::one: [ 5.0] {line}" in done.stdout


def test_a_log_without_the_mark_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    """A log that overflowed hides nothing, nor does one that is missing."""
    assert check(tmp_path, "[ 1.0] WARNING: at fs/x.c:1\n").returncode == 1
    assert subprocess.run([sys.executable, TOOL, tmp_path / "none"], check=False, capture_output=True).returncode == 1
