"""Targets by URI, and flash images from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, DataError, DeviceError, FormatError, ImageError, RejectedError
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import BootState
from rmaker_ota.targets.chip_record import load, record_path
from rmaker_ota.targets.create import create_flash_image, make_partition_csv
from rmaker_ota.targets.esp32_image import Esp32ImageTarget
from rmaker_ota.targets.file import FileTarget
from tests.python.chips import make_chip

APP = build_image(size=8192, version="1.0.0", project_name="demo")


def test_a_uri_names_kind_and_path(tmp_path: Path) -> None:
    chip = make_chip(tmp_path / "a:b.bin")
    with open_target(f"esp32-image:{chip}") as target:
        assert isinstance(target, Esp32ImageTarget)
        assert target.uri == f"esp32-image:{chip}"
    with open_target(f"file:{tmp_path}/x", buffered=True) as target:
        assert isinstance(target, FileTarget)


@pytest.mark.parametrize("uri", ["", ":", "file:", "esp32-image:", "ESP32-IMAGE:x", "floppy:a", "/dev/sda", "file"])
def test_an_unknown_uri_is_refused_with_those_that_are_known(uri: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        open_target(uri)
    assert repr(uri) in str(caught.value)
    assert "file:PATH" in str(caught.value)
    assert "esp32-image:PATH" in str(caught.value)


@pytest.mark.parametrize("uri", ["esp32-image:.", "esp32-image:/", "esp32-image:..", "esp32-image:a\0b", "file:a\0b"])
def test_a_path_that_is_no_file_is_an_error_of_ours(uri: str) -> None:
    with pytest.raises((ArgumentError, DeviceError)):
        open_target(uri)


def test_an_unknown_option_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no option 'colour', only .*read_only"):
        open_target(f"esp32-image:{tmp_path}/x", colour="red")
    with pytest.raises(ArgumentError, match="no option 'path'"):
        open_target(f"esp32-image:{tmp_path}/x", path="y")


def test_options_that_are_none_are_left_out(tmp_path: Path) -> None:
    open_target(f"file:{tmp_path}/x", rollback=None, secure_version=None).close()


# ---- flash images from scratch ---------------------------------------------------------------------------------------


def test_a_new_chip_has_its_app_in_ota_0_and_is_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "chip.bin"
    create_flash_image(path, APP, chip_revision=3, secure_version=2)
    assert path.stat().st_size == 4 << 20
    with Esp32ImageTarget(path) as target:
        assert not target.is_powered
        running = target.running_slot()
        assert running is not None and running.name == "ota_0"
        assert target.verify(running) == len(APP)
        assert target.secure_version == 2
        assert target.verify_image_rules()["chip_id"] == 5
        assert target.verify_image_rules()["chip_revision"] == 3
        assert [slot.size for slot in target.slots] == [0x1E0000, 0x1E0000]
        target.restart()
        assert target.boot_state(running) is BootState.VALID
    assert {entry.name for entry in tmp_path.iterdir()} == {"chip.bin", "chip.bin.chip.json"}


def test_a_new_chip_with_a_factory_slot_starts_there(tmp_path: Path) -> None:
    path = tmp_path / "chip.bin"
    create_flash_image(path, APP, factory=True, flash_size=2 << 20)
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot is not None and report.slot.name == "factory"
        assert target.next_slot().name == "ota_0"


@pytest.mark.parametrize("chip", ["esp32", "esp32s3", "esp32c6", "esp32p4"])
def test_every_chip_finds_its_boot_loader_at_its_place(tmp_path: Path, chip: str) -> None:
    path = tmp_path / "chip.bin"
    chip_id = ota_core.esp_chip_id(chip)
    app = build_image(size=8192, chip_id=chip_id)
    create_flash_image(path, app, chip=chip, flash_size=1 << 20)
    record_path(path).unlink()
    with Esp32ImageTarget(path, read_only=True) as target:  # the boot loader tells the chip
        assert target.verify_image_rules()["chip_id"] == chip_id
    offset = next(row.bootloader_offset for row in ota_core.esp_chips() if row.name == chip)
    assert path.read_bytes()[offset] == 0xE9


def test_a_chip_without_boot_loader_is_told_by_the_running_app(tmp_path: Path) -> None:
    path = make_chip(tmp_path / "chip.bin")
    record_path(path).unlink()
    with Esp32ImageTarget(path, read_only=True) as target:
        assert target.verify_image_rules()["chip_id"] == 5


def test_own_tables_parts_and_places(tmp_path: Path) -> None:
    path = tmp_path / "chip.bin"
    table = """
        otadata, data, ota,   0x11000, 0x2000
        ota_0,   app,  ota_0, 0x20000, 64K
        ota_1,   app,  ota_1, 0x30000, 64K
    """
    loader = build_image(size=4096, version="loader")
    create_flash_image(
        path,
        APP,
        table=table,
        table_offset=0x10000,
        flash_size=0x40000,
        slot="ota_1",
        bootloader=loader,
        rollback=False,
    )
    assert path.read_bytes()[:4096] == loader
    record = load(path)
    assert record is not None and record.table_offset == 0x10000 and not record.rollback
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot is not None and report.slot.name == "ota_1"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"flash_size": 0}, ArgumentError, "whole sectors"),
        ({"flash_size": 4097}, ArgumentError, "whole sectors"),
        ({"flash_size": 0x20000}, ArgumentError, "too small"),
        ({"chip": "esp8266"}, ArgumentError, "esp8266"),
        ({"slot": "ota_2"}, ArgumentError, "only ota_0, ota_1"),
        ({"table": "nonsense"}, FormatError, None),
        ({"table": make_partition_csv(8 << 20)}, FormatError, None),
        ({"bootloader": bytes(0x8001)}, ArgumentError, "boot loader"),
        ({"chip": "esp32s3"}, RejectedError, "chip"),
        ({"app": b""}, DataError, None),
        ({"app": b"garbage" * 100}, ImageError, None),
        ({"app": APP[:-1]}, DataError, None),
        ({"app": build_image(size=8192, bad_sha=True)}, ImageError, "SHA-256"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str | None
) -> None:
    app = options.pop("app", APP)
    with pytest.raises(error, match=text):
        create_flash_image(tmp_path / "chip.bin", app, **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_it_may_go(tmp_path: Path) -> None:
    path = tmp_path / "chip.bin"
    path.write_bytes(b"precious")
    with pytest.raises(ArgumentError, match="exists already"):
        create_flash_image(path, APP)
    assert path.read_bytes() == b"precious"
    create_flash_image(path, APP, overwrite=True)
    assert path.stat().st_size == 4 << 20


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeviceError):
        create_flash_image(tmp_path / "no" / "chip.bin", APP)
