"""Building: a missing library is named with the command that installs it; the source archive is complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "packaging" / "debian-packages.txt"


def rows() -> list[list[str]]:
    lines = (line.split(maxsplit=3) for line in LIST.read_text(encoding="utf-8").splitlines())
    return [row for row in lines if row and not row[0].startswith("#")]


def pkg_config_path() -> list[Path]:
    done = subprocess.run(
        ["pkg-config", "--variable", "pc_path", "pkg-config"], capture_output=True, text=True, check=True
    )
    return [Path(name) for name in done.stdout.strip().split(":") if name]


def setup_without(tmp_path: Path, hidden: set[str]) -> subprocess.CompletedProcess[str]:
    """Runs setup.py where pkg-config does not know some libraries."""
    known = tmp_path / "pkgconfig"
    known.mkdir()
    for folder in pkg_config_path():
        for file in folder.glob("*.pc"):
            link = known / file.name
            if file.stem not in hidden and not link.exists():
                link.symlink_to(file)
    environment = {**os.environ, "PKG_CONFIG_LIBDIR": str(known), "PKG_CONFIG_PATH": ""}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("hidden", [{"libzstd"}, {"libcurl", "liblzma"}])
def test_a_missing_library_stops_the_build_with_the_one_command(tmp_path: Path, hidden: set[str]) -> None:
    done = setup_without(tmp_path, hidden)
    packages = [package for _, package, kind, what in rows() if kind == "library" and what in hidden]
    assert len(packages) == len(hidden)
    assert done.returncode != 0
    assert f"sudo apt-get install -y {' '.join(packages)}\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_pkg_config_the_command_installs_it_too(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("gcc", "cc"):
        (bare / tool).symlink_to(shutil.which("gcc") or "/usr/bin/gcc")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env={"PATH": str(bare), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "apt-get install -y pkg-config libcurl4-openssl-dev" in done.stderr


def test_the_list_of_packages_is_well_formed() -> None:
    needs = ["build", "demo", "test", "fuzz"]
    seen = [row[0] for row in rows()]
    assert seen == sorted(seen, key=needs.index)
    for need, package, kind, what in rows():
        assert need in needs
        assert kind in {"command", "library", "python", "file"}
        assert package
        assert what
    assert len({tuple(row[2:]) for row in rows()}) == len(rows())


def test_the_source_archive_holds_all_that_a_build_and_its_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("Cython")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=100,
    )
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("src", "python", "tests", "packaging", "scripts", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not {"__pycache__", "rmaker_ota.egg-info"} & set(path.parts)
        and path.suffix not in {".so", ".pyc"}
        and path != ROOT / "examples/gateway/gateway"
        and not path.is_relative_to(ROOT / "python/rmaker_ota/embed/include")
        and not path.is_relative_to(ROOT / "python/rmaker_ota/embed/lib")
    }
    wanted |= {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", ".clang-format"}
    assert wanted <= packed, sorted(wanted - packed)
    assert not [
        name for name in packed if name.endswith((".so", ".so.0", ".pyc")) or name.startswith(("build/", ".venv/"))
    ]
