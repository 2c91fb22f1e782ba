"""The broker twin does what the tests that use it rely on."""

from __future__ import annotations

import queue
import ssl
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.sim.mosquitto import BrokerError, Identity, Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


def connect(broker: Mosquitto, identity: Identity) -> tuple[paho.Client, queue.Queue[str]]:
    seen: queue.Queue[str] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=identity.common_name)
    client.tls_set(str(broker.ca_file), str(identity.cert_file), str(identity.key_file))
    client.on_connect = lambda *_: seen.put("connected")
    client.on_subscribe = lambda *_: seen.put("subscribed")
    client.on_message = lambda _client, _user, message: seen.put(f"{message.topic} {message.payload.decode()}")
    client.connect(broker.host, broker.port)
    client.loop_start()
    return client, seen


def test_messages_pass_also_on_topics_of_basic_ingest(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        client, seen = connect(broker, broker.identity("N1"))
        try:
            assert seen.get(timeout=10) == "connected"
            client.subscribe("$aws/rules/esp_node_otafetch/node/+/otafetch", 1)
            assert seen.get(timeout=10) == "subscribed"
            client.publish("$aws/rules/esp_node_otafetch/node/N1/otafetch", "x", 1)
            assert seen.get(timeout=10) == "$aws/rules/esp_node_otafetch/node/N1/otafetch x"
        finally:
            client.disconnect()
            client.loop_stop()


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        stranger = broker.stranger("N1")
        client = paho.Client(CallbackAPIVersion.VERSION2)
        client.tls_set(str(broker.ca_file), str(stranger.cert_file), str(stranger.key_file))
        mark = len(broker.log)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            client.connect(broker.host, broker.port)
            while client.loop(timeout=1.0) == paho.MQTT_ERR_SUCCESS:
                pass
            raise ConnectionError
        broker.wait_log("certificate verify failed", since=mark)


def test_a_restart_keeps_the_port(tmp_path: Path) -> None:
    with Mosquitto(tmp_path, tls=False) as broker:
        port = broker.port
        broker.restart()
        assert broker.port == port


def test_a_broker_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="no_such_option"):
        Mosquitto(tmp_path, options=("no_such_option true",)).start()
