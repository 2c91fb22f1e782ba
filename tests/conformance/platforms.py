"""Where the images of a scenario lie, what the boot loader does, and how an attempt installs.

`Platform` is what the world needs; `SimplePlatform` is the plainest thing that behaves so: slots are byte arrays,
the boot entries two small records, an image a header, a filling and a SHA-256.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from rmaker_ota.config import OtaSection
from rmaker_ota.errors import OtaError
from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker import streams
from rmaker_ota.rainmaker.stream_attempt import StreamAttempt
from rmaker_ota.rainmaker.workflow import (
    AttemptCheckpoint,
    AttemptFailed,
    AttemptFinished,
    AttemptHeader,
    AttemptProgress,
    AttemptReceived,
    ImageDescription,
    Input,
    ResumePoint,
    Stage,
    StartAttempt,
)
from rmaker_ota.targets.base import BootState
from tests.conformance.http_twin import Client, HttpFailure

Json = dict[str, Any]
Record = Callable[[str, Json], None]

SLOT_SIZES = {"ota_0": 1 << 20, "ota_1": 1 << 20, "factory": 192 << 10}
SECTOR = 4096


@dataclass(frozen=True)
class Running:
    """What runs after a start."""

    slot: str
    version: str
    project_name: str
    boot_state: BootState | None
    next_slot: str | None


class InstallFailure(Exception):
    """The installation failed; where, and with what."""

    def __init__(self, stage: Stage, esp_err: int = -1, errno: int = 0) -> None:
        super().__init__(stage, esp_err)
        self.stage = stage
        self.esp_err = esp_err
        self.errno = errno


@dataclass
class Services:
    """What the world offers to an attempt."""

    client: Client
    feed: Callable[[Input], None]
    checksum: Callable[
        [str | None, bytes], bytes | None
    ]  # real digest for a checksum of the trace, and the file served
    read_size: int
    rollback: bool
    dark: Callable[[], bool]  # the power is gone


@dataclass
class StreamServices:
    """What the world offers to an attempt over MQTT. ``surroundings`` are transport and loop."""

    node_id: str
    surroundings: Any
    post: Callable[[Any], None]
    checksum: Callable[[str | None, bytes], bytes | None]
    rollback: bool
    dark: Callable[[], bool]
    image: str  # that the stream holds

    def real(self, action: StartAttempt, contents: bytes) -> StartAttempt:
        """The action with the real checksum."""
        md5 = self.checksum(action.md5, contents)
        return action if md5 is None else replace(action, md5=md5.hex())


class Platform(ABC):
    """The node's flash and boot loader. Slot states that change are recorded as ``slot_state``."""

    @abstractmethod
    def contents(self, image: str) -> bytes:
        """The bytes of an image's file."""

    @abstractmethod
    def start(self, loader_rollback: bool, app_rollback: bool) -> Running:
        """Runs the boot loader and says what runs now; ends an attempt that is under way."""

    @abstractmethod
    def mark_valid(self) -> int: ...

    @abstractmethod
    def mark_invalid(self) -> int: ...

    @abstractmethod
    def attempt(self, action: StartAttempt, services: Services) -> Generator[float, None, None]:
        """Downloads and installs; yields the seconds that pass. Feeds what the workflow is to hear of it, the end
        too."""

    @abstractmethod
    def stream(self, action: StartAttempt, section: OtaSection, services: StreamServices) -> StreamAttempt:
        """An attempt over MQTT, to be started.

        Raises:
            ValueError: there can be no such stream.
        """

    @abstractmethod
    def pump(self, stream: StreamAttempt) -> None:
        """Has the installation take what the transfer handed out; nothing is under way when it returns."""

    @abstractmethod
    def decide(self, attempt: int, accept: bool) -> None:
        """The workflow's answer to the header."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what it holds."""


# ---- The plain one --------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<BBHIHHHIIII")  # magic, flaws, chip, size, min rev, max rev, mode, secure version, 3 x spare
_TEXTS = struct.Struct("<I32s32s")
_DESC_MAGIC = 0xABCD5432


def build_image(properties: Json) -> bytes:
    """An image file with the properties of a trace (README.md, `images`)."""
    size = int(properties.get("size", 65536))
    padding = int(properties.get("padding", 0))
    chip = properties.get("chip_id", 5)
    magic = 0x00 if properties.get("bad_magic") else 0xE9
    header = _HEADER.pack(
        magic,
        1 if properties.get("bad_checksum") else 0,
        chip,
        size - padding,
        properties.get("min_chip_rev", 0),
        properties.get("max_chip_rev", 99),
        properties.get("spi_flash_mode", 0),
        properties.get("secure_version", 0),
        0,
        0,
        0,
    )
    desc_magic = 0 if properties.get("bad_desc_magic") else _DESC_MAGIC
    version = str(properties.get("version", "2.0.0"))
    project = str(properties.get("project_name", "my_product"))
    texts = _TEXTS.pack(desc_magic, version.encode()[:32], project.encode()[:32])
    body = header + texts
    filling = hashlib.sha256(version.encode()).digest()
    body += (filling * (size // 32 + 1))[: size - padding - 32 - len(body)]
    digest = bytearray(hashlib.sha256(body).digest())
    if properties.get("bad_sha"):
        digest[0] ^= 0xFF
    return body + bytes(digest) + b"\xff" * padding


@dataclass(frozen=True)
class _Image:
    flaws: int
    magic: int
    chip: int
    size: int
    min_revision: int
    max_revision: int
    description: ImageDescription | None

    @classmethod
    def parse(cls, data: bytes) -> _Image:
        magic, flaws, chip, size, low, high, _, secure, *_ = _HEADER.unpack_from(data)
        desc_magic, version, project = _TEXTS.unpack_from(data, _HEADER.size)
        description = None
        if desc_magic == _DESC_MAGIC:
            description = ImageDescription(
                project.split(b"\0")[0].decode("utf-8", "replace"),
                version.split(b"\0")[0].decode("utf-8", "replace"),
                secure,
            )
        return cls(flaws, magic, chip, size, low, high, description)


def image_is_sound(data: bytes) -> bool:
    """Whether the slot's content is a complete image."""
    image = _Image.parse(data)
    if image.magic != 0xE9 or image.flaws or not 64 < image.size <= len(data):
        return False
    return hashlib.sha256(data[: image.size - 32]).digest() == bytes(data[image.size - 32 : image.size])


@dataclass
class _Entry:
    slot: str
    seq: int
    state: BootState


class SimplePlatform(Platform):
    """Slots in memory."""

    def __init__(self, inputs: Json, record: Record) -> None:
        self._record = record
        self._images = {name: build_image(image) for name, image in inputs.get("images", {}).items()}
        self._device = {"chip_id": 5, "chip_revision": 4, "efuse_secure_version": 0, **inputs.get("device", {})}
        self._slots: dict[str, bytearray] = {}
        for name, content in inputs.get("slots", {}).get("slots", {}).items():
            self._slots[name] = bytearray(b"\xff" * SLOT_SIZES[name])
            if content:
                image = self._images[content["image"]]
                self._slots[name][: len(image)] = image
        self._slots.setdefault("ota_0", bytearray(b"\xff" * SLOT_SIZES["ota_0"]))
        self._slots.setdefault("ota_1", bytearray(b"\xff" * SLOT_SIZES["ota_1"]))
        entries = [*(inputs.get("slots", {}).get("boot_entries") or []), None, None][:2]
        self._entries = [
            None if entry is None else _Entry(entry["slot"], entry["seq"], BootState[entry["state"]])
            for entry in entries
        ]
        fault = inputs.get("flash_fault") or {}
        self._fault_op = fault.get("op")
        self._fault_at = fault.get("at", 0)
        self._faults_left = fault.get("count", 1) if fault else 0
        self._running: Running | None = None
        self._verdicts: dict[int, bool] = {}
        self._stream: _SimpleStream | None = None

    def contents(self, image: str) -> bytes:
        return self._images[image]

    def close(self) -> None:
        pass

    def start(self, loader_rollback: bool, app_rollback: bool) -> Running:
        chosen = self._choose(loader_rollback)
        slot = chosen.slot if chosen is not None else ("factory" if "factory" in self._slots else "ota_0")
        image = _Image.parse(bytes(self._slots[slot][:512]))
        description = image.description or ImageDescription("", "")
        entry = self._entry_of(slot)
        self._running = Running(
            slot,
            description.version,
            description.project_name,
            None if entry is None else entry.state,
            "ota_0" if slot == "factory" else ("ota_1" if slot == "ota_0" else "ota_0"),
        )
        return self._running

    def _choose(self, rollback: bool) -> _Entry | None:
        if rollback:
            for entry in self._entries:
                if entry is not None and entry.state == BootState.PENDING_VERIFY:
                    self._set_state(entry, BootState.ABORTED)
        bad = (BootState.INVALID, BootState.ABORTED)
        usable = [entry for entry in self._entries if entry is not None and entry.state not in bad]
        for entry in sorted(usable, key=lambda entry: -entry.seq):
            if not image_is_sound(bytes(self._slots[entry.slot])):
                continue
            if rollback and entry.state == BootState.NEW:
                self._set_state(entry, BootState.PENDING_VERIFY)
            return entry
        return None

    def _set_state(self, entry: _Entry, state: BootState) -> None:
        entry.state = state
        self._record("slot_state", {"slot": entry.slot, "state": state.name})

    def _entry_of(self, slot: str) -> _Entry | None:
        found = [entry for entry in self._entries if entry is not None and entry.slot == slot]
        return max(found, key=lambda entry: entry.seq, default=None)

    def _running_entry(self) -> _Entry | None:
        return None if self._running is None else self._entry_of(self._running.slot)

    def mark_valid(self) -> int:
        entry = self._running_entry()
        if entry is None:
            return EspErr.FAIL
        self._set_state(entry, BootState.VALID)
        return EspErr.OK

    def mark_invalid(self) -> int:
        entry = self._running_entry()
        if entry is None:
            return EspErr.FAIL
        bad = (BootState.INVALID, BootState.ABORTED)
        others = [other for other in self._entries if other is not None and other.slot != entry.slot]
        possible = (
            any(other.state not in bad and image_is_sound(bytes(self._slots[other.slot])) for other in others)
            or "factory" in self._slots
        )
        if not possible:
            return EspErr.OTA_ROLLBACK_FAILED
        self._set_state(entry, BootState.INVALID)
        return EspErr.OK

    def decide(self, attempt: int, accept: bool) -> None:
        self._verdicts[attempt] = accept
        if self._stream is not None and self._stream.number == attempt:
            self._stream.decide(None if accept else "refused")

    def stream(self, action: StartAttempt, section: OtaSection, services: StreamServices) -> StreamAttempt:
        self._stream = _SimpleStream(self, services.real(action, self._images[services.image]), section, services)
        return self._stream

    def pump(self, stream: StreamAttempt) -> None:
        assert isinstance(stream, _SimpleStream)
        stream.pump()

    def attempt(self, action: StartAttempt, services: Services) -> Generator[float, None, None]:
        run = _SimpleAttempt(self, action, services)
        number = action.attempt
        try:
            yield from run.install()
        except HttpFailure as error:
            services.feed(AttemptFailed(number, run.stage, error.esp_err, error.errno, answered=error.answered))
        except InstallFailure as error:
            services.feed(AttemptFailed(number, error.stage, error.esp_err, error.errno))
        else:
            description = run.image.description
            services.feed(
                AttemptFinished(number, self.target_slot, None if description is None else description.version)
            )

    def accepted(self, attempt: int) -> bool:
        return self._verdicts.get(attempt, False)

    def fault(self, op: str, end: int) -> None:
        """Raises InstallFailure when a flash operation that reaches ``end`` is to fail."""
        if self._fault_op == op and self._faults_left > 0 and end > self._fault_at:
            self._faults_left -= 1
            raise InstallFailure(Stage.TRANSFER, EspErr.FLASH_OP_FAIL)

    def activate(self, slot: str, rollback: bool) -> None:
        newest = max((entry.seq for entry in self._entries if entry is not None), default=0)
        state = BootState.NEW if rollback else BootState.UNDEFINED
        index = 1 if slot == "ota_1" else 0
        self._entries[index] = _Entry(slot, newest + 1, state)
        self._record("slot_state", {"slot": slot, "state": state.name})

    @property
    def device(self) -> Json:
        return self._device

    @property
    def target_slot(self) -> str:
        assert self._running is not None and self._running.next_slot is not None
        return self._running.next_slot

    def slot(self, name: str) -> bytearray:
        return self._slots[name]

    @property
    def unconfirmed(self) -> bool:
        entry = self._running_entry()
        return entry is not None and entry.state == BootState.PENDING_VERIFY


class _SimpleAttempt:
    """One attempt into a slot in memory."""

    def __init__(self, platform: SimplePlatform, action: StartAttempt, services: Services | StreamServices) -> None:
        self._platform = platform
        self._action = action
        self._services = services
        self._slot = platform.target_slot
        self._at = 0
        self._erased = 0
        self._unit = 1024  # positions are kept in multiples of it
        self.stage = Stage.BEGIN
        self.image: _Image

    def install(self) -> Generator[float, None, None]:
        action, services = self._action, self._services
        assert isinstance(services, Services)
        number = action.attempt
        body = yield from services.client.open(action.url, None if action.resume is None else action.resume.offset)
        self.stage = Stage.DESCRIPTION
        md5 = services.checksum(action.md5, self._platform.contents(body.behaviour.get("image", "new")))
        first = b""
        while body.offset == 0 and len(first) < action.header_size:
            piece = yield from body.read(action.header_size - len(first))
            if not piece:
                break
            first += piece
        description = self._header(first, body.offset)
        services.feed(AttemptHeader(number, description, body.offset, self._slot))
        if not self._platform.accepted(number):
            raise InstallFailure(Stage.TRANSFER)
        self.stage = Stage.TRANSFER
        self._judge()
        piece = first
        while True:
            if piece:
                self._write(piece)
                services.feed(AttemptProgress(number, self._at))
            if services.dark():
                return
            piece = yield from body.read(services.read_size)
            if not piece:
                break
        services.feed(AttemptReceived(number, self._at))
        if not services.dark():
            self._finish(md5)

    def _content(self) -> bytearray:
        return self._platform.slot(self._slot)

    def _header(self, data: bytes, offset: int) -> ImageDescription:
        if offset:
            self._at = offset
            self._erased = -(-offset // SECTOR) * SECTOR
            data = bytes(self._content()[: self._action.header_size])
            resume = self._action.resume
            assert resume is not None
            if hashlib.sha256(bytes(self._content()[:offset])).digest() != resume.sha256:
                raise InstallFailure(Stage.DESCRIPTION, EspErr.FAIL)
        if len(data) < self._action.header_size:
            raise InstallFailure(Stage.DESCRIPTION, EspErr.FAIL)
        self.image = _Image.parse(data)
        if self.image.description is None:
            raise InstallFailure(Stage.DESCRIPTION, EspErr.FAIL)
        return self.image.description

    def _judge(self) -> None:
        device = self._platform.device
        if self.image.magic != 0xE9:
            raise InstallFailure(Stage.TRANSFER, EspErr.OTA_VALIDATE_FAILED)
        low, high = self.image.min_revision, self.image.max_revision
        if self.image.chip != device["chip_id"] or not low <= device["chip_revision"] <= high:
            raise InstallFailure(Stage.CHIP, EspErr.INVALID_VERSION)
        if self._platform.unconfirmed:
            raise InstallFailure(Stage.TRANSFER, EspErr.OTA_ROLLBACK_INVALID_STATE)

    def _write(self, data: bytes) -> None:
        end = self._at + len(data)
        content = self._content()
        if end > len(content):
            raise InstallFailure(Stage.TRANSFER, EspErr.INVALID_SIZE)
        while self._erased < end:
            self._platform.fault("erase", self._erased + SECTOR)
            content[self._erased : self._erased + SECTOR] = b"\xff" * SECTOR
            self._erased += SECTOR
        self._platform.fault("write", end)
        content[self._at : end] = data
        self._at = end
        if self._action.keep_position:
            offset = self._at // self._unit * self._unit
            digest = hashlib.sha256(bytes(content[:offset])).digest()
            self._tell(AttemptCheckpoint(self._action.attempt, ResumePoint(offset, digest)))

    def _tell(self, event: Input) -> None:
        services = self._services
        (services.feed if isinstance(services, Services) else services.post)(event)

    def _finish(self, md5: bytes | None) -> None:
        data = bytes(self._content()[: self._at])
        sound = image_is_sound(bytes(self._content()))
        if md5 is not None and hashlib.md5(data, usedforsecurity=False).digest() != md5:
            sound = False
        if self._action.size and self._action.size != self._at:
            sound = False
        if not sound:
            raise InstallFailure(Stage.VALIDATE, EspErr.OTA_VALIDATE_FAILED)
        self._platform.activate(self._slot, self._services.rollback)


class _SimpleStream(StreamAttempt):
    """One attempt over MQTT into a slot in memory: the real transfer, no engine."""

    def __init__(
        self, platform: SimplePlatform, action: StartAttempt, section: OtaSection, services: StreamServices
    ) -> None:
        around = services.surroundings
        super().__init__(
            action,
            None,
            section,
            services.post,
            node_id=services.node_id,
            transport=around,
            loop=around,  # type: ignore[arg-type]
        )
        self._run = _StreamIntoSlot(platform, action, services, self._batch_size)
        self._is_up = False
        self._is_done = False

    def decide(self, refusal: str | None) -> None:
        if refusal is None and self._run.has_room:
            self._feed(streams.Accepted())

    def _start_engine(self) -> None:
        self._is_up = True

    def _perform(self, action: streams.Action) -> streams.Input | None:
        answer = super()._perform(action)
        if isinstance(action, streams.Ready):
            self.pump()
        return answer

    def _fail(self, stage: Stage, detail: str, rejection: streams.Rejection | None) -> None:
        if not self._is_up:
            super()._fail(stage, detail, rejection)
            return
        self._failed = AttemptFailed(self.number, stage, said=str(rejection) if rejection else "")
        self._carried.put(OtaError(detail))

    def pump(self) -> None:
        while self._is_up and not self._is_done:
            try:
                self._run.begin()
                if self._carried.empty():
                    return
                item = self._carried.get()
                if isinstance(item, OtaError):
                    last: Input = self._failed
                elif item is None:
                    last = self._run.finish()
                else:
                    self._run.take(item.data)
                    self._feed(streams.Taken(item.offset + len(item.data)))
                    continue
            except InstallFailure as error:
                last = AttemptFailed(self.number, error.stage, error.esp_err)
            self._is_done = True
            self._post(last)


class _StreamIntoSlot(_SimpleAttempt):
    def __init__(
        self, platform: SimplePlatform, action: StartAttempt, services: StreamServices, batch_size: int
    ) -> None:
        super().__init__(platform, action, services)
        self._unit = batch_size
        self._first = b""
        self._begun = False

    @property
    def has_room(self) -> bool:
        return self._action.size <= len(self._content())

    def begin(self) -> None:
        """A resumed one looks at what is in the slot before it asks for more."""
        resume = self._action.resume
        if resume is not None and not self._begun:
            self._pass(b"", resume.offset)

    def take(self, data: bytes) -> None:
        if not self._begun:
            self._first += data
            if len(self._first) < self._action.header_size:
                raise InstallFailure(Stage.DESCRIPTION, EspErr.FAIL)
            data = self._first
            self._pass(data, 0)
        self._write(data)
        self._tell(AttemptProgress(self._action.attempt, self._at))

    def _pass(self, data: bytes, offset: int) -> None:
        self._begun = True
        number = self._action.attempt
        self._tell(AttemptHeader(number, self._header(data, offset), offset, self._slot))
        if not self._platform.accepted(number):
            raise InstallFailure(Stage.TRANSFER)
        if not self.has_room:
            raise InstallFailure(Stage.TRANSFER, EspErr.INVALID_SIZE)
        if self.image.magic != 0xE9:
            raise InstallFailure(Stage.VALIDATE, EspErr.OTA_VALIDATE_FAILED)
        self._judge()

    def finish(self) -> Input:
        self._tell(AttemptReceived(self._action.attempt, self._at))
        md5 = self._action.md5
        self._finish(None if md5 is None else bytes.fromhex(md5) if len(md5) == 32 else b"")
        description = self.image.description
        return AttemptFinished(self._action.attempt, self._slot, None if description is None else description.version)
