"""Replays trace files and keeps the tally."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.compare import compare
from tests.conformance.deviations import Context, explain, explain_stop
from tests.conformance.observe import at_the_end, observe, stored_values
from tests.conformance.platforms import Platform, Record, SimplePlatform
from tests.conformance.scenario import study
from tests.conformance.trace import Trace, UnknownInput, check_inputs, is_trace, parse
from tests.conformance.world import World

Json = dict[str, Any]
MakePlatform = Callable[[Json, Record], Platform]


def platform(name: str) -> MakePlatform:
    """Where the images lie: "chip" (flash image file and engine) or "simple" (slots in memory)."""
    if name == "simple":
        return SimplePlatform
    from tests.conformance.chip import ChipPlatform  # needs the extension

    return ChipPlatform


@dataclass
class Outcome:
    """What came of one trace: one of matched, deviates (``rules``), unmatched (``why``), not_replayed (``why``)."""

    kind: str
    why: str = ""
    rules: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def replay(trace: Trace, make_platform: MakePlatform = SimplePlatform) -> Outcome:
    """Replays one trace and judges it."""
    try:
        world = run(trace, make_platform)
    except UnknownInput as unknown:
        return Outcome("not_replayed", str(unknown))
    return judge(trace, world)


def run(trace: Trace, make_platform: MakePlatform = SimplePlatform) -> World:
    """Lets the world of a trace take its course.

    Raises:
        UnknownInput: the trace asks for something the world cannot do.
    """
    check_inputs(trace)
    world = World(trace, make_platform)
    world.run()
    return world


def judge(trace: Trace, world: World) -> Outcome:
    """Compares what was recorded with what was seen in the replay."""
    final = trace.final
    reference = observe(trace.records)
    ours = list(world.seen)
    if not trace.stopped:
        reference += at_the_end(stored_values(final), final["running"], final["t"])
        ours += at_the_end(world.stored, world.running, world.t)
    comparison = compare(reference, ours)
    context = Context(study(trace), reference, ours, list(comparison.differences))
    if trace.stopped:
        explain_stop(context, comparison.last_common)
    explain(context)
    context.used.pop("", None)
    notes = sorted(world.notes)
    if context.open:
        left = [str(one) for one in context.open]
        return Outcome(
            "unmatched", f"{left[0]}" + (f" (and {len(left) - 1} more)" if left[1:] else ""), notes=notes, left=left
        )
    if context.used:
        return Outcome("deviates", rules=sorted(context.used, key=lambda number: int(number[1:])), notes=notes)
    return Outcome("matched", notes=notes)


@dataclass
class Tally:
    matched: list[str] = field(default_factory=list)
    deviates: dict[str, list[str]] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    not_replayed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, outcome: Outcome) -> None:
        match outcome.kind:
            case "matched":
                self.matched.append(name)
            case "deviates":
                self.deviates[name] = outcome.rules
            case "unmatched":
                self.unmatched[name] = outcome.why
                self.details[name] = outcome.left
            case _:
                self.not_replayed[name] = outcome.why
        if outcome.notes:
            self.notes[name] = outcome.notes

    @property
    def counts(self) -> dict[str, int]:
        return {
            "matched": len(self.matched),
            "deviates": len(self.deviates),
            "unmatched": len(self.unmatched),
            "not_replayed": len(self.not_replayed),
        }

    def to_json(self) -> Json:
        return {
            "matched": self.matched,
            "deviates": self.deviates,
            "unmatched": self.unmatched,
            "not_replayed": self.not_replayed,
            "counts": self.counts,
            "notes": self.notes,
        }


def find(folders: Iterable[Path]) -> list[Path]:
    """The ``*.json`` files of folders and their subfolders, and files named themselves, in order of their names."""
    found: list[Path] = []
    for folder in folders:
        found += [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
    return found


def replay_all(paths: Iterable[Path], make_platform: MakePlatform = SimplePlatform) -> Tally:
    """Replays trace files; a JSON file that is no trace is passed over, one that cannot be read is unmatched."""
    tally = Tally()
    for path in paths:
        name = path.stem
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            tally.add(name, Outcome("unmatched", f"cannot be read: {error}"))
            continue
        if not is_trace(document):
            continue
        try:
            outcome = replay(parse(document), make_platform)
        except UnknownInput as unknown:
            outcome = Outcome("not_replayed", str(unknown))
        except Exception as error:
            outcome = Outcome("unmatched", f"the replay failed: {type(error).__name__}: {error}")
        tally.add(str(document.get("name", name)), outcome)
    return tally
