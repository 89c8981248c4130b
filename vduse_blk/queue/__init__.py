"""Virtqueues of a disk: where the memory is (IovaMap), what a queue needs (QueueSetup), who serves it."""

from vduse_blk.queue.base import DiskRules, Queue, QueueSetup, QueueState, QueueView, inflight_log_bytes
from vduse_blk.queue.factory import QueueFactory
from vduse_blk.queue.inflight import InflightLog
from vduse_blk.queue.iova import FdRange, IovaMap, Region, SharedArea
from vduse_blk.queue.native import NativeQueue
from vduse_blk.queue.plugin import PluginQueue
from vduse_blk.queue.policy import NativePolicy

__all__ = [
    "DiskRules",
    "FdRange",
    "InflightLog",
    "IovaMap",
    "NativePolicy",
    "NativeQueue",
    "PluginQueue",
    "Queue",
    "QueueFactory",
    "QueueSetup",
    "QueueState",
    "QueueView",
    "Region",
    "SharedArea",
    "inflight_log_bytes",
]
