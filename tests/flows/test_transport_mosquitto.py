"""The MQTT transport against a real broker with mutual TLS."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.rainmaker.transport_paho import Connection, PahoTransport, TlsFiles
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

WAIT_S = 20.0


class Heard:
    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[object, ...]] = queue.Queue()

    def connected(self, session_present: bool) -> None:
        self.queue.put(("connected", session_present))

    def disconnected(self, reason: str) -> None:
        self.queue.put(("disconnected",))

    def message(self, topic: str, payload: bytes) -> None:
        self.queue.put(("message", topic, payload))

    def published(self, message_id: int) -> None:
        self.queue.put(("published", message_id))

    def wait(self, *wanted: object) -> None:
        """Waits for this, passing over other things."""
        while self.queue.get(timeout=WAIT_S) != wanted:
            pass


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path, persistence=True) as broker:
        yield broker


@pytest.fixture
def nodes() -> Iterator[list[PahoTransport]]:
    nodes: list[PahoTransport] = []
    yield nodes
    for node in nodes:
        node.stop(0.0)


def make(broker: Mosquitto, name: str, *, persistent: bool = False, ca: Path | None = None) -> PahoTransport:
    identity = broker.identity(name)
    return PahoTransport(
        Connection(
            broker.host,
            broker.port,
            name,
            TlsFiles(identity.cert_file, identity.key_file, ca or broker.ca_file, "x-amzn-mqtt-ca"),
            persistent_session=persistent,
            reconnect_min_s=0.02,
            reconnect_max_s=0.05,
        )
    )


def test_messages_pass_through_a_lost_connection(broker: Mosquitto, nodes: list[PahoTransport]) -> None:
    node, cloud = make(broker, "N1"), make(broker, "cloud")
    nodes += [node, cloud]
    at_node, at_cloud = Heard(), Heard()
    cloud.subscribe("$aws/rules/esp_node_otastatus/node/+/otastatus")
    node.subscribe("node/N1/otaurl")
    cloud.start(at_cloud)
    at_cloud.wait("connected", False)
    node.start(at_node)
    at_node.wait("connected", False)
    broker.kill()
    at_node.wait("disconnected")
    at_cloud.wait("disconnected")
    ours = node.publish("$aws/rules/esp_node_otastatus/node/N1/otastatus", b"said while offline")
    broker.start()
    at_cloud.wait("connected", False)
    at_node.wait("connected", False)
    at_node.wait("published", ours)
    cloud.publish("node/N1/otaurl", b"x" * (1 << 20))
    at_node.wait("message", "node/N1/otaurl", b"x" * (1 << 20))


def test_a_broker_that_comes_later_is_found(broker: Mosquitto, nodes: list[PahoTransport]) -> None:
    broker.stop()
    node, heard = make(broker, "N1"), Heard()
    nodes.append(node)
    ours = node.publish("t", b"x")
    node.start(heard)
    broker.start()
    heard.wait("connected", False)
    heard.wait("published", ours)


def test_a_kept_session_has_the_messages_of_the_time_offline(broker: Mosquitto, nodes: list[PahoTransport]) -> None:
    cloud, at_cloud = make(broker, "cloud"), Heard()
    nodes.append(cloud)
    cloud.start(at_cloud)
    at_cloud.wait("connected", False)
    first, heard = make(broker, "N1", persistent=True), Heard()
    first.subscribe("node/N1/otaurl")
    first.start(heard)
    heard.wait("connected", False)
    heard.wait("published", first.publish("t", b"the subscription is in force"))
    first.stop()
    ours = cloud.publish("node/N1/otaurl", b"job")
    at_cloud.wait("published", ours)
    second, heard = make(broker, "N1", persistent=True), Heard()
    nodes.append(second)
    second.subscribe("node/N1/otaurl")
    second.start(heard)
    heard.wait("connected", True)
    heard.wait("message", "node/N1/otaurl", b"job")


def test_two_with_the_same_name_take_turns_and_none_gives_up(broker: Mosquitto, nodes: list[PahoTransport]) -> None:
    first, second = make(broker, "N1"), make(broker, "N1")
    nodes += [first, second]
    at_first, at_second = Heard(), Heard()
    first.start(at_first)
    at_first.wait("connected", False)
    second.start(at_second)
    at_second.wait("connected", False)
    at_first.wait("disconnected")
    at_first.wait("connected", False)
    at_second.wait("disconnected")
    first.stop()
    at_second.wait("connected", False)


def test_a_server_that_nobody_vouches_for_gets_nothing(
    broker: Mosquitto, nodes: list[PahoTransport], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Mosquitto(tmp_path / "elsewhere")
    node, heard = make(broker, "N1", ca=other.ca_file), Heard()
    nodes.append(node)
    said = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: said.set() if "server certificate refused" in record.getMessage() else None  # type: ignore[method-assign]
    logger = logging.getLogger("rmaker_ota")
    logger.addHandler(handler)
    try:
        node.start(heard)
        assert said.wait(WAIT_S)
    finally:
        logger.removeHandler(handler)
    assert heard.queue.empty()
