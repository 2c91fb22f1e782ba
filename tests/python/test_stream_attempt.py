"""Images over MQTT through the whole node: rules, transfer, engine, virtual chip. Time and broker are the test's."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota.config import MqttSection, NodeConfig, NodeSection, OtaSection, RestartSection, TargetSection
from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker.application import OtaConfig, OtaHandle
from rmaker_ota.rainmaker.loop import VirtualClock
from rmaker_ota.rainmaker.node import Node
from rmaker_ota.rainmaker.store import MemoryStore, Value
from rmaker_ota.rainmaker.streams import HEADER_REQUEST, MAX_MESSAGE, Block, BlockRequest, Flavour
from rmaker_ota.rainmaker.types import OtaData, OtaType
from rmaker_ota.targets.esp32_image import Esp32ImageTarget
from tests.python.chips import image, make_chip, otadata, slot_bytes, version_of
from tests.sim.node_world import OTASTATUS, OTAURL, WAIT_S
from tests.sim.stream_broker import Answer, Script, StreamBroker

NEW = image("3.0.0")
MD5 = hashlib.md5(NEW, usedforsecurity=False).hexdigest()
SMALL = {"mqtt_ota_block_size": 512, "mqtt_ota_blocks_per_request": 4}
STARTING = "Starting OTA Upgrade (MQTT attempt 1/3)"
DOWNLOADING = "Downloading Firmware Image"
COMPLETE = "Firmware Image download complete"
REBOOTING = "Rebooting into new firmware (after 1 MQTT attempt)"
GOOD = [STARTING, DOWNLOADING, COMPLETE, REBOOTING]


class WatchedStore(MemoryStore):
    """Tells when a position was kept."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = threading.Condition()

    def update(self, changes: Mapping[str, Value | None]) -> None:
        super().update(changes)
        with self._kept:
            self._kept.notify_all()

    def wait_offset(self, offset: int) -> None:
        with self._kept:
            assert self._kept.wait_for(lambda: self.items().get("mqtt_ota_off") == offset, WAIT_S)


class World:
    """A chip file, a store and the time outlive the node."""

    def __init__(self, directory: Path, file: bytes = NEW, **ota: Any) -> None:
        self.path = make_chip(directory / "chip.bin")
        self.store = WatchedStore()
        self.clock = VirtualClock()
        self.file = file
        self.ota = {"ota_transport": "mqtt", **SMALL, **ota}
        self.node: Node | None = None
        self.restarts: list[str] = []

    def boot(self, config: OtaConfig | None = None, script: Script | None = None) -> Node:
        self.stop()
        flavour = Flavour(self.ota.get("mqtt_ota_flavour", "cbor"))
        self.broker = StreamBroker(self.file, flavour=flavour, clock=self.clock.monotonic)
        if script is not None:
            self.broker.script = script
        self.target = Esp32ImageTarget(self.path)
        self.node = Node(
            NodeConfig(
                node=NodeSection(id="N1", name="gw"),
                mqtt=MqttSection(host="broker.invalid", cert=Path("node.crt"), key=Path("node.key")),
                ota=OtaSection(**self.ota),
                target=TargetSection(f"esp32-image:{self.path}"),
                restart=RestartSection(),
            ),
            target=self.target,
            state=self.store,
            transport=self.broker,
            clock=self.clock,
            restarter=self.restarts.append,
        )
        assert self.node.enable(config, OtaType.USING_TOPICS) == EspErr.OK
        self.node.start()
        self.broker.go_online()
        self.node.settle()
        return self.node

    def stop(self) -> None:
        if self.node is not None:
            self.node.stop()

    def job(self, **fields: object) -> None:
        job = {"ota_job_id": "J1", "url": "https://x/y", "stream_id": "S1", "file_size": len(self.file), **fields}
        assert self.broker.deliver(OTAURL, json.dumps(job))

    def wait(self, text: str, since: int = 0) -> None:
        """Until that was reported."""
        self.broker.wait_for(lambda one: one.topic == OTASTATUS and text.encode() in one.payload, since=since)

    def wait_requests(self, count: int) -> None:
        self.broker.wait_for(lambda one: len(self.broker.requests) >= count and one.topic == self.broker.topics.get)

    @property
    def reports(self) -> list[str]:
        sent = [json.loads(one.payload) for one in self.broker.sent if one.topic == OTASTATUS]
        return [one["additional_info"] for one in sent]

    def body_requests(self) -> list[tuple[int, int | None]]:
        return [(one.offset, one.count) for one in self.broker.requests if one.bitmap is not None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.stop()


def make(tmp_path: Path, **ota: Any) -> Iterator[World]:
    world = World(tmp_path, **ota)
    yield world
    world.stop()


# -- the way it should go


@pytest.mark.parametrize("flavour", ["cbor", "json"])
@pytest.mark.parametrize("window", [1, 3])
def test_an_image_arrives_in_the_slot_and_boots(directory: Path, flavour: str, window: int) -> None:
    world = World(directory, mqtt_ota_flavour=flavour, mqtt_ota_window=window)
    world.boot()
    world.job(file_md5=MD5)
    world.wait(REBOOTING)
    assert world.reports == GOOD
    assert slot_bytes(world.path, "ota_1", len(NEW)) == NEW
    topics = world.broker.topics
    stream = [(one.kind, one.topic) for one in world.broker.sent if "streams" in one.topic]
    assert stream[:3] == [("subscribe", topics.rejected), ("subscribe", topics.data), ("publish", topics.get)]
    assert stream[-2:] == [("unsubscribe", topics.rejected), ("unsubscribe", topics.data)]
    assert world.broker.requests[0] == BlockRequest(HEADER_REQUEST)
    world.clock.advance(10)
    assert world.restarts == ["new firmware"]
    world.boot()
    assert version_of(world.target) == "3.0.0"
    world.wait("OTA Upgrade finished and verified successfully")
    kept = set(world.store.items())
    assert not kept & {"mqtt_ota_off", "mqtt_ota_md5", "ota_position"}
    world.stop()


def test_the_order_of_reports_and_subscriptions_is_that_of_the_specification(world: World) -> None:
    world.boot()
    world.job()
    world.wait(REBOOTING)
    names = {world.broker.topics.get: "get", OTASTATUS: "status"}
    seen = [
        names.get(one.topic, one.kind) for one in world.broker.sent if "stream" in one.topic or one.topic == OTASTATUS
    ]
    batches = math.ceil(len(NEW) / (512 * 4))
    assert seen == [
        "status",
        "subscribe",
        "subscribe",
        "get",  # the header
        "status",  # downloading
        *["get"] * batches,
        "status",  # complete
        "unsubscribe",
        "unsubscribe",
        "status",  # rebooting
    ]


# -- hostile and clumsy servers


def shuffled(broker: StreamBroker) -> Script:
    return lambda request: reversed(broker.blocks(request))


def doubled(broker: StreamBroker) -> Script:
    return lambda request: [block for block in broker.blocks(request) for _ in (1, 2)]


def noisy(broker: StreamBroker) -> Script:
    """Between the blocks comes what no node can use."""

    def script(request: BlockRequest) -> Iterable[Answer]:
        size = request.block_size
        for block in broker.blocks(request):
            yield b""
            yield b"\xff" * 100
            yield b"\x9f" * 5000  # nested arrays
            yield Block(1, 2**40, size, b"x" * size)  # a number beyond the file
            yield Block(1, block.number, size, bytes(200_000))  # longer than was asked for
            yield Block(7, block.number, 2**60, block.data)  # lies about file and size, which nobody looks at
            yield block

    return script


def header_again(broker: StreamBroker) -> Script:
    """The answer to the header request comes again with every batch, as a broker that repeats sends it."""
    header = Block(1, 0, HEADER_REQUEST, broker.file[:HEADER_REQUEST])
    return lambda request: [header, *broker.blocks(request), header]


@pytest.mark.parametrize("behaviour", [shuffled, doubled, noisy, header_again])
def test_the_image_arrives_all_the_same(world: World, behaviour: Any) -> None:
    world.boot()
    world.broker.script = behaviour(world.broker)
    world.job(file_md5=MD5)
    world.wait(REBOOTING)
    assert world.reports == GOOD and slot_bytes(world.path, "ota_1", len(NEW)) == NEW


def test_a_lost_block_is_asked_for_again(world: World) -> None:
    world.boot()
    lost = {5}

    def script(request: BlockRequest) -> Iterable[Answer]:
        for block in world.broker.blocks(request):
            if request.bitmap is not None and block.number in lost:
                lost.remove(block.number)
            else:
                yield block

    world.broker.script = script
    world.job()
    world.wait_requests(3)
    world.node.settle()
    world.clock.advance(9.9)
    assert world.body_requests() == [(0, 4), (4, 4)]
    world.clock.advance(0.2)
    world.wait(REBOOTING)
    assert world.broker.requests[3] == BlockRequest(512, 4, 4, b"\x02")
    assert world.reports == GOOD


def test_a_silent_server_fails_every_attempt_after_its_repetitions(world: World) -> None:
    world.boot(script=lambda _: [])
    world.broker.script = lambda request: [] if request.bitmap else world.broker.blocks(request)
    world.job()
    for attempt in (1, 2, 3):
        world.wait(f"Starting OTA Upgrade (MQTT attempt {attempt}/3)")
        world.wait_requests(5 * attempt - 3)
        world.node.settle()
        world.clock.advance(40)
        world.wait(f"OTA Attempt {attempt}/3 failed: OTA failed: ESP_FAIL")
    assert world.body_requests() == [(0, 4)] * 12  # one and three repetitions, three times
    assert otadata(world.path)[1] == "blank"


def test_a_header_that_does_not_come(world: World) -> None:
    world.boot(script=lambda _: [])
    world.job()
    world.wait_requests(1)
    world.node.settle()
    world.clock.advance(10)
    world.wait("OTA Attempt 1/3 failed: Failed to read image description: ESP_FAIL")


def test_a_rejection_is_told_in_the_report(world: World) -> None:
    world.boot(script=lambda _: [("ResourceNotFound", "no such\nstream")])
    world.job()
    world.wait("OTA Attempt 3/3 failed")
    description = "Failed to read image description: ESP_FAIL (ResourceNotFound: no such?stream)"
    assert [one for one in world.reports if "failed" in one] == [
        f"OTA Attempt {n}/3 failed: {description}" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("announced", "description"),
    [
        (len(NEW) + 1, "Complete data was not received"),
        (len(NEW) - 1, "Complete data was not received"),
        (len(NEW) // 512 * 512, "Image validation failed"),
    ],
)
def test_an_announced_size_that_is_not_the_streams(world: World, announced: int, description: str) -> None:
    world.boot()

    def script(request: BlockRequest) -> Iterable[Answer]:
        if request.offset * request.block_size >= len(NEW):
            return [("OffsetOutOfBounds", "beyond the file")]
        return world.broker.blocks(request)

    world.broker.script = script
    world.job(file_size=announced)
    world.wait("OTA Attempt 3/3 failed")
    failures = [one for one in world.reports if "failed" in one]
    assert failures == [f"OTA Attempt {n}/3 failed: {description}" for n in (1, 2, 3)]
    assert otadata(world.path)[1] == "blank"


def test_an_announced_size_far_beyond_the_stream(world: World) -> None:
    world.boot()
    world.job(file_size=len(NEW) + 5000)
    for attempt in (1, 2, 3):
        world.wait(f"Starting OTA Upgrade (MQTT attempt {attempt}/3)")
        world.wait_requests(attempt * 6 + (attempt - 1) * 3)
        world.node.settle()
        world.clock.advance(40)
        world.wait(f"OTA Attempt {attempt}/3 failed: Complete data was not received")


def test_a_damaged_block_is_found_before_the_image_can_boot(world: World) -> None:
    world.boot()

    def script(request: BlockRequest) -> Iterable[Answer]:
        for block in world.broker.blocks(request):
            damaged = bytes([block.data[-1] ^ 1])
            yield Block(1, block.number, block.size, block.data[:-1] + damaged) if block.number == 9 else block

    world.broker.script = script
    world.job(file_md5=MD5)
    world.wait("OTA Attempt 1/3 failed: Image validation failed")
    assert otadata(world.path)[1] == "blank"


@pytest.mark.parametrize("stream", ["a/b", "#", "+", "x\0y", "$aws/things/N2"])
def test_a_stream_id_that_would_reach_other_topics_fails(world: World, stream: str) -> None:
    world.boot()
    world.job(stream_id=stream)
    world.wait("OTA Attempt 3/3 failed: ESP MQTT OTA Begin failed: ESP_FAIL")
    assert not [one for one in world.broker.sent if "streams" in one.topic]


# -- jobs without a stream


@pytest.mark.parametrize("fields", [{"file_size": 0}, {"stream_id": ""}, {"file_size": -5}])
def test_a_job_without_stream_or_size_is_reported(world: World, fields: dict[str, object]) -> None:
    world.boot()
    world.job(**fields)
    world.wait("Missing stream_id or filesize for MQTT OTA")
    assert world.reports == ["Missing stream_id or filesize for MQTT OTA"]


def test_a_job_without_stream_id_is_none(world: World) -> None:
    world.boot()
    world.job(stream_id=None)
    world.wait("Aborted. Stream ID not found in JSON")


# -- disconnects, restarts


def half(world: World, first: int) -> Script:
    """Blocks before ``first`` only."""
    return lambda request: [
        block for block in world.broker.blocks(request) if request.bitmap is None or block.number < first
    ]


def test_a_disconnect_ends_the_attempt_and_the_next_one_resumes(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.broker.go_offline()
    world.node.settle()
    world.clock.advance(30)
    world.broker.script = world.broker.blocks
    asked = len(world.broker.requests)
    world.broker.go_online()
    world.wait("Rebooting")
    assert world.reports[2:] == [
        "OTA Attempt 1/3 failed: OTA failed: ESP_FAIL",
        "Starting OTA Upgrade (MQTT attempt 2/3)",
        DOWNLOADING,
        COMPLETE,
        "Rebooting into new firmware (after 2 MQTT attempts)",
    ]
    assert world.broker.requests[asked] == BlockRequest(512, 8, 4, b"\x0f")
    assert slot_bytes(world.path, "ota_1", len(NEW)) == NEW


def test_a_connection_that_stays_away_fails_the_attempts_that_wait_for_it(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.broker.go_offline()
    world.node.settle()
    world.clock.advance(59.9)
    world.clock.advance(60.2)
    world.broker.go_online()
    world.wait("OTA Attempt 3/3 failed: MQTT not connected")
    failures = [one for one in world.reports if "failed" in one]
    assert failures[1:] == [f"OTA Attempt {n}/3 failed: MQTT not connected" for n in (2, 3)]


def test_a_connection_that_comes_and_goes_is_looked_for_until_the_wait_is_over(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.broker.go_offline()
    world.node.settle()
    asked = len(world.broker.requests)
    world.clock.advance(1.2)
    world.broker.go_online()
    world.node.settle()
    world.broker.go_offline()
    world.node.settle()
    world.clock.advance(58.7)
    world.node.settle()
    assert len(world.broker.requests) == asked
    assert world.reports[-1] == "Starting OTA Upgrade (MQTT attempt 2/3)"
    world.clock.advance(0.2)
    world.node.settle()
    world.clock.advance(0.2)
    world.broker.script = world.broker.blocks
    world.broker.go_online()
    world.node.settle()
    assert len(world.broker.requests) == asked
    world.clock.advance(0.5)
    world.wait("Rebooting")
    assert "OTA Attempt 2/3 failed: MQTT not connected" in world.reports
    assert slot_bytes(world.path, "ota_1", len(NEW)) == NEW


def test_a_restart_resumes_where_the_bytes_are_durable(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.boot()
    world.job(file_md5=MD5.upper())
    world.wait(REBOOTING)
    assert world.reports == GOOD
    assert world.broker.requests[0] == BlockRequest(512, 8, 4, b"\x0f")  # no header request
    assert slot_bytes(world.path, "ota_1", len(NEW)) == NEW


def test_another_block_size_resumes_at_the_same_byte(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.ota |= {"mqtt_ota_block_size": 700}
    world.boot()
    world.job(file_md5=MD5)
    world.wait(REBOOTING)
    assert world.broker.requests[0].offset == 4096 // 700
    assert slot_bytes(world.path, "ota_1", len(NEW)) == NEW


def test_a_slot_that_was_changed_in_between_starts_over(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.stop()
    with world.path.open("r+b") as file:
        file.seek(0x40000 + 1000)
        file.write(b"changed")
    world.boot()
    world.job(file_md5=MD5)
    world.wait("Rebooting")
    assert slot_bytes(world.path, "ota_1", len(NEW)) == NEW
    assert world.reports[-1] == "Rebooting into new firmware (after 2 MQTT attempts)"


def test_another_image_under_the_same_job_starts_over(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.node.settle()
    world.file = image("4.0.0")
    world.boot()
    world.job(file_md5=hashlib.md5(world.file, usedforsecurity=False).hexdigest())
    world.wait(REBOOTING)
    assert world.broker.requests[0] == BlockRequest(HEADER_REQUEST)
    assert slot_bytes(world.path, "ota_1", len(world.file)) == world.file


def test_stopping_in_the_middle_gives_the_subscriptions_back(world: World) -> None:
    world.boot()
    world.broker.script = half(world, 10)
    world.job(file_md5=MD5)
    world.store.wait_offset(4096)
    world.stop()
    topics = world.broker.topics
    gone = [one.topic for one in world.broker.sent if one.kind == "unsubscribe"]
    assert gone[-2:] == [topics.rejected, topics.data]


# -- the callbacks by name


@pytest.mark.parametrize(
    ("configured", "call", "label"),
    [("https", "mqtt_cb", "MQTT"), ("mqtt", "default_cb", "MQTT"), ("mqtt", "https_cb", "HTTPS")],
)
def test_each_transport_can_be_called(directory: Path, configured: str, call: str, label: str) -> None:
    from rmaker_ota import esp_rmaker_ota as api

    results: list[int] = []

    def callback(handle: OtaHandle, data: OtaData) -> None:
        assert data.stream_id == "S1"
        results.append(getattr(api, f"esp_rmaker_ota_{call}")(handle, data))

    world = World(directory, ota_transport=configured, ota_max_retries=1)
    world.boot(OtaConfig(ota_cb=callback))
    world.job(url="https://127.0.0.1:1/x")
    world.wait("Rebooting" if label == "MQTT" else "OTA Attempt 1/1 failed")
    world.stop()
    assert world.reports[0] == f"Starting OTA Upgrade ({label} attempt 1/{1})"
    assert results == [EspErr.OK if label == "MQTT" else EspErr.FAIL]


def test_a_flood_of_blocks_is_bounded(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """What a server sends beyond what was asked for does not pile up."""
    world.boot()
    gate, reached = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reached.set()
        assert gate.wait(WAIT_S)

    assert world.node is not None
    world.broker.script = lambda request: [] if request.bitmap else world.broker.blocks(request)
    world.job()
    world.wait_requests(2)
    world.node._loop._handle, handle = hold, world.node._loop._handle  # the loop is busy
    world.node._loop.post(None)
    assert reached.wait(WAIT_S)
    for _ in range(100):
        world.broker.send(Block(1, 0, 512, bytes(100_000)))
    listener = world.node._listener
    assert listener._stream_bytes <= 3 * 2048 + 2 * MAX_MESSAGE
    assert "dropping some" in caplog.text
    world.node._loop._handle = handle
    gate.set()
    world.node.settle()
    assert listener._stream_bytes == 0
