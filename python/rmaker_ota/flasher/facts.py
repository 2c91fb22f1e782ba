"""What was learned about a device at a port, kept for the next session with it.

One small JSON file per device in a cache folder, named by the device's USB serial: a session that knows flash id, size
and a rate that works asks less. The flasher checks what it is told (chip and flash id at every connect); a file that is
damaged, or gone, costs a second and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from rmaker_ota.flasher.chip import ChipFacts

_VERSION = 1
_FILE_MAX = 4096
_BOUNDS = {
    "chip_id": 0xFFFF,
    "flash_id": 0xFFFFFFFF,
    "flash_size": 1 << 32,
    "baud": 12_000_000,
    "rom_clock": 0xFFFFFFFF,
}


def cache_folder() -> Path | None:
    """Where the files lie: ``$CACHE_DIRECTORY`` (systemd), ``$XDG_CACHE_HOME/rmaker-ota`` or ``~/.cache/rmaker-ota``;
    None where the user has none of them."""
    for name, below in (("CACHE_DIRECTORY", "chips"), ("XDG_CACHE_HOME", "rmaker-ota/chips")):
        folder = os.environ.get(name, "").partition(":")[0]
        if folder.startswith("/"):
            return Path(folder) / below
    home = os.environ.get("HOME", "")
    return Path(home) / ".cache" / "rmaker-ota" / "chips" if home.startswith("/") else None


class FactsFile:
    """The file of one device.

    Args:
        key: of the device (`rmaker_ota.flasher.ports.Port.device_key`); None: nothing tells it from others, so nothing
            is kept.
        folder: where; None: nothing is kept.
    """

    def __init__(self, key: str | None, folder: Path | None) -> None:
        self.path: Path | None = None
        if key is not None and folder is not None:
            safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:64]
            self.path = folder / f"{safe}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"

    def load(self) -> ChipFacts | None:
        """What is known; None when nothing is, or what is there cannot be used."""
        if self.path is None:
            return None
        try:
            with self.path.open("rb") as file:
                record = json.loads(file.read(_FILE_MAX))
            if not isinstance(record, dict) or record.get("version") != _VERSION:
                return None
            numbers = {name: _number(record[name], most) for name, most in _BOUNDS.items()}
            revision = record["revision"]
            mac = bytes.fromhex(record["mac"])
            if len(mac) != 6:
                return None
            return ChipFacts(mac=mac, revision=None if revision is None else _number(revision, 0xFFFFFFFE), **numbers)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def save(self, facts: ChipFacts) -> None:
        """Keeps them where they are new. A cache that cannot be written is none."""
        if self.path is None or facts == self.load():
            return
        record = {"version": _VERSION, "mac": facts.mac.hex(), "revision": facts.revision}
        record |= {name: getattr(facts, name) for name in _BOUNDS}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(record, file)
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


def _number(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number up to {most}")
    return value


__all__ = ["FactsFile", "cache_folder"]
