"""The double itself: each habit of ROM loader and stub that was measured on chips, each fault, and its time line."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sim.esp_chip import (
    PERSONAS,
    Chip,
    DirectLink,
    Fault,
    Flash,
    FlashTiming,
    LinkModel,
    Options,
)
from tests.sim.esp_chip import opcodes as op
from tests.sim.esp_chip.host import Host, data_packet, pack, packet
from tests.sim.esp_chip.stubs import stub_images

MakeHost = Callable[..., Host]
FF = b"\xff"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeHost]:
    """Makes a chip and a host that talks to it directly."""
    flashes = []

    def make_host(
        name: str = "esp32c3", *, size: int = 4 << 20, model: LinkModel | None = None, **options: object
    ) -> Host:
        flash = Flash(tmp_path / f"flash{len(flashes)}.bin", size)
        flashes.append(flash)
        chip = Chip(
            name,
            flash,
            DirectLink(),
            link_model=model,
            options=Options(**options),  # type: ignore[arg-type]
        )
        return Host(chip)

    yield make_host
    for flash in flashes:
        flash.close()


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# ---- ROM loader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PERSONAS))
def test_sync_is_answered_eight_times_with_a_value(make: MakeHost, name: str) -> None:
    replies = make(name).sync()
    assert len(replies) == 8
    assert {(reply.opcode, reply.value, reply.data) for reply in replies} == {(op.SYNC, 0x20120707, bytes(4))}


@pytest.mark.parametrize(
    ("name", "magic"), [("esp32", 0x00F01D83), ("esp32s2", 0x7C6), ("esp32s3", 9), ("esp32c6", 0x2CE0806F)]
)
def test_chip_is_known_by_its_magic(make: MakeHost, name: str, magic: int) -> None:
    host = make(name)
    host.sync()
    assert host.one(op.READ_REG, pack(0x40001000)).value == magic


def test_security_info_tells_the_chip(make: MakeHost) -> None:
    for name, chip_id in (("esp32s3", 9), ("esp32c3", 5), ("esp32c6", 13)):
        host = make(name)
        host.sync()
        reply = host.one(op.GET_SECURITY_INFO)
        assert len(reply.data) == 24
        assert int.from_bytes(reply.data[12:16], "little") == chip_id
    host = make("esp32s2")
    host.sync()
    assert len(host.one(op.GET_SECURITY_INFO).data) == 16


def test_rom_keeps_value_error_and_reserved_bytes_of_earlier_replies(make: MakeHost) -> None:
    host = make()
    host.connect()
    md5 = host.one(op.SPI_FLASH_MD5, pack(0, 4096, 0, 0))
    digest = hashlib.md5(FF * 4096).hexdigest().encode()
    assert md5.data == digest + bytes(2) + bytes(2)
    after = host.one(op.SPI_ATTACH, bytes(8))
    assert after.data == b"\0\0" + digest[2:4]  # a success
    host.one(op.READ_REG, pack(0x40001000))
    assert host.one(op.SPI_ATTACH, bytes(8)).value == 0x1B31506F  # what READ_REG left
    assert host.begin(op.FLASH_BEGIN, 4096, 0, block_size=0x2000).data[:2] == b"\x01\x05"
    assert host.one(op.SPI_ATTACH, bytes(8)).data[:2] == b"\x00\x05"  # a success too


def test_unknown_command_is_answered_under_the_name_of_the_one_before(make: MakeHost) -> None:
    host = make("esp32")
    host.sync()
    replies = host.all_of(op.GET_SECURITY_INFO)
    assert len(replies) == 8
    assert {(reply.opcode, reply.data[:2]) for reply in replies} == {(op.SYNC, b"\x01\x05")}
    value = host.one(op.READ_REG, pack(0x40001000)).value
    reply = host.one(op.GET_SECURITY_INFO)
    assert (reply.opcode, reply.value, reply.data[:2]) == (op.READ_REG, value, b"\x01\x05")


@pytest.mark.parametrize(("name", "right", "wrong"), [("esp32", 16, 20), ("esp32c3", 20, 16), ("esp32s3", 20, 16)])
def test_rom_takes_one_length_of_begin(make: MakeHost, name: str, right: int, wrong: int) -> None:
    for opcode in (op.FLASH_BEGIN, op.FLASH_DEFL_BEGIN):
        host = make(name)
        host.connect()
        words = pack(4096, 4, 0x400, 0x10000, 0)
        assert host.one(opcode, words[:wrong]).data[:2] == b"\x01\x05"
        assert host.one(opcode, words[:right]).data[0] == 0


def test_rom_erases_sector_by_sector_before_it_answers_begin(make: MakeHost) -> None:
    host = make()
    host.connect()
    chip = host.chip
    chip.flash[0x10000:0x40000] = bytes(0x30000)
    chip.mark()
    host.begin(op.FLASH_BEGIN, 0x20000 + 1, 0x10000, block_size=0x400)
    assert chip.flash.counts.sector_erases == 33
    assert chip.flash.counts.block_erases == 0
    assert chip.model_seconds == pytest.approx(33 * 0.045, abs=0.02)
    assert chip.flash[0x10000:0x31000] == FF * 0x21000
    assert chip.flash[0x31000:0x40000] == bytes(0xF000)


def test_rom_largest_block(make: MakeHost) -> None:
    host = make()
    host.connect()
    assert host.begin(op.FLASH_BEGIN, 0x3000, 0, block_size=0x1800).data[0] == 0
    assert host.block(op.FLASH_DATA, 0, bytes(0x1800))[0].data[0] == 0
    assert host.block(op.FLASH_DATA, 1, bytes(0x1801))[0].data[:2] == b"\x01\x05"
    assert host.one(op.MEM_BEGIN, pack(0x2000, 1, 0x2000, 0x40380000)).data[:2] == b"\x01\x05"


def test_rom_cannot_repeat_a_refused_block(make: MakeHost) -> None:
    host = make()
    host.connect()
    host.begin(op.FLASH_BEGIN, 0x1000, 0, block_size=0x400)
    blocks = [some_bytes(0x400, seed) for seed in range(3)]
    assert host.block(op.FLASH_DATA, 0, blocks[0])[0].data[0] == 0
    assert host.block(op.FLASH_DATA, 1, blocks[1], checksum=0x12345)[0].data[:2] == b"\x01\x07"
    for _ in range(3):
        assert host.block(op.FLASH_DATA, 1, blocks[1])[0].data[:2] == b"\x01\x05"
    assert host.block(op.FLASH_DATA, 2, blocks[2])[0].data[0] == 0
    assert host.chip.flash[:0x800] == blocks[0] + blocks[2]  # where block 1 belonged


def test_rom_reads_back_what_it_programs(make: MakeHost) -> None:
    host = make()
    host.connect()
    host.begin(op.FLASH_BEGIN, 0x400, 0x1000, block_size=0x400)
    host.chip.flash.faults.dead_bytes.add(0x1100)
    assert host.block(op.FLASH_DATA, 0, bytes(0x400))[0].data[:2] == b"\x01\x08"
    host.chip.flash.faults.dead_bytes.clear()
    host.chip.flash[0x2000:0x3000] = bytes(0x1000)
    host.begin(op.FLASH_BEGIN, 0, 0x2000, block_size=0x400)  # erases nothing: programming only clears bits
    assert host.block(op.FLASH_DATA, 0, FF * 16)[0].data[:2] == b"\x01\x08"


def test_data_without_begin(make: MakeHost) -> None:
    host = make("esp32")
    host.connect()
    assert host.block(op.FLASH_DATA, 0, bytes(16))[0].data[:2] == b"\x01\x05"
    host = make("esp32c3")
    host.connect()
    assert host.block(op.FLASH_DATA, 0, bytes(16))[0].data[0] == 0
    assert host.chip.flash[:16] == FF * 16


def test_rom_deflate_errors(make: MakeHost) -> None:
    data = some_bytes(3000)
    packed = zlib.compress(data)

    def write(stream: bytes) -> bytes:
        host = make()
        host.connect()
        host.begin(op.FLASH_DEFL_BEGIN, 3000, 0, block_size=0x1800)
        status = host.block(op.FLASH_DEFL_DATA, 0, stream)[0].data[:2]
        if status[0] == 0:
            assert host.chip.flash[:3000] == data
        return status

    assert write(packed)[0] == 0
    assert write(b"rubbish" * 30) == b"\x01\x0b"
    assert write(zlib.compress(data)[2:-4]) == b"\x01\x0b"  # without its header
    assert write(packed[:-1] + bytes((packed[-1] ^ 1,))) == b"\x01\x0c"


def test_flash_end_leaves_most_roms_dumb(make: MakeHost) -> None:
    host = make("esp32c3")
    host.connect()
    host.begin(op.FLASH_BEGIN, 0x400, 0, block_size=0x400)
    assert host.one(op.FLASH_END, pack(1)).data[:2] == b"\x01\x06"
    assert host.sync() == []
    host = make("esp32")
    host.connect()
    host.begin(op.FLASH_DEFL_BEGIN, 0x400, 0, block_size=0x400)
    assert host.one(op.FLASH_DEFL_END, pack(1)).data[0] == 0
    assert len(host.sync()) == 8


def test_rom_needs_attach_and_the_size(make: MakeHost) -> None:
    host = make()
    host.sync()
    assert host.begin(op.FLASH_BEGIN, 0x400, 0, block_size=0x400).data[:2] == b"\x01\x06"
    host.one(op.SPI_ATTACH, bytes(8))
    assert host.begin(op.FLASH_BEGIN, 0x400, 0, block_size=0x400).data[0] == 0
    assert (
        host.begin(op.FLASH_BEGIN, 0x400, 0x200000, block_size=0x400).data[:2] == b"\x01\x06"
    )  # it takes it for 2 MiB


def test_flash_id_through_registers_in_three_commands(make: MakeHost) -> None:
    for name in ("esp32", "esp32s3", "esp32c3", "esp32c6"):
        host = make(name)
        host.connect()
        spi = PERSONAS[name].spi
        usr, usr2, miso, w0 = (0x1C, 0x24, 0x2C, 0x80) if name == "esp32" else (0x18, 0x20, 0x28, 0x58)
        every = 0xFFFFFFFF
        writes = ((miso, 23), (usr, 1 << 31 | 1 << 28), (usr2, 7 << 28 | 0x9F), (w0, 0), (0, 1 << 18))
        batch = b"".join(pack(spi + offset, value, every, 0) for offset, value in writes)
        assert host.one(op.WRITE_REG, batch).data[0] == 0
        assert host.one(op.READ_REG, pack(spi)).value & 1 << 18 == 0
        assert host.one(op.READ_REG, pack(spi + w0)).value == 0x1640EF


def test_write_reg_takes_a_mask(make: MakeHost) -> None:
    host = make()
    host.sync()
    host.one(op.WRITE_REG, pack(0x60001000, 0x12345678, 0xFFFFFFFF, 0) + pack(0x60001000, 0, 0xFF, 0))
    assert host.one(op.READ_REG, pack(0x60001000)).value == 0x12345600


def test_secure_download_mode_serves_few_commands(make: MakeHost) -> None:
    host = make("esp32c3", secure_download=True)
    host.sync()
    assert host.one(op.GET_SECURITY_INFO).data[0] & 4
    for opcode, data in (
        (op.READ_REG, pack(0x40001000)),
        (op.SPI_FLASH_MD5, pack(0, 4096, 0, 0)),
        (op.MEM_BEGIN, pack(1, 1, 1, 1)),
    ):
        reply = host.one(opcode, data)
        assert reply.opcode != opcode
        assert reply.data[-4:-2] == b"\x01\x05"
    host.one(op.SPI_ATTACH, bytes(8))
    assert host.begin(op.FLASH_BEGIN, 0x1000, 0x300000, block_size=0x400).data[:2] == b"\x01\x64"
    host.one(op.SPI_SET_PARAMS, pack(0, 4 << 20, 0x10000, 0x1000, 0x100, 0xFFFF))
    assert host.begin(op.FLASH_BEGIN, 0x400, 0x300000, block_size=0x400).data[0] == 0
    assert host.block(op.FLASH_DATA, 0, bytes(0x400))[0].data[0] == 0
    assert host.chip.flash[0x300000:0x300400] == bytes(0x400)


def test_usb_otg_takes_small_blocks_only(make: MakeHost) -> None:
    host = make("esp32s3", model=LinkModel.usb("otg"))
    host.connect()
    assert host.one(op.MEM_BEGIN, pack(0x1800, 1, 0x1800, 0x40380000)).data[:2] == b"\x01\x05"
    assert host.begin(op.FLASH_BEGIN, 0x1000, 0, block_size=0x400).data[0] == 0
    assert host.block(op.FLASH_DATA, 0, bytes(0x801))[0].data[:2] == b"\x01\x05"
    assert host.block(op.FLASH_DATA, 0, bytes(0x800))[0].data[0] == 0


def test_read_flash_slow(make: MakeHost) -> None:
    host = make()
    host.connect()
    host.chip.flash[0x100:0x110] = b"0123456789abcdef"
    reply = host.one(op.READ_FLASH_SLOW, pack(0x100, 10))
    assert reply.data[:10] == b"0123456789"
    assert len(reply.data) == 64 + 4
    assert host.one(op.READ_FLASH_SLOW, pack(0, 65)).data[:2] == b"\x01\x0a"


# ---- stub ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["esp32", "esp32s2", "esp32s3", "esp32c2", "esp32c3", "esp32c6", "esp32h2", "esp32p4"])
def test_published_stub_starts_and_a_wrong_bit_in_it_does_not(make: MakeHost, name: str) -> None:
    images = [image for image in stub_images(name) if image.version == 2]
    assert images, "the tool that brings the stubs is not installed"
    (image,) = images
    for spoilt in (False, True):
        host = make(name)
        host.connect()
        for address, segment in image.segments:
            data = bytearray(segment)
            if spoilt:
                data[10] ^= 4
            host.one(op.MEM_BEGIN, pack(len(data), 1, 0x1800, address))
            for seq, at in enumerate(range(0, len(data), 0x1800)):
                assert host.block(op.MEM_DATA, seq, bytes(data[at : at + 0x1800]))[0].data[0] == 0
        frames = host.frames(packet(op.MEM_END, pack(0, image.entry)))
        assert (b"OHAI" in frames) != spoilt
        assert host.chip.mode == ("hung" if spoilt else "stub")
        if not spoilt:
            replies = host.sync()
            assert len(replies) == 8
            assert {(reply.value, reply.data) for reply in replies} == {(0, bytes(2))}


def test_stub_unknown_commands(make: MakeHost) -> None:
    host = make("esp32")
    host.start_stub()
    assert host.one(0xD4).data == b"\xc3\x00"
    assert host.one(op.READ_FLASH_SLOW, pack(0, 4)).data == b"\xc3\x00"
    assert host.one(0xD5).data == b"\xff\x00"
    assert host.one(op.GET_SECURITY_INFO).data == b"\xff\x00"
    assert host.one(op.SPI_ATTACH, bytes(8)).data == b"\xc0\x00"
    assert host.one(op.SPI_ATTACH, bytes(4)).data == b"\0\0"
    assert host.all_of(op.RUN_USER_CODE) == []
    (reply,) = host.raw(b"\0\0\0\0\xc0" + b"\0\x0a\x08\0" + bytes(4) + bytes(4) + b"\xc0")
    assert reply[8:] == b"\xc0\x00"  # the length is wrong


def test_stub_takes_both_lengths_of_begin_and_odd_offsets(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    data = some_bytes(5000)
    for words in (pack(5000, 1, 0x4000, 0x1234), pack(5000, 1, 0x4000, 0x1234, 0)):
        assert host.one(op.FLASH_BEGIN, words).data == b"\0\0"
        assert host.block(op.FLASH_DATA, 0, data)[0].data == b"\0\0"
        assert host.one(op.FLASH_END, pack(1)).data == b"\0\0"
        assert host.chip.flash[0x1234 : 0x1234 + 5000] == data


def test_stub_begin_has_erased_already(make: MakeHost) -> None:
    for size, gone, offset in ((0x2000, 0x1000, 0x11000), (0x20000, 0x10000, 0x20000), (0x20000, 0x1000, 0x21000)):
        host = make()
        host.start_stub()
        host.chip.flash[0:0x100000] = bytes(0x100000)
        host.begin(op.FLASH_BEGIN, size, offset)
        assert host.chip.flash[offset : offset + gone + 1] == FF * gone + b"\0"


def test_stub_leaves_blank_sectors_alone_until_one_is_not(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    flash = host.chip.flash
    flash[0x15000:0x15010] = bytes(16)
    host.chip.mark()
    host.begin(op.FLASH_BEGIN, 0x10000, 0x11000)
    for seq in range(4):
        host.block(op.FLASH_DATA, seq, bytes(0x4000))
    assert host.one(op.FLASH_END, pack(1)).data == b"\0\0"
    assert flash.counts.blank_skips == 4
    assert flash.counts.sector_erases == 12  # all behind it, unread
    assert flash[0x11000:0x21000] == bytes(0x10000)


def test_stub_uses_blocks_where_it_can(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.chip.flash[0:0x100000] = bytes(0x100000)
    host.chip.mark()
    host.begin(op.FLASH_BEGIN, 0x22000, 0x1F000)
    for seq in range(9):
        host.block(op.FLASH_DATA, seq, some_bytes(0x4000, seq))
    assert host.one(op.FLASH_END, pack(1)).data == b"\0\0"
    assert (host.chip.flash.counts.sector_erases, host.chip.flash.counts.block_erases) == (2, 2)


def test_stub_tells_an_error_one_command_late_and_swallows_that_command(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_DEFL_BEGIN, 3000, 0)
    assert host.block(op.FLASH_DEFL_DATA, 0, b"\x12\x34 no zlib header")[0].data == b"\0\0"
    host.chip.flash[0x5000:0x6000] = bytes(0x1000)
    assert host.one(op.ERASE_REGION, pack(0x5000, 0x1000)).data == b"\xc7\x00"
    assert host.chip.flash[0x5000:0x6000] == bytes(0x1000)  # not erased
    assert host.one(op.ERASE_REGION, pack(0x5000, 0x1000)).data == b"\0\0"
    assert host.chip.flash[0x5000:0x6000] == FF * 0x1000


def test_stub_checks_length_and_checksum_at_once(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    assert host.block(op.FLASH_DATA, 0, bytes(16))[0].data == b"\xc6\x00"
    host.begin(op.FLASH_BEGIN, 0x1000, 0)
    assert host.block(op.FLASH_DATA, 0, some_bytes(0x1000), checksum=1)[0].data == b"\xc1\x00"
    assert host.one(op.FLASH_DATA, pack(7, 0, 0, 0) + bytes(8)).data == b"\xc0\x00"
    assert host.one(op.FLASH_END, pack(1)).data == b"\xc0\x00"  # bytes are missing
    assert host.one(op.ERASE_REGION, pack(0x100, 0x1000)).data == b"\xc0\x00"


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("block", [1000, 0x4000, 0x4000 + 223])
def test_stub_inflates_any_zlib_stream_in_blocks_of_any_size(make: MakeHost, level: int, block: int) -> None:
    host = make()
    host.start_stub()
    data = (some_bytes(300) + bytes(700)) * 200
    stream = zlib.compress(data, level)
    host.begin(op.FLASH_DEFL_BEGIN, len(data), 0x10000, blocks=0xFFFF)  # far too many is fine
    for seq, at in enumerate(range(0, len(stream), block)):
        assert host.block(op.FLASH_DEFL_DATA, seq, stream[at : at + block])[0].data == b"\0\0"
    assert host.one(op.FLASH_DEFL_END, pack(1)).data == b"\0\0"
    assert host.chip.flash[0x10000 : 0x10000 + len(data)] == data
    assert host.chip.flash[0x10000 + len(data) : 0x10000 + len(data) + 16] == FF * 16


def test_stub_hangs_when_more_comes_than_was_declared(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_DEFL_BEGIN, 4999, 0)
    assert host.block(op.FLASH_DEFL_DATA, 0, zlib.compress(some_bytes(5000)))[0].data == b"\0\0"
    assert host.sync() == []
    assert host.chip.mode == "hung"


def test_stub_hangs_when_fewer_blocks_were_declared(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    stream = zlib.compress(some_bytes(30000))
    host.begin(op.FLASH_DEFL_BEGIN, 30000, 0, blocks=1)
    assert host.block(op.FLASH_DEFL_DATA, 0, stream[:0x4000])[0].data == b"\0\0"
    assert host.block(op.FLASH_DEFL_DATA, 1, stream[0x4000:]) == []
    assert host.chip.mode == "hung"


def test_stub_notices_too_few_bytes_at_the_end(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_DEFL_BEGIN, 5001, 0)
    host.block(op.FLASH_DEFL_DATA, 0, zlib.compress(some_bytes(5000)))
    assert host.one(op.FLASH_DEFL_END, pack(1)).data == b"\xc0\x00"


def test_stub_checks_the_adler_of_single_blocks_only(make: MakeHost) -> None:
    data = some_bytes(20000)
    stream = bytearray(zlib.compress(data))
    stream[-1] ^= 1
    host = make()
    host.start_stub()
    host.begin(op.FLASH_DEFL_BEGIN, len(data), 0)
    host.block(op.FLASH_DEFL_DATA, 0, bytes(stream[:0x4000]))
    host.block(op.FLASH_DEFL_DATA, 1, bytes(stream[0x4000:]))
    assert host.one(op.FLASH_DEFL_END, pack(1)).data == b"\0\0"
    small = bytearray(zlib.compress(data[:1000]))
    small[-1] ^= 1
    host.begin(op.FLASH_DEFL_BEGIN, 1000, 0)
    host.block(op.FLASH_DEFL_DATA, 0, bytes(small))
    assert host.one(op.FLASH_DEFL_END, pack(1)).data == b"\xc7\x00"


def test_stub_drops_what_is_beyond_the_declared_size_of_a_plain_write(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_BEGIN, 1000, 0x1000)
    assert host.block(op.FLASH_DATA, 0, bytes(0x1000))[0].data == b"\0\0"
    assert host.one(op.FLASH_END, pack(1)).data == b"\0\0"
    assert host.chip.flash[0x1000:0x2000] == bytes(1000) + FF * 3096


def test_repeated_data_shifts_what_follows(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_BEGIN, 0x2000, 0)
    first, second = some_bytes(0x800, 1), some_bytes(0x800, 2)
    host.block(op.FLASH_DATA, 0, first)
    host.block(op.FLASH_DATA, 0, first)
    host.block(op.FLASH_DATA, 1, second)
    host.chip.settle()
    assert host.chip.flash[:0x1800] == first + first + second


def test_too_long_a_frame_is_dropped_without_a_word(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_BEGIN, 0x8000, 0)
    assert host.block(op.FLASH_DATA, 0, bytes(0x4000 + 0xFF - 15)) == []
    assert host.block(op.FLASH_DATA, 0, bytes(0x4000 + 0xFF - 16))[0].data == b"\0\0"


@pytest.mark.parametrize(("gap", "answers"), [(b"", 1), (b"\x00" * 2000, 2)])
def test_frames_back_to_back_are_lost_silently(make: MakeHost, gap: bytes, answers: int) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_BEGIN, 0x2000, 0)
    blocks = [data_packet(op.FLASH_DATA, seq, some_bytes(0x1000, seq)) for seq in range(2)]
    replies = host.frames(*blocks, gap=gap)
    assert len(replies) == answers
    if answers == 1:
        # the end of the lost frame looked like the beginning of one: what is sent next closes it
        assert host.chip.counts.frames_lost == 1
        assert host.raw(b"\xc0" * 2) == []


def test_a_frame_that_comes_while_both_buffers_are_taken_is_lost(make: MakeHost) -> None:
    """While the stub programs the first, the second fills the other buffer; the third finds none, whatever its gap."""
    host = make()
    host.start_stub()
    host.chip.flash[0:0x10000] = bytes(0x10000)
    host.begin(op.FLASH_BEGIN, 0x10000, 0)
    blocks = [data_packet(op.FLASH_DATA, seq, some_bytes(64, seq)) for seq in range(3)]
    replies = host.frames(*blocks, gap=b"\x00" * 50)  # 4 ms; the erase takes 150
    assert len(replies) == 2


def test_stub_md5_is_raw_and_region_erase_uses_blocks(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.chip.flash[0x1000:0x40000] = some_bytes(0x3F000)
    content = host.chip.flash[0x1234:0x23456]
    assert (
        host.one(op.SPI_FLASH_MD5, pack(0x1234, 0x23456 - 0x1234, 0, 0)).data == hashlib.md5(content).digest() + b"\0\0"
    )
    host.chip.mark()
    assert host.one(op.ERASE_REGION, pack(0xF000, 0x21000)).data == b"\0\0"
    assert (host.chip.flash.counts.sector_erases, host.chip.flash.counts.block_erases) == (1, 2)
    assert host.chip.model_seconds == pytest.approx(0.045 + 2 * 0.150, abs=0.01)


def test_read_flash_has_one_packet_under_way(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    content = some_bytes(10000)
    host.chip.flash[0x8000 : 0x8000 + 10000] = content
    reply, packet_1 = host.frames(packet(op.READ_FLASH, pack(0x8000, 10000, 4096, 64)))
    assert reply[8:] == b"\0\0"
    got = packet_1
    while len(got) < 10000:
        (more,) = host.frames(pack(len(got)))
        got += more
    assert got == content
    assert host.frames(pack(len(got))) == [hashlib.md5(content).digest()]
    host.frames(packet(op.READ_FLASH, pack(0x8000, 10000, 4096, 64)))
    assert host.frames(b"no") == []  # not four bytes: it is over
    host.raw(bytes(4))
    assert len(host.sync()) == 8


def test_legacy_stub(make: MakeHost) -> None:
    (image,) = [image for image in stub_images("esp32c3") if image.version == 1]
    host = make("esp32c3")
    host.connect()
    for address, data in image.segments:
        host.one(op.MEM_BEGIN, pack(len(data), 1, 0x1800, address))
        host.block(op.MEM_DATA, 0, data)
    assert host.frames(packet(op.MEM_END, pack(0, image.entry)))[-1] == b"OHAI"
    assert host.one(0xD4).data == b"\xff\x00"


# ---- line ------------------------------------------------------------------------------------------------------------


def test_baud_rate_changes_after_the_answer(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    assert host.one(op.CHANGE_BAUDRATE, pack(921600, 115200)).data == b"\0\0"
    assert host.sync() == []  # the host has not changed yet
    host.link.baud = 921600
    host.raw(b"\xc0")
    assert len(host.sync()) == 8


def test_a_stub_left_behind_does_not_answer_at_the_first_rate(make: MakeHost) -> None:
    host = make(stub_baud=921600)
    assert host.sync() == []
    host.link.baud = 921600
    host.raw(b"\xc0" * 2)
    assert [reply.value for reply in host.sync()] == [0] * 8


def test_rom_finds_the_rate_of_the_first_frame(make: MakeHost) -> None:
    host = make()
    host.link.baud = 57600
    assert len(host.sync()) == 8


def test_esp32_rom_sets_the_rate_by_the_crystal_it_believes_in(make: MakeHost) -> None:
    host = make("esp32")
    host.sync()
    cal = host.one(op.READ_REG, pack(0x3FF5F06C)).value >> 7 & 0x1FFFFFF
    ck8m = host.one(op.READ_REG, pack(0x3FF5A010)).value & 0xFF
    idea = cal * 15625 * ck8m / 40
    host.one(op.CHANGE_BAUDRATE, pack(round(921600 * idea / 40e6), 0))
    assert host.chip.report()["baud"] == pytest.approx(921600, rel=1e-4)
    host = make("esp32")
    host.sync()
    host.one(op.CHANGE_BAUDRATE, pack(0, 0))
    assert host.sync() == []  # a rate of nothing kills the link


def test_uart_divider_shows_the_crystal(make: MakeHost) -> None:
    for name, xtal_hz in (("esp32", 40e6), ("esp32c2", 26e6), ("esp32c5", 48e6), ("esp32h2", 32e6)):
        host = make(name)
        host.sync()
        divider = host.one(op.READ_REG, pack(PERSONAS[name].uart_divider)).value
        assert divider * 115200 == pytest.approx(xtal_hz, rel=0.01)


def test_boot_log_comes_before_the_first_frame(tmp_path: Path) -> None:
    flash = Flash(tmp_path / "flash.bin", 1 << 20)
    for name, text in (("esp32", b"waiting for download\r\n"), ("esp32c3", b"wait uart0 download\r\n")):
        chip = Chip(name, flash, DirectLink())
        assert isinstance(chip.link, DirectLink)
        log = chip.link.take()
        assert log.endswith(text)
        assert b"boot:0x" in log
    flash.close()


@pytest.mark.parametrize("swaps", ["tight", "classic"])
def test_control_lines_lead_to_the_rom_loader_and_back(make: MakeHost, swaps: str) -> None:
    host = make(button=False)
    chip = host.chip
    assert chip.mode == "app"
    if swaps == "tight":
        lines = [(False, False), (True, True), (False, True), (True, False), (False, False)]
    else:
        lines = [(False, False), (False, True), (True, True), (True, False)]
    for dtr, rts in lines:
        chip.set_lines(dtr, rts)
    chip.let_pass()
    chip.set_lines(False, False)
    assert chip.mode == "rom" or swaps == "tight"
    if swaps == "classic":
        chip.set_lines(False, True)
        assert chip.mode == "off"
        chip.set_lines(False, False)
        chip.let_pass()
        assert chip.mode == "app"


def test_usb_jtag_lines(make: MakeHost) -> None:
    host = make(model=LinkModel.usb("usj"), button=False)
    chip = host.chip
    for dtr, rts in ((False, False), (True, False), (True, True), (False, True), (False, False)):
        chip.set_lines(dtr, rts)
    assert chip.mode == "rom"
    chip.set_lines(False, True)
    chip.set_lines(False, False)
    assert chip.mode == "app"
    chip.power_cycle(download=True)  # with the button: a reset over USB does not look at it again
    chip.options.button = False
    chip.set_lines(False, True)
    assert chip.mode == "rom"


def test_watchdog_reset_by_registers(make: MakeHost) -> None:
    host = make("esp32c3")
    host.connect()
    host.chip.options.button = False
    dogs = PERSONAS["esp32c3"].watchdogs
    assert dogs is not None
    every = 0xFFFFFFFF
    host.one(op.WRITE_REG, pack(dogs.config0, 0xD0000102, every, 0))
    host.chip.let_pass()
    assert host.chip.mode == "rom"  # it was locked
    writes = ((dogs.protect, dogs.key), (dogs.config1, 2000), (dogs.config0, 0xD0000102), (dogs.protect, 0))
    host.one(op.WRITE_REG, b"".join(pack(address, value, every, 0) for address, value in writes))
    host.chip.let_pass()
    assert host.chip.mode == "app"


def test_watchdogs_of_the_app_bite_unless_switched_off(make: MakeHost) -> None:
    dogs = PERSONAS["esp32c3"].watchdogs
    assert dogs is not None
    every = 0xFFFFFFFF
    off = (
        (dogs.protect, dogs.key, every),
        (dogs.config0, 0, every),
        (dogs.protect, 0, every),
        (dogs.swd_protect, dogs.swd_key, every),
        (dogs.swd_config, 1 << dogs.swd_bit, 1 << dogs.swd_bit),
        (dogs.swd_protect, 0, every),
    )
    for switched_off in (False, True):
        host = make(watchdog_s=2.0)
        host.connect()
        if switched_off:
            host.one(op.WRITE_REG, b"".join(pack(address, value, mask, 0) for address, value, mask in off))
        host.begin(op.FLASH_BEGIN, 0x64000, 0, block_size=0x400)  # 100 sectors: 4.5 s
        resets = host.chip.counts.resets
        host.sync()
        assert host.chip.counts.resets - resets == (0 if switched_off else 1)


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lose-byte", "double-byte", "insert-byte", "flip-byte"])
def test_bytes_on_the_way_are_spoilt(make: MakeHost, kind: str) -> None:
    host = make()
    host.start_stub()
    host.chip.faults.add(Fault(kind, opcode=op.FLASH_DATA, nth=2, position=100, value=0x11))
    host.begin(op.FLASH_BEGIN, 0x1000, 0)
    assert host.block(op.FLASH_DATA, 0, some_bytes(0x800))[0].data == b"\0\0"
    status = host.block(op.FLASH_DATA, 1, some_bytes(0x800, 2))[0].data
    assert status == (b"\xc1\0" if kind == "flip-byte" else b"\xc0\0")


def test_a_flip_into_a_delimiter_cuts_the_frame(make: MakeHost) -> None:
    host = make()
    host.sync()
    body = packet(op.READ_REG, pack(0x40001000))
    host.chip.faults.add(Fault("flip-byte", opcode=op.READ_REG, position=9, value=body[9] ^ 0xC0))
    (reply,) = host.frames(body)
    assert reply[8:10] == b"\x01\x05"  # of what came before the false delimiter
    (reply,) = host.frames(body)
    assert reply[8] == 0


def test_replies_are_lost_and_spoilt(make: MakeHost) -> None:
    host = make()
    host.sync()
    host.chip.faults.add(
        Fault("lose-reply", opcode=op.READ_REG, nth=1),
        Fault("reply-flip-byte", opcode=op.READ_REG, nth=2, position=4, value=1),
        Fault("reply-after-garbage", opcode=op.READ_REG, nth=3),
        Fault("reply-lose-byte", opcode=op.READ_REG, nth=4, position=2),
    )
    body = packet(op.READ_REG, pack(0x40001000))
    assert host.frames(body) == []
    assert int.from_bytes(host.frames(body)[0][4:8], "little") == 0x1B31506F ^ 1
    host.chip.deliver(b"\xc0" + body + b"\xc0")
    assert host.link.take()[:1] != b"\xc0"
    assert len(host.frames(body)[0]) == 11
    assert len(host.frames(body)[0]) == 12


@pytest.mark.parametrize("stub", [True, False])
def test_md5_lies(make: MakeHost, stub: bool) -> None:
    host = make()
    if stub:
        host.start_stub()
    else:
        host.connect()
    host.chip.faults.add(Fault("wrong-md5"))
    ask = pack(0, 4096, 0, 0)
    assert host.one(op.SPI_FLASH_MD5, ask).data != host.one(op.SPI_FLASH_MD5, ask).data


def test_chip_resets_itself_in_mid_stream(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.begin(op.FLASH_BEGIN, 0x1000, 0)
    host.chip.faults.add(Fault("reset", opcode=op.FLASH_DATA))
    host.chip.deliver(b"\xc0" + data_packet(op.FLASH_DATA, 0, bytes(100)) + b"\xc0")
    assert b"wait uart0 download" in host.link.take()
    assert [reply.value for reply in host.sync()] == [0x20120707] * 8
    host.chip.faults.add(Fault("reset-to-app", opcode=op.READ_REG))
    host.chip.deliver(b"\xc0" + packet(op.READ_REG, pack(0)) + b"\xc0")
    assert b"invalid header" in host.link.take()
    assert host.chip.mode == "app"
    assert host.sync() == []


def test_stub_that_never_starts_and_rate_that_is_wrong(make: MakeHost) -> None:
    host = make()
    host.connect()
    host.chip.faults.add(Fault("no-ohai"), Fault("no-mem-end-reply"))
    host.one(op.MEM_BEGIN, pack(16, 1, 16, 0x40380000))
    host.block(op.MEM_DATA, 0, bytes(16))
    assert host.frames(packet(op.MEM_END, pack(0, 0x40380000))) == []
    host = make()
    host.sync()
    host.chip.faults.add(Fault("wrong-baud"))
    assert host.one(op.CHANGE_BAUDRATE, pack(460800, 0)).data[0] == 0
    host.link.baud = 460800
    assert host.sync() == []


def test_power_cut_between_commands(make: MakeHost) -> None:
    for kind, erased in (("power-cut", False), ("power-cut-after", True)):
        host = make()
        host.start_stub()
        host.chip.flash[0:0x1000] = bytes(0x1000)
        host.chip.faults.add(Fault(kind, opcode=op.ERASE_REGION))
        host.all_of(op.ERASE_REGION, pack(0, 0x1000))
        assert host.chip.mode == "off"
        assert (host.chip.flash[0:0x1000] == FF * 0x1000) == erased
        assert host.sync() == []
        host.chip.power_cycle()
        host.link.take()
        assert len(host.sync()) == 8


def test_power_cut_in_the_middle_of_a_program_and_of_an_erase(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    flash = host.chip.flash
    host.chip.mark()
    flash.faults.power_cut_after = 3
    host.begin(op.FLASH_BEGIN, 0x1000, 0x1000)
    host.block(op.FLASH_DATA, 0, bytes(0x1000))
    host.chip.settle()
    assert host.chip.mode == "off"
    assert flash[0x1000:0x2000] == bytes(3 * 256 + 128) + FF * (0x1000 - 3 * 256 - 128)

    host.chip.power_cycle()
    host.start_stub()
    flash[0x3000:0x5000] = bytes(0x2000)
    host.chip.mark()
    flash.faults.power_cut_after = 1
    assert host.all_of(op.ERASE_REGION, pack(0x3000, 0x2000)) == []
    assert host.chip.mode == "off"
    assert flash[0x3000:0x4000] == FF * 0x1000
    torn = flash[0x4000:0x5000]
    assert torn not in (bytes(0x1000), FF * 0x1000)


def test_faults_are_read_from_text() -> None:
    fault = Fault.parse("flip-byte,opcode=0x11,nth=3,position=-1,value=0x80")
    assert (fault.kind, fault.opcode, fault.nth, fault.position, fault.value) == ("flip-byte", 0x11, 3, -1, 0x80)
    for text in ("nonsense", "hang,when=3", "hang,nth=many"):
        with pytest.raises(ValueError):
            Fault.parse(text)


# ---- time ------------------------------------------------------------------------------------------------------------


def write_deflated(host: Host, data: bytes, offset: int, *, level: int = 9) -> int:
    """As a host does that waits for each answer; compressed bytes."""
    stream = zlib.compress(data, level)
    host.begin(op.FLASH_DEFL_BEGIN, len(data), offset, blocks=(len(stream) + 0x3FFF) // 0x4000)
    for seq, at in enumerate(range(0, len(stream), 0x4000)):
        assert host.block(op.FLASH_DEFL_DATA, seq, stream[at : at + 0x4000])[0].data == b"\0\0"
    assert host.one(op.FLASH_DEFL_END, pack(1)).data == b"\0\0"
    return len(stream)


@pytest.fixture(scope="module")
def application() -> bytes:
    """1.5 MiB that deflate to 0.6."""
    rng = random.Random(3)
    data = b"".join(rng.randbytes(600) + b"\0" * 400 for _ in range(1573))[: 1536 << 10]
    assert len(zlib.compress(data)) / len(data) == pytest.approx(0.61, abs=0.02)
    return data


@pytest.mark.parametrize(
    ("baud", "dirty", "least", "most"),
    [
        (115200, True, 82, 86),  # the wire decides
        (460800, True, 20.5, 22),
        (921600, True, 10.3, 13.0),  # both, in steps of 32 KiB that do not fit the blocks
        (2_000_000, True, 10.0, 11.0),  # the flash decides
        (2_000_000, False, 7.3, 8.5),  # blank: it erases nothing
    ],
)
def test_write_takes_what_wire_and_flash_take_overlapped(
    make: MakeHost, application: bytes, baud: int, dirty: bool, least: float, most: float
) -> None:
    """The limits of the data sheets: wire alone, or erases and programs alone, plus what cannot overlap."""
    host = make(model=LinkModel(baud=baud))
    host.start_stub()
    if dirty:
        host.chip.flash[0x10000 : 0x10000 + len(application)] = bytes(len(application))
    host.chip.mark()
    write_deflated(host, application, 0x10000)
    assert host.chip.flash[0x10000 : 0x10000 + len(application)] == application
    assert least < host.chip.model_seconds < most
    assert host.chip.flash.counts.block_erases == (24 if dirty else 0)


def test_rom_write_takes_wire_plus_flash(make: MakeHost, application: bytes) -> None:
    host = make(model=LinkModel(baud=921600))
    host.connect()
    host.chip.mark()
    data = application[:0x40000]
    host.begin(op.FLASH_BEGIN, len(data), 0, block_size=0x400)
    for seq, at in enumerate(range(0, len(data), 0x400)):
        host.block(op.FLASH_DATA, seq, data[at : at + 0x400])
    wire_s = host.chip.counts.bytes_in * 10 / 921600
    flash_s = 64 * 0.045 + 1024 * 8 * 0.1384e-3 + len(data) / 2.6e6
    turns_s = 257 * 0.0023
    assert host.chip.model_seconds == pytest.approx(wire_s + flash_s + turns_s, rel=0.03)


def test_round_trips_cost_a_turn_around(make: MakeHost) -> None:
    for turn_around_s in (0.001, 0.016):
        host = make(model=LinkModel(turn_around_s=turn_around_s, baud=115200))
        host.sync()
        host.chip.mark()
        for _ in range(100):
            host.one(op.READ_REG, pack(0x40001000))
        wire_s = 100 * (14 + 14) * 10 / 115200
        assert host.chip.model_seconds == pytest.approx(wire_s + 100 * turn_around_s, rel=0.08)


def test_usb_has_its_own_speed(make: MakeHost) -> None:
    host = make(model=LinkModel.usb("usj", usb_bytes_per_s=400_000))
    host.start_stub()
    host.chip.flash.timing = FlashTiming.named("none")
    host.chip.mark()
    data = some_bytes(400_000)
    write_deflated(host, data, 0x10000)
    assert host.chip.model_seconds == pytest.approx(1.03, abs=0.03)


def test_slow_sectors_are_slow(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.chip.flash.faults.slow_sectors[0x3000] = 20
    host.chip.mark()
    host.one(op.ERASE_REGION, pack(0x2000, 0x3000))
    assert host.chip.model_seconds == pytest.approx(22 * 0.045, rel=0.01)


def test_counts(make: MakeHost) -> None:
    host = make()
    host.start_stub()
    host.chip.mark()
    host.begin(op.FLASH_BEGIN, 0x1000, 0x80)
    host.block(op.FLASH_DATA, 0, bytes(0x1000))
    host.one(op.FLASH_END, pack(1))
    report = host.chip.report()
    assert report["commands"] == {"FLASH_BEGIN": 1, "FLASH_DATA": 1, "FLASH_END": 1}
    assert report["command_count"] == 3
    assert report["flash"]["pages_programmed"] == 17
    assert report["bytes_out"] == 3 * 12
    assert report["bytes_in"] == (2 + 8 + 16) + (2 + 8 + 16 + 0x1000) + (2 + 8 + 4)
