"""otadata in 15 states: what a boot loader makes of them, for 2 and 3 slots, with and without factory and rollback."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import ota_core
from rmaker_ota.errors import FormatError
from rmaker_ota.esp_format import BootConfig, OtadataEntry
from tests.conformance.vectors import described, description

OTADATA = described("otadata")
by_name = pytest.mark.parametrize("path", OTADATA, ids=lambda path: path.stem)


def facts(entry: OtadataEntry) -> dict[str, Any] | str:
    found = ota_core.otadata_facts(entry, 2)
    if found.blank:
        return "erased"
    return {
        "ota_seq": entry.seq,
        "ota_state": entry.state,
        "state_name": found.state_name,
        "crc": entry.crc,
        "crc_ok": found.crc_ok,
    }


def test_all_vectors_are_here() -> None:
    assert len(OTADATA) == 15


@by_name
def test_both_entries_are_read(path: Path) -> None:
    data = path.read_bytes()
    about = description(path)
    assert hashlib.sha256(data).hexdigest() == about["sha256"]
    entries = ota_core.parse_otadata(data)
    assert [facts(entry) for entry in entries] == about["expected"]["entries"]
    assert ota_core.build_otadata(entries) == data
    with pytest.raises(FormatError):
        ota_core.parse_otadata(data[:-1])


@by_name
def test_the_boot_loader_boots_what_it_should(path: Path) -> None:
    entries = ota_core.parse_otadata(path.read_bytes())
    cases = description(path)["expected"]["boot"]
    assert len(cases) == 8
    for case in cases:
        config = BootConfig(
            slot_count=case["ota_slots"], has_factory=case["factory"], rollback=case["rollback_enabled"]
        )
        decision = ota_core.boot_decide(entries, config)
        assert decision.slot == case["boots"], case
        assert [facts(entry) for entry in decision.plan.after] == case["after_boot"], case
        assert decision.reasons[-1].startswith(f"{case['boots']} boots") or decision.first_use
