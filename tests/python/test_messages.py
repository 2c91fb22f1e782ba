"""Topics and payloads: exact texts out, hostile texts in."""

from __future__ import annotations

import contextlib
import json
import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rmaker_ota.rainmaker.messages import (
    MAX_DEPTH,
    MAX_INFO,
    MAX_PAYLOAD,
    Job,
    JobError,
    NodeConfig,
    TimeLimits,
    Topics,
    fetch_payload,
    node_config_payload,
    params_payload,
    parse_otaurl,
    parse_time_limits,
    status_payload,
)
from rmaker_ota.rainmaker.params import Bounds, Device, Param, ota_service

NO_JSON = "Aborted. JSON Payload error"
NO_ID = "Aborted. OTA Updated ID not found in JSON"
NO_URL = "Aborted. URL not found in JSON"


def refused(payload: bytes, **options: bool) -> tuple[str, str | None]:
    with pytest.raises(JobError) as caught:
        parse_otaurl(payload, **options)
    return caught.value.info, caught.value.job_id


# ---- Topics and what goes out ---------------------------------------------------------------------------------


def test_topics_to_the_cloud_carry_their_rule_with_basic_ingest_and_none_without() -> None:
    with_rules, plain = Topics("N1"), Topics("N1", basic_ingest=False)
    assert with_rules.config == "$aws/rules/esp_node_config/node/N1/config"
    assert with_rules.otafetch == "$aws/rules/esp_node_otafetch/node/N1/otafetch"
    assert with_rules.otastatus == "$aws/rules/esp_node_otastatus/node/N1/otastatus"
    assert with_rules.params_local == "$aws/rules/esp_set_params/node/N1/params/local"
    assert with_rules.params_local_init == "$aws/rules/esp_init_params/node/N1/params/local/init"
    assert with_rules.alert == "$aws/rules/esp_node_alert/node/N1/alert"
    assert with_rules.user_mapping == "$aws/rules/esp_user_node_mapping/node/N1/user/mapping"
    assert with_rules.from_node == "$aws/rules/esp_cmd_resp/node/N1/from-node"
    assert plain.otastatus == "node/N1/otastatus"
    for topics in (with_rules, plain):
        assert topics.otaurl == "node/N1/otaurl"
        assert topics.params_remote == "node/N1/params/remote"
        assert topics.to_node == "node/N1/to-node"


def test_fetch_is_exactly_this_text() -> None:
    assert fetch_payload("N1", "1.0.0") == b'{"node_id":"N1","fw_version":"1.0.0"}'
    assert fetch_payload("N1", "1.0.0", "0A1B2C3D") == (
        b'{"node_id":"N1","fw_version":"1.0.0","network_id":"0A1B2C3D"}'
    )


def test_status_is_exactly_this_text() -> None:
    assert status_payload("J1", "failed", "why", 1767225600.9, "0A1B2C3D") == (
        b'{"ota_job_id":"J1","status":"failed","network_id":"0A1B2C3D","additional_info":"why","ts":1767225600}'
    )
    assert status_payload(None, "success", "", 5_000_000_000) == (
        b'{"status":"success","additional_info":"","ts":5000000000}'
    )


@given(st.text(), st.text())
@example('quote " back \\ slash', "\ud800 \x00 \x1f \u2028")
def test_status_is_valid_json_whatever_the_texts(job_id: str, info: str) -> None:
    parsed = json.loads(status_payload(job_id, "failed", info, 0).decode("utf-8"))
    assert list(parsed) == ["ota_job_id", "status", "additional_info", "ts"]
    expected = info[:MAX_INFO].encode("utf-8", "replace").decode("utf-8")
    assert parsed["additional_info"] == expected


def test_a_long_report_is_shortened_in_its_text_alone() -> None:
    payload = status_payload("J1", "failed", "x" * 100_000, 7)
    assert json.loads(payload) == {"ota_job_id": "J1", "status": "failed", "additional_info": "x" * MAX_INFO, "ts": 7}


OTA_SERVICE = ota_service()


def test_node_configuration_is_exactly_this_text() -> None:
    node = NodeConfig("N1", "Gateway", "Gateway", "1.0.0", "gw-app", "gw-app", "linux")
    assert node_config_payload(node) == (
        b'{"node_id":"N1","config_version":"2020-03-20","info":{"name":"Gateway","fw_version":"1.0.0",'
        b'"type":"Gateway","model":"gw-app","project_name":"gw-app","platform":"linux"}}'
    )


def test_node_configuration_with_everything_keeps_the_order_of_keys() -> None:
    lamp = Device(
        "Lamp",
        "esp.device.lightbulb",
        subtype="s",
        model="m",
        attributes={"a": "1"},
        primary="Power",
        params=(
            Param("Brightness", "esp.param.brightness", 0, bounds=Bounds(0, 100, 1), ui_type="esp.ui.slider"),
            Param("Power", "esp.param.power", "x", properties=("simple_ts", "write", "read"), valid_strs=("x", "y")),
        ),
    )
    node = NodeConfig(
        "N1",
        "n",
        "t",
        "v",
        "m",
        "p",
        "linux",
        subtype="s",
        readme="r",
        secure_boot_digest={"k0": "aa", "k1": None},
        attributes={"cmd-resp": "1"},
        devices=(lamp,),
        services=(OTA_SERVICE,),
    )
    text = json.loads(node_config_payload(node))
    assert list(text) == ["node_id", "config_version", "info", "attributes", "devices", "services"]
    assert list(text["info"]) == [
        "name",
        "fw_version",
        "type",
        "subtype",
        "model",
        "project_name",
        "platform",
        "readme",
        "secure_boot_digest",
    ]
    assert text["attributes"] == [{"name": "cmd-resp", "value": "1"}]
    assert list(text["devices"][0]) == ["name", "type", "subtype", "model", "attributes", "primary", "params"]
    brightness, power = text["devices"][0]["params"]
    assert list(brightness) == ["name", "type", "data_type", "properties", "bounds", "ui_type"]
    assert list(brightness["bounds"].items()) == [("min", 0), ("max", 100), ("step", 1)]
    assert list(power) == ["name", "type", "data_type", "properties", "valid_strs"]
    assert power["properties"] == ["read", "write", "simple_ts"]
    assert [param["name"] for param in text["services"][0]["params"]] == ["Status", "Info", "URL"]
    assert text["services"][0]["params"][2] == {
        "name": "URL",
        "type": "esp.param.ota_url",
        "data_type": "string",
        "properties": ["write"],
    }


def test_a_service_alone_brings_an_empty_list_of_devices() -> None:
    node = NodeConfig("N1", "n", "t", "v", "m", "p", "linux", services=(OTA_SERVICE,))
    text = json.loads(node_config_payload(node))
    assert text["devices"] == []
    assert len(text["services"]) == 1


def test_params_that_say_nothing_are_not_published() -> None:
    assert params_payload({}) is None
    assert params_payload({"A": {}}) is None  # 8 bytes
    assert params_payload({"OTA": {"a": 1}}) == b'{"OTA":{"a":1}}'


# ---- Jobs that come in ----------------------------------------------------------------------------------------


def test_a_job_with_every_field() -> None:
    payload = (
        b'{"ota_job_id":"J","url":"https://x/a?b=1\\u0026c=\\/","fw_version":"1.1","file_size":1577600,'
        b'"file_md5":"AbC","stream_id":"S","metadata":{ "k" : [1, {"v":null}] } ,"other":[1,2]}'
    )
    assert parse_otaurl(payload) == Job(
        job_id="J",
        url="https://x/a?b=1&c=/",
        stream_id="S",
        file_size=1577600,
        fw_version="1.1",
        file_md5="AbC",
        metadata='{ "k" : [1, {"v":null}] }',
    )


def test_of_equal_keys_the_first_counts_at_every_level() -> None:
    job = parse_otaurl(b'{"ota_job_id":"A","ota_job_id":"B","url":"u","url":"v","metadata":{"a":1,"a":2}}')
    assert (job.job_id, job.url) == ("A", "u")
    assert parse_time_limits('{"validity":{"start":1,"start":2}}') == TimeLimits(valid_from=1)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"   ",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"ota_job_id":"J","url":"u"',
        b'{"ota_job_id":"J","url":"u"}{"a":1}',
        b'{"ota_job_id":"J","url":"u"}\0',
        b'{"ota_job_id":"J" "url":"u"}',
        b"{'ota_job_id':'J','url':'u'}",
        b'{"ota_job_id":"J","url":"u",}',
        b'{"ota_job_id":"J","url":"line\nbreak"}',
        b'{"ota_job_id":"J","url":"u","x":NaN}',
        b'{"ota_job_id":"J","url":"u","x":Infinity}',
        b'{"ota_job_id":"J","url":"\xff\xfe"}',
        b'\xef\xbb\xbf{"ota_job_id":"J","url":"u"}',
        b'{1:2,"ota_job_id":"J","url":"u"}',
        b'{"ota_job_id":"J","url":"u","x":01}',
    ],
)
def test_what_is_no_json_object_is_no_job(payload: bytes) -> None:
    assert refused(payload) == (NO_JSON, None)


def test_required_fields() -> None:
    assert refused(b"{}") == (NO_ID, None)
    assert refused(b'{"ota_job_id":7,"url":"u"}') == (NO_ID, None)
    assert refused(b'{"ota_job_id":null,"url":"u"}') == (NO_ID, None)
    assert refused(b'{"ota_job_id":"\\ud800","url":"u"}') == (NO_ID, None)  # no text that could be sent back
    assert refused(b'{"ota_job_id":"J"}') == (NO_URL, "J")
    assert refused(b'{"ota_job_id":"J","url":["u"]}') == (NO_URL, "J")
    stream = b'{"ota_job_id":"J","url":"u"}'
    assert parse_otaurl(stream).stream_id is None
    assert refused(stream, require_stream_id=True) == ("Aborted. Stream ID not found in JSON", "J")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (b"0", 0),
        (b"-5", -5),
        (b"4294967296", 4294967296),
        (b"9223372036854775807", 2**63 - 1),
        (b"9223372036854775808", 0),
        (b"1" * 100_000, 0),
        (b'"65536"', 0),
        (b"12.5", 0),
        (b"1e5", 0),
        (b"true", 0),
        (b"null", 0),
        (b"[1]", 0),
    ],
)
def test_sizes_are_integers_of_64_bits_and_everything_else_is_unknown(text: bytes, size: int) -> None:
    assert parse_otaurl(b'{"ota_job_id":"J","url":"u","file_size":' + text + b"}").file_size == size


def test_optional_fields_of_another_type_are_missing() -> None:
    job = parse_otaurl(b'{"ota_job_id":"J","url":"u","fw_version":"","file_md5":5,"stream_id":{},"metadata":[{"a":1}]}')
    assert job == Job("J", "u")
    assert parse_otaurl(b'{"ota_job_id":"","url":"","file_md5":""}') == Job("", "", file_md5="")


def test_size_and_depth_have_limits() -> None:
    room = MAX_PAYLOAD - len(b'{"ota_job_id":"J","url":""}')
    assert len(parse_otaurl(b'{"ota_job_id":"J","url":"' + b"x" * room + b'"}').url) == room
    assert refused(b'{"ota_job_id":"J","url":"' + b"x" * (room + 1) + b'"}') == (NO_JSON, None)
    for levels, fine in ((MAX_DEPTH - 1, True), (MAX_DEPTH, False), (60_000, False)):
        payload = b'{"ota_job_id":"J","url":"u","a":' + b"[" * levels + b"]" * levels + b"}"
        if fine:
            assert parse_otaurl(payload).job_id == "J"
        else:
            assert refused(payload) == (NO_JSON, None)
    brackets = b'{"ota_job_id":"J","url":"u","a":"' + b'[{\\"' * 1000 + b'"}'
    assert parse_otaurl(brackets).job_id == "J"  # brackets inside a string nest nothing


@given(st.binary(max_size=200))
def test_any_bytes_are_a_job_or_a_job_error(payload: bytes) -> None:
    try:
        parse_otaurl(payload)
    except JobError as error:
        assert error.info.startswith("Aborted. ")


_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["ota_job_id", "url", "file_size", "metadata", "x"]), _VALUES), st.booleans())
def test_any_object_is_read_as_python_reads_it(document: dict[str, Any], pretty: bool) -> None:
    text = json.dumps(document, indent=1 if pretty else None)
    try:
        job = parse_otaurl(text.encode())
    except JobError as error:
        if error.info == NO_ID:
            assert not isinstance(document.get("ota_job_id"), str)
        else:
            assert (error.info, error.job_id) == (NO_URL, document["ota_job_id"])
            assert not isinstance(document.get("url"), str)
        return
    assert (job.job_id, job.url) == (document["ota_job_id"], document["url"])
    metadata = document.get("metadata")
    assert (None if job.metadata is None else json.loads(job.metadata)) == (
        metadata if isinstance(metadata, dict) else None
    )
    assert job.metadata is None or job.metadata in text


@given(st.data())
def test_a_damaged_job_is_still_a_job_or_a_job_error(data: st.DataObject) -> None:
    payload = bytearray(b'{"ota_job_id":"J","url":"https://x/y","file_size":12,"metadata":{"a":[1,{}]}}')
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        if data.draw(st.booleans()):
            payload[at] = data.draw(st.sampled_from(string.printable.encode() + b"\x00\xff"))
        else:
            del payload[at:]
            break
    with contextlib.suppress(JobError):
        parse_otaurl(bytes(payload))


# ---- Time limits ----------------------------------------------------------------------------------------------


def test_time_limits_are_integers_other_than_minus_one() -> None:
    text = '{"download_window":{"start":1380,"end":120},"validity":{"start":1665081000,"end":5665426600}}'
    assert parse_time_limits(text) == TimeLimits(1380, 120, 1665081000, 5665426600)
    assert parse_time_limits('{"download_window":{"start":-1,"end":"5"},"validity":{"start":1.5,"end":true}}') == (
        TimeLimits()
    )
    assert parse_time_limits('{"download_window":{}}') == TimeLimits()
    assert parse_time_limits('{"validity":{"end":' + "9" * 30 + "}}") == TimeLimits()


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "no json", '{"esp.ota.target":"host_mcu"}', '{"validity":5}'])
def test_no_time_limits(text: str | None) -> None:
    assert parse_time_limits(text) is None
