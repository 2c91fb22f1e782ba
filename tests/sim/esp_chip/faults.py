"""What goes wrong on the line and in the chip, at an exact command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.sim.esp_chip.opcodes import SPI_FLASH_MD5

# of a frame on its way to the chip
LOSE_FRAME = "lose-frame"
LOSE_BYTE = "lose-byte"
DOUBLE_BYTE = "double-byte"
FLIP_BYTE = "flip-byte"
INSERT_BYTE = "insert-byte"
# of an answer
LOSE_REPLY = "lose-reply"
REPLY_LOSE_BYTE = "reply-lose-byte"
REPLY_FLIP_BYTE = "reply-flip-byte"
REPLY_DOUBLE_BYTE = "reply-double-byte"
REPLY_INSERT_BYTE = "reply-insert-byte"
REPLY_AFTER_GARBAGE = "reply-after-garbage"
WRONG_MD5 = "wrong-md5"
# of the chip
RESET = "reset"  # in the middle of receiving the command
RESET_TO_APP = "reset-to-app"
HANG = "hang"  # instead of carrying it out
POWER_CUT = "power-cut"  # before it is carried out
POWER_CUT_AFTER = "power-cut-after"  # and answered
UNPLUG = "unplug"  # before it is carried out; the chip keeps its power
UNPLUG_AND_RETURN = "unplug-and-return"  # the chip loses its power and comes back under another port name
WRONG_BAUD = "wrong-baud"  # CHANGE_BAUDRATE answers well and sets 7 % too much
NO_OHAI = "no-ohai"
NO_MEM_END_REPLY = "no-mem-end-reply"
STALL = "stall"  # the line takes no more bytes after this command: the host's write() blocks

ON_FRAME = (LOSE_FRAME, LOSE_BYTE, DOUBLE_BYTE, FLIP_BYTE, INSERT_BYTE)
ON_REPLY = (
    LOSE_REPLY,
    REPLY_LOSE_BYTE,
    REPLY_FLIP_BYTE,
    REPLY_DOUBLE_BYTE,
    REPLY_INSERT_BYTE,
    REPLY_AFTER_GARBAGE,
    WRONG_MD5,
)
ON_COMMAND = (RESET, RESET_TO_APP, HANG, POWER_CUT, UNPLUG, UNPLUG_AND_RETURN)
AFTER_COMMAND = (POWER_CUT_AFTER, STALL)
IN_COMMAND = (WRONG_BAUD, NO_OHAI, NO_MEM_END_REPLY)
KINDS = (*ON_FRAME, *ON_REPLY, *ON_COMMAND, *AFTER_COMMAND, *IN_COMMAND)


@dataclass(slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: a name of this module's list.
        opcode: of the commands that are counted; None: all.
        nth: at the n-th of them, from 1.
        count: and so many more after it, less one.
        position: byte of the frame between its delimiters, as it stands on the wire; negative ones count from the end.
        value: byte that is inserted, or bits that are flipped.
        seen: how many matching commands went by; kept by the chip.
        fired: how often it happened.
    """

    kind: str
    opcode: int | None = None
    nth: int = 1
    count: int = 1
    position: int = 0
    value: int = 0x10
    seen: int = 0
    fired: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault is called {self.kind!r}")
        if self.kind == WRONG_MD5:
            self.opcode = SPI_FLASH_MD5

    @classmethod
    def parse(cls, text: str) -> Fault:
        """``KIND[,opcode=0x11][,nth=3][,position=20][,value=1][,count=2]``.

        Raises:
            ValueError: not of that form.
        """
        kind, *rest = text.split(",")
        numbers: dict[str, int] = {}
        for item in rest:
            name, _, number = item.partition("=")
            if name not in ("opcode", "nth", "count", "position", "value"):
                raise ValueError(f"a fault has no {name!r}")
            numbers[name] = int(number, 0)
        return cls(kind, **numbers)

    def matches(self, opcode: int) -> bool:
        """Counts the command."""
        if self.opcode is not None and self.opcode != opcode:
            return False
        self.seen += 1
        if self.nth <= self.seen < self.nth + self.count:
            self.fired += 1
            return True
        return False


class Faults:
    """All that goes wrong with one chip. Each fault counts for itself."""

    def __init__(self) -> None:
        self.all: list[Fault] = []

    def add(self, *faults: Fault) -> None:
        self.all.extend(faults)

    def clear(self) -> None:
        self.all.clear()

    def at(self, kinds: tuple[str, ...], opcode: int) -> Iterator[Fault]:
        """Those of these kinds that happen at this command."""
        for fault in self.all:
            if fault.kind in kinds and fault.matches(opcode):
                yield fault


def spoil(body: bytes, fault: Fault, prefix: str = "") -> bytes:
    """A frame's bytes after the fault."""
    if not body:
        return body
    at = fault.position % len(body)
    kind = fault.kind.removeprefix(prefix)
    if kind == LOSE_BYTE:
        return body[:at] + body[at + 1 :]
    if kind == DOUBLE_BYTE:
        return body[: at + 1] + body[at:]
    if kind == FLIP_BYTE:
        return body[:at] + bytes((body[at] ^ (fault.value & 0xFF),)) + body[at + 1 :]
    if kind == INSERT_BYTE:
        return body[:at] + bytes((fault.value & 0xFF,)) + body[at:]
    raise ValueError(fault.kind)
