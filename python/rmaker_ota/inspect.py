"""Looks into images, partition tables, otadata, NVS partitions and whole flash images; changes nothing.

`inspect` answers with plain dictionaries that can be printed as JSON. What is damaged is described, not raised: an
answer has an ``"error"`` where something is wrong. Offsets and sizes are bytes; digests are hex.

`app_description` is what a header gate and a target need of an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmaker_ota import credentials, esp_format, nvs, ota_core
from rmaker_ota.errors import ArgumentError, FormatError, ImageError, NotFoundError, OtaError
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.base import AppDescription
from rmaker_ota.targets.chip_record import ChipRecord

if TYPE_CHECKING:
    from rmaker_ota.targets.esp32_serial import Esp32SerialTarget

TABLE_OFFSET = 0x8000  # where ESP-IDF puts the partition table unless told otherwise
SECTOR = 4096
MAX_FILE = 256 << 20  # a flash image larger than any chip is not read into memory

SPI_MODES = ("QIO", "QOUT", "DIO", "DOUT", "FAST_READ", "SLOW_READ")

KINDS = ("image", "partition-table", "otadata", "nvs", "flash")
"""Of files. A chip behind a serial port is of the kind ``"chip"``."""


def app_description(raw: bytes) -> AppDescription:
    """The app descriptor of an image, from its first 288 bytes.

    A device reads it before it looks at anything else, and so does this: an image whose header is damaged still has its
    descriptor (without chip and revisions), and is refused by the image check that follows.

    Raises:
        DataError: fewer bytes than that.
        ImageError: no image, or one without an app descriptor.
    """
    header: esp_format.EspImageHeader | None = None
    wrong: OtaError | None = None
    try:
        header = ota_core.parse_image_header(raw)
    except OtaError as exc:
        wrong = exc
    try:
        found = ota_core.parse_app_descriptor(raw)
    except ImageError as exc:
        if wrong is None:
            raise
        raise wrong from exc  # not an image at all: the better sentence
    return AppDescription(
        version=found.version,
        project_name=found.project_name,
        secure_version=found.secure_version,
        time=found.time,
        date=found.date,
        idf_version=found.idf_version,
        elf_sha256=found.elf_sha256,
        chip_id=None if header is None else header.chip_id,
        min_chip_revision=0 if header is None else header.min_chip_rev_full,
        max_chip_revision=0 if header is None else header.max_chip_rev_full,
    )


# ---- What is it? -----------------------------------------------------------------------------------------------------


def identify(data: bytes) -> str:
    """Which of `KINDS` some bytes are.

    Raises:
        ArgumentError: none of them.
    """
    if _is_table(data[TABLE_OFFSET : TABLE_OFFSET + SECTOR]):
        return "flash"  # before the image: some chips have their boot loader at 0
    if data[:1] == b"\xe9":
        return "image"
    if _is_table(data):
        return "partition-table"
    if len(data) == 2 * SECTOR and all(_is_otadata_sector(data[at : at + SECTOR]) for at in (0, SECTOR)):
        return "otadata"
    if _is_nvs(data):
        return "nvs"
    raise ArgumentError(
        "neither an image, a partition table, otadata, an NVS partition nor a flash image; name it with --kind"
    )


def _is_table(data: bytes) -> bool:
    return data[:2] == b"\xaa\x50"


def _is_otadata_sector(sector: bytes) -> bool:
    """32 bytes and then nothing."""
    return sector[32:].count(0xFF) == SECTOR - 32


def _is_nvs(data: bytes) -> bool:
    """Whole pages, each with a state of its own kind and a version, or empty; at least one is in use."""
    if not data or len(data) % SECTOR:
        return False
    used = 0
    for at in range(0, len(data), SECTOR):
        state = int.from_bytes(data[at : at + 4], "little")
        if state == 0xFFFFFFFF and data[at : at + SECTOR].count(0xFF) == SECTOR:
            continue
        if state not in {0xFFFFFFFE, 0xFFFFFFFC, 0xFFFFFFF8, 0xFFFFFFF0} or data[at + 8] not in {0xFE, 0xFF}:
            return False
        used += 1
    return used > 0


def inspect(where: str | Path, *, kind: str | None = None, nvs_keys: bytes | None = None) -> dict[str, Any]:
    """Looks into a file or a target.

    Args:
        where: a path, or a target's URI (``esp32-image:PATH``, ``file:PATH``, ``esp32-serial:PORT``).
        kind: one of `KINDS`; None: found out.
        nvs_keys: 64 key bytes for encrypted NVS partitions (`rmaker_ota.credentials.read_keys`).

    Returns:
        ``"kind"``, ``"path"``, ``"size"`` and what that kind has.

    Raises:
        ArgumentError: it is nothing known.
        OSError: it cannot be read.
    """
    text = str(where)
    if text.startswith("esp32-serial:"):
        return inspect_chip(text.removeprefix("esp32-serial:"))
    if text.startswith("esp32-image:"):
        path, kind = Path(text.removeprefix("esp32-image:")), kind or "flash"
    else:
        path = Path(text.removeprefix("file:"))
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ArgumentError(f"{path} is larger than {MAX_FILE >> 20} MiB")
    kind = kind or identify(data)
    if kind == "flash":
        found = _inspect_chip(path, data, nvs_keys)
    elif kind == "nvs":
        found = inspect_nvs(data, nvs_keys)
    else:
        found = _LOOK[kind](data)
    return {"kind": kind, "path": str(path), "size": len(data), **found}


# ---- Images ----------------------------------------------------------------------------------------------------------


def inspect_image(data: bytes) -> dict[str, Any]:
    """Header, descriptor, segments, checksum and hash of an app or boot loader image."""
    found = ota_core.parse_image(data)
    return {
        "image_size": found.size,
        "bytes_after": found.bytes_after,
        "header": _header(found.header),
        "app": _app(found.descriptor),
        "bootloader": _bootloader(found.bootloader_descriptor),
        "segments": [
            {
                "offset": segment.data_offset,
                "size": segment.size,
                "load_addr": segment.load_addr,
                "mapped": segment.mapped,
            }
            for segment in found.segments
        ],
        "checksum": _pair(found.checksum, found.checksum_computed),
        "sha256": _pair(found.appended_sha256, found.computed_sha256),
        "error": _error(found.error),
    }


def _pair(stored: int | bytes | None, computed: int | bytes | None) -> dict[str, Any] | None:
    if stored is None or computed is None:
        return None
    return {
        "stored": stored.hex() if isinstance(stored, bytes) else stored,
        "computed": computed.hex() if isinstance(computed, bytes) else computed,
        "right": stored == computed,
    }


def _header(header: esp_format.EspImageHeader | None) -> dict[str, Any] | None:
    if header is None:
        return None
    limits = {0, 0xFFFF}
    return {
        "chip": header.chip,
        "chip_id": header.chip_id,
        "min_revision": revision(header.min_chip_rev_full),
        "max_revision": None if header.max_chip_rev_full in limits else revision(header.max_chip_rev_full),
        "entry_addr": header.entry_addr,
        "spi_mode": SPI_MODES[header.spi_mode] if header.spi_mode < len(SPI_MODES) else header.spi_mode,
        "flash_size": 1 << (20 + header.spi_size) if header.spi_size < 8 else None,
        "hash_appended": header.hash_appended,
    }


def revision(value: int) -> str:
    """``103`` is ``"v1.3"``."""
    return f"v{value // 100}.{value % 100}"


def _app(app: esp_format.AppDescriptor | None) -> dict[str, Any] | None:
    if app is None:
        return None
    return {
        "project": app.project_name,
        "version": app.version,
        "secure_version": app.secure_version,
        "built": " ".join(part for part in (app.date, app.time) if part) or None,
        "idf_version": app.idf_version,
        "elf_sha256": app.elf_sha256.hex(),
    }


def _bootloader(found: esp_format.BootloaderDescriptor | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "version": found.version,
        "secure_version": found.secure_version,
        "built": found.date_time or None,
        "idf_version": found.idf_version,
    }


def _error(exc: OtaError | None) -> dict[str, Any] | None:
    return None if exc is None else {"name": exc.status, "offset": exc.offset, "message": exc.message}


# ---- Partition table -------------------------------------------------------------------------------------------------


def inspect_partition_table(data: bytes, *, flash_size: int = 0) -> dict[str, Any]:
    """The rows of a partition table; ``flash_size`` 0: whether they fit is not looked at."""
    try:
        table = ota_core.parse_partition_table(data, flash_size=flash_size)
    except OtaError as exc:
        return {"partitions": [], "md5": None, "error": _error(exc)}
    return {
        "partitions": [_partition(row) for row in table.partitions],
        "md5": table.md5.hex() if table.md5 else None,
        "error": None,
    }


def _partition(row: esp_format.Partition) -> dict[str, Any]:
    kind, subtype = ota_core.partition_names(row.type, row.subtype)
    return {
        "label": row.label,
        "type": kind,
        "subtype": subtype,
        "offset": row.offset,
        "size": row.size,
        "encrypted": bool(row.flags & esp_format.FLAG_ENCRYPTED),
        "readonly": bool(row.flags & esp_format.FLAG_READONLY),
    }


# ---- otadata ---------------------------------------------------------------------------------------------------------


def inspect_otadata(data: bytes, *, slot_count: int = 2) -> dict[str, Any]:
    """Both select entries; which slot one names depends on how many OTA slots there are."""
    try:
        entries = ota_core.parse_otadata(data)
    except OtaError as exc:
        return {"slot_count": slot_count, "entries": [], "error": _error(exc)}
    return {"slot_count": slot_count, "entries": [_entry(entry, slot_count) for entry in entries], "error": None}


def _entry(entry: esp_format.OtadataEntry, slot_count: int) -> dict[str, Any]:
    facts = ota_core.otadata_facts(entry, slot_count)
    return {
        "seq": None if facts.blank else entry.seq,
        "slot": None if facts.blank else facts.slot,
        "state": None if facts.blank else facts.state_name,
        "crc_right": facts.crc_ok,
        "counts": facts.live,
    }


# ---- NVS -------------------------------------------------------------------------------------------------------------


def inspect_nvs(data: bytes, keys: bytes | None = None) -> dict[str, Any]:
    """The items of a key-value partition, secrets masked. An encrypted one without its keys has none, and as many
    damaged ones. ``"credentials"``: what a node's credentials in it are, None where there are none."""
    try:
        found, encrypted = credentials.open_nvs(data, keys)
    except OtaError as exc:
        return {
            "pages": len(data) // SECTOR,
            "items": [],
            "damaged": 0,
            "encrypted": False,
            "credentials": None,
            "error": _error(exc),
        }
    has_credentials = credentials.NAMESPACE in found.namespaces
    return {
        "pages": len(found.pages),
        "items": nvs.describe(found.items()),
        "damaged": found.damaged,
        "encrypted": encrypted,
        "credentials": credentials.describe(credentials.credentials_in(found)) if has_credentials else None,
        "error": None,
    }


# ---- Flash image -----------------------------------------------------------------------------------------------------


def _inspect_chip(path: Path, data: bytes, nvs_keys: bytes | None) -> dict[str, Any]:
    """A flash image with what the record beside it says of the chip."""
    try:
        record, damage = chip_record.load(path), None
    except FormatError as exc:
        record, damage = None, _error(exc)
    report = inspect_flash(data, record, nvs_keys)
    report["error"] = report["error"] or damage
    return report


def inspect_flash(data: bytes, record: ChipRecord | None = None, nvs_keys: bytes | None = None) -> dict[str, Any]:
    """A whole flash: table, slots with their images, otadata, NVS partitions, and what boots next.

    Args:
        data: the flash.
        record: of the chip it belongs to; None: one with rollback, whose revision and secure version are not known.
        nvs_keys: for NVS partitions that are encrypted; others are read all the same.
    """
    chip = record or ChipRecord()
    table_bytes = data[chip.table_offset : chip.table_offset + SECTOR]
    report = inspect_partition_table(table_bytes, flash_size=len(data))
    report |= {"chip": None, "bootloader": None, "slots": [], "otadata": None, "boot": None, "nvs": []}
    if record is not None:
        names = {row.id: row.name for row in ota_core.esp_chips()}
        report["chip"] = asdict(record) | {"chip": names.get(record.chip_id) if record.chip_id is not None else None}
    if report["error"]:
        return report
    table = ota_core.parse_partition_table(table_bytes, flash_size=len(data))
    report["bootloader"] = _find_bootloader(data, chip.table_offset)
    try:
        layout = ota_core.partition_layout(table)
    except OtaError as exc:
        report["error"] = _error(exc)
        return report
    for row in table.partitions:
        if row.type == esp_format.TYPE_DATA and row.subtype == esp_format.SUBTYPE_DATA_NVS:
            report["nvs"].append({"label": row.label, **inspect_nvs(data[row.offset : row.end], nvs_keys)})
    facts = {}
    for name, row in _slots(layout):
        image = ota_core.parse_image(
            data[row.offset : row.end],
            kind="app",
            slot_size=row.size,
            chip_id=chip.chip_id,
            chip_revision=chip.chip_revision,
            efuse_block_revision=chip.efuse_block_revision,
            ignore_max_revision=chip.ignore_max_revision,
        )
        app = image.descriptor
        facts[name] = esp_format.SlotFacts(
            verifies=image.error is None, described=app is not None, secure_version=app.secure_version if app else 0
        )
        blank = data[row.offset : row.offset + SECTOR].count(0xFF) == min(SECTOR, row.size)
        report["slots"].append(
            {
                "slot": name,
                "label": row.label,
                "offset": row.offset,
                "size": row.size,
                "image_size": image.size,
                "app": _app(app),
                "empty": blank,
                "error": None if blank else _error(image.error),
            }
        )
    entries = (ota_core.blank_otadata_entry(), ota_core.blank_otadata_entry())
    if layout.otadata is not None:
        part = data[layout.otadata.offset : layout.otadata.end]
        report["otadata"] = inspect_otadata(part, slot_count=len(layout.slots))
        if report["otadata"]["error"]:
            report["error"] = report["otadata"]["error"]
            return report
        entries = ota_core.parse_otadata(part)
    decision = ota_core.boot_decide(
        entries,
        esp_format.BootConfig(
            slot_count=len(layout.slots),
            has_factory=layout.factory is not None,
            has_test=layout.test is not None,
            has_otadata=layout.otadata is not None,
            rollback=chip.rollback or chip.anti_rollback,
            anti_rollback=chip.anti_rollback,
            secure_version=chip.secure_version,
            slots=facts,
        ),
    )
    report["boot"] = {"slot": decision.slot, "reasons": list(decision.reasons), "writes": bool(decision.plan.ops)}
    return report


def _slots(layout: esp_format.PartitionLayout) -> Iterator[tuple[str, esp_format.Partition]]:
    if layout.factory is not None:
        yield "factory", layout.factory
    for number, row in enumerate(layout.slots):
        yield f"ota_{number}", row
    if layout.test is not None:
        yield "test", layout.test


def _find_bootloader(data: bytes, table_offset: int) -> dict[str, Any] | None:
    """The boot loader, at the offset of the chip it says it is for."""
    for chip in ota_core.esp_chips():
        at = chip.bootloader_offset
        if data[at : at + 1] != b"\xe9":
            continue
        found = ota_core.parse_image(data[at:table_offset], kind="bootloader")
        if found.header is not None and found.header.chip_id == chip.id:
            return {
                "offset": at,
                "image_size": found.size,
                "chip": chip.name,
                **(_bootloader(found.bootloader_descriptor) or {}),
                "error": _error(found.error),
            }
    return None


# ---- A chip behind a serial port -------------------------------------------------------------------------------------


def inspect_chip(place: str, **options: Any) -> dict[str, Any]:
    """A chip behind a serial port: what it is, which stub does the work, its slots and what boots next.

    The chip is stopped for that and runs again afterwards.

    Args:
        place: what stands behind ``esp32-serial:``.
        options: of `rmaker_ota.targets.esp32_serial.Esp32SerialTarget`.

    Raises:
        OtaError: no chip answers.
    """
    from rmaker_ota.targets.esp32_serial import Esp32SerialTarget

    with Esp32SerialTarget(place, **options) as target:
        report: dict[str, Any] = {"kind": "chip", "path": target.uri, "partitions": [], "slots": []}
        report |= {"otadata": None, "boot": None, "error": None}
        try:
            _look_into_chip(target, report)
        except OtaError as exc:
            if target.info is None:
                raise
            report["error"] = _error(exc)
        info = target.info
        assert info is not None, "something was asked of it"
        stub = target.stubs.find(info.stub) if info.stub is not None else None
        report["size"] = info.flash_size
        report["chip"] = {
            "chip": info.chip,
            "title": info.title,
            "revision": None if info.revision is None else revision(info.revision),
            "mac": info.mac,
            "flash_id": info.flash_id or None,
            "flash_size_known": info.flash_size_known,
            "link": info.link,
            "baud": info.baud,
            "secure_download": info.secure_download,
            "secure_boot": info.secure_boot,
            "flash_encrypted": info.flash_encrypted,
        }
        report["stub"] = {
            "used": info.stub,
            "release": stub.release if stub is not None else None,
            "was_running": info.stub_was_running,
            "origin": target.stubs.origin,
            "notes": list(target.stubs.notes),
        }
    return report


def _look_into_chip(target: Esp32SerialTarget, report: dict[str, Any]) -> None:
    table = target.partition_table()
    report["partitions"] = [_partition(row) for row in table.partitions]
    running = target.running_slot()
    for slot in target.slots:
        app = target.describe(slot)
        report["slots"].append(
            {
                "slot": slot.name,
                "offset": slot.offset,
                "size": slot.size,
                "runs": slot == running,
                "app": None
                if app is None
                else {
                    "project": app.project_name,
                    "version": app.version,
                    "secure_version": app.secure_version,
                    "built": " ".join(part for part in (app.date, app.time) if part) or None,
                    "idf_version": app.idf_version,
                },
            }
        )
    count = len(ota_core.partition_layout(table).slots)
    with contextlib.suppress(NotFoundError):
        report["otadata"] = {
            "slot_count": count,
            "entries": [_entry(entry, count) for entry in target.esp.entries()],
            "error": None,
        }
    boot = target.preview()
    report["boot"] = {"slot": boot.slot.name if boot.slot else None, "reasons": list(boot.reasons)}


_LOOK: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "image": inspect_image,
    "partition-table": inspect_partition_table,
    "otadata": inspect_otadata,
}
