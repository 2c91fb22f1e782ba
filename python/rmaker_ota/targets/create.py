"""Makes flash images of virtual ESP32 chips from scratch: for the demo, for tests, for a node without a chip."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, DeviceError
from rmaker_ota.esp_build import build_image
from rmaker_ota.esp_format import PartitionTable
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.chip_record import ChipRecord

SECTOR = 4096
APP_ALIGN = 0x10000
_FIRST_APP = 0x20000  # NVS, otadata and PHY data lie below
_FACTORY_NVS = 0x6000  # at the end, as RainMaker firmware has it


def make_partition_csv(flash_size: int = 4 << 20, *, factory: bool = False) -> str:
    """A partition table for two OTA slots as large as the flash allows, as CSV.

    Args:
        flash_size: bytes, at least 512 KiB.
        factory: with a factory slot of the same size too.

    Raises:
        ArgumentError: the flash is too small.
    """
    names = ["factory", "ota_0", "ota_1"] if factory else ["ota_0", "ota_1"]
    size = (flash_size - _FIRST_APP - _FACTORY_NVS) // len(names) // APP_ALIGN * APP_ALIGN
    if size < APP_ALIGN:
        raise ArgumentError(f"a flash of {flash_size} bytes is too small for {len(names)} app slots", stage="target")
    rows = [
        "nvs,      data, nvs,     0x9000,  0x6000",
        "otadata,  data, ota,     0xf000,  0x2000",
        "phy_init, data, phy,     0x11000, 0x1000",
    ]
    for i, name in enumerate(names):
        rows.append(f"{name}, app, {name}, {_FIRST_APP + i * size:#x}, {size:#x}")
    rows.append(f"fctry, data, nvs, {_FIRST_APP + len(names) * size:#x}, {_FACTORY_NVS:#x}")
    return "\n".join(rows) + "\n"


def create_flash_image(
    path: str | os.PathLike[str],
    app: bytes,
    *,
    chip: str = "esp32c3",
    chip_revision: int | None = None,
    flash_size: int = 4 << 20,
    table: PartitionTable | str | None = None,
    table_offset: int = 0x8000,
    factory: bool = False,
    slot: str | None = None,
    bootloader: bytes | None = None,
    rollback: bool = True,
    anti_rollback: bool = False,
    secure_version: int = 0,
    overwrite: bool = False,
) -> None:
    """Makes a flash image and the record of its chip, as they leave a factory: one app, empty otadata, switched off.

    Args:
        path: of the flash image.
        app: the first app image, whole.
        chip: its name.
        chip_revision: major * 100 + minor; None: not known, not checked.
        flash_size: bytes, whole sectors.
        table: partition table, as CSV or read from one; None: `make_partition_csv`.
        table_offset: where it lies.
        factory: the usual table gets a factory slot.
        slot: where the app goes: ``factory`` or ``ota_0`` ..; None: factory where there is one, else ota_0.
        bootloader: the second-stage boot loader's image; None: a placeholder that does nothing but name the chip.
        rollback, anti_rollback: how boot loader and app are built.
        secure_version: burnt into the eFuses.
        overwrite: replace a file that is there.

    Raises:
        ArgumentError: the file is there already, or something does not fit.
        FormatError: the partition table is not valid.
        ImageError, DataError, RejectedError: the app is no whole image for that chip.
        DeviceError: it cannot be written.
    """
    path = Path(path)
    chip_id = ota_core.esp_chip_id(chip)
    described = next(row for row in ota_core.esp_chips() if row.id == chip_id)
    if flash_size <= 0 or flash_size % SECTOR != 0:
        raise ArgumentError(f"a flash has whole sectors of {SECTOR} bytes, not {flash_size} bytes", stage="target")
    if table is None:
        table = make_partition_csv(flash_size, factory=factory)
    if isinstance(table, str):
        table = ota_core.partition_table_from_csv(
            table, table_offset=table_offset, flash_size=flash_size, bootloader_offset=described.bootloader_offset
        )
    layout = ota_core.partition_layout(table)
    places = {f"ota_{i}": place for i, place in enumerate(layout.slots)}
    if layout.factory is not None:
        places["factory"] = layout.factory
    slot = slot or ("factory" if layout.factory is not None else "ota_0")
    if slot not in places:
        raise ArgumentError(f"the partition table has no slot {slot!r}, only {', '.join(places)}", stage="target")
    found = ota_core.parse_image(
        app, kind="app", chip_id=chip_id, chip_revision=chip_revision, slot_size=places[slot].size
    )
    if found.error is not None:
        raise found.error
    if bootloader is None:
        bootloader = build_image(size=1024, version="0", project_name="placeholder", chip_id=chip_id)
    _check_fits("the boot loader", bootloader, described.bootloader_offset, table_offset)
    _check_fits("the app", app, 0, places[slot].size)

    flash = bytearray(b"\xff") * flash_size
    rows = ota_core.build_partition_table(table)
    for offset, part in ((described.bootloader_offset, bootloader), (table_offset, rows), (places[slot].offset, app)):
        flash[offset : offset + len(part)] = part
    if len(flash) != flash_size:
        raise ArgumentError(f"the parts do not fit into a flash of {flash_size} bytes", stage="target")
    if path.exists() and not overwrite:
        raise ArgumentError(f"{path} exists already", stage="target")
    record = ChipRecord(
        chip_id=chip_id,
        chip_revision=chip_revision,
        secure_version=secure_version,
        rollback=rollback or anti_rollback,
        anti_rollback=anti_rollback,
        table_offset=table_offset,
    )
    chip_record.save(path, record)  # first: beside an older image it means switched off, which is true of both
    _write(path, flash)


def _check_fits(what: str, data: bytes, start: int, end: int) -> None:
    if len(data) > end - start:
        raise ArgumentError(f"{what} has {len(data)} bytes, there is room for {end - start}", stage="target")


def _write(path: Path, data: bytearray) -> None:
    """The file is on the medium under its name, complete, or not at all."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        chip_record.sync_directory(path.parent)
    except OSError as exc:
        raise DeviceError(
            f"{path} cannot be written: {exc.strerror}", status="ERR_SYSTEM", stage="target", device_code=exc.errno or 0
        ) from exc


__all__ = ["create_flash_image", "make_partition_csv"]
