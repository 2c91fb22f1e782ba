"""A service for file streams over a real broker that answers as a script says, truthfully or not."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Self

from rmaker_ota.rainmaker.streams import BlockRequest, StreamTopics, parse_request
from rmaker_ota.rainmaker.transport_paho import Connection, PahoTransport, TlsFiles
from tests.sim.agent import NODE_ID, WAIT_S
from tests.sim.mosquitto import Mosquitto
from tests.sim.stream_broker import Script, message_of, truthful

STREAM_ID = "S1"


class StreamService:
    """Answers requests of one node for one stream.

    Args:
        file: what the stream holds.

    ``script`` answers, on a thread of its own; at first truthfully. ``requests`` lists what was asked for.
    """

    def __init__(self, broker: Mosquitto, file: bytes, node_id: str = NODE_ID) -> None:
        identity = broker.identity("streams")
        self.file = file
        self.topics = StreamTopics(node_id, STREAM_ID)
        self.requests: list[BlockRequest] = []
        self.script: Script = lambda request: truthful(self.file, request)
        self._asked: queue.Queue[BlockRequest | None] = queue.Queue()
        self._connected = threading.Event()
        self._subscribed = threading.Event()
        self._marker = 0
        self._transport = PahoTransport(
            Connection(
                broker.host,
                broker.port,
                f"streams-of-{node_id}",
                TlsFiles(identity.cert_file, identity.key_file, broker.ca_file),
                reconnect_min_s=0.02,
                reconnect_max_s=0.05,
            )
        )
        self._transport.subscribe(self.topics.get)
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._transport.start(self)
        assert self._connected.wait(WAIT_S)
        self._marker = self._transport.publish("marker", b"")  # acknowledged behind the subscription
        assert self._subscribed.wait(WAIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._asked.put(None)
        self._thread.join(WAIT_S)
        self._transport.stop(0.1)

    # -- listener

    def connected(self, session_present: bool) -> None:
        self._connected.set()

    def disconnected(self, reason: str) -> None:
        pass

    def published(self, message_id: int) -> None:
        self._subscribed.set()

    def message(self, topic: str, payload: bytes) -> None:
        request = parse_request(payload, self.topics.flavour)
        self.requests.append(request)
        self._asked.put(request)

    def _answer(self) -> None:
        while (request := self._asked.get()) is not None:
            for answer in self.script(request):
                self._transport.publish(*message_of(self.topics, answer))
