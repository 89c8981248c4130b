"""QEMU, the front-end most virtual machines have, against a real server."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "exporters"))
from conftest import serve

__all__ = ["serve"]
