"""Options whose effect only a real broker shows: kept sessions, names in certificates, plain topics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.esp_build import build_image
from tests.sim.agent import Agent, Cloud
from tests.sim.https_server import HttpsServer, serve
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

NEW = build_image(version="2.0.0", project_name="gw", size=256 * 1024)
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")


@pytest.fixture
def server() -> Iterator[HttpsServer]:
    with HttpsServer([serve(NEW)]) as server:
        yield server


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    (tmp_path / "broker").mkdir()
    # Who is not a node of that name, by its certificate, may not read what is for it.
    (tmp_path / "broker" / "acl").write_text(
        "user cloud\ntopic readwrite #\ntopic readwrite $aws/#\npattern read node/%u/#\n"
        "pattern write node/%u/#\npattern write $aws/rules/+/node/%u/#\n"
    )
    options = ("use_identity_as_username true", f"acl_file {tmp_path}/broker/acl")
    with Mosquitto(tmp_path / "broker", options=options) as broker:
        yield broker


@pytest.mark.parametrize("persistent", [True, False])
def test_a_job_pushed_while_the_node_was_away_arrives(
    tmp_path: Path, broker: Mosquitto, server: HttpsServer, persistent: bool
) -> None:
    ota = {"mqtt_persistent_session": persistent, "mqtt_send_username": False}
    with (
        Cloud(broker) as cloud,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem, ota=ota) as agent,
    ):
        agent.start()
        cloud.wait("otafetch")  # by then the subscription is in force
        assert agent.stop() == 0
        cloud.send_job(server.url(), NEW)
        agent.start()
        if persistent:
            cloud.wait_status(*SUCCESS)
            cloud.wait_config("2.0.0")
        else:  # what came while it was away is lost; what comes now is not
            cloud.wait("otafetch")
            cloud.send_job(server.url(), NEW, "J2")
            cloud.wait_status(*SUCCESS)
            assert {message["ota_job_id"] for kind, message in cloud.all if kind == "otastatus"} == {"J2"}


def without_id(agent: Agent, option: str) -> None:
    """Takes the node's id out of the configuration and an option in."""
    text = agent.config.read_text()
    assert 'id = "N1"' in text
    agent.config.write_text(text.replace('id = "N1"', "") + f"\n{option}\n")


def test_the_certificate_names_the_node(tmp_path: Path, broker: Mosquitto, server: HttpsServer) -> None:
    ota = {"mqtt_send_username": False}
    with Cloud(broker) as cloud, Agent(tmp_path / "node", broker, server_ca=server.ca_pem, ota=ota) as agent:
        without_id(agent, "node_id_from_cert_cn = true")
        agent.start()
        assert cloud.wait_config()["node_id"] == "N1"
        cloud.wait("otafetch", node_id="N1")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*SUCCESS)


def test_without_basic_ingest_the_cloud_is_reached_by_plain_topics(
    tmp_path: Path, broker: Mosquitto, server: HttpsServer
) -> None:
    ota = {"mqtt_use_basic_ingest": False, "mqtt_send_username": False}
    with (
        Cloud(broker, plain=True) as cloud,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem, ota=ota) as agent,
    ):
        agent.start()
        cloud.wait("otafetch", fw_version="1.0.0")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*SUCCESS)


def test_the_broker_tells_users_when_a_node_is_lost(tmp_path: Path, broker: Mosquitto, server: HttpsServer) -> None:
    """[node] connectivity: by itself when it is connected, by the broker when it is gone without a word."""
    ota = {"connectivity_report_delay_s": 0, "mqtt_send_username": False}
    with Cloud(broker) as cloud, Agent(tmp_path / "node", broker, server_ca=server.ca_pem, ota=ota) as agent:
        agent.config.write_text(agent.config.read_text().replace("[node]", "[node]\nconnectivity = true"))
        cloud.subscribe("node/N1/params/local")
        cloud.subscribe("$aws/rules/esp_set_params/node/N1/params/local")
        agent.start()
        assert cloud.wait("local")["Connectivity"] == {"Connected": True}
        agent.kill()
        assert cloud.wait("local") == {"Connectivity": {"Connected": False}}
        agent.start()
        assert cloud.wait("local")["Connectivity"] == {"Connected": True}
        assert agent.stop() == 0
        assert cloud.wait("local") == {"Connectivity": {"Connected": False}}
        assert json.dumps(cloud.all[-1][1]) == '{"Connectivity": {"Connected": false}}'
