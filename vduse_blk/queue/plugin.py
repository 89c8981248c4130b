"""A virtqueue served by the event loop, for storage that lives in Python.

A kick wakes the loop; one C call pops and parses a batch; each request goes to one of a fixed set of worker tasks, which
awaits the stack; the answers of one turn of the loop are given in one C call that publishes once and notifies at
most once. Guest memory is handed to the stack as memoryviews over the mapping, never copied.

Owners: ``start``, ``stop``, ``set_table``, ``answer_miss`` are the control thread's; everything with an underscore is the
loop's. The C queue object is created before the loop learns of it and freed after the loop has let go of it, so the two
never share it at the same time, but for the atomics of ``set_table``, ``answer_miss`` and ``view``.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import struct
from collections import deque
from collections.abc import Coroutine
from typing import Any, NamedTuple

from vduse_blk.block.errors import Status, status_of
from vduse_blk.block.stack import Stack
from vduse_blk.core._core import ffi, lib
from vduse_blk.queue.base import CoreQueue, DiskRules, QueueSetup
from vduse_blk.queue.iova import IovaMap

log = logging.getLogger("vduse_blk.disk")

_WORKERS = 64  # requests of one queue in Python at a time; the rest waits in the ring
_ITEM = struct.Struct("<HBBIQQQQQ")
assert _ITEM.size == ffi.sizeof("struct vb_item")
_STATUS = {Status.OK: lib.VBLK_S_OK, Status.IOERR: lib.VBLK_S_IOERR, Status.UNSUPP: lib.VBLK_S_UNSUPP}


class _Item(NamedTuple):
    head: int
    op: int
    fua: int
    iov_count: int
    offset: int
    length: int
    iov: int
    ranges: int
    range_count: int


class PluginQueue(CoreQueue):
    """Needs the running ``loop`` on another thread than the one that calls start and stop."""

    def __init__(self, index: int, rules: DiskRules, stack: Stack, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(index, rules)
        self._stack = stack
        self._loop = loop
        self._items = ffi.new("struct vb_item[]", _WORKERS)
        self._answers = ffi.new("struct vb_done[]", _WORKERS)
        self._done: list[tuple[int, int]] = []
        self._idle: deque[asyncio.Future[_Item]] = deque()
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

    def _on_loop(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # -------------------------------------------------------------------------------------------------- the loop

    async def _start(self) -> None:
        self._popping = True
        self._drained.set()
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
        """Pop what the idle workers can take. Runs again by itself until the ring is empty and kicks are on."""
        self._polling = False
        if not self._popping or not self._idle:
            return  # a worker that becomes idle looks again
        count = lib.vb_queue_poll(self._c, self._items, len(self._idle))
        if count == 0:
            return
        self._drained.clear()
        for fields in _ITEM.iter_unpack(ffi.buffer(self._items, count * _ITEM.size)):
            self._idle.popleft().set_result(_Item(*fields))
        self._look_soon()

    def _look_soon(self) -> None:
        if not self._polling:
            self._polling = True
            self._loop.call_soon(self._look)

    async def _work(self) -> None:
        while True:
            slot: asyncio.Future[_Item] = self._loop.create_future()
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
            if not self._answering:
                self._answering = True
                self._loop.call_soon(self._answer)

    def _answer(self) -> None:
        self._answering = False
        done, self._done = self._done, []
        for slot, (head, status) in zip(self._answers, done, strict=False):
            slot.head, slot.status = head, status
        if lib.vb_queue_complete(self._c, self._answers, len(done)) < 0:
            raise AssertionError("a request was answered twice")
        if self.counters_inflight() == 0:
            self._drained.set()
        self._look_soon()

    def counters_inflight(self) -> int:
        """Requests popped and not answered."""
        return int(lib.vb_queue_counters(self._c).inflight)

    async def _execute(self, item: _Item) -> None:
        stack = self._stack
        if item.op == lib.VBLK_READ:
            views = self._views(item)
            try:
                await stack.read(item.offset, views)
            finally:
                _release(views)
        elif item.op == lib.VBLK_WRITE:
            views = [view.toreadonly() for view in self._views(item)]
            try:
                await stack.write(item.offset, views, fua=bool(item.fua))
            finally:
                _release(views)
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
    def _views(item: _Item) -> list[memoryview]:
        iov = ffi.cast("struct vb_iov *", item.iov)
        return [memoryview(ffi.buffer(iov[i].base, iov[i].length)) for i in range(item.iov_count)]


def _release(views: list[memoryview]) -> None:
    """A backend that keeps a view beyond its request would touch another's data; make that an exception.

    A view that is exported further (numpy, a socket's send) cannot be released: then the backend broke the
    contract, and the reference it holds keeps only the view alive, never the mapping.
    """
    for view in views:
        try:
            view.release()
        except BufferError:
            pass
