"""A node as its own process on a virtual chip, and the cloud's end of its conversation, over a real broker.

    with Mosquitto(tmp_path) as broker, Cloud(broker) as cloud, Agent(tmp_path, broker) as agent:
        agent.start()
        cloud.wait_config()
        cloud.send_job(server.url(), image)
        cloud.wait_status("success", ...)

The firmware's fixed delays (5 s before a fetch, 10 s before a restart) are shortened inside the process; it restarts as
any other does, and is shortened again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rmaker_ota.esp_build import build_image
from rmaker_ota.rainmaker.transport_paho import Connection, PahoTransport, TlsFiles
from rmaker_ota.targets.create import create_flash_image
from tests.sim.mosquitto import Mosquitto

WAIT_S = 30.0
NODE_ID = "N1"
ROOT = Path(__file__).resolve().parents[2]

RULES = (  # and the topics that go with them; messages are known by the last level
    ("esp_node_config", "config"),
    ("esp_node_otafetch", "otafetch"),
    ("esp_node_otastatus", "otastatus"),
    ("esp_set_params", "params/local"),
    ("esp_init_params", "params/local/init"),
)

# What the process runs: the command line, with shorter delays.
PROGRAM = """
import sys
from rmaker_ota.rainmaker import workflow
workflow.FETCH_DELAY_S = 0.1
workflow.REBOOT_DELAY_S = 0.1
from rmaker_ota.cli import main
main(sys.argv[1:])
"""


class Cloud:
    """What the cloud hears of the nodes, and says to one. ``plain``: without Basic Ingest."""

    def __init__(self, broker: Mosquitto, node_id: str = NODE_ID, *, plain: bool = False) -> None:
        identity = broker.identity("cloud")
        self.node_id = node_id
        self.heard: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.all: list[tuple[str, dict[str, Any]]] = []
        self._connected = threading.Event()
        self._acknowledged: queue.Queue[int] = queue.Queue()
        self._transport = PahoTransport(
            Connection(
                broker.host,
                broker.port,
                f"cloud-of-{node_id}",
                TlsFiles(identity.cert_file, identity.key_file, broker.ca_file),
                reconnect_min_s=0.02,
                reconnect_max_s=0.05,
            )
        )
        for rule, suffix in RULES:
            prefix = "" if plain else f"$aws/rules/{rule}/"
            self._transport.subscribe(f"{prefix}node/{node_id}/{suffix}")

    def __enter__(self) -> Self:
        self._transport.start(self)
        if not self._connected.wait(WAIT_S):
            raise TimeoutError("the cloud does not reach the broker")
        # Acknowledged behind the subscriptions: from now on nothing is missed.
        marker = self._transport.publish("marker", b"")
        while self._acknowledged.get(timeout=WAIT_S) != marker:
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.stop(0.1)

    def subscribe(self, topic: str) -> None:
        """Hears of another topic too, from when it returns on."""
        self._transport.subscribe(topic)
        self.wait_connected_again()

    def wait_connected_again(self) -> None:
        """After the broker came back: waits until nothing is missed any more."""
        marker = self._transport.publish("marker", b"")
        while self._acknowledged.get(timeout=WAIT_S) != marker:
            pass

    # -- listener

    def connected(self, session_present: bool) -> None:
        self._connected.set()

    def disconnected(self, reason: str) -> None:
        pass

    def message(self, topic: str, payload: bytes) -> None:
        item = (topic.rpartition("/")[2], json.loads(payload))
        self.all.append(item)
        self.heard.put(item)

    def published(self, message_id: int) -> None:
        self._acknowledged.put(message_id)

    # -- what a test waits for

    def wait(self, kind: str, **fields: object) -> dict[str, Any]:
        """The next message of a kind with these fields; others are passed over.

        Raises:
            TimeoutError: it does not come; the message lists what came.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                found, message = self.heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {kind} {fields}; heard was:\n" + "\n".join(map(str, self.all))) from None
            if found == kind and fields.items() <= message.items():
                return message

    def wait_config(self, version: str | None = None) -> dict[str, Any]:
        while True:
            message = self.wait("config")
            if version is None or message["info"]["fw_version"] == version:
                return message

    def wait_status(self, status: str, info: str | None = None) -> dict[str, Any]:
        return self.wait("otastatus", status=status, **({} if info is None else {"additional_info": info}))

    def statuses(self) -> list[tuple[str, str]]:
        return [(message["status"], message["additional_info"]) for kind, message in self.all if kind == "otastatus"]

    # -- what it says

    def send(self, payload: bytes, suffix: str = "otaurl") -> None:
        """A message to the node; returns when the broker has it."""
        sent = self._transport.publish(f"node/{self.node_id}/{suffix}", payload)
        while self._acknowledged.get(timeout=WAIT_S) != sent:
            pass

    def send_job(self, url: str, image: bytes, job_id: str = "J1", **more: object) -> None:
        job = {
            "ota_job_id": job_id,
            "url": url,
            "file_size": len(image),
            "file_md5": hashlib.md5(image).hexdigest(),
            **more,
        }
        self.send(json.dumps(job).encode())


class Agent:
    """One node process. Everything of it lies in a folder of its own.

    Args:
        directory: made when missing.
        broker: where it connects to.
        server_ca: PEM of the authority to trust for downloads.
        ota: lines for ``[ota]``.
        version: of the image it starts with.
    """

    def __init__(
        self,
        directory: Path,
        broker: Mosquitto,
        *,
        node_id: str = NODE_ID,
        server_ca: bytes | None = None,
        ota: Mapping[str, object] | None = None,
        version: str = "1.0.0",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.flash = directory / "flash.bin"
        self.state = directory / "node.state"
        self.config = directory / "node.toml"
        self.process: subprocess.Popen[str] | None = None
        self._log: list[str] = []
        self._log_grew = threading.Condition()
        self._reader: threading.Thread | None = None
        identity = broker.identity(node_id)
        create_flash_image(self.flash, build_image(version=version, project_name="gw"))
        options = dict(ota or {})
        if server_ca is not None:
            (directory / "server-ca.pem").write_bytes(server_ca)
            options["server_cert"] = "server-ca.pem"
        self.config.write_text(
            f"""
            [node]
            id = "{node_id}"
            [mqtt]
            host = "{broker.host}"
            port = {broker.port}
            ca = "{broker.ca_file}"
            cert = "{identity.cert_file}"
            key = "{identity.key_file}"
            reconnect_min_s = 0.05
            reconnect_max_s = 0.2
            [target]
            uri = "esp32-image:flash.bin"
            [state]
            path = "node.state"
            [ota]
            """
            + "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
        )

    def start(self, *, environment: Mapping[str, str] | None = None, program: str = PROGRAM) -> None:
        assert self.process is None
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "agent", "--config", str(self.config), "--log-level", "debug"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}", **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read_log, args=(self.process,), daemon=True)
        self._reader.start()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end of the process; returns its exit code."""
        assert self.process is not None
        assert self._reader is not None
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None
        return code

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The process stands still, so that others come first."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    @property
    def log(self) -> str:
        with self._log_grew:
            return "".join(self._log)

    def wait_log(self, text: str, *, count: int = 1) -> None:
        """Waits until a text stands in the log so many times.

        Raises:
            TimeoutError: it does not come; the message is the log.
        """
        self.wait_until(lambda log: log.count(text) >= count)

    def wait_until(self, is_so: Callable[[str], bool]) -> None:
        """Waits until something is so in the log."""
        with self._log_grew:
            if not self._log_grew.wait_for(lambda: is_so("".join(self._log)), WAIT_S):
                raise TimeoutError("not logged; log:\n" + "".join(self._log))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.kill()
        if exc is not None:
            sys.stderr.write(f"---- log of the agent in {self.directory}\n{self.log}")

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._log_grew:
                self._log.append(line)
                self._log_grew.notify_all()
