"""A virtqueue served by the event loop, for storage that lives in Python.

A kick wakes the loop; one C call pops and parses what is there. Storage that takes batches is given reads and writes at
once, on the loop, or in shares on its threads, and one C call answers them. Every other request goes to one of a fixed
set of worker tasks, which awaits the stack; the answers of one turn of the loop are given in one C call. Each such call
publishes once and notifies at most once. Guest memory is handed over as memoryviews of the mapping, never copied.

Owners: ``start``, ``stop``, ``set_table``, ``answer_miss`` are the control thread's; everything with an underscore is the
loop's, but for ``_serve_share`` and the filling of ``_shares``, which are a thread's. The C queue object is created before
the loop learns of it and freed after the loop has let go of it, so the two never share it at the same time, but for the
atomics of ``set_table``, ``answer_miss`` and ``view``.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

from vduse_blk.block.errors import Status, status_of
from vduse_blk.block.stack import Stack
from vduse_blk.block.threads import Threads
from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.base import CoreQueue, DiskRules, QueueSetup
from vduse_blk.queue.batch import Item, RingBatch, release, views_of
from vduse_blk.queue.iova import IovaMap

log = logging.getLogger("vduse_blk.disk")

_WORKERS = 64  # requests of one queue in Python at a time; the rest waits in the ring
_CHUNK = 16  # requests of a batch that is served on the loop: the driver gets on with them while we do the next
_CHUNKS = 8  # of those in a row, then others on the loop have their turn
_STATUS = {Status.OK: lib.VBLK_S_OK, Status.IOERR: lib.VBLK_S_IOERR, Status.UNSUPP: lib.VBLK_S_UNSUPP}


class PluginQueue(CoreQueue):
    """Needs the running ``loop`` on another thread than the one that calls start and stop."""

    def __init__(self, index: int, rules: DiskRules, stack: Stack, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(index, rules)
        self._stack = stack
        self._loop = loop
        self._batch = RingBatch(_WORKERS)
        self._takes_batches = stack.takes_batches
        self._threads = stack.batch_threads if stack.takes_batches else None
        self._shares: deque[RingBatch] = deque()  # served, not yet looked at
        self._busy_threads = 0
        self._on_threads = 0  # requests
        self._answers = ffi.new("struct vb_done[]", _WORKERS)
        self._done: list[tuple[int, int]] = []
        self._idle: deque[asyncio.Future[Item]] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._answering = False
        self._has_complained = False
        self._polling = False
        self._popping = False
        self._drained: asyncio.Event = asyncio.Event()
        self._kick: select.epoll | None = None

    # ------------------------------------------------------------------------------------------- control thread

    def start(self, setup: QueueSetup, iova: IovaMap) -> None:
        self._create(setup, iova)
        try:
            # Edge-triggered, in an epoll of its own, and never read: the descriptor may be blocking, and others may read it.
            self._kick = select.epoll()
            self._kick.register(setup.kick_fd, select.EPOLLIN | select.EPOLLET)
            self._on_loop(self._start())
        except BaseException:
            self._destroy()
            raise
        self._running = True
        iova.attach(self)

    def stop(self) -> int:
        assert self._iova is not None
        self._on_loop(self._stop())
        self._running = False
        self._iova.detach(self)
        return self._destroy()

    def _destroy(self) -> int:
        if self._kick is not None:
            self._kick.close()
            self._kick = None
        return super()._destroy()

    def set_table(self, table: Any) -> None:
        super().set_table(table)
        self._loop.call_soon_threadsafe(self._look)

    def answer_miss(self) -> None:
        super().answer_miss()
        self._loop.call_soon_threadsafe(self._look)

    def hold(self, on: bool) -> None:
        super().hold(on)
        self._loop.call_soon_threadsafe(self._look)

    def _on_loop(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # -------------------------------------------------------------------------------------------------- the loop

    async def _start(self) -> None:
        self._popping = True
        self._tasks = [self._loop.create_task(self._work()) for _ in range(_WORKERS)]
        await asyncio.sleep(0)  # every worker has registered itself as idle
        assert self._kick is not None
        self._loop.add_reader(self._kick, self._on_kick)
        self._look()

    async def _stop(self) -> None:
        while lib.vb_queue_replaying(self._c):
            self._look_soon()
            await asyncio.sleep(0.001)
        self._popping = False
        assert self._kick is not None
        self._loop.remove_reader(self._kick)
        if self.counters_inflight():
            with self._stack.patience.hurry():
                await self._drained.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._idle.clear()

    def _on_kick(self) -> None:
        assert self._kick is not None
        self._kick.poll(0, 1)
        self._look()

    def _look(self) -> None:
        """Pop what can be served now. Runs again by itself until the ring is empty and kicks are on."""
        self._polling = False
        inline = self._takes_batches and self._threads is None
        batch = self._batch
        for _ in range(_CHUNKS if inline else 1):
            room = self._room()
            if not self._popping or room <= 0:
                return  # what ends looks again
            count = lib.vb_queue_poll(self._c, batch.items, min(room, _CHUNK) if inline else room)
            if count == 0:
                return
            batch.begin(count)
            if self._takes_batches:
                self._stack.admit(batch)
            if self._threads is not None:
                self._share_out(self._threads)
            elif inline and len(batch):
                self._stack.serve(batch)
                self._stack.settle(batch)
                self._complete(batch.answers, batch.answered)
            self._begin(batch.rest())
        self._look_soon()

    def _room(self) -> int:
        """How many requests may be popped. A worker is kept for each that a thread has: it may come back open."""
        if self._threads is not None and self._busy_threads >= self._threads.limit:
            return 0
        return len(self._idle) - self._on_threads

    def _begin(self, items: Iterable[Item]) -> None:
        """Have requests served one by one. There are as many idle workers."""
        for item in items:
            self._idle.popleft().set_result(item)

    def _look_soon(self) -> None:
        if not self._polling:
            self._polling = True
            self._loop.call_soon(self._look)

    async def _work(self) -> None:
        while True:
            slot: asyncio.Future[Item] = self._loop.create_future()
            self._idle.append(slot)
            item = await slot
            try:
                await self._execute(item)
                status = Status.OK
            except OSError as error:
                status = status_of(error)
            except asyncio.CancelledError:
                status = Status.IOERR
            except Exception:
                # Our own bug, for the stack lets only OSError through: without an answer stop would wait for ever.
                if not self._has_complained:
                    self._has_complained = True
                    log.exception("bug in queue %d: a request failed in a way it must not (said once)", self.index)
                status = Status.IOERR
            self._done.append((item.head, _STATUS[status]))
            self._answer_soon()

    def _answer_soon(self) -> None:
        if not self._answering:
            self._answering = True
            self._loop.call_soon(self._answer)

    def _answer(self) -> None:
        self._answering = False
        done, self._done = self._done, []
        assert len(done) <= _WORKERS  # a worker ends one request per turn of the loop
        for slot, (head, status) in zip(self._answers, done, strict=False):
            slot.head, slot.status = head, status
        self._complete(self._answers, len(done))
        self._look_soon()

    def _complete(self, answers: Any, count: int) -> None:
        if lib.vb_queue_complete(self._c, answers, count) < 0:
            raise AssertionError("a request was answered twice")
        if not self._popping and self.counters_inflight() == 0:
            self._drained.set()

    def counters_inflight(self) -> int:
        """Requests popped and not answered."""
        return int(lib.vb_queue_counters(self._c).inflight)

    # ------------------------------------------------------------------------------- batches on threads of the storage

    def _share_out(self, threads: Threads) -> None:
        """Give every free thread its share of the batch."""
        for share in self._batch.split(threads.limit - self._busy_threads):
            self._busy_threads += 1
            self._on_threads += len(share)
            if not threads.start(self._serve_share, share):
                self._shares.append(share)  # all open
                self._loop.call_soon(self._take_shares)

    def _serve_share(self, share: RingBatch) -> None:
        """On a thread. One wake-up of the loop for all that end before it gets to them."""
        try:
            self._stack.serve(share)
        finally:
            self._shares.append(share)
            self._loop.call_soon_threadsafe(self._take_shares)

    def _take_shares(self) -> None:
        """Answer what the threads have done, begin what they have left open."""
        while self._shares:
            share = self._shares.popleft()
            self._busy_threads -= 1
            self._on_threads -= len(share)
            self._stack.settle(share)
            self._complete(share.answers, share.answered)
            self._begin(share.rest())
        self._look_soon()

    # ------------------------------------------------------------------------------------------------- one request

    async def _execute(self, item: Item) -> None:
        stack = self._stack
        if item.op == lib.VBLK_READ:
            views = self._views(item, writable=True)
            try:
                await stack.read(item.offset, views)
            finally:
                release(views)
        elif item.op == lib.VBLK_WRITE:
            views = self._views(item, writable=False)
            try:
                await stack.write(item.offset, views, fua=bool(item.fua))
            finally:
                release(views)
        elif item.op == lib.VBLK_FLUSH:
            await stack.flush()
        elif item.op in (lib.VBLK_DISCARD, lib.VBLK_WRITE_ZEROES):
            ranges = ffi.cast("struct vblk_range *", item.ranges)
            for i in range(item.range_count):
                if ranges[i].length == 0:
                    continue
                if item.op == lib.VBLK_DISCARD:
                    await stack.discard(ranges[i].offset, ranges[i].length)
                else:
                    await stack.write_zeroes(
                        ranges[i].offset, ranges[i].length, unmap=bool(ranges[i].unmap), fua=bool(item.fua)
                    )
        else:
            raise OSError(errno.EOPNOTSUPP, f"request type {item.op}")

    @staticmethod
    def _views(item: Item, *, writable: bool) -> list[memoryview]:
        return views_of(ffi.cast("struct vb_iov *", item.iov), item.iov_count, writable=writable)
