"""Where the vectors lie, and how their JSON files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmaker_ota import ota_core
from rmaker_ota.esp_format import OtadataEntry

DATA = Path(__file__).resolve().parents[1] / "data"
VECTORS = DATA / "vectors"


def described(folder: str) -> list[Path]:
    """The vectors of a folder; each has a JSON file of the same name plus ``.json``."""
    return sorted(path.with_suffix("") for path in (VECTORS / folder).glob("*.json"))


def description(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.with_name(path.name + ".json").read_text())
    return loaded


def entry(hexadecimal: str) -> OtadataEntry:
    """An otadata entry from the hexadecimal digits of its 32 bytes."""
    sector = bytes.fromhex(hexadecimal) + b"\xff" * (4096 - 32)
    return ota_core.parse_otadata(sector * 2)[0]


def entries(hexadecimal: list[str]) -> tuple[OtadataEntry, OtadataEntry]:
    first, second = hexadecimal
    return entry(first), entry(second)
