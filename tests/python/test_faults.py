"""Bad input and faults: jobs that are none, callbacks that misbehave, wrong configurations, nodes of one name, and
secrets that are to be kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import esp_rmaker_ota as c
from rmaker_ota.config import _SECTIONS, SUB_DEVICE, OtaSection, load_config
from rmaker_ota.errors import ConfigError, OtaError
from rmaker_ota.rainmaker import transport_paho
from rmaker_ota.rainmaker.application import OtaConfig, OtaDiagPriv, OtaHandle
from rmaker_ota.rainmaker.messages import MAX_DEPTH
from rmaker_ota.rainmaker.node import Outcome
from rmaker_ota.rainmaker.ota import Ota
from rmaker_ota.rainmaker.transport_paho import Connection, PahoTransport
from rmaker_ota.rainmaker.types import OTA_EVENT_BASE, OtaData, OtaEvent, OtaType
from rmaker_ota.rainmaker.workflow import OPTION_RANGES
from tests.python.test_options import NEW, Gateway, configuration
from tests.python.test_transport import Heard, RawBroker
from tests.sim import https_server as sim
from tests.sim.https_server import HttpsServer
from tests.sim.node_world import URL, WAIT_S, World, good

REBOOTING = ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)")


@pytest.fixture
def world() -> Iterator[World]:
    world = World(ota={"ota_autofetch": False})
    yield world
    world.stop()


def still_works(world: World) -> None:
    """Whatever happened, the next job is done."""
    world.scripts[:] = [good()]
    world.deliver_job("J-next")
    assert world.statuses()[-1] == REBOOTING


# ---- Jobs that are none -------------------------------------------------------------------------------------------

NO_TEXT: list[object] = [None, True, 0, -1, 1.5, 10**400, [], {}, ["x"], {"a": "b"}]


@pytest.mark.parametrize("value", NO_TEXT, ids=lambda value: repr(value)[:12])
def test_a_job_id_that_is_no_text_is_nobodys_job(world: World, value: object) -> None:
    world.boot()
    world.connect()
    world.deliver({"ota_job_id": value, "url": URL})
    assert world.statuses() == []
    assert [(each.id, each.data) for each in world.events if each.base == OTA_EVENT_BASE] == [
        (OtaEvent.FAILED, "Aborted. OTA Updated ID not found in JSON")
    ]
    still_works(world)


@pytest.mark.parametrize("value", NO_TEXT, ids=lambda value: repr(value)[:12])
def test_a_url_that_is_no_text_fails_the_job(world: World, value: object) -> None:
    world.boot()
    world.connect()
    world.deliver({"ota_job_id": "J1", "url": value})
    assert world.statuses() == [("failed", "Aborted. URL not found in JSON")]
    still_works(world)


@pytest.mark.parametrize("field", ["file_md5", "stream_id", "fw_version", "file_size", "metadata"])
@pytest.mark.parametrize("value", [*NO_TEXT[:7], ["x"], "", "x" * 10_000], ids=lambda value: repr(value)[:12])
def test_an_optional_field_of_another_type_counts_as_missing(world: World, field: str, value: object) -> None:
    seen: list[OtaData] = []
    world.boot(OtaConfig(lambda _, data: seen.append(data)))
    world.connect()
    world.deliver({"ota_job_id": "J1", "url": URL, field: value})
    got = {"file_size": seen[0].filesize, "metadata": seen[0].metadata}.get(field, getattr(seen[0], field, None))
    if field == "file_size":
        assert got == (value if type(value) is int and abs(value) < 2**63 else 0)
    elif field == "metadata":
        assert got is None
    else:
        assert got == (value if isinstance(value, str) and (value or field != "fw_version") else None)


def test_of_equal_keys_the_first_counts_also_where_it_is_of_a_wrong_type(world: World) -> None:
    seen: list[OtaData] = []
    world.boot(OtaConfig(lambda _, data: seen.append(data)))
    world.connect()
    world.deliver('{"ota_job_id":"J1","ota_job_id":"J2","url":"https://a","url":7,"file_size":"1","file_size":2}')
    assert [(data.ota_job_id, data.url, data.filesize) for data in seen] == [("J1", "https://a", 0)]
    world.deliver('{"ota_job_id":null,"ota_job_id":"J3","url":"https://a"}')
    assert len(seen) == 1


@pytest.mark.parametrize("nest", ["[%s]", '{"a":%s}'])
def test_depth_has_a_limit_and_what_is_below_it_passes(world: World, nest: str) -> None:
    seen: list[OtaData] = []
    world.boot(OtaConfig(lambda _, data: seen.append(data)))
    world.connect()
    for depth, taken in ((MAX_DEPTH - 2, True), (MAX_DEPTH, False), (100_000 // len(nest), False)):
        text = "1"
        for _ in range(depth) if depth < 1000 else ():
            text = nest % text
        if depth >= 1000:
            opening, closing = nest.split("%s")
            text = opening * depth + "1" + closing * depth
        world.deliver(f'{{"ota_job_id":"J{depth}","url":"https://a","metadata":{{"x":{text}}}}}')
        assert (f"J{depth}" in [data.ota_job_id for data in seen]) is taken


# ---- Callbacks that misbehave -------------------------------------------------------------------------------------


class Odd(BaseException):
    """Not an `Exception`, as `asyncio.CancelledError` is none."""


@pytest.mark.parametrize(
    "raised",
    [ValueError("no"), SystemExit(3), KeyboardInterrupt(), Odd("odd"), RecursionError(), MemoryError()],
    ids=repr,
)
def test_whatever_a_callback_raises_is_reported_and_the_next_job_is_done(
    world: World, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    raising = [raised]

    def callback(handle: OtaHandle, data: OtaData) -> int:
        if raising:
            raise raising.pop()
        return c.esp_rmaker_ota_default_cb(handle, data)

    world.boot(OtaConfig(callback))
    world.connect()
    world.deliver_job()
    ((status, info),) = world.statuses()
    assert status == "failed"
    assert info.startswith(f"OTA callback failed: {type(raised).__name__}")
    assert "Traceback" in caplog.text
    still_works(world)


@pytest.mark.parametrize("raised", [ValueError("no"), SystemExit(3), Odd("odd")], ids=repr)
def test_whatever_diagnostics_raise_counts_as_a_failure(world: World, raised: BaseException) -> None:
    def diagnostics(state: OtaDiagPriv, priv: object) -> int:
        raise raised

    world.boot(OtaConfig(ota_diag=diagnostics))
    world.connect()
    still_works(world)
    world.advance(10)
    node = world.power_on()
    node.enable(OtaConfig(ota_diag=diagnostics), OtaType.USING_TOPICS)
    assert node.wait() == Outcome.RESTART
    assert world.restart_reasons == ["new firmware", "rollback"]


def test_whatever_an_event_handler_raises_ends_nothing(world: World) -> None:
    node = world.boot()
    heard: list[int] = []

    def handler(event: Any) -> None:
        heard.append(event.id)
        raise SystemExit

    node.events.subscribe(handler)
    world.connect()
    before = len(heard)
    assert before > 0
    still_works(world)
    assert len(heard) > before


@pytest.mark.parametrize(
    "value",
    [None, 0, -1, 1 << 100, "ESP_OK", object(), [], float("nan"), (one for one in ()), NotImplemented],
    ids=lambda value: repr(value)[:20],
)
def test_what_a_callback_returns_does_not_matter(world: World, value: object) -> None:
    world.boot(OtaConfig(lambda handle, data: value))
    world.connect()
    world.deliver_job()
    assert world.statuses() == []
    world.deliver_job("J2")
    assert world.node is not None
    assert world.node.job_id == "J2"


def test_a_callback_that_waits_for_ever_keeps_nothing_else_from_happening(world: World) -> None:
    entered, leave = threading.Event(), threading.Event()

    def callback(handle: OtaHandle, data: OtaData) -> int:
        entered.set()
        assert leave.wait(WAIT_S)
        return c.esp_rmaker_ota_default_cb(handle, data)

    world.boot(OtaConfig(callback))
    world.connect()
    job = json.dumps({"ota_job_id": "J1", "url": URL})
    assert world.transport.deliver("node/N1/otaurl", job)
    assert entered.wait(WAIT_S)
    assert c.esp_rmaker_ota_fetch() == c.ESP_OK
    assert c.esp_rmaker_ota_mark_valid() == c.ESP_ERR_INVALID_STATE
    world.transport.go_offline()
    world.transport.go_online()
    assert world.transport.deliver(
        "node/N1/otaurl", job.replace("J1", "J2")
    )  # remembered, and asked for when there is time
    assert world.node is not None
    assert world.node.responds(WAIT_S)
    world.scripts.append(good("1.0.0"))
    leave.set()
    world.settle()
    assert world.statuses()[-1] == ("rejected", "Same version received")
    assert world.node._loop.next_due() is not None  # that fetch


def every_call(world: World, handle: OtaHandle, data: OtaData) -> dict[str, object]:
    """Calls everything there is, rightly and wrongly; what came of it."""
    node = world.node
    assert node is not None
    found: dict[str, object] = {}

    def call(name: str, act: Callable[[], object]) -> None:
        try:
            found[name] = act()
        except OtaError as error:
            found[name] = type(error).__name__

    call("enable", lambda: c.esp_rmaker_ota_enable(None, c.OTA_USING_TOPICS))
    call("enable default", c.esp_rmaker_ota_enable_default)
    call("enable nothing", lambda: c.esp_rmaker_ota_enable(None, 7))
    call("report", lambda: c.esp_rmaker_ota_report_status(handle, c.OTA_STATUS_IN_PROGRESS, "here"))
    call("report NULL", lambda: c.esp_rmaker_ota_report_status(None, 1, "x"))
    call("report nonsense", lambda: c.esp_rmaker_ota_report_status(handle, "1", 5))  # type: ignore[arg-type]
    call("https", lambda: c.esp_rmaker_ota_https_cb(handle, dataclasses.replace(data, url=None)))
    call("mqtt", lambda: c.esp_rmaker_ota_mqtt_cb(None, data))
    call("fetch", c.esp_rmaker_ota_fetch)
    call("fetch later", lambda: c.esp_rmaker_ota_fetch_with_delay(3600))
    call("fetch before", lambda: c.esp_rmaker_ota_fetch_with_delay(-1))
    call("mark valid", c.esp_rmaker_ota_mark_valid)
    call("mark invalid", c.esp_rmaker_ota_mark_invalid)
    call("Ota", lambda: Ota(node))
    call("start", node.start)
    call("progress", node.progress)
    call("report parameters", node.report)
    return found


IN_A_CALLBACK = {
    "enable": c.ESP_FAIL,
    "enable default": c.ESP_FAIL,
    "enable nothing": c.ESP_ERR_INVALID_ARG,
    "report": c.ESP_OK,
    "report NULL": c.ESP_FAIL,
    "report nonsense": c.ESP_ERR_INVALID_ARG,
    "https": c.ESP_FAIL,
    "mqtt": c.ESP_FAIL,
    "fetch": c.ESP_OK,
    "fetch later": c.ESP_OK,
    "fetch before": c.ESP_ERR_INVALID_ARG,
    "mark valid": c.ESP_ERR_INVALID_STATE,
    "mark invalid": c.ESP_ERR_INVALID_STATE,
    "Ota": "OtaError",
    "start": "StateError",
    "progress": None,
    "report parameters": None,
}


@pytest.mark.parametrize("place", ["job", "event"])
def test_every_function_can_be_called_inside_a_callback(world: World, place: str) -> None:
    found: list[dict[str, object]] = []

    def callback(handle: OtaHandle, data: OtaData) -> None:
        if place == "job":
            found.append(every_call(world, handle, data))
        else:
            handle.report_status(c.OTA_STATUS_IN_PROGRESS, "event")

    def handler(event: Any) -> None:
        if place == "event" and event.data == "event":
            assert world.node is not None
            found.append(every_call(world, OtaHandle(world.node, 1), OtaData(URL)))

    node = world.boot(OtaConfig(callback))
    node.events.subscribe(handler)
    world.connect()
    world.deliver_job()
    assert found == [IN_A_CALLBACK]


def test_every_function_can_be_called_inside_diagnostics(world: World) -> None:
    found: list[dict[str, object]] = []

    def diagnostics(state: OtaDiagPriv, priv: object) -> int:
        assert world.node is not None
        data = OtaData(URL)
        seen = every_call(world, OtaHandle(world.node, 1), data)
        found.append(seen)
        return c.OTA_DIAG_STATUS_SUCCESS

    world.boot(OtaConfig(ota_diag=diagnostics))
    world.connect()
    still_works(world)
    world.advance(10)
    world.power_on().start()
    assert world.node is not None
    world.node.enable(OtaConfig(ota_diag=diagnostics), OtaType.USING_TOPICS)
    world.settle()
    (first,) = found  # it confirmed the image inside, so there was nothing left to ask
    assert first["mark valid"] == c.ESP_OK
    assert first["mark invalid"] == c.ESP_ERR_INVALID_STATE
    assert first["enable"] == c.ESP_FAIL


# ---- Two nodes of one name ----------------------------------------------------------------------------------------


def test_who_is_dropped_again_and_again_comes_back_ever_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker drops the older of two clients of one name: without this the two would chase each other."""
    broker = RawBroker()
    slept: list[float] = []
    again = threading.Semaphore(0)
    transport = PahoTransport(
        Connection("127.0.0.1", broker.port, "N1", None, reconnect_min_s=1.0, reconnect_max_s=20.0)
    )

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        again.release()

    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(transport, "_sleep", sleep)
    heard = Heard()
    try:
        transport.start(heard)
        for _ in range(8):
            wire = broker.accept()
            wire.greet()
            assert heard.next() == ("connected", False)
            wire.sock.close()
            assert heard.next()[0] == "disconnected"
            assert again.acquire(timeout=WAIT_S)
        assert slept[:8] == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0, 20.0]
        monkeypatch.setattr(transport_paho, "STEADY_S", 0.0)  # as if the next one lasted
        wire = broker.accept()
        wire.greet()
        wire.sock.close()
        assert again.acquire(timeout=WAIT_S)
        assert slept[8] == 1.0
    finally:
        transport.stop(0.0)
        broker.close()


def test_delays_are_spread_so_that_nodes_do_not_come_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    spread: list[tuple[float, float]] = []
    asked = threading.Event()

    def uniform(low: float, high: float) -> float:
        spread.append((low, high))
        asked.set()
        return 1.0

    monkeypatch.setattr(random, "uniform", uniform)
    transport = PahoTransport(Connection("127.0.0.1", 1, "N1", None, reconnect_min_s=100.0, reconnect_max_s=100.0))
    try:
        transport.start(Heard())
        assert asked.wait(WAIT_S)
    finally:
        transport.stop(0.0)
    assert spread[0] == (0.75, 1.25)


# ---- Wrong configurations -----------------------------------------------------------------------------------------


def write(directory: Path, tables: dict[str, Any]) -> Path:
    lines = []
    for section, values in tables.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = directory / "node.toml"
    path.write_text("\n".join(lines))
    return path


def wrong_values() -> Iterator[tuple[str, str, object]]:
    """Section, key, value: of every key at least one value of a wrong type, and both ends of each range passed."""
    for section, kind in _SECTIONS.items():
        hints = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            if each.name == "options":
                continue
            kinds = typing.get_args(hints[each.name]) or (hints[each.name],)
            yield section, each.name, {"a": 1} if str not in kinds else 5
            if bool in kinds:
                yield section, each.name, "true"
                yield section, each.name, 1
            limits = each.metadata.get("range") or OPTION_RANGES.get(each.name)
            if limits is not None:
                yield section, each.name, limits[0] - 1
                yield section, each.name, limits[1] + 1
                yield section, each.name, True
            if "choices" in each.metadata:
                yield section, each.name, "neither"


@pytest.mark.parametrize(("section", "key", "value"), list(wrong_values()), ids=lambda value: str(value)[:20])
def test_every_wrong_value_is_said_with_its_key(tmp_path: Path, section: str, key: str, value: object) -> None:
    tables = configuration(tmp_path)
    tables[section] = {**tables.get(section, {}), key: value}
    if isinstance(value, dict):
        tables[section][key] = ["a", 1]  # JSON has arrays as TOML has them
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, tables))
    assert str(caught.value).startswith(f"{tmp_path}/node.toml: [{section}] {key}")
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("section", sorted(set(_SECTIONS) - {"target"}))
def test_an_unknown_key_is_named_and_its_value_is_not(tmp_path: Path, section: str) -> None:
    tables = configuration(tmp_path)
    tables[section] = {**tables.get(section, {}), "pasword": "hunter2"}
    with pytest.raises(ConfigError, match=rf"\[{section}\] pasword: unknown key") as caught:
        load_config(write(tmp_path, tables))
    assert "hunter2" not in str(caught.value)


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[otta\]: unknown section, expected one of the sections .*mqtt, node, ota"):
        load_config(write(tmp_path, {**configuration(tmp_path), "otta": {}}))
    assert SUB_DEVICE not in _SECTIONS


def test_of_many_mistakes_each_is_said_in_turn(tmp_path: Path) -> None:
    """Whoever mends what is said comes to the end, and hears of every mistake once."""
    right = configuration(tmp_path)
    wrong = {
        ("node", "network_id"): "xyz",
        ("node", "colour"): "red",
        ("mqtt", "port"): 70_000,
        ("mqtt", "keepalive_s"): "long",
        ("mqtt", "reconnect_min_s"): 3000,
        ("ota", "type"): "pigeon",
        ("ota", "transport"): "pigeon",
        ("ota", "ota_max_retries"): 0,
        ("ota", "timezone"): "Mars/Olympus",
        ("ota", "server_cert"): "none.pem",
        ("restart", "mode"): "command",
        ("metrics", "path"): "no/such/folder/node.prom",
    }
    said = []
    for left in range(len(wrong), -1, -1):
        tables = {section: dict(values) for section, values in right.items()}
        for (section, key), value in wrong.items():
            tables.setdefault(section, {})[key] = value
        if not left:
            load_config(write(tmp_path, tables))
            break
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, tables))
        text = str(caught.value).replace("[restart] command", "[restart] mode")
        (named,) = [each for each in wrong if f": [{each[0]}] {each[1]}" in text]
        said.append(named)
        del wrong[named]
    assert len(said) == 12


# ---- Secrets ------------------------------------------------------------------------------------------------------

SECRET = "5f3a9c-not-for-logs"


@pytest.mark.parametrize("how", ["good", "refused", "redirected", "cut", "unreachable", "bad url"])
def test_no_secret_of_an_address_is_logged_or_reported(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "rmaker_ota")
    behaviour = {
        "refused": sim.answers(403, body=SECRET.encode()),
        "redirected": sim.redirects(f"https://user:{SECRET}@nowhere.invalid/x?token={SECRET}"),
        "cut": sim.closes_early(NEW, 1000),
    }.get(how, sim.serve(NEW))
    with HttpsServer([behaviour]) as server:
        url = server.url(f"/app.bin?X-Amz-Signature={SECRET}").replace("://", f"://user:{SECRET}@")
        if how == "unreachable":
            url = f"https://user:{SECRET}@127.0.0.1:1/app.bin?X-Amz-Signature={SECRET}"
        elif how == "bad url":
            url = f"https://user:{SECRET}@host:port/?{SECRET}"
        statuses = Gateway(tmp_path).download(url, server_cert=server.ca_pem.decode())
    assert (statuses[-1] == REBOOTING) is (how == "good")
    assert SECRET not in caplog.text
    assert SECRET not in str(statuses)


def test_no_secret_of_a_proxy_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rmaker_ota")
    gateway = Gateway(tmp_path, http_proxy=f"http://user:{SECRET}@127.0.0.1:1")
    statuses = gateway.download("https://nowhere.invalid/x")
    assert statuses[-1][0] == "failed"
    assert SECRET not in caplog.text
    assert SECRET not in str(statuses)


def test_no_key_is_part_of_what_is_shown_of_a_configuration(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, configuration(tmp_path)))
    body = (tmp_path / "node.key").read_text().splitlines()[1]
    assert body not in repr(config)
    assert not [each for each in dataclasses.fields(OtaSection) if "password" in each.name]
