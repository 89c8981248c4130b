"""The ways a disk is presented. Installed as ``vduse_blk.exporters``; a module is found by its folder's name."""

if __name__ != "vduse_blk.exporters":
    raise ImportError(
        "the top-level folder 'exporters' is the package vduse_blk.exporters; import it by that name"
    )
