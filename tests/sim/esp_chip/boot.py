"""What the chip does without a host: the boot loader chooses a slot, and the app in it prints."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rmaker_ota import ota_core
from rmaker_ota.errors import OtaError

if TYPE_CHECKING:
    from tests.sim.esp_chip.chip import Options
    from tests.sim.esp_chip.flash import Flash
    from tests.sim.esp_chip.personas import Persona


@dataclass(frozen=True, slots=True)
class BootedApp:
    """What runs.

    Attributes:
        slot: its name.
        offset: of the slot.
        entry: address in the image header.
        project_name, version: of the app descriptor.
        reasons: how the boot loader came to it.
    """

    slot: str
    offset: int
    entry: int
    project_name: str
    version: str
    reasons: tuple[str, ...]

    def confirm(self, flash: Flash, options: Options) -> None:
        """The app marks itself valid."""
        with contextlib.closing(_open(flash, options, running=self.slot)) as esp:
            esp.mark_valid()


@dataclass(frozen=True, slots=True)
class App:
    """What an app does on its console.

    Attributes:
        lines: it prints, without line ends.
        line_s: before each.
        crashes: after the lines it crashes, and the chip restarts.
        confirms: after the lines it marks itself valid.
    """

    lines: Sequence[str] = ()
    line_s: float = 0.1
    crashes: bool = False
    confirms: bool = False

    def crash_text(self) -> str:
        return (
            "\r\nGuru Meditation Error: Core  0 panic'ed (Load access fault). Exception was unhandled.\r\n"
            "\r\nBacktrace: 0x42007d0e:0x3fc91230\r\n\r\nRebooting...\r\n"
        )


def usual_app(booted: BootedApp) -> App:
    """An app that starts well and says so."""
    return App(
        (
            f"I (345) app_init: Project name:     {booted.project_name}",
            f"I (350) app_init: App version:      {booted.version}",
            "I (812) main: ready",
        )
    )


def silent_app(_booted: BootedApp) -> App:
    return App()


def crashing_app(_booted: BootedApp) -> App:
    return App(("I (345) main: starting",), crashes=True)


def start_text(booted: BootedApp) -> str:
    return (
        f"load:0x3fcd5820,len:0x1574\r\nentry 0x403cc70a\r\nI (24) boot: ESP-IDF 2nd stage bootloader\r\n"
        f"I (187) boot: Loaded app from partition at offset {booted.offset:#x}\r\n"
        f"I (240) boot: entry {booted.entry:#x}\r\n"
    )


def choose(flash: Flash, persona: Persona, options: Options) -> BootedApp | None:
    """The boot loader's work on the flash as it is, with what it writes. None: nothing boots."""
    if options.needs_bootloader:
        at = persona.bootloader_offset
        header = flash[at : at + 24]
        if header[0] != 0xE9 or int.from_bytes(header[12:14], "little") != persona.chip_id:
            return None
    try:
        with contextlib.closing(_open(flash, options, chip_id=persona.chip_id)) as esp:
            decision = esp.boot()
            if decision.slot is None:
                return None
            header_of_app, descriptor = esp.describe(decision.slot)
            offset = next(start for name, _, start, _ in esp.slots() if name == decision.slot)
            return BootedApp(
                decision.slot,
                offset,
                header_of_app.entry_addr,
                descriptor.project_name,
                descriptor.version,
                decision.reasons,
            )
    except OtaError:
        return None


def _open(
    flash: Flash, options: Options, *, running: str | None = None, chip_id: int | None = None
) -> ota_core.EspTarget:
    return ota_core.EspTarget(
        flash.path,
        table_offset=options.table_offset,
        rollback=options.rollback or options.anti_rollback,
        anti_rollback=options.anti_rollback,
        running=running,
        chip_id=chip_id,
    )
