"""Serial ports, by what sysfs says of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from rmaker_ota.errors import ArgumentError, NotFoundError
from rmaker_ota.flasher import ports
from tests.python.fake_sysfs import plug

MAC = "34:85:18:AA:BB:CC"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A bridge, a chip with two interfaces, and a port of the mainboard."""
    root = tmp_path / "sys"
    plug(root, "ttyUSB0", plug="1-1.2")
    plug(root, "ttyACM1", plug="1-3", vid=0x303A, pid=0x1001, serial=MAC, interface=2, driver="cdc_acm")
    plug(root, "ttyACM0", plug="1-3", vid=0x303A, pid=0x1001, serial=MAC, interface=0, driver="cdc_acm")
    plug(root, "ttyS0", plug="", driver="serial8250")
    dev = tmp_path / "dev"
    (dev / "serial" / "by-id").mkdir(parents=True)
    for name in ("ttyUSB0", "ttyACM0", "ttyACM1", "ttyS0", "null"):
        (dev / name).touch()
    (dev / "serial" / "by-id" / "usb-Espressif_34-if00").symlink_to("../../ttyACM0")
    return tmp_path


def roots(machine: Path) -> dict[str, Path]:
    return {"sysfs_root": machine / "sys", "dev_root": machine / "dev"}


def test_ports_are_listed_with_what_is_known(machine: Path) -> None:
    listed = ports.list_ports(**roots(machine))
    assert [port.name for port in listed] == ["ttyACM0", "ttyACM1", "ttyS0", "ttyUSB0"]
    chip, second, board, bridge = listed
    assert chip == ports.Port(
        name="ttyACM0",
        path=str(machine / "dev" / "ttyACM0"),
        by_id=str(machine / "dev" / "serial" / "by-id" / "usb-Espressif_34-if00"),
        driver="cdc_acm",
        usb_path="1-3",
        vid=0x303A,
        pid=0x1001,
        interface=0,
        serial=MAC,
        manufacturer="",
        product="CP2102N USB to UART Bridge Controller",
    )
    assert second.interface == 2
    assert (board.is_usb, board.is_chip, board.interface, board.vid, board.device_key) == (False, False, -1, 0, None)
    assert (bridge.is_usb, bridge.is_chip, bridge.driver, bridge.serial) == (True, False, "cp210x", "0001")


def test_only_a_serial_that_can_be_unique_names_a_device(machine: Path) -> None:
    keys = [port.device_key for port in ports.list_ports(**roots(machine))]
    assert keys == [f"303a-{MAC}", f"303a-{MAC}", None, None]


def test_a_machine_without_sysfs_has_no_ports(tmp_path: Path) -> None:
    assert ports.list_ports(sysfs_root=tmp_path, dev_root=tmp_path) == []


def test_a_port_is_found_by_path_link_serial_and_plug(machine: Path) -> None:
    resolve = partial(ports.resolve_port, **roots(machine))
    dev = machine / "dev"
    for named, name in (
        (f"serial={MAC}", "ttyACM0"),
        ("usb=1-3", "ttyACM0"),
        ("usb=1-3:2", "ttyACM1"),
        ("usb=1-1.2", "ttyUSB0"),
        ("serial=0001", "ttyUSB0"),
    ):
        path, port = resolve(named)
        assert port is not None
        assert (path, port.name) == (str(dev / name), name)
    for named in (str(dev / "ttyACM0"), str(dev / "serial" / "by-id" / "usb-Espressif_34-if00")):
        path, port = resolve(named)
        assert port is not None
        assert (path, port.name) == (named, "ttyACM0")


def test_what_sysfs_does_not_list_is_opened_as_it_is(machine: Path) -> None:
    for named in (str(machine / "dev" / "null"), "/nowhere/ttyUSB0", "socket://host:5000", "socket://a=b:1"):
        assert ports.resolve_port(named, **roots(machine)) == (named, None)


def test_a_device_that_is_not_there_is_told_with_those_that_are(machine: Path) -> None:
    with pytest.raises(NotFoundError, match=r"serial=42; there is ttyACM0 \(34:85:18:AA:BB:CC\), .*ttyUSB0"):
        ports.resolve_port("serial=42", **roots(machine))
    with pytest.raises(NotFoundError, match="no USB port"):
        ports.resolve_port("usb=1-1", sysfs_root=machine / "none", dev_root=machine)


def test_two_devices_with_the_same_serial_have_to_be_told_apart(machine: Path) -> None:
    plug(machine / "sys", "ttyUSB1", plug="1-4")
    with pytest.raises(ArgumentError, match=r"2 ports have serial=0001; .*usb=1-1.2, usb=1-4"):
        ports.resolve_port("serial=0001", **roots(machine))


@pytest.mark.parametrize("port", ["serial=", "usb=", "vid=303a", "=x"])
def test_other_forms_are_refused(machine: Path, port: str) -> None:
    with pytest.raises(ArgumentError, match="port"):
        ports.resolve_port(port, **roots(machine))
