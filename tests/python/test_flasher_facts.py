"""What is kept about a device between two sessions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmaker_ota.flasher.chip import ChipFacts
from rmaker_ota.flasher.facts import FactsFile, cache_folder

FACTS = ChipFacts(5, bytes(range(6)), 4, 0x164020, 4 << 20, 921600, 40_000_000)


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    file = FactsFile("303a-34:85:18:AA:BB:CC", tmp_path / "deep" / "chips")
    assert file.load() is None
    file.save(FACTS)
    assert file.load() == FACTS
    other = ChipFacts(9, bytes(6), None, 0, 8 << 20)
    file.save(other)
    assert file.load() == other
    assert FactsFile("303a-34:85:18:AA:BB:CD", tmp_path / "deep" / "chips").load() is None
    assert len(list((tmp_path / "deep" / "chips").iterdir())) == 1


def test_unchanged_facts_are_not_written_again(tmp_path: Path) -> None:
    file = FactsFile("key-of-it", tmp_path)
    file.save(FACTS)
    assert file.path is not None
    before = file.path.stat().st_ino
    file.save(FACTS)
    assert file.path.stat().st_ino == before


def test_a_device_that_cannot_be_told_from_others_has_no_file(tmp_path: Path) -> None:
    for file in (FactsFile(None, tmp_path), FactsFile("key", None)):
        file.save(FACTS)
        assert file.load() is None
    assert list(tmp_path.iterdir()) == []


def test_a_serial_never_leaves_the_folder(tmp_path: Path) -> None:
    for key in ("../../etc/passwd", "/etc/passwd", "a\0b", "ü" * 200, ".", ""):
        file = FactsFile(key, tmp_path)
        file.save(FACTS)
        assert file.path is not None
        assert file.path.parent == tmp_path
        assert file.load() == FACTS


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"chip_id": -1},
        {"chip_id": 1 << 16},
        {"flash_size": "4M"},
        {"flash_size": True},
        {"revision": 1 << 32},
        {"mac": "00"},
        {"mac": "zz" * 6},
        {"mac": 5},
        {"baud": None},
    ],
)
def test_a_damaged_record_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    file = FactsFile("key-of-it", tmp_path)
    file.save(FACTS)
    assert file.path is not None
    record = json.loads(file.path.read_text())
    file.path.write_text(json.dumps(record | change))
    assert file.load() is None
    for text in ("", "[]", "{}", "null", "[" * 4000, "\0"):
        file.path.write_text(text)
        assert file.load() is None
    file.save(FACTS)
    assert file.load() == FACTS


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = FactsFile("key-of-it", tmp_path / "file" / "chips")
    file.save(FACTS)
    assert file.load() is None


def test_the_folder_is_the_services_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/rmaker-ota:/other")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/users/me")
    assert cache_folder() == Path("/var/cache/rmaker-ota/chips")
    monkeypatch.delenv("CACHE_DIRECTORY")
    assert cache_folder() == Path("/x/rmaker-ota/chips")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/users/me/.cache/rmaker-ota/chips")
    monkeypatch.delenv("HOME")
    assert cache_folder() is None
