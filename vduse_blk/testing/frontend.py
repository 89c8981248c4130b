"""A vhost-user front-end: what a virtual machine monitor would do, one message at a time, over a real socket.

The queues are ``FakeDriver``s whose memory is a shared file. Everything is written here a second time, from the
specification, so that the back-end's codec is not its own judge; only the names of the messages are shared. The front-end
can also send what no sane one does: ``send_raw``.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vduse_blk.exporters.vhost_user.messages import ProtocolFeature, Request
from vduse_blk.testing.driver import FakeDriver
from vduse_blk.virtio import Feature

_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8
_HEADER = struct.Struct("=III")
_PROTOCOL_FEATURES = 1 << 30
LOG_ALL = 1 << 26
USER_OFFSET = 0x7F0000000000
"""User address minus guest address: they differ, as in a real front-end, and nobody may take one for the other."""


class GuestMemory:
    """A region: ``length`` bytes at guest address ``base``, in a file that others can map."""

    def __init__(self, base: int, length: int = 16 << 20, *, offset: int = 0) -> None:
        """``offset``: where in the file the region begins."""
        self.base, self.length, self.offset = base, length, offset
        self.user = base + USER_OFFSET
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.fd, offset + length)

    def map(self) -> mmap.mmap:
        page = mmap.PAGESIZE
        assert self.offset % page == 0
        return mmap.mmap(self.fd, self.length, offset=self.offset)

    def wire(self) -> bytes:
        """As in memory messages."""
        return struct.pack("=QQQQ", self.base, self.length, self.user, self.offset)

    def close(self) -> None:
        os.close(self.fd)


class FrontendQueue(FakeDriver):
    """A queue whose ring and data lie in ``region``."""

    def __init__(self, region: GuestMemory, num: int = 64, **options: Any) -> None:
        super().__init__(num, memory=region.map(), base=region.base, **options)
        self.region = region

    def close(self) -> None:
        super().close()
        self.region.close()


class FakeFrontend:
    """One connection. Questions wait at most ``timeout`` seconds for their answer."""

    def __init__(self, connection: socket.socket, timeout: float = 20.0) -> None:
        self.connection = connection
        connection.settimeout(timeout)
        self.protocol = 0
        self.features = 0
        self.backend: socket.socket | None = None
        """Where the back-end's own messages arrive."""

    @classmethod
    def connect(cls, path: str | Path, *, patience: float = 10.0) -> FakeFrontend:
        """Connect to a back-end, which may be about to listen."""
        deadline = time.monotonic() + patience
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                connection.connect(str(path))
                return cls(connection)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        self.connection.close()
        if self.backend is not None:
            self.backend.close()

    # ---- messages ----

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.connection.sendmsg([data], ancillary)

    def send(self, request: Request | int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> None:
        self.send_raw(_HEADER.pack(request, flags | _VERSION, len(payload)) + payload, fds)

    def receive(self) -> tuple[int, bytes, list[int]]:
        """(request, payload, descriptors) of a reply. Raises EOFError when the back-end has left."""
        fds: list[int] = []
        header = self._exactly(_HEADER.size, fds)
        request, flags, size = _HEADER.unpack(header)
        assert flags == _VERSION | _REPLY, f"a reply with flags {flags:#x}"
        return request, self._exactly(size, fds), fds

    def _exactly(self, length: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < length:
            more, ancillary, _, _ = self.connection.recvmsg(length - len(data), socket.CMSG_SPACE(32))
            for _, _, content in ancillary:
                fds += array.array("i", content)
            if not more:
                raise EOFError("the back-end has left")
            data += more
        return data

    def ask(self, request: Request, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """A message that has an answer of its own."""
        self.send(request, payload)
        answered, reply, fds = self.receive()
        assert answered == request, f"{Request(answered).name} answers {request.name}"
        return reply, fds

    def ask_number(self, request: Request) -> int:
        reply, _ = self.ask(request)
        return int(struct.unpack("=Q", reply)[0])

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A message without an answer of its own; with REPLY_ACK, the acknowledgement (0 is yes), else 0."""
        if not self.protocol & ProtocolFeature.REPLY_ACK.mask:
            self.send(request, payload, fds)
            return 0
        self.send(request, payload, fds, flags=_NEED_REPLY)
        answered, reply, _ = self.receive()
        assert answered == request
        return int(struct.unpack("=Q", reply)[0])

    def gone(self) -> bool:
        """Wait for the back-end to leave; False: it says something, or stays."""
        try:
            return self.connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    # ---- conversations ----

    def negotiate(
        self, *, protocol: int | None = None, without: Sequence[Feature] = (), protocol_features: bool = True
    ) -> None:
        """Take everything that is offered, but dirty logging and ``without``; of the protocol features, ``protocol``."""
        offered = self.ask_number(Request.GET_FEATURES)
        self.features = offered & ~LOG_ALL & ~sum(feature.mask for feature in without)
        if protocol_features and offered & _PROTOCOL_FEATURES:
            offered_protocol = self.ask_number(Request.GET_PROTOCOL_FEATURES)
            wanted = offered_protocol if protocol is None else protocol & offered_protocol
            self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", wanted))
            self.protocol = wanted
        else:
            self.features &= ~_PROTOCOL_FEATURES
        assert self.tell(Request.SET_OWNER) == 0
        if self.protocol & ProtocolFeature.BACKEND_REQ.mask:
            ours, theirs = socket.socketpair()
            with theirs:
                assert self.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
            ours.settimeout(20)
            self.backend = ours
        self.set_features(self.features)

    def set_features(self, features: int) -> int:
        self.features = features
        return self.tell(Request.SET_FEATURES, struct.pack("=Q", features))

    def set_memory(self, *regions: GuestMemory) -> int:
        """The whole table at once."""
        payload = struct.pack("=II", len(regions), 0) + b"".join(region.wire() for region in regions)
        return self.tell(Request.SET_MEM_TABLE, payload, [region.fd for region in regions])

    def add_memory(self, region: GuestMemory) -> int:
        return self.tell(Request.ADD_MEM_REG, bytes(8) + region.wire(), [region.fd])

    def remove_memory(self, region: GuestMemory) -> int:
        return self.tell(Request.REM_MEM_REG, bytes(8) + region.wire())

    def set_kick(self, index: int, fd: int | None) -> int:
        return self._vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_call(self, index: int, fd: int | None) -> int:
        return self._vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_err(self, index: int, fd: int | None) -> int:
        return self._vring_fd(Request.SET_VRING_ERR, index, fd)

    def _vring_fd(self, request: Request, index: int, fd: int | None) -> int:
        flag = 0 if fd is not None else 1 << 8
        return self.tell(request, struct.pack("=Q", index | flag), [] if fd is None else [fd])

    def set_num(self, index: int, num: int) -> int:
        return self.tell(Request.SET_VRING_NUM, struct.pack("=II", index, num))

    def set_base(self, index: int, base: int) -> int:
        return self.tell(Request.SET_VRING_BASE, struct.pack("=II", index, base))

    def set_addr(self, index: int, queue: FakeDriver, *, flags: int = 0) -> int:
        user = USER_OFFSET
        payload = struct.pack(
            "=IIQQQQ", index, flags, queue.desc + user, queue.used + user, queue.avail + user, queue.used
        )
        return self.tell(Request.SET_VRING_ADDR, payload)

    def enable(self, index: int, on: bool = True) -> int:
        return self.tell(Request.SET_VRING_ENABLE, struct.pack("=II", index, int(on)))

    def start_queue(self, index: int, queue: FakeDriver, *, base: int = 0) -> None:
        """In the order of QEMU."""
        assert self.set_num(index, queue.num) == 0
        assert self.set_base(index, base) == 0
        assert self.set_addr(index, queue) == 0
        assert self.set_kick(index, queue.kick_fd) == 0
        assert self.set_call(index, queue.call_fd) == 0
        if self.features & _PROTOCOL_FEATURES:
            assert self.enable(index) == 0

    def stop_queue(self, index: int) -> int:
        """Returns the next avail index."""
        reply, _ = self.ask(Request.GET_VRING_BASE, struct.pack("=II", index, 0))
        stopped, base = struct.unpack("=II", reply)
        assert stopped == index
        return int(base)

    def config(self, offset: int = 0, size: int = 60) -> bytes:
        """Bytes of the configuration space."""
        reply, _ = self.ask(Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
        assert struct.unpack_from("=III", reply) == (offset, len(reply) - 12, 0)
        return reply[12:]

    def set_config(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        return self.tell(Request.SET_CONFIG, struct.pack("=III", offset, len(data), flags) + data)

    def capacity(self) -> int:
        """Size of the disk in bytes, as the configuration space has it."""
        return int(struct.unpack("=Q", self.config(0, 8))[0]) * 512

    def backend_message(self) -> int:
        """Wait for a message of the back-end's own; returns its number."""
        assert self.backend is not None
        request, flags, size = _HEADER.unpack(self.backend.recv(_HEADER.size, socket.MSG_WAITALL))
        assert flags & ~_NEED_REPLY == _VERSION
        if size:
            self.backend.recv(size, socket.MSG_WAITALL)
        return int(request)
