"""Every ``fuzz_*.c`` here is a test: fed with its corpus and mutations that are the same in every run (``driver.c``).

Real fuzzing, with libFuzzer and new inputs, is ``make fuzz`` (``tests/fuzz/run.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.csrc.conftest import CFile, CItem, check
from tests.csrc.csrc_build import Toolchain, build, run
from tests.fuzz.corpus import corpus_files

MUTATIONS = 300


class FuzzItem(CItem):
    def runtest(self) -> None:
        program = build(self.path, Toolchain(), extra=("tests/fuzz/driver.c",))
        check(run(program, str(MUTATIONS), *map(str, corpus_files(self.path))))


class FuzzFile(CFile):
    item: Any = FuzzItem


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix == ".c" and file_path.name.startswith("fuzz_"):
        return FuzzFile.from_parent(parent, path=file_path)
    return None
