"""What all benches share: the machine's line, the fixture `measure`, and a table at the end."""

from __future__ import annotations

import os
import platform
import sqlite3
import ssl
import zlib
from pathlib import Path
from typing import Any

import pytest
from benches.measure import Measure, Rows

from rmaker_ota import ota_core

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


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether nothing is timed."""
    return bool(pytestconfig.getoption("benchmark_disable"))


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config, quick: bool) -> Measure:
    return Measure(benchmark, pytestconfig.stash[ROWS], quick=quick)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[ROWS].table()
    if lines:
        terminalreporter.section("benches: minimum seconds, rates, and counts")
        for line in lines:
            terminalreporter.write_line(line)
