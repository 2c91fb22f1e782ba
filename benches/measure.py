"""One way to measure, for all benches: the result is checked before its time counts.

A bench hands over what is done and how its result is checked::

    def test_ours(measure): measure("ours", install_it, check=is_the_image, counts=counters_of)

`check` sees the result of a first run before anything is timed, and the last result afterwards. Whatever stands in one
pytest-benchmark group belongs together: the row whose name begins with "plain" is the plain way of doing it in Python,
and the others are compared with it. Seconds are minimums, because a busy machine only ever adds to them; counts do not
jitter at all. With ``--benchmark-disable`` everything runs once, on small inputs: a test of the benches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One measured way of doing something."""

    group: str
    name: str
    wall_s: float | None
    cpu_s: float | None
    work: float  # what is divided by the seconds
    unit: str
    rounds: int
    counts: Mapping[str, object]

    def text(self, plain: Row | None) -> str:
        """Seconds, rate, how it compares with the plain way, counts."""
        parts = [f"wall {seconds(self.wall_s):>8}"]
        if self.cpu_s is not None:
            parts.append(f"CPU {seconds(self.cpu_s):>8}")
        if self.wall_s and self.unit:
            parts.append(f"{self.work / self.wall_s:,.0f} {self.unit}/s")
        if plain is not None and self is not plain and self.wall_s and plain.wall_s:
            parts.append(f"{plain.wall_s / self.wall_s:.2f} x as fast as plain")
            if self.cpu_s is not None and plain.cpu_s:
                parts.append(f"{self.cpu_s / plain.cpu_s:.2f} x its CPU")
        if self.counts:
            parts.append(", ".join(f"{name} {value}" for name, value in self.counts.items()))
        return "  ".join(parts)


@dataclass
class Rows:
    rows: list[Row] = field(default_factory=list)

    def table(self) -> list[str]:
        """The rows by group, each beside the plain way."""
        lines = []
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        for group, rows in groups.items():
            lines.append(f"{group}:")
            plain = next((row for row in rows if row.name.startswith("plain")), None)
            width = max(len(row.name) for row in rows)
            lines += [f"  {row.name:<{width}}  {row.text(plain)}" for row in rows]
        return lines


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    factor, unit = next((row for row in ((1, "s"), (1e3, "ms"), (1e6, "us")) if value * row[0] >= 1), (1e9, "ns"))
    return f"{value * factor:.3g} {unit}"


def system_calls() -> dict[str, int]:
    """Calls of the read and the write family this process has made, its threads included."""
    rows = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        {"syscr": "read_calls", "syscw": "write_calls"}[name]: int(n) for name, n in rows if name.startswith("sysc")
    }


def own_calls() -> dict[str, int]:
    before = system_calls()
    return {kind: count - before[kind] for kind, count in system_calls().items()}


OWN_CALLS = own_calls()  # what looking costs


class Measure:
    """Times one way of doing something, once its result was found right.

    Args:
        benchmark: the fixture of pytest-benchmark.
        quick: nothing is timed; inputs should be small.
    """

    def __init__(self, benchmark: Any, rows: Rows, *, quick: bool) -> None:
        self._benchmark = benchmark
        self._rows = rows
        self.quick = quick

    def __call__(
        self,
        name: str,
        what: Callable[..., Any],
        *,
        check: Callable[[Any], object],
        work: float = 1,
        unit: str = "",
        setup: Callable[[], tuple[Any, ...]] | None = None,
        rounds: int = 0,
        counts: Callable[[Any], Mapping[str, object]] | None = None,
        cpu_s: Callable[[Any], float] | None = None,
    ) -> None:
        """Measures.

        Args:
            name: of the row; "plain ..." is what the others of its group are compared with.
            what: does it, with the arguments `setup` returned.
            check: raises or returns False when the result is wrong.
            work, unit: how much was done, for the rate: 64 and "MiB" give MiB/s.
            setup: before each round, not timed.
            rounds: how often; 1: without a first run before; 0: as often as fits the time of pytest-benchmark, for
                what takes microseconds.
            counts: what was counted, from the last result.
            cpu_s: CPU seconds of a run, from its result; None: those of this process.
        """
        arguments = setup or (lambda: ())
        given = arguments() if self.quick or rounds != 1 else None
        before = system_calls()
        first = None if given is None else what(*given)
        calls = {kind: count - before[kind] - OWN_CALLS[kind] for kind, count in system_calls().items()}
        assert given is None or check(first) is not False, f"{name}: wrong result"
        cpu: list[float] = []

        def timed(*args: Any) -> Any:
            began = time.process_time()
            result = what(*args)
            cpu.append(time.process_time() - began if cpu_s is None else cpu_s(result))
            return result

        if self.quick:
            result = first
            self._benchmark.pedantic(lambda: None)
        elif rounds:
            result = self._benchmark.pedantic(timed, setup=lambda: (arguments(), {}), rounds=rounds)
        else:
            result = self._benchmark(what, *arguments())
        assert check(result) is not False, f"{name}: wrong result"
        stats = None if self.quick else self._benchmark.stats.stats
        found = dict(counts(result)) if counts is not None else {}
        if rounds and cpu_s is None:  # of this process too
            found |= calls
        row = Row(
            group=self._benchmark.group or "",
            name=name,
            wall_s=stats.min if stats else None,
            cpu_s=min(cpu) if cpu else None,
            work=work,
            unit=unit,
            rounds=stats.rounds if stats else 1,
            counts=found,
        )
        self._rows.rows.append(row)
        self._benchmark.extra_info.update({**found, "cpu_s": row.cpu_s, "work": work, "unit": unit})
