"""The stable names of disks, and the directory that they are in, which several servers make and remove."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from vduse_blk.exporters.vduse import kernel

from vduse_blk.block.errors import UserError


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kernel, "LINKS", tmp_path / "vduse-blk")
    return tmp_path / "vduse-blk"


def test_the_directory_goes_with_the_last_name(links: Path) -> None:
    """And a name that is gone already, or whose server died while it made it, is no obstacle."""
    kernel.add_link("a", "vda")
    kernel.add_link("b", "vdb")
    (links / ".b.new").symlink_to("../vdc")
    kernel.remove_link("a")
    assert [os.readlink(link) for link in links.iterdir() if link.name == "b"] == ["../vdb"]
    kernel.remove_link("b")
    assert not links.exists()
    kernel.remove_link("b")


def test_a_name_is_made_while_the_last_one_goes(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the directory is removed between its making and the name's, as another disk's end does it."""
    ends = 2
    make = os.mkdir

    def make_and_lose(path: Any, mode: int = 0o777) -> None:
        nonlocal ends
        make(path, mode)
        if ends:
            ends -= 1
            kernel.remove_link("other")

    monkeypatch.setattr(os, "mkdir", make_and_lose)
    kernel.add_link("a", "vda")
    assert os.readlink(links / "a") == "../vda"
    assert ends == 0


def test_what_is_in_the_way_of_the_directory_is_said(links: Path) -> None:
    """A file there is not waited for: one sentence."""
    links.touch()
    with pytest.raises(UserError, match=r"^cannot make \S+/vduse-blk/a: Not a directory$"):
        kernel.add_link("a", "vda")
