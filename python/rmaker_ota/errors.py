"""The exception tree.

::

    OtaError                      everything this package raises on purpose
    ├── ArgumentError             ERR_ARGUMENT, ERR_HTTP_URL, ERR_HTTP_TLS_FILE     (also ValueError)
    ├── OutOfMemoryError          ERR_NO_MEMORY                                     (also MemoryError)
    ├── StateError                ERR_STATE                                         (also RuntimeError)
    │   ├── PendingVerifyError    ERR_PENDING_VERIFY
    │   └── StateFileError        the file that keeps a node's state is damaged, locked or cannot be used
    ├── ConfigError               a wrong configuration: key, value, what was expected (exit code 2)  (also ValueError)
    ├── CancelledError            ERR_CANCELLED
    ├── CallbackError             ERR_CALLBACK (only where no Python exception is at hand)
    ├── OtaTimeoutError           ERR_DEADLINE, ERR_STALLED, ERR_HTTP_CONNECT_TIMEOUT (also TimeoutError)
    ├── UnsupportedError          ERR_UNSUPPORTED
    ├── NotFoundError             ERR_NOT_FOUND                                     (also LookupError)
    ├── TargetError               the place the image goes to
    │   ├── DeviceError           ERR_SYSTEM, ERR_NO_SPACE, ERR_READ_ONLY, ERR_BUSY,
    │   │                         ERR_PERMISSION, ERR_SHORT_WRITE, ERR_SERIAL_LOST  (also OSError with errno)
    │   ├── ChipError             ERR_CHIP_*: no answer, a refused command, another chip
    │   ├── TooLargeError         ERR_TOO_LARGE
    │   ├── ReadBackError         ERR_READ_BACK
    │   ├── NotResumableError     ERR_NOT_RESUMABLE
    │   ├── SlotRunningError      ERR_SLOT_RUNNING
    │   ├── RollbackError         ERR_ROLLBACK
    │   ├── NotBootableError      ERR_NOT_BOOTABLE
    │   └── FormatError           ERR_PARTITION_TABLE, ERR_OTADATA, ERR_NVS, ERR_NVS_FULL (also ValueError)
    ├── DownloadError             ERR_HTTP_*: connecting, TLS, status, range, redirect  (also ConnectionError)
    └── VerifyError               the bytes are not what was announced
        ├── RejectedError         ERR_REJECTED, ERR_IMAGE_CHIP, ERR_IMAGE_REVISION, ERR_IMAGE_FLASH_MODE,
        │                         ERR_SECURE_VERSION: refused by policy (exit code 3)
        ├── DigestError           ERR_SHA256, ERR_MD5, ERR_SIZE
        ├── ImageError            ERR_IMAGE_*: an ESP image that is not one          (also ValueError)
        └── DataError             ERR_INCOMPLETE, ERR_COMPRESSED_DATA, ERR_EXPANSION  (also ValueError)

Every `OtaError` carries ``status`` (name in the C table, ``"ERR_IMAGE_CHIP"``), ``esp_err`` (int), ``stage``
(``"source"``, ``"sink"``, ...), ``offset`` (bytes from the start of the image) and ``device_code`` (errno, HTTP status,
0 for none).
"""

from __future__ import annotations

import os


class OtaError(Exception):
    """Base of everything raised on purpose.

    Args:
        message: one sentence: what, where, expected, found.
        status: name of the status in the C table.
        esp_err: the ``esp_err_t`` the RainMaker API reports.
        stage: where in the flow it was found.
        offset: byte position in that stage, from the start of the image.
        device_code: errno, HTTP status or a device's own code; 0: none.
    """

    status: str = "ERR_STATE"
    esp_err: int = -1
    stage: str = "none"
    offset: int = 0
    device_code: int = 0

    def __init__(
        self,
        message: str,
        *,
        status: str | None = None,
        esp_err: int | None = None,
        stage: str = "none",
        offset: int = 0,
        device_code: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        if status is not None:
            self.status = status
        if esp_err is not None:
            self.esp_err = esp_err
        self.stage = stage
        self.offset = offset
        self.device_code = device_code

    def __str__(self) -> str:
        return self.message


class ArgumentError(OtaError, ValueError):
    status, esp_err = "ERR_ARGUMENT", 0x102


class OutOfMemoryError(OtaError, MemoryError):
    status, esp_err = "ERR_NO_MEMORY", 0x101


class StateError(OtaError, RuntimeError):
    status, esp_err = "ERR_STATE", 0x103


class PendingVerifyError(StateError):
    status, esp_err = "ERR_PENDING_VERIFY", 0x1506


class StateFileError(StateError):
    """The message names the file and the way out."""

    esp_err = -1


class ConfigError(OtaError, ValueError):
    """The message names the file, the key, the value found and what was expected."""

    status, esp_err = "ERR_ARGUMENT", 0x102


class CancelledError(OtaError):
    status, esp_err = "ERR_CANCELLED", -1


class CallbackError(OtaError):
    status, esp_err = "ERR_CALLBACK", -1


class OtaTimeoutError(OtaError, TimeoutError):
    status, esp_err = "ERR_DEADLINE", 0x107


class UnsupportedError(OtaError):
    status, esp_err = "ERR_UNSUPPORTED", 0x106


class NotFoundError(OtaError, LookupError):
    status, esp_err = "ERR_NOT_FOUND", 0x105


class TargetError(OtaError):
    pass


class DeviceError(TargetError, OSError):
    """The operating system or the device refused; ``errno`` and ``strerror`` are those of the system."""

    status, esp_err = "ERR_SYSTEM", -1

    def __init__(self, message: str, *, device_code: int = 0, **details: object) -> None:
        super().__init__(message, device_code=device_code, **details)  # type: ignore[arg-type]
        self.errno = device_code or None
        self.strerror = os.strerror(device_code) if device_code else message

    def __str__(self) -> str:
        return self.message


class ChipError(TargetError):
    """A chip on a serial line: ``device_code`` is ``status << 8 | error`` of its answer, or 0."""

    status, esp_err = "ERR_CHIP_REFUSED", -1


class TooLargeError(TargetError):
    status, esp_err = "ERR_TOO_LARGE", 0x104


class ReadBackError(TargetError):
    status, esp_err = "ERR_READ_BACK", 0x1503


class NotResumableError(TargetError):
    status, esp_err = "ERR_NOT_RESUMABLE", 0x103


class SlotRunningError(TargetError):
    status, esp_err = "ERR_SLOT_RUNNING", 0x1501


class RollbackError(TargetError):
    status, esp_err = "ERR_ROLLBACK", 0x1505


class NotBootableError(TargetError):
    status, esp_err = "ERR_NOT_BOOTABLE", -1


class FormatError(TargetError, ValueError):
    status, esp_err = "ERR_PARTITION_TABLE", -1


class DownloadError(OtaError, ConnectionError):
    status, esp_err = "ERR_HTTP_CONNECT", 0x7002

    def __init__(self, message: str, *, device_code: int = 0, **details: object) -> None:
        super().__init__(message, device_code=device_code, **details)  # type: ignore[arg-type]
        self.errno = None
        self.strerror = message

    def __str__(self) -> str:
        return self.message


class VerifyError(OtaError):
    status, esp_err = "ERR_IMAGE_STRUCTURE", 0x1503


class RejectedError(VerifyError):
    status, esp_err = "ERR_REJECTED", -1


class DigestError(VerifyError):
    status, esp_err = "ERR_SHA256", 0x1503


class ImageError(VerifyError, ValueError):
    status, esp_err = "ERR_IMAGE_STRUCTURE", 0x1503


class DataError(VerifyError, ValueError):
    status, esp_err = "ERR_INCOMPLETE", -1


_CLASSES: dict[str, type[OtaError]] = {
    "ERR_ARGUMENT": ArgumentError,
    "ERR_HTTP_URL": ArgumentError,
    "ERR_HTTP_TLS_FILE": ArgumentError,
    "ERR_NO_MEMORY": OutOfMemoryError,
    "ERR_STATE": StateError,
    "ERR_PENDING_VERIFY": PendingVerifyError,
    "ERR_CANCELLED": CancelledError,
    "ERR_CALLBACK": CallbackError,
    "ERR_DEADLINE": OtaTimeoutError,
    "ERR_STALLED": OtaTimeoutError,
    "ERR_HTTP_CONNECT_TIMEOUT": OtaTimeoutError,
    "ERR_UNSUPPORTED": UnsupportedError,
    "ERR_NOT_FOUND": NotFoundError,
    "ERR_SYSTEM": DeviceError,
    "ERR_NO_SPACE": DeviceError,
    "ERR_READ_ONLY": DeviceError,
    "ERR_BUSY": DeviceError,
    "ERR_PERMISSION": DeviceError,
    "ERR_SHORT_WRITE": DeviceError,
    "ERR_SERIAL_LOST": DeviceError,
    "ERR_CHIP_SILENT": ChipError,
    "ERR_CHIP_PROTOCOL": ChipError,
    "ERR_CHIP_REFUSED": ChipError,
    "ERR_CHIP_OTHER": ChipError,
    "ERR_CHIP_BOOT_MODE": ChipError,
    "ERR_CHIP_RESTARTED": ChipError,
    "ERR_TOO_LARGE": TooLargeError,
    "ERR_READ_BACK": ReadBackError,
    "ERR_NOT_RESUMABLE": NotResumableError,
    "ERR_SLOT_RUNNING": SlotRunningError,
    "ERR_ROLLBACK": RollbackError,
    "ERR_NOT_BOOTABLE": NotBootableError,
    "ERR_PARTITION_TABLE": FormatError,
    "ERR_OTADATA": FormatError,
    "ERR_NVS": FormatError,
    "ERR_NVS_FULL": FormatError,
    "ERR_HTTP_CONNECT": DownloadError,
    "ERR_HTTP_RESOLVE": DownloadError,
    "ERR_HTTP_TLS": DownloadError,
    "ERR_HTTP_STATUS": DownloadError,
    "ERR_HTTP_REDIRECT": DownloadError,
    "ERR_HTTP_DOWNGRADE": DownloadError,
    "ERR_HTTP_CLOSED": DownloadError,
    "ERR_HTTP_NOT_MODIFIED": DownloadError,
    "ERR_HTTP_PROTOCOL": DownloadError,
    "ERR_HTTP_RANGE": DownloadError,
    "ERR_HTTP_INSECURE": DownloadError,
    "ERR_HTTP_NO_RESPONSE": DownloadError,
    "ERR_REJECTED": RejectedError,
    "ERR_IMAGE_CHIP": RejectedError,
    "ERR_IMAGE_REVISION": RejectedError,
    "ERR_IMAGE_FLASH_MODE": RejectedError,
    "ERR_SECURE_VERSION": RejectedError,
    "ERR_SHA256": DigestError,
    "ERR_MD5": DigestError,
    "ERR_SIZE": DigestError,
    "ERR_IMAGE_MAGIC": ImageError,
    "ERR_IMAGE_STRUCTURE": ImageError,
    "ERR_IMAGE_CHECKSUM": ImageError,
    "ERR_IMAGE_HASH": ImageError,
    "ERR_IMAGE_DESCRIPTOR": ImageError,
    "ERR_INCOMPLETE": DataError,
    "ERR_COMPRESSED_DATA": DataError,
    "ERR_EXPANSION": DataError,
}


def error_class(status: str) -> type[OtaError]:
    """The class raised for a status name of the C table.

    Raises:
        KeyError: the table has no such error.
    """
    return _CLASSES[status]
