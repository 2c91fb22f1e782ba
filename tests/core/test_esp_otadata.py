"""otadata over the border. The plans' properties from every state are tested in C (``test_esp_otadata.c``)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmaker_ota import ota_core
from rmaker_ota.errors import (
    ArgumentError,
    NotFoundError,
    PendingVerifyError,
    RejectedError,
    RollbackError,
    SlotRunningError,
    StateError,
    UnsupportedError,
)
from rmaker_ota.esp_format import (
    STATE_ABORTED,
    STATE_INVALID,
    STATE_NEW,
    STATE_PENDING_VERIFY,
    STATE_UNDEFINED,
    STATE_VALID,
    BootConfig,
    OtadataEntry,
    SlotFacts,
)

BLANK = ota_core.blank_otadata_entry()
entry = ota_core.make_otadata_entry
u32 = st.integers(0, 2**32 - 1)
raw_entries = st.builds(OtadataEntry, u32, u32, u32, st.binary(min_size=20, max_size=20))
made_entries = st.builds(entry, st.one_of(st.integers(0, 9), u32), st.one_of(st.integers(0, 5), u32))
entries = st.tuples(*[st.one_of(raw_entries, made_entries, st.just(BLANK))] * 2)
facts = st.builds(SlotFacts, st.booleans(), st.booleans(), st.integers(0, 3))
configs = st.builds(
    BootConfig,
    slot_count=st.integers(0, 16),
    has_factory=st.booleans(),
    has_test=st.booleans(),
    has_otadata=st.booleans(),
    rollback=st.just(True),
    anti_rollback=st.booleans(),
    secure_version=st.integers(0, 3),
    slots=st.dictionaries(st.sampled_from(["factory", "test", *(f"ota_{n}" for n in range(16))]), facts),
)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_any_entries_are_read_and_built_again(first: bytes, second: bytes) -> None:
    fill = b"\xff" * 4064
    both = ota_core.parse_otadata(first + fill + second + fill)
    assert ota_core.build_otadata_entry(both[0]) == first
    assert ota_core.build_otadata(both) == first + fill + second + fill
    for one in both:
        found = ota_core.otadata_facts(one, 2)
        assert not (found.dead and found.live)
        assert not found.live or found.crc_ok


@given(entries, configs)
def test_the_boot_loader_decides_about_anything(both: tuple[OtadataEntry, OtadataEntry], config: BootConfig) -> None:
    decision = ota_core.boot_decide(both, config)
    assert decision.reasons
    if decision.slot is not None:
        found = config.slots.get(decision.slot, SlotFacts())
        assert found.verifies
        if config.anti_rollback:
            assert found.secure_version >= config.secure_version
    if decision.plan.secure_version is not None:
        assert decision.plan.secure_version > config.secure_version
    again = ota_core.boot_decide(decision.plan.after, config)
    for one in again.plan.after:  # what boots unconfirmed is given up at the second power-on
        assert one.state != STATE_PENDING_VERIFY or again.active is not None or not config.has_otadata


@given(entries, configs, st.sampled_from(["factory", "ota_0", "ota_1", "ota_15", None]))
def test_plans_end_in_a_plan_or_a_named_error(
    both: tuple[OtadataEntry, OtadataEntry], config: BootConfig, running: str | None
) -> None:
    named = (
        ArgumentError,
        NotFoundError,
        PendingVerifyError,
        RejectedError,
        RollbackError,
        SlotRunningError,
        StateError,
        UnsupportedError,
    )
    for plan in (
        lambda: ota_core.otadata_plan_begin(both, config, running, "ota_1"),
        lambda: ota_core.otadata_plan_set_boot(both, config, running, "ota_1"),
        lambda: ota_core.otadata_plan_set_boot(both, config, running, "factory"),
        lambda: ota_core.otadata_plan_mark_valid(both, config, running),
        lambda: ota_core.otadata_plan_mark_invalid(both, config, running),
    ):
        try:
            made = plan()
        except named:
            continue
        except ValueError as error:  # FormatError: sequence numbers used up
            assert "used up" in str(error)
            continue
        assert len(made.ops) <= 6
        for op in made.ops:
            assert (op.entry is None) == (op.kind == "erase")


def test_the_trial_that_is_never_confirmed_ends_where_it_began() -> None:
    config = BootConfig(slot_count=2)
    both = (entry(1, STATE_VALID), BLANK)
    both = ota_core.otadata_plan_begin(both, config, "ota_0", "ota_1").after
    both = ota_core.otadata_plan_set_boot(both, config, "ota_0", "ota_1").after
    first = ota_core.boot_decide(both, config)
    assert first.slot == "ota_1"
    assert ota_core.otadata_slot_state(first.plan.after, 2, "ota_1") == STATE_PENDING_VERIFY
    second = ota_core.boot_decide(first.plan.after, config)
    assert second.slot == "ota_0"
    assert ota_core.otadata_slot_state(second.plan.after, 2, "ota_1") == STATE_ABORTED
    assert ota_core.otadata_last_invalid(second.plan.after, 2) == "ota_1"


def test_undefined_never_rolls_back() -> None:
    config = BootConfig(slot_count=2)
    both = (entry(1, STATE_VALID), entry(2, STATE_UNDEFINED))
    for _ in range(3):
        decision = ota_core.boot_decide(both, config)
        assert (decision.slot, decision.plan.ops) == ("ota_1", ())
    written = ota_core.otadata_plan_set_boot((entry(1, STATE_VALID), BLANK), config, "ota_0", "ota_1").after
    assert written[1].state == STATE_NEW  # so it is not written with rollback


def test_new_in_slot_0_beside_a_blank_sector_boots_for_ever_so_it_is_never_written_alone() -> None:
    config = BootConfig(slot_count=2)
    both = (entry(1, STATE_NEW), BLANK)  # the trap: ota_1 is good, but no entry leads to it
    for _ in range(3):
        decision = ota_core.boot_decide(both, config)
        assert decision.slot == "ota_0"
        both = decision.plan.after
    both = ota_core.otadata_plan_set_boot((BLANK, BLANK), config, "ota_1", "ota_0").after
    slots = []
    for _ in range(3):
        decision = ota_core.boot_decide(both, config)
        slots.append(decision.slot)
        both = decision.plan.after
    assert slots == ["ota_0", "ota_1", "ota_1"]


def test_errors_have_their_classes() -> None:
    config = BootConfig(slot_count=2)
    pending = (entry(1, STATE_PENDING_VERIFY), BLANK)
    with pytest.raises(PendingVerifyError):
        ota_core.otadata_plan_begin(pending, config, "ota_0", "ota_1")
    with pytest.raises(SlotRunningError):
        ota_core.otadata_plan_begin(pending, config, "ota_0", "ota_0")
    with pytest.raises(RollbackError):
        ota_core.otadata_plan_mark_invalid(pending, config, "ota_0")
    with pytest.raises(StateError, match="ota_0"):
        ota_core.otadata_plan_mark_valid(pending, config, "ota_1")
    with pytest.raises(NotFoundError):
        ota_core.otadata_slot_state(pending, 2, "ota_1")
    with pytest.raises(UnsupportedError):
        ota_core.otadata_slot_state(pending, 2, "factory")
    old = BootConfig(2, anti_rollback=True, secure_version=1, slots={"ota_0": SlotFacts(secure_version=1)})
    with pytest.raises(RejectedError, match="secure version"):
        ota_core.otadata_plan_set_boot(pending, old, "ota_0", "ota_1")
    with pytest.raises(ArgumentError):
        ota_core.boot_decide(pending, BootConfig(17))
    for name in ("ota_16", "ota_", "ota_-1", "app", "", "ota_²"):
        with pytest.raises(ArgumentError):
            ota_core.otadata_slot_state(pending, 2, name)
    with pytest.raises(ArgumentError):
        ota_core.boot_decide(pending, BootConfig(2, slots={"ota_99": SlotFacts()}))
    with pytest.raises(ArgumentError, match="20 bytes"):
        ota_core.build_otadata_entry(OtadataEntry(1, 2, 3, b"short"))


def test_reasons_tell_the_way() -> None:
    config = BootConfig(slot_count=2, slots={"ota_1": SlotFacts(verifies=False)})
    decision = ota_core.boot_decide((entry(1, STATE_VALID), entry(2, STATE_NEW)), config)
    assert decision.reasons == (
        "entry 1 is the active one: ota_1, NEW",
        "first boot of ota_1: entry 1 becomes PENDING_VERIFY",
        "ota_1 holds no image that boots",
        "ota_0 boots",
    )
    assert decision.active == 1
    nothing = ota_core.boot_decide((BLANK, entry(2, STATE_INVALID)), BootConfig(0))
    assert nothing.slot is None
    assert nothing.reasons[-1] == "nothing boots"


def test_the_next_slot() -> None:
    assert ota_core.otadata_next_slot(2, "ota_0") == "ota_1"
    assert ota_core.otadata_next_slot(2, "ota_1") == "ota_0"
    assert ota_core.otadata_next_slot(3, "factory") == "ota_0"
    assert ota_core.otadata_next_slot(3, None) == "ota_0"
    assert ota_core.otadata_next_slot(0, "factory") is None
