"""The specification of one disk: what ``attach`` tells the server that is to serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from vduse_blk.block.errors import UserError
from vduse_blk.block.policy import Policy
from vduse_blk.control.errors import Exit, unusable
from vduse_blk.control.rundir import check_name

PATHS: Final = ("auto", "native", "plugin")
RESTARTS: Final = ("no", "on-failure")
BLOCK_SIZES: Final = (512, 1024, 2048, 4096)
MIN_QUEUE_SIZE: Final = 4  # header, one data segment, status, and one to spare, as one chain without indirect
MAX_QUEUE_SIZE: Final = 32768  # virtio 1.2, 2.7: the largest split queue
MAX_QUEUES: Final = 64
MAX_SERIAL: Final = 20  # VIRTIO_BLK_ID_BYTES
MAX_TIMEOUT: Final = 1e6
"""Seconds, eleven days. The system calls that wait take milliseconds in 32 bits, or refuse infinity."""
TIMEOUT_RULE: Final = f"positive numbers of seconds up to {MAX_TIMEOUT:.0f}"


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a server needs to know to serve one disk. Construction checks every field (``UserError``,
    exit 2)."""

    name: str
    source: str
    """As the user wrote it, except that a relative path was made absolute (a server's working directory is
    ``/``)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the backend beyond those in ``source``."""
    read_only: bool = False
    queues: int | None = None
    """None: the export's own choice; for VDUSE as many as the host has CPUs, at most 8."""
    queue_size: int = 256
    """Descriptors per queue."""
    serial: str | None = None
    """None: the server chooses."""
    block_size: int | None = None
    """Logical block size in bytes; None: the storage's own."""
    size: int | None = None
    """Bytes; None: the storage's own."""
    path: str = "auto"
    """Who serves requests: ``native`` (C), ``plugin`` (asyncio), or ``auto``: native where the storage
    can."""
    ready_fd: int | None = None
    """Inherited pipe for the one line that says how the start went; None: nobody waits (``serve``)."""
    exports: tuple[str, ...] = ("vduse",)
    """Ways to present the disk, as ``vduse_blk.exports`` understands them."""
    timeout: float | None = None
    """Seconds after which whoever waits gives up; None: nobody does."""
    on_error: str | None = None
    """What becomes of requests with temporary errors, as ``vduse_blk.block.policy`` has it; None: the storage's default."""
    on_full: str = "fail"
    """The same for lack of space."""
    filters: tuple[str, ...] = ()
    """Layers over the storage, the lowest first, as ``vduse_blk.source.parse_filter`` understands them."""
    restart: str = "no"
    """``on-failure``: a monitor starts a server that dies again."""
    upgrade_fd: int | None = None
    """Inherited socket on which the server that serves the disk hands it over (``vduse_blk.worker.handover``)."""
    directory_fd: int | None = None
    """Inherited descriptor of the disk's directory, without which there is nothing to serve any more; None: it is made."""

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        check_name(self.name)
        if not self.source:
            raise UserError("source: must not be empty", Exit.USAGE)
        if self.queues is not None and not 1 <= self.queues <= MAX_QUEUES:
            raise unusable("queues", self.queues, f"1 to {MAX_QUEUES}")
        if not MIN_QUEUE_SIZE <= self.queue_size <= MAX_QUEUE_SIZE or self.queue_size & (self.queue_size - 1):
            raise unusable("queue-size", self.queue_size, f"powers of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}")
        if self.serial is not None and not (
            self.serial.isascii() and self.serial.isprintable() and 1 <= len(self.serial) <= MAX_SERIAL
        ):
            raise unusable("serial", self.serial, f"1 to {MAX_SERIAL} printable ASCII characters")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise unusable("block-size", self.block_size, ", ".join(map(str, BLOCK_SIZES)))
        unit = self.block_size or BLOCK_SIZES[0]
        if self.size is not None and (self.size <= 0 or self.size % unit):
            raise unusable("size", self.size, f"positive multiples of the block size, {unit} bytes")
        if not self.exports or not all(isinstance(export, str) and export for export in self.exports):
            raise unusable("exports", self.exports, "lists of at least one way to present the disk")
        if not all(isinstance(text, str) and text for text in self.filters):
            raise unusable("filters", self.filters, "lists of filters")
        Policy.parse("fail" if self.on_error is None else self.on_error, self.on_full)
        if self.path not in PATHS:
            raise unusable("path", self.path, ", ".join(PATHS))
        if self.restart not in RESTARTS:
            raise unusable("restart", self.restart, ", ".join(RESTARTS))
        if self.timeout is not None and not 0 < self.timeout <= MAX_TIMEOUT:
            raise unusable("timeout", self.timeout, TIMEOUT_RULE)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerSpec:
        """Decode and check. Raises ``UserError`` (exit 2) naming the key that is wrong, missing or
        unknown."""
        try:
            decoded = json.loads(text)
        except ValueError as e:
            raise UserError(f"the disk's specification is not JSON: {e}", Exit.USAGE) from e
        if not isinstance(decoded, dict):
            raise UserError("the disk's specification is not a JSON object", Exit.USAGE)
        known = {f.name for f in fields(cls)}
        unknown = sorted(decoded.keys() - known)
        if unknown:
            raise UserError(
                f"{unknown[0]}: unknown key in the disk's specification; accepted are " + ", ".join(sorted(known)),
                Exit.USAGE,
            )
        for key in ("name", "source"):
            if key not in decoded:
                raise UserError(f"{key}: missing in the disk's specification", Exit.USAGE)
        for key in ("exports", "filters"):
            if isinstance(decoded.get(key), list):
                decoded[key] = tuple(decoded[key])
        return cls(**decoded)


_SPEC_TYPES: Final[Mapping[str, tuple[type, bool]]] = {  # key → (type, may be null)
    "name": (str, False),
    "source": (str, False),
    "options": (dict, False),
    "read_only": (bool, False),
    "queues": (int, True),
    "queue_size": (int, False),
    "serial": (str, True),
    "block_size": (int, True),
    "size": (int, True),
    "path": (str, False),
    "ready_fd": (int, True),
    "exports": (tuple, False),
    "timeout": (float, True),
    "on_error": (str, True),
    "on_full": (str, False),
    "filters": (tuple, False),
    "restart": (str, False),
    "upgrade_fd": (int, True),
    "directory_fd": (int, True),
}


def _check_type(key: str, value: object) -> None:
    wanted, optional = _SPEC_TYPES[key]
    if value is None and optional:
        return
    accepted = (int, float) if wanted is float else wanted
    if not isinstance(value, accepted) or (wanted is not bool and isinstance(value, bool)):
        raise unusable(key, value, f"values of type {wanted.__name__}")
