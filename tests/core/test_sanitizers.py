"""The C core under the sanitizers: the fuzz corpus, and the engine under load.

Programs are built by tests/fuzz/run into build/fuzz/ and only when something they are made from is newer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="needs gcc"),
    pytest.mark.timeout(300),
]


def load(name: str) -> ModuleType:
    """A module or script of tests/fuzz."""
    loader = SourceFileLoader(f"fuzz_{name.partition('.')[0]}", str(FUZZ / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def stress(program: str, requests: int) -> str:
    run = load("run")
    path = run.build_program(program)
    result = subprocess.run(
        [path, str(requests)], env=os.environ | run.ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr[-8000:]
    return result.stdout


def test_corpus_is_clean() -> None:
    """No input of the corpus violates memory, arithmetic or an invariant."""
    result = subprocess.run([sys.executable, FUZZ / "run", "replay"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def test_corpus_has_the_seeds() -> None:
    """The corpus holds exactly what seeds.py writes, and stays small."""
    seeds = load("seeds.py")
    made = {"queue": seeds.queue_seeds(), "iova": seeds.iova_seeds(), "inflight": seeds.inflight_seeds()}
    for target, expected in made.items():
        found = {path.name: path.read_bytes() for path in (FUZZ / "corpus" / target).glob("seed-*")}
        assert found == expected, "run python tests/fuzz/seeds.py"
    files = [path for path in (FUZZ / "corpus").rglob("*") if path.is_file()]
    assert len(files) < 200
    assert sum(path.stat().st_size for path in files) < 1 << 20


def test_engine_memory_and_arithmetic() -> None:
    """Thousands of verified requests on every kind of storage: address and undefined-behaviour sanitizers are silent."""
    assert "engine_stress: ok" in stress("stress_memory", 4000)


def test_engine_threads() -> None:
    """The same, with control looking on and publishing tables: the thread sanitizer is silent."""
    assert "engine_stress: ok" in stress("stress_threads", 4000)


def test_device_tests_under_the_sanitizers() -> None:
    """The device tests of every native engine mode, with the extension that the address and undefined-behaviour sanitizers
    watch: they pass, and the sanitizers, which end the process, are silent."""
    environment = load("run").extension_environment()
    where = "import vduse_blk.core._core as core, vduse_blk.exporters.vhost_user as e; print(core.__file__)"
    python = [sys.executable, "-P"]
    loaded = subprocess.run([*python, "-c", where], env=environment, capture_output=True, text=True, check=False)
    assert "build/fuzz/extension" in loaded.stdout, loaded.stderr
    some = "(native and not flags and not event-direct and not 65536 or pool or chunks) and not durability"
    result = subprocess.run(
        [*python, "-m", "pytest", "-q", FUZZ.parent / "device", "-k", some],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert int(result.stdout.rpartition(" passed")[0].split()[-1]) > 300
    if " skipped" in result.stdout.splitlines()[-1]:  # counted here, or nobody would see it
        pytest.skip(f"of the tests under the sanitizers some were: {result.stdout.splitlines()[-1]}")
