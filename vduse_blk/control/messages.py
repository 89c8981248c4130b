"""Messages of the control socket, and the line with which a server says how its start went.

The socket is a unix stream socket; one JSON object per line in each direction, one reply per request, in order::

    {"op": "detach", "force": false}
    {"ok": true}  |  {"ok": false, "error": "one sentence", "code": 4, "holders": [...]}

Start. ``attach`` hands a server its ``WorkerSpec`` as JSON on standard input, and in ``ready_fd`` the number
of an inherited pipe. The server writes exactly one line there and closes it: ``ready_line`` or
``failure_line``. Before that line either side may give up: a reader that closes its end asks the server to
undo everything and exit; an end of file without a line means that the server died.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

MAX_MESSAGE: Final = 1 << 20
"""Longest message in bytes, newline included. ``info`` of 64 queues is about 20 KiB."""


def encode_message(message: Mapping[str, Any]) -> bytes:
    """One line, newline included."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode_message(line: bytes) -> dict[str, Any]:
    """Inverse of ``encode_message``. Raises ``ValueError`` for anything but one JSON object, and for one whose ``force``
    is not true or false: what it would allow must not be a matter of interpretation."""
    try:
        message = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    if not isinstance(message.get("force", False), bool):
        raise ValueError(f"force: {message['force']!r} is not usable; accepted are true and false")
    return message


def ok_reply(**values: Any) -> bytes:
    return encode_message({"ok": True, **values})


def error_reply(error: str, code: int, holders: list[Any] | None = None) -> bytes:
    reply: dict[str, Any] = {"ok": False, "error": error, "code": int(code)}
    if holders:
        reply["holders"] = holders
    return encode_message(reply)


def ready_line(device: str, **values: Any) -> bytes:
    """What a server writes to ``ready_fd`` when its disk is usable. ``device`` is the node, ``/dev/vda``."""
    return encode_message({"ready": True, "device": device, **values})


def failure_line(error: str, code: int, holders: list[Any] | None = None) -> bytes:
    """What a server writes to ``ready_fd`` after it undid everything."""
    line: dict[str, Any] = {"error": error, "code": int(code)}
    if holders:
        line["holders"] = holders
    return encode_message(line)
