"""C programs against the library, built as the README says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rmaker_ota import embed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def compile_only(source: Path, *flags: str, language: str = "c") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [compiler("gcc" if language == "c" else "g++"), *flags, f"-I{embed.INCLUDE_DIR}", "-fsyntax-only", str(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def c_abi(*options: str) -> list[str]:
    """What ``rmaker-ota c-abi`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "rmaker_ota", "c-abi", *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.split()


def build_program(source: Path, program: Path, *, linked: bool = True) -> Path:
    """Compiles and links one C program, with every warning an error.

    Args:
        linked: with the library.
    """
    command = [compiler("gcc"), "-std=c11", "-D_GNU_SOURCE", *WARNINGS, "-O2", "-g", str(source)]
    command.append(f"-I{embed.INCLUDE_DIR}")
    done = subprocess.run(
        [*command, *(c_abi("--cflags", "--libs") if linked else []), "-pthread", "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return program
