"""`rmaker-ota serve` and `rmaker-ota job` as a user has them: a directory made by `init`, its broker, a process."""

from __future__ import annotations

import gzip
import json
import queue
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from rmaker_ota import config as node_config
from rmaker_ota.cli import cli, errors
from rmaker_ota.cloud.broker import Broker
from rmaker_ota.cloud.client import AdminClient
from rmaker_ota.cloud.config import load_config
from rmaker_ota.errors import StateError
from rmaker_ota.esp_build import build_image
from tests.python.cloud_parts import free_port
from tests.sim.mosquitto import find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
WAIT_S = 20.0


def run(*args: object) -> int:
    words = [str(arg) for arg in args]
    return errors.run(lambda: cli.main(words, prog_name="rmaker-ota", standalone_mode=False))


class Serving:
    """`rmaker-ota serve` as a process."""

    def __init__(self, config: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rmaker_ota", "serve", "--config", str(config), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.listening = json.loads(self.process.stdout.readline())

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline())["event"] == "ready"

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        out, _ = self.process.communicate(timeout=WAIT_S)
        assert out == ""
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class NodeClient:
    """A node of the installation, by its credentials."""

    def __init__(self, directory: Path, name: str, port: int) -> None:
        self.name = name
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        subscribed = threading.Event()
        files = directory / "nodes" / name
        context = ssl.create_default_context(cafile=directory / "ca.crt")
        context.load_cert_chain(files / "node.crt", files / "node.key")
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=name)
        self.client.tls_set_context(context)
        self.client.on_connect = lambda client, *rest: client.subscribe(f"node/{name}/otaurl", 1)
        self.client.on_subscribe = lambda *rest: subscribed.set()
        self.client.on_message = lambda client, data, message: self.jobs.put(json.loads(message.payload))
        self.client.connect((files / "endpoint.info").read_text(), port)
        self.client.loop_start()
        assert subscribed.wait(WAIT_S)

    def report(self, job: str, status: str, *, as_node: str = "") -> None:
        topic = f"$aws/rules/esp_node_otastatus/node/{as_node or self.name}/otastatus"
        payload = json.dumps({"ota_job_id": job, "status": status, "additional_info": "\x1b[31m"})
        self.client.publish(topic, payload, qos=1).wait_for_publish(WAIT_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Installation:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "cloud.toml"
        self.mqtt_port = free_port()
        ports = ["--port", free_port(), "--mqtt-port", self.mqtt_port]
        assert run("serve", "init", directory, "--node", "N1", "--node", "N2", *ports) == 0
        self.broker = Broker(directory / "mosquitto.conf")


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path / "cloud")
    with installation.broker:
        yield installation


@pytest.fixture
def serving(installation: Installation) -> Iterator[Serving]:
    serving = Serving(installation.config)
    serving.wait_ready()
    yield serving
    serving.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "app.bin"
    path.write_bytes(build_image(version="2.0.0"))
    return path


def output(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def wait_for(installation: Installation, job: str, *wanted: tuple[str, str]) -> None:
    """Returns when the job's history has these (node, status)."""
    missing = set(wanted)
    for entry in AdminClient(load_config(installation.config)).watch(job):
        missing.discard((entry["node"], entry["status"]))
        if not missing:
            return
    raise AssertionError(f"the job ended without {missing}")


def test_a_job_from_the_command_line_reaches_the_node_and_its_report_comes_back(
    installation: Installation, serving: Serving, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--config", installation.config)
    node = NodeClient(installation.directory, "N1", installation.mqtt_port)
    capsys.readouterr()
    assert run("job", "create", image, "--node", "N1", "--metadata", '{"k": 1}', "--json", *config) == 0
    job = output(capsys)
    message = node.jobs.get(timeout=WAIT_S)
    assert (message["ota_job_id"], message["fw_version"], message["metadata"]) == (job["id"], "2.0.0", {"k": 1})
    assert message["url"].startswith(serving.listening["url"] + "/images/")

    node.report(job["id"], "success")
    wait_for(installation, job["id"], ("N1", "success"))
    assert run("job", "show", job["id"], *config) == 0
    text = capsys.readouterr().out
    assert "success" in text
    assert "\x1b" not in text
    assert run("job", "list", *config) == 0
    assert job["id"] in capsys.readouterr().out
    assert run("job", "cancel", job["id"], *config) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert run("job", "nodes", "--json", *config) == 0
    assert [each["node"] for each in output(capsys)["nodes"]] == ["N1"]
    node.close()


@pytest.mark.parametrize(("status", "code"), [("success", 0), ("rejected", 3)])
def test_create_waits_for_the_end_and_says_how_it_was(
    installation: Installation,
    serving: Serving,
    image: Path,
    status: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = NodeClient(installation.directory, "N1", installation.mqtt_port)

    def answer() -> None:
        job = node.jobs.get(timeout=WAIT_S)["ota_job_id"]
        node.report(job, "in-progress")
        node.report(job, status)

    thread = threading.Thread(target=answer)
    thread.start()
    assert run("job", "create", image, "--node", "N1", "--wait", "--config", installation.config) == code
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[-4:]] == ["queued", "sent", "in-progress", status]
    node.close()


def test_nodes_speak_for_themselves_only(
    installation: Installation, serving: Serving, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--config", installation.config)
    capsys.readouterr()
    assert run("job", "create", image, "--node", "N1", "--node", "N2", "--on-fetch", "--json", *config) == 0
    job = output(capsys)["id"]
    n1, n2 = (NodeClient(installation.directory, name, installation.mqtt_port) for name in ("N1", "N2"))
    n1.report(job, "success", as_node="N2")
    n1.report(job, "rejected")
    n2.report(job, "failed")
    wait_for(installation, job, ("N1", "rejected"), ("N2", "failed"))
    assert run("job", "show", job, "--json", *config) == 0
    states = {each["node"]: each["state"] for each in output(capsys)["nodes"]}
    assert states == {"N1": "rejected", "N2": "failed"}
    n1.close()
    n2.close()


def test_a_report_waits_for_the_service_in_a_broker_that_crashed(
    installation: Installation, serving: Serving, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    config = ("--config", installation.config)
    assert run("job", "create", image, "--node", "N1", "--on-fetch", "--json", *config) == 0
    job = output(capsys)["id"]
    serving.process.kill()
    process = installation.broker._process
    assert process is not None
    process.kill()
    process.wait(WAIT_S)
    with Broker(installation.directory / "mosquitto.conf"):
        node = NodeClient(installation.directory, "N1", installation.mqtt_port)
        node.report(job, "success")
        node.close()
        again = Serving(installation.config)
        try:
            wait_for(installation, job, ("N1", "success"))
        finally:
            again.kill()


def test_only_an_image_becomes_a_job_unless_it_is_said_to_be_raw(
    installation: Installation, serving: Serving, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--node", "N1", "--on-fetch", "--json", "--config", installation.config)
    whole = image.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    packed = gzip.compress(whole)
    bad = {
        "text.bin": b"no image" * 1000,
        "short.bin": whole[:100],
        "cut.bin": whole[: len(whole) // 2],
        "damaged.bin": bytes(damaged),
        "packed.bin.gz": gzip.compress(b"no image" * 1000),
        "cut.bin.gz": packed[: len(packed) // 2],
    }
    for name, content in bad.items():
        path = image.with_name(name)
        path.write_bytes(content)
        capsys.readouterr()
        assert run("job", "create", path, *config) == 2, name
        said = capsys.readouterr().err
        assert f"{path} is no ESP app image: " in said
        assert "--raw" in said
    assert AdminClient(load_config(installation.config)).images() == []
    image.with_name("good.bin.gz").write_bytes(packed)
    for words in (["good.bin.gz"], ["text.bin", "--raw"]):
        assert run("job", "create", image.with_name(words[0]), *words[1:], *config) == 0
        assert output(capsys)["image"]["name"] == words[0]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_the_service_in_order(
    serving: Serving, installation: Installation, how: signal.Signals, code: int
) -> None:
    assert serving.listening["event"] == "listening"
    assert serving.stop(how) == code
    assert not (installation.directory / "data" / "admin.sock").exists()


def test_without_a_service_job_commands_say_how_to_start_it(
    installation: Installation, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["list"], ["show", "x"], ["cancel", "x"], ["nodes"], ["create", image, "--node", "N1"]):
        assert run("job", *words, "--config", installation.config) == 1
        assert "start it with `rmaker-ota serve --config" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(
    installation: Installation, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--config", installation.config)
    assert run("job", "create", image, *config) == 2
    assert run("job", "create", image.parent / "none.bin", "--node", "N1", *config) == 2
    assert run("job", "create", image, "--node", "N1", "--metadata", "{", *config) == 2
    assert run("job", "create", image, "--node", "N1", "--metadata", "[]", *config) == 2
    assert run("serve", "--config", image.parent / "none.toml") == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err
    installation.config.write_text("[http]\nprot = 1\ncert = 'c'\nkey = 'k'\n")
    assert run("job", "list", *config) == 2
    assert "[http] prot is an unknown key" in capsys.readouterr().err


def test_an_installation_is_never_overwritten_and_nodes_are_added(
    installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    before = installation.config.read_text()
    assert run("serve", "init", installation.directory) == 1
    assert "there is an installation already" in capsys.readouterr().err
    assert installation.config.read_text() == before
    assert run("serve", "add-node", installation.directory, "N3", "--json") == 0
    assert output(capsys)["nodes"][0]["node"] == "N3"
    assert run("serve", "add-node", installation.directory, "N1") == 1
    assert "has credentials already" in capsys.readouterr().err
    NodeClient(installation.directory, "N3", installation.mqtt_port).close()


def test_names_given_to_init_are_those_of_certificate_urls_and_nodes(tmp_path: Path) -> None:
    directory = tmp_path / "lan"
    assert run("serve", "init", directory, "--host", "ota.lan", "--host", "192.0.2.7", "--node", "N1") == 0
    text = (directory / "cloud.toml").read_text()
    assert 'url = "https://ota.lan:8443"' in text
    assert 'host = "0.0.0.0"' in text
    assert (directory / "nodes" / "N1" / "endpoint.info").read_text() == "ota.lan"


def test_the_node_configuration_made_is_a_good_one(installation: Installation) -> None:
    config = node_config.load_config(installation.directory / "nodes" / "N1" / "node.toml")
    assert (config.node.id, config.mqtt.host, config.mqtt.port) == ("N1", "localhost", installation.mqtt_port)
    assert config.ota.server_cert == config.mqtt.ca


def test_a_broker_that_cannot_start_says_why(installation: Installation) -> None:
    with pytest.raises(StateError, match=r"mosquitto did not start: .*Address already in use"):
        Broker(installation.directory / "mosquitto.conf").start()
