"""Builds the source archive and, from it alone, a wheel; installs that in an empty environment and runs it.

What ``make check`` does. The archive and the wheel are left in ``dist/``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        print(done.stdout)
        sys.exit(f"check: failed: {' '.join(map(str, command))}")
    return done.stdout


def check_c_abi(python: Path, example: Path, cwd: Path) -> str:
    """Builds the example with what was installed and starts it: the wheel was built in another environment."""
    answer = "import rmaker_ota.embed.build_embed as b, rmaker_ota.embed as e; print(b.why_not() or e.LIBRARY.exists())"
    found = run(python, "-c", answer, cwd=cwd).strip()
    if found not in {"True", "False"}:
        return f"without the C ABI: {found}"
    if found == "False":
        sys.exit("check: libesp_rmaker_ota is missing in the wheel")
    run("make", "-C", example, f"RMAKER_OTA={python.parent / 'rmaker-ota'}", cwd=cwd)
    done = subprocess.run([example / "gateway", "none.toml"], env={}, capture_output=True, text=True, check=False)
    if "none.toml: No such file or directory" not in done.stderr:
        sys.exit(f"check: a C program does not find its Python: {done.stderr}")
    return "C ABI works"


def main() -> None:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="rmaker-ota-check-") as name:
        scratch = Path(name)
        venv.create(scratch / "tools", with_pip=True)
        tools = scratch / "tools" / "bin" / "python"
        run(tools, "-m", "pip", "install", "--quiet", "build", cwd=scratch)
        run(tools, "-m", "build", "--sdist", "--outdir", dist, ROOT, cwd=scratch)
        archive = next(dist.glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        source = scratch / archive.name.removesuffix(".tar.gz")
        run(tools, "-m", "build", "--wheel", "--outdir", dist, source, cwd=scratch)
        wheel = next(dist.glob("*.whl"))
        venv.create(scratch / "empty", with_pip=True)
        python = scratch / "empty" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=scratch)
        os.environ.pop("PYTHONPATH", None)
        version = run(scratch / "empty" / "bin" / "rmaker-ota", "--version", cwd=scratch)
        statuses = run(
            python, "-c", "from rmaker_ota import ota_core; print(len(ota_core.status_table()))", cwd=scratch
        )
        typed = list((scratch / "empty").rglob("rmaker_ota/py.typed")) + list((scratch / "empty").rglob("ota_core.pyi"))
        if len(typed) != 2:
            sys.exit("check: py.typed or ota_core.pyi is missing in the wheel")
        c_abi = check_c_abi(python, source / "examples" / "gateway", scratch)
    print(f"check: ok: {archive.name}, {wheel.name}: {version.strip()}, {statuses.strip()} statuses, {c_abi}")


if __name__ == "__main__":
    main()
