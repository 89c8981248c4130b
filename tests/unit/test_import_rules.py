"""Who may import whom. The table is docs/architecture.md's; this test holds it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]

# part → the parts (module prefixes) it may import from, besides itself; "*" = any of ours.
RULES: dict[str, tuple[str, ...]] = {
    "pyvduse": (),
    "vduse_blk.block": (),
    "vduse_blk.core": (),
    "vduse_blk.queue": ("vduse_blk.block", "vduse_blk.core"),
    "vduse_blk.virtio": ("vduse_blk.block",),
    "vduse_blk.backends": ("vduse_blk.block",),
    "vduse_blk.filters": ("vduse_blk.block",),
    "vduse_blk.block.holders": ("vduse_blk.block",),
    "vduse_blk.exporter": ("vduse_blk.block", "vduse_blk.block.holders"),
    "vduse_blk.registry": ("vduse_blk.block", "vduse_blk.exporter"),
    "vduse_blk.source": ("vduse_blk.block", "vduse_blk.registry"),
    "vduse_blk.exports": ("vduse_blk.block", "vduse_blk.exporter", "vduse_blk.registry"),
    "vduse_blk.control": ("vduse_blk.block",),
    "vduse_blk.record": ("vduse_blk.block", "vduse_blk.control", "vduse_blk.source"),
    "vduse_blk.exporters.vduse": (
        "pyvduse",
        "vduse_blk.block",
        "vduse_blk.virtio",
        "vduse_blk.queue",
        "vduse_blk.exporter",
        "vduse_blk.block.holders",
    ),
    "vduse_blk.exporters.vhost_user": (
        "vduse_blk.block",
        "vduse_blk.virtio",
        "vduse_blk.queue",
        "vduse_blk.exporter",
        "vduse_blk.block.holders",
    ),
    "vduse_blk.worker": (
        "vduse_blk.block",
        "vduse_blk.control",
        "vduse_blk.exporter",
        "vduse_blk.exports",
        "vduse_blk.block.holders",
        "vduse_blk.queue",
        "vduse_blk.record",
        "vduse_blk.registry",
        "vduse_blk.source",
    ),
    "vduse_blk.cli": (
        "vduse_blk.block",
        "vduse_blk.control",
        "vduse_blk.record",
        "vduse_blk.registry",
        "vduse_blk.source",
        "vduse_blk.exports",
        "vduse_blk.exporters",
    ),
    "vduse_blk.testing": (
        "pyvduse",
        "vduse_blk.block",
        "vduse_blk.core",
        "vduse_blk.queue",
        "vduse_blk.virtio",
        "vduse_blk.backends",
        "vduse_blk.filters",
        "vduse_blk.exporters",
        "vduse_blk.exporter",
        "vduse_blk.registry",
        "vduse_blk.source",
    ),
}
# Heavy libraries and the one part that may import each; within it, at most where it is needed.
LIBRARIES = {
    "pyroute2": ("pyvduse",),
    "click": ("vduse_blk.cli",),
    "rich": ("vduse_blk.cli",),
    "cffi": ("pyvduse", "vduse_blk.core"),
    "numpy": ("vduse_blk.queue", "vduse_blk.testing", "vduse_blk.backends"),
    "aiohttp": ("vduse_blk.manager",),
}
OURS = ("pyvduse", "vduse_blk")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module we ship, under the name it is imported by."""
    for folder, package in (("pyvduse", "pyvduse"), ("vduse_blk", "vduse_blk"), ("exporters", "vduse_blk.exporters")):
        for path in sorted((TOP / folder).rglob("*.py")):
            parts = [package, *path.relative_to(TOP / folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


def part_of(module: str) -> str | None:
    """The longest rule that covers a module."""
    covering = [part for part in RULES if module == part or module.startswith(part + ".")]
    return max(covering, key=len) if covering else None


def imports(path: Path, module: str) -> Iterator[str]:
    """Modules a file imports, TYPE_CHECKING and functions included: a dependency is a dependency."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            yield node.module
            # "from vduse_blk import registry" names a module, too
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "vduse_blk")


def allowed(importer: str, imported: str) -> bool:
    part = part_of(importer)
    if part is None or imported in (*OURS, "vduse_blk.__version__"):
        return True  # the top package's own __init__ imports nothing; see below
    within = imported == part or imported.startswith(part + ".")
    return within or any(imported == other or imported.startswith(other + ".") for other in RULES[part])


def test_every_module_is_covered_by_a_rule() -> None:
    """A new part needs a row in the table."""
    uncovered = [name for name, _ in modules() if part_of(name) is None]
    assert uncovered == ["vduse_blk", "vduse_blk.exporters"]


def test_imports_follow_the_table() -> None:
    """No part imports from a part above or beside it."""
    broken = [
        f"{name} imports {imported}"
        for name, path in modules()
        for imported in imports(path, name)
        if imported.split(".")[0] in OURS and not allowed(name, imported)
    ]
    assert broken == []


def test_backends_and_filters_import_no_sibling() -> None:
    """One file per kind of storage."""
    broken = [
        f"{name} imports {imported}"
        for name, path in modules()
        for imported in imports(path, name)
        if name.startswith(("vduse_blk.backends.", "vduse_blk.filters."))
        and imported.startswith(("vduse_blk.backends", "vduse_blk.filters"))
    ]
    assert broken == []


def test_heavy_libraries_stay_where_they_belong() -> None:
    """A server that serves a file must not load a netlink or a command line library."""
    broken = []
    for name, path in modules():
        for imported in imports(path, name):
            homes = LIBRARIES.get(imported.split(".")[0])
            if homes is not None and not name.startswith(homes):
                broken.append(f"{name} imports {imported}")
    assert broken == []


def test_a_server_loads_no_heavy_library() -> None:
    """What the worker imports to serve a native disk is free of click, rich, pyroute2, numpy."""
    code = (
        "import sys, vduse_blk.worker.serve, vduse_blk.backends.file;"
        "import vduse_blk.exporters.vduse.export, vduse_blk.exporters.vhost_user.export;"
        f"print([m for m in {sorted(LIBRARIES)!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exporters_refuses_its_generic_name() -> None:
    """The folder at the top is vduse_blk.exporters and nothing else."""
    done = subprocess.run([sys.executable, "-c", "import exporters"], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "vduse_blk.exporters" in done.stderr


def test_nothing_refers_outside_the_clone() -> None:
    """Users have only the clone: no path of a developer's machine, no registry's host name."""
    words = ("../sha" + "red", "/wo" + "rk/", "deb.debian" + ".org", "pypi" + ".org", "pythonhosted" + ".org")
    names = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True).stdout.split("\n")
    found = []
    for name in filter(None, names):
        try:
            text = (TOP / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{name}: {word}" for word in words if word in text]
    assert found == []
