"""The rules of parameters and of the params workflow, one by one; the recordings show them working together."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rmaker_ota import Device, Groups, Param
from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker.types import COMMON_EVENT_BASE, DiagStatus, OtaEvent, OtaStatus, OtaType
from rmaker_ota.rainmaker.workflow import (
    Action,
    AttemptFailed,
    AttemptFinished,
    AttemptHeader,
    AttemptReceived,
    BootFacts,
    CallbackReturned,
    CallDiagnostics,
    CallFetch,
    CallMarkValid,
    CallReportParams,
    CallReportStatus,
    ConfigReported,
    DiagnosticsReturned,
    Disconnected,
    Enable,
    FetchScheduled,
    ImageDescription,
    MessageReceived,
    OtaOptions,
    PostEvent,
    PubAck,
    Publish,
    QueueCallback,
    ReportConfig,
    Restart,
    Stage,
    StartAttempt,
    StartTimer,
    Subscribe,
    TimerKind,
    Unsubscribe,
    WriteParams,
)
from rmaker_ota.targets.base import BootState
from tests.python.workflow_driver import (
    BOOT,
    INIT,
    LOCAL,
    PENDING,
    REMOTE,
    URL_TOPIC,
    Driver,
    data_of,
    events,
    fetches,
    of,
    reports,
    said,
)

NEW = ImageDescription("gw", "2.0.0")
PARAMS, TOPICS = OtaType.USING_PARAMS, OtaType.USING_TOPICS
VERIFIED = "OTA Upgrade finished and verified successfully"
FLAG: dict[str, bytes | str | int] = {"ota_update": b"\x01", "ota_target": '{"slot":"ota_1","workflow":"params"}'}
BOTH = OtaOptions(type="both")


def pairs(actions: list[Action]) -> list[tuple[str, str]]:
    """Text and status of each report by params; checks that they come as two messages."""
    messages = said(actions)
    assert [list(one["OTA"]) for one in messages] == [["Info"], ["Status"]] * (len(messages) // 2)
    values = [next(iter(one["OTA"].values())) for one in messages]
    return list(zip(values[0::2], values[1::2], strict=True))


def install(driver: Driver) -> list[Action]:
    attempt = driver.attempt.attempt
    before = len(driver.done)
    driver.feed(AttemptHeader(attempt, NEW, 0, "ota_1"))
    driver.feed(AttemptReceived(attempt, 100_000))
    driver.feed(AttemptFinished(attempt, "ota_1", "2.0.0"))
    return driver.done[before:]


# ---- Start ----------------------------------------------------------------------------------------------------


def test_a_start_subscribes_reports_everything_and_fetches_nothing() -> None:
    driver = Driver()
    actions = driver.start_params()
    assert of(actions, Subscribe) == [Subscribe(REMOTE, 1)]
    assert [(one.topic, one.payload) for one in of(actions, Publish)] == [
        (INIT, b'{"OTA":{"Status":"","Info":"","URL":""}}')
    ]
    assert of(actions, StartTimer) == []
    assert of(actions, FetchScheduled) == []


def test_a_node_without_devices_subscribes_all_the_same() -> None:
    driver = Driver()
    driver.enable()
    actions = driver.come_up()
    assert of(actions, Subscribe) == [Subscribe(REMOTE, 1), Subscribe(URL_TOPIC, 1)]
    assert of(actions, Publish) == []


def test_enabled_after_the_start_the_configuration_is_reported_again() -> None:
    driver = Driver()
    driver.come_up()
    actions = driver.enable(PARAMS)
    assert of(actions, ReportConfig) == [ReportConfig()]
    assert said(actions, INIT) == [{"OTA": {"Status": "", "Info": "", "URL": ""}}]
    assert of(actions, Subscribe) == []


def test_a_device_named_as_the_service_keeps_it_out() -> None:
    driver = Driver()
    driver.params.add(Device("OTA"))
    assert driver.call(Enable, PARAMS) == EspErr.INVALID_ARG
    assert driver.call(Enable, TOPICS) == EspErr.OK


def test_one_workflow_is_enabled_once_unless_both_are_asked_for() -> None:
    for first, second in itertools.permutations(OtaType):
        driver = Driver()
        assert driver.call(Enable, first) == EspErr.OK
        assert driver.call(Enable, first) == EspErr.FAIL
        assert driver.call(Enable, second) == EspErr.FAIL
        driver = Driver(BOTH)
        assert driver.call(Enable, first) == EspErr.OK
        assert driver.call(Enable, first) == EspErr.FAIL
        assert driver.call(Enable, 3) == EspErr.INVALID_ARG
        assert driver.call(Enable, second) == EspErr.OK
        assert driver.call(Enable, second) == EspErr.FAIL


def test_an_unknown_type_in_the_options_is_refused() -> None:
    with pytest.raises(ValueError, match='type is "all", expected "topics", "params" or "both"'):
        OtaOptions(type="all")


# ---- Jobs -----------------------------------------------------------------------------------------------------


def test_an_update_with_rollback_is_told_in_pairs() -> None:
    driver = Driver()
    driver.start_params()
    actions = driver.url()
    assert data_of(actions).url == "https://x/fw.bin"
    assert data_of(actions).ota_job_id is None
    actions += install(driver)
    assert pairs(actions) == [
        ("Starting OTA Upgrade (HTTPS attempt 1/3)", "in-progress"),
        ("Downloading Firmware Image", "in-progress"),
        ("Firmware Image download complete", "in-progress"),
        ("Rebooting into new firmware (after 1 HTTPS attempt)", "in-progress"),
    ]
    assert [event for event, _ in events(actions)] == [1, 2, 2, 2, 2, 0]
    assert reports(actions) == []
    assert fetches(actions) == 0
    assert driver.stored is not None
    assert json.loads(str(driver.stored["ota_target"])) == {"slot": "ota_1", "version": "2.0.0", "workflow": "params"}
    assert "rmaker_ota_id" not in driver.stored
    assert of(driver.fire(TimerKind.REBOOT), Restart)


def test_the_application_sees_the_address_and_what_it_gave_itself() -> None:
    driver = Driver()
    driver.start_params(has_ota_callback=True, server_cert="C", priv="P")
    [query] = of(driver.url(), QueueCallback)
    data = query.data
    assert (data.url, data.server_cert, data.priv, data.filesize, data.metadata) == (
        "https://x/fw.bin",
        "C",
        "P",
        0,
        None,
    )
    assert (query.builtin, query.type) == (False, PARAMS)
    assert driver.call(CallReportStatus, query.handle, OtaStatus.DELAYED, None) == EspErr.OK
    assert pairs(driver.done) == [("", "delayed")]
    actions = driver.feed(CallbackReturned(query.job, "ValueError: no"))
    assert pairs(actions) == [("OTA callback failed: ValueError: no", "failed")]
    assert not driver.workflow.busy


@pytest.mark.parametrize("state", ["running", "restart", "verify"])
def test_while_busy_an_address_is_refused_and_nothing_is_reported(state: str) -> None:
    driver = Driver(boot=PENDING if state == "verify" else BOOT)
    if state == "verify":
        driver.start_params(has_diagnostics=True)
        driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.PENDING))
    else:
        driver.start_params()
        driver.url()
    if state == "restart":
        install(driver)
    assert driver.workflow.busy
    actions = driver.url("https://x/other.bin")
    assert of(actions, Publish) == of(actions, QueueCallback) == of(actions, PostEvent) == []


def test_after_the_last_failed_attempt_nothing_more_happens() -> None:
    driver = Driver(OtaOptions(ota_max_retries=2))
    driver.start_params()
    driver.url()
    driver.feed(AttemptFailed(driver.attempt.attempt, Stage.TRANSFER))
    driver.feed(AttemptFailed(driver.attempt.attempt, Stage.TRANSFER))
    assert [status for _, status in pairs(driver.done)] == ["in-progress", "failed", "in-progress", "failed"]
    assert of(driver.done, FetchScheduled) == []
    assert driver.timers == {}
    assert not driver.workflow.busy
    assert of(driver.url(), StartAttempt)


def test_a_full_worker_queue_loses_the_job_and_asks_for_nothing() -> None:
    driver = Driver(queue_full=True)
    driver.start_params()
    actions = driver.url()
    assert of(actions, Publish) == of(actions, FetchScheduled) == []
    assert not driver.workflow.busy


def test_fetching_is_possible_and_brings_nothing() -> None:
    driver = Driver()
    driver.start_params()
    assert driver.call(CallFetch) == EspErr.OK
    assert fetches(driver.done) == 1
    assert of(driver.feed(MessageReceived(URL_TOPIC, b'{"ota_job_id":"J","url":"u"}')), QueueCallback) == []


@pytest.mark.parametrize(
    "message",
    [
        {"OTA": {"URL": 5}},
        {"OTA": {"URL": None}},
        {"OTA": {"Status": "success"}},
        {"OTA": {"Info": "x"}},
        {"OTA": {"Other": 1}},
        {"OTA": []},
        {"Light": {"Power": True}},
        b"{broken",
        b"\xff",
        b'{"OTA":' * 10_000,
        b'{"OTA":{"URL":"' + b"x" * 40_000 + b'"}}',
    ],
    ids=lambda value: str(value)[:32],
)
def test_hostile_writes_begin_nothing(message: object) -> None:
    driver = Driver()
    driver.start_params()
    actions = driver.write(message)
    assert of(actions, QueueCallback) == of(actions, Publish) == []
    assert driver.params.values() == {"OTA": {"Status": "", "Info": "", "URL": ""}}


def test_an_address_is_taken_whatever_else_is_in_the_message() -> None:
    driver = Driver()
    driver.start_params()
    actions = driver.write(b'{"OTA":{"Info":"x","URL":"u1","URL":"u2","Status":7},"Nobody":1}')
    assert data_of(actions).url == "u1"
    assert driver.params.values()["OTA"]["URL"] == ""


# ---- Results after a restart -----------------------------------------------------------------------------------


def test_confirmed_at_the_connection_the_success_is_in_the_initial_report_and_in_the_next_one() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG))
    actions = driver.start_params()
    assert said(actions) == []
    assert said(actions, INIT) == [{"OTA": {"Status": "success", "Info": VERIFIED, "URL": ""}}]
    assert (OtaEvent.SUCCESSFUL, VERIFIED) in events(actions)
    assert of(actions, FetchScheduled) == []
    driver.acknowledge()
    assert driver.stored == {}
    # The initial report does not count as a report: the first one brings the status of then once more.
    assert said(driver.url()) == [
        {"OTA": {"Status": "success", "Info": "Starting OTA Upgrade (HTTPS attempt 1/3)"}},
        {"OTA": {"Status": "in-progress"}},
    ]


def test_rolled_back_is_reported_at_once_and_goes_out_with_the_initial_report() -> None:
    driver = Driver(stored=dict(FLAG))
    actions = driver.enable(PARAMS)
    assert (OtaEvent.REJECTED, "Firmware rolled back") in events(actions)
    assert said(driver.come_up(), INIT) == [{"OTA": {"Status": "rejected", "Info": "Firmware rolled back", "URL": ""}}]


def test_a_target_without_confirmation_that_runs_is_a_success() -> None:
    facts = BootFacts("ota_1", BootState.VALID, "ota_0", "gw", "2.0.0")
    stored: dict[str, bytes | str | int] = {
        "ota_update": b"\x01",
        "ota_target": '{"slot":"ota_1","version":"2.0.0","workflow":"params"}',
    }
    driver = Driver(boot=facts, stored=stored)
    assert said(driver.start_params(), INIT)[0]["OTA"]["Status"] == "success"  # Q35


def test_a_result_that_was_not_acknowledged_is_said_again_after_the_next_restart() -> None:
    first = Driver(boot=PENDING, stored=dict(FLAG))
    first.start_params()
    second = Driver(boot=BootFacts("ota_1", BootState.VALID, "ota_0", "gw", "2.0.0"), stored=first.stored)
    assert said(second.start_params(), INIT)[0]["OTA"] == {"Status": "success", "Info": VERIFIED, "URL": ""}
    second.acknowledge()
    assert second.stored == {}
    third = Driver(stored=second.stored)
    assert said(third.start_params(), INIT)[0]["OTA"]["Status"] == ""


@pytest.mark.parametrize("damaged", ["{", "[]", '{"status":"x","info":"y"}', '{"status":2}', b"\xff", 5])
def test_a_damaged_result_is_passed_over(damaged: bytes | str | int) -> None:
    driver = Driver(stored={"ota_params_result": damaged})
    assert said(driver.start_params(), INIT)[0]["OTA"]["Status"] == ""


def test_without_rollback_the_result_is_kept_until_it_is_acknowledged() -> None:
    driver = Driver(OtaOptions(rollback_enable=False))
    driver.start_params()
    driver.acknowledge()
    driver.url()
    assert pairs(install(driver))[-1] == ("HTTPS OTA Upgrade finished successfully (after 1 attempt)", "success")
    assert driver.stored is not None
    assert "ota_params_result" in driver.stored
    driver.acknowledge()
    assert driver.stored == {}


def test_a_new_job_makes_the_kept_result_history() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG))
    driver.start_params()
    driver.url()
    assert driver.stored == {}


def test_diagnostics_that_fail_without_a_way_back_are_reported() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG), target_error=EspErr.FAIL)
    driver.enable(PARAMS, has_diagnostics=True)
    driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.FAIL))
    assert said(driver.come_up(), INIT)[0]["OTA"]["Status"] == "failed"  # Q40


def test_a_time_out_of_the_confirmation_is_a_rejection_whatever_is_set() -> None:
    driver = Driver(OtaOptions(ota_rollback_report_failed=True), boot=PENDING, stored=dict(FLAG))
    driver.enable(PARAMS)
    assert of(driver.fire(TimerKind.ROLLBACK), Restart)
    assert driver.stored == FLAG


# ---- Parameters of the application -----------------------------------------------------------------------------


def lamp(driver: Driver) -> Device:
    device = Device("Lamp", None, [Param("Power", None, False), Param("Level", None, 0)])
    driver.params.add(device)
    return device


def test_a_report_before_the_start_waits_for_it() -> None:
    driver = Driver()
    device = lamp(driver)
    device["Power"].update(True)
    assert driver.call(CallReportParams) == EspErr.OK
    assert of(driver.done, Publish) == []
    actions = driver.come_up()
    assert said(actions, INIT) == [{"Lamp": {"Power": True, "Level": 0}}]
    device["Level"].update(3)
    assert driver.call(CallReportParams) == EspErr.OK
    assert said(driver.done) == [{"Lamp": {"Power": True, "Level": 3}}]
    assert driver.call(CallReportParams) == EspErr.OK  # nothing has changed
    assert len(said(driver.done)) == 1


def test_a_text_that_says_nothing_is_not_published() -> None:
    driver = Driver()
    driver.params.add(Device("Empty"))
    assert of(driver.come_up(), Publish) == []
    driver.params.add(Device("D", None, [Param("a", None, 1)]))
    assert [action.payload for action in of(driver.feed(ConfigReported()), Publish)] == [b'{"D":{"a":1}}']  # 13 bytes


def test_a_refused_report_is_tried_again_with_what_came_meanwhile() -> None:
    driver = Driver()
    device = lamp(driver)
    driver.come_up()
    driver.accept = False
    device["Power"].update(True)
    assert driver.call(CallReportParams) == EspErr.FAIL
    assert driver.timers[TimerKind.REPORT_PARAMS].seconds == 30
    driver.fire(TimerKind.REPORT_PARAMS)
    assert driver.timers[TimerKind.REPORT_PARAMS].seconds == 60
    device["Level"].update(9)
    driver.accept = True
    assert said(driver.fire(TimerKind.REPORT_PARAMS)) == [{"Lamp": {"Power": True, "Level": 9}}]
    assert driver.timers == {}


def test_in_strict_mode_a_refused_report_is_dropped() -> None:
    driver = Driver(OtaOptions(strict=True), accept=False)
    device = lamp(driver)
    driver.come_up()
    device["Power"].update(True)
    assert driver.call(CallReportParams) == EspErr.FAIL
    assert driver.timers == {}
    driver.accept = True
    assert driver.call(CallReportParams) == EspErr.OK
    assert said(driver.done) == [{"Lamp": {"Power": True}}]  # that of the refused one


def test_a_refused_initial_report_is_tried_again() -> None:
    driver = Driver(accept=False)
    lamp(driver)
    driver.come_up()
    driver.accept = True
    assert said(driver.fire(TimerKind.REPORT_PARAMS), INIT) == [{"Lamp": {"Power": False, "Level": 0}}]


def test_a_reconnect_sends_what_was_refused_at_once() -> None:
    driver = Driver()
    device = lamp(driver)
    driver.come_up()
    driver.accept = False
    device["Power"].update(True)
    driver.call(CallReportParams)
    driver.feed(Disconnected())
    driver.accept = True
    before = len(driver.done)
    driver.away(1)
    assert said(driver.done[before:]) == [{"Lamp": {"Power": True}}]


def test_writes_go_to_the_callbacks_and_change_nothing_by_themselves() -> None:
    driver = Driver()
    device = lamp(driver)
    driver.start_params()
    actions = driver.write({"OTA": {"URL": "u"}, "Lamp": {"Level": 7, "Power": 5}})
    [write] = of(actions, WriteParams)
    assert write.write.device is device
    assert write.write.values == [(device["Level"], 7)]
    assert device["Level"].value == 0
    assert of(actions, QueueCallback)


def test_params_work_without_any_workflow() -> None:
    driver = Driver()
    lamp(driver)
    driver.come_up()
    assert of(driver.write({"Lamp": {"Power": True}}), WriteParams)


# ---- Groups ---------------------------------------------------------------------------------------------------


def test_a_group_is_joined_changed_left_and_remembered() -> None:
    driver = Driver()
    driver.params.add(Groups())
    device = lamp(driver)
    assert of(driver.come_up(), Subscribe) == [Subscribe(REMOTE, 1)]
    actions = driver.write({"Groups": {"GroupID": "g1"}})
    assert of(actions, Subscribe) == [Subscribe(f"{REMOTE}/g1", 1)]
    device["Power"].update(True)
    driver.call(CallReportParams)
    assert said(driver.done, "node/N1/params/local/g1") == [
        {"Groups": {"GroupID": "g1"}, "Lamp": {"Power": True}}  # the id was updated, and not reported until now
    ]
    assert of(driver.write({"Lamp": {"Level": 1}}, f"{REMOTE}/g1"), WriteParams)

    again = Driver(stored=driver.stored)
    again.params.add(Groups())
    actions = again.come_up()
    assert of(actions, Subscribe) == [Subscribe(f"{REMOTE}/g1", 1), Subscribe(REMOTE, 1)]
    assert said(actions, INIT) == [{"Groups": {"GroupID": "g1"}}]

    actions = again.write({"Groups": {"GroupID": "g2"}})
    assert of(actions, Unsubscribe) == [Unsubscribe(f"{REMOTE}/g1")]
    assert of(actions, Subscribe) == [Subscribe(f"{REMOTE}/g2", 1)]
    actions = again.write({"Groups": {"GroupID": ""}})
    assert of(actions, Unsubscribe) == [Unsubscribe(f"{REMOTE}/g2")]
    assert of(actions, Subscribe) == []
    assert again.write({"Lamp": {"Level": 1}}, f"{REMOTE}/g2") == []


@pytest.mark.parametrize("group_id", ["a/b", "+", "#", "x" * 129, "ü", "a b"])
def test_what_is_no_level_of_a_topic_is_no_group(group_id: str) -> None:
    driver = Driver()
    driver.params.add(Groups())
    driver.come_up()
    actions = driver.write({"Groups": {"GroupID": group_id}})
    assert of(actions, Subscribe) == []
    assert driver.stored == {}
    kept = Driver(stored={"group_id": group_id})
    kept.params.add(Groups())
    assert of(kept.come_up(), Subscribe) == [Subscribe(REMOTE, 1)]


def test_groups_added_later_are_joined_with_the_next_configuration() -> None:
    driver = Driver(stored={"group_id": "g1"})
    driver.come_up()
    driver.params.add(Groups())
    assert of(driver.feed(ConfigReported()), Subscribe) == [Subscribe(f"{REMOTE}/g1", 1)]


# ---- Both workflows -------------------------------------------------------------------------------------------


def both(**more: Any) -> Driver:
    driver = Driver(BOTH, **more)
    driver.enable(TOPICS)
    driver.enable(PARAMS)
    driver.come_up()
    return driver


def test_each_job_is_reported_the_way_it_came() -> None:
    driver = both()
    driver.url()
    driver.feed(AttemptHeader(driver.attempt.attempt, ImageDescription("gw", "1.0.0")))
    driver.feed(AttemptFailed(driver.attempt.attempt, Stage.TRANSFER))
    assert pairs(driver.done)[-1] == ("Same version received", "rejected")
    assert reports(driver.done) == []
    before = len(driver.done)
    driver.job("J1")
    assert [status for status, _ in reports(driver.done)] == ["in-progress"]
    assert said(driver.done[before:]) == []


def test_a_job_that_comes_while_the_other_workflow_is_at_work() -> None:
    driver = both(stored={"rmaker_ota_id": b"J1"})
    driver.url()
    driver.job("J1")  # an old one by that id was the last, but is not the one at hand
    driver.feed(AttemptHeader(driver.attempt.attempt, ImageDescription("gw", "1.0.0")))
    actions = driver.feed(AttemptFailed(driver.attempt.attempt, Stage.TRANSFER))
    assert of(actions, FetchScheduled) == [FetchScheduled(5, False)]  # Q13; one is due already
    driver.job("J2")
    assert of(driver.url("https://x/other.bin"), QueueCallback) == []


@pytest.mark.parametrize("first", list(OtaType))
@pytest.mark.parametrize("came_by", ["params", "topics"])
def test_the_result_of_an_update_is_told_the_way_its_job_came(first: OtaType, came_by: str) -> None:
    target = {"slot": "ota_1", "version": "2.0.0"} | ({"workflow": "params"} if came_by == "params" else {})
    stored: dict[str, bytes | str | int] = {
        "ota_update": b"\x01",
        "rmaker_ota_id": b"J1",
        "ota_target": json.dumps(target),
    }
    driver = Driver(BOTH, boot=PENDING, stored=stored)
    driver.enable(first)
    driver.enable(PARAMS if first == TOPICS else TOPICS)
    actions = driver.come_up()
    by_topics = reports(actions)
    by_params = said(actions, INIT)[0]["OTA"]["Status"]
    if came_by == "params":
        assert (by_topics, by_params) == ([], "success")
    else:
        assert (by_topics, by_params) == ([("success", VERIFIED)], "")
    assert driver.call(CallMarkValid) == EspErr.INVALID_STATE


def test_each_workflow_has_its_own_callback() -> None:
    driver = Driver(BOTH)
    driver.enable(TOPICS, has_ota_callback=True, priv="t")
    driver.enable(PARAMS, priv="p")
    driver.come_up()
    [by_params] = of(driver.url(), QueueCallback)
    assert (by_params.builtin, by_params.data.priv) == (True, "p")
    driver.feed(AttemptHeader(driver.attempt.attempt, ImageDescription("gw", "1.0.0")))
    driver.feed(AttemptFailed(driver.attempt.attempt, Stage.TRANSFER))
    [by_topics] = of(driver.job("J1"), QueueCallback)
    assert (by_topics.builtin, by_topics.data.priv) == (False, "t")


# ---- Whatever happens -------------------------------------------------------------------------------------------

STEPS = st.sampled_from(
    ["url", "job", "header", "same", "fail", "finish", "refuse", "accept", "ack", "away", "report", "timer", "reboot"]
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), rollback=st.booleans(), types=st.sampled_from(["params", "both"]))
def test_reports_by_params_are_always_sound(steps: list[str], rollback: bool, types: str) -> None:
    """One job at a time, valid JSON, events for all, nothing lost: what is refused is said when it can be."""
    options = OtaOptions(rollback_enable=rollback, type=types, ota_max_retries=2)

    def boot(stored: Any) -> Driver:
        driver = Driver(options, stored=stored)
        driver.enable(PARAMS)
        if types == "both":
            driver.enable(TOPICS)
        driver.come_up()
        return driver

    driver = boot({})
    for step in steps:
        attempts = of(driver.done, StartAttempt)
        attempt = attempts[-1].attempt if attempts else 0
        before = len(driver.done)
        match step:
            case "url":
                driver.url()
            case "job":
                driver.job("J1")
            case "header":
                driver.feed(AttemptHeader(attempt, NEW))
            case "same":
                driver.feed(AttemptHeader(attempt, ImageDescription("gw", "1.0.0")))
            case "fail":
                driver.feed(AttemptFailed(attempt, Stage.TRANSFER))
            case "finish":
                driver.feed(AttemptFinished(attempt, "ota_1", "2.0.0"))
            case "refuse" | "accept":
                driver.accept = step == "accept"
            case "ack":
                driver.acknowledge()
            case "away":
                driver.away(1)
            case "report":
                driver.call(CallReportStatus, 1, OtaStatus.IN_PROGRESS, "x")
            case "timer" if TimerKind.REPORT_PARAMS in driver.timers:
                driver.fire(TimerKind.REPORT_PARAMS)
            case "reboot":
                driver = boot(driver.stored)
                before = 0
        actions = driver.done[before:]
        for action in of(actions, Publish):
            message = json.loads(action.payload)
            if action.topic in (LOCAL, INIT):
                assert list(message) == ["OTA"]
                assert set(message["OTA"]) <= {"Status", "Info", "URL"}
        told = [event for event in of(actions, PostEvent) if event.base != COMMON_EVENT_BASE]
        assert len(of(actions, QueueCallback)) <= 1
        assert len(told) <= 8
    driver.accept = True
    if TimerKind.REPORT_PARAMS in driver.timers:
        driver.fire(TimerKind.REPORT_PARAMS)
    # The last thing heard of each parameter is what it holds.
    heard: dict[str, Any] = {}
    for action in of(driver.done, Publish):
        if action.topic in (LOCAL, INIT) and action.token in driver.accepted:
            heard |= json.loads(action.payload)["OTA"]
    assert heard == driver.params.values()["OTA"]
    driver.acknowledge()
    driver.feed(PubAck(10**6))
    assert driver.stored is not None
    assert "ota_params_result" not in driver.stored
