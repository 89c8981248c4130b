"""Sources: paths are taken as they are, URIs are understood, everything else is refused by name."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vduse_blk.block.errors import UserError
from vduse_blk.block.stack import Stack
from vduse_blk.source import SourceSpec, absolute_source, open_source, parse_source


@pytest.mark.parametrize(
    ("source", "backend", "options"),
    [
        ("./disk.img", "file", {"path": "./disk.img"}),
        ("disk", "file", {"path": "disk"}),
        ("/dev/sdb", "file", {"path": "/dev/sdb"}),
        ("/srv/a b?c%20&d=1.img", "file", {"path": "/srv/a b?c%20&d=1.img"}),
        ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", "file", {"path": "/dev/disk/by-path/pci-0000:00:1f.2-ata-1"}),
        ("./memory:1G", "file", {"path": "./memory:1G"}),
        ("file:/x", "file", {"path": "/x"}),
        ("file:x", "file", {"path": "x"}),
        ("file:/x?direct=1&sync=no", "file", {"path": "/x", "direct": True, "sync": False}),
        ("file:/x?size=1G", "file", {"path": "/x", "size": 1 << 30}),
        ("file:/a%20b%3Fc%25", "file", {"path": "/a b?c%"}),
        ("file:///x", "file", {"path": "/x"}),
        ("file://localhost/x", "file", {"path": "/x"}),
        ("file:?path=/x", "file", {"path": "/x"}),
        ("file:/x?", "file", {"path": "/x"}),
        ("file:/x+y", "file", {"path": "/x+y"}),
        ("memory:1G", "memory", {"size": 1 << 30}),
        ("null:10G", "null", {"size": 10 << 30}),
        ("null:512", "null", {"size": 512}),
    ],
)
def test_a_source_is_understood(source: str, backend: str, options: Mapping[str, object]) -> None:
    assert parse_source(source) == SourceSpec(backend, options)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "path: '' is not usable"),
        ("nbd:host", "source: 'nbd:' is no kind of storage; accepted are a path and file:, memory:, null:"),
        ("File:/x", "source: 'File:' is no kind of storage"),
        ("file:", "source: 'file:' needs a path after the colon"),
        ("file:?direct=1", "source: 'file:' needs a path"),
        ("memory:", "source: 'memory:' needs a size"),
        ("memory:lots", "size: 'lots' is not usable; accepted are bytes"),
        ("memory:1G?direct=1", "direct: 'memory' has no such option; accepted are size"),
        ("file:/x?direct", "direct: has no value; accepted is direct=VALUE"),
        ("file:/x?direct=1&direct=0", "direct: given twice"),
        ("file:/x?path=/y", "path: given twice"),
        ("file:/x?cache=none", "cache: 'file' has no such option; accepted are direct, path, read_only, size, sync"),
        ("file://host/x", "source: 'file://host' names another host"),
        ("file:/x%00", "path: '/x\\x00' is not usable"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(source: str, says: str) -> None:
    """With the key and what is accepted; exit code 2."""
    with pytest.raises(UserError) as caught:
        parse_source(source)
    assert str(caught.value).startswith(says)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a:b", "nbd:x?y=z", "with space", "100%", "q?direct=1", "%2e", "é", "x\ny", "a+b:c"])
def test_an_existing_file_of_any_name_is_that_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative or absolute, and again after it was made absolute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert parse_source(name) == SourceSpec("file", {"path": name})
    assert parse_source(str(tmp_path / name)) == SourceSpec("file", {"path": str(tmp_path / name)})
    assert parse_source(absolute_source(name)).options["path"] == str(tmp_path / name)


def test_a_known_kind_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a file somebody puts there would change what a command does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory:1G").touch()
    assert parse_source("memory:1G").backend == "memory"
    assert parse_source("./memory:1G").backend == "file"


@pytest.mark.parametrize(
    ("source", "path"),
    [("x", "x"), ("./x", "./x"), ("file:x?direct=1", "x"), ("file:a%20b", "a b"), ("file:./100%25?sync=1", "./100%")],
)
def test_a_relative_source_becomes_absolute(source: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its options, in a directory whose name would mean something in a URI."""
    directory = tmp_path / "odd ?%41&=name"
    directory.mkdir()
    monkeypatch.chdir(directory)
    before, after = parse_source(source), parse_source(absolute_source(source))
    assert after.options["path"] == f"{directory}/{path}"
    assert {**after.options, "path": None} == {**before.options, "path": None}


@pytest.mark.parametrize("source", ["/x", "file:/x?direct=1", "memory:1G", "null:1G", "file:///x"])
def test_an_absolute_source_stays_as_it_is(source: str) -> None:
    assert absolute_source(source) == source


@given(st.text(max_size=60))
def test_any_text_is_understood_or_refused(source: str) -> None:
    """Nothing but UserError comes out, and a path always comes out as it went in."""
    try:
        spec = parse_source(source)
    except UserError:
        return
    if not source.startswith("file:") and spec.backend == "file":
        assert spec.options == {"path": source}


class TestOpenSource:
    def test_options_come_together(self, tmp_path: Path) -> None:
        """From the source, from the command line, and from options of any kind."""
        path = tmp_path / "x.img"

        async def run() -> None:
            stack = open_source(
                f"file:{path}?sync=1", {"direct": "no"}, size=1 << 20, block_size=4096, serial="S1", read_only=False
            )
            info = await stack.open()
            assert (info.size, info.logical_block_size, info.serial, info.volatile_cache) == (1 << 20, 4096, "S1", False)
            await stack.close()

        asyncio.run(run())

    def test_read_only_reaches_the_backend_that_knows_it_and_the_stack_of_any(self, tmp_path: Path) -> None:
        path = tmp_path / "x.img"
        path.write_bytes(bytes(4096))

        async def is_read_only(stack: Stack) -> bool:
            info = await stack.open()
            await stack.close()
            return info.read_only

        path.chmod(0o400)
        assert asyncio.run(is_read_only(open_source(str(path), read_only=True)))
        assert asyncio.run(is_read_only(open_source(f"file:{path}?read_only=1")))
        assert asyncio.run(is_read_only(open_source("memory:1M", read_only=True)))

    def test_a_size_given_twice_must_agree(self) -> None:
        open_source("memory:1M", size=1 << 20)
        with pytest.raises(UserError, match="size: given twice, as 1048576 in the source and as 2097152"):
            open_source("memory:1M", size=2 << 20)

    def test_a_wrong_option_is_refused_before_anything_is_opened(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="direct: 'maybe' is not usable"):
            open_source(str(tmp_path / "x"), {"direct": "maybe"}, size=1 << 20)
        with pytest.raises(UserError, match="serial: 'ü' is not usable"):
            open_source("memory:1M", serial="ü")
        with pytest.raises(UserError, match="block_size: 1000 is not usable; accepted are powers of two from 512"):
            open_source("memory:1M", block_size=1000)
        assert not list(tmp_path.iterdir())


def test_paths_are_the_same_storage_if_they_lead_to_it(tmp_path: Path) -> None:
    """Or, where they lead nowhere, if they are the same path."""
    (tmp_path / "x").touch()
    (tmp_path / "y").touch()
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "folder").symlink_to(".")

    def same(one: str, other: str) -> bool:
        return parse_source(f"{tmp_path}/{one}").is_same_storage(parse_source(f"file:{tmp_path}/{other}?sync=1"))

    assert same("x", "x")
    assert same("./x", "folder/link")
    assert not same("x", "y")
    assert same("gone", "folder/./gone")
    assert not same("gone", "x")
    assert not parse_source("null:1M").is_same_storage(parse_source("memory:1M"))
    assert not parse_source("null:1M").is_same_storage(parse_source("null:2M"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_nodes_are_the_same_storage_if_they_are_of_one_device(tmp_path: Path) -> None:
    """Not opened, only looked at: nobody has such devices."""
    for name, minor in (("a", 1), ("b", 1), ("c", 2)):
        os.mknod(tmp_path / name, stat.S_IFBLK | 0o600, os.makedev(240, minor))
    os.mknod(tmp_path / "d", stat.S_IFCHR | 0o600, os.makedev(240, 1))
    (tmp_path / "by-id").symlink_to("a")

    def same(one: str, other: str) -> bool:
        return parse_source(f"{tmp_path}/{one}").is_same_storage(parse_source(f"{tmp_path}/{other}"))

    assert same("a", "b")
    assert same("by-id", "b")
    assert not same("a", "c")
    assert not same("a", "d")
