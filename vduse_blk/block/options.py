"""Options as frozen dataclasses: one declaration gives URI parsing, help and JSON schema.

A field has ``about`` for metadata and the type ``str``, ``bool``, ``Size``, ``Count``, ``Duration``, ``Share`` or one of
these ``| None``. One without default is required::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        path: str = field(metadata=about("path of the file", place=True))
        size: Size | None = field(default=None, metadata=about("size to create it with"))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import MISSING
from decimal import Decimal
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints
from urllib.parse import quote, unquote

from vduse_blk.block.errors import UserError

_SIZE = "size"
Size = Annotated[int, _SIZE]
"""A number of bytes, which a user may write with a suffix."""
_COUNT = "count"
Count = Annotated[int, _COUNT]
"""A number of things, from 0."""
_DURATION = "duration"
Duration = Annotated[float, _DURATION]
"""Seconds, which a user may write with a unit."""
_SHARE = "share"
Share = Annotated[float, _SHARE]
"""From 0 to 1."""

MAX_SIZE: Final = (1 << 63) - 1
"""Largest file offset of Linux."""

SECTOR: Final = 512
"""Bytes; no disk has a smaller block."""

_UNITS: Final = "KMGTPE"
_SIZE_TEXT: Final = re.compile(rf"([0-9]+)([{_UNITS}]?)", re.IGNORECASE | re.ASCII)
_DURATION_TEXT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?", re.ASCII)
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_DURATION: Final = 1e6  # seconds, as for --timeout
_SHARE_TEXT: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?", re.ASCII)
_BOOLEANS: Final = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}


def about(help: str, *, place: bool = False) -> Mapping[str, object]:
    """Metadata of a field. ``place``: it is what stands before the '?' of a URI."""
    return {"help": help, "place": place}


def parse_size(text: str) -> int:
    """Bytes. '4096', '4k', '512M', '1G', '1T': suffixes are powers of 1024. Raises UserError."""
    match = _SIZE_TEXT.fullmatch(text.strip())
    if match is None:
        raise UserError(f"size: {text!r} is not usable; accepted are bytes, or a number with K, M, G, T, P or E (512M, 1G)")
    size = int(match[1]) << 10 * (_UNITS.index(match[2].upper()) + 1 if match[2] else 0)
    if size > MAX_SIZE:
        raise UserError(f"size: {text!r} is too large; accepted are sizes below 8E")
    return size


def parse_duration(text: str) -> float:
    """Seconds. '5', '0.5', '250ms', '5s', '2m', '1h'. Raises UserError."""
    match = _DURATION_TEXT.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else -1
    if not 0 <= seconds <= _MAX_DURATION:
        raise UserError(
            f"duration: {text!r} is not usable; accepted are seconds up to {_MAX_DURATION:.0f}, or a number with "
            "ms, s, m or h (250ms, 5s)"
        )
    return seconds


def check_disk_size(size: int) -> None:
    """Raise UserError unless ``size``, of storage that is as large as its user says, can be a disk's."""
    if size == 0 or size % SECTOR:
        raise UserError(f"size: {size} is not usable; accepted are positive multiples of {SECTOR} bytes")


def place_of(options: type) -> str | None:
    """Name of the field that stands before the '?' of a URI."""
    return next((f.name for f in dataclasses.fields(options) if f.metadata["place"]), None)


def parse_values(owner: str, options: type, given: Mapping[str, object]) -> dict[str, Any]:
    """Check and convert values, each text as a user writes it or already of the field's type.

    ``owner`` is the backend's name, for messages. Raises UserError naming the key and what is accepted.
    """
    hints = _hints(options)
    for key in given:
        if key not in hints:
            accepted = ", ".join(sorted(hints)) or "none"
            raise UserError(f"{key}: '{owner}' has no such option; accepted are {accepted}")
    return {key: _convert(key, hints[key], value) for key, value in given.items()}


def make_options(owner: str, options: type, given: Mapping[str, object]) -> Any:
    """An instance of ``options``. Raises UserError as ``parse_values`` does, and for a required one that is missing."""
    values = parse_values(owner, options, given)
    for field in dataclasses.fields(options):
        if field.default is MISSING and field.name not in values:
            raise UserError(f"{field.name}: '{owner}' needs it: {field.metadata['help']}")
    return options(**values)


def parse_uri(what: str, owner: str, options: type, rest: str) -> dict[str, Any]:
    """Check and convert what stands behind ``owner:`` in a URI, ``PLACE?OPTION=VALUE&…``. The place is the value of the
    *place* option; it and the values are percent-decoded.

    ``what`` is what the URI names ("source"), for messages. Raises UserError.
    """
    place_text, _, query = rest.partition("?")
    given: dict[str, object] = {}
    place = place_of(options)
    if place_text.startswith("//"):  # kind://host/path, as in URIs of the web
        host, slash, path = place_text[2:].partition("/")
        if host not in ("", "localhost"):
            raise UserError(f"{what}: '{owner}://{host}' names another host; accepted is {owner}:/path")
        place_text = slash + path
    if place_text:
        if place is None:
            raise UserError(f"{what}: '{owner}:' takes nothing but options, {owner}:?OPTION=VALUE")
        given[place] = unquote(place_text)
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{key}: has no value; accepted is {key}=VALUE")
        if key in given:
            raise UserError(f"{key}: given twice; leave one out")
        given[key] = unquote(value)
    values = parse_values(owner, options, given)
    if place is not None and place not in values:
        raise UserError(f"{what}: '{owner}:' needs a {place} after the colon")
    return values


def write_values(options: Any) -> str:
    """``OPTION=VALUE&…`` for everything that differs from its default, as ``parse_uri`` understands it."""
    items = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            text = _text_of(int(value) if isinstance(value, bool) else value)
            items.append(f"{field.name}={quote(text, safe='')}")
    return "&".join(items)


def quote_place(path: str) -> str:
    """A path that is to stand in a URI as it is."""
    return path.replace("%", "%25").replace("?", "%3F")


def help_rows(options: type) -> list[tuple[str, str, str]]:
    """(name, accepted values, help) of every option, in declared order."""
    hints = _hints(options)
    rows = []
    for field in dataclasses.fields(options):
        text = field.metadata["help"]
        if field.default is MISSING:
            text += " [required]"
        elif field.default not in (None, False, ""):
            text += f" [default: {field.default}]"
        rows.append((field.name, _ACCEPTED[hints[field.name]], text))
    return rows


def json_schema(options: type) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of an object with these options."""
    hints = _hints(options)
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        properties[field.name] = dict(_SCHEMAS[hints[field.name]], description=field.metadata["help"])
        if field.default not in (MISSING, None):
            properties[field.name]["default"] = field.default
    required = [field.name for field in dataclasses.fields(options) if field.default is MISSING]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_SCHEMAS: Final[dict[object, dict[str, Any]]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    _SIZE: {
        "anyOf": [
            {"type": "integer", "minimum": 0, "maximum": MAX_SIZE},
            {"type": "string", "pattern": f"^[0-9]+[{_UNITS}{_UNITS.lower()}]?$"},
        ]
    },
    _COUNT: {"type": "integer", "minimum": 0, "maximum": MAX_SIZE},
    _DURATION: {
        "anyOf": [
            {"type": "number", "minimum": 0, "maximum": _MAX_DURATION},
            {"type": "string", "pattern": "^[0-9]+([.][0-9]+)?(ms|s|m|h)?$"},
        ]
    },
    _SHARE: {"type": "number", "minimum": 0, "maximum": 1},
}


_ACCEPTED: Final[dict[object, str]] = {
    str: "TEXT",
    bool: "1|0|yes|no|true|false",
    _SIZE: "SIZE",
    _COUNT: "NUMBER",
    _DURATION: "SECONDS",
    _SHARE: "0..1",
}


def _hints(options: type) -> dict[str, object]:
    """Field name → ``str``, ``bool``, or the tag of an annotated type."""
    result: dict[str, object] = {}
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if get_origin(hint) in (Union, UnionType):
            (hint,) = (part for part in get_args(hint) if part is not type(None))
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[1]
        if hint not in _SCHEMAS:
            raise TypeError(
                f"{options.__qualname__}.{field.name}: options are str, bool, Size, Count, Duration or Share, not {hint}"
            )
        result[field.name] = hint
    return result


def _text_of(value: object) -> str:
    """As a user writes it: numbers without an exponent, and not rounded."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def _convert(key: str, hint: object, value: object) -> object:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        raise UserError(f"{key}: {value!r} is not usable; accepted are {', '.join(_BOOLEANS)}")
    if hint == _SIZE:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE:
            return value
        try:
            return parse_size(value if isinstance(value, str) else repr(value))
        except UserError as error:
            raise UserError(f"{key}: {str(error).partition(': ')[2]}") from None
    if hint == _COUNT:
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE:
            return value
        raise UserError(f"{key}: {value!r} is not usable; accepted are whole numbers from 0")
    if hint == _DURATION:
        try:
            return parse_duration(_text_of(value))
        except UserError as error:
            raise UserError(f"{key}: {str(error).partition(': ')[2]}") from None
    if hint == _SHARE:
        text = _text_of(value)
        if not isinstance(value, bool) and _SHARE_TEXT.fullmatch(text) and 0 <= float(text) <= 1:
            return float(text)
        raise UserError(f"{key}: {value!r} is not usable; accepted are numbers from 0 to 1 (0.25)")
    if isinstance(value, str) and value and "\0" not in value:
        return value
    raise UserError(f"{key}: {value!r} is not usable; accepted is text that is not empty")
