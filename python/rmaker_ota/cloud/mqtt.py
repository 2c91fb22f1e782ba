"""The job service's connection to the broker: hears fetches, reports and configurations of nodes, sends them jobs.

Topics, all QoS 1 (specification of the protocol, section 2.1)::

    node/+/otafetch  node/+/otastatus  node/+/config  node/+/params/local  plain
    node/+/params/local/+                                                  initial reports, and those to groups
    $aws/rules/esp_node_otafetch/node/+/otafetch  ...                      AWS Basic Ingest, on any broker
    node/<id>/otaurl  node/<id>/params/remote                              what we publish
    $aws/things/+/streams/+/get/+  .../describe/+                          with ``streams = true``; `cloud.streams`

Every ``$aws/...`` filter is subscribed as it stands: brokers such as Mosquitto deliver these topics neither to ``#``
nor to shared subscriptions. A message is acknowledged to the broker only after what it says was written down: one that
could not be (disk full) comes again with the next connection.

Handlers run on the client's network thread. Their failures are logged and never end it.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from rmaker_ota.cloud.config import MqttConfig
from rmaker_ota.cloud.jobs import printable
from rmaker_ota.errors import ConfigError

logger = logging.getLogger("rmaker_ota.cloud.mqtt")

RULES = {
    "otafetch": "esp_node_otafetch",
    "otastatus": "esp_node_otastatus",
    "config": "esp_node_config",
    "params/local": "esp_set_params",
    "params/local/init": "esp_init_params",
}
GROUPS = "node/+/params/local/+"  # never with Basic Ingest; also the plain form of initial reports
MAX_RECONNECT_DELAY_S = 60
CONNECT_TIMEOUT_S = 5.0

STREAM_FILTERS = [f"$aws/things/+/streams/+/{verb}/+" for verb in ("get", "describe")]

Handler = Callable[[str, bytes], object]  # node id, payload
Responder = Callable[[str, bytes], Iterable[tuple[str, bytes]]]  # topic, payload -> the same of each answer


def filters(basic_ingest: str) -> list[str]:
    """The topic filters to subscribe to; ``basic_ingest`` is ``on``, ``off`` or ``both``."""
    plain = [f"node/+/{suffix}" for suffix in RULES if suffix != "params/local/init"]
    ingest = [f"$aws/rules/{rule}/node/+/{suffix}" for suffix, rule in RULES.items()]
    return [GROUPS, *{"on": ingest, "off": plain, "both": plain + ingest}[basic_ingest]]


def parse_topic(topic: str) -> tuple[str, str] | None:
    """Node id and suffix of a topic nodes publish on, or None for any other."""
    levels = topic.split("/")
    rule = None
    if levels[:2] == ["$aws", "rules"] and len(levels) > 3:
        rule, levels = levels[2], levels[3:]
    if len(levels) < 3 or levels[0] != "node":
        return None
    suffix = "/".join(levels[2:])
    if rule is None and suffix not in RULES and levels[2:4] == ["params", "local"] and len(levels) == 5:
        suffix = "params/local"  # of a group
    if suffix not in RULES or rule not in (None, RULES[suffix]):
        return None
    return levels[1], suffix


def tls_context(config: MqttConfig) -> ssl.SSLContext:
    """The TLS settings of the connection: the server is verified always.

    Raises:
        ConfigError: a certificate or key file cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.ca is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cafile=config.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"[mqtt] ca = {str(config.ca)!r}: expected a PEM certificate file: {error}") from error
    if config.cert is not None and config.key is not None:
        try:
            context.load_cert_chain(config.cert, config.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"[mqtt] cert = {str(config.cert)!r}, [mqtt] key = {str(config.key)!r}:"
                f" expected a PEM certificate and its private key: {error}"
            ) from error
    return context


class MqttLink:
    """One connection, kept up until `stop`.

    Args:
        config: the broker and how to reach it.
        handlers: what to do with a message, by topic suffix: those of `RULES`.
        on_ready: called after every (re)connection, when the broker has confirmed the subscriptions.
        streams: answers requests for image streams; None: they are not subscribed to.

    Raises:
        ConfigError: certificate, key or password file cannot be used.
    """

    def __init__(
        self,
        config: MqttConfig,
        handlers: dict[str, Handler],
        *,
        on_ready: Callable[[], object],
        streams: Responder | None = None,
    ) -> None:
        self._config = config
        self._handlers = handlers
        self._on_ready = on_ready
        self._streams = streams
        self._filters = filters(config.basic_ingest) + (STREAM_FILTERS if streams is not None else [])
        self._ready = threading.Event()
        self._stopping = False
        self._sent = self._received = 0  # each written by one thread at a time
        self._subscribe_mid: int | None = None
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=config.client_id,
            clean_session=not config.persistent_session,
            manual_ack=True,
        )
        if config.allow_plain:
            logger.warning("MQTT without TLS (allow_plain)")
        else:
            client.tls_set_context(tls_context(config))
        if config.username:
            client.username_pw_set(config.username, _password(config.password_file))
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.reconnect_delay_set(1, MAX_RECONNECT_DELAY_S)
        client.on_connect = self._connected
        client.on_connect_fail = self._connect_failed
        client.on_disconnect = self._disconnected
        client.on_subscribe = self._subscribed
        client.on_message = self._message
        self._client = client

    @property
    def ready(self) -> threading.Event:
        """Set while connected with all subscriptions in place."""
        return self._ready

    def start(self) -> None:
        """Begins to connect, in the background; a broker that is not there is tried again for ever."""
        self._client.connect_async(self._config.host, self._config.port, self._config.keepalive_s)
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnects and ends the network thread. Calling it again is harmless."""
        self._stopping = True
        self._client.disconnect()
        self._client.loop_stop()
        self._ready.clear()

    def publish(self, topic: str, payload: bytes) -> bool:
        """Hands a message to the broker, QoS 1, not retained; False when there is no connection."""
        if not self._client.is_connected():
            return False
        if self._client.publish(topic, payload, qos=1).rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        self._sent += 1
        return True

    def counts(self) -> dict[str, int]:
        """Messages received from nodes and sent to them since the start."""
        return {"received": self._received, "sent": self._sent}

    # -- the client's callbacks, on its network thread

    def _connected(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            logger.error("broker %s:%d refused the connection: %s", self._config.host, self._config.port, reason)
            return
        _, self._subscribe_mid = client.subscribe([(topic, 1) for topic in self._filters])

    def _subscribed(self, client: Client, userdata: Any, mid: int, reasons: Any, properties: Any) -> None:
        if mid != self._subscribe_mid:
            return
        for topic, reason in zip(self._filters, reasons, strict=False):
            if reason.is_failure:
                logger.error("the broker refused the subscription to %s: %s", topic, reason)
        logger.info("connected to broker %s:%d", self._config.host, self._config.port)
        self._ready.set()
        self._guarded(self._on_ready)

    def _connect_failed(self, client: Client, userdata: Any) -> None:
        logger.warning("no connection to broker %s:%d; trying again", self._config.host, self._config.port)

    def _disconnected(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._ready.clear()
        if not self._stopping:
            logger.warning("connection to the broker lost (%s); connecting again", reason)

    def _message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        if self._guarded(lambda: self._dispatch(message)):
            client.ack(message.mid, message.qos)

    def _dispatch(self, message: MQTTMessage) -> None:
        self._received += 1
        if self._streams is not None and message.topic.startswith("$aws/things/"):
            for topic, payload in self._streams(message.topic, bytes(message.payload)):
                if not self.publish(topic, payload):
                    break  # the node asks again
            return
        parsed = parse_topic(message.topic)
        if parsed is None:
            logger.warning("message on unknown topic %s dropped", printable(message.topic))
            return
        node_id, suffix = parsed
        self._handlers[suffix](node_id, bytes(message.payload))

    def _guarded(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception:
            logger.exception("a message could not be handled; the broker will bring it again")
            return False
        return True


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"[mqtt] password_file = {str(path)!r}: cannot be read: {error}") from error
