"""From a node's configuration to its MQTT connection (specification, section 8)."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from rmaker_ota.config import ALPN, NodeConfig, OtaSection, nvs_credentials
from rmaker_ota.rainmaker.transport import PublishBudget

if TYPE_CHECKING:
    from rmaker_ota.rainmaker.transport import Transport
    from rmaker_ota.rainmaker.transport_paho import TlsFiles


def username(ota: OtaSection, node_id: str) -> str:
    """The MQTT user name, for statistics (specification, section 8.1): at most 64 characters."""
    if re.fullmatch(r"[0-9A-Fa-f]{12}", node_id):
        uid = node_id.upper()
    else:
        import uuid

        uid = f"{uuid.getnode():012X}"
    names = f"{ota.mqtt_product_name}|{ota.mqtt_product_version}"[: 37 - len(uid)]
    return f"?Platform=APN3|A0|RM|{ota.mqtt_product_sku}|{names}|{uid}"[:64]


def _tls(config: NodeConfig, alpn: str | None) -> TlsFiles:
    from rmaker_ota.rainmaker.transport_paho import TlsFiles, TlsNvs

    mqtt, ota = config.mqtt, config.ota
    if mqtt.nvs is not None:
        read = functools.partial(
            nvs_credentials,
            mqtt.nvs,
            mqtt.nvs_keys,
            partition=ota.factory_partition,
            namespace=ota.factory_namespace,
            source=config.source,
        )
        return TlsNvs(cert=mqtt.nvs, key=mqtt.nvs, ca=mqtt.ca, alpn=alpn, read=read)
    assert mqtt.cert is not None and mqtt.key is not None
    return TlsFiles(mqtt.cert, mqtt.key, mqtt.ca, alpn)


def publish_budget(ota: OtaSection) -> PublishBudget | None:
    """How many messages may be published (specification, section 8.6); None: any number."""
    if not ota.mqtt_budgeting:
        return None
    return PublishBudget(
        ota.mqtt_default_budget,
        ota.mqtt_max_budget,
        float(ota.mqtt_budget_revive_period_s),
        ota.mqtt_budget_revive_count,
    )


def make_transport(config: NodeConfig) -> Transport:
    """The MQTT connection a configuration describes; not yet started."""
    from rmaker_ota.rainmaker.transport_paho import Connection, PahoTransport  # and with it paho

    mqtt, ota = config.mqtt, config.ota
    assert mqtt.host is not None
    alpn = (ALPN if mqtt.port == 443 else None) if mqtt.alpn is None else mqtt.alpn or None
    node_id = config.node.id or ""
    return PahoTransport(
        Connection(
            host=mqtt.host,
            port=mqtt.port,
            client_id=node_id,
            tls=_tls(config, alpn),
            keepalive_s=mqtt.keepalive_s,
            persistent_session=mqtt.persistent_session,
            username=username(ota, node_id) if ota.mqtt_send_username else None,
            connect_timeout_s=mqtt.connect_timeout_s,
            reconnect_min_s=mqtt.reconnect_min_s,
            reconnect_max_s=mqtt.reconnect_max_s,
        ),
        budget=publish_budget(ota),
        max_subscriptions=ota.max_mqtt_subscriptions,
    )
