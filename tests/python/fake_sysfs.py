"""A sysfs of our own: USB devices with ttys, as folders and links."""

from __future__ import annotations

from pathlib import Path


def plug(
    root: Path,
    name: str,
    *,
    plug: str = "1-1",
    vid: int = 0x10C4,
    pid: int = 0xEA60,
    serial: str | None = "0001",
    interface: int = 0,
    driver: str = "cp210x",
    product: str = "CP2102N USB to UART Bridge Controller",
) -> None:
    """Adds a tty behind a USB device; ``plug`` "" puts it on the mainboard."""
    if plug:
        device = root / "devices" / "pci0000:00" / "usb1" / plug
        owner = device / f"{plug}:1.{interface}"
        owner.mkdir(parents=True)
        (device / "idVendor").write_text(f"{vid:04x}\n")
        (device / "idProduct").write_text(f"{pid:04x}\n")
        (device / "product").write_text(f"{product}\n")
        if serial is not None:
            (device / "serial").write_text(f"{serial}\n")
        (owner / "bInterfaceNumber").write_text(f"{interface:02x}\n")
    else:
        owner = root / "devices" / "platform" / name
    tty = owner / "tty" / name
    tty.mkdir(parents=True)
    drivers = root / "bus" / "drivers" / driver
    drivers.mkdir(parents=True, exist_ok=True)
    (owner / "driver").symlink_to(drivers)
    (tty / "device").symlink_to(owner)
    classes = root / "class" / "tty"
    classes.mkdir(parents=True, exist_ok=True)
    (classes / name).symlink_to(tty)
