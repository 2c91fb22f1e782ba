"""Credentials in NVS: found in a flash or a dump, plain or encrypted; the private key is shown nowhere."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import ssl
import stat
import tempfile
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner

from rmaker_ota import credentials, ota_core
from rmaker_ota.cli import cli
from rmaker_ota.config import NodeConfig, load_config
from rmaker_ota.credentials import private_file, read_credentials, read_keys
from rmaker_ota.errors import ArgumentError, ConfigError, FormatError, NotFoundError
from rmaker_ota.rainmaker.connection import make_transport

VECTORS = Path(__file__).resolve().parents[1] / "data" / "vectors"
KEYS_FILE = VECTORS / "nvs" / "keys" / "nvs_keys.bin"
SIZE = 0x6000
LEAF = trustme.CA().issue_cert("n1.invalid", common_name="CN-of-N1")
CERT = LEAF.cert_chain_pems[0].bytes()
KEY = LEAF.private_key_pem.bytes()
SECRET = KEY.split(b"\n")[1].decode()  # a line of the key itself
HMAC_KEYS = (
    "813a141220ddb819f4d73d59fa3032ab9f592cc26a18cf1fde692f712b6a025c"
    + "b20ad6b6ddd1658a6e14d1b5b726e42356adf4ff2f68fcd8826ac2908408addf"
)
VALUES = {"node_id": b"N-stored", "mqtt_host": b"stored.example", "client_cert": CERT, "client_key": KEY}


def partition(
    values: dict[str, bytes] = VALUES, *, keys: bytes | None = None, namespace: str = "rmaker_creds", size: int = SIZE
) -> bytes:
    """A factory partition, as claiming leaves it."""
    found = ota_core.Nvs(b"\xff" * size, keys)
    for key, value in values.items():
        found.set(namespace, key, "blob", value)
    return found.image


def flash_with(data: bytes, *, label: str = "fctry") -> bytes:
    """A flash whose ``nvs`` partition has another label, and these bytes."""
    flash = bytearray(gzip.decompress((VECTORS / "flash" / "esp32c3_2mb.bin.gz").read_bytes()))
    table = flash[0x8000:0x9000]
    at = next(at for at in range(0, len(table), 32) if table[at + 2 : at + 4] == b"\x01\x02")
    flash[0x8000 + at + 12 : 0x8000 + at + 28] = label.encode().ljust(16, b"\0")
    # The MD5 row is over the rows before it.
    end = next(at for at in range(0, len(table), 32) if table[at : at + 2] == b"\xeb\xeb")
    flash[0x8000 + end + 16 : 0x8000 + end + 32] = hashlib.md5(flash[0x8000 : 0x8000 + end]).digest()
    offset, size = (int.from_bytes(table[at + n : at + n + 4], "little") for n in (4, 8))
    assert len(data) <= size
    flash[offset : offset + size] = data.ljust(size, b"\xff")
    return bytes(flash)


@pytest.fixture
def keys() -> bytes:
    return read_keys(KEYS_FILE)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- Where they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["dump", "flash"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_credentials_are_found_wherever_they_lie(tmp_path: Path, keys: bytes, *, whole: bool, encrypted: bool) -> None:
    data = partition(keys=keys if encrypted else None, size=0x4000)
    path = write(tmp_path / "x.bin", flash_with(data) if whole else data)
    found = read_credentials(path, keys=keys if encrypted else None)
    assert (found.node_id, found.mqtt_host, found.mqtt_cred_host) == ("N-stored", "stored.example", None)
    assert (found.client_cert, found.client_key, found.encrypted) == (CERT, KEY, encrypted)
    assert found.where == f"{path}, partition fctry" if whole else str(path)


def test_keys_do_no_harm_to_a_plain_partition(tmp_path: Path, keys: bytes) -> None:
    found = read_credentials(write(tmp_path / "x.bin", partition()), keys=keys)
    assert (found.node_id, found.encrypted) == ("N-stored", False)


def test_values_may_be_strings_and_end_with_nul(tmp_path: Path) -> None:
    data = ota_core.Nvs(partition({"client_cert": CERT + b"\0", "random": bytes(64), "mqtt_host": b"\xff"}))
    data.set("rmaker_creds", "node_id", "str", "N-text")
    found = read_credentials(write(tmp_path / "x.bin", data.image))
    assert (found.client_cert, found.random, found.node_id, found.mqtt_host) == (CERT, bytes(64), "N-text", None)


def test_what_cannot_be_read_is_named(tmp_path: Path, keys: bytes) -> None:
    plain = write(tmp_path / "plain.bin", partition())
    locked = write(tmp_path / "locked.bin", partition(keys=keys))
    flash = write(tmp_path / "flash.bin", flash_with(partition(size=0x4000)))
    other = bytes(reversed(keys))
    with pytest.raises(NotFoundError, match=r"plain\.bin has no namespace other"):
        read_credentials(plain, namespace="other")
    with pytest.raises(NotFoundError, match=r"flash\.bin has no partition nope: .*fctry"):
        read_credentials(flash, partition="nope")
    with pytest.raises(FormatError, match=r"locked\.bin: no entry can be read: it is encrypted"):
        read_credentials(locked)
    with pytest.raises(FormatError, match=r"locked\.bin: no entry can be read: damaged, or of other keys"):
        read_credentials(locked, keys=other)
    with pytest.raises(ArgumentError, match="neither a flash image nor whole pages"):
        read_credentials(write(tmp_path / "short.bin", b"x" * 4095))
    with pytest.raises(FileNotFoundError):
        read_credentials(tmp_path / "none")


def test_keys_come_as_a_partition_or_as_bytes(tmp_path: Path, keys: bytes) -> None:
    assert len(keys) == 64
    assert read_keys(write(tmp_path / "64", keys)) == keys
    # Computed with OpenSSL: printf '\x5a\x5a\xbe\xae...' | openssl dgst -sha256 -mac HMAC -macopt hexkey:0001..1f
    derived = read_keys(write(tmp_path / "32", bytes(range(32))))
    assert derived.hex() == HMAC_KEYS
    for wrong in (b"", b"\xff" * 4096, KEYS_FILE.read_bytes()[:-1][:66]):
        with pytest.raises(FormatError):
            read_keys(write(tmp_path / "wrong", wrong))


# ---- The private key stays where it is -------------------------------------------------------------------------------


def test_files_for_tls_are_private_and_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_credentials(write(tmp_path / "x.bin", partition()))
    before = set(Path("/proc/self/fd").iterdir())
    with found.as_files() as (cert, key):
        assert Path(key).read_bytes() == KEY
        ssl.create_default_context().load_cert_chain(cert, key)
    assert set(Path("/proc/self/fd").iterdir()) == before

    def refused(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_file(KEY) as name:
        assert Path(name).parent == tmp_path
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600
        assert Path(name).read_bytes() == KEY
    assert not Path(name).exists()
    with pytest.raises(ZeroDivisionError), private_file(KEY) as name:
        raise ZeroDivisionError
    assert not Path(name).exists()


def test_the_key_is_in_no_text(tmp_path: Path) -> None:
    found = read_credentials(write(tmp_path / "x.bin", partition(VALUES | {"random": b"R" * 64})))
    for shown in (repr(found), json.dumps(credentials.describe(found))):
        assert "PRIVATE" not in shown.replace('"kind": "RSA PRIVATE KEY"', "").replace('"kind": "EC PRIVATE KEY"', "")
        assert SECRET not in shown
        assert "RRRR" not in shown
    with (
        pytest.raises(NotFoundError, match="has no client_key"),
        credentials.Credentials("x", client_cert=CERT).as_files(),
    ):
        raise AssertionError


# ---- In a configuration ----------------------------------------------------------------------------------------------


def load(directory: Path, mqtt: str, more: str = "") -> NodeConfig:
    path = directory / "node.toml"
    path.write_text(f'[mqtt]\n{mqtt}\n[target]\nuri = "file:x"\n{more}\n')
    return load_config(path)


def test_a_node_takes_everything_from_nvs(tmp_path: Path, keys: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    write(tmp_path / "fctry.bin", partition(keys=keys))
    write(tmp_path / "keys.bin", KEYS_FILE.read_bytes())
    config = load(tmp_path, 'nvs = "fctry.bin"\nnvs_keys = "keys.bin"')
    assert (config.node.id, config.mqtt.host) == ("N-stored", "stored.example")
    assert (config.mqtt.cert, config.mqtt.key, config.mqtt.nvs) == (None, None, tmp_path / "fctry.bin")
    transport = make_transport(config)
    tls = transport._connection.tls  # type: ignore[attr-defined]
    assert isinstance(tls.context(), ssl.SSLContext)
    assert SECRET not in repr(config) + repr(tls) + repr(vars(transport)) + caplog.text


def test_other_names_and_other_sources_of_id_and_host(tmp_path: Path) -> None:
    write(tmp_path / "f.bin", flash_with(partition(namespace="mine", size=0x4000), label="mfg"))
    names = 'factory_partition = "mfg"\nfactory_namespace = "mine"\n'
    config = load(tmp_path, 'nvs = "f.bin"', "[ota]\n" + names + "mqtt_host_from_config = true\nmqtt_host = 'h'\n")
    assert (config.node.id, config.mqtt.host) == ("N-stored", "h")
    config = load(tmp_path, 'nvs = "f.bin"\nhost = "b"', "[ota]\n" + names + "node_id_from_cert_cn = true\n")
    assert (config.node.id, config.mqtt.host) == ("CN-of-N1", "b")
    assert load(tmp_path, 'nvs = "f.bin"', '[node]\nid = "me"\n[ota]\n' + names).node.id == "me"


def test_wrong_configurations_name_file_key_and_expectation(tmp_path: Path, keys: bytes) -> None:
    write(tmp_path / "ok.bin", partition())
    write(tmp_path / "locked.bin", partition(keys=keys))
    write(tmp_path / "nokey.bin", partition({"node_id": b"N", "client_cert": CERT}))
    write(tmp_path / "noid.bin", partition({"client_cert": CERT, "client_key": KEY}))
    write(tmp_path / "short", b"1")
    where = r"^.*node\.toml: \[mqtt\] "
    for mqtt, message in {
        "nvs = 3": where + "nvs = 3: expected a path",
        'nvs = "none"': where + r'nvs = ".*none": No such file or directory, expected a flash image or a dump of fctry',
        'nvs = "locked.bin"': where + r'nvs = ".*": .*encrypted.*, expected a flash image',
        'nvs = "nokey.bin"': where + r'nvs = ".*": none there, expected a client_key',
        'nvs = "noid.bin"': r"^.*node\.toml: \[node\] id: missing, expected an id, a node_id in .*noid\.bin",
        'nvs = "ok.bin"\ncert = "c"': where + r'cert = ".*": .*\[mqtt\] nvs too, expected only one of them',
        'nvs = "ok.bin"\ncredentials = "."': where + "credentials = .*only one of them",
        'nvs = "ok.bin"\nnvs_keys = "short"': where + r'nvs_keys = ".*short": .*, expected an nvs_keys partition',
        'nvs_keys = "short"\ncredentials = "."': where + r"nvs_keys = .*expected \[mqtt\] nvs beside it",
        'nvs = "ok.bin"\nca = "none"': where + "ca = ",
        'nvsx = "ok.bin"': where + r"nvsx: unknown key; did you mean nvs\?",
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            load(tmp_path, mqtt)
        assert SECRET not in str(caught.value)


def test_a_key_that_is_none_is_not_quoted(tmp_path: Path) -> None:
    write(tmp_path / "x.bin", partition(VALUES | {"client_key": b"-----BEGIN PRIVATE KEY-----\nhunter2\n"}))
    transport = make_transport(load(tmp_path, 'nvs = "x.bin"'))
    with pytest.raises(ConfigError, match=r"MQTT certificate .*x\.bin") as caught:
        transport._connection.tls.context()  # type: ignore[attr-defined]
    assert "hunter2" not in str(caught.value)
    write(tmp_path / "x.bin", partition({"node_id": b"N"}))  # changed since
    with pytest.raises(ConfigError, match="no client_cert and client_key"):
        transport._connection.tls.context()  # type: ignore[attr-defined]


# ---- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["dump", "flash"])
def test_inspect_names_them_and_shows_no_key(tmp_path: Path, keys: bytes, *, whole: bool) -> None:
    data = partition(VALUES | {"spare": KEY}, keys=keys, size=0x4000)
    path = write(tmp_path / "x.bin", flash_with(data) if whole else data)
    words = ["inspect", str(path), "--nvs-keys", str(KEYS_FILE)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0
    assert ", encrypted" in done.stdout
    for line in ("node id           N-stored", "MQTT host         stored.example", "CN-of-N1, SHA-256 "):
        assert f"  {line}" in done.stdout
    assert f"PRIVATE KEY, {len(KEY)} bytes, not shown" in done.stdout
    listed = CliRunner().invoke(cli, [*words, "--json"]).stdout
    answer = json.loads(listed)
    part = answer["nvs"][0] if whole else answer
    der = ssl.PEM_cert_to_DER_cert(CERT.decode())
    assert part["credentials"]["certificate"] == {
        "size": len(CERT),
        "sha256": hashlib.sha256(der).hexdigest(),
        "common_name": "CN-of-N1",
    }
    for shown in (done.stdout, listed):
        assert SECRET not in shown
        assert KEY[:60].hex() not in shown


def test_inspect_without_keys_finds_nothing_and_says_so(tmp_path: Path, keys: bytes) -> None:
    path = write(tmp_path / "x.bin", partition(keys=keys))
    answer = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).stdout)
    assert (answer["items"], answer["credentials"], answer["encrypted"]) == ([], None, False)
    assert answer["damaged"] > 0
    wrong = write(tmp_path / "wrong", b"1")
    done = CliRunner().invoke(cli, ["inspect", str(path), "--nvs-keys", str(wrong)])
    assert done.exit_code != 0


def test_inspect_reads_the_encrypted_vector() -> None:
    path = VECTORS / "nvs" / "nvs_small_encrypted.bin"
    answer = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--nvs-keys", str(KEYS_FILE), "--json"]).stdout)
    assert answer["encrypted"]
    assert {item["key"]: item["value"] for item in answer["items"]} == {
        "ota_file_md5": "0123456789abcdef0123456789abcdef",
        "ota_written": 12,
        "ota_update": "01",
    }
