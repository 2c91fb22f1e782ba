"""Configuration: what is accepted, what it becomes, and what is said of everything else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trustme

from rmaker_ota.config import NodeConfig, OtaSection, load_config, parse_config
from rmaker_ota.errors import ConfigError
from rmaker_ota.rainmaker.timezone import load_timezone, local_minute
from rmaker_ota.rainmaker.workflow import OtaOptions

# Specification, section 7: name -> default of the reference. (mqtt_port and others have a twin in [mqtt].)
REFERENCE: dict[str, Any] = {
    "ota_autofetch": True,
    "ota_autofetch_period_hours": 0,
    "ota_skip_common_name_check": False,
    "ota_skip_version_check": False,
    "ota_skip_secure_version_check": False,
    "ota_skip_project_name_check": False,
    "ota_rollback_wait_period_s": 90,
    "ota_rollback_report_failed": False,
    "ota_test_rollback": False,
    "ota_test_rollback_count": 100,
    "ota_disable_auto_reboot": False,
    "ota_time_support": True,
    "ota_progress_support": False,
    "ota_progress_interval_pct": 10,
    "ota_max_retries": 3,
    "ota_retry_delay_minutes": 5,
    "http_ota_resumption": True,
    "ota_transport": "https",
    "http_rx_buffer_size": None,  # 1024 would cost CPU time and gain nothing here
    "mqtt_ota_block_size": 4096,
    "mqtt_ota_blocks_per_request": 16,
    "mqtt_ota_max_retries": 3,
    "mqtt_ota_block_wait_s": 10,
    "use_cert_bundle": True,
    "rollback_enable": True,
    "mqtt_use_basic_ingest": True,
    "mqtt_budgeting": True,
    "mqtt_default_budget": 100,
    "mqtt_max_budget": 1024,
    "mqtt_budget_revive_period_s": 5,
    "mqtt_budget_revive_count": 1,
    "max_param_data_size": 1024,
    "mqtt_host": "mqtt.rainmaker.espressif.com",
    "mqtt_host_from_config": False,
    "node_id_from_cert_cn": False,
    "mqtt_port": 443,
    "mqtt_persistent_session": False,
    "mqtt_keepalive_s": 120,
    "max_mqtt_subscriptions": 10,
    "mqtt_send_username": True,
    "mqtt_product_name": "RMDev",
    "mqtt_product_version": "1x0",
    "mqtt_product_sku": "EX00",
    "timezone": None,  # Q18: the system's, not Asia/Shanghai
    "sntp_server": "pool.ntp.org",
    "connectivity_report_delay_s": 5,
    "factory_partition": "fctry",
    "factory_namespace": "rmaker_creds",
}

MINIMAL = """
[node]
id = "N1"
[mqtt]
host = "broker.example"
cert = "node.crt"
key = "node.key"
[target]
uri = "esp32-image:flash.bin"
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Credentials as host claiming leaves them."""
    leaf = trustme.CA().issue_cert("n1.invalid", common_name="CN-of-N1")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "node.crt")
    leaf.private_key_pem.write_to_path(tmp_path / "node.key")
    (tmp_path / "node.info").write_text("N-claimed")
    (tmp_path / "endpoint.info").write_text("claimed.example\n")
    return tmp_path


def load(directory: Path, text: str) -> NodeConfig:
    path = directory / "node.toml"
    path.write_text(text)
    return load_config(path)


def test_defaults_are_those_of_the_reference() -> None:
    section = OtaSection()
    assert {name: getattr(section, name) for name in REFERENCE} == REFERENCE


def test_a_minimal_file_is_complete(directory: Path) -> None:
    config = load(directory, MINIMAL)
    assert config.node.id == "N1"
    assert (config.mqtt.host, config.mqtt.port, config.mqtt.keepalive_s) == ("broker.example", 443, 120)
    assert config.mqtt.cert == directory / "node.crt"
    assert config.state.path == directory / "rmaker-ota.state"
    assert (config.restart.mode, config.restart.command) == ("process", ())
    assert isinstance(config.ota, OtaOptions)
    assert config.ota == OtaSection()


def test_every_option_of_the_reference_can_be_set(directory: Path) -> None:
    lines = []
    for name, default in REFERENCE.items():
        value = {
            "ota_transport": "mqtt",
            "timezone": "UTC",
            "http_rx_buffer_size": 1024,
            "mqtt_port": 8883,
            "mqtt_product_sku": "EX06",
        }.get(name)
        if value is None:
            value = not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else "x"
        shown = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
        lines.append(f"{name} = {shown}")
    config = load(directory, MINIMAL + "[ota]\n" + "\n".join(lines))
    for name, default in REFERENCE.items():
        assert getattr(config.ota, name) != default


def test_both_names_of_the_connection_mean_the_same(directory: Path) -> None:
    by_ota = load(
        directory, MINIMAL + "[ota]\nmqtt_port = 8883\nmqtt_keepalive_s = 60\nmqtt_use_basic_ingest = false\n"
    )
    by_mqtt = load(
        directory, MINIMAL.replace("[mqtt]", "[mqtt]\nport = 8883\nkeepalive_s = 60\nbasic_ingest = false\n")
    )
    assert dataclasses.replace(by_ota) == by_mqtt
    assert (by_ota.mqtt.port, by_ota.mqtt.keepalive_s, by_ota.ota.mqtt_use_basic_ingest) == (8883, 60, False)


def test_transport_is_short_for_ota_transport(directory: Path) -> None:
    assert load(directory, MINIMAL + '[ota]\ntransport = "https"\n').ota.ota_transport == "https"
    with pytest.raises(ConfigError, match="given again as transport"):
        load(directory, MINIMAL + '[ota]\ntransport = "https"\nota_transport = "https"\n')


def test_a_server_certificate_is_used_unless_the_bundle_is_asked_for(directory: Path) -> None:
    given = MINIMAL + '[ota]\nserver_cert = "node.crt"\n'
    assert load(directory, given).ota.use_cert_bundle is False
    assert load(directory, given + "use_cert_bundle = true\n").ota.use_cert_bundle is True


def test_claimed_credentials_need_no_other_key(directory: Path) -> None:
    config = load(directory, '[mqtt]\ncredentials = "."\n[target]\nuri = "file:x"\n')
    assert config.node.id == "N-claimed"
    assert config.mqtt.host == "claimed.example"
    assert (config.mqtt.cert, config.mqtt.key) == (directory / "node.crt", directory / "node.key")


def test_the_host_may_come_from_the_configuration_instead(directory: Path) -> None:
    text = '[mqtt]\ncredentials = "."\n[target]\nuri = "file:x"\n[ota]\nmqtt_host = "other.example"\n'
    assert load(directory, text).mqtt.host == "claimed.example"
    assert load(directory, text + "mqtt_host_from_config = true\n").mqtt.host == "other.example"
    (directory / "endpoint.info").unlink()
    assert load(directory, text).mqtt.host == "other.example"


def test_the_node_id_may_come_from_the_certificate(directory: Path) -> None:
    text = '[mqtt]\ncredentials = "."\n[target]\nuri = "file:x"\n[ota]\nnode_id_from_cert_cn = true\n'
    assert load(directory, text).node.id == "CN-of-N1"
    assert load(directory, text + '[node]\nid = "N1"\n').node.id == "N1"


def test_other_keys_of_a_target_are_left_to_it(directory: Path) -> None:
    config = load(directory, MINIMAL + "secure_version = 3\nanti_rollback = true\n")
    assert dict(config.target.options) == {"secure_version": 3, "anti_rollback": True}


def test_a_target_path_is_relative_to_the_file(directory: Path) -> None:
    assert load(directory, MINIMAL).target.uri == f"esp32-image:{directory}/flash.bin"
    assert load(directory, MINIMAL.replace("flash.bin", "/dev/x")).target.uri == "esp32-image:/dev/x"
    serial = MINIMAL.replace("esp32-image:flash.bin", "esp32-serial:/dev/ttyUSB0?baud=1")
    assert load(directory, serial).target.uri == "esp32-serial:/dev/ttyUSB0?baud=1"


WRONG: dict[str, tuple[str, str]] = {
    "unknown section": (
        MINIMAL + "[otta]\n",
        r"\[otta\]: unknown section, expected one of the sections metrics, mqtt",
    ),
    "section that is a value": ("ota = 1\n" + MINIMAL, r"ota = 1: expected a section \[ota\]"),
    "unknown key": (
        MINIMAL + "[ota]\nota_autofech = true\n",
        r"\[ota\] ota_autofech: unknown key; .*autofetch",
    ),
    "unknown key unlike any": (MINIMAL + "[state]\nx = 1\n", r"\[state\] x: unknown key; known are path"),
    "text for a switch": (
        MINIMAL + '[ota]\nota_autofetch = "yes"\n',
        r'\[ota\] ota_autofetch = "yes": .* or false',
    ),
    "number for a switch": (MINIMAL + "[ota]\nota_autofetch = 1\n", r"ota_autofetch = 1: expected true or false"),
    "switch for a number": (MINIMAL + "[ota]\nota_max_retries = true\n", r"ota_max_retries = true: .* from 1 to 10"),
    "below": (MINIMAL + "[ota]\nota_max_retries = 0\n", r"ota_max_retries = 0: expected a whole number from 1 to 10"),
    "above": (MINIMAL + "[ota]\nmqtt_max_budget = 2049\n", r"mqtt_max_budget = 2049: .* from 64 to 2048"),
    "fraction": (MINIMAL + "[ota]\nota_max_retries = 2.5\n", r"ota_max_retries = 2.5: expected a whole number"),
    "not a number": (MINIMAL + "[ota]\nhttp_stall_timeout_s = nan\n", r"http_stall_timeout_s = nan: .* from 0.1 to"),
    "endless": (MINIMAL + "[ota]\nhttp_deadline_s = inf\n", r"http_deadline_s = inf: expected a number from 0 to"),
    "huge": (MINIMAL + f"[ota]\nota_max_retries = {10**30}\n", r"ota_max_retries = 1000.*: expected a whole number"),
    "choice": (MINIMAL + '[ota]\ntype = "queues"\n', r'type = "queues": expected one of "topics", "params", "both"'),
    "choice of numbers": (MINIMAL + "[ota]\nmqtt_port = 1883\n", r"mqtt_port = 1883: expected one of 443, 8883"),
    "transport": (MINIMAL + '[ota]\ntransport = "ftp"\n', r'transport = "ftp": expected one of "https", "mqtt"'),
    "too much at once": (
        MINIMAL + "[ota]\nmqtt_ota_block_size = 16384\n",
        r"mqtt_ota_blocks_per_request = 16: expected at most 8 blocks of 16384 bytes",
    ),
    "params workflow, image over MQTT": (
        MINIMAL + '[ota]\ntype = "params"\ntransport = "mqtt"\n',
        r'type = "params": expected "topics": the params workflow has no stream',
    ),
    "both workflows, image over MQTT": (
        MINIMAL + '[ota]\ntype = "both"\ntransport = "mqtt"\n',
        r'type = "both": expected "topics": the params workflow has no stream',
    ),
    "twice": (MINIMAL + "[ota]\nmqtt_port = 443\n[mqtt2]", r"unknown section"),
    "list for a text": (MINIMAL.replace('"N1"', '["N1"]'), r"\[node\] id = \['N1'\]: expected a text"),
    "path that is empty": (MINIMAL + '[state]\npath = ""\n', r'\[state\] path = "": expected a path'),
    "bad id": (MINIMAL.replace("N1", "N/1"), r'\[node\] id = "N/1": expected 1 to 128 letters'),
    "bad host": (
        MINIMAL.replace("broker.example", "mqtts://x/"),
        r'\[mqtt\] host = "mqtts://x/": expected a host',
    ),
    "network id": (MINIMAL.replace("[mqtt]", 'network_id = "0a"\n[mqtt]'), r'network_id = "0a": expected 8 upper-case'),
    "no id": (MINIMAL.replace('id = "N1"', ""), r"\[node\] id: missing, expected an id, .*credentials"),
    "no cert": (MINIMAL.replace('cert = "node.crt"', ""), r"\[mqtt\] cert: missing"),
    "no such cert": (MINIMAL.replace("node.crt", "no.crt"), r'\[mqtt\] cert = ".*/no.crt": No such file or directory'),
    "no target": (MINIMAL.replace('uri = "esp32-image:flash.bin"', ""), r"\[target\] uri: missing"),
    "command without command": (MINIMAL + '[restart]\nmode = "command"\n', r"\[restart\] command: missing"),
    "command in vain": (MINIMAL + '[restart]\ncommand = ["reboot"]\n', r"\[restart\] command = .*expected mode = "),
    "command as text": (MINIMAL + '[restart]\nmode = "command"\ncommand = "reboot"\n', r"expected a list of texts"),
    "time zone": (MINIMAL + '[ota]\ntimezone = "Mars/Base"\n', r'timezone = "Mars/Base": expected an IANA name'),
    "not TOML": ("[node\n", r"not TOML: .*line 1"),
    "deep": ("a = " + "[" * 5000, r"not TOML"),
    "delays": (MINIMAL.replace("[mqtt]", "[mqtt]\nreconnect_min_s = 200"), r"reconnect_min_s = 200: .*at most"),
    "budget": (
        MINIMAL + "[ota]\nmqtt_default_budget = 2000\n",
        r"mqtt_default_budget = 2000: .*at most mqtt_max_budget",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_with_file_key_value_and_what_was_expected(
    directory: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(directory, text)
    assert str(caught.value).startswith(str(directory / "node.toml"))


def test_a_thing_said_twice_under_two_names_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[ota\] mqtt_port = 443: given again as \[mqtt\] port, expected only one"):
        load(directory, MINIMAL.replace("[mqtt]", "[mqtt]\nport = 443") + "[ota]\nmqtt_port = 443\n")
    with pytest.raises(ConfigError, match="given again as transport"):
        load(directory, MINIMAL + '[ota]\ntransport = "https"\nota_transport = "https"\n')


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: No such file"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bad\.toml: byte 0 is not UTF-8"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff", b" \n"])
def test_a_claimed_node_id_must_be_one_word(directory: Path, content: bytes) -> None:
    (directory / "node.info").write_bytes(content)
    with pytest.raises(ConfigError, match=r"node\.info"):
        load(directory, '[mqtt]\ncredentials = "."\n[target]\nuri = "file:x"\n')


@pytest.mark.parametrize("content", ["not a certificate", None])
def test_a_certificate_without_a_name_is_refused(directory: Path, content: str | None) -> None:
    text = '[mqtt]\ncredentials = "."\n[target]\nuri = "file:x"\n[ota]\nnode_id_from_cert_cn = true\n'
    if content is None:
        trustme.CA().issue_cert("n1.invalid").cert_chain_pems[0].write_to_path(directory / "node.crt")
    else:
        (directory / "node.crt").write_text(content)
    with pytest.raises(ConfigError, match=r"node\.crt"):
        load(directory, text)


def test_tables_may_come_from_a_program(directory: Path) -> None:
    config = parse_config(
        {"mqtt": {"credentials": str(directory)}, "target": {"uri": "file:x"}, "state": {"path": "/var/lib/s"}},
        directory=directory,
    )
    assert config.state.path == Path("/var/lib/s")
    with pytest.raises(ConfigError, match=r"^configuration: \[ota\] x"):
        parse_config({"ota": {"x": 1}})


@pytest.mark.parametrize(
    ("zone", "hours"),
    [("UTC0", 0), ("UTC", 0), ("IST-5:30", 5.5), ("<+0530>-5:30", 5.5), ("CST-8", 8), ("EST5EDT,M3.2.0,M11.1.0", 19)],
)
def test_time_zones(zone: str, hours: float) -> None:
    assert local_minute(1767225600, load_timezone(zone)) == hours * 60


def test_a_posix_zone_has_its_summer_time() -> None:
    zone = load_timezone("CET-1CEST,M3.5.0,M10.5.0/3")
    assert [local_minute(1767225600 + 86400 * day, zone) for day in (0, 180)] == [60, 120]


@pytest.mark.parametrize("name", ["", "nowhere", "../../etc/passwd", "/etc/passwd", "UTC\0", "UTC0\nX", "Ü-1"])
def test_what_is_no_time_zone(name: str) -> None:
    with pytest.raises(ValueError, match="not a time zone"):
        load_timezone(name)


# ---- sub-devices -----------------------------------------------------------------------------------------------------

SUB_DEVICES = (
    MINIMAL
    + """
    [ota]
    ota_max_retries = 5
    [state]
    path = "gw.state"
    [[sub_device]]
    node = {id = "lamp-1", name = "Lamp"}
    mqtt = {cert = "node.crt", key = "node.key", keepalive_s = 60}
    target = {uri = "esp32-serial:/dev/ttyUSB0", baud = 921600}
    [[sub_device]]
    [sub_device.node]
    id = "lamp-2"
    [sub_device.mqtt]
    cert = "node.crt"
    key = "node.key"
    [sub_device.ota]
    ota_max_retries = 2
    [sub_device.target]
    uri = "esp32-image:lamp.bin"
    [sub_device.state]
    path = "lamp.state"
    """
)


def test_a_sub_device_takes_what_it_does_not_say_from_the_node(directory: Path) -> None:
    config = load(directory, SUB_DEVICES)
    first, second = config.sub_devices
    assert (first.node.id, first.node.name, second.node.id) == ("lamp-1", "Lamp", "lamp-2")
    assert first.mqtt.host == second.mqtt.host == config.mqtt.host
    assert (config.mqtt.keepalive_s, first.mqtt.keepalive_s, second.mqtt.keepalive_s) == (120, 60, 120)
    assert (config.ota.ota_max_retries, first.ota.ota_max_retries, second.ota.ota_max_retries) == (5, 5, 2)
    assert first.target.options == {"baud": 921600}
    assert first.state.path == directory / "gw.lamp-1.state"
    assert second.state.path == directory / "lamp.state"
    assert first.restart.mode == second.restart.mode == "none"
    assert first.sub_devices == ()


@pytest.mark.parametrize(
    ("common", "own"),
    [
        ('[ota]\ntransport = "https"', 'ota = {ota_transport = "mqtt"}'),
        ('[ota]\nota_transport = "https"', 'ota = {transport = "mqtt"}'),
        ("[ota]\nmqtt_keepalive_s = 60", "keepalive_s = 90"),
        ("keepalive_s = 60", "ota = {mqtt_keepalive_s = 90}"),
    ],
)
def test_what_a_sub_device_says_counts_under_either_name(directory: Path, common: str, own: str) -> None:
    mqtt = own if own.startswith("keepalive") else "keepalive_s = 90" if "transport" in own else ""
    text = f"""{MINIMAL}
    {common if common.startswith("[") else ""}
    [[sub_device]]
    node = {{id = "lamp-1"}}
    mqtt = {{cert = "node.crt", key = "node.key"{", " * bool(mqtt)}{mqtt}}}
    {"" if own == mqtt else own}
    target = {{uri = "esp32-image:lamp.bin"}}
    """
    if not common.startswith("["):
        text = text.replace("[mqtt]", f"[mqtt]\n{common}", 1)
    (lamp,) = load(directory, text).sub_devices
    assert (lamp.mqtt.keepalive_s, lamp.ota.mqtt_keepalive_s) == (90, 90)
    assert lamp.ota.ota_transport == ("mqtt" if "transport" in own else "https")


@pytest.mark.parametrize(
    ("old", "new"),
    [("[mqtt]", '[mqtt]\nca = "~nobody-of-that-name/ca.pem"'), ("image:", "image:~nobody-of-that-name/")],
)
def test_a_home_that_is_not_there_is_named(directory: Path, old: str, new: str) -> None:
    text = MINIMAL.replace(old, new, 1)
    assert text != MINIMAL
    with pytest.raises(ConfigError, match=r'"(esp32-image:)?~nobody-of-that-name/.*expected the name of a user'):
        load(directory, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "lamp-2"', 'id = "lamp-1"', r'number 2: \[node\] id = "lamp-1": lamp-1 has it already'),
        ("esp32-image:lamp.bin", "esp32-serial:/dev/ttyUSB0", r"number 2: \[target\] uri = .*: lamp-1 has it already"),
        ('"lamp.state"', '"gw.state"', r"number 2: \[state\] path = .*: N1 has it already"),
        ("[sub_device.state]", "[sub_device.restart]", r"number 2: restart: unknown section, expected one of node"),
        ("ota_max_retries = 2", "ota_max_retries = 0", r"number 2: \[ota\] ota_max_retries = 0: expected a whole"),
        ('cert = "node.crt"\n    key', "key", r"number 2: \[mqtt\] cert: missing"),
        ("[sub_device.ota]", "[[sub_device.sub_device]]", r"number 2: sub_device: unknown section"),
    ],
)
def test_what_is_wrong_with_a_sub_device_is_said_with_its_number(
    directory: Path, old: str, new: str, message: str
) -> None:
    assert SUB_DEVICES.count(old) >= 1
    start, _, end = SUB_DEVICES.rpartition(old)
    with pytest.raises(ConfigError, match=message):
        load(directory, start + new + end)


def test_sub_devices_are_tables(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"sub_device = .*expected tables \[\[sub_device\]\]"):
        load(directory, "sub_device = 3\n" + MINIMAL)
