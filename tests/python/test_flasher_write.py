"""Whole parts of a flash: what is sent, what is erased, what is left alone, over a flasher made of memory."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import pytest

from rmaker_ota.errors import ArgumentError, DigestError, RejectedError, UnsupportedError
from rmaker_ota.esp_build import build_image
from rmaker_ota.flasher.chip import ChipInfo
from rmaker_ota.flasher.write import BLANK_MIN, SECTOR, Extent, Part, check_chip, check_parts, verify_part, write_parts

if TYPE_CHECKING:
    from rmaker_ota.ota_core import Flasher

INFO: dict[str, Any] = {
    "chip": "esp32c3",
    "title": "ESP32-C3",
    "chip_id": 5,
    "mac": None,
    "revision": None,
    "flash_id": 0,
    "flash_size": 1 << 20,
    "flash_size_known": True,
    "stub": "esp32c3",
    "stub_was_running": False,
    "baud": None,
    "link": "uart",
    "was_reset": True,
    "secure_download": False,
    "secure_boot": False,
    "flash_encrypted": False,
    "security_flags": 0,
    "block_size": 0x4000,
    "can_deflate": True,
    "can_verify": True,
    "facts": None,
}


class MemoryFlasher:
    """As much of a `Flasher` as parts need. Everything in flash is 0x00 at first, so that a missing erase is seen."""

    def __init__(self, **changes: Any) -> None:
        self.info = ChipInfo(**INFO | changes)
        self.flash = bytearray(self.info.flash_size)
        self.calls: list[tuple[Any, ...]] = []
        self.spoil = False

    def md5(self, offset: int, size: int) -> bytes:
        assert self.info.can_verify
        return hashlib.md5(self.flash[offset : offset + size]).digest()

    def erase(self, offset: int, size: int) -> None:
        assert offset % SECTOR == 0
        assert size % SECTOR == 0
        self.calls.append(("erase", offset, size))
        self.flash[offset : offset + size] = b"\xff" * size

    def write(
        self,
        offset: int,
        size: int,
        pieces: Iterable[tuple[bytes, int]],
        *,
        deflated: bool,
        wire_size: int,
        on_progress: Any,
    ) -> None:
        assert offset % SECTOR == 0
        self.calls.append(("write", offset, size, deflated))
        pieces = list(pieces)
        assert sum(complete for _, complete in pieces) == size
        wire = b"".join(bytes(piece) for piece, _ in pieces)
        content = zlib.decompress(wire) if deflated else wire
        assert len(content) == size
        assert wire_size == (len(wire) if deflated else 0)
        end = offset + -(-size // SECTOR) * SECTOR
        self.flash[offset:end] = b"\xff" * (end - offset)
        self.flash[offset : offset + size] = content
        if self.spoil:
            self.flash[offset + size - 1] ^= 1
        on_progress(size)

    @property
    def as_flasher(self) -> Flasher:
        return cast("Flasher", self)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def text(size: int) -> bytes:
    return (b"the same words again and again " * (size // 31 + 1))[:size]


def test_a_part_is_sent_deflated_where_that_is_smaller() -> None:
    flasher = MemoryFlasher()
    parts = [Part(0x1000, text(10_000), "text"), Part(0x8000, noise(5000), "noise")]
    done: list[int] = []
    result = write_parts(flasher.as_flasher, parts, on_progress=done.append)
    assert flasher.calls == [("write", 0x1000, 10_000, True), ("write", 0x8000, 5000, False)]
    assert bytes(flasher.flash[0x1000 : 0x1000 + 10_000]) == parts[0].data
    assert bytes(flasher.flash[0x8000 : 0x8000 + 5000]) == parts[1].data
    assert (result.written, result.skipped, result.blank, result.verified) == (15_000, 0, 0, True)
    assert done == sorted(done)
    assert done[-1] == 15_000


def test_what_lies_there_already_is_left_alone() -> None:
    flasher = MemoryFlasher()
    part = Part(0x1000, noise(9000), "noise")
    write_parts(flasher.as_flasher, [part])
    result = write_parts(flasher.as_flasher, [part])
    assert (result.written, result.skipped) == (0, 9000)
    assert len(flasher.calls) == 1
    assert write_parts(flasher.as_flasher, [part], skip_same=False).written == 9000


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_long_runs_of_ff_are_erased_and_not_sent(before: int, after: int) -> None:
    data = noise(before * SECTOR) + b"\xff" * (BLANK_MIN + SECTOR) + noise(after * SECTOR, 2)
    flasher = MemoryFlasher()
    result = write_parts(flasher.as_flasher, [Part(0, data, "merged")])
    assert bytes(flasher.flash[: len(data)]) == data
    assert result.blank == BLANK_MIN + SECTOR
    assert result.written == (before + after) * SECTOR
    assert ("erase", before * SECTOR, BLANK_MIN + SECTOR) in flasher.calls
    flasher.calls.clear()
    write_parts(flasher.as_flasher, [Part(0, data, "merged")], skip_same=False)
    assert not [call for call in flasher.calls if call[0] == "erase"]  # blank already


def test_short_runs_of_ff_are_sent_along() -> None:
    data = noise(SECTOR) + b"\xff" * (BLANK_MIN - SECTOR) + noise(SECTOR, 2)
    assert Part(0, data, "app").extents == (Extent(0, len(data)),)


def test_a_run_that_ends_with_half_a_sector_is_whole() -> None:
    data = noise(100) + b"\xff" * (SECTOR - 100 + BLANK_MIN + 77)
    flasher = MemoryFlasher()
    write_parts(flasher.as_flasher, [Part(SECTOR, data, "tail")])
    assert bytes(flasher.flash[SECTOR : SECTOR + len(data)]) == data
    assert flasher.calls == [("write", SECTOR, SECTOR, True), ("erase", 2 * SECTOR, BLANK_MIN + SECTOR)]


def test_random_layouts_come_out_as_they_were() -> None:
    rng = random.Random(5)
    for _ in range(50):
        data = b"".join(
            rng.choice([noise, text, lambda size: b"\xff" * size])(rng.randrange(1, 40) * SECTOR // 2)
            for _ in range(rng.randrange(1, 8))
        )
        flasher = MemoryFlasher()
        result = write_parts(flasher.as_flasher, [Part(SECTOR, data, "random")])
        assert bytes(flasher.flash[SECTOR : SECTOR + len(data)]) == data
        assert result.written + result.blank == len(data)
        assert flasher.flash[SECTOR - 1] == 0


def test_a_part_that_reads_back_as_something_else_is_an_error() -> None:
    flasher = MemoryFlasher()
    flasher.spoil = True
    with pytest.raises(DigestError, match=r"app at 0x1000: the chip's flash has MD5 .* expected"):
        write_parts(flasher.as_flasher, [Part(0x1000, noise(5000), "app")])


def test_in_secure_download_mode_all_is_sent_plain_and_nothing_claimed() -> None:
    flasher = MemoryFlasher(can_verify=False, can_deflate=False, secure_download=True)
    data = text(SECTOR) + b"\xff" * BLANK_MIN
    result = write_parts(flasher.as_flasher, [Part(0, data, "app")])
    assert flasher.calls == [("write", 0, len(data), False)]
    assert not result.verified
    with pytest.raises(UnsupportedError, match="secure download mode"):
        verify_part(flasher.as_flasher, Part(0, data, "app"))


def test_parts_that_share_a_sector_are_refused() -> None:
    check_parts([Part(0x2000, bytes(0x1000), "b"), Part(0x1000, bytes(0x1000), "a")])
    with pytest.raises(ArgumentError, match="a at 0x1000 ends at 0x2001, in the sectors of b at 0x2000"):
        check_parts([Part(0x2000, bytes(4), "b"), Part(0x1000, bytes(0x1001), "a")])
    for offset, data in ((1, b"x"), (-4096, b"x"), (0, b"")):
        with pytest.raises(ArgumentError):
            Part(offset, data, "part")


def test_parts_that_do_not_fit_the_chip_are_refused() -> None:
    info = ChipInfo(**INFO)
    check_chip(info, [Part(0, build_image(size=4096, version="1", project_name="p", chip_id=5), "app")])
    check_chip(info, [Part(0, noise(100), "data")])
    with pytest.raises(ArgumentError, match="behind the flash of 0x100000 bytes"):
        check_chip(info, [Part(0xFF000, bytes(4097), "big")])
    with pytest.raises(RejectedError, match="app is an image for esp32s3, the chip is an ESP32-C3"):
        check_chip(info, [Part(0, build_image(size=4096, version="1", project_name="p", chip_id=9), "app")])


def test_a_part_is_compressed_once_for_all_chips() -> None:
    part = Part(0, text(100_000), "app")
    (extent,) = part.extents
    assert part.stream(extent) is part.stream(extent)
