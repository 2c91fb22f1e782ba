"""The API an application sees: names, numbers, return values of the C functions, exceptions of `Ota`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rmaker_ota as ota
from rmaker_ota.rainmaker.ota import Ota
from rmaker_ota.rainmaker.types import OtaData
from rmaker_ota.targets.base import BootState
from tests.sim.node_world import OTAFETCH, FakeInstallation, World, good

OK, FAIL = ota.EspErr.OK, ota.EspErr.FAIL
INVALID_ARG, INVALID_STATE = ota.EspErr.INVALID_ARG, ota.EspErr.INVALID_STATE


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


# -- importing


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = """
import sys
import rmaker_ota
heavy = {"paho", "cryptography", "rich", "click", "sqlite3", "ssl", "rmaker_ota.ota_core", "asyncio"} & set(sys.modules)
assert not heavy, heavy
rmaker_ota.esp_rmaker_ota_enable, rmaker_ota.Node, rmaker_ota.OtaConfig
heavy = {"paho", "cryptography", "rich", "click"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_public_name_is_there() -> None:
    assert len(set(ota.__all__)) == len(ota.__all__)
    for name in ota.__all__:
        assert getattr(ota, name) is not None
        assert name in dir(ota)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ota.nothing


@pytest.mark.parametrize("first", ["import rmaker_ota.install", "rmaker_ota.install", "from rmaker_ota import install"])
def test_install_is_a_function_whoever_imports_the_module_of_that_name_first(first: str) -> None:
    program = f"""
import rmaker_ota
{first}
from rmaker_ota.install import InstallOptions, Installer
from rmaker_ota import install
for each in (rmaker_ota.install, install):
    try:
        each("/no/such/image", "file:/no/such/target")
    except rmaker_ota.OtaError:
        pass
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_numbers_are_those_of_the_c_headers() -> None:
    assert [int(event) for event in ota.OtaEvent] == list(range(8))
    assert (ota.RMAKER_OTA_EVENT_STARTING, ota.RMAKER_OTA_EVENT_REQ_FOR_REBOOT) == (1, 7)
    assert [
        ota.OTA_STATUS_IN_PROGRESS,
        ota.OTA_STATUS_SUCCESS,
        ota.OTA_STATUS_FAILED,
        ota.OTA_STATUS_DELAYED,
        ota.OTA_STATUS_REJECTED,
    ] == [1, 2, 3, 4, 5]
    assert (ota.OTA_USING_PARAMS, ota.OTA_USING_TOPICS) == (1, 2)
    assert (ota.OTA_DIAG_STATUS_FAIL, ota.OTA_DIAG_STATUS_PENDING, ota.OTA_DIAG_STATUS_SUCCESS) == (0, 1, 2)
    assert (ota.OTA_DIAG_STATE_INIT, ota.OTA_DIAG_STATE_POST_MQTT) == (0, 1)
    assert ota.RMAKER_OTA_EVENT == "RMAKER_OTA_EVENT"
    assert ota.esp_err_to_name(0x7002) == "ESP_ERR_HTTP_CONNECT"
    assert ota.esp_err_to_name(-1) == "ESP_FAIL"
    assert ota.esp_err_to_name(0) == "ESP_OK"


def test_structures_have_the_fields_of_c_in_their_order() -> None:
    assert list(OtaData.__dataclass_fields__) == [
        "url",
        "stream_id",
        "filesize",
        "fw_version",
        "file_md5",
        "ota_job_id",
        "server_cert",
        "priv",
        "metadata",
    ]
    assert list(ota.OtaConfig.__dataclass_fields__) == ["ota_cb", "ota_diag", "server_cert", "priv"]
    assert list(ota.OtaDiagPriv.__dataclass_fields__) == ["state", "rmaker_ota"]


# -- the call matrix of the specification, section 1.4

CALLS: dict[str, Callable[[], ota.EspErr]] = {
    "enable": ota.esp_rmaker_ota_enable_default,
    "enable bad type": lambda: ota.esp_rmaker_ota_enable(None, 3),
    "mark_valid": ota.esp_rmaker_ota_mark_valid,
    "mark_invalid": ota.esp_rmaker_ota_mark_invalid,
    "fetch": ota.esp_rmaker_ota_fetch,
    "fetch_with_delay": lambda: ota.esp_rmaker_ota_fetch_with_delay(7),
    "fetch_with_delay negative": lambda: ota.esp_rmaker_ota_fetch_with_delay(-1),
    "report_status NULL": lambda: ota.esp_rmaker_ota_report_status(None, ota.OTA_STATUS_SUCCESS, "x"),
    "default_cb NULL": lambda: ota.esp_rmaker_ota_default_cb(None, OtaData("https://x/y")),
    "https_cb without url": lambda: ota.esp_rmaker_ota_https_cb(None, OtaData(None)),
}


def call_all(*names: str) -> dict[str, ota.EspErr]:
    return {name: CALLS[name]() for name in names}


ALWAYS = {
    "enable bad type": INVALID_ARG,
    "fetch_with_delay negative": INVALID_ARG,
    "report_status NULL": FAIL,
    "default_cb NULL": FAIL,
    "https_cb without url": FAIL,
}


def test_without_a_node_every_call_says_so() -> None:
    found = call_all(*CALLS)
    assert found.pop("https_cb without url") == FAIL
    assert set(found.values()) == {INVALID_STATE}


def test_before_enable(world: World) -> None:
    world.power_on().start()
    world.connect()
    expected = {"mark_valid": INVALID_STATE, "mark_invalid": INVALID_STATE, "fetch": OK, "fetch_with_delay": OK}
    assert call_all(*ALWAYS, *expected) == ALWAYS | expected
    assert CALLS["enable"]() == OK


def test_before_enable_with_an_image_that_is_not_confirmed(world: World) -> None:
    world.chip.states["ota_0"] = BootState.NEW
    world.power_on()
    assert world.chip.states["ota_0"] == BootState.PENDING_VERIFY
    assert CALLS["mark_valid"]() == INVALID_ARG


def test_enabled_and_idle(world: World) -> None:
    world.boot()
    assert CALLS["fetch"]() == INVALID_STATE  # not connected
    world.connect()
    expected = {"enable": FAIL, "mark_valid": INVALID_STATE, "mark_invalid": INVALID_STATE, "fetch": OK}
    assert call_all(*ALWAYS, *expected) == ALWAYS | expected


def test_a_failed_enable_leaves_room_for_another(world: World) -> None:
    node = world.power_on()
    assert CALLS["enable bad type"]() == INVALID_ARG
    seen: list[OtaData] = []
    assert ota.esp_rmaker_ota_enable(ota.OtaConfig(lambda _, data: seen.append(data)), ota.OTA_USING_TOPICS) == OK
    assert ota.esp_rmaker_ota_enable(ota.OtaConfig(lambda *_: 1 / 0), ota.OTA_USING_TOPICS) == FAIL
    node.start()
    world.connect()
    world.deliver_job()
    assert [data.ota_job_id for data in seen] == ["J1"]


def test_while_a_job_runs(world: World) -> None:
    found: dict[str, ota.EspErr] = {}

    def busy(run: FakeInstallation) -> None:
        run.header()
        found.update(call_all("enable", "mark_valid", "mark_invalid", "fetch", *ALWAYS))
        run.finish()

    world.boot()
    world.connect()
    world.scripts.append(busy)
    world.deliver_job()
    expected = {"enable": FAIL, "mark_valid": INVALID_STATE, "mark_invalid": INVALID_STATE, "fetch": OK}
    assert found == ALWAYS | expected


def pending(world: World, diag: int = ota.DiagStatus.PENDING) -> None:
    """The world after an update whose image waits for a verdict."""
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.deliver_job()
    world.advance(10)
    world.boot(ota.OtaConfig(None, lambda *_: diag))
    world.connect()


def test_while_an_image_waits_for_the_verdict(world: World) -> None:
    pending(world)
    assert call_all("enable", "fetch", *ALWAYS) == ALWAYS | {"enable": FAIL, "fetch": OK}
    assert CALLS["mark_valid"]() == OK
    assert CALLS["mark_valid"]() == INVALID_STATE


def test_refusing_the_image_restarts(world: World) -> None:
    pending(world)
    assert CALLS["mark_invalid"]() == OK
    world.settle()
    assert len(world.restart_reasons) == 2


def test_refusing_the_only_image_is_the_boot_layers_error(world: World) -> None:
    pending(world)
    world.chip.states["ota_0"] = BootState.INVALID
    assert CALLS["mark_invalid"]() == ota.EspErr.OTA_ROLLBACK_FAILED
    world.settle()
    assert len(world.restart_reasons) == 1


def test_a_fetch_that_cannot_be_sent(world: World) -> None:
    world.boot()
    world.connect()
    world.transport.refuse = lambda: True
    assert CALLS["fetch"]() == FAIL
    world.transport.refuse = lambda: False
    world.advance(31)
    assert len(world.published(OTAFETCH)) >= 1


def test_a_second_fetch_before_the_acknowledgement_sends_nothing(world: World) -> None:
    world.acknowledge = False
    world.ota = {"ota_autofetch": False}
    world.boot()
    world.connect()
    assert [CALLS["fetch"](), CALLS["fetch"]()] == [OK, OK]
    assert len(world.published(OTAFETCH)) == 1


def test_reports_outside_a_callback(world: World) -> None:
    handles: list[ota.OtaHandle] = []
    world.boot(ota.OtaConfig(lambda handle, _: handles.append(handle)))
    world.connect()
    world.deliver_job()
    (handle,) = handles
    assert ota.esp_rmaker_ota_report_status(handle, ota.OTA_STATUS_SUCCESS, "by hand") == OK
    assert world.statuses() == [("success", "by hand")]
    world.transport.refuse = lambda: True
    assert ota.esp_rmaker_ota_report_status(handle, ota.OTA_STATUS_FAILED, "x") in (FAIL, INVALID_STATE)
    world.settle()
    assert [event.data for event in world.events if event.base == "RMAKER_OTA_EVENT"] == ["by hand", "x"]


def test_arguments_of_a_wrong_kind_are_refused_and_nobody_waits_for_ever(world: World) -> None:
    anything: Any = ota
    answers: list[ota.EspErr] = []

    def callback(handle: ota.OtaHandle, data: ota.OtaData) -> int:
        answers.append(anything.esp_rmaker_ota_report_status(handle, 1, 5))
        answers.append(anything.esp_rmaker_ota_report_status(handle, 2, b"bytes"))
        answers.append(anything.esp_rmaker_ota_report_status(handle, "success", "text"))
        answers.append(anything.esp_rmaker_ota_default_cb(handle, None))
        return OK

    world.boot(ota.OtaConfig(callback))
    world.connect()
    world.deliver_job()
    assert answers == [INVALID_ARG, INVALID_ARG, INVALID_ARG, FAIL]
    for seconds in ("5", None, 2.5, float("inf"), 2**31, 10**12, 10**400):
        assert anything.esp_rmaker_ota_fetch_with_delay(seconds) == INVALID_ARG
    assert anything.esp_rmaker_ota_fetch_with_delay(2**31 - 1) == OK
    assert world.statuses() == []
    assert ota.esp_rmaker_ota_fetch() == OK


def test_a_callback_as_in_the_documentation(world: World) -> None:
    returned: list[ota.EspErr] = []

    def my_cb(handle: ota.OtaHandle, data: ota.OtaData) -> int:
        handle.report_status(ota.OtaStatus.IN_PROGRESS, "checking battery")
        returned.append(ota.esp_rmaker_ota_default_cb(handle, data))
        return returned[-1]

    cfg = ota.OtaConfig(ota_cb=my_cb, ota_diag=None, server_cert=None, priv=None)
    node = world.power_on()
    assert ota.esp_rmaker_ota_enable(cfg, ota.OtaType.USING_TOPICS) == OK
    node.start()
    world.connect()
    world.scripts += [good(project="other"), good()]
    world.deliver_job("J1")
    world.deliver_job("J2")
    assert returned == [FAIL, OK]
    assert [info for _, info in world.statuses()].count("checking battery") == 2


# -- Ota


def test_ota_raises_what_the_c_names_return(world: World) -> None:
    node = world.power_on()
    with pytest.raises(ota.ArgumentError) as caught:
        Ota(node, type=3)
    assert caught.value.esp_err == INVALID_ARG
    service = Ota(node)
    with pytest.raises(ota.OtaError) as failed:
        Ota(node)
    assert failed.value.esp_err == FAIL
    node.start()
    with pytest.raises(ota.StateError) as state:
        service.fetch()
    assert state.value.esp_err == INVALID_STATE
    world.connect()
    service.fetch()
    service.fetch_with_delay(1)
    with pytest.raises(ota.ArgumentError):
        service.fetch_with_delay(-1)
    for call in (service.mark_valid, service.mark_invalid):
        with pytest.raises(ota.StateError):
            call()
    with pytest.raises(ota.StateError):
        service.report_status(ota.OtaStatus.SUCCESS)
    with pytest.raises(ota.OtaError):
        service.default_cb(ota.OtaHandle(node, 1), OtaData(None))


def test_two_nodes_in_one_process_do_not_meet(world: World) -> None:
    other = World()
    try:
        world.boot()
        other.boot()
        assert ota.default_node() is world.node
        world.connect()
        other.connect()
        other.scripts.append(good())
        other.deliver_job()
        assert world.statuses() == []
        assert other.statuses()[-1][1].startswith("Rebooting")
        world.stop()
        assert ota.default_node() is other.node
    finally:
        other.stop()
    assert ota.default_node() is None
