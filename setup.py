"""Builds the one extension, rmaker_ota.ota_core, from src/ota_core.pyx and src/csrc/, and the C ABI, libesp_rmaker_ota.

Environment: RMAKER_OTA_CFLAGS replaces ``-O2``; RMAKER_OTA_WERROR=1 makes a warning about our C an error;
RMAKER_OTA_C_ABI=0 leaves libesp_rmaker_ota out, =1 makes it an error when it cannot be built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
CSRC = Path("src/csrc")


def libraries() -> dict[str, str]:
    """pkg-config name -> Debian package, of the libraries the extension links, from the project's one list."""
    rows = (line.split() for line in (HERE / "packaging" / "debian-packages.txt").read_text().splitlines())
    return {row[3]: row[1] for row in rows if row[:1] == ["build"] and row[2] == "library"}


LIBRARIES = libraries()


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
            f"    sudo apt-get install -y {' '.join(dict.fromkeys(missing))}\n"
        )


def project_version() -> str:
    version: str = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
    return version


def relative(paths: list[Path]) -> list[str]:
    return sorted(str(path) for path in paths)


def extension() -> Extension:
    require_libraries()
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
        define_macros=[("_GNU_SOURCE", "1"), ("OTA_VERSION", f'"{project_version()}"')],
        extra_compile_args=["-std=c11", "-fvisibility=hidden", *optimise, *cflags],
        extra_link_args=[*libs, "-pthread"],
    )


class BuildExt(build_ext):
    """Warnings for our C, none for what Cython generates; objects newer than all they are made of are kept.

    Then the C ABI, where it can be built: the Python package is complete without it.
    """

    def run(self) -> None:
        super().run()
        wanted = os.environ.get("RMAKER_OTA_C_ABI", "")
        if wanted == "0":
            return
        sys.path.insert(0, str(HERE / "python"))
        from rmaker_ota.embed import build_embed

        package = HERE / "python" if self.inplace else Path(self.build_lib)
        try:
            build_embed.build(
                package / "rmaker_ota" / "embed",
                HERE / "build" / "embed",
                project_version(),
                werror=os.environ.get("RMAKER_OTA_WERROR", "0") != "0",
            )
        except build_embed.CannotBuild as error:
            message = f"rmaker-ota: the C ABI (libesp_rmaker_ota) is left out: {error}"
            if wanted == "1":
                sys.exit(message)
            print(message, file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile
        newest_header = max(Path(name).stat().st_mtime_ns for name in [*ext.depends, __file__])
        warnings = ["-Wall", "-Wextra"]
        if os.environ.get("RMAKER_OTA_WERROR", "0") != "0":
            warnings.append("-Werror")

        def compile_with_care(obj: str, src: str, suffix: str, cc_args: Any, postargs: list[str], pp_opts: Any) -> None:
            ours = Path(src).is_relative_to(CSRC)
            flags = [*postargs, *(warnings if ours else ["-w"])]
            made_with = Path(f"{obj}.flags")
            command = repr((cc_args, flags, pp_opts))
            if (
                Path(obj).exists()
                and Path(obj).stat().st_mtime_ns > max(Path(src).stat().st_mtime_ns, newest_header)
                and made_with.exists()
                and made_with.read_text() == command
            ):
                return
            made_with.unlink(missing_ok=True)
            compile_one(obj, src, suffix, cc_args, flags, pp_opts)
            made_with.write_text(command)

        self.compiler._compile = compile_with_care
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


def main() -> None:
    os.chdir(HERE)
    from Cython.Build import cythonize

    setup(
        cmdclass={"build_ext": BuildExt},
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
        ),
    )


main()
