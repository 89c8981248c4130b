"""vhost-user-blk: the disk appears to virtual machines (QEMU, Cloud Hypervisor, libblkio, …) through a unix socket.

=============  ==================================================================================================
``messages``   the wire format, without I/O
``inflight``   the memory in which requests in flight outlive the server
``session``    what one front-end has told us, and the queues that follow from it
``server``     the thread that owns the socket: one front-end after another
``log``        lines in the log, and not too many
``export``     the Exporter: socket file, lifetime
=============  ==================================================================================================
"""
