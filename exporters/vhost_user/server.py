"""The thread that owns the socket: accepts or connects, reads messages, lets a ``Session`` obey, answers.

One front-end at a time; others wait in the backlog. When one leaves, its queues are stopped (what it has asked for is
finished first, its memory is ours until then) and the next may come.

Owner of: the listening socket, the connection, the session. Other threads use ``start``, ``stop``, ``config_changed`` and
``describe``. Nothing here waits for a front-end: the connection is non-blocking, and one that does not read its answers
is left.
"""

from __future__ import annotations

import array
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

from vduse_blk.exporters.vhost_user import messages
from vduse_blk.exporters.vhost_user.log import FrontendLog
from vduse_blk.exporters.vhost_user.messages import Assembler, ProtocolError, Refused
from vduse_blk.exporters.vhost_user.session import Reply, Session, Totals

from vduse_blk.block.errors import UserError
from vduse_blk.exporter import HandOver, add_counters, counters_of
from vduse_blk.queue import QueueFactory
from vduse_blk.virtio import VirtioBlkDevice, feature_names

_RECONNECT_SECONDS = 1.0
_MEMORY_GRACE = 0.2
"""Seconds for which a queue waits for memory it does not know: the message that brings it may still be on its way."""


class FrontendServer:
    """Serve ``virtio`` to front-ends. ``listener`` is a bound, listening, non-blocking socket; or ``path`` is where
    a front-end listens. ``on_failure`` is called (from this thread) with a sentence if this thread must end."""

    def __init__(
        self,
        name: str,
        virtio: VirtioBlkDevice,
        factory: QueueFactory,
        on_failure: Callable[[str], None],
        *,
        listener: socket.socket | None = None,
        path: str = "",
    ) -> None:
        self._log = FrontendLog(name)
        self._virtio = virtio
        self._factory = factory
        self._on_failure = on_failure
        self._listener = listener
        self._path = path
        self._totals = Totals()
        self._session: Session | None = None
        self._kept: _Conversation | None = None
        self._resting = False
        self._received = False
        self.peer: int | None = None
        """Process id of the front-end that is connected. Any thread."""
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._config_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------- other threads

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="vhost-user", daemon=True)
        self._thread.start()

    def _end_thread(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            self._thread = None
            os.eventfd_read(self._stop_fd)

    def hold(self, on: bool) -> None:
        """Have the queues begin nothing new, or go on."""
        session = self._session
        for queue in session.running() if session is not None else []:
            queue.hold(on)

    def is_quiet(self) -> bool:
        """They are held and have nothing in flight."""
        session = self._session
        return session is None or all(queue.is_quiet() for queue in session.running())

    def rest(self) -> HandOver:
        """End the thread and stop the queues, but stay connected. Raises UserError; ``resume`` or ``stop`` follows in any
        case."""
        self._resting = True
        self._end_thread()
        facts: dict[str, Any] = {"session": None}
        fds: list[int] = []
        if self._kept is not None:
            self._kept.session.rest()
            if not self._kept.is_between_messages:
                raise UserError("the front-end is in the middle of a message; try again", exit_code=4)
            given = self._kept.session.give()
            facts["session"] = given.facts | {"connection_fd": len(given.fds)}
            fds = [*given.fds, self._kept.connection.fileno()]
        if self._listener is not None:
            facts["listener_fd"] = len(fds)
            fds.append(self._listener.fileno())
        facts["counters"] = self._totals.past  # all of them: no queue runs
        return HandOver(facts, fds)

    def receive(self, handed: HandOver) -> None:
        """Before ``resume``: a session that another server has given. Raises UserError."""
        self._received = True
        self._totals.past.update(counters_of(handed.facts))
        facts = handed.facts["session"]
        if facts is None:
            return
        connection = socket.socket(fileno=os.dup(handed.fds[facts["connection_fd"]]))
        session = Session(self._log, self._virtio, self._factory, self._event_fd, self._totals)
        self._kept = _Conversation(connection, session, self._log)
        self.peer, self._session = _pid_of(connection), session
        try:
            session.take(HandOver(facts, handed.fds))
        except (Refused, ProtocolError) as error:
            raise UserError(str(error), exit_code=1) from error

    def resume(self, factory: QueueFactory, *, touched: bool) -> None:
        """Serve what rests, or was received; of the latter only the queues, until ``attend``: what was read of the front-end
        is lost to the old server. ``touched``: another server may have begun to, and died. Raises UserError if a queue of
        what was received is not served from the storage."""
        self._factory, self._resting = factory, False
        if self._kept is not None:
            if touched and not self._kept.session.has_inflight:
                self._log.error("the front-end is left: nobody knows what the server that died had in flight")
                self._leave(self._kept)
                self._kept = None
            else:
                try:
                    self._kept.session.resume(factory, strict=self._received)
                except OSError as error:
                    raise UserError(f"a queue cannot serve the storage: {error}", exit_code=1) from error
        if not self._received:
            self.attend()

    def attend(self) -> None:
        """The front-end, and whoever connects next, is ours."""
        self._received = False
        self.start()

    def stop(self) -> None:
        """Leave the front-end and stop its queues. The listener stays open; its owner closes it."""
        self._end_thread()
        if self._kept is not None:
            self._leave(self._kept)
            self._kept = None
        for fd in (self._event_fd, self._config_fd, self._stop_fd):
            os.close(fd)

    def config_changed(self) -> None:
        """The configuration space of the device is another now."""
        os.eventfd_write(self._config_fd, 1)

    def describe(self) -> dict[str, Any]:
        """For ``info``: JSON types only."""
        with self._totals.lock:
            session = self._session
            counters = {index: dict(past) for index, past in self._totals.past.items()}
            for running in session.running() if session is not None else []:
                add_counters(counters.setdefault(running.index, {}), running.counters())
        if session is not None:
            negotiated, queues = session.negotiated, session.queue_states()
        else:
            negotiated = 0
            unused = {"size": 0, "ready": False, "state": "unused", "replayed": 0}
            queues = [{"index": index} | unused for index in range(self._virtio.num_queues)]
        return {
            "frontend": self.peer,
            "queues": [queue | {"counters": counters.get(queue["index"], {})} for queue in queues],
            "features_offered": feature_names(self._virtio.offered),
            "features_negotiated": feature_names(negotiated),
            "broken": None,
        }

    # --------------------------------------------------------------------------------------------- this thread

    def _run(self) -> None:
        try:
            while True:
                conversation, self._kept = self._kept, None
                if conversation is None:
                    connection = self._next_front_end()
                    if connection is None:
                        return
                    conversation = self._begin(connection)
                if not self._serve(conversation):
                    return
        except Exception as error:
            self._log.bug("bug while serving front-ends")
            self._on_failure(f"front-ends are served no longer: {error!r}")

    def _next_front_end(self) -> socket.socket | None:
        """None: it is time to end."""
        while True:
            connection = None
            seconds: float | None = _RECONNECT_SECONDS
            poll = select.poll()
            poll.register(self._stop_fd, select.POLLIN)
            try:
                if self._listener is None:
                    connection = self._connect()
                else:
                    connection = self._accept(self._listener)
                    poll.register(self._listener, select.POLLIN)
                    seconds = None
            except OSError as error:  # too many files, say: the listener stays readable, so it must not be waited for
                self._log.error("a front-end cannot be accepted: %s", error)
            if connection is not None:
                connection.setblocking(False)
                return connection
            ready = poll.poll(None if seconds is None else seconds * 1000)
            if any(fd == self._stop_fd for fd, _ in ready):
                return None

    @staticmethod
    def _accept(listener: socket.socket) -> socket.socket | None:
        try:
            return listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._path)
        except OSError as error:
            connection.close()
            self._log.debug("no front-end at %s: %s", self._path, error)
            return None
        return connection

    def _begin(self, connection: socket.socket) -> _Conversation:
        try:
            session = Session(self._log, self._virtio, self._factory, self._event_fd, self._totals)
        except BaseException:
            connection.close()
            raise
        self.peer = _pid_of(connection)
        self._session = session
        self._log.info("front-end connected (process %s)", self.peer)
        return _Conversation(connection, session, self._log)

    def _serve(self, conversation: _Conversation) -> bool:
        """One front-end, to its last message. False: it is time to end."""
        goes_on = True
        try:
            goes_on = conversation.run(self._event_fd, self._config_fd, self._stop_fd)
        except Exception:
            self._log.bug("bug while serving a front-end, which is left")
        if not goes_on and self._resting:
            self._kept = conversation
        else:
            self._leave(conversation)
        return goes_on

    def _leave(self, conversation: _Conversation) -> None:
        try:
            conversation.close()
        finally:
            self._session = None
            self.peer = None
        if not self._resting:
            self._log.info("front-end gone")


class _Conversation:
    """The messages of one connection."""

    def __init__(self, connection: socket.socket, session: Session, log: FrontendLog) -> None:
        self.connection = connection
        self.session = session
        self._log = log
        self._assembler = Assembler()
        self._fds: list[int] = []
        """Came with the bytes of the present message."""

    def run(self, event_fd: int, config_fd: int, stop_fd: int) -> bool:
        poll = select.poll()
        for fd in (self.connection.fileno(), event_fd, config_fd, stop_fd):
            poll.register(fd, select.POLLIN)
        waiting = False
        try:
            while True:
                ready = {fd for fd, _ in poll.poll(_MEMORY_GRACE * 1000 if waiting else None)}
                if stop_fd in ready:
                    return False
                if config_fd in ready:
                    os.eventfd_read(config_fd)
                    self.session.config_changed()
                if event_fd in ready:
                    os.eventfd_read(event_fd)
                if self.connection.fileno() in ready:
                    # The memory a queue asks for was announced before it was used: messages first.
                    if not self._read():
                        return True
                    waiting = self.session.look_at_queues(memory_may_come=True)
                elif event_fd in ready:
                    waiting = self.session.look_at_queues(memory_may_come=True)
                elif not ready:
                    waiting = self.session.look_at_queues(memory_may_come=False)
        except (ProtocolError, Refused) as error:
            self._log.error("the front-end is left: %s", error)
        except OSError as error:
            self._log.error("the front-end is lost: %s", error)
        return True

    @property
    def is_between_messages(self) -> bool:
        return self._assembler.idle and not self._fds

    def close(self) -> None:
        """Stop what the session runs, and leave the front-end."""
        self._close_fds()
        try:
            self.session.close()
        finally:
            self.connection.close()

    def _read(self) -> bool:
        """Take in what is there of the present message. False: the front-end has left."""
        try:
            data, ancillary, flags, _ = self.connection.recvmsg(
                self._assembler.wanted, socket.CMSG_SPACE(messages.MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) // 4 * 4])
                self._fds += fds
        if len(self._fds) > messages.MAX_FDS:
            raise ProtocolError(f"more than {messages.MAX_FDS} descriptors with one message")
        if not data:
            if not self._assembler.idle:
                self._log.error("the front-end left in the middle of a message")
            return False
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"more than {messages.MAX_FDS} descriptors, or more than we may have open")
        complete = self._assembler.feed(data)
        if complete is not None:
            self._obey(*complete)
        return True

    def _obey(self, number: int, flags: int, payload: bytes) -> None:
        message = messages.decode(number, flags, payload, len(self._fds))
        self._log.debug("%s", message)
        try:
            reply = self.session.handle(message, self._fds)
        except Refused as error:
            reply = self.session.refusal(message)
            if reply is None:
                raise
            self._log.warning("%s refused: %s", message.request.name, error)
        self._close_fds()
        if reply is not None:
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        ancillary = [] if reply.fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reply.fd]))]
        try:
            if self.connection.sendmsg([reply.data], ancillary, socket.MSG_NOSIGNAL) != len(reply.data):
                raise ProtocolError("it does not read its answers")
        finally:
            if reply.fd is not None:
                os.close(reply.fd)

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _pid_of(connection: socket.socket) -> int | None:
    """Process id at the other end, as the kernel recorded it; None: in another pid namespace."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], "little") or None
