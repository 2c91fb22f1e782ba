"""The MQTT transport against a broker made of raw sockets: what a real broker never does. And its twin in memory."""

from __future__ import annotations

import functools
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from rmaker_ota.errors import ArgumentError, ConfigError, OtaError
from rmaker_ota.rainmaker import transport_paho
from rmaker_ota.rainmaker.transport import (
    MAX_MESSAGE_BYTES,
    MAX_OUTBOX,
    MemoryTransport,
    PublishBudget,
    PublishRefused,
    Transport,
    check_topic,
    topic_matches,
)
from rmaker_ota.rainmaker.transport_paho import Connection, PahoTransport, TlsFiles

CONNACK = bytes([0x20, 2, 0, 0])
WAIT_S = 10.0


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[object, ...]] = queue.Queue()

    def connected(self, session_present: bool) -> None:
        self.queue.put(("connected", session_present))

    def disconnected(self, reason: str) -> None:
        self.queue.put(("disconnected", reason))

    def message(self, topic: str, payload: bytes) -> None:
        self.queue.put(("message", topic, payload))

    def published(self, message_id: int) -> None:
        self.queue.put(("published", message_id))

    def next(self) -> tuple[object, ...]:
        return self.queue.get(timeout=WAIT_S)


class RawConnection:
    """One accepted connection; reads and writes MQTT packets as bytes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock

    def read_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise ConnectionError("closed by the node")
            data += more
        return data

    def read(self) -> tuple[int, bytes]:
        """Next packet: first byte and body."""
        first = self.read_exactly(1)[0]
        length, shift = 0, 0
        while True:
            byte = self.read_exactly(1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return first, self.read_exactly(length)

    def greet(self) -> None:
        assert self.read()[0] == 0x10
        self.sock.sendall(CONNACK)

    def wait_closed(self) -> None:
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        self.sock.close()


class RawBroker:
    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(WAIT_S)
        self.port = self.listener.getsockname()[1]
        self.connections: list[RawConnection] = []

    def accept(self) -> RawConnection:
        connection = RawConnection(self.listener.accept()[0])
        self.connections.append(connection)
        return connection

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.sock.close()


@pytest.fixture
def broker() -> Iterator[RawBroker]:
    broker = RawBroker()
    yield broker
    broker.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def node(broker: RawBroker) -> Iterator[PahoTransport]:
    node = make(broker.port)
    yield node
    node.stop(0.0)


def make(port: int, *, keepalive_s: int = 120, connect_timeout_s: float = WAIT_S) -> PahoTransport:
    return PahoTransport(
        Connection(
            "127.0.0.1",
            port,
            "N1",
            None,
            keepalive_s=keepalive_s,
            connect_timeout_s=connect_timeout_s,
            reconnect_min_s=0.01,
            reconnect_max_s=0.02,
        )
    )


def publish_packet(topic: bytes, payload: bytes, *, qos: int = 0, mid: int = 1) -> bytes:
    body = struct.pack("!H", len(topic)) + topic + (struct.pack("!H", mid) if qos else b"") + payload
    return bytes([0x30 | qos << 1]) + remaining_length(len(body)) + body


def remaining_length(length: int) -> bytes:
    out = bytearray()
    while True:
        length, byte = divmod(length, 128)
        out.append(byte | (128 if length else 0))
        if not length:
            return bytes(out)


def parse_publish(body: bytes) -> tuple[str, int, bytes]:
    (size,) = struct.unpack_from("!H", body)
    return body[2 : 2 + size].decode(), struct.unpack_from("!H", body, 2 + size)[0], body[4 + size :]


def puback(mid: int) -> bytes:
    return bytes([0x40, 2]) + struct.pack("!H", mid)


# -- connecting


def test_subscriptions_come_first_then_what_waited(broker: RawBroker, node: PahoTransport, heard: Heard) -> None:
    node.publish("node/N1/a", b"1")
    node.subscribe("node/N1/otaurl")
    node.publish("node/N1/b", b"2")
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    kinds = [wire.read() for _ in range(3)]
    assert [first & 0xF0 for first, _ in kinds] == [0x80, 0x30, 0x30]
    assert [parse_publish(body)[0] for _, body in kinds[1:]] == ["node/N1/a", "node/N1/b"]
    assert heard.next() == ("connected", False)


def test_nothing_is_sent_before_the_broker_accepted(broker: RawBroker, node: PahoTransport, heard: Heard) -> None:
    node.start(heard)
    wire = broker.accept()
    assert wire.read()[0] == 0x10
    node.publish("node/N1/a", b"1")
    node.subscribe("node/N1/otaurl")
    assert select.select([wire.sock], [], [], 0.05)[0] == []
    wire.sock.sendall(CONNACK)
    assert [wire.read()[0] & 0xF0 for _ in range(2)] == [0x80, 0x30]


def test_connect_says_who_and_how(broker: RawBroker, heard: Heard) -> None:
    node = PahoTransport(Connection("127.0.0.1", broker.port, "N1", None, keepalive_s=300, username="?Platform=APN3"))
    try:
        node.start(heard)
        first, body = broker.accept().read()
        assert first == 0x10
        assert body == b"\x00\x04MQTT\x04\x82" + struct.pack("!H", 300) + b"\x00\x02N1\x00\x0e?Platform=APN3"
    finally:
        node.stop(0.0)


@pytest.mark.parametrize("answer", [bytes([0x20, 2, 0, code]) for code in (1, 2, 3, 4, 5, 99)], ids=bytes.hex)
def test_a_refusal_is_tried_again(broker: RawBroker, node: PahoTransport, heard: Heard, answer: bytes) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.read()
    wire.sock.sendall(answer)
    wire.wait_closed()
    broker.accept().greet()
    assert heard.next() == ("connected", False)


def test_a_broker_that_never_answers_is_given_up(broker: RawBroker, heard: Heard) -> None:
    node = make(broker.port, connect_timeout_s=0.1)
    try:
        node.start(heard)
        broker.accept().wait_closed()
        broker.accept().greet()
        assert heard.next() == ("connected", False)
    finally:
        node.stop(0.0)


# -- messages


def test_acknowledgements_carry_our_numbers(broker: RawBroker, node: PahoTransport, heard: Heard) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    ours = [node.publish("t", bytes([number])) for number in range(3)]
    theirs = [parse_publish(wire.read()[1])[1] for _ in range(3)]
    for mid in reversed(theirs):
        wire.sock.sendall(puback(mid))
    assert [heard.next() for _ in ours] == [("published", number) for number in reversed(ours)]


def test_what_was_not_acknowledged_is_sent_again_once_after_the_subscriptions(
    broker: RawBroker, node: PahoTransport, heard: Heard
) -> None:
    node.subscribe("node/N1/otaurl")
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    ours = node.publish("t", b"report")
    assert wire.read()[0] & 0xF0 == 0x80
    first, body = wire.read()
    assert first == 0x32
    wire.sock.close()
    wire = broker.accept()
    wire.greet()
    assert wire.read()[0] & 0xF0 == 0x80
    assert wire.read() == (0x3A, body)  # marked as duplicate
    wire.sock.sendall(puback(parse_publish(body)[1]))
    assert [heard.next()[0] for _ in range(3)] == ["connected", "disconnected", "connected"]
    assert heard.next() == ("published", ours)
    node.publish("t", b"next")
    assert parse_publish(wire.read()[1])[2] == b"next"


def test_a_burst_keeps_its_order_and_is_sent_in_portions(broker: RawBroker, node: PahoTransport, heard: Heard) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    for number in range(100):
        node.publish("t", str(number).encode())
    for number in range(100):
        _, mid, payload = parse_publish(wire.read()[1])
        assert payload == str(number).encode()
        if number % transport_paho.MAX_INFLIGHT == transport_paho.MAX_INFLIGHT - 1:
            assert select.select([wire.sock], [], [], 0.01)[0] == []  # the rest waits for acknowledgements
            wire.sock.sendall(b"".join(puback(mid - back) for back in range(transport_paho.MAX_INFLIGHT)))


def test_large_messages_pass_both_ways(broker: RawBroker, node: PahoTransport, heard: Heard) -> None:
    node.subscribe("t")
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    big = bytes(range(256)) * 4096
    node.publish("t", big)
    assert wire.read()[0] & 0xF0 == 0x80
    assert parse_publish(wire.read()[1])[2] == big
    wire.sock.sendall(publish_packet(b"t", big))
    assert heard.next() == ("message", "t", big)


GARBAGE = {
    "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": bytes(64),
    "length without end": b"\x30\xff\xff\xff\xff\xff",
    "connack without body": b"\x20\x00",
    "suback of one byte": b"\x90\x01\x00",
    "publish with a topic beyond its end": b"\x30\x04\xff\xff\x61\x62",
    "publish with qos 3": b"\x36\x05\x00\x01t\x00\x01",
    "publish without topic": b"\x30\x02\x00\x00",
    "acknowledgement of nothing": b"\x40\x02\x12\x34",
    "acknowledgement without number": b"\x40\x00",
    "unknown packet type": b"\xf0\x00",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_at_most_the_connection(
    broker: RawBroker, node: PahoTransport, heard: Heard, garbage: bytes
) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    wire.sock.sendall(garbage)
    wire.sock.close()
    broker.accept().greet()
    while heard.next() != ("connected", False):
        pass
    node.publish("t", b"still alive")
    _, payload = broker.connections[-1].read()
    assert payload.endswith(b"still alive")


def test_a_topic_that_is_not_text_is_passed_over(broker: RawBroker, node: PahoTransport, heard: Heard) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    wire.sock.sendall(publish_packet(b"node/\xff\xfe", b"x") + publish_packet(b"good", b"\xff"))
    assert heard.next() == ("message", "good", b"\xff")


def test_a_huge_message_ends_the_connection_before_it_fills_memory(
    broker: RawBroker, node: PahoTransport, heard: Heard
) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    wire.sock.sendall(b"\x30" + remaining_length(MAX_MESSAGE_BYTES + 1) + b"\x00\x01t")
    wire.wait_closed()
    kind, reason = heard.next()
    assert kind == "disconnected"
    assert str(MAX_MESSAGE_BYTES + 1) in str(reason)


# -- quiet


def test_a_quiet_connection_sleeps_until_the_keepalive_is_due(
    broker: RawBroker, node: PahoTransport, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps: queue.Queue[float] = queue.Queue()
    poll = PahoTransport._poll

    def watched(wanted: list[tuple[int, int]], timeout_s: float) -> dict[int, int]:
        sleeps.put(timeout_s)
        return poll(wanted, timeout_s)

    monkeypatch.setattr(PahoTransport, "_poll", staticmethod(watched))
    node.subscribe("t")
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    wire.read()
    assert heard.next() == ("connected", False)
    with pytest.raises(queue.Empty):
        while True:
            sleeps.get(timeout=0.3)
    for _ in range(3):
        wire.sock.sendall(publish_packet(b"t", b"x"))
        assert heard.next() == ("message", "t", b"x")
        assert sleeps.get(timeout=WAIT_S) > 119.0
    with pytest.raises(queue.Empty):
        sleeps.get(timeout=0.3)


def test_the_keepalive_asks_and_notices_silence(broker: RawBroker, heard: Heard) -> None:
    node = make(broker.port, keepalive_s=1)
    try:
        node.start(heard)
        wire = broker.accept()
        wire.greet()
        assert heard.next() == ("connected", False)
        assert wire.read() == (0xC0, b"")
        wire.sock.sendall(b"\xd0\x00")
        assert wire.read() == (0xC0, b"")
        wire.wait_closed()  # this one was not answered
        assert heard.next()[0] == "disconnected"
    finally:
        node.stop(0.0)


# -- stopping


def test_stop_delivers_what_was_accepted_then_says_goodbye(
    broker: RawBroker, node: PahoTransport, heard: Heard
) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    ours = node.publish("t", b"last words")
    stopper = threading.Thread(target=node.stop, args=(WAIT_S,))
    stopper.start()
    _, mid, _ = parse_publish(wire.read()[1])
    wire.sock.sendall(puback(mid))
    assert wire.read() == (0xE0, b"")
    stopper.join(WAIT_S)
    assert not stopper.is_alive()
    assert heard.next() == ("published", ours)
    with pytest.raises(PublishRefused):
        node.publish("t", b"too late")
    node.stop()


def test_stop_does_not_wait_for_a_broker_that_is_not_there(heard: Heard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    node = PahoTransport(Connection("127.0.0.1", port, "N1", None, reconnect_min_s=100.0))
    node.start(heard)
    node.stop(0.1)
    assert node._thread is not None
    node._thread.join(WAIT_S)  # far less than its reconnect delay
    assert not node._thread.is_alive()


def test_stop_does_not_wait_for_an_acknowledgement_that_never_comes(
    broker: RawBroker, node: PahoTransport, heard: Heard
) -> None:
    node.start(heard)
    wire = broker.accept()
    wire.greet()
    assert heard.next() == ("connected", False)
    node.publish("t", b"x")
    wire.read()
    node.stop(0.01)
    assert wire.read() == (0xE0, b"")


def test_stop_ends_a_tls_handshake_that_gets_no_answer(broker: RawBroker, heard: Heard, tmp_path: Path) -> None:
    leaf = trustme.CA().issue_cert("n1.invalid")
    leaf.private_key_and_cert_chain_pem.write_to_path(tmp_path / "node.pem")
    tls = TlsFiles(tmp_path / "node.pem", tmp_path / "node.pem")
    node = PahoTransport(Connection("127.0.0.1", broker.port, "N1", tls, connect_timeout_s=600.0))
    node.start(heard)
    assert broker.accept().read_exactly(1) == b"\x16"  # its hello
    node.stop(0.0)
    assert node._thread is not None
    assert not node._thread.is_alive()


def test_every_address_of_a_host_is_tried(broker: RawBroker, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def two_addresses(host: str, port: int, **more: Any) -> list[Any]:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            nobody = taken.getsockname()[1]
        return look_up(host, nobody, **more) + look_up(host, port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    node = make(broker.port)
    try:
        node.start(heard)
        broker.accept().greet()
        assert heard.next() == ("connected", False)
    finally:
        node.stop(0.0)


def test_stop_may_come_at_any_moment_of_the_start(broker: RawBroker) -> None:
    for _ in range(50):
        node = make(broker.port)
        gate = threading.Barrier(2)
        failures: list[BaseException] = []

        def race(act: Callable[[], None], gate: threading.Barrier, failures: list[BaseException]) -> None:
            try:
                gate.wait(WAIT_S)
                act()
            except BaseException as error:
                failures.append(error)

        acts: list[Callable[[], None]] = [functools.partial(node.start, Heard()), functools.partial(node.stop, 0.0)]
        threads = [threading.Thread(target=race, args=(act, gate, failures)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert failures == []
        if node._thread is not None:
            node._thread.join(WAIT_S)
            assert not node._thread.is_alive()


# -- limits


@pytest.fixture(params=["memory", "paho"])
def offline(request: pytest.FixtureRequest) -> Transport:
    return MemoryTransport() if request.param == "memory" else PahoTransport(Connection("127.0.0.1", 1, "N1", None))


@pytest.mark.parametrize("topic", ["", "a/+", "a/#", "a\0", "half \ud800", "x" * 65536], ids=ascii)
def test_what_is_no_topic_is_refused(offline: Transport, topic: str) -> None:
    with pytest.raises(ArgumentError):
        offline.publish(topic, b"")


def test_subscriptions_are_counted_by_topic(offline: Transport) -> None:
    for number in range(10):
        offline.subscribe(f"t{number}")
    offline.subscribe("t0")
    with pytest.raises(OtaError, match="more than 10"):
        offline.subscribe("t10")
    assert offline.unsubscribe("t3")
    assert not offline.unsubscribe("t3")
    offline.subscribe("t10")


def test_the_outbox_has_an_end() -> None:
    node = PahoTransport(Connection("127.0.0.1", 1, "N1", None))
    for _ in range(MAX_OUTBOX):
        node.publish("t", b"")
    with pytest.raises(PublishRefused, match="wait for the MQTT connection"):
        node.publish("t", b"")


def test_an_exhausted_budget_refuses_and_revives_while_connected() -> None:
    now = 0.0
    node = MemoryTransport(budget=PublishBudget(2, 4, 5.0, 1), clock=lambda: now)
    node.start(Heard())
    node.publish("t", b"")
    node.publish("t", b"")
    now = 1000.0
    with pytest.raises(PublishRefused, match="budget"):
        node.publish("t", b"")  # nothing revives while there is no connection
    node.go_online()
    now += 4.9
    with pytest.raises(PublishRefused):
        node.publish("t", b"")
    now += 0.1
    node.publish("t", b"")
    now += 4.9
    node.go_offline()
    node.go_online()
    now += 4.9
    with pytest.raises(PublishRefused):
        node.publish("t", b"")  # the period begins anew with the connection
    now += 1000.0
    for _ in range(4):
        node.publish("t", b"")
    with pytest.raises(PublishRefused):
        node.publish("t", b"")


def test_a_budget_above_its_maximum_is_kept_but_does_not_grow() -> None:
    budget = PublishBudget(100, 64, 5.0, 1)
    budget.connected(0.0)
    assert budget.left(500.0) == 100


@pytest.mark.parametrize(
    ("topic_filter", "topic", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/b", "a/b/c", False),
        ("node/+/params", "node/N1/params", True),
        ("node/+/params", "node/N1/x/params", False),
        ("+", "", True),
    ],
)
def test_topic_filters(topic_filter: str, topic: str, matches: bool) -> None:
    assert topic_matches(topic_filter, topic) is matches


def test_a_topic_of_the_longest_size_is_allowed() -> None:
    check_topic("x" * 65535)


# -- credentials


@pytest.mark.parametrize("missing", ["ca", "cert", "key"])
def test_credentials_that_cannot_be_used_are_named(tmp_path: Path, missing: str) -> None:
    path = tmp_path / f"{missing}.pem"
    nothing = tmp_path / "no.pem"
    files = TlsFiles(
        cert=path if missing == "cert" else nothing,
        key=path if missing == "key" else nothing,
        ca=path if missing == "ca" else None,
    )
    for content in (None, b"", b"not a certificate"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=str(path) if missing == "ca" else "MQTT certificate"):
            files.context()


# -- the twin


def test_the_twin_keeps_messages_until_it_is_online_and_acknowledged(heard: Heard) -> None:
    node = MemoryTransport(acknowledge=False)
    node.start(heard)
    node.subscribe("s")
    first = node.publish("t", b"1")
    assert node.sent == []
    node.go_online()
    assert [sent.kind for sent in node.sent] == ["subscribe", "publish"]
    node.go_offline()
    node.go_online()
    assert [sent.kind for sent in node.sent[2:]] == ["subscribe", "publish"]
    node.acknowledge(first)
    node.go_offline()
    node.go_online()
    assert [sent.kind for sent in node.sent[4:]] == ["subscribe"]
    assert node.deliver("s", "x")
    assert not node.deliver("other", "x")
