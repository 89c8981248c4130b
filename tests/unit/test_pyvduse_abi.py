"""The ABI as we wrote it down against the kernel's own headers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pyvduse.uapi import constants, ffi, struct_size

# Members the two headers call differently, and structures version 0 headers do not have.
STRUCTS = (
    "vduse_dev_config",
    "vduse_vq_config",
    "vduse_vq_state_split",
    "vduse_vq_state_packed",
    "vduse_vq_info",
    "vduse_vq_eventfd",
    "vduse_config_data",
    "vduse_iotlb_entry",
    "vduse_iova_umem",
    "vduse_iova_info",
    "vduse_vq_state",
    "vduse_dev_status",
    "vduse_iova_range",
    "vduse_dev_request",
    "vduse_dev_response",
)
# Carved out of reserved space by version 1, so that an older header has other names there.
VERSION_1_FIELDS = {
    "ngroups", "nas", "group", "asid", "reserved", "reserved1", "reserved2", "padding", "vq_group_asid", "iova_v2",
}  # fmt: skip
VERSION_1_NAMES = {"VDUSE_API_VERSION_1", "VDUSE_SET_VQ_GROUP_ASID", "VDUSE_IOTLB_GET_FD2"}
OURS = {"VDUSE_NAME_MAX", "VDUSE_CONFIG_OFFSET", "VDUSE_API_VERSION_1"}


def fields(struct: str) -> list[tuple[str, int]]:
    """(member, offset) of our declaration, looking through anonymous unions."""
    return [
        (name, ffi.offsetof(f"struct {struct}", name))
        for name, _ in ffi.typeof(f"struct {struct}").fields
        if name and name not in VERSION_1_FIELDS
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler says about <linux/vduse.h>: constants by name, "struct" sizes, "struct.member" offsets."""
    folder = tmp_path_factory.mktemp("abi")
    lines = [f'    printf("{s} %zu\\n", sizeof(struct {s}));' for s in STRUCTS]
    lines += [f'    printf("{s}.{name} %zu\\n", offsetof(struct {s}, {name}));' for s in STRUCTS for name, _ in fields(s)]
    for name in sorted(constants().keys() - OURS):
        one = f'    printf("{name} %llu\\n", (unsigned long long){name});'
        lines.append(f"#ifdef {name}\n{one}\n#endif" if name in VERSION_1_NAMES else one)
    source = folder / "abi.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/vduse.h>\nint main(void) {\n"
        + "\n".join(lines)
        + "\n    return 0;\n}\n"
    )
    include = os.environ.get("VDUSE_UAPI_INCLUDE")
    flags = [f"-I{include}"] if include else []
    subprocess.run(["gcc", "-Wall", "-Werror", *flags, str(source), "-o", str(folder / "abi")], check=True)
    said = subprocess.run([str(folder / "abi")], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in (line.split() for line in said.splitlines())}


def test_constants_are_the_kernels(kernel: dict[str, int]) -> None:
    """Every request code, message type and flag."""
    ours = {name: value for name, value in constants().items() if name in kernel}
    assert ours == {name: kernel[name] for name in ours}
    assert len(ours) >= len(constants()) - len(OURS | VERSION_1_NAMES)


def test_sizes_and_offsets_are_the_kernels(kernel: dict[str, int]) -> None:
    """Every structure and every member that version 1 did not rename."""
    assert {s: struct_size(s) for s in STRUCTS} == {s: kernel[s] for s in STRUCTS}
    ours = {f"{s}.{name}": offset for s in STRUCTS for name, offset in fields(s)}
    assert ours == {name: kernel[name] for name in ours}


def test_version_1_layouts() -> None:
    """What older headers cannot confirm, as read from the kernel's 7.2 header: sizes and request codes of version 1."""
    assert struct_size("vduse_iotlb_entry_v2") == 80
    assert constants()["VDUSE_IOTLB_GET_FD2"] == 0xC050811B
    assert ffi.offsetof("struct vduse_dev_config", "ngroups") == 280
    assert ffi.offsetof("struct vduse_vq_config", "group") == 8
    assert ffi.offsetof("struct vduse_iova_umem", "asid") == 24
    assert ffi.offsetof("struct vduse_iova_info", "asid") == 24
    assert ffi.offsetof("struct vduse_iotlb_entry_v2", "asid") == 32


def test_each_constant_is_written_once() -> None:
    """The header is the one place: no module repeats a request code."""
    top = Path(__file__).resolve().parents[2]
    codes = {f"{value:#x}" for name, value in constants().items() if value > 0xFFFF} | {"0x8113"}
    for path in (top / "pyvduse").glob("*.py"):
        found = {number.lower() for number in re.findall(r"0x[0-9a-fA-F]+", path.read_text())}
        assert not found & codes, path
