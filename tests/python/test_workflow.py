"""The rules, one by one; the recordings in tests/conformance show them working together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker.default_cert import DEFAULT_SERVER_CERT
from rmaker_ota.rainmaker.types import CommonEvent, DiagState, DiagStatus, OtaEvent, OtaStatus, OtaType
from rmaker_ota.rainmaker.workflow import (
    OPTION_RANGES,
    AcceptHeader,
    ApiReturn,
    AttemptCheckpoint,
    AttemptFailed,
    AttemptFinished,
    AttemptHeader,
    AttemptProgress,
    AttemptReceived,
    BootFacts,
    CallbackReturned,
    CallDefaultCallback,
    CallDiagnostics,
    CallFetch,
    CallFetchWithDelay,
    CallMarkInvalid,
    CallMarkValid,
    CallReportStatus,
    Connected,
    DiagnosticsReturned,
    Disconnected,
    Enable,
    FetchScheduled,
    ImageDescription,
    MarkInvalid,
    MessageReceived,
    NodeInfoChanged,
    OtaOptions,
    PubAck,
    Publish,
    PublishResult,
    QueueCallback,
    RefuseHeader,
    Restart,
    ResumePoint,
    Stage,
    StartAttempt,
    Started,
    StartTimer,
    Subscribe,
    TimerFired,
    TimerKind,
    minutes_to_window,
)
from rmaker_ota.targets.base import BootState
from tests.python.workflow_driver import (
    BOOT,
    IMAGE_SIZE,
    MD5,
    NODE,
    PENDING,
    URL_TOPIC,
    VERSIONS,
    Driver,
    chip,
    data_of,
    events,
    fetches,
    of,
    reports,
)

NEW = ImageDescription("gw", VERSIONS["ota_1"])
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")
ROLLED_BACK = ("rejected", "Firmware rolled back")
FLAG: dict[str, bytes | str | int] = {"ota_update": b"\x01", "rmaker_ota_id": b"J1"}


def failed(driver: Driver, stage: Stage = Stage.TRANSFER, **fields: int | bool) -> None:
    driver.feed(AttemptFailed(driver.attempt.attempt, stage, **fields))  # type: ignore[arg-type]


def install(driver: Driver) -> None:
    attempt = driver.attempt.attempt
    driver.feed(AttemptHeader(attempt, NEW, 0, "ota_1"))
    driver.feed(AttemptReceived(attempt, IMAGE_SIZE))
    driver.feed(AttemptFinished(attempt, "ota_1", VERSIONS["ota_1"]))


# ---- Options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTION_RANGES))
def test_numbers_outside_their_range_name_option_value_and_range(name: str) -> None:
    low, high = OPTION_RANGES[name]
    OtaOptions(**{name: low})
    OtaOptions(**{name: high})
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected {low} to {high}"):
            OtaOptions(**{name: value})


def test_a_transport_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match='"pigeon", expected "https" or "mqtt"'):
        OtaOptions(ota_transport="pigeon")


# ---- Enable and start -----------------------------------------------------------------------------------------


def test_a_start_subscribes_and_fetches_five_seconds_later() -> None:
    driver = Driver()
    actions = driver.start()
    assert of(actions, Subscribe) == [Subscribe(URL_TOPIC, 1)]
    assert of(actions, StartTimer) == [StartTimer(TimerKind.FETCH, 5)]
    assert driver.feed(Started()) == []
    assert fetches(driver.fire(TimerKind.FETCH)) == 1


def test_enable_checks_the_type_before_anything_else_and_works_once() -> None:
    driver = Driver()
    assert driver.call(Enable, 0) == EspErr.INVALID_ARG
    assert driver.call(Enable, OtaType.USING_TOPICS) == EspErr.OK
    assert driver.call(Enable, OtaType.USING_PARAMS) == EspErr.FAIL
    assert driver.call(Enable, OtaType.USING_TOPICS) == EspErr.FAIL
    assert driver.call(Enable, 3) == EspErr.INVALID_ARG


def test_enabled_after_the_start_it_starts_at_once() -> None:
    driver = Driver()
    driver.feed(Connected())
    driver.feed(Started())
    assert of(driver.enable(), Subscribe) == [Subscribe(URL_TOPIC, 1)]


def test_automatic_fetching() -> None:
    assert of(Driver(OtaOptions(ota_autofetch=False)).start(), StartTimer) == []
    driver = Driver(OtaOptions(ota_autofetch=False, ota_autofetch_period_hours=2))
    assert of(driver.start(), StartTimer) == [StartTimer(TimerKind.AUTOFETCH, 7200)]
    for _ in range(3):
        assert fetches(driver.fire(TimerKind.AUTOFETCH)) == 1
        driver.feed(PubAck(driver.unacknowledged[-1]))
        assert driver.timers[TimerKind.AUTOFETCH].seconds == 7200


# ---- Fetch ----------------------------------------------------------------------------------------------------


def test_fetch_while_one_waits_for_its_acknowledgement_sends_nothing() -> None:
    driver = Driver()
    driver.start()
    assert driver.call(CallFetch) == EspErr.OK
    before = len(driver.done)
    assert driver.call(CallFetch) == EspErr.OK
    assert fetches(driver.done[before:]) == 0
    driver.feed(PubAck(driver.unacknowledged[-1]))
    assert TimerKind.FETCH_PUBACK not in driver.timers
    assert driver.call(CallFetch) == EspErr.OK
    assert fetches(driver.done[before:]) == 1


def test_fetch_is_tried_again_with_growing_delays_until_it_is_acknowledged() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False))
    driver.enable()
    assert driver.call(CallFetch) == EspErr.INVALID_STATE
    delays = []
    for _ in range(7):
        delays.append(driver.timers[TimerKind.FETCH].seconds)
        driver.fire(TimerKind.FETCH)
    assert delays == [30, 60, 120, 240, 480, 480, 480]
    driver.feed(Connected())
    driver.fire(TimerKind.FETCH)
    driver.feed(PubAck(driver.unacknowledged[-1]))
    driver.feed(Disconnected())
    driver.call(CallFetch)
    assert driver.timers[TimerKind.FETCH].seconds == 30


def test_fetch_fails_without_message_id_node_information_or_room() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False))
    driver.start()
    driver.message_ids = False
    assert driver.call(CallFetch) == EspErr.FAIL
    driver.message_ids = True
    driver.accept = False
    assert driver.call(CallFetch) == EspErr.FAIL
    driver.accept = True
    driver.feed(NodeInfoChanged(None))
    assert driver.call(CallFetch) == EspErr.FAIL
    assert fetches(driver.done) == 2
    driver.feed(NodeInfoChanged(NODE))
    assert driver.call(CallFetch) == EspErr.OK


def test_a_missing_acknowledgement_is_noticed_after_a_minute() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False))
    driver.start()
    driver.call(CallFetch)
    assert driver.timers[TimerKind.FETCH_PUBACK].seconds == 60
    driver.fire(TimerKind.FETCH_PUBACK)
    assert driver.timers[TimerKind.FETCH].seconds == 30


def test_an_acknowledgement_before_the_result_of_publishing_counts() -> None:
    workflow = Driver(OtaOptions(ota_autofetch=False))
    workflow.start()
    actions = workflow.workflow.handle(CallFetch(1), workflow.now)
    token = of(actions, Publish)[0].token
    workflow.workflow.handle(PubAck(77), workflow.now)
    actions = workflow.workflow.handle(PublishResult(token, True, 77), workflow.now)
    assert of(actions, ApiReturn) == [ApiReturn(1, 0)]
    assert workflow.call(CallFetch) == EspErr.OK
    assert fetches(workflow.done) == 1  # it was not waiting any more


def test_one_fetch_is_due_and_the_earliest_wins() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False))
    driver.start()
    assert driver.call(CallFetchWithDelay, 100) == EspErr.OK
    assert driver.call(CallFetchWithDelay, 200) == EspErr.OK
    assert driver.call(CallFetchWithDelay, 50) == EspErr.OK
    assert [(one.seconds, one.effective) for one in of(driver.done, FetchScheduled)] == [
        (100, True),
        (200, False),
        (50, True),
    ]
    assert driver.timers[TimerKind.FETCH].seconds == 50
    driver.fire(TimerKind.FETCH)
    assert fetches(driver.done) == 1
    assert driver.feed(TimerFired(TimerKind.FETCH)) == []  # a timer that was replaced


def test_delays_of_a_fetch() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False))
    driver.start()
    assert driver.call(CallFetchWithDelay, -1) == EspErr.INVALID_ARG
    assert driver.call(CallFetchWithDelay, 10**12) == EspErr.OK
    assert driver.timers[TimerKind.FETCH].seconds == 10**12
    assert driver.call(CallFetchWithDelay, 0) == EspErr.OK
    assert driver.timers[TimerKind.FETCH].seconds == 0


def test_a_long_absence_is_followed_by_a_fetch_except_in_strict_mode() -> None:
    for options, seconds, expected in (
        (OtaOptions(), 61, True),
        (OtaOptions(), 60, False),
        (OtaOptions(strict=True), 1000, False),
        (OtaOptions(fetch_after_reconnect=False), 1000, False),
    ):
        driver = Driver(replace(options, ota_autofetch=False))
        driver.start()
        driver.away(seconds)
        assert (TimerKind.FETCH in driver.timers) == expected


# ---- Jobs -----------------------------------------------------------------------------------------------------


def test_a_job_goes_to_the_application_with_all_its_data() -> None:
    driver = Driver()
    driver.start(has_ota_callback=True, server_cert="PEM", priv="mine")
    actions = driver.job(metadata={"k": 1}, fw_version="2", stream_id="S", file_md5=MD5)
    data = data_of(actions)
    assert (data.url, data.filesize, data.metadata) == ("https://x/fw.bin", 100_000, '{"k": 1}')
    assert (data.server_cert, data.priv, data.ota_job_id, data.stream_id) == ("PEM", "mine", "J1", "S")
    assert driver.stored == {"rmaker_ota_id": b"J1"}
    assert driver.workflow.busy
    driver.feed(CallbackReturned(of(actions, QueueCallback)[0].job))
    assert not driver.workflow.busy
    assert reports(driver.done) == []  # whatever it returned: reports are its own business


def test_an_exception_of_the_application_is_reported() -> None:
    driver = Driver()
    driver.start(has_ota_callback=True)
    actions = driver.job()
    driver.feed(CallbackReturned(of(actions, QueueCallback)[0].job, error="ValueError: no"))
    assert reports(driver.done) == [("failed", "OTA callback failed: ValueError: no")]
    assert not driver.workflow.busy


def test_while_busy_the_same_job_is_ignored_and_another_one_remembered() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False))
    driver.start(has_ota_callback=True)
    first = of(driver.job("J1"), QueueCallback)[0]
    driver.job("J1")
    driver.feed(MessageReceived(URL_TOPIC, b"garbage"))
    driver.feed(CallbackReturned(first.job))
    assert driver.timers == {}
    second = of(driver.job("J2"), QueueCallback)[0]
    driver.job("J3")
    driver.job("J3")
    assert driver.timers == {}
    driver.feed(CallbackReturned(second.job))
    assert driver.timers[TimerKind.FETCH].seconds == 5


def test_a_job_without_room_is_asked_for_again() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False), queue_full=True)
    driver.start()
    driver.job()
    assert driver.timers[TimerKind.FETCH].seconds == 5
    assert not driver.workflow.busy


def test_messages_that_are_no_jobs() -> None:
    driver = Driver(stored={"rmaker_ota_id": b"OLD"})
    driver.start()
    actions = driver.feed(MessageReceived(URL_TOPIC, b"{"))
    assert events(actions) == [(OtaEvent.FAILED, "Aborted. JSON Payload error")]
    assert of(actions, Publish) == []  # nobody to report to, least of all an old job
    assert driver.stored is not None
    assert driver.stored["rmaker_ota_id"] == b"OLD"
    actions = driver.feed(MessageReceived(URL_TOPIC, b'{"ota_job_id":"J9"}'))
    assert reports(actions) == [("failed", "Aborted. URL not found in JSON")]
    assert not driver.workflow.busy
    assert driver.feed(MessageReceived("node/N1/other", b"{}")) == []


def test_a_message_before_enable_is_not_looked_at() -> None:
    assert Driver().job() == []


# ---- The built-in handler -------------------------------------------------------------------------------------


def test_the_happy_path_with_rollback() -> None:
    driver = Driver()
    driver.start()
    driver.job()
    install(driver)
    assert reports(driver.done) == [
        ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)"),
        ("in-progress", "Downloading Firmware Image"),
        ("in-progress", "Firmware Image download complete"),
        ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)"),
    ]
    assert events(driver.done)[0] == (OtaEvent.STARTING, None)
    assert events(driver.done)[-1] == (CommonEvent.REBOOT, 10)
    assert driver.stored is not None
    assert driver.stored["ota_update"] == b"\x01"
    assert json.loads(str(driver.stored["ota_target"])) == {"slot": "ota_1", "version": "2.0.0"}
    assert driver.timers[TimerKind.REBOOT].seconds == 10
    driver.job("J2")  # nothing is installed over the image that waits
    assert len(of(driver.done, StartAttempt)) == 1
    assert of(driver.fire(TimerKind.REBOOT), Restart) == [Restart("new firmware")]
    assert driver.feed(Connected()) == []


def test_the_happy_path_without_rollback_and_automatic_restart() -> None:
    driver = Driver(OtaOptions(rollback_enable=False, ota_disable_auto_reboot=True))
    driver.start()
    driver.job()
    failed(driver)
    install(driver)
    assert reports(driver.done)[-1] == ("success", "HTTPS OTA Upgrade finished successfully (after 2 attempts)")
    assert events(driver.done)[-1] == (OtaEvent.REQ_FOR_REBOOT, None)
    assert TimerKind.REBOOT not in driver.timers
    assert driver.stored is not None
    assert "ota_update" not in driver.stored


def test_every_attempt_that_fails_is_reported_and_the_job_fetched_again() -> None:
    driver = Driver(OtaOptions(ota_autofetch=False, ota_max_retries=2, ota_retry_delay_minutes=7))
    driver.start()
    driver.job()
    failed(driver, Stage.BEGIN, esp_err=EspErr.HTTP_CONNECT, errno=111, answered=False)
    failed(driver, Stage.TRANSFER)
    assert reports(driver.done) == [
        ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/2)"),
        ("failed", "OTA Attempt 1/2 failed: OTA Begin failed: ESP_ERR_HTTP_CONNECT (errno=111: Connection refused)"),
        ("in-progress", "Starting OTA Upgrade (HTTPS attempt 2/2)"),
        ("failed", "OTA Attempt 2/2 failed: OTA failed: ESP_FAIL (errno=0: Invalid)"),
    ]
    assert driver.timers[TimerKind.FETCH].seconds == 420
    assert not driver.workflow.busy


def test_failed_attempts_can_be_told_as_progress_with_one_failure_at_the_end() -> None:
    driver = Driver(OtaOptions(report_attempt_failures=False))
    driver.start()
    driver.job()
    for _ in range(3):
        failed(driver)
    assert [status for status, _ in reports(driver.done)] == ["in-progress"] * 5 + ["failed"]


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (Stage.BEGIN, "OTA Begin failed: ESP_ERR_TIMEOUT (errno=0: Invalid)"),
        (Stage.DESCRIPTION, "Failed to read image description: ESP_ERR_TIMEOUT (errno=0: Invalid)"),
        (Stage.TRANSFER, "OTA failed: ESP_ERR_TIMEOUT (errno=0: Invalid)"),
        (Stage.INCOMPLETE, "Complete data was not received"),
        (Stage.VALIDATE, "Image validation failed"),
        (Stage.FINISH, "OTA finish failed: ESP_ERR_TIMEOUT (errno=0: Invalid)"),
    ],
)
def test_texts_of_failures(stage: Stage, text: str) -> None:
    driver = Driver()
    driver.start()
    driver.job()
    failed(driver, stage, esp_err=EspErr.TIMEOUT)
    assert reports(driver.done)[1] == ("failed", f"OTA Attempt 1/3 failed: {text}")


@pytest.mark.parametrize(
    ("image", "option", "text"),
    [
        (ImageDescription("other", "1.0.0", 0), "ota_skip_project_name_check", "Project Name mismatch"),
        (ImageDescription("gw", "1.0.0", 0), "ota_skip_version_check", "Same version received"),
        (ImageDescription("gw", "0.9", 1), "ota_skip_secure_version_check", "Lower secure version received"),
    ],
)
def test_an_unwanted_image_is_refused_before_anything_is_written(
    image: ImageDescription, option: str, text: str
) -> None:
    driver = Driver(OtaOptions(ota_autofetch=False), boot=replace(BOOT, secure_version=2))
    driver.start()
    driver.job()
    actions = driver.feed(AttemptHeader(driver.attempt.attempt, image))
    assert reports(actions) == [("rejected", text)]
    assert of(actions, RefuseHeader) == [RefuseHeader(driver.attempt.attempt, text)]
    assert driver.workflow.busy  # until the attempt has ended
    failed(driver, Stage.TRANSFER)
    assert not driver.workflow.busy
    assert driver.timers == {}
    assert len(of(driver.done, StartAttempt)) == 1

    others = {
        "ota_skip_project_name_check": True,
        "ota_skip_version_check": True,
        "ota_skip_secure_version_check": True,
    }
    driver = Driver(OtaOptions(**others), boot=replace(BOOT, secure_version=2))
    assert option in others
    driver.start()
    driver.job()
    assert of(driver.feed(AttemptHeader(driver.attempt.attempt, image)), AcceptHeader) != []


def test_another_chip_is_rejected_after_the_download_began() -> None:
    driver = Driver()
    driver.start()
    driver.job()
    driver.feed(AttemptHeader(driver.attempt.attempt, NEW))
    failed(driver, Stage.CHIP)
    assert reports(driver.done)[1:] == [
        ("in-progress", "Downloading Firmware Image"),
        ("rejected", "Chip revision mismatch"),
    ]
    assert not driver.workflow.busy


def test_progress_reports_each_multiple_once() -> None:
    driver = Driver(OtaOptions(ota_progress_support=True, ota_progress_interval_pct=25))
    driver.start()
    driver.job()
    attempt = driver.attempt.attempt
    assert driver.feed(AttemptProgress(attempt, 60_000)) == []  # before the header was accepted
    driver.feed(AttemptHeader(attempt, NEW))
    told = [reports(driver.feed(AttemptProgress(attempt, done))) for done in (24_999, 25_000, 49_000, 60_000, 60_001)]
    assert [[text for _, text in one] for one in told] == [
        [],
        ["Downloaded 25% Firmware Image"],
        [],
        ["Downloaded 50% Firmware Image"],
        [],
    ]
    actions = driver.feed(AttemptReceived(attempt, 100_000))
    assert [text for _, text in reports(actions)] == [
        "Downloaded 75% Firmware Image",
        "Firmware Image download complete",
    ]
    assert driver.feed(AttemptProgress(attempt, 100_000)) == []


def test_progress_without_a_size_and_beyond_it_says_nothing_wrong() -> None:
    driver = Driver(OtaOptions(ota_progress_support=True))
    driver.start()
    driver.job(file_size=0)
    driver.feed(AttemptHeader(driver.attempt.attempt, NEW))
    assert driver.feed(AttemptProgress(driver.attempt.attempt, 10**15)) == []
    failed(driver)
    failed(driver)
    failed(driver)
    driver.job(file_size=1000)
    driver.feed(AttemptHeader(driver.attempt.attempt, NEW))
    texts = [text for _, text in reports(driver.feed(AttemptProgress(driver.attempt.attempt, 10**15)))]
    assert texts == [f"Downloaded {percent}% Firmware Image" for percent in range(10, 100, 10)]


def test_an_application_may_call_the_handler_and_again_and_report_in_between() -> None:
    driver = Driver(OtaOptions(ota_max_retries=1))
    driver.start(has_ota_callback=True)
    query = of(driver.job(), QueueCallback)[0]
    assert driver.call(CallReportStatus, query.handle, OtaStatus.IN_PROGRESS, "mine") == EspErr.OK
    assert driver.call(CallDefaultCallback, query.handle, query.data) is None
    assert driver.call(CallDefaultCallback, query.handle, query.data) == EspErr.FAIL  # never two downloads at once
    before = len(driver.done)
    failed(driver)
    assert [one.value for one in of(driver.done[before:], ApiReturn)] == [EspErr.FAIL]
    assert driver.workflow.busy
    assert driver.call(CallDefaultCallback, query.handle, query.data) is None
    install(driver)
    assert of(driver.done, ApiReturn)[-1].value == EspErr.OK
    driver.feed(CallbackReturned(query.job))
    assert [text for _, text in reports(driver.done)][:3] == [
        "mine",
        "Starting OTA Upgrade (HTTPS attempt 1/1)",
        "OTA Attempt 1/1 failed: OTA failed: ESP_FAIL (errno=0: Invalid)",
    ]


def test_the_handler_wants_a_url_and_a_handle() -> None:
    driver = Driver()
    driver.start(has_ota_callback=True)
    query = of(driver.job(), QueueCallback)[0]
    assert driver.call(CallDefaultCallback, None, query.data) == EspErr.FAIL
    assert driver.call(CallDefaultCallback, query.handle, replace(query.data, url=None)) == EspErr.FAIL
    assert reports(driver.done) == []


def test_the_certificate_to_trust() -> None:
    for bundle, given, expected in (
        (True, "PEM", None),
        (True, None, None),
        (False, "PEM", "PEM"),
        (False, None, DEFAULT_SERVER_CERT),
    ):
        driver = Driver(OtaOptions(use_cert_bundle=bundle))
        driver.start(server_cert=given)
        driver.job()
        assert driver.attempt.server_cert == expected


# ---- Positions that are kept ----------------------------------------------------------------------------------


def interrupted(size: int = IMAGE_SIZE, md5: str = MD5) -> Driver:
    """A download cut after 40960 bytes."""
    driver = Driver()
    driver.start()
    driver.job(file_md5=md5, file_size=size)
    driver.feed(AttemptHeader(driver.attempt.attempt, NEW))
    driver.feed(AttemptCheckpoint(driver.attempt.attempt, ResumePoint(40960, bytes(32), '"tag"')))
    return driver


def test_a_download_goes_on_where_the_data_ends_also_after_a_restart() -> None:
    driver = interrupted()
    failed(driver)
    assert driver.attempt.resume == ResumePoint(40960, bytes(32), '"tag"')
    again = Driver(stored=driver.stored)
    again.start()
    again.job(file_md5=MD5.upper())
    assert again.attempt.resume == ResumePoint(40960, bytes(32), '"tag"')


@pytest.mark.parametrize(
    "change", [{"file_md5": MD5[:31]}, {"file_md5": ""}, {"file_size": 99_999}, {"file_md5": None}]
)
def test_a_position_of_another_file_is_not_used(change: dict[str, str | int | None]) -> None:
    again = Driver(stored=interrupted().stored)
    again.start()
    again.job(**{"file_md5": MD5, **change})
    assert again.attempt.resume is None


def test_a_position_in_another_slot_is_not_used() -> None:
    again = Driver(stored=interrupted().stored, boot=chip("ota_1", BootState.VALID, "1.0.0"))
    again.start()
    again.job(file_md5=MD5)
    assert again.attempt.resume is None


def test_notes_of_the_firmware_and_damaged_notes_are_not_used() -> None:
    stored = interrupted().stored
    assert stored is not None
    for note in (
        None,
        "",
        "{",
        "[]",
        '{"offset":40960}',
        json.dumps({"offset": 40960, "slot": "ota_1", "size": 100_000}),
    ):
        kept = dict(stored)
        if note is None:
            del kept["ota_position"]
        else:
            kept["ota_position"] = note
        again = Driver(stored=kept)
        again.start()
        again.job(file_md5=MD5)
        assert again.attempt.resume is None


def test_a_position_is_forgotten_when_it_may_be_the_fault() -> None:
    for stage, answered, kept in (
        (Stage.BEGIN, False, True),  # nobody there: it says nothing of what is in the slot
        (Stage.BEGIN, True, False),
        (Stage.DESCRIPTION, True, False),
    ):
        driver = interrupted()
        failed(driver)
        failed(driver, stage, answered=answered)
        assert (driver.attempt.resume is not None) == kept, (stage, answered)


def test_a_position_is_forgotten_when_the_image_is_wrong_or_complete() -> None:
    driver = interrupted()
    failed(driver, Stage.VALIDATE)
    assert driver.attempt.resume is None
    driver = interrupted()
    driver.feed(AttemptReceived(driver.attempt.attempt, 100_000))
    assert driver.stored is not None
    assert not {"ota_written", "ota_file_md5", "ota_position"} & set(driver.stored)


def test_a_job_without_checksum_invalidates_what_is_kept_when_it_writes() -> None:
    again = Driver(stored=interrupted().stored)
    again.start()
    again.job("J2")
    assert again.attempt.keep_position is False
    assert again.stored is not None
    assert "ota_written" in again.stored
    again.feed(AttemptHeader(again.attempt.attempt, NEW))
    assert not {"ota_written", "ota_file_md5", "ota_position"} & set(again.stored)


def test_a_server_that_starts_over_takes_the_position_along() -> None:
    again = Driver(stored=interrupted().stored)
    again.start()
    again.job(file_md5=MD5)
    again.feed(AttemptHeader(again.attempt.attempt, NEW, offset=0))
    assert again.stored is not None
    assert again.stored["ota_written"] == 0
    assert "ota_position" not in again.stored


def test_resumption_can_be_switched_off() -> None:
    driver = Driver(OtaOptions(http_ota_resumption=False), stored=interrupted().stored)
    driver.start()
    driver.job(file_md5=MD5)
    assert (driver.attempt.resume, driver.attempt.keep_position) == (None, False)


# ---- Time windows ---------------------------------------------------------------------------------------------

VECTORS = [
    (120, 270, 60, 3605),
    (120, 270, 120, None),
    (120, 270, 270, None),
    (120, 270, 271, 77345),
    (1380, 120, 1080, 18005),
    (1380, 120, 1410, None),
    (1380, 120, 0, None),
    (1380, 120, 120, None),
    (1380, 120, 121, 75545),
    (600, 600, 600, None),
    (600, 600, 601, 86345),
    (1080, 1155, 1200, 79205),
]


@pytest.mark.parametrize(("start", "end", "minute", "delay"), VECTORS)
def test_windows_of_the_specification(start: int, end: int, minute: int, delay: int | None) -> None:
    driver = Driver(OtaOptions(ota_autofetch=False), minute=minute)
    driver.start()
    actions = driver.job(metadata={"download_window": {"start": start, "end": end}})
    if delay is None:
        assert of(actions, StartAttempt) != []
    else:
        assert reports(actions) == [("delayed", "Not within download window.")]
        assert [one.seconds for one in of(actions, FetchScheduled)] == [delay]
        assert events(actions) == [(OtaEvent.DELAYED, "Not within download window.")]  # no STARTING
        assert not driver.workflow.busy


def test_the_wait_for_a_window_ends_inside_it() -> None:
    for start in range(0, 1440, 97):
        for end in range(0, 1440, 89):
            for now in range(0, 1440, 83):
                wait = minutes_to_window(start, end, now)
                assert 0 <= wait < 1440
                assert minutes_to_window(start, end, (now + wait) % 1440) == 0


@pytest.mark.parametrize(
    ("unix", "validity", "report", "delay"),
    [
        (1_546_300_800, {}, ("delayed", "No time information available yet."), 30),
        (1_546_300_801, {}, None, None),
        (2_000_000_000, {"start": 2_000_000_000}, None, None),
        (1_999_999_999, {"start": 2_000_000_000}, ("delayed", "Not within valid window."), 6),
        (2_000_000_000, {"end": 2_000_000_000}, None, None),
        (2_000_000_001, {"end": 2_000_000_000}, ("failed", "OTA download window lapsed."), None),
        (2_000_000_000, {"start": 5_000_000_000}, ("delayed", "Not within valid window."), 3_000_000_005),
        (2_000_000_000, {"end": 5_000_000_000}, None, None),
    ],
)
def test_validity(unix: int, validity: dict[str, int], report: tuple[str, str] | None, delay: int | None) -> None:
    driver = Driver(OtaOptions(ota_autofetch=False), unix=unix)
    driver.start()
    actions = driver.job(metadata={"validity": validity})
    assert [one.seconds for one in of(actions, FetchScheduled)] == ([] if delay is None else [delay])
    if report is None:
        assert of(actions, StartAttempt) != []
    else:
        assert reports(actions) == [report]
        assert not driver.workflow.busy


def test_windows_without_an_end_without_a_start_and_switched_off() -> None:
    driver = Driver()
    driver.start()
    assert reports(driver.job(metadata={"download_window": {"start": 5}})) == [
        ("failed", "Invalid download window specified.")
    ]
    assert of(driver.job(metadata={"download_window": {"end": 5}}), StartAttempt) != []
    driver = Driver(OtaOptions(ota_time_support=False))
    driver.start()
    assert of(driver.job(metadata={"download_window": {"start": 5}}), StartAttempt) != []


# ---- Confirmation and rollback --------------------------------------------------------------------------------


def test_a_new_image_is_confirmed_at_the_connection() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG))
    driver.enable()
    assert driver.timers[TimerKind.ROLLBACK] == StartTimer(TimerKind.ROLLBACK, 90, repeat=True)
    assert driver.workflow.busy
    actions = driver.feed(Connected())
    assert reports(actions) == [SUCCESS]
    assert driver.timers.keys() == {TimerKind.FETCH}
    assert not driver.workflow.busy
    driver.feed(PubAck(driver.unacknowledged[-1]))
    assert driver.stored == {}
    assert of(driver.feed(Started()), FetchScheduled) == [FetchScheduled(5, False)]


def test_diagnostics_are_asked_before_and_after_the_connection() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG))
    asked = of(driver.enable(has_diagnostics=True), CallDiagnostics)
    assert [(one.state, one.rmaker_ota) for one in asked] == [(DiagState.INIT, True)]
    assert of(driver.done, ApiReturn) == []  # enable waits for the answer
    driver.feed(DiagnosticsReturned(asked[0].token, DiagStatus.PENDING))
    assert of(driver.done, ApiReturn) == [ApiReturn(1, 0)]
    asked = of(driver.feed(Connected()), CallDiagnostics)
    assert [one.state for one in asked] == [DiagState.POST_MQTT]
    driver.feed(Disconnected())
    assert of(driver.feed(Connected()), CallDiagnostics) == []  # one answer is awaited already
    assert reports(driver.feed(DiagnosticsReturned(asked[0].token, DiagStatus.SUCCESS))) == [SUCCESS]
    driver.feed(Disconnected())
    assert of(driver.feed(Connected()), CallDiagnostics) == []


def test_failing_diagnostics_roll_back_without_a_word() -> None:
    for answers in ((DiagStatus.FAIL,), (DiagStatus.SUCCESS, DiagStatus.FAIL)):
        driver = Driver(boot=PENDING, stored=dict(FLAG))
        driver.enable(has_diagnostics=True)
        for number, answer in enumerate(answers):
            if number == 1:
                driver.feed(Connected())
            driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, answer))
        assert of(driver.done, Restart) == [Restart("rollback")]
        assert reports(driver.done) == []
        assert driver.stored == FLAG


def test_a_verdict_that_is_pending_has_its_own_time_limit_and_text() -> None:
    driver = Driver(OtaOptions(ota_rollback_report_failed=True), boot=PENDING, stored=dict(FLAG))
    driver.enable(has_diagnostics=True)
    driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.SUCCESS))
    driver.monotonic = 80
    driver.feed(Connected())
    driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.PENDING))
    assert driver.due[TimerKind.ROLLBACK] == 170
    driver.monotonic = 100
    driver.away(1)
    driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.PENDING))
    assert driver.due[TimerKind.ROLLBACK] == 170  # a connection that comes and goes gives no more time
    driver.fire(TimerKind.ROLLBACK)
    assert driver.dead
    assert driver.stored is not None
    assert driver.stored["ota_fail_rsn"] == "Firmware verification did not finish within 90 seconds"


def test_no_connection_in_time_rolls_back_and_the_old_image_reports_it() -> None:
    for report, expected in ((False, ROLLED_BACK), (True, ("failed", "MQTT did not connect within 90 seconds"))):
        driver = Driver(OtaOptions(ota_rollback_report_failed=report), boot=PENDING, stored=dict(FLAG))
        driver.enable()
        assert of(driver.fire(TimerKind.ROLLBACK), Restart) == [Restart("rollback")]
        old = Driver(stored=driver.stored)
        actions = old.start()
        assert reports(actions) == [expected]
        first = next(action for action in actions if isinstance(action, Publish | Subscribe))
        assert isinstance(first, Publish)  # before it subscribes
        old.feed(PubAck(old.unacknowledged[-1]))
        assert old.stored == {}


def test_a_rollback_that_is_impossible_is_tried_again_and_leaves_no_trace() -> None:
    driver = Driver(
        OtaOptions(ota_rollback_report_failed=True),
        boot=PENDING,
        stored=dict(FLAG),
        target_error=EspErr.OTA_ROLLBACK_FAILED,
    )
    driver.enable()
    for _ in range(3):
        assert of(driver.fire(TimerKind.ROLLBACK), MarkInvalid) != []
    assert driver.stored == FLAG
    assert driver.call(CallMarkInvalid) == EspErr.OTA_ROLLBACK_FAILED
    driver.target_error = 0
    assert reports(driver.feed(Connected())) == [SUCCESS]


def test_diagnostics_that_fail_without_a_way_back_are_reported_and_leave_the_choice() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG), target_error=EspErr.OTA_ROLLBACK_FAILED)
    driver.enable(has_diagnostics=True)
    driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.FAIL))
    assert of(driver.done, ApiReturn) == [ApiReturn(1, 0)]
    driver.feed(Connected())
    driver.feed(Started())
    assert reports(driver.done) == [("failed", "Diagnostics failed and there is no image to roll back to")]
    driver.target_error = 0
    assert driver.call(CallMarkValid) == EspErr.OK
    assert reports(driver.done)[-1] == SUCCESS


def test_mark_valid_and_mark_invalid_in_every_state() -> None:
    driver = Driver()
    assert driver.call(CallMarkValid) == EspErr.INVALID_STATE
    assert driver.call(CallMarkInvalid) == EspErr.INVALID_STATE
    driver = Driver(boot=PENDING)
    assert driver.call(CallMarkValid) == EspErr.INVALID_ARG  # not enabled
    driver.enable()
    assert driver.call(CallMarkValid) == EspErr.OK
    assert driver.call(CallMarkValid) == EspErr.INVALID_STATE
    driver = Driver(boot=PENDING)
    assert driver.call(CallMarkInvalid) is None
    assert driver.dead
    driver = Driver(boot=BootFacts("factory", None, "ota_0"))
    assert driver.call(CallMarkValid) == EspErr.INVALID_ARG


def test_success_is_reported_only_when_the_image_could_be_confirmed() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG), target_error=EspErr.FAIL)
    driver.enable()
    driver.feed(Connected())
    assert driver.call(CallMarkValid) == EspErr.FAIL
    assert reports(driver.done) == []
    assert TimerKind.ROLLBACK in driver.timers


def test_confirming_inside_the_first_diagnostics_works() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG))
    driver.enable(has_diagnostics=True)
    assert driver.call(CallMarkValid) == EspErr.OK
    driver.feed(DiagnosticsReturned(of(driver.done, CallDiagnostics)[-1].token, DiagStatus.SUCCESS))
    assert TimerKind.ROLLBACK not in driver.timers
    assert of(driver.feed(Connected()), CallDiagnostics) == []
    assert reports(driver.done) == [SUCCESS]


def test_an_image_that_needs_no_confirmation_is_told_from_a_rollback() -> None:
    target = json.dumps({"slot": "ota_1", "version": "2.0.0"})
    for boot, expected in (
        (chip("ota_1", BootState.NEW), SUCCESS),
        (chip("ota_1", BootState.VALID), SUCCESS),
        (chip("ota_1", BootState.VALID, "2.0.1"), ROLLED_BACK),
        (BOOT, ROLLED_BACK),
        (BootFacts("factory", None, "ota_0", "gw", "0.9"), ROLLED_BACK),
    ):
        driver = Driver(boot=boot, stored={**FLAG, "ota_target": target})
        assert reports(driver.start()) == [expected]


def test_test_mode_rolls_good_images_back_for_a_number_of_times() -> None:
    options = OtaOptions(ota_test_rollback=True, ota_test_rollback_count=2)
    driver = Driver(options, boot=PENDING, stored=dict(FLAG))
    driver.enable()
    driver.feed(Connected())
    assert reports(driver.done) == [("failed", "TEST_ROLLBACK: forced failure to re-trigger OTA (cycle 1/2)")]
    assert driver.dead
    assert driver.stored is not None
    assert (driver.stored["ota_test_cnt"], driver.stored["ota_test_jid"]) == (1, b"J1")
    assert not {"ota_update", "rmaker_ota_id"} & set(driver.stored)
    again = Driver(options, boot=PENDING, stored={**driver.stored, **FLAG})
    again.enable()
    again.feed(Connected())
    assert reports(again.done) == [("success", "TEST_ROLLBACK_END: 2/2 cycles complete; marking valid")]
    assert again.stored is not None
    assert "ota_test_cnt" not in again.stored
    endless = Driver(OtaOptions(ota_test_rollback=True, ota_test_rollback_count=0), boot=PENDING, stored=dict(FLAG))
    endless.enable()
    endless.feed(Connected())
    assert reports(endless.done)[0][1].endswith("(cycle 1, indefinite)")


# ---- Outcomes that must not be lost ---------------------------------------------------------------------------


def test_an_outcome_that_is_refused_is_sent_again_later_once() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG), accept=False)
    driver.start()
    assert reports(driver.done) == [SUCCESS]
    assert events(driver.done) == [(OtaEvent.SUCCESSFUL, SUCCESS[1])]
    driver.fire(TimerKind.RESEND)
    assert driver.timers[TimerKind.RESEND].seconds == 60
    driver.accept = True
    driver.away(1)
    assert reports(driver.done) == [SUCCESS] * 3
    driver.feed(PubAck(driver.unacknowledged[-1]))
    driver.away(1)
    driver.fire(TimerKind.RESEND)
    assert reports(driver.done) == [SUCCESS] * 3
    assert len(events(driver.done)) == 1
    assert driver.stored == {}


def test_an_outcome_that_is_not_acknowledged_is_sent_again_after_a_restart() -> None:
    driver = Driver(boot=PENDING, stored=dict(FLAG))
    driver.start()
    driver.away(10)
    assert reports(driver.done) == [SUCCESS]  # the client has it, and sends it again itself
    again = Driver(stored=driver.stored, boot=replace(PENDING, boot_state=BootState.VALID))
    actions = again.start()
    assert reports(actions) == [SUCCESS]
    assert events(actions) == []  # it was posted before
    again.feed(PubAck(again.unacknowledged[-1]))
    assert again.stored == {}


def test_a_job_that_is_begun_anew_has_no_old_outcome() -> None:
    driver = Driver(accept=False)
    driver.start()
    driver.job(metadata={"validity": {"end": 5}})
    assert reports(driver.done) == [("failed", "OTA download window lapsed.")]
    driver.accept = True
    driver.job()
    driver.away(1)
    assert [status for status, _ in reports(driver.done)].count("failed") == 1


def test_damaged_outcomes_in_the_store_do_no_harm() -> None:
    for value in ("", "{", "7", '[{"id":1}]', '[["a"]]', b"\xff", 5):
        driver = Driver(stored={"ota_result": value})
        assert reports(driver.start()) == []


def test_reports_outside_a_job_use_up_the_stored_id() -> None:
    driver = Driver(stored={"rmaker_ota_id": b"J7"})
    driver.start()
    assert driver.call(CallReportStatus, None, OtaStatus.SUCCESS, "x") == EspErr.FAIL
    driver.accept = False
    assert driver.call(CallReportStatus, 1, OtaStatus.IN_PROGRESS, "x") == EspErr.FAIL
    driver.accept = True
    assert driver.call(CallReportStatus, 1, OtaStatus.IN_PROGRESS, None) == EspErr.OK
    assert driver.stored == {}
    before = len(driver.done)
    assert driver.call(CallReportStatus, 1, OtaStatus.SUCCESS, "late") == EspErr.INVALID_STATE
    assert events(driver.done[before:]) == [(OtaEvent.SUCCESSFUL, "late")]
    assert reports(driver.done[before:]) == []
    assert driver.call(CallReportStatus, 1, 99, "x") == EspErr.INVALID_STATE
    assert events(driver.done)[-1] == (OtaEvent.INVALID, "x")


def test_a_stored_id_that_is_too_long_cannot_be_read() -> None:
    driver = Driver(stored={"rmaker_ota_id": b"x" * 65})
    driver.start()
    assert driver.call(CallReportStatus, 1, OtaStatus.IN_PROGRESS, "x") == EspErr.INVALID_STATE
    driver = Driver(stored={"rmaker_ota_id": b"x" * 64})
    driver.start()
    assert driver.call(CallReportStatus, 1, OtaStatus.IN_PROGRESS, "x") == EspErr.OK


def test_without_a_store_reports_leave_the_id_out_and_jobs_work() -> None:
    driver = Driver(stored=None)
    driver.start()
    assert driver.call(CallReportStatus, 1, OtaStatus.IN_PROGRESS, "x") == EspErr.OK
    assert b"ota_job_id" not in of(driver.done, Publish)[-1].payload
    driver.job(file_md5=MD5)
    install(driver)
    assert b'"ota_job_id":"J1"' in of(driver.done, Publish)[-1].payload
    assert driver.attempt.keep_position is False
