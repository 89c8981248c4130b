"""The wheel, the sdist and the editable install each give a working program in a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]

PROBE = """
import sys
import pyvduse, pyvduse._uapi
import vduse_blk.core._core as core
import vduse_blk.exporters.vduse.export
assert core.lib.VRING_CHAIN_MAX == 260
try:
    import exporters
except ImportError:
    pass
else:
    raise AssertionError("the package 'exporters' must not be importable under its generic name")
print(core.__file__)
"""


def run(*words: object, cwd: Path = TOP) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed tree plus uncommitted changes of tracked files, and nothing that was built."""
    target = tmp_path_factory.mktemp("clone")
    names = run("git", "ls-files", "-z").split("\0")
    for name in filter(None, names):
        if (TOP / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((TOP / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def dist(clone: Path) -> Path:
    """Directory with one sdist and the wheel that was built from it."""
    run(sys.executable, "-m", "build", "--outdir", clone / "dist", cwd=clone)
    return clone / "dist"


def environment(path: Path) -> Path:
    """A new virtual environment; returns its python."""
    run(sys.executable, "-m", "venv", path)
    return path / "bin/python"


def check_installed(python: Path, tmp_path: Path) -> str:
    """Import everything and run the program, from a directory that is not the source tree."""
    where = run(python, "-P", "-c", PROBE, cwd=tmp_path).strip()
    assert "vduse-blk" in run(python.parent / "vduse-blk", "--version", cwd=tmp_path)
    return where


@pytest.mark.timeout(600)
def test_wheel(dist: Path, tmp_path: Path) -> None:
    """There is one wheel, for every CPython from 3.11 on; installed it works, and ships no tests."""
    (wheel,) = dist.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(("tests/", "bench/", "exporters/"))]
    assert "vduse_blk/exporters/vduse/export.py" in names
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", wheel)
    assert str(tmp_path) in check_installed(python, tmp_path)


@pytest.mark.timeout(600)
def test_sdist(dist: Path, tmp_path: Path) -> None:
    """The sdist holds every source and builds by itself."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    for wanted in ("vduse_blk/core/api.h", "vduse_blk/core/uring.h", "pyvduse/vduse_abi.h", "LICENSE", "README.md"):
        assert any(name.endswith(wanted) for name in names), wanted
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", sdist)
    assert str(tmp_path) in check_installed(python, tmp_path)


@pytest.mark.timeout(600)
def test_editable(clone: Path, tmp_path: Path) -> None:
    """An editable install runs from the source tree, with exporters/ under its mapped name."""
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", "-e", clone)
    assert check_installed(python, tmp_path).startswith(str(clone))
