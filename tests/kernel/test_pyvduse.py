"""pyvduse against the real kernel, with iproute2's vdpa as the oracle."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvduse import Control, Device, DeviceConfig, VduseError
from pyvduse.vdpa import Vdpa
from tests.kernel.host import run

VERSION_1, ACCESS_PLATFORM = 1 << 32, 1 << 33
BLOCK = 2
DOCS = Path(__file__).resolve().parents[2] / "docs/pyvduse.md"


def config(name: str = "p", **changes: object) -> DeviceConfig:
    values: dict[str, object] = {
        "name": name,
        "device_id": BLOCK,
        "features": VERSION_1 | ACCESS_PLATFORM,
        "config": bytes(60),
        "vq_num": 2,
    }
    return DeviceConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def control() -> Iterator[Control]:
    with Control.open() as opened:
        yield opened


@pytest.fixture
def device(control: Control) -> Iterator[Device]:
    control.create(config())
    try:
        with Device.open("p") as opened:
            yield opened
    finally:
        control.destroy("p")


def refused(call: object, *arguments: object) -> VduseError:
    with pytest.raises(VduseError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def test_create_and_its_refusals(control: Control, device: Device) -> None:
    """What the kernel refuses at creation comes with the reason."""
    assert refused(control.create, config()).errno == errno.EEXIST
    for wrong in (
        config("q", features=VERSION_1),
        config("q", features=VERSION_1 | ACCESS_PLATFORM | 1 << 11),
        config("q", device_id=99),
        config("q", vq_align=3),
        config("q", config=bytes(5000)),
        config("q", ngroups=1, nas=1),
    ):
        error = refused(control.create, wrong)
        assert (error.errno, error.asked) == (errno.EINVAL, "CREATE_DEV")
        assert error.cause
    assert refused(control.destroy, "p").errno == errno.EBUSY
    assert refused(control.destroy, "nosuch").errno == errno.EINVAL


def test_the_node_is_exclusive_and_stays_here(device: Device) -> None:
    """A second open is refused; a child does not inherit the descriptor."""
    assert refused(Device.open, "p").errno == errno.EBUSY
    assert not os.get_inheritable(device.fd)
    assert not os.get_blocking(device.fd)


def test_ioctls_without_a_driver(device: Device) -> None:
    """Each ioctl on a device nobody uses: its answer, or its error in words."""
    assert device.features() == 0
    assert device.vq_count() == 2
    device.vq_setup(0, 256)
    assert refused(device.vq_setup, 2, 256).errno == errno.EINVAL
    assert device.vq_info(0).ready is False
    assert refused(device.vq_info, 7).errno == errno.EINVAL
    assert device.iotlb_fd(0, 4095) is None
    assert device.iotlb_info(0, 4095) is None
    assert "DRIVER_OK" in str(refused(device.inject_irq, 0))
    assert "DRIVER_OK" in str(refused(device.inject_config_irq))
    device.set_config(0, bytes(8))
    assert refused(device.set_config, 56, bytes(8)).errno == errno.EINVAL
    with open("/dev/null") as null:
        assert refused(device.set_kickfd, 0, null.fileno()).errno == errno.EINVAL
    kick = os.eventfd(0)
    device.set_kickfd(0, kick)
    device.set_kickfd(0, None)
    os.close(kick)
    with pytest.raises(ValueError, match="-5"):
        device.set_kickfd(0, -5)
    assert refused(device.register_umem, 0, 1 << 20, 4096).errno == errno.EINVAL
    assert refused(device.deregister_umem, 0, 1 << 20).errno in (errno.ENOENT, errno.EINVAL)
    assert device.read_message() is None
    assert device.write_response(bytes(152)) is False


def test_sysfs(device: Device) -> None:
    """msg_timeout, bounce_size, interrupt affinity."""
    device.msg_timeout = 77
    assert device.msg_timeout == 77
    device.bounce_size = 8 << 20
    assert device.bounce_size == 8 << 20
    with pytest.raises(VduseError, match="1 MiB to 1 GiB"):
        device.bounce_size = 4096
    device.set_irq_affinity(0, {0})
    assert device.irq_affinity(0) == {0}
    assert refused(device.set_irq_affinity, 0, {1000}).asked == "irq_cb_affinity"


def test_netlink_against_iproute2(control: Control, device: Device) -> None:
    """Management devices and errors; the listing is the one of `vdpa dev show`."""
    with Vdpa() as vdpa:
        (management,) = [m for m in vdpa.mgmtdevs() if m.name == "vduse"]
        shown = json.loads(run("vdpa", "-j", "mgmtdev", "show").stdout)["mgmtdev"]
        assert "vduse" in shown
        assert management.bus is None
        assert management.classes & (1 << BLOCK)
        listed = json.loads(run("vdpa", "-j", "dev", "show").stdout)["dev"]
        assert {d.name for d in vdpa.dev_list()} == set(listed)
        assert refused(vdpa.dev_add, "nosuch").errno == errno.EINVAL
        assert refused(vdpa.dev_add, "p").errno == errno.EINVAL  # its queues are not set up
        assert refused(vdpa.dev_add, "p", "nosuch").errno == errno.ENODEV
        assert refused(vdpa.dev_del, "nosuch").errno == errno.ENODEV
        assert refused(vdpa.dev_get, "nosuch").errno == errno.ENODEV


def test_a_silent_server_loses_the_device(control: Control, device: Device) -> None:
    """After msg_timeout the kernel gives the device up: POLLERR, EPERM with the reason, and dev_add still says yes."""
    device.vq_setup(0, 64)
    device.vq_setup(1, 64)
    device.msg_timeout = 1
    with Vdpa() as vdpa:
        vdpa.dev_add("p")
        poll = select.poll()
        poll.register(device.fd, select.POLLIN)
        assert poll.poll(5000)[0][1] & select.POLLERR
        assert device.read_message() is None
        assert "given the device up" in str(refused(device.features))
        vdpa.dev_del("p")


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    """A device of another class, as docs/pyvduse.md shows it."""
    run("modprobe", "virtio_net")
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    script = tmp_path / "example.py"
    script.write_text(found[1])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "statuses 0x0 0x1 0x3 0xb 0xf 0x0 0x1" in done.stdout
    assert done.stdout.count("ready True") == 2
