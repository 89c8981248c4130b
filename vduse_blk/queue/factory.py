"""Which kind of queue serves a stack: decided once, when it is exported, never per request."""

from __future__ import annotations

import asyncio

from vduse_blk.block.contract import BlockInfo
from vduse_blk.block.errors import UserError
from vduse_blk.block.native import FileTarget
from vduse_blk.block.stack import Stack
from vduse_blk.queue.base import DiskRules, Queue
from vduse_blk.queue.native import NativeQueue
from vduse_blk.queue.plugin import PluginQueue
from vduse_blk.queue.policy import NativePolicy


class QueueFactory:
    """Makes the queues of one export of an open ``stack``.

    ``info`` is the disk as the export shows it; the limits are bytes per range and ranges per request; ``path`` "native",
    "plugin", or "auto": native where the stack can be served by C. Made on the event loop, which serves plugin queues.
    """

    def __init__(
        self, stack: Stack, info: BlockInfo, *, path: str, max_discard: int, max_write_zeroes: int, max_ranges: int
    ) -> None:
        """Raises UserError if ``path`` cannot be had."""
        self._stack = stack
        self._loop = asyncio.get_running_loop()
        self._target = None if path == "plugin" else stack.native_target()
        if self._target is None and path == "native":
            raise UserError(
                "path: 'native' is not possible, because this storage is served by Python; "
                "accepted are 'auto' and 'plugin'",
                exit_code=2,
            )
        # Memory and null have no errors.
        temporary = self._target.temporary if isinstance(self._target, FileTarget) else None
        self._policy = None if temporary is None else NativePolicy(stack.patience, temporary)
        self.path = "plugin" if self._target is None else "native"
        self.rules = DiskRules(
            info, max_discard=max_discard, max_write_zeroes=max_write_zeroes, max_ranges=max_ranges
        )

    def make(self, index: int, failing: bool) -> Queue:
        """A queue that is not started. ``failing``: it answers every request with an error. Any thread."""
        if failing:
            return NativeQueue(index, self.rules, None)
        if self._target is not None:
            return NativeQueue(index, self.rules, self._target, policy=self._policy)
        return PluginQueue(index, self.rules, self._stack, self._loop)
