"""Where two lists of observations differ.

The longest common subsequence pairs what is equal; what is left over on either side is a difference. Timers are
compared apart from the rest: a timer is no message, only its moment and its length count, not its place among
things of the same moment.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from tests.conformance.observe import Observation


@dataclass(eq=False)
class Difference:
    """Something one side saw and the other did not, at that place in its list."""

    side: str  # "missing": the reference did it, the replay did not; "extra": the other way round
    index: int  # in the list of its side
    seen: Observation

    def __str__(self) -> str:
        return f"{self.side} {self.seen}"


@dataclass
class Comparison:
    reference: list[Observation]
    replay: list[Observation]
    differences: list[Difference] = field(default_factory=list)
    last_common: int = -1  # index in the replay of the last thing, timers apart, that both did


def compare(reference: list[Observation], replay: list[Observation]) -> Comparison:
    result = Comparison(reference, replay)
    for timers in (False, True):
        ours = [(i, seen) for i, seen in enumerate(replay) if (seen.kind == "timer") == timers]
        theirs = [(i, seen) for i, seen in enumerate(reference) if (seen.kind == "timer") == timers]
        matcher = difflib.SequenceMatcher(
            None, [seen.key for _, seen in theirs], [seen.key for _, seen in ours], autojunk=False
        )
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            if tag == "equal" and not timers:
                result.last_common = ours[j2 - 1][0]
            if tag != "equal":
                result.differences += [Difference("missing", i, seen) for i, seen in theirs[i1:i2]]
                result.differences += [Difference("extra", j, seen) for j, seen in ours[j1:j2]]
    result.differences.sort(key=lambda one: (one.seen.boot, one.seen.t, one.side == "extra", one.index))
    return result
