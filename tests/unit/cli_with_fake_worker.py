"""The command line as it is, except that the server it starts is ``fake_worker.py``."""

import sys
from pathlib import Path

from vduse_blk.cli import launch, main

launch.worker_command = lambda: [sys.executable, str(Path(__file__).with_name("fake_worker.py"))]
main.main()
