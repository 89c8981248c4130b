"""``python -m vduse_blk.worker``: serve one disk, whose specification (``control.spec.WorkerSpec``) comes on standard input.

Exit status: as in ``control.errors.Exit``. The log goes to standard error.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys

from vduse_blk.block.errors import UserError
from vduse_blk.control import messages
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.worker.notify import ReadyPipe
from vduse_blk.worker.serve import Worker


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    faulthandler.enable()
    try:
        spec = WorkerSpec.from_json(sys.stdin.buffer.read())
    except UserError as error:
        print(f"vduse-blk: {error}", file=sys.stderr)
        return error.exit_code
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir("/")
    ready = ReadyPipe(spec.ready_fd)
    try:
        return int(asyncio.run(_serve(spec, ready)))
    except UserError as error:
        holders = error.holders if isinstance(error, ControlError) else None
        if spec.ready_fd is None:
            print(f"vduse-blk: {error}", file=sys.stderr)
        ready.write(messages.failure_line(str(error), error.exit_code, holders))
        return int(error.exit_code)
    except Exception as error:
        logging.getLogger("vduse_blk").exception("disk '%s': bug, or a refusal nobody foresaw", spec.name)
        ready.write(messages.failure_line(f"{type(error).__name__}: {error}", Exit.FAILED))
        return int(Exit.FAILED)


async def _serve(spec: WorkerSpec, ready: ReadyPipe) -> Exit:
    return await Worker(spec, ready).run()


if __name__ == "__main__":
    sys.exit(main())
