"""Target ``file:PATH``: a raw file or block device as one slot; nothing chooses what boots."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from rmaker_ota import ota_core
from rmaker_ota.errors import DeviceError, NotFoundError, OtaError, UnsupportedError
from rmaker_ota.targets.base import AppDescription, BootReport, BootState, Slot, Target

if TYPE_CHECKING:
    from pathlib import Path

_NO_BOOT_CHOICE = "a file: target has no boot choice"


class FileTarget(Target):
    """A regular file, which ends up exactly as long as the image (made when missing), or a block device.

    Args:
        path: of the file or device.
        buffered: write through the page cache although direct writes are possible.
        fault: what goes wrong, for tests.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, buffered: bool = False, fault: ota_core.Fault | None = None
    ) -> None:
        self._path = os.fspath(path)
        self.uri = f"file:{self._path}"
        self._buffered = buffered
        self._fault = fault

    @property
    def path(self) -> Path:
        """Where the file or device is."""
        from pathlib import Path  # 4 ms of imports that an installation does without

        return Path(self._path)

    def running_slot(self) -> None:
        return None

    def next_slot(self) -> Slot:
        """The file or device; its size is what it can hold: the device's capacity, or the room left for the file."""
        try:
            try:
                status = os.stat(self._path)
            except FileNotFoundError:
                return Slot(self._path, 0, self._room())
            if stat.S_ISBLK(status.st_mode):
                fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    return Slot(self._path, 0, os.lseek(fd, 0, os.SEEK_END))
                finally:
                    os.close(fd)
            return Slot(self._path, 0, self._room() + status.st_blocks * 512)
        except OSError as exc:
            raise DeviceError(
                f"{self._path}: {exc.strerror}",
                status="ERR_NOT_FOUND" if isinstance(exc, FileNotFoundError) else "ERR_SYSTEM",
                stage="target",
                device_code=exc.errno or 0,
            ) from None

    def _room(self) -> int:
        """Bytes of the file system that are free for this user."""
        room = os.statvfs(os.path.dirname(self._path) or ".")
        return room.f_bavail * room.f_frsize

    def describe(self, slot: Slot) -> AppDescription | None:
        from rmaker_ota.inspect import app_description

        try:
            with open(self._path, "rb") as file:
                return app_description(file.read(288))
        except (OSError, OtaError):
            return None

    def boot_state(self, slot: Slot) -> BootState:
        raise NotFoundError(_NO_BOOT_CHOICE, stage="target")

    @property
    def secure_version(self) -> int:
        return 0

    def open_sink(self, slot: Slot, *, activate: bool = True) -> ota_core.Sink:
        del activate  # there is nothing to choose
        try:
            is_block = stat.S_ISBLK(os.stat(self._path).st_mode)
        except OSError:
            is_block = False  # the sink says what is wrong with it
        return ota_core.FileSink(
            self._path, buffered=self._buffered, max_size=slot.size if is_block else 0, fault=self._fault
        )

    def set_boot(self, slot: Slot) -> None:
        raise UnsupportedError(_NO_BOOT_CHOICE, stage="target")

    def mark_valid(self) -> None:
        raise UnsupportedError(_NO_BOOT_CHOICE, stage="target")

    def mark_invalid(self) -> None:
        raise UnsupportedError(_NO_BOOT_CHOICE, stage="target")

    def can_rollback(self) -> bool:
        return False

    def restart(self) -> BootReport:
        raise UnsupportedError(_NO_BOOT_CHOICE, stage="target")

    def close(self) -> None:
        """Nothing is held open between calls."""
