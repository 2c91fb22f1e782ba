"""A small host that says exactly what a test wants to say: for tests of the double, and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.sim.esp_chip import opcodes as op
from tests.sim.esp_chip import slip
from tests.sim.esp_chip.chip import Chip
from tests.sim.esp_chip.links import DirectLink

SYNC_DATA = b"\x07\x07\x12\x20" + b"\x55" * 32
STUB_ENTRY = 0x40380000


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. ``data``: all behind the header, status bytes too."""

    opcode: int
    value: int
    data: bytes


def packet(opcode: int, data: bytes = b"", checksum: int = 0) -> bytes:
    return struct.pack("<BBHI", 0, opcode, len(data), checksum) + data


def data_packet(opcode: int, seq: int, block: bytes, *, checksum: int | None = None) -> bytes:
    checksum = op.xor_all(block) if checksum is None else checksum
    return packet(opcode, struct.pack("<4I", len(block), seq, 0, 0) + block, checksum)


def pack(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)


class Host:
    """Talks to a chip on a `DirectLink`.

    Args:
        chip: not started.
    """

    def __init__(self, chip: Chip) -> None:
        assert isinstance(chip.link, DirectLink)
        self.chip = chip
        self.link: DirectLink = chip.link
        self.link.take()

    def frames(self, *payloads: bytes, gap: bytes = b"") -> list[bytes]:
        """Sends frames in one go, ``gap`` between them; frames that came back, with text between them left out."""
        return self.raw(gap.join(slip.encode(payload) for payload in payloads))

    def raw(self, data: bytes) -> list[bytes]:
        self.chip.deliver(data)
        return [frame for frame in map(slip.decode, self.link.take().split(slip.END)[1::2]) if frame]

    def all_of(self, opcode: int, data: bytes = b"", checksum: int = 0) -> list[Reply]:
        return [_reply(frame) for frame in self.frames(packet(opcode, data, checksum))]

    def one(self, opcode: int, data: bytes = b"", checksum: int = 0) -> Reply:
        (reply,) = self.all_of(opcode, data, checksum)
        return reply

    def block(self, opcode: int, seq: int, block: bytes, *, checksum: int | None = None) -> list[Reply]:
        return [_reply(frame) for frame in self.frames(data_packet(opcode, seq, block, checksum=checksum))]

    # ---- usual steps -------------------------------------------------------------------------------------------------

    def sync(self) -> list[Reply]:
        return self.all_of(op.SYNC, SYNC_DATA)

    def connect(self) -> None:
        """To the ROM loader, with the flash attached and its size set."""
        assert len(self.sync()) == 8
        assert self.one(op.SPI_ATTACH, bytes(8)).data[0] == 0
        self.one(op.SPI_SET_PARAMS, pack(0, self.chip.flash.size, 0x10000, 0x1000, 0x100, 0xFFFF))

    def start_stub(self, program: bytes = b"\x01" * 3000, entry: int = STUB_ENTRY) -> None:
        """Uploads a program that the chip takes for a stub."""
        self.connect()
        blocks = [program[at : at + 0x1800] for at in range(0, len(program), 0x1800)]
        assert self.one(op.MEM_BEGIN, pack(len(program), len(blocks), 0x1800, entry)).data[0] == 0
        for seq, block in enumerate(blocks):
            assert self.block(op.MEM_DATA, seq, block)[0].data[0] == 0
        end, hello = self.frames(packet(op.MEM_END, pack(0, entry)))
        assert end[8] == 0
        assert hello == b"OHAI"

    def begin(
        self, opcode: int, size: int, offset: int, *, blocks: int | None = None, block_size: int = 0x4000
    ) -> Reply:
        count = (size + block_size - 1) // block_size if blocks is None else blocks
        words: Sequence[int] = (size, count, block_size, offset)
        if self.chip.mode == "rom" and self.chip.persona.begin_size == 20:
            words = (*words, 0)
        return self.one(opcode, pack(*words))


def _reply(frame: bytes) -> Reply:
    direction, opcode, size, value = struct.unpack_from("<BBHI", frame)
    assert direction == 1
    assert size == len(frame) - 8
    return Reply(opcode, value, frame[8:])
