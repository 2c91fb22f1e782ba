"""The same bytes every time: noise that no compressor shrinks, and bytes that shrink as firmware does."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 20


def _pieces(size: int) -> Iterator[bytes]:
    block = random.Random(20260101).randbytes(BLOCK)
    for index in range(0, size, BLOCK):
        # a different block each time, at a fraction of the price of fresh noise
        yield (index.to_bytes(8, "little") + block[8:])[: size - index]


def write_incompressible(path: Path, size: int) -> str:
    """Writes ``size`` bytes of fixed noise to ``path``.

    Returns:
        str: SHA-256 of the file, hex.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(size):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


@functools.cache
def incompressible(size: int) -> bytes:
    """The same noise in memory."""
    return b"".join(_pieces(size))


@functools.cache
def compressible(size: int) -> bytes:
    """Bytes that gzip makes about half as long, no two MiB the same: words of a fixed vocabulary with noise between."""
    generator = random.Random(20260102)
    words = [generator.randbytes(generator.randrange(4, 24)) for _ in range(1024)]
    count = size // 16 + 1  # a word and its noise are 17 bytes on average
    noise = generator.randbytes(4 * count)
    pieces = [word + noise[4 * index : 4 * index + 4] for index, word in enumerate(generator.choices(words, k=count))]
    data = b"".join(pieces)[:size]
    return data + generator.randbytes(size - len(data))
