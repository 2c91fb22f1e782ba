"""What the chips of the ESP32 family have different before a program runs on them: one row each.

Addresses are those of each chip's technical reference manual. What a row does not say of a register reads as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAC = bytes.fromhex("a0b1c2d3e4f5")

_SWD_KEY = 0x8F1D312A
_WDT_KEY = 0x50D83AA1


@dataclass(frozen=True, slots=True)
class Watchdogs:
    """The RTC watchdog and the super-watchdog: addresses, and the keys that unlock them."""

    config0: int
    config1: int
    protect: int
    swd_config: int = 0  # 0: the chip has none
    swd_bit: int = 0
    swd_protect: int = 0
    swd_key: int = 0
    key: int = _WDT_KEY


@dataclass(frozen=True, slots=True)
class Persona:
    """One chip.

    Attributes:
        name: as the flashing tools write it.
        chip_id: in image headers and in the security info.
        magic: what 0x40001000 holds; None: cannot be read.
        begin_size: bytes of data that FLASH_BEGIN takes of the ROM loader, exactly.
        security_info_size: bytes of GET_SECURITY_INFO; 0: the command is unknown.
        spi: base address of the controller the flash hangs on.
        spi_old: it has the ESP32's register layout.
        uart_divider: address of the divider of UART0; 0: not read by tools.
        xtal_hz: of the crystal.
        rom_xtal_hz: what the ROM loader takes for it when it computes a baud rate.
        mac: address of the low word of the MAC; the high word follows.
        bootloader_offset: where in flash the ROM looks.
        end_survives: FLASH_END leaves a ROM loader that goes on.
        data_needs_begin: FLASH_DATA without FLASH_BEGIN is refused.
        power_on: the reset reason after that.
        eco: its number in the security info.
        more_stubs: names of stubs for other revisions of it; the usual one has the chip's name.
        watchdogs: None: no watchdog that a host has to know.
        registers: further registers, address -> value after reset.
        boot_log: what it prints before the reset reason.
        waiting: what it prints when it waits for the first frame.
        reset_download, reset_flash: the boot field of either mode.
    """

    name: str
    chip_id: int
    magic: int | None
    mac: int
    uart_divider: int = 0x60000014
    begin_size: int = 20
    security_info_size: int = 20
    eco: int = 0
    spi: int = 0x60002000
    spi_old: bool = False
    xtal_hz: float = 40e6
    rom_xtal_hz: float = 40e6
    bootloader_offset: int = 0
    end_survives: bool = False
    data_needs_begin: bool = False
    watchdogs: Watchdogs | None = None
    registers: Mapping[int, int] = field(default_factory=dict)
    boot_log: str = "ESP-ROM:{name}\r\nBuild:Jan  1 2022\r\n"
    waiting: str = "wait uart0 download\r\n"
    reset_download: str = "0x2 (UART0_BOOT)"
    reset_flash: str = "0xc (SPI_FAST_FLASH_BOOT)"
    power_on: str = "POWERON"
    more_stubs: tuple[str, ...] = ()


def _rwdt_c6(protect: int, swd_config: int, swd_protect: int) -> Watchdogs:
    return Watchdogs(0x600B1C00, 0x600B1C04, protect, swd_config, 18, swd_protect, _WDT_KEY)


_ALL = (
    Persona(
        "esp32",
        0,
        0x00F01D83,
        0x3FF5A004,
        uart_divider=0x3FF40014,
        begin_size=16,
        security_info_size=0,
        spi=0x3FF42000,
        spi_old=True,
        # the ROM measures its crystal against the 8 MHz oscillator: 1 % off, as chips are
        rom_xtal_hz=808 * 15625 * 128 / 40,
        bootloader_offset=0x1000,
        end_survives=True,
        data_needs_begin=True,
        registers={
            0x3FF5F06C: 808 << 7,  # calibration of the 8 MHz oscillator
            0x3FF5A010: 128,  # eFuse: the oscillator's frequency
            0x3FF5A00C: 1 << 15,  # eFuse: revision bit 0
            0x3FF5A014: 1 << 20,  # eFuse: revision bit 1
            0x3FF6607C: 1 << 31,  # APB date: revision bit 2
        },
        boot_log="ets Jul 29 2019 12:21:46\r\n\r\n",
        waiting="waiting for download\r\n",
        reset_download="0x3 (DOWNLOAD_BOOT(UART0/UART1/SDIO_REI_REO_V2))",
        reset_flash="0x13 (SPI_FAST_FLASH_BOOT)",
        power_on="POWERON_RESET",
    ),
    Persona(
        "esp32s2",
        2,
        0x000007C6,
        0x3F41A044,
        uart_divider=0x3F400014,
        security_info_size=12,
        spi=0x3F402000,
        bootloader_offset=0x1000,
        watchdogs=Watchdogs(0x3F408094, 0x3F408098, 0x3F4080AC),
        registers={0x3F404038: 8, 0x3F41A050: 1 << 18},  # GPIO0 high at reset; revision 1.0
        boot_log="ESP-ROM:esp32s2-rc4-20191025\r\nBuild:Oct 25 2019\r\n",
    ),
    Persona(
        "esp32s3",
        9,
        0x00000009,
        0x60007044,
        watchdogs=Watchdogs(0x60008098, 0x6000809C, 0x600080B0, 0x600080B4, 31, 0x600080B8, _SWD_KEY),
        registers={0x60004038: 8, 0x60007050: 2 << 18},  # GPIO0 high at reset; revision 0.2
        boot_log="ESP-ROM:esp32s3-20210327\r\nBuild:Mar 27 2021\r\n",
        waiting="waiting for download\r\n",
        reset_download="0x0 (DOWNLOAD(USB/UART0))",
        reset_flash="0x8 (SPI_FAST_FLASH_BOOT)",
    ),
    Persona(
        "esp32c2",
        12,
        0x7C41A06F,
        0x60008840,
        xtal_hz=26e6,
        watchdogs=Watchdogs(0x60008084, 0x60008088, 0x6000809C),
        registers={0x60008844: 1 << 20},  # revision 1.0, beside the MAC
        boot_log="ESP-ROM:esp8684-api2-20220127\r\nBuild:Jan 27 2022\r\n",
    ),
    Persona(
        "esp32c3",
        5,
        0x1B31506F,
        0x60008844,
        watchdogs=Watchdogs(0x60008090, 0x60008094, 0x600080A8, 0x600080AC, 31, 0x600080B0, _SWD_KEY),
        registers={0x60008850: 4 << 18},  # revision 0.4
        boot_log="ESP-ROM:esp32c3-api1-20210207\r\nBuild:Feb  7 2021\r\n",
    ),
    Persona(
        "esp32c5",
        23,
        0x5FD1406F,
        0x600B4844,
        spi=0x60003000,
        xtal_hz=48e6,
        rom_xtal_hz=48e6,
        bootloader_offset=0x2000,
        watchdogs=_rwdt_c6(0x600B1C18, 0x600B1C1C, 0x600B1C20),
        registers={0x60096110: 48 << 24, 0x600B484C: 1 << 4},  # the ROM's crystal; revision 1.0
    ),
    Persona(
        "esp32c6",
        13,
        0x2CE0806F,
        0x600B0844,
        spi=0x60003000,
        watchdogs=_rwdt_c6(0x600B1C18, 0x600B1C1C, 0x600B1C20),
        registers={0x600B0850: 1 << 18},  # revision 0.1
        boot_log="ESP-ROM:esp32c6-20220919\r\nBuild:Sep 19 2022\r\n",
    ),
    Persona(
        "esp32c61",
        20,
        0x7211606F,
        0x600B4844,
        spi=0x60003000,
        watchdogs=_rwdt_c6(0x600B1C18, 0x600B1C1C, 0x600B1C20),
    ),
    Persona(
        "esp32h2",
        16,
        0xD7B73E80,
        0x600B0844,
        spi=0x60003000,
        xtal_hz=32e6,
        rom_xtal_hz=32e6,
        watchdogs=_rwdt_c6(0x600B1C1C, 0x600B1C20, 0x600B1C24),
    ),
    Persona(
        "esp32p4",
        18,
        None,
        0x5012D044,
        uart_divider=0,
        eco=5,
        more_stubs=("esp32p4-rev1",),
        registers={0x5012D04C: 3 << 4},  # revision 3.0
        spi=0x5008D000,
        bootloader_offset=0x2000,
        watchdogs=Watchdogs(0x50116000, 0x50116004, 0x50116018, 0x5011601C, 18, 0x50116020, _WDT_KEY),
    ),
)

PERSONAS: Mapping[str, Persona] = {persona.name: persona for persona in _ALL}
