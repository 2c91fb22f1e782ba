"""Over-the-air update engine for embedded-Linux gateways and the ESP32 chips attached to them.

The public names, each imported when it is first used: ``import rmaker_ota`` itself loads neither the engine nor MQTT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmaker_ota.config import NodeConfig, load_config
    from rmaker_ota.errors import (
        ArgumentError,
        CallbackError,
        CancelledError,
        ChipError,
        ConfigError,
        DataError,
        DeviceError,
        DigestError,
        DownloadError,
        FormatError,
        ImageError,
        NotBootableError,
        NotFoundError,
        NotResumableError,
        OtaError,
        OtaTimeoutError,
        OutOfMemoryError,
        PendingVerifyError,
        ReadBackError,
        RejectedError,
        RollbackError,
        SlotRunningError,
        StateError,
        StateFileError,
        TargetError,
        TooLargeError,
        UnsupportedError,
        VerifyError,
    )
    from rmaker_ota.esp_err import EspErr, esp_err_name
    from rmaker_ota.esp_rmaker_ota import (
        ESP_ERR_INVALID_ARG,
        ESP_ERR_INVALID_STATE,
        ESP_ERR_NO_MEM,
        ESP_FAIL,
        ESP_OK,
        OTA_DIAG_STATE_INIT,
        OTA_DIAG_STATE_POST_MQTT,
        OTA_DIAG_STATUS_FAIL,
        OTA_DIAG_STATUS_PENDING,
        OTA_DIAG_STATUS_SUCCESS,
        OTA_STATUS_DELAYED,
        OTA_STATUS_FAILED,
        OTA_STATUS_IN_PROGRESS,
        OTA_STATUS_REJECTED,
        OTA_STATUS_SUCCESS,
        OTA_USING_PARAMS,
        OTA_USING_TOPICS,
        RMAKER_OTA_EVENT,
        RMAKER_OTA_EVENT_DELAYED,
        RMAKER_OTA_EVENT_FAILED,
        RMAKER_OTA_EVENT_IN_PROGRESS,
        RMAKER_OTA_EVENT_INVALID,
        RMAKER_OTA_EVENT_REJECTED,
        RMAKER_OTA_EVENT_REQ_FOR_REBOOT,
        RMAKER_OTA_EVENT_STARTING,
        RMAKER_OTA_EVENT_SUCCESSFUL,
        esp_err_t,
        esp_err_to_name,
        esp_rmaker_ota_config_t,
        esp_rmaker_ota_data_t,
        esp_rmaker_ota_default_cb,
        esp_rmaker_ota_diag_priv_t,
        esp_rmaker_ota_diag_state_t,
        esp_rmaker_ota_diag_status_t,
        esp_rmaker_ota_enable,
        esp_rmaker_ota_enable_default,
        esp_rmaker_ota_event_t,
        esp_rmaker_ota_fetch,
        esp_rmaker_ota_fetch_with_delay,
        esp_rmaker_ota_handle_t,
        esp_rmaker_ota_https_cb,
        esp_rmaker_ota_mark_invalid,
        esp_rmaker_ota_mark_valid,
        esp_rmaker_ota_mqtt_cb,
        esp_rmaker_ota_report_status,
        esp_rmaker_ota_type_t,
        ota_status_t,
    )
    from rmaker_ota.install import (
        HttpOptions,
        ImageHeader,
        ImagePolicy,
        Installer,
        InstallOptions,
        InstallResult,
        Phase,
        Progress,
        ResumePoint,
        install,
    )
    from rmaker_ota.rainmaker.application import OtaConfig, OtaDiagPriv, OtaHandle
    from rmaker_ota.rainmaker.events import Event, Subscription
    from rmaker_ota.rainmaker.node import Node, Outcome, default_node
    from rmaker_ota.rainmaker.ota import Ota
    from rmaker_ota.rainmaker.params import Bounds, Device, Groups, Param, Service
    from rmaker_ota.rainmaker.types import (
        CommonEvent,
        DiagState,
        DiagStatus,
        OtaData,
        OtaEvent,
        OtaStatus,
        OtaType,
        RmakerEvent,
    )
    from rmaker_ota.targets import open_target
    from rmaker_ota.targets.base import AppDescription, BootReport, BootState, Slot, Target

__all__ = [
    "ESP_ERR_INVALID_ARG",
    "ESP_ERR_INVALID_STATE",
    "ESP_ERR_NO_MEM",
    "ESP_FAIL",
    "ESP_OK",
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
    "AppDescription",
    "ArgumentError",
    "BootReport",
    "BootState",
    "Bounds",
    "CallbackError",
    "CancelledError",
    "ChipError",
    "CommonEvent",
    "ConfigError",
    "DataError",
    "Device",
    "DeviceError",
    "DiagState",
    "DiagStatus",
    "DigestError",
    "DownloadError",
    "EspErr",
    "Event",
    "FormatError",
    "Groups",
    "HttpOptions",
    "ImageError",
    "ImageHeader",
    "ImagePolicy",
    "InstallOptions",
    "InstallResult",
    "Installer",
    "Node",
    "NodeConfig",
    "NotBootableError",
    "NotFoundError",
    "NotResumableError",
    "Ota",
    "OtaConfig",
    "OtaData",
    "OtaDiagPriv",
    "OtaError",
    "OtaEvent",
    "OtaHandle",
    "OtaStatus",
    "OtaTimeoutError",
    "OtaType",
    "OutOfMemoryError",
    "Outcome",
    "Param",
    "PendingVerifyError",
    "Phase",
    "Progress",
    "ReadBackError",
    "RejectedError",
    "ResumePoint",
    "RmakerEvent",
    "RollbackError",
    "Service",
    "Slot",
    "SlotRunningError",
    "StateError",
    "StateFileError",
    "Subscription",
    "Target",
    "TargetError",
    "TooLargeError",
    "UnsupportedError",
    "VerifyError",
    "default_node",
    "esp_err_name",
    "esp_err_t",
    "esp_err_to_name",
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
    "install",
    "load_config",
    "open_target",
    "ota_status_t",
]

# Where each name is at home.
_NAMES = {
    "rmaker_ota.config": """
        NodeConfig load_config
    """,
    "rmaker_ota.errors": """
        ArgumentError CallbackError CancelledError ChipError ConfigError DataError DeviceError DigestError
        DownloadError FormatError ImageError NotBootableError NotFoundError NotResumableError OtaError OtaTimeoutError
        OutOfMemoryError PendingVerifyError ReadBackError RejectedError RollbackError SlotRunningError
        StateError StateFileError TargetError TooLargeError UnsupportedError VerifyError
    """,
    "rmaker_ota.esp_err": """
        EspErr esp_err_name
    """,
    "rmaker_ota.esp_rmaker_ota": """
        ESP_ERR_INVALID_ARG ESP_ERR_INVALID_STATE ESP_ERR_NO_MEM ESP_FAIL ESP_OK OTA_DIAG_STATE_INIT
        OTA_DIAG_STATE_POST_MQTT OTA_DIAG_STATUS_FAIL OTA_DIAG_STATUS_PENDING OTA_DIAG_STATUS_SUCCESS
        OTA_STATUS_DELAYED OTA_STATUS_FAILED OTA_STATUS_IN_PROGRESS OTA_STATUS_REJECTED OTA_STATUS_SUCCESS
        OTA_USING_PARAMS OTA_USING_TOPICS RMAKER_OTA_EVENT RMAKER_OTA_EVENT_DELAYED RMAKER_OTA_EVENT_FAILED
        RMAKER_OTA_EVENT_INVALID RMAKER_OTA_EVENT_IN_PROGRESS RMAKER_OTA_EVENT_REJECTED
        RMAKER_OTA_EVENT_REQ_FOR_REBOOT RMAKER_OTA_EVENT_STARTING RMAKER_OTA_EVENT_SUCCESSFUL esp_err_t
        esp_err_to_name esp_rmaker_ota_config_t esp_rmaker_ota_data_t esp_rmaker_ota_default_cb
        esp_rmaker_ota_diag_priv_t esp_rmaker_ota_diag_state_t esp_rmaker_ota_diag_status_t
        esp_rmaker_ota_enable esp_rmaker_ota_enable_default esp_rmaker_ota_event_t esp_rmaker_ota_fetch
        esp_rmaker_ota_fetch_with_delay esp_rmaker_ota_handle_t esp_rmaker_ota_https_cb
        esp_rmaker_ota_mark_invalid esp_rmaker_ota_mark_valid esp_rmaker_ota_mqtt_cb
        esp_rmaker_ota_report_status esp_rmaker_ota_type_t ota_status_t
    """,
    "rmaker_ota.install": """
        HttpOptions ImageHeader ImagePolicy InstallOptions InstallResult Installer Phase Progress ResumePoint
        install
    """,
    "rmaker_ota.rainmaker.application": """
        OtaConfig OtaDiagPriv OtaHandle
    """,
    "rmaker_ota.rainmaker.events": """
        Event Subscription
    """,
    "rmaker_ota.rainmaker.node": """
        Node Outcome default_node
    """,
    "rmaker_ota.rainmaker.ota": """
        Ota
    """,
    "rmaker_ota.rainmaker.params": """
        Bounds Device Groups Param Service
    """,
    "rmaker_ota.rainmaker.types": """
        CommonEvent DiagState DiagStatus OtaData OtaEvent OtaStatus OtaType RmakerEvent
    """,
    "rmaker_ota.targets": """
        open_target
    """,
    "rmaker_ota.targets.base": """
        AppDescription BootReport BootState Slot Target
    """,
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    # `install` is a function and a module of that name, which the import has just put here and which can be called.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
