"""The configuration of a node: frozen dataclasses, and the TOML file they come from.

    [node]    id, name, type, model, project, version, platform, network_id, groups
    [mqtt]    host, port, ca, cert, key, credentials, nvs, nvs_keys, alpn, basic_ingest, keepalive_s, ...
    [ota]     type, transport, server_cert, and the options of the RainMaker firmware under their own names
    [target]  uri, and what that kind of target takes
    [state]   path
    [restart] mode, command
    [metrics] path
    [[sub_device]]  another node of the same process, as a chip at a USB port: [sub_device.node], ...

Relative paths are relative to the file. Everything wrong is a `ConfigError` that says file, key, value and what was
expected. Where the firmware has one name for a thing (``[ota] mqtt_port``) and the ``[mqtt]`` section another
(``port``), either may be used, not both.

Credentials come from ``[mqtt] cert`` and ``key``, or from a directory as host claiming leaves it (``[mqtt]
credentials``): ``node.info`` (node id), ``node.crt``, ``node.key``, ``endpoint.info`` (MQTT host). Or from
where a device has them (``[mqtt] nvs``): a flash image, or a dump of its factory partition; ``[mqtt] nvs_keys`` where
that is encrypted, and ``[ota] factory_partition`` and ``factory_namespace`` where they have other names. `NodeConfig`
holds the paths; the private key is read when the connection is set up, and is in no configuration object.

A sub-device has sections of its own for who it is (``node``, credentials, ``target``) and takes what it does not say
of ``[mqtt]`` and ``[ota]`` from the node. It restarts with its target, so there is no ``restart``; its state is kept
beside the node's, with the sub-device's id in the file name, unless it says where.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmaker_ota.errors import ConfigError, OtaError
from rmaker_ota.rainmaker.workflow import OPTION_RANGES, OtaOptions

if TYPE_CHECKING:
    from rmaker_ota.credentials import Credentials

log = logging.getLogger(__name__)

PUBLIC_MQTT_HOST = "mqtt.rainmaker.espressif.com"
MAX_STREAM_REQUEST = 131_072  # bytes asked for at once, as `rmaker_ota.rainmaker.streams` has it
ALPN = "x-amzn-mqtt-ca"  # what AWS IoT wants on port 443
MAX_CREDENTIAL_BYTES = 1 << 20

_FILE_TARGETS = ("file", "esp32-image", "linux-ab")
NETWORK_ID = re.compile(r"[0-9A-F]{8}")
_NODE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")  # goes into topics, file names and a certificate's name


def _in_range(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"range": (low, high)})


def _one_of(default: Any, *choices: object) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True, slots=True)
class NodeSection:
    """Who the node is. ``project`` and ``version`` are needed where the target has no app descriptor.

    ``id`` None: from the credentials. ``fw_version`` in messages is ``version`` when given, else the running image's.
    ``model`` None: the project's name.
    """

    id: str | None = None
    name: str = "RMaker OTA node"
    type: str = "Gateway"
    model: str | None = None
    project: str | None = None
    version: str | None = None
    platform: str = "linux"
    network_id: str | None = None  # 8 upper-case hex digits
    groups: bool = False  # the service by which a node is made a member of a group
    connectivity: bool = False  # the service that tells users whether the node is connected


@dataclass(frozen=True, slots=True)
class MqttSection:
    """The connection. Host None: from the credentials, else ``[ota] mqtt_host``. ``ca`` None: the system's authorities.

    ``nvs``: a flash image or a dump of its factory partition that holds the credentials; ``nvs_keys``: a file with the
    keys of an encrypted one, see `rmaker_ota.credentials.read_keys`.

    ``alpn`` None: `ALPN` on port 443, nothing elsewhere; empty: nothing. Reconnect delays double from the smallest to
    the largest, each spread by a quarter.
    """

    host: str | None = None
    port: int = _in_range(443, 1, 65535)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    credentials: Path | None = None
    nvs: Path | None = None
    nvs_keys: Path | None = None
    alpn: str | None = None
    basic_ingest: bool = True
    keepalive_s: int = _in_range(120, 5, 65535)  # seconds; the firmware allows 30 to 1200
    persistent_session: bool = False
    connect_timeout_s: float = _in_range(10.0, 0.1, 600)
    reconnect_min_s: float = _in_range(1.0, 0.01, 3600)
    reconnect_max_s: float = _in_range(120.0, 0.01, 86400)


@dataclass(frozen=True, slots=True)
class OtaSection(OtaOptions):
    """How updates are done: the rules' options (`OtaOptions`) and those of connection, download and storage.

    Sizes are bytes unless the name says otherwise. Options of `WITHOUT_EFFECT` are accepted, so that one file serves
    both, and said to have none.
    """

    type: str = _one_of("topics", "topics", "params", "both")
    server_cert: Path | None = None  # PEM; given: trusted for downloads in place of the system's, see use_cert_bundle
    # Download.
    http_connect_timeout_s: float = _in_range(10.0, 0.1, 600)
    http_stall_timeout_s: float = _in_range(60.0, 0.1, 86400)  # no byte for so long fails the attempt (Q20)
    http_deadline_s: float = _in_range(0.0, 0, 30 * 86400)  # of one attempt; 0: none
    http_max_bytes_per_s: int = _in_range(0, 0, 1 << 40)  # 0: as fast as it comes
    http_proxy: str | None = None
    ota_checkpoint_kib: int = _in_range(4096, 64, 1 << 20)  # a resume position is kept at most every so many KiB,
    ota_checkpoint_s: float = _in_range(5.0, 0.0, 3600)  # or every so many seconds, whichever comes first
    ota_read_back: bool = False  # verify what is on the medium, not only what was written
    # Image over MQTT.
    mqtt_ota_block_size: int = _in_range(4096, 256, 131072)
    mqtt_ota_blocks_per_request: int = _in_range(16, 1, 512)
    mqtt_ota_max_retries: int = _in_range(3, 1, 255)
    mqtt_ota_block_wait_s: int = _in_range(10, 5, 300)
    mqtt_ota_window: int = _in_range(1, 1, 16)  # requests on their way at once; the firmware waits for each
    mqtt_ota_flavour: str = _one_of("cbor", "cbor", "json")
    # Publish budget: messages, and seconds.
    mqtt_budgeting: bool = True
    mqtt_default_budget: int = _in_range(100, 64, 2048)
    mqtt_max_budget: int = _in_range(1024, 64, 2048)
    mqtt_budget_revive_period_s: int = _in_range(5, 5, 600)
    mqtt_budget_revive_count: int = _in_range(1, 1, 16)
    # Connection.
    mqtt_host: str = PUBLIC_MQTT_HOST
    mqtt_host_from_config: bool = False  # do not look at endpoint.info
    node_id_from_cert_cn: bool = False
    mqtt_port: int = _one_of(443, 443, 8883)
    mqtt_persistent_session: bool = False
    mqtt_keepalive_s: int = _in_range(120, 30, 1200)
    max_mqtt_subscriptions: int = _in_range(10, 2, 1000)
    mqtt_send_username: bool = True
    mqtt_product_name: str = "RMDev"
    mqtt_product_version: str = "1x0"
    mqtt_product_sku: str = _one_of("EX00", "ES00", *(f"EX{number:02}" for number in range(7)))
    # Time.
    timezone: str | None = None  # IANA name or POSIX TZ string; None: the system's
    # Where a device has its credentials, see [mqtt] nvs.
    factory_partition: str = "fctry"
    factory_namespace: str = "rmaker_creds"
    connectivity_report_delay_s: int = _in_range(5, 0, 30)  # see [node] connectivity
    # Accepted, without effect here.
    sntp_server: str = "pool.ntp.org"
    max_param_data_size: int = _in_range(1024, 64, 8192)


@dataclass(frozen=True, slots=True)
class TargetSection:
    """Where images go. ``options`` are the other keys of the section, for `rmaker_ota.targets.open_target`."""

    uri: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: types.MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class StateSection:
    path: Path = Path("rmaker-ota.state")


@dataclass(frozen=True, slots=True)
class RestartSection:
    """How the node restarts. ``process``: this program starts anew. ``command``: run that; it restarts the machine.
    ``none``: somebody else will."""

    mode: str = _one_of("process", "process", "command", "none")
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricsSection:
    """``path``: of a text file for Prometheus, see `rmaker_ota.rainmaker.observe`; None: none."""

    path: Path | None = None


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A complete configuration. ``node.id`` and ``mqtt.host`` are resolved, and so are ``mqtt.cert`` and
    ``mqtt.key`` unless there is ``mqtt.nvs``.

    ``source`` is the file it came from, for messages.
    """

    node: NodeSection
    mqtt: MqttSection
    ota: OtaSection
    target: TargetSection
    state: StateSection = StateSection()
    restart: RestartSection = RestartSection()
    source: str = "configuration"
    metrics: MetricsSection = MetricsSection()
    sub_devices: tuple[NodeConfig, ...] = ()


_SECTIONS: dict[str, type] = {
    "node": NodeSection,
    "mqtt": MqttSection,
    "ota": OtaSection,
    "target": TargetSection,
    "state": StateSection,
    "restart": RestartSection,
    "metrics": MetricsSection,
}

SUB_DEVICE = "sub_device"
_SUB_DEVICE_SECTIONS = ("node", "mqtt", "ota", "target", "state", "metrics")
_CREDENTIALS = ("credentials", "cert", "key", "nvs", "nvs_keys")  # one node's own, never another's

# [ota] options that have no effect, and why.
WITHOUT_EFFECT: dict[str, str] = {
    "sntp_server": "the operating system keeps the time",
    "max_param_data_size": "reports are as long as they have to be",
}

# [ota] name of the firmware -> [mqtt] name of the same thing
_SAME: dict[str, str] = {
    "mqtt_port": "port",
    "mqtt_persistent_session": "persistent_session",
    "mqtt_keepalive_s": "keepalive_s",
    "mqtt_use_basic_ingest": "basic_ingest",
}

_TRANSPORT = ("transport", "ota_transport")  # names of [ota] for one thing


def load_config(path: str | os.PathLike[str]) -> NodeConfig:
    """Reads a configuration file and the credentials it names.

    Raises:
        ConfigError: something is missing or wrong; the message says what and where.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected a TOML file") from error
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    return parse_config(tables, source=str(path), directory=path.resolve().parent)


def _other_names(section: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a section of the node for what a sub-device says under the other name of the same thing."""
    ota, mqtt = (one if isinstance(one := entry.get(name, {}), Mapping) else {} for name in ("ota", "mqtt"))
    if section == "ota":
        yield from (theirs for theirs, ours in _SAME.items() if ours in mqtt)
        yield from (theirs for theirs, ours in (_TRANSPORT, _TRANSPORT[::-1]) if ours in ota)
    else:
        yield from (theirs for ours, theirs in _SAME.items() if ours in ota)


def _sub_devices(reader: _Reader, tables: Mapping[str, Any], node: NodeConfig) -> tuple[NodeConfig, ...]:
    """The sub-devices of a node: whatever they have in common with it is merged before the checks."""
    entries = tables.get(SUB_DEVICE, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        reader.fail(SUB_DEVICE, entries, f"tables [[{SUB_DEVICE}]]")
    found: list[NodeConfig] = []
    for number, entry in enumerate(entries, 1):
        where = f"[[{SUB_DEVICE}]] number {number}"
        for name in entry:
            if name not in _SUB_DEVICE_SECTIONS:
                reader.fail(
                    f"{where}: {name}", None, f"one of {', '.join(_SUB_DEVICE_SECTIONS)}", found="unknown section"
                )
        merged = dict(entry)
        for section in ("mqtt", "ota"):
            own, common = entry.get(section, {}), tables.get(section, {})
            if isinstance(own, Mapping):  # otherwise it is refused below
                said = _CREDENTIALS + tuple(_other_names(section, entry))
                merged[section] = {key: value for key, value in common.items() if key not in said} | dict(own)
        source = f"{reader.source}: {where}"
        one = parse_config(merged, source=source, directory=reader.directory)
        if "path" not in entry.get("state", {}):
            beside = node.state.path
            path = beside.with_name(f"{beside.stem}.{one.node.id}{beside.suffix}")
            one = dataclasses.replace(one, state=StateSection(path))
        one = dataclasses.replace(one, restart=RestartSection(mode="none"))
        for other in (node, *found):
            for key, mine, theirs in (
                ("[node] id", one.node.id, other.node.id),
                ("[target] uri", one.target.uri, other.target.uri),
                ("[state] path", str(one.state.path), str(other.state.path)),
                ("[metrics] path", one.metrics.path, other.metrics.path),
            ):
                if mine == theirs and mine is not None:
                    raise ConfigError(f"{source}: {key} = {_shown(str(mine))}: {other.node.id} has it already")
        found.append(one)
    return tuple(found)


def parse_config(
    tables: Mapping[str, Any], *, source: str = "configuration", directory: Path | None = None
) -> NodeConfig:
    """Checks the tables of a configuration file.

    Args:
        tables: section name -> key -> value, as TOML has them.
        source: what messages call the file.
        directory: what relative paths are relative to; None: the current one.

    Raises:
        ConfigError: something is missing or wrong.
    """
    reader = _Reader(source, directory or Path.cwd())
    for name in tables:
        if name == SUB_DEVICE:
            continue
        if name not in _SECTIONS:
            reader.fail(f"[{name}]", None, f"one of the sections {_listing(_SECTIONS)}", found="unknown section")
        if not isinstance(tables[name], Mapping):
            reader.fail(name, tables[name], f"a section [{name}]")
    values = {name: reader.section(name, kind, tables.get(name, {})) for name, kind in _SECTIONS.items()}
    for key, reason in WITHOUT_EFFECT.items():
        if key in values["ota"]:
            log.warning("%s: [ota] %s has no effect: %s", source, key, reason)
    _merge_same(reader, values)
    ota, mqtt = values["ota"], values["mqtt"]
    if "server_cert" in ota:
        ota.setdefault("use_cert_bundle", False)
    if "transport" in ota:
        ota["ota_transport"] = ota.pop("transport")
    _resolve_credentials(reader, values)
    config = NodeConfig(
        node=NodeSection(**values["node"]),
        mqtt=MqttSection(**mqtt),
        ota=OtaSection(**ota),
        target=TargetSection(**_resolve_target(reader, values["target"])),
        state=StateSection(**({"path": reader.directory / StateSection().path} | values["state"])),
        restart=RestartSection(**values["restart"]),
        source=source,
        metrics=MetricsSection(**values["metrics"]),
    )
    _check(reader, config)
    return dataclasses.replace(config, sub_devices=_sub_devices(reader, tables, config))


class _Reader:
    """Turns one file's values into those of the dataclasses."""

    def __init__(self, source: str, directory: Path) -> None:
        self.source = source
        self.directory = directory

    def fail(self, where: str, value: object, expected: str, *, found: str | None = None) -> typing.NoReturn:
        shown = f" = {_shown(value)}" if value is not None else ""
        raise ConfigError(f"{self.source}: {where}{shown}: {found + ', ' if found else ''}expected {expected}")

    def section(self, name: str, kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
        fields = {each.name: each for each in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        if kind is OtaSection:
            fields["transport"], hints["transport"] = fields["ota_transport"], str
        fields.pop("options", None)
        values: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for key, value in table.items():
            where = f"[{name}] {key}"
            if key in fields:
                values[key] = self._value(where, value, fields[key], hints[key])
            elif kind is TargetSection and isinstance(value, (bool, int, str)):
                options[key] = value  # the kind of target knows them
            else:
                near = difflib.get_close_matches(key, fields, 1)
                meant = f"; did you mean {near[0]}?" if near else f"; known are {_listing(fields)}"
                raise ConfigError(f"{self.source}: {where}: unknown key{meant}")  # without its value: a password?
        if kind is TargetSection:
            values["options"] = types.MappingProxyType(options)
        if kind is OtaSection and "transport" in values and "ota_transport" in values:
            self.fail("[ota] ota_transport", None, "only one of them", found="given again as transport")
        return values

    def _value(self, where: str, value: object, known: dataclasses.Field[Any], hint: Any) -> Any:
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        low, high = known.metadata.get("range") or OPTION_RANGES.get(known.name) or (-math.inf, math.inf)
        choices = known.metadata.get("choices")
        if known.name == "ota_transport":
            choices = ("https", "mqtt")
        if choices is not None and (value not in choices or isinstance(value, bool)):
            self.fail(where, value, "one of " + ", ".join(_shown(choice) for choice in choices))
        if bool in kinds:
            if isinstance(value, bool):
                return value
            self.fail(where, value, "true or false")
        if int in kinds or float in kinds:
            wanted = "a whole number" if int in kinds else "a number"
            numbers = (int,) if int in kinds else (int, float)
            if isinstance(value, numbers) and not isinstance(value, bool) and low <= value <= high:
                return value
            self.fail(where, value, wanted if low == -math.inf else f"{wanted} from {low:g} to {high:g}")
        if Path in kinds:
            if isinstance(value, str) and value and "\0" not in value:
                return self.path(where, value)
            self.fail(where, value, "a path")
        if str in kinds:
            if isinstance(value, str) and "\0" not in value:
                return value
            self.fail(where, value, "a text")
        if isinstance(value, list) and value and all(isinstance(word, str) and word for word in value):
            return tuple(value)
        self.fail(where, value, "a list of texts: the program and its arguments")

    def path(self, where: str, text: str) -> Path:
        """A path, relative ones from the file's directory."""
        try:
            return self.directory / Path(text).expanduser()
        except RuntimeError:  # ~somebody
            self.fail(where, text, "the name of a user with a home directory after the ~")

    def read_credential(self, where: str, path: Path) -> bytes:
        """A small file that must be there."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_CREDENTIAL_BYTES + 1)
        except OSError as error:
            self.fail(where, str(path), "a readable file", found=error.strerror or "unreadable")
        if not data or len(data) > MAX_CREDENTIAL_BYTES:
            self.fail(where, str(path), f"1 to {MAX_CREDENTIAL_BYTES} bytes", found="wrong size")
        return data

    def read_word(self, where: str, path: Path) -> str:
        """A file of one line, such as ``node.info``."""
        try:
            word = self.read_credential(where, path).decode("ascii").strip()
        except UnicodeDecodeError:
            self.fail(where, str(path), "one line of ASCII")
        if not word or any(sign.isspace() for sign in word):
            self.fail(where, str(path), "one word of ASCII")
        return word


def _shown(value: object) -> str:
    """A value as TOML would have it, cut when long."""
    text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _listing(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names))


def _merge_same(reader: _Reader, values: dict[str, dict[str, Any]]) -> None:
    ota, mqtt = values["ota"], values["mqtt"]
    for ours, theirs in _SAME.items():
        if ours in ota and theirs in mqtt:
            reader.fail(f"[ota] {ours}", ota[ours], "only one of them", found=f"given again as [mqtt] {theirs}")
        if ours in ota:
            mqtt[theirs] = ota[ours]
        elif theirs in mqtt:
            ota[ours] = mqtt[theirs]


def _resolve_target(reader: _Reader, target: dict[str, Any]) -> dict[str, Any]:
    """A target that is a file has a path, which is relative to the configuration as others are."""
    scheme, colon, path = target.get("uri", "").partition(":")
    if scheme in _FILE_TARGETS and path:
        target["uri"] = scheme + colon + str(reader.path("[target] uri", path))
    return target


def _resolve_credentials(reader: _Reader, values: dict[str, dict[str, Any]]) -> None:
    node, mqtt, ota = values["node"], values["mqtt"], values["ota"]
    claimed: Path | None = mqtt.get("credentials")
    where = "[mqtt] credentials"
    if "nvs" in mqtt:
        _resolve_nvs(reader, values)
        return
    if "nvs_keys" in mqtt:
        reader.fail("[mqtt] nvs_keys", str(mqtt["nvs_keys"]), "[mqtt] nvs beside it, which these are the keys of")
    for key in ("cert", "key"):
        if key not in mqtt:
            if claimed is None:
                reader.fail(f"[mqtt] {key}", None, "a path, [mqtt] credentials or [mqtt] nvs", found="missing")
            mqtt[key] = claimed / ("node.crt" if key == "cert" else "node.key")
            reader.read_credential(where, mqtt[key])
        else:
            reader.read_credential(f"[mqtt] {key}", mqtt[key])
    _check_authorities(reader, values)
    if "host" not in mqtt:
        mqtt["host"] = ota.get("mqtt_host", PUBLIC_MQTT_HOST)
        endpoint = claimed / "endpoint.info" if claimed is not None else None
        if endpoint is not None and not ota.get("mqtt_host_from_config", False) and endpoint.exists():
            mqtt["host"] = reader.read_word(where, endpoint)
    if "id" not in node:
        if ota.get("node_id_from_cert_cn", False):
            node["id"] = certificate_common_name(reader.read_credential("[mqtt] cert", mqtt["cert"]), mqtt["cert"])
        elif claimed is not None:
            node["id"] = reader.read_word(where, claimed / "node.info")
        else:
            reader.fail(
                "[node] id", None, "an id, [mqtt] credentials, or [ota] node_id_from_cert_cn = true", found="missing"
            )


def _check_authorities(reader: _Reader, values: dict[str, dict[str, Any]]) -> None:
    for section, key in (("mqtt", "ca"), ("ota", "server_cert")):
        if key in values[section]:
            path = values[section][key]
            if b"-----BEGIN " not in reader.read_credential(f"[{section}] {key}", path):
                reader.fail(f"[{section}] {key}", str(path), "PEM certificates", found="none there")


def _resolve_nvs(reader: _Reader, values: dict[str, dict[str, Any]]) -> None:
    """Node id and host from NVS; that certificate and key are there, without keeping them."""
    node, mqtt, ota = values["node"], values["mqtt"], values["ota"]
    path: Path = mqtt["nvs"]
    for key in ("credentials", "cert", "key"):
        if key in mqtt:
            reader.fail(f"[mqtt] {key}", str(mqtt[key]), "only one of them", found="credentials are in [mqtt] nvs too")
    _check_authorities(reader, values)
    found = nvs_credentials(
        path,
        mqtt.get("nvs_keys"),
        partition=ota.get("factory_partition", "fctry"),
        namespace=ota.get("factory_namespace", "rmaker_creds"),
        source=reader.source,
    )
    for key, value in (("client_cert", found.client_cert), ("client_key", found.client_key)):
        if value is None:
            reader.fail("[mqtt] nvs", str(path), f"a {key} in {found.where}", found="none there")
    if "host" not in mqtt:
        stored = None if ota.get("mqtt_host_from_config", False) else found.mqtt_host
        mqtt["host"] = stored or ota.get("mqtt_host", PUBLIC_MQTT_HOST)
    if "id" not in node:
        if ota.get("node_id_from_cert_cn", False):
            node["id"] = certificate_common_name(found.client_cert or b"", path)
        elif found.node_id is not None:
            node["id"] = found.node_id
        else:
            reader.fail(
                "[node] id",
                None,
                f"an id, a node_id in {found.where}, or [ota] node_id_from_cert_cn = true",
                found="missing",
            )


def nvs_credentials(path: Path, keys: Path | None, *, partition: str, namespace: str, source: str) -> Credentials:
    """The credentials of ``[mqtt] nvs``.

    Raises:
        ConfigError: the file or its keys cannot be used; the message says why.
    """
    from rmaker_ota.credentials import read_credentials, read_keys

    where, named, wanted = "[mqtt] nvs_keys", keys, "an nvs_keys partition, 64 key bytes or an HMAC key of 32"
    try:
        key_bytes = None if keys is None else read_keys(keys)
        where, named, wanted = "[mqtt] nvs", path, f"a flash image or a dump of {partition}, with {namespace}"
        return read_credentials(path, keys=key_bytes, partition=partition, namespace=namespace)
    except (OtaError, OSError) as error:
        found = str(error) if isinstance(error, OtaError) else error.strerror or "unreadable"
        raise ConfigError(f'{source}: {where} = "{named}": {found}, expected {wanted}') from None


def certificate_common_name(pem: bytes, path: Path) -> str:
    """The subject common name of a PEM certificate.

    Raises:
        ConfigError: not a certificate, or without such a name.
    """
    from cryptography import x509  # heavy, and needed for this option only
    from cryptography.x509.oid import NameOID

    try:
        names = x509.load_pem_x509_certificate(pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError as error:
        raise ConfigError(f"{path}: not a PEM certificate: {error}") from error
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise ConfigError(f"{path}: the certificate's subject has {len(names)} common names, expected 1")
    return names[0].value


def _check(reader: _Reader, config: NodeConfig) -> None:
    """What concerns more than one value, or the sense of one."""
    node, mqtt, ota = config.node, config.mqtt, config.ota
    if node.id is None or not _NODE_ID.fullmatch(node.id):
        reader.fail("[node] id", node.id, "1 to 128 letters, digits or _ . : -")
    if node.network_id is not None and not NETWORK_ID.fullmatch(node.network_id):
        reader.fail("[node] network_id", node.network_id, "8 upper-case hex digits")
    # What is not built yet is said here, with the key, and not later by a node that takes no job.
    if ota.type != "topics" and ota.ota_transport == "mqtt":
        reader.fail("[ota] type", ota.type, '"topics": the params workflow has no stream to take an image from by MQTT')
    if ota.mqtt_ota_block_size * ota.mqtt_ota_blocks_per_request > MAX_STREAM_REQUEST:
        most = MAX_STREAM_REQUEST // ota.mqtt_ota_block_size
        reader.fail(
            "[ota] mqtt_ota_blocks_per_request",
            ota.mqtt_ota_blocks_per_request,
            f"at most {most} blocks of {ota.mqtt_ota_block_size} bytes",
        )
    if not config.target.uri:
        reader.fail("[target] uri", None, 'a target such as "esp32-image:flash.bin"', found="missing")
    if config.restart.mode == "command" and not config.restart.command:
        reader.fail("[restart] command", None, 'a command, because mode is "command"', found="missing")
    if config.restart.mode != "command" and config.restart.command:
        reader.fail("[restart] command", list(config.restart.command), 'mode = "command" beside it')
    if not mqtt.host or not re.fullmatch(r"[^\s/@]{1,253}", mqtt.host):
        reader.fail("[mqtt] host", mqtt.host, "a host name or address")
    if config.metrics.path is not None and not config.metrics.path.parent.is_dir():
        reader.fail("[metrics] path", str(config.metrics.path), "a file in a directory that is there")
    if mqtt.reconnect_min_s > mqtt.reconnect_max_s:
        reader.fail(
            "[mqtt] reconnect_min_s", mqtt.reconnect_min_s, f"at most reconnect_max_s ({mqtt.reconnect_max_s:g})"
        )
    if ota.mqtt_default_budget > ota.mqtt_max_budget:
        reader.fail(
            "[ota] mqtt_default_budget", ota.mqtt_default_budget, f"at most mqtt_max_budget ({ota.mqtt_max_budget})"
        )
    if mqtt.alpn is not None and len(mqtt.alpn.encode()) > 255:
        reader.fail("[mqtt] alpn", mqtt.alpn, "a protocol name of at most 255 bytes, or an empty one")
    if ota.timezone is not None:
        from rmaker_ota.rainmaker.timezone import load_timezone

        try:
            load_timezone(ota.timezone)
        except ValueError:
            reader.fail(
                "[ota] timezone", ota.timezone, 'an IANA name ("Europe/Berlin") or a POSIX one ("CET-1CEST,...")'
            )
