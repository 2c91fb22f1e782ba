"""Parameters and the params workflow in a node: callbacks, threads, the broker's side. Time is the test's."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rmaker_ota import Bounds, Device, Ota, OtaConfig, OtaData, OtaHandle, Param, Service
from rmaker_ota.errors import ArgumentError, OtaError
from rmaker_ota.rainmaker.node import Node, ota_types_of
from rmaker_ota.rainmaker.params import Value
from rmaker_ota.rainmaker.transport import PublishBudget
from rmaker_ota.rainmaker.types import OtaStatus, OtaType
from tests.sim.node_world import CONFIG, OTAFETCH, OTAURL, URL, WAIT_S, FakeInstallation, World, good

REMOTE = "node/N1/params/remote"
LOCAL = "$aws/rules/esp_set_params/node/N1/params/local"
INIT = "$aws/rules/esp_init_params/node/N1/params/local/init"
VERIFIED = "OTA Upgrade finished and verified successfully"


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


class Lamp:
    """An application's device which does what it is told and says so."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.power = Param("Power", "esp.param.power", False)
        self.level = Param("Level", "esp.param.brightness", 10, bounds=Bounds(0, 100))
        self.device = Device("Lamp", "esp.device.lightbulb", [self.power, self.level], write_cb=self.write)

    def write(self, device: Device, param: Param, value: Value) -> None:
        assert device is self.device
        self.threads.append(threading.current_thread().name)
        param.update_and_report(value)


def start(world: World, *devices: Device, ota: OtaType | None = None, config: OtaConfig | None = None) -> Node:
    node = world.power_on()
    for device in devices:
        node.add_device(device)
    if ota is not None:
        assert node.enable(config, ota) == 0
    node.start()
    world.connect()
    return node


def write(world: World, text: str | bytes) -> None:
    assert world.transport.deliver(REMOTE, text)
    world.settle()


def pairs(world: World) -> list[tuple[str, str]]:
    values = [next(iter(one["OTA"].values())) for one in world.published(LOCAL)]
    return list(zip(values[0::2], values[1::2], strict=True))


# ---- Devices of the application --------------------------------------------------------------------------------


def test_a_device_is_in_the_configuration_and_its_values_in_the_initial_report(world: World) -> None:
    start(world, Lamp().device, Service("Time", "esp.service.time", [Param("TZ", "esp.param.tz", "")]))
    assert world.sent()[:3] == [("publish", CONFIG), ("subscribe", REMOTE), ("publish", INIT)]
    [config] = world.published(CONFIG)
    assert list(config) == ["node_id", "config_version", "info", "devices", "services"]
    assert config["devices"] == [
        {
            "name": "Lamp",
            "type": "esp.device.lightbulb",
            "params": [
                {"name": "Power", "type": "esp.param.power", "data_type": "bool", "properties": ["read", "write"]},
                {
                    "name": "Level",
                    "type": "esp.param.brightness",
                    "data_type": "int",
                    "properties": ["read", "write"],
                    "bounds": {"min": 0, "max": 100},
                },
            ],
        }
    ]
    assert [service["name"] for service in config["services"]] == ["Time"]
    assert world.published(INIT) == [{"Lamp": {"Power": False, "Level": 10}, "Time": {"TZ": ""}}]
    names = [event.name for event in world.events if event.name != "RMAKER_COMMON_EVENT_MQTT_PUBLISHED"]
    assert names[-2:] == ["RMAKER_EVENT_CONFIG_REPORTED", "RMAKER_EVENT_STARTED"]


def test_a_write_reaches_the_callback_on_a_thread_of_the_node_and_is_reported_back(world: World) -> None:
    lamp = Lamp()
    start(world, lamp.device)
    write(world, '{"Lamp":{"Level":42,"Power":true}}')
    assert world.published(LOCAL) == [{"Lamp": {"Power": True}}, {"Lamp": {"Level": 42}}]
    assert lamp.threads == ["rmaker-params"] * 2


def test_a_callback_that_raises_is_logged_and_the_next_one_is_called(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    lamp = Lamp()

    def write_cb(device: Device, param: Param, value: Value) -> None:
        if param.name == "Power":
            raise ValueError("fuse blown")
        param.update_and_report(value)

    lamp.device.write_cb = write_cb
    start(world, lamp.device)
    write(world, '{"Lamp":{"Level":42,"Power":true}}')
    write(world, '{"Lamp":{"Level":43}}')
    assert world.published(LOCAL) == [{"Lamp": {"Level": 42}}, {"Lamp": {"Level": 43}}]
    assert lamp.power.value is False
    [record] = [one for one in caplog.records if one.exc_info]
    assert record.message == "the write callback of Lamp.Power raised"


def test_a_device_without_callback_cannot_be_written(world: World, caplog: pytest.LogCaptureFixture) -> None:
    start(world, Device("Fan", None, [Param("Speed", None, 1)]))
    write(world, '{"Fan":{"Speed":3}}')
    assert world.published(LOCAL) == []
    assert "Fan not written: it has no write callback" in caplog.messages


@pytest.mark.parametrize(
    "text",
    ["{broken", "[]", '{"Lamp":{"Level":101}}', '{"Lamp":{"Power":1}}', '{"Lamp":[]}', b"\xff", '{"x":' * 5000, ""],
    ids=lambda value: repr(value[:20]),
)
def test_hostile_writes_reach_nobody_and_the_node_goes_on(world: World, text: str | bytes) -> None:
    lamp = Lamp()
    start(world, lamp.device)
    write(world, text)
    assert lamp.threads == []
    write(world, '{"Lamp":{"Power":true}}')
    assert world.published(LOCAL) == [{"Lamp": {"Power": True}}]


def test_writes_are_not_kept_waiting_by_a_job_callback(world: World) -> None:
    lamp = Lamp()
    inside, go_on = threading.Event(), threading.Event()

    def ota_cb(handle: OtaHandle, data: OtaData) -> None:
        inside.set()
        assert go_on.wait(WAIT_S)

    start(world, lamp.device, ota=OtaType.USING_PARAMS, config=OtaConfig(ota_cb=ota_cb))
    try:
        assert world.transport.deliver(REMOTE, f'{{"OTA":{{"URL":"{URL}"}}}}')
        assert inside.wait(WAIT_S)
        assert world.transport.deliver(REMOTE, '{"Lamp":{"Power":true}}')
        world.wait_sent(LOCAL, "Power")
    finally:
        go_on.set()
    world.settle()


def test_callbacks_far_behind_lose_writes_and_say_so(world: World, caplog: pytest.LogCaptureFixture) -> None:
    lamp = Lamp()
    go_on = threading.Event()
    lamp.device.write_cb = lambda *_: go_on.wait(WAIT_S)
    node = start(world, lamp.device)
    try:
        for _ in range(100):
            assert world.transport.deliver(REMOTE, '{"Lamp":{"Power":true}}')
            assert node.responds(WAIT_S)
    finally:
        go_on.set()
    world.settle()
    assert "Lamp not written: its callbacks are far behind, or the node ends" in caplog.messages


def test_a_device_added_later_is_reported_with_a_new_configuration(world: World) -> None:
    node = start(world)
    assert world.published(INIT) == []
    node.add_device(Lamp().device)
    world.settle()
    assert len(world.published(CONFIG)) == 2
    assert world.published(INIT) == [{"Lamp": {"Power": False, "Level": 10}}]
    assert world.sent().count(("subscribe", REMOTE)) == 1
    world.disconnect()
    node.add_service(Service("Empty"))
    world.settle()
    assert len(world.published(CONFIG)) == 2
    world.connect()
    assert len(world.published(CONFIG)) == 3
    with pytest.raises(ArgumentError, match='there is a device or service "Lamp" already'):
        node.add_device(Device("Lamp"))


def test_another_network_is_reported_with_the_configuration_and_all_values(world: World) -> None:
    node = start(world, Lamp().device)
    for network_id in ("0A1B2C3D", "0A1B2C3D", None):
        node.set_network_id(network_id)
        world.settle()
    configs = world.published(CONFIG)
    assert [one.get("attributes") for one in configs] == [None, [{"name": "network-id", "value": "0A1B2C3D"}], None]
    assert len(world.published(INIT)) == 3
    for wrong in ("0a1b2c3d", "0A1B2C3", "0A1B2C3D\n", ""):
        with pytest.raises(ArgumentError, match="expected 8 upper-case hex digits"):
            node.set_network_id(wrong)


def test_reports_before_the_start_while_it_runs_and_after_the_end(world: World) -> None:
    lamp = Lamp()
    node = world.power_on()
    node.add_device(lamp.device)
    lamp.power.update_and_report(True)
    node.start()
    world.connect()
    assert world.published(INIT)[0]["Lamp"]["Power"] is True
    lamp.level.update(11)
    node.report()
    assert world.published(LOCAL) == [{"Lamp": {"Power": True, "Level": 11}}]
    node.stop()
    with pytest.raises(OtaError, match="report: ESP_FAIL"):
        lamp.level.update_and_report(12)


def test_a_report_without_budget_is_refused_and_sent_later(world: World) -> None:
    lamp = Lamp()
    world.budget = PublishBudget(2, 100, 5.0, 1)
    start(world, lamp.device)  # configuration and initial report
    with pytest.raises(OtaError, match="report: ESP_FAIL"):
        lamp.power.update_and_report(True)
    world.advance(31)
    assert world.published(LOCAL) == [{"Lamp": {"Power": True}}]


def test_the_groups_service_of_the_configuration(world: World) -> None:
    world.groups = True
    node = start(world)
    write(world, '{"Groups":{"GroupID":"g7"}}')
    assert world.sent()[-1] == ("subscribe", f"{REMOTE}/g7")
    assert node.params.groups is not None
    start(world)
    assert world.sent()[1:3] == [("subscribe", f"{REMOTE}/g7"), ("subscribe", REMOTE)]


# ---- The params workflow ---------------------------------------------------------------------------------------


def test_a_whole_update(world: World) -> None:
    world.scripts.append(good())
    start(world, ota=OtaType.USING_PARAMS)
    assert [service["name"] for service in world.published(CONFIG)[0]["services"]] == ["OTA"]
    write(world, f'{{"OTA":{{"URL":"{URL}"}}}}')
    world.advance(10)
    assert pairs(world) == [
        ("Starting OTA Upgrade (HTTPS attempt 1/3)", "in-progress"),
        ("Downloading Firmware Image", "in-progress"),
        ("Firmware Image download complete", "in-progress"),
        ("Rebooting into new firmware (after 1 HTTPS attempt)", "in-progress"),
    ]
    assert world.restart_reasons == ["new firmware"]
    assert world.installations[0].action.url == URL
    start(world, ota=OtaType.USING_PARAMS)
    assert world.published(INIT) == [{"OTA": {"Status": "success", "Info": VERIFIED, "URL": ""}}]
    world.advance(100)
    assert world.published(OTAFETCH) == []
    assert world.store.items() == {}


def test_an_address_written_while_busy_is_refused(world: World, caplog: pytest.LogCaptureFixture) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def script(run: FakeInstallation) -> None:
        run.header()
        at_work.set()
        assert go_on.wait(WAIT_S)
        run.finish()

    world.scripts.append(script)
    node = start(world, ota=OtaType.USING_PARAMS)
    assert world.transport.deliver(REMOTE, f'{{"OTA":{{"URL":"{URL}"}}}}')
    assert at_work.wait(WAIT_S)
    assert world.transport.deliver(REMOTE, '{"OTA":{"URL":"https://x/other"}}')
    assert node.responds(WAIT_S)
    go_on.set()
    world.settle()
    assert len(world.installations) == 1
    assert "OTA.URL not taken: a job is running" in caplog.messages


def test_a_job_callback_that_raises_is_reported(world: World) -> None:
    def ota_cb(handle: OtaHandle, data: OtaData) -> None:
        assert data.ota_job_id is None
        handle.report_status(OtaStatus.IN_PROGRESS, data.url)
        raise RuntimeError("no")

    start(world, ota=OtaType.USING_PARAMS, config=OtaConfig(ota_cb=ota_cb))
    write(world, '{"OTA":{"URL":"u"}}')
    assert pairs(world) == [("u", "in-progress"), ("OTA callback failed: RuntimeError: no", "failed")]


def test_enabled_after_the_start_the_service_is_reported(world: World) -> None:
    node = start(world)
    Ota(node, type=OtaType.USING_PARAMS)
    world.settle()
    assert [one.get("services") is not None for one in world.published(CONFIG)] == [False, True]
    assert world.published(INIT) == [{"OTA": {"Status": "", "Info": "", "URL": ""}}]


def test_a_device_named_as_the_service_is_an_argument_error(world: World) -> None:
    node = world.power_on()
    node.add_device(Device("OTA"))
    with pytest.raises(ArgumentError):
        Ota(node, type=OtaType.USING_PARAMS)
    Ota(node)


# ---- Both workflows --------------------------------------------------------------------------------------------


def test_both_at_once_when_the_configuration_says_so(world: World) -> None:
    world.ota["type"] = "both"
    called: list[tuple[str, str | None]] = []

    def note(name: str) -> OtaConfig:
        return OtaConfig(ota_cb=lambda handle, data: called.append((name, data.url)))

    node = world.power_on()
    assert set(ota_types_of(node.config)) == set(OtaType)
    assert node.enable(note("params"), OtaType.USING_PARAMS) == 0
    assert node.enable(note("topics"), OtaType.USING_TOPICS) == 0
    assert node.enable(note("more"), OtaType.USING_TOPICS) == -1
    node.start()
    world.connect()
    assert world.sent()[:4] == [
        ("publish", CONFIG),
        ("subscribe", REMOTE),
        ("publish", INIT),
        ("subscribe", OTAURL),
    ]
    write(world, '{"OTA":{"URL":"u1"}}')
    world.deliver_job()
    assert called == [("params", "u1"), ("topics", URL)]


def test_the_second_workflow_is_refused_when_it_does_not(world: World) -> None:
    node = world.power_on()
    Ota(node, type=OtaType.USING_TOPICS)
    with pytest.raises(OtaError, match="enable: ESP_FAIL"):
        Ota(node, type=OtaType.USING_PARAMS)
