"""The ESP formats with `struct` alone: the plain way in Python that the C parsers are measured against.

Written for the benches from the formats' descriptions (ESP-IDF: esp_app_format.h, esp_flash_partitions.h,
nvs_types.hpp), with the checks a careful script makes, and no more: checksums are compared, damage raises ValueError.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import NamedTuple

SECTOR = 4096
ERASED = 0xFFFFFFFF

IMAGE_HEADER = struct.Struct("<BBBBIB3sHBHH4sB")
SEGMENT_HEADER = struct.Struct("<II")
DESCRIPTOR = struct.Struct("<II8s32s32s16s16s32s32sHHBB2s72s")
PARTITION = struct.Struct("<2sBBII16sI")
OTADATA = struct.Struct("<I20sII")
NVS_ENTRY = struct.Struct("<BBBBI16s8s")

NVS_NUMBERS = {
    0x01: "<B",
    0x02: "<H",
    0x04: "<I",
    0x08: "<Q",
    0x11: "<b",
    0x12: "<h",
    0x14: "<i",
    0x18: "<q",
}
NVS_STR, NVS_BLOB_DATA, NVS_BLOB_INDEX = 0x21, 0x42, 0x48


class Image(NamedTuple):
    chip_id: int
    version: str
    project_name: str
    segments: tuple[tuple[int, int], ...]  # load address, bytes
    size: int
    sha256: bytes | None


def text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode()


def xor_of(data: bytes) -> int:
    """XOR of all bytes, folded as one large integer: the fastest way without help."""
    folded = int.from_bytes(data, "little")
    width = len(data) * 8
    while width > 8:
        width = (width // 2 + 7) // 8 * 8
        folded = (folded >> width) ^ (folded & ((1 << width) - 1))
    return folded


def parse_image(data: bytes) -> Image:
    """A whole app image: headers, segments, checksum, appended hash."""
    fields = IMAGE_HEADER.unpack_from(data)
    if fields[0] != 0xE9:
        raise ValueError("no image")
    chip_id, appended = fields[7], fields[12]
    described = DESCRIPTOR.unpack_from(data, 32)
    if described[0] != 0xABCD5432:
        raise ValueError("no app descriptor")
    offset, checksum, segments = 24, 0xEF, []
    for _ in range(fields[1]):
        address, length = SEGMENT_HEADER.unpack_from(data, offset)
        offset += 8
        checksum ^= xor_of(data[offset : offset + length])
        segments.append((address, length))
        offset += length
    offset += 16 - offset % 16
    if data[offset - 1] != checksum:
        raise ValueError("checksum")
    digest = None
    if appended:
        digest = hashlib.sha256(data[:offset]).digest()
        if data[offset : offset + 32] != digest:
            raise ValueError("hash")
        offset += 32
    return Image(chip_id, text(described[3]), text(described[4]), tuple(segments), offset, digest)


def parse_header(data: bytes) -> tuple[int, str, str]:
    """Chip, version and project from the first 288 bytes."""
    fields = IMAGE_HEADER.unpack_from(data)
    described = DESCRIPTOR.unpack_from(data, 32)
    if fields[0] != 0xE9 or described[0] != 0xABCD5432:
        raise ValueError("no app image")
    return fields[7], text(described[3]), text(described[4])


def parse_partition_table(data: bytes) -> list[tuple[str, int, int, int, int, int]]:
    """Rows: label, type, subtype, offset, size, flags."""
    rows: list[tuple[str, int, int, int, int, int]] = []
    for at in range(0, len(data) - 31, 32):
        magic, kind, subtype, offset, size, label, flags = PARTITION.unpack_from(data, at)
        if magic == b"\xaa\x50":
            rows.append((text(label), kind, subtype, offset, size, flags))
        elif magic == b"\xeb\xeb":
            if data[at + 16 : at + 32] != hashlib.md5(data[:at]).digest():
                raise ValueError("MD5")
        elif magic == b"\xff\xff":
            return rows
        else:
            raise ValueError(f"magic {magic!r}")
    return rows


def parse_otadata(data: bytes) -> list[tuple[int, int, bool]]:
    """Both entries: sequence number, state, whether the CRC is right."""
    found = []
    for at in (0, SECTOR):
        seq, _, state, crc = OTADATA.unpack_from(data, at)
        found.append((seq, state, crc == zlib.crc32(seq.to_bytes(4, "little"), ERASED)))
    return found


def otadata_entry(seq: int, state: int) -> bytes:
    return OTADATA.pack(seq, b"\xff" * 20, state, zlib.crc32(seq.to_bytes(4, "little"), ERASED))


def parse_nvs(data: bytes) -> dict[tuple[str, str], int | str | bytes]:
    """Values by namespace and key. Blobs of format 2, no deleted or half-written entries looked at."""
    namespaces: dict[int, str] = {}
    values: dict[tuple[int, str], int | str | bytes] = {}
    chunks: dict[tuple[int, str, int], bytes] = {}
    indexes: dict[tuple[int, str], tuple[int, int, int]] = {}
    for page in range(0, len(data), SECTOR):
        state = int.from_bytes(data[page : page + 4], "little")
        if state == ERASED:
            continue
        if zlib.crc32(data[page + 4 : page + 28], ERASED) != int.from_bytes(data[page + 28 : page + 32], "little"):
            raise ValueError("page header")
        bitmap = int.from_bytes(data[page + 32 : page + 64], "little")
        entry = 0
        while entry < 126:
            if bitmap >> (2 * entry) & 3 != 2:  # not written, or erased
                entry += 1
                continue
            at = page + 64 + 32 * entry
            namespace, kind, span, chunk, crc, raw_key, value = NVS_ENTRY.unpack_from(data, at)
            if zlib.crc32(data[at + 8 : at + 32], zlib.crc32(data[at : at + 4], ERASED)) != crc:
                raise ValueError("entry")
            key = text(raw_key)
            if namespace == 0:
                namespaces[value[0]] = key
            elif kind in NVS_NUMBERS:
                (values[namespace, key],) = struct.unpack_from(NVS_NUMBERS[kind], value)
            elif kind in (NVS_STR, NVS_BLOB_DATA):
                length, _, data_crc = struct.unpack("<HHI", value)
                content = data[at + 32 : at + 32 + length]
                if zlib.crc32(content, ERASED) != data_crc:
                    raise ValueError("value")
                if kind == NVS_STR:
                    values[namespace, key] = content[:-1].decode()
                else:
                    chunks[namespace, key, chunk] = content
            elif kind == NVS_BLOB_INDEX:
                indexes[namespace, key] = struct.unpack("<IBB2x", value)
            entry += span
    for (namespace, key), (length, count, start) in indexes.items():
        blob = b"".join(chunks[namespace, key, start + number] for number in range(count))
        if len(blob) != length:
            raise ValueError("blob")
        values[namespace, key] = blob
    return {(namespaces[namespace], key): value for (namespace, key), value in values.items()}
