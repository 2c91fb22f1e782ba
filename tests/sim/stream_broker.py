"""A broker that is the test and has a file stream: it answers requests for blocks as a script says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rmaker_ota.cloud.streams import check_request
from rmaker_ota.rainmaker.streams import Block, BlockRequest, Flavour, StreamTopics, encode_message, parse_request
from rmaker_ota.rainmaker.transport import MemoryTransport, Sent

# What is sent in answer to a request: blocks, or raw payloads on the data topic, or a rejection (code, text).
Answer = Block | bytes | tuple[str, str]
Script = Callable[[BlockRequest], Iterable[Answer]]


def truthful(file: bytes, request: BlockRequest) -> list[Block]:
    """The blocks asked for, in order."""
    size = request.block_size
    return [
        Block(1, number, size, file[number * size : (number + 1) * size])
        for number in check_request(request, len(file))
    ]


def message_of(topics: StreamTopics, answer: Answer) -> tuple[str, bytes]:
    """Topic and payload of an answer."""
    match answer:
        case Block():
            return topics.data, answer.encode(topics.flavour)
        case bytes():
            return topics.data, answer
        case (code, text):
            return topics.rejected, encode_message({"o": code, "m": text}, topics.flavour)


class StreamBroker(MemoryTransport):
    """Args:
    file: what the stream holds.
    flavour, node_id, stream_id: of its topics.

    ``script`` answers; at first truthfully and in order. ``requests`` lists what was asked for.
    """

    def __init__(
        self,
        file: bytes,
        *,
        flavour: Flavour = Flavour.CBOR,
        node_id: str = "N1",
        stream_id: str = "S1",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.file = file
        self.topics = StreamTopics(node_id, stream_id, flavour)
        self.script: Script = self.blocks
        self.requests: list[BlockRequest] = []
        self.bytes_sent = 0

    def blocks(self, request: BlockRequest) -> list[Block]:
        """The truthful answer."""
        return truthful(self.file, request)

    def _reach(self, sent: Sent) -> None:
        super()._reach(sent)
        if sent.kind == "publish" and sent.topic == self.topics.get:
            request = parse_request(sent.payload, self.topics.flavour)
            self.requests.append(request)
            for answer in self.script(request):
                self.send(answer)

    def send(self, answer: Answer) -> None:
        """One message to the node, if it listens."""
        topic, payload = message_of(self.topics, answer)
        self.bytes_sent += len(payload)
        if self._online and topic in self._subscriptions:
            assert self._listener is not None
            self._listener.message(topic, payload)
