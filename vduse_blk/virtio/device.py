"""A virtio-blk device as pure state: features, configuration space, limits, size. Shared by all virtio exports."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vduse_blk.block.contract import BlockInfo, Support
from vduse_blk.virtio.features import Feature, feature_names

SECTOR = 512
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")  # struct virtio_blk_config up to write_zeroes_may_unmap, 60 bytes
assert _CONFIG.size == 60

CONFIG_WCE_OFFSET = 32
"""Of the byte ``wce`` in the configuration space, the only one a driver may write."""
_SEG_MAX = 254  # 1 MiB of scattered 4 KiB pages in one request, and what a queue of 256 holds without indirect tables
_MAX_DISCARD = 256 << 20
_MAX_WRITE_ZEROES = 32 << 20  # may have to be written out
_MAX_RANGES = 32

REQUIRED = Feature.VERSION_1.mask | Feature.ACCESS_PLATFORM.mask


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device promises to accept: ``seg_max`` data segments per request; per discard or write-zeroes request
    ``max_ranges`` ranges of at most ``max_discard`` or ``max_write_zeroes`` bytes."""

    seg_max: int
    max_discard: int
    max_write_zeroes: int
    max_ranges: int


class VirtioBlkDevice:
    """``info`` is the disk, ``num_queues`` and ``queue_size`` (entries) its virtqueues, ``transport`` the feature bits
    the export adds (for VDUSE ACCESS_PLATFORM), ``config_wce`` whether the driver can write to the configuration space and
    so choose between write-back and write-through."""

    def __init__(
        self, info: BlockInfo, *, num_queues: int, queue_size: int, transport: int, config_wce: bool = False
    ) -> None:
        self.info = info
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.writeback = True
        """The driver's choice, the byte ``wce``; it counts if CONFIG_WCE was negotiated."""
        self._transport = transport
        self._config_wce = config_wce
        self.limits = Limits(
            seg_max=max(1, min(_SEG_MAX, queue_size - 2)),
            max_discard=_MAX_DISCARD,
            max_write_zeroes=_MAX_WRITE_ZEROES,
            max_ranges=_MAX_RANGES,
        )

    @property
    def offered(self) -> int:
        """Device features."""
        info = self.info
        offers = {
            Feature.SEG_MAX: True,
            Feature.RO: info.read_only,
            Feature.BLK_SIZE: True,
            Feature.FLUSH: info.volatile_cache,
            Feature.TOPOLOGY: True,
            Feature.CONFIG_WCE: self._config_wce and info.volatile_cache and not info.read_only,
            Feature.MQ: self.num_queues > 1,
            Feature.DISCARD: info.discard is not Support.NONE and not info.read_only,
            Feature.WRITE_ZEROES: info.write_zeroes is not Support.NONE and not info.read_only,
            Feature.INDIRECT_DESC: True,
            Feature.EVENT_IDX: True,
            Feature.VERSION_1: True,
        }
        return self._transport | sum(feature.mask for feature, offered in offers.items() if offered)

    def refusal(self, driver_features: int) -> str | None:
        """Why FEATURES_OK must be refused, or None."""
        unknown = driver_features & ~self.offered
        if unknown:
            return f"the driver accepted features that were not offered: {', '.join(feature_names(unknown))}"
        missing = (Feature.VERSION_1.mask | self._transport) & ~driver_features
        if missing:
            return f"the driver lacks {', '.join(feature_names(missing))}"
        if self.info.volatile_cache and not driver_features & Feature.FLUSH.mask:
            # 5.2.5: without FLUSH the driver takes every completed write as durable, which it would not be.
            return "the driver cannot flush and the storage has a volatile cache"
        return None

    def config(self) -> bytes:
        """The configuration space (5.2.4)."""
        info = self.info
        block = info.logical_block_size
        physical = max(info.physical_block_size, block)
        discards = bool(self.offered & Feature.DISCARD.mask)
        zeroes = bool(self.offered & Feature.WRITE_ZEROES.mask)
        return _CONFIG.pack(
            info.size // SECTOR,
            0,  # size_max: not offered
            self.limits.seg_max,
            0,  # geometry: not offered
            0,
            0,
            block,
            (physical // block).bit_length() - 1,
            0,  # alignment_offset
            min(physical // block, 0xFFFF),  # min_io_size
            info.optimal_io_size // block,
            int(bool(self.offered & Feature.CONFIG_WCE.mask) and self.writeback),
            0,
            self.num_queues,
            self.limits.max_discard // SECTOR if discards else 0,
            self.limits.max_ranges if discards else 0,
            physical // SECTOR if discards else 0,
            self.limits.max_write_zeroes // SECTOR if zeroes else 0,
            1 if zeroes else 0,  # max_write_zeroes_seg: Linux sends one range
            1 if zeroes else 0,  # may_unmap
        )

    def is_writethrough(self, driver_features: int) -> bool:
        """Whether the driver takes every completed write as durable (5.2.5.2), and the storage does not make it so."""
        if not self.info.volatile_cache:
            return False
        if driver_features & Feature.CONFIG_WCE.mask:
            return not self.writeback
        return not driver_features & Feature.FLUSH.mask

    def resize(self, info: BlockInfo) -> bytes:
        """Take the new size; returns the bytes at offset 0 of the configuration space that change."""
        self.info = info
        return self.config()[:8]
