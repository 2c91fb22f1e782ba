"""The job service's streams: which blocks are sent, which error is the answer, and whole transfers in memory."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmaker_ota.cloud.images import stream_id
from rmaker_ota.cloud.jobs import JobService
from rmaker_ota.cloud.streams import (
    MAX_DELIVERY,
    MAX_REQUEST,
    StreamError,
    StreamServer,
    check_request,
    parse_topic,
)
from rmaker_ota.rainmaker.messages import parse_otaurl
from rmaker_ota.rainmaker.streams import (
    MAX_BITMAP,
    Accepted,
    Action,
    Begin,
    BlockRequest,
    Complete,
    Failed,
    Flavour,
    Message,
    Publish,
    Ready,
    StreamOptions,
    StreamTransfer,
    Subscribe,
    SubscribeResult,
    parse_block,
    parse_rejection,
)
from tests.python.cloud_parts import Cloud, esp_image


class Side:
    """A server with one image and an open job for node N1."""

    def __init__(self, directory: Path, size: int = 66_000) -> None:
        self.cloud = Cloud(directory)
        self.content = esp_image(size)
        self.sha256 = self.cloud.add_image(self.content)
        self.job = self.cloud.jobs.create(self.sha256, ["N1"])
        self.stream = stream_id(self.sha256)
        self.server = StreamServer(self.cloud.store, self.cloud.images)

    def ask(
        self, payload: bytes, *, node: str = "N1", verb: str = "get", flavour: Flavour = Flavour.CBOR
    ) -> list[tuple[str, bytes]]:
        topic = f"$aws/things/{node}/streams/{self.stream}/{verb}/{flavour}"
        return list(self.server.handle(topic, payload))

    def code(self, payload: bytes, *, node: str = "N1", flavour: Flavour = Flavour.CBOR) -> str:
        ((topic, answer),) = self.ask(payload, node=node, flavour=flavour)
        assert topic == f"$aws/things/{node}/streams/{self.stream}/rejected/{flavour}"
        return parse_rejection(answer, flavour).code


@pytest.fixture
def side(tmp_path: Path) -> Side:
    return Side(tmp_path)


@pytest.mark.parametrize(
    "topic",
    [
        "$aws/things/N1/streams/S/data/cbor",
        "$aws/things/N1/streams/S/get/xml",
        "$aws/things/N1/streams/S/get",
        "$aws/things//streams/S/get/cbor",
        "$aws/things/N1/jobs/S/get/cbor",
        "node/N1/otafetch",
    ],
)
def test_other_topics_are_not_answered(side: Side, topic: str) -> None:
    assert parse_topic(topic) is None
    assert list(side.server.handle(topic, b"")) == []


@pytest.mark.parametrize("flavour", list(Flavour))
def test_the_header_request_is_answered_with_the_first_289_bytes(side: Side, flavour: Flavour) -> None:
    ((topic, payload),) = side.ask(BlockRequest(289).encode(flavour), flavour=flavour)
    assert topic == f"$aws/things/N1/streams/{side.stream}/data/{flavour}"
    block = parse_block(payload, flavour)
    assert (block.file_id, block.number, block.size, block.data) == (1, 0, 289, side.content[:289])


def test_only_wanted_blocks_are_sent(side: Side) -> None:
    request = BlockRequest(4096, 8, 16, b"\x09\x80")
    assert [parse_block(p).number for _, p in side.ask(request.encode())] == [8, 11]  # 23 is behind the end


@given(
    size=st.integers(1, 20_000),
    offset=st.integers(0, 100),
    count=st.none() | st.integers(1, 50),
    bitmap=st.none() | st.binary(max_size=12),
)
def test_blocks_are_those_of_the_bitmap_inside_the_file(
    size: int, offset: int, count: int | None, bitmap: bytes | None
) -> None:
    blocks = -(-size // 256)
    request = BlockRequest(256, offset, count, bitmap)
    if offset >= blocks:
        with pytest.raises(StreamError):
            check_request(request, size)
        return
    wanted = [n for n in range(offset, blocks) if bitmap is None or wants(bitmap, n - offset)]
    assert check_request(request, size) == wanted[:count]


def wants(bitmap: bytes, bit: int) -> bool:
    return bit // 8 < len(bitmap) and bool(bitmap[bit // 8] >> bit % 8 & 1)


def test_one_request_delivers_no_more_than_128_kib() -> None:
    numbers = check_request(BlockRequest(4096, 2, 98_304, b"\xff" * (MAX_BITMAP - 1)), 1 << 30)
    assert numbers == list(range(2, 2 + MAX_DELIVERY // 4096))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"l": 255}, "BlockSizeOutOfBounds"),
        ({"l": 131_073}, "BlockSizeOutOfBounds"),
        ({"o": 17}, "OffsetOutOfBounds"),
        ({"o": 98_305, "l": 256}, "OffsetOutOfBounds"),
        ({"n": 0}, "BlockCountLimitExceeded"),
        ({"n": 98_305}, "BlockCountLimitExceeded"),
        ({"b": bytes(MAX_BITMAP)}, "BlockBitmapLimitExceeded"),
        ({"f": 0}, "ResourceNotFound"),
        ({"s": 2}, "VersionMismatch"),
        ({"l": "x"}, "InvalidRequest"),
        ({"o": -1}, "InvalidRequest"),
        ({"b": 5}, "InvalidRequest"),
        ({"c": "x" * 65}, "InvalidRequest"),
        ({"x": bytes(MAX_REQUEST)}, "InvalidRequest"),
    ],
)
def test_each_limit_has_its_error_code(side: Side, fields: dict[str, object], code: str) -> None:
    assert side.code(cbor2.dumps({"f": 1, "l": 4096, "o": 0, "n": 1, **fields})) == code


def test_malformed_requests_are_named_after_their_flavour(side: Side) -> None:
    assert side.code(b"\xa1") == "InvalidCbor"
    assert side.code(b"{", flavour=Flavour.JSON) == "InvalidJson"


def test_the_token_comes_back_with_blocks_and_errors(side: Side) -> None:
    ((_, good),) = side.ask(BlockRequest(256, token="t1").encode())
    ((_, bad),) = side.ask(BlockRequest(255, token="t2").encode())
    assert cbor2.loads(good)["c"] == "t1"
    assert cbor2.loads(bad)["c"] == "t2"


def test_a_node_reads_only_images_of_its_own_open_jobs(side: Side) -> None:
    assert side.code(BlockRequest(256).encode(), node="N2") == "ResourceNotFound"
    assert len(side.ask(BlockRequest(256).encode())[0][1]) > 256
    side.cloud.jobs.cancel(side.job.id)
    assert side.code(BlockRequest(256).encode()) == "ResourceNotFound"


def test_an_image_that_cannot_be_read_is_an_internal_error(side: Side) -> None:
    side.cloud.images.path(side.sha256).write_bytes(b"cut")
    assert side.code(BlockRequest(256).encode()) == "InternalError"
    side.cloud.images.path(side.sha256).unlink()
    assert side.code(BlockRequest(256).encode()) == "InternalError"


def test_a_stream_is_described(side: Side) -> None:
    ((topic, payload),) = side.ask(b'{"c":"t"}', verb="describe", flavour=Flavour.JSON)
    assert topic == f"$aws/things/N1/streams/{side.stream}/description/json"
    assert json.loads(payload) == {"c": "t", "s": 1, "d": "app.bin", "r": [{"f": 1, "z": 66_000}]}
    ((topic, payload),) = side.ask(b"\xa0", verb="describe")
    assert topic.endswith("/description/cbor") and cbor2.loads(payload)["r"] == [{"f": 1, "z": 66_000}]


@pytest.mark.parametrize("streams", [False, True])
def test_nodes_are_told_the_stream_id_only_when_streams_are_offered(side: Side, streams: bool) -> None:
    sent: list[bytes] = []
    cloud = side.cloud

    def publish(topic: str, payload: bytes) -> bool:
        sent.append(payload)
        return True

    jobs = JobService(cloud.store, cloud.images, cloud.links, publish=publish, clock=cloud.clock, streams=streams)
    jobs.create(side.sha256, ["N1"])
    assert parse_otaurl(sent[0]).stream_id == (side.stream if streams else None)


# ---- Whole transfers --------------------------------------------------------------------------------------------


def transfer(side: Side, options: StreamOptions, node: str = "N1", stream: str | None = None) -> tuple[bytes, Any, int]:
    """Runs node and server against each other; returns what arrived, how it ended and how many requests it took."""
    machine = StreamTransfer(node, stream or side.stream, len(side.content), options)
    received, requests, end = bytearray(), 0, None
    pending: deque[Action] = deque(machine.handle(Begin()))
    messages: deque[tuple[str, bytes]] = deque()
    while pending or messages:
        if not pending:
            pending.extend(machine.handle(Message(*messages.popleft())))
            continue
        match pending.popleft():
            case Subscribe(topic):
                pending.extendleft(reversed(machine.handle(SubscribeResult(topic, True))))
            case Publish(topic, payload):
                requests += 1
                messages.extend(side.server.handle(topic, payload))
            case Ready(offset, data):
                received += data
                if offset == 0:
                    pending.extend(machine.handle(Accepted()))
            case Complete() | Failed() as last:
                end = last
    return bytes(received), end, requests


@pytest.mark.parametrize("flavour", list(Flavour))
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(("size", "requests"), [(300, 2), (65_536, 2), (66_000, 3), (300_001, 6)])
def test_a_node_fetches_a_whole_image(tmp_path: Path, size: int, requests: int, window: int, flavour: Flavour) -> None:
    side = Side(tmp_path, size)
    received, end, asked = transfer(side, StreamOptions(window=window, flavour=flavour))
    assert received == side.content and end == Complete() and asked == requests


def test_a_node_is_told_why_it_gets_nothing(side: Side) -> None:
    received, end, _ = transfer(side, StreamOptions(), stream="nothing")
    assert received == b"" and isinstance(end, Failed)
    assert end.detail == "ResourceNotFound: no such stream for this node"
