"""The command ``vduse-blk``: parses, talks to the server of a disk, prints. One module per group of
commands."""
