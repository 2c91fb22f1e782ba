"""Numbers and names of the RainMaker OTA interface: enums, and what a job callback is given. Error codes: `esp_err`.

Values are those of the C API (specification, section 1); wire strings are protocol constants.
"""

from __future__ import annotations

import enum

from rmaker_ota.records import dataclass

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
