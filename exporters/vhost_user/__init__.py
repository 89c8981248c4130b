"""vhost-user-blk: the disk appears to virtual machines (QEMU, Cloud Hypervisor, libblkio, …) through a unix socket.

=============  ==================================================================================================
``messages``   the wire format, without I/O
``session``    what one front-end has told us, and the queues that follow from it
``server``     the thread that owns the socket: one front-end after another
``export``     the Exporter: socket file, lifetime
=============  ==================================================================================================
"""
