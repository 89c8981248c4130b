"""virtio-blk without I/O: which features a disk offers, its configuration space, what a driver may choose."""

from vduse_blk.virtio.device import CONFIG_WCE_OFFSET, Limits, VirtioBlkDevice
from vduse_blk.virtio.features import Feature, feature_names

__all__ = ["CONFIG_WCE_OFFSET", "Feature", "Limits", "VirtioBlkDevice", "feature_names"]
