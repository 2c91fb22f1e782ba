"""A 2 MiB image into an app slot of a flash image: which operations that takes.

``python benches/flash_counts.py FOLDER`` prints one JSON object. The counts are those of the flash: an erase may span
many sectors; bytes_written are bytes programmed. It fails when a byte was programmed twice or a sector erased twice, or
when the slot does not hold the image.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from rmaker_ota.esp_build import build_image
from rmaker_ota.install import install
from rmaker_ota.targets import open_target
from rmaker_ota.targets.create import create_flash_image

SECTOR = 4096


def main(folder: Path) -> None:
    flash = folder / "chip.bin"
    create_flash_image(flash, build_image(version="1.0.0"), flash_size=8 << 20, overwrite=True)
    image = build_image(version="2.0.0", size=2 << 20)
    used = bytearray(flash.read_bytes())
    with open_target(f"esp32-image:{flash}") as target:
        slot = target.next_slot()
        used[slot.offset : slot.offset + slot.size] = bytes(slot.size)  # a dirty slot: every sector has to be erased
    flash.write_bytes(used)
    with open_target(f"esp32-image:{flash}") as target:
        result = install(image, target)
    written = flash.read_bytes()[slot.offset : slot.offset + len(image)]
    if hashlib.sha256(written).digest() != hashlib.sha256(image).digest():
        raise SystemExit("the slot does not hold the image")
    counts = result.counts
    if int(counts["bytes_written"]) > len(image) or int(counts["sectors_erased"]) > len(image) // SECTOR:
        raise SystemExit(f"a byte was programmed or a sector erased twice: {counts}")
    names = ("reads", "writes", "erases", "syncs", "sectors_erased", "bytes_written", "bytes_skipped", "copies")
    print(json.dumps({"image_bytes": len(image), **{name: counts[name] for name in names}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
