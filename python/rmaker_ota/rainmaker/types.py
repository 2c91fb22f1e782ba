"""Numbers and names of the RainMaker OTA interface: error codes, enums, and what a job callback is given.

Values are those of the C API (specification, section 1); wire strings are protocol constants.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class EspErr(enum.IntEnum):
    """``esp_err_t``: the codes that occur in OTA (specification, section 1.1)."""

    ESP_OK = 0
    ESP_FAIL = -1
    ESP_ERR_NO_MEM = 0x101
    ESP_ERR_INVALID_ARG = 0x102
    ESP_ERR_INVALID_STATE = 0x103
    ESP_ERR_INVALID_SIZE = 0x104
    ESP_ERR_NOT_FOUND = 0x105
    ESP_ERR_NOT_SUPPORTED = 0x106
    ESP_ERR_TIMEOUT = 0x107
    ESP_ERR_INVALID_RESPONSE = 0x108
    ESP_ERR_INVALID_CRC = 0x109
    ESP_ERR_INVALID_VERSION = 0x10A
    ESP_ERR_INVALID_MAC = 0x10B
    ESP_ERR_NOT_FINISHED = 0x10C
    ESP_ERR_NVS_NOT_INITIALIZED = 0x1101
    ESP_ERR_NVS_NOT_FOUND = 0x1102
    ESP_ERR_NVS_INVALID_LENGTH = 0x110C
    ESP_ERR_OTA_PARTITION_CONFLICT = 0x1501
    ESP_ERR_OTA_SELECT_INFO_INVALID = 0x1502
    ESP_ERR_OTA_VALIDATE_FAILED = 0x1503
    ESP_ERR_OTA_SMALL_SEC_VER = 0x1504
    ESP_ERR_OTA_ROLLBACK_FAILED = 0x1505
    ESP_ERR_OTA_ROLLBACK_INVALID_STATE = 0x1506
    ESP_ERR_OTA_ALREADY_IN_PROGRESS = 0x1507
    ESP_ERR_OTA_SPI_MODE_MISMATCH = 0x1508
    ESP_ERR_FLASH_OP_FAIL = 0x6001
    ESP_ERR_FLASH_OP_TIMEOUT = 0x6002
    ESP_ERR_HTTP_MAX_REDIRECT = 0x7001
    ESP_ERR_HTTP_CONNECT = 0x7002
    ESP_ERR_HTTP_WRITE_DATA = 0x7003
    ESP_ERR_HTTP_FETCH_HEADER = 0x7004
    ESP_ERR_HTTP_INVALID_TRANSPORT = 0x7005
    ESP_ERR_HTTP_CONNECTING = 0x7006
    ESP_ERR_HTTP_EAGAIN = 0x7007
    ESP_ERR_HTTP_CONNECTION_CLOSED = 0x7008
    ESP_ERR_HTTP_NOT_MODIFIED = 0x7009
    ESP_ERR_HTTP_RANGE_NOT_SATISFIABLE = 0x700A
    ESP_ERR_HTTP_READ_TIMEOUT = 0x700B
    ESP_ERR_HTTP_INCOMPLETE_DATA = 0x700C
    ESP_ERR_HTTP_REDIRECT_DOWNGRADE = 0x700D
    ESP_ERR_HTTP_HEADER_TOO_LONG = 0x700E
    ESP_ERR_HTTPS_OTA_IN_PROGRESS = 0x9001


def esp_err_name(code: int) -> str:
    """Name of an error code, as status reports quote it: ``"ESP_ERR_HTTP_CONNECT"``; ``"ERROR"`` for an unknown one."""
    try:
        return EspErr(code).name
    except ValueError:
        return "ERROR"


OTA_EVENT_BASE = "RMAKER_OTA_EVENT"
COMMON_EVENT_BASE = "RMAKER_COMMON_EVENT"
RMAKER_EVENT_BASE = "RMAKER_EVENT"


class OtaEvent(enum.IntEnum):
    """Events of the base ``RMAKER_OTA_EVENT``. All but STARTING and REQ_FOR_REBOOT carry the report's text."""

    INVALID = 0
    STARTING = 1
    IN_PROGRESS = 2
    SUCCESSFUL = 3
    FAILED = 4
    REJECTED = 5
    DELAYED = 6
    REQ_FOR_REBOOT = 7


class CommonEvent(enum.IntEnum):
    """Events of the base ``RMAKER_COMMON_EVENT``. REBOOT carries the delay in seconds, MQTT_PUBLISHED a message id."""

    REBOOT = 0
    WIFI_RESET = 1
    FACTORY_RESET = 2
    MQTT_CONNECTED = 3
    MQTT_DISCONNECTED = 4
    MQTT_PUBLISHED = 5
    TZ_POSIX_CHANGED = 6
    TZ_CHANGED = 7
    MQTT_MSG_DELETED = 8


class RmakerEvent(enum.IntEnum):
    """Events of the base ``RMAKER_EVENT``."""

    INIT_DONE = 1
    CLAIM_STARTED = 2
    CLAIM_SUCCESSFUL = 3
    CLAIM_FAILED = 4
    USER_NODE_MAPPING_DONE = 5
    LOCAL_CTRL_STARTED = 6
    USER_NODE_MAPPING_RESET = 7
    LOCAL_CTRL_STOPPED = 8
    STARTED = 9
    CONFIG_REPORTED = 10


class OtaStatus(enum.IntEnum):
    """``ota_status_t``: what a status report says."""

    IN_PROGRESS = 1
    SUCCESS = 2
    FAILED = 3
    DELAYED = 4
    REJECTED = 5


_STATUS: dict[int, tuple[str, OtaEvent]] = {
    OtaStatus.IN_PROGRESS: ("in-progress", OtaEvent.IN_PROGRESS),
    OtaStatus.SUCCESS: ("success", OtaEvent.SUCCESSFUL),
    OtaStatus.FAILED: ("failed", OtaEvent.FAILED),
    OtaStatus.DELAYED: ("delayed", OtaEvent.DELAYED),
    OtaStatus.REJECTED: ("rejected", OtaEvent.REJECTED),
}


def status_text(status: int) -> str:
    """Wire string of a status; ``"invalid"`` for a number that is none."""
    return _STATUS.get(status, ("invalid", OtaEvent.INVALID))[0]


def status_event(status: int) -> OtaEvent:
    """Event posted with a status report; INVALID for a number that is none."""
    return _STATUS.get(status, ("invalid", OtaEvent.INVALID))[1]


class OtaType(enum.IntEnum):
    """``esp_rmaker_ota_type_t``: where jobs come from."""

    USING_PARAMS = 1
    USING_TOPICS = 2


class DiagStatus(enum.IntEnum):
    """``esp_rmaker_ota_diag_status_t``: verdict of the application's diagnostics."""

    FAIL = 0
    PENDING = 1
    SUCCESS = 2


class DiagState(enum.IntEnum):
    """``esp_rmaker_ota_diag_state_t``: when the diagnostics are asked."""

    INIT = 0
    POST_MQTT = 1


@dataclass(frozen=True, slots=True)
class OtaData:
    """``esp_rmaker_ota_data_t``: one job, as its callback sees it. None stands for C's NULL.

    ``filesize`` is bytes, 0 = unknown; ``metadata`` is the exact JSON text of the job's ``metadata`` object;
    ``ota_job_id`` is None in the params workflow; ``server_cert`` (PEM) and ``priv`` are those given when enabling.
    """

    url: str | None
    stream_id: str | None = None
    filesize: int = 0
    fw_version: str | None = None
    file_md5: str | None = None
    ota_job_id: str | None = None
    server_cert: str | None = None
    priv: object = None
    metadata: str | None = None
