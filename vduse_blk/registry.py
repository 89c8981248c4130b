"""Backends, filters and exporters by name.

The name of a part is the name of its module: ``vduse_blk.backends.file`` is the backend ``file``, and
``vduse_blk.exporters.vduse`` the exporter ``vduse`` (a folder, whose module ``export`` has the class). That module
defines one class of the right kind. Other packages add parts through entry points of the groups
``vduse_blk.backends``, ``vduse_blk.filters`` and ``vduse_blk.exporters``: the name is the part's, the value its class.
Ours go first. Nothing is imported before it is asked for, and entry points are not read (which costs 20 ms) for a part of
ours.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast

from vduse_blk.block.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vduse_blk.block.contract import Backend, Filter
    from vduse_blk.exporter import Exporter

Kind = Literal["backend", "filter", "exporter"]


class _Place(NamedTuple):
    package: str
    """Where ours are, and the group of entry points where others' are."""
    module: str
    """Behind a part's name: where its class is."""
    base: tuple[str, str]
    """Module and name of the class it is made from."""


_PLACES: Final[dict[Kind, _Place]] = {
    "backend": _Place("vduse_blk.backends", "", ("vduse_blk.block.contract", "Backend")),
    "filter": _Place("vduse_blk.filters", "", ("vduse_blk.block.contract", "Filter")),
    "exporter": _Place("vduse_blk.exporters", ".export", ("vduse_blk.exporter", "Exporter")),
}


def names(kind: Kind) -> list[str]:
    """Names of all parts of a kind, sorted."""
    return sorted(_own(kind) | _foreign(kind).keys())


def exists(kind: Kind, name: str) -> bool:
    """Whether there is such a part."""
    return name in _own(kind) or name in _foreign(kind)


def backend(name: str) -> type[Backend]:
    """The class of a backend. Raises UserError naming those there are."""
    return cast("type[Backend]", _load("backend", name))


def filter(name: str) -> type[Filter]:
    """The class of a filter. Raises UserError naming those there are."""
    return cast("type[Filter]", _load("filter", name))


def exporter(name: str) -> type[Exporter]:
    """The class of an exporter. Raises UserError naming those there are."""
    return cast("type[Exporter]", _load("exporter", name))


@functools.cache
def _load(kind: Kind, name: str) -> type[Any]:
    place = _PLACES[kind]
    base: type[Any] = getattr(import_module(place.base[0]), place.base[1])
    if name in _own(kind):
        module = import_module(f"{place.package}.{name}{place.module}")
        parts = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
        ]
        if len(parts) != 1:
            raise TypeError(f"{module.__name__} defines {len(parts)} classes made from {base.__name__}; it must be one")
        return cast("type[Any]", parts[0])
    foreign = _foreign(kind)
    if name not in foreign:
        raise UserError(f"{kind}: '{name}' does not exist; accepted are {', '.join(names(kind)) or 'none'}")
    part = foreign[name].load()
    if not (inspect.isclass(part) and issubclass(part, base)):
        raise TypeError(f"entry point '{name}' of {place.package} is no class made from {base.__name__}")
    return cast("type[Any]", part)


@functools.cache
def _own(kind: Kind) -> frozenset[str]:
    spec = find_spec(_PLACES[kind].package)
    if spec is None or spec.submodule_search_locations is None:
        return frozenset()
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return frozenset(module.name for module in found if not module.name.startswith("_"))


@functools.cache
def _foreign(kind: Kind) -> Mapping[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=_PLACES[kind].package)}
