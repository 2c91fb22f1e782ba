"""Whole parts of a flash at their offsets: boot loader, partition table, apps, file systems. No slots, no boot choice.

A part is compressed once, whatever the number of chips it goes to. Runs of FF of at least `BLANK_MIN` bytes are not
sent: those sectors are erased, where they are not blank already. A part that lies in flash already is left alone, and
every part that was written is compared by the MD5 the chip computes.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, DigestError, OtaError, RejectedError, UnsupportedError
from rmaker_ota.flasher.chip import ChipInfo
from rmaker_ota.records import dataclass

SECTOR = 4096
BLANK_MIN = 16 * SECTOR
"""Bytes of FF that are worth a write session of their own before and after them: 64 KiB take 1.4 s at 460800 baud as
they are, 0.15 s to erase, and next to nothing deflated; what is saved is their programming, 0.28 s."""

PIECE = 16 * 1024
_LEVEL = 6  # of zlib: within 0.1 % of 9, in half the time


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a part that are sent, ``start`` from the part's beginning; whole sectors but at the part's end."""

    start: int
    size: int


class Part:
    """Bytes for one place.

    Args:
        offset: in flash, a multiple of `SECTOR`.
        data: what goes there.
        name: for messages, a file's name.

    Raises:
        ArgumentError: nothing, or not at a sector.
    """

    def __init__(self, offset: int, data: bytes, name: str) -> None:
        if offset < 0 or offset % SECTOR != 0:
            raise ArgumentError(f"{name}: offset {offset:#x} is no multiple of {SECTOR}", stage="target")
        if not data:
            raise ArgumentError(f"{name} is empty", stage="target")
        self.offset = offset
        self.data = data
        self.name = name
        self._lock = threading.Lock()
        self._streams: dict[Extent, list[tuple[bytes, int]] | None] = {}

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + len(self.data)

    @cached_property
    def md5(self) -> bytes:
        return hashlib.md5(self.data, usedforsecurity=False).digest()

    @cached_property
    def extents(self) -> tuple[Extent, ...]:
        """What is not a long run of FF."""
        return tuple(_extents(self.data))

    def stream(self, extent: Extent) -> list[tuple[bytes, int]] | None:
        """An extent as one zlib stream in pieces, each with the content bytes that are complete with it. Made once.

        None: it does not get smaller."""
        with self._lock:
            if extent not in self._streams:
                self._streams[extent] = _deflate(self.content(extent))
            return self._streams[extent]

    def content(self, extent: Extent) -> memoryview:
        return memoryview(self.data)[extent.start : extent.start + extent.size]


def _extents(data: bytes) -> Iterable[Extent]:
    blank = b"\xff" * SECTOR
    begin = 0  # of the extent
    run: int | None = None  # where the run of blank sectors began
    for at in range(0, len(data), SECTOR):
        is_blank = data[at : at + SECTOR] == blank[: len(data) - at]
        if is_blank:
            run = at if run is None else run
        elif run is not None:
            if at - run >= BLANK_MIN:
                if run > begin:
                    yield Extent(begin, run - begin)
                begin = at
            run = None
    end = run if run is not None and len(data) - run >= BLANK_MIN else len(data)
    if end > begin:
        yield Extent(begin, end - begin)


def _deflate(content: memoryview) -> list[tuple[bytes, int]] | None:
    packed = zlib.compress(content, _LEVEL)
    if len(packed) >= len(content):
        return None
    inflate = zlib.decompressobj()
    pieces = []
    for at in range(0, len(packed), PIECE):
        piece = packed[at : at + PIECE]
        pieces.append((piece, len(inflate.decompress(piece))))
    return pieces


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of flash, bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Written:
    """What was done to one chip, in bytes of flash."""

    written: int
    skipped: int
    blank: int
    verified: bool


def check_parts(parts: Sequence[Part]) -> None:
    """Raises ArgumentError when parts share a sector."""
    ordered = sorted(parts, key=lambda part: part.offset)
    for one, two in pairwise(ordered):
        if -(-one.end // SECTOR) * SECTOR > two.offset:
            raise ArgumentError(
                f"{one.name} at {one.offset:#x} ends at {one.end:#x}, in the sectors of {two.name} at {two.offset:#x}",
                stage="target",
            )


def check_chip(info: ChipInfo, parts: Sequence[Part]) -> None:
    """Whether parts fit a chip.

    Raises:
        ArgumentError: one does not fit into its flash.
        RejectedError: one is an image for another chip.
    """
    for part in parts:
        if part.end > info.flash_size:
            raise ArgumentError(
                f"{part.name} ends at {part.end:#x}, behind the flash of {info.flash_size:#x} bytes", stage="target"
            )
        try:
            header = ota_core.parse_image_header(part.data[:24])
        except OtaError:
            continue  # no image
        if header.chip_id != info.chip_id:
            raise RejectedError(
                f"{part.name} is an image for {header.chip or header.chip_id}, the chip is an {info.title}",
                status="ERR_IMAGE_CHIP",
                esp_err=0x10A,
                stage="target",
            )


def write_parts(
    flasher: ota_core.Flasher,
    parts: Sequence[Part],
    *,
    skip_same: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Written:
    """Writes parts to a connected chip and compares them.

    Args:
        skip_same: leave a part alone that lies there already.
        on_progress: ``(bytes of flash that are done)``.

    Raises:
        DigestError: a part reads back as something else.
        OtaError: the link, or the chip.
    """
    info = flasher.info
    assert info is not None, "connected"
    written = skipped = blank = done = 0

    def report(now: int) -> None:
        if on_progress is not None:
            on_progress(done + now)

    for part in parts:
        if skip_same and info.can_verify and flasher.md5(part.offset, len(part.data)) == part.md5:
            skipped += len(part.data)
        else:
            sent = _write_part(flasher, info, part, report)
            written += sent
            blank += len(part.data) - sent
            if info.can_verify:
                verify_part(flasher, part)
        done += len(part.data)
        report(0)
    return Written(written, skipped, blank, info.can_verify)


def _write_part(flasher: ota_core.Flasher, info: ChipInfo, part: Part, report: Callable[[int], None]) -> int:
    """Bytes that were sent. The rest is erased."""
    extents = part.extents if info.can_verify else (Extent(0, len(part.data)),)
    at = 0
    for extent in extents:
        _erase_gap(flasher, part, at, extent.start)
        stream = part.stream(extent) if info.can_deflate else None
        content = part.content(extent)
        begin = extent.start
        flasher.write(
            part.offset + begin,
            extent.size,
            stream if stream is not None else _plain(content),
            deflated=stream is not None,
            wire_size=sum(len(piece) for piece, _ in stream) if stream is not None else 0,
            on_progress=lambda now, begin=begin: report(begin + now),  # type: ignore[misc]
        )
        at = begin + extent.size
    _erase_gap(flasher, part, at, len(part.data))
    return sum(extent.size for extent in extents)


def _plain(content: memoryview) -> Iterable[tuple[memoryview, int]]:
    for at in range(0, len(content), PIECE):
        piece = content[at : at + PIECE]
        yield piece, len(piece)


def _erase_gap(flasher: ota_core.Flasher, part: Part, start: int, end: int) -> None:
    size = -(-end // SECTOR) * SECTOR - start
    if (
        start < end
        and flasher.md5(part.offset + start, size) != hashlib.md5(b"\xff" * size, usedforsecurity=False).digest()
    ):
        flasher.erase(part.offset + start, size)


def verify_part(flasher: ota_core.Flasher, part: Part) -> None:
    """Compares what lies in flash.

    Raises:
        UnsupportedError: secure download mode.
        DigestError: it is something else.
    """
    info = flasher.info
    assert info is not None, "connected"
    if not info.can_verify:
        raise UnsupportedError(
            f"{part.name} cannot be verified: the {info.title} is in secure download mode", stage="target"
        )
    found = flasher.md5(part.offset, len(part.data))
    if found != part.md5:
        raise DigestError(
            f"{part.name} at {part.offset:#x}: the chip's flash has MD5 {found.hex()}, expected {part.md5.hex()}",
            status="ERR_MD5",
            esp_err=0x1503,
            stage="target",
            offset=part.offset,
        )


__all__ = ["Extent", "Part", "Region", "Written", "check_chip", "check_parts", "verify_part", "write_parts"]
