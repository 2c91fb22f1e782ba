"""Parameters over a real Mosquitto with mutual TLS: a whole update by the job service, and an application's lamp.

The node is a process of its own on a flash image, restarted by itself; the job service offers, serves and follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.cloud.service import CloudService, ServiceThread
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets.base import BootState
from tests.flows.test_cloud_mosquitto import WAIT_S, Watch, config_for
from tests.flows.test_node_mosquitto import running
from tests.sim.agent import Agent, Cloud
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

LISTENS = "node/N1/params/remote (QoS 1)"  # what the broker logs of the node's subscription

# An application with a lamp, which breaks when it is dimmed to 13.
APPLICATION = """
import logging, sys
from rmaker_ota.rainmaker import workflow
workflow.REBOOT_DELAY_S = 0.1
import rmaker_ota as ota
from rmaker_ota.cli.agent import set_up_logging
set_up_logging("debug")

def write(device, param, value):
    if value == 13:
        raise RuntimeError("the fuse has blown")
    param.update_and_report(value)

power = ota.Param("Power", "esp.param.power", False)
level = ota.Param("Level", "esp.param.brightness", 50, bounds=ota.Bounds(0, 100, 1), ui_type="esp.ui.slider")
node = ota.Node.from_config(sys.argv[sys.argv.index("--config") + 1])
node.add_device(ota.Device("Lamp", "esp.device.lightbulb", [power, level], write_cb=write, primary="Power"))
ota.esp_rmaker_ota_enable(None, ota.OTA_USING_PARAMS)
node.run()
"""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    (tmp_path / "broker").mkdir()
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def service(broker: Mosquitto, watch: Watch, tmp_path: Path) -> Iterator[CloudService]:
    with ServiceThread(config_for(broker, tmp_path), wait_ready_s=WAIT_S, on_change=watch) as service:
        yield service


@pytest.fixture
def agent(broker: Mosquitto, service: CloudService, tmp_path: Path) -> Iterator[Agent]:
    ca = (tmp_path / "ca.crt").read_bytes()
    with Agent(tmp_path / "node", broker, server_ca=ca, ota={"type": "params"}) as agent:
        yield agent


def offer(service: CloudService, version: str = "2.0.0", project: str = "gw") -> str:
    with service.images.begin("app.bin") as writer:
        writer.write(build_image(version=version, project_name=project, size=256 * 1024))
        return service.jobs.create(writer.commit().sha256, ["N1"]).id


def told(watch: Watch, job: str) -> list[tuple[str, str]]:
    return [(entry.status, entry.info) for entry in watch.entries if entry.job == job]


OFFERED = [("queued", ""), ("sent", "by params")]
STARTING = ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)")


def test_a_whole_update_is_confirmed_after_the_restart(
    agent: Agent, broker: Mosquitto, service: CloudService, watch: Watch
) -> None:
    agent.start()
    broker.wait_log(LISTENS)
    job = offer(service)
    watch.wait(job, "N1", "success")
    assert told(watch, job) == [
        *OFFERED,
        STARTING,
        ("in-progress", "Downloading Firmware Image"),
        ("in-progress", "Firmware Image download complete"),
        ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)"),
        ("success", "OTA Upgrade finished and verified successfully"),
    ]
    next_job = offer(service, "3.0.0", "other")  # what is reported of it begins with the status of the one before
    watch.wait(next_job, "N1", "rejected")
    assert told(watch, next_job) == [*OFFERED, STARTING, ("rejected", "Project Name mismatch")]
    assert agent.stop() == 0
    assert "otafetch" not in agent.log
    assert running(agent) == ("ota_1", "2.0.0", BootState.VALID)


def test_a_crash_before_the_confirmation_rolls_back_and_says_so_at_the_next_start(
    agent: Agent, broker: Mosquitto, service: CloudService, watch: Watch
) -> None:
    agent.start()
    broker.wait_log(LISTENS)
    job = offer(service)
    agent.wait_log("Rebooting into new firmware")
    broker.suspend()  # so that the new image cannot be confirmed
    agent.wait_log("ota_1 boots")
    agent.kill()
    broker.resume()
    agent.start()
    assert watch.wait(job, "N1", "rejected").info == "Firmware rolled back"
    assert agent.stop() == 0
    assert running(agent) == ("ota_0", "1.0.0", BootState.VALID)


def test_a_job_for_a_node_that_is_off_is_offered_when_it_starts(
    agent: Agent, broker: Mosquitto, service: CloudService, watch: Watch
) -> None:
    agent.start()
    broker.wait_log(LISTENS)
    assert agent.stop() == 0
    job = offer(service)  # nobody hears the offer
    agent.start()
    watch.wait(job, "N1", "success")
    assert told(watch, job)[:3] == [*OFFERED, ("sent", "by params")]


def test_a_lamp_of_the_application_is_switched_from_the_broker(
    agent: Agent, broker: Mosquitto, service: CloudService, watch: Watch
) -> None:
    with Cloud(broker) as cloud:
        agent.start(program=APPLICATION)
        config = cloud.wait_config()
        assert [device["name"] for device in config["devices"]] == ["Lamp"]
        assert [one["name"] for one in config["services"]] == ["OTA"]
        initial = cloud.wait("init")
        assert initial == {"Lamp": {"Power": False, "Level": 50}, "OTA": {"Status": "", "Info": "", "URL": ""}}
        for text in (b"{broken", b"[" * 50_000, b'{"Lamp":{"Level":101,"Power":"on","x":1},"OTA":{"URL":5}}', b"\xff"):
            cloud.send(text, "params/remote")
        cloud.send(b'{"Lamp":{"Level":13}}', "params/remote")
        cloud.send(b'{"Lamp":{"Level":7,"Power":true}}', "params/remote")
        assert cloud.wait("local") == {"Lamp": {"Power": True}}
        assert cloud.wait("local") == {"Lamp": {"Level": 7}}
        agent.wait_log("the fuse has blown")
        job = offer(service)
        watch.wait(job, "N1", "success")
        assert cloud.wait("init")["OTA"]["Status"] == "success"
        assert agent.process is not None
        assert agent.process.poll() is None
