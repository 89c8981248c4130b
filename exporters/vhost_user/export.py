"""The Exporter: the socket, and the server behind it.

A socket that a dead server left is replaced; one behind which somebody listens is not. The file is made under a name of
its own, gets its owner and mode, and then its final name: whoever sees it can connect to it, if he may.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import socket
import stat
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vduse_blk.exporters.vhost_user.server import FrontendServer

from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.errors import UserError
from vduse_blk.block.holders import Holder
from vduse_blk.block.options import about
from vduse_blk.block.stack import Stack
from vduse_blk.exporter import CommonOptions, Endpoint, Exporter, ExportOptions, HandOver
from vduse_blk.queue import QueueFactory
from vduse_blk.virtio import VirtioBlkDevice

_QUEUES_DEFAULT = 64
"""The front-end chooses how many of them it uses; the others cost nothing."""
_SEG_MAX_QUEUE = 128
"""The number of segments is promised for the smallest queue in common use, QEMU's default: the size of the real one is the
front-end's choice, and comes later."""
_PATH_MAX = 107  # sizeof(sockaddr_un.sun_path) - 1 for the terminating NUL
_BACKLOG = 4


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What may stand behind ``vhost-user:``."""

    path: str = field(metadata=about("path of the socket", place=True))
    client: bool = field(default=False, metadata=about("connect to a front-end that listens there, again and again"))
    group: str | None = field(default=None, metadata=about("group whose members may connect, too"))


class VhostUserExporter(Exporter):
    """The disk as a vhost-user-blk device behind a unix socket."""

    Options = Options
    hands_over = True

    def __init__(self, stack: Stack, name: str, options: ExportOptions) -> None:
        super().__init__(stack, name, options)
        self._own: Options = options.own
        self._undo = AsyncExitStack()
        self._server: FrontendServer | None = None
        self._listener_is_ours = True
        self.queue_count = options.queues or _QUEUES_DEFAULT
        self._virtio = VirtioBlkDevice(
            self.info,
            num_queues=self.queue_count,
            queue_size=min(options.queue_size, _SEG_MAX_QUEUE),
            transport=0,
            config_wce=True,
        )
        self._factory = self._make_factory()
        self.path = self._factory.path
        if len(os.fsencode(self._own.path)) > _PATH_MAX:
            raise UserError(f"path: {self._own.path} is longer than the {_PATH_MAX} bytes of a socket's path")

    def _make_factory(self) -> QueueFactory:
        limits = self._virtio.limits
        return QueueFactory(
            self.stack,
            self.info,
            path=self.options.path,
            max_discard=limits.max_discard,
            max_write_zeroes=limits.max_write_zeroes,
            max_ranges=limits.max_ranges,
        )

    async def start(self) -> Endpoint:
        path = self._own.path
        listener = None
        try:
            if not self._own.client:
                listener = self._listen(path)
            self._server = FrontendServer(
                self.name, self._virtio, self._factory, self.fail, listener=listener, path=path
            )
        except BaseException:
            await self._undo.aclose()
            raise
        self._server.start()
        self._undo.push_async_callback(asyncio.to_thread, self._server.stop)
        return Endpoint("socket", path)

    def hold(self, on: bool) -> None:
        assert self._server is not None
        self._server.hold(on)

    def is_quiet(self) -> bool:
        assert self._server is not None
        return self._server.is_quiet()

    async def hand_over(self) -> HandOver:
        assert self._server is not None
        return await asyncio.to_thread(self._server.rest)

    async def receive(self, handed: HandOver) -> None:
        path, listener = self._own.path, None
        if "listener_fd" in handed.facts:
            listener = socket.socket(fileno=os.dup(handed.fds[handed.facts["listener_fd"]]))
            self._keep(listener)
        self._server = FrontendServer(self.name, self._virtio, self._factory, self.fail, listener=listener, path=path)
        self._undo.push_async_callback(asyncio.to_thread, self._server.stop)
        self._server.receive(handed)
        for fd in handed.fds:
            os.close(fd)

    async def resume(self, stack: Stack, *, touched: bool = False) -> Endpoint:
        assert self._server is not None
        if stack is not self.stack:
            self.stack = stack
            self._factory = self._make_factory()
        await asyncio.to_thread(self._server.resume, self._factory, touched=touched)
        return Endpoint("socket", self._own.path)

    def attend(self) -> None:
        assert self._server is not None
        self._server.attend()

    async def release(self) -> None:
        self._listener_is_ours = False
        await self.stop()

    async def resized(self, info: BlockInfo) -> None:
        assert self._server is not None
        self._factory.rules.set_capacity(info.size)
        self._virtio.resize(self.info)
        self._server.config_changed()

    async def stop(self) -> None:
        undo, self._undo = self._undo.pop_all(), AsyncExitStack()
        await undo.aclose()

    def users(self) -> list[Holder]:
        pid = self._server.peer if self._server is not None else None
        if pid is None:
            return []
        try:
            command = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            command = "unknown"
        return [Holder("open", command, pid)]

    def status(self) -> dict[str, Any]:
        assert self._server is not None
        return {"device": self._own.path, "path": self.path, **self._server.describe()}

    def _listen(self, path: str) -> socket.socket:
        """Raises UserError. The file goes first when the export stops."""
        _check_free(path)
        group = _group_id(self._own.group)
        temporary = os.path.join(os.path.dirname(path), f".{os.urandom(4).hex()}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.bind(temporary)
            try:
                os.chmod(temporary, 0o600 if group is None else 0o660)
                if group is not None:
                    os.chown(temporary, -1, group)
                listener.listen(_BACKLOG)
                os.rename(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            listener.close()
            denied = error.errno in (errno.EPERM, errno.EACCES)
            raise UserError(f"path: no socket can be made at {path}: {error.strerror}", 5 if denied else 2) from error
        self._keep(listener)
        return listener

    def _keep(self, listener: socket.socket) -> None:
        """Until the export stops; then the file goes first, unless it is another server's by then."""
        try:
            self._undo.callback(self._unlink, os.stat(self._own.path).st_ino)
        except FileNotFoundError:
            pass  # somebody has removed the file of a socket that was handed over
        self._undo.callback(listener.close)

    def _unlink(self, inode: int) -> None:
        if self._listener_is_ours:
            _unlink(self._own.path, inode)


def remove_leftover(own: Options) -> None:
    """Remove the socket of a server that is dead; not one behind which somebody listens."""
    if own.client:
        return
    try:
        _check_free(own.path)
        os.unlink(own.path)
    except (UserError, FileNotFoundError):
        pass


def _check_free(path: str) -> None:
    """Nothing is there, or the socket of somebody who is gone. Raises UserError."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"path: {path} cannot be used: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise UserError(f"path: {path} exists and is no socket; choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError:
            pass  # EAGAIN: somebody listens, and is busy
    raise UserError(f"path: somebody listens at {path} already; choose another", exit_code=4)


def _unlink(path: str, inode: int) -> None:
    """Remove our socket file, not one that has taken its place since."""
    try:
        if os.stat(path, follow_symlinks=False).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UserError(f"group: '{name}' does not exist on this host") from None
