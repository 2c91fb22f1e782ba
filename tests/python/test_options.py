"""What each option does: a table from every option of the specification (section 7) and of this project to the tests
that show its effect, and those of them that need no broker. The others are named by file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import pytest
import trustme

from rmaker_ota.config import MqttSection, NodeConfig, NodeSection, OtaSection, TargetSection, parse_config
from rmaker_ota.errors import DownloadError, OtaError
from rmaker_ota.esp_build import build_image
from rmaker_ota.rainmaker import workflow
from rmaker_ota.rainmaker.application import OtaConfig
from rmaker_ota.rainmaker.connection import make_transport, publish_budget
from rmaker_ota.rainmaker.loop import VirtualClock
from rmaker_ota.rainmaker.node import Node, ota_types_of
from rmaker_ota.rainmaker.params import Param, Service
from rmaker_ota.rainmaker.store import MemoryStore, Value
from rmaker_ota.rainmaker.transport import MAX_OUTBOX, MemoryTransport, PublishRefused
from rmaker_ota.rainmaker.transport_paho import PahoTransport
from rmaker_ota.rainmaker.types import OTA_EVENT_BASE, OtaEvent, OtaType
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import BootState
from rmaker_ota.targets.create import create_flash_image
from tests.python.test_stream_attempt import World as StreamWorld
from tests.python.test_transport import Heard, RawBroker
from tests.sim import https_server as sim
from tests.sim.https_server import HttpsServer
from tests.sim.node_world import CONFIG, OTAFETCH, OTASTATUS, OTAURL, FakeChip, World, fails, good

T = TypeVar("T", bound=Callable[..., None])

# Specification, section 7: name in the firmware (behind CONFIG_ESP_RMAKER_; of BOOTLOADER_... behind CONFIG_) -> here.
SPECIFICATION = {
    "OTA_AUTOFETCH": "ota_autofetch",
    "OTA_AUTOFETCH_PERIOD": "ota_autofetch_period_hours",
    "SKIP_COMMON_NAME_CHECK": "ota_skip_common_name_check",
    "SKIP_VERSION_CHECK": "ota_skip_version_check",
    "SKIP_SECURE_VERSION_CHECK": "ota_skip_secure_version_check",
    "SKIP_PROJECT_NAME_CHECK": "ota_skip_project_name_check",
    "OTA_ROLLBACK_WAIT_PERIOD": "ota_rollback_wait_period_s",
    "OTA_ROLLBACK_REPORT_FAILED": "ota_rollback_report_failed",
    "OTA_TEST_ROLLBACK": "ota_test_rollback",
    "OTA_TEST_ROLLBACK_COUNT": "ota_test_rollback_count",
    "OTA_DISABLE_AUTO_REBOOT": "ota_disable_auto_reboot",
    "OTA_TIME_SUPPORT": "ota_time_support",
    "OTA_PROGRESS_SUPPORT": "ota_progress_support",
    "OTA_PROGRESS_INTERVAL": "ota_progress_interval_pct",
    "OTA_MAX_RETRIES": "ota_max_retries",
    "OTA_RETRY_DELAY_MINUTES": "ota_retry_delay_minutes",
    "HTTP_OTA_RESUMPTION": "http_ota_resumption",
    "OTA_USE_HTTPS": "ota_transport",
    "OTA_USE_MQTT": "ota_transport",
    "OTA_HTTP_RX_BUFFER_SIZE": "http_rx_buffer_size",
    "MQTT_OTA_BLOCK_SIZE": "mqtt_ota_block_size",
    "MQTT_OTA_NO_OF_BLOCKS": "mqtt_ota_blocks_per_request",
    "MQTT_OTA_MAX_RETRIES": "mqtt_ota_max_retries",
    "MQTT_OTA_BLOCK_WAIT_SEC": "mqtt_ota_block_wait_s",
    "USE_CERT_BUNDLE": "use_cert_bundle",
    "BOOTLOADER_APP_ROLLBACK_ENABLE": "rollback_enable",
    "MQTT_USE_BASIC_INGEST_TOPICS": "mqtt_use_basic_ingest",
    "MQTT_ENABLE_BUDGETING": "mqtt_budgeting",
    "MQTT_DEFAULT_BUDGET": "mqtt_default_budget",
    "MQTT_MAX_BUDGET": "mqtt_max_budget",
    "MQTT_BUDGET_REVIVE_PERIOD": "mqtt_budget_revive_period_s",
    "MQTT_BUDGET_REVIVE_COUNT": "mqtt_budget_revive_count",
    "MAX_PARAM_DATA_SIZE": "max_param_data_size",
    "MQTT_HOST": "mqtt_host",
    "READ_MQTT_HOST_FROM_CONFIG": "mqtt_host_from_config",
    "READ_NODE_ID_FROM_CERT_CN": "node_id_from_cert_cn",
    "MQTT_PORT": "mqtt_port",
    "MQTT_PERSISTENT_SESSION": "mqtt_persistent_session",
    "MQTT_KEEP_ALIVE_INTERVAL": "mqtt_keepalive_s",
    "MAX_MQTT_SUBSCRIPTIONS": "max_mqtt_subscriptions",
    "MQTT_SEND_USERNAME": "mqtt_send_username",
    "MQTT_PRODUCT_NAME": "mqtt_product_name",
    "MQTT_PRODUCT_VERSION": "mqtt_product_version",
    "MQTT_PRODUCT_SKU": "mqtt_product_sku",
    "DEF_TIMEZONE": "timezone",
    "SNTP_SERVER_NAME": "sntp_server",
    "CONNECTIVITY_REPORT_DELAY": "connectivity_report_delay_s",
    "FACTORY_PARTITION_NAME": "factory_partition",
    "FACTORY_NAMESPACE": "factory_namespace",
}

RULES = "rainmaker/workflow.py"
ATTEMPT = "rainmaker/attempt.py"
STREAM = "rainmaker/stream_attempt.py"
CONNECTION = "rainmaker/connection.py"
NODE = "rainmaker/node.py"
CONFIGURATION = "config.py"

# Option -> file that acts on it.
WHERE = {
    "ota_autofetch": RULES,
    "ota_autofetch_period_hours": RULES,
    "ota_skip_common_name_check": RULES,
    "ota_skip_version_check": RULES,
    "ota_skip_secure_version_check": RULES,
    "ota_skip_project_name_check": RULES,
    "ota_rollback_wait_period_s": RULES,
    "ota_rollback_report_failed": RULES,
    "ota_test_rollback": RULES,
    "ota_test_rollback_count": RULES,
    "ota_disable_auto_reboot": RULES,
    "ota_time_support": RULES,
    "ota_progress_support": RULES,
    "ota_progress_interval_pct": RULES,
    "ota_max_retries": RULES,
    "ota_retry_delay_minutes": RULES,
    "http_ota_resumption": RULES,
    "use_cert_bundle": RULES,
    "rollback_enable": RULES,
    "allow_http": RULES,
    "fetch_after_reconnect": RULES,
    "report_attempt_failures": RULES,
    "strict": RULES,
    "mqtt_use_basic_ingest": RULES,
    "ota_transport": RULES,
    "mqtt_ota_block_size": STREAM,
    "mqtt_ota_blocks_per_request": STREAM,
    "mqtt_ota_max_retries": STREAM,
    "mqtt_ota_block_wait_s": STREAM,
    "mqtt_ota_window": STREAM,
    "mqtt_ota_flavour": STREAM,
    "http_rx_buffer_size": ATTEMPT,
    "http_connect_timeout_s": ATTEMPT,
    "http_stall_timeout_s": ATTEMPT,
    "http_deadline_s": ATTEMPT,
    "http_max_bytes_per_s": ATTEMPT,
    "http_proxy": ATTEMPT,
    "ota_checkpoint_kib": ATTEMPT,
    "ota_checkpoint_s": ATTEMPT,
    "ota_read_back": ATTEMPT,
    "mqtt_budgeting": CONNECTION,
    "mqtt_default_budget": CONNECTION,
    "mqtt_max_budget": CONNECTION,
    "mqtt_budget_revive_period_s": CONNECTION,
    "mqtt_budget_revive_count": CONNECTION,
    "max_mqtt_subscriptions": CONNECTION,
    "mqtt_send_username": CONNECTION,
    "mqtt_product_name": CONNECTION,
    "mqtt_product_version": CONNECTION,
    "mqtt_product_sku": CONNECTION,
    "factory_partition": CONNECTION,
    "factory_namespace": CONNECTION,
    "timezone": NODE,
    "type": NODE,
    "server_cert": NODE,
    "connectivity_report_delay_s": NODE,
    "mqtt_host": CONFIGURATION,
    "mqtt_host_from_config": CONFIGURATION,
    "node_id_from_cert_cn": CONFIGURATION,
    "mqtt_port": CONFIGURATION,
    "mqtt_persistent_session": CONFIGURATION,
    "mqtt_keepalive_s": CONFIGURATION,
    "max_param_data_size": CONFIGURATION,
    "sntp_server": CONFIGURATION,
}

# Option -> tests that show its effect, as module::function. Those of this file are added by `shows`.
EFFECTS: dict[str, list[str]] = {
    "http_rx_buffer_size": ["tests/csrc/test_source_http.c::no_more_is_taken_at_once_than_the_receive_buffer_holds"],
    "http_max_bytes_per_s": ["tests.core.test_source_http::test_the_bandwidth_limit_is_never_exceeded"],
    "ota_read_back": ["tests/csrc/test_pipeline.c::read_back_finds_a_slot_that_forgets"],
    "mqtt_persistent_session": ["tests.flows.test_options::test_a_job_pushed_while_the_node_was_away_arrives"],
    "node_id_from_cert_cn": ["tests.flows.test_options::test_the_certificate_names_the_node"],
    "mqtt_use_basic_ingest": [
        "tests.flows.test_options::test_without_basic_ingest_the_cloud_is_reached_by_plain_topics"
    ],
    "mqtt_ota_flavour": ["tests.python.test_stream_attempt::test_an_image_arrives_in_the_slot_and_boots"],
    "factory_partition": ["tests.python.test_credentials::test_other_names_and_other_sources_of_id_and_host"],
    "factory_namespace": ["tests.python.test_credentials::test_other_names_and_other_sources_of_id_and_host"],
}


def shows(*options: str) -> Callable[[T], T]:
    """Enters a test into `EFFECTS`."""

    def enter(test: T) -> T:
        for option in options:
            EFFECTS.setdefault(option, []).append(f"{test.__module__}::{test.__name__}")
        return test

    return enter


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    """Makes worlds whose nodes are stopped at the end."""
    worlds: list[World] = []

    def make(**ota: Any) -> World:
        worlds.append(World(ota=ota))
        return worlds[-1]

    yield make
    for world in worlds:
        world.stop()


MakeWorld = Callable[..., World]
FETCHED = ("publish", OTAFETCH)
REBOOTING = ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)")
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")


def online(world: World, config: OtaConfig | None = None) -> World:
    world.boot(config)
    world.connect()
    return world


def fetches_until(world: World, seconds: float) -> list[float]:
    """Moments of the next fetches, in seconds from now."""
    began = world.clock.monotonic()
    found = []
    seen = world.sent().count(FETCHED)
    while world.clock.monotonic() < began + seconds:
        world.advance(1)
        now = world.sent().count(FETCHED)
        found += [world.clock.monotonic() - began] * (now - seen)
        seen = now
    return found


def updated(world: World, version: str = "2.0.0") -> None:
    """A job is done, and the node has restarted into the new image."""
    world.scripts.append(good(version))
    world.deliver_job()
    world.advance(10)
    assert world.restart_reasons[-1] == "new firmware"


# ---- The table --------------------------------------------------------------------------------------------------


def test_every_option_has_its_place_and_a_test_that_shows_its_effect() -> None:
    options = {each.name for each in dataclasses.fields(OtaSection)}
    assert set(SPECIFICATION.values()) <= options
    assert len(SPECIFICATION) == 49
    assert set(WHERE) == options
    assert set(EFFECTS) == options
    package = Path(workflow.__file__).parents[1]
    for option, file in WHERE.items():
        text = (package / file).read_text(encoding="utf-8")
        uses = re.findall(rf"\b{option}\b", text)
        declared = len(re.findall(rf"^    {option}: ", text, re.MULTILINE))
        assert len(uses) > declared, f"{file} does not use {option}"


@pytest.mark.parametrize("test", sorted({test for tests in EFFECTS.values() for test in tests}))
def test_the_tests_named_are_there(test: str) -> None:
    module, _, name = test.partition("::")
    if module.endswith(".c"):
        assert f"TEST({name})" in (Path(__file__).parents[2] / module).read_text()
    else:
        assert callable(getattr(importlib.import_module(module), name))


# ---- Fetching ---------------------------------------------------------------------------------------------------


@shows("ota_autofetch", "ota_autofetch_period_hours")
@pytest.mark.parametrize(
    ("ota", "times"),
    [
        ({}, [5]),
        ({"ota_autofetch": False}, []),
        ({"ota_autofetch_period_hours": 1}, [5, 3600, 7200]),
        ({"ota_autofetch": False, "ota_autofetch_period_hours": 1}, [3600, 7200]),
    ],
)
def test_it_fetches_after_the_start_and_every_so_many_hours(
    make: MakeWorld, ota: dict[str, Any], times: list[float]
) -> None:
    assert fetches_until(online(make(**ota)), 7500) == times


@shows("fetch_after_reconnect", "strict")
@pytest.mark.parametrize(("ota", "times"), [({}, [5]), ({"fetch_after_reconnect": False}, []), ({"strict": True}, [])])
def test_a_long_absence_is_followed_by_a_fetch(make: MakeWorld, ota: dict[str, Any], times: list[float]) -> None:
    world = online(make(ota_autofetch=False, **ota))
    world.disconnect()
    world.advance(61)
    world.connect()
    assert fetches_until(world, 60) == times


@shows("type")
@pytest.mark.parametrize(
    ("kind", "listens", "has_service"), [("topics", True, False), ("params", False, True), ("both", True, True)]
)
def test_jobs_come_from_where_it_is_said(make: MakeWorld, kind: str, listens: bool, has_service: bool) -> None:
    world = make(type=kind)
    node = world.power_on()
    for each in ota_types_of(node.config):
        assert node.enable(None, each) == 0
    node.start()
    world.connect()
    assert (("subscribe", OTAURL) in world.sent()) is listens
    (config,) = world.published(CONFIG)
    assert ("OTA" in [service["name"] for service in config.get("services", [])]) is has_service


# ---- Attempts ---------------------------------------------------------------------------------------------------

UNREACHABLE = DownloadError("no route", status="ERR_HTTP_CONNECT", esp_err=0x7002, stage="source", device_code=111)
REFUSED_TEXT = "OTA Begin failed: ESP_ERR_HTTP_CONNECT (errno=111: Connection refused)"


@shows("ota_max_retries", "ota_retry_delay_minutes")
def test_so_many_attempts_then_a_fetch_after_so_many_minutes(make: MakeWorld) -> None:
    for attempts, minutes in ((1, 60), (4, 1)):
        world = online(make(ota_autofetch=False, ota_max_retries=attempts, ota_retry_delay_minutes=minutes))
        world.scripts = [fails(UNREACHABLE)] * attempts
        world.deliver_job()
        expected: list[tuple[str, str]] = []
        for number in range(1, attempts + 1):
            expected.append(("in-progress", f"Starting OTA Upgrade (HTTPS attempt {number}/{attempts})"))
            expected.append(("failed", f"OTA Attempt {number}/{attempts} failed: {REFUSED_TEXT}"))
        assert world.statuses() == expected
        assert fetches_until(world, minutes * 60 + 100) == [minutes * 60]


@shows("report_attempt_failures")
def test_failed_attempts_may_be_progress_with_one_failure_at_the_end(make: MakeWorld) -> None:
    world = online(make(ota_max_retries=2, report_attempt_failures=False))
    world.scripts = [fails(UNREACHABLE)] * 2
    world.deliver_job()
    assert [status for status, _ in world.statuses()] == ["in-progress"] * 3 + ["failed"]


@shows("ota_progress_support", "ota_progress_interval_pct")
@pytest.mark.parametrize(
    ("ota", "told"),
    [
        ({}, []),
        ({"ota_progress_support": True}, list(range(10, 100, 10))),
        ({"ota_progress_support": True, "ota_progress_interval_pct": 50}, [50]),
        ({"ota_progress_support": True, "ota_progress_interval_pct": 33}, [33, 66, 99]),
    ],
)
def test_progress_is_told_in_steps(make: MakeWorld, ota: dict[str, Any], told: list[int]) -> None:
    world = online(make(**ota))

    def script(run: Any) -> None:
        run.header()
        for count in range(0, 65537, 655):
            run.progress_to(count)
        run.finish()

    world.scripts.append(script)
    world.deliver_job()
    found = [re.fullmatch(r"Downloaded (\d+)% Firmware Image", info) for _, info in world.statuses()]
    assert [int(match[1]) for match in found if match is not None] == told


class SecureChip(FakeChip):
    """Takes images from secure version 3 on."""

    @property
    def secure_version(self) -> int:
        return 3


@shows("ota_skip_version_check", "ota_skip_project_name_check", "ota_skip_secure_version_check")
@pytest.mark.parametrize(
    ("option", "version", "project", "secure", "refusal"),
    [
        ("ota_skip_project_name_check", "2.0.0", "other", 3, "Project Name mismatch"),
        ("ota_skip_version_check", "1.0.0", "gw", 3, "Same version received"),
        ("ota_skip_secure_version_check", "2.0.0", "gw", 2, "Lower secure version received"),
    ],
)
def test_each_check_of_the_header_can_be_left_out(
    make: MakeWorld, option: str, version: str, project: str, secure: int, refusal: str
) -> None:
    from rmaker_ota.install import ImageHeader
    from rmaker_ota.targets.base import AppDescription

    for skip in (False, True):
        world = make(**{option: skip})
        world.chip = SecureChip()

        def script(run: Any) -> None:
            run._app = AppDescription(version, project, secure)
            run.callbacks.header_gate(ImageHeader(run._app, b"", 65536, 0, ""))
            run.finish()

        world.scripts.append(script)
        online(world).deliver_job()
        assert world.statuses()[-1] == (REBOOTING if skip else ("rejected", refusal))


@shows("ota_disable_auto_reboot")
def test_the_application_may_restart_by_itself(make: MakeWorld) -> None:
    world = online(make(ota_disable_auto_reboot=True))
    world.scripts.append(good())
    world.deliver_job()
    world.advance(1000)
    assert world.restart_reasons == []
    assert [event.id for event in world.events if event.base == OTA_EVENT_BASE][-1] == OtaEvent.REQ_FOR_REBOOT
    world.deliver_job("J2")
    assert len(world.installations) == 1  # the new image is not written over
    online(world)
    assert world.chip.running == "ota_1"
    assert world.statuses()[0] == SUCCESS

    automatic = online(make())
    updated(automatic)
    assert not [
        event for event in automatic.events if event.id == OtaEvent.REQ_FOR_REBOOT and event.base == OTA_EVENT_BASE
    ]


# ---- Rollback ---------------------------------------------------------------------------------------------------


@shows("rollback_enable")
def test_without_rollback_success_is_told_before_the_restart(make: MakeWorld) -> None:
    for rollback, last in (
        (True, REBOOTING),
        (False, ("success", "HTTPS OTA Upgrade finished successfully (after 1 attempt)")),
    ):
        world = online(make(rollback_enable=rollback))
        updated(world)
        assert world.statuses()[-1] == last


@shows("ota_rollback_wait_period_s")
@pytest.mark.parametrize("period", [30, 90, 600])
def test_an_image_that_does_not_connect_in_time_is_rolled_back(make: MakeWorld, period: int) -> None:
    world = online(make(ota_rollback_wait_period_s=period))
    updated(world)
    world.boot()
    world.advance(period - 1)
    assert world.restart_reasons == ["new firmware"]
    world.advance(1)
    assert world.restart_reasons == ["new firmware", "rollback"]
    assert world.chip.states["ota_1"] == BootState.INVALID


@shows("ota_rollback_report_failed")
@pytest.mark.parametrize(
    ("report", "told"),
    [
        (False, ("rejected", "Firmware rolled back")),
        (True, ("failed", "MQTT did not connect within 90 seconds")),
    ],
)
def test_a_rollback_for_want_of_a_connection_may_be_told_as_a_failure(
    make: MakeWorld, report: bool, told: tuple[str, str]
) -> None:
    world = online(make(ota_rollback_report_failed=report))
    updated(world)
    world.boot()
    world.advance(90)
    online(world)
    assert world.chip.running == "ota_0"
    assert world.statuses() == [told]


@shows("ota_test_rollback", "ota_test_rollback_count")
def test_good_images_are_rolled_back_so_many_times(make: MakeWorld) -> None:
    world = online(make(ota_test_rollback=True, ota_test_rollback_count=3))
    for cycle in (1, 2):
        updated(world)
        online(world)
        assert world.statuses() == [("failed", f"TEST_ROLLBACK: forced failure to re-trigger OTA (cycle {cycle}/3)")]
        assert world.restart_reasons[-1] == "rollback"
        online(world)
        assert world.chip.running == "ota_0"
    updated(world)
    online(world)
    assert world.statuses() == [("success", "TEST_ROLLBACK_END: 3/3 cycles complete; marking valid")]
    assert world.chip.states["ota_1"] == BootState.VALID

    endless = online(make(ota_test_rollback=True, ota_test_rollback_count=0))
    updated(endless)
    online(endless)
    assert endless.statuses() == [("failed", "TEST_ROLLBACK: forced failure to re-trigger OTA (cycle 1, indefinite)")]


# ---- Time -------------------------------------------------------------------------------------------------------


def unix(zone: str, *local: int, fold: int = 0) -> float:
    return datetime(*local, tzinfo=ZoneInfo(zone), fold=fold).timestamp()  # type: ignore[misc]


def window(start: int, end: int) -> dict[str, Any]:
    return {"download_window": {"start": start, "end": end}}


def moment_of_fetch(world: World, zone: str) -> str:
    """Local time of the next fetch; the world is there then."""
    seen = world.sent().count(FETCHED)
    for _ in range(3 * 24 * 60):
        due = world.node._loop.next_due() if world.node is not None else None
        assert due is not None, "no fetch is due"
        world.advance(max(due - world.clock.monotonic(), 0.0))
        if world.sent().count(FETCHED) > seen:
            return datetime.fromtimestamp(world.clock.unix(), ZoneInfo(zone)).strftime("%d %H:%M:%S")
    raise AssertionError("no fetch")


@shows("ota_time_support")
def test_windows_count_only_with_time_support(make: MakeWorld) -> None:
    for support, last in ((True, ("delayed", "Not within download window.")), (False, REBOOTING)):
        world = make(ota_time_support=support, timezone="UTC")
        world.clock.set_unix(unix("UTC", 2026, 1, 1, 12, 0))
        online(world).scripts.append(good())
        world.deliver_job(metadata=window(60, 120))
        assert world.statuses()[-1] == last


@shows("timezone")
@pytest.mark.parametrize(
    ("zone", "now", "inside"),
    [
        ("UTC", (2026, 1, 1, 23, 30), True),
        ("Asia/Shanghai", (2026, 1, 1, 23, 30), True),
        ("America/New_York", (2026, 7, 1, 1, 59), True),
        ("America/New_York", (2026, 7, 1, 2, 1), False),
        ("CET-1CEST,M3.5.0,M10.5.0/3", (2026, 7, 1, 23, 0), True),
        ("Australia/Lord_Howe", (2026, 7, 1, 22, 59), False),
    ],
)
def test_a_window_is_of_the_time_where_the_node_stands(
    make: MakeWorld, zone: str, now: tuple[int, ...], inside: bool
) -> None:
    world = make(timezone=zone)
    world.clock.set_unix(unix("Europe/Berlin" if "," in zone else zone, *now))
    online(world).scripts.append(good())
    world.deliver_job(metadata=window(1380, 120))
    assert (world.statuses()[-1] == REBOOTING) is inside


# Europe/Berlin: on 29 March 2026 02:00 is followed by 03:00; on 25 October 03:00 by 02:00 once more.
BERLIN = "Europe/Berlin"


@shows("timezone")
@pytest.mark.parametrize(
    ("now", "start", "end", "fetched"),
    [
        ((2026, 3, 28, 23, 0), 180, 190, "29 03:00:05"),  # by counting minutes it would be 04:00, ten days of it
        ((2026, 3, 28, 23, 0), 240, 300, "29 04:00:05"),
        ((2026, 3, 28, 23, 0), 60, 110, "29 01:00:05"),
        ((2026, 10, 24, 23, 0), 240, 250, "25 04:00:05"),
        ((2026, 10, 24, 23, 0), 150, 160, "25 02:30:05"),
        ((2026, 10, 24, 23, 0), 60, 70, "25 01:00:05"),
        ((2026, 6, 1, 23, 0), 180, 190, "02 03:00:05"),
    ],
)
def test_a_window_opens_by_the_clock_on_the_wall_when_it_is_put_forward_or_back(
    make: MakeWorld, now: tuple[int, ...], start: int, end: int, fetched: str
) -> None:
    world = make(timezone=BERLIN, ota_autofetch=False)
    world.clock.set_unix(unix(BERLIN, *now))
    online(world).deliver_job(metadata=window(start, end))
    assert world.statuses() == [("delayed", "Not within download window.")]
    assert moment_of_fetch(world, BERLIN) == fetched
    world.scripts.append(good())
    world.deliver_job(metadata=window(start, end))
    assert world.statuses()[-1] == REBOOTING


@shows("timezone")
def test_a_window_in_an_hour_that_does_not_exist_waits_for_the_next_day(make: MakeWorld) -> None:
    world = make(timezone=BERLIN, ota_autofetch=False)
    world.clock.set_unix(unix(BERLIN, 2026, 3, 29, 1, 30))
    online(world).deliver_job(metadata=window(135, 165))  # 02:15 to 02:45
    assert moment_of_fetch(world, BERLIN) == "29 03:15:05"
    world.deliver_job(metadata=window(135, 165))
    assert world.statuses() == [("delayed", "Not within download window.")] * 2
    assert moment_of_fetch(world, BERLIN) == "30 02:15:10"


@shows("timezone")
def test_a_window_in_an_hour_that_comes_twice_is_open_both_times(make: MakeWorld) -> None:
    for fold in (0, 1):
        world = make(timezone=BERLIN)
        world.clock.set_unix(unix(BERLIN, 2026, 10, 25, 2, 30, fold=fold))
        online(world).scripts.append(good())
        world.deliver_job(metadata=window(120, 179))
        assert world.statuses()[-1] == REBOOTING


@shows("ota_time_support")
def test_validity_is_absolute_whatever_the_zone_and_its_changes(make: MakeWorld) -> None:
    begin = unix(BERLIN, 2026, 3, 29, 3, 0)
    for zone in (BERLIN, "Asia/Shanghai"):
        world = make(timezone=zone, ota_autofetch=False)
        world.clock.set_unix(begin - 7200)
        online(world).deliver_job(metadata={"validity": {"start": int(begin), "end": int(begin) + 60}})
        assert world.statuses() == [("delayed", "Not within valid window.")]
        assert moment_of_fetch(world, "UTC") == datetime.fromtimestamp(begin + 5, UTC).strftime("%d %H:%M:%S")
        world.advance(56)
        world.deliver_job(metadata={"validity": {"start": int(begin), "end": int(begin) + 60}})
        assert world.statuses()[-1] == ("failed", "OTA download window lapsed.")


@shows("ota_time_support")
def test_without_a_clock_it_asks_again_until_there_is_one(make: MakeWorld) -> None:
    world = make(ota_autofetch=False, timezone="UTC")
    world.clock.set_unix(1000.0)
    online(world)
    for number in range(1, 4):
        world.deliver_job(metadata=window(0, 1439))
        assert world.statuses() == [("delayed", "No time information available yet.")] * number
        assert fetches_until(world, 30) == [30]
    world.clock.set_unix(unix("UTC", 2026, 1, 1, 12, 0))
    world.scripts.append(good())
    world.deliver_job(metadata=window(0, 1439))
    assert world.statuses()[-1] == REBOOTING


@shows("sntp_server", "max_param_data_size")
def test_what_has_no_effect_here_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = configuration(tmp_path)
    parse_config(tables, directory=tmp_path)
    assert "has no effect" not in caplog.text
    tables["ota"] = {"sntp_server": "ntp.example", "max_param_data_size": 64}
    parse_config(tables, directory=tmp_path, source="node.toml")
    assert "node.toml: [ota] sntp_server has no effect: the operating system keeps the time" in caplog.text
    assert "node.toml: [ota] max_param_data_size has no effect" in caplog.text


@shows("max_param_data_size")
def test_a_report_larger_than_the_first_buffer_goes_out_whole(make: MakeWorld) -> None:
    world = make(max_param_data_size=64)
    node = world.power_on()
    text = Param("Text", None, "", properties=("read",))
    node.add_service(Service("S", None, [text]))
    node.start()
    world.connect()
    text.update_and_report("x" * 1000)
    world.settle()
    assert world.published("$aws/rules/esp_set_params/node/N1/params/local") == [{"S": {"Text": "x" * 1000}}]


# ---- Downloads, with the engine and a real server ---------------------------------------------------------------

NEW = build_image(version="2.0.0", project_name="gw", size=512 * 1024)


class PositionStore(MemoryStore):
    """Keeps every position of a download that was made durable."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[int] = []

    def update(self, changes: Mapping[str, Value | None]) -> None:
        super().update(changes)
        written = changes.get("ota_written")
        if isinstance(written, int) and written > 0:
            self.positions.append(written)


class Gateway:
    """A node with a real flash image that downloads by the engine; time stands still, the cloud is the test."""

    def __init__(self, directory: Path, **ota: Any) -> None:
        directory.mkdir(exist_ok=True)
        flash = directory / "flash.bin"
        create_flash_image(flash, build_image(version="1.0.0", project_name="gw"))
        self.transport = MemoryTransport()
        self.store = PositionStore()
        self.restarts: list[str] = []
        self.ota = OtaSection(**{"ota_max_retries": 1, "use_cert_bundle": False, **ota})
        self.node = Node(
            NodeConfig(
                node=NodeSection(id="N1"),
                mqtt=MqttSection(host="broker.invalid", cert=Path("node.crt"), key=Path("node.key")),
                ota=self.ota,
                target=TargetSection(f"esp32-image:{flash}"),
            ),
            target=open_target(f"esp32-image:{flash}"),
            state=self.store,
            transport=self.transport,
            clock=VirtualClock(),
            restarter=self.restarts.append,
        )

    def download(self, url: str, *, server_cert: str | None = None, **more: Any) -> list[tuple[str, str]]:
        """Status and text of all reports about one job."""
        with self.node:
            assert self.node.enable(OtaConfig(server_cert=server_cert), OtaType.USING_TOPICS) == 0
            self.node.start()
            self.transport.go_online()
            self.node.settle()
            job = {"ota_job_id": "J1", "url": url, "file_size": len(NEW), **more}
            assert self.transport.deliver(OTAURL, json.dumps(job))
            self.node.settle()
        sent = [json.loads(one.payload) for one in self.transport.sent if one.topic == OTASTATUS]
        return [(each["status"], each["additional_info"]) for each in sent]


TLS_FAILED = "OTA Attempt 1/1 failed: OTA Begin failed: ESP_ERR_HTTP_CONNECT (errno=0: Invalid)"


@shows("ota_skip_common_name_check")
def test_the_name_in_the_certificate_need_not_be_looked_at(tmp_path: Path) -> None:
    with HttpsServer([sim.serve(NEW)], certificate="wrong_host") as server:
        trusted = server.ca_pem.decode()
        assert Gateway(tmp_path / "a").download(server.url(), server_cert=trusted)[-1] == ("failed", TLS_FAILED)
        skipping = Gateway(tmp_path / "b", ota_skip_common_name_check=True)
        assert skipping.download(server.url(), server_cert=trusted)[-1] == REBOOTING
        stranger = trustme.CA().cert_pem.bytes().decode()
        still = Gateway(tmp_path / "c", ota_skip_common_name_check=True)
        assert still.download(server.url(), server_cert=stranger)[-1] == ("failed", TLS_FAILED)


@shows("use_cert_bundle", "server_cert")
def test_who_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpsServer([sim.serve(NEW)]) as server:
        trusted = server.ca_pem.decode()
        own = Gateway(tmp_path / "own")
        assert own.download(server.url(), server_cert=trusted)[-1] == REBOOTING
        (tmp_path / "ca.pem").write_text(trusted)
        configured = Gateway(tmp_path / "configured", server_cert=tmp_path / "ca.pem")
        assert configured.download(server.url())[-1] == REBOOTING
        bundle = Gateway(tmp_path / "bundle", use_cert_bundle=True)  # then the certificate is passed over
        assert bundle.download(server.url(), server_cert=trusted)[-1] == ("failed", TLS_FAILED)


@shows("allow_http")
def test_plain_http_is_refused_unless_allowed(tmp_path: Path) -> None:
    with HttpsServer([sim.serve(NEW)], tls=False) as server:
        refused = "OTA Attempt 1/1 failed: OTA Begin failed: ESP_ERR_INVALID_ARG (errno=0: Invalid)"
        assert Gateway(tmp_path / "a").download(server.url())[-1] == ("failed", refused)
        assert server.requests == []
        assert Gateway(tmp_path / "b", allow_http=True).download(server.url())[-1] == REBOOTING


@shows("http_ota_resumption")
@pytest.mark.parametrize(
    ("ota", "second"),
    [
        ({"ota_checkpoint_kib": 64}, True),
        ({"ota_checkpoint_kib": 64, "http_ota_resumption": False}, False),
    ],
)
def test_the_next_attempt_goes_on_where_the_last_one_ended(tmp_path: Path, ota: dict[str, Any], second: bool) -> None:
    with HttpsServer([sim.closes_early(NEW, 400_000), sim.serve(NEW)]) as server:
        gateway = Gateway(tmp_path, ota_max_retries=2, **ota)
        md5 = hashlib.md5(NEW).hexdigest()
        statuses = gateway.download(server.url(), server_cert=server.ca_pem.decode(), file_md5=md5)
        assert statuses[-1] == ("in-progress", "Rebooting into new firmware (after 2 HTTPS attempts)")
        ranges = [request.range for request in server.requests]
        assert ranges[0] is None
        assert (ranges[1] is not None) is second


@shows("ota_checkpoint_kib", "ota_checkpoint_s")
@pytest.mark.parametrize(
    ("kib", "seconds", "at_least", "at_most"),
    [(64, 3600.0, 4, 8), (1 << 20, 3600.0, 1, 1), (1 << 20, 0.01, 3, 8)],  # the last one is that of the cut
)
def test_a_position_is_kept_every_so_many_bytes_or_seconds(
    tmp_path: Path, kib: int, seconds: float, at_least: int, at_most: int
) -> None:
    with HttpsServer([sim.closes_early(NEW, 400_000)]) as server:
        gateway = Gateway(
            tmp_path, ota_checkpoint_kib=kib, ota_checkpoint_s=seconds, http_max_bytes_per_s=1 << 20
        )  # so that 64 KiB take 60 ms
        md5 = hashlib.md5(NEW).hexdigest()
        gateway.download(server.url(), server_cert=server.ca_pem.decode(), file_md5=md5)
        assert at_least <= len(gateway.store.positions) <= at_most
        assert gateway.store.positions == sorted(gateway.store.positions)


@shows("http_stall_timeout_s", "http_deadline_s")
@pytest.mark.parametrize("option", ["http_stall_timeout_s", "http_deadline_s"])
def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, option: str) -> None:
    with HttpsServer([sim.stalls(NEW, 100_000)]) as server:
        statuses = Gateway(tmp_path, **{option: 0.2}).download(server.url(), server_cert=server.ca_pem.decode())
        assert statuses[-1][0] == "failed"
        assert "OTA failed: ESP_ERR_TIMEOUT" in statuses[-1][1]


@shows("http_connect_timeout_s")
def test_a_server_that_does_not_greet_is_given_up(tmp_path: Path) -> None:
    with HttpsServer(silent=True) as server:
        gateway = Gateway(tmp_path, http_connect_timeout_s=0.2)
        status, info = gateway.download(server.url(), server_cert=server.ca_pem.decode())[-1]
        assert status == "failed"
        assert "OTA Begin failed: ESP_ERR_HTTP_CONNECT" in info


@shows("http_proxy")
def test_a_proxy_is_used(tmp_path: Path) -> None:
    with HttpsServer([sim.serve(NEW)]) as server, HttpsServer([sim.tunnels()], tls=False) as proxy:
        gateway = Gateway(tmp_path, http_proxy=proxy.url("/").rstrip("/"))
        assert gateway.download(server.url(), server_cert=server.ca_pem.decode())[-1] == REBOOTING
        assert proxy.requests[0].method == "CONNECT"


@shows("http_max_bytes_per_s", "http_rx_buffer_size", "ota_read_back")
def test_what_is_set_reaches_the_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmaker_ota import install

    made: list[install.Installer] = []

    class Seen(install.Installer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(install, "Installer", Seen)
    with HttpsServer([sim.serve(NEW)]) as server:
        gateway = Gateway(tmp_path, http_max_bytes_per_s=1 << 30, http_rx_buffer_size=4096, ota_read_back=True)
        assert gateway.download(server.url(), server_cert=server.ca_pem.decode())[-1] == REBOOTING
    (installer,) = made
    assert installer._http.max_bytes_per_s == 1 << 30
    assert installer._http.receive_buffer == 4096
    assert installer._options.read_back


# ---- Images over MQTT -------------------------------------------------------------------------------------------


@shows("ota_transport")
def test_the_built_in_handler_follows_the_transport(tmp_path: Path, make: MakeWorld) -> None:
    world = online(make(ota_transport="https"))
    world.scripts.append(good())
    world.deliver_job(stream_id="S1")
    assert world.statuses()[0][1] == "Starting OTA Upgrade (HTTPS attempt 1/3)"
    stream = StreamWorld(tmp_path, ota_transport="mqtt")
    try:
        stream.boot()
        stream.job()
        stream.wait("Rebooting into new firmware (after 1 MQTT attempt)")
        assert stream.reports[0] == "Starting OTA Upgrade (MQTT attempt 1/3)"
    finally:
        stream.stop()


@shows("mqtt_ota_block_size", "mqtt_ota_blocks_per_request")
@pytest.mark.parametrize(("size", "count"), [(256, 1), (512, 4), (4096, 2), (1000, 3)])
def test_blocks_are_asked_for_in_this_size_and_number(tmp_path: Path, size: int, count: int) -> None:
    stream = StreamWorld(tmp_path, mqtt_ota_block_size=size, mqtt_ota_blocks_per_request=count)
    try:
        stream.boot()
        stream.job()
        stream.wait("Rebooting into new firmware (after 1 MQTT attempt)")
    finally:
        stream.stop()
    blocks = -(-len(stream.file) // size)
    asked = [one for one in stream.broker.requests if one.bitmap is not None]
    assert {one.block_size for one in asked} == {size}
    assert [(one.offset, one.count) for one in asked] == [
        (first, min(count, blocks - first)) for first in range(0, blocks, count)
    ]


@shows("mqtt_ota_max_retries", "mqtt_ota_block_wait_s")
@pytest.mark.parametrize(("retries", "seconds"), [(1, 5), (3, 10), (5, 30)])
def test_a_missing_block_is_asked_for_so_often_after_so_long(tmp_path: Path, retries: int, seconds: int) -> None:
    stream = StreamWorld(
        tmp_path, mqtt_ota_max_retries=retries, mqtt_ota_block_wait_s=seconds, ota_max_retries=1, ota_autofetch=False
    )
    try:
        node = stream.boot()
        stream.broker.script = lambda request: [] if request.bitmap else stream.broker.blocks(request)
        stream.job()
        stream.wait_requests(2)
        for number in range(1, retries + 1):
            node.settle()
            stream.clock.advance(seconds - 0.5)
            assert len(stream.body_requests()) == number
            stream.clock.advance(0.5)
            stream.wait_requests(2 + number)
        node.settle()
        stream.clock.advance(seconds)
        stream.wait("OTA Attempt 1/1 failed: OTA failed: ESP_FAIL")
        assert len(stream.body_requests()) == retries + 1
    finally:
        stream.stop()


@shows("mqtt_ota_window")
@pytest.mark.parametrize("window", [1, 4])
def test_so_many_requests_are_on_their_way_at_once(tmp_path: Path, window: int) -> None:
    stream = StreamWorld(tmp_path, mqtt_ota_window=window, mqtt_ota_block_size=256, mqtt_ota_blocks_per_request=1)
    try:
        node = stream.boot()
        stream.broker.script = lambda request: [] if request.bitmap else stream.broker.blocks(request)
        stream.job()
        stream.wait_requests(1 + window)
        node.settle()
        assert stream.body_requests() == [(number, 1) for number in range(window)]
    finally:
        stream.stop()


# ---- Publishing -------------------------------------------------------------------------------------------------


@shows("mqtt_use_basic_ingest")
def test_topics_to_the_cloud_are_plain_without_basic_ingest(make: MakeWorld) -> None:
    for ingest, prefix in ((True, "$aws/rules/esp_node_{}/"), (False, "")):
        world = online(make(mqtt_use_basic_ingest=ingest))
        world.scripts.append(good())
        world.advance(5)
        world.deliver_job()
        topics = {topic for kind, topic in world.sent() if kind == "publish"}
        assert topics == {
            prefix.format(name.removeprefix("ota") if False else name) + f"node/N1/{name}"
            for name in ("config", "otafetch", "otastatus")
        }
        assert {topic for kind, topic in world.sent() if kind == "subscribe"} == {OTAURL, "node/N1/params/remote"}


@shows("mqtt_budgeting", "mqtt_default_budget")
def test_so_many_messages_may_be_published_at_first(make: MakeWorld) -> None:
    for budget in (64, 100):
        world = make(mqtt_default_budget=budget, ota_autofetch=False)
        world.budget = publish_budget(OtaSection(mqtt_default_budget=budget))
        online(world)
        node = world.node
        assert node is not None
        accepted = 1  # the node configuration
        while node.fetch() == 0 and accepted < 2000:
            world.settle()
            accepted += 1
        assert accepted == budget
    world.scripts.append(good())
    world.deliver_job()
    world.settle()
    assert world.statuses() == []  # dropped,
    assert [event.id for event in world.events if event.base == OTA_EVENT_BASE][
        -1
    ] == OtaEvent.IN_PROGRESS  # not undone
    assert publish_budget(OtaSection(mqtt_budgeting=False)) is None


@shows("mqtt_budgeting")
def test_without_a_budget_only_the_outbox_has_an_end(tmp_path: Path) -> None:
    for budgeting, accepted in ((True, 100), (False, MAX_OUTBOX)):
        transport = transport_of(tmp_path, {"ota": {"mqtt_budgeting": budgeting}})
        for _ in range(accepted):
            transport.publish("t", b"")
        with pytest.raises(PublishRefused):
            transport.publish("t", b"")


@shows("mqtt_max_budget", "mqtt_budget_revive_period_s", "mqtt_budget_revive_count")
def test_the_budget_grows_while_connected_up_to_its_most(make: MakeWorld) -> None:
    options = {
        "mqtt_default_budget": 64,
        "mqtt_max_budget": 70,
        "mqtt_budget_revive_period_s": 10,
        "mqtt_budget_revive_count": 2,
    }
    budget = publish_budget(OtaSection(**options))
    assert budget is not None
    budget.connected(0.0)
    assert [budget.left(now) for now in (9.9, 10.0, 20.0, 29.9, 30.0, 1000.0)] == [64, 66, 68, 68, 70, 70]


@shows("connectivity_report_delay_s")
@pytest.mark.parametrize("delay", [0, 5, 30])
def test_users_are_told_that_the_node_is_connected_after_a_while(make: MakeWorld, delay: int) -> None:
    class ConnectedWorld(World):
        def config(self) -> NodeConfig:
            config = super().config()
            return dataclasses.replace(config, node=dataclasses.replace(config.node, connectivity=True, groups=True))

    report = "$aws/rules/esp_set_params/node/N1/params/local"
    world = ConnectedWorld(ota={"connectivity_report_delay_s": delay})
    try:
        online(world)
        gone = ("node/N1/params/local", b'{"Connectivity":{"Connected":false}}')
        assert world.transport.will == gone
        (config,) = world.published(CONFIG)
        assert [each for each in config["services"] if each["name"] == "Connectivity"] == [
            {
                "name": "Connectivity",
                "type": "esp.service.connectivity",
                "params": [
                    {
                        "name": "Connected",
                        "type": "esp.param.connected",
                        "data_type": "bool",
                        "properties": ["read"],
                    }
                ],
            }
        ]
        world.advance(max(delay - 1, 0))
        world.disconnect()
        world.connect()  # it counts from the last connect
        world.advance(max(delay - 1, 0))
        assert [one["Connectivity"] for one in world.published(report)] == ([] if delay else [{"Connected": True}] * 2)
        world.advance(1)
        assert [one["Connectivity"] for one in world.published(report)][-1:] == [{"Connected": True}]
        assert world.transport.deliver("node/N1/params/remote", '{"Groups":{"GroupID":"G1"}}')
        world.settle()
        world.disconnect()
        world.connect()
        assert world.transport.will == ("node/N1/params/local/G1", gone[1])
        world.stop()  # in order, so the broker keeps the will to itself
        last = world.transport.sent[-1]
        assert (last.topic, last.payload) == ("node/N1/params/local/G1", gone[1])
    finally:
        world.stop()


# ---- Connecting -------------------------------------------------------------------------------------------------


def configuration(directory: Path) -> dict[str, Any]:
    """Tables of a configuration with credentials as host claiming leaves them."""
    leaf = trustme.CA().issue_cert("n1.invalid", common_name="CN-of-N1")
    leaf.cert_chain_pems[0].write_to_path(directory / "node.crt")
    leaf.private_key_pem.write_to_path(directory / "node.key")
    (directory / "node.info").write_text("N1")
    (directory / "endpoint.info").write_text("claimed.example")
    return {"mqtt": {"credentials": "."}, "target": {"uri": "file:slot"}}


def transport_of(directory: Path, tables: dict[str, Any]) -> PahoTransport:
    given = configuration(directory)
    for section, values in tables.items():
        given[section] = {**given.get(section, {}), **values}
    transport = make_transport(parse_config(given, directory=directory))
    assert isinstance(transport, PahoTransport)
    return transport


@pytest.fixture
def broker() -> Iterator[RawBroker]:
    broker = RawBroker()
    yield broker
    broker.close()


@dataclasses.dataclass
class ConnectPacket:
    """What the first packet says."""

    clean_session: bool
    keepalive_s: int
    client_id: str
    will: tuple[str, bytes] | None
    username: str | None


def connect_packet(broker: RawBroker, directory: Path, tables: dict[str, Any]) -> ConnectPacket:
    """Connects, without TLS, with what a configuration says otherwise."""
    transport = transport_of(directory, tables)
    transport._connection = dataclasses.replace(transport._connection, host="127.0.0.1", port=broker.port, tls=None)
    return first_packet(broker, transport)


def first_packet(broker: RawBroker, transport: PahoTransport) -> ConnectPacket:
    try:
        transport.start(Heard())
        kind, body = broker.accept().read()
    finally:
        transport.stop(0.0)
    assert kind == 0x10
    assert body[:7] == b"\x00\x04MQTT\x04"
    flags, keepalive = body[7], int.from_bytes(body[8:10], "big")
    rest = body[10:]

    def text() -> bytes:
        nonlocal rest
        size = int.from_bytes(rest[:2], "big")
        found, rest = rest[2 : 2 + size], rest[2 + size :]
        return found

    client_id = text().decode()
    will = (text().decode(), text()) if flags & 4 else None
    assert not flags & 4 or flags & 0x38 == 0x08  # QoS 1, not retained
    username = text().decode() if flags & 0x80 else None
    assert rest == b""
    assert not flags & 0x40  # no password
    return ConnectPacket(bool(flags & 2), keepalive, client_id, will, username)


@shows("mqtt_persistent_session", "mqtt_keepalive_s")
def test_session_and_keepalive_are_what_is_asked_for(broker: RawBroker, tmp_path: Path) -> None:
    normal = connect_packet(broker, tmp_path, {})
    assert (normal.clean_session, normal.keepalive_s, normal.client_id, normal.will) == (True, 120, "N1", None)
    other = connect_packet(broker, tmp_path, {"ota": {"mqtt_persistent_session": True, "mqtt_keepalive_s": 30}})
    assert (other.clean_session, other.keepalive_s) == (False, 30)


@shows("mqtt_send_username", "mqtt_product_name", "mqtt_product_version", "mqtt_product_sku")
@pytest.mark.parametrize(
    ("ota", "username"),
    [
        ({}, "?Platform=APN3|A0|RM|EX00|RMDev|1x0|AABBCCDDEEFF"),
        ({"mqtt_product_name": "Lamp"}, "?Platform=APN3|A0|RM|EX00|Lamp|1x0|AABBCCDDEEFF"),
        ({"mqtt_product_version": "2x5"}, "?Platform=APN3|A0|RM|EX00|RMDev|2x5|AABBCCDDEEFF"),
        ({"mqtt_product_sku": "ES00"}, "?Platform=APN3|A0|RM|ES00|RMDev|1x0|AABBCCDDEEFF"),
        ({"mqtt_send_username": False}, None),
    ],
)
def test_the_user_name_is_for_statistics(
    broker: RawBroker, tmp_path: Path, ota: dict[str, Any], username: str | None
) -> None:
    assert connect_packet(broker, tmp_path, {"node": {"id": "aabbccddeeff"}, "ota": ota}).username == username


@shows("mqtt_product_name", "mqtt_product_version")
def test_a_user_name_is_never_longer_than_it_may_be(broker: RawBroker, tmp_path: Path) -> None:
    ota = {"mqtt_product_name": "n" * 50, "mqtt_product_version": "v" * 50}
    username = connect_packet(broker, tmp_path, {"node": {"id": "AABBCCDDEEFF"}, "ota": ota}).username
    assert username is not None
    assert len(username) <= 64
    assert username.endswith("|AABBCCDDEEFF")


def test_the_will_is_the_brokers_from_the_connect_on(broker: RawBroker, tmp_path: Path) -> None:
    transport = transport_of(tmp_path, {})
    transport._connection = dataclasses.replace(transport._connection, host="127.0.0.1", port=broker.port, tls=None)
    transport.set_will("node/N1/params/local", b"gone")
    assert first_packet(broker, transport).will == ("node/N1/params/local", b"gone")


@shows("mqtt_port")
@pytest.mark.parametrize(
    ("tables", "port", "alpn"),
    [
        ({}, 443, "x-amzn-mqtt-ca"),
        ({"ota": {"mqtt_port": 8883}}, 8883, None),
        ({"mqtt": {"port": 8883}}, 8883, None),
        ({"mqtt": {"alpn": ""}}, 443, None),
        ({"mqtt": {"port": 1883, "alpn": "mqtt"}}, 1883, "mqtt"),
    ],
)
def test_port_443_is_shared_by_way_of_alpn(tmp_path: Path, tables: dict[str, Any], port: int, alpn: str | None) -> None:
    """The protocol the server hears of in the handshake."""
    transport = transport_of(tmp_path, tables)
    assert transport._connection.port == port
    assert asked_protocol(transport, tmp_path) == alpn


def asked_protocol(transport: PahoTransport, directory: Path) -> str | None:
    """Connects to a TLS server that knows several protocols; the one agreed on."""
    import socket
    import ssl

    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    server.set_alpn_protocols(["http/1.1", "mqtt", "x-amzn-mqtt-ca"])
    tls = transport._connection.tls
    assert tls is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10.0)
        transport._connection = dataclasses.replace(
            transport._connection,
            host="127.0.0.1",
            port=listener.getsockname()[1],
            tls=dataclasses.replace(tls, ca=directory / "ca.pem"),
        )
        try:
            transport.start(Heard())
            sock, _ = listener.accept()
            sock.settimeout(10.0)
            with server.wrap_socket(sock, server_side=True) as wire:
                assert wire.recv(1) == b"\x10"  # and the CONNECT follows
                return wire.selected_alpn_protocol()
        finally:
            transport.stop(0.0)


@shows("max_mqtt_subscriptions")
def test_subscriptions_have_an_end(tmp_path: Path) -> None:
    for most in (2, 10):
        transport = transport_of(tmp_path, {"ota": {"max_mqtt_subscriptions": most}})
        for number in range(most):
            transport.subscribe(f"t{number}")
        with pytest.raises(OtaError, match=f"more than {most} subscriptions"):
            transport.subscribe("one more")


@shows("mqtt_host", "mqtt_host_from_config", "node_id_from_cert_cn")
@pytest.mark.parametrize(
    ("tables", "host", "node_id"),
    [
        ({}, "claimed.example", "N1"),
        ({"ota": {"mqtt_host": "mine.example"}}, "claimed.example", "N1"),
        ({"ota": {"mqtt_host": "mine.example", "mqtt_host_from_config": True}}, "mine.example", "N1"),
        ({"ota": {"mqtt_host_from_config": True}}, "mqtt.rainmaker.espressif.com", "N1"),
        ({"mqtt": {"host": "other.example"}}, "other.example", "N1"),
        ({"ota": {"node_id_from_cert_cn": True}}, "claimed.example", "CN-of-N1"),
        ({"node": {"id": "mine"}, "ota": {"node_id_from_cert_cn": True}}, "claimed.example", "mine"),
    ],
)
def test_whom_it_connects_to_and_as_whom(tmp_path: Path, tables: dict[str, Any], host: str, node_id: str) -> None:
    connection = transport_of(tmp_path, tables)._connection
    assert (connection.host, connection.client_id) == (host, node_id)


@shows("mqtt_host")
def test_without_a_stored_host_the_configured_one_is_used(tmp_path: Path) -> None:
    given = configuration(tmp_path)
    (tmp_path / "endpoint.info").unlink()
    given["ota"] = {"mqtt_host": "mine.example"}
    assert parse_config(given, directory=tmp_path).mqtt.host == "mine.example"
