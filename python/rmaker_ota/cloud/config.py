"""What ``cloud.toml`` says, checked: unknown keys, wrong types and values out of bounds are errors naming the key.

Relative paths are relative to the directory of the file. Nothing is opened or created here.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rmaker_ota.errors import ConfigError

MAX_SOCKET_PATH = 107  # bytes of sockaddr_un.sun_path without its NUL (unix(7))


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """``[service]``. ``data_dir``: database, images and secrets; created with mode 0700 when missing."""

    data_dir: Path


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """``[http]``: where images are served.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 lets the system choose one.
        url: base of the URLs nodes get (``https://ota.example.org``); empty: made from host and port.
        cert: server certificate with its chain (PEM). None with ``allow_http`` only.
        key: private key of the certificate (PEM).
        url_ttl_s: how long a URL given to a node is good, in seconds (public RainMaker: 24 h).
        stall_timeout_s: a download whose client takes nothing for so many seconds is ended.
        allow_http: serve without TLS, for a proxy on the same machine that adds it.
    """

    host: str = "127.0.0.1"
    port: int = 8443
    url: str = ""
    cert: Path | None = None
    key: Path | None = None
    url_ttl_s: int = 86400
    stall_timeout_s: int = 60
    allow_http: bool = False


@dataclass(frozen=True, slots=True)
class MqttConfig:
    """``[mqtt]``: the broker, and the topics nodes publish on.

    Attributes:
        host: broker's host name or address.
        port: broker's TCP port.
        ca: authority the broker's certificate is checked against (PEM); None: the system's.
        cert: client certificate (PEM), or None.
        key: private key of the client certificate.
        username: user name, or empty.
        password_file: file whose first line is the password.
        client_id: MQTT client id; one service per id.
        keepalive_s: MQTT keep alive, seconds.
        persistent_session: the broker keeps what nodes report while the service is away.
        basic_ingest: ``on``: nodes publish on ``$aws/rules/...`` topics; ``off``: on plain ones; ``both``.
        streams: offer images over MQTT as well, and answer requests for their blocks.
        allow_plain: speak MQTT without TLS.
    """

    host: str = "localhost"
    port: int = 8883
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    username: str = ""
    password_file: Path | None = None
    client_id: str = "rmaker-ota-cloud"
    keepalive_s: int = 60
    persistent_session: bool = True
    basic_ingest: str = "both"
    streams: bool = False
    allow_plain: bool = False


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """``[admin]``: where ``rmaker-ota job`` talks to the service.

    Attributes:
        socket: Unix socket, mode 0600; None when ``port`` is used.
        port: TCP port on 127.0.0.1, guarded by a token kept in ``<data_dir>/admin.token``; 0: not used.
    """

    socket: Path | None = None
    port: int = 0


@dataclass(frozen=True, slots=True)
class CloudConfig:
    """All of ``cloud.toml``. ``path`` is the file it was read from, for messages."""

    service: ServiceConfig
    http: HttpConfig = field(default_factory=HttpConfig)
    mqtt: MqttConfig = field(default_factory=MqttConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    path: Path | None = None


def load_config(path: str | Path) -> CloudConfig:
    """Reads and checks a configuration file.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or says something impossible.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    return parse_config(text, path=path)


def parse_config(text: str, *, path: Path) -> CloudConfig:
    """Checks the text of a configuration file; ``path`` is what messages call it and what relative paths start from.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    root = _Table(path, "", document)
    service, http, mqtt, admin = (root.table(name) for name in ("service", "http", "mqtt", "admin"))
    root.finish()
    data_dir = service.path("data_dir") or path.parent.absolute() / "data"
    service.finish()
    return CloudConfig(ServiceConfig(data_dir), _http(http), _mqtt(mqtt), _admin(admin, data_dir), path)


def _http(table: _Table) -> HttpConfig:
    config = HttpConfig(
        host=table.string("host", "127.0.0.1"),
        port=table.integer("port", 8443, 0, 65535),
        url=table.string("url", "").rstrip("/"),
        cert=table.path("cert"),
        key=table.path("key"),
        url_ttl_s=table.integer("url_ttl_s", 86400, 1, 7 * 86400),
        stall_timeout_s=table.integer("stall_timeout_s", 60, 1, 3600),
        allow_http=table.boolean("allow_http", False),
    )
    table.finish()
    if (config.cert is None) != (config.key is None):
        given, missing = ("key", "cert") if config.cert is None else ("cert", "key")
        raise table.error(missing, f"is missing, but {table.name(given)} is given: expected both or neither")
    if config.cert is None and not config.allow_http:
        raise table.error("cert", "is missing: expected a certificate file (or allow_http = true behind a TLS proxy)")
    if not config.url and config.host in {"", "0.0.0.0", "::"}:
        raise table.error("url", f"is missing: expected the URL nodes use, as {table.name('host')} is every address")
    if config.url:
        parts = urlsplit(config.url)
        schemes = ("https", "http") if config.allow_http else ("https",)
        if parts.scheme not in schemes or not parts.hostname or parts.query or parts.fragment:
            raise table.error("url", f"= {_shown(config.url)}: expected a URL like https://ota.example.org:8443")
    return config


def _mqtt(table: _Table) -> MqttConfig:
    config = MqttConfig(
        host=table.string("host", "localhost"),
        port=table.integer("port", 8883, 1, 65535),
        ca=table.path("ca"),
        cert=table.path("cert"),
        key=table.path("key"),
        username=table.string("username", ""),
        password_file=table.path("password_file"),
        client_id=table.string("client_id", "rmaker-ota-cloud"),
        keepalive_s=table.integer("keepalive_s", 60, 5, 1200),
        persistent_session=table.boolean("persistent_session", True),
        basic_ingest=table.choice("basic_ingest", "both", ("on", "off", "both")),
        streams=table.boolean("streams", False),
        allow_plain=table.boolean("allow_plain", False),
    )
    table.finish()
    if not config.host:
        raise table.error("host", "is empty: expected a host name or an address")
    if not config.client_id:
        raise table.error("client_id", "is empty: expected a name")
    if (config.cert is None) != (config.key is None):
        given, missing = ("key", "cert") if config.cert is None else ("cert", "key")
        raise table.error(missing, f"is missing, but {table.name(given)} is given: expected both or neither")
    if config.allow_plain and (config.ca or config.cert):
        raise table.error("allow_plain", "= true: expected no ca, cert or key beside it, they mean TLS")
    return config


def _admin(table: _Table, data_dir: Path) -> AdminConfig:
    socket, port = table.path("socket"), table.integer("port", 0, 0, 65535)
    table.finish()
    if socket is not None and port:
        raise table.error("port", f"= {port}: expected either a socket or a port, not both")
    if socket is None and not port:
        socket = data_dir / "admin.sock"
    if socket is not None and len(str(socket).encode()) > MAX_SOCKET_PATH:
        raise table.error(
            "socket",
            f"= {_shown(str(socket))}: expected at most {MAX_SOCKET_PATH} bytes (choose another path, or a port)",
        )
    return AdminConfig(socket, port)


class _Table:
    """One table of the file. Each getter takes its key out; `finish` complains about what is left."""

    def __init__(self, path: Path, section: str, values: dict[str, Any]) -> None:
        self._path = path
        self._section = section
        self._left = dict(values)
        self._known: list[str] = []

    def name(self, key: str) -> str:
        return f"[{self._section}] {key}" if self._section else f"[{key}]"

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._path}: {self.name(key)} {problem}")

    def table(self, key: str) -> _Table:
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"= {_shown(value)}: expected a table, [{key}]")
        return _Table(self._path, key, value)

    def string(self, key: str, default: str) -> str:
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"= {_shown(value)}: expected a string")
        if "\0" in value:
            raise self.error(key, f"= {_shown(value)}: expected a string without NUL")
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self._take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"= {_shown(value)}: expected a whole number from {low} to {high}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"= {_shown(value)}: expected true or false")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        value = self._take(key, default)
        if value not in choices:
            raise self.error(key, f"= {_shown(value)}: expected one of {', '.join(map(_shown, choices))}")
        return str(value)

    def path(self, key: str) -> Path | None:
        if not (text := self.string(key, "")):
            return None
        try:
            return self._path.parent.absolute() / Path(text).expanduser()
        except RuntimeError:  # ~somebody
            raise self.error(key, f"= {_shown(text)}: expected a user with a home directory after the ~") from None

    def finish(self) -> None:
        for key in self._left:
            near = difflib.get_close_matches(key, self._known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(self._known))}"
            raise self.error(key, f"{'is an unknown key' if self._section else 'is an unknown section'}; {hint}")

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._left.pop(key, default)


def _shown(value: object) -> str:
    """A value as TOML would have it."""
    return json.dumps(value) if isinstance(value, bool | str | int | list) else repr(value)
