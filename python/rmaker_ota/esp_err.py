"""``esp_err_t``: the error numbers of the RainMaker API, and their names.

Source: ESP-IDF ``esp_err.h``, ``esp_ota_ops.h``, ``esp_http_client.h``, ``esp_flash.h``, ``esp_https_ota.h``,
``nvs.h``.
"""

from __future__ import annotations

import enum


class EspErr(enum.IntEnum):
    """Named as in C, without the prefix: ``ESP_ERR_NO_MEM`` is ``EspErr.NO_MEM``, ``ESP_OK`` is ``EspErr.OK``."""

    OK = 0
    FAIL = -1
    NO_MEM = 0x101
    INVALID_ARG = 0x102
    INVALID_STATE = 0x103
    INVALID_SIZE = 0x104
    NOT_FOUND = 0x105
    NOT_SUPPORTED = 0x106
    TIMEOUT = 0x107
    INVALID_VERSION = 0x10A
    NOT_FINISHED = 0x10C
    NVS_NOT_FOUND = 0x1102
    NVS_INVALID_LENGTH = 0x110C
    OTA_PARTITION_CONFLICT = 0x1501
    OTA_SELECT_INFO_INVALID = 0x1502
    OTA_VALIDATE_FAILED = 0x1503
    OTA_SMALL_SEC_VER = 0x1504
    OTA_ROLLBACK_FAILED = 0x1505
    OTA_ROLLBACK_INVALID_STATE = 0x1506
    OTA_ALREADY_IN_PROGRESS = 0x1507
    OTA_SPI_MODE_MISMATCH = 0x1508
    FLASH_OP_FAIL = 0x6001
    FLASH_OP_TIMEOUT = 0x6002
    HTTP_MAX_REDIRECT = 0x7001
    HTTP_CONNECT = 0x7002
    HTTP_WRITE_DATA = 0x7003
    HTTP_FETCH_HEADER = 0x7004
    HTTP_INVALID_TRANSPORT = 0x7005
    HTTP_CONNECTING = 0x7006
    HTTP_EAGAIN = 0x7007
    HTTP_CONNECTION_CLOSED = 0x7008
    HTTP_NOT_MODIFIED = 0x7009
    HTTP_RANGE_NOT_SATISFIABLE = 0x700A
    HTTP_READ_TIMEOUT = 0x700B
    HTTP_INCOMPLETE_DATA = 0x700C
    HTTP_REDIRECT_DOWNGRADE = 0x700D
    HTTP_HEADER_TOO_LONG = 0x700E
    HTTPS_OTA_IN_PROGRESS = 0x9001


def esp_err_name(code: int) -> str:
    """The C name of a code, ``"ESP_ERR_HTTP_CONNECT"``; ``"UNKNOWN ERROR"`` for one that has none here."""
    try:
        name = EspErr(code).name
    except ValueError:
        return "UNKNOWN ERROR"
    return f"ESP_{name}" if name in {"OK", "FAIL"} else f"ESP_ERR_{name}"
