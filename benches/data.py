"""The same bytes every time: incompressible files of any size, made once and checked by their size."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

BLOCK = 1 << 20


def write_incompressible(path: Path, size: int) -> str:
    """Writes ``size`` bytes of fixed noise to ``path`` unless they are there already.

    Returns:
        str: SHA-256 of the file, hex.
    """
    digest = hashlib.sha256()
    generator = random.Random(20260101)
    block = generator.randbytes(BLOCK)
    with path.open("wb") as file:
        for index in range(0, size, BLOCK):
            # a different block each time, at a fraction of the price of fresh noise
            piece = (index.to_bytes(8, "little") + block[8:])[: size - index]
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
