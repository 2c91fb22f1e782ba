"""What is known of a chip behind a serial line."""

from __future__ import annotations

from rmaker_ota.records import dataclass


@dataclass(frozen=True, slots=True)
class ChipFacts:
    """What one session learned about a device, for the next one (``ota_flasher_facts``).

    Attributes:
        chip_id: as in image headers.
        mac: 6 bytes.
        revision: major * 100 + minor; None: not known.
        flash_id: JEDEC id; vendor | type << 8 | size code << 16.
        flash_size: bytes.
        baud: rate that worked; 0: not known.
        rom_clock: crystal as the boot ROM sees it; 0: not known.
    """

    chip_id: int
    mac: bytes
    revision: int | None
    flash_id: int
    flash_size: int
    baud: int = 0
    rom_clock: int = 0


@dataclass(frozen=True, slots=True)
class ChipInfo:
    """A connected chip (``ota_flasher_info``).

    Attributes:
        chip, title: ``"esp32c3"``, ``"ESP32-C3"``.
        chip_id: as in image headers.
        mac: ``"34:85:18:aa:bb:cc"``; None where it cannot be read (secure download mode).
        revision: major * 100 + minor; None: not known (yet).
        flash_id: JEDEC id; 0: cannot be read.
        flash_size: bytes; assumed when not ``flash_size_known``.
        stub: name of the stub that does the work; None: the boot ROM.
        stub_was_running: it was left by an earlier session.
        baud: bits per second; None: the line has no rate.
        link: ``"uart"``, ``"usb-jtag"`` or ``"usb-otg"``.
        was_reset: the chip was reset on the way into its boot loader.
        secure_download: nothing can be read, nothing verified.
        secure_boot, flash_encrypted, security_flags: of the security info.
        block_size: bytes of one data command.
        can_deflate, can_verify: deflated writes; MD5 and reading.
        facts: for the next session; None: not worth keeping.
    """

    chip: str
    title: str
    chip_id: int
    mac: str | None
    revision: int | None
    flash_id: int
    flash_size: int
    flash_size_known: bool
    stub: str | None
    stub_was_running: bool
    baud: int | None
    link: str
    was_reset: bool
    secure_download: bool
    secure_boot: bool
    flash_encrypted: bool
    security_flags: int
    block_size: int
    can_deflate: bool
    can_verify: bool
    facts: ChipFacts | None


__all__ = ["ChipFacts", "ChipInfo"]
