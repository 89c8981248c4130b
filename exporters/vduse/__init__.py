"""VDUSE + virtio-vdpa: the disk appears on this host as an ordinary virtio disk, /dev/vdX.

=============  ==================================================================================================
``export``     the transaction: create, serve, add the vdpa device, find the disk; and back
``server``     the thread that answers the kernel's messages and owns the device's memory map and queues
``kernel``     sysfs, module loading, driver binding: what the kernel shows about the device
``names``      what the kernel calls a disk, and what killed servers keep of theirs
``cleanup``    removing what a dead server left behind
``doctor``     can this host do it?
=============  ==================================================================================================
"""
