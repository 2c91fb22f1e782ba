"""Compiles C test programs, with sanitizers, from the sources their first comment names. Knows nothing of pytest.

The comments before the first line of code say what a program needs. The list of sources may span lines and ends at the
first word that is no ``.c`` file; the others end with their line, and may come several times::

    /* sources: esp/esp_image.c base/bytes.c */     files of src/csrc, of tests/csrc, or paths from the project's root
    /* libs: zlib libcrypto */                      names of pkg-config
    /* corpus: images/?*.bin */                     of fuzz entries: what they start from, under tests/data

Objects and programs are kept under ``build/ctest``, named by the SHA-256 of what they are made from (compiler, flags,
preprocessed text), so that tests share objects and a second run compiles nothing.

By hand: ``python -m tests.csrc.csrc_build [--sanitizer address|thread|none] [--threaded] [FILE ...]`` compiles and
runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = Path("src/csrc")
TESTS = Path("tests/csrc")
DATA = ROOT / "tests" / "data"
BUILD = ROOT / "build" / "ctest"
CC = os.environ.get("CC", "gcc")

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "none": [],
}
RUN_ENV = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


class BuildError(Exception):
    """A test program could not be built; the message is what the tool said."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the first comments of a test program ask for."""

    sources: tuple[str, ...] = ()
    libs: tuple[str, ...] = ()
    corpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """A program that was built. ``key`` names everything it is made from."""

    path: Path
    key: str


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler with the flags of one way to build. ``compile`` and ``link`` are flags of that step alone."""

    cc: str = CC
    sanitizer: str = "address"
    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    flags: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        flags = [
            "-std=c11",
            "-D_GNU_SOURCE",
            f'-DOTA_VERSION="{version}"',
            "-O1",
            "-g",
            *WARNINGS,
            *SANITIZERS[self.sanitizer],
            "-fno-omit-frame-pointer",
            "-pthread",
            f"-I{CSRC}",
            f"-I{CSRC / 'include'}",
            f"-I{TESTS}",
            *self.compile,
        ]
        object.__setattr__(self, "flags", tuple(flags))


def read_needs(path: Path) -> Needs:
    """Reads the comments before the first line of code.

    Raises:
        BuildError: the file does not start with a comment.
    """
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(?:\s*(?:/\*.*?\*/|//[^\n]*))+", text, re.DOTALL)
    if head is None:
        raise BuildError(f"{path}: the first comment has to name the sources: /* sources: base/bytes.c */")
    lists: dict[str, list[str]] = {"sources": [], "libs": [], "corpus": []}
    current = ""
    for raw in re.sub(r"/\*|\*/|//", "\n", head[0]).splitlines():
        line = re.sub(r"^\s*\*", "", raw).strip()
        current = current if current == "sources" else ""
        for word in line.split():
            if word.removesuffix(":") in lists and word.endswith(":"):
                current = word[:-1]
            elif current == "sources" and not word.endswith(".c"):
                current = ""
            elif current:
                lists[current].append(word)
    return Needs(tuple(lists["sources"]), tuple(lists["libs"]), tuple(lists["corpus"]))


def has_threads(path: Path) -> bool:
    """Whether a test program, or a source it names, uses POSIX threads."""
    files = [path, *(ROOT / locate(name) for name in read_needs(path).sources)]
    return any("<pthread.h>" in file.read_text(encoding="utf-8") for file in files)


def locate(name: str) -> Path:
    """The path, from the project's root, of a source named in a first comment."""
    for folder in (CSRC, TESTS, Path()):
        if (ROOT / folder / name).is_file():
            return folder / name
    raise BuildError(f"there is no {name} in {CSRC}, in {TESTS} or in the project's root")


def build(path: Path, toolchain: Toolchain, extra: tuple[str, ...] = ()) -> Program:
    """Builds the program of one test file.

    Args:
        path: the test file.
        toolchain: how to build it.
        extra: more sources, as in its first comment.

    Raises:
        BuildError: a source or library is missing, or the compiler complained.
    """
    needs = read_needs(path)
    sources = [Path(os.path.relpath(path, ROOT)), *(locate(name) for name in (*needs.sources, *extra))]
    libs = [flag for lib in needs.libs for flag in _pkg_config("--libs", lib)]
    cflags = tuple(flag for lib in needs.libs for flag in _pkg_config("--cflags", lib))
    objects = [compile_object(source, toolchain, cflags) for source in dict.fromkeys(sources)]
    link = [*SANITIZERS[toolchain.sanitizer], *toolchain.link, "-pthread"]
    key = _digest(_version(toolchain.cc), *link, *libs, *(program.key for program in objects))
    out = BUILD / "bin" / f"{path.stem}-{key[:24]}"
    if not out.exists():
        command = [toolchain.cc, *link, *(str(program.path) for program in objects), *libs, "-lm"]
        _make(out, command, before=len(command))
    return Program(out, key)


def run(program: Program, *args: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    """Runs a program in a new empty directory with `args` (default: the folder of test data).

    Raises:
        subprocess.TimeoutExpired: it ran for more than `timeout` seconds; it was killed.
    """
    scratch = BUILD / "run"
    scratch.mkdir(parents=True, exist_ok=True)
    directory = tempfile.mkdtemp(prefix=program.path.name[:40], dir=scratch)
    try:
        return subprocess.run(
            [str(program.path), *(args or (str(DATA),))],
            cwd=directory,
            env={**os.environ, **RUN_ENV, "TMPDIR": directory},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def compile_object(source: Path, toolchain: Toolchain, cflags: tuple[str, ...] = ()) -> Program:
    """Compiles one source, a path from the project's root. Raises BuildError with what the compiler said."""
    key = _preprocessed(source, toolchain, cflags)
    out = BUILD / "obj" / f"{source.stem}-{key[:24]}.o"
    if not out.exists():
        command = [toolchain.cc, *toolchain.flags, *cflags, "-c", str(source)]
        _make(out, command, before=len(command))
    return Program(out, key)


@cache
def _preprocessed(source: Path, toolchain: Toolchain, cflags: tuple[str, ...]) -> str:
    text = _tool([toolchain.cc, *toolchain.flags, *cflags, "-E", str(source)])
    return _digest(_version(toolchain.cc), *toolchain.flags, *cflags, text)


def _make(out: Path, command: list[str], before: int) -> None:
    """Runs a command with ``-o FILE`` inserted; the result appears under its name complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=out.name)
    os.close(handle)
    try:
        _tool([*command[:before], "-o", name, *command[before:]])
        Path(name).chmod(0o755)
        Path(name).replace(out)
    finally:
        Path(name).unlink(missing_ok=True)


def _tool(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr or done.stdout}")
    return done.stdout


@cache
def _version(cc: str) -> str:
    return _tool([cc, "--version"])


@cache
def _pkg_config(option: str, lib: str) -> tuple[str, ...]:
    return tuple(_tool(["pkg-config", option, lib]).split())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="compile and run C test programs")
    parser.add_argument("--sanitizer", choices=SANITIZERS, default="address")
    parser.add_argument("--threaded", action="store_true", help="only programs that use POSIX threads")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    failed = 0
    ran = 0
    for path in options.files or sorted((ROOT / TESTS).glob("test_*.c")):
        if options.threaded and not has_threads(path):
            continue
        ran += 1
        try:
            done = run(build(path.resolve(), Toolchain(sanitizer=options.sanitizer)))
        except BuildError as exc:
            print(exc)
            failed += 1
            continue
        print(f"{'ok' if done.returncode == 0 else 'FAILED'}  {path.name}")
        if done.returncode != 0:
            print(done.stdout)
            failed += 1
    print(f"{ran - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
