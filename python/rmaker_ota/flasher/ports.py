"""Serial ports with what sysfs says of the devices behind them. Looks only: opens none.

A port is named as the user likes: by its path (``/dev/ttyUSB0``, ``/dev/serial/by-id/...``), by what stays the same
when the name changes (``serial=34:85:18:AA:BB:CC``, ``usb=1-1.2``, ``usb=1-1.2:0`` with an interface), or, without any
device, by ``socket://host:port``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, NotFoundError
from rmaker_ota.records import dataclass

ESPRESSIF = 0x303A
"""USB vendor id of the chips' own ports."""

SERIAL_MIN = 6
"""Characters of a USB serial that is taken for unique: many adapters say "0001" (``OTA_TTY_SERIAL_MIN``)."""


@dataclass(frozen=True, slots=True)
class Port:
    """A serial port. Strings are what the device says of itself, ``""`` where it says nothing.

    ``usb_path`` is the plug it is in (``"1-1.2"``), ``""`` when it is not on USB; ``vid`` and ``pid`` are 0 and
    ``interface`` is -1 then. ``by_id`` is its link below ``/dev/serial/by-id``, ``""`` where udev made none.
    """

    name: str
    path: str
    by_id: str
    driver: str
    usb_path: str
    vid: int
    pid: int
    interface: int
    serial: str
    manufacturer: str
    product: str

    @property
    def is_usb(self) -> bool:
        return self.usb_path != ""

    @property
    def is_chip(self) -> bool:
        """Whether the port is the chip's own, not an adapter's."""
        return self.vid == ESPRESSIF

    @property
    def device_key(self) -> str | None:
        """Name of the device that outlives replugging; None when nothing tells it from others of its kind."""
        if len(self.serial) < SERIAL_MIN:
            return None
        return f"{self.vid:04x}-{self.serial}"


def list_ports(*, sysfs_root: str | os.PathLike[str] = "/sys", dev_root: str | os.PathLike[str] = "/dev") -> list[Port]:
    """All serial ports with a device behind them, by name.

    Raises:
        DeviceError: sysfs cannot be read.
    """
    links = _by_id(Path(dev_root))
    ports = []
    for name, driver, usb_path, serial, manufacturer, product, vid, pid, interface in ota_core.list_ttys(sysfs_root):
        path = str(Path(dev_root) / name)
        ports.append(
            Port(
                name=name,
                path=path,
                by_id=links.get(name, ""),
                driver=driver,
                usb_path=usb_path,
                vid=vid,
                pid=pid,
                interface=interface,
                serial=serial,
                manufacturer=manufacturer,
                product=product,
            )
        )
    return ports


def _by_id(dev_root: Path) -> dict[str, str]:
    """Names of ttys and the links that lead to them."""
    links: dict[str, str] = {}
    folder = dev_root / "serial" / "by-id"
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return {}
    for link in entries:
        links.setdefault(link.resolve().name, str(link))
    return links


def is_socket(port: str) -> bool:
    return port.startswith("socket://")


def find_port(
    port: str, *, sysfs_root: str | os.PathLike[str] = "/sys", dev_root: str | os.PathLike[str] = "/dev"
) -> Port | None:
    """What is known of the port a user named.

    Returns:
        The port; None for sockets, pseudo terminals and whatever else sysfs does not list.

    Raises:
        ArgumentError: not a form a port can have.
        NotFoundError: no device has that serial or sits in that plug.
        DeviceError: sysfs cannot be read.
    """
    if is_socket(port):
        return None
    known = list_ports(sysfs_root=sysfs_root, dev_root=dev_root)
    if not _is_query(port):
        real = Path(port).resolve()
        return next((each for each in known if real == Path(dev_root).resolve() / each.name), None)
    kind, _, value = port.partition("=")
    if not value:
        raise ArgumentError(f"port {port!r} says nothing after its =", stage="target")
    match kind:
        case "serial":
            found = [each for each in known if each.is_usb and each.serial == value]
        case "usb":
            plug, _, interface = value.partition(":")
            found = [
                each for each in known if each.usb_path == plug and (not interface or str(each.interface) == interface)
            ]
        case _:
            raise ArgumentError(f"port {port!r} is none of PATH, serial=, usb=, socket://HOST:PORT", stage="target")
    return _one(port, found, known)


def _is_query(port: str) -> bool:
    """Whether a port is named by what its device says, not by a path."""
    return "=" in port.partition("/")[0]


def _one(port: str, found: list[Port], known: Iterable[Port]) -> Port:
    """The port that was found; of one device's several interfaces the lowest."""
    if not found:
        others = ", ".join(f"{each.name} ({each.serial or each.usb_path})" for each in known if each.is_usb)
        raise NotFoundError(f"no port has {port}; there is {others or 'no USB port'}", stage="target")
    plugs = sorted({each.usb_path for each in found})
    if len(plugs) > 1:
        choice = ", ".join(f"usb={plug}" for plug in plugs)
        raise ArgumentError(f"{len(found)} ports have {port}; name one by its plug: {choice}", stage="target")
    return min(found, key=lambda each: each.interface)


def resolve_port(
    port: str, *, sysfs_root: str | os.PathLike[str] = "/sys", dev_root: str | os.PathLike[str] = "/dev"
) -> tuple[str, Port | None]:
    """What to open for the port a user named, and what is known of it. Raises as `find_port`."""
    found = find_port(port, sysfs_root=sysfs_root, dev_root=dev_root)
    if found is not None and _is_query(port):
        return found.path, found
    return port, found


__all__ = ["ESPRESSIF", "Port", "find_port", "is_socket", "list_ports", "resolve_port"]
