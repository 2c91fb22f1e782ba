"""The node around its rules: threads, callbacks, state, restarts. Time and the broker are the test's."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rmaker_ota.config import RestartSection
from rmaker_ota.errors import (
    ConfigError,
    DeviceError,
    DownloadError,
    NotBootableError,
    OtaError,
    RejectedError,
    StateError,
    StateFileError,
)
from rmaker_ota.esp_err import EspErr
from rmaker_ota.esp_rmaker_ota import esp_rmaker_ota_enable_default
from rmaker_ota.rainmaker import node as node_module
from rmaker_ota.rainmaker.application import OtaConfig, OtaDiagPriv, OtaHandle
from rmaker_ota.rainmaker.events import Event
from rmaker_ota.rainmaker.node import Node, Outcome
from rmaker_ota.rainmaker.transport import MemoryTransport, PublishBudget
from rmaker_ota.rainmaker.types import DiagState, DiagStatus, OtaData, OtaStatus, OtaType
from rmaker_ota.targets.base import BootState
from tests.sim.node_world import (
    CONFIG,
    OTAFETCH,
    OTASTATUS,
    OTAURL,
    WAIT_S,
    FakeChip,
    FakeInstallation,
    World,
    fails,
    good,
)

STARTING = ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)")
DOWNLOADING = ("in-progress", "Downloading Firmware Image")
COMPLETE = ("in-progress", "Firmware Image download complete")
REBOOTING = ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)")
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")
ROLLED_BACK = ("rejected", "Firmware rolled back")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


def updated(world: World, config: OtaConfig | None = None) -> None:
    """The world after the restart into 2.0.0, node made, not connected."""
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.deliver_job()
    world.advance(10)
    assert world.restart_reasons
    world.boot(config)


# -- start


def test_the_start_goes_in_the_order_of_the_specification(world: World) -> None:
    world.boot()
    world.connect()
    assert world.sent() == [
        ("publish", CONFIG),
        ("subscribe", "node/N1/params/remote"),
        ("subscribe", OTAURL),
    ]
    assert world.published(CONFIG) == [
        {
            "node_id": "N1",
            "config_version": "2020-03-20",
            "info": {
                "name": "gw",
                "fw_version": "1.0.0",
                "type": "Gateway",
                "model": "gw",
                "project_name": "gw",
                "platform": "linux",
            },
        }
    ]
    names = [event.name for event in world.events if event.name != "RMAKER_COMMON_EVENT_MQTT_PUBLISHED"]
    assert names == [
        "RMAKER_EVENT_INIT_DONE",
        "RMAKER_COMMON_EVENT_MQTT_CONNECTED",
        "RMAKER_EVENT_CONFIG_REPORTED",
        "RMAKER_EVENT_STARTED",
    ]
    world.advance(4.9)
    assert world.published(OTAFETCH) == []
    world.advance(0.2)
    assert world.published(OTAFETCH) == [{"node_id": "N1", "fw_version": "1.0.0"}]


def test_a_reconnect_restores_the_subscriptions_and_reports_nothing_again(world: World) -> None:
    world.boot()
    world.connect()
    world.advance(10)
    mark = len(world.transport.sent)
    world.disconnect()
    world.connect()
    assert world.sent()[mark:] == [("subscribe", "node/N1/params/remote"), ("subscribe", OTAURL)]


def test_a_configuration_that_cannot_be_published_is_tried_again(world: World) -> None:
    world.budget = PublishBudget(0, 100, 5.0, 1)
    world.boot()
    world.connect()
    assert world.sent() == []
    world.advance(59)
    assert world.sent() == []
    world.advance(2)
    assert [topic for _, topic in world.sent()] == [CONFIG, "node/N1/params/remote", OTAURL]


def test_enabling_after_the_start_subscribes_at_once(world: World) -> None:
    node = world.power_on()
    node.start()
    world.connect()
    assert ("subscribe", OTAURL) not in world.sent()
    assert node.enable(None, OtaType.USING_TOPICS) == EspErr.OK
    world.settle()
    assert ("subscribe", OTAURL) in world.sent()


# -- the whole way


def test_an_update_from_the_job_to_the_confirmed_image(world: World) -> None:
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.deliver_job()
    assert world.statuses() == [STARTING, DOWNLOADING, COMPLETE, REBOOTING]
    ota = [event for event in world.events if event.base == "RMAKER_OTA_EVENT"]
    assert [(event.id, event.data) for event in ota] == [
        (1, None),
        *((2, text) for _, text in (STARTING, DOWNLOADING, COMPLETE, REBOOTING)),
    ]
    assert Event("RMAKER_COMMON_EVENT", 0, 10) in world.events
    world.advance(9.9)
    assert world.restart_reasons == []
    world.advance(0.2)
    assert len(world.restart_reasons) == 1
    assert world.chip.closed == 1

    world.boot()
    assert world.chip.running == "ota_1"
    world.connect()
    assert world.statuses() == [SUCCESS]
    assert world.chip.states["ota_1"] == BootState.VALID
    world.advance(6)
    assert world.published(OTAFETCH) == [{"node_id": "N1", "fw_version": "2.0.0"}]
    assert "ota_update" not in world.store.items()


def test_making_a_node_is_the_power_on_and_nothing_else_is(world: World) -> None:
    updated(world)
    assert world.chip.restarts == 2  # one for each node
    world.connect()
    world.advance(1000)
    world.stop()
    assert world.chip.restarts == 2


def test_a_crash_before_the_confirmation_is_a_restart_and_rolls_back(world: World) -> None:
    updated(world)
    assert world.chip.states["ota_1"] == BootState.PENDING_VERIFY
    world.boot()  # a service manager starts the process again
    assert world.chip.running == "ota_0"
    world.connect()
    assert world.statuses() == [ROLLED_BACK]


def test_no_connection_in_time_rolls_back(world: World) -> None:
    updated(world)
    world.advance(89)
    assert len(world.restart_reasons) == 1
    world.advance(2)
    assert len(world.restart_reasons) == 2
    world.boot()
    world.connect()
    assert world.statuses() == [ROLLED_BACK]


def test_a_target_that_boots_nothing_is_an_error_that_says_why(world: World) -> None:
    world.chip.states["ota_0"] = BootState.INVALID
    with pytest.raises(NotBootableError, match="fake:chip: nothing boots: None boots"):
        world.power_on()
    assert world.chip.closed == 1


# -- refusals and failures


def test_a_refused_image_writes_nothing_and_ends_the_job(world: World) -> None:
    world.scripts.append(good(project="other"))
    world.boot()
    world.connect()
    world.deliver_job()
    assert world.statuses() == [STARTING, ("rejected", "Project Name mismatch")]
    assert not world.installations[0].wrote
    world.scripts.append(good())
    world.deliver_job("J2")
    assert world.statuses()[-1] == REBOOTING


CASES: dict[str, tuple[Exception, bool, str]] = {
    "connect": (
        DownloadError("refused", status="ERR_HTTP_CONNECT", esp_err=0x7002, stage="source", device_code=111),
        False,
        "OTA Begin failed: ESP_ERR_HTTP_CONNECT (errno=111: Connection refused)",
    ),
    "http status": (
        DownloadError("404", status="ERR_HTTP_STATUS", esp_err=-1, stage="source", device_code=404),
        False,
        "OTA Begin failed: ESP_FAIL (errno=0: Invalid)",
    ),
    "closed midway": (
        DownloadError("closed", status="ERR_HTTP_CLOSED", esp_err=-1, stage="source", device_code=104),
        True,
        "OTA failed: ESP_FAIL (errno=104: Connection reset by peer)",
    ),
    "descriptor": (
        OtaError("no descriptor", status="ERR_IMAGE_DESCRIPTOR", esp_err=-1, stage="header"),
        False,
        "Failed to read image description: ESP_FAIL (errno=0: Invalid)",
    ),
    "digest": (
        OtaError("md5", status="ERR_MD5", esp_err=0x1503, stage="verify"),
        True,
        "Image validation failed",
    ),
    "incomplete": (
        OtaError("short", status="ERR_INCOMPLETE", esp_err=-1, stage="source"),
        True,
        "Complete data was not received",
    ),
    "disk": (
        DeviceError("full", status="ERR_NO_SPACE", esp_err=0x104, stage="sink", device_code=28),
        True,
        "OTA failed: ESP_ERR_INVALID_SIZE (errno=28: No space left on device)",
    ),
    "commit": (
        DeviceError("boot entry", status="ERR_SYSTEM", esp_err=-1, stage="commit", device_code=5),
        True,
        "OTA finish failed: ESP_FAIL (errno=5: Input/output error)",
    ),
    "a fault of ours": (
        ZeroDivisionError("in the installer"),
        True,
        "OTA failed: ESP_FAIL (errno=0: Invalid)",
    ),
}


@pytest.mark.parametrize(("error", "after_header", "text"), CASES.values(), ids=CASES.keys())
def test_a_failure_is_reported_in_the_words_of_the_specification(
    world: World, error: Exception, after_header: bool, text: str
) -> None:
    world.scripts += [fails(error, after_header=after_header)] * 3
    world.boot()
    world.connect()
    world.advance(6)
    world.deliver_job()
    failed = [info for status, info in world.statuses() if status == "failed"]
    assert failed == [f"OTA Attempt {number}/3 failed: {text}" for number in (1, 2, 3)]
    world.advance(299)
    assert len(world.published(OTAFETCH)) == 1
    world.advance(2)
    assert len(world.published(OTAFETCH)) == 2


def test_another_chip_is_a_rejection(world: World) -> None:
    world.scripts.append(fails(RejectedError("chip", status="ERR_IMAGE_CHIP", stage="verify"), after_header=True))
    world.boot()
    world.connect()
    world.deliver_job()
    assert world.statuses() == [STARTING, DOWNLOADING, ("rejected", "Chip revision mismatch")]


# -- resume


def interrupted(run: FakeInstallation) -> None:
    run.header()
    run.keep(8192)
    run.keep(16384)
    run.world.reached.set()  # type: ignore[attr-defined]
    run.wait_for_cancel()


def test_stopping_in_a_download_keeps_the_position_and_reports_nothing(world: World) -> None:
    world.reached = threading.Event()  # type: ignore[attr-defined]
    world.scripts.append(interrupted)
    node = world.boot()
    world.connect()
    assert world.transport.deliver(OTAURL, json.dumps({"ota_job_id": "J1", "url": "https://x/y", "file_md5": "0" * 32}))
    assert world.reached.wait(WAIT_S)  # type: ignore[attr-defined]
    world.wait_sent(OTASTATUS, "Downloading")
    node.stop()
    assert world.statuses() == [STARTING, DOWNLOADING]
    kept = world.store.items()
    assert kept["ota_written"] in (0, 8192, 16384)  # the end may come before the node heard of the last ones
    if kept["ota_written"]:
        position = json.loads(str(kept["ota_position"]))
        assert position["offset"] == kept["ota_written"]
        assert position["sha256"] == f"{position['offset'] % 251:02x}" * 32


def test_a_kept_position_is_gone_on_from_with_its_digest(world: World) -> None:
    def first(run: FakeInstallation) -> None:
        run.header()
        run.keep(16384)
        raise DownloadError("closed", status="ERR_HTTP_CLOSED", stage="source")

    def second(run: FakeInstallation) -> None:
        assert run.resume is not None
        assert (run.resume.offset, run.resume.entity_tag) == (16384, '"v1"')
        assert run.resume.sha256 == bytes([16384 % 251]) * 32
        run.header(offset=16384)
        run.finish()

    world.scripts += [first, second]
    world.boot()
    world.connect()
    world.deliver_job(file_md5="0" * 32)
    assert world.statuses()[-1][1] == "Rebooting into new firmware (after 2 HTTPS attempts)"
    assert {"ota_written", "ota_file_md5", "ota_position"}.isdisjoint(world.store.items())


@pytest.mark.parametrize("spoiled", [None, "{}", "nonsense", b"\xff", '{"offset":16384}'])
def test_a_position_that_cannot_be_trusted_is_not_gone_on_from(world: World, spoiled: str | bytes | None) -> None:
    world.reached = threading.Event()  # type: ignore[attr-defined]
    world.scripts += [interrupted, good()]
    world.boot()
    world.connect()
    job = {"ota_job_id": "J1", "url": "https://x/y", "file_md5": "0" * 32}
    assert world.transport.deliver(OTAURL, json.dumps(job))
    assert world.reached.wait(WAIT_S)  # type: ignore[attr-defined]
    world.stop()
    world.store.update({"ota_position": spoiled})
    world.boot()
    world.connect()
    world.deliver(job)
    assert world.installations[1].resume is None
    assert world.statuses()[-1] == REBOOTING


# -- state


def test_a_final_report_is_kept_until_it_is_acknowledged(world: World) -> None:
    world.acknowledge = False
    updated(world)
    world.connect()
    assert world.statuses() == [SUCCESS]
    world.boot()  # the node goes down before the acknowledgement
    world.connect()
    assert world.statuses() == [SUCCESS]
    sent = world.wait_sent(OTASTATUS, "success")
    world.transport.acknowledge(sent.message_id)
    world.settle()
    world.boot()
    world.connect()
    assert world.statuses() == []


def test_a_report_made_while_offline_goes_out_once_when_connected(world: World) -> None:
    def goes_offline(run: FakeInstallation) -> None:
        run.header("1.0.0")

    world.acknowledge = False
    world.scripts.append(goes_offline)
    world.boot()
    world.connect()
    world.transport.go_offline()
    world.transport._listener.message(OTAURL, b'{"ota_job_id":"J1","url":"https://x/y"}')  # type: ignore[union-attr]
    world.settle()
    assert world.statuses() == []
    world.transport.acknowledge_all = True
    world.connect()
    world.advance(1000)
    assert world.statuses() == [STARTING, ("rejected", "Same version received")]


def test_a_state_that_cannot_be_written_does_not_stop_updates(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.store.failure = StateFileError("state file x: database or disk is full")
    world.deliver_job()
    assert world.statuses()[-1] == REBOOTING
    assert "state is not kept: state file x: database or disk is full" in caplog.text
    world.store.failure = None


def test_a_second_node_on_the_same_state_is_refused_before_it_touches_the_target(world: World, tmp_path: Path) -> None:
    def make(chip: FakeChip) -> Node:
        return Node(world.config(), target=chip, state=tmp_path / "state.db", transport=MemoryTransport())

    chip = FakeChip()
    with make(FakeChip()), pytest.raises(StateFileError, match="another node uses it"):
        make(chip)
    assert chip.restarts == 0
    make(chip).stop()
    assert chip.restarts == 1


# -- callbacks


def test_a_callback_runs_on_the_worker_with_the_whole_job(world: World) -> None:
    seen: list[tuple[str, OtaData]] = []

    def callback(handle: OtaHandle, data: OtaData) -> int:
        seen.append((threading.current_thread().name, data))
        handle.report_status(OtaStatus.IN_PROGRESS, "checking battery")
        handle.report_status(OtaStatus.SUCCESS)
        return 0

    world.boot(OtaConfig(callback, None, "PEM", priv={"mine": 1}))
    world.connect()
    world.deliver_job(file_md5="aa", fw_version="2.0.0", stream_id="S", metadata={"a": [1, 2]})
    assert world.statuses() == [("in-progress", "checking battery"), ("success", "")]
    ((name, data),) = seen
    assert name == "rmaker-worker"
    assert data == OtaData(
        url="https://fw.example.com/image.bin",
        stream_id="S",
        filesize=65536,
        fw_version="2.0.0",
        file_md5="aa",
        ota_job_id="J1",
        server_cert="PEM",
        priv={"mine": 1},
        metadata='{"a": [1, 2]}',
    )


def test_the_certificate_of_the_configuration_is_used_where_none_is_given(world: World, tmp_path: Path) -> None:
    seen: list[str | None] = []
    (tmp_path / "ca.pem").write_text("PEM of the file")
    world.ota = {"server_cert": tmp_path / "ca.pem", "use_cert_bundle": False}
    for given, expected in ((None, "PEM of the file"), ("PEM given", "PEM given")):
        world.boot(OtaConfig(lambda _, data: seen.append(data.server_cert), server_cert=given))
        world.connect()
        world.deliver_job()
        assert seen.pop() == expected
    (tmp_path / "ca.pem").unlink()
    node = world.power_on()
    with pytest.raises(ConfigError, match="server_cert"):
        node.enable(None, OtaType.USING_TOPICS)
    assert esp_rmaker_ota_enable_default() == EspErr.INVALID_ARG


def test_a_callback_can_hand_the_job_to_the_built_in_handler(world: World) -> None:
    results: list[int] = []

    def callback(handle: OtaHandle, data: OtaData) -> None:
        results.append(handle._node.default_callback(handle, data))

    world.scripts += [good(), good(project="other")]
    world.boot(OtaConfig(callback))
    world.connect()
    world.deliver_job()
    assert world.statuses() == [STARTING, DOWNLOADING, COMPLETE, REBOOTING]
    assert results == [EspErr.OK]


class Boom(Exception):
    pass


def test_what_a_callback_raises_is_logged_reported_and_kills_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(handle: OtaHandle, data: OtaData) -> int:
        raise Boom("no battery")

    world.boot(OtaConfig(callback))
    world.connect()
    for job in ("J1", "J2"):
        world.deliver_job(job)
    assert world.statuses() == [("failed", "OTA callback failed: Boom: no battery")] * 2
    assert "Traceback" in caplog.text
    assert "test_node.py" in caplog.text


def test_events_reach_all_who_subscribed_until_they_unsubscribe(world: World, caplog: pytest.LogCaptureFixture) -> None:
    node = world.boot()
    seen: list[str] = []
    threads: set[str] = set()

    def bad(event: Event) -> None:
        raise Boom

    def fine(event: Event) -> None:
        threads.add(threading.current_thread().name)
        seen.append(event.name)

    node.events.subscribe(bad)
    with node.events.subscribe(fine, "RMAKER_COMMON_EVENT"):
        world.connect()
        assert seen[0] == "RMAKER_COMMON_EVENT_MQTT_CONNECTED"
        assert {name.rpartition("_EVENT_")[0] for name in seen} == {"RMAKER_COMMON"}
    count = len(seen)
    world.disconnect()
    assert len(seen) == count
    assert threads == {"rmaker-events"}
    assert "Boom" in caplog.text


def test_an_event_callback_may_call_the_api(world: World) -> None:
    results: list[int] = []

    def callback(event: Event) -> None:
        if event.name == "RMAKER_EVENT_STARTED":
            results.append(world.node.fetch())  # type: ignore[union-attr]

    node = world.power_on()
    node.events.subscribe(callback)
    node.enable(None, OtaType.USING_TOPICS)
    node.start()
    world.connect()
    assert results == [EspErr.OK]
    assert len(world.published(OTAFETCH)) == 1


# -- diagnostics


def test_diagnostics_are_asked_twice_on_the_worker(world: World) -> None:
    seen: list[tuple[OtaDiagPriv, object, str]] = []

    def diagnose(facts: OtaDiagPriv, priv: object) -> DiagStatus:
        seen.append((facts, priv, threading.current_thread().name))
        return DiagStatus.SUCCESS

    updated(world, OtaConfig(None, diagnose, priv=7))
    assert seen == [(OtaDiagPriv(DiagState.INIT, True), 7, "rmaker-worker")]
    world.connect()
    assert seen[1:] == [(OtaDiagPriv(DiagState.POST_MQTT, True), 7, "rmaker-worker")]
    assert world.statuses() == [SUCCESS]


def _raises(*_: object) -> int:
    raise Boom


@pytest.mark.parametrize(
    "answer",
    [lambda *_: DiagStatus.FAIL, lambda *_: 0, _raises, lambda *_: None, lambda *_: True, lambda *_: 17],
    ids=["fail", "zero", "exception", "nothing", "true", "unknown number"],
)
def test_diagnostics_that_do_not_say_yes_roll_back(world: World, answer: Callable[..., int]) -> None:
    updated(world)
    world.chip.states["ota_1"] = BootState.NEW  # boot it once more, now with diagnostics
    world.boot(OtaConfig(None, answer))
    assert len(world.restart_reasons) == 2
    assert world.chip.states["ota_1"] == BootState.INVALID
    world.boot()
    world.connect()
    assert world.statuses() == [ROLLED_BACK]


def test_a_verdict_may_come_later_from_the_application(world: World) -> None:
    updated(world, OtaConfig(None, lambda *_: DiagStatus.PENDING))
    world.connect()
    assert world.statuses() == []
    node = world.node
    assert node is not None
    assert node.mark_valid() == EspErr.OK
    world.settle()
    assert world.statuses() == [SUCCESS]
    assert node.mark_valid() == EspErr.INVALID_STATE


def test_enabling_inside_the_first_diagnostics_is_refused_and_does_not_wait_for_itself(world: World) -> None:
    answers: list[int] = []

    def diag(about: OtaDiagPriv, priv: object) -> int:
        answers.extend(node.enable(None, each) for each in (OtaType.USING_TOPICS, 3))
        return DiagStatus.SUCCESS

    world.chip.states["ota_0"] = BootState.NEW
    node = world.power_on()
    assert node.enable(OtaConfig(ota_diag=diag), OtaType.USING_TOPICS) == EspErr.OK
    assert answers == [EspErr.FAIL, EspErr.INVALID_ARG]


def test_the_application_may_confirm_inside_the_first_diagnostics(world: World) -> None:
    results: list[int] = []

    def diagnose(facts: OtaDiagPriv, priv: object) -> DiagStatus:
        from rmaker_ota.rainmaker.node import default_node

        node = default_node()
        assert node is not None
        results.append(node.mark_valid())
        return DiagStatus.SUCCESS

    updated(world, OtaConfig(None, diagnose))
    assert results == [EspErr.OK]
    assert world.chip.states["ota_1"] == BootState.VALID


def test_a_boot_layer_that_refuses_is_said_and_not_called_a_success(world: World) -> None:
    updated(world)
    world.chip.mark_valid_error = DeviceError("flash", esp_err=-1, device_code=5)
    world.connect()
    assert world.statuses() == []
    world.chip.mark_valid_error = RuntimeError("a fault of ours")
    assert world.node is not None
    assert world.node.mark_valid() == EspErr.FAIL


# -- hostile messages


HOSTILE = [
    b"",
    b"\x00",
    b"\xff\xfe\xfd",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"{}",
    b'{"ota_job_id":null,"url":1}',
    b'{"ota_job_id":"J","url":null}',
    b'{"ota_job_id":{"a":1},"url":"https://x"}',
    b'{"ota_job_id":"\\ud800","url":"https://x"}',
    b'{"ota_job_id":"' + b"x" * 100_000 + b'","url":"ftp://x"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"ota_job_id":"J","url":"https://x","file_size":' + b"9" * 10_000 + b"}",
    b'{"ota_job_id":"J","url":"https://x","file_size":1e999}',
    b'{"ota_job_id":"J","url":"https://x","metadata":{"validity":{"start":NaN}}}',
    b'{"ota_job_id":"J","url":"https://x","metadata":{"validity":{"start":99999999999999999999,"end":-1}}}',
    b'{"ota_job_id":"J","url":"https://x","metadata":{"download_window":{"start":-5,"end":1e9}}}',
    b"x" * (1 << 20),
    b'{"ota_job_id":"J","url":"https://' + b"y" * (1 << 20) + b'"}',
]


@pytest.mark.parametrize("payload", HOSTILE, ids=lambda payload: f"{payload[:24]!r}...{len(payload)}")
def test_a_hostile_message_leaves_the_node_as_it_was(
    world: World, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    world.scripts += [fails(DownloadError("no", stage="source"))] * 3
    world.boot()
    world.connect()
    world.deliver(payload)
    world.advance(1)
    assert "Traceback" not in caplog.text
    for report in world.published(OTASTATUS):
        assert set(report) == {"ota_job_id", "status", "additional_info", "ts"}
    world.scripts[:] = [good()]
    world.deliver_job("J9")
    assert world.statuses()[-1] == REBOOTING


def test_a_flood_of_messages_is_not_kept_in_memory(world: World, caplog: pytest.LogCaptureFixture) -> None:
    node = world.boot()
    world.connect()
    gate = threading.Event()
    node._loop.post(gate)  # an item the node does not know, and whose handling waits
    handle = node._workflow.handle
    node._workflow.handle = lambda event, now: gate.wait(WAIT_S) and handle(event, now)  # type: ignore[method-assign, assignment, return-value]
    for _ in range(node_module.MAX_MESSAGES_WAITING * 3):
        world.transport.deliver(OTAURL, b"junk")
    assert len(node._loop._inbox) <= node_module.MAX_MESSAGES_WAITING + 1
    gate.set()
    world.settle()
    assert caplog.text.count("messages come faster") == 1
    world.scripts.append(good())
    world.deliver_job()
    assert world.statuses()[-1] == REBOOTING


def test_a_duplicate_of_the_job_at_hand_is_passed_over(world: World) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(run: FakeInstallation) -> None:
        run.header()
        started.set()
        assert go_on.wait(WAIT_S)
        run.finish()

    world.scripts.append(slow)
    world.boot()
    world.connect()
    payload = json.dumps({"ota_job_id": "J1", "url": "https://x/y"})
    assert world.transport.deliver(OTAURL, payload)
    assert started.wait(WAIT_S)
    assert world.transport.deliver(OTAURL, payload)
    go_on.set()
    world.settle()
    assert world.statuses() == [STARTING, DOWNLOADING, COMPLETE, REBOOTING]
    assert len(world.installations) == 1


# -- the end


def test_calls_after_the_end_fail_at_once(world: World) -> None:
    node = world.boot()
    node.stop()
    node.stop()
    assert node.fetch() == EspErr.FAIL
    assert node.enable(None, OtaType.USING_TOPICS) == EspErr.FAIL
    node.start()
    assert node.run() == Outcome.STOPPED


def test_a_node_starts_once(world: World) -> None:
    node = world.boot()
    with pytest.raises(StateError, match="starts once"):
        node.start()


def test_a_call_that_waits_is_answered_when_the_node_stops(world: World) -> None:
    results: list[int] = []
    inside = threading.Event()

    def callback(handle: OtaHandle, data: OtaData) -> None:
        results.append(handle._node.default_callback(handle, data))

    def endless(run: FakeInstallation) -> None:
        inside.set()
        run.wait_for_cancel()

    world.scripts.append(endless)
    node = world.boot(OtaConfig(callback))
    world.connect()
    assert world.transport.deliver(OTAURL, b'{"ota_job_id":"J1","url":"https://x/y"}')
    assert inside.wait(WAIT_S)
    node.stop()
    assert results == [EspErr.FAIL]


def test_a_callback_may_stop_the_node(world: World) -> None:
    def callback(handle: OtaHandle, data: OtaData) -> None:
        handle._node.stop()

    node = world.boot(OtaConfig(callback))
    world.connect()
    assert world.transport.deliver(OTAURL, b'{"ota_job_id":"J1","url":"https://x/y"}')
    assert node.run() == Outcome.STOPPED


def test_a_callback_that_never_ends_does_not_keep_the_node(world: World, caplog: pytest.LogCaptureFixture) -> None:
    never, inside = threading.Event(), threading.Event()

    def callback(handle: OtaHandle, data: OtaData) -> None:
        inside.set()
        never.wait(WAIT_S)

    node = world.boot(OtaConfig(callback))
    world.connect()
    assert world.transport.deliver(OTAURL, b'{"ota_job_id":"J1","url":"https://x/y"}')
    assert inside.wait(WAIT_S)
    node.stop(0.05)
    never.set()
    assert "a callback is not over" in caplog.text


def test_a_fault_in_the_rules_is_logged_and_the_node_goes_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    node = world.boot()
    world.connect()
    handle = node._workflow.handle

    def faulty(event: object, now: object) -> list[object]:
        node._workflow.handle = handle  # type: ignore[method-assign]
        raise Boom

    node._workflow.handle = faulty  # type: ignore[method-assign, assignment]
    world.deliver_job()
    assert "Boom" in caplog.text
    world.scripts.append(good())
    world.deliver_job()
    assert world.statuses()[-1] == REBOOTING


def test_the_restart_command_is_repeated_until_it_works(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "COMMAND_RETRY_S", 0.01)
    tries = tmp_path / "tries"
    script = f'echo x >> {tries}; [ "$(wc -l < {tries})" -ge 3 ]'
    config = dataclasses.replace(world.config(), restart=RestartSection("command", ("sh", "-c", script)))
    monkeypatch.setattr(world, "config", lambda: config)
    node = world.power_on()
    node._restarter = None
    updated_node(world, node)
    assert node.run() == Outcome.RESTART
    assert tries.read_text() == "x\n" * 3


def test_a_restart_somebody_else_does_ends_the_node(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(world.config(), restart=RestartSection("none"))
    monkeypatch.setattr(world, "config", lambda: config)
    node = world.power_on()
    node._restarter = None
    updated_node(world, node)
    assert node.run() == Outcome.RESTART
    assert not node.is_connected


def updated_node(world: World, node: Node) -> None:
    """Runs an update up to the restart on a node made by hand."""
    world.scripts.append(good())
    assert node.enable(None, OtaType.USING_TOPICS) == EspErr.OK
    node.start()
    world.connect()
    world.deliver_job()
    world.advance(10)


def test_progress_can_be_watched(world: World) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(run: FakeInstallation) -> None:
        run.header()
        inside.set()
        assert go_on.wait(WAIT_S)
        run.finish()

    node = world.boot()
    assert node.progress() is None
    world.scripts.append(slow)
    world.connect()
    assert world.transport.deliver(OTAURL, b'{"ota_job_id":"J1","url":"https://x/y"}')
    assert inside.wait(WAIT_S)
    progress = node.progress()
    assert progress is not None
    assert progress.bytes_read == 1000
    go_on.set()


def test_progress_is_reported_when_asked_for(world: World) -> None:
    def steps(run: FakeInstallation) -> None:
        run.header()
        for count in (1000, 7000, 30000, 65536):
            run.progress_to(count)
        run.finish()

    world.ota = {"ota_progress_support": True, "ota_progress_interval_pct": 25}
    world.scripts.append(steps)
    world.boot()
    world.connect()
    world.deliver_job()
    texts = [text for _, text in world.statuses() if text.startswith("Downloaded")]
    assert texts == ["Downloaded 25% Firmware Image", "Downloaded 50% Firmware Image", "Downloaded 75% Firmware Image"]


def test_a_target_without_descriptor_needs_a_version(world: World) -> None:
    world.chip.apps.clear()
    with pytest.raises(ConfigError, match=r"\[node\] project: missing, expected a text: fake:chip has no app"):
        world.power_on()


def test_secrets_of_a_url_are_not_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.deliver_job(url="https://x/y?X-Amz-Signature=SECRET")
    assert "SECRET" not in caplog.text


# -- a cut anywhere


class CutWorld(World):
    """A world whose power goes before the n-th thing a node does: a state written, a message, a boot choice..."""

    def __init__(self, cut_at: int) -> None:
        super().__init__()
        self.left = cut_at
        self.was_cut = False

    def power_on(self) -> Node:
        node = super().power_on()
        perform, update = node._perform, node._update_store

        def cut() -> bool:
            self.left -= 1
            if self.left == 0:
                self.was_cut = node._is_down = True
                if node._attempt is not None:  # which would wait for a node that says nothing any more
                    node._attempt.cancel(0.0)
            return node._is_down

        node._perform = lambda action: None if cut() else perform(action)  # type: ignore[method-assign]
        node._update_store = lambda changes: None if cut() else update(changes)  # type: ignore[method-assign]
        return node


def live(world: CutWorld, diagnose: OtaConfig | None) -> list[tuple[str, str]]:
    """Boots again and again until nothing more happens; the cloud offers the job until it is over. Returns reports."""
    reports: list[tuple[str, str]] = []
    for _ in range(10):
        world.scripts = [good()]
        restarts = len(world.restart_reasons)
        was_cut = world.was_cut
        node = world.power_on()
        # A node whose power is gone answers no call any more.
        caller = threading.Thread(target=node.enable, args=(diagnose, OtaType.USING_TOPICS))
        caller.start()
        world.settle()
        if not node._is_down:
            caller.join(WAIT_S)
            node.start()
            world.connect()
            over = any(status in ("success", "rejected") for status, _ in reports + world.statuses())
            if not over and not node._is_down and node.boot.version == "1.0.0":
                world.transport.deliver(OTAURL, json.dumps({"ota_job_id": "J1", "url": "https://x/y"}))
            world.advance(400)
        reports += world.statuses()
        node.stop()
        caller.join(WAIT_S)
        assert not caller.is_alive()
        if len(world.restart_reasons) == restarts and world.was_cut == was_cut:
            return reports
    raise AssertionError(f"it does not come to rest: {reports}")


@pytest.mark.parametrize("works", [True, False], ids=["good image", "bad image"])
def test_the_final_report_is_true_wherever_the_power_goes(works: bool) -> None:
    diagnose = OtaConfig(None, lambda *_: DiagStatus.SUCCESS if works else DiagStatus.FAIL)
    cut_at = 0
    while True:
        cut_at += 1
        world = CutWorld(cut_at)
        reports = live(world, diagnose)
        final = [status for status, _ in reports if status not in ("in-progress", "failed")]
        assert final, f"cut at {cut_at}: {reports}"
        running = world.chip.apps[world.chip.running or ""].version
        state = world.chip.states[world.chip.running or ""]
        story = f"cut at {cut_at}: runs {running}, reports {reports}"
        assert set(final) == {"success"} if running == "2.0.0" else set(final) == {"rejected"}, story
        assert state == BootState.VALID, story
        assert works or running == "1.0.0", story
        assert "ota_update" not in world.store.items(), story
        assert "ota_result" not in world.store.items(), story
        if not world.was_cut:
            break
    assert cut_at > 20
