"""The control socket of a server: a line is a request, and what comes of it is a line (``control.messages``). What is asked
is a handler's to answer; nothing here knows of disks. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from vduse_blk.block.errors import UserError
from vduse_blk.control import messages
from vduse_blk.control.errors import ControlError, Exit
from vduse_blk.control.messages import MAX_MESSAGE

log = logging.getLogger("vduse_blk.disk")

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Gives the values of the reply to a request. What it raises is the client's to read: ControlError with its exit code and
holders; UserError; ValueError, a request that is not usable; OSError. Anything else is a bug, and logged as one."""


async def listen(path: Path, answer: Handler) -> asyncio.Server:
    """Serve the control socket at ``path``, where a dead server may have left one. Raises ControlError."""
    new = path.with_name("control.new")  # no longer than the final name, which has been checked
    server = await bind(new, answer)
    os.replace(new, path)
    return server


async def bind(path: Path, answer: Handler) -> asyncio.Server:
    """Serve a socket at ``path``, to be renamed later: it answers under any name. Raises ControlError."""
    try:
        path.unlink(missing_ok=True)  # of a dead predecessor: we hold the lock, or the only line to who does
        server = await asyncio.start_unix_server(partial(_converse, answer), path, limit=MAX_MESSAGE)
        os.chmod(path, 0o600)
    except OSError as error:
        raise ControlError(f"no control socket can be made at {path}: {error.strerror}", Exit.FAILED) from error
    return server


async def _converse(answer: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(await _reply(answer, line))
            await writer.drain()
    except (ConnectionError, ValueError, asyncio.CancelledError):
        pass  # gone in the middle, a line beyond the limit, or the server ends: nothing to answer
    finally:
        writer.close()


async def _reply(answer: Handler, line: bytes) -> bytes:
    try:
        return messages.ok_reply(**await answer(messages.decode_message(line)))
    except ControlError as error:
        return messages.error_reply(str(error), error.exit_code, error.holders)
    except UserError as error:
        return messages.error_reply(str(error), error.exit_code)
    except ValueError as error:
        return messages.error_reply(f"the request is not usable: {error}", Exit.USAGE)
    except OSError as error:
        log.error("%s", error)
        return messages.error_reply(str(error), Exit.FAILED)
    except Exception as error:
        log.exception("bug while answering %r", line[:200])
        return messages.error_reply(f"bug in the server: {error!r}; its log has more", Exit.FAILED)
