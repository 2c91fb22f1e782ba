"""An ESP flash image: what it takes to install 2 MiB into an app slot, and how fast its formats are read.

Operations are those of the flash: an erase may span several sectors, ``programmed`` are bytes written after it,
``skipped`` bytes that were there already. They are of the whole installation: table, slot, otadata. Plain Python does
the same work sector by sector; the blind writer only writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benches import plain_esp
from benches.measure import Measure

from rmaker_ota import ota_core
from rmaker_ota.esp_build import build_image
from rmaker_ota.esp_format import AppDescriptor, EspImage, EspImageHeader, OtadataEntry, PartitionTable
from rmaker_ota.install import install
from rmaker_ota.nvs import NvsItem
from rmaker_ota.targets.chip_record import record_path
from rmaker_ota.targets.create import create_flash_image
from rmaker_ota.targets.esp32_image import Esp32ImageTarget

SECTOR = 4096
BLANK = b"\xff" * SECTOR
OTADATA = 0xF000  # where `make_partition_csv` puts it
DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "vectors"
ROUNDS = 9

# ---- 2 MiB into a slot -----------------------------------------------------------------------------------------------


class Chip:
    """A flash image whose inactive slot holds what the case says, made anew for each run.

    Args:
        folder: where it lies.
        case: "blank", "dirty" (programmed all over), "identical" or "one string changed".
        size: bytes of the image.
    """

    def __init__(self, folder: Path, case: str, size: int) -> None:
        self.image = build_image(version="2.0.0", size=size)
        self.path = folder / "chip.bin"
        self._kept = folder / "kept.bin"
        create_flash_image(self.path, build_image(version="1.0.0"), flash_size=8 << 20)
        with Esp32ImageTarget(self.path) as target:
            target.restart()  # runs: later ones find it as it is
            self.slot = target.next_slot()
        content = bytearray(self.path.read_bytes())
        content[self.slot.offset : self.slot.offset + self.slot.size] = self._content(case)
        self._kept.write_bytes(content)
        self._record = record_path(self.path).read_bytes()

    def _content(self, case: str) -> bytes:
        match case:
            case "blank":
                held = b""
            case "dirty":
                held = bytes(self.slot.size)
            case "identical":
                held = self.image
            case _:  # the image of the same build, but for one string in its middle
                changed = bytearray(self.image)
                middle = len(changed) // 2
                changed[middle : middle + 12] = b"another text"
                held = bytes(changed)
        return held + b"\xff" * (self.slot.size - len(held))

    def fresh(self) -> tuple[Path]:
        shutil.copyfile(self._kept, self.path)
        record_path(self.path).write_bytes(self._record)
        return (self.path,)

    def holds_image(self, _: object) -> None:
        with self.path.open("rb") as flash:
            flash.seek(self.slot.offset)
            assert flash.read(len(self.image)) == self.image


def install_it(chip: Chip) -> Callable[[Path], dict[str, object]]:
    def run(path: Path) -> dict[str, object]:
        with contextlib.closing(Esp32ImageTarget(path)) as target:
            result = install(chip.image, target)
            counts = target.esp.counts
        assert result.activated
        return {
            "reads": counts["reads"],
            "writes": counts["programs"],
            "erases": counts["erases"],
            "syncs": counts["syncs"],
            "programmed": counts["bytes_programmed"],
            "skipped": result.bytes_skipped,
            "sectors_erased": counts["sectors_erased"],
        }

    return run


def blind_write(chip: Chip) -> Callable[[Path], dict[str, object]]:
    """Seeks, writes, hashes; looks at nothing that is there, and the chip goes on booting what it booted."""

    def run(path: Path) -> dict[str, object]:
        writes = 0
        digest = hashlib.sha256()
        with path.open("r+b", buffering=0) as flash:
            offset = slot_offset(flash, chip.slot.name)
            for at in range(0, len(chip.image), SECTOR):
                sector = chip.image[at : at + SECTOR]
                digest.update(sector)
                flash.seek(offset + at)
                flash.write(sector)
                writes += 1
            os.fdatasync(flash.fileno())
        assert digest.digest() == hashlib.sha256(chip.image).digest()
        return {"reads": 1, "writes": writes, "erases": 0, "syncs": 1, "programmed": len(chip.image)}

    return run


def plain_install(chip: Chip) -> Callable[[Path], dict[str, object]]:
    """What the engine does, in plain Python: sectors that differ are erased where they are not blank, and programmed;
    then the image is read back and checked, and otadata names it."""

    def run(path: Path) -> dict[str, object]:
        reads = writes = erases = 0
        digest = hashlib.sha256()
        with path.open("r+b", buffering=0) as flash:
            offset = slot_offset(flash, chip.slot.name)
            for at in range(0, len(chip.image), SECTOR):
                sector = chip.image[at : at + SECTOR]
                digest.update(sector)
                flash.seek(offset + at)
                held = flash.read(SECTOR)
                reads += 1
                if held == sector:
                    continue
                if held != BLANK:
                    flash.seek(offset + at)
                    flash.write(BLANK)
                    erases += 1
                flash.seek(offset + at)
                flash.write(sector)
                writes += 1
            os.fdatasync(flash.fileno())
            flash.seek(offset)
            found = plain_esp.parse_image(flash.read(len(chip.image)))
            flash.seek(OTADATA + SECTOR)
            flash.write(plain_esp.otadata_entry(2, 0))
            os.fdatasync(flash.fileno())
        assert digest.digest() == hashlib.sha256(chip.image).digest()
        assert found.version == "2.0.0"
        return {
            "reads": reads + 2,
            "writes": writes + 1,
            "erases": erases,
            "syncs": 2,
            "programmed": writes * SECTOR + 32,
            "skipped": len(chip.image) - writes * SECTOR,
            "sectors_erased": erases,
        }

    return run


def slot_offset(flash: Any, name: str) -> int:
    flash.seek(0x8000)
    return next(row[3] for row in plain_esp.parse_partition_table(flash.read(0xC00)) if row[0] == name)


WAYS: dict[str, Callable[[Chip], Callable[[Path], Any]]] = {
    "ours": install_it,
    "plain Python": plain_install,
    "blind writer": blind_write,
}
CASES = ("blank", "dirty", "identical", "one string changed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_image_into_slot(measure: Measure, benchmark: Any, tmp_path: Path, quick: bool, case: str, way: str) -> None:
    size = (128 << 10) if quick else (2 << 20)
    benchmark.group = f"2 MiB into an app slot: {case}"
    chip = Chip(tmp_path, case, size)
    measure(
        way,
        WAYS[way](chip),
        check=chip.holds_image,
        setup=chip.fresh,
        rounds=ROUNDS,
        work=size / (1 << 20),
        unit="MiB",
        counts=dict,
    )


@pytest.mark.parametrize(("case", "programs", "erases"), [("blank", 32, 0), ("dirty", 32, 32), ("identical", 0, 0)])
def test_no_byte_is_programmed_twice(tmp_path: Path, case: str, programs: int, erases: int) -> None:
    """In sectors; the 32 bytes are the otadata entry."""
    chip = Chip(tmp_path, case, 32 * SECTOR)
    counts = install_it(chip)(*chip.fresh())
    assert (counts["programmed"], counts["sectors_erased"]) == (programs * SECTOR + 32, erases)


# ---- Reading the formats ---------------------------------------------------------------------------------------------


def vector(name: str) -> bytes:
    return (DATA / name).read_bytes()


def image_facts(image: EspImage) -> tuple[object, ...]:
    assert image.error is None
    assert image.header is not None
    assert image.descriptor is not None
    segments = tuple((segment.load_addr, segment.size) for segment in image.segments)
    found = image.descriptor
    return image.header.chip_id, found.version, found.project_name, segments, image.size, image.computed_sha256


def header_facts(found: tuple[EspImageHeader, AppDescriptor]) -> tuple[object, ...]:
    return found[0].chip_id, found[1].version, found[1].project_name


def table_facts(table: PartitionTable) -> list[tuple[object, ...]]:
    return [(row.label, row.type, row.subtype, row.offset, row.size, row.flags) for row in table.partitions]


def otadata_facts(entries: tuple[OtadataEntry, OtadataEntry]) -> list[tuple[object, ...]]:
    return [(entry.seq, entry.state, ota_core.otadata_facts(entry, 2).crc_ok) for entry in entries]


def nvs_facts(items: list[NvsItem]) -> dict[tuple[str | None, str], object]:
    return {(item.namespace, item.key): item.value for item in items}


@dataclass
class Format:
    """A format: a file that has it, our reader, the plain one, and how our answer is turned into the plain one's."""

    file: str
    ours: Callable[[bytes], Any]
    facts: Callable[[Any], Any]
    plain: Callable[[bytes], Any]
    size: int | None = None


FORMATS = {
    "app image, 68 KiB, whole check": Format(
        "images/esp32c3_app_v1.0.0.bin", ota_core.parse_image, image_facts, plain_esp.parse_image
    ),
    "app image, header and descriptor": Format(
        "images/esp32c3_app_v1.0.0.bin",
        lambda data: (ota_core.parse_image_header(data), ota_core.parse_app_descriptor(data)),
        header_facts,
        plain_esp.parse_header,
        size=288,
    ),
    "partition table, 94 rows": Format(
        "partition_table/full_94_entries.bin",
        ota_core.parse_partition_table,
        table_facts,
        plain_esp.parse_partition_table,
    ),
    "otadata": Format(
        "otadata/s0_seq1_valid_s1_seq2_new.bin", ota_core.parse_otadata, otadata_facts, plain_esp.parse_otadata
    ),
    "NVS, 16 KiB": Format("nvs/nvs_all_types.bin", ota_core.parse_nvs, nvs_facts, plain_esp.parse_nvs),
}


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("plainly", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize("name", FORMATS)
def test_read(measure: Measure, benchmark: Any, name: str, plainly: bool) -> None:
    benchmark.group = f"read: {name}"
    kind = FORMATS[name]
    data = vector(kind.file)[: kind.size]
    expected = kind.plain(data)
    measure(
        "plain struct" if plainly else "ours",
        (lambda: kind.plain(data)) if plainly else (lambda: kind.ours(data)),
        check=(lambda found: found == expected) if plainly else (lambda found: kind.facts(found) == expected),
        unit="reads",
    )
