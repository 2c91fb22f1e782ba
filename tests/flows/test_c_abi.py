"""C programs as nodes: the example gateway through updates and rollbacks, and programs whose callbacks misbehave.

Real broker with mutual TLS, real HTTPS, the job service, compiled programs started without any environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.cloud.service import CloudService, ServiceThread
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import BootState
from tests.c_abi.compiled import HERE, ROOT, build_program, compiler
from tests.c_abi.library import WHY_NOT
from tests.flows.test_cloud_mosquitto import Watch, config_for
from tests.sim.agent import WAIT_S, Agent, Cloud
from tests.sim.c_program import CProgram
from tests.sim.https_server import HttpsServer, serve, stalls
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = [
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

NEW = build_image(version="2.0.0", project_name="gw", size=512 * 1024)
LISTENS = "node/N1/otaurl (QoS 1)"  # what the broker logs of the node's subscription


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built by its own Makefile."""
    compiler("cc")
    folder = tmp_path_factory.mktemp("gateway")
    for name in ("gateway.c", "Makefile"):
        shutil.copy(ROOT / "examples" / "gateway" / name, folder)
    command = ["make", "-s", "-C", str(folder), f"RMAKER_OTA={sys.executable} -m rmaker_ota", "CFLAGS=-O2 -g -Werror"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "gateway"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program(HERE / "faults.c", tmp_path_factory.mktemp("faults") / "faults")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    (tmp_path / "broker").mkdir()
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


def running(agent: Agent) -> tuple[str, BootState]:
    """Version and state of what runs, while the node is stopped."""
    with open_target(f"esp32-image:{agent.flash}", read_only=True) as target:
        slot = target.running_slot()
        assert slot is not None
        app = target.describe(slot)
        assert app is not None
        return app.version, target.boot_state(slot)


def offer(service: CloudService, version: str) -> str:
    """A job with an image of that version; returns its id."""
    with service.images.begin("app.bin") as writer:
        writer.write(build_image(version=version, project_name="gw", size=256 * 1024))
        return service.jobs.create(writer.commit().sha256, ["N1"]).id


def test_the_example_updates_and_rolls_back(gateway: Path, broker: Mosquitto, tmp_path: Path) -> None:
    """An update that is kept, where the program restarts itself; one that is not, where the library restarts it."""
    watch = Watch()
    config = config_for(broker, tmp_path)
    with ServiceThread(config, wait_ready_s=WAIT_S, on_change=watch) as service:
        options = {"ota_disable_auto_reboot": True}
        ca = (tmp_path / "ca.crt").read_bytes()
        with CProgram(gateway, tmp_path / "node", broker, server_ca=ca, ota=options) as node:
            node.start()
            broker.wait_log(LISTENS)
            good = offer(service, "2.0.0")
            node.wait_log("diagnostics with MQTT of 2.0.0: works")
            assert watch.wait(good, "N1", "success").info == "OTA Upgrade finished and verified successfully"
            bad = offer(service, "2.1.0-broken")
            node.wait_log("diagnostics with MQTT of 2.1.0-broken: does not work")
            assert watch.wait(bad, "N1", "rejected").info == "Firmware rolled back"
            node.wait_log("node N1 runs gw 2.0.0 from ota_1", count=2)
            assert node.stop() == 0
            told = [line for line in node.log.splitlines() if not line.startswith(("I ", "W ", "event 2"))]
            assert told.count("connected") == 4
            told = [line for line in told if line != "connected"]  # on a thread of its own, so before or after the next
            assert told == [
                "node N1 runs gw 1.0.0 from ota_0",
                f"job {good}: version 2.0.0, 262144 bytes, for the hall",
                "event 1 ",
                "event 7 ",
                "restarting",
                "node N1 runs gw 2.0.0 from ota_1",
                "diagnostics at the start of 2.0.0: works",
                "diagnostics with MQTT of 2.0.0: works",
                "event 3 OTA Upgrade finished and verified successfully",
                f"job {bad}: version 2.1.0-broken, 262144 bytes, for the hall",
                "event 1 ",
                "event 7 ",
                "restarting",
                "node N1 runs gw 2.1.0-broken from ota_0",
                "diagnostics at the start of 2.1.0-broken: does not work",
                "diagnostics with MQTT of 2.1.0-broken: does not work",
                "node N1 runs gw 2.0.0 from ota_1",
                "event 5 Firmware rolled back",
                "stopping",
            ]
            reports = [entry.info for entry in watch.entries if entry.job == good and entry.info]
            assert reports[0] == "Battery is charged"
        assert running(node) == ("2.0.0", BootState.VALID)


def test_a_program_that_cannot_begin_says_why(gateway: Path, tmp_path: Path) -> None:
    def begin(**environment: str) -> str:
        done = subprocess.run(
            [gateway, "none.toml"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        return done.stderr

    assert "cannot open the node: rmaker_ota_open: ESP_ERR_INVALID_ARG: none.toml: No such file" in begin()
    assert begin(RMAKER_OTA_PYTHON="/no/python") == (
        "gateway: cannot start: Python cannot be used: RMAKER_OTA_PYTHON=/no/python: No such file or directory\n"
    )


# -- callbacks that misbehave, and programs that end while a job runs

ENDS = {
    "main-returns": 6,
    "main-stops": 6,
    "thread-exits": 4,
    "event-exits": 5,
    "callback-exits": 3,
}


@pytest.mark.parametrize("mode", ENDS)
def test_a_program_may_end_while_a_job_runs(mode: str, faults: Path, broker: Mosquitto, tmp_path: Path) -> None:
    """It ends with its own exit code, and takes the job anew when it is started again."""
    with (
        HttpsServer([serve(NEW)] if mode == "callback-exits" else [stalls(NEW, len(NEW) // 2), serve(NEW)]) as server,
        Cloud(broker) as cloud,
        CProgram(faults, tmp_path / "node", broker, server_ca=server.ca_pem) as node,
    ):
        node.start(mode)
        broker.wait_log(LISTENS)
        cloud.send_job(server.url(), NEW)
        assert node.wait() == ENDS[mode]
        assert node.log.count("exit handler") == 1
        assert "Traceback" not in node.log
        assert running(node) == ("1.0.0", BootState.VALID)
        mark = len(broker.log)
        node.start("behaves")
        broker.wait_log(LISTENS, since=mark)
        cloud.send_job(server.url(), NEW)
        cloud.wait_status("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)")
        assert node.stop() == 0


def test_a_callback_that_never_returns_does_not_keep_the_program(
    faults: Path, broker: Mosquitto, tmp_path: Path
) -> None:
    with Cloud(broker) as cloud, CProgram(faults, tmp_path / "node", broker) as node:
        node.start("never-returns")
        broker.wait_log(LISTENS)
        cloud.send_job("https://localhost/x", NEW)
        node.wait_log("job J1")
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert "a callback is not over; going on without it" in node.log


def test_a_callback_may_call_every_function(faults: Path, broker: Mosquitto, tmp_path: Path) -> None:
    with Cloud(broker) as cloud, CProgram(faults, tmp_path / "node", broker) as node:
        node.start("calls-everything")
        broker.wait_log(LISTENS)
        cloud.send_job("https://localhost/x", NEW)
        assert node.wait() == 0
        assert "called everything" in node.log
        assert "ended 0" in node.log
        assert [status for status, _ in cloud.statuses()] == ["in-progress", "invalid"]  # sent before it stopped
