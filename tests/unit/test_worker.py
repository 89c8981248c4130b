"""A real server whose export and storage fail on demand (fake_parts.py): how its disk ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vduse_blk.block.holders import take_from
from vduse_blk.cli import detach, launch, show
from vduse_blk.control import notes, rundir
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.process import is_dying
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.control.status import disk_status
from vduse_blk.exporter import KILL_ENV

HERE = Path(__file__).parent


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp") as directory:
        monkeypatch.setenv(rundir.RUN_ENV, directory)
        yield Path(directory)


class Server:
    """The server of disk "d". ``log`` is what it has written."""

    def __init__(
        self,
        folder: Path,
        env: dict[str, str],
        spec: dict[str, Any],
        prepare: Callable[[], object],
        pass_fds: Sequence[int],
        command: Sequence[str],
    ) -> None:
        parts = folder / "fake_parts-1.dist-info"
        parts.mkdir(exist_ok=True)
        (parts / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-parts\nVersion: 1\n")
        (parts / "entry_points.txt").write_text(
            "[vduse_blk.exporters]\nfake = fake_parts:Export\nkept = fake_parts:Kept\n"
            "[vduse_blk.backends]\nfake = fake_parts:Storage\ndurable = fake_parts:Durable\n"
            "careless = fake_parts:Careless\n"
        )
        paths = [str(folder), str(HERE), os.environ.get("PYTHONPATH", "")]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))} | env,
                preexec_fn=prepare,
                pass_fds=pass_fds,
            )
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(json.dumps({"name": "d", "source": "fake:?size=1M", "exports": ["fake"]} | spec).encode())

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until(self, phase: str) -> None:
        while disk_status("d").state != phase if rundir.disk_names() else True:
            assert self.process.poll() is None, self.log
            time.sleep(0.01)

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        with Client("d") as client:
            return client.call(op, **arguments)


Start = Callable[..., Server]


class Hung:
    """A dead server of disk "d" of which one thread has not ended, and ``lock``: a duplicate of the one it keeps."""

    def __init__(self) -> None:
        self.lock = rundir.lock_directory("d")
        # As the kernel leaves a killed process: the first thread has exited, another has not.
        number = 60 if os.uname().machine == "x86_64" else 93  # exit(2), of one thread
        words = f"import ctypes, threading; threading.Thread(target=input).start(); ctypes.CDLL(None).syscall({number}, 0)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", words], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[self.lock]
        )
        notes.write_state("d", notes.read_state("d") | {"pid": self.process.pid})
        while not is_dying("d"):
            assert self.process.poll() is None
            time.sleep(0.01)

    def end(self) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            os.close(self.lock)
            self.process.stdin.close()
            self.process.wait(30)


@pytest.fixture
def hung(start: Start) -> Iterator[Hung]:
    """In place of a server that was killed."""
    killed(start)
    made = Hung()
    yield made
    made.end()


@pytest.fixture
def start(run_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the server with environment variables (capitals) and keys of its specification."""
    servers = []

    def start(
        *,
        prepare: Callable[[], object] = lambda: None,
        pass_fds: Sequence[int] = (),
        command: Sequence[str] = ("-m", "vduse_blk.worker"),
        **how: Any,
    ) -> Server:
        env = {key: value for key, value in how.items() if key.isupper()}
        spec = {key: value for key, value in how.items() if not key.isupper()}
        servers.append(Server(tmp_path, env, spec, prepare, pass_fds, command))
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
            assert notes.read_state("d")["phase"] == "serving"
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
        assert rundir.disk_names() == []


def test_why_a_start_failed_is_not_lost_in_undoing_it(start: Start, run_dir: Path) -> None:
    """Storage that cannot be closed either does not hide the reason."""
    server = start(FAKE_START="fail", FAKE_CLOSE="fail")
    assert server.process.wait(30) == Exit.UNSUPPORTED
    assert "\nvduse-blk: the kernel does not want it\n" in server.log
    assert "the last write was lost" in server.log
    assert list(run_dir.iterdir()) == []


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_detaches(self, number: signal.Signals, start: Start, run_dir: Path) -> None:
        server = start(prepare=heeding(number))
        server.until("serving")
        server.process.send_signal(number)
        assert server.process.wait(30) == 0
        assert list(run_dir.iterdir()) == []

    def test_a_disk_that_stays_is_served_on(self, start: Start) -> None:
        server = start(prepare=heeding(signal.SIGTERM), FAKE_STOPS="1")
        server.until("serving")
        server.process.send_signal(signal.SIGTERM)
        while "still serving" not in server.log:
            time.sleep(0.01)
        server.call("detach")
        assert server.process.wait(30) == 0

    def test_a_hangup_reads_the_settings_again(self, start: Start, tmp_path: Path) -> None:
        """Those of the file win over the command line at the start, too; a closed terminal leaves the disk alone; a file
        with one wrong line changes nothing and is said."""
        file = tmp_path / "d.settings"
        file.write_text("# ours\n\non-error=retry=30s\n")
        server = start(VDUSE_BLK_ETC=str(tmp_path), on_error="wait", filters=["faults?count=4"])
        server.until("serving")

        def settings() -> tuple[str, str, str]:
            info = server.call("info")
            return info["policy"]["on_error"], info["policy"]["on_full"], info["filters"][0]["options"]

        def hang_up(text: str, said: str) -> None:
            file.write_text(text)
            server.process.send_signal(signal.SIGHUP)
            while said not in server.log:
                assert server.process.poll() is None, server.log
                time.sleep(0.01)

        assert settings() == ("retry=30s", "fail", "count=4")
        hang_up("on-full=wait\nfaults.error=EIO\n", "has settings on-full=wait faults.error=EIO")
        assert settings() == ("retry=30s", "wait", "count=4&error=EIO")
        hang_up("on-error=fail\nfaults.error=oops\n", "are as before: error: 'oops' is no error")
        assert settings() == ("retry=30s", "wait", "count=4&error=EIO")
        file.unlink()
        os.mkfifo(file)  # nobody writes to it
        server.process.send_signal(signal.SIGHUP)
        while "d.settings is in the way: it is not a regular file" not in server.log:
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        assert settings() == ("retry=30s", "wait", "count=4&error=EIO")
        file.unlink()
        server.process.send_signal(signal.SIGHUP)
        while "SIGHUP: no settings in" not in server.log:
            time.sleep(0.01)
        assert settings() == ("retry=30s", "wait", "count=4&error=EIO")

    def test_a_wrong_settings_file_is_why_there_is_no_disk(self, start: Start, run_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "d.settings").write_text("on-error=sometimes\n")
        server = start(VDUSE_BLK_ETC=str(tmp_path))
        assert server.process.wait(30) == Exit.USAGE
        assert "on-error: 'sometimes' is not usable; accepted are fail, wait, retry=DURATION" in server.log
        assert list(run_dir.iterdir()) == []

    def test_a_settings_directory_is_no_settings_file(self, start: Start, run_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "d.settings").mkdir()
        server = start(VDUSE_BLK_ETC=str(tmp_path))
        assert server.process.wait(30) == Exit.USAGE
        assert "d.settings is in the way: it is not a regular file" in server.log
        assert "Traceback" not in server.log

    def test_a_relative_settings_directory_is_why_there_is_no_disk(self, start: Start, run_dir: Path) -> None:
        server = start(VDUSE_BLK_ETC="etc")
        assert server.process.wait(30) == Exit.USAGE
        assert "VDUSE_BLK_ETC: 'etc' is not usable; accepted are absolute paths" in server.log
        assert list(run_dir.iterdir()) == []


class TestSet:
    def test_settings_change_at_once_and_outlive_the_server(self, start: Start) -> None:
        """What is set is what info shows, and what the state tells a successor; an empty value is the default."""
        server = start(filters=["faults?count=4&on=read", "faults"])
        server.until("serving")
        values = {"on-error": "wait", "faults.error": "EIO", "faults.on": "", "faults2.delay": "5ms"}
        reply = server.call("set", values=values)
        assert reply["policy"] == {"on_error": "wait", "on_full": "fail"}
        assert [(layer["name"], layer["options"]) for layer in reply["filters"]] == [
            ("faults", "count=4&error=EIO"),
            ("faults2", "delay=0.005"),
        ]
        assert server.call("info")["policy"]["on_error"] == "wait"
        spec = WorkerSpec.from_json(json.dumps(notes.read_state("d")["spec"]))
        assert (spec.on_error, list(spec.filters)) == ("wait", ["faults?count=4&error=EIO", "faults?delay=0.005"])
        server.call("set", values={"on-error": "", "faults.error": ""})
        info = server.call("info")
        assert info["policy"]["on_error"] == "fail"
        assert info["filters"][0]["options"] == "count=4"

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ({"on-error": "maybe"}, "on-error: 'maybe' is not usable; accepted are fail, wait, retry=DURATION"),
            ({"size": "1G"}, "size: cannot be set while the disk is in use; accepted are on-error, on-full, faults.OPTION"),
            ({"throttle.iops": "5"}, "throttle.iops: cannot be set"),
            ({"faults.speed": "5"}, "speed: 'faults' has no such option; accepted are count, delay"),
            ({"faults.speed": ""}, "speed: 'faults' has no such option"),
            ({"faults.on": "fly"}, "on: 'fly' is no operation"),
            (None, "values: None is not usable"),
            ({"on-error": 5}, "is not usable; accepted is an object of texts"),
            ({"on_error": "wait"}, "on_error: cannot be set while the disk is in use; accepted are on-error"),
        ],
    )
    def test_all_of_it_or_nothing(self, values: Any, sentence: str, start: Start) -> None:
        server = start(filters=["faults"])
        server.until("serving")
        both = {"on-full": "wait", "faults.error": "EIO"} | values if isinstance(values, dict) else values
        with pytest.raises(ControlError, match=sentence) as caught:
            server.call("set", values=both)
        assert caught.value.exit_code == Exit.USAGE
        info = server.call("info")
        assert info["policy"] == {"on_error": "fail", "on_full": "fail"}
        assert info["filters"][0]["options"] == ""


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


KEPT: dict[str, Any] = {"source": "durable:?size=1M", "exports": ["kept"]}


def killed(start: Start, **how: Any) -> None:
    """A disk that has lost its server."""
    server = start(**KEPT | how)
    server.until("serving")
    server.process.kill()
    server.process.wait()


class TestTakingOver:
    def test_the_same_disk_is_served_on(self, start: Start, run_dir: Path) -> None:
        """The successor takes over instead of making the disk anew, and both what it did again and who did it are noted."""
        killed(start)
        assert disk_status("d").state == "dead"
        server = start(**KEPT)
        server.until("serving")
        assert server.call("info")["options"]["adopt"] is True
        (event,) = notes.read_events("d")
        assert (event["event"], event["pid"], event["replayed"]) == ("taken over", server.process.pid, 17)
        server.call("detach")
        assert server.process.wait(30) == 0
        assert list(run_dir.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"source": "durable:?size=2M"}, r"source: the disk has 'durable:\?size=1M', not 'durable:\?size=2M'"),
            ({"source": "fake:?size=1M"}, r"source: the disk has 'durable:\?size=1M', not 'fake:\?size=1M'"),
            ({"queues": 2}, "queues: the disk has 3, not 2"),
            ({"queue_size": 128}, "queue-size: the disk has 256, not 128"),
            ({"block_size": 4096}, "block-size: the disk has 512, not 4096"),
            ({"serial": "other"}, "serial: the disk has 'd', not 'other'"),
            ({"read_only": True}, "read-only: the disk has no, not yes"),
            ({"exports": ["kept", "fake"]}, "export: the disk has 'kept', not 'kept, fake'"),
        ],
    )
    def test_another_disk_is_refused(self, change: dict[str, Any], difference: str, start: Start) -> None:
        """The refusal names the difference and leaves everything as it was: the right one can still come."""
        killed(start)
        server = start(**KEPT | change)
        assert server.process.wait(30) == Exit.BUSY
        assert re.search(difference, server.log), server.log
        assert "`vduse-blk detach d --force`" in server.log
        server = start(**KEPT)
        server.until("serving")

    @pytest.mark.parametrize("spelling", ["{path}", "{folder}/./d.img", "file://{folder}//d.img?size=1M", "link", "hard"])
    def test_a_source_is_what_it_means(self, spelling: str, start: Start, tmp_path: Path) -> None:
        """The same file by another path, and without the size that it was made with, is the same disk, with what was set;
        and then by the words it was made with again."""
        path = tmp_path / "d.img"
        made: dict[str, Any] = {"source": f"file:{path}?size=1M", "exports": ["kept"]}
        server = start(**made)
        server.until("serving")
        server.call("set", values={"on-error": "wait"})
        server.process.kill()
        server.process.wait()
        source = spelling.format(path=path, folder=tmp_path)
        if spelling in ("link", "hard"):
            source = str(tmp_path / spelling)
            (tmp_path / spelling).symlink_to(path) if spelling == "link" else os.link(path, source)
        for words in ({**made, "source": source}, made):
            server = start(**words)
            server.until("serving")
            info = server.call("info")
            assert (info["taken_over"], info["size"], info["policy"]["on_error"]) == (True, 1 << 20, "wait")
            server.process.kill()
            server.process.wait()

    @pytest.mark.parametrize(
        ("source", "size", "difference"),
        [
            ("{folder}/other.img", None, r"source: the disk has '\S+/d.img', not '\S+/other.img'"),
            ("{folder}/missing.img", 1 << 20, r"source: the disk has '\S+/d.img', not '\S+/missing.img'"),
            ("file:{path}?sync=1", None, "sync: the disk has no, not yes"),
            ("file:{path}?size=2M", None, "size: the disk has 1048576 bytes, not 2097152"),
            ("{path}", 2 << 20, "size: the disk has 1048576 bytes, not 2097152"),
        ],
    )
    def test_but_no_other(self, source: str, size: int | None, difference: str, start: Start, tmp_path: Path) -> None:
        """Another file, though it has the same size; other options; a size that the disk never had."""
        for name in ("d.img", "other.img"):
            (tmp_path / name).write_bytes(bytes(1 << 20))
        made: dict[str, Any] = {"source": str(tmp_path / "d.img"), "exports": ["kept"]}
        killed(start, **made)
        server = start(**made | {"source": source.format(path=tmp_path / "d.img", folder=tmp_path), "size": size})
        assert server.process.wait(30) == Exit.BUSY
        assert re.search(difference, server.log), server.log
        assert not (tmp_path / "missing.img").exists()
        server = start(**made)
        server.until("serving")

    def test_nor_one_that_has_taken_its_path(self, start: Start, tmp_path: Path) -> None:
        """Neither by the words of the disk nor by another path to it."""
        path = tmp_path / "d.img"
        path.write_bytes(bytes(1 << 20))
        made: dict[str, Any] = {"source": str(path), "exports": ["kept"]}
        killed(start, **made)
        path.rename(tmp_path / "old.img")
        path.write_bytes(bytes(1 << 20))
        for source in (path, f"{tmp_path}/./d.img"):
            server = start(**made | {"source": str(source)})
            assert server.process.wait(30) == Exit.BUSY
            assert "is not the same file any more" in server.log

    def test_the_default_number_of_queues_is_that_of_the_disk(self, start: Start) -> None:
        """And not what this host or version would choose today."""
        killed(start, queues=5)
        server = start(**KEPT)
        server.until("serving")
        assert server.call("info")["queue_count"] == 5

    def test_what_was_set_live_is_the_disks(self, start: Start) -> None:
        """Until it is detached; the successor is started with the words of the first."""
        server = start(**KEPT)
        server.until("serving")
        server.call("set", values={"on-error": "wait", "on-full": "wait"})
        server.call("set", values={"on-full": ""})
        server.process.kill()
        server.process.wait()
        server = start(**KEPT)
        server.until("serving")
        assert server.call("info")["policy"] == {"on_error": "wait", "on_full": "fail"}
        server.call("detach")
        assert server.process.wait(30) == 0
        server = start(**KEPT)
        server.until("serving")
        assert server.call("info")["policy"] == {"on_error": "fail", "on_full": "fail"}

    @pytest.mark.parametrize("damage", ["lost", "damaged", "cut", "public", "another", "version", "link"])
    def test_a_description_that_cannot_be_trusted_is_not(self, damage: str, start: Start, run_dir: Path) -> None:
        killed(start)
        path = run_dir / "d/disk.json"
        text = path.read_text()
        match damage:
            case "lost":
                path.unlink()
            case "damaged":
                path.write_text(text.replace('"size": 1048576', '"size": "much"'))
            case "cut":
                path.write_text(text[:40])
            case "public":
                path.chmod(0o644)
            case "another":
                path.write_text(text.replace('"name": "d"', '"name": "e"'))
            case "version":
                path.write_text(text.replace('"version": 1', '"version": 2'))
            case "link":
                path.rename(run_dir / "d/other")
                path.symlink_to("other")
        server = start(**KEPT)
        assert server.process.wait(30) != 0
        assert re.search("record is lost|cannot be trusted", server.log), server.log
        assert (run_dir / "kept").exists()

    def test_what_the_dead_one_has_under_way_is_waited_for(self, start: Start, run_dir: Path) -> None:
        killed(start)
        (run_dir / "under-way").touch()
        server = start(**KEPT)
        while "waiting for the last I/O of the dead server" not in server.log:
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        assert server.call("ping")["phase"] == "starting"
        (run_dir / "under-way").unlink()
        server.until("serving")

    def test_but_not_for_ever(self, start: Start, run_dir: Path) -> None:
        killed(start)
        (run_dir / "under-way").touch()
        server = start(**KEPT, timeout=1)
        assert server.process.wait(30) == Exit.BUSY
        assert "I/O of its dead server may still be under way" in server.log
        assert (run_dir / "kept").exists()

    def test_one_that_hangs_in_the_kernel_is_waited_for(self, start: Start, run_dir: Path, hung: Hung) -> None:
        """It was killed and keeps the lock of the disk's directory until its last thread has ended."""
        server = start(**KEPT)
        while "waiting for the last I/O of the dead server" not in server.log:
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        assert launch.claim_directory("d", unique=False) == ("d", False)
        hung.end()
        server.until("serving")
        with pytest.raises(ControlError, match="a disk called 'd' exists"):  # who serves it is not waited for
            launch.claim_directory("d", unique=False)

    def test_one_that_hangs_in_the_kernel_is_not_waited_for_for_ever(self, start: Start, run_dir: Path, hung: Hung) -> None:
        server = start(**KEPT, timeout=1)
        assert server.process.wait(30) == Exit.BUSY
        assert "hangs in the kernel" in server.log
        assert (run_dir / "kept").exists()

    def test_one_that_hangs_in_the_kernel_is_shown_as_such(self, start: Start, tmp_path: Path) -> None:
        """At once, for it will not answer, and with what can be done; as soon as it has ended the disk is dead."""
        killed(start, source=str(tmp_path / "d.img"), size=1 << 20)
        hung = Hung()
        try:
            listener = socket.socket(socket.AF_UNIX)
            rundir.DiskPaths.of("d").socket.unlink()
            listener.bind(str(rundir.DiskPaths.of("d").socket))
            listener.listen()  # as the hanging process, which has its files open, still does
            shown = CliRunner().invoke(show.info, ["d", "--json"])
            found = json.loads(shown.stdout)
            assert (found["state"], found["pid"]) == ("dying", hung.process.pid)
            assert re.search(
                "its server was killed and waits in the kernel.*`vduse-blk attach .* --name d .*` waits for its end and "
                "serves the disk again; `vduse-blk detach d --force` fails its requests and removes it",
                found["way_out"],
            )
            refused = CliRunner().invoke(detach.detach, ["d", "--timeout", "1"])
            assert isinstance(refused.exception, ControlError)
            assert refused.exception.exit_code == Exit.BUSY
            assert "was killed and waits in the kernel" in str(refused.exception)
            listener.close()
        finally:
            hung.end()
        assert disk_status("d").state == "dead"

    def test_a_disk_removed_meanwhile_is_not_made_again(self, start: Start, run_dir: Path, hung: Hung) -> None:
        """`detach --force` while a successor waits for the dead server."""
        server = start(**KEPT)
        while "waiting for the last I/O of the dead server" not in server.log:
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        rundir.remove_directory("d", locked_fd=hung.lock)
        assert server.process.wait(30) == Exit.NOT_FOUND
        assert rundir.disk_names() == []

    def test_memory_is_never_replaced_by_zeros(self, start: Start, run_dir: Path) -> None:
        """A disk whose contents are gone is failed and removed, and whoever asked for it is told."""
        killed(start, source="fake:?size=1M")
        server = start(source="fake:?size=1M", exports=["kept"])
        assert server.process.wait(30) == Exit.FAILED
        assert "died with its server" in server.log
        assert (run_dir / "failed").exists()
        assert rundir.disk_names() == []

    def test_storage_that_does_not_fence_is_not_taken_over(self, start: Start, run_dir: Path) -> None:
        killed(start, source="careless:?size=1M")
        server = start(source="careless:?size=1M", exports=["kept"])
        assert server.process.wait(30) == Exit.BUSY
        assert "does not say how writes of a dead server" in server.log
        assert (run_dir / "kept").exists()

    def test_a_successor_nobody_waits_for_leaves_the_disk(self, start: Start, run_dir: Path) -> None:
        """Giving up undoes the taking over, not the disk."""
        killed(start)
        read, write = os.pipe()
        os.set_inheritable(write, True)
        server = start(**KEPT, ready_fd=write, pass_fds=[write])
        os.close(write)
        os.close(read)
        assert server.process.wait(30) == Exit.FAILED
        assert (run_dir / "kept").exists()
        server = start(**KEPT)
        server.until("serving")


class TestLeaving:
    def test_a_signal_leaves_a_used_disk_to_the_next_server(self, start: Start, run_dir: Path) -> None:
        """The exit status and the log say so, and the next server takes it over."""
        server = start(**KEPT, FAKE_USED="1", prepare=heeding(signal.SIGTERM))
        server.until("serving")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == Exit.LEFT
        assert "it is mounted on /mnt. The server ends" in server.log
        assert notes.read_state("d")["phase"] == "left"
        server = start(**KEPT)
        server.until("serving")

    def test_a_server_that_dies_when_it_has_left_has_left(self, start: Start, run_dir: Path) -> None:
        how = {"FAKE_USED": "1", KILL_ENV: "left"}
        server = start(**KEPT, **how, prepare=heeding(signal.SIGTERM))
        server.until("serving")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == -signal.SIGKILL
        assert notes.read_state("d")["phase"] == "left"
        server = start(**KEPT)
        server.until("serving")

    def test_what_does_not_end_is_left_as_it_is(self, start: Start, run_dir: Path) -> None:
        """To stop the queues would be to fail it, or to wait for ever: it is in the log for the next server."""
        server = start(**KEPT, FAKE_USED="1", FAKE_HANGS="1", prepare=heeding(signal.SIGTERM))
        server.until("serving")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == Exit.LEFT
        assert "left to the next server as it is: what is in flight has not ended within 5 seconds" in server.log
        assert notes.read_state("d")["phase"] == "left"
        server = start(**KEPT)
        server.until("serving")

    def test_but_not_one_that_ends_with_its_server(self, start: Start) -> None:
        """Memory is served on: ending would destroy what its users have."""
        server = start(source="fake:?size=1M", exports=["kept"], FAKE_USED="1", prepare=heeding(signal.SIGTERM))
        server.until("serving")
        server.process.send_signal(signal.SIGTERM)
        while "still serving: it is mounted on /mnt; nobody could take it over" not in server.log:
            assert server.process.poll() is None, server.log
            time.sleep(0.01)
        assert server.call("ping")["phase"] == "serving"


def monitored(start: Start, *, pause: float = 0.1, **how: Any) -> Server:
    rundir.make_directory("d")  # as attach does
    code = f"import sys; from vduse_blk.worker import monitor; monitor._PAUSE = {pause}; sys.exit(monitor.main())"
    return start(command=("-c", code), restart="on-failure", **KEPT | how)


def serving_pid(server: Server, *, other_than: int = 0) -> int:
    """Process id of a server that serves."""
    while True:
        assert server.process.poll() is None, server.log
        status = disk_status("d")
        if status.state == "serving" and status.info["pid"] != other_than:
            return int(status.info["pid"])
        time.sleep(0.01)


class TestMonitor:
    def test_a_server_that_dies_is_followed_by_another(self, start: Start, run_dir: Path) -> None:
        """Each takes the disk over; how each ended, and what was done again, can be read; detach ends both for good."""
        monitor = monitored(start)
        first = serving_pid(monitor)
        os.kill(first, signal.SIGKILL)
        second = serving_pid(monitor, other_than=first)
        os.kill(second, signal.SIGSEGV)
        third = serving_pid(monitor, other_than=second)
        events = [(e["event"], e["pid"], e.get("signal"), e.get("replayed")) for e in notes.read_events("d")]
        assert events == [
            ("ended", first, signal.SIGKILL, None),
            ("taken over", second, None, 17),
            ("ended", second, signal.SIGSEGV, None),
            ("taken over", third, None, 17),
        ]
        assert disk_status("d").info["monitor"] == monitor.process.pid
        monitor.call("detach")
        assert monitor.process.wait(30) == 0
        assert list(run_dir.iterdir()) == []

    def test_a_start_that_fails_is_not_repeated(self, start: Start, run_dir: Path) -> None:
        monitor = monitored(start, FAKE_START="fail")
        assert monitor.process.wait(30) == Exit.UNSUPPORTED
        assert rundir.disk_names() == []

    def test_a_server_that_dies_at_once_is_given_up(self, start: Start) -> None:
        """Ten in a row; then the disk stays for somebody to look at."""
        monitor = monitored(start, pause=0.001, FAKE_LIFE="short")
        assert monitor.process.wait(60) == Exit.FAILED
        assert notes.read_events("d")[-1]["event"] == "given up"
        assert "10 servers in a row have ended" in monitor.log
        assert disk_status("d").state == "dead"

    def test_a_signal_is_the_servers(self, start: Start) -> None:
        """The monitor ends as its server does, and starts no other."""
        monitor = monitored(start, FAKE_USED="1", prepare=heeding(signal.SIGTERM))
        serving_pid(monitor)
        monitor.process.send_signal(signal.SIGTERM)
        assert monitor.process.wait(30) == Exit.LEFT
        assert disk_status("d").state == "dead"

    def test_a_disk_that_is_removed_meanwhile_is_left_alone(self, start: Start, run_dir: Path) -> None:
        monitor = monitored(start)
        pid = serving_pid(monitor)
        lock = take_from(pid, str(run_dir / "d"))
        assert lock is not None
        os.kill(pid, signal.SIGKILL)
        assert monitor.process.wait(30) == 0
        rundir.remove_directory("d", locked_fd=lock)
        os.close(lock)

    def test_a_disk_that_is_removed_while_its_server_starts_stays_removed(self, start: Start, run_dir: Path) -> None:
        """Between the monitor's last look and the new server's lock: the directory is not made again."""
        code = """
import sys
from vduse_blk.control import rundir
from vduse_blk.worker import monitor
class Late(monitor.Monitor):
    starts = 0
    def _start(self, *how):
        self.starts += 1
        if self.starts == 2:
            (rundir.run_root() / "kept").unlink()
            rundir.remove_directory("d")
        return super()._start(*how)
monitor.Monitor = Late
sys.exit(monitor.main())
"""
        rundir.make_directory("d")
        monitor = start(command=("-c", code), restart="on-failure", **KEPT)
        os.kill(serving_pid(monitor), signal.SIGKILL)
        assert monitor.process.wait(30) == Exit.OK
        assert list(run_dir.iterdir()) == []
        assert "disk 'd' was removed meanwhile" in monitor.log


class TestRunDirectory:
    def test_full_at_run_time_it_is_survived(self, start: Start, run_dir: Path) -> None:
        """What cannot be noted is logged, and the disk is served and removed all the same."""
        server = start(**KEPT)
        server.until("serving")
        (run_dir / "d/state.json.new").mkdir()  # no file can be written there
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) in (0, Exit.BUSY)
        assert "cannot write" in server.log
