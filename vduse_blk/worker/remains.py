"""What one server of a disk leaves to the next, whatever the disk's exports: that it was served, and what
was set while it was in use.

``served.json`` in the disk's directory: written before anybody can use the disk, gone with the directory when it is detached.
It speaks of storage. Who finds it and is to serve other storage under the same name has nothing to do with it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final

from vduse_blk import control, registry
from vduse_blk.block.errors import UserError
from vduse_blk.block.options import place_of
from vduse_blk.control import DiskPaths
from vduse_blk.source import parse_source

log = logging.getLogger("vduse_blk.disk")

_FILE: Final = "served.json"
_VERSION: Final = 1


class Remains:
    """Of the disk ``name`` over ``source``. Owned by whoever has the lock of the disk's directory."""

    def __init__(self, name: str, source: str) -> None:
        """Reads what there is. Damage costs what was noted, not the disk: it is said in the log."""
        self.was_served = False
        """Of the storage as a disk of this name, by a server that is gone or about to be."""
        self.settings: dict[str, str] = {}
        """As ``settings.change`` takes them; whoever changes them calls ``write``."""
        self._name = name
        self._source = source
        self._path = DiskPaths.of(name).directory / _FILE
        try:
            found = _read(self._path)
        except (OSError, ValueError, RecursionError) as error:
            log.error("disk '%s': what %s says is lost: %s", name, self._path, error)
            return
        if found is not None and _storage(str(found.get("source"))) == _storage(source):
            self.was_served = True
            self.settings = settings_of(found.get("settings"))

    def write(self) -> None:
        """Raises ControlError (exit 1), with the old ones in place."""
        control.replace_json(self._path, {"version": _VERSION, "source": self._source, "settings": self.settings})


def settings_of(value: object) -> dict[str, str]:
    """What another server has written down as settings; nothing of what cannot be any."""
    items = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in items if isinstance(key, str) and isinstance(text, str)}


def _read(path: Path) -> dict[str, object] | None:
    """Raises OSError, ValueError."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(control.MAX_MESSAGE))
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    return found


def _storage(source: str) -> tuple[str, object] | None:
    """What a source names, however it is written."""
    try:
        spec = parse_source(source)
        place = place_of(registry.backend(spec.backend).Options)
    except UserError:
        return None
    return spec.backend, spec.options.get(place or "")
