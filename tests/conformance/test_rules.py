"""Rules that no recording in the folder meets, each on one made to meet it, and on the same without its condition.

The reference's side is written from the specification: what section 10 says "upstream" does.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.conformance.runner import MakePlatform, Outcome, platform, replay, run
from tests.conformance.test_traces import DOCUMENTS
from tests.conformance.trace import parse

Json = dict[str, Any]

JOB = "Rk3vXyZ0aB1cD2eF3gH4iJ"
OTAURL = "node/7cdfa1b2c3d4/otaurl"
FETCH = {"node_id": "7cdfa1b2c3d4", "fw_version": "1.0.0"}


@pytest.fixture(params=["simple", "chip"])
def make(request: pytest.FixtureRequest) -> MakePlatform:
    return platform(request.param)


def recording(name: str) -> Json:
    return copy.deepcopy(DOCUMENTS[name])


def judged(document: Json, make: MakePlatform) -> Outcome:
    return replay(parse(document), make)


def drawn(base: str, steps: list[Json], records: list[Json], final: Json, **inputs: Any) -> Json:
    """A recording drawn up by hand; ``records`` without their ``boot``."""
    document = recording(base)
    document["inputs"].update(boots=[steps], **inputs)
    document["trace"] = [{"boot": 1, **record} for record in records]
    document["final"] = final
    return document


def boot(running: str = "ota_0", version: str = "1.0.0") -> Json:
    return {"t": 0.0, "kind": "boot", "running": running, "version": version, "project_name": "my_product"}


def step(index: int, do: str, t: float = 0.0) -> Json:
    return {"t": t, "kind": "step", "i": index, "do": do}


def returned(api: str, ret: str = "ESP_OK", t: float = 0.0) -> Json:
    return {"t": t, "kind": "api_return", "api": api, "ret": ret}


def subscribed(t: float = 0.0) -> Json:
    return {"t": t, "kind": "mqtt_subscribe", "topic": OTAURL, "qos": 1, "result": "ESP_OK"}


def timer(name: str, seconds: float, number: int, t: float = 0.0) -> Json:
    return {"t": t, "kind": "timer_start", "timer": name, "id": number, "seconds": seconds, "repeat": False}


def fetched(t: float, number: int, version: str = "1.0.0") -> list[Json]:
    return [
        {"t": t, "kind": "timer_fired", "timer": "fetch_delay", "id": number},
        {
            "t": t,
            "kind": "mqtt_publish",
            "topic": "$aws/rules/esp_node_otafetch/node/7cdfa1b2c3d4/otafetch",
            "qos": 1,
            "payload": f'{{"node_id":"7cdfa1b2c3d4","fw_version":"{version}"}}',
            "result": "ESP_OK",
        },
        timer("puback_timeout", 60.0, number + 1, t),
    ]


START: list[Json] = [{"do": "start"}, {"do": "mqtt_connect"}]
ENABLE: Json = {"do": "enable", "type": "topics", "ota_config": None}


def test_q1_the_stream_id_is_told(make: MakePlatform) -> None:
    def with_stream(shown: str | None) -> Outcome:
        document = recording("otaurl-minimal")
        for one in document["inputs"]["boots"][0]:
            if one["do"] == "message":
                one["payload"] = one["payload"][:-1] + ',"stream_id":"S1"}'
        for record in document["trace"]:
            if record["kind"] == "callback":
                record["ota_data"]["stream_id"] = shown
        return judged(document, make)

    assert with_stream(None).rules == ["Q1"]
    assert with_stream("S1").kind == "matched"
    assert with_stream("S2").kind == "unmatched"


def late_enable(message: bool) -> Json:
    steps: list[Json] = [*START, ENABLE, {"do": "advance", "seconds": 10}]
    records = [boot(), step(0, "start"), step(1, "mqtt_connect"), step(2, "enable"), returned("enable")]
    records.append(step(3, "advance"))
    if message:
        payload = '{"ota_job_id":"' + JOB + '","url":"https://fw.example.com/a.bin"}'
        steps.append({"do": "message", "topic": OTAURL, "payload": payload})
        records += [step(4, "message", 10.0), {"t": 10.0, "kind": "message_not_delivered", "topic": OTAURL}]
    final = {"nvs": {"rmaker_ota": {}}, "running": "ota_0", "t": 10.0}
    images = {"running": {"version": "1.0.0", "size": 32768}, "new": {"version": "1.0.0", "size": 32768}}
    return drawn("fetch-connected", steps, records, final, images=images)


def test_q4_enabled_late_it_subscribes(make: MakePlatform) -> None:
    assert judged(late_enable(False), make).rules == ["Q4"]
    early = late_enable(False)
    early["inputs"]["boots"][0].insert(0, early["inputs"]["boots"][0].pop(2))
    assert judged(early, make).kind == "unmatched"


def test_q4_and_takes_the_jobs_that_come(make: MakePlatform) -> None:
    assert judged(late_enable(True), make).rules == ["Q4"]


@pytest.mark.parametrize(("info", "rules"), [(None, ["Q5"]), ("x", [])])
def test_q5_a_report_without_text_is_no_crash(make: MakePlatform, info: str | None, rules: list[str]) -> None:
    call = {"name": "report_status", "handle": "last", "status": "SUCCESS", "info": info}
    document = recording("report-status-outside-job")
    steps = document["inputs"]["boots"][0]
    first = next(index for index, one in enumerate(steps) if one["do"] == "api")
    steps[first]["call"] = call
    at = next(i for i, one in enumerate(document["trace"]) if one["kind"] == "step" and one.get("i") == first)
    document["trace"] = [*document["trace"][: at + 1], {"t": 11.0, "boot": 1, "kind": "crash", "what": "NULL"}]
    document["ending"] = "stopped: the reference does not continue"
    outcome = judged(document, make)
    assert outcome.kind in ("matched", "deviates")
    assert outcome.rules == rules
    del document["trace"][-3]  # before the crash everything counts
    document["trace"] = [one for one in document["trace"] if one["kind"] != "callback_return"]
    assert judged(document, make).kind == "unmatched"


def test_q20_a_stalled_server_ends_an_attempt(make: MakePlatform) -> None:
    document = recording("https-stall-then-continues")
    document["inputs"]["https_server"] = [{"stall_after": 20000}]
    at = next(index for index, one in enumerate(document["trace"]) if one["kind"] == "http_stall")
    document["trace"] = [*document["trace"][: at + 1], {"t": 20.0, "boot": 1, "kind": "endless_wait", "what": "read"}]
    document["ending"] = "stopped: the reference does not continue"
    assert judged(document, make).rules == ["Q20"]
    document["trace"] = [one for one in document["trace"] if one["kind"] != "http_request"]
    assert judged(document, make).kind == "unmatched"


def back_on_factory() -> Json:
    nvs = {
        "rmaker_ota": {
            "ota_update": {"type": "blob", "value": {"hex": "01"}},
            "rmaker_ota_id": {"type": "blob", "value": {"text": JOB}},
        }
    }
    slots = {
        "slots": {"factory": {"image": "running"}, "ota_0": {"image": "new"}},
        "boot_entries": [{"slot": "ota_0", "seq": 1, "state": "INVALID"}],
    }
    records = [
        boot("factory"),
        step(0, "enable"),
        returned("enable"),
        step(1, "start"),
        step(2, "mqtt_connect"),
        subscribed(),
        timer("fetch_delay", 5.0, 1),
        step(3, "advance"),
        *fetched(5.0, 1),
    ]
    final = {"nvs": nvs, "running": "factory", "t": 10.0}
    steps = [ENABLE, *START, {"do": "advance", "seconds": 10}]
    return drawn("fetch-connected", steps, records, final, nvs=copy.deepcopy(nvs), slots=slots)


def test_q28_a_rollback_to_the_factory_image_is_reported(make: MakePlatform) -> None:
    document = back_on_factory()
    assert judged(document, make).rules == ["Q28"]
    document = back_on_factory()
    document["trace"] = [one for one in document["trace"] if one["kind"] != "mqtt_subscribe"]
    assert judged(document, make).kind == "unmatched"


def failing_without_way_back() -> Json:
    source = recording("verify-rollback-not-possible")["inputs"]
    config = {"ota_diag": {"INIT": "FAIL", "POST_MQTT": "SUCCESS"}}
    asked = {"t": 0.0, "kind": "callback", "which": "ota_diag", "state": "INIT", "rmaker_ota": True, "priv": None}
    records = [
        {"t": 0.0, "kind": "slot_state", "slot": "ota_1", "state": "PENDING_VERIFY", "seq": 2, "entry": 1},
        boot("ota_1", "2.0.0"),
        step(0, "enable"),
        asked,
        {"t": 0.0, "kind": "callback_return", "which": "ota_diag", "ret": "FAIL"},
        returned("enable"),
        step(1, "start"),
        step(2, "mqtt_connect"),
        subscribed(),
        timer("fetch_delay", 5.0, 1),
        step(3, "advance"),
        *fetched(5.0, 1, "2.0.0"),
    ]
    final = {"nvs": source["nvs"], "running": "ota_1", "t": 10.0}
    steps = [{**ENABLE, "ota_config": config}, *START, {"do": "advance", "seconds": 10}]
    return drawn("verify-rollback-not-possible", steps, records, final)


def test_q40_failed_diagnostics_without_a_way_back_are_reported(make: MakePlatform) -> None:
    document = failing_without_way_back()
    assert judged(document, make).rules == ["Q40"]
    for record in document["trace"]:
        if record["kind"] == "callback_return":
            record["ret"] = "SUCCESS"
    assert judged(document, make).kind == "unmatched"


def test_q42_an_early_acknowledgement_counts(make: MakePlatform) -> None:
    document = recording("fetch-no-acknowledgement-8")  # which is what the reference makes of early ones too
    assert judged(document, make).kind == "matched"
    document["inputs"]["mqtt"]["publish_rules"][0]["action"] = "ack_before_return"
    assert judged(document, make).rules == ["Q42"]
    publishes = [index for index, one in enumerate(document["trace"]) if one["kind"] == "mqtt_publish"]
    del document["trace"][publishes[0]]
    assert judged(document, make).kind == "unmatched"


def test_q43_writing_to_the_slot_invalidates_a_position(make: MakePlatform) -> None:
    kept = {
        "ota_written": {"type": "u16", "value": 29},
        "ota_file_md5": {"type": "str", "value": "5d41402abc4b2a76b9719d911017c592"},
    }
    document = recording("https-success-no-md5")
    document["inputs"]["nvs"] = {"rmaker_ota": kept}
    assert judged(document, make).kind == "matched"
    document["final"]["nvs"]["rmaker_ota"].update(copy.deepcopy(kept))
    assert judged(document, make).rules == ["Q43"]
    other = recording("fetch-connected")
    other["final"]["nvs"]["rmaker_ota"] = copy.deepcopy(kept)
    assert judged(other, make).kind == "unmatched"


def test_q13_another_job_takes_the_place_of_a_later_fetch(make: MakePlatform) -> None:
    """All attempts fail, so the reference fetches after 300 s; a job that came meanwhile is asked for at once."""
    document = recording("https-one-attempt-setting")
    steps = document["inputs"]["boots"][0]
    index = next(number for number, one in enumerate(steps) if one["do"] == "message")
    message = copy.deepcopy(steps[index])
    message["payload"] = message["payload"].replace(JOB, "OTHER")
    document["inputs"]["https_server"][0].update({"connect": "timed out", "errno": 110, "connect_ms": 5000})
    steps.insert(index, {"do": "at", "seconds": 2, "step": message})
    moved = []
    at = next(i for i, one in enumerate(document["trace"]) if one["kind"] == "step" and one["do"] == "message")
    message_t = document["trace"][at]["t"]
    for number, recorded in enumerate(document["trace"]):
        record = copy.deepcopy(recorded)
        text = record.get("payload", record.get("data")) or ""
        if record["kind"] == "step" and record["i"] >= index:
            record["i"] += 1
        if number == at:
            moved.append({"t": message_t, "boot": 1, "kind": "step", "i": index, "do": "at"})
        if record["kind"] == "http_connect":
            record["result"] = "timed out"
            moved.append({"t": message_t + 2, "boot": 1, "kind": "step", "do": "message", "scheduled": True})
            record["t"] += 5
        elif moved and any(one["kind"] == "http_connect" for one in moved):
            record["t"] += 5
            if "111: Connection refused" in str(text):
                key = "payload" if "payload" in record else "data"
                record[key] = record[key].replace("111: Connection refused", "110: Connection timed out")
            if '"ts":' in str(record.get("payload", "")):
                stamp = int(record["payload"].rsplit('"ts":', 1)[1].rstrip("}"))
                record["payload"] = record["payload"].replace(str(stamp), str(stamp + 5))
        moved.append(record)
    document["trace"] = moved
    document["final"]["t"] += 5
    outcome = judged(document, make)
    assert outcome.kind == "deviates", outcome.left
    assert "Q13" in outcome.rules


def test_q24_a_range_from_zero_that_is_not_granted_costs_the_reference_a_connection(make: MakePlatform) -> None:
    document = recording("https-fail-twice")
    trace = document["trace"]
    asked = next(i for i, one in enumerate(trace) if one["kind"] == "http_request" and one["headers"].get("Range"))
    assert trace[asked]["headers"]["Range"] == "bytes=0-"
    connects = [i for i, one in enumerate(trace) if one["kind"] == "http_connect"]
    before = [i for i in connects if i < asked]
    document["inputs"]["https_server"].insert(len(before) - 1, {"ignore_range": True})
    whole = {name: value for name, value in trace[asked]["headers"].items() if name != "Range"}
    trace[asked + 1] = {**trace[asked + 1], "status": 200}
    trace[asked + 2 : asked + 2] = [
        copy.deepcopy(trace[before[-1]]),
        {**trace[asked], "headers": whole},
        copy.deepcopy(trace[asked + 1]),
    ]
    assert judged(document, make).rules == ["Q24"]
    trace[asked] = {**trace[asked], "headers": {**whole, "Range": "bytes=1024-"}}
    assert judged(document, make).kind == "unmatched"


@pytest.mark.parametrize("name", ["https-closed-midway-resumption-off", "https-power-loss-no-md5-at-all"])
def test_q43_explains_no_range_that_is_not_the_kept_one(make: MakePlatform, name: str) -> None:
    document = recording(name)
    asked = [one for one in document["trace"] if one["kind"] == "http_request"][-1]
    asked["headers"]["Range"] = "bytes=777-"
    assert judged(document, make).kind == "unmatched"


def test_each_boot_has_its_own_settings(make: MakePlatform) -> None:
    document = recording("https-fail-twice")
    own = document["config"]
    document["config"] = {**own, "max_retries": 1, "retry_delay_minutes": 33, "progress_support": True}
    document["config_per_boot"] = [own]
    assert judged(document, make).kind != "unmatched"
    document["config_per_boot"] = [document["config"]]
    assert judged(document, make).kind == "unmatched"


@pytest.mark.parametrize(
    ("kind", "t"), [("mqtt_publish", 5.0), ("timer_fired", 5.0), ("http_response", 10.0), ("nvs_set", 10.0)]
)
def test_the_power_goes_at_the_first_record_of_a_kind(make: MakePlatform, kind: str, t: float) -> None:
    document = recording("https-success-no-md5")
    document["inputs"]["power_loss_on"] = kind
    world = run(parse(document), make)
    assert [(one.t, one.data["reason"]) for one in world.seen if one.kind == "reboot"][:1] == [(t, "power_loss")]


def test_q36_holds_where_the_range_is_not_granted_too(make: MakePlatform) -> None:
    document = recording("https-power-loss-empty-md5-matches")
    trace = document["trace"]
    connects = [i for i, one in enumerate(trace) if one["kind"] == "http_connect"]
    asked = next(i for i, one in enumerate(trace) if one["kind"] == "http_request" and one["headers"].get("Range"))
    before = [i for i in connects if i < asked]
    document["inputs"]["https_server"].insert(len(before) - 1, {"ignore_range": True})
    whole = {name: value for name, value in trace[asked]["headers"].items() if name != "Range"}
    trace[asked + 1] = {**trace[asked + 1], "status": 200}
    trace[asked + 2 : asked + 2] = [
        copy.deepcopy(trace[before[-1]]),
        {**trace[asked], "headers": whole},
        copy.deepcopy(trace[asked + 1]),
    ]
    assert "Q36" in judged(document, make).rules


def first_request(behind: str, blocks: int = 32) -> Json:
    """A file of ten blocks, of which the reference asks for ``blocks``; ``behind``: what it read behind the bitmap."""
    document = recording("mqtt-success-one-request")
    document["config"]["mqtt_blocks_per_request"] = blocks
    bitmap = bytes.fromhex("ff03" + behind)
    asked = next(one for one in document["trace"] if "b" in one.get("cbor", {}))
    asked["cbor"] |= {"b": bitmap.hex(), "n": blocks}
    head = bytes.fromhex("a5616601616c191000616f006162")
    asked["payload_hex"] = (head + bytes([0x40 | len(bitmap)]) + bitmap + b"\x61n\x18" + bytes([blocks])).hex()
    return document


@pytest.mark.parametrize("behind", ["0000", "5a00"])
def test_q33_the_reference_sends_what_lies_behind_its_bitmap(make: MakePlatform, behind: str) -> None:
    assert judged(first_request(behind), make).rules == ["Q33"]


def test_q33_a_bitmap_has_a_bit_for_each_block_that_is_asked_for(make: MakePlatform) -> None:
    assert judged(first_request("00"), make).kind == "unmatched"
    assert judged(first_request("000000"), make).kind == "unmatched"


@pytest.mark.parametrize(
    "said",
    [
        '{"o":"Throttled","m":"slow down"}',
        '{"code":"ResourceNotFound","message":"no such (stream)"}',
        '{"m":"slow down"}',
        "no map",
    ],
)
def test_q41_holds_for_whatever_is_said(make: MakePlatform, said: str) -> None:
    document = recording("mqtt-rejected-in-second-batch")
    document["inputs"]["stream_server"]["rules"][0]["do"]["reject"] = said
    assert "Q41" in judged(document, make).rules


@pytest.mark.parametrize("said", ["{}", '{"o":7}'])
def test_q41_has_nothing_to_say_where_nothing_was_said(make: MakePlatform, said: str) -> None:
    document = recording("mqtt-rejected-in-second-batch")
    document["inputs"]["stream_server"]["rules"][0]["do"]["reject"] = said
    outcome = judged(document, make)
    assert outcome.kind != "unmatched"
    assert "Q41" not in outcome.rules


def test_a_download_over_mqtt_goes_on_at_the_next_look_at_the_connection(make: MakePlatform) -> None:
    """The reference looks every 500 ms, so 2.6 s without a connection are as long as 3 s."""
    document = recording("mqtt-disconnect-short")
    assert judged(document, make).kind == "matched"
    behaviour = document["inputs"]["stream_server"]["rules"][0]["do"]
    for away, kind in ((2.6, "matched"), (2.4, "unmatched"), (3.1, "unmatched")):
        behaviour["reconnect_in"] = away
        assert judged(document, make).kind == kind


def test_q33_is_about_the_first_batch(make: MakePlatform) -> None:
    document = recording("mqtt-success-several-requests")
    assert judged(document, make).kind == "matched"
    asked = [one for one in document["trace"] if "b" in one.get("cbor", {})][-1]
    assert (asked["cbor"]["o"], asked["cbor"]["n"]) == (8, 2)
    asked["cbor"]["n"] = 4
    asked["payload_hex"] = asked["payload_hex"][:-2] + "04"
    assert judged(document, make).kind == "unmatched"


@pytest.mark.parametrize("name", ["mqtt-blocks-of-256", "mqtt-chip-revision-not-checked", "mqtt-job-negative-size"])
def test_a_job_that_goes_another_way_starts_all_the_same(make: MakePlatform, name: str) -> None:
    document = recording(name)
    start = next(one for one in document["trace"] if one["kind"] == "event" and one["event"] == "STARTING")
    document["trace"].remove(start)
    assert judged(document, make).kind == "unmatched"
