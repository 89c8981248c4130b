"""The command line: real processes, with a server that speaks the real protocol (fake_worker.py)."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from vduse_blk.exporters.vduse import names as kernel_names

from vduse_blk.block.holders import take_from
from vduse_blk.cli import attach as attach_module
from vduse_blk.cli import detach as detach_module
from vduse_blk.cli import launch, output
from vduse_blk.cli.main import COMMANDS, cli
from vduse_blk.control import notes, rundir
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.process import is_running
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.control.status import all_disks, disk_status

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "cli.md"


def until(condition: Callable[[], bool]) -> None:
    """Return as soon as ``condition`` holds; a wait in vain ends with the test's time limit."""
    while not condition():
        time.sleep(0.01)


def heed_signals() -> None:
    """Tests under nohup, or in the background of a shell, inherit that these are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Host:
    """A run directory of its own and the command line on it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.env = os.environ | {rundir.RUN_ENV: str(run_dir)}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / "cli_with_fake_worker.py"), *arguments]

    def run(self, *arguments: str, fake: str = "ready", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.env | {"FAKE_WORKER": fake},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def json(self, *arguments: str, fake: str = "ready") -> tuple[int, dict[str, Any]]:
        done = self.run(*arguments, "--json", fake=fake)
        return done.returncode, json.loads(done.stdout)

    def start(self, *arguments: str, fake: str) -> subprocess.Popen[str]:
        """Start a command without waiting for its end."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.env | {"FAKE_WORKER": fake},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )

    def wait_for_log(self, name: str, text: str) -> None:
        """Until the server of ``name`` has written ``text`` to its log (pytest's timeout ends a wait in
        vain)."""
        log = self.run_dir / name / "log"
        until(lambda: log.exists() and text in log.read_text())

    def server_pid(self, name: str) -> int:
        pid = notes.read_state(name)["pid"]
        assert isinstance(pid, int)
        return pid

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.run_dir.iterdir())


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Ends the servers that a test leaves."""
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp") as directory:
        monkeypatch.setenv(rundir.RUN_ENV, directory)
        yield Host(Path(directory))
        for disk in all_disks(timeout=0.2):
            pid = disk.info.get("pid")
            if pid is not None and rundir.is_locked(disk.name):
                os.kill(int(pid), signal.SIGKILL)


# --------------------------------------------------------------------------------------------------- attach


class TestAttach:
    def test_prints_only_the_device(self, host: Host) -> None:
        """Standard output of attach is the path of the disk and nothing else; the hint goes to standard
        error."""
        done = host.run("attach", "memory:1G", "--name", "m")
        assert (done.returncode, done.stdout) == (0, "/dev/vdz\n")
        assert "vduse-blk detach m" in done.stderr

    def test_json(self, host: Host) -> None:
        """With --json the object holds the name that was chosen, the device and what the server adds."""
        assert host.json("attach", "memory:1G", "--size", "2G") == (
            0,
            {"ok": True, "name": "memory", "device": "/dev/vdz", "size": 2 << 30},
        )

    def test_the_server_is_on_its_own(self, host: Host) -> None:
        """The server leads a session, works in '/', and inherits no descriptor but the ready pipe."""
        host.env["NOTIFY_SOCKET"] = "/nowhere"
        read_end, write_end = os.pipe()
        os.set_inheritable(write_end, True)
        host.run("attach", "memory:1G")
        os.close(read_end)
        os.close(write_end)
        seen = host.json("info", "memory")[1]["seen"]
        assert seen["cwd"] == "/"
        assert seen["session_leader"] is True
        assert seen["descriptors"] == [0, 1, 2, seen["ready_fd"]]
        assert seen["notify"] is False

    def test_files_are_private(self, host: Host) -> None:
        """Directory 0700, log 0600."""
        host.run("attach", "memory:1G")
        paths = rundir.DiskPaths.of("memory")
        assert stat.S_IMODE(paths.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(paths.log.stat().st_mode) == 0o600

    def test_options_reach_the_server(self, host: Host) -> None:
        """What the options say is in the server's specification."""
        host.run(
            "attach", "memory:1G", "--name", "m", "--read-only", "--queue-size", "64", "--serial", "S1",
            "--block-size", "4096", "--size", "1M", "--timeout", "47",
        )  # fmt: skip
        info = host.json("info", "m")[1]
        assert (info["read_only"], info["serial"], info["block_size"], info["size"]) == (
            True,
            "S1",
            4096,
            1 << 20,
        )
        assert info["queues"][0]["size"] == 64
        assert info["seen"]["timeout"] == 47

    def test_names_are_made_unique(self, host: Host) -> None:
        """The second disk of one source gets '-2', the third '-3'."""
        names = [host.json("attach", "memory:1G")[1]["name"] for _ in range(3)]
        assert names == ["memory", "memory-2", "memory-3"]

    def test_names_are_unique_among_simultaneous_attaches(self, host: Host) -> None:
        """Commands that race for a name made from the same source get one each."""
        racing = [host.start("attach", "memory:1G", fake="ready") for _ in range(4)]
        assert [process.wait(60) for process in racing] == [0] * 4
        for process in racing:
            process.communicate()
        assert rundir.disk_names() == ["memory", "memory-2", "memory-3", "memory-4"]

    def test_a_taken_name_is_busy(self, host: Host) -> None:
        """A name given with --name that a disk has is refused with exit 4, and the disk is left alone."""
        host.run("attach", "memory:1G", "--name", "m")
        pid = host.server_pid("m")
        done = host.run("attach", "null:1G", "--name", "m")
        assert done.returncode == 4
        assert "vduse-blk detach m" in done.stderr
        assert host.server_pid("m") == pid
        assert rundir.is_locked("m")

    def test_relative_paths_are_taken_from_here(self, host: Host, tmp_path: Path) -> None:
        """The server, which works in '/', is told the absolute path."""
        (tmp_path / "disk.img").write_bytes(b"\0" * 4096)
        host.run("attach", "./disk.img", cwd=tmp_path)
        assert os.path.normpath(host.json("info", "disk")[1]["source"]) == str(tmp_path / "disk.img")

    @pytest.mark.parametrize(
        "arguments",
        [
            ("memory:1G", "--queue-size", "100"), ("memory:1G", "--queue-size", "1000000"),
            ("memory:1G", "--queues", "0"), ("memory:1G", "--queues", "many"), ("/x", "--path", "fast"),
            ("memory:1G", "--block-size", "513"), ("memory:1G", "--serial", "x" * 21),
            ("memory:1G", "--size", "1000"), ("memory:1G", "--size", "big"), ("memory:1G", "--name", "a/b"),
            ("memory:1G", "--name", "control"), ("/x", "--no-such"),
            *(("memory:1G", "--timeout", seconds) for seconds in ("0", "-1", "nan", "inf", "1e10", "soon")),
            ("nosuchkind:1G",), (),
        ],
    )  # fmt: skip
    def test_bad_input(self, host: Host, arguments: tuple[str, ...]) -> None:
        """Bad input is one sentence on standard error, JSON where asked for, exit 2, and leaves nothing."""
        done = host.run("attach", *arguments, "--json")
        assert done.returncode == 2
        assert done.stderr.startswith("vduse-blk: ")
        assert done.stderr.count("\n") == 1
        report = json.loads(done.stdout)
        assert (report["ok"], report["code"]) == (False, 2)
        assert done.stderr == f"vduse-blk: {report['error']}\n"
        assert host.names() == []

    def test_a_refusal_is_passed_on(self, host: Host) -> None:
        """The server's own sentence, code and holders become attach's; its directory is gone."""
        code, report = host.json("attach", "memory:1G", fake="refuse")
        assert (code, report["error"], report["code"]) == (4, "the file is in use", 4)
        assert report["holders"][1]["pid"] == 42
        assert host.names() == []

    def test_unexpected_failures_show_the_log(self, host: Host) -> None:
        """With exit 1 the end of the server's log is shown: its file is gone afterwards."""
        done = host.run("attach", "memory:1G", fake="broken")
        assert done.returncode == 1
        assert "log: the reason is here" in done.stderr
        assert "the kernel said no" in done.stderr
        assert host.names() == []

    @pytest.mark.parametrize(("fake", "how"), [("die", "ended with status 3"), ("crash", "was ended by signal 9")])
    def test_a_server_that_dies(self, host: Host, fake: str, how: str) -> None:
        """A server that ends without its line is reported with its log, and nothing is left."""
        done = host.run("attach", "memory:1G", fake=fake)
        assert done.returncode == 1
        assert how in done.stderr
        assert f"log: fake worker: {fake}" in done.stderr
        assert host.names() == []

    def test_timeout_undoes_everything(self, host: Host) -> None:
        """After --timeout the server is asked to undo, waited for, and the exit status is 7."""
        code, report = host.json("attach", "memory:1G", "--timeout", "0.5", fake="slow")
        assert (code, report["code"]) == (7, 7)
        assert "nothing is left" in report["error"]
        assert host.names() == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_signals_undo_everything(self, host: Host, number: signal.Signals) -> None:
        """Ctrl-C and its kin make the server undo everything; attach waits for it and ends with 128 + N."""
        process = host.start("attach", "memory:1G", fake="slow")
        host.wait_for_log("memory", "slow")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "nothing is left" in said
        assert host.names() == []

    def test_a_second_signal_kills_a_stuck_server(self, host: Host) -> None:
        """A server that does not undo anything is killed at the second Ctrl-C and cleaned up after."""
        process = host.start("attach", "memory:1G", fake="stuck")
        host.wait_for_log("memory", "stuck")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "undoing" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert host.names() == []

    def test_a_disk_that_got_ready_as_we_gave_up_is_removed(self, host: Host) -> None:
        """A server that became ready in the instant in which attach gave up is asked to detach."""
        code, _ = host.json("attach", "memory:1G", "--timeout", "0.5", fake="late")
        assert code == 7
        assert host.names() == []

    def test_a_disk_whose_path_cannot_be_printed_is_removed(self, host: Host) -> None:
        """Nobody would know of it: standard output on a full device ends in exit 1 and no disk."""
        with open("/dev/full", "w") as full:
            process = subprocess.run(
                host.command("attach", "memory:1G"), env=host.env, stdout=full, stderr=subprocess.PIPE, check=False
            )
        assert process.returncode == 1
        assert b"it was removed" in process.stderr
        until(lambda: host.names() == [])

    def test_a_killed_attach_leaves_nothing(self, host: Host) -> None:
        """When attach itself is killed its server sees the pipe break and undoes everything."""
        process = host.start("attach", "memory:1G", fake="slow")
        host.wait_for_log("memory", "slow")
        process.kill()
        process.communicate()
        until(lambda: not rundir.is_locked("memory"))
        assert host.names() == []

    def test_a_failed_attach_leaves_a_dead_disk_of_that_name(self, host: Host) -> None:
        """What a disk's dead server left is not removed by an attach of that name whose server dies, too."""
        rundir.make_directory("m")
        notes.write_state("m", {"source": "/x"})
        done = host.run("attach", "null:1G", "--name", "m", fake="die")
        assert done.returncode == 1
        assert "vduse-blk detach m" in done.stderr
        assert notes.read_state("m") == {"source": "/x"}

    @pytest.mark.parametrize("fake", ["heir", "slow"])
    def test_what_is_said_to_be_left_is_true(self, host: Host, fake: str) -> None:
        """An attach that gave up says that nothing is left only where the disk's directory is gone."""
        rundir.make_directory("m")
        notes.write_state("m", {"source": "/x"})
        code, report = host.json("attach", "null:1G", "--name", "m", "--timeout", "0.5", fake=fake)
        assert code == 7
        assert ("nothing is left" in report["error"]) == (host.names() == []) == (fake == "slow")
        if fake == "heir":
            assert "the disk 'm' that is there is an earlier server's (`vduse-blk info m` says more)" in report["error"]
            assert notes.read_state("m") == {"source": "/x"}


class TestRace:
    """Two attach the same name at once: the loser made the directory, and the winner's server came first."""

    @pytest.fixture
    def removed(self, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of what was removed from the kernel."""
        names: list[str] = []

        def remove(name: str, *, force: bool, node: int | None = None) -> None:
            assert rundir.is_locked(name)
            names.append(name)

        monkeypatch.setattr(launch, "remove_leftover", remove)
        monkeypatch.setattr(kernel_names, "DEVICES", tmp_path)
        monkeypatch.setenv("FAKE_WORKER", "die")
        return names

    def lose(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: Callable[[], object]) -> ControlError:
        """An attach between whose claim and whose server ``winner`` runs; its error."""

        def command() -> list[str]:
            winner()
            (tmp_path / "m").touch()
            return [sys.executable, str(HERE / "fake_worker.py")]

        monkeypatch.setattr(launch, "worker_command", command)
        with pytest.raises(ControlError) as caught:
            launch.start(WorkerSpec(name="m", source="null:1G"), 30, unique=False)
        return caught.value

    def test_the_winners_device_stays(self, removed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        locks: list[int] = []
        error = self.lose(tmp_path, monkeypatch, lambda: locks.append(rundir.lock_directory("m")))
        assert removed == []
        assert rundir.is_locked("m")
        assert "the disk 'm' that is there is another attach's" in str(error)
        os.close(locks[0])

    def test_a_winner_that_died_is_left_to_detach(
        self, removed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its disk was promised to somebody, who may use it: its directory says what it is."""
        error = self.lose(tmp_path, monkeypatch, lambda: notes.write_state("m", {"pid": 1}))
        assert removed == []
        assert notes.read_state("m") == {"pid": 1}
        assert "the disk 'm' that is there is another attach's" in str(error)

    def test_without_another_what_is_left_is_removed(
        self, removed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.lose(tmp_path, monkeypatch, lambda: None)
        assert removed == ["m"]
        assert rundir.disk_names() == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/srv/disk.img", "disk"), ("/dev/sdb", "sdb"), ("/srv/my disk (1).raw", "my-disk-1"),
        ("/x/ä.img", "disk"), ("/x/control", "disk"), ("file:/x/a.b.img?direct=1", "a.b"),
        ("file:/x/my%20disk.img", "my-disk"), ("memory:1G", "memory"), ("/x/" + "y" * 90, "y" * 63),
    ],
)  # fmt: skip
def test_default_name(source: str, name: str) -> None:
    """A name made from a source is always a good name."""
    assert attach_module.specification(source, None).name == name


class TestServe:
    def test_becomes_the_server(self, host: Host) -> None:
        """serve turns into the server: same process, no ready pipe, standard error its own."""
        process = host.start("serve", "memory:1G", "--name", "m", fake="ready")
        assert process.stderr is not None
        assert process.stderr.readline() == "fake worker: ready\n"
        until(lambda: bool(notes.read_state("m")))
        info = host.json("info", "m")[1]
        assert info["pid"] == process.pid
        assert info["seen"]["ready_fd"] is None
        assert host.run("detach", "m").returncode == 0
        process.communicate()
        assert process.returncode == 0

    def test_bad_input(self, host: Host) -> None:
        """serve checks its options before it becomes the server."""
        assert host.json("serve", "memory:1G", "--queues", "0")[0] == 2
        assert host.names() == []


# --------------------------------------------------------------------------------------------------- detach


class TestDetach:
    def test_ends_the_server(self, host: Host) -> None:
        """When detach returns, server and directory are gone."""
        host.run("attach", "memory:1G")
        pid = host.server_pid("memory")
        assert host.json("detach", "memory") == (0, {"ok": True, "name": "memory"})
        assert not is_running(pid)
        assert host.names() == []

    def test_busy_says_by_whom(self, host: Host) -> None:
        """A disk in use stays, exit 4; the sentence names every holder; --force removes it."""
        host.run("attach", "memory:1G", fake="busy")
        done = host.run("detach", "memory")
        assert done.returncode == 4
        assert done.stderr == "vduse-blk: disk 'memory' is in use: mounted on /mnt; open in process 42 (dd)\n"
        assert host.json("detach", "memory")[1]["holders"][0] == {"kind": "mounted", "what": "/mnt"}
        assert host.run("detach", "memory", "--force").returncode == 0
        assert host.names() == []

    @pytest.mark.parametrize("how", ["mute", "stopped", "mortal"])
    def test_force_waits_for_no_server(self, how: str, host: Host) -> None:
        """One that answers nothing, is stopped, or dies when it is asked: within 5 seconds there is neither server nor disk,
        and the name is free."""
        host.run("attach", "memory:1G", fake="ready" if how == "stopped" else how)
        pid = notes.read_state("memory")["pid"]
        if how == "stopped":
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        done = host.run("detach", "memory", "--force")
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began < 5
        assert not is_running(pid)
        assert host.names() == []
        assert host.run("attach", "memory:1G").returncode == 0

    def test_what_a_server_held_is_taken_before_it_is_killed(self, host: Host) -> None:
        """The lock of the disk's directory is whoever's who removes it, without a moment in which it is nobody's."""
        host.run("attach", "memory:1G", fake="mute")
        pid = notes.read_state("memory")["pid"]
        taken = take_from(pid, str(host.run_dir / "memory"))
        assert taken is not None
        try:
            os.kill(pid, signal.SIGKILL)
            until(lambda: not is_running(pid))
            assert rundir.is_locked("memory")
        finally:
            os.close(taken)
        assert not rundir.is_locked("memory")
        assert take_from(os.getpid(), str(host.run_dir / "nothing")) is None
        assert take_from(os.getpid(), str(host.run_dir)) is None

    def test_no_such_disk(self, host: Host) -> None:
        """Exit 3, and the sentence says where names are to be found."""
        done = host.run("detach", "nothing")
        assert done.returncode == 3
        assert "vduse-blk list" in done.stderr

    def test_a_dead_disk_is_removed(self, host: Host) -> None:
        """What a killed server left is cleaned up without it."""
        host.run("attach", "memory:1G")
        os.kill(host.server_pid("memory"), signal.SIGKILL)
        until(lambda: not rundir.is_locked("memory"))
        assert host.run("detach", "memory").returncode == 0
        assert host.names() == []

    def test_a_dead_disk_is_removed_under_its_lock(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody attaches that name meanwhile; where somebody has begun to, nothing is removed: exit 4."""
        removed: list[str] = []

        def remove(name: str, *, force: bool, node: int | None = None) -> None:
            assert rundir.is_locked(name)
            removed.append(name)

        monkeypatch.setattr(launch, "remove_leftover", remove)
        rundir.make_directory("m")
        lock = rundir.lock_directory("m")
        with pytest.raises(ControlError, match="just now") as caught:
            detach_module._without_server("m", force=True)
        assert (caught.value.exit_code, removed) == (Exit.BUSY, [])
        os.close(lock)
        detach_module._without_server("m", force=False)
        assert (removed, rundir.disk_names()) == (["m"], [])

    def test_a_directory_looked_at_meanwhile_is_removed(self, host: Host) -> None:
        """`list` takes the lock for an instant, just when detach wants to remove the directory."""
        rundir.make_directory("m")
        probe = rundir.open_directory("m")
        fcntl.flock(probe, fcntl.LOCK_SH)
        process = host.start("detach", "m", fake="ready")
        time.sleep(0.7)
        os.close(probe)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, host.names()) == (0, []), said

    def test_what_an_ended_server_left_is_removed(self, host: Host) -> None:
        """It said ok, and something was left all the same."""
        host.run("attach", "memory:1G", fake="untidy")
        assert host.run("detach", "memory").returncode == 0
        assert host.names() == []

    def test_a_server_that_dies_meanwhile(self, host: Host) -> None:
        """A server that dies while it detaches is waited for and cleaned up after."""
        host.run("attach", "memory:1G", fake="mortal")
        assert host.run("detach", "memory").returncode == 0
        assert host.names() == []

    def test_a_silent_server_times_out(self, host: Host) -> None:
        """No answer within --timeout is exit 7, and the disk stays."""
        host.run("attach", "memory:1G", fake="mute")
        assert host.run("detach", "memory", "--timeout", "0.2").returncode == 7
        assert host.names() == ["memory"]

    def test_one_that_is_starting_is_busy(self, host: Host) -> None:
        """A disk that is still being attached cannot be detached yet: exit 4."""
        process = host.start("attach", "memory:1G", fake="stuck")
        host.wait_for_log("memory", "stuck")
        done = host.run("detach", "memory")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert (done.returncode, "just now" in done.stderr) == (4, True)


# ------------------------------------------------------------------------------- list, info, resize, doctor


class TestList:
    def test_columns(self, host: Host) -> None:
        """One line per disk with name, device, size, path, queues, source, pid and state."""
        host.run("attach", "memory:1G", "--name", "a")
        host.run("attach", "memory:1G", "--name", "b")
        pids = {name: host.server_pid(name) for name in "ab"}
        os.kill(pids["b"], signal.SIGKILL)
        until(lambda: not rundir.is_locked("b"))
        lines = [line.split() for line in host.run("list").stdout.splitlines()]
        assert lines == [
            ["NAME", "DEVICE", "SIZE", "PATH", "QUEUES", "SOURCE", "PID", "STATE"],
            ["a", "/dev/vdz", "1", "GiB", "native", "2", "memory:1G", str(pids["a"]), "serving"],
            ["b", "/dev/vdz", "-", "-", "-", "memory:1G", "-", "dead"],
        ]

    def test_json(self, host: Host) -> None:
        """The same for programs, with numbers as numbers."""
        host.run("attach", "memory:1G", "--name", "a")
        code, report = host.json("list")
        assert (code, report["ok"]) == (0, True)
        (disk,) = report["disks"]
        assert (disk["name"], disk["state"], disk["size"], disk["pid"]) == (
            "a",
            "serving",
            1 << 30,
            host.server_pid("a"),
        )

    def test_nothing(self, host: Host) -> None:
        """No disks: nothing on standard output, exit 0."""
        done = host.run("list")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "vduse-blk: no disks\n")
        assert host.json("list") == (0, {"ok": True, "disks": []})

    def test_a_silent_server_does_not_stop_the_list(self, host: Host) -> None:
        """A server that answers nothing is shown as silent."""
        host.run("attach", "memory:1G", "--name", "a", fake="mute")
        host.run("attach", "memory:1G", "--name", "b")
        assert [disk["state"] for disk in host.json("list")[1]["disks"]] == ["silent", "serving"]

    def test_table_on_a_terminal(self, host: Host) -> None:
        """On a terminal the table is drawn to its width, and no cell is lost."""
        host.run("attach", "memory:1G", "--name", "a")
        leader, follower = pty.openpty()
        process = subprocess.Popen(host.command("list"), env=host.env | {"COLUMNS": "90"}, stdout=follower)
        os.close(follower)
        text = b""
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # the last writer is gone
                break
            text += data
        os.close(leader)
        assert process.wait(60) == 0
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text.decode())
        assert {"NAME", "a", "/dev/vdz", "native", "serving"} <= set(plain.split())
        assert max(map(len, plain.splitlines())) <= 90


class TestInfo:
    def test_says_everything(self, host: Host) -> None:
        """Device, size, features with those the driver did not take, queues and counters are shown."""
        host.run("attach", "memory:1G", "--name", "a")
        lines = [" ".join(line.split()) for line in host.run("info", "a").stdout.splitlines()]
        for expected in (
            "device /dev/vdz",
            "size 1 GiB (1073741824 bytes)",
            "features flush",
            "not taken discard",
            "queues 2 of 256 descriptors; unused: 1",
            "bounce area 12 MiB of the server's memory",
            "COUNTER TOTAL QUEUE 0 QUEUE 1",
            "read ops 7 7 0",
        ):
            assert expected in lines
        assert not any("write ops" in line for line in lines)  # has not counted

    def test_a_dead_disk(self, host: Host) -> None:
        """Of a disk without a server what its directory holds is shown, and its state; exit 0."""
        rundir.make_directory("a")
        notes.write_state("a", {"source": "/x", "started_at": 1700000000.0, "pid": 1})
        code, report = host.json("info", "a")
        assert (code, report["state"], report["pid"], report["source"]) == (0, "dead", None, "/x")
        assert "dead" in host.run("info", "a").stdout

    def test_no_such_disk(self, host: Host) -> None:
        """Exit 3, as JSON too."""
        code, report = host.json("info", "a")
        assert (code, report["ok"], report["code"]) == (3, False, 3)


class TestResize:
    def test_new_size(self, host: Host) -> None:
        """The size goes to the server in bytes; its answer is reported."""
        host.run("attach", "memory:1G", "--name", "a")
        assert host.json("resize", "a", "3G") == (0, {"ok": True, "name": "a", "size": 3 << 30})
        assert host.json("info", "a")[1]["size"] == 3 << 30

    def test_a_disk_removed_meanwhile(self, host: Host) -> None:
        """A detach that wins leaves no disk to resize: exit 3."""
        host.run("attach", "memory:1G", "--name", "a", fake="leaving")
        code, report = host.json("resize", "a", "3G")
        assert (code, report["error"]) == (3, "disk 'a' was removed meanwhile")

    def test_a_server_that_dies_meanwhile(self, host: Host) -> None:
        """Its disk is still there, and broken: exit 1 and its log."""
        host.run("attach", "memory:1G", "--name", "a", fake="mortal")
        done = host.run("resize", "a", "3G")
        assert done.returncode == 1
        assert str(host.run_dir / "a" / "log") in done.stderr

    def test_a_dead_server_cannot(self, host: Host) -> None:
        """Resizing a disk without a server fails and points to what leads out."""
        rundir.make_directory("a")
        done = host.run("resize", "a", "3G")
        assert done.returncode == 1
        assert "`vduse-blk info a`" in done.stderr


class TestSet:
    def test_values_go_to_the_server_and_its_answer_is_reported(self, host: Host) -> None:
        host.run("attach", "memory:1G", "--name", "a")
        code, report = host.json("set", "a", "on-error=retry=5s", "faults.error=")
        assert (code, report) == (0, {"ok": True, "name": "a", "policy": {"on_error": "wait"}, "filters": []})
        assert "disk 'a' has on-error=wait" in host.run("set", "a", "on-error=wait").stderr
        assert "disk 'a' has on-error=wait faults.error=\n" in host.run("set", "a", "on-error=", "faults.error=").stderr

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [(["on-error"], "on-error: is no setting; accepted is KEY=VALUE"), (["a=1", "a=2"], "given twice"), ([], "Missing")],
    )
    def test_what_is_no_setting_is_refused(self, host: Host, values: list[str], sentence: str) -> None:
        done = host.run("set", "a", *values)
        assert done.returncode == 2
        assert sentence in done.stderr

    def test_bad_policies_and_filters_are_refused_before_anything_is_made(self, host: Host) -> None:
        for arguments, sentence in (
            (("--on-error", "never"), "on-error: 'never' is not usable; accepted are fail, wait, retry=DURATION (retry=5s)"),
            (("--on-full", "retry=5s"), "on-full: 'retry=5s' is not usable; accepted are fail, wait"),
            (("--filter", "nope"), "filter: 'nope' does not exist; accepted are faults"),
        ):
            done = host.run("attach", "memory:1G", *arguments)
            assert done.returncode == 2
            assert sentence in done.stderr
        assert list(host.run_dir.iterdir()) == []


def test_doctor_exit_status_agrees_with_its_findings(host: Host) -> None:
    """doctor ends with 0 if no finding says 'fail', else with 6, and everything but 'ok' has a remedy."""
    code, report = host.json("doctor")
    levels = {finding["level"] for finding in report["findings"]}
    assert code == (6 if "fail" in levels else 0)
    assert report["ok"] is ("fail" not in levels)
    assert all(finding["remedy"] for finding in report["findings"] if finding["level"] != "ok")
    done = host.run("doctor")
    assert done.returncode == code
    assert all(finding["name"] in done.stdout for finding in report["findings"])


# ------------------------------------------------------------------------------------------ the whole of it


def test_usage_errors(host: Host) -> None:
    """An unknown command is bad usage: exit 2, one sentence."""
    done = host.run("atach")
    assert done.returncode == 2
    assert done.stderr.startswith("vduse-blk: No such command 'atach'")


def test_version(host: Host) -> None:
    """--version prints program and version."""
    assert re.fullmatch(r"vduse-blk, version \d+\.\d+\S*\n", host.run("--version").stdout)


def test_bugs_keep_their_traceback(host: Host) -> None:
    """An exception nobody foresaw has a traceback and exit 1, and with --json an object all the same."""
    bug = "from vduse_blk.control import status; status.all_disks = None; from vduse_blk.cli import main; main.main()"
    done = subprocess.run(
        [sys.executable, "-c", bug, "list", "--json"], env=host.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert json.loads(done.stdout)["code"] == 1


def test_a_closed_pipe_is_no_bug(host: Host) -> None:
    """`vduse-blk list | true` prints no traceback."""
    rundir.make_directory("a")
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", *host.command("info", "a")],
        env=host.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(host: Host, shell: str) -> None:
    """Each shell's script names our command and the variable that makes it answer."""
    done = host.run("completion", shell)
    assert done.returncode == 0
    assert "vduse-blk" in done.stdout
    assert "_VDUSE_BLK_COMPLETE" in done.stdout
    assert host.json("completion", shell)[1]["script"] + "\n" == done.stdout


def test_bash_completes_names_and_options(host: Host) -> None:
    """The shell gets the names of disks for NAME, and options after '--'."""
    rundir.make_directory("alpha")
    rundir.make_directory("beta")

    def ask(words: str, index: int) -> list[str]:
        env = host.env | {
            "_VDUSE_BLK_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(index),
        }
        done = subprocess.run(host.command(), env=env, capture_output=True, text=True, check=False)
        return [line.split(",", 1)[1] for line in done.stdout.splitlines()]

    assert ask("vduse-blk detach a", 2) == ["alpha"]
    assert ask("vduse-blk info ", 2) == ["alpha", "beta"]
    assert "--force" in ask("vduse-blk detach --", 2)
    assert "resize" in ask("vduse-blk re", 1)


def test_list_is_light(host: Host) -> None:
    """What is slow to import stays out of a short command: a slow machine pays for every module."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *host.command("list")[1:]],
        env=host.env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    heavy = {
        "rich",
        "asyncio",
        "subprocess",
        "cffi",
        "pyroute2",
        "numpy",
        "logging",
        "importlib.metadata",
        "pyvduse",
    }
    assert not heavy & modules


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    """docs/cli.md has a section for every command, which describes every option of its own, and no other."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    section = re.search(rf"^## vduse-blk {name}\b(.*?)(?=^## )", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    options = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
    text = re.sub(r"```.*?```", "", section[1], flags=re.DOTALL)  # examples use other commands, too
    assert set(re.findall(r"--[a-z][a-z-]+", text)) - {"--timeout"} == options - {"--timeout"}
    assert command.help
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    synopsis = DOCS.read_text().split("```")[1]
    assert f"vduse-blk {name}" in synopsis


def test_every_exit_status_is_documented() -> None:
    """The table in docs/cli.md lists exactly the exit codes there are."""
    table = DOCS.read_text().split("## Exit status")[1].split("## ")[0]
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {int(code) for code in Exit}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (512, "512 B"),
        (1 << 30, "1 GiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_size_text(size: int | None, text: str) -> None:
    """Sizes are shown in the largest binary unit that keeps them at least 1."""
    assert output.size_text(size) == text


# ------------------------------------------------------------------------------------------- places in disorder


class TestRunDirectoryInTheWay:
    """The run directory is a file."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ("attach", "null:1G"), ("attach", "null:1G", "--name", "a"), ("serve", "null:1G"),
            ("serve", "null:1G", "--name", "a"), ("list",), ("info", "a"), ("detach", "a"),
        ],
    )  # fmt: skip
    def test_is_one_sentence_at_once(self, host: Host, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        """No name is free there, so none is looked for: exit 4."""
        host.env[rundir.RUN_ENV] = str(tmp_path / "run")
        (tmp_path / "run").touch()
        done = host.run(*arguments)
        assert (done.returncode, done.stderr) == (
            4,
            f"vduse-blk: {tmp_path / 'run'} is in the way: it is not a directory\n",
        )


class TestRelativeDirectories:
    """The server, which works in '/', would have another one than the command."""

    @pytest.mark.parametrize(
        "arguments",
        [("attach", "null:1G"), ("serve", "null:1G", "--name", "a"), ("list",), ("info", "a"), ("detach", "a"), ("doctor",)],
    )
    def test_a_run_directory_is_refused(self, host: Host, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        host.env[rundir.RUN_ENV] = "run"
        done = host.run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (
            2,
            "vduse-blk: VDUSE_BLK_RUN: 'run' is not usable; accepted are absolute paths\n",
        )
        assert os.listdir(tmp_path) == []


def test_the_names_tried_are_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all are taken the user is asked for one."""
    monkeypatch.setattr(launch, "MAX_CANDIDATES", 3)
    assert [launch.claim_directory("a", unique=True)[0] for _ in range(3)] == ["a", "a-2", "a-3"]
    with pytest.raises(ControlError, match="--name") as caught:
        launch.claim_directory("a", unique=True)
    assert caught.value.exit_code == 4


def test_nothing_is_written_to_an_unsafe_directory(host: Host) -> None:
    """attach refuses it before its log is made there."""
    (host.run_dir / "a").mkdir()
    (host.run_dir / "a").chmod(0o777)
    done = host.run("attach", "null:1G", "--name", "a")
    assert done.returncode == 5
    assert "is not safe to use" in done.stderr
    assert os.listdir(host.run_dir / "a") == []


class TestDamagedDisk:
    """What is in a disk's directory is no work of a server's."""

    @pytest.fixture(params=["directory", "fifo", "link", "nested", "nonsense"])
    def damaged(self, host: Host, request: pytest.FixtureRequest) -> Path:
        """``state.json`` of disk 'a'; a sound dead disk is called 'b'."""
        state = rundir.make_directory("a").state
        match request.param:
            case "directory":
                state.mkdir()
            case "fifo":
                os.mkfifo(state)
            case "link":
                state.symlink_to("/dev/zero")
            case "nested":
                state.write_text("[" * 100_000)
            case "nonsense":
                keys = ("source", "size", "queue_count", "pid", "monitor", "policy", "waiting", "filters", "exports", "spec")
                state.write_text(json.dumps({key: [{}] for key in keys})[:-1] + ', "started_at": 1e400}')
        rundir.make_directory("b")
        notes.write_state("b", {"source": "/x"})
        return state

    def test_is_listed_as_dead(self, host: Host, damaged: Path) -> None:
        """And the others with it."""
        code, report = host.json("list")
        assert code == 0
        assert [(d["name"], d["state"], d.get("source")) for d in report["disks"]] == [
            ("a", "dead", None),
            ("b", "dead", "/x"),
        ]
        assert host.json("info", "a")[1]["state"] == "dead"
        for command in (["list"], ["info", "a"]):
            done = host.run(*command)
            assert (done.returncode, done.stderr) == (0, "")

    def test_is_detached_or_refused(self, host: Host, damaged: Path) -> None:
        """A directory is nothing that we made, so its owner removes it; anything else goes."""
        done = host.run("detach", "a")
        if damaged.is_dir():
            assert (done.returncode, done.stderr.count("\n")) == (4, 1)
            assert str(damaged) in done.stderr
        else:
            assert (done.returncode, done.stderr) == (0, "")
            assert host.names() == ["b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_root(host: Host) -> None:
    """Somebody else hears that root is needed, not that the run directory is unsafe, and may see what disks there are."""

    become_somebody = (  # after the imports: our files may be in a directory of root's own
        "import os, vduse_blk.cli.main as main; from vduse_blk.cli import attach, detach, launch, resize, show;"
        "from vduse_blk import exports, registry, source; registry.backend('null'); registry.exporter('vduse');"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); main.main()"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", become_somebody, *arguments],
            env=host.env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    host.run_dir.chmod(0o755)
    rundir.make_directory("a")
    for arguments in (("attach", "null:1G"), ("serve", "null:1G"), ("info", "a"), ("detach", "a"), ("resize", "a", "1G")):
        done = run(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (5, 1)
        assert "no permission; run as root" in done.stderr
    assert json.loads(run("list", "--json").stdout)["disks"] == [{"name": "a", "state": "unreadable"}]
    host.run_dir.chmod(0o700)
    assert run("list").returncode == 5


def in_shell(host: Host, script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command as ``"$@"`` of a shell's script."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *host.command(*arguments)],
        env=host.env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


class TestPoorSurroundings:
    """Closed, full and too few files."""

    @pytest.mark.parametrize("limit", [6, 8, 10, 12, 20, 30])
    @pytest.mark.parametrize("command", ["attach", "serve"])
    def test_too_few_descriptors(self, host: Host, command: str, limit: int) -> None:
        """One sentence, and nothing is left."""
        done = in_shell(host, f'ulimit -n {limit}; exec "$@"', command, "null:1G")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "ulimit -n" in done.stderr
        assert host.names() == []

    @pytest.mark.parametrize(
        "arguments",
        [("list",), ("list", "--json"), ("doctor",), ("doctor", "--json"), ("--help",), ("attach", "-h"), ("--version",),
         ("completion", "bash"), ("info", "a"), ("info", "a", "--json")],
    )  # fmt: skip
    def test_full_output(self, host: Host, arguments: tuple[str, ...]) -> None:
        """What cannot be printed is one sentence and exit 1."""
        rundir.make_directory("a")
        done = in_shell(host, '"$@" >/dev/full', *arguments)
        assert (done.returncode, done.stderr) == (
            1,
            "vduse-blk: cannot write to standard output: No space left on device\n",
        )

    def test_a_failure_on_full_output_keeps_its_exit_status(self, host: Host) -> None:
        """Also with --json, which cannot be printed."""
        done = in_shell(host, '"$@" >/dev/full', "info", "a", "--json")
        assert (done.returncode, done.stderr.count("\n")) == (3, 1)

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
    def test_closed_files(self, host: Host, closed: str) -> None:
        """A disk is attached and removed, and doctor judges the host, whoever can hear of it."""
        status = in_shell(host, '"$@"', "doctor").returncode
        done = in_shell(host, f'"$@" {closed}', "doctor")
        assert (done.returncode, done.stderr) == (status, "")
        assert in_shell(host, f'"$@" {closed}', "attach", "null:1G", "--name", "a").returncode == 0
        assert host.json("info", "a")[1]["seen"]["descriptors"][:3] == [0, 1, 2]
        assert in_shell(host, f'"$@" {closed}', "detach", "a").returncode == 0
        assert host.names() == []

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_serve_without_standard_files(self, host: Host, closed: str) -> None:
        """The server gets all three, so that no file of its own takes their numbers."""
        serving = subprocess.Popen(
            ["bash", "-c", f'exec "$@" {closed}', "bash", *host.command("serve", "null:1G", "--name", "a")], env=host.env
        )
        until(lambda: rundir.disk_names() == ["a"] and disk_status("a").state == "serving")
        assert host.json("info", "a")[1]["seen"]["descriptors"] == [0, 1, 2]
        assert host.run("detach", "a").returncode == 0
        assert serving.wait(60) == 0

    def test_deleted_current_directory(self, host: Host, tmp_path: Path) -> None:
        """A relative path leads nowhere: bad input."""
        gone = tmp_path / "gone"
        gone.mkdir()
        done = in_shell(host, 'rmdir "$PWD"; exec "$@"', "attach", "./disk.img", cwd=gone)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "current directory" in done.stderr
        assert host.names() == []

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_that_no_shell_asked_for(self, host: Host, shell: str) -> None:
        host.env["_VDUSE_BLK_COMPLETE"] = f"{shell}_complete"
        done = host.run()
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_log_that_is_no_file(host: Host, kind: str) -> None:
    """A dead disk's log is not followed elsewhere: one sentence, exit 4."""
    log = rundir.make_directory("a").log
    match kind:
        case "link":
            log.symlink_to("/dev/null")
        case "fifo":
            os.mkfifo(log)
        case "directory":
            log.mkdir()
    done = host.run("attach", "null:1G", "--name", "a")
    assert (done.returncode, done.stderr) == (4, f"vduse-blk: {log} is in the way: it is not a regular file\n")


def test_sentences_are_one_line(host: Host) -> None:
    """Whatever a name holds, and however click lays out its messages."""
    assert host.run("attach", "--name", "a\nb\x1b[1m", "null:1G").stderr.count("\n") == 1
    done = host.run("completion", "--json")
    assert done.returncode == 2
    assert "\n" not in json.loads(done.stdout)["error"]
    host.run("attach", "/x\ny\x1b[1m", "--name", "a")
    assert r"/x\ny\x1b[1m" in host.run("info", "a").stdout
    assert host.run("list").stdout.count("\n") == 2


@pytest.mark.parametrize("name", ["attach", "detach", "resize"])
def test_help_shows_the_default_timeout(host: Host, name: str) -> None:
    """As the whole number it is."""
    assert "[default: 60]" in " ".join(host.run(name, "-h").stdout.split())
