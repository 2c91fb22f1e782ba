"""Builds the one extension, rmaker_ota.ota_core, from src/ota_core.pyx and src/csrc/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
CSRC = Path("src/csrc")

# pkg-config name -> Debian package
LIBRARIES = {
    "libcurl": "libcurl4-openssl-dev",
    "libcrypto": "libssl-dev",
    "zlib": "zlib1g-dev",
    "libzstd": "libzstd-dev",
    "liblzma": "liblzma-dev",
}


def pkg_config(*args: str) -> list[str]:
    return subprocess.run(["pkg-config", *args], check=True, capture_output=True, text=True).stdout.split()


def require_libraries() -> None:
    """Stops the build with the one command that installs what is missing."""
    if shutil.which("pkg-config") is None:
        missing = ["pkg-config", *LIBRARIES.values()]
    else:
        missing = [
            package
            for name, package in LIBRARIES.items()
            if subprocess.run(["pkg-config", "--exists", name], check=False).returncode != 0
        ]
    if missing:
        sys.exit(
            "rmaker-ota: system libraries are missing; install them with\n\n"
            f"    sudo apt-get install -y {' '.join(missing)}\n"
        )


def relative(paths: list[Path]) -> list[str]:
    return sorted(str(path) for path in paths)


def extension() -> Extension:
    require_libraries()
    version = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
    sources = relative(list(CSRC.rglob("*.c")))
    depends = relative([*CSRC.rglob("*.h"), *Path("src").glob("*.pxd"), *Path("src/border").glob("*.pxi")])
    cflags = [flag for flag in pkg_config("--cflags", *LIBRARIES) if not flag.startswith("-I/usr/include")]
    libs = pkg_config("--libs", *LIBRARIES)
    optimise = os.environ.get("RMAKER_OTA_CFLAGS", "-O2").split()
    return Extension(
        "rmaker_ota.ota_core",
        sources=["src/ota_core.pyx", *sources],
        depends=depends,
        include_dirs=[str(CSRC), str(CSRC / "include")],
        define_macros=[("_GNU_SOURCE", "1"), ("OTA_VERSION", f'"{version}"')],
        extra_compile_args=["-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra", *optimise, *cflags],
        extra_link_args=[*libs, "-pthread"],
    )


def main() -> None:
    os.chdir(HERE)
    from Cython.Build import cythonize

    setup(
        ext_modules=cythonize(
            [extension()],
            include_path=["src"],
            build_dir="build/cython",
            compiler_directives={
                "language_level": 3,
                "boundscheck": False,
                "wraparound": False,
                "embedsignature": True,
                "freethreading_compatible": False,
            },
        )
    )


main()
