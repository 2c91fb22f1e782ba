"""The agent as a service: signs of life for systemd, and the unit it is started with."""

from __future__ import annotations

import configparser
import os
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.cli.agent import Watchdog, watchdog_interval_s
from rmaker_ota.cli.errors import ExitCode
from tests.sim.node_world import WAIT_S, World

UNIT = Path(__file__).resolve().parents[2] / "packaging" / "rmaker-ota-agent.service"


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


# ---- Watchdog --------------------------------------------------------------------------------------------------------


def test_the_interval_is_half_of_what_systemd_allows() -> None:
    mine = str(os.getpid())
    assert watchdog_interval_s({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": mine}) == 30.0
    assert watchdog_interval_s({"WATCHDOG_USEC": "1000000"}) == 0.5
    for other in ({}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}):
        assert watchdog_interval_s(other) is None


def test_signs_of_life_stop_while_the_node_does_not_answer() -> None:
    answers = iter([True, False, True])
    asked: queue.Queue[bool] = queue.Queue()
    told: list[str] = []
    over = threading.Event()

    def responds(timeout_s: float) -> bool:
        answer = next(answers, None)
        if answer is None:
            over.set()
            return False
        asked.put(answer)
        return answer

    with Watchdog(responds, 0.001, told.append):
        assert over.wait(WAIT_S)
    assert [asked.get() for _ in range(3)] == [True, False, True]
    assert told == ["WATCHDOG=1"] * 2


def test_nothing_runs_where_no_watchdog_is_asked_for() -> None:
    before = threading.active_count()
    with Watchdog(lambda _: True, None, lambda _: None):
        assert threading.active_count() == before


def test_a_node_responds_unless_its_thread_is_stuck(world: World) -> None:
    node = world.boot()
    assert node.responds(WAIT_S)
    stuck, free = threading.Event(), threading.Event()

    def refuse() -> bool:
        stuck.set()
        assert free.wait(WAIT_S)
        return False

    world.transport.refuse = refuse
    caller = threading.Thread(target=node.fetch)
    world.transport.go_online()  # the node reports its configuration, and hangs in that
    caller.start()
    assert stuck.wait(WAIT_S)
    assert not node.responds(0.01)
    free.set()
    assert node.responds(WAIT_S)
    caller.join(WAIT_S)
    node.stop()
    assert node.responds(0.0)


# ---- The unit --------------------------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    class Many(dict[str, str]):
        """The last of several lines of one key counts here."""

    parser = configparser.ConfigParser(strict=False, interpolation=None, dict_type=Many, comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT, encoding="utf-8")
    return parser


def test_the_unit_says_what_the_agent_expects() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert int(service["RestartPreventExitStatus"]) == ExitCode.USAGE
    assert int(service["WatchdogSec"]) >= 30
    assert re.fullmatch(r"/\S+/rmaker-ota agent --config /\S+\.toml", service["ExecStart"])
    assert service["NoNewPrivileges"] == service["DynamicUser"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/usr/bin/rmaker-ota", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False, timeout=60
    )
    assert [line for line in done.stderr.splitlines() if UNIT.name in line] == []
