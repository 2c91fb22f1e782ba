"""An image over MQTT on a long line: what it costs to wait for each batch, and what a window of requests saves.

A whole node (rules, transfer, engine, flash image) and a stream service at a real Mosquitto with mutual TLS; between
node and broker lie 50 ms each way. Timed is one job, from its message to the image that boots next; connecting is not.
The broker may have any number of messages on their way (Mosquitto's usual 20 would be the window then).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benches.measure import Measure
from tests.sim.agent import WAIT_S, Cloud
from tests.sim.delay_proxy import DelayProxy
from tests.sim.mosquitto import Mosquitto, find_mosquitto
from tests.sim.stream_service import STREAM_ID, StreamService

import rmaker_ota
from rmaker_ota.esp_build import build_image
from rmaker_ota.rainmaker import workflow
from rmaker_ota.rainmaker.events import Event
from rmaker_ota.targets.create import create_flash_image

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

ONE_WAY_S = 0.05
ROUNDS = 3


class Bench:
    """Broker, stream service and a node behind the long line; a new node for each round."""

    def __init__(self, directory: Path, size: int) -> None:
        self.image = build_image(version="2.0.0", project_name="gw", size=size)
        self._directory = directory
        self._flash = directory / "flash.bin"
        self._stack = contextlib.ExitStack()
        self._node: Any = None
        (directory / "broker").mkdir()
        self._broker = self._stack.enter_context(Mosquitto(directory / "broker", options=("max_inflight_messages 0",)))
        self._cloud = self._stack.enter_context(Cloud(self._broker))
        self._proxy = self._stack.enter_context(DelayProxy((self._broker.host, self._broker.port), ONE_WAY_S))
        self._service = self._stack.enter_context(StreamService(self._broker, self.image))

    def node(self, window: int) -> None:
        """Power-on with the old image, connected and asked for jobs."""
        self._stop()
        create_flash_image(self._flash, build_image(version="1.0.0", project_name="gw"), overwrite=True)
        (self._directory / "state").unlink(missing_ok=True)
        identity = self._broker.identity("N1")
        self._service.requests.clear()
        self._done = threading.Event()
        self._node = rmaker_ota.Node(
            node_id="N1",
            mqtt={
                "host": self._broker.host,
                "port": self._proxy.port,
                "ca": str(self._broker.ca_file),
                "cert": str(identity.cert_file),
                "key": str(identity.key_file),
            },
            target=f"esp32-image:{self._flash}",
            state=self._directory / "state",
            ota={"ota_transport": "mqtt", "mqtt_ota_window": window, "ota_disable_auto_reboot": True},
            restart={"mode": "none"},
        )
        rmaker_ota.Ota(self._node)
        self._node.events.subscribe(self._heard)
        self._node.start()
        self._cloud.wait("otafetch")  # sent behind its subscription

    def _heard(self, event: Event) -> None:
        if event.name == "RMAKER_OTA_EVENT_REQ_FOR_REBOOT":
            self._done.set()

    def job(self) -> bytes:
        """One job; the image as it lies in the slot."""
        self._cloud.send_job("https://nobody.invalid/", self.image, stream_id=STREAM_ID)
        assert self._done.wait(WAIT_S)
        with rmaker_ota.open_target(f"esp32-image:{self._flash}", read_only=True) as target:
            offset = target.next_slot().offset
        with self._flash.open("rb") as file:
            file.seek(offset)
            return file.read(len(self.image))

    @property
    def requests(self) -> int:
        return len(self._service.requests)

    def _stop(self) -> None:
        if self._node is not None:
            self._node.stop()

    def close(self) -> None:
        self._stop()
        self._stack.close()


@pytest.fixture
def bench(tmp_path: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(workflow, "FETCH_DELAY_S", 0.1)
    bench = Bench(tmp_path, (128 << 10) if quick else (1 << 20))
    yield bench
    bench.close()


@pytest.mark.parametrize("window", [1, 4])
def test_window(measure: Measure, benchmark: Any, bench: Bench, window: int) -> None:
    benchmark.group = "an image over MQTT at 100 ms round trip"

    def setup() -> tuple[()]:
        bench.node(window)
        return ()

    measure(
        "plain: each batch is waited for (window 1)" if window == 1 else f"ours, window {window}",
        bench.job,
        check=lambda found: found == bench.image,
        setup=setup,
        rounds=ROUNDS,
        work=len(bench.image) / 2**20,
        unit="MiB",
        counts=lambda _: {"requests": bench.requests},
    )
