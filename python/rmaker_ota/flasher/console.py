"""What a chip says after a restart: whether the new image is well. No clock, no line: it is fed bytes and asked.

The console of an ESP32 carries the boot ROM's log, the boot loader's, and the application's. The first restart is the
one that was asked for; a second one in the log, a panic, a refused image or another slot than the one expected mean
that the new image is not well, whatever it says later.

Source: ESP-IDF panic handler and boot loader messages (esp_system/panic.c, bootloader_utility.c, esp_image_format.c).
"""

from __future__ import annotations

import enum
import re

from rmaker_ota.errors import ConfigError
from rmaker_ota.records import dataclass

LINE_MAX = 1024
"""Longer lines are looked at in pieces of so many bytes."""

PATTERN_MAX = 512

# A line that has one of these tells of a crash, or of an image that the boot loader does not start.
_CRASHES = (
    re.compile(r"Guru Meditation Error"),
    re.compile(r"Fatal exception"),
    re.compile(r"abort\(\) was called at"),
    re.compile(r"assert failed: "),
    re.compile(r"^Backtrace: ?0x"),
    re.compile(r"Task watchdog got triggered"),
    re.compile(r"Brownout detector was triggered"),
    re.compile(r"\*\*\*ERROR\*\*\* A stack overflow in task"),
    re.compile(r"No bootable (app|test app) partitions"),
    re.compile(r"esp_image: .*(invalid|failed|mismatch|corrupt)", re.IGNORECASE),
    re.compile(r"invalid header: 0x"),
)
_RESET = re.compile(r"rst:0x[0-9a-f]+ \((\w+)\),\s?boot:0x[0-9a-f]+ \(([\w/]+)\)")
_WAITS = re.compile(r"wait(ing for| uart0?| usb)? ?download", re.IGNORECASE)
_LOADED = re.compile(r"Loaded app from partition at offset 0x([0-9a-fA-F]{1,8})")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Verdict(enum.Enum):
    """What the console told so far."""

    NOTHING = "nothing yet"
    WELL = "well"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class ConsoleReport:
    """How the watch ended. ``line`` is the line that decided, or why nothing did; control characters are replaced."""

    verdict: Verdict
    line: str

    @property
    def is_well(self) -> bool:
        return self.verdict is Verdict.WELL


class ConsoleWatch:
    """Judges a console.

    Args:
        success: regular expression of a line that says all is well; None: no line does, only time tells.
        slot_offset: where the image that should run lies in flash, bytes; None: not compared.

    Raises:
        ConfigError: the expression is none.
    """

    def __init__(self, success: str | None = None, *, slot_offset: int | None = None) -> None:
        if success is not None and len(success) > PATTERN_MAX:
            raise ConfigError(f"the pattern has {len(success)} characters, at most {PATTERN_MAX} are possible")
        try:
            self._success = None if success is None else re.compile(success)
        except (re.error, RecursionError, OverflowError) as exc:
            raise ConfigError(f"the pattern {success!r} is no regular expression: {exc}") from exc
        self._slot_offset = slot_offset
        self._rest = b""
        self._resets = 0
        self._lines = 0
        self.report = ConsoleReport(Verdict.NOTHING, "")

    def feed(self, data: bytes) -> Verdict:
        """The next bytes from the chip. After the first verdict nothing is looked at any more."""
        if self.report.verdict is not Verdict.NOTHING:
            return self.report.verdict
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        while len(self._rest) > LINE_MAX:
            lines.append(self._rest[:LINE_MAX])
            self._rest = self._rest[LINE_MAX:]
        for raw in lines:
            while raw:
                self._judge(raw[:LINE_MAX])
                raw = raw[LINE_MAX:]  # noqa: PLW2901
            if self.report.verdict is not Verdict.NOTHING:
                break
        return self.report.verdict

    def end(self) -> ConsoleReport:
        """Time is over. A line that has not ended counts too; without a pattern, no bad word is a good one."""
        if self.report.verdict is Verdict.NOTHING and self._rest:
            self._judge(self._rest)
            self._rest = b""
        if self.report.verdict is Verdict.NOTHING:
            if self._success is None:
                said = f"{self._lines} lines without a crash" if self._lines else "it stayed silent"
                self.report = ConsoleReport(Verdict.WELL, said)
            else:
                said = "no line matched" if self._lines else "it stayed silent"
                self.report = ConsoleReport(Verdict.BAD, f"{said}, expected {self._success.pattern!r}")
        return self.report

    def _judge(self, raw: bytes) -> None:
        line = _COLOURS.sub("", raw.decode("utf-8", "replace")).strip()
        if not line or self.report.verdict is not Verdict.NOTHING:
            return
        self._lines += 1
        if self._is_bad(line):
            self.report = ConsoleReport(Verdict.BAD, printable(line))
        elif self._success is not None and self._success.search(line):
            self.report = ConsoleReport(Verdict.WELL, printable(line))

    def _is_bad(self, line: str) -> bool:
        if any(pattern.search(line) for pattern in _CRASHES) or _WAITS.search(line):
            return True
        reset = _RESET.search(line)
        if reset is not None:
            self._resets += 1
            return self._resets > 1
        loaded = _LOADED.search(line)
        return loaded is not None and self._slot_offset is not None and int(loaded[1], 16) != self._slot_offset


def printable(line: str) -> str:
    """A line from a chip as it can be shown: at most 200 characters, none that moves a cursor."""
    return "".join(char if char.isprintable() else "?" for char in line[:200])


__all__ = ["ConsoleReport", "ConsoleWatch", "Verdict", "printable"]
