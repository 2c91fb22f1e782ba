"""The HTTPS source alone against ``curl -o /dev/null``: the same file from the same nginx over TLS 1.3, by turns.

What is ours to lose is CPU time: TLS and the kernel cost both sides the same. Size in MiB: BENCH_MIB (256).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from tests.csrc.csrc_build import ROOT, Toolchain, build
from tests.sim.nginx import Nginx, find_nginx

ROUNDS = 5


def measure(command: list[str]) -> tuple[float, float, str]:
    """Runs a command; wall seconds, CPU seconds, what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.timeout(600)
def test_the_source_costs_what_curl_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_nginx() is None or shutil.which("curl") is None:
        pytest.skip("needs nginx and curl")
    size = int(os.environ.get("BENCH_MIB", "256")) << 20
    program = build(ROOT / "benches/csrc/bench_source_http.c", Toolchain(sanitizer="none", compile=("-O2",)))
    with (tmp_path / "image.bin").open("wb") as image:
        for _ in range(size >> 20):
            image.write(os.urandom(1 << 20))
    ours: list[tuple[float, float, str]] = []
    curl: list[tuple[float, float, str]] = []
    with Nginx(tmp_path) as server:
        url, ca = server.url("image.bin"), str(server.ca_file)
        for _ in range(ROUNDS):
            ours.append(measure([str(program.path), url, ca, "1024", str(size)]))  # checks the size itself
            count = ["-w", "%{size_download}", "--http1.1", "--cacert", ca, "-o", "/dev/null", url]
            curl.append(measure(["curl", "-s", *count]))
            assert curl[-1][2] == str(size)
    detail = json.loads(ours[-1][2])
    wall, curl_wall = (statistics.median(run[0] for run in runs) for runs in (ours, curl))
    cpu, curl_cpu = (statistics.median(run[1] for run in runs) for runs in (ours, curl))
    with capsys.disabled():
        print(
            f"\nHTTPS source, {size >> 20} MiB, medians of {ROUNDS}: "
            f"wall {wall:.3f} s ({wall / curl_wall:.2f} x curl), CPU {cpu:.3f} s ({cpu / curl_cpu:.2f} x curl), "
            f"header after {detail['answer_ms']} ms, {detail['reads']} reads"
        )
