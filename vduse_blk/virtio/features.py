"""The feature table of virtio-blk and of the transport bits it uses (virtio 1.3, 5.2.3 and 6)."""

from __future__ import annotations

import enum


class Feature(enum.IntEnum):
    """Bit numbers. Absent on purpose: SECURE_ERASE (Linux maps its range list device-writable, so over VDUSE the device
    would read another request's bytes as ranges), NOTIFICATION_DATA (VDUSE cannot carry it), IN_ORDER (requests complete out
    of order)."""

    SEG_MAX = 2
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11  # only where the transport lets the driver write to the configuration space; VDUSE does not
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33

    @property
    def mask(self) -> int:
        return 1 << self.value


def feature_names(bits: int) -> list[str]:
    """Names of the bits that are set, lowest first; a bit this program does not know is ``bit N``."""
    known = {feature.value: feature.name for feature in Feature}
    return [known.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]
