"""The published stub images, found in an installed flashing tool. Only its data files are read."""

from __future__ import annotations

import base64
import importlib.metadata
import json
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath


@dataclass(frozen=True, slots=True)
class StubImage:
    """One program for a chip's RAM.

    Attributes:
        version: 1 or 2.
        entry: address it starts at.
        segments: (address, bytes), text first.
    """

    version: int
    entry: int
    segments: tuple[tuple[int, bytes], ...]


@cache
def stub_images(name: str) -> tuple[StubImage, ...]:
    """The published stubs with this name; none when no tool is installed that brings them."""
    try:
        files = importlib.metadata.files("esptool") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    found = []
    for file in files:
        path = PurePosixPath(file)
        if path.name == f"{name}.json" and path.parent.name in ("1", "2") and "stub_flasher" in path.parts:
            record = json.loads(file.locate().read_text(encoding="utf-8"))
            segments = [(record["text_start"], base64.b64decode(record["text"]))]
            if record.get("data"):
                segments.append((record["data_start"], base64.b64decode(record["data"])))
            found.append(StubImage(int(path.parent.name), record["entry"], tuple(segments)))
    return tuple(found)
