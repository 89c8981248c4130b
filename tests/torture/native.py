"""The torture without a kernel's help: a vhost-user driver that reconnects, and a server that is killed all the time.

    python -m tests.torture.native --kills N [--seed N] [--server ours|qsd|forgetful] [--failures N]

The driver keeps requests of 512 bytes to 1 MiB in flight on two queues and a shadow of what every sector must hold. At a
random instant (while it serves, while it takes over, while it starts) the server dies by SIGKILL. Then and at every read

    an acknowledged write is there, whole; one in flight is there or not, word by word; nothing else is anywhere

and every request is answered once. Every tenth server lives until all that was ever offered is answered: what is missing
then is lost; and what it says it has replayed must be what the log of its predecessor says. Requests that overtake each
other are what makes this hard, so they are counted: a death "with a gap" is one after which resuming from used.idx alone, as
without a log, loses a request and does another twice. ``forgetful`` does just that, with a new log each time, and must fail.

A server is forked from a process that has all imports done, and runs the worker's own main(). The seed decides everything
but the time that things take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vduse_blk.exporters.vhost_user.messages import ProtocolFeature

from vduse_blk.control import rundir
from vduse_blk.control.client import Client
from vduse_blk.testing.driver import DISCARD, FLUSH, IN, OK, OUT, STALE, WRITE_ZEROES, Request
from vduse_blk.testing.frontend import FakeFrontend, FrontendQueue, GuestMemory, InflightFile
from vduse_blk.worker import __main__ as worker

Words = NDArray[np.uint64]

SECTOR = 512
SECTORS = 32768
QUEUES = 2
DEPTH = 32
MAX_SECTORS = 2048
_SLOT = MAX_SECTORS * SECTOR + 8192
_BASE, _GAP = 0x10000000, 0x10000000
_PATTERN: Words = np.arange(64, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_PATIENCE = 10.0
"""Seconds for the answer to a request when nothing is killed. A server that is well needs milliseconds."""
_RANGE = struct.Struct("<QII")
_KINDS = (IN, OUT, OUT, OUT, FLUSH, DISCARD, WRITE_ZEROES)
_WEIGHTS = (30, 20, 20, 20, 4, 3, 3)


class Wrong(Exception):
    """What must never happen, as a sentence."""


# --------------------------------------------------------------------------------------------------------- servers


class Nursery:
    """A process that starts servers and kills them; orders and answers are JSON lines.

    It is forked before anything else happens, so it has one thread. {"start", "after", "of"}: a server with that
    specification, to be killed ``after`` seconds "of" its start or "of" being ready; null: when told "kill".
    """

    def __init__(self, server: str, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self._server, self._folder = server, folder
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            try:
                self._run(theirs.makefile("rw"))
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(60)
        self.socket = ours
        self._lines = ours.makefile("rw")

    def order(self, **what: Any) -> None:
        self._lines.write(json.dumps(what) + "\n")
        self._lines.flush()

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._lines.readline() or '{"failed": "the nursery has died"}')
        if "failed" in found:
            raise Wrong(f"a server did not start: {found['failed']}")
        return found

    def close(self) -> None:
        self._lines.close()
        self.socket.close()
        os.waitpid(self.pid, 0)

    # ---- the child ----

    def _run(self, lines: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        def say(**what: Any) -> None:
            lines.write(json.dumps(what) + "\n")
            lines.flush()

        for line in lines:
            order = json.loads(line)
            pid, ready = self._peer() if self._server == "qsd" else self._fork(order["start"])
            try:
                if order["of"] == "ready":
                    trouble = ready()
                    say(**({"ready": pid} if trouble is None else {"failed": trouble}))
                if order["after"] is None:
                    lines.readline()
                else:
                    time.sleep(order["after"])
            finally:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            say(dead=os.waitstatus_to_exitcode(status))

    def _fork(self, spec: dict[str, Any]) -> tuple[int, Any]:
        pipe, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                file = os.memfd_create("spec")
                os.write(file, json.dumps(spec | {"ready_fd": theirs}).encode())
                os.lseek(file, 0, os.SEEK_SET)
                os.dup2(file, 0)
                log = os.open(self._folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.close(pipe)
                os._exit(worker.main())
            os._exit(99)
        os.close(theirs)

        def ready() -> str | None:
            said = json.loads(answer.readline() or "{}")
            return None if said.get("ready") else f"{said}"

        answer = open(pipe, "rb")  # noqa: SIM115 - dies with ready, or with this process
        return pid, ready

    def _peer(self) -> tuple[int, Any]:
        path = self._folder / "socket"
        path.unlink(missing_ok=True)
        words = ["qemu-storage-daemon", "--blockdev"]
        words += [f"driver=file,node-name=image,filename={self._folder / 'disk.img'},discard=unmap"]
        words += ["--export", f"type=vhost-user-blk,id=export,node-name=image,addr.type=unix,addr.path={path},"
                  f"writable=on,num-queues={QUEUES}"]  # fmt: skip
        log = os.open(self._folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        pid = os.posix_spawnp(words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, log, 2)])
        os.close(log)

        def ready() -> str | None:
            deadline = time.monotonic() + _PATIENCE
            while not path.exists():
                if time.monotonic() > deadline:
                    return "no socket"
                time.sleep(0.002)
            return None

        return pid, ready


# ---------------------------------------------------------------------------------------------------------- driver


@dataclass
class Flying:
    """A request in flight: sectors [first, end), ``number`` in the order of its queue's offers."""

    kind: int
    first: int
    end: int
    slot: int
    number: int
    request: Request


class Queue(FrontendQueue):
    """A queue with room for DEPTH requests of the largest size."""

    def __init__(self, index: int) -> None:
        super().__init__(GuestMemory(_BASE + index * _GAP, (DEPTH + 1) * _SLOT), 64)
        self.flying: dict[int, Flying] = {}
        self.slots = list(range(DEPTH))
        self.offered = 0

    def send(self, kind: int, first: int, count: int, data: bytes, pieces: int) -> None:
        slot = self.slots.pop()
        self._heap = self._heap_start + slot * _SLOT
        into = count * SECTOR if kind == IN else 0
        sector = first if kind in (IN, OUT) else 0
        request = self.request(kind, sector, out=data, into=into, pieces=pieces if kind in (IN, OUT) else 1)
        self.flying[request.head] = Flying(kind, first, first + count, slot, self.offered, request)
        self.offered += 1

    def has_gap(self) -> bool:
        """Whether those in flight are not simply the last that were offered."""
        return bool(self.flying) and min(f.number for f in self.flying.values()) < self.offered - len(self.flying)


def words_of(stamps: Words) -> Words:
    """The contents of sectors with these stamps; 0 stands for zeros."""
    words: Words = (stamps[:, None] ^ _PATTERN) * (stamps != 0)[:, None]
    return words


def popped(area: InflightFile, index: int, used_idx: int) -> int:
    """How many requests of a queue a dead server had popped and not answered, by the specification's rules."""
    stride = (16 + 16 * area.queue_size + 63) // 64 * 64
    content = os.pread(area.fd, stride, area.offset + index * stride)
    _, version, num, head, used = struct.unpack_from("<QHHHH", content)
    if version == 0:
        return 0
    marked = {i for i in range(num) if content[16 + 16 * i]}
    for _ in range((used_idx - used) & 0xFFFF):
        marked.discard(head)
        head = struct.unpack_from("<H", content, 16 + 16 * head + 6)[0]
    return len(marked)


@dataclass
class Found:
    """What happened."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Life:
    """A disk and its driver, until something is wrong or enough servers have died."""

    def __init__(self, server: str, folder: Path, chance: random.Random, counts: Counter[str]) -> None:
        self._server, self._folder, self._chance, self._counts = server, folder, chance, counts
        self._image = folder / "disk.img"
        self._image.write_bytes(bytes(SECTORS * SECTOR))
        self._now: Words = np.zeros(SECTORS, np.uint64)
        """What a sector holds; and what else it may hold, because a request in flight changes it:"""
        self._then: Words = np.zeros(SECTORS, np.uint64)
        self._busy = np.zeros(SECTORS, np.bool_)
        self._stamp = 0
        self._queues = [Queue(i) for i in range(QUEUES)]
        self._area: InflightFile | None = None
        self._expected = 0
        self._nursery = Nursery(server, folder)

    def close(self) -> None:
        self._nursery.close()
        for queue in self._queues:
            queue.close()
        if self._area is not None:
            self._area.close()

    def run(self, kills: int) -> None:
        """Raises Wrong."""
        try:
            for number in range(1, kills + 1):
                self._turn(calm=number % 10 == 0 or number == kills)
        except (AssertionError, TimeoutError) as error:
            raise Wrong(str(error) or repr(error)) from error

    # ---- one server ----

    def _turn(self, *, calm: bool) -> None:
        chance = self._chance
        way = chance.random()
        of = "start" if not calm and way < 0.1 and self._server != "qsd" else "ready"
        after = None if calm else chance.random() * (0.03 if of == "start" else 0.005 if way < 0.3 else 0.05)
        self._counts["deaths while starting"] += of == "start"
        spec = {
            "name": "torture",
            "source": str(self._image),
            "exports": [f"vhost-user:{self._folder / 'socket'}"],
            "path": chance.choice(("native", "plugin")),
            "queues": QUEUES,
        }
        self._nursery.order(start=spec, after=after, of=of)
        if of == "ready":
            self._nursery.answer()
            with contextlib.suppress(EOFError, ConnectionError), self._connected() as frontend:
                self._boot(frontend)
                if calm:
                    self._settle()
                else:
                    self._load(frontend)
        if after is None:
            self._nursery.order(kill=True)
        status = self._nursery.answer()["dead"]
        if status != -signal.SIGKILL:
            raise Wrong(f"a server has ended by itself, with status {status}")
        self._look_at_the_dead()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[FakeFrontend]:
        frontend = FakeFrontend.connect(self._folder / "socket")
        try:
            yield frontend
        finally:
            frontend.close()

    def _boot(self, frontend: FakeFrontend) -> None:
        """As QEMU, which knows where the used ring stands and nothing else."""
        frontend.negotiate()
        if frontend.protocol & ProtocolFeature.INFLIGHT_SHMFD.mask:
            if self._area is None or self._server == "forgetful":
                self._area = frontend.get_inflight(QUEUES, self._queues[0].num)
            assert frontend.set_inflight(self._area) == 0
        assert frontend.set_memory(*(queue.region for queue in self._queues)) == 0
        for index, queue in enumerate(self._queues):
            frontend.start_queue(index, queue, base=queue.used_idx())
            if self._server == "qsd":
                queue.kick(force=True)

    def _load(self, frontend: FakeFrontend) -> None:
        """Until the server leaves."""
        connection = frontend.connection
        connection.settimeout(0.0005)
        deadline = time.monotonic() + _PATIENCE
        while True:
            for queue in self._queues:
                self._offer(queue)
                queue.kick()
            if not self._take_answers():
                try:
                    if connection.recv(1) == b"":
                        return
                except TimeoutError:
                    pass
            if time.monotonic() > deadline:
                raise Wrong("a server that was to be killed lives")

    def _settle(self) -> None:
        """No more offers: everything must be answered, and the server must know what it took over."""
        if self._server == "ours":
            said = [queue["replayed"] for queue in _info(self._folder)["queues"][:QUEUES]]
            if sum(said) != self._expected:
                raise Wrong(f"the log has {self._expected} requests in flight, the server says it replayed {sum(said)}")
        deadline = time.monotonic() + (_PATIENCE if self._server == "ours" else 2.0)
        while any(queue.flying for queue in self._queues):
            if not self._take_answers():
                time.sleep(0.001)
            if time.monotonic() > deadline:
                raise Wrong(f"lost: {sum(len(queue.flying) for queue in self._queues)} requests are never answered")
        self._counts["settled"] += 1

    def _look_at_the_dead(self) -> None:
        self._take_answers()
        counts = self._counts
        counts["kills"] += 1
        flying = sum(len(queue.flying) for queue in self._queues)
        counts["deaths with requests in flight"] += flying > 0
        counts["deaths with a gap"] += any(queue.has_gap() for queue in self._queues)
        if self._area is not None:
            self._expected = sum(popped(self._area, i, queue.used_idx()) for i, queue in enumerate(self._queues))
            counts["replays"] += self._expected
        self._check_image()

    def _check_image(self) -> None:
        image: Words = np.fromfile(self._image, np.uint64).reshape(SECTORS, 64)
        bad = np.flatnonzero((image != words_of(self._now)).any(axis=1))
        if len(bad):
            old, new = words_of(self._now[bad]), words_of(self._then[bad])
            bad = bad[((image[bad] != old) & (image[bad] != new)).any(axis=1)]
        if len(bad):
            raise Wrong(f"{len(bad)} sectors from {bad[0]} on hold neither what was acknowledged nor what is in flight")

    # ---- requests ----

    def _offer(self, queue: Queue) -> None:
        chance = self._chance
        for _ in range(4):  # few at a time, so that answers are taken meanwhile
            if not queue.slots:
                return
            kind = chance.choices(_KINDS, _WEIGHTS)[0]
            if kind == FLUSH:
                queue.send(kind, 0, 0, b"", 1)
                continue
            # Few large ones among many small ones: those are overtaken.
            count = int(2 ** (chance.uniform(8, 11) if chance.random() < 0.15 else chance.uniform(0, 4)))
            first = chance.randrange(SECTORS - count)
            if self._busy[first : first + count].any():
                continue
            self._busy[first : first + count] = True
            data = b""
            if kind == OUT:
                self._stamp += 1
                self._then[first : first + count] = (self._stamp << 20) + np.arange(first, first + count, dtype=np.uint64)
                data = words_of(self._then[first : first + count]).tobytes()
            elif kind != IN:
                self._then[first : first + count] = 0
                data = _RANGE.pack(first, count, chance.randrange(2) if kind == WRITE_ZEROES else 0)
            queue.send(kind, first, count, data, chance.choice((1, 1, 3)))

    def _take_answers(self) -> bool:
        some = False
        for queue in self._queues:
            for head, _ in queue.poll_used():
                some = True
                self._finish(queue, queue.flying.pop(head))
        return some

    def _finish(self, queue: Queue, flying: Flying) -> None:
        request = queue._requests.pop(flying.request.head)
        status = queue.get(request.status_iova, 1)[0]
        if status != OK:
            what = "was answered and not done" if status == STALE else f"has status {status}"
            raise Wrong(f"a request of kind {flying.kind} on sectors {flying.first} to {flying.end - 1} {what}")
        where = slice(flying.first, flying.end)
        if flying.kind == IN:
            found = np.frombuffer(queue.data(request), np.uint64).reshape(-1, 64)
            bad = np.flatnonzero((found != words_of(self._now[where])).any(axis=1))
            if len(bad):
                raise Wrong(f"{len(bad)} sectors from {flying.first + bad[0]} on were read and are not what was written")
        elif flying.kind != FLUSH:
            self._now[where] = self._then[where]
        self._busy[where] = False
        queue.slots.append(flying.slot)
        self._counts["requests"] += 1
        self._counts["overtaking"] += any(other.number < flying.number for other in queue.flying.values())


def _info(folder: Path) -> dict[str, Any]:
    with Client("torture") as client:
        return client.call("info")


# ------------------------------------------------------------------------------------------------------------ main


def torture(kills: int, seed: int, server: str, failures: int, folder: Path) -> Found:
    """``failures``: end after so many; each begins with an empty disk again."""
    found, began, told = Found(), time.monotonic(), 0.0
    chance = random.Random(seed)
    while found.counts["kills"] < kills and len(found.failures) < failures:
        place = folder / str(len(found.failures))
        (place / "run").mkdir(parents=True)
        os.environ[rundir.RUN_ENV] = str(place / "run")
        life = Life(server, place, chance, found.counts)
        try:
            while (left := kills - found.counts["kills"]) > 0:
                life.run(min(left, 50))
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    print(f"torture: {server}, {found.counts['kills']} of {kills} kills", flush=True)
        except Wrong as wrong:
            found.counts["kills"] += 1  # a turn that failed is one, whoever ended it: this loop must end
            found.failures.append(str(wrong))
        finally:
            life.close()
    found.seconds = time.monotonic() - began
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--server", choices=("ours", "qsd", "forgetful"), default="ours")
    parser.add_argument("--failures", type=int, default=1, help="end after so many (%(default)s)")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"torture: {arguments.server} over vhost-user, KILLS={arguments.kills} SEED={seed}", flush=True)
    # In memory: there io_uring hands requests to several threads, which overtake each other.
    with tempfile.TemporaryDirectory(prefix="torture-", dir="/dev/shm") as folder:
        found = torture(arguments.kills, seed, arguments.server, arguments.failures, Path(folder))
        log = "".join(path.read_text(errors="replace")[-2000:] for path in Path(folder).glob("*/log"))
    print(f"torture: {', '.join(f'{name} {count}' for name, count in found.counts.items())}, {found.seconds:.0f} s")
    failures = list(found.failures)
    if arguments.server == "ours" and not found.counts["deaths with a gap"]:
        failures.append("no death found requests that had overtaken each other: nothing is proven")
    if "Traceback" in log or (failures and arguments.server == "ours"):
        print(log)
    for failure, times in Counter(failures).most_common(10):
        print(f"torture: {times} times: {failure}")
    print(f"torture: failed {len(failures)} times, SEED={seed}" if failures else "torture: ok")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
