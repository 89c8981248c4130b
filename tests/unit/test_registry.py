"""Parts are found by name, others' by entry point, and none is imported before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vduse_blk import registry
from vduse_blk.block.contract import Backend
from vduse_blk.block.errors import UserError
from vduse_blk.exporter import Exporter


def test_ours_are_there() -> None:
    assert set(registry.names("backend")) >= {"file", "memory", "null"}
    assert "vduse" in registry.names("exporter")
    for name in registry.names("backend"):
        assert issubclass(registry.backend(name), Backend)
    assert issubclass(registry.exporter("vduse"), Exporter)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"backend: 'nope' does not exist; accepted are file, memory, null"):
        registry.backend("nope")
    with pytest.raises(UserError, match="exporter: 'nope' does not exist"):
        registry.exporter("nope")
    assert not registry.exists("backend", "nope")
    assert not registry.exists("backend", "__init__")


@pytest.mark.parametrize("call", ["names('backend')", "exists('backend', 'file')", "backend('null')"])
def test_nothing_is_imported_before_it_is_asked_for(call: str) -> None:
    """Neither by listing names nor by loading another part; and a part of ours needs no look at entry points."""
    code = (
        f"import sys; from vduse_blk import registry; registry.{call}; "
        "print([m for m in sys.modules if m.startswith('vduse_blk.backends.')], 'importlib.metadata' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    wanted = "['vduse_blk.backends.null']" if "null" in call else "[]"
    assert shown == f"{wanted} {call.startswith('names')}"


def test_another_package_adds_parts_by_entry_point(tmp_path: Path) -> None:
    """A real installed distribution; one whose entry point is no backend is a bug of that package and says so."""
    (tmp_path / "other.py").write_text(
        "from vduse_blk.backends.null import NullBackend\nclass OtherBackend(NullBackend):\n    pass\nwrong = dict\n"
    )
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[vduse_blk.backends]\nother = other:OtherBackend\nwrong = other:wrong\nfile = x:y\n"
    )
    code = (
        "from vduse_blk import registry\n"
        "from vduse_blk.source import open_source, parse_source\n"
        "print(registry.names('backend'), registry.backend('other').__name__, registry.backend('file').__module__)\n"
        "print(parse_source('other:1G'))\n"
        "try: registry.backend('wrong')\n"
        "except TypeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "['file', 'memory', 'null', 'other', 'wrong'] OtherBackend vduse_blk.backends.file"
    assert lines[1] == "SourceSpec(backend='other', options={'size': 1073741824})"
    assert lines[2] == "entry point 'wrong' of vduse_blk.backends is no class made from Backend"
