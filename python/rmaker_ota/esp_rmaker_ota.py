"""The C API under its C names: ``esp_rmaker_ota.h`` in Python.

Functions take and return what C does: an ``esp_err_t`` (`EspErr`), never an exception. They work on the process's
default node, the first `rmaker_ota.Node` made and not yet stopped; without one they return ``ESP_ERR_INVALID_STATE``.
For several nodes, and exceptions in place of numbers, see `rmaker_ota.Ota`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rmaker_ota.errors import OtaError
from rmaker_ota.esp_err import EspErr, esp_err_name
from rmaker_ota.rainmaker.application import DiagCallback, OtaCallback, OtaConfig, OtaDiagPriv, OtaHandle
from rmaker_ota.rainmaker.default_cert import DEFAULT_SERVER_CERT
from rmaker_ota.rainmaker.node import Node, default_node
from rmaker_ota.rainmaker.types import OTA_EVENT_BASE, DiagState, DiagStatus, OtaData, OtaEvent, OtaStatus, OtaType

log = logging.getLogger(__name__)

# Types.
esp_err_t = EspErr
esp_rmaker_ota_handle_t = OtaHandle
esp_rmaker_ota_data_t = OtaData
esp_rmaker_ota_config_t = OtaConfig
esp_rmaker_ota_diag_priv_t = OtaDiagPriv
esp_rmaker_ota_event_t = OtaEvent
esp_rmaker_ota_type_t = OtaType
esp_rmaker_ota_diag_status_t = DiagStatus
esp_rmaker_ota_diag_state_t = DiagState
ota_status_t = OtaStatus
esp_rmaker_ota_cb_t = OtaCallback
esp_rmaker_post_ota_diag_t = DiagCallback
esp_event_base_t = str

# Enum members and constants.
ESP_OK = EspErr.OK
ESP_FAIL = EspErr.FAIL
ESP_ERR_NO_MEM = EspErr.NO_MEM
ESP_ERR_INVALID_ARG = EspErr.INVALID_ARG
ESP_ERR_INVALID_STATE = EspErr.INVALID_STATE
ESP_ERR_INVALID_SIZE = EspErr.INVALID_SIZE
ESP_ERR_NOT_FOUND = EspErr.NOT_FOUND
ESP_ERR_NOT_SUPPORTED = EspErr.NOT_SUPPORTED
ESP_ERR_TIMEOUT = EspErr.TIMEOUT
ESP_ERR_INVALID_VERSION = EspErr.INVALID_VERSION
ESP_ERR_NOT_FINISHED = EspErr.NOT_FINISHED
ESP_ERR_NVS_NOT_FOUND = EspErr.NVS_NOT_FOUND
ESP_ERR_NVS_INVALID_LENGTH = EspErr.NVS_INVALID_LENGTH
ESP_ERR_OTA_PARTITION_CONFLICT = EspErr.OTA_PARTITION_CONFLICT
ESP_ERR_OTA_SELECT_INFO_INVALID = EspErr.OTA_SELECT_INFO_INVALID
ESP_ERR_OTA_VALIDATE_FAILED = EspErr.OTA_VALIDATE_FAILED
ESP_ERR_OTA_SMALL_SEC_VER = EspErr.OTA_SMALL_SEC_VER
ESP_ERR_OTA_ROLLBACK_FAILED = EspErr.OTA_ROLLBACK_FAILED
ESP_ERR_OTA_ROLLBACK_INVALID_STATE = EspErr.OTA_ROLLBACK_INVALID_STATE
ESP_ERR_OTA_ALREADY_IN_PROGRESS = EspErr.OTA_ALREADY_IN_PROGRESS
ESP_ERR_OTA_SPI_MODE_MISMATCH = EspErr.OTA_SPI_MODE_MISMATCH
ESP_ERR_FLASH_OP_FAIL = EspErr.FLASH_OP_FAIL
ESP_ERR_FLASH_OP_TIMEOUT = EspErr.FLASH_OP_TIMEOUT
ESP_ERR_HTTP_MAX_REDIRECT = EspErr.HTTP_MAX_REDIRECT
ESP_ERR_HTTP_CONNECT = EspErr.HTTP_CONNECT
ESP_ERR_HTTP_WRITE_DATA = EspErr.HTTP_WRITE_DATA
ESP_ERR_HTTP_FETCH_HEADER = EspErr.HTTP_FETCH_HEADER
ESP_ERR_HTTP_INVALID_TRANSPORT = EspErr.HTTP_INVALID_TRANSPORT
ESP_ERR_HTTP_CONNECTING = EspErr.HTTP_CONNECTING
ESP_ERR_HTTP_EAGAIN = EspErr.HTTP_EAGAIN
ESP_ERR_HTTP_CONNECTION_CLOSED = EspErr.HTTP_CONNECTION_CLOSED
ESP_ERR_HTTP_NOT_MODIFIED = EspErr.HTTP_NOT_MODIFIED
ESP_ERR_HTTP_RANGE_NOT_SATISFIABLE = EspErr.HTTP_RANGE_NOT_SATISFIABLE
ESP_ERR_HTTP_READ_TIMEOUT = EspErr.HTTP_READ_TIMEOUT
ESP_ERR_HTTP_INCOMPLETE_DATA = EspErr.HTTP_INCOMPLETE_DATA
ESP_ERR_HTTP_REDIRECT_DOWNGRADE = EspErr.HTTP_REDIRECT_DOWNGRADE
ESP_ERR_HTTP_HEADER_TOO_LONG = EspErr.HTTP_HEADER_TOO_LONG
ESP_ERR_HTTPS_OTA_IN_PROGRESS = EspErr.HTTPS_OTA_IN_PROGRESS
ESP_ERR_NVS_BASE = 0x1100
ESP_ERR_OTA_BASE = 0x1500
ESP_ERR_HTTP_BASE = 0x7000
ESP_ERR_HTTPS_OTA_BASE = 0x9000

ESP_RMAKER_OTA_DEFAULT_SERVER_CERT = DEFAULT_SERVER_CERT

RMAKER_OTA_EVENT = OTA_EVENT_BASE
RMAKER_OTA_EVENT_INVALID = OtaEvent.INVALID
RMAKER_OTA_EVENT_STARTING = OtaEvent.STARTING
RMAKER_OTA_EVENT_IN_PROGRESS = OtaEvent.IN_PROGRESS
RMAKER_OTA_EVENT_SUCCESSFUL = OtaEvent.SUCCESSFUL
RMAKER_OTA_EVENT_FAILED = OtaEvent.FAILED
RMAKER_OTA_EVENT_REJECTED = OtaEvent.REJECTED
RMAKER_OTA_EVENT_DELAYED = OtaEvent.DELAYED
RMAKER_OTA_EVENT_REQ_FOR_REBOOT = OtaEvent.REQ_FOR_REBOOT

OTA_STATUS_IN_PROGRESS = OtaStatus.IN_PROGRESS
OTA_STATUS_SUCCESS = OtaStatus.SUCCESS
OTA_STATUS_FAILED = OtaStatus.FAILED
OTA_STATUS_DELAYED = OtaStatus.DELAYED
OTA_STATUS_REJECTED = OtaStatus.REJECTED

OTA_USING_PARAMS = OtaType.USING_PARAMS
OTA_USING_TOPICS = OtaType.USING_TOPICS

OTA_DIAG_STATUS_FAIL = DiagStatus.FAIL
OTA_DIAG_STATUS_PENDING = DiagStatus.PENDING
OTA_DIAG_STATUS_SUCCESS = DiagStatus.SUCCESS

OTA_DIAG_STATE_INIT = DiagState.INIT
OTA_DIAG_STATE_POST_MQTT = DiagState.POST_MQTT


def _with_node(what: str, act: Callable[[Node], int]) -> EspErr:
    node = default_node()
    if node is None:
        log.error("%s: there is no node in this process", what)
        return EspErr.INVALID_STATE
    try:
        value = act(node)
    except OtaError as error:
        log.error("%s: %s", what, error)
        value = error.esp_err
    try:
        return EspErr(value)
    except ValueError:
        log.error("%s: error %#x has no name", what, value)
        return EspErr.FAIL


def esp_rmaker_ota_enable(ota_config: OtaConfig | None, type: int) -> EspErr:
    """Switches OTA on.

    Args:
        ota_config: callbacks; None: all defaults.
        type: an `OtaType`.

    Returns:
        OK; INVALID_ARG: no such type; FAIL: it is on already.
    """
    return _with_node("esp_rmaker_ota_enable", lambda node: node.enable(ota_config, type))


def esp_rmaker_ota_enable_default() -> EspErr:
    """``esp_rmaker_ota_enable(None, OTA_USING_TOPICS)``."""
    return esp_rmaker_ota_enable(None, OtaType.USING_TOPICS)


def esp_rmaker_ota_report_status(
    ota_handle: OtaHandle | None, status: int, additional_info: str | None = None
) -> EspErr:
    """Reports a status of the job, and posts the matching event.

    Returns:
        OK; FAIL: no handle, or not published; INVALID_STATE: there is no job to report for; INVALID_ARG: the status
        is no number, or the information no text.
    """
    return _with_node(
        "esp_rmaker_ota_report_status", lambda node: node.report_status(ota_handle, status, additional_info)
    )


def _default_cb(what: str, ota_handle: OtaHandle | None, ota_data: OtaData, transport: str | None) -> EspErr:
    node = ota_handle._node if ota_handle is not None else None  # the callback's own node, whichever is the default
    if node is not None:
        return _with_node(what, lambda _: node.default_callback(ota_handle, ota_data, transport))
    return _with_node(what, lambda node: node.default_callback(None, ota_data, transport))


def esp_rmaker_ota_default_cb(ota_handle: OtaHandle | None, ota_data: OtaData) -> EspErr:
    """The built-in handler of a job, to be called inside a callback; over what ``ota_transport`` says. Returns when the
    job is over.

    Returns:
        OK: installed, and the restart is arranged; FAIL: failed, rejected or delayed, and reported.
    """
    return _default_cb("esp_rmaker_ota_default_cb", ota_handle, ota_data, None)


def esp_rmaker_ota_https_cb(ota_handle: OtaHandle | None, ota_data: OtaData) -> EspErr:
    """`esp_rmaker_ota_default_cb` over HTTPS. FAIL without a word when the job has no URL."""
    if ota_data.url is None:
        return EspErr.FAIL
    return _default_cb("esp_rmaker_ota_https_cb", ota_handle, ota_data, "https")


def esp_rmaker_ota_mqtt_cb(ota_handle: OtaHandle | None, ota_data: OtaData) -> EspErr:
    """`esp_rmaker_ota_default_cb` over MQTT. A job without stream id or size is reported as failed (Q6)."""
    return _default_cb("esp_rmaker_ota_mqtt_cb", ota_handle, ota_data, "mqtt")


def esp_rmaker_ota_fetch() -> EspErr:
    """Asks the cloud for a job.

    Returns:
        OK: sent, or a request is on its way; INVALID_STATE: not connected; FAIL: not sent. It is tried again by itself.
    """
    return _with_node("esp_rmaker_ota_fetch", lambda node: node.fetch())


def esp_rmaker_ota_fetch_with_delay(time: int) -> EspErr:
    """Asks in so many seconds.

    Returns:
        OK; INVALID_ARG: a negative number, one above 2**31 - 1, or none at all.
    """
    return _with_node("esp_rmaker_ota_fetch_with_delay", lambda node: node.fetch_with_delay(time))


def esp_rmaker_ota_mark_valid() -> EspErr:
    """Confirms the running image.

    Returns:
        OK; INVALID_STATE: there is nothing to confirm; INVALID_ARG: OTA is not on; another one: the target refused.
    """
    return _with_node("esp_rmaker_ota_mark_valid", lambda node: node.mark_valid())


def esp_rmaker_ota_mark_invalid() -> EspErr:
    """Refuses the running image and restarts into the one before.

    Returns:
        INVALID_STATE: the running image is confirmed already; OTA_ROLLBACK_FAILED: there is no other image.
    """
    return _with_node("esp_rmaker_ota_mark_invalid", lambda node: node.mark_invalid())


def esp_err_to_name(code: int) -> str:
    """The C name of an error code."""
    return esp_err_name(code)


__all__ = [
    "ESP_ERR_FLASH_OP_FAIL",
    "ESP_ERR_FLASH_OP_TIMEOUT",
    "ESP_ERR_HTTPS_OTA_BASE",
    "ESP_ERR_HTTPS_OTA_IN_PROGRESS",
    "ESP_ERR_HTTP_BASE",
    "ESP_ERR_HTTP_CONNECT",
    "ESP_ERR_HTTP_CONNECTING",
    "ESP_ERR_HTTP_CONNECTION_CLOSED",
    "ESP_ERR_HTTP_EAGAIN",
    "ESP_ERR_HTTP_FETCH_HEADER",
    "ESP_ERR_HTTP_HEADER_TOO_LONG",
    "ESP_ERR_HTTP_INCOMPLETE_DATA",
    "ESP_ERR_HTTP_INVALID_TRANSPORT",
    "ESP_ERR_HTTP_MAX_REDIRECT",
    "ESP_ERR_HTTP_NOT_MODIFIED",
    "ESP_ERR_HTTP_RANGE_NOT_SATISFIABLE",
    "ESP_ERR_HTTP_READ_TIMEOUT",
    "ESP_ERR_HTTP_REDIRECT_DOWNGRADE",
    "ESP_ERR_HTTP_WRITE_DATA",
    "ESP_ERR_INVALID_ARG",
    "ESP_ERR_INVALID_SIZE",
    "ESP_ERR_INVALID_STATE",
    "ESP_ERR_INVALID_VERSION",
    "ESP_ERR_NOT_FINISHED",
    "ESP_ERR_NOT_FOUND",
    "ESP_ERR_NOT_SUPPORTED",
    "ESP_ERR_NO_MEM",
    "ESP_ERR_NVS_BASE",
    "ESP_ERR_NVS_INVALID_LENGTH",
    "ESP_ERR_NVS_NOT_FOUND",
    "ESP_ERR_OTA_ALREADY_IN_PROGRESS",
    "ESP_ERR_OTA_BASE",
    "ESP_ERR_OTA_PARTITION_CONFLICT",
    "ESP_ERR_OTA_ROLLBACK_FAILED",
    "ESP_ERR_OTA_ROLLBACK_INVALID_STATE",
    "ESP_ERR_OTA_SELECT_INFO_INVALID",
    "ESP_ERR_OTA_SMALL_SEC_VER",
    "ESP_ERR_OTA_SPI_MODE_MISMATCH",
    "ESP_ERR_OTA_VALIDATE_FAILED",
    "ESP_ERR_TIMEOUT",
    "ESP_FAIL",
    "ESP_OK",
    "ESP_RMAKER_OTA_DEFAULT_SERVER_CERT",
    "OTA_DIAG_STATE_INIT",
    "OTA_DIAG_STATE_POST_MQTT",
    "OTA_DIAG_STATUS_FAIL",
    "OTA_DIAG_STATUS_PENDING",
    "OTA_DIAG_STATUS_SUCCESS",
    "OTA_STATUS_DELAYED",
    "OTA_STATUS_FAILED",
    "OTA_STATUS_IN_PROGRESS",
    "OTA_STATUS_REJECTED",
    "OTA_STATUS_SUCCESS",
    "OTA_USING_PARAMS",
    "OTA_USING_TOPICS",
    "RMAKER_OTA_EVENT",
    "RMAKER_OTA_EVENT_DELAYED",
    "RMAKER_OTA_EVENT_FAILED",
    "RMAKER_OTA_EVENT_INVALID",
    "RMAKER_OTA_EVENT_IN_PROGRESS",
    "RMAKER_OTA_EVENT_REJECTED",
    "RMAKER_OTA_EVENT_REQ_FOR_REBOOT",
    "RMAKER_OTA_EVENT_STARTING",
    "RMAKER_OTA_EVENT_SUCCESSFUL",
    "esp_err_t",
    "esp_err_to_name",
    "esp_event_base_t",
    "esp_rmaker_ota_cb_t",
    "esp_rmaker_ota_config_t",
    "esp_rmaker_ota_data_t",
    "esp_rmaker_ota_default_cb",
    "esp_rmaker_ota_diag_priv_t",
    "esp_rmaker_ota_diag_state_t",
    "esp_rmaker_ota_diag_status_t",
    "esp_rmaker_ota_enable",
    "esp_rmaker_ota_enable_default",
    "esp_rmaker_ota_event_t",
    "esp_rmaker_ota_fetch",
    "esp_rmaker_ota_fetch_with_delay",
    "esp_rmaker_ota_handle_t",
    "esp_rmaker_ota_https_cb",
    "esp_rmaker_ota_mark_invalid",
    "esp_rmaker_ota_mark_valid",
    "esp_rmaker_ota_mqtt_cb",
    "esp_rmaker_ota_report_status",
    "esp_rmaker_ota_type_t",
    "esp_rmaker_post_ota_diag_t",
    "ota_status_t",
]
