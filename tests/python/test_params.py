"""Devices, services and parameters: what fits together, what is accepted, what is reported."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rmaker_ota import Bounds, Device, Groups, Param, Service
from rmaker_ota.errors import ArgumentError
from rmaker_ota.rainmaker.messages import MAX_PAYLOAD, params_payload
from rmaker_ota.rainmaker.params import MAX_TEXT, Params, ota_service


def lamp() -> Device:
    return Device(
        "Lamp",
        "esp.device.lightbulb",
        [
            Param("Power", "esp.param.power", False),
            Param("Brightness", "esp.param.brightness", 50, bounds=Bounds(0, 100, 1)),
            Param("Level", None, 0.5, bounds=Bounds(0, 1)),
            Param("Mode", None, "auto", valid_strs=("auto", "off")),
            Param("Scene", None, {"a": [1, None]}),
            Param("Times", None, []),
            Param("Energy", None, 0, properties=["read", "time_series"]),
        ],
        primary="Power",
    )


@pytest.fixture
def params() -> Params:
    params = Params()
    params.add(lamp())
    params.add(ota_service())
    return params


MISFITS: dict[str, tuple[Callable[[], object], str]] = {
    "no name": (lambda: Param("", None, 1), "'' is no name of a parameter"),
    "name with half a pair": (lambda: Param("\ud800", None, 1), r"'\\ud800' is no name of a parameter"),
    "long name": (lambda: Device("x" * 257), "is no name of a device"),
    "name that is no text": (lambda: Device(5), "5 is no name"),  # type: ignore[arg-type]
    "no data type": (lambda: Param("P", None, None), "P: None, expected one of bool, int"),  # type: ignore[arg-type]
    "unknown data type": (lambda: Param("P", None, 1, data_type="u8"), 'P: data type "u8"'),
    "value of another type": (lambda: Param("P", None, 1, data_type="string"), "P: 1, expected string"),
    "unknown property": (lambda: Param("P", None, 1, properties=["read", "persist"]), "P: property 'persist'"),
    "neither read nor write": (lambda: Param("P", None, 1, properties=["time_series"]), "P: neither read nor write"),
    "both time series": (
        lambda: Param("P", None, 1, properties=["read", "time_series", "simple_ts"]),
        "time_series and simple_ts exclude each other",
    ),
    "bounds of a text": (lambda: Param("P", None, "", bounds=Bounds(0, 1)), "P: bounds are for numbers"),
    "bounds of a bool": (lambda: Param("P", None, True, bounds=Bounds(0, 1)), "P: bounds are for numbers"),
    "bounds the wrong way": (lambda: Param("P", None, 1, bounds=Bounds(2, 1)), "from 2 to 1: nothing lies between"),
    "float bound of an int": (lambda: Param("P", None, 1, bounds=Bounds(0, 1.5)), "bound 1.5, expected int"),
    "infinite bound": (lambda: Param("P", None, 1.0, bounds=Bounds(0, float("inf"))), "bound inf, expected float"),
    "bool as bound": (lambda: Param("P", None, 1, bounds=Bounds(False, 1)), "bound False"),
    "no step": (lambda: Param("P", None, 1, bounds=Bounds(0, 1, 0)), "step 0, expected more than 0"),
    "value out of bounds": (lambda: Param("P", None, 2, bounds=Bounds(0, 1)), "P: 2, expected 0 to 1"),
    "strings of a number": (lambda: Param("P", None, 1, valid_strs=["a"]), "valid_strs are for strings"),
    "none of its strings": (lambda: Param("P", None, "b", valid_strs=["a"]), "P: 'b', expected one of \"a\""),
    "type of half a character": (lambda: Param("P", "\ud800", 1), "is no type of parameter P: expected a text"),
    "ui_type of bytes": (lambda: Param("P", None, 1, ui_type=b"x"), "is no ui_type of parameter P"),  # type: ignore[arg-type]
    "strings of numbers": (lambda: Param("P", None, "a", valid_strs=["a", 1]), "1 is no string of parameter P"),  # type: ignore[list-item]
    "model of a device": (lambda: Device("D", None, model="\udfff"), "is no model of D: expected a text"),
    "two of one name": (lambda: Device("D", None, [Param("P", None, 1), Param("P", None, 2)]), "D: two parameters"),
    "no primary": (lambda: Device("D", primary="P"), 'D: no parameter "P" to be the primary'),
    "parameter of another": (lambda: Device("D", None, [lamp()["Power"]]), "D: parameter Power belongs to Lamp"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together_is_named(case: str) -> None:
    make, message = MISFITS[case]
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_device_that_was_refused_keeps_no_parameter() -> None:
    power = Param("Power", None, False)
    with pytest.raises(ArgumentError):
        Device("D", None, [power, lamp()["Mode"]])
    assert Device("E", None, [power])["Power"] is power


def test_names_are_unique_within_a_node(params: Params) -> None:
    with pytest.raises(ArgumentError, match='there is a device or service "OTA" already'):
        params.add(Device("OTA"))
    with pytest.raises(ArgumentError, match="Lamp belongs to a node already"):
        Params().add(params.devices[0])
    params.add(Groups())
    assert params.groups is params.services[1]
    assert [one.name for one in params.services] == ["OTA", "Groups"]


NESTED: Any = []
for _ in range(100_000):
    NESTED = [NESTED]

REFUSED: list[tuple[str, object, str]] = [
    ("Power", 1, "Lamp.Power: 1, expected bool"),
    ("Power", None, "None, expected bool"),
    ("Brightness", True, "True, expected int"),
    ("Brightness", 5.0, "5.0, expected int"),
    ("Brightness", 101, "101, expected 0 to 100"),
    ("Brightness", -1, "-1, expected 0 to 100"),
    ("Brightness", 10**5000, "a large number, expected 64 bits"),
    ("Level", float("nan"), "nan, expected a finite number"),
    ("Level", float("inf"), "inf, expected a finite number"),
    ("Level", 10**400, "a large number, expected float"),
    ("Level", 1.5, "1.5, expected 0 to 1"),
    ("Level", "0.5", "'0.5', expected float"),
    ("Mode", "on", '\'on\', expected one of "auto", "off"'),
    ("Mode", b"auto", "b'auto', expected string"),
    ("Scene", [], "an array, expected object"),
    ("Scene", {"a": float("inf")}, "not a value of JSON"),
    ("Scene", {"a": "\udfff"}, "not a value of JSON"),
    ("Scene", {"a": b""}, "not a value of JSON"),
    ("Scene", {"a": "x" * MAX_TEXT}, f"expected at most {MAX_TEXT}"),
    ("Times", {}, "an object, expected array"),
    ("Times", NESTED, "not a value of JSON"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[f"{name}: {text}" for name, _, text in REFUSED])
def test_a_refused_value_changes_nothing(name: str, value: object, message: str) -> None:
    param = lamp()[name]
    before = param.value
    with pytest.raises(ArgumentError) as caught:
        param.update(value)
    assert message in str(caught.value)
    assert param.value == before
    assert not param.changed


class Step(enum.IntEnum):
    LOW = 3
    HIGH = 200


def test_a_member_of_an_enum_is_the_number_it_stands_for() -> None:
    brightness = lamp()["Brightness"]
    brightness.update(Step.LOW)
    with pytest.raises(ArgumentError, match="expected 0 to 100"):
        brightness.update(Step.HIGH)
    speed = Param("Speed", None, Step.HIGH)
    assert (json.dumps(brightness.value), json.dumps(speed.value), speed.data_type) == ("3", "200", "int")
    level = lamp()["Level"]
    with pytest.raises(ArgumentError, match="expected 0 to 1"):
        level.update(Step.LOW)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**5000], ids=["above", "below", "far above"])
def test_numbers_have_64_bits(value: int) -> None:
    count = Param("Count", None, 2**63 - 1)
    count.update(-(2**63))
    with pytest.raises(ArgumentError, match="expected 64 bits"):
        count.update(value)


def test_an_integer_is_a_float_where_one_is_meant() -> None:
    level = lamp()["Level"]
    level.update(1)
    assert type(level.value) is float
    assert json.dumps(level.value) == "1.0"


def test_objects_are_copied() -> None:
    scene = lamp()["Scene"]
    mine: dict[str, Any] = {"a": [1]}
    scene.update(mine)
    mine["a"].append(2)
    assert scene.value == {"a": [1]}


def test_only_what_was_updated_is_reported_grouped_by_device(params: Params) -> None:
    device = params.devices[0]
    assert params.take_changed() == ({}, [])
    device["Mode"].update("off")
    params.services[0]["Info"].put("hello")
    device["Power"].update(False)  # the same value is an update too
    values, taken = params.take_changed()
    assert params_payload(values) == b'{"Lamp":{"Power":false,"Mode":"off"},"OTA":{"Info":"hello"}}'
    assert params.take_changed() == ({}, [])
    params.put_back(taken)
    assert params.take_changed() == (values, taken)


def test_the_initial_report_has_everything_and_does_not_count_as_a_report(params: Params) -> None:
    params.devices[0]["Mode"].update("off")
    values = params.values()
    assert list(values) == ["Lamp", "OTA"]
    assert list(values["OTA"].items()) == [("Status", ""), ("Info", ""), ("URL", "")]
    assert values["Lamp"]["Mode"] == "off"
    assert params.take_changed()[0] == {"Lamp": {"Mode": "off"}}


def test_a_device_without_parameters_has_no_place_in_a_report() -> None:
    params = Params()
    params.add(Device("Empty"))
    assert params.values() == {}


def test_a_report_takes_along_the_parameter_itself(params: Params) -> None:
    calls: list[object] = []
    params.reporter = lambda: calls.append(params.take_changed()[0])
    params.devices[0]["Power"].report()
    params.devices[0]["Brightness"].update_and_report(7)
    assert calls == [{"Lamp": {"Power": False}}, {"Lamp": {"Brightness": 7}}]
    Param("Loose", None, 1).update_and_report(2)  # belongs to nobody: nobody hears of it


# ---- Writes from outside --------------------------------------------------------------------------------------


def written(params: Params, payload: str | bytes) -> tuple[dict[str, list[tuple[str, object]]], list[str]]:
    raw = payload.encode() if isinstance(payload, str) else payload
    writes, refused = params.parse_writes(raw)
    return {one.device.name: [(param.name, value) for param, value in one.values] for one in writes}, refused


def test_writes_come_in_the_order_of_the_node(params: Params) -> None:
    text = '{"OTA":{"URL":"u"},"Lamp":{"Level":1,"Mode":"off","Power":true}}'
    assert written(params, text) == (
        {"Lamp": [("Power", True), ("Level", 1.0), ("Mode", "off")], "OTA": [("URL", "u")]},
        [],
    )
    assert not any(param.changed for param in params.devices[0])  # the callback decides


def test_of_equal_names_the_first_counts(params: Params) -> None:
    text = '{"Lamp":{"Power":true,"Power":5},"Lamp":{"Mode":"off"}}'
    assert written(params, text) == ({"Lamp": [("Power", True)]}, [])


def test_what_cannot_be_written_is_said_and_the_rest_is_written(params: Params) -> None:
    text = (
        '{"Nobody":{"a":1},"Lamp":{"Power":1,"Brightness":1e999,"Level":1e999,"Mode":"on","Energy":3,"Other":1,'
        '"Scene":{"x":1e400},"Times":[1]},"OTA":5}'
    )
    values, refused = written(params, text)
    assert values == {"Lamp": [("Times", [1])]}
    assert refused == [
        "no device 'Nobody'",
        "Lamp: no parameter 'Other'",
        "parameter Lamp.Power: 1, expected bool",
        "parameter Lamp.Brightness: inf, expected int",
        "parameter Lamp.Level: inf, expected a finite number",
        'parameter Lamp.Mode: \'on\', expected one of "auto", "off"',
        "parameter Lamp.Scene: not a value of JSON: ValueError",
        "parameter Lamp.Energy: not to be written",
        "OTA: 5, expected an object",
    ]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{broken",
        b"[]",
        b"5",
        b"null",
        b'{"Lamp":{"Power":true}} x',
        b'{"Lamp":{"Power":NaN}}',
        b"\xff\xfe",
        b'{"Lamp":{"Times":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b'{"Lamp":{"Mode":"' + b"x" * MAX_PAYLOAD + b'"}}',
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_no_object_writes_nothing(params: Params, payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        params.parse_writes(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from(["Power", "Brightness", "Level", "Mode", "Scene", "Times", "Energy", "Status", "URL", "x"])


@given(
    st.dictionaries(st.sampled_from(["Lamp", "OTA", "x"]), st.dictionaries(NAMES, JSON, max_size=6) | JSON, max_size=3)
)
def test_whatever_is_written_fits_its_parameter_and_can_be_reported(message: dict[str, Any]) -> None:
    params = Params()
    params.add(lamp())
    params.add(ota_service())
    try:
        writes, _ = params.parse_writes(json.dumps(message).encode())
    except ValueError:  # NaN
        return
    for write in writes:
        for param, value in write.values:
            assert "write" in param.properties
            param.update(value)
            assert param.value == value
    payload = params_payload(params.take_changed()[0])
    if payload is not None:
        json.loads(payload.decode("utf-8"), parse_constant=pytest.fail)


@given(st.binary(max_size=80) | st.text(alphabet='{}[]":,eE+-0123456789.trufalsn\\ LampPower', max_size=80))
@example('{"Lamp":{"Power":"\\ud800"}}')
def test_arbitrary_bytes_raise_nothing_but_value_error(payload: bytes | str) -> None:
    params = Params()
    params.add(lamp())
    raw = payload if isinstance(payload, bytes) else payload.encode()
    try:
        params.parse_writes(raw)
    except ValueError:
        return


def test_a_service_is_one_whoever_adds_it() -> None:
    params = Params()
    params.add(Service("Time", "esp.service.time", [Param("TZ", "esp.param.tz", "")]))
    assert (params.devices, [one.name for one in params.services]) == ((), ["Time"])
    assert repr(params.services[0]["TZ"]) == "<Param Time.TZ>"
    assert repr(params.services[0]) == "<Service Time>"
    assert [param.name for param in params.services[0]] == ["TZ"]
