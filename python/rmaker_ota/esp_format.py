"""What the ESP formats are made of, as plain records: images, partition table, otadata.

The C engine (``src/csrc/esp``) parses and builds; the functions of `rmaker_ota.ota_core` return and take these. Offsets
and sizes are bytes, revisions are ``major * 100 + minor``. Text that is not UTF-8 is shown with backslash escapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Final, Literal

from rmaker_ota.errors import OtaError
from rmaker_ota.records import dataclass

TYPE_APP: Final = 0
TYPE_DATA: Final = 1
TYPE_BOOTLOADER: Final = 2
TYPE_PARTITION_TABLE: Final = 3

SUBTYPE_FACTORY: Final = 0x00
SUBTYPE_OTA_0: Final = 0x10
SUBTYPE_TEST: Final = 0x20
SUBTYPE_DATA_OTA: Final = 0x00
SUBTYPE_DATA_NVS: Final = 0x02

FLAG_ENCRYPTED: Final = 1
FLAG_READONLY: Final = 2

STATE_NEW: Final = 0
STATE_PENDING_VERIFY: Final = 1
STATE_VALID: Final = 2
STATE_INVALID: Final = 3
STATE_ABORTED: Final = 4
STATE_UNDEFINED: Final = 0xFFFFFFFF

ImageKind = Literal["app", "bootloader", "any"]


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip of the ESP32 family.

    Attributes:
        id: ``chip_id`` of image headers.
        name: ``"esp32c3"``; title: ``"ESP32-C3"``.
        bootloader_offset: where the boot ROM looks for the second-stage boot loader.
        mapped: address ranges ``(low, high)`` in which the flash can be mapped.
    """

    id: int
    name: str
    title: str
    bootloader_offset: int
    mapped: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EspImageHeader:
    """The 24 bytes an image begins with (ESP-IDF ``esp_image_header_t``). ``chip`` is None for an unknown id."""

    segment_count: int
    spi_mode: int
    spi_speed: int
    spi_size: int
    entry_addr: int
    wp_pin: int
    spi_pin_drv: tuple[int, int, int]
    chip_id: int
    min_chip_rev: int
    min_chip_rev_full: int
    max_chip_rev_full: int
    hash_appended: bool
    chip: str | None


@dataclass(frozen=True, slots=True)
class AppDescriptor:
    """The app descriptor, 256 bytes at offset 32 (ESP-IDF ``esp_app_desc_t``)."""

    version: str
    project_name: str
    secure_version: int
    time: str
    date: str
    idf_version: str
    elf_sha256: bytes
    min_efuse_block_rev_full: int
    max_efuse_block_rev_full: int
    mmu_page_size_log2: int
    spi_flash_mode: int


@dataclass(frozen=True, slots=True)
class BootloaderDescriptor:
    """The boot loader descriptor, 80 bytes at offset 32 (ESP-IDF ``esp_bootloader_desc_t``)."""

    version: int
    secure_version: int
    idf_version: str
    date_time: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of an image. ``mapped``: run in place from flash; else copied to RAM, or padding (``load_addr`` 0)."""

    header_offset: int
    data_offset: int
    load_addr: int
    size: int
    mapped: bool


@dataclass(frozen=True, slots=True)
class EspImage:
    """What a whole check of an image found.

    Attributes:
        header, descriptor, bootloader_descriptor: None where the bytes did not reach so far or there is none.
        size: length by the headers, hash included; 0 when it is not known.
        checksum, checksum_computed: None when the check did not get so far.
        appended_sha256, computed_sha256: None when there is none or the check did not get so far.
        bytes_after: bytes behind the image, not part of it.
        error: what is wrong; None: a whole, right image.
    """

    header: EspImageHeader | None
    descriptor: AppDescriptor | None
    bootloader_descriptor: BootloaderDescriptor | None
    segments: tuple[Segment, ...]
    size: int
    checksum: int | None
    checksum_computed: int | None
    appended_sha256: bytes | None
    computed_sha256: bytes | None
    bytes_after: int
    error: OtaError | None


@dataclass(frozen=True, slots=True)
class Partition:
    """A row of the partition table.

    Attributes:
        label: at most 16 bytes of UTF-8.
        type, subtype: numbers 0..255; the ``TYPE_`` and ``SUBTYPE_`` constants, and ``ota_core.partition_names``.
        flags: ``FLAG_ENCRYPTED``, ``FLAG_READONLY``; other bits are kept.
        raw_label: the 16 bytes as they came; empty: made from ``label``.
    """

    label: str
    type: int
    subtype: int
    offset: int
    size: int
    flags: int = 0
    raw_label: bytes = field(default=b"", repr=False, compare=False)

    @property
    def end(self) -> int:
        """Offset of the first byte behind the partition."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """A partition table; ``md5`` and ``end_offset`` (of the end marker) are what a parsed one had."""

    partitions: tuple[Partition, ...]
    has_md5: bool = True
    md5: bytes | None = field(default=None, compare=False)
    end_offset: int | None = field(default=None, compare=False)

    def find(self, type: int, subtype: int) -> Partition | None:
        """The first partition of that kind."""
        for partition in self.partitions:
            if (partition.type, partition.subtype) == (type, subtype):
                return partition
        return None

    def named(self, label: str) -> Partition | None:
        """The partition of that name."""
        for partition in self.partitions:
            if partition.label == label:
                return partition
        return None


@dataclass(frozen=True, slots=True)
class PartitionLayout:
    """What boot loader and update code take from a table; ``slots`` are ota_0, ota_1, ..."""

    otadata: Partition | None
    factory: Partition | None
    test: Partition | None
    slots: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class OtadataEntry:
    """One of the two select entries (ESP-IDF ``esp_ota_select_entry_t``). ``crc`` is kept as it was found."""

    seq: int
    state: int
    crc: int
    label: bytes = b"\xff" * 20


@dataclass(frozen=True, slots=True)
class OtadataFacts:
    """What an entry means: ``slot`` it names (``"ota_1"``), whether it counts (`live`), its state by name."""

    slot: str | None
    state_name: str
    crc_ok: bool
    blank: bool
    dead: bool
    live: bool


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """What lies in a slot: a whole, right image; a readable app descriptor and its secure version."""

    verifies: bool = True
    described: bool = True
    secure_version: int = 0


@dataclass(frozen=True, slots=True)
class BootConfig:
    """A chip as far as the boot choice goes.

    Attributes:
        slot_count: OTA slots, 0..16.
        rollback: boot loader and app are built with app rollback.
        anti_rollback: they are built with secure version checks; needs ``rollback``.
        secure_version: of the eFuses.
        slots: facts by slot name (``"ota_0"``, ``"factory"``, ``"test"``); a slot that is missing holds a right image.
    """

    slot_count: int
    has_factory: bool = False
    has_test: bool = False
    has_otadata: bool = True
    rollback: bool = True
    anti_rollback: bool = False
    secure_version: int = 0
    slots: Mapping[str, SlotFacts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OtadataOp:
    """One change of the medium: erase ``sector`` (0, 1) of otadata, or program ``entry`` at its start."""

    kind: Literal["erase", "program"]
    sector: int
    entry: OtadataEntry | None = None


@dataclass(frozen=True, slots=True)
class OtadataPlan:
    """Changes in the order they have to reach the medium, the entries they end with, and the eFuse secure version they
    call for afterwards (None: unchanged)."""

    ops: tuple[OtadataOp, ...]
    after: tuple[OtadataEntry, OtadataEntry]
    secure_version: int | None


@dataclass(frozen=True, slots=True)
class BootDecision:
    """What a boot loader does at one power-on.

    Attributes:
        slot: that boots; None: nothing does.
        active: entry it followed (0, 1); None: none.
        first_use: otadata was never written before.
        plan: what it writes.
        reasons: how it came to that, a sentence each.
    """

    slot: str | None
    active: int | None
    first_use: bool
    plan: OtadataPlan
    reasons: tuple[str, ...]
