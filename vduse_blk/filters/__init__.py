"""Layers over storage: one file per filter, whose name is the module's. See ``block.contract.Filter``."""
