"""The headers: what they declare is what the library shows, what Python does, and what the specification says."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest

from rmaker_ota import embed, esp_rmaker_ota
from rmaker_ota.embed import build_embed
from rmaker_ota.esp_err import EspErr, esp_err_name
from tests.c_abi.compiled import HERE, WARNINGS, build_program, c_abi, compile_only
from tests.c_abi.library import _PROTOTYPES, Config, Data, DiagPriv, Info, load

HEADERS = build_embed.HEADERS


@pytest.mark.parametrize(
    ("language", "standard"), [("c", "c99"), ("c", "c11"), ("c", "c17"), ("c++", "c++11"), ("c++", "c++17")]
)
@pytest.mark.parametrize("order", [HEADERS, HEADERS[::-1], HEADERS[:1]])
def test_headers_compile_without_a_warning(
    tmp_path: Path, language: str, standard: str, order: tuple[str, ...]
) -> None:
    source = tmp_path / ("use.c" if language == "c" else "use.cpp")
    uses = "int use(void);\nint use(void) { return esp_rmaker_ota_enable(0, OTA_USING_TOPICS); }\n"
    source.write_text("".join(f"#include <{name}>\n" for name in order) * 2 + uses)
    done = compile_only(source, f"-std={standard}", *WARNINGS, "-Wshadow", "-Wconversion", language=language)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bits", [64, 32])
def test_layout_and_numbers_are_those_of_the_specification(bits: int) -> None:
    """Freestanding: a compiler for 64 bits knows the rules of 32 bits, and needs no C library of that size for them."""
    probe = compile_only(HERE / "empty.c", f"-m{bits}", "-ffreestanding")
    if probe.returncode != 0:
        pytest.skip(f"this compiler does not make {bits}-bit code")
    done = compile_only(HERE / "layout.c", f"-m{bits}", f"-DBITS={bits}", "-std=c11", "-ffreestanding", *WARNINGS)
    assert done.returncode == 0, done.stderr


def test_layout_is_what_cffi_and_ctypes_make_of_it() -> None:
    assert [ctypes.sizeof(each) for each in (Data, Config, DiagPriv, Info)] == [
        9 * ctypes.sizeof(ctypes.c_void_p),
        4 * ctypes.sizeof(ctypes.c_void_p),
        8,
        290,
    ]


def test_a_wrong_layout_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text((HERE / "layout.c").read_text().replace("AT(esp_rmaker_ota_config_t, ota_diag, P)", "IS(P == 3)"))
    assert "static assertion failed" in compile_only(source, "-std=c11").stderr


def test_the_library_shows_what_the_headers_declare_and_nothing_else() -> None:
    done = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--with-symbol-versions", str(embed.LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    )
    shown = {line.split()[-1] for line in done.stdout.splitlines()}
    assert shown == {f"{name}@@{build_embed.SYMBOL_VERSION}" for name in build_embed.symbols()} | {
        build_embed.SYMBOL_VERSION
    }
    assert len(build_embed.all_functions()) == len(_PROTOTYPES)
    assert {each.name for each in build_embed.all_functions()} == set(_PROTOTYPES)


def test_the_library_is_named_by_its_interface() -> None:
    done = subprocess.run(["readelf", "-d", str(embed.LIBRARY)], capture_output=True, text=True, check=True)
    assert "Library soname: [libesp_rmaker_ota.so.0]" in done.stdout
    assert re.search(r"NEEDED.*\[libpython3\.\d+\.so", done.stdout)
    assert (embed.LIBRARY_DIR / "libesp_rmaker_ota.so").resolve() == embed.LIBRARY


def test_every_function_has_its_body_and_its_python_name() -> None:
    from rmaker_ota.embed import bodies

    assert set(bodies.BODIES) == {each.name for each in build_embed.bodies()}
    for each in build_embed.functions(build_embed.header_text("esp_rmaker_ota.h")):
        assert callable(getattr(esp_rmaker_ota, each.name))


def test_errors_have_the_names_and_numbers_of_python() -> None:
    text = build_embed.header_text("esp_rmaker_ota.h")
    defined = {name: int(value, 0) for name, value in re.findall(r"#define (ESP_\w+) (-?\w+)", text)}
    named = {name: value for name, value in defined.items() if not name.endswith("_BASE")}
    assert named == {esp_err_name(code): int(code) for code in EspErr}
    for name, value in named.items():
        assert load().esp_err_to_name(value) == name.encode()
    assert load().esp_err_to_name(0x1234) == b"UNKNOWN ERROR"


def test_enums_have_the_numbers_of_python() -> None:
    text = build_embed._COMMENT.sub("", build_embed.header_text("esp_rmaker_ota.h"))
    found = dict(re.findall(r"\b((?:OTA|RMAKER)_\w+) = (\d+),", text))
    assert len(found) == 20
    for name, value in found.items():
        assert int(getattr(esp_rmaker_ota, name)) == int(value), name


def test_what_the_command_prints_builds_a_program(tmp_path: Path) -> None:
    source = tmp_path / "version.c"
    source.write_text(
        "#include <rmaker_ota_host.h>\n#include <stdio.h>\nint main(void) { puts(rmaker_ota_version()); return 0; }\n"
    )
    program = build_program(source, tmp_path / "version")
    done = subprocess.run([program], env={}, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == load().rmaker_ota_version().decode() + "\n"


def test_pkg_config_says_the_same() -> None:
    (folder,) = c_abi("--pkg-config-dir")
    done = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "esp_rmaker_ota"],
        env={"PKG_CONFIG_PATH": folder, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    normal = [re.sub(r"/embed/lib/pkgconfig/\.\./\.\.", "/embed", word) for word in done.stdout.split()]
    assert sorted(normal) == sorted(c_abi("--cflags", "--libs"))


def test_the_command_answers_in_json_and_by_name() -> None:
    found = json.loads(" ".join(c_abi("--json")))
    assert found["library"] == str(embed.LIBRARY)
    assert found["libs"].split() == c_abi("--libs")
    assert "cflags:" in c_abi()
