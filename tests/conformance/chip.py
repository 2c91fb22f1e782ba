"""The real parts in the world: an `esp32-image:` target in a flash image file, and the engine that installs into it.

What the HTTP twin reads is pushed into the engine (`PushSource`), piece by piece; the attempt is the node's own
(`rmaker_ota.rainmaker.attempt`), so what a failure becomes in a report is judged too. The attempt runs on its own
thread, but never beside the world: one of them holds the baton. The world hands it over while it waits for the
engine to take what was pushed, to ask for more, or to end.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmaker_ota import ota_core
from rmaker_ota.config import OtaSection
from rmaker_ota.errors import CancelledError, NotFoundError, OtaError, error_class
from rmaker_ota.esp_build import build_image
from rmaker_ota.esp_err import EspErr
from rmaker_ota.install import Installer
from rmaker_ota.rainmaker.attempt import Attempt, Callbacks, Installation, InstallationFactory, make_installation
from rmaker_ota.rainmaker.stream_attempt import StreamAttempt
from rmaker_ota.rainmaker.streams import Action, Ready, Taken
from rmaker_ota.rainmaker.streams import Input as StreamInputs
from rmaker_ota.rainmaker.workflow import AttemptFailed, AttemptFinished, AttemptProgress, Input, StartAttempt
from rmaker_ota.targets.base import BootState, Slot, Target
from rmaker_ota.targets.esp32_image import Esp32ImageTarget
from tests.conformance.http_twin import Body, HttpFailure, PowerCut
from tests.conformance.platforms import Platform, Record, Running, Services, StreamServices

Json = dict[str, Any]

FLASH_SIZE = 4 << 20
TABLE_OFFSET = 0x8000
OTADATA_OFFSET = 0xD000
SLOTS = {"ota_0": (0x20000, 0x100000), "ota_1": (0x120000, 0x100000), "factory": (0x220000, 0x30000)}
SECTOR = 4096
WAIT_S = 30.0  # for a thread that should be done at once


class ChipPlatform(Platform):
    """A virtual chip with two slots of 1 MiB, and a factory slot of 192 KiB where the scenario has one."""

    def __init__(self, inputs: Json, record: Record) -> None:
        self._record = record
        self._inputs = inputs
        self._images: dict[str, bytes] = {}
        self._device = {"chip_id": 5, "chip_revision": 4, "efuse_secure_version": 0, **inputs.get("device", {})}
        self._folder = Path(tempfile.mkdtemp(prefix="conformance-", dir=_fast_folder()))
        self._path = self._folder / "flash.bin"
        self._fault = self._make_fault(inputs.get("flash_fault"))
        self._write_flash(inputs.get("slots", {}))
        self._target: Esp32ImageTarget | None = None
        self._rollback = False
        self._entries: dict[str, tuple[int, int]] = {}
        self._attempt: Attempt | None = None
        self._stream: _ChipStream | None = None
        self._baton = threading.Lock()
        self._baton.acquire()

    # -- The flash

    def contents(self, image: str) -> bytes:
        if image not in self._images:
            self._images[image] = _build(self._inputs["images"][image])
        return self._images[image]

    def _write_flash(self, slots: Json) -> None:
        contents = slots.get("slots", {})
        factory = "factory" in contents
        rows = ["nvs, data, nvs, 0x9000, 0x4000", f"otadata, data, ota, {OTADATA_OFFSET:#x}, 0x2000"]
        for name, (offset, size) in SLOTS.items():
            if name != "factory" or factory:
                rows.append(f"{name}, app, {name}, {offset:#x}, {size:#x}")
        table = ota_core.partition_table_from_csv(
            "\n".join(rows) + "\n", table_offset=TABLE_OFFSET, flash_size=FLASH_SIZE, bootloader_offset=0
        )
        flash = bytearray(b"\xff") * FLASH_SIZE
        parts = [(TABLE_OFFSET, ota_core.build_partition_table(table))]
        for name, content in contents.items():
            if content:
                parts.append((SLOTS[name][0], self.contents(content["image"])))
        if self._fault is not None:  # an empty sector need not be erased
            slot, size = SLOTS[self._faulty_slot()]
            parts.append((slot, bytes(size)))
        for index, entry in enumerate(slots.get("boot_entries") or []):
            if entry:
                state = BootState[entry["state"]]
                written = ota_core.build_otadata_entry(ota_core.make_otadata_entry(entry["seq"], int(state)))
                parts.append((OTADATA_OFFSET + index * SECTOR, written))
        for offset, part in parts:
            flash[offset : offset + len(part)] = part
        self._path.write_bytes(flash)

    def _faulty_slot(self) -> str:
        """The slot an update goes to at first."""
        entries = [entry for entry in self._inputs.get("slots", {}).get("boot_entries") or [] if entry]
        newest = max(entries, key=lambda entry: int(entry["seq"]), default={"slot": "factory"})
        return {"ota_0": "ota_1"}.get(newest["slot"], "ota_0")

    def _make_fault(self, fault: Json | None) -> ota_core.Fault | None:
        if not fault:
            return None
        kind = {"write": ota_core.Fault.WRITE, "erase": ota_core.Fault.ERASE}[fault["op"]]
        beyond = SLOTS[self._faulty_slot()][0] + fault.get("at", 0) + 1
        return ota_core.Fault(ops=kind, count=fault.get("count", 1), errnum=errno.EIO, reaches=beyond)

    def _open(self, rollback: bool) -> Esp32ImageTarget:
        chips = {chip.id: chip.name for chip in ota_core.esp_chips()}
        return Esp32ImageTarget(
            self._path,
            rollback=rollback,
            chip=chips[self._device["chip_id"]],
            chip_revision=self._device["chip_revision"],
            secure_version=self._device["efuse_secure_version"],
            fault=self._fault,
        )

    # -- The boot loader

    def start(self, loader_rollback: bool, app_rollback: bool) -> Running:
        self._end_attempt()
        target = self._reopen(loader_rollback)
        self._entries = self._read_entries(target)
        target.restart()
        self._note_states(target)
        target = self._reopen(app_rollback)
        slot = target.running_slot()
        assert slot is not None
        description = target.describe(slot)
        try:
            state: BootState | None = target.boot_state(slot)
        except NotFoundError:
            state = None
        return Running(
            slot.name,
            "" if description is None else description.version,
            "" if description is None else description.project_name,
            state,
            target.next_slot().name,
        )

    def _reopen(self, rollback: bool) -> Esp32ImageTarget:
        """The target as boot loader and app are built; the same one where they are built alike."""
        if self._target is None or self._rollback != rollback:
            if self._target is not None:
                self._target.close()
                self._target = None
                gc.collect()  # a finished installation holds the file until it is gone
            self._target = self._open(rollback)
            self._rollback = rollback
        return self._target

    def _read_entries(self, target: Esp32ImageTarget) -> dict[str, tuple[int, int]]:
        """Newest entry of each slot: its sequence number and state."""
        newest: dict[str, tuple[int, int]] = {}
        for entry in target.esp.entries():
            facts = ota_core.otadata_facts(entry, 2)
            if (
                facts.slot is not None
                and facts.crc_ok
                and not facts.blank
                and entry.seq >= newest.get(facts.slot, (0, 0))[0]
            ):
                newest[facts.slot] = (entry.seq, entry.state)
        return newest

    def _note_states(self, target: Esp32ImageTarget) -> None:
        entries = self._read_entries(target)
        for slot, (number, state) in sorted(entries.items()):
            old_number, old_state = self._entries.get(slot, (0, None))
            # The running slot gets an entry where it had none, so that there is one to come back to; it stays what
            # it was.
            if old_state is None and state == BootState.VALID:
                continue
            if state != old_state or (state == BootState.NEW and number != old_number):
                self._record("slot_state", {"slot": slot, "state": BootState(state).name})
        self._entries = entries

    def mark_valid(self) -> int:
        assert self._target is not None
        return self._change(self._target.mark_valid)

    def mark_invalid(self) -> int:
        assert self._target is not None
        return self._change(self._target.mark_invalid)

    def _change(self, change: Any) -> int:
        assert self._target is not None
        try:
            change()
        except OtaError as error:
            return error.esp_err
        finally:
            self._note_states(self._target)
        return EspErr.OK

    # -- Attempts

    def decide(self, attempt: int, accept: bool) -> None:
        if self._stream is not None and self._stream.number == attempt:
            self._stream.decide(None if accept else "refused")
        if self._attempt is not None and self._attempt.number == attempt:
            self._attempt.decide(None if accept else "refused")

    def attempt(self, action: StartAttempt, services: Services) -> Generator[float, None, None]:
        failure: HttpFailure | None = None
        body: Body | None = None
        md5: bytes | None = None
        try:
            body = yield from services.client.open(action.url, None if action.resume is None else action.resume.offset)
            md5 = services.checksum(action.md5, self.contents(body.behaviour.get("image", "new")))
        except HttpFailure as error:
            failure = error
        size, offset = (None, 0) if body is None else (body.size, body.offset)
        push = ota_core.PushSource(size=size, capacity=1 << 16, offset=offset)
        attempt = self._begin(action, md5, push, failure, services)
        if body is not None:
            with self._hand_over(), contextlib.suppress(CancelledError):
                push.drain()  # what can be done before the first byte: the header of a resumed image is in the slot
            try:
                while True:
                    piece = yield from body.read(services.read_size)
                    if not piece:
                        break
                    try:
                        with self._hand_over():
                            push.write(piece)
                            push.drain()
                    except CancelledError:
                        break  # the engine wants no more
                    if services.dark():
                        break
                    progress = attempt.progress()
                    if progress is not None and attempt.accepted:
                        services.feed(AttemptProgress(action.attempt, progress.bytes_read))
            except HttpFailure as error:
                failure = error
        with self._hand_over():
            if failure is None:
                push.end()
            else:
                push.fail(_error(failure))
            attempt.join()
        self._attempt = None

    def stream(self, action: StartAttempt, section: OtaSection, services: StreamServices) -> StreamAttempt:
        self._stream = _ChipStream(self, services.real(action, self.contents(services.image)), section, services)
        return self._stream

    def pump(self, stream: StreamAttempt) -> None:
        assert isinstance(stream, _ChipStream)
        stream.pump()

    @property
    def target(self) -> Esp32ImageTarget:
        assert self._target is not None
        return self._target

    def take_baton(self, event: object, post: Callable[[Any], None]) -> None:
        """Something the engine's thread tells."""
        with self._baton:
            if isinstance(event, AttemptFailed) and event.errno == errno.EIO and self._fault is not None:
                event = replace(event, esp_err=int(EspErr.FLASH_OP_FAIL), errno=0)
            if isinstance(event, AttemptFinished):
                self._note_states(self.target)
            post(event)

    def _begin(
        self,
        action: StartAttempt,
        md5: bytes | None,
        push: ota_core.PushSource,
        failure: HttpFailure | None,
        services: Services,
    ) -> _Attempt:
        assert self._target is not None
        target = self._target

        def post(event: Input) -> None:
            with self._baton:
                if isinstance(event, AttemptFailed) and event.errno == errno.EIO and self._fault is not None:
                    # A flash chip has no errno; its driver says this.
                    event = replace(event, esp_err=int(EspErr.FLASH_OP_FAIL), errno=0)
                if isinstance(event, AttemptFinished):
                    self._note_states(target)
                services.feed(event)
                if services.dark():
                    attempt.decide("the power is gone")
                    if not isinstance(event, AttemptFailed | AttemptFinished):
                        raise PowerCut  # ends the engine where it is

        def make(
            made: StartAttempt, where: Target, slot: Slot, options: OtaSection, callbacks: Callbacks
        ) -> Installation:
            if failure is not None:
                raise _error(failure)  # as the HTTPS source does when it is opened
            installer = make_installation(made, where, slot, options, callbacks)
            assert isinstance(installer, Installer)
            installer._source_like = push
            installer._options = replace(
                installer._options,
                threads=False,
                buffer_size=SECTOR,
                buffer_count=2,
                checkpoint_bytes=SECTOR,
                progress_interval_s=3600.0,
            )
            return installer

        if md5 is not None:
            action = replace(action, md5=md5.hex())
        attempt = _Attempt(action, target, OtaSection(), post, make=make)
        self._attempt = attempt
        attempt.start()
        return attempt

    @contextlib.contextmanager
    def _hand_over(self) -> Iterator[None]:
        self._baton.release()
        try:
            yield
        finally:
            self._baton.acquire()

    def _end_attempt(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with self._hand_over():
                assert stream.cancel(WAIT_S), "the attempt does not end"
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            with self._hand_over():
                assert attempt.cancel(WAIT_S), "the attempt does not end"

    def close(self) -> None:
        self._end_attempt()
        if self._target is not None:
            self._target.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _ChipStream(StreamAttempt):
    """The node's attempt over MQTT; what the transfer hands out is carried by the world, not by a thread."""

    def __init__(
        self, platform: ChipPlatform, action: StartAttempt, section: OtaSection, services: StreamServices
    ) -> None:
        self._platform = platform
        self._services = services
        self._world = threading.get_ident()
        super().__init__(
            action,
            platform.target,
            section,
            self._hear,
            node_id=services.node_id,
            transport=services.surroundings,
            loop=services.surroundings,
        )
        self._source: ota_core.PushSource | None = None
        self._has_begun = False

    def _hear(self, event: object) -> None:
        if threading.get_ident() == self._world:
            self._services.post(event)
            return
        self._platform.take_baton(event, self._services.post)
        if self._services.dark():
            self.decide("the power is gone")
            if not isinstance(event, AttemptFailed | AttemptFinished):
                raise PowerCut

    def _make_installation(self, source: ota_core.PushSource) -> InstallationFactory:
        real = super()._make_installation(source)

        def make(*arguments: Any) -> Installation:
            installer = real(*arguments)
            assert isinstance(installer, Installer)
            installer._options = replace(installer._options, threads=False, buffer_count=2, progress_interval_s=3600.0)
            return installer

        return make

    def _start_carrier(self, source: ota_core.PushSource) -> None:
        self._source = source

    def _perform(self, action: Action) -> StreamInputs | None:
        answer = super()._perform(action)
        if isinstance(action, Ready):
            self.pump()
        return answer

    def pump(self) -> None:
        while self._source is not None:
            source = self._source
            if not self._has_begun:
                self._has_begun = True
                item: Any = Ready(0, b"")
            elif self._carried.empty():
                return
            else:
                item = self._carried.get()
            try:
                with self._platform._hand_over():
                    if isinstance(item, Ready):
                        if item.data:
                            source.write(item.data)
                        source.drain()
                    elif item is None:
                        source.end()
                    else:
                        source.fail(item)
            except CancelledError:
                item = None
            if not isinstance(item, Ready):
                self._source = None
                with self._platform._hand_over():
                    assert self._attempt is not None
                    self._attempt._thread.join(WAIT_S)
                return
            if item.data:
                progress = self.progress()
                if progress is not None and self._attempt is not None and self._attempt._gate_passed:
                    self._services.post(AttemptProgress(self.number, progress.bytes_read))
                self._feed(Taken(item.offset + len(item.data)))


class _Attempt(Attempt):
    """The node's attempt, watched."""

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def accepted(self) -> bool:
        return self._gate_passed

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert self.is_over, "the attempt does not end"


def _error(failure: HttpFailure) -> OtaError:
    return error_class(failure.status)(
        f"HTTP twin: {failure.status}",
        status=failure.status,
        esp_err=failure.esp_err,
        stage="source",
        device_code=failure.errno,
    )


def _build(properties: Json) -> bytes:
    """An image as the traces describe it (README.md, `images`); its filling depends on the version."""
    given = {"version": "2.0.0", "project_name": "my_product", "size": 65536, **properties}
    whole = given["size"] - given.get("padding", 0)
    if whole % 16:  # images end on a multiple of 16 bytes; the rest is padding
        given["padding"] = given.get("padding", 0) + whole % 16
    return build_image(seed=str(given["version"]), **given)


def _fast_folder() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None
