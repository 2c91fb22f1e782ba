"""A virtual ESP32 in a flash image file: what a chip does at each step of an update, by the rules and against traps."""

from __future__ import annotations

import errno
import gc
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rmaker_ota import ota_core
from rmaker_ota.cli import cli
from rmaker_ota.errors import (
    ArgumentError,
    DataError,
    DeviceError,
    FormatError,
    ImageError,
    NotFoundError,
    OtaError,
    PendingVerifyError,
    RejectedError,
    RollbackError,
    SlotRunningError,
    StateError,
    TooLargeError,
)
from rmaker_ota.esp_build import build_image
from rmaker_ota.inspect import inspect
from rmaker_ota.install import ImageHeader, Installer, InstallOptions, Phase, install
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.base import BootState, Slot
from rmaker_ota.targets.chip_record import record_path
from rmaker_ota.targets.create import create_flash_image
from rmaker_ota.targets.esp32_image import Esp32ImageTarget
from tests.conformance.test_traces_boot import OBSERVED, before
from tests.python.chips import (
    FACTORY_ROW,
    IMAGE_SIZE,
    OFFSETS,
    OTADATA,
    SECTOR,
    SLOT_SIZE,
    TABLE,
    entry_text,
    image,
    make_chip,
    memory_directory,
    otadata,
    patch,
    slot_bytes,
    spoil,
    version_of,
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with memory_directory(tmp_path) as directory:
        yield directory / "chip.bin"


def update(target: Esp32ImageTarget, version: str = "3.0.0", slot: str | None = None, **options: Any) -> str:
    """Installs an image; the slot it went to."""
    where = target.next_slot() if slot is None else target.slot(slot)
    return install(image(version, **options), target, slot=where).slot


def boot(target: Esp32ImageTarget) -> str | None:
    report = target.restart()
    assert report.slot == target.running_slot()
    return None if report.slot is None else report.slot.name


def state(target: Esp32ImageTarget, slot: str) -> BootState:
    return target.boot_state(target.slot(slot))


# ---- what is there ---------------------------------------------------------------------------------------------------


def test_slots_descriptions_and_states_are_told(path: Path) -> None:
    with Esp32ImageTarget(make_chip(path, factory=True, running="ota_0")) as target:
        assert [slot.name for slot in target.slots] == ["ota_0", "ota_1", "factory"]
        assert target.slot("ota_1") == Slot("ota_1", 0x40000, SLOT_SIZE)
        description = target.describe(target.slot("ota_1"))
        assert description is not None
        assert (description.version, description.project_name, description.chip_id) == ("2.0.0", "chip", 5)
        assert state(target, "ota_0") is BootState.VALID
        for slot in ("ota_1", "factory"):
            with pytest.raises(NotFoundError):
                state(target, slot)
        with pytest.raises(NotFoundError, match="no slot 'ota_7', only ota_0, ota_1, factory"):
            target.slot("ota_7")
        assert target.verify(target.slot("factory")) == IMAGE_SIZE
        assert target.partition_table().named("otadata") is not None


def test_a_slot_without_an_app_has_no_description(path: Path) -> None:
    garbage = b"\xe9" + bytes(4095)
    with Esp32ImageTarget(make_chip(path, factory=True, apps={"ota_1": None, "factory": garbage})) as target:
        assert target.describe(target.slot("ota_1")) is None
        assert target.describe(target.slot("factory")) is None
        with pytest.raises(ImageError):
            target.verify(target.slot("ota_1"))


def test_a_slot_of_another_target_is_refused(path: Path) -> None:
    with Esp32ImageTarget(make_chip(path)) as target:
        for slot in (Slot("ota_0", 0, 10), Slot("ota_9", 0x20000, SLOT_SIZE)):
            for method in (target.describe, target.boot_state, target.open_sink, target.set_boot, target.verify):
                with pytest.raises(ArgumentError):
                    method(slot)


@pytest.mark.parametrize(
    ("running", "expected"), [("ota_0", "ota_1"), ("ota_1", "ota_0"), ("factory", "ota_0"), ("test", "ota_0")]
)
def test_the_next_slot_follows_the_running_one(path: Path, running: str, expected: str) -> None:
    table = TABLE + FACTORY_ROW.replace("128K", "64K") + "test, app, test, 0x70000, 64K\n"
    with Esp32ImageTarget(make_chip(path, table=table, running=running)) as target:
        assert target.next_slot().name == expected


def test_with_three_slots_the_last_is_followed_by_the_first(path: Path) -> None:
    table = TABLE + "ota_2, app, ota_2, 0x60000, 128K\n"
    for running, expected in (("ota_0", "ota_1"), ("ota_1", "ota_2"), ("ota_2", "ota_0")):
        with Esp32ImageTarget(make_chip(path, table=table, running=running)) as target:
            assert target.next_slot().name == expected


def test_a_chip_with_one_slot_or_none_has_no_next_one(path: Path) -> None:
    table = TABLE.replace("ota_1,   app,  ota_1, 0x40000, 128K\n", "")
    with Esp32ImageTarget(make_chip(path, table=table, running="ota_0")) as target:
        with pytest.raises(NotFoundError):
            target.next_slot()
        assert "slot_size" not in target.verify_image_rules()
    table = "factory, app, factory, 0x60000, 128K\n"
    with Esp32ImageTarget(make_chip(path, table=table, factory=True)) as target:
        assert boot(target) == "factory"
        with pytest.raises(NotFoundError):
            target.next_slot()
        with pytest.raises(StateError):
            target.esp.can_rollback()
        with pytest.raises(NotFoundError):
            target.mark_valid()


def test_the_rules_for_images_name_chip_revision_room_and_flash_mode(path: Path) -> None:
    apps = {"ota_0": image("1.0.0", spi_flash_mode=3)}
    make_chip(path, apps=apps, efuse_block_revision=103, ignore_max_revision=True)
    with Esp32ImageTarget(path) as target:
        assert target.verify_image_rules() == {
            "chip_id": 5,
            "chip_revision": 3,
            "efuse_block_revision": 103,
            "ignore_max_revision": True,
            "spi_flash_mode": 3,
            "slot_size": SLOT_SIZE,
            "bytes_after_allowed": True,
        }


# ---- switched off, and what is written down --------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False])
def test_looking_at_a_chip_that_is_off_changes_nothing(path: Path, recorded: bool) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    if not recorded:
        record_path(path).unlink()
    flash = path.read_bytes()
    with Esp32ImageTarget(path) as target:
        assert not target.is_powered
        assert version_of(target) == "2.0.0"
        assert target.next_slot().name == "ota_0"
        assert target.can_rollback()
        report = target.preview()
        assert report.slot == target.slot("ota_1")
        assert report.writes == ("otadata sector 1: erased", "otadata sector 1: sequence 2, PENDING_VERIFY")
    assert path.read_bytes() == flash
    assert record_path(path).exists() == recorded


def test_the_first_change_switches_a_chip_on(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    with Esp32ImageTarget(path) as target:
        with pytest.raises(PendingVerifyError):  # 2.0.0 would run for the first time
            target.open_sink(target.slot("ota_0"))
        assert otadata(path) == ("1:VALID", "2:NEW")
        spoil(path, "ota_0")
        with pytest.raises(ImageError):
            target.set_boot(target.slot("ota_0"))
        assert target.is_powered
        assert otadata(path) == ("1:VALID", "2:PENDING_VERIFY")
        target.mark_valid()
    with Esp32ImageTarget(path) as target:
        assert target.is_powered
        assert otadata(path) == ("1:VALID", "2:VALID")
        assert update(target) == "ota_0"


@pytest.mark.parametrize("entries", [("blank", "blank"), ("1:VALID", "2:PENDING_VERIFY"), ("1:VALID", "blank")])
def test_an_image_that_is_refused_does_not_even_switch_a_chip_on(path: Path, entries: tuple[str, str]) -> None:
    make_chip(path, entries)
    record_path(path).unlink()
    flash = path.read_bytes()
    with Esp32ImageTarget(path) as target:
        with pytest.raises(RejectedError):
            install(image("3.0.0", chip_id=9), target)
        assert path.read_bytes() == flash
        assert update(target) == "ota_1"
        assert version_of(target) == "1.0.0"
        assert boot(target) == "ota_1"
        target.mark_valid()
        assert boot(target) == "ota_1"


def test_what_a_power_on_burns_is_written_down(path: Path) -> None:
    secure_chip(path, ("1:VALID", "blank"), (3, 0), 1)
    with Esp32ImageTarget(path) as target, pytest.raises(RejectedError):
        target.set_boot(target.slot("ota_1"))
    record = chip_record.load(path)
    assert record is not None and record.secure_version == 3


def test_what_runs_is_remembered_although_another_slot_was_chosen(path: Path) -> None:
    make_chip(path)
    record_path(path).unlink()
    with Esp32ImageTarget(path) as target:
        assert update(target) == "ota_1"
    with Esp32ImageTarget(path) as target:
        assert version_of(target) == "1.0.0"
        assert target.next_slot().name == "ota_1"
        assert boot(target) == "ota_1"
    with Esp32ImageTarget(path) as target:
        assert version_of(target) == "3.0.0"
        assert state(target, "ota_1") is BootState.PENDING_VERIFY


def test_options_stand_for_once_and_are_not_written_down(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    with Esp32ImageTarget(path, rollback=False, anti_rollback=False, secure_version=0, chip_revision=50) as target:
        assert target.verify_image_rules()["chip_revision"] == 50
        assert boot(target) == "ota_1"
    assert otadata(path) == ("1:VALID", "2:NEW")
    record = chip_record.load(path)
    assert record is not None and record.rollback and record.chip_revision == 3 and record.running == "ota_1"
    with Esp32ImageTarget(path, anti_rollback=True, secure_version=1) as target:
        assert target.secure_version == 1
        assert boot(target) is None  # both apps have secure version 0
    record = chip_record.load(path)
    assert record is not None and record.secure_version == 0 and not record.anti_rollback and record.running is None


def test_a_restart_whose_record_cannot_be_written_is_an_error_and_can_be_repeated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        update(target)

        def fail(*_: object) -> None:
            raise DeviceError("no space", status="ERR_NO_SPACE", device_code=errno.ENOSPC)

        with monkeypatch.context() as patched:
            patched.setattr(chip_record, "save", fail)
            with pytest.raises(DeviceError):
                target.restart()
    with Esp32ImageTarget(path) as target:  # as after a power cut in the middle of the restart
        assert version_of(target) == "1.0.0"
        with pytest.raises(StateError):
            target.mark_valid()
        assert boot(target) == "ota_0"
        assert otadata(path) == ("1:VALID", "2:ABORTED")


# ---- begin (3.6) -----------------------------------------------------------------------------------------------------


def test_an_update_from_end_to_end(path: Path) -> None:
    make_chip(path)
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_0"
        assert update(target) == "ota_1"
        assert slot_bytes(path, "ota_1") == image("3.0.0")
        assert otadata(path) == ("1:VALID", "2:NEW")
        assert version_of(target) == "1.0.0"
        assert boot(target) == "ota_1"
        assert version_of(target) == "3.0.0"
        assert state(target, "ota_1") is BootState.PENDING_VERIFY
        target.mark_valid()
        assert state(target, "ota_1") is BootState.VALID
        assert boot(target) == "ota_1"


def test_the_running_slot_and_factory_are_not_written(path: Path) -> None:
    make_chip(path, factory=True, running="ota_0")
    with Esp32ImageTarget(path) as target:
        with pytest.raises(SlotRunningError) as running:
            target.open_sink(target.slot("ota_0"))
        assert running.value.esp_err == 0x1501
        with pytest.raises(ArgumentError) as factory:
            target.open_sink(target.slot("factory"))
        assert factory.value.esp_err == 0x102


def test_an_unconfirmed_image_cannot_update(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_1"
        flash = path.read_bytes()
        with pytest.raises(PendingVerifyError) as caught:
            update(target)
        assert caught.value.esp_err == 0x1506
        assert path.read_bytes() == flash


def test_without_rollback_every_image_can_update(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:PENDING_VERIFY"), rollback=False)
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_1"
        assert update(target) == "ota_0"
        assert otadata(path) == ("3:UNDEFINED", "2:PENDING_VERIFY")
        assert boot(target) == "ota_0"


@pytest.mark.parametrize("inactive", ["2:INVALID", "2:ABORTED", "2:VALID"])
def test_opening_the_sink_drops_the_inactive_entry_and_nothing_before_does(path: Path, inactive: str) -> None:
    make_chip(path, ("3:VALID", inactive), running="ota_0")
    with Esp32ImageTarget(path) as target:
        seen: list[tuple[str, str]] = []

        def gate(_: ImageHeader) -> None:
            seen.append(otadata(path))

        damaged = image("3.0.0")[:-1] + b"\0"
        with pytest.raises(ImageError):
            install(damaged, target, header_gate=gate, options=InstallOptions(threads=False, buffer_size=4096))
        assert seen == [("3:VALID", inactive)]
        assert otadata(path) == ("3:VALID", "blank")
        assert boot(target) == "ota_0"


def test_an_image_refused_by_its_header_changes_nothing(path: Path) -> None:
    make_chip(path, ("3:VALID", "2:VALID"), running="ota_0")
    flash = path.read_bytes()

    def refuse(_: ImageHeader) -> None:
        raise RejectedError("not today")

    with Esp32ImageTarget(path) as target:
        counts = target.esp.counts
        with pytest.raises(RejectedError, match="not today"):
            install(image("3.0.0"), target, header_gate=refuse)
        for other in (
            image("3.0.0", chip_id=9),
            image("3.0.0", min_chip_rev=4),
            image("3.0.0", max_chip_rev=2),
            image("3.0.0", bad_magic=True),
            image("3.0.0", bad_desc_magic=True),
            b"short",
        ):
            with pytest.raises(OtaError):
                install(other, target)
        with pytest.raises(TooLargeError):
            install(build_image(size=SLOT_SIZE + 16), target)
        assert target.esp.counts["erases"] == counts["erases"]
        assert target.esp.counts["programs"] == counts["programs"]
    assert path.read_bytes() == flash


@pytest.mark.parametrize("damage", ["bad_sha", "bad_checksum"])
def test_a_damaged_image_is_never_chosen(path: Path, damage: str) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        with pytest.raises(ImageError) as caught:
            install(image("3.0.0", **{damage: True}), target)
        assert caught.value.esp_err == 0x1503
        assert otadata(path) == ("1:VALID", "blank")
        assert boot(target) == "ota_0"


def test_an_image_may_fill_its_slot(path: Path) -> None:
    make_chip(path, running="ota_0")
    large = build_image(size=SLOT_SIZE, version="9", project_name="chip")
    with Esp32ImageTarget(path) as target:
        install(large, target)
        assert slot_bytes(path, "ota_1", SLOT_SIZE) == large
        assert boot(target) == "ota_1"


def test_without_activate_the_boot_choice_is_left(path: Path) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        install(image("3.0.0"), target, options=InstallOptions(activate=False))
        assert otadata(path) == ("1:VALID", "blank")
        target.set_boot(target.slot("ota_1"))
        assert boot(target) == "ota_1"


def test_two_installations_into_one_slot_do_not_mix(path: Path) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:

        def gate(_: ImageHeader) -> None:
            with pytest.raises(RejectedError):
                install(image("4.0.0"), target, header_gate=refuse)

        def refuse(_: ImageHeader) -> None:
            raise RejectedError("no")

        install(image("3.0.0"), target, header_gate=gate)
        begun: list[str] = []

        def second(_: object) -> None:
            if not begun:
                begun.append("")
                with pytest.raises(DeviceError) as caught:
                    install(image("4.0.0"), target)
                assert caught.value.status == "ERR_BUSY"

        source = build_image(size=SLOT_SIZE, version="5", project_name="chip")
        install(
            source,
            target,
            options=InstallOptions(threads=False, buffer_size=4096, checkpoint_bytes=4096),
            on_checkpoint=second,
        )
        assert begun
        assert slot_bytes(path, "ota_1", SLOT_SIZE) == source


def test_2_mib_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    create_flash_image(path, build_image(size=1 << 20, version="1.0.0"), flash_size=8 << 20)
    size = 2 << 20
    new = build_image(size=size, version="2.0.0")
    with Esp32ImageTarget(path) as target:
        target.restart()
        patch(path, target.slot("ota_1").offset, random.Random(4).randbytes(size))  # another image was there
        before_ = target.esp.counts
        result = install(new, target)
        counts = {name: value - before_[name] for name, value in target.esp.counts.items()}
        offset = target.slot("ota_1").offset
    assert path.read_bytes()[offset : offset + size] == new
    assert result.bytes_written == size
    assert result.counts["copies"] == 0
    assert counts["sectors_erased"] == size // SECTOR  # every sector once; otadata's was erased already
    assert counts["bytes_programmed"] == size + 32
    assert counts["erases"] == 32  # blocks of 64 KiB
    assert counts["programs"] == 33
    assert counts["syncs"] == 3  # the data, before the image is verified, the entry
    assert counts["reads"] == 73  # 32 for what is there already, 32 to verify, 9 of otadata and the running header
    with Esp32ImageTarget(path) as target:
        assert target.running_slot() == target.slot("ota_0")
        again = install(new, target)  # nothing to write but the choice
        assert (again.bytes_written, again.bytes_skipped) == (0, size)
        assert boot(target) == "ota_1"


# ---- set_boot (3.4) --------------------------------------------------------------------------------------------------


def test_set_boot_verifies_the_image_first(path: Path) -> None:
    make_chip(path, running="ota_0")
    spoil(path, "ota_1")
    flash = path.read_bytes()
    with Esp32ImageTarget(path) as target:
        with pytest.raises(ImageError) as caught:
            target.set_boot(target.slot("ota_1"))
        assert caught.value.esp_err == 0x1503
    assert path.read_bytes() == flash


def test_set_boot_reads_what_is_in_flash_not_what_was_written(path: Path) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        install(image("3.0.0"), target, options=InstallOptions(activate=False))
        spoil(path, "ota_1")
        with pytest.raises(ImageError):
            target.set_boot(target.slot("ota_1"))


def test_set_boot_of_an_image_for_another_chip_is_refused(path: Path) -> None:
    make_chip(path, apps={"ota_1": image("2.0.0", chip_id=9)}, running="ota_0")
    with Esp32ImageTarget(path) as target, pytest.raises(RejectedError):
        target.set_boot(target.slot("ota_1"))


@pytest.mark.parametrize(
    ("entries", "running", "slot", "after"),
    [
        (("blank", "blank"), "factory", "ota_0", ("1:NEW", "blank")),
        (("blank", "blank"), "factory", "ota_1", ("2:NEW", "blank")),
        (("1:VALID", "blank"), "ota_0", "ota_1", ("1:VALID", "2:NEW")),
        (("1:VALID", "2:VALID"), "ota_1", "ota_0", ("3:NEW", "2:VALID")),
        (("5:VALID", "4:VALID"), "ota_0", "ota_1", ("5:VALID", "6:NEW")),
        (("1:VALID", "6:VALID"), "ota_1", "ota_0", ("7:NEW", "6:VALID")),
        (("3:VALID", "2:ABORTED"), "ota_0", "ota_1", ("3:VALID", "4:NEW")),
        (("1:VALID", "blank"), "ota_0", "ota_0", ("1:VALID", "3:NEW")),  # active already: seq + n, other sector
        (("1:VALID", "2:VALID"), "ota_1", "ota_1", ("4:NEW", "2:VALID")),
    ],
)
def test_set_boot_takes_the_smallest_sequence_above_in_the_other_sector(
    path: Path, entries: tuple[str, str], running: str, slot: str, after: tuple[str, str]
) -> None:
    make_chip(path, entries, factory=True, running=running)
    with Esp32ImageTarget(path) as target:
        target.set_boot(target.slot(slot))
        assert otadata(path) == after
        assert boot(target) == slot


def test_the_factory_app_is_chosen_by_erasing_otadata(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:VALID"), factory=True, running="ota_1")
    with Esp32ImageTarget(path) as target:
        target.set_boot(target.slot("factory"))
        assert otadata(path) == ("blank", "blank")
        assert boot(target) == "factory"
        with pytest.raises(StateError):
            target.mark_valid()
        with pytest.raises(StateError):
            target.mark_invalid()
        assert not target.can_rollback()


def test_the_test_app_is_not_chosen(path: Path) -> None:
    table = TABLE + "test, app, test, 0x60000, 128K\n"
    make_chip(path, table=table, factory=True, running="ota_0")
    flash = path.read_bytes()
    with Esp32ImageTarget(path) as target, pytest.raises(ArgumentError):
        target.set_boot(target.slot("test"))
    assert path.read_bytes() == flash


# ---- mark valid, mark invalid (3.5) ----------------------------------------------------------------------------------


def test_a_confirmed_image_is_not_written_again(path: Path) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        counts = target.esp.counts
        target.mark_valid()
        assert target.esp.counts["erases"] == counts["erases"]
        assert target.esp.counts["programs"] == counts["programs"]


def test_an_image_that_is_not_tracked_can_be_confirmed(path: Path) -> None:
    make_chip(path, ("1:UNDEFINED", "blank"), running="ota_0")
    with Esp32ImageTarget(path) as target:
        target.mark_valid()
    assert otadata(path) == ("1:VALID", "blank")


def test_a_rejected_image_is_rolled_back_at_the_next_restart(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_1"
        assert target.can_rollback()
        target.mark_invalid()
        assert otadata(path) == ("1:VALID", "2:INVALID")
        assert version_of(target) == "2.0.0"
        assert boot(target) == "ota_0"
        assert state(target, "ota_1") is BootState.INVALID


def test_an_image_that_was_never_confirmed_is_rolled_back(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    with Esp32ImageTarget(path) as target:
        assert [boot(target), boot(target), boot(target)] == ["ota_1", "ota_0", "ota_0"]
        assert state(target, "ota_1") is BootState.ABORTED


def test_a_first_update_rolls_back_to_factory(path: Path) -> None:
    make_chip(path, ("blank", "blank"), factory=True)
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "factory"
        assert update(target) == "ota_0"
        assert boot(target) == "ota_0"
        assert target.can_rollback()
        target.mark_invalid()
        assert boot(target) == "factory"
        assert slot_bytes(path, "factory") == image("0.9.0")


@pytest.mark.parametrize("why", ["no entry", "dead entry", "damaged image", "blank slot"])
def test_with_nothing_to_go_back_to_nothing_is_changed(path: Path, why: str) -> None:
    other = {"no entry": "blank", "dead entry": "2:ABORTED"}.get(why, "2:VALID")
    make_chip(path, ("3:PENDING_VERIFY", other), running="ota_0", apps={"ota_1": None} if why == "blank slot" else None)
    if why == "damaged image":
        spoil(path, "ota_1")
    flash = path.read_bytes()
    with Esp32ImageTarget(path) as target:
        assert not target.can_rollback()
        with pytest.raises(RollbackError) as caught:
            target.mark_invalid()
        assert caught.value.esp_err == 0x1505
    assert path.read_bytes() == flash


# ---- secure version (8.6) --------------------------------------------------------------------------------------------


def secure_chip(path: Path, entries: tuple[str, str], versions: tuple[int, int], burnt: int, **options: Any) -> Path:
    apps = {"ota_0": image("1.0.0", versions[0]), "ota_1": image("2.0.0", versions[1])}
    return make_chip(path, entries, apps=apps, anti_rollback=True, secure_version=burnt, **options)


def test_confirming_burns_the_secure_version_for_good(path: Path) -> None:
    secure_chip(path, ("1:VALID", "2:NEW"), (1, 3), 1)
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_1"
        assert target.secure_version == 1
        target.mark_valid()
        assert target.secure_version == 3
    with Esp32ImageTarget(path) as target:
        assert target.secure_version == 3


def test_without_anti_rollback_nothing_is_burnt(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"), apps={"ota_1": image("2.0.0", 3)})
    with Esp32ImageTarget(path) as target:
        boot(target)
        target.mark_valid()
        assert target.secure_version == 0
        assert boot(target) == "ota_1"


def test_an_older_secure_version_is_refused_and_its_slot_erased(path: Path) -> None:
    secure_chip(path, ("1:VALID", "blank"), (2, 0), 2, running="ota_0")
    with Esp32ImageTarget(path) as target:
        with pytest.raises(RejectedError) as caught:
            update(target, secure_version=1)
        assert (caught.value.status, caught.value.esp_err, caught.value.stage) == (
            "ERR_SECURE_VERSION",
            0x1504,
            "commit",
        )
        assert slot_bytes(path, "ota_1", SLOT_SIZE) == b"\xff" * SLOT_SIZE
        assert otadata(path) == ("1:VALID", "blank")
        assert boot(target) == "ota_0"


def test_the_running_slot_is_not_erased_for_its_secure_version(path: Path) -> None:
    secure_chip(path, ("1:VALID", "blank"), (0, 0), 2, running="ota_0")
    with Esp32ImageTarget(path) as target, pytest.raises(RejectedError):
        target.set_boot(target.slot("ota_0"))
    assert slot_bytes(path, "ota_0") == image("1.0.0", 0)


# ---- the nine traps of data/traces/boot/README.md --------------------------------------------------------------------


def test_trap_1_a_trial_boot_is_written_as_new(path: Path) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        update(target)
        assert state(target, "ota_1") is BootState.NEW
        assert [boot(target), boot(target)] == ["ota_1", "ota_0"]


@pytest.mark.parametrize("start", [("blank", "blank"), ("1:ABORTED", "blank"), ("1:INVALID", "2:ABORTED")])
def test_trap_2_the_running_slot_has_an_entry_before_new_is_written(path: Path, start: tuple[str, str]) -> None:
    make_chip(path, start, running="ota_1")
    with Esp32ImageTarget(path) as target:
        assert update(target) == "ota_0"
        entries = otadata(path)
        assert any(re.fullmatch(r"\d*[02468]:VALID", text) for text in entries)  # of ota_1
        assert boot(target) == "ota_0"
        assert boot(target) == "ota_1"  # not ota_0 for ever
        assert boot(target) == "ota_1"


def test_trap_3_only_the_slot_that_the_active_entry_names_is_confirmed(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:NEW"))
    spoil(path, "ota_1")
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_0"
        assert otadata(path) == ("1:VALID", "2:PENDING_VERIFY")
        for confirm in (target.mark_valid, target.mark_invalid):
            with pytest.raises(StateError, match="names ota_1"):
                confirm()
        assert not target.can_rollback()
        assert otadata(path) == ("1:VALID", "2:PENDING_VERIFY")
        assert state(target, "ota_0") is BootState.VALID
        assert update(target) == "ota_1"  # and the way on is open
        assert boot(target) == "ota_1"


def test_trap_4_the_state_is_not_covered_by_the_crc_and_an_unknown_one_boots(path: Path) -> None:
    make_chip(path, ("1:VALID", "2:VALID"))
    patch(path, OTADATA + SECTOR + 24, b"\x34\x12\0\0")
    with Esp32ImageTarget(path) as target:
        assert [boot(target), boot(target)] == ["ota_1", "ota_1"]
        assert state(target, "ota_1") is BootState.UNDEFINED
        target.mark_valid()
        assert otadata(path) == ("1:VALID", "2:VALID")


def test_trap_5_pending_becomes_aborted_whatever_the_crc_and_both_sectors_may_change(path: Path) -> None:
    make_chip(path, ("1:PENDING_VERIFY", "2:NEW"))
    patch(path, OTADATA + 28, b"\0\0\0\0")
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot == target.slot("ota_1")
        assert [write.partition(":")[0] for write in report.writes] == ["otadata sector 0"] * 2 + [
            "otadata sector 1"
        ] * 2
    assert otadata(path) == ("1:ABORTED BADCRC", "2:PENDING_VERIFY")


@pytest.mark.parametrize("crc", ["right", "wrong"])
def test_trap_6_without_a_usable_entry_slot_0_runs_and_can_still_update(path: Path, crc: str) -> None:
    make_chip(path, ("1:ABORTED", "2:INVALID") if crc == "right" else ("1:VALID", "2:VALID"))
    if crc == "wrong":
        patch(path, OTADATA + 28, b"\0")
        patch(path, OTADATA + SECTOR + 28, b"\0")
    broken = otadata(path)
    with Esp32ImageTarget(path) as target:
        assert [boot(target), boot(target)] == ["ota_0", "ota_0"]
        assert otadata(path) == broken
        with pytest.raises(StateError):
            target.mark_valid()
        assert update(target) == "ota_1"
        assert [boot(target), boot(target)] == ["ota_1", "ota_0"]  # a way back was made
        assert update(target) == "ota_1"
        assert boot(target) == "ota_1"
        target.mark_valid()
        assert boot(target) == "ota_1"


def test_trap_7_equal_sequences_and_sequence_0_count(path: Path) -> None:
    make_chip(path, ("2:VALID", "2:VALID"))
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_1"
        assert update(target) == "ota_0"
        assert boot(target) == "ota_0"
    make_chip(path, ("0:VALID", "blank"))  # slot (0 - 1) mod 2^32 mod 2
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_1"
        assert state(target, "ota_1") is BootState.VALID
        assert update(target) == "ota_0"
        assert [boot(target), boot(target)] == ["ota_0", "ota_1"]


def test_trap_8_any_image_that_verifies_may_run_whatever_its_entry_says(path: Path) -> None:
    make_chip(path, ("3:VALID", "2:ABORTED"))
    spoil(path, "ota_0")
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot == target.slot("ota_1")
        assert otadata(path) == ("3:VALID", "2:ABORTED")
        with pytest.raises(StateError):
            target.mark_valid()
        assert update(target) == "ota_0"
        assert boot(target) == "ota_0"
        target.mark_valid()
        assert boot(target) == "ota_0"
    make_chip(path, ("3:VALID", "2:VALID"), factory=True)
    spoil(path, "ota_0")
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "factory"  # before ota_1
        assert update(target) == "ota_0"
        assert [boot(target), boot(target)] == ["ota_0", "factory"]


def test_trap_9_a_start_with_a_valid_entry_burns_and_closes_the_way_back(path: Path) -> None:
    secure_chip(path, ("1:VALID", "2:VALID"), (0, 2), 0)
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot == target.slot("ota_1")
        assert report.writes == ("eFuses: secure version 2",)
        assert target.secure_version == 2
        assert not target.can_rollback()
        with pytest.raises(RollbackError):
            target.mark_invalid()
        assert boot(target) == "ota_1"
        with pytest.raises(RejectedError):
            target.set_boot(target.slot("ota_0"))


# ---- what real boot loaders did, by images and otadata that lie in flash ---------------------------------------------


def observed_chip(path: Path, row: dict[str, Any]) -> Path:
    """The chip of a row, with the damage its text tells."""
    secure: dict[int, tuple[int, int]] = {51: (0, 1), 53: (1, 0), 55: (1, 2), 57: (0, 1)}
    first, second = secure.get(row["row"], (0, 0))
    apps: dict[str, bytes | None] = {"ota_0": image("1.0.0", first), "ota_1": image("2.0.0", second)}
    match row["row"]:
        case 19:
            apps["ota_1"] = None
        case 21:
            apps["ota_1"] = b"\xff" * SECTOR + image("2.0.0")[SECTOR:]
        case 23:
            apps["ota_1"] = image("2.0.0", min_chip_rev=9999, max_chip_rev=9999)
    make_chip(
        path,
        apps=apps,
        factory=row["scenario"].startswith("factory app,") or row["scenario"].endswith(", factory app"),
        rollback=row["boot_loader"] != "no rollback",
        anti_rollback=row["boot_loader"] == "rollback and anti-rollback",
        secure_version=1 if row["row"] in {53, 55, 57} else 0,
    )
    patch(path, OTADATA, ota_core.build_otadata(before(row)))
    if row["row"] in {15, 17}:
        spoil(path, "ota_1")
    if row["row"] == 25:
        spoil(path, "ota_0")
    return path


@pytest.mark.parametrize("row", OBSERVED, ids=lambda row: f"{row['boot_loader'].replace(' ', '_')}-{row['row']}")
def test_a_chip_does_what_real_ones_did(path: Path, row: dict[str, Any]) -> None:
    observed_chip(path, row)
    for power_on in row["power_ons"]:
        parsed = re.fullmatch(r"(.*); \[(.*)\](?:, eFuse (\d+))?", power_on)
        assert parsed is not None
        ran, entries, efuse = parsed.groups()
        with Esp32ImageTarget(path) as target:
            for app in ran.removesuffix(" (stopped by time limit)").split(" → "):
                target.restart()
                assert version_of(target) == app
            shown = [re.sub(r"^(\d+):", r"seq=\1 ", entry_text(one)) for one in target.esp.entries()]
            assert " / ".join(shown) == entries
            assert efuse is None or target.secure_version == int(efuse)


def test_inspect_shows_the_chip_and_what_its_own_boot_loader_would_do(path: Path) -> None:
    secure_chip(path, ("1:VALID", "2:NEW"), (1, 0), 1, running="ota_0")
    found = inspect(f"esp32-image:{path}")
    assert found["chip"]["chip"] == "esp32c3"
    assert found["chip"]["running"] == "ota_0"
    assert found["boot"]["slot"] == "ota_0"  # 2.0.0 has too small a secure version
    with Esp32ImageTarget(path, read_only=True) as target:
        assert list(target.preview().reasons) == found["boot"]["reasons"]
    text = CliRunner().invoke(cli, ["inspect", str(path)]).output
    assert "esp32c3 revision 3, secure version 1, anti-rollback; ota_0 runs" in text
    record_path(path).write_text("{")
    damaged = inspect(path)
    assert damaged["chip"] is None
    assert "delete it" in damaged["error"]["message"]
    assert damaged["boot"]["slot"] == "ota_1"


# ---- bad input -------------------------------------------------------------------------------------------------------


def rows(csv: str) -> bytes:
    """A table without the generator's checks."""
    return ota_core.build_partition_table(ota_core.partition_table_from_csv(csv))


LYING_TABLES = {
    "erased": b"\xff" * 0xC00,
    "zero": bytes(0xC00),
    "garbage": random.Random(5).randbytes(0xC00),
    "beyond the flash": rows(TABLE + "far, data, nvs, 0x100000, 0x6000"),
    "a gap in the slots": rows(TABLE.replace("ota_1", "ota_2")),
    "no app": rows("nvs, data, nvs, 0x9000, 0x6000"),
    "wrong MD5": rows(TABLE)[: 6 * 32 - 1] + b"\0" + rows(TABLE)[6 * 32 :],
    "no end": (rows(TABLE)[: 5 * 32] * 20)[:0xC00],
}


@pytest.mark.parametrize("name", LYING_TABLES)
def test_a_partition_table_that_lies_is_a_clear_error(path: Path, name: str) -> None:
    make_chip(path)
    patch(path, 0x8000, LYING_TABLES[name])
    flash = path.read_bytes()
    with pytest.raises(FormatError) as caught:
        Esp32ImageTarget(path)
    assert caught.value.status == "ERR_PARTITION_TABLE"
    assert caught.value.message
    assert path.read_bytes() == flash


def test_otadata_that_is_too_small_is_a_clear_error(path: Path) -> None:
    table = bytearray(rows(TABLE)[: 5 * 32])
    at = next(i for i in range(0, len(table), 32) if table[i + 2 : i + 4] == b"\x01\x00")
    table[at + 8 : at + 12] = (0x1000).to_bytes(4, "little")
    make_chip(path)
    patch(path, 0x8000, bytes(table) + b"\xff" * 32)
    with pytest.raises(FormatError, match="otadata"):
        Esp32ImageTarget(path)


@pytest.mark.parametrize("seed", range(20))
def test_garbage_in_otadata_still_boots_and_updates(path: Path, seed: int) -> None:
    make_chip(path)
    patch(path, OTADATA, random.Random(seed).randbytes(2 * SECTOR))
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_0"
        assert update(target) == "ota_1"
        assert boot(target) == "ota_1"
        target.mark_valid()
        assert boot(target) == "ota_1"


@pytest.mark.parametrize("seed", range(30))
def test_live_entries_with_any_numbers_never_lead_to_a_broken_image(path: Path, seed: int) -> None:
    choose = random.Random(seed)
    make_chip(path, factory=choose.random() < 0.3)
    states = [0, 1, 2, 3, 4, 5, 0xFFFFFFFF, choose.getrandbits(32)]
    numbers = [0, 1, 2, 3, 0x7FFFFFFF, 0xFFFFFFFD, 0xFFFFFFFE, choose.getrandbits(32)]
    entries = [ota_core.make_otadata_entry(choose.choice(numbers), choose.choice(states)) for _ in range(2)]
    patch(path, OTADATA, ota_core.build_otadata(entries))
    with Esp32ImageTarget(path) as target:
        for _ in range(3):
            running = boot(target)
            assert running is not None
            try:
                target.mark_valid()
                slot = update(target)
            except PendingVerifyError:  # confirmed it could not be: a fallback runs
                continue
            except (StateError, FormatError):  # not the active one; sequence numbers used up
                continue
            assert boot(target) == slot
            assert version_of(target) == "3.0.0"


def test_a_file_that_is_no_flash_image_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Esp32ImageTarget(tmp_path / "missing.bin")
    odd = tmp_path / "odd.bin"
    for size in (0, 1, 4097):
        odd.write_bytes(b"\xff" * size)
        with pytest.raises(ArgumentError, match="not a flash image"):
            Esp32ImageTarget(odd)
    odd.write_bytes(b"\xff" * SECTOR)
    with pytest.raises(ArgumentError, match="partition table"):
        Esp32ImageTarget(odd)
    with pytest.raises(DeviceError) as caught:
        Esp32ImageTarget(tmp_path)
    assert caught.value.errno == errno.EISDIR


def test_a_damaged_record_is_a_clear_error(path: Path) -> None:
    make_chip(path)
    record_path(path).write_text("{")
    with pytest.raises(FormatError, match=r"chip\.json is damaged .* delete it"):
        Esp32ImageTarget(path)
    record_path(path).unlink()
    with Esp32ImageTarget(path) as target:
        assert boot(target) == "ota_0"


def test_a_record_that_names_a_slot_the_table_lacks_is_as_good_as_none(path: Path) -> None:
    make_chip(path, running="ota_9")
    with Esp32ImageTarget(path) as target:
        assert version_of(target) == "1.0.0"
        assert boot(target) == "ota_0"


def test_nothing_that_boots_is_told_and_can_be_repaired(path: Path) -> None:
    make_chip(path, apps={"ota_0": None, "ota_1": None})
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot is None
        assert report.reasons[-1] == "nothing boots"
        assert target.running_slot() is None
        assert update(target) == "ota_0"
        assert boot(target) == "ota_0"


# ---- one chip, several users -----------------------------------------------------------------------------------------


def test_a_chip_is_taken_by_one_and_looked_at_by_many(path: Path) -> None:
    make_chip(path, running="ota_0")
    with Esp32ImageTarget(path) as target:
        with pytest.raises(DeviceError) as caught:
            Esp32ImageTarget(path)
        assert caught.value.status == "ERR_BUSY"
        with Esp32ImageTarget(path, read_only=True) as other:
            assert version_of(other) == "1.0.0"
        assert boot(target) == "ota_0"
    Esp32ImageTarget(path).close()


@pytest.mark.parametrize("running", ["ota_0", None])
def test_a_chip_opened_for_reading_is_not_changed(path: Path, running: str | None) -> None:
    make_chip(path, ("1:VALID", "2:PENDING_VERIFY"), running=running)
    flash, record = path.read_bytes(), record_path(path).read_bytes()
    with Esp32ImageTarget(path, read_only=True) as target:
        slot = target.slot("ota_1")
        for change in (
            target.restart,
            target.mark_valid,
            target.mark_invalid,
            lambda: target.set_boot(slot),
            lambda: target.open_sink(slot),
        ):
            with pytest.raises(DeviceError) as caught:
                change()
            assert (caught.value.status, caught.value.errno) == ("ERR_READ_ONLY", errno.EROFS)
    assert (path.read_bytes(), record_path(path).read_bytes()) == (flash, record)


def test_questions_are_answered_while_an_installation_runs(path: Path) -> None:
    make_chip(path, running="ota_0")
    large = build_image(size=SLOT_SIZE, version="9", project_name="chip")
    with Esp32ImageTarget(path) as target:
        for _ in range(5):
            installer = Installer(large, target, options=InstallOptions(buffer_size=4096))
            installer.start()
            asked = 0
            while not asked or installer.progress().phase != Phase.DONE:
                assert version_of(target) == "1.0.0"
                assert state(target, "ota_0") is BootState.VALID
                assert target.next_slot() == target.slot("ota_1")
                assert not target.can_rollback()
                asked += 1
            installer.result(60)
        assert boot(target) == "ota_1"


def test_a_closed_chip_refuses_and_is_given_back(path: Path) -> None:
    make_chip(path, running="ota_0")
    target = Esp32ImageTarget(path)
    sink = target.open_sink(target.next_slot())
    target.close()
    target.close()
    with pytest.raises(StateError, match="closed"):
        target.restart()
    with Esp32ImageTarget(path) as other:  # although the sink is still there
        assert sink.capacity == SLOT_SIZE
        with pytest.raises(DeviceError) as caught:
            ota_core.Pipeline(ota_core.MemorySource(image("3.0.0")), sink).run()
        assert caught.value.errno == errno.ECANCELED
        assert otadata(path) == ("1:VALID", "blank")
        assert boot(other) == "ota_0"


def test_closing_ends_an_installation_that_is_under_way(path: Path) -> None:
    make_chip(path, running="ota_0")
    target = Esp32ImageTarget(path)

    def close(_: object) -> None:
        target.close()

    options = InstallOptions(threads=False, buffer_size=4096, checkpoint_bytes=4096)
    with pytest.raises(DeviceError):
        install(image("3.0.0"), target, options=options, on_checkpoint=close)
    with Esp32ImageTarget(path) as again:
        assert boot(again) == "ota_0"
        assert update(again) == "ota_1"


def test_a_sink_outlives_the_target_that_made_it(path: Path) -> None:
    make_chip(path, running="ota_0")
    sink = Esp32ImageTarget(path).open_sink(Slot("ota_1", OFFSETS["ota_1"], SLOT_SIZE))  # not closed, only forgotten
    gc.collect()
    ota_core.Pipeline(ota_core.MemorySource(image("3.0.0")), sink).run()
    assert otadata(path) == ("1:VALID", "2:NEW")


def test_a_changed_record_is_seen_by_whoever_takes_the_chip_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chip(path, ("1:VALID", "2:VALID"), running="ota_0")
    load, times = chip_record.load, []

    def load_late(image_path: Path) -> chip_record.ChipRecord | None:
        record = load(image_path)
        if not times:  # between reading the record and taking the file, the one who had it restarted the chip
            times.append(1)
            chip_record.save(image_path, chip_record.ChipRecord(chip_id=5, running="ota_1"))
        return record

    monkeypatch.setattr(chip_record, "load", load_late)
    with Esp32ImageTarget(path) as target:
        assert target.running_slot() == target.slot("ota_1")


def test_ota_core_types_are_not_made_by_hand() -> None:
    with pytest.raises(TypeError):
        ota_core.FlashSink()
    with pytest.raises(ArgumentError, match="no slot"):
        ota_core.EspTarget("x", running="nonsense")


def test_a_short_image_in_a_slot_is_incomplete(path: Path) -> None:
    make_chip(path, apps={"ota_1": build_image(size=SLOT_SIZE)[: SLOT_SIZE - 1]})
    with Esp32ImageTarget(path) as target, pytest.raises((DataError, ImageError)):
        target.verify(target.slot("ota_1"))
