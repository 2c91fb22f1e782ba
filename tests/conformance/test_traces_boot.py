"""What real boot loaders did at each power-on (``data/traces/boot``): ours decides and writes the same."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rmaker_ota import ota_core
from rmaker_ota.esp_format import BootConfig, OtadataEntry, SlotFacts
from tests.conformance.vectors import DATA

OBSERVED: list[dict[str, Any]] = json.loads((DATA / "traces" / "boot" / "observed.json").read_text())
APPS = {"1.0.0": "ota_0", "2.0.0": "ota_1", "0.9.0": "factory"}
STATES = {"NEW": 0, "PENDING_VERIFY": 1, "VALID": 2, "INVALID": 3, "ABORTED": 4, "UNDEFINED": 0xFFFFFFFF}
DAMAGED = SlotFacts(verifies=False)
BLANK = SlotFacts(verifies=False, described=False)

# what the scenario's text says of the images, by row number
IMAGES: dict[int, dict[str, SlotFacts]] = {
    15: {"ota_1": DAMAGED},
    17: {"ota_1": DAMAGED},
    19: {"ota_1": BLANK},
    21: {"ota_1": BLANK},
    23: {"ota_1": DAMAGED},  # wants chip v99.99
    25: {"ota_0": DAMAGED},
    51: {"ota_1": SlotFacts(secure_version=1)},
    53: {"ota_0": SlotFacts(secure_version=1)},
    55: {"ota_0": SlotFacts(secure_version=1), "ota_1": SlotFacts(secure_version=2)},
    57: {"ota_1": SlotFacts(secure_version=1)},
}
EFUSE = {53: 1, 55: 1, 57: 1}


def written(text: str) -> OtadataEntry:
    if text == "blank":
        return ota_core.blank_otadata_entry()
    seq, state = text.split(":")
    return ota_core.make_otadata_entry(int(seq), STATES[state])


def with_crc(entry: OtadataEntry, crc: int) -> OtadataEntry:
    return OtadataEntry(entry.seq, entry.state, crc, entry.label)


def before(row: dict[str, Any]) -> tuple[OtadataEntry, OtadataEntry]:
    """Both entries at the first power-on: as written, then changed as the scenario's text says."""
    first, second = (written(text) for text in row["otadata_before"].split(" / "))
    match row["row"]:
        case 29:  # newest entry: bad CRC
            second = with_crc(second, second.crc ^ 1)
        case 31:  # only its first 16 bytes are there
            raw = ota_core.build_otadata_entry(second)[:16] + b"\xff" * 16
            second = ota_core.parse_otadata(raw.ljust(4096, b"\xff") * 2)[0]
        case 33:  # state changed from INVALID to VALID, CRC left
            second = OtadataEntry(second.seq, STATES["VALID"], second.crc, second.label)
        case 35:  # older entry: bad CRC
            first = with_crc(first, first.crc ^ 1)
    return first, second


def shown(entry: OtadataEntry) -> str:
    facts = ota_core.otadata_facts(entry, 2)
    if facts.blank:
        return "blank"
    return f"seq={entry.seq} {facts.state_name}" + ("" if facts.crc_ok else " BADCRC")


def test_all_rows_are_here() -> None:
    assert len(OBSERVED) == 41
    assert {row["boot_loader"] for row in OBSERVED} == {"rollback", "rollback and anti-rollback", "no rollback"}


@pytest.mark.parametrize("row", OBSERVED, ids=lambda row: f"{row['boot_loader'].replace(' ', '_')}-{row['row']}")
def test_ours_does_the_same(row: dict[str, Any]) -> None:
    anti_rollback = row["boot_loader"] == "rollback and anti-rollback"
    secure_version = EFUSE.get(row["row"], 0)
    entries = before(row)
    for power_on in row["power_ons"]:
        parsed = re.fullmatch(r"(.*); \[(.*)\](?:, eFuse (\d+))?", power_on)
        assert parsed is not None
        ran, expected, efuse = parsed.groups()
        apps = ran.removesuffix(" (stopped by time limit)").split(" → ")
        for app in apps:  # a reset in between: the boot loader decides again
            decision = ota_core.boot_decide(
                entries,
                BootConfig(
                    slot_count=2,
                    has_factory="factory app," in row["scenario"] or row["scenario"].endswith(", factory app"),
                    rollback=row["boot_loader"] != "no rollback",
                    anti_rollback=anti_rollback,
                    secure_version=secure_version,
                    slots=IMAGES.get(row["row"], {}),
                ),
            )
            assert decision.slot == APPS[app], power_on
            entries = decision.plan.after
            if decision.plan.secure_version is not None:
                secure_version = decision.plan.secure_version
        assert " / ".join(shown(entry) for entry in entries) == expected, power_on
        assert efuse is None or int(efuse) == secure_version
        assert (efuse is None) == (not anti_rollback)
