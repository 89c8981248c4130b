"""QEMU's tools of Debian 13, on any host: ``tools/setup libblkio`` has them. libblkio is a front-end without a machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path("/var/lib/vduse-blk/libblkio")
_COUNT = 300_000
_TIMEOUT = 120.0


def is_there() -> bool:
    return (ROOT / "ready").exists()


def command(name: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """How to start one of the tools by its own loader, so that it is the same on every host: words and environment."""
    (libraries,) = ROOT.glob("usr/lib/*-linux-gnu")
    (loader,) = ROOT.glob("usr/lib*/ld-linux-*.so.*")
    words = (str(loader), "--library-path", str(libraries), str(ROOT / "usr/bin" / name))
    return words, {"QEMU_MODULE_DIR": str(libraries / "qemu")}


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tools; both its outputs are kept."""
    start, environment = command(name)
    return subprocess.run(
        [*start, *words], env=os.environ | environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )


def disk(socket: Path) -> str:
    """What the tools call the disk that is exported at a socket, with ``--image-opts``."""
    return f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"


def iops(socket: Path, depth: int) -> float:
    """Of 4 KiB reads, one after the other place, by ``qemu-img bench``. Raises RuntimeError."""
    words = ("-t", "none", "-c", str(_COUNT), "-d", str(depth), "-s", "4096", "--image-opts", disk(socket))
    done = run("qemu-img", "bench", *words)
    took = re.search(r"^Run completed in ([0-9.]+) seconds", done.stdout, re.MULTILINE)
    if done.returncode != 0 or took is None:
        raise RuntimeError(f"qemu-img bench {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return _COUNT / float(took[1])
