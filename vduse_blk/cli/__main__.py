"""``python -m vduse_blk.cli``: the same as the command ``vduse-blk``."""

from vduse_blk.cli.main import main

main()
