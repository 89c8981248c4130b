"""``bench/upgrade``: how long users wait while a disk's server is replaced under load.

4 KiB random writes at queue depth 32 through vhost-user (vhost_gen.c, which fails if a request does), on a file in /dev/shm.
Each upgrade is the real command. Prints median and maximum of the pauses; the last line is ``upgrade: ok``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.compare import BUILD, CFLAGS, TOP
from vduse_blk.control import rundir

_SIZE = 256 << 20
_CLI = (sys.executable, "-P", "-m", "vduse_blk.cli")


def _cli(*words: str) -> str:
    done = subprocess.run([*_CLI, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/upgrade", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--upgrades", type=int, default=50, help="how many (%(default)s)")
    arguments = parser.parse_args()
    generator = BUILD / "vhost_gen"
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", *CFLAGS, "-pthread", TOP / "bench/vhost_gen.c", "-o", generator], check=True)
    pauses: list[float] = []
    rounds = 0
    with tempfile.TemporaryDirectory(prefix="vb", dir="/dev/shm") as folder:
        os.environ[rundir.RUN_ENV] = f"{folder}/run"
        image, socket = Path(folder, "disk.img"), f"{folder}/socket"
        with image.open("wb") as file:
            file.truncate(_SIZE)
        _cli("attach", str(image), "--name", "bench", "--export", f"vhost-user:{socket}")
        try:
            while len(pauses) < arguments.upgrades:
                load = [str(generator), socket, "--size", "4096", "--depth", "32", "--op", "write", "--seconds", "10"]
                with subprocess.Popen(load, stdout=subprocess.PIPE, text=True) as process:
                    while process.poll() is None and len(pauses) < arguments.upgrades:
                        pauses.append(json.loads(_cli("upgrade", "bench", "--json"))["pause_ms"])
                    process.communicate()
                rounds += 1
                if process.returncode != 0:
                    print("upgrade: failed: a request of the load failed")
                    return 1
        finally:
            _cli("detach", "bench", "--force")
    print(f"{len(pauses)} upgrades in {rounds} x 10 s of load at queue depth 32, no error")
    print(f"pause: median {statistics.median(pauses):.1f} ms, maximum {max(pauses):.1f} ms")
    print("upgrade: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
