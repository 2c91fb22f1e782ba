"""Registers as a host reads and writes them: identity, UART divider, watchdogs, and SPI transfers with the flash."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.esp_chip.personas import MAC, Persona

if TYPE_CHECKING:
    from tests.sim.esp_chip.flash import Flash

CHIP_MAGIC = 0x40001000
_USER_COMMAND = 1 << 18
_SLOW_CLOCK_HZ = 150_000.0


class Registers:
    """The address space of one chip, as far as hosts look at it. What nobody wrote reads as 0.

    Args:
        persona: whose.
        flash: on the SPI pads.
        baud: what the UART runs at now.
        arm_watchdog: called with the seconds after which the RTC watchdog resets the system.
        mac: six bytes.
    """

    def __init__(
        self,
        persona: Persona,
        flash: Flash,
        *,
        baud: Callable[[], float],
        arm_watchdog: Callable[[float], None],
        mac: bytes = MAC,
    ) -> None:
        self._persona = persona
        self._flash = flash
        self._baud = baud
        self._arm_watchdog = arm_watchdog
        self.flash_attached = False
        self._words: dict[int, int] = dict(persona.registers)
        if persona.magic is not None:
            self._words[CHIP_MAGIC] = persona.magic
        self._words[persona.mac] = int.from_bytes(mac[2:], "big")
        self._words[persona.mac + 4] = self._words.get(persona.mac + 4, 0) | int.from_bytes(mac[:2], "big")
        self._spi = persona.spi
        offsets = (0x1C, 0x20, 0x24, 0x28, 0x2C, 0x80) if persona.spi_old else (0x18, 0x1C, 0x20, 0x24, 0x28, 0x58)
        self._usr, self._usr1, self._usr2, self._mosi, self._miso, self._w0 = (self._spi + off for off in offsets)
        self.swd_fed = False  # the super-watchdog feeds itself
        watchdogs = persona.watchdogs
        self._open_locks: set[int] = set()
        self._locks = (
            {} if watchdogs is None else {watchdogs.protect: watchdogs.key, watchdogs.swd_protect: watchdogs.swd_key}
        )
        self._locks.pop(0, None)

    def read(self, address: int) -> int:
        if address == self._persona.uart_divider:
            return round(self._persona.xtal_hz / self._baud())
        return self._words.get(address, 0)

    def write(self, address: int, value: int, mask: int) -> None:
        value = (self.read(address) & ~mask | value & mask) & 0xFFFFFFFF
        watchdogs = self._persona.watchdogs
        if address in self._locks:
            if value == self._locks[address]:
                self._open_locks.add(address)
            else:
                self._open_locks.discard(address)
        elif watchdogs is not None and address in (watchdogs.config0, watchdogs.config1):
            if watchdogs.protect not in self._open_locks:
                return  # still locked: the write does nothing
            self._words[address] = value
            if address == watchdogs.config0 and value & 1 << 31:
                self._arm_watchdog(self._words.get(watchdogs.config1, 0) / _SLOW_CLOCK_HZ)
            return
        elif watchdogs is not None and address == watchdogs.swd_config != 0:
            if watchdogs.swd_protect not in self._open_locks:
                return
            self.swd_fed = bool(value >> watchdogs.swd_bit & 1)
        self._words[address] = value
        if address == self._spi and value & _USER_COMMAND:
            self._transfer()
            self._words[address] = value & ~_USER_COMMAND

    def run_watchdogs(self) -> None:
        """As an app leaves them when only the core was reset."""
        watchdogs = self._persona.watchdogs
        if watchdogs is not None:
            self._words[watchdogs.config0] = 1 << 31

    @property
    def watchdogs_off(self) -> bool:
        """Whether the host stopped the RTC watchdog and has the super-watchdog feed itself."""
        watchdogs = self._persona.watchdogs
        if watchdogs is None:
            return True
        return not self._words.get(watchdogs.config0, 0) >> 31 and (self.swd_fed or not watchdogs.swd_config)

    def _transfer(self) -> None:
        """One SPI transaction of the "user" registers with the flash."""
        user = self._words.get(self._usr, 0)
        if not user & 1 << 31:
            return
        command = self._words.get(self._usr2, 0) & 0xFF
        if not user & 1 << 28:
            return
        bits = (self._words.get(self._miso, 0) & 0x3FF) + 1
        size = (bits + 7) // 8
        answer = self._answer(command, size) if self.flash_attached else b"\xff" * size
        answer = answer.ljust((size + 3) // 4 * 4, b"\0")
        for index, word in enumerate(struct.unpack(f"<{len(answer) // 4}I", answer)):
            self._words[self._w0 + 4 * index] = word

    def _answer(self, command: int, size: int) -> bytes:
        if command == 0x9F:  # RDID
            return (self._flash.jedec_id + bytes(size))[:size]
        if command == 0x5A:  # SFDP
            return (b"SFDP\x06\x01\x00\xff" + bytes(size))[:size]
        return bytes(size)  # status: not busy, nothing protected
