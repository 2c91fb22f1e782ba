"""Start-up: what importing and each command cost as a process, and which modules that brings in.

Wall and CPU seconds are those of whole processes, the interpreter's own start included. The row "plain Python" is a
script that imports what the plain way of downloading needs. Counts: modules loaded in all, ours among them, the heavy
ones by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benches.data import incompressible
from benches.measure import Measure

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("paho", "cryptography", "rich", "aiohttp", "sqlite3", "asyncio", "click", "inspect", "dataclasses", "pathlib")
ROUNDS = 20

# Prints at its end, after whatever it runs, which modules are loaded.
REPORT = """
import atexit, sys
@atexit.register
def report():
    sys.stdout.flush()
    print("modules:", *sorted(sys.modules), file=sys.stderr)
"""

CLI = "import sys; sys.argv = ['rmaker-ota', {}]\nfrom rmaker_ota.cli import main; main()"

PLAIN = "plain Python: urllib, ssl, hashlib"
SCRIPTS = {
    "python alone": "pass",
    PLAIN: "import urllib.request, ssl, hashlib, argparse",
    "import rmaker_ota": "import rmaker_ota",
    "import rmaker_ota.ota_core": "import rmaker_ota.ota_core",
    "import rmaker_ota.install": "import rmaker_ota.install",
    "import rmaker_ota.rainmaker.node": "import rmaker_ota.rainmaker.node",
    "rmaker-ota --version": CLI.format("'--version'"),
    "rmaker-ota install --help": CLI.format("'install', '--help'"),
    "rmaker-ota install, 64 KiB": CLI.format("'install', 'image.bin', 'file:out.bin', '--json'"),
}


@dataclass
class Finished:
    """A process that ended well."""

    cpu_s: float
    stdout: str
    stderr: str


def run(script: str, folder: Path) -> Finished:
    """Runs a script as its own process. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        stdout, stderr = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command, stdout, stderr)
    return Finished(usage.ru_utime + usage.ru_stime, stdout, stderr)


def modules(name: str, folder: Path) -> set[str]:
    """The modules a script has loaded at its end."""
    for line in run(REPORT + SCRIPTS[name], folder).stderr.splitlines():
        if line.startswith("modules: "):
            return set(line.split()[1:])
    raise AssertionError("no report")


def checker(name: str) -> Callable[[Finished], object]:
    def check(done: Finished) -> None:
        match name:
            case "rmaker-ota --version":
                assert done.stdout.startswith("rmaker-ota")
            case "rmaker-ota install --help":
                assert "--sha256" in done.stdout
            case "rmaker-ota install, 64 KiB":
                assert json.loads(done.stdout)["status"] == "success"
            case _:
                assert done.stdout == ""

    return check


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "image.bin").write_bytes(incompressible(1 << 16))
    return tmp_path


@pytest.mark.benchmark(group="start-up, whole processes")
@pytest.mark.parametrize("name", SCRIPTS)
def test_start_up(measure: Measure, folder: Path, name: str, quick: bool) -> None:
    used: list[Finished] = []

    def start() -> Finished:
        done = run(SCRIPTS[name], folder)
        used.append(done)
        return done

    def counts(_: Any) -> Mapping[str, object]:
        loaded = modules(name, folder)
        cpu = sorted(done.cpu_s for done in used)
        return {
            "cpu_median_ms": round(cpu[len(cpu) // 2] * 1e3, 1),
            "modules": len(loaded),
            "ours": len([module for module in loaded if module.split(".")[0] == "rmaker_ota"]),
            "heavy": " ".join(module for module in HEAVY if module in loaded) or "none",
        }

    measure(
        name, start, check=checker(name), rounds=1 if quick else ROUNDS, counts=counts, cpu_s=lambda done: done.cpu_s
    )


def test_importing_the_package_brings_nothing_heavy(folder: Path) -> None:
    """The figures above stand on this."""
    assert not modules("import rmaker_ota", folder) & set(HEAVY)
    assert not modules("import rmaker_ota.install", folder) & {"paho", "cryptography", "rich", "aiohttp", "click"}


def test_an_installation_loads_no_more_than_it_needs(folder: Path) -> None:
    """Of ours: the command, the engine, one target; no ESP formats for an image that is none, nothing of a node."""
    loaded = {name for name in modules("rmaker-ota install, 64 KiB", folder) if name.startswith("rmaker_ota.")}
    assert loaded == {
        "rmaker_ota.cli",
        "rmaker_ota.cli.errors",
        "rmaker_ota.cli.install",
        "rmaker_ota.cli.output",
        "rmaker_ota.errors",
        "rmaker_ota.esp_err",
        "rmaker_ota.install",
        "rmaker_ota.ota_core",
        "rmaker_ota.records",
        "rmaker_ota.targets",
        "rmaker_ota.targets.base",
        "rmaker_ota.targets.file",
    }
