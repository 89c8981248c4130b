"""What the kernel calls a disk, in a sysfs of directories: the kernel tests show that the real one behaves like it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import cast

import pytest
from vduse_blk.exporters.vduse import names

from pyvduse.control import Control, check_name
from pyvduse.errors import VduseError
from vduse_blk.block.errors import UserError
from vduse_blk.control.rundir import check_name as check_disk_name


class Kernel:
    """VDUSE devices: directories. ``busy``: those whose node a process has open."""

    def __init__(self, top: Path) -> None:
        self._devices, self._vdpa = top / "vduse", top / "vdpa"
        self._devices.mkdir()
        self._vdpa.mkdir()
        self.busy: set[str] = set()

    def make(self, device: str) -> str:
        (self._devices / device).mkdir()
        (self._devices / device / "msg_timeout").write_text("120\n")
        return device

    def make_vdpa(self, device: str) -> None:
        (self._vdpa / device).mkdir()

    def listed(self) -> list[str]:
        return sorted(entry.name for entry in self._devices.iterdir())

    def destroy(self, device: str) -> None:
        """As ``Control.destroy``."""
        if device in self.busy or (self._vdpa / device).exists():
            raise VduseError("DESTROY_DEV", device, errno.EBUSY)
        (self._devices / device / "msg_timeout").unlink()
        (self._devices / device).rmdir()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(names, "DEVICES", tmp_path / "vduse")
    monkeypatch.setattr(names, "VDPA_DEVICES", tmp_path / "vdpa")
    monkeypatch.setattr(names, "CONTROL", tmp_path / "control")
    (tmp_path / "control").touch()
    return Kernel(tmp_path)


def leave_remnant(kernel: Kernel, device: str) -> None:
    """What ``detach --force`` of a disk does whose server hangs in the kernel."""
    kernel.busy.add(kernel.make(device))
    names.mark_remnant(device)


def test_a_disk_has_its_own_name(kernel: Kernel) -> None:
    assert names.device_of("k") is None
    assert not names.is_taken("k")
    assert names.free_device("k") == "k"
    kernel.make("k")
    assert names.device_of("k") == "k"
    assert names.is_taken("k")


def test_a_remnant_is_not_in_the_way(kernel: Kernel) -> None:
    """Each disk of a name leaves one, and the next is found by all who know only its name."""
    for device in ("k", "k@2", "k@3"):
        assert not names.is_taken("k")
        assert names.free_device("k") == device
        leave_remnant(kernel, device)
        assert names.device_of("k") is None
    kernel.make("k@4")
    assert names.device_of("k") == "k@4"
    assert names.is_taken("k")
    assert names.remnants() == ["k", "k@2", "k@3"]


def test_remnants_go_when_their_process_has_ended(kernel: Kernel) -> None:
    """Those of any disk; nothing else goes, and the name the first one had is used again."""
    for device in ("a", "k", "k@2"):
        leave_remnant(kernel, device)
    for device in ("k@3", "b"):
        kernel.make(device)
    names.sweep(cast(Control, kernel))
    assert kernel.listed() == ["a", "b", "k", "k@2", "k@3"]
    kernel.busy -= {"a", "k"}
    names.sweep(cast(Control, kernel))
    assert kernel.listed() == ["b", "k@2", "k@3"]
    assert names.device_of("k") == "k@3"
    kernel.destroy("k@3")
    assert names.free_device("k") == "k"


def test_a_device_of_another_program_is_in_the_way(kernel: Kernel) -> None:
    """Open or not, of VDUSE or not: it is no remnant, and never swept."""
    kernel.busy.add(kernel.make("qsd"))
    kernel.make_vdpa("net")
    assert names.is_taken("qsd")
    assert names.is_taken("net")
    names.sweep(cast(Control, kernel))
    assert kernel.listed() == ["qsd"]


def test_a_disk_with_a_device_of_its_own_is_not_mistaken_for_another_programs(kernel: Kernel) -> None:
    """The name has become free and somebody else has taken it, while the disk has another in the kernel."""
    kernel.make("k@2")
    kernel.make("k")
    assert names.device_of("k") == "k@2"


@pytest.mark.parametrize("device", ["k@", "k@0", "k@02", "k@x", "k@2@3", "k.2", "k-2", "kk", "k@\u0662"])
def test_names_that_are_not_the_disks(kernel: Kernel, device: str) -> None:
    kernel.make(device)
    assert names.device_of("k") is None


@pytest.mark.parametrize("name", ["k", "a.b", "k" * 63])
def test_forms(kernel: Kernel, name: str) -> None:
    """No disk can have the name of another's device; every device can be made; the disk's name can be told from it."""
    kernel.make(name)
    device = names.free_device(name)
    assert check_name(device) == device
    with pytest.raises(UserError):
        check_disk_name(device)
    assert names.disk_of(device) == names.disk_of(name) == name
