"""Target ``esp32-image:PATH``: a virtual ESP32 in a flash image file.

The file is a raw dump of the whole flash: partition table, otadata and app slots at their real offsets. What a chip
keeps outside its flash lies beside it in ``PATH.chip.json`` (`chip_record`). ``restart`` runs the boot loader's choice
in software.

A chip without a record is switched off. Looking at it changes nothing and shows what a power-on would start; the first
change (a sink that is opened, `set_boot`, `mark_valid`, `mark_invalid`) switches it on first, with all the boot loader
writes, because only an image that runs can do these things. What runs is written down before that, so that it is still
known when another slot was chosen since.

Order of what is made durable: flash first, one operation at a time, the record after it. A cut between a restart's
flash writes and its record leaves the old slot recorded as running, which it was; the next restart, as after any power
cut, sorts out the rest.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmaker_ota import ota_core
from rmaker_ota.errors import DeviceError, OtaError
from rmaker_ota.esp_format import BootDecision, OtadataOp
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.base import BootReport, Slot
from rmaker_ota.targets.chip_record import ChipRecord
from rmaker_ota.targets.esp32 import NO_APP, Esp32Target


class Esp32ImageTarget(Esp32Target):
    """A virtual ESP32.

    Options that are given stand for this object's life and are not written down; those that are None come from the
    chip's record, or are what a usual chip has.

    Args:
        path: of the flash image. It is taken exclusively unless ``read_only``.
        read_only: for looking only, also while somebody else has the chip.
        rollback: boot loader and app are built with app rollback (usual: yes).
        anti_rollback: they are built with secure version checks; means ``rollback`` too (usual: no).
        secure_version: burnt into the eFuses at least.
        chip: name of the chip (``esp32c3``); usual: the one its boot loader or its app is for.
        chip_revision: major * 100 + minor.
        table_offset: of the partition table, bytes (usual: 0x8000).
        rewrite_same: write sectors of an image that hold the right bytes already too.
        fault: what goes wrong with the flash, for tests.

    Raises:
        DeviceError, NotFoundError: the file cannot be opened, or is in use.
        ArgumentError: it is no flash image.
        FormatError: its partition table, otadata or record is damaged.
    """

    boots_with_process = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        rollback: bool | None = None,
        anti_rollback: bool | None = None,
        secure_version: int | None = None,
        chip: str | None = None,
        chip_revision: int | None = None,
        table_offset: int | None = None,
        rewrite_same: bool = False,
        fault: ota_core.Fault | None = None,
    ) -> None:
        self.path = Path(path)
        self.place = str(self.path)
        self.uri = f"esp32-image:{self.path}"
        self._read_only = read_only
        self._rewrite_same = rewrite_same
        self._lock = threading.RLock()
        given = {
            "rollback": rollback,
            "anti_rollback": anti_rollback,
            "chip_id": None if chip is None else ota_core.esp_chip_id(chip),
            "chip_revision": chip_revision,
            "table_offset": table_offset,
        }
        self._given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self._least_secure_version = secure_version or 0
        self._fault = fault
        self._open()
        if not read_only and chip_record.load(self.path) != self._record:
            self._esp.close()  # whoever had the chip until now changed its record since it was read
            self._open()
        if self._chip.chip_id is None:
            chip_id = self._guess_chip()
            if chip_id is not None:  # now images are checked for it
                self._given["chip_id"] = chip_id
                self._esp.close()
                self._open()
        self._slots = super()._by_name()

    # ---- what is there -----------------------------------------------------------------------------------------------

    @property
    def esp(self) -> ota_core.EspTarget:
        return self._esp

    @property
    def is_powered(self) -> bool:
        """Whether an image runs. Otherwise the chip is switched off; `running_slot` is what a power-on would start."""
        return self._record is not None and self._record.running is not None

    def preview(self) -> BootReport:
        """What a restart would do now. Changes nothing."""
        return self._report(self._esp.choose())

    def chip_rules(self) -> dict[str, int]:
        chip = self._chip
        rules: dict[str, int] = {}
        if chip.chip_id is not None:
            rules["chip_id"] = chip.chip_id
        if chip.chip_revision is not None:
            rules["chip_revision"] = chip.chip_revision
        if chip.efuse_block_revision is not None:
            rules["efuse_block_revision"] = chip.efuse_block_revision
        if chip.ignore_max_revision:
            rules["ignore_max_revision"] = True
        return rules

    # ---- changes -----------------------------------------------------------------------------------------------------

    def open_sink(self, slot: Slot, *, activate: bool = True) -> ota_core.Sink:
        with self._lock:
            name = self._name(slot)
            self._need_writable()
            sink = self._esp.sink(name, activate=activate, rewrite_same=self._rewrite_same)
            self._save()
            return sink

    def set_boot(self, slot: Slot) -> None:
        with self._lock:
            name = self._name(slot)
            self._change(lambda: self._esp.set_boot(name))

    def mark_valid(self) -> None:
        with self._lock:
            self._change(self._esp.mark_valid)

    def mark_invalid(self) -> None:
        with self._lock:
            self._change(self._esp.mark_invalid)

    def restart(self) -> BootReport:
        with self._lock:
            self._need_writable()
            decision = self._esp.boot()
            self._save()
            return self._report(decision)

    def close(self) -> None:
        self._esp.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._record = chip_record.load(self.path)
        known = self._record or ChipRecord()
        burnt = max(known.secure_version, self._least_secure_version)
        self._chip = chip = replace(known, **self._given, secure_version=burnt)
        self._esp = ota_core.EspTarget(
            self.path,
            read_only=self._read_only,
            table_offset=chip.table_offset,
            rollback=chip.rollback,
            anti_rollback=chip.anti_rollback,
            secure_version=chip.secure_version,
            running=chip.running,
            chip_id=chip.chip_id,
            chip_revision=chip.chip_revision,
            efuse_block_revision=chip.efuse_block_revision,
            ignore_max_revision=chip.ignore_max_revision,
            fault=self._fault,
        )

    def _by_name(self) -> dict[str, Slot]:
        return self._slots

    def _need_writable(self) -> None:
        if self._read_only:
            raise DeviceError(
                f"{self.path} was opened for reading only",
                status="ERR_READ_ONLY",
                stage="target",
                device_code=errno.EROFS,
            )

    def _change(self, change: Callable[[], None]) -> None:
        self._need_writable()
        self._save()  # what runs
        try:
            change()
        finally:
            self._save()  # what was burnt

    def _save(self) -> None:
        """Writes down what runs and what is burnt, where that changed."""
        old = self._record or ChipRecord()
        burnt = self._esp.secure_version
        record = replace(
            old,
            chip_id=self._chip.chip_id if old.chip_id is None else old.chip_id,
            running=self._esp.running,
            secure_version=burnt if burnt > self._chip.secure_version else old.secure_version,
        )
        if record != self._record:
            chip_record.save(self.path, record)
            self._record = record

    def _guess_chip(self) -> int | None:
        """The chip that boot loader or running app are for."""
        for chip in ota_core.esp_chips():
            try:
                header = ota_core.parse_image_header(self._esp.read(chip.bootloader_offset, 24))
            except OtaError:
                continue
            if header.chip_id == chip.id:
                return chip.id
        running = self._esp.running
        if running is not None:
            try:
                return self._esp.describe(running)[0].chip_id
            except NO_APP:
                pass
        return None

    def _report(self, decision: BootDecision) -> BootReport:
        writes = [_op_text(op) for op in decision.plan.ops]
        if decision.plan.secure_version is not None:
            writes.append(f"eFuses: secure version {decision.plan.secure_version}")
        slot = None if decision.slot is None else self._slots[decision.slot]
        return BootReport(slot, decision.reasons, tuple(writes))


def _op_text(op: OtadataOp) -> str:
    if op.entry is None:
        return f"otadata sector {op.sector}: erased"
    state = ota_core.otadata_facts(op.entry, 1).state_name
    return f"otadata sector {op.sector}: sequence {op.entry.seq}, {state}"
