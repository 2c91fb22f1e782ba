"""A NOR flash of 4096-byte sectors: erasing sets bits, programming only clears them, both take time and can be cut.

The content lies in a file, mapped into memory, so that what the chip holds can be looked at, kept over a power cut, and
booted by the boot loader's rules at any moment.
"""

from __future__ import annotations

import hashlib
import mmap
import random
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 4096
BLOCK = 65536
PAGE = 256
_BLANK = b"\xff" * SECTOR


class PowerLost(Exception):
    """The supply went away in the middle of what the chip did."""


@dataclass(slots=True)
class FlashTiming:
    """Seconds of one operation. The usual figures are those of 3.3 V NOR parts, programmed 32 bytes at a time as ROM
    loader and stub do: 1.11 ms for a page."""

    sector_erase_s: float = 0.045
    block_erase_s: float = 0.150
    program_32_s: float = 0.1384e-3
    read_bytes_per_s: float = 2.6e6
    md5_bytes_per_s: float = 2.0e6

    @classmethod
    def named(cls, name: str) -> FlashTiming:
        """`typical`, `fast`, `slow`, or `none`: nothing takes time.

        Raises:
            KeyError: no such name.
        """
        return {
            "typical": cls(),
            "fast": cls(0.045, 0.100, 0.1488e-3),
            "slow": cls(0.060, 0.200, 0.1384e-3),
            "none": cls(0.0, 0.0, 0.0, float("inf"), float("inf")),
        }[name]


@dataclass(slots=True)
class FlashFaults:
    """What the flash does wrong.

    Attributes:
        dead_bytes: addresses whose bits stay 1 when they are programmed.
        slow_sectors: address of a sector -> factor on the time its erase takes.
        power_cut_after: erases and programs that still complete; the next is torn. None: never.
        torn: share of the torn operation that happens, 0 .. 1.
        seed: of what a torn erase leaves.
    """

    dead_bytes: set[int] = field(default_factory=set)
    slow_sectors: dict[int, float] = field(default_factory=dict)
    power_cut_after: int | None = None
    torn: float = 0.5
    seed: int = 1


@dataclass(slots=True)
class FlashCounts:
    sectors_erased: int = 0  # all 4096-byte sectors set to FF, those of blocks too
    sector_erases: int = 0  # operations
    block_erases: int = 0
    pages_programmed: int = 0
    bytes_programmed: int = 0
    bytes_read: int = 0
    blank_skips: int = 0
    operations: int = 0


class Flash:
    """The flash and its content.

    Args:
        path: of the file. One that is missing or empty becomes an erased flash of ``size`` bytes.
        size: bytes, a power of two; None: that of the file.
        jedec_id: vendor, type and size code as RDID sends them; None: made from the size.

    Raises:
        ValueError: the file has another size.
    """

    def __init__(self, path: Path, size: int | None = None, *, jedec_id: bytes | None = None) -> None:
        there = path.stat().st_size if path.exists() else 0
        if there == 0:
            size = size or 4 << 20
            with path.open("wb") as file:
                for _ in range(0, size, BLOCK):
                    file.write(b"\xff" * min(BLOCK, size))
        elif size not in (None, there):
            raise ValueError(f"{path} has {there} bytes, not {size}")
        self.path = path
        self.size = size or there
        if self.size & (self.size - 1) or self.size < BLOCK:
            raise ValueError(f"no flash has {self.size} bytes")
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.size)
        self.jedec_id = jedec_id or bytes((0xEF, 0x40, self.size.bit_length() - 1))
        self.timing = FlashTiming()
        self.faults = FlashFaults()
        self.counts = FlashCounts()

    def close(self) -> None:
        self._map.close()

    # ---- for tests: look and change without a trace ------------------------------------------------------------------

    def __getitem__(self, where: slice) -> bytes:
        return self._map[where]

    def __setitem__(self, where: slice, data: bytes) -> None:
        self._map[where] = data

    def content(self) -> bytes:
        return self._map[:]

    # ---- operations: each returns how long it takes, seconds ---------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        self.counts.bytes_read += size
        return self._map[offset : offset + size]

    def read_s(self, size: int) -> float:
        return size / self.timing.read_bytes_per_s

    def md5(self, offset: int, size: int) -> bytes:
        self.counts.bytes_read += size
        with memoryview(self._map) as view, view[offset : offset + size] as part:
            return hashlib.md5(part).digest()

    def md5_s(self, size: int) -> float:
        return size / self.timing.md5_bytes_per_s

    def is_blank(self, offset: int) -> bool:
        """Whether the sector there holds nothing but FF."""
        return self._map[offset : offset + SECTOR] == _BLANK

    def erase_sector(self, offset: int) -> float:
        self._erase(offset, SECTOR)
        self.counts.sector_erases += 1
        return self.timing.sector_erase_s * self.faults.slow_sectors.get(offset, 1.0)

    def erase_block(self, offset: int) -> float:
        self._erase(offset, BLOCK)
        self.counts.block_erases += 1
        factor = 1.0
        if self.faults.slow_sectors:
            factor = max(self.faults.slow_sectors.get(at, 1.0) for at in range(offset, offset + BLOCK, SECTOR))
        return self.timing.block_erase_s * factor

    def program(self, offset: int, data: bytes) -> float:
        """Clears the bits that are 0 in ``data``. Bytes behind the end of the flash go nowhere."""
        data = data[: max(self.size - offset, 0)]
        if not data:
            return 0.0
        end = offset + len(data)
        pages = (end + PAGE - 1) // PAGE - offset // PAGE
        cut = self.faults.power_cut_after
        if cut is not None and self.counts.operations + pages > cut:
            self._program_torn(offset, data, cut - self.counts.operations)
        self.counts.operations += pages
        self._clear_bits(offset, data)
        self.counts.pages_programmed += pages
        self.counts.bytes_programmed += len(data)
        return ((len(data) + 31) // 32) * self.timing.program_32_s

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _erase(self, offset: int, size: int) -> None:
        cut = self.faults.power_cut_after
        if cut is not None and self.counts.operations + 1 > cut:
            done = int(size * self.faults.torn)
            rng = random.Random(self.faults.seed ^ offset)
            old = int.from_bytes(self._map[offset : offset + size], "little")
            half = old | rng.getrandbits(8 * size)  # some of the cells were discharged in time
            self._map[offset : offset + size] = half.to_bytes(size, "little") if done else old.to_bytes(size, "little")
            self.counts.operations += 1
            raise PowerLost(f"in the erase at {offset:#x}")
        self.counts.operations += 1
        self._map[offset : offset + size] = b"\xff" * size
        self.counts.sectors_erased += size // SECTOR

    def _clear_bits(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        dead = self.faults.dead_bytes
        if dead and any(offset <= at < end for at in dead):
            changed = bytearray(data)
            for at in dead:
                if offset <= at < end:
                    changed[at - offset] = 0xFF
            data = bytes(changed)
        old = self._map[offset:end]
        if old != b"\xff" * len(data):
            both = int.from_bytes(old, "little") & int.from_bytes(data, "little")
            data = both.to_bytes(len(data), "little")
        self._map[offset:end] = data

    def _program_torn(self, offset: int, data: bytes, whole_pages: int) -> None:
        """The pages that still fit are programmed, of the next one a part."""
        at = PAGE - offset % PAGE if whole_pages > 0 else 0
        at += PAGE * max(whole_pages - 1, 0)
        at = min(at, len(data))
        rest = min(PAGE - (offset + at) % PAGE, len(data) - at)
        self._clear_bits(offset, data[: at + int(rest * self.faults.torn)])
        self.counts.operations += whole_pages + 1
        raise PowerLost(f"in the program at {offset + at:#x}")
