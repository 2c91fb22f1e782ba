"""Stubs: found as data files, checked, never imported."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota.errors import ConfigError
from rmaker_ota.flasher import stubs
from rmaker_ota.flasher.stubs import find_stubs

TEXT = bytes(range(64))
GOOD: dict[str, Any] = {
    "entry": 0x40380008,
    "text_start": 0x40380000,
    "text": base64.b64encode(TEXT).decode(),
    "data_start": 0x3FC80000,
    "data": base64.b64encode(b"data").decode(),
    "bss_start": 0x3FC80100,
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stubs.ENVIRONMENT, raising=False)


def write(
    folder: Path, name: str = "esp32c3", *, licence: bool = True, raw: bytes | None = None, **changes: Any
) -> str:
    """Puts a stub into a folder and returns its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    content = json.dumps(fields).encode() if raw is None else raw
    (folder / f"{name}.json").write_bytes(content)
    if licence:
        (folder / "LICENSE-MIT").write_text("MIT License\n\nCopyright\n")
    return hashlib.sha256(content).hexdigest()


def known(monkeypatch: pytest.MonkeyPatch, digest: str, name: str = "esp32c3") -> None:
    monkeypatch.setattr(stubs, "_RELEASES", {(name, digest): "9.9"})


def test_a_stub_of_a_known_release_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, write(tmp_path))
    found = find_stubs(str(tmp_path))
    assert found.origin == f"{tmp_path} (MIT)"
    assert found.notes == ()
    stub = found.find("esp32c3")
    assert stub is not None
    assert (stub.entry, stub.text_start, stub.text) == (0x40380008, 0x40380000, TEXT)
    assert (stub.data_start, stub.data, stub.release) == (0x3FC80000, b"data", "9.9")
    assert found.find("esp32") is None


def test_a_changed_file_is_refused_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, write(tmp_path))
    write(tmp_path, entry=0x40380004)
    with pytest.raises(ConfigError, match="no known release"):
        find_stubs(str(tmp_path))
    stub = find_stubs(str(tmp_path), accept_unknown=True).find("esp32c3")
    assert stub is not None
    assert stub.release is None


def test_a_known_file_counts_only_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, write(tmp_path))
    (tmp_path / "esp32c3.json").rename(tmp_path / "esp32s3.json")
    with pytest.raises(ConfigError, match=r"esp32s3\.json is of no known release"):
        find_stubs(str(tmp_path))


def test_without_its_licence_nothing_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, write(tmp_path, licence=False))
    with pytest.raises(ConfigError, match="LICENSE-MIT or LICENSE-APACHE does not lie beside"):
        find_stubs(str(tmp_path))
    (tmp_path / "LICENSE-MIT").write_text("something else")
    with pytest.raises(ConfigError, match="LICENSE-MIT"):
        find_stubs(str(tmp_path))
    (tmp_path / "LICENSE-APACHE").write_text("  Apache License\n")
    assert find_stubs(str(tmp_path)).origin.endswith("(Apache)")


def test_a_stub_may_have_no_data(tmp_path: Path) -> None:
    write(tmp_path, data=None, data_start=None)
    stub = find_stubs(str(tmp_path), accept_unknown=True).find("esp32c3")
    assert stub is not None
    assert (stub.data, stub.data_start) == (b"", 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"entry": None}, "entry is None"),
        ({"entry": True}, "entry is True"),
        ({"entry": "1"}, "entry is '1'"),
        ({"entry": -1}, "entry is -1"),
        ({"entry": 0x40380040}, "outside its text"),
        ({"entry": 0x4037FFFF}, "outside its text"),
        ({"text_start": (1 << 32) - 63}, "text_start is"),
        ({"text_start": 1 << 40}, "text_start is"),
        ({"text": None}, "text is no text"),
        ({"text": ""}, "text is empty"),
        ({"text": 5}, "text is no text"),
        ({"text": "!!!!"}, "esp32c3.json"),
        ({"text": base64.b64encode(bytes(256 * 1024 + 1)).decode()}, "text has more than"),
        ({"data": []}, "data is no text"),
        ({"data_start": None}, "data_start is None"),
        ({"raw": b"[]"}, "no JSON object"),
        ({"raw": b"\xff\xfe"}, "esp32c3.json"),
        ({"raw": b"{"}, "esp32c3.json"),
        ({"raw": b""}, "esp32c3.json"),
        ({"raw": b"[" * 100_000}, "nested too deeply"),
        ({"raw": b" " * (512 * 1024 + 1)}, "more than 524288 bytes"),
    ],
)
def test_a_damaged_stub_is_left_out_with_the_reason(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    write(tmp_path, **changes)
    write(tmp_path, "esp32s3")
    found = find_stubs(str(tmp_path), accept_unknown=True)
    assert [stub.name for stub in found.stubs] == ["esp32s3"]
    assert len(found.notes) == 1
    assert complaint in found.notes[0]


def test_a_folder_that_was_named_has_to_hold_stubs(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=str(folder)):
            find_stubs(str(folder))


def test_the_environment_names_a_folder_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, write(tmp_path))
    monkeypatch.setenv(stubs.ENVIRONMENT, str(tmp_path))
    for where in (None, "auto"):
        assert find_stubs(where).find("esp32c3") is not None
    assert find_stubs("none").stubs == ()
    monkeypatch.setenv(stubs.ENVIRONMENT, "none")
    assert find_stubs().origin == "switched off"
    assert find_stubs(str(tmp_path)).find("esp32c3") is not None


def test_without_esptool_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "esptool", raising=False)
    assert find_stubs() == stubs.StubSet((), "esptool is not installed")


# Run apart: a package named esptool that ends the program when it is imported, with the files beside it.
_TRAP = """
import sys
sys.path.insert(0, sys.argv[1])
from rmaker_ota.flasher import stubs
stubs._RELEASES = {("esp32c3", sys.argv[2]): "9.9"}
found = stubs.find_stubs()
assert found.origin == "installed esptool (MIT)", found
assert found.find("esp32c3").release == "9.9"
assert "esptool" not in sys.modules
print("ok")
"""


def test_esptool_is_looked_at_and_never_imported(tmp_path: Path) -> None:
    package = tmp_path / "esptool"
    digest = write(package / "targets" / "stub_flasher" / "2")
    (package / "__init__.py").write_text("import os\nos._exit(9)\n")
    done = subprocess.run(
        [sys.executable, "-c", _TRAP, str(tmp_path), digest], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_a_script_of_the_same_name_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "esptool.py").write_text("raise SystemExit('not this one')")
    known(monkeypatch, write(tmp_path / "lib" / "esptool" / "targets" / "stub_flasher" / "2"))
    monkeypatch.setattr(sys, "path", [str(scripts), str(tmp_path / "lib")])
    monkeypatch.delitem(sys.modules, "esptool", raising=False)
    assert find_stubs().find("esp32c3") is not None
    assert "esptool" not in sys.modules


_INSTALLED = """
import sys
from rmaker_ota.flasher.stubs import find_stubs
found = find_stubs()
assert not [name for name in sys.modules if name.partition(".")[0] == "esptool"]
print(" ".join(f"{stub.name}={len(stub.text) + len(stub.data)}" for stub in found.stubs))
print(found.origin, found.notes)
"""


@pytest.mark.skipif(importlib.util.find_spec("esptool") is None, reason="esptool is not installed")
def test_the_stubs_of_an_installed_esptool_are_known() -> None:
    done = subprocess.run([sys.executable, "-c", _INSTALLED], capture_output=True, text=True, check=True)
    sizes, origin = done.stdout.splitlines()
    assert origin == "installed esptool (MIT or Apache) ()"
    for chip in ("esp32=6668", "esp32s3=8932", "esp32c3=6084", "esp32c6=7628", "esp32p4-rev1=", "esp32c61="):
        assert chip in sizes
