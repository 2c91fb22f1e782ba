"""What a node needs of an MQTT client, and a twin of it in memory.

A transport keeps one connection up by itself: it connects when started, again after every loss, and restores the
subscriptions first thing after each connect. Publishing never waits: a message is refused at once (`PublishRefused`) or
accepted, and an accepted one is delivered as soon as the connection allows, with a `Listener.published` call when the
broker acknowledged it.

`Listener` methods are called on the transport's own thread and must only take note; nothing they do may wait.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rmaker_ota.errors import ArgumentError, OtaError

MAX_TOPIC_BYTES = 65535  # MQTT 3.1.1, 1.5.3
MAX_MESSAGE_BYTES = 8 << 20  # of one incoming message; AWS IoT sends at most 128 KiB, our own job service at most 1 MiB
MAX_OUTBOX = 1024  # messages kept while they cannot be delivered


class PublishRefused(OtaError):
    """A message was not accepted: no publish budget left, outbox full, or the transport is stopped."""

    esp_err = -1


class Listener(Protocol):
    """Who hears of a transport. Called on the transport's thread; must return at once and not raise."""

    def connected(self, session_present: bool) -> None:
        """The broker accepted the connection and the subscriptions are on their way."""

    def disconnected(self, reason: str) -> None:
        """A connection that was reported is gone; the next attempt comes by itself."""

    def message(self, topic: str, payload: bytes) -> None:
        """A message arrived on a subscribed topic. The payload may be anything."""

    def published(self, message_id: int) -> None:
        """The broker acknowledged a message (PUBACK)."""


class PublishBudget:
    """How many messages a node may still publish (fact sheet 8.6). Thread-compatible: the owner locks.

    Args:
        initial: messages at the start.
        maximum: more than this never gather.
        period_s: seconds of connection after which ``count`` more are allowed.
        count: messages gained per period.
    """

    def __init__(self, initial: int = 100, maximum: int = 1024, period_s: float = 5.0, count: int = 1) -> None:
        self._maximum = maximum
        self._period_s = period_s
        self._count = count
        self._left = initial
        self._since: float | None = None  # begin of the period now running; None while not connected

    def connected(self, now: float) -> None:
        self._since = now

    def disconnected(self, now: float) -> None:
        """A period that was not completed is lost, as with the firmware's timer."""
        self.left(now)
        self._since = None

    def left(self, now: float) -> int:
        """Messages that may be published at this moment."""
        if self._since is not None:
            periods = math.floor((now - self._since) / self._period_s)
            self._since += periods * self._period_s
            self._left = max(self._left, min(self._maximum, self._left + periods * self._count))
        return self._left

    def take(self, now: float) -> bool:
        """Uses one message; False when none is left."""
        if self.left(now) <= 0:
            return False
        self._left -= 1
        return True


def check_topic(topic: str) -> None:
    """Refuses a topic no message can be published on.

    Raises:
        ArgumentError: empty, too long, not encodable, or with a wildcard.
    """
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_TOPIC_BYTES or any(sign in topic for sign in "+#\0"):
        raise ArgumentError(f"not a topic to publish on: {topic[:100]!r}")


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription takes a topic; ``+`` stands for one level (``#`` is not used by nodes)."""
    wanted, found = topic_filter.split("/"), topic.split("/")
    return len(wanted) == len(found) and all(w in ("+", f) for w, f in zip(wanted, found, strict=True))


class Transport(ABC):
    """One MQTT connection. Methods may be called from any thread, `start` and `stop` once.

    Args:
        budget: None: publishing is not limited.
        max_subscriptions: further subscriptions are refused (fact sheet 8.2).
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        *,
        budget: PublishBudget | None = None,
        max_subscriptions: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._max_subscriptions = max_subscriptions
        self._clock = clock
        self._lock = threading.Lock()
        self._subscriptions: dict[str, int] = {}
        self._last_id = 0
        self._will: tuple[str, bytes] | None = None

    @abstractmethod
    def start(self, listener: Listener) -> None:
        """Begins to connect, and returns. A broker that is not there is tried again and again.

        Raises:
            ConfigError: a certificate or key cannot be used.
        """

    @abstractmethod
    def stop(self, timeout_s: float = 2.0) -> None:
        """Delivers what was accepted, for at most that time, and disconnects. May be called twice."""

    @property
    @abstractmethod
    def is_connected(self) -> bool: ...

    def publish(self, topic: str, payload: bytes, *, qos: int = 1) -> int:
        """Accepts a message, not retained.

        Returns:
            Its number, which `Listener.published` gives back; unique for this transport.

        Raises:
            PublishRefused: not accepted, and it will not be sent.
            ArgumentError: not a topic.
        """
        check_topic(topic)
        with self._lock:
            self._check_accepting()
            if self._budget is not None and not self._budget.take(self._clock()):
                raise PublishRefused(f"publish budget is used up: message on {topic} dropped")
            self._last_id += 1
            message_id = self._last_id
            self._send(message_id, topic, payload, qos)
        return message_id

    def set_will(self, topic: str, payload: bytes) -> None:
        """The message the broker publishes, with QoS 1, when it loses this node; counts from the next connect on.

        Raises:
            ArgumentError: not a topic.
        """
        check_topic(topic)
        with self._lock:
            self._will = (topic, payload)

    def subscribe(self, topic_filter: str, *, qos: int = 1) -> None:
        """Subscribes now, or at the next connect, and again at every later one.

        Raises:
            OtaError: too many subscriptions.
        """
        with self._lock:
            if topic_filter not in self._subscriptions and len(self._subscriptions) >= self._max_subscriptions:
                raise OtaError(f"more than {self._max_subscriptions} subscriptions: {topic_filter} refused")
            self._subscriptions[topic_filter] = max(qos, self._subscriptions.get(topic_filter, 0))
            self._send_subscribe(topic_filter, self._subscriptions[topic_filter])

    def unsubscribe(self, topic_filter: str) -> bool:
        """Gives up a subscription.

        Returns:
            Whether there was one; without one nothing is sent.
        """
        with self._lock:
            if self._subscriptions.pop(topic_filter, None) is None:
                return False
            self._send_unsubscribe(topic_filter)
            return True

    # What a kind of transport does; called with the lock held, must not wait.

    @abstractmethod
    def _check_accepting(self) -> None:
        """Raises PublishRefused when no message can be accepted."""

    @abstractmethod
    def _send(self, message_id: int, topic: str, payload: bytes, qos: int) -> None: ...

    @abstractmethod
    def _send_subscribe(self, topic_filter: str, qos: int) -> None: ...

    @abstractmethod
    def _send_unsubscribe(self, topic_filter: str) -> None: ...


@dataclass(frozen=True)
class Sent:
    """One thing a node sent through a `MemoryTransport`."""

    kind: str  # "subscribe", "unsubscribe" or "publish"
    topic: str
    payload: bytes = b""
    qos: int = 1
    message_id: int = 0


class MemoryTransport(Transport):
    """The twin: the test is the broker. It connects and disconnects when told, and keeps what was sent.

    Args:
        acknowledge: acknowledge each message when it is sent; otherwise the test calls `acknowledge`.
        refuse: called with each topic; True refuses the message as a failing client does.
    """

    def __init__(
        self,
        *,
        acknowledge: bool = True,
        budget: PublishBudget | None = None,
        max_subscriptions: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(budget=budget, max_subscriptions=max_subscriptions, clock=clock)
        self.acknowledge_all = acknowledge
        self.refuse: Callable[[], bool] = lambda: False
        self.sent: list[Sent] = []  # what reached the broker, in order
        self.will: tuple[str, bytes] | None = None  # that of the connection
        self._changed = threading.Condition()
        self._waiting: list[Sent] = []  # published and not acknowledged, in order
        self._listener: Listener | None = None
        self._online = False
        self._stopped = False

    # -- the node's side

    def start(self, listener: Listener) -> None:
        self._listener = listener

    def stop(self, timeout_s: float = 2.0) -> None:
        with self._lock:
            self._online = False
            self._stopped = True

    @property
    def is_connected(self) -> bool:
        return self._online

    def _check_accepting(self) -> None:
        if self._stopped:
            raise PublishRefused("transport is stopped")
        if self.refuse():
            raise PublishRefused("refused by the test")

    def _send(self, message_id: int, topic: str, payload: bytes, qos: int) -> None:
        message = Sent("publish", topic, payload, qos, message_id)
        self._waiting.append(message)
        if self._online:
            self._reach(message)

    def _send_subscribe(self, topic_filter: str, qos: int) -> None:
        if self._online:
            self._reach(Sent("subscribe", topic_filter, qos=qos))

    def _send_unsubscribe(self, topic_filter: str) -> None:
        if self._online:
            self._reach(Sent("unsubscribe", topic_filter))

    def _reach(self, sent: Sent) -> None:
        with self._changed:
            self.sent.append(sent)
            self._changed.notify_all()
        if sent.kind == "publish" and self.acknowledge_all:
            self._waiting.remove(sent)
            if self._listener is not None:
                self._listener.published(sent.message_id)

    # -- the test's side

    def go_online(self, *, session_present: bool = False) -> None:
        """The broker accepts the connection: subscriptions, then what is not acknowledged yet."""
        assert self._listener is not None
        with self._lock:
            assert not self._online
            self._online = True
            self.will = self._will
            if self._budget is not None:
                self._budget.connected(self._clock())
            for topic_filter, qos in self._subscriptions.items():
                self._reach(Sent("subscribe", topic_filter, qos=qos))
            for message in list(self._waiting):
                self._reach(message)
        self._listener.connected(session_present)

    def go_offline(self, reason: str = "connection lost") -> None:
        """The connection is lost."""
        assert self._listener is not None
        with self._lock:
            assert self._online
            self._online = False
            if self._budget is not None:
                self._budget.disconnected(self._clock())
        self._listener.disconnected(reason)

    def deliver(self, topic: str, payload: bytes | str) -> bool:
        """A message for the node; returns whether it was online and subscribed."""
        assert self._listener is not None
        with self._lock:
            takes = self._online and any(topic_matches(name, topic) for name in self._subscriptions)
        if takes:
            self._listener.message(topic, payload.encode() if isinstance(payload, str) else payload)
        return takes

    def acknowledge(self, message_id: int) -> None:
        """Sends the PUBACK of one message."""
        assert self._listener is not None
        with self._lock:
            self._waiting = [message for message in self._waiting if message.message_id != message_id]
        self._listener.published(message_id)

    def wait_for(self, predicate: Callable[[Sent], bool], *, since: int = 0, timeout_s: float = 10.0) -> Sent:
        """Waits for something sent that a predicate accepts.

        Raises:
            TimeoutError: it was not sent in time; the message lists what was.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            looked_at = since
            while True:
                for sent in self.sent[looked_at:]:
                    if predicate(sent):
                        return sent
                looked_at = len(self.sent)
                if not self._changed.wait(deadline - time.monotonic()):
                    listing = "\n".join(f"{sent.kind} {sent.topic} {sent.payload!r}" for sent in self.sent[since:])
                    raise TimeoutError(f"not sent within {timeout_s} s; sent was:\n{listing}")
