"""Images over MQTT alone: real broker with mutual TLS, real agent, job service, and services that do not behave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from rmaker_ota.cloud.service import ServiceThread
from rmaker_ota.cloud.store import JobMode
from rmaker_ota.esp_build import build_image
from rmaker_ota.rainmaker.streams import HEADER_REQUEST, Block, BlockRequest
from rmaker_ota.targets.base import BootState
from tests.flows.test_cloud_mosquitto import config_for
from tests.flows.test_node_mosquitto import running
from tests.sim.agent import WAIT_S, Agent, Cloud
from tests.sim.mosquitto import Mosquitto, find_mosquitto
from tests.sim.stream_broker import Answer, Script, truthful
from tests.sim.stream_service import STREAM_ID, StreamService

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

NEW = build_image(version="2.0.0", project_name="gw", size=256 * 1024)
BLOCK = 4096
MQTT = {"ota_transport": "mqtt", "mqtt_ota_blocks_per_request": 8}

DOWNLOADING = ("in-progress", "Downloading Firmware Image")
COMPLETE = ("in-progress", "Firmware Image download complete")
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")


def starting(attempt: int) -> tuple[str, str]:
    return "in-progress", f"Starting OTA Upgrade (MQTT attempt {attempt}/3)"


def failed(attempt: int, why: str) -> tuple[str, str]:
    return "failed", f"OTA Attempt {attempt}/3 failed: {why}"


def rebooting(attempts: int) -> tuple[str, str]:
    return "in-progress", f"Rebooting into new firmware (after {attempts} MQTT attempt{'s' * (attempts > 1)})"


FINE = [starting(1), DOWNLOADING, COMPLETE, rebooting(1), SUCCESS]


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
def service(broker: Mosquitto) -> Iterator[StreamService]:
    with StreamService(broker, NEW) as service:
        yield service


@pytest.fixture
def agent(tmp_path: Path, broker: Mosquitto) -> Iterator[Agent]:
    with Agent(tmp_path / "node", broker, ota=MQTT) as agent:
        yield agent


def begin(agent: Agent, cloud: Cloud) -> None:
    agent.start()
    cloud.wait("otafetch")
    send(cloud)


def send(cloud: Cloud) -> None:
    cloud.send_job("https://nobody.invalid/", NEW, stream_id=STREAM_ID)


class Held:
    """Blocks up to one, then silence, until it is released."""

    def __init__(self, first_held: int) -> None:
        self.reached = threading.Event()
        self._first_held = first_held
        self._released = False

    def release(self) -> None:
        self._released = True

    def __call__(self, request: BlockRequest) -> Iterable[Answer]:
        for block in truthful(NEW, request):
            if request.bitmap is not None and block.number >= self._first_held and not self._released:
                self.reached.set()
                return
            yield block


# -- the job service


@pytest.mark.parametrize("flavour", ["cbor", "json"])
def test_a_whole_update_over_mqtt_alone(tmp_path: Path, broker: Mosquitto, cloud: Cloud, flavour: str) -> None:
    options = {**MQTT, "mqtt_ota_window": 4, "mqtt_ota_flavour": flavour}
    with (
        ServiceThread(config_for(broker, tmp_path, "streams = true"), wait_ready_s=WAIT_S) as jobs,
        Agent(tmp_path / "node", broker, ota=options) as agent,
    ):
        with jobs.images.begin("app.bin") as writer:
            writer.write(NEW)
            image = writer.commit().sha256
        agent.start()
        cloud.wait("otafetch")
        jobs.jobs.create(image, ["N1"], mode=JobMode.FORCE)
        cloud.wait_status(*SUCCESS)
        assert cloud.statuses() == FINE
        assert agent.stop() == 0
        assert running(agent) == ("ota_1", "2.0.0", BootState.VALID)


# -- cut short


def test_a_killed_download_goes_on_at_a_block_that_is_durable(
    agent: Agent, cloud: Cloud, service: StreamService
) -> None:
    held = service.script = Held(20)
    begin(agent, cloud)
    assert held.reached.wait(WAIT_S)
    agent.wait_log("state kept: ota_position, mqtt_ota_off", count=2)
    agent.kill()
    asked = len(service.requests)
    held.release()
    agent.start()
    cloud.wait("otafetch")
    send(cloud)
    cloud.wait_status(*SUCCESS)
    first = service.requests[asked]
    assert first.bitmap is not None, "the header was asked for again"
    assert first.offset == 16
    assert agent.stop() == 0
    assert running(agent) == ("ota_1", "2.0.0", BootState.VALID)


def test_a_lost_connection_costs_an_attempt_and_no_blocks(
    agent: Agent, broker: Mosquitto, cloud: Cloud, service: StreamService
) -> None:
    held = service.script = Held(20)
    begin(agent, cloud)
    assert held.reached.wait(WAIT_S)
    agent.wait_log("state kept: ota_position, mqtt_ota_off", count=2)
    asked = len(service.requests)
    held.release()
    broker.restart()
    cloud.wait_status(*SUCCESS)
    again = [request for request in service.requests[asked:] if request.offset < 16]
    assert again == []
    assert [one for one in agent.log.splitlines() if "OTA Attempt 1/3 failed: OTA failed: ESP_FAIL" in one]
    assert agent.stop() == 0
    assert running(agent) == ("ota_1", "2.0.0", BootState.VALID)


def test_a_second_node_of_the_same_name_takes_the_connection_for_a_while(
    tmp_path: Path, agent: Agent, broker: Mosquitto, cloud: Cloud, service: StreamService
) -> None:
    options = {**MQTT, "ota_max_retries": 10}
    held = service.script = Held(20)
    with Agent(tmp_path / "first", broker, ota=options) as first, Agent(tmp_path / "second", broker) as second:
        begin(first, cloud)
        assert held.reached.wait(WAIT_S)
        second.start()
        first.wait_log("OTA Attempt 1/10 failed")
        second.kill()
        held.release()
        cloud.wait_status(*SUCCESS)
        assert first.stop() == 0
        assert running(first) == ("ota_1", "2.0.0", BootState.VALID)
        assert running(second) == ("ota_0", "1.0.0", BootState.VALID)


# -- services that do not behave


def shuffled(request: BlockRequest) -> Iterable[Answer]:
    return reversed(truthful(NEW, request))


def doubled(request: BlockRequest) -> Iterable[Answer]:
    header = Block(1, 0, HEADER_REQUEST, NEW[:HEADER_REQUEST])
    return [header, *(block for block in truthful(NEW, request) for _ in range(2))]


def noisy(request: BlockRequest) -> Iterable[Answer]:
    for block in truthful(NEW, request):
        yield b"\x9f" * 10_000
        yield Block(1, 2**40, block.size, b"x")
        yield Block(1, block.number, block.size, bytes(150_000))
        yield block


@pytest.mark.parametrize("script", [shuffled, doubled, noisy])
def test_the_image_arrives_all_the_same(agent: Agent, cloud: Cloud, service: StreamService, script: Script) -> None:
    service.script = script
    begin(agent, cloud)
    cloud.wait_status(*SUCCESS)
    assert cloud.statuses() == FINE


def once(damage: Callable[[Block], list[Answer]], number: int = 9) -> Script:
    """One block of the first attempt is damaged."""
    left = [number]

    def script(request: BlockRequest) -> Iterable[Answer]:
        for block in truthful(NEW, request):
            if request.bitmap is not None and block.number in left:
                left.clear()
                yield from damage(block)
            else:
                yield block

    return script


def spoilt(block: Block) -> list[Answer]:
    return [Block(1, block.number, block.size, bytes([block.data[0] ^ 1]) + block.data[1:])]


def shortened(block: Block) -> list[Answer]:
    return [Block(1, block.number, block.size, block.data[:-1])]


def rejected(block: Block) -> list[Answer]:
    return [("InternalError", "try again")]


@pytest.mark.parametrize(
    ("damage", "why", "is_whole"),
    [
        (spoilt, "Image validation failed", True),
        (shortened, "Complete data was not received", False),
        (rejected, "OTA failed: ESP_FAIL (InternalError: try again)", False),
    ],
)
def test_a_damaged_answer_costs_an_attempt(
    agent: Agent,
    cloud: Cloud,
    service: StreamService,
    damage: Callable[[Block], list[Answer]],
    why: str,
    is_whole: bool,
) -> None:
    service.script = once(damage)
    begin(agent, cloud)
    cloud.wait_status(*SUCCESS)
    assert cloud.statuses() == [
        starting(1),
        DOWNLOADING,
        *([COMPLETE] if is_whole else []),
        failed(1, why),
        starting(2),
        DOWNLOADING,
        COMPLETE,
        rebooting(2),
        SUCCESS,
    ]
    assert agent.stop() == 0
    assert running(agent) == ("ota_1", "2.0.0", BootState.VALID)


def test_a_lost_block_is_asked_for_again(
    tmp_path: Path, broker: Mosquitto, cloud: Cloud, service: StreamService
) -> None:
    service.script = once(lambda block: [])
    with Agent(tmp_path / "node", broker, ota={**MQTT, "mqtt_ota_block_wait_s": 5}) as agent:
        begin(agent, cloud)
        cloud.wait_status(*SUCCESS)
        assert cloud.statuses() == FINE
        assert BlockRequest(BLOCK, 8, 8, b"\x02") in service.requests


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (len(NEW) - 100, "Complete data was not received"),
        (len(NEW) - BLOCK, "Image validation failed"),
        (len(NEW) + 100, "OTA failed: ESP_FAIL (OffsetOutOfBounds: no such block)"),
    ],
)
def test_a_size_that_is_not_the_streams_leaves_the_old_image(
    agent: Agent, cloud: Cloud, service: StreamService, size: int, why: str
) -> None:
    def script(request: BlockRequest) -> Iterable[Answer]:
        if request.offset * request.block_size >= len(NEW):
            return [("OffsetOutOfBounds", "no such block")]
        return truthful(NEW, request)

    service.script = script
    agent.start()
    cloud.wait("otafetch")
    cloud.send_job("https://nobody.invalid/", NEW, stream_id=STREAM_ID, file_size=size)
    for attempt in (1, 2, 3):
        cloud.wait_status(*failed(attempt, why))
    assert agent.stop() == 0
    assert running(agent) == ("ota_0", "1.0.0", BootState.VALID)
