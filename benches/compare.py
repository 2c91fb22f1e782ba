"""Whole processes against each other: ``python benches/compare.py [--size-mib N] [--runs N] [--json]``.

A file of incompressible bytes comes over TLS 1.3 from an nginx on loopback and goes, checked with SHA-256 and synced,
into a raw file and into a loop block device. Peers run interleaved with us in the same rounds, every result is compared
with the file before its time counts, and figures are medians.

    ours         rmaker-ota install URL file:OUT --sha256 HEX
    curl_null    curl -o /dev/null                              download and TLS alone
    openssl      openssl dgst -sha256 FILE                      the digest alone
    dd           dd oflag=direct bs=1M conv=fdatasync           the write alone
    shell_pipe   curl | tee >(openssl dgst) | dd oflag=direct   the plain way in a shell
    python       urllib3, 64 KiB pieces, hashlib, write, fdatasync: the plain way in Python

Ratios are ours divided by the peer, so smaller is better; CPU is user + system seconds of the client's processes, the
server's not included. ``--json`` prints one object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benches.data import write_incompressible  # noqa: E402
from tests.sim.nginx import Nginx  # noqa: E402

MIB = 1 << 20

# What every peer runs in: byte code is kept between runs, as on any installed machine.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

PYTHON_LOOP = """
import hashlib, os, ssl, sys, urllib3
url, out, ca = sys.argv[1:4]
pool = urllib3.PoolManager(ca_certs=ca)
response = pool.request("GET", url, preload_content=False)
assert response.status == 200
digest = hashlib.sha256()
fd = os.open(out, os.O_WRONLY | os.O_CREAT)
for piece in response.stream(65536):
    digest.update(piece)
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view):]
os.fdatasync(fd)
os.close(fd)
print(digest.hexdigest())
"""


@dataclass
class Usage:
    """What one process and its children used."""

    wall_s: float
    cpu_s: float
    rss_mib: float
    stdout: str


@dataclass
class Series:
    """The runs of one peer."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def add(self, usage: Usage) -> None:
        self.wall_s.append(usage.wall_s)
        self.cpu_s.append(usage.cpu_s)
        self.rss_mib.append(usage.rss_mib)

    def summary(self, size: int) -> dict[str, float | list[float]]:
        wall, cpu = statistics.median(self.wall_s), statistics.median(self.cpu_s)
        return {
            "wall_s": round(wall, 3),
            "cpu_s": round(cpu, 3),
            "mib_per_s": round(size / MIB / wall, 1),
            "cpu_s_per_gib": round(cpu * (1 << 30) / size, 2),
            "rss_mib": round(max(self.rss_mib), 1),
            "wall_runs_s": [round(value, 3) for value in self.wall_s],
            "cpu_runs_s": [round(value, 3) for value in self.cpu_s],
        }


def run(command: list[str]) -> Usage:
    """Runs a command to its end. Raises CalledProcessError when it fails."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        stdout, stderr = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command, stdout, stderr)
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, stdout)


def sha256_of(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0:
            piece = file.read(min(MIB, size))
            if not piece:
                break
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


@contextmanager
def loop_device(path: Path, size: int) -> Iterator[Path | None]:
    """A loop block device over a file with direct I/O, or None where that is not possible."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    losetup = shutil.which("losetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if losetup is None or os.geteuid() != 0:
        yield None
        return
    made = subprocess.run(
        [losetup, "--find", "--show", "--direct-io=on", str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        yield None
        return
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run([losetup, "--detach", str(device)], check=False)


def dirty_pages_mib(path: Path) -> float | None:
    """MiB of the file in the page cache, as util-linux's fincore counts them; None where it is missing."""
    if shutil.which("fincore") is None or path.is_block_device():
        return None
    counted = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(counted.stdout.strip() or 0) / MIB if counted.returncode == 0 else None


class Comparison:
    def __init__(self, url: str, ca: Path, file: Path, size: int, sha256: str, out: Path) -> None:
        self.url, self.ca, self.file, self.size, self.sha256, self.out = url, ca, file, size, sha256, out
        self.series: dict[str, Series] = {}
        self.cached_mib: float | None = None
        pipe = (
            f"set -o pipefail; exec 3>&1; curl -sS --cacert {ca} {url} | tee >(openssl dgst -sha256 -r >&3) | "
            f"dd of={out} bs=1M iflag=fullblock oflag=direct conv=fdatasync status=none; wait"
        )
        curl = ["curl", "-sS", "--cacert", str(ca), "-o", "/dev/null", url]
        write = ["dd", f"if={file}", f"of={out}", "bs=1M", "oflag=direct", "conv=fdatasync", "status=none"]
        self.peers: dict[str, tuple[list[str], Callable[[str], str] | None]] = {
            "ours": (
                [*ours(), "install", url, f"file:{out}", "--sha256", sha256, "--ca", str(ca), "--json"],
                lambda text: str(json.loads(text)["sha256"]),
            ),
            "curl_null": (curl, None),
            "openssl": (["openssl", "dgst", "-sha256", "-r", str(file)], lambda text: text.split()[0]),
            "dd": (write, None),
            "shell_pipe": (["bash", "-c", pipe], lambda text: text.split()[0]),
            "python": ([sys.executable, "-c", PYTHON_LOOP, url, str(out), str(ca)], str.strip),
        }

    def round(self) -> None:
        """Each peer once; a result that is not the file is an error, not a figure."""
        for name, (command, digest) in self.peers.items():
            writes = name in ("ours", "dd", "shell_pipe", "python")
            if writes and not self.out.is_block_device():
                self.out.unlink(missing_ok=True)
            usage = run(command)
            if digest is not None and digest(usage.stdout) != self.sha256:
                raise RuntimeError(f"{name}: digest {digest(usage.stdout)}, expected {self.sha256}")
            if name == "ours":
                cached = dirty_pages_mib(self.out)
                self.cached_mib = cached if self.cached_mib is None else max(self.cached_mib, cached or 0)
            if writes and sha256_of(self.out, self.size) != self.sha256:
                raise RuntimeError(f"{name}: what was written is not the file")
            self.series.setdefault(name, Series()).add(usage)

    def result(self) -> dict[str, object]:
        raw = {name: series.summary(self.size) for name, series in self.series.items()}
        wall = {name: statistics.median(series.wall_s) for name, series in self.series.items()}
        cpu = {name: statistics.median(series.cpu_s) for name, series in self.series.items()}
        return {
            "wall_vs_curl_null": round(wall["ours"] / wall["curl_null"], 3),
            "cpu_vs_parts": round(cpu["ours"] / (cpu["curl_null"] + cpu["openssl"] + cpu["dd"]), 3),
            "wall_vs_shell_pipe": round(wall["ours"] / wall["shell_pipe"], 3),
            "cpu_vs_shell_pipe": round(cpu["ours"] / cpu["shell_pipe"], 3),
            "wall_vs_python": round(wall["ours"] / wall["python"], 3),
            "rss_mib": raw["ours"]["rss_mib"],
            "page_cache_left_mib": self.cached_mib,
            "raw": raw,
        }


def ours() -> list[str]:
    """The command of this installation: the script beside this interpreter, or the module."""
    script = Path(sys.executable).with_name("rmaker-ota")
    return [str(script)] if script.exists() else [sys.executable, "-m", "rmaker_ota"]


def first_request_s(runs: int) -> dict[str, object]:
    """Seconds from process start to the first byte of the TLS handshake on the wire."""
    figures = []
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        port = server.getsockname()[1]
        command = [*ours(), "install", f"https://127.0.0.1:{port}/fw.bin", f"file:{folder}/out"]
        for _ in range(runs):
            began = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
            ) as process:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1)
                    figures.append(time.perf_counter() - began)
                process.wait()
    return {"median_s": round(statistics.median(figures), 3), "runs_s": [round(value, 3) for value in figures]}


def rss_by_size(root: Path, url: str, ca: Path, out: Path, runs: int) -> dict[str, object]:
    """Peak RSS for a small and a large image; what they hold does not matter, so they are sparse."""
    figures = {}
    for size in (64, 1024):
        name = f"zeros-{size}.bin"
        with (root / name).open("wb") as file:
            file.truncate(size * MIB)
        peaks = [
            run([*ours(), "install", f"{url}/{name}", f"file:{out}", "--ca", str(ca), "--json"]).rss_mib
            for _ in range(runs)
        ]
        figures[f"{size}_mib"] = round(statistics.median(peaks), 1)
        (root / name).unlink()
        out.unlink()
    return {**figures, "difference": round(figures["1024_mib"] - figures["64_mib"], 1)}


def import_ms(runs: int) -> dict[str, object]:
    """Milliseconds that importing the package adds to starting Python, and which heavy modules it brings."""
    probe = "import time; t = time.perf_counter(); import rmaker_ota; print((time.perf_counter() - t) * 1e3)"
    values = [float(run([sys.executable, "-c", probe]).stdout) for _ in range(runs)]
    heavy = run(
        [
            sys.executable,
            "-c",
            "import rmaker_ota, sys; print(*(m for m in ('paho', 'cryptography', 'rich') if m in sys.modules))",
        ]
    ).stdout.split()
    return {"median_ms": round(statistics.median(values), 1), "heavy_modules": heavy}


def flash_counts(folder: Path) -> dict[str, object]:
    """A 2 MiB image into an app slot of a flash image: operations, and whether any byte or sector was touched twice."""
    return dict(json.loads(run([sys.executable, str(ROOT / "benches" / "flash_counts.py"), str(folder)]).stdout))


def machine() -> dict[str, object]:
    versions = {
        name: (subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines() or ["?"])[0]
        for name, command in {"curl": ["curl", "--version"], "openssl": ["openssl", "version"]}.items()
    }
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(), **versions}


def compare(size_mib: int, runs: int, folder: Path, report: Callable[[str], None]) -> dict[str, object]:
    size = size_mib * MIB
    root = folder / "www"
    root.mkdir()
    root.chmod(0o755)
    file = root / "image.bin"
    report(f"making {size_mib} MiB")
    sha256 = write_incompressible(file, size)
    results: dict[str, object] = {"machine": machine(), "size_mib": size_mib, "runs": runs}
    with Nginx(root) as nginx, loop_device(folder / "loop.img", size + MIB) as device:
        url = f"https://localhost:{nginx.port}"
        ca = Path(nginx.ca_file)
        places: dict[str, Path] = {"file": folder / "out.bin"}
        if device is not None:
            places["block_device"] = device
        for place, out in places.items():
            comparison = Comparison(f"{url}/image.bin", ca, file, size, sha256, out)
            for index in range(runs):
                report(f"{place}: round {index + 1} of {runs}")
                comparison.round()
            results[place] = comparison.result()
            if out.is_file():
                out.unlink()
        if device is None:
            results["block_device"] = "left out: no loop device (needs root)"
        report("memory by size")
        results["rss_by_size"] = rss_by_size(root, url, ca, folder / "out.bin", min(runs, 3))
    report("start-up and import")
    results["first_request"] = first_request_s(max(5, runs))
    results["import"] = import_ms(max(5, runs))
    report("flash operations")
    results["flash_2_mib"] = flash_counts(folder)
    return results


def print_table(results: dict[str, object]) -> None:
    print(
        f"{results['size_mib']} MiB over TLS 1.3, medians of {results['runs']} interleaved runs, {results['machine']}"
    )
    for place in ("file", "block_device"):
        figures = results[place]
        if not isinstance(figures, dict):
            print(f"\n{place}: {figures}")
            continue
        print(f"\ninto a {place.replace('_', ' ')}")
        print(f"  {'':12}{'wall s':>9}{'MiB/s':>9}{'CPU s':>9}{'CPU s/GiB':>11}{'RSS MiB':>9}")
        for name, row in figures["raw"].items():
            print(
                f"  {name:12}{row['wall_s']:9.3f}{row['mib_per_s']:9.1f}{row['cpu_s']:9.3f}{row['cpu_s_per_gib']:11.2f}"
                f"{row['rss_mib']:9.1f}"
            )
        for name in ("wall_vs_curl_null", "cpu_vs_parts", "wall_vs_shell_pipe", "cpu_vs_shell_pipe", "wall_vs_python"):
            print(f"  {name:20} {figures[name]:.3f}   ({1 / figures[name]:.2f} x better)")
        print(f"  {'rss_mib':20} {figures['rss_mib']}")
        print(f"  {'page_cache_left_mib':20} {figures['page_cache_left_mib']}")
    for name in ("rss_by_size", "first_request", "import", "flash_2_mib"):
        print(f"\n{name}: {results[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size-mib", type=int, default=512, help="size of the image (512)")
    parser.add_argument("--runs", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--folder", type=Path, help="where the files go: a real disk, not a tmpfs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rmaker-ota-bench-", dir=arguments.folder) as folder:
        place = Path(folder)
        place.chmod(0o755)
        results = compare(
            arguments.size_mib, arguments.runs, place, lambda text: print(text, file=sys.stderr, flush=True)
        )
    with suppress(BrokenPipeError):
        if arguments.json:
            print(json.dumps(results, indent=2))
        else:
            print_table(results)


if __name__ == "__main__":
    main()
