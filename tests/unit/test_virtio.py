"""The virtio-blk device without I/O: features, configuration space, what a driver may choose."""

from __future__ import annotations

import struct

import pytest

from vduse_blk.block.contract import BlockInfo, Support
from vduse_blk.virtio import Feature, VirtioBlkDevice, feature_names

GIB = 1 << 30
PLATFORM = Feature.ACCESS_PLATFORM.mask
FULL = BlockInfo(
    size=GIB,
    logical_block_size=512,
    physical_block_size=4096,
    optimal_io_size=65536,
    volatile_cache=True,
    discard=Support.NATIVE,
    write_zeroes=Support.EMULATE,
)


def device(info: BlockInfo = FULL, num_queues: int = 4, queue_size: int = 256) -> VirtioBlkDevice:
    return VirtioBlkDevice(info, num_queues=num_queues, queue_size=queue_size, transport=PLATFORM)


def offers(info: BlockInfo, feature: Feature, num_queues: int = 4) -> bool:
    return bool(device(info, num_queues).offered & feature.mask)


def changed(**changes: object) -> BlockInfo:
    values = {name: getattr(FULL, name) for name in FULL.__dataclass_fields__}
    return BlockInfo(**(values | changes))  # type: ignore[arg-type]


def test_config_space_fields_are_where_the_specification_has_them() -> None:
    """5.2.4: capacity in sectors, sizes in blocks, limits in sectors."""
    config = device().config()
    assert struct.unpack_from("<Q", config, 0) == (GIB // 512,)
    assert struct.unpack_from("<II", config, 8) == (0, 254)
    assert struct.unpack_from("<I", config, 20) == (512,)
    assert struct.unpack_from("<BBHI", config, 24) == (3, 0, 8, 128)
    assert struct.unpack_from("<H", config, 34) == (4,)
    assert struct.unpack_from("<III", config, 36) == ((256 << 20) // 512, 32, 8)
    assert struct.unpack_from("<IIB", config, 48) == ((32 << 20) // 512, 1, 1)
    assert len(config) == 60


def test_a_small_ring_accepts_fewer_segments() -> None:
    """A chain without indirect table must fit: header and status need two entries."""
    assert [device(queue_size=size).limits.seg_max for size in (4, 64, 256, 1024)] == [2, 62, 254, 254]


@pytest.mark.parametrize(
    ("feature", "without"),
    [
        (Feature.FLUSH, changed(volatile_cache=False)),
        (Feature.DISCARD, changed(discard=Support.NONE)),
        (Feature.WRITE_ZEROES, changed(write_zeroes=Support.NONE)),
        (Feature.DISCARD, changed(read_only=True)),
        (Feature.WRITE_ZEROES, changed(read_only=True)),
    ],
)
def test_features_follow_the_storage(feature: Feature, without: BlockInfo) -> None:
    """What the storage cannot do is not offered, and its limits are zero."""
    assert offers(FULL, feature)
    assert not offers(without, feature)


def test_one_queue_needs_no_mq_and_a_read_only_disk_says_so() -> None:
    """MQ only with several queues; RO only when read-only."""
    assert not offers(FULL, Feature.MQ, num_queues=1)
    assert offers(FULL, Feature.MQ, num_queues=2)
    assert offers(changed(read_only=True), Feature.RO)
    assert not offers(FULL, Feature.RO)


def test_features_that_are_never_offered() -> None:
    """CONFIG_WCE is forbidden by VDUSE, SECURE_ERASE broken over it, NOTIFICATION_DATA and IN_ORDER not ours."""
    assert not device().offered & (1 << 11 | 1 << 16 | 1 << 38 | 1 << 35)


def test_what_a_driver_may_choose() -> None:
    """Everything offered is fine; an unoffered bit, no VERSION_1, or no FLUSH over a volatile cache is refused."""
    d = device()
    assert d.refusal(d.offered) is None
    assert d.refusal(Feature.VERSION_1.mask | PLATFORM | Feature.FLUSH.mask) is None
    assert "not offered" in str(d.refusal(d.offered | 1 << 38))
    assert "VERSION_1" in str(d.refusal(d.offered & ~Feature.VERSION_1.mask))
    assert "ACCESS_PLATFORM" in str(d.refusal(d.offered & ~PLATFORM))
    assert "flush" in str(d.refusal(d.offered & ~Feature.FLUSH.mask))
    assert device(changed(volatile_cache=False)).refusal(Feature.VERSION_1.mask | PLATFORM) is None


def test_resize_changes_the_capacity_only() -> None:
    """The driver re-reads nothing else."""
    d = device()
    before = d.config()
    assert d.resize(changed(size=2 * GIB)) == struct.pack("<Q", 2 * GIB // 512)
    assert d.config()[8:] == before[8:]


def test_names() -> None:
    """Known bits by name, others by number."""
    assert feature_names(Feature.VERSION_1.mask | 1 << 50) == ["VERSION_1", "bit 50"]
