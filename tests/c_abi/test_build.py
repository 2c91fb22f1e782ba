"""Making the library: what is said where it cannot be made, what is made anew, where it finds its Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rmaker_ota import embed
from rmaker_ota.embed import build_embed
from tests.c_abi.compiled import HERE, ROOT, build_program, compile_only

# Runs setup.py where there is no shared libpython.
WITHOUT = """
import runpy, sys
sys.path.insert(0, "python")
from rmaker_ota.embed import build_embed
build_embed.shared_libpython = lambda: None
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", sys.argv[1]]
runpy.run_path("setup.py")
"""


def setup_without(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_without_shared_libpython_all_else_is_built_and_it_is_said(tmp_path: Path) -> None:
    done = setup_without(tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"the C ABI \(libesp_rmaker_ota\) is left out: .* has no shared libpython3\.\d+", done.stderr)
    assert "apt-get install libpython3." in done.stderr
    assert list((tmp_path / "rmaker_ota").glob("ota_core*.so"))
    assert not list(tmp_path.rglob("libesp_rmaker_ota*"))


def test_who_asks_for_it_is_refused_without(tmp_path: Path) -> None:
    done = setup_without(tmp_path, RMAKER_OTA_C_ABI="1")
    assert done.returncode != 0
    assert "has no shared libpython" in done.stderr
    assert "Traceback" not in done.stderr


def build(tmp_path: Path) -> Path:
    build_embed.build(tmp_path / "embed", tmp_path / "build", "1.2.3", werror=True)
    return tmp_path / "embed" / "lib" / embed.SONAME


def test_what_is_up_to_date_is_left_alone(tmp_path: Path) -> None:
    library = build(tmp_path)
    first = library.stat()
    assert build(tmp_path) == library
    assert library.stat().st_mtime_ns == first.st_mtime_ns
    (tmp_path / "build" / "symbols.map").write_text("spoilt")
    library.unlink()
    build(tmp_path)
    assert library.stat().st_ino != first.st_ino or library.stat().st_mtime_ns != first.st_mtime_ns


def test_a_compiler_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build_embed.CannotBuild, match="exit status 1"):
        build(tmp_path)
    assert not (tmp_path / "embed" / "lib" / embed.SONAME).exists()


USE = """
#include <rmaker_ota_host.h>
#include <stdio.h>
int main(void) {
    esp_err_t err = rmaker_ota_open("none.toml");
    printf("%s|%s\\n", esp_err_to_name(err), rmaker_ota_last_error());
    return 0;
}
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "use.c").write_text(USE)
    return build_program(tmp_path / "use.c", tmp_path / "use")


def run(program: Path, **environment: str) -> str:
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


NO_FILE = "ESP_ERR_INVALID_ARG|rmaker_ota_open: ESP_ERR_INVALID_ARG: none.toml: No such file or directory"


def test_the_environment_of_the_process_does_not_matter(program: Path, tmp_path: Path) -> None:
    misleading = {name: str(tmp_path) for name in ("PYTHONHOME", "PYTHONPATH", "PATH", "HOME")}
    assert run(program) == NO_FILE
    assert run(program, LC_ALL="C", **misleading) == NO_FILE


def test_another_interpreter_can_be_named(program: Path) -> None:
    assert run(program, RMAKER_OTA_PYTHON=sys.executable) == NO_FILE
    answer = run(program, RMAKER_OTA_PYTHON="/no/python")
    assert answer.startswith("ESP_FAIL|Python cannot be used: RMAKER_OTA_PYTHON=/no/python: ")


def test_a_package_that_is_damaged_is_said(tmp_path: Path) -> None:
    """The library takes the package it lies in; that one cannot be imported."""
    package = tmp_path / "site" / "rmaker_ota"
    shutil.copytree(embed.HERE, package / "embed")
    (package / "__init__.py").write_text("raise RuntimeError('half an update')\n")
    (tmp_path / "use.c").write_text(USE)
    program = build_program(tmp_path / "use.c", tmp_path / "use")
    answer = run(program, LD_LIBRARY_PATH=str(package / "embed" / "lib"))
    # The program's own path (RUNPATH) comes after LD_LIBRARY_PATH.
    assert answer == "ESP_FAIL|Python cannot be used: import rmaker_ota: half an update"


def test_opened_at_run_time_with_local_symbols_it_works_too(tmp_path: Path) -> None:
    source = tmp_path / "open.c"
    source.write_text(
        """
#include <dlfcn.h>
#include <rmaker_ota_host.h>
#include <stdio.h>
int main(int argc, char **argv) {
    void *library = dlopen(argc == 2 ? argv[1] : "", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        puts(dlerror());
        return 1;
    }
    esp_err_t (*open_node)(const char *);
    const char *(*last_error)(void);
    *(void **)&open_node = dlsym(library, "rmaker_ota_open");
    *(void **)&last_error = dlsym(library, "rmaker_ota_last_error");
    int err = open_node("none.toml");
    printf("%d|%s\\n", err, last_error());
    return dlclose(library); /* it stays: threads of Python may be in it */
}
"""
    )
    program = build_program(source, tmp_path / "open", linked=False)
    done = subprocess.run([program, embed.LIBRARY], env={}, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "258|" + NO_FILE.partition("|")[2]


def test_the_example_of_the_readme_builds(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text[text.index("    #include <esp_rmaker_ota.h>") : text.index("and built:")]
    (tmp_path / "readme.c").write_text(re.sub("^    ", "", example, flags=re.MULTILINE))
    assert compile_only(tmp_path / "readme.c", "-Wall", "-Wextra", "-Werror").returncode == 0
    build_program(tmp_path / "readme.c", tmp_path / "readme")


# -- what a program is to the library


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    return build_program(HERE / "faults.c", tmp_path / "faults")


def test_many_threads_may_make_the_first_call(faults: Path) -> None:
    done = subprocess.run([faults, "-", "begins-together"], env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("replaced", ["not replaced", "by rename", "by another", "deleted"])
def test_a_restart_runs_what_lies_under_the_programs_name_with_the_same_arguments(faults: Path, replaced: str) -> None:
    arguments = ["x", "restarts", "", "a b", b"\xff", "--"]
    with subprocess.Popen(
        [faults, *arguments], env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        before = [process.stdout.readline() for _ in range(1 + 1 + len(arguments))]
        match replaced:
            case "by rename":  # as package managers do
                shutil.copy(faults, faults.with_suffix(".new"))
                faults.with_suffix(".new").rename(faults)
            case "by another":
                faults.unlink()
                faults.write_text("#!/bin/sh\nexit 8\n")
                faults.chmod(0o755)
            case "deleted":
                faults.unlink()
        process.stdin.write(b"\n")
        process.stdin.close()
        after = process.stdout.read().splitlines(keepends=True)
        code = process.wait(60)
    assert before[0] == b"SIGPIPE default, for the first time\n"
    assert before[1:] == [b"<%s>\n" % os.fsencode(word) for word in [faults, *arguments]]
    match replaced:
        case "deleted":
            assert code == 9
            assert after == [
                b"rmaker_ota_restart: ESP_FAIL: this program cannot be started anew: No such file or directory\n"
            ]
        case "by another":
            assert (code, after) == (8, [])
        case _:
            assert code == 8
            assert after == [b"SIGPIPE default, again\n", *before[1:]]
