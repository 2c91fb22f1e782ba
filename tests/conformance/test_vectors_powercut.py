"""otadata cut at every flash operation of an update: our plans make the same operations, and what boots is the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rmaker_ota import ota_core
from rmaker_ota.esp_format import BootConfig, OtadataEntry, OtadataOp, OtadataPlan
from tests.conformance.vectors import VECTORS, entries, entry

SCENARIOS: list[dict[str, Any]] = json.loads((VECTORS / "powercut" / "otadata_cuts.json").read_text())["scenarios"]
Entries = tuple[OtadataEntry, OtadataEntry]


def name(scenario: dict[str, Any]) -> str:
    return "-".join(
        [
            scenario["title"].replace(" ", "_").replace(",", ""),
            "rollback" if scenario["rollback_enabled"] else "no_rollback",
            "confirm" if scenario["confirm"] else "reject",
        ]
    )


by_name = pytest.mark.parametrize("scenario", SCENARIOS, ids=name)


def config_of(scenario: dict[str, Any]) -> BootConfig:
    return BootConfig(
        slot_count=scenario["slots"], has_factory=scenario["factory"], rollback=scenario["rollback_enabled"]
    )


def update(scenario: dict[str, Any]) -> list[tuple[str, OtadataOp]]:
    """Our operations of the whole update: begin, set boot, boot, confirm or reject."""
    config = config_of(scenario)
    current = entries(scenario["start"])
    running = ota_core.boot_decide(current, config).slot
    assert running is not None
    slot = ota_core.otadata_next_slot(config.slot_count, running)
    assert slot is not None
    done: list[tuple[str, OtadataOp]] = []

    def carry_out(stage: str, plan: OtadataPlan) -> Entries:
        done.extend((stage, op) for op in plan.ops)
        return plan.after

    current = carry_out("begin", ota_core.otadata_plan_begin(current, config, running, slot))
    current = carry_out("set_boot", ota_core.otadata_plan_set_boot(current, config, running, slot))
    decision = ota_core.boot_decide(current, config)
    assert decision.slot == slot
    current = carry_out("boot", decision.plan)
    if scenario["confirm"]:
        current = carry_out("mark_valid", ota_core.otadata_plan_mark_valid(current, config, slot))
    else:
        assert ota_core.otadata_can_rollback(current, config, slot) == running
        current = carry_out("mark_invalid", ota_core.otadata_plan_mark_invalid(current, config, slot))
    assert current == entries(scenario["end"])
    return done


def cut(start: Entries, ops: list[tuple[str, OtadataOp]], index: int, bytes_done: int) -> Entries:
    """Both entries when power goes in operation ``index``, after ``bytes_done`` bytes of it."""
    sectors = [bytearray(ota_core.build_otadata_entry(one)) for one in start]
    for number, (_, op) in enumerate(ops[: index + 1]):
        count = 4096 if number < index else bytes_done
        sector = sectors[op.sector]
        if op.kind == "erase":
            sector[: min(count, 32)] = b"\xff" * min(count, 32)
        else:
            assert op.entry is not None
            new = ota_core.build_otadata_entry(op.entry)
            for at in range(min(count, 32)):
                sector[at] &= new[at]  # programming clears bits
    first, second = sectors
    return entry(first.hex()), entry(second.hex())


def test_all_scenarios_are_here() -> None:
    assert len(SCENARIOS) == 18
    assert sum(len(scenario["cuts"]) for scenario in SCENARIOS) > 250


@by_name
def test_our_plans_make_the_operations_of_firmware(scenario: dict[str, Any]) -> None:
    assert [
        {
            "stage": stage,
            "op": op.kind,
            "sector": op.sector,
            "entry": None if op.entry is None else ota_core.build_otadata_entry(op.entry).hex(),
        }
        for stage, op in update(scenario)
    ] == scenario["ops"]
    end = ota_core.boot_decide(entries(scenario["end"]), config_of(scenario))
    assert end.slot == scenario["boots_at_end"]


@by_name
def test_every_cut_boots_what_it_should(scenario: dict[str, Any]) -> None:
    config = config_of(scenario)
    start = entries(scenario["start"])
    ops = update(scenario)
    old = ota_core.boot_decide(start, config).slot
    new = ota_core.otadata_next_slot(config.slot_count, old)
    for case in scenario["cuts"]:
        left = cut(start, ops, case["op"], case["bytes_done"])
        assert left == entries(case["after_cut"]), case
        first = ota_core.boot_decide(left, config)
        assert first.slot == case["boots"], case
        assert first.plan.after == entries(case["after_boot"]), case
        second = ota_core.boot_decide(first.plan.after, config)
        assert second.slot == case["boots_again"], case
        assert second.plan.after == entries(case["after_second_boot"]), case
        assert first.slot in (old, new), case


@by_name
def test_a_cut_after_any_byte_boots_the_old_or_the_new_image(scenario: dict[str, Any]) -> None:
    config = config_of(scenario)
    start = entries(scenario["start"])
    ops = update(scenario)
    old = ota_core.boot_decide(start, config).slot
    new = ota_core.otadata_next_slot(config.slot_count, old)
    for index in range(len(ops)):
        for bytes_done in range(33):
            assert ota_core.boot_decide(cut(start, ops, index, bytes_done), config).slot in (old, new)
