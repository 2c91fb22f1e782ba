"""``rmaker-ota ports``: which serial ports there are, which chips are behind them and what runs there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from rmaker_ota.cli import output
from rmaker_ota.cli.serial_options import serial_options
from rmaker_ota.errors import OtaError
from rmaker_ota.flasher.ports import Port, list_ports
from rmaker_ota.inspect import revision
from rmaker_ota.targets.esp32_serial import Esp32SerialTarget


def describe(port: Port) -> dict[str, Any]:
    """What sysfs says of a port."""
    return {
        "port": port.path,
        "by_id": port.by_id or None,
        "driver": port.driver or None,
        "usb": {
            "path": port.usb_path,
            "vid": f"{port.vid:04x}",
            "pid": f"{port.pid:04x}",
            "serial": port.serial or None,
            "interface": port.interface,
            "manufacturer": port.manufacturer or None,
            "product": port.product or None,
        }
        if port.is_usb
        else None,
    }


def probe(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the chip behind a port says; it is restarted for that."""
    found: dict[str, Any] = {
        "chip": None,
        "revision": None,
        "mac": None,
        "flash_size": None,
        "stub": None,
        "slot": None,
        "state": None,
        "project": None,
        "version": None,
        "error": None,
    }
    try:
        with Esp32SerialTarget(name, **options) as target:
            try:
                slot = target.running_slot()
                app = target.describe(slot) if slot is not None else None
                if slot is not None:
                    found["slot"] = slot.name
                    found["state"] = _state(target, slot)
                if app is not None:
                    found |= {"project": app.project_name, "version": app.version}
            finally:
                info = target.info
                if info is not None:
                    found |= {
                        "chip": info.chip,
                        "revision": None if info.revision is None else revision(info.revision),
                        "mac": info.mac,
                        "flash_size": info.flash_size if info.flash_size_known else None,
                        "stub": info.stub,
                    }
    except OtaError as exc:
        found["error"] = {"status": exc.status, "message": exc.message}
    return found


def _state(target: Esp32SerialTarget, slot: Any) -> str | None:
    try:
        return target.boot_state(slot).name.lower()
    except OtaError:
        return None


def lines(row: dict[str, Any]) -> list[str]:
    """A port as people read it."""
    usb = row["usb"]
    known = f"{usb['vid']}:{usb['pid']} {usb['product'] or row['driver'] or ''}".strip() if usb else row["driver"] or ""
    serial = f", serial {usb['serial']}" if usb and usb["serial"] else ""
    plug = f", plug {usb['path']}" if usb else ""
    out = [f"{row['port']}  {known}{serial}{plug}".rstrip()]
    chip = row.get("probe")
    if not chip:
        return out
    if chip["chip"]:
        size = f", {output.mib(chip['flash_size'])} flash" if chip["flash_size"] else ""
        rev = f" {chip['revision']}" if chip["revision"] else ""
        out.append(f"    {chip['chip']}{rev}, MAC {chip['mac'] or 'unreadable'}{size}")
    if chip["slot"]:
        app = f"{chip['project']} {chip['version']}" if chip["version"] is not None else "no app"
        state = f" ({chip['state']})" if chip["state"] else ""
        out.append(f"    {chip['slot']}{state}: {app}")
    if chip["error"]:
        out.append(f"    {chip['error']['message']}")
    return out


@click.command("ports")
@click.argument("names", metavar="[PORT]...", nargs=-1)
@click.option("--no-probe", is_flag=True, help="Look at the ports alone; chips go on running.")
@click.option("--all", "-a", "with_all", is_flag=True, help="Ports that are not on USB too.")
@serial_options
@output.json_option
def command(
    names: tuple[str, ...],
    *,
    no_probe: bool,
    with_all: bool,
    baud: int,
    chip: str,
    before: str,
    stub: str | None,
    connect_attempts: int,
    as_json: bool,
) -> None:
    """List serial ports with the chips behind them: chip, MAC, running slot and version.

    Asking a chip stops its application for a second and restarts it; --no-probe leaves it alone. Without PORT all USB
    ports are listed.
    """
    known = list_ports()
    if names:
        paths = {path: port for port in known for path in (port.path, port.by_id)}
        rows = [describe(paths[name]) if name in paths else bare(name) for name in names]
    else:
        rows = [describe(port) for port in known if port.is_usb or with_all]
    if rows and not no_probe:
        options = {
            "baud": baud,
            "chip": chip,
            "before": before,
            "stub": stub,
            "connect_attempts": connect_attempts,
        }
        with ThreadPoolExecutor(min(len(rows), 64), thread_name_prefix="rmaker-ports") as pool:
            found = list(pool.map(lambda row: probe(row["port"], options), rows))
        for row, result in zip(rows, found, strict=True):
            row["probe"] = result
    if as_json:
        output.print_json(rows)
        return
    if not rows:
        output.say("no USB serial port")
    for row in rows:
        for line in lines(row):
            output.say(line)


def bare(name: str) -> dict[str, Any]:
    """A port of which sysfs knows nothing."""
    return {"port": name, "by_id": None, "driver": None, "usb": None}
