"""Every ``test_*.c`` here is a test: compiled with sanitizers from the sources its first comment names, and run.

A program fails when it exits with anything but 0, which AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer
also make it do. What it printed is shown then.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.csrc.csrc_build import BuildError, Toolchain, build, run


class ProgramFailed(Exception):
    """A C test program ended with anything but 0."""


def check(done: subprocess.CompletedProcess[str]) -> None:
    """Raises ProgramFailed with what the program printed when it did not exit with 0."""
    if done.returncode != 0:
        raise ProgramFailed(f"exit status {done.returncode}\n{done.stdout}")


class CItem(pytest.Item):
    def runtest(self) -> None:
        check(run(build(self.path, Toolchain())))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any) -> Any:
        match excinfo.value:
            case ProgramFailed() | BuildError():
                return str(excinfo.value)
            case subprocess.TimeoutExpired() as late:
                shown = late.stdout.decode("utf-8", "replace") if isinstance(late.stdout, bytes) else late.stdout
                return f"still running after {late.timeout} s\n{shown or ''}"
        return super().repr_failure(excinfo, *args)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name


class CFile(pytest.File):
    item: Any = CItem

    def collect(self) -> Iterator[pytest.Item]:
        yield self.item.from_parent(self, name=self.path.stem)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix == ".c" and file_path.name.startswith("test_"):
        return CFile.from_parent(parent, path=file_path)
    return None
