"""What a server leaves to the next: hostile and damaged files cost what they say, never a wrong answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vduse_blk.control import rundir
from vduse_blk.control.errors import ControlError
from vduse_blk.worker.remains import Remains, settings_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(rundir.RUN_ENV, str(tmp_path))
    return rundir.make_directory("d").directory


def test_what_is_written_is_what_the_next_one_finds(folder: Path) -> None:
    """Whatever the source says of the storage beside which one it is; not for other storage."""
    first = Remains("d", "file:/x.img?size=1M")
    assert not first.was_served
    assert not first.matter
    first.settings["on-error"] = "wait"
    first.write()
    assert first.matter
    for source in ("file:/x.img?size=1M", "/x.img", "file:///x.img?sync=1"):
        second = Remains("d", source)
        assert (second.was_served, second.settings) == (True, {"on-error": "wait"}), source
    for source in ("/y.img", "memory:1M"):
        assert (Remains("d", source).was_served, Remains("d", source).settings) == (False, {}), source


def test_another_path_to_the_same_file_is_the_same_storage(folder: Path) -> None:
    """Otherwise its lost data would be forgotten."""
    (folder / "x.img").touch()
    (folder / "link").symlink_to("x.img")
    Remains("d", f"file:{folder}/x.img?size=1M").write()
    assert Remains("d", f"{folder}/./link").was_served


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')),
        lambda path: path.chmod(0o644),
        lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
        lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
    ],
    ids=["cut", "list", "version", "public", "fifo", "link"],
)
def test_damage_is_said_and_costs_what_was_noted(
    damage: Callable[[Path], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Remains("d", "/x").write()
    damage(folder / "served.json")
    assert not Remains("d", "/x").was_served
    assert "is lost" in caplog.text


def test_settings_are_texts() -> None:
    assert settings_of({"on-error": "wait", "on-full": 5}) == {"on-error": "wait"}
    assert settings_of(None) == settings_of(["on-error"]) == {}


def test_a_mark_outlives_whoever_set_it(folder: Path) -> None:
    """And is seen by everybody who has it at once; another disk's is not taken."""
    first, second = Remains("d", "/x"), Remains("d", "/x")
    mark = first.lost(keep=False)
    seen = second.lost(keep=True)
    assert bytes(mark) == bytes(4)
    mark[0] = 1
    assert bytes(seen) == b"\1\0\0\0"
    assert second.matter
    assert bytes(Remains("d", "/x").lost(keep=True)) == b"\1\0\0\0"
    assert bytes(Remains("d", "/y").lost(keep=False)) == bytes(4)


def test_a_mark_that_cannot_be_trusted_says_lost(folder: Path) -> None:
    path = folder / "lost"
    path.write_bytes(bytes(3))
    path.chmod(0o600)
    assert Remains("d", "/x").lost(keep=True)[0] == 1
    path.write_bytes(bytes(4))
    assert Remains("d", "/x").lost(keep=True)[0] == 0
    path.chmod(0o666)
    assert Remains("d", "/x").lost(keep=True)[0] == 1


def test_without_a_mark_there_is_no_disk(folder: Path) -> None:
    (folder / "lost").symlink_to("/nowhere")
    with pytest.raises(ControlError, match=r"cannot write .*/lost"):
        Remains("d", "/x").lost(keep=True)
