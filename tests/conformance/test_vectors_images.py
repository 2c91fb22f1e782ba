"""App images made by esptool: every field, every segment, and what happens when they are damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import ota_core
from rmaker_ota.errors import DataError, ImageError, OtaError, RejectedError, UnsupportedError
from tests.conformance.vectors import described, description

IMAGES = described("images")
APPS = [path for path in IMAGES if "bootloader" not in path.name]
by_name = pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
apps_by_name = pytest.mark.parametrize("path", APPS, ids=lambda path: path.stem)


def kind(path: Path) -> Any:
    return "app" if path in APPS else "bootloader"


def test_all_vectors_are_here() -> None:
    assert len(IMAGES) == 7
    assert len(APPS) == 6


@by_name
def test_the_file_is_the_one_described(path: Path) -> None:
    about = description(path)
    data = path.read_bytes()
    assert len(data) == about["size"]
    assert hashlib.sha256(data).hexdigest() == about["sha256"]


@by_name
def test_every_field_is_found(path: Path) -> None:
    about = description(path)
    expected = about["expected"]
    image = ota_core.parse_image(path.read_bytes(), kind=kind(path), bytes_after_allowed=False)
    assert image.error is None
    header = image.header
    assert header is not None
    for name in (
        "entry_addr",
        "segment_count",
        "spi_mode",
        "spi_speed",
        "spi_size",
        "wp_pin",
        "chip_id",
        "min_chip_rev",
        "min_chip_rev_full",
        "max_chip_rev_full",
        "hash_appended",
    ):
        assert getattr(header, name) == expected[name], name
    assert list(header.spi_pin_drv) == expected["spi_pin_drv"]
    assert header.chip == about["chip"]
    assert [
        {
            "header_offset": segment.header_offset,
            "data_offset": segment.data_offset,
            "load_addr": segment.load_addr,
            "length": segment.size,
        }
        for segment in image.segments
    ] == expected["segments"]
    assert image.checksum == image.checksum_computed == expected["checksum"]
    assert image.size == expected["image_len"]
    if "appended_sha256" in expected:
        assert image.appended_sha256 == image.computed_sha256 == bytes.fromhex(expected["appended_sha256"])
        covered = path.read_bytes()[: expected["sha256_covers_bytes"]]
        assert hashlib.sha256(covered).digest() == image.computed_sha256
    else:
        assert image.appended_sha256 is None


@apps_by_name
def test_the_app_descriptor_is_found(path: Path) -> None:
    expected = description(path)["expected"]["app_desc"]
    data = path.read_bytes()
    image = ota_core.parse_image(data)
    descriptor = image.descriptor
    assert descriptor is not None
    assert {
        "secure_version": descriptor.secure_version,
        "version": descriptor.version,
        "project_name": descriptor.project_name,
        "time": descriptor.time,
        "date": descriptor.date,
        "idf_ver": descriptor.idf_version,
        "app_elf_sha256": descriptor.elf_sha256.hex(),
        "min_efuse_blk_rev_full": descriptor.min_efuse_block_rev_full,
        "max_efuse_blk_rev_full": descriptor.max_efuse_block_rev_full,
        "mmu_page_size_log2": descriptor.mmu_page_size_log2,
        "spi_flash_mode": descriptor.spi_flash_mode,
    } == expected
    assert ota_core.parse_app_descriptor(data[:288]) == descriptor
    assert ota_core.parse_image_header(data[:24]) == image.header


def test_a_boot_loader_has_its_own_descriptor() -> None:
    path = next(path for path in IMAGES if path not in APPS)
    expected = description(path)["expected"]["bootloader_desc"]
    image = ota_core.parse_image(path.read_bytes())
    assert image.error is None
    assert image.descriptor is None
    found = image.bootloader_descriptor
    assert found is not None
    assert (found.version, found.secure_version) == (expected["version"], expected["secure_version"])
    assert (found.idf_version, found.date_time) == (expected["idf_ver"], expected["date_time"])
    as_app = ota_core.parse_image(path.read_bytes(), kind="app")
    assert as_app.error is not None
    assert as_app.error.status == "ERR_IMAGE_DESCRIPTOR"


@by_name
def test_pages_say_which_segments_are_mapped(path: Path) -> None:
    image = ota_core.parse_image(path.read_bytes())
    mapped = {chip.name: chip.mapped for chip in ota_core.esp_chips()}[description(path)["chip"]]
    assert [segment.mapped for segment in image.segments] == [
        any(low <= segment.load_addr < high for low, high in mapped) for segment in image.segments
    ]


def status_of(data: bytes, **rules: Any) -> str | None:
    error = ota_core.parse_image(data, **{"kind": "app", **rules}).error
    return error.status if error is not None else None


def changed(data: bytes, offset: int, value: int | bytes) -> bytes:
    new = bytes([value]) if isinstance(value, int) else value
    return data[:offset] + new + data[offset + len(new) :]


@apps_by_name
def test_damage_is_called_by_its_name(path: Path) -> None:
    data = path.read_bytes()
    expected = description(path)["expected"]
    end = expected["checksum_offset"]
    last = expected["segments"][-1]
    assert status_of(changed(data, last["data_offset"], data[last["data_offset"]] ^ 1)) == "ERR_IMAGE_CHECKSUM"
    assert status_of(changed(data, end, data[end] ^ 1)) == "ERR_IMAGE_CHECKSUM"
    assert status_of(changed(data, 0, 0xEA)) == "ERR_IMAGE_MAGIC"
    assert status_of(changed(data, 1, 17)) == "ERR_IMAGE_STRUCTURE"
    assert status_of(changed(data, 28, data[28] ^ 2)) == "ERR_IMAGE_STRUCTURE"  # size of segment 0
    assert status_of(changed(data, 24, data[24] ^ 4)) == "ERR_IMAGE_STRUCTURE"  # its place in the MMU page
    assert status_of(changed(data, 32, data[32] ^ 1)) == "ERR_IMAGE_DESCRIPTOR"
    assert status_of(changed(data, 23, 2)) == "ERR_IMAGE_STRUCTURE"
    assert status_of(data[:-1]) == "ERR_INCOMPLETE"
    assert status_of(data[:end]) == "ERR_INCOMPLETE"
    assert status_of(data[: last["data_offset"] + 1]) == "ERR_INCOMPLETE"
    assert status_of(data + b"\xff" * 100) is None
    assert status_of(data + b"\xff", bytes_after_allowed=False) == "ERR_SIZE"
    if expected["hash_appended"]:
        assert status_of(changed(data, len(data) - 1, data[-1] ^ 1)) == "ERR_IMAGE_HASH"
        assert status_of(changed(data, 8, data[8] ^ 1)) == "ERR_IMAGE_HASH"  # a header byte nothing else covers


def test_padding_before_the_checksum_is_covered_by_the_hash_alone() -> None:
    for path in APPS:
        expected = description(path)["expected"]
        last = expected["segments"][-1]
        if last["data_offset"] + last["length"] < expected["checksum_offset"] and expected["hash_appended"]:
            data = path.read_bytes()
            assert status_of(changed(data, expected["checksum_offset"] - 1, 1)) == "ERR_IMAGE_HASH"
            return
    pytest.fail("no vector has padding before its checksum")


@apps_by_name
def test_chip_and_revision_are_those_of_the_device(path: Path) -> None:
    data = path.read_bytes()
    header = ota_core.parse_image_header(data)
    assert status_of(data, chip_id=header.chip_id) is None
    assert status_of(data, chip_id=header.chip_id + 1) == "ERR_IMAGE_CHIP"
    assert status_of(data, chip_revision=header.max_chip_rev_full) is None
    assert status_of(data, chip_revision=header.max_chip_rev_full + 1) == "ERR_IMAGE_REVISION"
    assert status_of(data, chip_revision=header.max_chip_rev_full + 1, ignore_max_revision=True) is None
    if header.min_chip_rev_full:
        assert status_of(data, chip_revision=header.min_chip_rev_full) is None
        assert status_of(data, chip_revision=header.min_chip_rev_full - 1) == "ERR_IMAGE_REVISION"
    no_limit = changed(data, 17, b"\xff\xff")
    not_the_revision = "ERR_IMAGE_HASH" if header.hash_appended else None
    assert status_of(no_limit, chip_revision=999) == not_the_revision
    esp32 = header.chip_id == 0  # has no eFuse block version
    assert status_of(data, efuse_block_revision=200) == (None if esp32 else "ERR_IMAGE_REVISION")


def test_the_mmu_page_size_is_that_of_the_descriptor() -> None:
    path = next(path for path in APPS if "mmu16k" in path.name)
    data = path.read_bytes()
    assert status_of(data) is None
    as_64k = changed(data, 32 + 180, 16)  # then 0x42008020 and offset 0x20 are no longer at the same place of a page
    error = ota_core.parse_image(as_64k, kind="app").error
    assert error is not None
    assert (error.status, error.offset) == ("ERR_IMAGE_STRUCTURE", 24)


def test_the_flash_mode_is_that_of_the_running_app() -> None:
    path = next(path for path in APPS if "mmu16k" in path.name)  # spi_flash_mode 3
    assert status_of(path.read_bytes(), spi_flash_mode=3) is None
    assert status_of(path.read_bytes(), spi_flash_mode=2) == "ERR_IMAGE_FLASH_MODE"
    assert status_of(path.read_bytes(), spi_flash_mode=0) is None


@apps_by_name
def test_an_image_has_to_fit_its_slot(path: Path) -> None:
    data = path.read_bytes()
    assert status_of(data, slot_size=len(data)) is None
    assert status_of(data, slot_size=len(data) - 1) == "ERR_TOO_LARGE"
    assert status_of(data, slot_size=100) == "ERR_TOO_LARGE"


@apps_by_name
def test_what_is_wrong_is_raised_as_what_it_is(path: Path) -> None:
    data = path.read_bytes()
    checker = ota_core.ImageChecker(chip_id=1)
    with pytest.raises(RejectedError, match="chip id"):
        checker.update(data[:24])
    with pytest.raises(RejectedError):
        checker.update(data[24:])  # the first error stays
    checker = ota_core.ImageChecker()
    assert not checker.update(data[:-1])
    with pytest.raises(DataError):
        checker.finish()
    with pytest.raises(ImageError, match="magic"):
        ota_core.ImageChecker().update(b"<!DOCTYPE html>")
    for wrapped in (b"ESP\0" + bytes(100), changed(data, 1, 0)):
        with pytest.raises(UnsupportedError, match="compressed"):
            ota_core.ImageChecker().update(wrapped)


@pytest.mark.parametrize("path", [path for path in IMAGES if path.stat().st_size < 3000], ids=lambda path: path.stem)
def test_every_truncation_is_incomplete(path: Path) -> None:
    data = path.read_bytes()
    for size in range(len(data)):
        image = ota_core.parse_image(data[:size], kind=kind(path))
        assert isinstance(image.error, DataError), size
        assert image.error.offset == size


@apps_by_name
def test_bytes_may_come_in_any_pieces(path: Path) -> None:
    data = path.read_bytes()
    whole = ota_core.parse_image(data, kind="app")
    for piece in (1, 7, 1024):
        checker = ota_core.ImageChecker()
        done = [checker.update(data[at : at + piece]) for at in range(0, len(data), piece)]
        checker.finish()
        assert done[-1]
        assert not any(done[:-1])
        assert checker.result() == whole


def test_errors_are_ota_errors() -> None:
    with pytest.raises(OtaError):
        ota_core.parse_app_descriptor(b"")
    with pytest.raises(DataError):
        ota_core.parse_app_descriptor(bytes(287))
    with pytest.raises(ImageError, match="magic"):
        ota_core.parse_app_descriptor(bytes(288))
    with pytest.raises(DataError):
        ota_core.parse_image_header(b"\xe9")
