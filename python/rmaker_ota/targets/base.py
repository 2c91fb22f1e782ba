"""What a target offers: slots, a boot choice, and a sink for the slot that is not running.

Terms: a *slot* is a place an image can be installed to; an *image* is what is written to a slot; the *running* slot is
the one whose image runs now; the *next* slot is the one an update goes to. A new image is *pending verify* until
somebody confirms it (``mark_valid``), or it is *rolled back* (``mark_invalid``).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from rmaker_ota.records import dataclass

if TYPE_CHECKING:
    from rmaker_ota.ota_core import Sink


class BootState(enum.IntEnum):
    """State of a slot's boot entry (ESP-IDF ``esp_ota_img_states_t``)."""

    NEW = 0
    PENDING_VERIFY = 1
    VALID = 2
    INVALID = 3
    ABORTED = 4
    UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class AppDescription:
    """What an app image says of itself (``esp_app_desc_t``); strings end at their first NUL."""

    version: str
    project_name: str
    secure_version: int = 0
    time: str = ""
    date: str = ""
    idf_version: str = ""
    elf_sha256: bytes = b""
    chip_id: int | None = None
    min_chip_revision: int = 0
    max_chip_revision: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """A place an image can be installed to. ``offset`` and ``size`` are bytes on the target's medium."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class BootReport:
    """What a restart of a virtual target did: the slot that boots (None: nothing does) and why, in words."""

    slot: Slot | None
    reasons: tuple[str, ...]
    writes: tuple[str, ...]


class Target(ABC):
    """One place images go. Methods may be called from any thread, one at a time; all raise `OtaError` subclasses."""

    uri: str
    boots_with_process: bool = False
    """Whether `restart` is the boot loader in software, so that starting a node's process is this target's power-on."""

    @abstractmethod
    def running_slot(self) -> Slot | None:
        """The slot whose image runs now; None where the target has no such notion."""

    @abstractmethod
    def next_slot(self) -> Slot:
        """The slot an update goes to. Raises NotFoundError when there is none."""

    @abstractmethod
    def describe(self, slot: Slot) -> AppDescription | None:
        """The app descriptor found in a slot, or None when there is no readable one."""

    @abstractmethod
    def boot_state(self, slot: Slot) -> BootState:
        """State of the slot's boot entry. Raises NotFoundError when it has none (factory slot, no otadata)."""

    @property
    @abstractmethod
    def secure_version(self) -> int:
        """The smallest secure version the target accepts (eFuse); 0 where it has none."""

    @abstractmethod
    def open_sink(self, slot: Slot, *, activate: bool = True) -> Sink:
        """A sink for the slot; its commit makes the slot the next one to boot when ``activate``.

        Nothing is changed before the engine opens the sink. Opening it drops whatever would make the slot boot.
        Raises PendingVerifyError while the running image is not confirmed, SlotRunningError for the running slot.
        """

    @abstractmethod
    def set_boot(self, slot: Slot) -> None:
        """Verifies the slot's image and makes it the next one to boot."""

    @abstractmethod
    def mark_valid(self) -> None:
        """Confirms the running image. Raises StateError when the running slot is not the one the boot entry names."""

    @abstractmethod
    def mark_invalid(self) -> None:
        """Marks the running image invalid so that the next restart rolls back; does not restart.

        Raises RollbackError, with nothing changed, when there is no image to roll back to.
        """

    @abstractmethod
    def can_rollback(self) -> bool:
        """Whether another image would boot if the running one were marked invalid."""

    @abstractmethod
    def restart(self) -> BootReport:
        """Chooses the slot to boot as the boot loader would, with all it writes; that is the running slot from then."""

    def verify_image_rules(self) -> dict[str, int]:
        """Keyword arguments for the engine's ESP image verifier; empty where images are not ESP images."""
        return {}

    @abstractmethod
    def close(self) -> None: ...

    def release(self) -> None:  # noqa: B027
        """Lets run what was stopped to be looked at or written. Nothing where looking stops nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
