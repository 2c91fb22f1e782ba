"""Runs every linter and says which complained; ``--fix`` lets the formatters rewrite the sources first.

Python: ruff (rules and layout), mypy --strict on ``python/``. C: clang-format, gcc with -Wall -Wextra -Werror at the
optimisation that sees most (-O2), cppcheck. Their settings are in ``pyproject.toml``, ``.clang-format`` and
``packaging/cppcheck-suppressions.txt``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.csrc import csrc_build  # noqa: E402

PYTHON_DIRS = [name for name in ("python", "tests", "benches", "scripts") if (ROOT / name).is_dir()] + ["setup.py"]
C_DIRS = ["src/csrc", "python", "tests", "benches", "examples"]
MODULES = Path(sys.executable).parent


def c_files(*suffixes: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for folder in C_DIRS
        for suffix in suffixes
        for path in (ROOT / folder).rglob(f"*{suffix}")
        if "data" not in path.parts
    )


def step(name: str, *commands: list[str]) -> bool:
    """Runs the commands of one linter; shows what they print only when one fails."""
    started = time.monotonic()
    shown = []
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            shown.append(done.stdout + done.stderr)
    print(f"lint: {name:<12} {'FAILED' if shown else 'ok':<6} {time.monotonic() - started:5.1f} s", flush=True)
    for text in shown:
        print(text, flush=True)
    return not shown


def gcc() -> bool:
    """Every C file of ours compiles without a warning; what compiled before is not compiled again."""
    started = time.monotonic()
    toolchain = csrc_build.Toolchain(sanitizer="none", compile=("-O2",))
    sources = [Path(name) for name in c_files(".c") if name.startswith("src/csrc/")]
    complaints = []

    def compile_one(source: Path) -> None:
        try:
            csrc_build.compile_object(source, toolchain)
        except csrc_build.BuildError as exc:
            complaints.append(str(exc))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    print(f"lint: {'gcc -Werror':<12} {'FAILED' if complaints else 'ok':<6} {time.monotonic() - started:5.1f} s")
    for text in complaints:
        print(text)
    return not complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="rewrite the sources where a formatter can")
    fix = parser.parse_args().fix
    ruff = str(MODULES / "ruff")
    clang_format = str(MODULES / "clang-format")
    formatted = c_files(".c", ".h")
    if fix:
        subprocess.run([ruff, "check", "--fix", "--quiet", *PYTHON_DIRS], cwd=ROOT, check=False)
        subprocess.run([ruff, "format", "--quiet", *PYTHON_DIRS], cwd=ROOT, check=False)
        subprocess.run([clang_format, "-i", *formatted], cwd=ROOT, check=False)
    build_dir = ROOT / "build" / "cppcheck"
    build_dir.mkdir(parents=True, exist_ok=True)
    cppcheck = [
        "cppcheck",
        "--quiet",
        "--std=c11",
        "--enable=warning,performance,portability",
        "--error-exitcode=1",
        "--inline-suppr",
        "--suppressions-list=packaging/cppcheck-suppressions.txt",
        f"--cppcheck-build-dir={build_dir}",
        "--library=posix",
        "-D__GNUC__",
        "-D_GNU_SOURCE",
        "-DLIBCURL_VERSION_NUM=0x080000",
        "-Isrc/csrc",
        "-Isrc/csrc/include",
        f"-j{os.cpu_count()}",
        "src/csrc",
    ]
    results = [
        step("ruff check", [ruff, "check", "--output-format=concise", *PYTHON_DIRS]),
        step("ruff format", [ruff, "format", "--check", "--diff", *PYTHON_DIRS]),
        step("mypy", [sys.executable, "-m", "mypy", "--no-error-summary"]),
        step("clang-format", [clang_format, "--dry-run", "-Werror", *formatted]),
        gcc(),
        step("cppcheck", cppcheck),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
