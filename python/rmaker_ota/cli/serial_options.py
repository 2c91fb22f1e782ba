"""Options that commands about chips at serial ports share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from rmaker_ota.errors import ArgumentError
from rmaker_ota.targets.esp32_serial import DEFAULT_BAUD, parse_size


class FlashNumber(click.ParamType[int]):
    """An offset or a size: decimal, ``0x`` hex, or with K or M behind it."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            number = parse_size(value)
        except ValueError:
            self.fail(f"{value!r} is no number (examples: 0x10000, 65536, 64K, 4MB)", param, ctx)
        if not 0 <= number < 1 << 32:
            self.fail(f"{value!r} is not below 4 GiB", param, ctx)
        return number


def serial_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a port: baud, chip, before, stub, connect_attempts."""
    options = [
        click.option(
            "--baud", "-b", type=click.IntRange(1200, 12_000_000), default=DEFAULT_BAUD, show_default=True, help="Rate."
        ),
        click.option("--chip", default="auto", show_default=True, help="The chip it has to be."),
        click.option(
            "--before",
            metavar="RESET",
            default="default-reset",
            show_default=True,
            help="How the boot loader is entered: default-reset, classic-reset, usb-reset, no-reset, no-reset-no-sync, "
            "or a sequence such as D0|R1|W0.1|D1|R0|W0.05|D0.",
        ),
        click.option("--stub", metavar="DIR", help="Folder of stubs; none: the boot ROM alone.  [default: found out]"),
        click.option(
            "--connect-attempts", type=click.IntRange(1, 1000), default=7, show_default=True, help="Tries to reset it."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def port_list(ports: str) -> list[str]:
    """Ports of a list with commas.

    Raises:
        ArgumentError: one is empty or named twice.
    """
    names = [port.strip() for port in ports.split(",")]
    if not all(names):
        raise ArgumentError(f"a port in {ports!r} has no name")
    if len(set(names)) < len(names):
        raise ArgumentError(f"a port in {ports!r} is named twice")
    return names
