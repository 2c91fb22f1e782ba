"""The stub, version 2 (and 1 where it differs): what the ROM loader starts in RAM to be faster.

* It answers a DATA command before it programs, so that the next frame can come meanwhile; a failure is told one
  command late, in the place of that command.
* It has two frame buffers. A frame that starts while both are taken is lost, and nobody is told.
* Sizes it was told wrongly make it hang.
* It erases as it goes, in blocks of 64 KiB where it can, and leaves out sectors that are blank until it meets one that
  is not.

In its model of time the answer leaves when the command was checked; what it does afterwards keeps it `busy`, and an
erase it has started keeps the flash busy without it. The work itself is done when it is next looked for
(`finish_work`), so that a host's time is not mixed with the double's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.esp_chip.flash import BLOCK, SECTOR
from tests.sim.esp_chip.opcodes import (
    CHANGE_BAUDRATE,
    ERASE_FLASH,
    ERASE_REGION,
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
    READ_FLASH,
    READ_REG,
    RUN_USER_CODE,
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

BAD_LENGTH = 0xC0
BAD_CHECKSUM = 0xC1
BAD_BLOCK_SIZE = 0xC2
UNKNOWN = 0xC3
SPI_FAILED = 0xC4
NOT_IN_FLASH_MODE = 0xC6
INFLATE = 0xC7
NOT_ENOUGH_DATA = 0xC8
TOO_MUCH_DATA = 0xC9
NOT_IMPLEMENTED = 0xFF

FRAME_MAX = 8 + 0x4000 + 0xFF  # decoded bytes of one frame buffer
_FRAME_MAX_OTG = 8 + 16 + 0x800
_UNIT = 0x8000  # of inflated bytes that are programmed at a time


class Hung(Exception):
    """It will never answer again; only a reset helps."""


class _Refused(Exception):
    def __init__(self, error: int) -> None:
        self.error = error


class _Session:
    """One BEGIN and what followed."""

    def __init__(self, kind: int, size: int, offset: int, compressed_bound: int, *, skips_blank: bool) -> None:
        self.kind = kind
        self.left = size  # bytes to program yet
        self.at = offset
        self.erase_at = offset // SECTOR * SECTOR
        self.erase_end = (offset + size + SECTOR - 1) // SECTOR * SECTOR
        self.skips_blank = skips_blank
        self.compressed_left = compressed_bound
        self.inflater: zlib._Decompress | None = None
        self.header = b""
        self.blocks = 0
        self.tail = b""  # behind the last deflate block: the Adler-32
        self.adler = 1
        self.pending = bytearray()


class _Reading:
    """A READ_FLASH under way."""

    def __init__(self, offset: int, size: int, packet_size: int) -> None:
        self.offset = offset
        self.size = size
        self.packet_size = packet_size
        self.sent = 0


class Stub:
    """One run of the stub.

    Args:
        chip: it runs on.
        version: 2, or 1 for the legacy stub.
    """

    def __init__(self, chip: Chip, version: int = 2, *, busy: float = 0.0) -> None:
        self._chip = chip
        self.version = version
        self.busy = busy
        self.armed_at = busy
        self._flash_idle = 0.0
        self._late_error: int | None = None
        self._session: _Session | None = None
        self._reading: _Reading | None = None
        self._work: Callable[[], None] | None = None
        self._ram: list[tuple[int, bytearray]] = []

    @property
    def has_work(self) -> bool:
        return self._work is not None

    def finish_work(self) -> None:
        """Does what is left to do behind the last answer.

        Raises:
            Hung, PowerLost: in the course of it.
        """
        work, self._work = self._work, None
        if work is not None:
            work()

    # ---- frames ------------------------------------------------------------------------------------------------------

    def frame(self, payload: bytes, arrived: float) -> None:
        limit = _FRAME_MAX_OTG if self._chip.link_model.kind == "otg" else FRAME_MAX
        if len(payload) > limit:
            return
        self.finish_work()
        at = self.busy = max(arrived + self._chip.link_model.latency_s, self.busy)
        self.armed_at = at  # from here on the other buffer takes bytes
        if self._reading is not None:
            self._acknowledged(payload)
            return
        if len(payload) < 8:
            return
        direction, opcode, size, checksum = struct.unpack_from("<BBHI", payload)
        data = payload[8:]
        try:
            if self._late_error is not None:
                error, self._late_error = self._late_error, None
                raise _Refused(error)
            if direction != 0:
                raise _Refused(UNKNOWN)
            if len(data) != size:
                raise _Refused(BAD_LENGTH)
            self._execute(opcode, data, checksum)
        except _Refused as refused:
            self._reply(opcode, refused.error)

    def _reply(self, opcode: int, error: int = 0, *, value: int = 0, data: bytes = b"") -> None:
        packet = struct.pack("<BBHI", 1, opcode, len(data) + 2, value) + data + bytes((error, 0))
        self._chip.answer(opcode, packet, self.busy)

    def _execute(self, opcode: int, data: bytes, checksum: int) -> None:
        handler = _HANDLERS.get(opcode)
        if handler is not None:
            handler(self, data, checksum)
        elif self.version == 1 or 0xD5 <= opcode <= 0xEF:
            raise _Refused(NOT_IMPLEMENTED)
        else:
            raise _Refused(UNKNOWN)

    def _words(self, data: bytes, count: int) -> tuple[int, ...]:
        if len(data) != 4 * count:
            raise _Refused(BAD_LENGTH)
        return words(data, count)

    # ---- small commands ----------------------------------------------------------------------------------------------

    def _sync(self, data: bytes, _: int) -> None:
        for _ in range(8):
            self._reply(SYNC)

    def _read_reg(self, data: bytes, _: int) -> None:
        (address,) = self._words(data, 1)
        self._reply(READ_REG, value=self._chip.registers.read(address))

    def _write_reg(self, data: bytes, _: int) -> None:
        if not data or len(data) % 16:
            raise _Refused(BAD_LENGTH)
        for at in range(0, len(data), 16):
            address, value, mask, delay_us = words(data[at : at + 16], 4)
            self.busy += delay_us * 1e-6
            self._chip.registers.write(address, value, mask)
        self._reply(WRITE_REG)

    def _attach(self, data: bytes, _: int) -> None:
        self._words(data, 1)
        self._reply(SPI_ATTACH)

    def _set_params(self, data: bytes, _: int) -> None:
        self._words(data, 6)
        self._reply(SPI_SET_PARAMS)

    def _change_baud(self, data: bytes, _: int) -> None:
        baud, _old = self._words(data, 2)
        self._reply(CHANGE_BAUDRATE)
        self._chip.change_baud(baud)

    def _security_info(self, data: bytes, _: int) -> None:
        if self._chip.persona.security_info_size == 0:
            raise _Refused(NOT_IMPLEMENTED)
        self._reply(GET_SECURITY_INFO, data=self._chip.security_info())

    def _mem_begin(self, data: bytes, _: int) -> None:
        *_sizes, address = self._words(data, 4)
        self._ram.append((address, bytearray()))
        self._reply(MEM_BEGIN)

    def _mem_data(self, data: bytes, checksum: int) -> None:
        block = self._block(data, checksum)
        if not self._ram:
            raise _Refused(NOT_IN_FLASH_MODE)
        self._ram[-1][1].extend(block)
        self._reply(MEM_DATA)

    def _mem_end(self, data: bytes, _: int) -> None:
        no_entry, entry = self._words(data, 2)
        self._reply(MEM_END)
        if not no_entry and entry:
            self._chip.run_program(entry, self._ram, self.busy)

    def _run_user_code(self, data: bytes, _: int) -> None:
        if self.version == 1:
            self._chip.restart(self.busy)

    # ---- flash: whole commands ---------------------------------------------------------------------------------------

    def _wait_flash(self) -> None:
        self.busy = max(self.busy, self._flash_idle)

    def _erase_flash(self, data: bytes, _: int) -> None:
        flash = self._chip.flash
        self._wait_flash()
        for at in range(0, flash.size, BLOCK):
            self.busy += flash.erase_block(at)
        self._reply(ERASE_FLASH)

    def _erase_region(self, data: bytes, _: int) -> None:
        offset, size = self._words(data, 2)
        if offset % SECTOR or size % SECTOR:
            raise _Refused(BAD_LENGTH)
        flash = self._chip.flash
        end = offset + size
        if end > flash.size:
            raise _Refused(SPI_FAILED)
        self._wait_flash()
        while offset < end:
            if offset % BLOCK == 0 and end - offset >= BLOCK:
                self.busy += flash.erase_block(offset)
                offset += BLOCK
            else:
                self.busy += flash.erase_sector(offset)
                offset += SECTOR
        self._reply(ERASE_REGION)

    def _md5(self, data: bytes, _: int) -> None:
        offset, size, *_rest = self._words(data, 4)
        flash = self._chip.flash
        if offset + size > flash.size:
            raise _Refused(SPI_FAILED)
        self._wait_flash()
        self.busy += flash.md5_s(size)
        self._reply(SPI_FLASH_MD5, data=flash.md5(offset, size))

    def _read_flash(self, data: bytes, _: int) -> None:
        offset, size, packet_size, _window = self._words(data, 4)
        if not 0 < packet_size <= 0x1000 or offset + size > self._chip.flash.size:
            raise _Refused(BAD_LENGTH)
        self._reply(READ_FLASH)
        self._reading = _Reading(offset, size, packet_size)
        self._wait_flash()
        self._send_packet()

    def _send_packet(self) -> None:
        """The next packet, or the MD5 of all; one packet may be unacknowledged, whatever was asked for."""
        reading = self._reading
        assert reading is not None
        flash = self._chip.flash
        size = min(reading.packet_size, reading.size - reading.sent)
        if size:
            self.busy += flash.read_s(size)
            packet = flash.read(reading.offset + reading.sent, size)
            reading.sent += size
        else:
            packet = flash.md5(reading.offset, reading.size)
            self._reading = None
        self.busy = self._chip.answer(READ_FLASH, packet, self.busy)

    def _acknowledged(self, payload: bytes) -> None:
        if len(payload) != 4:
            self._reading = None
            return
        self._send_packet()

    # ---- flash: sessions ---------------------------------------------------------------------------------------------

    def _begin(self, kind: int, opcode: int, data: bytes) -> None:
        if len(data) not in (16, 20):
            raise _Refused(BAD_LENGTH)
        size, blocks, block_size, offset = words(data[:16], 4)
        if self._chip.link_model.kind == "otg" and block_size > 0x800:
            raise _Refused(BAD_BLOCK_SIZE)
        if offset + size > self._chip.flash.size:
            raise _Refused(SPI_FAILED)
        session = self._session = _Session(kind, size, offset, blocks * block_size, skips_blank=self.version >= 2)
        if session.erase_at < session.erase_end:
            self._wait_flash()
            self._erase_step(session)
        self._reply(opcode)

    def _flash_begin(self, data: bytes, _: int) -> None:
        self._begin(FLASH_DATA, FLASH_BEGIN, data)

    def _defl_begin(self, data: bytes, _: int) -> None:
        self._begin(FLASH_DEFL_DATA, FLASH_DEFL_BEGIN, data)

    def _block(self, data: bytes, checksum: int) -> bytes:
        if len(data) < 16:
            raise _Refused(BAD_LENGTH)
        block = data[16:]
        if words(data[:4], 1)[0] != len(block):
            raise _Refused(BAD_LENGTH)
        if xor_all(block) != checksum & 0xFF:
            raise _Refused(BAD_CHECKSUM)
        return block

    def _need_session(self, kind: int) -> _Session:
        if self._session is None or self._session.kind != kind:
            raise _Refused(NOT_IN_FLASH_MODE)
        return self._session

    def _flash_data(self, data: bytes, checksum: int) -> None:
        session = self._need_session(FLASH_DATA)
        block = self._block(data, checksum)
        self._reply(FLASH_DATA)
        self._work = lambda: self._write(session, block[: session.left])  # what is beyond the size is dropped

    def _defl_data(self, data: bytes, checksum: int) -> None:
        session = self._need_session(FLASH_DEFL_DATA)
        block = self._block(data, checksum)
        seq = words(data[4:8], 1)[0]
        self._reply(FLASH_DEFL_DATA)
        self._work = lambda: self._inflate(session, block, first=seq == 0)

    def _flash_end(self, data: bytes, _: int) -> None:
        self._end(FLASH_DATA, FLASH_END)

    def _defl_end(self, data: bytes, _: int) -> None:
        self._end(FLASH_DEFL_DATA, FLASH_DEFL_END)

    def _end(self, kind: int, opcode: int) -> None:
        """Its answer says that the last block is in flash. It restarts nothing."""
        session = self._need_session(kind)
        if session.left:
            raise _Refused(BAD_LENGTH)
        self._session = None
        self._reply(opcode)

    # ---- flash: parts ------------------------------------------------------------------------------------------------

    def _erase_step(self, session: _Session) -> None:
        """Goes one sector or block on: starts an erase, or sees that there is no need. The flash is idle."""
        flash = self._chip.flash
        if session.skips_blank:
            self.busy += flash.read_s(SECTOR)
            flash.counts.bytes_read += SECTOR
            if flash.is_blank(session.erase_at):
                flash.counts.blank_skips += 1
                session.erase_at += SECTOR
                return
            session.skips_blank = False
        if session.erase_at % BLOCK == 0 and session.erase_end - session.erase_at >= BLOCK:
            took = flash.erase_block(session.erase_at)
            session.erase_at += BLOCK
        else:
            took = flash.erase_sector(session.erase_at)
            session.erase_at += SECTOR
        self._flash_idle = self.busy + took

    def _write(self, session: _Session, data: bytes) -> None:
        end = session.at + len(data)
        while session.erase_at < min(end, session.erase_end):
            self._wait_flash()
            self._erase_step(session)
        self._wait_flash()
        self.busy += self._chip.flash.program(session.at, data)
        session.at = end
        session.left -= len(data)

    def _inflate(self, session: _Session, block: bytes, *, first: bool) -> None:
        if first:
            session.inflater, session.header, session.tail, session.adler = None, b"", b"", 1
            session.pending.clear()
            session.blocks = 0
        session.blocks += 1
        session.compressed_left -= len(block)
        data = block
        if session.inflater is None:
            session.header += data
            if len(session.header) < 2:
                return
            data = session.header[2:]
            head = session.header[:2]
            if head[0] & 0x0F != 8 or (head[0] << 8 | head[1]) % 31 or head[1] & 0x20:
                self._late_error = INFLATE
                return
            session.inflater = zlib.decompressobj(-15)
        inflater = session.inflater
        if inflater.eof:
            return
        while True:
            room = _UNIT - len(session.pending)
            try:
                out = inflater.decompress(data, room)
            except zlib.error:
                self._late_error = INFLATE
                return
            data = inflater.unconsumed_tail
            session.pending += out
            if self.version >= 2 and session.erase_at < session.erase_end and self._flash_idle <= self.busy:
                self._erase_step(session)
            if len(session.pending) == _UNIT or inflater.eof:
                if len(session.pending) > session.left:
                    raise Hung("more bytes than BEGIN declared: it erases for ever")
                self._write(session, bytes(session.pending))
                if session.blocks == 1:
                    session.adler = zlib.adler32(session.pending, session.adler)
                session.pending.clear()
            if inflater.eof:
                tail = inflater.unused_data
                if session.blocks == 1 and (len(tail) < 4 or int.from_bytes(tail[:4], "big") != session.adler):
                    self._late_error = INFLATE  # of one block alone the inflater sees the sum
                return
            if len(out) < room and not data:
                break
        if session.compressed_left <= 0:
            raise Hung("fewer bytes than the stream has were declared: it waits for none")


_HANDLERS = {
    SYNC: Stub._sync,
    READ_REG: Stub._read_reg,
    WRITE_REG: Stub._write_reg,
    SPI_ATTACH: Stub._attach,
    SPI_SET_PARAMS: Stub._set_params,
    CHANGE_BAUDRATE: Stub._change_baud,
    GET_SECURITY_INFO: Stub._security_info,
    MEM_BEGIN: Stub._mem_begin,
    MEM_DATA: Stub._mem_data,
    MEM_END: Stub._mem_end,
    RUN_USER_CODE: Stub._run_user_code,
    ERASE_FLASH: Stub._erase_flash,
    ERASE_REGION: Stub._erase_region,
    SPI_FLASH_MD5: Stub._md5,
    READ_FLASH: Stub._read_flash,
    FLASH_BEGIN: Stub._flash_begin,
    FLASH_DATA: Stub._flash_data,
    FLASH_END: Stub._flash_end,
    FLASH_DEFL_BEGIN: Stub._defl_begin,
    FLASH_DEFL_DATA: Stub._defl_data,
    FLASH_DEFL_END: Stub._defl_end,
}
