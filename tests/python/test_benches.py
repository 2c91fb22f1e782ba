"""The benches run and check what they measure; the script that compares processes prints what it promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sim.nginx import find_nginx

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted(path.name for path in (ROOT / "benches").glob("bench_*.py") if path.name != "bench_source_http.py")

RATIOS = {
    "wall_vs_curl_null",
    "cpu_vs_parts",
    "wall_vs_shell_pipe",
    "cpu_vs_shell_pipe",
    "wall_vs_python",
    "rss_mib",
    "page_cache_left_mib",
    "raw",
}
PEERS = {"ours", "curl_null", "openssl", "dd", "shell_pipe", "python"}
FIGURES = {"wall_s", "cpu_s", "mib_per_s", "cpu_s_per_gib", "rss_mib", "wall_runs_s", "cpu_runs_s"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.mark.parametrize("name", BENCHES)
def test_bench_checks_what_it_measures(name: str) -> None:
    done = run("-m", "pytest", f"benches/{name}", "--benchmark-disable", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nmachine: ") == done.stdout.count("\nversions: ") == 1


def test_every_bench_is_named_as_make_bench_looks_for_it() -> None:
    assert {"bench_agent.py", "bench_flash.py", "bench_import.py", "bench_pipeline.py", "bench_rainmaker.py"} <= set(
        BENCHES
    )


@pytest.mark.skipif(
    find_nginx() is None or shutil.which("curl") is None or shutil.which("openssl") is None,
    reason="nginx, curl or openssl is not installed",
)
def test_the_comparison_of_processes_prints_what_it_promises() -> None:
    done = run("benches/compare.py", "--size-mib", "4", "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert set(found) == {
        "machine",
        "size_mib",
        "runs",
        "file",
        "block_device",
        "rss_by_size",
        "first_request",
        "import",
        "flash_2_mib",
    }
    assert (found["size_mib"], found["runs"]) == (4, 1)
    places = [found[place] for place in ("file", "block_device") if isinstance(found[place], dict)]
    assert places
    for place in places:
        assert set(place) == RATIOS
        assert set(place["raw"]) == PEERS
        assert all(set(row) == FIGURES for row in place["raw"].values())
        assert place["wall_vs_curl_null"] > 0
    assert found["import"]["heavy_modules"] == []
    assert found["flash_2_mib"]["bytes_written"] == found["flash_2_mib"]["image_bytes"] == 2 << 20
