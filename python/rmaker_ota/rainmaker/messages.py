"""Topics and payloads of the RainMaker node, both ways (specification, sections 2 and 3). Pure functions.

What arrives is hostile: `parse_otaurl` accepts JSON as RFC 8259 has it and nothing else, within `MAX_PAYLOAD` bytes and
`MAX_DEPTH` levels; it never raises anything but `JobError`. What goes out is always valid JSON in UTF-8 (Q15).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Protocol

from rmaker_ota.records import dataclass

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

MAX_PAYLOAD = 128 * 1024  # bytes of a message that is looked at; what AWS IoT delivers at most
MAX_DEPTH = 200  # nested arrays and objects
MAX_INFO = 4096  # characters of `additional_info`; longer texts are shortened (Q15)
MIN_PARAMS = 13  # a params text shorter than this says nothing (`{}`) and is not published

_INT64 = range(-(2**63), 2**63)
_GROUP_ID = re.compile(r"[A-Za-z0-9_.:-]{0,128}")
_SPACE = re.compile(r"[ \t\n\r]*")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


# ---- Topics ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Topics:
    """Topic names of one node. From the node they carry ``$aws/rules/<rule>/`` in front when Basic Ingest is on."""

    node_id: str
    basic_ingest: bool = True

    def _to_cloud(self, suffix: str, rule: str) -> str:
        prefix = f"$aws/rules/{rule}/" if self.basic_ingest else ""
        return f"{prefix}node/{self.node_id}/{suffix}"

    @property
    def config(self) -> str:
        return self._to_cloud("config", "esp_node_config")

    @property
    def otafetch(self) -> str:
        return self._to_cloud("otafetch", "esp_node_otafetch")

    @property
    def otastatus(self) -> str:
        return self._to_cloud("otastatus", "esp_node_otastatus")

    @property
    def params_local(self) -> str:
        return self._to_cloud("params/local", "esp_set_params")

    @property
    def params_local_init(self) -> str:
        return self._to_cloud("params/local/init", "esp_init_params")

    def params_local_of(self, group_id: str) -> str:
        """Where a member of a group reports; never with Basic Ingest. Empty: no group."""
        return f"node/{self.node_id}/params/local/{group_id}" if group_id else self.params_local

    @property
    def alert(self) -> str:
        return self._to_cloud("alert", "esp_node_alert")

    @property
    def user_mapping(self) -> str:
        return self._to_cloud("user/mapping", "esp_user_node_mapping")

    @property
    def from_node(self) -> str:
        return self._to_cloud("from-node", "esp_cmd_resp")

    @property
    def otaurl(self) -> str:
        return f"node/{self.node_id}/otaurl"

    @property
    def params_remote(self) -> str:
        return f"node/{self.node_id}/params/remote"

    def params_remote_of(self, group_id: str) -> str:
        return f"{self.params_remote}/{group_id}"

    @property
    def to_node(self) -> str:
        return f"node/{self.node_id}/to-node"


def valid_group_id(group_id: str) -> bool:
    """Whether this can name a group: one level of a topic; empty: none."""
    return _GROUP_ID.fullmatch(group_id) is not None


# ---- From the node --------------------------------------------------------------------------------------------


def _encode(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def fetch_payload(node_id: str, fw_version: str, network_id: str | None = None) -> bytes:
    """Text of an ``otafetch`` message (section 2.3)."""
    message = {"node_id": node_id, "fw_version": fw_version}
    if network_id is not None:
        message["network_id"] = network_id
    return _encode(message)


def status_payload(job_id: str | None, status: str, info: str, unix: float, network_id: str | None = None) -> bytes:
    """Text of an ``otastatus`` message (section 2.6).

    Args:
        job_id: None leaves the key out: only where the store cannot be opened.
        status: the wire string.
        info: ``additional_info``; shortened to `MAX_INFO` characters.
        unix: seconds since 1970 UTC, whether or not the clock was set (Q38: not cut to 32 bits).
    """
    message: dict[str, object] = {}
    if job_id is not None:
        message["ota_job_id"] = job_id
    message["status"] = status
    if network_id is not None:
        message["network_id"] = network_id
    message["additional_info"] = info[:MAX_INFO]
    message["ts"] = math.floor(unix)
    return _encode(message)


class Described(Protocol):
    """A device or a service: `rmaker_ota.Device`."""

    def to_json(self) -> dict[str, object]: ...


def attributes_json(attributes: Mapping[str, str]) -> list[dict[str, str]]:
    """Name-value pairs as the node configuration has them."""
    return [{"name": name, "value": value} for name, value in attributes.items()]


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What a node says of itself on the ``config`` topic. ``platform`` is free text; a gateway may say ``linux``."""

    node_id: str
    name: str
    type: str
    fw_version: str
    model: str
    project_name: str
    platform: str
    subtype: str | None = None
    readme: str | None = None
    secure_boot_digest: Mapping[str, str | None] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    devices: Sequence[Described] = ()
    services: Sequence[Described] = ()


def node_config_payload(node: NodeConfig) -> bytes:
    """Text of a ``config`` message (section 3.2): key order fixed; without any device or service neither array."""
    info: dict[str, object] = {
        "name": node.name,
        "fw_version": node.fw_version,
        "type": node.type,
    }
    if node.subtype is not None:
        info["subtype"] = node.subtype
    info["model"] = node.model
    info["project_name"] = node.project_name
    info["platform"] = node.platform
    if node.readme is not None:
        info["readme"] = node.readme
    if node.secure_boot_digest is not None:
        info["secure_boot_digest"] = dict(node.secure_boot_digest)
    message: dict[str, object] = {"node_id": node.node_id, "config_version": "2020-03-20", "info": info}
    if node.attributes:
        message["attributes"] = attributes_json(node.attributes)
    if node.devices or node.services:
        message["devices"] = [device.to_json() for device in node.devices]
        message["services"] = [service.to_json() for service in node.services]
    return _encode(message)


def params_payload(values: Mapping[str, Mapping[str, object]]) -> bytes | None:
    """Text of a params report, ``{device: {param: value}}``; None when it says nothing and is not to be published."""
    text = _encode({device: dict(params) for device, params in values.items()})
    return None if len(text) < MIN_PARAMS else text


# ---- To the node ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """An ``otaurl`` message. ``metadata`` is the exact text of the object in the payload."""

    job_id: str
    url: str
    stream_id: str | None = None
    file_size: int = 0
    fw_version: str | None = None
    file_md5: str | None = None
    metadata: str | None = None


class JobError(Exception):
    """An ``otaurl`` message that is no job.

    Attributes:
        info: ``additional_info`` of the report.
        job_id: the id it carried, if that much could be read.
    """

    def __init__(self, info: str, job_id: str | None = None) -> None:
        super().__init__(info)
        self.info = info
        self.job_id = job_id


def _first_wins(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    return dict(reversed(pairs))  # of equal keys the first one counts, as in the firmware


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> float:
    return int(digits) if len(digits) <= 40 else math.inf  # no number of ours is that large; `int` refuses 4300 digits


_DECODER = json.JSONDecoder(object_pairs_hook=_first_wins, parse_constant=_no_constant, parse_int=_integer)


def _check(text: str) -> None:
    """Raises ValueError for what `json` would take but should not, or not so deep."""
    depth = 0
    for char in _STRINGS.sub("", text):
        if char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
        elif char in "]}":
            depth -= 1


def parse_object(text: str) -> dict[str, tuple[JsonValue, str]]:
    """A JSON object's members with the exact text of each value.

    Raises:
        ValueError: the text is not one JSON object.
        RecursionError: too deep.
    """
    _check(text)

    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        return at if match is None else match.end()

    def expect(at: int, char: str) -> int:
        if text[at : at + 1] != char:
            raise ValueError(f"expected {char} at {at}")
        return skip(at + 1)

    members: dict[str, tuple[JsonValue, str]] = {}
    at = expect(skip(0), "{")
    if text[at : at + 1] == "}":
        at = expect(at, "}")
    else:
        while True:
            key, end = _DECODER.raw_decode(text, at)
            if not isinstance(key, str):
                raise ValueError(f"expected a name at {at}")
            at = expect(skip(end), ":")
            value, end = _DECODER.raw_decode(text, at)
            members.setdefault(key, (value, text[at:end]))
            at = skip(end)
            if text[at : at + 1] == "}":
                at = expect(at, "}")
                break
            at = expect(at, ",")
    if at != len(text):
        raise ValueError(f"text behind the object at {at}")
    return members


def has_surrogate(text: str) -> bool:
    """Whether half a surrogate pair is in a text, which UTF-8 cannot carry."""
    return _SURROGATE.search(text) is not None


def _string(members: Mapping[str, tuple[JsonValue, str]], key: str) -> str | None:
    value = members.get(key, (None, ""))[0]
    return value if isinstance(value, str) and not has_surrogate(value) else None


def parse_otaurl(payload: bytes, *, require_stream_id: bool = False) -> Job:
    """Reads an ``otaurl`` message (section 2.4).

    Args:
        payload: as it arrived.
        require_stream_id: the image comes over MQTT, so a job without a stream id is none.

    Raises:
        JobError: the message is no job; says what to report.
    """
    try:
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"{len(payload)} bytes")
        members = parse_object(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        raise JobError("Aborted. JSON Payload error") from None
    job_id = _string(members, "ota_job_id")
    if job_id is None:
        raise JobError("Aborted. OTA Updated ID not found in JSON")
    url = _string(members, "url")
    if url is None:
        raise JobError("Aborted. URL not found in JSON", job_id)
    stream_id = _string(members, "stream_id")
    if stream_id is None and require_stream_id:
        raise JobError("Aborted. Stream ID not found in JSON", job_id)
    size = members.get("file_size", (0, ""))[0]
    metadata, metadata_text = members.get("metadata", (None, ""))
    return Job(
        job_id=job_id,
        url=url,
        stream_id=stream_id,
        file_size=size if isinstance(size, int) and not isinstance(size, bool) and size in _INT64 else 0,
        fw_version=_string(members, "fw_version") or None,
        file_md5=_string(members, "file_md5"),
        metadata=metadata_text if isinstance(metadata, dict) else None,
    )


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Time fields of a job's metadata; None: not given (missing, not an integer, or -1).

    ``window_start`` and ``window_end`` are minutes since local midnight, ``valid_from`` and ``valid_until`` Unix
    seconds.
    """

    window_start: int | None = None
    window_end: int | None = None
    valid_from: int | None = None
    valid_until: int | None = None


def parse_time_limits(metadata: str | None) -> TimeLimits | None:
    """Time fields of a job's metadata (section 4.1); None when it has neither a window nor a validity."""
    if metadata is None:
        return None
    try:
        members = parse_object(metadata)
    except (ValueError, RecursionError):
        return None
    window = members.get("download_window", (None, ""))[0]
    validity = members.get("validity", (None, ""))[0]
    if not isinstance(window, dict) and not isinstance(validity, dict):
        return None

    def number(where: JsonValue, key: str) -> int | None:
        value = where.get(key) if isinstance(where, dict) else None
        if isinstance(value, bool) or not isinstance(value, int) or value == -1 or value not in _INT64:
            return None
        return value

    return TimeLimits(
        window_start=number(window, "start"),
        window_end=number(window, "end"),
        valid_from=number(validity, "start"),
        valid_until=number(validity, "end"),
    )
