"""What all benches share: the machine's line, one way to measure, and a table that sets each figure beside its peer's.

A bench hands over what is done and how its result is checked::

    def test_ours(measure): measure("ours", install_it, check=is_the_image, counts=counters_of)

`check` sees the result of a first run before anything is timed, and the last result afterwards. Whatever stands in one
pytest-benchmark group belongs together: the row whose name begins with "plain" is the plain way of doing it in Python,
and the others are compared with it. Seconds are minimums, because a busy machine only ever adds to them; counts do not
jitter at all. With ``--benchmark-disable`` everything runs once, on small inputs: a test of the benches.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import ssl
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import ota_core


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


@dataclass
class Rows:
    rows: list[Row] = field(default_factory=list)


ROWS = pytest.StashKey[Rows]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = Rows()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def pytest_report_header() -> list[str]:
    return [
        f"machine: {cpu_name()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}",
        f"versions: Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, zlib {zlib.ZLIB_RUNTIME_VERSION}, "
        f"SQLite {sqlite3.sqlite_version}, {Path(ota_core.__file__).name}",
    ]


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
            rounds: how often; 0: as often as fits the time of pytest-benchmark, for what takes microseconds.
            counts: what was counted, from the last result.
            cpu_s: CPU seconds of a run, from its result; None: those of this process.
        """
        arguments = setup or (lambda: ())
        given = arguments()
        before = system_calls()
        first = what(*given)
        calls = {kind: count - before[kind] - OWN_CALLS[kind] for kind, count in system_calls().items()}
        assert check(first) is not False, f"{name}: wrong result"
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


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether nothing is timed."""
    return bool(pytestconfig.getoption("benchmark_disable"))


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config, quick: bool) -> Iterator[Measure]:
    yield Measure(benchmark, pytestconfig.stash[ROWS], quick=quick)


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    factor, unit = next((row for row in ((1, "s"), (1e3, "ms"), (1e6, "us")) if value * row[0] >= 1), (1e9, "ns"))
    return f"{value * factor:.3g} {unit}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    groups: dict[str, list[Row]] = {}
    for row in config.stash[ROWS].rows:
        groups.setdefault(row.group, []).append(row)
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("benches: minimum seconds, rates, and counts")
    for group, rows in groups.items():
        write(f"{group}:")
        plain = next((row for row in rows if row.name.startswith("plain")), None)
        width = max(len(row.name) for row in rows)
        for row in rows:
            parts = [f"  {row.name:<{width}}  wall {seconds(row.wall_s):>8}"]
            if row.cpu_s is not None:
                parts.append(f"CPU {seconds(row.cpu_s):>8}")
            if row.wall_s and row.unit:
                parts.append(f"{row.work / row.wall_s:,.0f} {row.unit}/s")
            if plain is not None and row is not plain and row.wall_s and plain.wall_s:
                parts.append(f"{plain.wall_s / row.wall_s:.2f} x as fast as plain")
                if row.cpu_s and plain.cpu_s:
                    parts.append(f"{row.cpu_s / plain.cpu_s:.2f} x its CPU")
            if row.counts:
                parts.append(", ".join(f"{name} {value}" for name, value in row.counts.items()))
            write("  ".join(parts))
    sys.stdout.flush()
