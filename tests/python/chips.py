"""Small virtual chips for tests: 512 KiB of flash, two OTA slots and a factory slot of 128 KiB, images of 8 KiB."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rmaker_ota import ota_core
from rmaker_ota.esp_build import build_image
from rmaker_ota.esp_format import (
    STATE_ABORTED,
    STATE_INVALID,
    STATE_NEW,
    STATE_PENDING_VERIFY,
    STATE_UNDEFINED,
    STATE_VALID,
    OtadataEntry,
)
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.chip_record import ChipRecord
from rmaker_ota.targets.esp32_image import Esp32ImageTarget

FLASH_SIZE = 0x80000
OTADATA = 0xF000
SECTOR = 0x1000
IMAGE_SIZE = 0x2010  # two sectors and a tail
OFFSETS = {"ota_0": 0x20000, "ota_1": 0x40000, "factory": 0x60000}
SLOT_SIZE = 0x20000

TABLE = """
nvs,     data, nvs,   0x9000,  0x6000
otadata, data, ota,   0xf000,  0x2000
phy,     data, phy,   0x11000, 0x1000
ota_0,   app,  ota_0, 0x20000, 128K
ota_1,   app,  ota_1, 0x40000, 128K
"""
FACTORY_ROW = "factory, app, factory, 0x60000, 128K\n"

APPS = {"ota_0": "1.0.0", "ota_1": "2.0.0", "factory": "0.9.0"}

_STATES = {
    "NEW": STATE_NEW,
    "PENDING_VERIFY": STATE_PENDING_VERIFY,
    "VALID": STATE_VALID,
    "INVALID": STATE_INVALID,
    "ABORTED": STATE_ABORTED,
    "UNDEFINED": STATE_UNDEFINED,
}


@cache
def image(version: str, secure_version: int = 0, **options: Any) -> bytes:
    """An app image of IMAGE_SIZE bytes for an ESP32-C3."""
    return build_image(size=IMAGE_SIZE, version=version, secure_version=secure_version, project_name="chip", **options)


def entry(text: str) -> OtadataEntry:
    """An otadata entry from ``"2:NEW"`` or ``"blank"``."""
    if text == "blank":
        return ota_core.blank_otadata_entry()
    seq, _, state = text.partition(":")
    return ota_core.make_otadata_entry(int(seq), _STATES[state])


def entry_text(found: OtadataEntry) -> str:
    """The other way; a wrong CRC is told."""
    facts = ota_core.otadata_facts(found, 2)
    if facts.blank:
        return "blank"
    return f"{found.seq}:{facts.state_name}" + ("" if facts.crc_ok else " BADCRC")


@contextmanager
def memory_directory(otherwise: Path) -> Iterator[Path]:
    """A directory in memory where the system has one: waiting for a disk thousands of times teaches nothing."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else otherwise) as directory:
        yield Path(directory)


def make_chip(
    path: Path,
    entries: Sequence[str] = ("1:VALID", "blank"),
    *,
    factory: bool = False,
    apps: Mapping[str, bytes | None] | None = None,
    table: str | None = None,
    running: str | None = None,
    **record: Any,
) -> Path:
    """A chip: both otadata entries, the images of its slots (usual: `APPS`), and its record."""
    flash = bytearray(b"\xff") * FLASH_SIZE
    csv = table if table is not None else TABLE + (FACTORY_ROW if factory else "")
    rows = ota_core.build_partition_table(ota_core.partition_table_from_csv(csv))
    flash[0x8000 : 0x8000 + len(rows)] = rows
    flash[OTADATA : OTADATA + 2 * SECTOR] = ota_core.build_otadata([entry(text) for text in entries])
    for slot, version in APPS.items():
        data = (apps or {}).get(slot, image(version))
        if data is not None and (slot != "factory" or factory):
            flash[OFFSETS[slot] : OFFSETS[slot] + len(data)] = data
    path.write_bytes(flash)
    chip_record.save(path, ChipRecord(chip_id=5, chip_revision=3, running=running, **record))
    return path


def otadata(path: Path) -> tuple[str, str]:
    """Both entries as they lie in the file."""
    flash = path.read_bytes()
    first, second = ota_core.parse_otadata(flash[OTADATA : OTADATA + 2 * SECTOR])
    return entry_text(first), entry_text(second)


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrites bytes of the file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def spoil(path: Path, slot: str, offset: int = 0x1800) -> None:
    """Changes one byte of a slot's image."""
    at = OFFSETS[slot] + offset
    patch(path, at, bytes([path.read_bytes()[at] ^ 0x10]))


def slot_bytes(path: Path, slot: str, size: int = IMAGE_SIZE) -> bytes:
    return path.read_bytes()[OFFSETS[slot] : OFFSETS[slot] + size]


def version_of(target: Esp32ImageTarget) -> str | None:
    """Version of the running image."""
    running = target.running_slot()
    description = None if running is None else target.describe(running)
    return None if description is None else description.version
