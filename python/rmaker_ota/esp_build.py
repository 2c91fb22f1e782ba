"""Builds ESP app images from scratch, for virtual nodes, tests and benches.

What comes out has the structure of real firmware (header, app descriptor, a mapped segment with constants, one with
code, RAM segments, checksum, appended hash), is accepted by every check a device makes, and does nothing: the data is
filler that depends on the seed alone. The same arguments give the same bytes, always.

Sizes: an image ends with its checksum at an offset ``16 n + 15`` and, mostly, 32 bytes of hash, so its size is a
multiple of 16; `build_image` reaches every one from `MIN_SIZE` (with hash 336) up. Bytes behind the image (``padding``)
make every other size.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Final

HEADER_SIZE: Final = 24
SEGMENT_HEADER_SIZE: Final = 8
DESCRIPTOR_SIZE: Final = 256
HASH_SIZE: Final = 32

# header, one segment with nothing but the descriptor, checksum; without hash
MIN_SIZE: Final = 304

_CHECKSUM_SEED: Final = 0xEF
_DESCRIPTOR_MAGIC: Final = 0xABCD5432
_PAGE: Final = 0x10000
_SEGMENT_MAX: Final = 0xFF0000  # bytes of data in one segment, below 16 MiB
_RAM_PART: Final = 0x2000  # bytes that go into the RAM segment, where the image has so many

# chip id -> address of constants in flash, of code in flash (None: one bus for both, code follows), of code in RAM
_ADDRESSES: Final[Mapping[int, tuple[int, int, int]]] = {
    0: (0x3F400000, 0x400D0000, 0x40080000),  # ESP32
    2: (0x3F000000, 0x40080000, 0x40020000),  # ESP32-S2
    5: (0x3C000000, 0x42000000, 0x40380000),  # ESP32-C3
    9: (0x3C000000, 0x42000000, 0x40374000),  # ESP32-S3
    12: (0x3C000000, 0x42000000, 0x4037C000),  # ESP32-C2
    13: (0x42000000, 0x42000000, 0x40800000),  # ESP32-C6
    16: (0x42000000, 0x42000000, 0x40800000),  # ESP32-H2
    18: (0x40000000, 0x40000000, 0x4FF00000),  # ESP32-P4
    20: (0x42000000, 0x42000000, 0x40800000),  # ESP32-C61
    23: (0x42000000, 0x42000000, 0x40800000),  # ESP32-C5
    31: (0x3C000000, 0x3C000000, 0x2F000000),  # ESP32-E22
    32: (0x40000000, 0x40000000, 0x2F000000),  # ESP32-S31
}
_OTHER_ADDRESSES: Final = (0x42000000, 0x42000000, 0x40800000)


def build_image(
    *,
    size: int = 65536,
    version: str = "1.0.0",
    project_name: str = "my_product",
    secure_version: int = 0,
    chip_id: int = 5,
    min_chip_rev: int = 0,
    max_chip_rev: int = 99,
    min_efuse_block_rev: int = 0,
    max_efuse_block_rev: int = 0,
    spi_flash_mode: int = 0,
    time: str = "12:34:56",
    date: str = "Jan  2 2026",
    idf_version: str = "v5.5.1",
    seed: str = "",
    hash_appended: bool = True,
    padding: int = 0,
    bad_magic: bool = False,
    bad_desc_magic: bool = False,
    bad_checksum: bool = False,
    bad_sha: bool = False,
) -> bytes:
    """An app image of exactly ``size`` bytes.

    Args:
        size: bytes of the file, ``padding`` included.
        version, project_name, idf_version: at most 32 bytes of UTF-8 each.
        secure_version: 0 .. 2**32 - 1.
        chip_id: of the image header; 5 is the ESP32-C3.
        min_chip_rev, max_chip_rev: ``major * 100 + minor``; a maximum of 0 or 65535 is no limit.
        min_efuse_block_rev, max_efuse_block_rev: the same of the eFuse block; 0: not set.
        spi_flash_mode: of the app descriptor; 0: not stated.
        time, date: of the build, at most 16 bytes each.
        seed: with ``version`` and ``project_name`` it decides the filler.
        hash_appended: a SHA-256 follows the checksum.
        padding: so many bytes 0xFF behind the image.
        bad_magic: the first byte is wrong (checksum and hash are those of the right image).
        bad_desc_magic: the magic number of the app descriptor is wrong, the rest is right.
        bad_checksum: the checksum byte is wrong, the hash is right.
        bad_sha: the last byte of the appended hash is wrong.

    Raises:
        ValueError: a size that cannot be reached, or an argument that does not fit its field.
    """
    descriptor = _descriptor(
        version=version,
        project_name=project_name,
        secure_version=secure_version,
        time=time,
        date=date,
        idf_version=idf_version,
        min_efuse_block_rev=min_efuse_block_rev,
        max_efuse_block_rev=max_efuse_block_rev,
        spi_flash_mode=spi_flash_mode,
        bad_magic=bad_desc_magic,
    )
    hash_size = HASH_SIZE if hash_appended else 0
    end = size - padding - hash_size  # the checksum is the byte before
    if padding < 0 or end % 16 != 0 or end < MIN_SIZE:
        raise ValueError(
            f"no image has {size} bytes with {padding} behind it: "
            f"size - padding is a multiple of 16 from {MIN_SIZE + hash_size} up"
        )
    try:
        filler = hashlib.shake_128("\0".join((project_name, version, seed)).encode()).digest(end)
        segments = _segments(descriptor, filler, end, chip_id)
        header = struct.pack(
            "<BBBBIB3sHBHH4sB",
            0xE9,
            len(segments),
            2,  # DIO
            0x2F,  # 4 MiB, 80 MHz
            _ADDRESSES.get(chip_id, _OTHER_ADDRESSES)[2],
            0xEE,
            bytes(3),
            chip_id,
            0,
            min_chip_rev,
            max_chip_rev,
            bytes(4),
            int(hash_appended),
        )
    except struct.error as exc:
        raise ValueError(f"an image header has no room for that: {exc}") from exc
    image = bytearray(header)
    checksum = _CHECKSUM_SEED
    for load_addr, data in segments:
        image += struct.pack("<II", load_addr, len(data)) + data
        checksum ^= _xor(data)
    image += bytes(end - len(image))
    image[-1] = checksum
    digest = bytearray(hashlib.sha256(image).digest())
    if bad_checksum:
        image[-1] ^= 0xFF
        digest = bytearray(hashlib.sha256(image).digest())
    if bad_sha:
        digest[-1] ^= 0xFF
    if bad_magic:
        image[0] ^= 0xFF
    if hash_appended:
        image += digest
    return bytes(image) + b"\xff" * padding


def _descriptor(
    *,
    version: str,
    project_name: str,
    secure_version: int,
    time: str,
    date: str,
    idf_version: str,
    min_efuse_block_rev: int,
    max_efuse_block_rev: int,
    spi_flash_mode: int,
    bad_magic: bool,
) -> bytes:
    texts = {"version": 32, "project_name": 32, "time": 16, "date": 16, "idf_version": 32}
    values = {"version": version, "project_name": project_name, "time": time, "date": date, "idf_version": idf_version}
    fields = {name: values[name].encode() for name in texts}
    for name, room in texts.items():
        if len(fields[name]) > room or b"\0" in fields[name]:
            raise ValueError(f"{name} is {values[name]!r}: at most {room} bytes of UTF-8, without NUL")
    elf_sha256 = hashlib.sha256(fields["project_name"] + b"\0" + fields["version"]).digest()
    try:
        return struct.pack(
            "<II8s32s32s16s16s32s32sHHBB2s72s",
            _DESCRIPTOR_MAGIC ^ (0xFFFFFFFF if bad_magic else 0),
            secure_version,
            bytes(8),
            fields["version"],
            fields["project_name"],
            fields["time"],
            fields["date"],
            fields["idf_version"],
            elf_sha256,
            min_efuse_block_rev,
            max_efuse_block_rev,
            16,  # MMU pages of 64 KiB
            spi_flash_mode,
            bytes(2),
            bytes(72),
        )
    except struct.error as exc:
        raise ValueError(f"an app descriptor has no room for that: {exc}") from exc


def _segments(descriptor: bytes, filler: bytes, end: int, chip_id: int) -> list[tuple[int, bytes]]:
    """Load address and data of the segments that fill an image up to the checksum's 16-byte line, ending at ``end``.

    Small images: constants alone. Larger ones: constants, RAM code up to the next page, then code run from flash, in as
    many pieces as the segment limit asks for.
    """
    constants, code, ram = _ADDRESSES.get(chip_id, _OTHER_ADDRESSES)
    last = end - 16  # where the data ends: the last line holds padding and checksum alone
    offset = HEADER_SIZE + SEGMENT_HEADER_SIZE
    whole = descriptor + filler[: last - offset - DESCRIPTOR_SIZE]
    if last < _PAGE + 0x100:
        return [(constants + 0x10000 + offset, whole)]
    # The first segment leaves room so that the RAM segment ends where the code can begin at offset 0x20 of a page.
    page_offset = _PAGE + offset
    ram_start = page_offset - SEGMENT_HEADER_SIZE - _RAM_PART
    first = ram_start - SEGMENT_HEADER_SIZE - offset
    segments = [(constants + offset, whole[:first]), (ram, filler[:_RAM_PART])]
    code_address = code + (_PAGE if constants == code else 0) + offset
    used = page_offset
    while used < last:
        take = min(last - used, _SEGMENT_MAX)
        if 0 < last - used - take <= SEGMENT_HEADER_SIZE:
            take -= 16  # room for the next segment's header and data
        segments.append((code_address, filler[used : used + take]))
        used += take + SEGMENT_HEADER_SIZE
        code_address += take + SEGMENT_HEADER_SIZE  # stays at the same place of the MMU page as the data
    return segments


def _xor(data: bytes) -> int:
    """XOR of all bytes; their number is a multiple of 4."""
    folded = int.from_bytes(data, "little")
    width = len(data) * 8
    while width > 8:
        width = (width // 2 + 7) // 8 * 8
        folded = (folded >> width) ^ (folded & ((1 << width) - 1))
    return folded
