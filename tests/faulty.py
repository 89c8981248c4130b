"""Programs to upgrade to that are not well, for ``python -c``."""

WITHOUT_THREADS = """
import errno, runpy
from vduse_blk.queue.native import NativeQueue, lib
start = NativeQueue.start
def refuse(self, setup, iova):
    if setup.index == 1 and self._target.kind != lib.VB_TARGET_NONE:
        raise OSError(errno.EAGAIN, "no thread")
    start(self, setup, iova)
NativeQueue.start = refuse
runpy.run_module("vduse_blk.worker", run_name="__main__")
"""
"""A new server that gets no thread for its second queue."""
