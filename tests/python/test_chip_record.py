"""The record of a virtual chip: kept whole, or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from rmaker_ota.errors import DeviceError, FormatError
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.chip_record import ChipRecord, load, record_path, save

RECORD = ChipRecord(
    chip_id=5,
    chip_revision=3,
    efuse_block_revision=103,
    ignore_max_revision=True,
    secure_version=7,
    rollback=False,
    anti_rollback=True,
    table_offset=0x10000,
    running="ota_1",
)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    image = tmp_path / "flash.bin"
    assert load(image) is None
    save(image, RECORD)
    assert load(image) == RECORD
    save(image, ChipRecord())
    assert load(image) == ChipRecord()
    assert [path.name for path in tmp_path.iterdir()] == ["flash.bin.chip.json"]


def test_every_field_but_those_that_may_be_missing_is_checked(tmp_path: Path) -> None:
    image = tmp_path / "flash.bin"
    for field in fields(ChipRecord):
        for wrong in ("x", -1, 1 << 32, 1.5, [], {}, None):
            raw = {"format": 1, field.name: wrong}
            record_path(image).write_text(json.dumps(raw))
            if wrong is None and "None" in str(field.type):
                assert getattr(load(image), field.name) is None
                continue
            with pytest.raises(FormatError) as caught:
                load(image)
            assert field.name in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1, "unknown": 1}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": 1, "secure_version": 1e400}',
        b'{"format": 1, "secure_version": ' + b"9" * 10_000 + b"}",
    ],
)
def test_a_damaged_record_names_the_file_and_the_way_out(tmp_path: Path, text: bytes) -> None:
    image = tmp_path / "flash.bin"
    record_path(image).write_bytes(text)
    with pytest.raises(FormatError) as caught:
        load(image)
    assert str(record_path(image)) in str(caught.value)
    assert "delete it" in str(caught.value)
    assert caught.value.status == "ERR_STATE"


def test_a_record_that_cannot_be_read_is_told_from_a_missing_one(tmp_path: Path) -> None:
    image = tmp_path / "flash.bin"
    record_path(image).mkdir()
    with pytest.raises(DeviceError) as caught:
        load(image)
    assert caught.value.errno == 21


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_record_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    image = tmp_path / "flash.bin"
    save(image, RECORD)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "replace") if call == "replace" else (os, call)), fail)
        with pytest.raises(DeviceError) as caught:
            save(image, ChipRecord())
    assert caught.value.errno == 28
    assert load(image) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["flash.bin.chip.json"]


def test_a_record_whose_name_may_not_be_durable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "flash.bin"
    save(image, RECORD)

    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(chip_record, "sync_directory", fail)
    with pytest.raises(DeviceError):
        save(image, ChipRecord())
    assert load(image) == ChipRecord()


def test_the_new_record_is_durable_before_it_has_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def traced_fsync(fd: int) -> None:
        calls.append("sync directory" if Path(f"/proc/self/fd/{fd}").resolve().is_dir() else "sync file")
        fsync(fd)

    def traced_replace(self: Path, to: Path) -> Path:
        calls.append("rename")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    chip_record.save(tmp_path / "flash.bin", RECORD)
    assert calls == ["sync file", "rename", "sync directory"]


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    image = tmp_path / "chip.bin"
    (tmp_path / "chip.bin.chip.json.new").write_text("half a rec")
    save(image, ChipRecord(chip_id=5))
    assert load(image) == ChipRecord(chip_id=5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["chip.bin.chip.json"]
