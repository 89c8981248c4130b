"""Options: what users write becomes typed values, or one sentence that says what is accepted."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vduse_blk import registry
from vduse_blk.block.errors import Status, UserError, status_of
from vduse_blk.block.options import MAX_SIZE, Size, about, help_rows, json_schema, make_options, parse_size, parse_values


@dataclass(frozen=True, kw_only=True)
class Sample:
    path: str = field(metadata=about("where", place=True))
    size: Size | None = field(default=None, metadata=about("how large"))
    chunk: Size = field(default=65536, metadata=about("how much at once"))
    direct: bool = field(default=False, metadata=about("straight"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("4k", 4096),
        ("4K", 4096),
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("10g", 10 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        (" 1M ", 1 << 20),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1.5G", "-1", "+1", "1GB", "1 G", "0x10", "1e3", "\u0661", "1_000", "1G\n1"])
def test_what_is_no_size_is_refused_with_the_accepted_form(text: str) -> None:
    with pytest.raises(UserError, match="accepted are bytes, or a number with K, M, G") as caught:
        parse_size(text)
    assert caught.value.exit_code == 2


@given(st.integers(0, 1 << 70), st.sampled_from(["", *"kKmMgGtTpPeE"]))
def test_every_size_is_exact_or_refused(number: int, unit: str) -> None:
    """No size beyond the largest file offset gets through, none below it is refused."""
    size = number * 1024 ** (" KMGTPE".index(unit.upper()) if unit else 0)
    if size <= MAX_SIZE:
        assert parse_size(f"{number}{unit}") == size
    else:
        with pytest.raises(UserError, match="too large"):
            parse_size(f"{number}{unit}")


def test_text_and_typed_values_mean_the_same() -> None:
    """Values come from URIs as text and from JSON as what they are."""
    text = make_options("sample", Sample, {"path": "/x", "size": "1G", "direct": "yes"})
    typed = make_options("sample", Sample, {"path": "/x", "size": 1 << 30, "direct": True})
    assert text == typed == Sample(path="/x", size=1 << 30, direct=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"path": "/x", "direkt": "1"}, "direkt: 'sample' has no such option; accepted are chunk, direct, path, size"),
        ({"path": "/x", "direct": "maybe"}, "direct: 'maybe' is not usable; accepted are 1, yes, true, 0, no, false"),
        ({"path": "/x", "direct": 1}, "direct: 1 is not usable"),
        ({"path": "/x", "size": "big"}, "size: 'big' is not usable; accepted are bytes"),
        ({"path": "/x", "chunk": "9E"}, "chunk: '9E' is too large"),
        ({"path": "/x", "size": True}, "size: 'True' is not usable"),
        ({"path": "/x", "size": -1}, "size: '-1' is not usable"),
        ({"path": "/x", "size": 1.5}, "size: '1.5' is not usable"),
        ({"path": "/x", "size": None}, "size: 'None' is not usable"),
        ({"path": ""}, "path: '' is not usable; accepted is text that is not empty"),
        ({"path": "a\0b"}, "path: 'a\\x00b' is not usable"),
        ({"path": 5}, "path: 5 is not usable"),
        ({}, "path: 'sample' needs it: where"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(given: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        make_options("sample", Sample, given)
    assert str(caught.value).startswith(says)
    assert caught.value.exit_code == 2


def test_only_what_is_given_is_returned() -> None:
    """Defaults stay the dataclass's affair."""
    assert parse_values("sample", Sample, {"direct": "0"}) == {"direct": False}


def test_help_rows_tell_everything() -> None:
    assert help_rows(Sample) == [
        ("path", "TEXT", "where [required]"),
        ("size", "SIZE", "how large"),
        ("chunk", "SIZE", "how much at once [default: 65536]"),
        ("direct", "1|0|yes|no|true|false", "straight"),
    ]


def test_the_schema_describes_the_options() -> None:
    schema = json_schema(Sample)
    assert schema["required"] == ["path"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["path"] == {"type": "string", "description": "where"}
    assert schema["properties"]["direct"] == {"type": "boolean", "description": "straight", "default": False}
    assert schema["properties"]["chunk"]["default"] == 65536
    json.dumps(schema)


def test_an_option_of_an_unknown_type_is_a_bug() -> None:
    @dataclass(frozen=True)
    class Wrong:
        ratio: float = field(metadata=about("how much"))

    with pytest.raises(TypeError, match=r"Wrong\.ratio"):
        help_rows(Wrong)


@pytest.mark.parametrize("name", registry.names("backend"))
def test_every_backend_documents_every_option(name: str) -> None:
    """In its declaration and on its page."""
    page = (Path(__file__).parents[2] / "docs" / "backends" / f"{name}.md").read_text()
    for key, _, text in help_rows(registry.backend(name).Options):
        assert text
        assert f"`{key}`" in page, f"docs/backends/{name}.md does not mention {key}"


def test_errors_map_to_the_three_statuses_of_virtio() -> None:
    """Only "not supported" has a status of its own; an error without a number is an I/O error, too."""
    assert status_of(OSError(errno.EOPNOTSUPP, "")) is Status.UNSUPP
    for number in (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EINVAL, errno.ENOTTY):
        assert status_of(OSError(number, "")) is Status.IOERR
    assert status_of(OSError("no number")) is Status.IOERR
