"""The functions over a node in memory: what they return, what callbacks are given, on which thread, for how long."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from ctypes import byref, c_int
from pathlib import Path
from typing import Any

import pytest
import trustme

from rmaker_ota import esp_rmaker_ota
from rmaker_ota.embed import bodies
from rmaker_ota.errors import OtaError
from rmaker_ota.rainmaker.node import Outcome
from rmaker_ota.targets.base import BootState
from tests.c_abi.library import (
    Config,
    Data,
    DiagCallback,
    EventHandler,
    Info,
    JobCallback,
    LogCallback,
    handling,
    last_error,
    load,
)
from tests.sim.node_world import WAIT_S, FakeInstallation, World, good

OK, FAIL, INVALID_ARG, INVALID_STATE, NOT_FOUND, NOT_SUPPORTED, TIMEOUT = 0, -1, 0x102, 0x103, 0x105, 0x106, 0x107
PARAMS, TOPICS = 1, 2
PRIV = 0x1234


@pytest.fixture
def lib() -> Any:
    return load()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


def config(
    job: Callable[[int, Any], int] | None = None,
    diag: Callable[[Any, int], int] | None = None,
    cert: bytes | None = None,
    priv: int | None = PRIV,
) -> Config:
    """Callbacks are kept by the structure."""
    return Config(
        JobCallback() if job is None else JobCallback(job),
        DiagCallback() if diag is None else DiagCallback(diag),
        cert,
        priv,
    )


def enabled(world: World, given: Config) -> Config:
    """A node that runs and is connected, with OTA switched on through C."""
    node = world.power_on()
    assert load().esp_rmaker_ota_enable(byref(given), TOPICS) == OK
    node.start()
    world.connect()
    return given


# -- what they return


def calls(lib: Any) -> dict[str, Callable[[], int]]:
    data = Data(url=b"https://x.invalid/y")
    info = Info()
    end = c_int()
    return {
        "enable": lib.esp_rmaker_ota_enable_default,
        "enable bad type": lambda: lib.esp_rmaker_ota_enable(None, 3),
        "report": lambda: lib.esp_rmaker_ota_report_status(1, 1, b"x"),
        "report NULL": lambda: lib.esp_rmaker_ota_report_status(None, 1, b"x"),
        "default_cb NULL": lambda: lib.esp_rmaker_ota_default_cb(None, byref(data)),
        "default_cb no data": lambda: lib.esp_rmaker_ota_default_cb(1, None),
        "https_cb no data": lambda: lib.esp_rmaker_ota_https_cb(1, None),
        "https_cb no url": lambda: lib.esp_rmaker_ota_https_cb(1, byref(Data())),
        "mqtt_cb NULL": lambda: lib.esp_rmaker_ota_mqtt_cb(None, byref(data)),
        "mqtt_cb no data": lambda: lib.esp_rmaker_ota_mqtt_cb(1, None),
        "fetch": lib.esp_rmaker_ota_fetch,
        "fetch_with_delay": lambda: lib.esp_rmaker_ota_fetch_with_delay(7),
        "fetch_with_delay negative": lambda: lib.esp_rmaker_ota_fetch_with_delay(-1),
        "mark_valid": lib.esp_rmaker_ota_mark_valid,
        "mark_invalid": lib.esp_rmaker_ota_mark_invalid,
        "open NULL": lambda: lib.rmaker_ota_open(None),
        "start": lib.rmaker_ota_start,
        "stop": lib.rmaker_ota_stop,
        "info": lambda: lib.rmaker_ota_info(byref(info)),
        "info NULL": lambda: lib.rmaker_ota_info(None),
        "unregister": lambda: lib.rmaker_ota_event_handler_unregister(None, -1, EventHandler(lambda *_: None)),
        "register NULL": lambda: lib.rmaker_ota_event_handler_register(None, -1, EventHandler(), None),
        "log level": lambda: lib.rmaker_ota_set_log(9, LogCallback(), None),
        "wait": lambda: lib.rmaker_ota_wait(0, byref(end)),
    }


WITHOUT_NODE = {
    "default_cb no data": INVALID_ARG,
    "https_cb no data": INVALID_ARG,
    "https_cb no url": FAIL,
    "mqtt_cb no data": INVALID_ARG,
    "open NULL": INVALID_ARG,
    "info NULL": INVALID_ARG,
    "unregister": NOT_FOUND,
    "register NULL": INVALID_ARG,
    "log level": INVALID_ARG,
}


def test_without_a_node_every_call_says_so(lib: Any) -> None:
    for name, call in calls(lib).items():
        if name != "wait":  # there may have been one
            assert call() == WITHOUT_NODE.get(name, INVALID_STATE), name
            assert last_error(), name
            if name not in WITHOUT_NODE:
                assert "no open node" in last_error(), name


def test_a_failure_has_its_sentence_in_the_thread_that_called(lib: Any, world: World) -> None:
    enabled(world, config())
    found: list[str] = []

    def call() -> None:
        found.append(last_error())
        assert lib.esp_rmaker_ota_fetch_with_delay(-1) == INVALID_ARG
        found.append(last_error())

    assert lib.esp_rmaker_ota_enable_default() == FAIL
    mine = last_error()
    assert mine == "esp_rmaker_ota_enable_default: ESP_FAIL: OTA is on already, or the node has ended"
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == ["", "esp_rmaker_ota_fetch_with_delay: ESP_ERR_INVALID_ARG: a negative time"]
    assert last_error() == mine


def test_a_long_sentence_is_cut_between_characters(lib: Any) -> None:
    for before in ("/", "/x"):  # so that one of the cuts is in the middle of a character
        assert lib.rmaker_ota_open((before + "\N{SNOWMAN}" * 1000).encode()) == INVALID_ARG
        assert 1020 < len(last_error().encode()) < 1024
        assert last_error().rstrip("\N{SNOWMAN}").endswith(before)


def test_an_exception_in_a_body_is_an_error_code_and_logged(
    lib: Any, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.power_on()
    for error in (RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3), MemoryError()):
        monkeypatch.setattr(bodies.api, "esp_rmaker_ota_fetch", lambda error=error: (_ for _ in ()).throw(error))
        assert lib.esp_rmaker_ota_fetch() == FAIL
        assert last_error() == f"esp_rmaker_ota_fetch: ESP_FAIL: {type(error).__name__}: {error}"
    assert "Traceback" in caplog.text


def test_text_that_is_not_utf8_is_reported_all_the_same(lib: Any, world: World) -> None:
    def job(handle: int, data: Any) -> int:
        return int(lib.esp_rmaker_ota_report_status(handle, 3, b"caf\xe9 \xff"))

    kept = enabled(world, config(job))
    world.deliver_job()
    assert world.statuses() == [("failed", "caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}")]
    del kept


# -- the job callback


def test_a_job_reaches_the_callback_with_everything_that_is_known(lib: Any, world: World) -> None:
    seen: list[dict[str, Any]] = []

    def job(handle: int, data: Any) -> int:
        found = data.contents
        seen.append({name: getattr(found, name) for name, _ in Data._fields_} | {"handle": handle})
        return 77  # nonsense, and nobody minds

    kept = enabled(world, config(job, cert=b"PEM"))
    metadata = '{"a":"\N{SNOWMAN}", "b": [1,2]}'
    world.deliver(
        '{"ota_job_id":"J1","url":"https://h/\N{SNOWMAN}","file_size":65536,"fw_version":"2.0.0","file_md5":"ab",'
        f'"stream_id":"S","metadata":{metadata}}}'
    )
    assert (
        seen.pop().items()
        >= {
            "url": "https://h/\N{SNOWMAN}".encode(),
            "stream_id": b"S",
            "filesize": 65536,
            "fw_version": b"2.0.0",
            "file_md5": b"ab",
            "ota_job_id": b"J1",
            "server_cert": b"PEM",
            "priv": PRIV,
            "metadata": metadata.encode(),
        }.items()
    )
    world.deliver({"ota_job_id": "J2", "url": "u", "file_size": 1 << 40})
    found = seen.pop()
    assert found["handle"] != 0
    assert [found[name] for name in ("filesize", "fw_version", "file_md5", "stream_id", "metadata")] == [0, *[None] * 4]
    del kept


def test_a_job_of_the_params_workflow_is_an_address(lib: Any, world: World) -> None:
    seen: list[dict[str, Any]] = []

    def job(handle: int, data: Any) -> int:
        seen.append({name: getattr(data.contents, name) for name, _ in Data._fields_})
        return int(lib.esp_rmaker_ota_report_status(handle, 1, b"seen"))

    kept = config(job, cert=b"PEM")
    node = world.power_on()
    assert lib.esp_rmaker_ota_enable(byref(kept), PARAMS) == OK
    assert lib.esp_rmaker_ota_enable(byref(kept), PARAMS) == FAIL
    assert lib.esp_rmaker_ota_enable(byref(kept), TOPICS) == FAIL
    node.start()
    world.connect()
    assert world.transport.deliver("node/N1/params/remote", '{"OTA":{"URL":"https://h/i"}}')
    world.settle()
    assert seen == [
        dict.fromkeys(seen[0]) | {"url": b"https://h/i", "filesize": 0, "server_cert": b"PEM", "priv": PRIV}
    ]
    local = "$aws/rules/esp_set_params/node/N1/params/local"
    assert world.published(local) == [{"OTA": {"Info": "seen"}}, {"OTA": {"Status": "in-progress"}}]
    del kept


def test_both_workflows_each_with_its_callback(lib: Any, world: World) -> None:
    world.ota["type"] = "both"
    called: list[str] = []
    by_params = config(lambda *_: called.append("params") or 0)
    by_topics = config(lambda *_: called.append("topics") or 0)
    node = world.power_on()
    assert lib.esp_rmaker_ota_enable(byref(by_params), PARAMS) == OK
    assert lib.esp_rmaker_ota_enable(byref(by_topics), TOPICS) == OK
    assert lib.esp_rmaker_ota_enable(byref(by_topics), TOPICS) == FAIL
    node.start()
    world.connect()
    world.deliver_job()
    assert world.transport.deliver("node/N1/params/remote", '{"OTA":{"URL":"https://h/i"}}')
    world.settle()
    assert called == ["topics", "params"]
    del by_params, by_topics


def test_the_built_in_handler_over_mqtt_whatever_is_configured(lib: Any, world: World) -> None:
    """With a stream it begins, which shows in its first request; without one it says so."""
    returned: list[int] = []
    kept = enabled(world, config(lambda handle, data: returned.append(lib.esp_rmaker_ota_mqtt_cb(handle, data)) or 0))
    world.deliver_job("J1")
    assert returned == [FAIL]
    assert world.statuses() == [("failed", "Missing stream_id or filesize for MQTT OTA")]
    world.scripts.append(good())
    payload = {"ota_job_id": "J2", "url": "https://h/i", "file_size": 65536, "stream_id": "S1"}
    assert world.transport.deliver("node/N1/otaurl", json.dumps(payload))
    world.settle()
    sent = [one.topic for one in world.transport.sent if one.topic.startswith("$aws/things")]
    assert sent[:3] == [f"$aws/things/N1/streams/S1/{what}/cbor" for what in ("rejected", "data", "get")]
    assert ("in-progress", "Rebooting into new firmware (after 1 MQTT attempt)") in world.statuses()
    assert returned == [FAIL, OK]
    del kept


def test_the_built_in_handler_does_a_job_for_the_callback(lib: Any, world: World) -> None:
    returned: list[int] = []
    world.ota["ota_disable_auto_reboot"] = True

    def job(handle: int, data: Any) -> int:
        assert lib.esp_rmaker_ota_report_status(handle, 1, b"checking battery") == OK
        returned.append(lib.esp_rmaker_ota_default_cb(handle, data))
        return returned[-1]

    kept = enabled(world, config(job))
    world.scripts += [good(project="other"), good()]
    events: list[tuple[bytes, int, bytes | None]] = []
    with handling(lambda *event: events.append(event), b"RMAKER_OTA_EVENT"):
        world.deliver_job("J1")
        assert events == [
            (b"RMAKER_OTA_EVENT", 2, b"checking battery\0"),
            (b"RMAKER_OTA_EVENT", 1, None),
            (b"RMAKER_OTA_EVENT", 2, b"Starting OTA Upgrade (HTTPS attempt 1/3)\0"),
            (b"RMAKER_OTA_EVENT", 5, b"Project Name mismatch\0"),
        ]
        world.deliver_job("J2")
        assert events[-1] == (b"RMAKER_OTA_EVENT", 7, None)
    assert returned == [FAIL, OK]
    del kept


def test_a_size_beyond_an_int_reaches_the_built_in_handler_whole(lib: Any, world: World) -> None:
    kept = enabled(world, config(lambda handle, data: int(lib.esp_rmaker_ota_default_cb(handle, data))))
    world.scripts.append(good())
    world.deliver_job(file_size=5 << 30)
    assert world.installations[0].action.size == 5 << 30
    del kept


def test_an_own_url_is_what_the_built_in_handler_downloads(lib: Any, world: World) -> None:
    """The structure is the callback's to change, as on a chip."""

    def job(handle: int, data: Any) -> int:
        mine = Data(url=b"https://mirror.invalid/a", filesize=17, file_md5=b"0" * 32)
        return int(lib.esp_rmaker_ota_https_cb(handle, byref(mine)))

    kept = enabled(world, config(job))
    world.scripts.append(good())
    world.deliver_job()
    action = world.installations[0].action
    assert (action.url, action.size, action.md5) == ("https://mirror.invalid/a", 17, "0" * 32)
    del kept


def test_callbacks_come_on_one_thread_and_events_on_another(lib: Any, world: World) -> None:
    threads: dict[str, set[int]] = {"worker": set(), "events": set()}

    def job(handle: int, data: Any) -> int:
        threads["worker"].add(threading.get_native_id())
        return int(lib.esp_rmaker_ota_default_cb(handle, data))

    def diag(about: Any, priv: int) -> int:
        threads["worker"].add(threading.get_native_id())
        return 2

    def on_event(*event: object) -> None:
        threads["events"].add(threading.get_native_id())

    world.chip.states["ota_0"] = BootState.NEW
    kept = config(job, diag)
    with handling(on_event):
        enabled(world, kept)
        for number in range(3):
            world.scripts.append(good(project="other"))
            world.deliver_job(f"J{number}")
    assert [len(found) for found in threads.values()] == [1, 1]
    assert not threads["worker"] & (threads["events"] | {threading.get_native_id()})


def test_what_a_callback_was_given_is_released_and_what_it_set_is_not(lib: Any, world: World) -> None:
    """The configuration, its strings and its structure may go as soon as enabling is over."""
    seen: list[tuple[bytes, int]] = []

    def job(handle: int, data: Any) -> int:
        seen.append((data.contents.server_cert, data.contents.priv))
        return 0

    callback = JobCallback(job)  # functions stay, as they do in C
    text = ctypes.create_string_buffer(b"PEM " * 100)
    given = Config(callback, DiagCallback(), ctypes.cast(text, ctypes.c_char_p), PRIV)
    enabled(world, given)
    ctypes.memset(byref(given), 0xEE, ctypes.sizeof(given))
    ctypes.memset(text, 0xEE, len(text))
    world.deliver_job()
    assert seen == [(b"PEM " * 100, PRIV)]


# -- diagnostics


@pytest.mark.parametrize(("verdict", "state"), [(2, BootState.VALID), (1, BootState.PENDING_VERIFY)])
def test_diagnostics_decide(lib: Any, world: World, verdict: int, state: BootState) -> None:
    asked: list[tuple[int, bool, int]] = []

    def diag(about: Any, priv: int) -> int:
        asked.append((about.contents.state, about.contents.rmaker_ota, priv))
        return verdict

    world.chip.states["ota_0"] = BootState.NEW
    kept = enabled(world, config(diag=diag))
    assert asked == [(0, False, PRIV), (1, False, PRIV)]
    assert world.chip.states["ota_0"] == state
    del kept


@pytest.mark.parametrize("nonsense", [0, 3, -1, 77])
def test_a_verdict_that_is_none_counts_as_failed(lib: Any, world: World, nonsense: int) -> None:
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.deliver_job()
    world.advance(10)
    world.power_on()
    kept = config(diag=lambda about, priv: nonsense)
    assert lib.esp_rmaker_ota_enable(byref(kept), TOPICS) == OK
    assert world.chip.states["ota_1"] == BootState.INVALID
    assert world.node is not None
    assert world.node.wait() is Outcome.RESTART
    assert len(world.restart_reasons) == 2
    del kept


def test_enabling_inside_the_diagnostics_of_enabling_does_not_wait_for_itself(lib: Any, world: World) -> None:
    found: list[int] = []

    def diag(about: Any, priv: int) -> int:
        found.append(lib.esp_rmaker_ota_enable_default())
        found.append(lib.esp_rmaker_ota_enable(None, 3))
        return 2

    world.chip.states["ota_0"] = BootState.NEW
    kept = config(diag=diag)
    world.power_on()
    assert lib.esp_rmaker_ota_enable(byref(kept), TOPICS) == OK
    assert found == [FAIL, INVALID_ARG]


# -- every function, from everywhere


def test_every_function_can_be_called_inside_every_callback(lib: Any, world: World) -> None:
    every = {name: call for name, call in calls(lib).items() if name not in {"enable", "wait"}}
    found: dict[str, dict[str, int]] = {}

    def job(handle: int, data: Any) -> int:
        found["job"] = {name: call() for name, call in every.items()}
        return 0

    def diag(about: Any, priv: int) -> int:
        found[f"diag {about.contents.state}"] = {
            name: call() for name, call in every.items() if name not in {"mark_valid", "mark_invalid"}
        }
        return 2

    def on_event(base: bytes, event_id: int, data: bytes | None) -> None:
        if "diag 1" in found and "event" not in found:  # what it does posts events, and confirms the image
            found["event"] = {}
            found["event"] |= {name: call() for name, call in every.items()}

    world.chip.states["ota_0"] = BootState.NEW
    kept = config(job, diag)
    with handling(on_event):
        enabled(world, kept)
        world.deliver_job()
    assert set(found) == {"job", "diag 0", "diag 1", "event"}
    assert found["job"] == WITHOUT_NODE | {
        "enable bad type": INVALID_ARG,
        "report": OK,
        "report NULL": FAIL,
        "default_cb NULL": FAIL,
        "mqtt_cb NULL": FAIL,
        "fetch": OK,
        "fetch_with_delay": OK,
        "fetch_with_delay negative": INVALID_ARG,
        "mark_valid": INVALID_STATE,
        "mark_invalid": INVALID_STATE,
        "start": INVALID_STATE,
        "stop": INVALID_STATE,  # the node is the test's, not one that was opened
        "info": INVALID_STATE,
    }


def test_functions_can_be_called_from_many_threads_at_once(lib: Any, world: World) -> None:
    kept = enabled(world, config())
    wrong: list[tuple[str, int]] = []
    expected = {"fetch": OK, "fetch_with_delay": OK, "enable": FAIL, "report NULL": FAIL, "mark_valid": INVALID_STATE}
    begin = threading.Barrier(8)

    def run() -> None:
        begin.wait(WAIT_S)
        mine = calls(lib)
        for _ in range(25):
            for name, value in expected.items():
                got = mine[name]()
                if got != value or (got != OK and not last_error().startswith("esp_rmaker_ota_")):
                    wrong.append((name, got))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not wrong
    del kept


# -- faults of callbacks


def test_a_callback_that_does_not_return_keeps_nothing_else_from_happening(lib: Any, world: World) -> None:
    entered, leave = threading.Event(), threading.Event()

    def job(handle: int, data: Any) -> int:
        entered.set()
        assert leave.wait(WAIT_S)
        return 0

    missing = {3, 4}  # MQTT_CONNECTED, MQTT_DISCONNECTED
    heard = threading.Event()

    def hear(base: object, number: int, data: object) -> None:
        missing.discard(number)
        if not missing:
            heard.set()

    kept = enabled(world, config(job))
    with handling(hear, b"RMAKER_COMMON_EVENT"):
        assert world.transport.deliver("node/N1/otaurl", '{"ota_job_id":"J1","url":"u"}')
        assert entered.wait(WAIT_S)
        assert lib.esp_rmaker_ota_fetch() == OK
        assert lib.esp_rmaker_ota_report_status(1, 1, b"from outside") == OK
        world.transport.go_offline()
        world.transport.go_online()
        assert heard.wait(WAIT_S)
        assert world.node is not None
        world.node.stop(0.05)
    assert not leave.is_set()
    leave.set()
    del kept


def test_a_running_download_ends_when_the_node_is_stopped(lib: Any, world: World) -> None:
    returned: list[int] = []
    running = threading.Event()

    def script(run: FakeInstallation) -> None:
        run.header()
        running.set()
        run.wait_for_cancel()

    def job(handle: int, data: Any) -> int:
        returned.append(lib.esp_rmaker_ota_default_cb(handle, data))
        return 0

    kept = enabled(world, config(job))
    world.scripts.append(script)
    assert world.transport.deliver("node/N1/otaurl", '{"ota_job_id":"J1","url":"u"}')
    assert running.wait(WAIT_S)
    assert world.node is not None
    world.node.stop()
    assert returned == [FAIL]
    del kept


# -- events


def test_events_carry_what_the_specification_says(lib: Any, world: World) -> None:
    events: list[tuple[bytes, int, bytes | None]] = []
    world.scripts.append(good())
    with handling(lambda *event: events.append(event)):
        kept = enabled(world, config())
        world.deliver_job()
        world.disconnect()
    common = [(number, data) for base, number, data in events if base == b"RMAKER_COMMON_EVENT"]
    assert (0, b"\x0a") in common  # int8_t
    assert (3, None) in common
    assert (4, None) in common
    assert all(data is not None and len(data) == 4 for number, data in common if number == 5)
    assert [number for base, number, _ in events if base == b"RMAKER_EVENT"] == [1, 10, 9]
    assert next((number, data is None) for base, number, data in events if base == b"RMAKER_OTA_EVENT") == (1, True)
    del kept


def test_the_base_of_an_event_is_the_variable_of_the_header(lib: Any, world: World) -> None:
    bases: set[int] = set()

    @EventHandler
    def handler(arg: int, base: int, number: int, data: int, size: int) -> None:
        assert arg == PRIV
        bases.add(base)

    assert lib.rmaker_ota_event_handler_register(None, -1, handler, PRIV) == OK
    kept = enabled(world, config(lambda handle, data: int(lib.esp_rmaker_ota_report_status(handle, 3, None))))
    world.deliver_job()
    assert lib.rmaker_ota_event_handler_unregister(None, -1, handler) == OK
    names = ("RMAKER_OTA_EVENT", "RMAKER_COMMON_EVENT", "RMAKER_EVENT")
    assert bases == {ctypes.c_void_p.in_dll(lib, name).value for name in names}
    certificate = ctypes.c_char_p.in_dll(lib, "ESP_RMAKER_OTA_DEFAULT_SERVER_CERT").value
    assert certificate == esp_rmaker_ota.ESP_RMAKER_OTA_DEFAULT_SERVER_CERT.encode()
    del kept


def test_a_handler_hears_only_what_it_asked_for(lib: Any, world: World) -> None:
    heard: list[tuple[bytes, int]] = []
    with handling(lambda base, number, data: heard.append((base, number)), b"RMAKER_EVENT", 9):
        kept = enabled(world, config())
    assert heard == [(b"RMAKER_EVENT", 9)]
    del kept


def test_unregistering_waits_for_a_handler_that_runs(lib: Any, world: World) -> None:
    entered, leave, over = threading.Event(), threading.Event(), threading.Event()

    @EventHandler
    def handler(*event: object) -> None:
        entered.set()
        assert leave.wait(WAIT_S)

    def unregister() -> None:
        assert lib.rmaker_ota_event_handler_unregister(b"RMAKER_EVENT", 1, handler) == OK
        over.set()

    assert lib.rmaker_ota_event_handler_register(b"RMAKER_EVENT", 1, handler, None) == OK
    node = world.power_on()
    assert lib.esp_rmaker_ota_enable_default() == OK
    node.start()
    assert entered.wait(WAIT_S)
    thread = threading.Thread(target=unregister)
    thread.start()
    assert not over.wait(0.05)
    leave.set()
    thread.join(WAIT_S)
    assert over.is_set()


def test_a_handler_may_unregister_itself(lib: Any, world: World) -> None:
    found: list[int] = []

    @EventHandler
    def handler(*event: object) -> None:
        found.append(lib.rmaker_ota_event_handler_unregister(None, -1, handler))

    assert lib.rmaker_ota_event_handler_register(None, -1, handler, None) == OK
    kept = enabled(world, config())
    assert found == [OK]
    del kept


# -- log


@pytest.fixture
def quiet(lib: Any) -> Iterator[logging.Logger]:
    """The logger, and the test session's own settings of it afterwards."""
    logger = logging.getLogger("rmaker_ota")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    lib.rmaker_ota_set_log(2, LogCallback(), None)
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_log_entries_come_in_order_on_a_thread_of_their_own(lib: Any, quiet: logging.Logger) -> None:
    entries: list[tuple[int, int, bytes, bytes]] = []
    threads: set[int] = set()

    @LogCallback
    def write(arg: int, level: int, tag: bytes, text: bytes) -> None:
        entries.append((arg, level, tag, text))
        threads.add(threading.get_native_id())
        assert lib.esp_rmaker_ota_fetch() == INVALID_STATE  # calls are safe here, too; what they log comes later

    assert lib.rmaker_ota_set_log(3, write, PRIV) == OK
    logging.getLogger("rmaker_ota.x").debug("not this")
    logging.getLogger("rmaker_ota.x").info("one %s", "\N{SNOWMAN}")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("rmaker_ota.x").exception("two")
    assert lib.rmaker_ota_set_log(0, LogCallback(), None) == OK
    assert entries[0] == (PRIV, 3, b"rmaker_ota.x", "one \N{SNOWMAN}".encode())
    assert entries[1][:3] == (PRIV, 1, b"rmaker_ota.x")
    assert entries[1][3].startswith(b"two\nTraceback")
    assert entries[1][3].endswith(b"ValueError: why")
    assert threads == threads - {threading.get_native_id()}
    count = len(entries)
    logging.getLogger("rmaker_ota.x").error("nobody hears")
    assert len(entries) == count


def test_a_log_callback_that_hangs_costs_entries_and_nothing_else(lib: Any, quiet: logging.Logger) -> None:
    entered, leave, emptied = threading.Event(), threading.Event(), threading.Event()
    texts: list[bytes] = []

    @LogCallback
    def write(arg: int, level: int, tag: bytes, text: bytes) -> None:
        entered.set()
        assert leave.wait(WAIT_S)
        texts.append(text)
        if len(texts) == bodies.LOG_CAPACITY:
            emptied.set()

    assert lib.rmaker_ota_set_log(3, write, None) == OK
    logger = logging.getLogger("rmaker_ota.x")
    logger.info("first")
    assert entered.wait(WAIT_S)
    for number in range(bodies.LOG_CAPACITY + 50):
        logger.info("%d", number)
    leave.set()
    assert emptied.wait(WAIT_S)
    logger.info("again")
    assert lib.rmaker_ota_set_log(0, LogCallback(), None) == OK
    assert texts[-2:] == [b"50 entries were dropped", b"again"]


# -- a node of a configuration file


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    from rmaker_ota.esp_build import build_image
    from rmaker_ota.targets.create import create_flash_image
    from tests.sim.mosquitto import issue_identity

    authority = trustme.CA()
    identity = issue_identity(authority, tmp_path, "N1")
    create_flash_image(tmp_path / "flash.bin", build_image(version="1.0.0", project_name="gw"))
    path = tmp_path / "node.toml"
    path.write_text(
        f"""
        [node]
        id = "N1"
        [mqtt]
        host = "127.0.0.1"
        port = 1
        cert = "{identity.cert_file}"
        key = "{identity.key_file}"
        [target]
        uri = "esp32-image:flash.bin"
        [state]
        path = "node.state"
        [restart]
        mode = "none"
        """
    )
    return path


def test_a_node_is_opened_started_waited_for_and_stopped(lib: Any, config_file: Path) -> None:
    path = str(config_file).encode()
    for _ in range(2):  # and again
        assert lib.rmaker_ota_open(path) == OK
        try:
            assert lib.rmaker_ota_open(path) == INVALID_STATE
            assert last_error() == "rmaker_ota_open: ESP_ERR_INVALID_STATE: node N1 is open"
            info = Info()
            assert lib.rmaker_ota_info(byref(info)) == OK
            assert (info.node_id, info.project, info.version, info.slot, info.connected) == (
                b"N1",
                b"gw",
                b"1.0.0",
                b"ota_0",
                False,
            )
            assert lib.esp_rmaker_ota_enable_default() == OK
            assert lib.rmaker_ota_start() == OK
            assert lib.rmaker_ota_start() == INVALID_STATE
            end = c_int(-5)
            assert lib.rmaker_ota_wait(0, byref(end)) == TIMEOUT
            assert end.value == -5
            lib.rmaker_ota_wake()
            assert lib.rmaker_ota_wait(-1, byref(end)) == OK
            assert end.value == 3
            assert lib.rmaker_ota_wait(1, None) == TIMEOUT
        finally:
            assert lib.rmaker_ota_stop() == OK
        assert lib.rmaker_ota_wait(-1, byref(end)) == OK
        assert end.value == 0
        assert lib.rmaker_ota_stop() == INVALID_STATE


def test_stopping_wakes_who_waits_and_may_be_done_by_many(lib: Any, config_file: Path) -> None:
    assert lib.rmaker_ota_open(str(config_file).encode()) == OK
    assert lib.rmaker_ota_start() == OK
    ends: list[int] = []
    results: list[int] = []

    def wait() -> None:
        end = c_int()
        assert lib.rmaker_ota_wait(-1, byref(end)) == OK
        ends.append(end.value)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    threads += [threading.Thread(target=lambda: results.append(lib.rmaker_ota_stop())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert ends == [0, 0]
    assert OK in results
    assert set(results) <= {OK, INVALID_STATE}


def test_a_node_may_be_stopped_by_its_own_event(lib: Any, config_file: Path) -> None:
    results: list[int] = []

    def on_event(base: bytes, number: int, data: bytes | None) -> None:
        results.append(lib.rmaker_ota_stop())

    with handling(on_event, b"RMAKER_EVENT", 1):
        assert lib.rmaker_ota_open(str(config_file).encode()) == OK
        assert lib.rmaker_ota_start() == OK
        end = c_int()
        assert lib.rmaker_ota_wait(20_000, byref(end)) == OK
        assert end.value == 0
    assert results == [OK]
    assert lib.rmaker_ota_stop() == INVALID_STATE


def test_a_node_that_wants_to_be_restarted_says_so(lib: Any, config_file: Path) -> None:
    """Diagnostics refuse the image inside enabling; somebody else restarts. The next opening is the next boot."""
    from rmaker_ota.esp_build import build_image
    from rmaker_ota.install import install

    target = f"esp32-image:{config_file.parent / 'flash.bin'}"
    install(build_image(version="2.0.0", project_name="gw"), target)
    path = str(config_file).encode()
    assert lib.rmaker_ota_open(path) == OK
    info = Info()
    assert lib.rmaker_ota_info(byref(info)) == OK
    assert info.version == b"2.0.0"
    kept = config(diag=lambda about, priv: 0)
    assert lib.esp_rmaker_ota_enable(byref(kept), TOPICS) == OK
    assert lib.rmaker_ota_start() == OK
    end = c_int()
    assert lib.rmaker_ota_wait(20_000, byref(end)) == OK
    assert end.value == 1
    assert lib.rmaker_ota_stop() == OK
    assert lib.rmaker_ota_open(path) == OK
    assert lib.rmaker_ota_info(byref(info)) == OK
    assert info.version == b"1.0.0"
    assert lib.rmaker_ota_stop() == OK


def test_a_node_that_failed_says_why_to_who_waits(lib: Any, config_file: Path) -> None:
    from rmaker_ota.rainmaker.node import default_node

    assert lib.rmaker_ota_open(str(config_file).encode()) == OK
    node = default_node()
    assert node is not None
    node._failure = OtaError("cannot restart: no \N{SNOWMAN}")
    node._ended.set()
    end = c_int()
    assert lib.rmaker_ota_wait(20_000, byref(end)) == OK
    assert end.value == 2
    assert last_error() == "cannot restart: no \N{SNOWMAN}"
    assert lib.rmaker_ota_stop() == OK


def test_long_names_are_cut_between_characters(lib: Any, config_file: Path) -> None:
    text = config_file.read_text().replace('uri = "esp32-image:flash.bin"', 'uri = "file:flash.bin"')
    names = f'[node]\nproject = "x{"é" * 40}"\nversion = "{"1" * 64}"'
    config_file.write_text(text.replace("[node]", names))
    assert lib.rmaker_ota_open(str(config_file).encode()) == OK, last_error()
    info = Info()
    assert lib.rmaker_ota_info(byref(info)) == OK
    assert lib.rmaker_ota_stop() == OK
    assert info.project.decode() == "x" + "é" * 31
    assert (info.version, info.slot) == (b"1" * 63, b"")


@pytest.mark.parametrize(
    ("line", "said"),
    [("[nothing]", "[nothing]"), ("[ota]\ntype = 5", "[ota] type"), ("= =", "not TOML")],
)
def test_a_wrong_configuration_is_said_with_its_place(lib: Any, config_file: Path, line: str, said: str) -> None:
    config_file.write_text(config_file.read_text() + line)
    assert lib.rmaker_ota_open(str(config_file).encode()) == INVALID_ARG
    assert said in last_error()
    assert str(config_file) in last_error()


def test_the_certificate_of_the_configuration_file_serves_where_c_gives_none(lib: Any, tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text("PEM OF THE FILE")
    for given, expected in ((None, b"PEM OF THE FILE"), (b"MINE", b"MINE")):
        world = World(ota={"server_cert": tmp_path / "server.pem"})
        seen: list[bytes] = []

        def job(handle: int, data: Any, seen: list[bytes] = seen) -> int:
            seen.append(data.contents.server_cert)
            return 0

        kept = enabled(world, config(job, cert=given))
        world.deliver_job()
        world.stop()
        assert seen == [expected]
        del kept


# -- nothing stays


def test_a_stopped_node_is_forgotten(lib: Any, config_file: Path) -> None:
    from rmaker_ota.rainmaker.node import default_node

    assert lib.rmaker_ota_open(str(config_file).encode()) == OK
    node = weakref.ref(default_node() or object())
    assert lib.esp_rmaker_ota_enable_default() == OK
    assert lib.rmaker_ota_start() == OK
    assert lib.rmaker_ota_stop() == OK
    gc.collect()
    assert node() is None


def test_nothing_is_left_of_a_job() -> None:
    """Counts what is allocated, not only what is resident: 1000 jobs of 9 kB in strings and structures each.

    What a first use fills (tables that double, caches) is some ten kB more after the second thousand.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.c_abi.leak", "1000"], capture_output=True, text=True, check=True, timeout=100
    )
    found = json.loads(done.stdout)
    grown = {name: found["after"][name] - found["before"][name] for name in found["after"]}
    assert grown["blocks"] < found["jobs"], grown
    assert grown["malloc"] < 300 * found["jobs"], grown
    assert grown["rss"] < 2 << 20, grown
