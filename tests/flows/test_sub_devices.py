"""A gateway whose process is the node of two chips as well: real broker with mutual TLS, real HTTPS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.esp_build import build_image
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import BootState
from rmaker_ota.targets.create import create_flash_image
from tests.sim.agent import Agent, Cloud
from tests.sim.https_server import HttpsServer, serve
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

LAMP = build_image(version="2.0.0", project_name="lamp", size=256 * 1024)
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    (tmp_path / "broker").mkdir()
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


def add_sub_device(agent: Agent, broker: Mosquitto, node_id: str) -> Path:
    flash = agent.directory / f"{node_id}.bin"
    create_flash_image(flash, build_image(version="1.0.0", project_name="lamp"))
    identity = broker.identity(node_id)
    with agent.config.open("a") as config:
        config.write(
            f"""
            [[sub_device]]
            node = {{id = "{node_id}"}}
            mqtt = {{cert = "{identity.cert_file}", key = "{identity.key_file}"}}
            target = {{uri = "esp32-image:{flash}"}}
            """
        )
    return flash


def test_each_sub_device_is_updated_and_restarts_by_itself(tmp_path: Path, broker: Mosquitto) -> None:
    with (
        HttpsServer([serve(LAMP)]) as server,
        Agent(tmp_path / "gateway", broker, server_ca=server.ca_pem) as agent,
        Cloud(broker) as cloud,
        Cloud(broker, "lamp-1") as first,
        Cloud(broker, "lamp-2") as second,
    ):
        flashes = [add_sub_device(agent, broker, name) for name in ("lamp-1", "lamp-2")]
        agent.start()
        for one in (cloud, first, second):
            one.wait("otafetch")
        first.send_job(server.url(), LAMP)
        first.wait_status(*SUCCESS)
        second.send_job(server.url(), LAMP)
        second.wait_status(*SUCCESS)
        assert agent.stop() == 0
        assert cloud.statuses() == []  # the gateway itself has nothing to do with it
        assert "node N1 runs" in agent.log
        assert agent.log.count("node lamp-1 runs lamp") == agent.log.count("node lamp-2 runs lamp") == 2
    for flash in flashes:
        with open_target(f"esp32-image:{flash}", read_only=True) as target:
            slot = target.running_slot()
            assert slot is not None
            assert (slot.name, target.boot_state(slot)) == ("ota_1", BootState.VALID)


def test_a_sub_device_that_is_not_there_keeps_nobody_else_from_work(tmp_path: Path, broker: Mosquitto) -> None:
    with (
        HttpsServer([serve(LAMP)]) as server,
        Agent(tmp_path / "gateway", broker, server_ca=server.ca_pem) as agent,
        Cloud(broker) as cloud,
        Cloud(broker, "lamp-2") as second,
    ):
        add_sub_device(agent, broker, "lamp-1").unlink()
        add_sub_device(agent, broker, "lamp-2")
        agent.start()
        cloud.wait("otafetch")
        agent.wait_log("again in 5 s")
        second.wait("otafetch")
        second.send_job(server.url(), LAMP)
        second.wait_status(*SUCCESS)
        assert agent.stop() == 0
