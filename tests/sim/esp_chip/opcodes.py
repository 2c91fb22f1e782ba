"""Numbers of the commands, and the arithmetic both loaders share."""

from __future__ import annotations

import struct
from typing import Final

FLASH_BEGIN: Final = 0x02
FLASH_DATA: Final = 0x03
FLASH_END: Final = 0x04
MEM_BEGIN: Final = 0x05
MEM_END: Final = 0x06
MEM_DATA: Final = 0x07
SYNC: Final = 0x08
WRITE_REG: Final = 0x09
READ_REG: Final = 0x0A
SPI_SET_PARAMS: Final = 0x0B
SPI_ATTACH: Final = 0x0D
READ_FLASH_SLOW: Final = 0x0E
CHANGE_BAUDRATE: Final = 0x0F
FLASH_DEFL_BEGIN: Final = 0x10
FLASH_DEFL_DATA: Final = 0x11
FLASH_DEFL_END: Final = 0x12
SPI_FLASH_MD5: Final = 0x13
GET_SECURITY_INFO: Final = 0x14
ERASE_FLASH: Final = 0xD0
ERASE_REGION: Final = 0xD1
READ_FLASH: Final = 0xD2
RUN_USER_CODE: Final = 0xD3

NAMES: Final = {number: name for name, number in list(globals().items()) if name.isupper() and isinstance(number, int)}
MAX_BAUD: Final = 5_000_000


def words(data: bytes, count: int) -> tuple[int, ...]:
    """``count`` little-endian words, no more and no less."""
    return struct.unpack(f"<{count}I", data)


def xor_all(data: bytes) -> int:
    """The checksum of a DATA command's payload."""
    size = len(data)
    number = int.from_bytes(data, "little")
    while size > 1:
        half = (size + 1) // 2
        number = (number >> (8 * half)) ^ (number & ((1 << (8 * half)) - 1))
        size = half
    return number ^ 0xEF
