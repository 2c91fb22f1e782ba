"""Every recorded trace is replayed with the real engine and a flash image file, and with slots in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.deviations import RULES
from tests.conformance.runner import find, platform, replay, replay_all
from tests.conformance.trace import is_trace, parse

TRACES = Path(__file__).parents[1] / "data" / "traces"
DOCUMENTS: dict[str, dict[str, Any]] = {
    path.stem: document
    for path in sorted(TRACES.glob("*.json"))
    if is_trace(document := json.loads(path.read_text(encoding="utf-8")))
}


def test_the_traces_are_there() -> None:
    assert len(DOCUMENTS) == 249
    protocols = [document["config"]["protocol"] for document in DOCUMENTS.values()]
    assert (protocols.count("https"), protocols.count("mqtt")) == (195, 54)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_trace_matches_or_deviates_as_specified(name: str) -> None:
    outcome = replay(parse(DOCUMENTS[name]), platform("chip"))
    assert outcome.kind in ("matched", "deviates"), "\n".join(outcome.left or [outcome.why])
    assert set(outcome.rules) <= {rule.id for rule in RULES}


def test_slots_in_memory_give_the_same_result() -> None:
    tally = replay_all(find([TRACES]), platform("simple"))
    assert tally.unmatched == {}
    assert len(tally.matched) + len(tally.deviates) == len(DOCUMENTS)
    assert tally.not_replayed == {}


def test_most_traces_match_without_any_deviation() -> None:
    tally = replay_all(find([TRACES]), platform("simple"))
    assert len(tally.matched) >= 150


def test_two_replays_are_the_same() -> None:
    names = (
        "mqtt-disconnect-short",
        "https-progress-100k",
        "https-closed-midway-three-times",
        "verify-whole-cycle-rollback-and-second-try",
    )
    for name in names:
        first, second = (replay(parse(DOCUMENTS[name]), platform("chip")) for _ in range(2))
        assert first == second
