"""The node as a process: real broker with mutual TLS, real HTTPS, a flash image; and what goes wrong there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.esp_build import build_image
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import BootState
from tests.python.test_node import HOSTILE
from tests.sim.agent import WAIT_S, Agent, Cloud
from tests.sim.https_server import HttpsServer, serve, stalls
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

NEW = build_image(version="2.0.0", project_name="gw", size=512 * 1024)
SAME = build_image(version="1.0.0", project_name="gw")

STARTING = ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)")
DOWNLOADING = ("in-progress", "Downloading Firmware Image")
COMPLETE = ("in-progress", "Firmware Image download complete")
REBOOTING = ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)")
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")
SAME_VERSION = ("rejected", "Same version received")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    (tmp_path / "broker").mkdir()
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def cloud(broker: Mosquitto) -> Iterator[Cloud]:
    with Cloud(broker) as cloud:
        yield cloud


@pytest.fixture
def server() -> Iterator[HttpsServer]:
    with HttpsServer([serve(NEW)]) as server:
        yield server


@pytest.fixture
def agent(tmp_path: Path, broker: Mosquitto, server: HttpsServer) -> Iterator[Agent]:
    with Agent(tmp_path / "node", broker, server_ca=server.ca_pem) as agent:
        yield agent


def running(agent: Agent) -> tuple[str, str, BootState]:
    """Slot, version and state of what runs, read from the flash image while the node is stopped."""
    with open_target(f"esp32-image:{agent.flash}", read_only=True) as target:
        slot = target.running_slot()
        assert slot is not None
        app = target.describe(slot)
        assert app is not None
        return slot.name, app.version, target.boot_state(slot)


# -- the main way


def test_an_update_through_the_restart_of_the_process(agent: Agent, cloud: Cloud, server: HttpsServer) -> None:
    agent.start()
    assert agent.process is not None
    pid = agent.process.pid
    assert cloud.wait_config()["info"]["fw_version"] == "1.0.0"
    assert cloud.wait("otafetch") == {"node_id": "N1", "fw_version": "1.0.0"}
    cloud.send_job(server.url("/image.bin?X-Amz-Signature=SECRET"), NEW)
    cloud.wait_config("2.0.0")
    cloud.wait("otafetch", fw_version="2.0.0")
    assert cloud.statuses() == [STARTING, DOWNLOADING, COMPLETE, REBOOTING, SUCCESS]
    assert agent.process.pid == pid
    assert agent.process.poll() is None
    assert agent.stop() == 0
    assert agent.log.count("boot: ") >= 2
    assert "SECRET" not in agent.log
    assert running(agent) == ("ota_1", "2.0.0", BootState.VALID)


def test_a_crash_before_the_confirmation_rolls_back(
    agent: Agent, broker: Mosquitto, cloud: Cloud, server: HttpsServer
) -> None:
    agent.start()
    cloud.wait("otafetch")
    cloud.send_job(server.url(), NEW)
    cloud.wait_status(*REBOOTING)
    broker.suspend()  # so that the new image cannot be confirmed
    agent.wait_log("ota_1 boots")
    agent.kill()
    broker.resume()
    assert running(agent) == ("ota_1", "2.0.0", BootState.PENDING_VERIFY)
    agent.start()
    cloud.wait_status("rejected", "Firmware rolled back")
    assert agent.stop() == 0
    assert running(agent) == ("ota_0", "1.0.0", BootState.VALID)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_download_that_was_cut_short_goes_on_where_it_was(
    tmp_path: Path, broker: Mosquitto, cloud: Cloud, how: signal.Signals
) -> None:
    half = len(NEW) // 2
    with (
        HttpsServer([stalls(NEW, half), serve(NEW)]) as server,
        Agent(
            tmp_path / "node", broker, server_ca=server.ca_pem, ota={"ota_checkpoint_kib": 64, "ota_checkpoint_s": 0}
        ) as agent,
    ):
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*DOWNLOADING)
        server.wait_until_held()
        agent.wait_log("state kept: ota_position, ota_written")
        agent.signal(how)
        assert agent.wait() == (0 if how == signal.SIGTERM else -signal.SIGKILL)
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*SUCCESS)
        (first, second) = server.ranges
        assert first is None
        assert second is not None
        assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= half


# -- the broker


def test_a_broker_that_is_absent_at_the_start(agent: Agent, broker: Mosquitto, server: HttpsServer) -> None:
    broker.stop()
    agent.start()
    agent.wait_log("cannot connect: Connection refused")
    broker.start()
    with Cloud(broker) as cloud:
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*SUCCESS)


def test_a_broker_lost_during_a_download(tmp_path: Path, broker: Mosquitto, cloud: Cloud) -> None:
    with (
        HttpsServer([stalls(NEW, len(NEW) // 2), serve(NEW)]) as server,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem) as agent,
    ):
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*DOWNLOADING)
        server.wait_until_held()
        broker.kill()
        agent.wait_log("MQTT connection to localhost ended")
        server.release()
        agent.wait_log("ota_1 boots")  # the download was not disturbed
        with agent.held():
            broker.start()
            cloud.wait_connected_again()
        cloud.wait_status(*SUCCESS)
        assert len(server.requests) == 1


def test_a_report_lost_before_its_acknowledgement_arrives_later_and_once(
    tmp_path: Path, broker: Mosquitto, cloud: Cloud
) -> None:
    with (
        HttpsServer([stalls(SAME, -1)]) as server,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem) as agent,
    ):
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), SAME)
        cloud.wait_status(*STARTING)
        server.wait_until_held()
        agent.wait_log("MQTT_PUBLISHED 3")  # configuration, fetch, and the report up to here are acknowledged
        broker.suspend()
        server.release()
        agent.wait_log(SAME_VERSION[1])
        with agent.held():
            broker.restart()
            cloud.wait_connected_again()
        cloud.wait_status(*SAME_VERSION)
        cloud.wait_connected_again()
        assert cloud.statuses() == [STARTING, SAME_VERSION]


def test_a_report_lost_with_the_process_arrives_after_its_next_start(
    tmp_path: Path, broker: Mosquitto, cloud: Cloud
) -> None:
    with (
        HttpsServer([stalls(SAME, -1)]) as server,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem) as agent,
    ):
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), SAME)
        cloud.wait_status(*STARTING)
        server.wait_until_held()
        agent.wait_log("MQTT_PUBLISHED 3")  # configuration, fetch, and the report up to here are acknowledged
        broker.suspend()
        server.release()
        agent.wait_log(SAME_VERSION[1])
        agent.kill()
        broker.restart()
        cloud.wait_connected_again()
        agent.start()
        cloud.wait_status(*SAME_VERSION)
        assert agent.stop() == 0
        agent.start()
        cloud.wait("otafetch")
        assert cloud.statuses() == [STARTING, SAME_VERSION]


def test_a_job_delivered_twice_is_done_once(tmp_path: Path, broker: Mosquitto, cloud: Cloud) -> None:
    with (
        HttpsServer([stalls(NEW, 100_000), serve(NEW)]) as server,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem) as agent,
    ):
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        server.wait_until_held()
        cloud.send_job(server.url(), NEW)
        agent.wait_log("job J1 is the one at hand")
        server.release()
        cloud.wait_status(*SUCCESS)
        assert cloud.statuses() == [STARTING, DOWNLOADING, COMPLETE, REBOOTING, SUCCESS]
        assert len(server.requests) == 1


def test_hostile_messages_over_a_real_broker(agent: Agent, cloud: Cloud, server: HttpsServer) -> None:
    agent.start()
    cloud.wait("otafetch")
    for payload in HOSTILE:
        if b'"url":"https' not in payload and b'"url":"ftp' not in payload:
            cloud.send(payload)
    cloud.send_job(server.url(), NEW, "J9")
    cloud.wait_status(*SUCCESS)
    assert {message["ota_job_id"] for kind, message in cloud.all if kind == "otastatus"} <= {"J", "J9"}
    assert "Traceback" not in agent.log


def test_two_nodes_with_the_same_name_take_turns_and_recover(
    tmp_path: Path, broker: Mosquitto, cloud: Cloud, server: HttpsServer
) -> None:
    with (
        Agent(tmp_path / "one", broker, server_ca=server.ca_pem) as one,
        Agent(tmp_path / "two", broker, server_ca=server.ca_pem) as two,
    ):
        one.start()
        one.wait_log("MQTT connected")
        two.start()
        two.wait_log("MQTT connected")
        one.wait_log("MQTT connection to localhost ended")
        one.wait_log("MQTT connected", count=2)
        two.wait_log("MQTT connection to localhost ended")
        assert two.stop() == 0
        one.wait_until(lambda log: log.count("MQTT connected") > log.count("MQTT connection to localhost ended"))
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*SUCCESS)


# -- wrong surroundings


def test_a_second_agent_on_the_same_state_is_refused(agent: Agent, broker: Mosquitto, cloud: Cloud) -> None:
    agent.start()
    cloud.wait("otafetch")
    before = agent.flash.read_bytes()
    done = run_agent(agent.config)
    assert done.returncode == 2
    assert f"state file {agent.state}: another node uses it" in done.stderr
    assert agent.flash.read_bytes() == before
    assert agent.stop() == 0


def test_a_damaged_state_file_is_named_with_the_way_out(agent: Agent, cloud: Cloud) -> None:
    agent.state.write_bytes(os.urandom(4096))
    damaged = agent.state.read_bytes()
    for _ in range(2):
        done = run_agent(agent.config)
        assert done.returncode == 2
        assert str(agent.state) in done.stderr
        assert "move it away" in done.stderr
        assert "Traceback" not in done.stderr
    assert agent.state.read_bytes() == damaged
    commands = done.stderr.partition("move it away (")[2].partition(")")[0]
    subprocess.run(commands, shell=True, check=True)
    agent.start()
    cloud.wait("otafetch")


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('id = "N1"', "", "[node] id: missing"),
        ("port = ", "prot = ", "[mqtt] prot: unknown key; did you mean port?"),
        ('"esp32-image:flash.bin"', '"usb:flash.bin"', "[target] target 'usb:flash.bin' is none of"),
        ("[ota]", "[ota]\nota_max_retries = 11\n", "[ota] ota_max_retries = 11: expected a whole number from 1 to 10"),
    ],
)
def test_a_wrong_configuration_ends_with_code_2(agent: Agent, right: str, wrong: str, message: str) -> None:
    agent.config.write_text(agent.config.read_text().replace(right, wrong))
    done = run_agent(agent.config)
    assert done.returncode == 2
    assert message in done.stderr
    assert str(agent.config) in done.stderr
    assert "Traceback" not in done.stderr


def run_agent(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rmaker_ota", "agent", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


# -- being a service


def test_systemd_is_told_when_it_is_up_and_when_it_stops(agent: Agent, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(WAIT_S)
        agent.start(environment={"NOTIFY_SOCKET": str(tmp_path / "notify"), "JOURNAL_STREAM": "8:1"})
        assert sock.recv(100) == b"READY=1"
        agent.signal(signal.SIGTERM)
        assert sock.recv(100) == b"STOPPING=1"
    assert agent.wait() == 0
    assert all(line.startswith("<") for line in agent.log.splitlines())


def test_interrupting_is_told_from_stopping(agent: Agent) -> None:
    agent.start()
    agent.wait_log("MQTT connected")
    agent.signal(signal.SIGINT)
    assert agent.wait() == 130


def test_it_stops_at_once_while_the_broker_is_silent(agent: Agent, broker: Mosquitto) -> None:
    broker.suspend()
    agent.start()
    agent.wait_log("INIT_DONE")
    assert agent.stop() == 0


def test_a_quiet_agent_does_nothing(agent: Agent, cloud: Cloud) -> None:
    agent.start()
    cloud.wait("otafetch")
    agent.wait_log("MQTT_PUBLISHED", count=2)
    quiet = threading.Event()
    before = wakes(agent)
    for _ in range(20):  # until what the acknowledgement caused is over
        quiet.wait(0.1)
        before, last = wakes(agent), before
        if before == last:
            break
    quiet.wait(1.0)
    assert wakes(agent) == before


def wakes(agent: Agent) -> int:
    """How often the process's threads have given up the processor so far."""
    assert agent.process is not None
    count = 0
    for task in Path(f"/proc/{agent.process.pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                count += int(line.split()[1])
    return count
