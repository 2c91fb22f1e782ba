"""What others see of a node: log records with its ids and without secrets, and a file of metrics that is whole."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.config import MetricsSection, NodeConfig
from rmaker_ota.errors import ConfigError, DownloadError
from rmaker_ota.rainmaker.observe import JsonFormatter, LogFields, without_secrets
from tests.sim.node_world import FakeInstallation, World, fails, good

KEY = "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0\n-----END EC PRIVATE KEY-----"


class MeasuredWorld(World):
    """A world whose node keeps metrics."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def config(self) -> NodeConfig:
        return dataclasses.replace(super().config(), metrics=MetricsSection(self.path))

    def metrics(self) -> dict[str, float]:
        """Name and labels beside the node's id -> value; each line is one the text format has."""
        self.settle()
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith(("# HELP rmaker_ota_", "# TYPE rmaker_ota_")):
                name, value = line.rsplit(" ", 1)
                assert 'node_id="N1"' in name
                found[name.replace('{node_id="N1"}', "").replace('node_id="N1",', "")] = float(value)
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[MeasuredWorld]:
    world = MeasuredWorld(tmp_path / "node.prom")
    yield world
    world.stop()


def update(world: World) -> None:
    world.boot()
    world.connect()
    world.deliver_job()
    world.advance(10)


# ---- Metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_follow_an_update_across_its_restart(world: MeasuredWorld) -> None:
    world.boot()
    first = world.metrics()
    assert first["rmaker_ota_connected"] == 0
    assert first['rmaker_ota_state{state="idle"}'] == 1
    assert first["rmaker_ota_last_success_timestamp_seconds"] == 0
    assert first['rmaker_ota_info{project="gw",version="1.0.0"}'] == 1
    world.connect()
    assert world.metrics()["rmaker_ota_connected"] == 1
    world.scripts.append(good())
    world.deliver_job()
    assert world.metrics()['rmaker_ota_state{state="updating"}'] == 1
    world.advance(10)
    world.boot()
    assert world.metrics()['rmaker_ota_state{state="verifying"}'] == 1
    world.connect()
    last = world.metrics()
    assert last['rmaker_ota_updates_total{result="success"}'] == 1
    assert last['rmaker_ota_state{state="idle"}'] == 1
    assert sum(value for name, value in last.items() if name.startswith("rmaker_ota_state")) == 1
    assert last["rmaker_ota_image_bytes_total"] == 1000  # what a fake installation says of itself
    assert last["rmaker_ota_last_success_timestamp_seconds"] > 1.7e9
    assert last['rmaker_ota_info{project="gw",version="2.0.0"}'] == 1
    node = world.node
    assert node is not None
    node.stop()
    assert 'rmaker_ota_connected{node_id="N1"} 0' in world.path.read_text()
    assert stat.S_IMODE(world.path.stat().st_mode) == 0o644
    assert [path.name for path in world.path.parent.iterdir()] == ["node.prom"]


def test_every_attempt_and_every_result_counts(world: MeasuredWorld) -> None:
    world.scripts += [fails(DownloadError("x", stage="source"), after_header=True) for _ in range(3)]
    world.boot()
    world.connect()
    world.deliver_job()
    world.advance(60)
    assert world.metrics()["rmaker_ota_image_bytes_total"] == 3000
    assert world.metrics()['rmaker_ota_updates_total{result="failed"}'] == 1

    world.scripts.append(good(project="other"))
    world.deliver_job("J2")
    world.advance(60)
    assert world.metrics()['rmaker_ota_updates_total{result="rejected"}'] == 1
    assert world.metrics()['rmaker_ota_updates_total{result="failed"}'] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b'rmaker_ota_updates_total{node_id="N1",result="success"} 1e1e1\n',
        b'rmaker_ota_updates_total{node_id="N1",result="success"} 1e999\n',
        b"",
    ],
)
def test_a_damaged_file_is_begun_anew(world: MeasuredWorld, content: bytes) -> None:
    world.path.write_bytes(content)
    world.boot()
    assert world.metrics()['rmaker_ota_updates_total{result="success"}'] == 0


def test_a_file_that_cannot_be_written_is_said_once_and_stops_nothing(
    world: MeasuredWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.path = world.path.parent / "none" / "node.prom"
    world.scripts.append(good())
    update(world)
    assert world.restart_reasons
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_the_directory_must_be_there(tmp_path: Path) -> None:
    from rmaker_ota.config import parse_config

    for name in ("cert", "key"):
        (tmp_path / name).write_text("x")
    tables = {
        "node": {"id": "N1"},
        "mqtt": {"cert": "cert", "key": "key"},
        "target": {"uri": "file:x"},
        "metrics": {"path": "none/x.prom"},
    }
    with pytest.raises(ConfigError, match=r"\[metrics\] path = .*expected a file in a directory"):
        parse_config(tables, directory=tmp_path)
    tables["metrics"] = {"path": "x.prom"}
    assert parse_config(tables, directory=tmp_path).metrics.path == tmp_path / "x.prom"


# ---- Logging ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What a handler with fields and JSON writes."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.addFilter(LogFields())
    handler.setFormatter(JsonFormatter())
    ours = logging.getLogger("rmaker_ota")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield text
    ours.removeHandler(handler)
    ours.setLevel(level)


def test_records_carry_node_and_job(world: MeasuredWorld, lines: io.StringIO) -> None:
    def slow(run: FakeInstallation) -> None:
        run.header()
        logging.getLogger("rmaker_ota.test").info("inside")
        run.finish()

    logging.getLogger("rmaker_ota.test").info("before")
    world.scripts.append(slow)
    update(world)
    entries = [json.loads(line) for line in lines.getvalue().splitlines()]
    by_message = {entry["message"]: entry for entry in entries}
    assert (by_message["before"]["node_id"], by_message["before"]["job_id"]) == ("-", "-")
    assert (by_message["inside"]["node_id"], by_message["inside"]["job_id"]) == ("N1", "J1")
    assert {entry["logger"].split(".")[0] for entry in entries} == {"rmaker_ota"}
    assert set(by_message["inside"]) == {"time", "level", "logger", "node_id", "job_id", "message"}


def test_of_two_nodes_each_has_its_own_records(world: MeasuredWorld, lines: io.StringIO) -> None:
    other = World()
    world.boot()
    other.boot()
    try:
        mark = lines.tell()
        world.connect()
        logging.getLogger("rmaker_ota.test").info("neither's")
    finally:
        other.stop()
    entries = [json.loads(line) for line in lines.getvalue()[mark:].splitlines()]
    assert {entry["node_id"] for entry in entries if entry["message"] == "neither's"} == {"-"}
    assert "N1" in {entry["node_id"] for entry in entries}


def test_secrets_reach_no_line(lines: io.StringIO) -> None:
    log = logging.getLogger("rmaker_ota.test")
    log.info("got %s from %s", KEY, "https://user:hunter2@h.example/a.bin?X-Sig=abcdef&b=1")
    try:
        raise ValueError(f"bad {KEY} at https://h.example/a?token=abcdef")
    except ValueError:
        log.exception("no %d%%", 5)
    first, second = [json.loads(line) for line in lines.getvalue().splitlines()]
    for secret in ("c2VjcmV0", "hunter2", "abcdef"):
        assert secret not in lines.getvalue()
    assert first["message"] == "got (private key) from https://(not shown)@h.example/a.bin?(not shown)"
    assert second["message"] == "no 5%"
    assert "ValueError: bad (private key) at https://h.example/a?(not shown)" in second["exception"]


def test_ordinary_text_is_left_alone() -> None:
    for text in ("a?b", "mail a@b.c", "https://h.example/a.bin: 404", "node/N1/otaurl {'a': 1}", ""):
        assert without_secrets(text) == text
    assert without_secrets("x -----BEGIN PRIVATE KEY-----\nabc") == "x (private key)"
