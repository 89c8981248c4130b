"""Kinds of storage: one module each, whose name is the backend's name. Found by ``vduse_blk.registry``."""
