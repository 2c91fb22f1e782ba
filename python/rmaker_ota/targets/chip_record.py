"""What a virtual chip is besides its flash: the file ``IMAGE.chip.json`` next to a flash image.

It holds what a real chip keeps elsewhere: which chip it is, the secure version burnt into its eFuses, how its boot
loader was built, and which slot's image runs. A flash image without the file is a chip that is switched off: nothing
runs, and what would run after a power-on is what the boot loader chooses.

The file is replaced as a whole, by rename, and is on the medium when a change returns.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rmaker_ota.errors import DeviceError, FormatError

FORMAT = 1

_SLOT_NAMES = {"factory", "test", *(f"ota_{i}" for i in range(16))}


@dataclass(frozen=True, slots=True)
class ChipRecord:
    """A virtual chip.

    Attributes:
        chip_id: of image headers, 5 for an ESP32-C3; None: not known.
        chip_revision, efuse_block_revision: major * 100 + minor; None: not known, not checked.
        ignore_max_revision: the eFuse "disable wafer version major" is burnt.
        secure_version: burnt into the eFuses.
        rollback, anti_rollback: how boot loader and app were built.
        table_offset: of the partition table in flash, bytes.
        running: name of the slot whose image runs; None: switched off.
    """

    chip_id: int | None = None
    chip_revision: int | None = None
    efuse_block_revision: int | None = None
    ignore_max_revision: bool = False
    secure_version: int = 0
    rollback: bool = True
    anti_rollback: bool = False
    table_offset: int = 0x8000
    running: str | None = None


def record_path(image: str | os.PathLike[str]) -> Path:
    """Where the record of a flash image lies."""
    return Path(f"{Path(image)}.chip.json")


def load(image: str | os.PathLike[str]) -> ChipRecord | None:
    """The record of a flash image; None: there is none.

    Raises:
        FormatError: the file is damaged; the message names it and the way out.
        DeviceError: it cannot be read.
    """
    path = record_path(image)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _device_error(path, "cannot be read", exc) from exc
    try:
        return _decode(json.loads(text))
    except (ValueError, RecursionError) as exc:
        raise FormatError(
            f"{path} is damaged ({exc}); delete it to switch the chip off, its secure version is 0 then",
            status="ERR_STATE",
            esp_err=0x103,
            stage="target",
        ) from None


def save(image: str | os.PathLike[str], record: ChipRecord) -> None:
    """Writes the record of a flash image; it is on the medium when this returns.

    Raises:
        DeviceError: it cannot be written; the old one is still there.
    """
    path = record_path(image)
    # Always the same name: whoever is killed here leaves one file behind, and the next one takes it over. Only one may
    # write, the one that has the flash image exclusively.
    new = path.with_name(path.name + ".new")
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=2) + "\n"
    try:
        try:
            handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        sync_directory(path.parent)
    except OSError as exc:
        raise _device_error(path, "cannot be written", exc) from exc


def sync_directory(directory: Path) -> None:
    """Names made or replaced in a directory are on the medium when this returns."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _decode(raw: Any) -> ChipRecord:
    if not isinstance(raw, dict):
        raise ValueError("it is no JSON object")
    if raw.pop("format", None) != FORMAT:
        raise ValueError(f"format is not {FORMAT}")
    known = {field.name: field for field in fields(ChipRecord)}
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in known:
            raise ValueError(f"{name!r} is not known")
        kind = str(known[name].type)
        if kind == "bool":
            right = isinstance(value, bool)
        elif kind.startswith("int"):
            right = (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0xFFFFFFFF) or (
                value is None and kind.endswith("None")
            )
        else:
            right = value is None or (isinstance(value, str) and value in _SLOT_NAMES)
        if not right:
            raise ValueError(f"{name} is {value!r}")
        values[name] = value
    return ChipRecord(**values)


def _device_error(path: Path, what: str, exc: OSError) -> DeviceError:
    return DeviceError(
        f"{path} {what}: {exc.strerror}",
        status="ERR_SYSTEM",
        stage="target",
        device_code=exc.errno or 0,
    )
