"""What all targets with an ESP32's flash have in common: slots, boot entries and app descriptors."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod

from rmaker_ota import ota_core
from rmaker_ota.errors import (
    ArgumentError,
    DataError,
    ImageError,
    NotFoundError,
    RollbackError,
    StateError,
    UnsupportedError,
)
from rmaker_ota.esp_format import AppDescriptor, EspImageHeader, PartitionTable
from rmaker_ota.targets.base import AppDescription, BootState, Slot, Target

NO_APP = (ImageError, DataError, UnsupportedError)
"""What looking for an app raises where there is none."""


class Esp32Target(Target):
    """An ESP32's flash, wherever it is. ``place`` names it in messages."""

    place: str
    _lock: threading.RLock  # of what changes something

    # ---- what a kind of target adds ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def esp(self) -> ota_core.EspTarget:
        """The flash underneath, for looking deeper. Changes belong through this object."""

    @abstractmethod
    def chip_rules(self) -> dict[str, int]:
        """What the chip asks of every image: keyword arguments of the engine's verifier."""

    # ---- what is there -----------------------------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All app slots: ota_0 .., factory, test."""
        return tuple(self._by_name().values())

    def partition_table(self) -> PartitionTable:
        return self.esp.partition_table()

    def slot(self, name: str) -> Slot:
        """A slot by its name. Raises NotFoundError when the partition table has none of that name."""
        slots = self._by_name()
        try:
            return slots[name]
        except KeyError:
            raise NotFoundError(f"{self.place} has no slot {name!r}, only {', '.join(slots)}", stage="target") from None

    def running_slot(self) -> Slot | None:
        name = self.esp.running
        return None if name is None else self._by_name()[name]

    def next_slot(self) -> Slot:
        return self._by_name()[self.esp.next_slot()]

    def describe(self, slot: Slot) -> AppDescription | None:
        try:
            return _description(*self.esp.describe(self._name(slot)))
        except NO_APP:
            return None

    def boot_state(self, slot: Slot) -> BootState:
        try:
            number = self.esp.state(self._name(slot))
        except UnsupportedError as exc:
            raise NotFoundError(exc.message, stage="target") from None
        try:
            return BootState(number)
        except ValueError:
            return BootState.UNDEFINED  # boots like it

    @property
    def secure_version(self) -> int:
        return self.esp.secure_version

    def can_rollback(self) -> bool:
        try:
            self.esp.can_rollback()
        except (RollbackError, StateError):
            return False
        return True

    def verify(self, slot: Slot) -> int:
        """Reads the slot's image and checks all of it, as the boot loader does.

        Returns:
            int: bytes of the image.

        Raises:
            ImageError, DataError, RejectedError: what is wrong with it.
        """
        return self.esp.verify(self._name(slot))

    def verify_image_rules(self) -> dict[str, int]:
        """What the engine's verifier has to know of the chip and its next slot."""
        rules: dict[str, int] = {"bytes_after_allowed": True, **self.chip_rules()}
        running = self.esp.running
        if running is not None:
            rules |= self._mode_rule(running)
        with contextlib.suppress(NotFoundError):
            rules["slot_size"] = self.next_slot().size
        return rules

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _by_name(self) -> dict[str, Slot]:
        return {name: Slot(name, offset, size) for name, _, offset, size in self.esp.slots()}

    def _mode_rule(self, running: str) -> dict[str, int]:
        """The SPI flash mode that an image has to share with the running one."""
        try:
            mode = self.esp.describe(running)[1].spi_flash_mode
        except NO_APP:
            return {}
        return {"spi_flash_mode": mode} if mode else {}

    def _name(self, slot: Slot) -> str:
        if self._by_name().get(slot.name) != slot:
            raise ArgumentError(f"{slot} is not a slot of {self.place}", stage="target")
        return slot.name


def _description(header: EspImageHeader, descriptor: AppDescriptor) -> AppDescription:
    return AppDescription(
        version=descriptor.version,
        project_name=descriptor.project_name,
        secure_version=descriptor.secure_version,
        time=descriptor.time,
        date=descriptor.date,
        idf_version=descriptor.idf_version,
        elf_sha256=descriptor.elf_sha256,
        chip_id=header.chip_id,
        min_chip_revision=header.min_chip_rev_full,
        max_chip_revision=header.max_chip_rev_full,
    )
