"""Real disks for Linux hosts, served from user space."""

__version__ = "0.1.0"
