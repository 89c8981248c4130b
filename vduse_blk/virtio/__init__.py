"""virtio-blk without I/O: which features a disk offers, its configuration space, what a driver may choose."""

from vduse_blk.virtio.device import Limits, VirtioBlkDevice
from vduse_blk.virtio.features import Feature, feature_names

__all__ = ["Feature", "Limits", "VirtioBlkDevice", "feature_names"]
