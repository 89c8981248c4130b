"""The file of in-flight logs: what is made can be opened, what is not ours is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vduse_blk.queue import InflightLog, inflight_log_bytes


def test_the_file_is_checked(tmp_path: Path) -> None:
    """What create made, open takes; what is damaged, foreign or open to others is refused with a sentence."""
    path = tmp_path / "inflight"
    log = InflightLog.create(path, 2, 64)
    assert log.address(0, 64) % 64 == 0
    assert log.address(1, 64) - log.address(0, 64) >= inflight_log_bytes(64)
    assert log.address(2, 64) == log.address(0, 128) == 0
    log.close()
    InflightLog.open(path).close()
    good = path.read_bytes()
    for damaged in (b"", good[:20], good[:-1], good + b"\0", b"x" + good[1:], good[:12] + b"\xff" + good[13:]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="inflight"):
            InflightLog.open(path)
    path.write_bytes(good)
    path.chmod(0o644)
    with pytest.raises(OSError, match="private"):
        InflightLog.open(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        InflightLog.open(link)
