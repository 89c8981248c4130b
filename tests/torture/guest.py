"""The torture on a real kernel, as root: two disks under fio with verification, their servers killed all the time.

    python -m tests.torture.guest --kills N [--seed N] [--server ours|qsd|forgetful]

One disk is used raw, the other has a file system on it. Rounds of fio (four jobs of depth 16; reads, verified writes, trims
and flushes of 512 bytes to 128 KiB) follow each other until enough servers have died by SIGKILL. Every other one dies at a
random instant; those between, as soon as requests have overtaken each other; and a fifth of the successors within a second,
mostly before they serve. Who comes next turns: the monitor's server twice, then ``serve``, then ``attach``, then ``attach``
with a new monitor. At the end: no error of fio's, none in the kernel's log, a clean file system, every take-over in the
trace, and what it replayed no more than what the log of its predecessor had in flight.

Every other stretch of the storage is slow, so that there is always something in flight, and requests overtake each other. A
death "with a gap" found some that later ones had overtaken; what that means is in tests/torture/native.py.

With ``qsd`` the servers are qemu-storage-daemon's, started again with the same words; it keeps its own log. ``forgetful``:
ours, without the log; must fail.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernel.host import CLI, RUN, cli, image, in_flight, leftovers, run, uneven, wait_until
from vduse_blk.control import notes
from vduse_blk.control.errors import ControlError
from vduse_blk.control.process import is_running

MIB = 1 << 20
SIZE = 96 * MIB
JOBS, JOB_BYTES = 4, 8 * MIB
_PATIENCE = 120.0
"""Seconds for anything that is not held up for ever. An emulated machine is slow."""
_LOG, _LOG_HEADER = struct.Struct("<8sIII"), 64
_QUEUE = struct.Struct("<QHHHH")
_ENTRY = struct.Struct("<?7xQ")
_TROUBLE = re.compile(r"I/O error|EXT4-fs (error|warning)|lost async page write|is not a head|blocked for more than")

ROUND_SECONDS = 20
_FIO = (
    "--ioengine=libaio --direct=1 --iodepth=16 --bsrange=512-128k --fsync=32 --verify=crc32c --verify_backlog=64 "
    f"--verify_fatal=1 --verify_state_save=0 --time_based --runtime={ROUND_SECONDS} --size={JOB_BYTES} "
    f"--offset_increment={JOB_BYTES}"
).split()
_MIXED = ("--rw=randrw", "--rwmixread=30")
_TRIM = ("--rw=randtrimwrite",)


class Wrong(Exception):
    """What must never happen, as a sentence."""


def kill(pid: int) -> None:
    if pid <= 0:
        raise Wrong("nobody knows which process the server is")  # 0 would be all of ours
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), f"process {pid} is dead")


@dataclass
class InFlight:
    """What the log of a server says, dead or alive: requests popped and not answered, each queue's used index, and whether
    requests have overtaken each other: popped after one that is in flight, and answered."""

    popped: int = 0
    gap: bool = False
    used: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, content: bytes, used_before: list[int]) -> InFlight:
        """``used_before``: when this server began. One that has answered nothing may have been left numbers of an older
        count, which tell nothing."""
        found = cls()
        _, _, queues, entries = _LOG.unpack_from(content)
        step = (_QUEUE.size + _ENTRY.size * entries + 63) // 64 * 64
        for queue in range(queues):
            at = _LOG_HEADER + queue * step
            _, _, _, last_answered, used = _QUEUE.unpack_from(content, at)
            logged = list(_ENTRY.iter_unpack(content[at + _QUEUE.size : at + _QUEUE.size + _ENTRY.size * entries]))
            numbers = [number for is_in_flight, number in logged if is_in_flight]
            found.popped += len(numbers)
            found.used.append(used)
            if numbers:
                is_answered, last = not logged[last_answered][0], logged[last_answered][1]
                has_answered = is_answered and used != (used_before[queue] if used_before else 0)
                found.gap |= max(numbers) - min(numbers) >= len(numbers) or (has_answered and last > min(numbers))
        return found


class Ours:
    """Our servers of one disk, one after the other."""

    NEXT = ("monitor", "monitor", "serve", "attach", "attach with a monitor")

    def __init__(self, name: str, path: Path, chance: random.Random, counts: Counter[str]) -> None:
        self.name, self._chance, self._counts = name, chance, counts
        self._source = f"file:{path}?direct=1"  # through the page cache nothing would be slow
        self._turn = 0
        self._by = ""
        self._used: list[int] = []
        """The used indices when the last server died."""
        self._starter: subprocess.Popen[bytes] | None = None
        self.device = cli("attach", self._source, "--name", name, "--restart", "on-failure").stdout.strip()

    def _state(self) -> dict[str, Any]:
        try:
            return notes.read_state(self.name)
        except ControlError:
            return {}

    def _pid(self) -> int:
        return int(self._state().get("pid", 0))

    def _is_served(self) -> bool:
        state = self._state()  # once: two looks would take the phase of one server and the process of the next
        return state.get("phase") == "serving" and is_running(state.get("pid"))

    def kill(self, load: Load, *, aimed: bool, again_after: float | None) -> int:
        """Kill the server, see to the next one. ``aimed``: not before its log shows that requests of ``load`` have overtaken
        each other. ``again_after``: kill the next one, too, so many seconds after its start, and go on to the one after it.
        Returns how many were killed."""
        dead, killed = self._pid(), 1
        monitor = int(self._state().get("monitor", 0))
        self._by = self.NEXT[self._turn % len(self.NEXT)]
        self._turn += 1
        if self._by != "monitor" and monitor:
            kill(monitor)  # first, or it would start one
        if aimed:
            wait_until(lambda: load.look(again=True) and self._in_flight().gap, f"{self.name}: requests overtake each other")
        popped = self._kill(dead)
        self._counts["deaths aimed at a gap"] += aimed
        if self._by != "monitor":
            self._start(self._by)
        wait_until(lambda: self._is_tended() and self._pid() != dead, f"a server after {dead}")
        if again_after is not None:
            time.sleep(again_after)
            popped = self._kill(self._pid())
            killed = 2
        wait_until(lambda: self._is_tended() and self._is_served(), f"disk {self.name} is taken over")
        event = [event for event in notes.read_events(self.name) if event["event"] == "taken over"][-1]
        if event["pid"] != self._pid():
            raise Wrong(f"{self.name}: the trace has no word of the server {self._pid()}, but {event}")
        if event["replayed"] > popped:
            raise Wrong(f"the log had {popped} requests in flight, {event['replayed']} were replayed")
        self._counts[f"by {self._by}"] += 1
        self._counts["replays"] += event["replayed"]
        self._counts["take-overs with replays"] += event["replayed"] > 0
        return killed

    def _is_tended(self) -> bool:
        """Start a server where nobody would: one that died while it started ends ``attach``, and its monitor."""
        state = self._state()
        starting = self._starter is not None and self._starter.poll() is None
        if not (starting or is_running(state.get("pid")) or is_running(state.get("monitor"))):
            self._by = "attach"
            self._start(self._by)
        return True

    def _start(self, way: str) -> None:
        self._end_starter()
        words = [*CLI, "serve" if way == "serve" else "attach", self._source, "--name", self.name]
        words += ["--path", self._chance.choice(("native", "plugin"))]
        if way == "attach with a monitor":
            words += ["--restart", "on-failure"]
        with open(f"/tmp/{self.name}.log", "ab") as log:
            self._starter = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _end_starter(self) -> None:
        """``attach`` ends by itself, ``serve`` with its server."""
        if self._starter is not None:
            self._starter.wait(_PATIENCE)

    def _kill(self, pid: int) -> int:
        """Returns how many requests the dead server had popped, as its log has them; some it may have answered just then."""
        kill(pid)
        found = self._in_flight()
        self._used = found.used
        self._counts["deaths with requests in flight"] += found.popped > 0
        self._counts["deaths with a gap"] += found.gap
        return found.popped

    def _in_flight(self) -> InFlight:
        return InFlight.read((RUN / self.name / "inflight").read_bytes(), self._used)

    def log(self) -> str:
        logs = (Path(f"/tmp/{self.name}.log"), RUN / self.name / "log")
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in logs if path.exists())

    def remove(self) -> None:
        cli("detach", self.name)
        self._end_starter()
        if left := leftovers(self.name):
            raise Wrong(f"left over: {left}")

    def give_up(self) -> None:
        cli("detach", self.name, "--force", check=False)


class Forgetful(Ours):
    """Ours, with the log emptied at each death: the next one resumes from used.idx alone."""

    def _kill(self, pid: int) -> int:
        popped = super()._kill(pid)
        with (RUN / self.name / "inflight").open("r+b") as log:
            size = os.fstat(log.fileno()).st_size
            os.pwrite(log.fileno(), bytes(size - _LOG_HEADER), _LOG_HEADER)
        self._used = []
        return popped


class Qsd:
    """qemu-storage-daemon's."""

    def __init__(self, name: str, path: Path, chance: random.Random, counts: Counter[str]) -> None:
        self.name, self._path, self._counts = name, path, counts
        self._start()
        wait_until(lambda: Path("/dev/vduse", name).exists(), f"the device {name}")
        run("vdpa", "dev", "add", "name", name, "mgmtdev", "vduse")
        disks = Path("/sys/bus/vdpa/devices", name)
        wait_until(lambda: any(disks.glob("virtio*/block/*")), f"the disk {name}")
        self.device = f"/dev/{next(disks.glob('virtio*/block/*')).name}"
        wait_until(lambda: Path(self.device).exists(), self.device)

    def _start(self) -> None:
        words = ["qemu-storage-daemon", "--blockdev"]
        words += [f"driver=host_device,node-name=image,filename={self._path},cache.direct=on,discard=unmap"]
        words += ["--export", f"type=vduse-blk,id={self.name},node-name=image,name={self.name},writable=on,num-queues=2"]
        with open(f"/tmp/{self.name}.log", "ab") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, _load: Load, *, aimed: bool, again_after: float | None) -> int:
        """Its log is its own; nothing is aimed."""
        self._process.kill()
        self._process.wait(_PATIENCE)
        killed = 1
        self._start()
        if again_after is not None:
            time.sleep(again_after)
            self._process.kill()
            self._process.wait(_PATIENCE)
            self._start()
            killed = 2
        time.sleep(0.5)  # it says nothing when it serves
        if self._process.poll() is not None:
            raise Wrong(f"the server ended with status {self._process.returncode}")
        return killed

    def log(self) -> str:
        return Path(f"/tmp/{self.name}.log").read_text(errors="replace")[-3000:]

    def remove(self) -> None:
        run("vdpa", "dev", "del", self.name)
        self._process.terminate()

    def give_up(self) -> None:
        self._process.terminate()


class Load:
    """Rounds of fio on ``where``, a device or a directory."""

    def __init__(self, name: str, where: Path, chance: random.Random, counts: Counter[str]) -> None:
        self._name, self._where, self._chance, self._counts = name, where, chance, counts
        self._begin()

    def _begin(self) -> None:
        words = ["fio", "--output-format=terse", f"--randseed={self._chance.randrange(1 << 32)}"]
        if self._where.is_dir():
            words += [f"--name={self._name}", *_FIO, *_MIXED, f"--numjobs={JOBS}"]
            words += [f"--directory={self._where}", "--unlink=1"]
        else:
            for number, ways in enumerate((_MIXED, _TRIM)):
                words += [f"--name={self._name}{number}", *_FIO, *ways, f"--filename={self._where}"]
                words += [f"--offset={number * SIZE // 2}", f"--numjobs={JOBS // 2}"]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the round has ended
        self._began = time.monotonic()
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT)

    def look(self, *, again: bool) -> bool:
        """False: the round has ended, and there is no other. Raises Wrong."""
        if self._process.poll() is None:
            if time.monotonic() - self._began > 5 * _PATIENCE:
                raise Wrong(f"{self._name}: fio hangs")
            return True
        self._said.seek(0)
        said = self._said.read()
        self._said.close()
        if self._process.returncode != 0:
            raise Wrong(f"{self._name}: fio ended with status {self._process.returncode}: {said[-2000:]}")
        self._counts["rounds of fio"] += 1
        if again:
            self._begin()
        return again

    def end(self) -> None:
        self._process.kill()


class Progress:
    """How many servers have died, of how many; a line now and then. Any thread. ``is_over``: something has failed, with
    either disk."""

    def __init__(self, kills: int) -> None:
        self._kills, self._done, self._told, self._lock = kills, 0, time.monotonic(), threading.Lock()
        self._log_begin = len(run("dmesg").stdout)
        self.is_over = False

    def add(self, kills: int) -> None:
        with self._lock:
            self._done += kills
            if time.monotonic() - self._told > 15:
                self._told = time.monotonic()
                print(f"torture: {self._done} of {self._kills} kills", flush=True)

    def fail(self, why: str) -> None:
        """Whoever waits for a request that nobody answers waits for ever, and so would the end of a run."""
        self.is_over = True
        end = threading.Timer(_PATIENCE, self._end, [why])
        end.daemon = True
        end.start()

    def _end(self, why: str) -> None:
        print(f"torture: failed after {self._done} kills: {why}", flush=True)
        os._exit(1)

    def check_kernel(self) -> None:
        """Raises Wrong with what it has complained of since we began."""
        for line in run("dmesg").stdout[self._log_begin :].splitlines():
            if _TROUBLE.search(line):
                raise Wrong(f"the kernel says: {line}")


def torment(disk: Ours | Qsd, where: Path, kills: int, chance: random.Random, counts: Counter[str], done: Progress) -> None:
    """Load one disk and kill its servers. Raises Wrong."""
    load, aimed = Load(disk.name, where, chance, counts), False
    try:
        while counts["kills"] < kills and not done.is_over:
            time.sleep(chance.random())
            load.look(again=True)
            killed = disk.kill(load, aimed=aimed, again_after=chance.random() if chance.random() < 0.2 else None)
            aimed = not aimed
            counts["kills"] += killed
            done.add(killed)
            done.check_kernel()
            load.look(again=True)
        wait_until(lambda: not load.look(again=False), "the last round ends", 5 * _PATIENCE)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        raise Wrong(f"{disk.name}: {type(error).__name__}: {error}") from error
    except Wrong as wrong:
        print(f"torture: {disk.name}, after {counts['kills']} kills: {wrong}", flush=True)
        done.fail(str(wrong))
        raise
    finally:
        load.end()


def torture(kills: int, seed: int, kind: type[Ours] | type[Qsd], counts: Counter[str]) -> None:
    """Both disks at once. Raises Wrong."""
    progress = Progress(kills)
    chances = [random.Random(seed), random.Random(seed + 1)]
    counters: list[Counter[str]] = [Counter(), Counter()]
    with (
        tempfile.TemporaryDirectory(prefix="torture-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as storage,
    ):
        mount = Path(folder, "mount")
        mount.mkdir()
        disks: list[Ours | Qsd] = []
        try:
            for name, chance, mine in zip(("raw", "fs"), chances, counters, strict=True):
                place = storage.enter_context(uneven(image(Path(folder, f"{name}.img"), SIZE), f"torture-{name}"))
                disks.append(kind(name, place, chance, mine))
            run("mkfs.ext4", "-q", disks[1].device)
            run("mount", "-o", "discard", disks[1].device, mount)
            places = (Path(disks[0].device), mount)
            with ThreadPoolExecutor(2) as pool:
                futures = [
                    pool.submit(torment, *what, progress)
                    for what in zip(disks, places, (kills // 2, kills - kills // 2), chances, counters, strict=True)
                ]
            for mine in counters:
                counts.update(mine)
            wrongs = [str(error) for future in futures if (error := future.exception()) is not None]
            if wrongs:
                raise Wrong("; ".join(wrongs))
            run("umount", mount)
            checked = run("e2fsck", "-fn", disks[1].device, check=False)
            if checked.returncode:
                raise Wrong(f"the file system is damaged: {checked.stdout}")
            for disk in disks:
                disk.remove()
            progress.check_kernel()
        except BaseException as error:
            for disk in disks:
                with contextlib.suppress(OSError):
                    print(f"--- {disk.name}: {in_flight(disk.device)} requests wait\n{disk.log()}")
            for disk in disks:
                disk.give_up()
            run("umount", "-l", mount, check=False)
            if isinstance(error, (AssertionError, OSError, subprocess.SubprocessError)):
                raise Wrong(f"{type(error).__name__}: {error}") from error
            raise


_SERVERS: dict[str, type[Ours] | type[Qsd]] = {"ours": Ours, "qsd": Qsd, "forgetful": Forgetful}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--server", choices=_SERVERS, default="ours")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"torture: {arguments.server} over VDUSE, KILLS={arguments.kills} SEED={seed}", flush=True)
    counts: Counter[str] = Counter()
    began, failure = time.monotonic(), None
    try:
        torture(arguments.kills, seed, _SERVERS[arguments.server], counts)
        if arguments.server == "ours" and not counts["take-overs with replays"]:
            failure = "no death found requests in flight: nothing is proven"
        elif arguments.server == "ours" and not counts["deaths with a gap"]:
            failure = "no death found requests that had overtaken each other: nothing is proven"
    except Wrong as wrong:
        failure = str(wrong)
    print(f"torture: {', '.join(f'{name} {count}' for name, count in counts.items())}, {time.monotonic() - began:.0f} s")
    print("torture: ok" if failure is None else f"torture: failed after {counts['kills']} kills, SEED={seed}: {failure}")
    return 0 if failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
