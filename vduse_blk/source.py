"""How a user names storage: a path, or ``KIND:PLACE?OPTION=VALUE&…``.

``KIND`` is a backend's name; ``block.options.parse_uri`` understands the rest. Anything that does not begin with letters
and a colon is a path, taken as it is, whatever characters are in it; so is a file that exists and whose name merely looks
like a URI of no known kind.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final

from vduse_blk import registry
from vduse_blk.block.contract import Backend
from vduse_blk.block.errors import UserError
from vduse_blk.block.options import make_options, parse_uri, parse_values, place_of, quote_place
from vduse_blk.block.policy import Policy
from vduse_blk.block.stack import Stack

_URI: Final = re.compile(r"([A-Za-z][A-Za-z0-9_+.-]*):(.*)", re.DOTALL)
_FILE: Final = "file"


@dataclass(frozen=True)
class SourceSpec:
    """A backend's name and the options the source gives, converted to their types (``path`` or ``size``, say)."""

    backend: str
    options: Mapping[str, Any]

    @property
    def size_is_for_making(self) -> bool:
        """Whether the backend has a size that it can do without."""
        return any(f.name == "size" and f.default is not MISSING for f in fields(registry.backend(self.backend).Options))

    def is_same_storage(self, other: SourceSpec) -> bool:
        """Whether both name the same storage at this moment, however they write it; their options are another matter. Two
        paths do that if they lead to one file or device, and two that lead nowhere if they are the same path."""
        place = place_of(registry.backend(self.backend).Options) or ""
        one, two = self.options.get(place), other.options.get(place)
        if self.backend != other.backend:
            return False
        return one == two or (place == "path" and isinstance(one, str) and isinstance(two, str) and _is_same_file(one, two))

    def difference(self, other: SourceSpec) -> tuple[str, Any, Any] | None:
        """The first option with which ``other``, of the same storage, would serve it otherwise: its name, and both values.
        The place is ``is_same_storage``'s; a size that was for making the storage, and whether it is read-only, are to be
        asked of what came of them."""
        options = registry.backend(self.backend).Options
        settled = {place_of(options), "read_only", "size" if self.size_is_for_making else None}
        for field in fields(options):
            default = None if field.default is MISSING else field.default
            one, two = (spec.options.get(field.name, default) for spec in (self, other))
            if field.name not in settled and one != two:
                return field.name, one, two
        return None


def _is_same_file(one: str, two: str) -> bool:
    try:
        facts, others = os.stat(one), os.stat(two)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(two)
    are_devices = stat.S_ISBLK(facts.st_mode) and stat.S_ISBLK(others.st_mode)
    return facts.st_rdev == others.st_rdev if are_devices else os.path.samestat(facts, others)


def parse_source(source: str) -> SourceSpec:
    """Understand a source as far as is possible without touching it. Raises UserError naming what is accepted."""
    match = _URI.fullmatch(source)
    known = match is not None and registry.exists("backend", match[1])
    if match is None or (not known and os.path.lexists(source)):
        given: dict[str, object] = {"path": source}
        return SourceSpec(_FILE, parse_values(_FILE, _options_of(_FILE), given))
    kind, rest = match[1], match[2]
    if not known:
        kinds = registry.names("backend")
        raise UserError(
            f"source: '{kind}:' is no kind of storage; accepted are a path and {', '.join(f'{k}:' for k in kinds)} "
            f"(a file of that name is written ./{source})"
        )
    return SourceSpec(kind, parse_uri("source", kind, _options_of(kind), rest))


def absolute_source(source: str) -> str:
    """The same storage, named so that it does not depend on the working directory."""
    spec = parse_source(source)
    path = spec.options.get("path")
    if spec.backend != _FILE or not isinstance(path, str) or os.path.isabs(path):
        return source
    match = _URI.fullmatch(source)
    if match is None or match[1] != _FILE:
        return os.path.join(os.getcwd(), source)
    # The working directory's name is not percent-decoded yet: it must survive that.
    return f"{_FILE}:{quote_place(os.getcwd())}/{match[2]}"


def gather(source: str, options: Mapping[str, object], size: int | None) -> SourceSpec:
    """A source together with what is said beside it, see ``open_source``. Raises UserError."""
    spec = parse_source(source)
    kind = registry.backend(spec.backend)
    values, more = dict(spec.options), dict(options)
    if size is not None:
        if "size" not in _names(kind):
            raise UserError(f"size: storage of kind '{spec.backend}' has its own size; leave it out")
        more["size"] = size
    for key, value in parse_values(spec.backend, kind.Options, more).items():
        if values.setdefault(key, value) != value:
            raise UserError(f"{key}: given twice, as {values[key]} in the source and as {value}; leave one out")
    return SourceSpec(spec.backend, values)


def open_source(
    source: str,
    options: Mapping[str, object] | None = None,
    *,
    read_only: bool = False,
    block_size: int | None = None,
    size: int | None = None,
    serial: str | None = None,
    filters: Sequence[str] = (),
    on_error: str | None = None,
    on_full: str = "fail",
    made: bool = False,
) -> Stack:
    """A stack over the storage, not opened yet. ``filters`` lie over it, the first lowest (see ``parse_filter``).
    ``on_error`` and ``on_full`` are the failure policy, as users write it; None: the backend's default.

    ``made``: it was a disk before. A size that the backend can do without was for making it; it may have grown since.

    ``options`` are the backend's, beyond those in ``source``; ``size`` and ``read_only`` go to a backend that has
    options of these names. Raises UserError.
    """
    spec = gather(source, options or {}, size)
    kind = registry.backend(spec.backend)
    values = dict(spec.options)
    if made and spec.size_is_for_making:
        values.pop("size", None)
    if read_only and "read_only" in _names(kind):
        values["read_only"] = True
    backend = kind(make_options(spec.backend, kind.Options, values))
    for text in filters:
        name, options_of_filter = parse_filter(text)
        backend = registry.filter(name)(backend, options_of_filter)
    policy = Policy.parse(kind.default_on_error if on_error is None else on_error, on_full)
    return Stack(backend, block_size=block_size, serial=serial or "", read_only=read_only, policy=policy)


def parse_filter(text: str) -> tuple[str, Any]:
    """The name of a filter and its options, of ``NAME`` or ``NAME?OPTION=VALUE&…``. Raises UserError."""
    name, _, query = text.partition("?")
    options = registry.filter(name).Options
    return name, make_options(name, options, parse_uri("filter", name, options, f"?{query}"))


def _options_of(kind: str) -> type:
    return registry.backend(kind).Options


def _names(kind: type[Backend]) -> set[str]:
    return {field.name for field in fields(kind.Options)}
