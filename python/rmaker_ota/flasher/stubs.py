"""Stubs: small programs that run in a chip's RAM and do the flashing faster than its boot ROM can.

They are not part of this package. They are found as data files of version 2 ("esp-flasher-stub", Apache-2.0 OR MIT)
in a folder the user names, else in an installed ``esptool`` distribution. Of that only these files are read: the
package itself, which has another licence, is never imported. A file counts when its SHA-256 is that of a known release
and its licence lies beside it. Without any, the boot ROM alone does the job.

Source: esp-serial-protocol.md 8; https://github.com/espressif/esp-flasher-stub/releases
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from rmaker_ota.errors import ConfigError
from rmaker_ota.records import dataclass

ENVIRONMENT = "RMAKER_OTA_STUBS"
"""Names a folder with stubs, or ``none``."""

_FILE_MAX = 512 * 1024
_PART_MAX = 256 * 1024
_LICENCES = {"LICENSE-MIT": "MIT License", "LICENSE-APACHE": "Apache License"}

# SHA-256 of the releases' files, for the chips the flasher knows. Releases before 1.1 erase without looking whether
# flash is blank and are left out.
_KNOWN: dict[str, dict[str, str]] = {
    "1.2.2": {
        "esp32": "d615e54e50af5ac7348393cca5d8edb369df9840b2ace5d07a86c40d28e39bea",
        "esp32c2": "5d098f981742fad65a1fea606ddf0cb2a0772685bb35d3a0009029e6a7a07869",
        "esp32c3": "8d342da995f01240c8671937f290757bf67bdf4bb818b022539e8e40bf61623a",
        "esp32c5": "fe53ce4ad53f68bf1f8f5b4fcd17d4b6608334bb1dbda78b200b1d1f902e4bba",
        "esp32c6": "a326f564fa8fe3ec69c1c17a9dd2df8918da1e37b44004019a643f5f181b8b27",
        "esp32c61": "308a86cc02cac95a86cf73e4a92d37a6cfc3249117a9b4836ce2c408142adde5",
        "esp32h2": "9d075440137dd7c71ed185bb933b69d54aadf5a08b714e03831cec77d80990f9",
        "esp32p4-rev1": "3bd974a1c18d147835f3c8c9cc024e528529fafeb716cd5820966b030305ba52",
        "esp32p4": "8cae9e8aec3de3433394cc347ebe49f54d21fcfc04e088a404bca5ae0eb07870",
        "esp32s2": "98154bb724806a41f798e91ef842ab2768350d2c8e57ebd110a3502663dc41dd",
        "esp32s3": "8816e0611701e8f7396a9fee9d1d33bc2021751bf24bda54560fb87c62de3f0b",
    },
    "1.4.0": {
        "esp32c2": "90ab18ea7df3ff982f399f9bf764668b9187d4c6aad6f071d43e6b7df208a233",
        "esp32c3": "946b19aa447bd04ad9db232dec074e139c08541abc3f1b3baa279418855e0871",
        "esp32c5": "fabf2861138988b9c431776eafbe6e8ffaed4a32961811f58c1013007c18527d",
        "esp32c6": "66a943da9d4ed0da631b2c1fe62d30a64afafcab6202e78de9a82244b7f715d0",
        "esp32c61": "6f524ec4f51649e2594e2bf9f8377aadc33bd8fed27078e8569b1d2d89640923",
        "esp32p4-rev1": "eb62e15af457c18181ddf075b5efa4ac344a0df455dd00b00a4c253f4ac1761f",
        "esp32p4": "a02e35fe802cc70bebc837b461a5b8350ccee924d53cbc29203602a80b99bd4a",
        "esp32s2": "79644275b5db42c70941b69514f2785449fc85c1d6a9c89bc2cc4dc361e8e583",
        "esp32s3": "767c0ef61d864bb9524c52a2fa7ff5b144598c8df729b2cd31e84d8785e2d65b",
    },
    "1.4.1": {
        "esp32c5": "b7ca2d6e7acd64fd0a02d99e755b2e29c96df55470bffd294f457a9b22d17f01",
        "esp32c61": "178783ff4265343fd9c48e9f5f97c78a358b0c124a82b3bf3892b95f3ee7ec72",
        "esp32p4-rev1": "e76e4535febf079ec517352adf21fdd9aa0b796f76f07641fab4d0073eb7d1f8",
        "esp32p4": "c32f75a32cc8b99a2ff17c14d3ed96e785f0523ccf6218efce7056e13f00c820",
    },
}
"""Release: name: SHA-256. A file that did not change between releases stands under the first one."""

_RELEASES = {(name, digest): release for release, files in _KNOWN.items() for name, digest in files.items()}
_NAMES = sorted({name for files in _KNOWN.values() for name in files})


@dataclass(frozen=True, slots=True)
class Stub:
    """One stub. Addresses are of the chip's RAM; ``release`` is None for a file of no known release."""

    name: str
    entry: int
    text_start: int
    text: bytes
    data_start: int
    data: bytes
    release: str | None
    path: str


@dataclass(frozen=True, slots=True)
class StubSet:
    """The stubs that were found. ``origin`` says where, or why there are none; ``notes`` what was left out and why."""

    stubs: tuple[Stub, ...]
    origin: str
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> Stub | None:
        return next((stub for stub in self.stubs if stub.name == name), None)


def find_stubs(where: str | None = None, *, accept_unknown: bool = False) -> StubSet:
    """Looks for stubs.

    Args:
        where: a folder; ``"none"``: use none; ``"auto"`` or None: what the environment (`ENVIRONMENT`) names, else an
            installed esptool.
        accept_unknown: take files of no known release too, from a folder that was named.

    Raises:
        ConfigError: a folder was named that holds no usable stub.
    """
    named = where if where not in {None, "", "auto"} else os.environ.get(ENVIRONMENT) or None
    if named == "none":
        return StubSet((), "switched off")
    if named is not None and named != "auto":
        found = _read_folder(Path(named), str(Path(named)), accept_unknown)
        if not found.stubs:
            why = "; ".join(found.notes) or "there are no files such as esp32c3.json"
            raise ConfigError(f"the folder {named} has no usable stub: {why}")
        return found
    folder = _esptool_folder()
    if folder is None:
        return StubSet((), "esptool is not installed")
    return _read_folder(folder, "installed esptool", accept_unknown=False)


def _esptool_folder() -> Path | None:
    """Where an installed esptool keeps its stubs. Looks the package up without importing it.

    Folders first: beside the programs of an environment, which a program's own search path begins with, esptool has a
    script of the same name that a look-up by name would find in the package's place.
    """
    places = [Path(entry, "esptool") for entry in sys.path if entry]
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("esptool")
        places += [Path(place) for place in (spec.submodule_search_locations if spec is not None else None) or ()]
    return next((folder for place in places if (folder := place / "targets" / "stub_flasher" / "2").is_dir()), None)


def _read_folder(folder: Path, origin: str, accept_unknown: bool) -> StubSet:
    licence = _licence(folder)
    if licence is None:
        return StubSet((), origin, (f"{' or '.join(_LICENCES)} does not lie beside them",))
    stubs = []
    notes = []
    for name in _NAMES:
        path = folder / f"{name}.json"
        try:
            stub = _read_stub(path, name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as exc:
            notes.append(f"{path.name}: {exc}")
            continue
        if stub.release is None and not accept_unknown:
            notes.append(f"{path.name} is of no known release ({', '.join(_KNOWN)})")
        else:
            stubs.append(stub)
    return StubSet(tuple(stubs), f"{origin} ({licence})", tuple(notes))


def _licence(folder: Path) -> str | None:
    """The licences that lie beside the stubs."""
    found = []
    for name, title in _LICENCES.items():
        try:
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                head = file.read(1024)
        except OSError:
            continue
        if title in head:
            found.append(title.removesuffix(" License"))
    return " or ".join(found) if found else None


def _read_stub(path: Path, name: str) -> Stub:
    with path.open("rb") as file:
        raw = file.read(_FILE_MAX + 1)
    if len(raw) > _FILE_MAX:
        raise ValueError(f"it has more than {_FILE_MAX} bytes")
    digest = hashlib.sha256(raw).hexdigest()
    try:
        fields = json.loads(raw)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    text = _part(fields, "text")
    data = _part(fields, "data") if "data" in fields else b""
    if not text:
        raise ValueError("text is empty")
    stub = Stub(
        name=name,
        entry=_address(fields, "entry", 0),
        text_start=_address(fields, "text_start", len(text)),
        text=text,
        data_start=_address(fields, "data_start", len(data)) if data else 0,
        data=data,
        release=_RELEASES.get((name, digest)),
        path=str(path),
    )
    if not stub.text_start <= stub.entry < stub.text_start + len(text):
        raise ValueError(f"entry {stub.entry:#x} lies outside its text")
    return stub


def _part(fields: dict[str, Any], key: str) -> bytes:
    value = fields.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    part = base64.b64decode(value, validate=True)
    if len(part) > _PART_MAX:
        raise ValueError(f"{key} has more than {_PART_MAX} bytes")
    return part


def _address(fields: dict[str, Any], key: str, size: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= (1 << 32) - size:
        raise ValueError(f"{key} is {value!r}, not an address")
    return value


__all__ = ["ENVIRONMENT", "Stub", "StubSet", "find_stubs"]
