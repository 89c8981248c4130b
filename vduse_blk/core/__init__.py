"""The C data plane. ``api.h`` documents it; ``vduse_blk.queue`` is the typed face of it."""
