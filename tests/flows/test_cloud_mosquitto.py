"""The job service and nodes over a real Mosquitto with mutual TLS. Nodes are plain MQTT clients here."""

from __future__ import annotations

import json
import queue
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from rmaker_ota.cloud.config import CloudConfig
from rmaker_ota.cloud.service import CloudService, ServiceThread
from rmaker_ota.cloud.store import HistoryEntry, JobMode
from rmaker_ota.rainmaker.streams import (
    Accepted,
    Begin,
    Complete,
    Failed,
    Flavour,
    Input,
    Message,
    Publish,
    Ready,
    StreamOptions,
    StreamTransfer,
    Subscribe,
    SubscribeResult,
)
from tests.python.cloud_parts import esp_image, service_config
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
WAIT_S = 20.0
INGEST = "$aws/rules/esp_node_{}/node/{}/{}"
PLAIN = "node/{1}/{2}"


class Node:
    """An MQTT client as a node's firmware would be one: subscribed to its otaurl, QoS 1."""

    def __init__(self, broker: Mosquitto, node_id: str, topics: str = INGEST) -> None:
        self.node_id = node_id
        self.topics = topics
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._subscribed = threading.Event()
        identity = broker.identity(node_id)
        context = ssl.create_default_context(cafile=broker.ca_file)
        context.load_cert_chain(identity.cert_file, identity.key_file)
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=node_id)
        self._client.tls_set_context(context)
        self._client.on_connect = lambda client, *rest: client.subscribe(f"node/{node_id}/otaurl", 1)
        self._client.on_subscribe = lambda *rest: self._subscribed.set()
        self._client.on_message = self._message
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        assert self._subscribed.wait(WAIT_S)

    def _message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        assert not message.retain
        assert message.qos == 1
        self.jobs.put(json.loads(message.payload))

    def publish(self, suffix: str, payload: dict[str, Any] | bytes) -> None:
        """Publishes and waits for the broker's acknowledgement."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        topic = self.topics.format(suffix, self.node_id, suffix)
        self._client.publish(topic, data, qos=1).wait_for_publish(WAIT_S)

    def fetch(self, version: str = "1.0.0") -> None:
        self.publish("otafetch", {"node_id": self.node_id, "fw_version": version})

    def report(self, job: str, status: str, info: str = "", ts: int = 1) -> None:
        self.publish("otastatus", {"ota_job_id": job, "status": status, "additional_info": info, "ts": ts})

    def job(self) -> dict[str, Any]:
        return self.jobs.get(timeout=WAIT_S)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Watch:
    """What the service recorded, and a way to wait for more."""

    def __init__(self) -> None:
        self.entries: list[HistoryEntry] = []
        self._grew = threading.Condition()

    def __call__(self, entry: HistoryEntry) -> None:
        with self._grew:
            self.entries.append(entry)
            self._grew.notify_all()

    def wait(self, job: str, node: str, status: str) -> HistoryEntry:
        def find() -> HistoryEntry | None:
            return next((e for e in self.entries if (e.job, e.node, e.status) == (job, node, status)), None)

        with self._grew:
            found = self._grew.wait_for(find, WAIT_S)
            assert found, f"no {status} of {node}: {self.entries}"
            return found


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    directory = tmp_path / "broker"
    directory.mkdir()
    with Mosquitto(directory, persistence=True) as broker:
        yield broker


def config_for(broker: Mosquitto, directory: Path, more: str = "") -> CloudConfig:
    identity = broker.identity("rmaker-ota-cloud")
    return service_config(
        directory,
        mqtt=f"""
            host = "{broker.host}"
            port = {broker.port}
            ca = "{broker.ca_file}"
            cert = "{identity.cert_file}"
            key = "{identity.key_file}"
            {more}
        """,
    )


def import_image(service: CloudService) -> str:
    with service.images.begin("app.bin") as writer:
        writer.write(esp_image())
        return writer.commit().sha256


@pytest.fixture
def make_node(broker: Mosquitto) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(node_id: str, topics: str = INGEST) -> Node:
        nodes.append(Node(broker, node_id, topics))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


@pytest.mark.parametrize("topics", [INGEST, PLAIN], ids=["basic ingest", "plain topics"])
def test_push_fetch_and_reports(broker: Mosquitto, make_node: Callable[..., Node], tmp_path: Path, topics: str) -> None:
    watch = Watch()
    with ServiceThread(config_for(broker, tmp_path), wait_ready_s=WAIT_S, on_change=watch) as service:
        node = make_node("N1", topics)
        sha256 = import_image(service)
        pushed = service.jobs.create(sha256, ["N1"]).id
        message = node.job()
        assert message["ota_job_id"] == pushed
        assert message["url"].startswith(f"{service.url}/images/{sha256}?expires=")

        node.report(pushed, "failed", "OTA Attempt 3/3 failed")
        watch.wait(pushed, "N1", "failed")
        node.fetch()
        assert node.job()["ota_job_id"] == pushed
        node.report(pushed, "success", "done", ts=2)
        assert watch.wait(pushed, "N1", "success").info == "done"

        waiting = service.jobs.create(sha256, ["N1"], mode=JobMode.ON_FETCH).id
        node.publish("config", {"node_id": "N1", "info": {"fw_version": "2.0.0"}})
        node.fetch("2.0.0")
        assert node.job()["ota_job_id"] == waiting
        assert node.jobs.empty()
        info = service.store.node("N1")
        assert info is not None
        assert info.fw_version == "2.0.0"
        assert json.loads(info.config or "")["node_id"] == "N1"


@pytest.mark.parametrize(("setting", "heard", "deaf"), [("on", INGEST, PLAIN), ("off", PLAIN, INGEST)])
def test_only_the_chosen_topics_are_heard(
    broker: Mosquitto, make_node: Callable[..., Node], tmp_path: Path, setting: str, heard: str, deaf: str
) -> None:
    watch = Watch()
    config = config_for(broker, tmp_path, f'basic_ingest = "{setting}"')
    with ServiceThread(config, wait_ready_s=WAIT_S, on_change=watch) as service:
        node = make_node("N1", deaf)
        job = service.jobs.create(import_image(service), ["N1"]).id
        node.report(job, "rejected")
        node.topics = heard
        node.report(job, "in-progress")
        watch.wait(job, "N1", "in-progress")
        assert [entry.status for entry in watch.entries] == ["queued", "sent", "in-progress"]


def test_hostile_messages_leave_the_service_at_work(
    broker: Mosquitto, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    watch = Watch()
    with ServiceThread(config_for(broker, tmp_path), wait_ready_s=WAIT_S, on_change=watch) as service:
        node = make_node("N1")
        job = service.jobs.create(import_image(service), ["N1"], mode=JobMode.ON_FETCH).id
        for suffix in ("otafetch", "otastatus", "config"):
            for payload in (b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"x" * (1 << 20)):
                node.publish(suffix, payload)
        node.fetch()
        assert node.job()["ota_job_id"] == job
        node.report(job, "success")
        watch.wait(job, "N1", "success")


def test_reports_made_while_the_service_is_away_are_counted_when_it_is_back(
    broker: Mosquitto, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    config = config_for(broker, tmp_path)
    node = make_node("N1")
    with ServiceThread(config, wait_ready_s=WAIT_S) as service:
        job = service.jobs.create(import_image(service), ["N1"]).id
        node.job()
    node.report(job, "success", "while you were away")
    watch = Watch()
    with ServiceThread(config, on_change=watch) as service:
        assert watch.wait(job, "N1", "success").info == "while you were away"
        assert service.store.job_nodes(job)[0].state.finished


def test_a_report_that_could_not_be_written_down_comes_again(
    broker: Mosquitto, make_node: Callable[..., Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(broker, tmp_path)
    node = make_node("N1")
    tried = threading.Event()

    def fail(*rest: object, **more: object) -> None:
        tried.set()
        raise sqlite3.OperationalError("database or disk is full")

    with ServiceThread(config, wait_ready_s=WAIT_S) as service:
        job = service.jobs.create(import_image(service), ["N1"]).id
        with monkeypatch.context() as patch:
            patch.setattr(service.store, "record", fail)
            node.report(job, "success", "the disk was full")
            assert tried.wait(WAIT_S)
    watch = Watch()
    with ServiceThread(config, on_change=watch):
        assert watch.wait(job, "N1", "success").info == "the disk was full"


def test_a_job_made_without_broker_is_pushed_once_it_is_there_again(
    broker: Mosquitto, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    watch = Watch()
    with ServiceThread(config_for(broker, tmp_path), wait_ready_s=WAIT_S, on_change=watch) as service:
        lost = threading.Event()
        service.mqtt._client.on_disconnect = lambda *rest: (service.mqtt._disconnected(*rest), lost.set())
        broker.kill()
        assert lost.wait(WAIT_S)
        job = service.jobs.create(import_image(service), ["N1"]).id
        assert [entry.status for entry in watch.entries] == ["queued"]
        broker.start()
        node = make_node("N1")
        # The node may be there before or after the service: the push reaches it, or its fetch does.
        watch.wait(job, "N1", "sent")
        node.fetch()
        assert node.job()["ota_job_id"] == job


def test_a_broker_of_another_authority_is_not_trusted(
    broker: Mosquitto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = config_for(broker, tmp_path)
    mixed = replace(config, mqtt=replace(config.mqtt, ca=Mosquitto(other).ca_file))
    with ServiceThread(mixed) as service:
        broker.wait_log("unknown ca")
        assert not service.mqtt.ready.is_set()
    assert "no connection to broker" in caplog.text


class StreamNode:
    """The node's side of an image stream: runs `StreamTransfer` on the network thread of a client."""

    def __init__(self, broker: Mosquitto, node_id: str, stream: str, size: int, options: StreamOptions) -> None:
        self.received = bytearray()
        self.ends: queue.Queue[Complete | Failed] = queue.Queue()
        self._transfer = StreamTransfer(node_id, stream, size, options)
        self._subscribing: dict[int, str] = {}
        identity = broker.identity(node_id)
        context = ssl.create_default_context(cafile=broker.ca_file)
        context.load_cert_chain(identity.cert_file, identity.key_file)
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=node_id)
        self._client.tls_set_context(context)
        self._client.on_connect = lambda *rest: self._feed(Begin())
        self._client.on_subscribe = self._subscribed
        self._client.on_message = lambda client, data, message: self._feed(Message(message.topic, message.payload))
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()

    def _subscribed(self, client: Client, userdata: object, mid: int, reasons: list[Any], properties: object) -> None:
        self._feed(SubscribeResult(self._subscribing.pop(mid), not reasons[0].is_failure))

    def _feed(self, event: Input) -> None:
        for action in self._transfer.handle(event):
            match action:
                case Subscribe(topic):
                    _, mid = self._client.subscribe(topic, 1)
                    assert mid is not None
                    self._subscribing[mid] = topic
                case Publish(topic, payload):
                    self._client.publish(topic, payload, qos=1)
                case Ready(offset, data):
                    self.received += data
                    if offset == 0:
                        self._feed(Accepted())
                case Complete() | Failed():
                    self.ends.put(action)

    def end(self) -> Complete | Failed:
        """Waits for the end of the transfer and disconnects."""
        try:
            return self.ends.get(timeout=WAIT_S)
        finally:
            self._client.disconnect()
            self._client.loop_stop()


@pytest.mark.parametrize("flavour", list(Flavour))
def test_an_image_travels_over_mqtt_alone(
    broker: Mosquitto, tmp_path: Path, make_node: Callable[..., Node], flavour: Flavour
) -> None:
    with ServiceThread(config_for(broker, tmp_path, "streams = true")) as service:
        image = import_image(service)
        node = make_node("N1")
        service.jobs.create(image, ["N1"], mode=JobMode.FORCE)
        job = node.job()
        node.close()
        options = StreamOptions(flavour=flavour, mqtt_ota_blocks_per_request=4, window=2)
        loader = StreamNode(broker, "N1", job["stream_id"], job["file_size"], options)
        assert loader.end() == Complete()
        assert bytes(loader.received) == esp_image()
        stranger = StreamNode(broker, "N2", job["stream_id"], job["file_size"], options)
        end = stranger.end()
        assert isinstance(end, Failed) and end.rejection is not None and end.rejection.code == "ResourceNotFound"
