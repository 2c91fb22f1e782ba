"""Types of the border to the C engine, room by room as in ``src/border``."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple, Self

from typing_extensions import Buffer

from rmaker_ota.errors import OtaError
from rmaker_ota.esp_format import (
    AppDescriptor,
    BootConfig,
    BootDecision,
    Chip,
    EspImage,
    EspImageHeader,
    ImageKind,
    OtadataEntry,
    OtadataFacts,
    OtadataPlan,
    PartitionLayout,
    PartitionTable,
)
from rmaker_ota.flasher.chip import ChipFacts, ChipInfo
from rmaker_ota.flasher.stubs import Stub
from rmaker_ota.nvs import NvsItem, NvsOp, NvsPage, NvsType, NvsValue

# ---- errors.pxi ------------------------------------------------------------------------------------------------------

VERSION: str

def status_table() -> list[tuple[str, int, int, str]]: ...

# ---- port.pxi --------------------------------------------------------------------------------------------------------

def list_ttys(
    sysfs_root: str | os.PathLike[str] = "/sys",
) -> tuple[tuple[str, str, str, str, str, str, int, int, int], ...]: ...

# ---- esp.pxi ---------------------------------------------------------------------------------------------------------

def esp_chips() -> tuple[Chip, ...]: ...
def esp_chip_id(name: str) -> int: ...
def parse_image_header(data: Buffer) -> EspImageHeader: ...
def parse_app_descriptor(data: Buffer) -> AppDescriptor: ...

class ImageChecker:
    def __init__(
        self,
        *,
        kind: ImageKind = "app",
        chip_id: int | None = None,
        chip_revision: int | None = None,
        efuse_block_revision: int | None = None,
        ignore_max_revision: bool = False,
        slot_size: int = 0,
        spi_flash_mode: int = 0,
        bytes_after_allowed: bool = True,
    ) -> None: ...
    def update(self, data: Buffer) -> bool: ...
    def finish(self) -> None: ...
    def result(self) -> EspImage: ...

def parse_image(
    data: Buffer,
    *,
    kind: ImageKind = "any",
    chip_id: int | None = None,
    chip_revision: int | None = None,
    efuse_block_revision: int | None = None,
    ignore_max_revision: bool = False,
    slot_size: int = 0,
    spi_flash_mode: int = 0,
    bytes_after_allowed: bool = True,
) -> EspImage: ...
def parse_partition_table(data: Buffer, *, flash_size: int = 0) -> PartitionTable: ...
def build_partition_table(table: PartitionTable) -> bytes: ...
def partition_table_from_csv(
    text: str | bytes,
    *,
    variables: Mapping[str, str] | None = None,
    table_offset: int = 0x8000,
    flash_size: int = 0,
    bootloader_offset: int | None = None,
    recovery_bootloader_offset: int | None = None,
    secure_boot_v1: bool = False,
) -> PartitionTable: ...
def check_partition_table(
    table: PartitionTable,
    *,
    table_offset: int = 0x8000,
    flash_size: int = 0,
    bootloader_offset: int | None = None,
    recovery_bootloader_offset: int | None = None,
    secure_boot_v1: bool = False,
) -> None: ...
def partition_table_to_csv(table: PartitionTable) -> str: ...
def partition_names(type: int, subtype: int) -> tuple[str, str]: ...
def partition_layout(table: PartitionTable) -> PartitionLayout: ...
def parse_otadata(data: Buffer) -> tuple[OtadataEntry, OtadataEntry]: ...
def build_otadata_entry(entry: OtadataEntry) -> bytes: ...
def build_otadata(entries: Sequence[OtadataEntry]) -> bytes: ...
def make_otadata_entry(seq: int, state: int) -> OtadataEntry: ...
def blank_otadata_entry() -> OtadataEntry: ...
def otadata_facts(entry: OtadataEntry, slot_count: int) -> OtadataFacts: ...
def boot_decide(entries: Sequence[OtadataEntry], config: BootConfig) -> BootDecision: ...
def otadata_next_slot(slot_count: int, running: str | None) -> str | None: ...
def otadata_slot_state(entries: Sequence[OtadataEntry], slot_count: int, slot: str) -> int: ...
def otadata_last_invalid(entries: Sequence[OtadataEntry], slot_count: int) -> str | None: ...
def otadata_can_rollback(entries: Sequence[OtadataEntry], config: BootConfig, running: str | None) -> str: ...
def otadata_plan_begin(
    entries: Sequence[OtadataEntry], config: BootConfig, running: str | None, slot: str
) -> OtadataPlan: ...
def otadata_plan_set_boot(
    entries: Sequence[OtadataEntry], config: BootConfig, running: str | None, slot: str
) -> OtadataPlan: ...
def otadata_plan_mark_valid(
    entries: Sequence[OtadataEntry], config: BootConfig, running: str | None
) -> OtadataPlan: ...
def otadata_plan_mark_invalid(
    entries: Sequence[OtadataEntry], config: BootConfig, running: str | None
) -> OtadataPlan: ...

# ---- nvs.pxi ---------------------------------------------------------------------------------------------------------

def parse_nvs_keys(data: Buffer) -> bytes: ...

class Nvs:
    def __init__(self, data: Buffer, keys: bytes | None = None, *, purge: bool = False) -> None: ...
    @property
    def pages(self) -> tuple[NvsPage, ...]: ...
    @property
    def namespaces(self) -> dict[str, int]: ...
    @property
    def damaged(self) -> int: ...
    @property
    def repair_count(self) -> int: ...
    @property
    def image(self) -> bytes: ...
    def items(self) -> list[NvsItem]: ...
    def get(self, namespace: str, key: str, type: NvsType | None = None) -> NvsValue: ...
    def set(self, namespace: str, key: str, type: NvsType, value: NvsValue) -> None: ...
    def erase(self, namespace: str, key: str | None = None) -> None: ...
    def operations(self, start: int = 0) -> list[NvsOp]: ...

def parse_nvs(data: Buffer, keys: bytes | None = None) -> list[NvsItem]: ...
def nvs_get(
    data: Buffer, namespace: str, key: str, type: NvsType | None = None, *, keys: bytes | None = None
) -> NvsValue: ...
def nvs_set(
    data: Buffer,
    namespace: str,
    key: str,
    type: NvsType,
    value: NvsValue,
    *,
    keys: bytes | None = None,
    purge: bool = False,
) -> list[NvsOp]: ...
def nvs_erase(
    data: Buffer, namespace: str, key: str | None = None, *, keys: bytes | None = None, purge: bool = False
) -> list[NvsOp]: ...
def nvs_apply(partition: Buffer, operations: Sequence[NvsOp]) -> None: ...

# ---- sink.pxi --------------------------------------------------------------------------------------------------------

class Fault:
    READ: int
    WRITE: int
    SYNC: int
    ERASE: int
    OPEN: int
    LINES: int
    BAUD: int
    def __init__(
        self,
        *,
        ops: int = 0,
        after: int = 0,
        count: int = 0,
        errnum: int = 0,
        reaches: int = 0,
        power_cut: bool = False,
        torn_len: int = 0,
    ) -> None: ...
    @property
    def seen(self) -> int: ...
    @property
    def lost(self) -> bool: ...

class Sink:
    @property
    def capacity(self) -> int | None: ...
    @property
    def resume_size(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]: ...

class FileSink(Sink):
    def __init__(
        self, path: str | os.PathLike[str], *, buffered: bool = False, max_size: int = 0, fault: Fault | None = None
    ) -> None: ...

# ---- flasher.pxi -----------------------------------------------------------------------------------------------------

FLASHER_BEFORE: tuple[str, ...]
FLASHER_AFTER: tuple[str, ...]
FLASHER_LINKS: tuple[str, ...]

class Flasher:
    def __init__(
        self,
        port: str | os.PathLike[str],
        *,
        baud: int = 0,
        chip: str | None = None,
        before: str = "default-reset",
        after: str = "default-reset",
        link: str = "auto",
        connect_attempts: int = 7,
        reuse_baud: int = 0,
        stubs: Iterable[Stub] = (),
        facts: ChipFacts | None = None,
        flash_size: int = 0,
        allow_encrypted: bool = False,
        slow: int = 1,
        keep_lines: bool = False,
        fault: Fault | None = None,
        on_lines: Callable[[bool, bool], object] | None = None,
        on_trace: Callable[[str, bytes], object] | None = None,
        sysfs_root: str | os.PathLike[str] | None = None,
        dev_root: str | os.PathLike[str] | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def has_lines(self) -> bool: ...
    @property
    def state(self) -> Literal["off", "ready", "broken", "gone", "stopped"]: ...
    @property
    def counts(self) -> dict[str, int]: ...
    @property
    def info(self) -> ChipInfo | None: ...
    def read_revision(self) -> int | None: ...
    def connect(self) -> None: ...
    def reopen(self, timeout_ms: int = 5000) -> None: ...
    def reset(self, how: str = "default-reset") -> None: ...
    def read_console(self, size: int = 4096, timeout_ms: int = 100) -> bytes: ...
    def set_baud(self, baud: int) -> None: ...
    def cancel(self) -> None: ...
    def rearm(self) -> None: ...
    def read(self, offset: int, size: int, *, on_progress: Callable[[int], object] | None = None) -> bytes: ...
    def erase(self, offset: int, size: int) -> None: ...
    def md5(self, offset: int, size: int) -> bytes: ...
    def write(
        self,
        offset: int,
        size: int,
        pieces: Iterable[tuple[Buffer, int]],
        *,
        deflated: bool = False,
        encrypt: bool = False,
        wire_size: int = 0,
        on_progress: Callable[[int], object] | None = None,
    ) -> None: ...

# ---- target.pxi ------------------------------------------------------------------------------------------------------

class EspTarget:
    def __init__(
        self,
        place: str | os.PathLike[str] | Flasher,
        *,
        read_only: bool = False,
        table_offset: int = 0x8000,
        rollback: bool = True,
        anti_rollback: bool = False,
        secure_version: int = 0,
        running: str | None = None,
        chip_id: int | None = None,
        chip_revision: int | None = None,
        efuse_block_revision: int | None = None,
        ignore_max_revision: bool = False,
        fault: Fault | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    @property
    def is_installing(self) -> bool: ...
    @property
    def rollback(self) -> bool: ...
    @property
    def size(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]: ...
    def slots(self) -> tuple[tuple[str, str, int, int], ...]: ...
    def partition_table(self) -> PartitionTable: ...
    @property
    def running(self) -> str | None: ...
    @property
    def secure_version(self) -> int: ...
    def next_slot(self) -> str: ...
    def describe(self, slot: str) -> tuple[EspImageHeader, AppDescriptor]: ...
    def verify(self, slot: str) -> int: ...
    def entries(self) -> tuple[OtadataEntry, OtadataEntry]: ...
    def state(self, slot: str) -> int: ...
    def read(self, offset: int, size: int) -> bytes: ...
    def sink(self, slot: str, *, activate: bool = True, rewrite_same: bool = False) -> FlashSink: ...
    def set_boot(self, slot: str) -> None: ...
    def mark_valid(self) -> None: ...
    def retry(self) -> None: ...
    def mark_invalid(self) -> None: ...
    def can_rollback(self) -> str: ...
    def choose(self) -> BootDecision: ...
    def boot(self) -> BootDecision: ...

class FlashSink(Sink): ...

class SerialSink(Sink):
    def __init__(
        self,
        places: Iterable[tuple[EspTarget, str]],
        *,
        activate: bool = True,
        skip_identical: bool = True,
        skip_blank: bool = True,
        sector_diff: bool = True,
        pre_erase: bool = True,
        level: int = 0,
        jobs: int = 0,
        reconnects: int = 0,
        reopen_ms: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None: ...
    def announce(self, *, sha256: bytes | None = None, md5: bytes | None = None) -> None: ...
    def exclude(self, index: int, error: OtaError) -> None: ...
    def results(self) -> tuple[dict[str, Any], ...]: ...
    @property
    def store_counts(self) -> dict[str, int]: ...

# ---- source.pxi ------------------------------------------------------------------------------------------------------

class SourceInfo(NamedTuple):
    size: int | None
    offset: int
    entity_tag: str

def public_url(url: str) -> str: ...

class Source:
    @property
    def bytes_read(self) -> int: ...
    @property
    def requests(self) -> int: ...
    def open(self, offset: int = 0) -> SourceInfo: ...
    def read(self, size: int = 65536) -> bytes: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...

class HttpSource(Source):
    def __init__(
        self,
        url: str,
        *,
        ca_file: str | os.PathLike[str] | None = None,
        ca_pem: str | bytes | None = None,
        client_cert_file: str | os.PathLike[str] | None = None,
        client_key_file: str | os.PathLike[str] | None = None,
        proxy: str | None = None,
        user_agent: str | None = None,
        entity_tag: str | None = None,
        connect_to: str | None = None,
        allow_http: bool = False,
        skip_common_name_check: bool = False,
        connect_timeout_ms: int = 0,
        stall_timeout_ms: int = 0,
        deadline_ms: int = 0,
        max_bytes_per_s: int = 0,
        max_redirects: int = 0,
        receive_buffer: int = 0,
    ) -> None: ...

class FileSource(Source):
    def __init__(self, path: str | os.PathLike[str]) -> None: ...

class FdSource(Source):
    def __init__(self, fd: int | IO[bytes]) -> None: ...

class MemorySource(Source):
    def __init__(self, data: bytes | bytearray | memoryview) -> None: ...

class PushSource(Source):
    def __init__(self, size: int | None = None, capacity: int = 1 << 20, offset: int = 0) -> None: ...
    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def drain(self) -> None: ...
    def end(self) -> None: ...
    def fail(
        self, error: BaseException | str, message: str | None = None, *, offset: int = 0, device_code: int = 0
    ) -> None: ...

# ---- engine.pxi ------------------------------------------------------------------------------------------------------

PHASES: tuple[str, ...]
TRANSFORMS: tuple[str, ...]

class Pipeline:
    def __init__(
        self,
        source: Source,
        sink: Sink,
        *,
        transform: str = "auto",
        file_sha256: bytes | None = None,
        file_md5: bytes | None = None,
        compute_sha256: bool = True,
        compute_md5: bool = False,
        file_size: int | None = None,
        image_rules: dict[str, int] | None = None,
        max_image_size: int = 0,
        header_size: int = 288,
        header_required: bool = False,
        read_back: bool = False,
        single_thread: bool = False,
        chunk_count: int = 8,
        chunk_size: int = 1048576,
        tick_ms: int = 100,
        checkpoint_bytes: int = 0,
        checkpoint_ms: int = 0,
        resume_offset: int = 0,
        resume_sha256: bytes | None = None,
    ) -> None: ...
    def run(
        self,
        *,
        on_header: Callable[[bytes, int | None, int, str], None] | None = None,
        on_phase: Callable[[str], None] | None = None,
        on_checkpoint: Callable[[int, bytes, str], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> None: ...
    def cancel(self) -> None: ...
    def progress(self) -> tuple[str, int, int | None, int]: ...
    def counts(self) -> dict[str, int | str]: ...
    @property
    def sha256(self) -> bytes | None: ...
    @property
    def md5(self) -> bytes | None: ...
