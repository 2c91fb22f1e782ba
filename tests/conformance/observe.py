"""What another party can see of a node: observations, from a recorded trace or from a replay, in one form.

An observation is a moment, the number of the boot, a kind and its data:

    publish      topic, qos, payload (parsed; {"text": ...} when it is no JSON), accepted
    subscribe    topic, qos, accepted            unsubscribe   topic (only where there was a subscription)
    undelivered  topic                           event         base, event, data
    callback     which, and all it is given      callback_return  which, ret
    api_return   api, ret                        timer         timer, seconds
    http_connect tls, host, port, result, verify http_request  method, path, range
    slot_state   slot, state                     reboot        reason
    boot         running, version, project_name    stored        key, value (at the end)
    running      slot (at the end)                end           t

Left out: read sizes, order and number of storage writes, records of the original platform.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rmaker_ota.rainmaker.streams import Flavour, parse_request

Json = dict[str, Any]

# Stored by this project beside what the reference stores (Q16, Q24, Q35).
OWN_KEYS = {"rmaker_ota/" + key for key in ("ota_result", "ota_params_result", "ota_position", "ota_target")}

TIMERS = {
    "fetch": "fetch_delay",
    "fetch-puback": "puback_timeout",
    "autofetch": "autofetch",
    "rollback": "rollback",
    "reboot": "reboot",
}


@dataclass(frozen=True)
class Observation:
    t: float
    boot: int
    kind: str
    data: Json
    step: int = 0  # how many steps of this boot had begun; not compared
    record: int = -1  # index in the recorded trace; -1: seen in the replay; not compared

    @property
    def key(self) -> str:
        """Equal for observations that do not differ."""
        return json.dumps([round(self.t, 3), self.boot, self.kind, self.data], sort_keys=True, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.t:g} s, boot {self.boot}: {self.kind} {json.dumps(self.data, ensure_ascii=False)}"


def parse_payload(payload: str | bytes) -> Any:
    """JSON as a value; a block request, which is a CBOR map, as its fields and bytes."""
    try:
        if isinstance(payload, bytes) and payload[:1] in (b"\xa4", b"\xa5"):
            request = parse_request(payload, Flavour.CBOR)
            return {
                "l": request.block_size,
                "o": request.offset,
                "b": None if request.bitmap is None else request.bitmap.hex(),
                "n": request.count,
                "hex": payload.hex(),
            }
        text = payload.decode("utf-8") if isinstance(payload, bytes) else payload
        return json.loads(text)
    except ValueError:
        return {"text": payload if isinstance(payload, str) else payload.decode("utf-8", "replace")}


def observe(records: Iterable[Json]) -> list[Observation]:
    """The observations of a recorded trace."""
    seen = []
    steps, boot = 0, 0
    for index, record in enumerate(records):
        if record["boot"] != boot:
            steps, boot = 0, record["boot"]
        if record["kind"] == "step":
            steps += 1
        data = _data(record)
        if data is not None:
            kind, content = data
            seen.append(Observation(record["t"], record["boot"], kind, content, steps, index))
    return seen


def at_the_end(values: dict[str, Any], running: str | None, t: float) -> list[Observation]:
    """What is left at the end, as observations; values that are this project's own have no counterpart and stay out."""
    left = [
        Observation(0, 0, "stored", {"key": key, "value": value.hex() if isinstance(value, bytes) else value})
        for key, value in sorted(values.items())
        if key not in OWN_KEYS
    ]
    return [*left, Observation(0, 0, "running", {"slot": running}), Observation(0, 0, "end", {"t": round(t, 3)})]


def _data(record: Json) -> tuple[str, Json] | None:
    kind = record["kind"]
    match kind:
        case "mqtt_publish":
            return "publish", {
                "topic": record["topic"],
                "qos": record["qos"],
                "payload": (
                    parse_payload(bytes.fromhex(record["payload_hex"]))
                    if "cbor" in record
                    else parse_payload(record.get("payload", ""))
                ),
                "accepted": record["result"] == "ESP_OK",
            }
        case "mqtt_subscribe":
            return "subscribe", {
                "topic": record["topic"],
                "qos": record["qos"],
                "accepted": record["result"] == "ESP_OK",
            }
        case "mqtt_unsubscribe":
            return ("unsubscribe", {"topic": record["topic"]}) if record.get("was_subscribed") else None
        case "message_not_delivered":
            return "undelivered", {"topic": record.get("topic")}
        case "event":
            data = record["seconds"] if "seconds" in record else record.get("data")
            return "event", {"base": record["base"], "event": record["event"], "data": data}
        case "callback":
            if record["which"] == "ota_cb":
                return "callback", {"which": "ota_cb", **record["ota_data"]}
            return "callback", {key: record[key] for key in ("which", "state", "rmaker_ota", "priv")}
        case "callback_return":
            return "callback_return", {"which": record["which"], "ret": record["ret"]}
        case "api_return":
            return "api_return", {"api": record["api"], "ret": record["ret"]}
        case "timer_start":
            return "timer", {"timer": record["timer"], "seconds": record["seconds"]}
        case "http_connect":
            data = {key: record[key] for key in ("tls", "host", "port", "result")}
            return "http_connect", data | ({"verify": record["verify"]} if "verify" in record else {})
        case "http_request":
            return "http_request", {
                "method": record["method"],
                "path": record["path"],
                "range": record["headers"].get("Range"),
            }
        case "slot_state":
            return "slot_state", {"slot": record["slot"], "state": record["state"]}
        case "reboot":
            return "reboot", {"reason": record["reason"]}
        case "boot":
            return "boot", {key: record[key] for key in ("running", "version", "project_name")}
    return None


def stored_values(final: Json) -> dict[str, Any]:
    """Stored values at the end, ``namespace/key``: bytes, str or int."""
    values: dict[str, Any] = {}
    for namespace, entries in final.get("nvs", {}).items():
        for key, entry in entries.items():
            values[f"{namespace}/{key}"] = stored_value(entry)
    return values


def stored_value(entry: Json) -> bytes | str | int:
    """A value as the traces spell it: text, a number, or {"hex": ...}; blobs are bytes."""
    value = entry["value"]
    if isinstance(value, dict):
        value = bytes.fromhex(value["hex"]) if "hex" in value else str(value["text"]).encode()
    elif entry["type"] == "blob":
        value = str(value).encode()
    if entry["type"] == "str" and isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    assert isinstance(value, bytes | str | int)
    return value
