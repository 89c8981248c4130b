"""Names, places, lock, specification and client of the control protocol."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vduse_blk.block.errors import UserError
from vduse_blk.control import messages, notes, rundir, status
from vduse_blk.control.client import Client
from vduse_blk.control.errors import ControlError, Exit, NotServed
from vduse_blk.control.messages import MAX_MESSAGE
from vduse_blk.control.process import read_stat
from vduse_blk.control.rundir import DiskPaths
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.control.status import all_disks, disk_status


@pytest.fixture(autouse=True)
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp") as directory:
        monkeypatch.setenv(rundir.RUN_ENV, directory)
        yield Path(directory)


@pytest.mark.parametrize("name", ["a", "0", "_x", "disk.img", "A-b_c.9", "x" * 63])
def test_good_names_pass(name: str) -> None:
    """Letters, digits, '_', '.', '-' up to 63 characters make a name."""
    assert rundir.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "control", "-x", ".x", "a/b", "a b", "x" * 64, "ä", "a\n", "a\0", "٣"])
def test_bad_names_are_bad_input(name: str) -> None:
    """Whatever could leave the directory, clash with the kernel's node or confuse a tool is refused with exit
    2."""
    with pytest.raises(UserError, match="name:") as caught:
        rundir.check_name(name)
    assert caught.value.exit_code == Exit.USAGE


def test_a_run_directory_too_long_for_a_socket_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has at most 107 bytes; the user hears which variable to shorten."""
    monkeypatch.setenv(rundir.RUN_ENV, "/tmp/" + "x" * 90)
    with pytest.raises(UserError, match="VDUSE_BLK_RUN"):
        DiskPaths.of("disk")


class TestDirectory:
    def test_modes(self, run_dir: Path) -> None:
        """Only root's own eyes see a disk's directory; the list of names is no secret."""
        paths = rundir.make_directory("d")
        assert stat.S_IMODE(paths.directory.stat().st_mode) == 0o700
        assert rundir.disk_names() == ["d"]

    def test_exclusive_claims_a_name_once(self) -> None:
        """Of two that claim the same name one gets it."""
        rundir.make_directory("d", exclusive=True)
        with pytest.raises(FileExistsError):
            rundir.make_directory("d", exclusive=True)

    def test_lock_is_exclusive_and_ends_with_its_descriptor(self) -> None:
        """A second server of a disk is refused with 'busy'; when the first is gone it is not."""
        fd = rundir.lock_directory("d")
        assert rundir.is_locked("d")
        with pytest.raises(ControlError) as caught:
            rundir.lock_directory("d", patience=0)
        assert caught.value.exit_code == Exit.BUSY
        os.close(fd)
        assert not rundir.is_locked("d")
        os.close(rundir.lock_directory("d", patience=0))

    def test_lock_survives_in_a_killed_process_only_as_long_as_it_lives(self) -> None:
        """The kernel drops the lock of a killed server."""
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from vduse_blk.control import rundir; rundir.lock_directory('d'); print(flush=True); input()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        assert rundir.is_locked("d")
        child.kill()
        child.communicate()
        assert not rundir.is_locked("d")

    def test_a_probe_does_not_turn_a_server_away(self) -> None:
        """Locking waits out the instant in which somebody asks whether the disk is served."""
        rundir.make_directory("d")
        stop = threading.Event()

        def probe() -> None:
            while not stop.is_set():
                rundir.is_locked("d")

        thread = threading.Thread(target=probe)
        thread.start()
        try:
            for _ in range(50):
                os.close(rundir.lock_directory("d", patience=30))
        finally:
            stop.set()
            thread.join()

    def test_remove_leaves_a_served_disk_alone(self) -> None:
        """Nobody but the server removes the directory of a disk that is served."""
        fd = rundir.lock_directory("d")
        notes.write_state("d", {"name": "d"})
        assert rundir.remove_directory("d", patience=0) is False
        assert notes.read_state("d") == {"name": "d"}
        assert rundir.remove_directory("d", locked_fd=fd) is True
        assert rundir.disk_names() == []
        os.close(fd)

    def test_a_probe_does_not_keep_a_directory(self) -> None:
        """`list` asks by the same lock for an instant; removing waits that out."""
        rundir.make_directory("d")
        probe = rundir.open_directory("d")
        fcntl.flock(probe, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, os.close, (probe,))
        timer.start()
        assert rundir.remove_directory("d") is True
        timer.join()
        assert rundir.disk_names() == []

    @pytest.mark.parametrize(("where", "mode"), [("root", 0o777), ("root", 0o775), ("d", 0o755), ("d", 0o710)])
    def test_a_directory_that_others_may_use_is_refused(self, where: str, mode: int, run_dir: Path) -> None:
        """Their files would be read and obeyed by a process of root's."""
        directory = run_dir / "d"
        directory.mkdir(0o700)
        (run_dir if where == "root" else directory).chmod(mode)
        for claim in (rundir.make_directory, rundir.lock_directory):
            with pytest.raises(ControlError, match="is not safe to use") as caught:
                claim("d")
            assert caught.value.exit_code == Exit.DENIED
        run_dir.chmod(0o700)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
    @pytest.mark.parametrize("where", ["root", "d"])
    def test_a_directory_of_somebody_else_is_refused(self, where: str, run_dir: Path) -> None:
        directory = run_dir / "d"
        directory.mkdir(0o700)
        os.chown(run_dir if where == "root" else directory, 65534, 65534)
        with pytest.raises(ControlError, match="belongs to user 65534"):
            rundir.lock_directory("d")

    @pytest.mark.parametrize("where", ["root", "d"])
    def test_a_link_is_no_directory(self, where: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever it leads."""
        (run_dir / "real").mkdir(0o700)
        (run_dir / "d").symlink_to("real")
        if where == "root":
            monkeypatch.setenv(rundir.RUN_ENV, str(run_dir / "d"))
        with pytest.raises(ControlError, match="in the way"):
            rundir.lock_directory("d")

    def test_remove_by_a_former_server_leaves_the_successor_alone(self) -> None:
        """A directory made anew under the same name is not removed on the strength of the old one's lock."""
        old = rundir.lock_directory("d")
        rundir.remove_directory("d", locked_fd=old)
        new = rundir.lock_directory("d")
        rundir.remove_directory("d", locked_fd=old)
        assert rundir.disk_names() == ["d"]
        os.close(old)
        os.close(new)

    def test_remove_of_a_known_directory_leaves_a_new_one_alone(self) -> None:
        """Who failed to start a disk does not remove the directory that another has made since."""
        rundir.make_directory("d")
        mine = rundir.open_directory("d")
        assert rundir.remove_directory("d") is True
        rundir.make_directory("d")
        assert rundir.remove_directory("d", opened_fd=mine) is True
        assert rundir.disk_names() == ["d"]
        os.close(mine)

    def test_lock_follows_a_directory_removed_meanwhile(self) -> None:
        """A server that wins the lock of a directory just removed makes and locks a new one."""
        old = rundir.lock_directory("d")
        waiter_fd: list[int] = []
        waiter = threading.Thread(target=lambda: waiter_fd.append(rundir.lock_directory("d", patience=30)))
        waiter.start()
        rundir.remove_directory("d", locked_fd=old)
        os.close(old)
        waiter.join()
        assert os.path.samestat(os.fstat(waiter_fd[0]), DiskPaths.of("d").directory.stat())
        os.close(waiter_fd[0])

    @pytest.mark.parametrize("there", [False, True])
    def test_a_directory_removed_as_it_is_looked_at_is_made_again(self, there: bool) -> None:
        """A server that starts while `detach` removes the directory it has just found, or made, is no error."""
        directory = DiskPaths.of("d").directory
        if there:
            rundir.make_directory("d")
        look = os.lstat
        looks: list[Path] = []

        def remove_first(path: Path) -> os.stat_result:
            if path == directory and not looks:
                looks.append(path)
                assert rundir.remove_directory("d")
            return look(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "lstat", remove_first)
            os.close(rundir.lock_directory("d"))
        assert looks
        assert directory.is_dir()

    def test_a_directory_that_cannot_be_removed_is_named(self) -> None:
        """On a run directory that has become read-only: not the name of the file in it that came first."""
        paths = rundir.make_directory("d")
        paths.log.touch()

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "log")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            with pytest.raises(ControlError, match=f"^cannot remove {paths.directory}: Read-only file system$"):
                rundir.remove_directory("d")

    def test_a_file_in_the_way_is_one_sentence(self, run_dir: Path) -> None:
        """A run directory in which a file has the disk's name gives a user error, not a traceback."""
        (run_dir / "d").write_text("")
        with pytest.raises(ControlError, match="in the way"):
            rundir.lock_directory("d")

    def test_state_is_replaced_whole_and_private(self) -> None:
        """state.json has mode 0600 and its replacement leaves no other file."""
        paths = rundir.make_directory("d")
        notes.write_state("d", {"a": 1})
        notes.write_state("d", {"a": 2})
        assert notes.read_state("d") == {"a": 2}
        assert [p.name for p in paths.directory.iterdir()] == ["state.json"]
        assert stat.S_IMODE(paths.state.stat().st_mode) == 0o600

    def test_a_disk_that_goes_while_it_is_looked_at_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that has removed its disk has not died."""
        rundir.make_directory("d")
        monkeypatch.setattr(status, "is_locked", lambda name: not rundir.remove_directory(name))
        assert list(all_disks()) == []

    @pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
    def test_damaged_state_reads_as_nothing_known(self, text: str) -> None:
        """A disk whose state.json is damaged can still be listed and removed."""
        rundir.make_directory("d").state.write_text(text)
        assert notes.read_state("d") == {}
        assert disk_status("d").state == "dead"


class TestWorkerSpec:
    def test_json_round_trip(self) -> None:
        """What attach writes is what the server reads."""
        spec = WorkerSpec(
            name="d", source="/x", options={"direct": True}, read_only=True, queues=3, queue_size=64,
            serial="S 1", block_size=4096, size=8192, path="plugin", ready_fd=5, timeout=2.5,
            exports=("vduse", "vhost-user:/x"),
        )  # fmt: skip
        assert WorkerSpec.from_json(spec.to_json()) == spec

    def test_only_name_and_source_are_needed(self) -> None:
        """Every other key has a default."""
        spec = WorkerSpec.from_json('{"name": "d", "source": "/x"}')
        assert (spec.queue_size, spec.queues, spec.path, spec.exports) == (256, None, "auto", ("vduse",))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("name", "a/b"), ("name", 3), ("source", ""), ("options", []), ("read_only", 1), ("queues", 0),
            ("queues", 65), ("queues", True), ("queue_size", 0), ("queue_size", 2), ("queue_size", 100),
            ("queue_size", 65536), ("queue_size", None), ("serial", ""), ("serial", "x" * 21),
            ("serial", "ä"), ("serial", "a\n"), ("block_size", 0), ("block_size", 8192), ("size", 0),
            ("size", -512), ("size", 513), ("path", "fast"), ("ready_fd", "5"),
            ("exports", None), ("exports", []), ("exports", [""]), ("exports", [1]), ("exports", "vduse"),
            ("timeout", 0), ("timeout", -1.5), ("timeout", "5"), ("timeout", True),
            ("colour", "red"),
        ],
    )  # fmt: skip
    def test_each_bad_value_is_named(self, key: str, value: object) -> None:
        """A value outside of what is accepted is bad input, and the sentence names its key."""
        with pytest.raises(UserError, match=rf"^{key.replace('_', '[-_]')}: ") as caught:
            WorkerSpec.from_json(json.dumps({"name": "d", "source": "/x"} | {key: value}))
        assert caught.value.exit_code == Exit.USAGE

    def test_size_must_fit_the_block_size(self) -> None:
        """512 more bytes than a multiple of 4096 are refused for a disk of 4096-byte blocks."""
        with pytest.raises(UserError, match="4096"):
            WorkerSpec(name="d", source="/x", size=4096 + 512, block_size=4096)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "d"}', '{"source": "/x"}'])
    def test_no_object_no_spec(self, text: str) -> None:
        """Text that is no specification is bad input, not a bug."""
        with pytest.raises(UserError):
            WorkerSpec.from_json(text)


class Server(threading.Thread):
    """A control socket whose answers are given in advance: bytes to send per connection, after one line came
    in."""

    def __init__(self, name: str, *answers: bytes) -> None:
        super().__init__(daemon=True)
        self._answers = answers
        self.requests: list[bytes] = []
        rundir.make_directory(name)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(DiskPaths.of(name).socket))
        self._listener.listen()
        self.start()

    def run(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rb") as lines:
                self.requests.append(lines.readline())
                connection.sendall(answer)
        self._listener.close()


class TestClient:
    def test_request_and_reply(self) -> None:
        """A request is one JSON line with its op and arguments; the reply comes back as a dictionary."""
        server = Server("d", messages.ok_reply(size=4096))
        with Client("d") as client:
            assert client.call("resize", size=4096)["size"] == 4096
            assert client.server_pid == os.getpid()
        assert json.loads(server.requests[0]) == {"op": "resize", "size": 4096}

    def test_a_refusal_carries_sentence_code_and_holders(self) -> None:
        """What the server says of a refusal reaches the caller unchanged."""
        Server("d", messages.error_reply("disk 'd' is in use", 4, ["/mnt"]))
        with Client("d") as client, pytest.raises(ControlError, match="disk 'd' is in use") as caught:
            client.call("detach")
        assert (caught.value.exit_code, caught.value.holders) == (4, ["/mnt"])

    @pytest.mark.parametrize("answer", [b"", b"{", b"nonsense\n", b"[1]\n", b"x" * (MAX_MESSAGE + 9)])
    def test_broken_replies_are_reported(self, answer: bytes) -> None:
        """A reply cut short, too long or not JSON names the server's log and has exit code 1."""
        Server("d", answer)
        with Client("d") as client, pytest.raises(ControlError, match="log") as caught:
            client.call("info")
        assert caught.value.exit_code == Exit.FAILED

    def test_no_such_disk(self) -> None:
        """Without a directory there is no disk: exit 3."""
        with pytest.raises(ControlError, match="no disk is called 'd'") as caught:
            Client("d")
        assert caught.value.exit_code == Exit.NOT_FOUND

    def test_a_dead_server_is_told_from_no_disk(self) -> None:
        """A directory whose socket nobody listens on means a dead server."""
        rundir.make_directory("d")
        with pytest.raises(NotServed):
            Client("d")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(DiskPaths.of("d").socket))
        listener.close()
        with pytest.raises(NotServed):
            Client("d")

    def test_silence_times_out(self) -> None:
        """A server that takes the request and says nothing is given up after the timeout: exit 7."""
        rundir.make_directory("d")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(DiskPaths.of("d").socket))
            listener.listen()
            with Client("d", timeout=0.05) as client, pytest.raises(ControlError) as caught:
                client.call("info")
        assert caught.value.exit_code == Exit.TIMEOUT


class TestStatus:
    def test_states(self) -> None:
        """Dead, starting, silent and serving are told apart, and each disk is listed once."""
        rundir.make_directory("a-claimed")
        os.utime(rundir.make_directory("a-never").directory, (0, 0))
        rundir.make_directory("a-dead")
        notes.write_state("a-dead", {"source": "/x"})
        starting = rundir.lock_directory("b-starting")
        silent = rundir.lock_directory("c-silent")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(DiskPaths.of("c-silent").socket))
        listener.listen()
        Server("d-serving", messages.ok_reply(phase="serving", size=1))
        try:
            disks = {disk.name: disk for disk in all_disks(timeout=0.1)}
        finally:
            listener.close()
            os.close(starting)
            os.close(silent)
        assert {name: disk.state for name, disk in disks.items()} == {
            "a-claimed": "starting",
            "a-dead": "dead",
            "a-never": "dead",
            "b-starting": "starting",
            "c-silent": "silent",
            "d-serving": "serving",
        }
        assert disks["a-dead"].info["source"] == "/x"

    def test_strangers_in_the_run_directory_are_no_disks(self, run_dir: Path) -> None:
        """Files, links and directories with other names are passed over."""
        (run_dir / "file").write_text("")
        (run_dir / ".hidden").mkdir()
        (run_dir / "link").symlink_to("/")
        assert rundir.disk_names() == []

    def test_no_run_directory_no_disks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before the first attach the list is empty."""
        monkeypatch.setenv(rundir.RUN_ENV, "/tmp/vduse-blk-not-there")
        assert list(all_disks()) == []


@pytest.mark.parametrize(
    "line",
    [b"", b"[]", b'"x"', b'{"op": "\xff"}', b"[" * 100_000, b'{"op":' * 100_000, b'{"op": "detach", "force": "no"}',
     b'{"op": "detach", "force": 1}', b'{"op": "detach", "force": null}'],
)  # fmt: skip
def test_what_is_no_request_is_a_value_error(line: bytes) -> None:
    """The server answers it as bad usage, not as a bug of its own."""
    with pytest.raises(ValueError):  # noqa: PT011
        messages.decode_message(line)


def test_state_that_cannot_be_written_is_one_sentence(run_dir: Path) -> None:
    """With the path, as the reason may be a full file system."""
    rundir.make_directory("d").state.mkdir()
    with pytest.raises(ControlError, match=f"cannot write {run_dir}/d/state.json: ") as caught:
        notes.write_state("d", {})
    assert os.listdir(run_dir / "d") == ["state.json"]
    assert caught.value.exit_code == Exit.FAILED


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), 1e10])
def test_timeouts_that_cannot_be_waited_for(timeout: float) -> None:
    with pytest.raises(UserError, match="timeout: "):
        WorkerSpec(name="d", source="null:1G", timeout=timeout)


def test_a_process_may_be_called_anything() -> None:
    """What is read of a process is its own, not what its name makes of it; nor need the name be text."""
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    name.write_bytes(b"x) Z 1 \xff) Z 1")
    try:
        assert read_stat(Path("/proc/self"))[:2] == ("R", os.getppid())
    finally:
        name.write_bytes(before)
