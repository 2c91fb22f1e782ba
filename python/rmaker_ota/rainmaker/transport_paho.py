"""paho-mqtt behind the `Transport` interface: MQTT 3.1.1, TLS with a client certificate.

One thread owns the paho client and the socket; nobody else touches either. Other threads leave commands in a queue and
wake that thread through a socket pair. It sleeps in ``poll`` until there is something to read, something to write, a
command, or the keep-alive is due: paho's own loop wakes every second instead, and sleeps in steps of a second between
connection attempts.

paho keeps what it has sent and what was not acknowledged, and sends it again after a reconnect, marked as duplicate.
What was accepted and not yet handed to paho stays here, in order, and is never handed over before the subscriptions of
a new connection are.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from rmaker_ota.errors import ConfigError
from rmaker_ota.rainmaker.transport import (
    MAX_MESSAGE_BYTES,
    MAX_OUTBOX,
    Listener,
    PublishBudget,
    PublishRefused,
    Transport,
)

if TYPE_CHECKING:
    from rmaker_ota.credentials import Credentials

log = logging.getLogger(__name__)

MAX_INFLIGHT = 20  # messages sent and not acknowledged; AWS IoT allows 100
STEADY_S = 30.0  # a connection that lasted this long ends the growing of the reconnect delay
KEEPALIVE_MARGIN_S = 0.05  # asked a little late, paho surely finds the keep-alive due


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. ``ca`` None: the system's authorities. ``alpn``: protocol name to ask for, or None."""

    cert: Path
    key: Path
    ca: Path | None = None
    alpn: str | None = None

    def context(self) -> ssl.SSLContext:
        """A client context that verifies the server's certificate and its name.

        Raises:
            ConfigError: a file cannot be read or does not hold what it should.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"MQTT certificate authorities {self.ca}: {_reason(error)}; expected PEM") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            self._load(context)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"MQTT certificate {self.cert} with key {self.key}: {_reason(error)}; "
                "expected a PEM certificate and its PEM private key without a password"
            ) from error
        if self.alpn is not None:
            context.set_alpn_protocols([self.alpn])
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.cert, self.key, password=_no_password)


@dataclass(frozen=True)
class TlsNvs(TlsFiles):
    """Certificate and key that lie in NVS: read anew for each context and kept in no object.

    ``cert`` and ``key`` name the file they are in, for messages. ``read`` raises ConfigError where it cannot.
    """

    read: Callable[[], Credentials] = field(kw_only=True)

    def _load(self, context: ssl.SSLContext) -> None:
        found = self.read()
        if found.client_cert is None or found.client_key is None:
            raise ConfigError(f"{found.where}: no client_cert and client_key there, expected both")
        with found.as_files() as (cert, key):
            context.load_cert_chain(cert, key, password=_no_password)


@dataclass(frozen=True)
class Connection:
    """Where and as whom to connect. Times in seconds."""

    host: str
    port: int
    client_id: str
    tls: TlsFiles | None
    keepalive_s: int = 120
    persistent_session: bool = False
    username: str | None = None
    connect_timeout_s: float = 10.0
    reconnect_min_s: float = 1.0
    reconnect_max_s: float = 120.0


def _no_password() -> str:
    raise ValueError("the key is protected by a password")


def _reason(error: BaseException) -> str:
    """An error in few words, without paths of its own."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"server certificate refused: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class _Message:
    message_id: int
    topic: str
    payload: bytes
    qos: int


class _Stopped(OSError):
    """A connection attempt was given up because the transport stops."""


class _Client(paho.Client):
    """paho's client with a connection attempt of our own, which `stop` can end.

    paho's waits in ``connect`` and in the TLS handshake, where nothing reaches it; and a thread that is inside OpenSSL
    when the process ends brings the process down.
    """

    def __init__(self, open_socket: Callable[[], socket.socket], **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, **options)
        self._open_socket = open_socket

    def _create_socket(self) -> socket.socket:
        return self._open_socket()


class PahoTransport(Transport):
    """One connection to a broker.

    Args:
        connection: where to.
        budget, max_subscriptions: see `Transport`.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        budget: PublishBudget | None = None,
        max_subscriptions: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(budget=budget, max_subscriptions=max_subscriptions, clock=clock)
        self._connection = connection
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        # Shared, under the lock of the base class:
        self._outbox: deque[_Message] = deque()
        self._commands: deque[tuple[str, str, int]] = deque()  # (un)subscribe, filter, qos
        self._forgotten: set[str] = set()  # given up while offline; a kept session still has them
        self._accepting = True
        self._stop_at: float | None = None
        self._is_connected = False
        # Owned by the thread:
        self._sent: dict[int, int] = {}  # paho's message id -> ours
        self._refusal: str | None = None
        self._ended_by: str | None = None
        self._write_blocked = False
        self._last_complaint: str | None = None

    # -- any thread

    def start(self, listener: Listener) -> None:
        assert self._thread is None, "already started"
        client = self._make_client()
        with self._lock:
            if self._stop_at is not None:
                return  # stopped before it began
            self._listener = listener
            self._client = client
            self._wake_read, self._wake_write = socket.socketpair()
            self._wake_read.setblocking(False)
            self._wake_write.setblocking(False)
            self._thread = threading.Thread(target=self._run, name="rmaker-mqtt", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        with self._lock:
            self._accepting = False
            if self._stop_at is None:
                self._stop_at = time.monotonic() + timeout_s
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._wake()
            thread.join(timeout_s + 1.0)  # longer only while it looks up a name

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    def _check_accepting(self) -> None:
        if not self._accepting:
            raise PublishRefused("MQTT connection is stopped")
        if len(self._outbox) >= MAX_OUTBOX:
            raise PublishRefused(f"more than {MAX_OUTBOX} messages wait for the MQTT connection")

    def _send(self, message_id: int, topic: str, payload: bytes, qos: int) -> None:
        self._outbox.append(_Message(message_id, topic, payload, qos))
        self._wake()

    def _send_subscribe(self, topic_filter: str, qos: int) -> None:
        self._forgotten.discard(topic_filter)
        self._commands.append(("subscribe", topic_filter, qos))
        self._wake()

    def _send_unsubscribe(self, topic_filter: str) -> None:
        self._forgotten.add(topic_filter)
        self._commands.append(("unsubscribe", topic_filter, 0))
        self._wake()

    def _wake(self) -> None:
        if self._thread is not None:
            try:
                self._wake_write.send(b"\0")
            except BlockingIOError:
                pass  # it is full of wakes already
            except OSError:
                log.debug("MQTT thread has ended already")

    # -- the thread

    def _make_client(self) -> paho.Client:
        where = self._connection
        self._tls = None if where.tls is None else where.tls.context()
        client = _Client(
            self._open_socket,
            client_id=where.client_id,
            clean_session=not where.persistent_session,
            protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )
        if where.username is not None:
            client.username_pw_set(where.username)
        client.max_inflight_messages = 0  # counted here
        client.max_queued_messages = 0
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        # With these set, paho only queues packets and leaves the writing to `_serve`.
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write
        client.connect_async(where.host, where.port, where.keepalive_s)
        return client

    def _run(self) -> None:
        delay_s = self._connection.reconnect_min_s
        try:
            while not self._is_stopping():
                began = time.monotonic()
                try:
                    self._serve()
                except Exception:  # a fault in paho or here: never the end of the node
                    log.exception("MQTT connection to %s failed", self._connection.host)
                    self._break_socket()
                self._lost()
                if time.monotonic() - began >= STEADY_S:
                    delay_s = self._connection.reconnect_min_s
                self._sleep(delay_s * random.uniform(0.75, 1.25))  # nodes must not all come back at once
                delay_s = min(2 * delay_s, self._connection.reconnect_max_s)
        finally:
            self._wake_read.close()
            self._wake_write.close()

    def _is_stopping(self) -> bool:
        return self._stop_at is not None

    def _sleep(self, seconds: float) -> None:
        """Waits between two attempts; only `stop` ends it early."""
        deadline = time.monotonic() + seconds
        while not self._is_stopping() and (left := deadline - time.monotonic()) > 0:
            self._poll([(self._wake_read.fileno(), select.POLLIN)], left)
            self._drain_wakes()

    def _drain_wakes(self) -> None:
        try:
            while self._wake_read.recv(4096):
                pass
        except BlockingIOError:
            pass

    @staticmethod
    def _poll(wanted: list[tuple[int, int]], timeout_s: float) -> dict[int, int]:
        poller = select.poll()
        for fd, events in wanted:
            poller.register(fd, events)
        return dict(poller.poll(max(0.0, timeout_s) * 1000))

    def _serve(self) -> None:
        """One connection, from the attempt to its end."""
        client = self._client
        self._refusal = self._ended_by = None
        self._write_blocked = False
        with self._lock:
            will = self._will
        if will is not None:
            client.will_set(*will, qos=1)
        try:
            client.reconnect()  # calls `_open_socket`
        except _Stopped:
            return
        except (OSError, ValueError) as error:
            self._complain(f"cannot connect: {_reason(error)}")
            return
        give_up_at = time.monotonic() + self._connection.connect_timeout_s  # unless the broker answers the CONNECT
        last_out = last_in = time.monotonic()
        keepalive_s = self._connection.keepalive_s
        while (sock := client.socket()) is not None:
            fd = sock.fileno()
            if self._is_connected:
                self._hand_over()
                due = min(last_out, last_in) + keepalive_s + KEEPALIVE_MARGIN_S
            else:
                due = give_up_at
            if self._stop_at is not None:
                if not self._is_connected or self._is_delivered() or time.monotonic() >= self._stop_at:
                    self._disconnect()
                    break
                due = min(due, self._stop_at)
            writing = client.want_write() or self._write_blocked
            pending = sock.pending() if isinstance(sock, ssl.SSLSocket) else 0
            ready = self._poll(
                [(fd, select.POLLIN | (select.POLLOUT if writing else 0)), (self._wake_read.fileno(), select.POLLIN)],
                0.0 if pending else due - time.monotonic(),
            )
            if self._wake_read.fileno() in ready:
                self._drain_wakes()
            events = ready.get(fd, 0)
            if events & ~select.POLLOUT or pending:
                client.loop_read()
                last_in = time.monotonic()
                self._check_size()
            if events & select.POLLOUT:
                self._write_blocked = False
                client.loop_write()
                last_out = time.monotonic()
            now = time.monotonic()
            if not self._is_connected and now >= give_up_at:
                self._ended_by = "no answer to CONNECT"
                self._break_socket()
            elif self._is_connected and now >= min(last_out, last_in) + keepalive_s + KEEPALIVE_MARGIN_S:
                client.loop_misc()  # sends a PINGREQ, or finds that the last one was not answered
                last_out = last_in = time.monotonic()

    def _open_socket(self) -> socket.socket:
        """A connection up to the end of the TLS handshake.

        Raises:
            _Stopped: the transport stops.
            OSError: none of the host's addresses answers as it should.
        """
        where = self._connection
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                deadline = time.monotonic() + where.connect_timeout_s
                sock.setblocking(False)
                if sock.connect_ex(address) != 0:
                    self._wait_for(sock, select.POLLOUT, deadline)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code != 0:
                        raise OSError(code, os.strerror(code))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_hostname=where.host, do_handshake_on_connect=False)
                    self._shake_hands(sock, deadline)
                return sock
            except _Stopped:
                sock.close()
                raise
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
        raise failure or OSError(f"{where.host} has no address")

    def _shake_hands(self, sock: ssl.SSLSocket, deadline: float) -> None:
        while True:
            try:
                sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._wait_for(sock, select.POLLIN, deadline)
            except ssl.SSLWantWriteError:
                self._wait_for(sock, select.POLLOUT, deadline)

    def _wait_for(self, sock: socket.socket, events: int, deadline: float) -> None:
        """Waits until a socket that is being connected is ready.

        Raises:
            _Stopped, TimeoutError
        """
        wake = self._wake_read.fileno()
        while True:
            if self._is_stopping():
                raise _Stopped
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            ready = self._poll([(sock.fileno(), events), (wake, select.POLLIN)], left)
            if wake in ready:
                self._drain_wakes()
            if sock.fileno() in ready:
                return

    def _hand_over(self) -> None:
        """Gives paho what may be sent now."""
        while True:
            with self._lock:
                if self._commands:
                    verb, topic_filter, qos = self._commands.popleft()
                    message = None
                elif self._outbox and len(self._sent) < MAX_INFLIGHT:
                    message = self._outbox.popleft()
                else:
                    return
            if message is None:
                if verb == "subscribe":
                    self._client.subscribe(topic_filter, qos)
                else:
                    self._client.unsubscribe(topic_filter)
                    with self._lock:
                        self._forgotten.discard(topic_filter)
                continue
            info = self._client.publish(message.topic, message.payload, message.qos)
            if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:  # the 16-bit number is still in use
                with self._lock:
                    self._outbox.appendleft(message)
                return
            self._sent[info.mid] = message.message_id

    def _is_delivered(self) -> bool:
        with self._lock:
            return not self._outbox and not self._sent and not self._client.want_write()

    def _disconnect(self) -> None:
        self._client.disconnect()
        self._client.loop_write()
        self._ended_by = "stopped"
        self._break_socket()

    def _break_socket(self) -> None:
        """Ends a connection whose other side does not do its part."""
        sock = self._client.socket()
        if sock is not None:
            try:
                sock.close()
            finally:
                self._client.disconnect()
                self._client.loop_write()

    def _check_size(self) -> None:
        """Ends the connection before a huge message fills the memory."""
        announced = getattr(self._client, "_in_packet", {}).get("remaining_length", 0)
        if announced > MAX_MESSAGE_BYTES:
            self._ended_by = f"a message of {announced} bytes (more than {MAX_MESSAGE_BYTES}) was announced"
            self._break_socket()

    def _lost(self) -> None:
        """A connection ended, or was never made."""
        with self._lock:
            was_connected, self._is_connected = self._is_connected, False
            self._commands.clear()
            if was_connected and self._budget is not None:
                self._budget.disconnected(self._clock())
        reason = self._refusal or self._ended_by or "closed by the broker"
        if was_connected:
            self._last_complaint = None
            log.log(
                logging.INFO if self._is_stopping() else logging.WARNING,
                "MQTT connection to %s ended: %s",
                self._connection.host,
                reason,
            )
            assert self._listener is not None
            self._listener.disconnected(reason)
        elif self._refusal or self._ended_by:
            self._complain(reason)

    def _complain(self, what: str) -> None:
        """Logs a failed attempt: aloud when it says something new."""
        level = logging.DEBUG if what == self._last_complaint or self._is_stopping() else logging.WARNING
        self._last_complaint = what
        log.log(level, "MQTT broker %s port %d: %s", self._connection.host, self._connection.port, what)

    # -- called by paho, on the thread

    def _on_connect(self, client: paho.Client, _user: Any, flags: paho.ConnectFlags, reason: Any, _more: Any) -> None:
        if reason.is_failure:
            self._refusal = f"refused: {reason}"
            return
        log.info("MQTT connected to %s as %s", self._connection.host, self._connection.client_id)
        with self._lock:
            # Whatever was asked while there was no connection is in the table.
            self._commands.clear()
            subscriptions = dict(self._subscriptions)
            forgotten = self._forgotten if flags.session_present else set()
            self._forgotten = set()
            if self._budget is not None:
                self._budget.connected(self._clock())
            self._is_connected = True
        for topic_filter, qos in subscriptions.items():
            client.subscribe(topic_filter, qos)
        for topic_filter in forgotten:
            client.unsubscribe(topic_filter)
        assert self._listener is not None
        self._listener.connected(bool(flags.session_present))

    def _on_disconnect(self, _client: paho.Client, _user: Any, _flags: Any, reason: Any, _more: Any) -> None:
        if self._ended_by is None:  # paho knows no more of a lost connection than that it is lost
            self._ended_by = "connection lost" if reason == "Unspecified error" else str(reason)

    def _on_message(self, _client: paho.Client, _user: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("MQTT message with a topic that is not UTF-8 ignored")
            return
        assert self._listener is not None
        self._listener.message(topic, bytes(message.payload))

    def _on_publish(self, _client: paho.Client, _user: Any, mid: int, _reason: Any, _more: Any) -> None:
        message_id = self._sent.pop(mid, None)
        if message_id is not None:
            assert self._listener is not None
            self._listener.published(message_id)

    def _on_subscribe(self, _client: paho.Client, _user: Any, _mid: int, reasons: list[Any], _more: Any) -> None:
        for reason in reasons:
            if reason.is_failure:
                log.error("MQTT broker refused a subscription: %s", reason)

    def _on_register_write(self, _client: paho.Client, _user: Any, _sock: Any) -> None:
        self._write_blocked = True

    def _on_unregister_write(self, _client: paho.Client, _user: Any, _sock: Any) -> None:
        self._write_blocked = False
