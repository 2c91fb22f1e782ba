"""The C API in Python against the text of the C header: nothing is missing, nothing has another value or order."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import ssl
from pathlib import Path
from typing import Any

import pytest

import rmaker_ota
from rmaker_ota import esp_rmaker_ota
from rmaker_ota.rainmaker.types import CommonEvent, OtaData, RmakerEvent

EMBED = Path(rmaker_ota.__file__).parent / "embed"
TEXT = re.sub(r"/\*.*?\*/", "", (EMBED / "esp_rmaker_ota.h").read_text(encoding="utf-8"), flags=re.S)

# Specification, section 1.2.
SPECIFIED: dict[str, dict[str, int]] = {
    "esp_rmaker_ota_event_t": {
        "RMAKER_OTA_EVENT_INVALID": 0,
        "RMAKER_OTA_EVENT_STARTING": 1,
        "RMAKER_OTA_EVENT_IN_PROGRESS": 2,
        "RMAKER_OTA_EVENT_SUCCESSFUL": 3,
        "RMAKER_OTA_EVENT_FAILED": 4,
        "RMAKER_OTA_EVENT_REJECTED": 5,
        "RMAKER_OTA_EVENT_DELAYED": 6,
        "RMAKER_OTA_EVENT_REQ_FOR_REBOOT": 7,
    },
    "ota_status_t": {
        "OTA_STATUS_IN_PROGRESS": 1,
        "OTA_STATUS_SUCCESS": 2,
        "OTA_STATUS_FAILED": 3,
        "OTA_STATUS_DELAYED": 4,
        "OTA_STATUS_REJECTED": 5,
    },
    "esp_rmaker_ota_type_t": {"OTA_USING_PARAMS": 1, "OTA_USING_TOPICS": 2},
    "esp_rmaker_ota_diag_status_t": {
        "OTA_DIAG_STATUS_FAIL": 0,
        "OTA_DIAG_STATUS_PENDING": 1,
        "OTA_DIAG_STATUS_SUCCESS": 2,
    },
    "esp_rmaker_ota_diag_state_t": {"OTA_DIAG_STATE_INIT": 0, "OTA_DIAG_STATE_POST_MQTT": 1},
}
# Specification, section 1.4: name and arguments.
FUNCTIONS: dict[str, list[str]] = {
    "esp_rmaker_ota_enable": ["ota_config", "type"],
    "esp_rmaker_ota_enable_default": [],
    "esp_rmaker_ota_report_status": ["ota_handle", "status", "additional_info"],
    "esp_rmaker_ota_default_cb": ["ota_handle", "ota_data"],
    "esp_rmaker_ota_https_cb": ["ota_handle", "ota_data"],
    "esp_rmaker_ota_mqtt_cb": ["ota_handle", "ota_data"],
    "esp_rmaker_ota_fetch": [],
    "esp_rmaker_ota_fetch_with_delay": ["time"],
    "esp_rmaker_ota_mark_valid": [],
    "esp_rmaker_ota_mark_invalid": [],
    "esp_err_to_name": ["code"],
}
STRUCTURES: dict[str, list[str]] = {
    "esp_rmaker_ota_data_t": [
        "url",
        "stream_id",
        "filesize",
        "fw_version",
        "file_md5",
        "ota_job_id",
        "server_cert",
        "priv",
        "metadata",
    ],
    "esp_rmaker_ota_config_t": ["ota_cb", "ota_diag", "server_cert", "priv"],
    "esp_rmaker_ota_diag_priv_t": ["state", "rmaker_ota"],
}


def named(name: str) -> Any:
    return getattr(esp_rmaker_ota, name)


def enums_of_header() -> dict[str, dict[str, int]]:
    return {
        name: {member: int(value) for member, value in re.findall(r"(\w+) = (\d+)", body)}
        for body, name in re.findall(r"typedef enum \{(.*?)\} (\w+);", TEXT, re.S)
    }


def test_enums_are_those_of_header_and_specification() -> None:
    assert enums_of_header() == SPECIFIED
    for name, members in SPECIFIED.items():
        kind = named(name)
        assert issubclass(kind, enum.IntEnum)
        assert {int(member) for member in kind} == set(members.values())
        for member, value in members.items():
            assert type(named(member)) is kind, member
            assert named(member) == value, member


def test_constants_are_those_of_the_header() -> None:
    defined = re.findall(r"#define (\w+) (-?\w+)", TEXT)
    assert len(defined) == 42
    for name, value in defined:
        assert named(name) == int(value, 0), name
        if not name.endswith("_BASE"):
            assert esp_rmaker_ota.esp_err_to_name(named(name)) == name
    assert esp_rmaker_ota.esp_err_to_name(0x1234) == "UNKNOWN ERROR"
    assert esp_rmaker_ota.RMAKER_OTA_EVENT == "RMAKER_OTA_EVENT"


def test_functions_have_the_arguments_of_the_header_in_its_order() -> None:
    found = {
        name: [] if params == "void" else [re.findall(r"\w+", each)[-1] for each in params.split(",")]
        for name, params in re.findall(r"^\w[\w ]*[ *](\w+)\(([^()]*)\);", TEXT, re.M)
        if not name.startswith("typedef")
    }
    assert found == FUNCTIONS
    for name, arguments in FUNCTIONS.items():
        assert list(inspect.signature(named(name)).parameters) == arguments, name
    info = inspect.signature(esp_rmaker_ota.esp_rmaker_ota_report_status).parameters["additional_info"]
    assert info.default is None  # C's NULL


def test_structures_have_the_fields_of_the_header_in_its_order() -> None:
    found = {
        name: [re.findall(r"\w+", field)[-1] for field in body.split(";") if field.strip()]
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", TEXT, re.S)
    }
    assert found == STRUCTURES
    for name, fields in STRUCTURES.items():
        assert [field.name for field in dataclasses.fields(named(name))] == fields
    assert named("esp_rmaker_ota_config_t")() == named("esp_rmaker_ota_config_t")(None, None, None, None)
    assert OtaData(None).filesize == 0


def test_every_name_of_the_header_is_there_and_comes_with_a_star() -> None:
    names = set(re.findall(r"\b(?:esp|ESP|RMAKER|OTA|ota)_\w+\b", TEXT)) - {"ota_config", "ota_handle", "ota_data"}
    names -= {field for fields in STRUCTURES.values() for field in fields} | {"ota_diag_priv"}
    star: dict[str, object] = {}
    exec("from rmaker_ota.esp_rmaker_ota import *", star)
    del star["__builtins__"]
    assert names <= set(star)
    assert set(star) == names  # and nothing of ours


def test_other_events_have_their_numbers() -> None:
    """Section 1.2, below the enums; and the second header, which names those that are posted here."""
    assert [(each.name, int(each)) for each in CommonEvent] == [
        ("REBOOT", 0),
        ("WIFI_RESET", 1),
        ("FACTORY_RESET", 2),
        ("MQTT_CONNECTED", 3),
        ("MQTT_DISCONNECTED", 4),
        ("MQTT_PUBLISHED", 5),
        ("TZ_POSIX_CHANGED", 6),
        ("TZ_CHANGED", 7),
        ("MQTT_MSG_DELETED", 8),
    ]
    assert [(each.name, int(each)) for each in RmakerEvent] == [
        ("INIT_DONE", 1),
        ("CLAIM_STARTED", 2),
        ("CLAIM_SUCCESSFUL", 3),
        ("CLAIM_FAILED", 4),
        ("USER_NODE_MAPPING_DONE", 5),
        ("LOCAL_CTRL_STARTED", 6),
        ("USER_NODE_MAPPING_RESET", 7),
        ("LOCAL_CTRL_STOPPED", 8),
        ("STARTED", 9),
        ("CONFIG_REPORTED", 10),
    ]
    host = (EMBED / "rmaker_ota_host.h").read_text(encoding="utf-8")
    for name, value in re.findall(r"\bRMAKER_(\w+) = (\d+),", host):
        kinds = {"EVENT_REBOOT": CommonEvent.REBOOT} | {f"MQTT_EVENT_{each.name[5:]}": each for each in CommonEvent}
        kinds |= {f"EVENT_{each.name}": each for each in RmakerEvent}  # type: ignore[dict-item]
        if name in kinds:
            assert kinds[name] == int(value), name


def test_the_default_certificate_holds_roots_that_are_valid_for_years() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=esp_rmaker_ota.ESP_RMAKER_OTA_DEFAULT_SERVER_CERT)
    certificates: Any = context.get_ca_certs()
    subjects = [dict(pair[0] for pair in each["subject"]) for each in certificates]
    assert {each["commonName"] for each in subjects} == {
        "Amazon Root CA 1",
        "Starfield Services Root Certificate Authority - G2",
    }
    assert all(ssl.cert_time_to_seconds(each["notAfter"]) > 2_000_000_000 for each in certificates)  # 2033


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"esp_err_to_name"}))
def test_without_a_node_every_function_returns_a_number(name: str) -> None:
    arguments: dict[str, object] = {"ota_data": OtaData("https://x/y", stream_id="S", filesize=1), "type": 2, "time": 1}
    arguments["status"] = 1
    value = named(name)(*(arguments.get(each) for each in FUNCTIONS[name]))
    assert value == esp_rmaker_ota.ESP_ERR_INVALID_STATE
    assert type(value) is esp_rmaker_ota.esp_err_t
