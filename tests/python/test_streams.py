"""The image over MQTT: exact requests out, hostile messages in, and every order of blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rmaker_ota.rainmaker.streams import (
    HEADER_REQUEST,
    HEADER_SIZE,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_MESSAGE,
    MISSING_STREAM,
    Accepted,
    Action,
    Begin,
    Block,
    BlockRequest,
    Checkpoint,
    Close,
    Complete,
    Disconnected,
    Failed,
    Flavour,
    Input,
    Message,
    Publish,
    PublishResult,
    Ready,
    Rejection,
    StartTimer,
    StopTimer,
    StreamMessageError,
    StreamOptions,
    StreamTopics,
    StreamTransfer,
    Subscribe,
    SubscribeResult,
    Taken,
    TimerFired,
    Unsubscribe,
    parse_block,
    parse_rejection,
    parse_request,
)
from rmaker_ota.rainmaker.workflow import Stage

SMALL = StreamOptions(mqtt_ota_block_size=512, mqtt_ota_blocks_per_request=4)
TOPICS = StreamTopics("N1", "S1")


def image(size: int) -> bytes:
    return bytes((at * 7 + (at >> 8)) & 0xFF for at in range(size))


class Bench:
    """A transfer with its actions sorted: what was asked for, what was handed out, how it ended."""

    def __init__(self, file: bytes, options: StreamOptions = SMALL, *, size: int | None = None) -> None:
        self.file, self.options = file, options
        self.transfer = StreamTransfer("N1", "S1", len(file) if size is None else size, options)
        self.requests: list[BlockRequest] = []
        self.received = bytearray()
        self.start = 0
        self.checkpoints: list[int] = []
        self.timer: StartTimer | None = None
        self.failed: Failed | None = None
        self.complete = False
        self.unsubscribed: list[str] = []
        self.most_buffered = 0

    def feed(self, event: Input) -> list[Action]:
        actions = self.transfer.handle(event)
        self.most_buffered = max(self.most_buffered, self.transfer.buffered)
        for action in actions:
            match action:
                case Subscribe():
                    self.feed(SubscribeResult(action.topic, True))
                case Publish():
                    assert action.topic == self.transfer.topics.get
                    self.requests.append(parse_request(action.payload, self.options.flavour))
                case Ready():
                    assert not self.complete and action.data
                    assert action.offset == self.start + len(self.received)
                    self.received += action.data
                case Checkpoint():
                    assert action.offset == self.start + len(self.received)
                    self.checkpoints.append(action.offset)
                case StartTimer():
                    self.timer = action
                case StopTimer():
                    self.timer = None
                case Failed():
                    assert self.failed is None and not self.complete
                    self.failed = action
                case Complete():
                    self.complete = True
                case Unsubscribe():
                    self.unsubscribed.append(action.topic)
        return actions

    def begin(self, offset: int = 0) -> Bench:
        self.start = offset if 0 < offset < len(self.file) else 0
        self.feed(Begin(offset))
        if self.start > 0:
            assert self.requests == []  # not before the image on the slot was looked at
            self.feed(Accepted())
        return self

    def to_body(self) -> Bench:
        self.begin()
        self.block(0, size=HEADER_REQUEST)
        self.feed(Accepted())
        return self

    def block(self, number: int, *, size: int | None = None, data: bytes | None = None) -> list[Action]:
        size = self.options.mqtt_ota_block_size if size is None else size
        if data is None:
            data = self.file[number * size : (number + 1) * size]
        payload = Block(1, number, size, data).encode(self.options.flavour)
        return self.feed(Message(self.transfer.topics.data, payload))

    def fire(self) -> list[Action]:
        assert self.timer is not None
        return self.feed(TimerFired(self.timer.number))

    def wanted(self, request: BlockRequest) -> list[int]:
        assert request.bitmap is not None and request.count is not None
        bits = int.from_bytes(request.bitmap, "little")
        return [request.offset + i for i in range(request.count) if bits >> i & 1]

    def serve(self) -> None:
        """Answers all requests, in order, until the transfer is over."""
        at = len(self.requests) - len([r for r in self.requests if r.bitmap is not None])
        while at < len(self.requests) and not self.complete and self.failed is None:
            for number in self.wanted(self.requests[at]):
                self.block(number)
            at += 1


# ---- Topics and requests ----------------------------------------------------------------------------------------


def test_topics_end_in_the_flavour() -> None:
    assert TOPICS.get == "$aws/things/N1/streams/S1/get/cbor"
    assert TOPICS.data == "$aws/things/N1/streams/S1/data/cbor"
    assert TOPICS.rejected == "$aws/things/N1/streams/S1/rejected/cbor"
    plain = StreamTopics("N1", "S1", Flavour.JSON)
    assert plain.describe == "$aws/things/N1/streams/S1/describe/json"
    assert plain.description == "$aws/things/N1/streams/S1/description/json"


@pytest.mark.parametrize("stream_id", ["", "+", "a/b", "#", "a\0"])
def test_a_stream_id_that_is_no_topic_level_is_refused(stream_id: str) -> None:
    with pytest.raises(ValueError, match=r"stream_id|Missing"):
        StreamTransfer("N1", stream_id, 1000)


def test_a_long_stream_id_is_taken() -> None:
    assert len(StreamTransfer("N" * 22, "S" * 200, 1000).topics.data) > 100


@pytest.mark.parametrize(("stream_id", "size"), [(None, 5), ("", 5), ("S1", 0), ("S1", -1)])
def test_a_job_without_stream_or_size_says_what_to_report(stream_id: str | None, size: int) -> None:
    with pytest.raises(ValueError, match="^" + MISSING_STREAM + "$"):
        StreamTransfer("N1", stream_id, size)


@pytest.mark.parametrize(
    ("request_", "vector"),
    [
        (BlockRequest(289), "a4 61 66 01 61 6c 19 01 21 61 6f 00 61 6e 01"),
        (BlockRequest(4096, 0, 16, b"\xff\xff"), "a5 61 66 01 61 6c 19 10 00 61 6f 00 61 62 42 ff ff 61 6e 10"),
        (BlockRequest(4096, 16, 16, b"\x09\x80"), "a5 61 66 01 61 6c 19 10 00 61 6f 10 61 62 42 09 80 61 6e 10"),
        (BlockRequest(4096, 384, 1, b"\x01"), "a5 61 66 01 61 6c 19 10 00 61 6f 19 01 80 61 62 41 01 61 6e 01"),
    ],
)
def test_requests_are_the_reference_s_byte_for_byte(request_: BlockRequest, vector: str) -> None:
    assert request_.encode() == bytes.fromhex(vector)
    assert parse_request(bytes.fromhex(vector)) == request_


def test_requests_in_json() -> None:
    request = BlockRequest(4096, 0, 16, b"\xff\xff", version=1, token="t")
    assert json.loads(request.encode(Flavour.JSON)) == {
        "f": 1, "l": 4096, "o": 0, "b": "0xffff", "n": 16, "s": 1, "c": "t",
    }  # fmt: skip
    assert parse_request(request.encode(Flavour.JSON), Flavour.JSON) == request


# ---- Messages ---------------------------------------------------------------------------------------------------

GOOD = {"f": 1, "i": 3, "l": 4, "p": b"abcd"}


@pytest.mark.parametrize("flavour", list(Flavour))
@given(number=st.integers(0, 2**32), data=st.binary(max_size=600))
def test_blocks_survive_the_way_there_and_back(flavour: Flavour, number: int, data: bytes) -> None:
    block = Block(1, number, 4096, data)
    assert parse_block(block.encode(flavour, token="t"), flavour) == block


def test_a_map_of_indefinite_length_with_chunked_bytes_is_taken() -> None:
    payload = bytes.fromhex("bf 6166 01 6169 03 616c 04 6170 5f 42 6162 42 6364 ff 6163 7f 6161 6162 ff ff")
    assert parse_block(payload) == Block(1, 3, 4, b"abcd")


def test_unknown_members_are_passed_over_without_being_decoded() -> None:
    huge = cbor2.CBORTag(4, [2**60, 1])  # a decimal fraction with as many digits
    payload = cbor2.dumps({"x": huge, 5: {"f": 2}, "y": [None, 1.5, True], **GOOD})
    assert parse_block(payload) == Block(1, 3, 4, b"abcd")


def deep(levels: int) -> bytes:
    return b"\xa5" + b"\x61x" + b"\x81" * levels + b"\x00" + cbor2.dumps(GOOD)[1:]


def test_depth_and_number_of_values_are_bounded() -> None:
    parse_block(deep(MAX_DEPTH - 1))
    for payload in (
        deep(MAX_DEPTH),
        deep(50_000),
        cbor2.dumps({**GOOD, "x": [0] * MAX_ITEMS}),
        b"\xbb" + b"\xff" * 8 + b"\x00" * 1000,
        b"\x9b" + b"\xff" * 8,
        b"\xa1\x61x\x9b" + b"\xff" * 8 + b"\x00" * 500,
        b"\xa1\x61p\x5b" + b"\xff" * 8 + b"abc",
        cbor2.dumps({**GOOD, "p": bytes(MAX_MESSAGE)}),
    ):
        with pytest.raises(StreamMessageError):
            parse_block(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        b"\xa0",
        cbor2.dumps([GOOD]),
        cbor2.dumps("x"),
        cbor2.dumps(GOOD) + b"\x00",
        b"\xa5" + cbor2.dumps(GOOD)[1:] + b"\x61f\x01",  # f twice
        b"\xa5" + cbor2.dumps(GOOD)[1:] + b"\x78\x01f\x01",  # the same in a longer form
        b"\xbf\x61f\xff",  # key without value
        b"\xa1\x61\xff\x01",  # key is no UTF-8
        b"\xa1\x61x\x5f\x61a\xff",  # text inside bytes
        b"\xa1\x1c\x01",  # reserved length
        b"\xa1\x61x\xff",  # break where a value belongs
        b"\xa1\x61x\x1f",  # integer of indefinite length
        *[cbor2.dumps({k: v for k, v in GOOD.items() if k != key}) for key in GOOD],
        *[cbor2.dumps({**GOOD, key: wrong}) for key in "fil" for wrong in ("1", b"1", 1.0, True, None, [1], -1, 2**64)],
        *[cbor2.dumps({**GOOD, "p": wrong}) for wrong in ("abcd", 1, None, [b"abcd"], cbor2.CBORTag(24, b"abcd"))],
    ],
)
def test_what_is_no_block_is_refused(payload: bytes) -> None:
    with pytest.raises(StreamMessageError):
        parse_block(payload)


def test_every_truncation_is_refused() -> None:
    payload = cbor2.dumps(GOOD)
    for end in range(len(payload)):
        with pytest.raises(StreamMessageError):
            parse_block(payload[:end])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"f":1,"i":0,"l":4,"p":"YWJjZA=="}x',
        '{"f":1,"f":1,"i":0,"l":4,"p":"YWJjZA=="}',
        '{"f":1,"i":0,"l":4,"p":"YWJj ZA=="}',
        '{"f":1,"i":0,"l":4,"p":"YWJjZA"}',
        '{"f":1,"i":0,"l":4,"p":"é"}',
        '{"f":true,"i":0,"l":4,"p":""}',
        '{"f":1.0,"i":0,"l":4,"p":""}',
        '{"f":NaN,"i":0,"l":4,"p":""}',
        '{"f":' + "9" * 5000 + ',"i":0,"l":4,"p":""}',
        '{"x":' + "[" * 100_000,
        '{"x":[' + "1," * MAX_ITEMS + "1]}",
    ],
)
def test_what_is_no_json_block_is_refused(text: str) -> None:
    with pytest.raises(StreamMessageError):
        parse_block(text.encode(), Flavour.JSON)


@pytest.mark.parametrize("flavour", list(Flavour))
@given(payload=st.binary(max_size=80) | st.recursive(
    st.none() | st.integers() | st.binary(max_size=5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("filpxyobnsc"), inner, max_size=6),
).map(cbor2.dumps))  # fmt: skip
@example(payload=b"\xd8\x1c\xd8\x1d\x00")
def test_any_bytes_are_a_message_or_a_message_error(flavour: Flavour, payload: bytes) -> None:
    parsers: list[Callable[[bytes, Flavour], object]] = [parse_block, parse_request]
    for parse in parsers:
        try:
            assert parse(payload, flavour) is not None
        except StreamMessageError as error:
            assert str(error)
    assert str(parse_rejection(payload, flavour))


def test_a_rejection_is_read_in_both_forms_and_made_safe_to_show() -> None:
    assert parse_rejection(cbor2.dumps({"o": "ResourceNotFound", "m": "no such stream", "c": "t"})) == Rejection(
        "ResourceNotFound", "no such stream"
    )
    assert str(parse_rejection(b'{"code":"Unauthorized","message":"no"}', Flavour.JSON)) == "Unauthorized: no"
    assert parse_rejection(cbor2.dumps({"o": 5, "m": "a\n\x1b[31m" + "x" * 5000})).text == "a??[31m" + "x" * 193
    assert str(parse_rejection(b"\xa0")) == "no reason given"
    assert "unreadable" in str(parse_rejection(b"\xff"))


@pytest.mark.parametrize(
    "message", [{"l": 1, "f": 1}, {"l": 1, "f": 1, "b": "x"}, {"l": 1, "f": 1, "n": 1, "c": "x" * 65}]
)
def test_what_is_no_request_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(StreamMessageError):
        parse_request(cbor2.dumps(message))


# ---- Options and resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"mqtt_ota_block_size": 255},
        {"mqtt_ota_block_size": 131_073},
        {"mqtt_ota_blocks_per_request": 0},
        {"mqtt_ota_max_retries": 256},
        {"mqtt_ota_block_wait_s": 4},
        {"window": 0},
        {"mqtt_ota_block_size": 8192, "mqtt_ota_blocks_per_request": 17},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StreamOptions(**wrong)  # type: ignore[arg-type]


# ---- One transfer -----------------------------------------------------------------------------------------------


def test_the_reference_transfer_of_66000_bytes() -> None:
    bench = Bench(image(66_000), StreamOptions())
    assert bench.transfer.handle(Begin()) == [Subscribe(TOPICS.rejected), Subscribe(TOPICS.data)]
    bench.feed(SubscribeResult(TOPICS.rejected, True))
    header_request = [Publish(TOPICS.get, BlockRequest(289).encode()), StartTimer(1, 10)]
    assert bench.feed(SubscribeResult(TOPICS.data, True)) == header_request
    assert bench.block(0, size=289) == [StopTimer(), Ready(0, bench.file[:289])]
    assert bench.feed(Accepted())[0] == Publish(TOPICS.get, BlockRequest(4096, 0, 16, b"\xff\xff").encode())
    for number in (15, 3, 0, 1, 2, 4, 14, 5, 6, 7, 8, 9, 10, 11, 12, 13):
        bench.block(number)
    assert bench.checkpoints == [65_536]
    assert bench.requests[-1] == BlockRequest(4096, 16, 1, b"\x01")
    assert bench.block(16)[-3:] == [Checkpoint(66_000, 4096), StopTimer(), Complete()]
    assert bytes(bench.received) == bench.file
    assert bench.feed(Close()) == [Unsubscribe(TOPICS.rejected), Unsubscribe(TOPICS.data)]
    assert bench.feed(Close()) == [] and bench.feed(Begin()) == []


@pytest.mark.parametrize("flavour", list(Flavour))
@pytest.mark.parametrize("size", [1, 288, 289, 290, 512, 513, 2047, 2048, 2049, 9000])
@pytest.mark.parametrize("block_size", [256, 512])
def test_any_size_arrives_whole(size: int, block_size: int, flavour: Flavour) -> None:
    options = StreamOptions(mqtt_ota_block_size=block_size, mqtt_ota_blocks_per_request=4, flavour=flavour)
    bench = Bench(image(size), options).to_body()
    bench.serve()
    assert bench.complete and bytes(bench.received) == bench.file
    blocks = -(-size // block_size)
    assert [r.count for r in bench.requests[1:]] == [min(4, blocks - at) for at in range(0, blocks, 4)]  # clamped


def test_missing_blocks_are_asked_for_again_by_the_same_batch() -> None:
    bench = Bench(image(32 * 512), StreamOptions(mqtt_ota_block_size=512)).begin(16 * 512)
    for number in range(16, 32):
        if number not in (16, 19, 31):
            bench.block(number)
    assert bench.received == b""
    bench.fire()
    assert bench.requests[-1] == BlockRequest(512, 16, 16, b"\x09\x80")
    bench.serve()
    assert bench.complete and bytes(bench.received) == bench.file[16 * 512 :]


def test_time_outs_count_only_in_a_row() -> None:
    bench = Bench(image(2048)).to_body()
    for number in range(3):
        for _ in range(3):
            bench.fire()
        bench.block(number)
    for _ in range(3):
        bench.fire()
    assert bench.failed is None and len(bench.requests) == 1 + 1 + 12
    assert bench.fire()[-1] == bench.failed
    assert bench.failed is not None and bench.failed.stage is Stage.TRANSFER
    assert bench.transfer.buffered == 0


def test_a_timer_that_was_started_again_does_not_count() -> None:
    bench = Bench(image(2048)).to_body()
    old = bench.timer
    assert old is not None
    bench.block(0)
    assert bench.feed(TimerFired(old.number)) == []


def test_duplicates_are_answers_that_do_not_put_off_the_time_out_for_ever() -> None:
    bench = Bench(image(2048)).to_body()
    bench.block(0)
    assert [len(bench.block(0)) for _ in range(6)] == [1, 1, 1, 1, 0, 0]  # as many as were asked for
    for _ in range(3):
        bench.fire()
        bench.block(0)
    bench.fire()
    assert bench.failed is not None and bench.failed.stage is Stage.TRANSFER
    assert bytes(bench.received) == bench.file[:512]


def test_two_blocks_before_anybody_waited_count_twice() -> None:
    bench = Bench(image(2048)).to_body()
    for number in range(4):
        bench.block(number)
    assert bench.complete and len(bench.requests) == 2


def test_answers_of_two_requests_for_the_same_blocks_may_mix() -> None:
    bench = Bench(image(16 * 512), StreamOptions(mqtt_ota_block_size=512)).to_body()
    bench.fire()
    for number in range(16):
        for _ in range(5):
            bench.block(number)
    assert bench.complete and bytes(bench.received) == bench.file and len(bench.requests) == 3


def test_what_was_not_asked_for_is_ignored() -> None:
    bench = Bench(image(4096)).to_body()
    too_long = Block(1, 1, 512, bytes(513)).encode()
    for payload in (b"", b"junk", too_long, Block(1, 4, 512, bytes(512)).encode(), Block(1, 2**63, 512, b"").encode()):
        assert bench.feed(Message(TOPICS.data, payload)) == []
    assert bench.feed(Message("other", Block(1, 0, 512, bytes(512)).encode())) == []
    bench.serve()
    assert bench.complete and bytes(bench.received) == bench.file


def test_another_file_id_or_block_size_in_an_answer_is_not_looked_at() -> None:
    bench = Bench(image(512)).to_body()
    bench.feed(Message(TOPICS.data, Block(9, 0, 1, bench.file).encode()))
    assert bench.complete


def test_a_late_block_after_the_end_is_ignored() -> None:
    bench = Bench(image(512)).to_body()
    bench.block(0)
    assert bench.complete
    assert bench.block(0) == [] and bench.feed(Disconnected()) == [] and bench.feed(TimerFired(2)) == []


def test_a_header_that_does_not_come_fails_after_one_wait() -> None:
    bench = Bench(image(2048)).begin()
    bench.block(1)
    bench.fire()
    assert bench.failed is not None and bench.failed.stage is Stage.DESCRIPTION
    assert len(bench.requests) == 1


def test_a_header_too_short_fails_and_a_whole_block_for_one_is_taken() -> None:
    bench = Bench(image(2048)).begin()
    bench.block(0, data=image(HEADER_SIZE - 1))
    assert bench.failed is not None and bench.failed.stage is Stage.DESCRIPTION
    bench = Bench(image(2048)).begin()
    bench.block(0)
    assert bytes(bench.received) == bench.file[:HEADER_REQUEST]


def test_nothing_is_asked_for_before_the_header_was_accepted() -> None:
    bench = Bench(image(2048)).begin()
    bench.block(0, size=HEADER_REQUEST)
    assert bench.block(0) == [] and len(bench.requests) == 1
    assert bench.feed(Close()) == [Unsubscribe(TOPICS.rejected), Unsubscribe(TOPICS.data)]
    assert bench.feed(Accepted()) == []


def test_block_0_must_be_the_one_whose_header_was_checked() -> None:
    bench = Bench(image(2048)).to_body()
    bench.block(0, data=bytes(512))
    assert bench.failed is not None and "header was checked" in bench.failed.detail
    assert len(bench.received) == HEADER_REQUEST


@pytest.mark.parametrize("wrong", [100, 511])
def test_a_short_block_fails_as_incomplete_once_its_batch_is_answered(wrong: int) -> None:
    bench = Bench(image(4096)).to_body()
    bench.block(0)
    bench.block(1, data=bytes(wrong))
    bench.block(2)
    assert bench.failed is None
    bench.block(3)
    assert bench.failed is not None and bench.failed.stage is Stage.INCOMPLETE
    assert bytes(bench.received) == bench.file[:512] and bench.checkpoints == []


def test_a_file_longer_than_announced_fails_as_incomplete() -> None:
    bench = Bench(image(2048), size=2000).to_body()
    bench.serve()
    assert bench.failed is not None and bench.failed.stage is Stage.INCOMPLETE


def test_a_file_shorter_than_announced_fails_as_incomplete() -> None:
    bench = Bench(image(700), size=2048).to_body()
    bench.block(0)
    bench.block(1)
    for _ in range(4):
        bench.fire()
    assert bench.failed is not None and bench.failed.stage is Stage.INCOMPLETE


@pytest.mark.parametrize("body", [False, True])
def test_a_rejection_fails_at_once_with_what_the_server_said(body: bool) -> None:
    bench = Bench(image(2048))
    _ = bench.to_body() if body else bench.begin()
    bench.feed(Message(TOPICS.rejected, cbor2.dumps({"o": "ResourceNotFound", "m": "gone"})))
    assert bench.failed == Failed(
        Stage.TRANSFER if body else Stage.DESCRIPTION,
        "ResourceNotFound: gone",
        Rejection("ResourceNotFound", "gone"),
    )


@pytest.mark.parametrize("cause", [Disconnected(), PublishResult(False)])
def test_a_lost_connection_or_refused_request_fails_at_once(cause: Input) -> None:
    bench = Bench(image(2048)).to_body()
    bench.block(0)
    assert bench.feed(PublishResult(True)) == []
    bench.feed(cause)
    assert bench.failed is not None and bench.failed.stage is Stage.TRANSFER
    bench.feed(Close())
    assert bench.unsubscribed == [TOPICS.rejected, TOPICS.data]


def test_only_the_data_subscription_decides() -> None:
    transfer = StreamTransfer("N1", "S1", 2048, SMALL)
    transfer.handle(Begin())
    assert transfer.handle(SubscribeResult(TOPICS.rejected, False)) == []
    assert isinstance(transfer.handle(SubscribeResult(TOPICS.data, True))[0], Publish)
    transfer = StreamTransfer("N1", "S1", 2048, SMALL)
    transfer.handle(Begin())
    failed = transfer.handle(SubscribeResult(TOPICS.data, False))[-1]
    assert isinstance(failed, Failed) and failed.stage is Stage.BEGIN
    assert transfer.handle(Close()) == []


@pytest.mark.parametrize("offset", [1, 511, 512, 2048, 2500, 8999])
def test_a_resumed_transfer_goes_on_at_the_very_byte(offset: int) -> None:
    bench = Bench(image(9000)).begin(offset)
    assert bench.requests[0].offset == offset // 512
    bench.serve()
    assert bench.complete and bytes(bench.received) == bench.file[offset:]


@pytest.mark.parametrize("offset", [9000, 9001, 2**40, -1])
def test_an_unusable_offset_starts_afresh_with_the_header(offset: int) -> None:
    bench = Bench(image(9000)).begin(offset)
    assert bench.requests == [BlockRequest(HEADER_REQUEST)]


def test_a_window_keeps_that_many_batches_in_flight() -> None:
    options = StreamOptions(mqtt_ota_block_size=512, mqtt_ota_blocks_per_request=4, window=3)
    bench = Bench(image(20 * 512), options).to_body()
    assert [r.offset for r in bench.requests[1:]] == [0, 4, 8]
    for number in range(4, 12):  # all but the first batch: nothing more may be asked for
        bench.block(number)
    assert len(bench.requests) == 4 and bench.transfer.buffered == 8 * 512
    bench.fire()
    assert [r.offset for r in bench.requests[4:]] == [0]
    for number in range(4):
        bench.block(number)
    assert [r.offset for r in bench.requests[5:]] == [12, 16]
    assert bench.checkpoints == [4 * 512, 8 * 512, 12 * 512]


def round_trips(window: int) -> int:
    """Round trips of a transfer when the server answers all it was asked within one."""
    options = StreamOptions(window=window)
    bench = Bench(image(1 << 20), options).to_body()
    trips, at = 1, 1
    while not bench.complete:
        asked, at = bench.requests[at:], len(bench.requests)
        for request in asked:
            for number in bench.wanted(request):
                bench.block(number)
        trips += 1
    return trips


def test_a_window_of_four_costs_a_quarter_of_the_round_trips() -> None:
    assert (round_trips(1), round_trips(4)) == (1 + 16, 1 + 4)


# ---- Any order --------------------------------------------------------------------------------------------------


def deliveries(bench: Bench, steps: Iterable[int]) -> None:
    """A network with a will: each step loses, repeats, delays or damages what was asked for, or lets time pass."""
    under_way: list[int] = []
    seen = 1 if bench.start == 0 else 0
    for step in steps:
        while seen < len(bench.requests):
            under_way += bench.wanted(bench.requests[seen])
            seen += 1
        if bench.complete or bench.failed is not None:
            return
        if not under_way or step % 16 == 0:
            bench.fire()
            continue
        at = step // 16 % len(under_way)
        match step % 16:
            case 1:
                under_way.pop(at)  # lost
            case 2 | 3:
                bench.block(under_way[at])  # comes again later
            case 4:
                bench.feed(Message(TOPICS.data, Block(1, under_way.pop(at), 512, b"x" * 513).encode()))
            case 5:
                bench.feed(Message(TOPICS.data, Block(1, under_way.pop(at), 512, bytes(512)).encode()[:-1]))
            case _:
                bench.block(under_way.pop(at))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 7000),
    window=st.integers(1, 4),
    per_request=st.integers(1, 5),
    offset=st.integers(0, 7000),
    steps=st.lists(st.integers(0, 16 * 30), max_size=150),
)
def test_any_network_yields_exactly_the_image_or_a_clean_failure(
    size: int, window: int, per_request: int, offset: int, steps: list[int]
) -> None:
    options = StreamOptions(mqtt_ota_block_size=512, mqtt_ota_blocks_per_request=per_request, window=window)
    bench = Bench(image(size), options).begin(offset)
    if bench.start == 0:
        bench.block(0, size=HEADER_REQUEST)
        bench.feed(Accepted())
    deliveries(bench, steps)
    deliveries(bench, [15] * 200)  # from here on nothing is lost: it comes to an end
    assert bench.complete != (bench.failed is not None)
    assert bench.most_buffered <= options.buffer_size
    assert bench.transfer.buffered == 0 and bench.timer is None
    wanted = bench.file[bench.start :]
    assert bytes(bench.received) == (wanted if bench.complete else wanted[: len(bench.received)])
    bench.feed(Close())
    assert bench.unsubscribed == [TOPICS.rejected, TOPICS.data]


# ---- Who takes it -----------------------------------------------------------------------------------------------


def test_nothing_more_is_asked_for_while_too_much_lies_about() -> None:
    options = StreamOptions(mqtt_ota_block_size=512, mqtt_ota_blocks_per_request=4, window=2)
    bench = Bench(image(40 * 512), options)
    bench.transfer = StreamTransfer("N1", "S1", 40 * 512, options, backlog=4096)
    bench.to_body()
    for number in range(12):
        bench.block(number)
    assert [r.offset for r in bench.requests[1:]] == [0, 4, 8, 12]  # 12 blocks are here, 8 are allowed
    for number in range(12, 16):
        bench.block(number)
    assert bench.timer is None, "there is nothing to wait for"
    assert bench.feed(Taken(4095)) == []
    assert [type(action) for action in bench.feed(Taken(16 * 512))] == [Publish, Publish, StartTimer]
    assert bench.feed(Taken(2**60)) == []  # more than was handed out changes nothing
    at = 5
    while not bench.complete:
        asked, at = bench.requests[at:], len(bench.requests)
        for request in asked:
            for number in bench.wanted(request):
                bench.block(number)
                bench.feed(Taken(bench.transfer.offset))
    assert bytes(bench.received) == bench.file


def test_the_header_that_comes_again_is_no_block() -> None:
    bench = Bench(image(9000)).to_body()
    assert bench.block(0, size=HEADER_REQUEST) == []
    bench.serve()
    assert bench.complete and bytes(bench.received) == bench.file


def test_a_rejection_in_json_is_read_in_either_flavour() -> None:
    payload = b'{"o":"Throttled","m":"slow down"}'
    assert parse_rejection(payload, Flavour.CBOR) == parse_rejection(payload, Flavour.JSON)
    assert str(parse_rejection(payload)) == "Throttled: slow down"
    assert not parse_rejection(b"{}")
