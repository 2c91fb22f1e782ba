"""Fuzzes with libFuzzer: ``python -m tests.fuzz.run [--seconds N] [ENTRY ...]``; what ``make fuzz`` runs.

Each ``fuzz_*.c`` is built with clang, AddressSanitizer and UndefinedBehaviorSanitizer, and runs for N seconds, starting
from its corpus and from what earlier runs found (``build/fuzz/NAME``). An input that fails is left in ``build/fuzz``:
fix the fault and keep the input under ``tests/fuzz/corpus/NAME``, so that every test run feeds it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.csrc.csrc_build import ROOT, RUN_ENV, BuildError, Toolchain, build
from tests.fuzz.corpus import corpus_files

HERE = Path(__file__).parent
FOUND = ROOT / "build" / "fuzz"


def fuzz(entry: Path, seconds: int) -> bool:
    """Fuzzes one entry; True when nothing failed."""
    toolchain = Toolchain(cc="clang", sanitizer="address", compile=("-fsanitize=fuzzer",), link=("-fsanitize=fuzzer",))
    program = build(entry, toolchain)
    found = FOUND / entry.stem
    found.mkdir(parents=True, exist_ok=True)
    seeds = FOUND / f"{entry.stem}.seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir()
    for number, path in enumerate(corpus_files(entry)):
        shutil.copyfile(path, seeds / f"{number:04d}-{path.name}")
    command = [
        str(program.path),
        f"-max_total_time={seconds}",
        "-max_len=65536",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        f"-artifact_prefix={FOUND}/{entry.stem}-",
        str(found),
        str(seeds),
    ]
    log = FOUND / f"{entry.stem}.log"
    with log.open("w") as stream:
        done = subprocess.run(command, env={**os.environ, **RUN_ENV}, stdout=stream, stderr=stream, check=False)
    lines = log.read_text(errors="replace").splitlines()
    stats = {line.split(":")[2]: line.split()[-1] for line in lines if line.startswith("stat::")}
    executed = stats.get("number_of_executed_units", "?")
    print(f"fuzz: {entry.stem:<28} {'ok' if done.returncode == 0 else 'FAILED':<7} {executed} inputs", flush=True)
    if done.returncode != 0:
        print("\n".join(lines[-60:]), flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz with libFuzzer")
    parser.add_argument("--seconds", type=int, default=30, help="for each entry")
    parser.add_argument("entries", nargs="*", help="names as fuzz_esp_image; all")
    options = parser.parse_args()
    entries = [HERE / f"{name.removesuffix('.c')}.c" for name in options.entries] or sorted(HERE.glob("fuzz_*.c"))
    failed = 0
    for entry in entries:
        try:
            failed += not fuzz(entry.resolve(), options.seconds)
        except BuildError as exc:
            print(exc)
            failed += 1
    print(f"{len(entries) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
