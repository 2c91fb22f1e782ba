"""cloud.toml: what is accepted, and what is said of everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmaker_ota.cli.errors import ExitCode, exit_code
from rmaker_ota.cloud.config import load_config, parse_config
from rmaker_ota.errors import ConfigError

PATH = Path("/etc/rmaker/cloud.toml")
FULL = """
[service]
data_dir = "/var/lib/rmaker"
[http]
host = "0.0.0.0"
port = 443
url = "https://ota.example.org/"
cert = "tls/server.crt"
key = "tls/server.key"
url_ttl_s = 60
stall_timeout_s = 5
[mqtt]
host = "broker"
port = 1884
ca = "ca.crt"
cert = "client.crt"
key = "client.key"
username = "u"
password_file = "pw"
client_id = "c"
keepalive_s = 30
persistent_session = false
streams = true
basic_ingest = "on"
[admin]
port = 9000
"""
HTTP = '[http]\ncert = "c"\nkey = "k"\n'


def test_every_key_is_read_and_paths_start_at_the_file() -> None:
    config = parse_config(FULL, path=PATH)
    assert config.service.data_dir == Path("/var/lib/rmaker")
    http, mqtt = config.http, config.mqtt
    assert (http.host, http.port, http.url) == ("0.0.0.0", 443, "https://ota.example.org")
    assert (http.cert, http.key) == (Path("/etc/rmaker/tls/server.crt"), Path("/etc/rmaker/tls/server.key"))
    assert (http.url_ttl_s, http.stall_timeout_s, http.allow_http) == (60, 5, False)
    assert (mqtt.host, mqtt.port, mqtt.ca, mqtt.cert) == (
        "broker",
        1884,
        PATH.with_name("ca.crt"),
        PATH.with_name("client.crt"),
    )
    assert (mqtt.username, mqtt.password_file, mqtt.client_id) == ("u", PATH.with_name("pw"), "c")
    assert mqtt.streams
    assert (mqtt.keepalive_s, mqtt.persistent_session, mqtt.basic_ingest) == (30, False, "on")
    assert (config.admin.socket, config.admin.port, config.path) == (None, 9000, PATH)


def test_defaults() -> None:
    config = parse_config(HTTP, path=PATH)
    assert config.service.data_dir == PATH.with_name("data")
    assert (config.http.host, config.http.port, config.http.url_ttl_s) == ("127.0.0.1", 8443, 86400)
    assert not config.mqtt.streams
    assert (config.mqtt.port, config.mqtt.basic_ingest, config.mqtt.persistent_session) == (8883, "both", True)
    assert config.admin.socket == PATH.with_name("data") / "admin.sock"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HTTP + "prot = 5", r"\[http\] prot is an unknown key; did you mean port\?"),
        (HTTP + "zzz = 5", r"\[http\] zzz is an unknown key; known are allow_http, cert"),
        ("[htpp]", r"cloud\.toml: \[htpp\] is an unknown section; did you mean http\?"),
        ("[service]\nx = 1\n" + HTTP, r"\[service\] x is an unknown key"),
        (HTTP + "[mqtt]\nhots = 'x'", r"\[mqtt\] hots is an unknown key; did you mean host\?"),
        (HTTP + "[admin]\nsokcet = 'x'", r"\[admin\] sokcet is an unknown key; did you mean socket\?"),
        ("http = 5", r"\[http\] = 5: expected a table, \[http\]"),
        (HTTP + "port = '8443'", r"\[http\] port = \"8443\": expected a whole number from 0 to 65535"),
        (HTTP + "port = true", r"\[http\] port = true: expected a whole number"),
        (HTTP + "port = 65536", r"\[http\] port = 65536: expected a whole number"),
        (HTTP + "host = 5", r"\[http\] host = 5: expected a string"),
        (HTTP + 'host = "a\\u0000"', r"\[http\] host = .* without NUL"),
        (HTTP + "allow_http = 1", r"\[http\] allow_http = 1: expected true or false"),
        (HTTP + "url = 'http://x'", r"\[http\] url = \"http://x\": expected a URL like https://"),
        (HTTP + "url = 'https://x/?a=b'", r"\[http\] url = \"https://x/\?a=b\": expected a URL"),
        (HTTP + "host = '0.0.0.0'", r"\[http\] url is missing: expected the URL nodes use"),
        ("[http]\ncert = 'c'", r"\[http\] key is missing, but \[http\] cert is given"),
        ("[http]\nkey = 'k'", r"\[http\] cert is missing, but \[http\] key is given"),
        ("", r"\[http\] cert is missing: expected a certificate file \(or allow_http = true"),
        (
            HTTP + "[mqtt]\nbasic_ingest = 'yes'",
            r"\[mqtt\] basic_ingest = \"yes\": expected one of \"on\", \"off\", \"both\"",
        ),
        (HTTP + "[mqtt]\nbasic_ingest = []", r"\[mqtt\] basic_ingest = \[\]: expected one of"),
        (HTTP + "[mqtt]\nhost = ''", r"\[mqtt\] host is empty"),
        (HTTP + "[mqtt]\nclient_id = ''", r"\[mqtt\] client_id is empty"),
        (HTTP + "[mqtt]\ncert = 'c'", r"\[mqtt\] key is missing, but \[mqtt\] cert is given"),
        (HTTP + "[mqtt]\nca = 'c'\nallow_plain = true", r"\[mqtt\] allow_plain = true: expected no ca"),
        (HTTP + "[admin]\nsocket = 's'\nport = 1", r"\[admin\] port = 1: expected either a socket or a port"),
        (HTTP + f"[admin]\nsocket = '/{'s' * 120}'", r"\[admin\] socket = .*: expected at most 107 bytes"),
        ("[http", r"cloud\.toml: not TOML: Expected"),
    ],
)
def test_what_is_wrong_is_named_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(text, path=PATH)
    assert str(PATH) in str(raised.value)
    assert exit_code(raised.value) is ExitCode.USAGE


def test_tls_may_be_left_to_a_proxy() -> None:
    config = parse_config("[http]\nallow_http = true\nurl = 'http://x'", path=PATH)
    assert (config.http.cert, config.http.url) == (None, "http://x")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad\.toml: cannot be read: .*utf-8"):
        load_config(tmp_path / "bad.toml")
