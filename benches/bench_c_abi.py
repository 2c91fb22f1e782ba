"""What a C program pays for the Python inside libesp_rmaker_ota: time until OTA is enabled, memory, threads, per call.

Each row is a whole process, from its start to a point of its way, where it ends at once; the rows of the C program go a
step further each. "plain Python" is the same node in the Python API. Memory is that of the process then: resident
(RSS), and the part of it that no other process can share (anonymous).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme
from benches.measure import Measure
from tests.c_abi.compiled import build_program
from tests.c_abi.library import WHY_NOT
from tests.sim.mosquitto import issue_identity

from rmaker_ota import embed
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets.create import create_flash_image

pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.skipif(not embed.LIBRARY.exists(), reason="libesp_rmaker_ota is not built"),
]

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 15
PLAIN = """
import os, re, sys
import rmaker_ota
node = rmaker_ota.Node.from_config(sys.argv[1])
config = rmaker_ota.OtaConfig(ota_cb=lambda handle, data: rmaker_ota.esp_rmaker_ota_default_cb(handle, data))
assert rmaker_ota.esp_rmaker_ota_enable(config, rmaker_ota.OTA_USING_TOPICS) == 0
with open("/proc/self/status") as file:
    for name, value in re.findall(r"^(VmRSS|RssAnon|Threads):\\s*(\\d+)", file.read(), re.M):
        print(name, value)
sys.stdout.flush()
os._exit(0)
"""
STEPS = {
    "an empty C program": None,
    "C, library linked": "linked",
    "C, Python started": "python",
    "C, node opened": "opened",
    "C, OTA enabled": "enabled",
}


@dataclass
class Finished:
    """A process that ended well: what it printed, as names and numbers."""

    cpu_s: float
    found: dict[str, float] = field(default_factory=dict)


def run(command: list[str]) -> Finished:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    words = [line.split() for line in lines]
    found = {name: float(value) for name, value in words if name != "version"}
    return Finished(usage.ru_utime + usage.ru_stime, found)


def counts(done: Finished) -> Mapping[str, object]:
    return {
        "rss_mib": round(done.found["VmRSS"] / 1024, 1),
        "anonymous_mib": round(done.found["RssAnon"] / 1024, 1),
        "threads": int(done.found["Threads"]),
    }


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-c-abi")
    for name in ("bench_c_abi", "bench_c_empty"):
        build_program(ROOT / "benches" / "csrc" / f"{name}.c", folder / name, linked=name == "bench_c_abi")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    identity = issue_identity(trustme.CA(), tmp_path, "N1")
    create_flash_image(tmp_path / "flash.bin", build_image(version="1.0.0", project_name="gw"))
    path = tmp_path / "node.toml"
    path.write_text(
        f"""
        [node]
        id = "N1"
        [mqtt]
        host = "127.0.0.1"
        cert = "{identity.cert_file}"
        key = "{identity.key_file}"
        [target]
        uri = "esp32-image:flash.bin"
        [state]
        path = "node.state"
        """
    )
    return path


def is_sound(done: Finished) -> bool:
    return done.found["Threads"] >= 1 and done.found["VmRSS"] > 100


@pytest.mark.benchmark(group="a program's start until OTA is enabled")
@pytest.mark.parametrize("name", [*STEPS, "plain Python, OTA enabled"])
def test_start(measure: Measure, programs: Path, config: Path, name: str, quick: bool) -> None:
    step = STEPS.get(name)
    if name.startswith("plain"):
        command = [sys.executable, "-c", PLAIN, str(config)]
    elif step is None:
        command = [str(programs / "bench_c_empty")]
    else:
        command = [str(programs / "bench_c_abi"), step, str(config)]
    measure(
        name,
        lambda: run(command),
        check=is_sound,
        rounds=1 if quick else ROUNDS,
        counts=counts,
        cpu_s=lambda done: done.cpu_s,
    )


@pytest.mark.benchmark(group="one call from C through the node's thread and back, 20000 times")
def test_call(measure: Measure, programs: Path, config: Path, quick: bool) -> None:
    measure(
        "esp_rmaker_ota_mark_valid, refused",
        lambda: run([str(programs / "bench_c_abi"), "calls", str(config)]),
        check=is_sound,
        rounds=1 if quick else 3,
        counts=lambda done: {"us_per_call": round(done.found["call_ns"] / 1e3, 2), **counts(done)},
        cpu_s=lambda done: done.cpu_s,
    )
