"""The ROM loader, with the habits that were measured on mask ROMs.

* Its replies carry four status bytes; what a command does not set keeps what an earlier reply left there.
* A command it does not know is answered under the name of the one before.
* It works strictly in series: BEGIN erases everything first, DATA is programmed and read back, then comes the answer.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from tests.sim.esp_chip import faults
from tests.sim.esp_chip.flash import SECTOR
from tests.sim.esp_chip.opcodes import (
    CHANGE_BAUDRATE,
    FLASH_BEGIN,
    FLASH_DATA,
    FLASH_DEFL_BEGIN,
    FLASH_DEFL_DATA,
    FLASH_DEFL_END,
    FLASH_END,
    GET_SECURITY_INFO,
    MEM_BEGIN,
    MEM_DATA,
    MEM_END,
    READ_FLASH_SLOW,
    READ_REG,
    SPI_ATTACH,
    SPI_FLASH_MD5,
    SPI_SET_PARAMS,
    SYNC,
    WRITE_REG,
    words,
    xor_all,
)

if TYPE_CHECKING:
    from tests.sim.esp_chip.chip import Chip

BAD_FORMAT = 0x05
FAILED = 0x06
BAD_CHECKSUM = 0x07
READBACK = 0x08
READ_LENGTH = 0x0A
INFLATE = 0x0B
ADLER = 0x0C
SECURE_PARAMETER = 0x64

MAX_BLOCK = 0x1800
MAX_BLOCK_OTG = 0x800
_DEFAULT_FLASH_SIZE = 2 << 20
_ADDRESS_MASK = 0xFFFFFF  # it sends three address bytes

SYNC_VALUE = 0x20120707
_SECURE_DOWNLOAD = frozenset(
    (SYNC, SPI_ATTACH, SPI_SET_PARAMS, CHANGE_BAUDRATE, FLASH_BEGIN, FLASH_DATA, FLASH_END, GET_SECURITY_INFO)
)


class _Refused(Exception):
    def __init__(self, error: int) -> None:
        self.error = error


class RomLoader:
    """One run of the loader, from a reset to the next or until it starts a program.

    Args:
        chip: it runs on.
    """

    armed_at = 0.0  # it never misses the start of a frame
    has_work = False

    def __init__(self, chip: Chip) -> None:
        self._chip = chip
        self.busy = 0.0
        self._last_opcode = 0
        self._value = 0
        self._error = 0
        self._tail = bytearray(128)  # the reply buffer behind the header
        self._after_sync = False
        self._flash_size = _DEFAULT_FLASH_SIZE
        # one download at a time
        self._next_seq = 0
        self._kind: int | None = None
        self._address = 0
        self._inflater: zlib._Decompress | None = None
        self._ram: list[tuple[int, bytearray]] = []
        self._encrypted = False
        self.silent = False  # after an END it does not survive

    def finish_work(self) -> None:
        """It never leaves work behind an answer."""

    # ---- frames ------------------------------------------------------------------------------------------------------

    def frame(self, payload: bytes, arrived: float) -> None:
        if self.silent or len(payload) < 8 or payload[0] != 0:
            return
        at = max(arrived, self.busy) + self._chip.link_model.latency_s
        opcode, size, checksum = struct.unpack_from("<xBHI", payload)
        data = payload[8:]
        self.busy = at
        if not self._is_known(opcode):
            self._unknown()
            return
        self._after_sync = opcode == SYNC
        try:
            if len(data) != size:
                raise _Refused(BAD_FORMAT)
            result = self._execute(opcode, data, checksum)
        except _Refused as refused:
            self._reply(opcode, 1, refused.error)
            return
        if result is not None:
            self._reply(opcode, 0, None, result)
            self._after(opcode, data)

    def _is_known(self, opcode: int) -> bool:
        known = opcode in (_SECURE_DOWNLOAD if self._chip.options.secure_download else _HANDLERS)
        return known and not (opcode == GET_SECURITY_INFO and self._chip.persona.security_info_size == 0)

    def _unknown(self) -> None:
        """The reply to the command before, with status 01 05; as often as that one was answered."""
        for _ in range(8 if self._after_sync else 1):
            self._reply(self._last_opcode, 1, BAD_FORMAT)

    def _reply(self, opcode: int, status: int, error: int | None, data: bytes = b"") -> None:
        """Sets what the command sets, and sends the whole buffer."""
        self._last_opcode = opcode
        if error is not None:
            self._error = error
        size = len(data)
        self._tail[:size] = data
        self._tail[size] = status
        self._tail[size + 1] = self._error
        packet = struct.pack("<BBHI", 1, opcode, size + 4, self._value) + self._tail[: size + 4]
        if not (opcode == MEM_END and any(self._chip.faults.at((faults.NO_MEM_END_REPLY,), opcode))):
            self.busy = max(self.busy, self._chip.answer(opcode, packet, self.busy))

    def _execute(self, opcode: int, data: bytes, checksum: int) -> bytes | None:
        return _HANDLERS[opcode](self, data, checksum)

    def _after(self, opcode: int, data: bytes) -> None:
        """What comes behind the answer."""
        if opcode == SYNC:
            for _ in range(7):
                self._reply(SYNC, 0, None)
        elif opcode == CHANGE_BAUDRATE:
            persona = self._chip.persona
            baud, _ = words(data, 2)
            self._chip.change_baud(baud * persona.xtal_hz / persona.rom_xtal_hz)
        elif opcode == MEM_END:
            no_entry, entry = words(data, 2)
            if not no_entry and entry:
                self._chip.run_program(entry, self._ram, self.busy)

    # ---- commands: bytes of the reply before the status --------------------------------------------------------------

    def _sync(self, data: bytes, _: int) -> bytes:
        if data[:4] != b"\x07\x07\x12\x20":
            raise _Refused(BAD_FORMAT)
        self._value = SYNC_VALUE
        return b""

    def _read_reg(self, data: bytes, _: int) -> bytes:
        (address,) = self._words(data, 1)
        self._value = self._chip.registers.read(address)
        return b""

    def _write_reg(self, data: bytes, _: int) -> bytes:
        if not data or len(data) % 16:
            raise _Refused(BAD_FORMAT)
        for at in range(0, len(data), 16):
            address, value, mask, delay_us = words(data[at : at + 16], 4)
            self.busy += delay_us * 1e-6
            self._chip.registers.write(address, value, mask)
        return b""

    def _attach(self, data: bytes, _: int) -> bytes:
        if len(data) not in (4, 8):
            raise _Refused(BAD_FORMAT)
        self._chip.registers.flash_attached = True
        return b""

    def _set_params(self, data: bytes, _: int) -> bytes:
        _id, size, *_rest = self._words(data, 6)
        self._flash_size = size
        return b""

    def _change_baud(self, data: bytes, _: int) -> bytes:
        self._words(data, 2)
        return b""

    def _security_info(self, data: bytes, _: int) -> bytes:
        return self._chip.security_info()

    def _mem_begin(self, data: bytes, _: int) -> bytes:
        size, _blocks, block_size, address = self._words(data, 4)
        self._check_block(block_size)
        self._ram = [(start, kept) for start, kept in self._ram if start != address]
        self._ram.append((address, bytearray()))
        self._kind, self._next_seq = MEM_DATA, 0
        if size > 0x80000:
            raise _Refused(0x0E)
        return b""

    def _mem_data(self, data: bytes, checksum: int) -> bytes:
        if self._kind != MEM_DATA:
            raise _Refused(BAD_FORMAT)
        block = self._block(data, checksum)
        self._next_seq += 1
        self._ram[-1][1].extend(block)
        return b""

    def _mem_end(self, data: bytes, _: int) -> bytes:
        self._words(data, 2)
        self._kind = None
        return b""

    def _flash_begin(self, data: bytes, _: int) -> bytes:
        return self._begin(FLASH_DATA, data)

    def _defl_begin(self, data: bytes, _: int) -> bytes:
        return self._begin(FLASH_DEFL_DATA, data)

    def _begin(self, kind: int, data: bytes) -> bytes:
        if len(data) != self._chip.persona.begin_size:
            raise _Refused(BAD_FORMAT)
        size, _blocks, block_size, offset = words(data[:16], 4)
        self._encrypted = len(data) == 20 and words(data[16:], 1)[0] != 0
        if size:
            self._check_block(block_size)
        self._need_flash(offset, size)
        self._kind, self._next_seq, self._inflater = kind, 0, None
        self._address = offset & _ADDRESS_MASK
        flash = self._chip.flash
        first = self._address // SECTOR * SECTOR
        for at in range(first, min(self._address + size, flash.size), SECTOR):
            self.busy += flash.erase_sector(at)
        return b""

    def _flash_data(self, data: bytes, checksum: int) -> bytes:
        if self._kind is None:
            return self._stray_data()
        block = self._block(data, checksum)
        self._next_seq += 1
        self._program(block)
        return b""

    def _defl_data(self, data: bytes, checksum: int) -> bytes:
        if self._kind is None:
            return self._stray_data()
        block = self._block(data, checksum)
        self._next_seq += 1
        if self._inflater is None:
            self._inflater = zlib.decompressobj()
        try:
            out = self._inflater.decompress(block)
        except zlib.error as exc:
            raise _Refused(ADLER if "incorrect data check" in str(exc) else INFLATE) from None
        self._program(out)
        return b""

    def _stray_data(self) -> bytes:
        if self._chip.persona.data_needs_begin:
            raise _Refused(BAD_FORMAT)
        return b""

    def _flash_end(self, data: bytes, _: int) -> bytes | None:
        (stay,) = self._words(data, 1)
        self._kind = None
        if not self._chip.persona.end_survives:
            self._reply(FLASH_END, 1, FAILED)
            self.silent = True
            return None
        if not stay:
            self._reply(FLASH_END, 0, None)
            self._chip.restart(self.busy)
            return None
        return b""

    def _defl_end(self, data: bytes, _: int) -> bytes | None:
        (stay,) = self._words(data, 1)
        self._kind = None
        if not self._chip.persona.end_survives:
            self._reply(FLASH_DEFL_END, 1, FAILED)
            self.silent = True
            return None
        if not stay:
            self._reply(FLASH_DEFL_END, 0, None)
            self._chip.restart(self.busy)
            return None
        return b""

    def _md5(self, data: bytes, _: int) -> bytes:
        offset, size, *_rest = self._words(data, 4)
        self._need_flash(offset, size)
        flash = self._chip.flash
        self.busy += flash.md5_s(size)
        return flash.md5(offset & _ADDRESS_MASK, size).hex().encode()

    def _read_flash_slow(self, data: bytes, _: int) -> bytes:
        offset, size = self._words(data, 2)
        if size > 64:
            raise _Refused(READ_LENGTH)
        self._need_flash(offset, size)
        flash = self._chip.flash
        self.busy += flash.read_s(64)
        return flash.read(offset & _ADDRESS_MASK, size).ljust(64, b"\0")

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _words(self, data: bytes, count: int) -> tuple[int, ...]:
        if len(data) != 4 * count:
            raise _Refused(BAD_FORMAT)
        return words(data, count)

    def _check_block(self, size: int) -> None:
        most = MAX_BLOCK_OTG if self._chip.link_model.kind == "otg" else MAX_BLOCK
        if size > most:
            raise _Refused(BAD_FORMAT)

    def _need_flash(self, offset: int, size: int) -> None:
        if not self._chip.registers.flash_attached:
            raise _Refused(FAILED)
        if offset + size > self._flash_size:
            raise _Refused(SECURE_PARAMETER if self._chip.options.secure_download else FAILED)

    def _block(self, data: bytes, checksum: int) -> bytes:
        """Payload of a DATA command, once length, number and checksum are right."""
        if len(data) < 16:
            raise _Refused(BAD_FORMAT)
        size, seq, _, _ = words(data[:16], 4)
        block = data[16:]
        if size != len(block):
            raise _Refused(BAD_FORMAT)
        self._check_block(size)
        if seq != self._next_seq:
            raise _Refused(BAD_FORMAT)
        if xor_all(block) != checksum & 0xFF:
            self._next_seq += 1  # a refused block counts too; the address stays
            raise _Refused(BAD_CHECKSUM)
        return block

    def _program(self, block: bytes) -> None:
        flash = self._chip.flash
        self.busy += flash.program(self._address, block)
        self.busy += flash.read_s(len(block))
        if not self._encrypted and flash.read(self._address, len(block)) != block:
            raise _Refused(READBACK)
        self._address += len(block)


_HANDLERS = {
    SYNC: RomLoader._sync,
    READ_REG: RomLoader._read_reg,
    WRITE_REG: RomLoader._write_reg,
    SPI_ATTACH: RomLoader._attach,
    SPI_SET_PARAMS: RomLoader._set_params,
    CHANGE_BAUDRATE: RomLoader._change_baud,
    GET_SECURITY_INFO: RomLoader._security_info,
    MEM_BEGIN: RomLoader._mem_begin,
    MEM_DATA: RomLoader._mem_data,
    MEM_END: RomLoader._mem_end,
    FLASH_BEGIN: RomLoader._flash_begin,
    FLASH_DATA: RomLoader._flash_data,
    FLASH_END: RomLoader._flash_end,
    FLASH_DEFL_BEGIN: RomLoader._defl_begin,
    FLASH_DEFL_DATA: RomLoader._defl_data,
    FLASH_DEFL_END: RomLoader._defl_end,
    SPI_FLASH_MD5: RomLoader._md5,
    READ_FLASH_SLOW: RomLoader._read_flash_slow,
}
