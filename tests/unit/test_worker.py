"""A real server whose export and storage fail on demand (fake_parts.py): how its disk ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vduse_blk import control
from vduse_blk.control import ControlError, Exit

HERE = Path(__file__).parent


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp") as directory:
        monkeypatch.setenv(control.RUN_ENV, directory)
        yield Path(directory)


class Server:
    """The server of disk "d". ``log`` is what it has written."""

    def __init__(self, folder: Path, env: dict[str, str], spec: dict[str, Any], prepare: Callable[[], object]) -> None:
        parts = folder / "fake_parts-1.dist-info"
        parts.mkdir()
        (parts / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-parts\nVersion: 1\n")
        (parts / "entry_points.txt").write_text(
            "[vduse_blk.exporters]\nfake = fake_parts:Export\n[vduse_blk.backends]\nfake = fake_parts:Storage\n"
        )
        paths = [str(folder), str(HERE), os.environ.get("PYTHONPATH", "")]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vduse_blk.worker"],
                stdin=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))} | env,
                preexec_fn=prepare,
            )
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(json.dumps({"name": "d", "source": "fake:?size=1M", "exports": ["fake"]} | spec).encode())

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until(self, phase: str) -> None:
        while control.disk_status("d").state != phase if control.disk_names() else True:
            assert self.process.poll() is None, self.log
            time.sleep(0.01)

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        with control.Client("d") as client:
            return client.call(op, **arguments)


Start = Callable[..., Server]


@pytest.fixture
def start(run_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the server with environment variables (capitals) and keys of its specification."""
    servers = []

    def start(*, prepare: Callable[[], object] = lambda: None, **how: Any) -> Server:
        env = {key: value for key, value in how.items() if key.isupper()}
        spec = {key: value for key, value in how.items() if not key.isupper()}
        servers.append(Server(tmp_path, env, spec, prepare))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def heeding(number: signal.Signals) -> Callable[[], object]:
    return lambda: signal.signal(number, signal.SIG_DFL)


class TestDetach:
    def test_what_keeps_the_disk_is_the_answer_and_it_is_served_on(self, start: Start, run_dir: Path) -> None:
        """A second detach really tries again, and says ok only when the disk is gone."""
        server = start(FAKE_STOPS="2")
        server.until("serving")
        for _ in range(2):
            with pytest.raises(ControlError, match="the kernel holds on to it"):
                server.call("detach")
            assert server.call("ping")["phase"] == "serving"
            assert control.read_state("d")["phase"] == "serving"
        server.call("detach")
        assert server.process.wait(30) == 0
        assert list(run_dir.iterdir()) == []

    def test_storage_that_cannot_be_closed_does_not_keep_the_server(self, start: Start, run_dir: Path) -> None:
        """The disk is gone: detach says what was lost, and so do log and exit status."""
        server = start(FAKE_CLOSE="fail")
        server.until("serving")
        with pytest.raises(ControlError, match=r"its storage could not be closed.*the last write was lost"):
            server.call("detach")
        assert server.process.wait(30) == Exit.FAILED
        assert "the last write was lost" in server.log
        assert list(run_dir.iterdir()) == []

    def test_a_start_that_is_detached_is_undone_before_the_answer(self, start: Start, run_dir: Path) -> None:
        server = start(FAKE_START="slow")
        while not (run_dir / "begun").exists():
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        server.call("detach")
        assert (run_dir / "undone").exists()
        assert server.process.wait(30) == Exit.FAILED
        assert control.disk_names() == []


def test_why_a_start_failed_is_not_lost_in_undoing_it(start: Start, run_dir: Path) -> None:
    """Storage that cannot be closed either does not hide the reason."""
    server = start(FAKE_START="fail", FAKE_CLOSE="fail")
    assert server.process.wait(30) == Exit.UNSUPPORTED
    assert "\nvduse-blk: the kernel does not want it\n" in server.log
    assert "the last write was lost" in server.log
    assert list(run_dir.iterdir()) == []


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_detaches(self, number: signal.Signals, start: Start, run_dir: Path) -> None:
        """A closed terminal, too: the disk is not left without a server."""
        server = start(prepare=heeding(number))
        server.until("serving")
        server.process.send_signal(number)
        assert server.process.wait(30) == 0
        assert list(run_dir.iterdir()) == []

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_disk_that_stays_is_served_on(self, number: signal.Signals, start: Start) -> None:
        server = start(prepare=heeding(number), FAKE_STOPS="1")
        server.until("serving")
        server.process.send_signal(number)
        while "still serving" not in server.log:
            time.sleep(0.01)
        server.call("detach")
        assert server.process.wait(30) == 0

    def test_nohup_is_respected(self, start: Start) -> None:
        """A hang-up that whoever started the server wants ignored is ignored."""
        server = start(prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        server.until("serving")
        server.process.send_signal(signal.SIGHUP)
        assert server.call("ping")["phase"] == "serving"
        time.sleep(0.2)
        assert server.call("ping")["phase"] == "serving"


class TestExport:
    @pytest.mark.parametrize(("timeout", "least", "most"), [(60, 40, 50), (4, 1, 3), (0.01, 0, 0)])
    def test_the_export_gives_up_before_the_starter(self, timeout: float, least: float, most: float, start: Start) -> None:
        """So that its explanation is heard."""
        server = start(timeout=timeout)
        server.until("serving")
        assert least <= server.call("info")["options"]["timeout"] <= most

    def test_the_export_knows_the_disks_directory(self, start: Start, run_dir: Path) -> None:
        server = start()
        server.until("serving")
        options = server.call("info")["options"]
        assert options["directory"] == str(run_dir / "d")
        assert options["timeout"] == 60  # nobody waits: the default
