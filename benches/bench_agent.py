"""An idle agent: what a node that waits for messages costs, as its own process on a real broker with mutual TLS.

Between messages nothing polls: what is left is the MQTT keep-alive. CPU time and context switches of all threads come
from ``/proc``; a thread that gave the processor up of itself was woken before. The plain way is paho-mqtt's own loop,
``loop_forever``, which looks at its timers once a second.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from benches.measure import Measure
from tests.sim.agent import Agent, Cloud
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

PLAIN = """
import sys
import paho.mqtt.client as mqtt
host, port, ca, cert, key = sys.argv[1:]
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="plain")
client.tls_set(ca, cert, key)
client.on_connect = lambda client, *_: client.subscribe("node/plain/otaurl", 1)
client.on_subscribe = lambda *_: print("ready", flush=True)
client.connect(host, int(port), keepalive=120)
client.loop_forever()
"""


def used(pid: int) -> dict[str, int]:
    """What all threads of a process have used so far."""
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    found = {"threads": len(threads), "cpu_ns": 0, "wakeups": 0}
    for thread in threads:
        found["cpu_ns"] += int((thread / "schedstat").read_text().split()[0])
        for line in (thread / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                found["wakeups"] += int(line.split()[1])
    return found


@contextmanager
def agent(folder: Path, broker: Mosquitto) -> Iterator[int]:
    """A node that has connected, reported itself and asked for a job."""
    with Cloud(broker) as cloud, Agent(folder / "node", broker) as node:
        node.start()
        cloud.wait("otafetch")
        assert node.process is not None
        yield node.process.pid
        assert node.stop() == 0


@contextmanager
def plain_client(folder: Path, broker: Mosquitto) -> Iterator[int]:
    """A client of paho-mqtt that has subscribed."""
    identity = broker.identity("plain")
    given = [broker.host, str(broker.port), str(broker.ca_file), str(identity.cert_file), str(identity.key_file)]
    with subprocess.Popen([sys.executable, "-c", PLAIN, *given], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            process.kill()


WAYS: dict[str, Callable[[Path, Mosquitto], AbstractContextManager[int]]] = {
    "ours": agent,
    "plain paho loop": plain_client,
}


def settled(pid: int, still_s: float) -> None:
    """Waits until what the start set going is over: no wake-up for a while, at most ten times that long."""
    before = used(pid)
    for _ in range(10):
        time.sleep(still_s)
        now = used(pid)
        if now == before:
            return
        before = now


@pytest.mark.benchmark(group="idle, connected")
@pytest.mark.parametrize("way", WAYS)
def test_idle(measure: Measure, tmp_path: Path, quick: bool, way: str) -> None:
    idle_s = 0.5 if quick else 5.0
    (tmp_path / "broker").mkdir()
    with Mosquitto(tmp_path / "broker") as broker, WAYS[way](tmp_path, broker) as pid:
        settled(pid, 0.1 if quick else 0.5)

        def idle() -> dict[str, int]:
            before = used(pid)
            time.sleep(idle_s)
            now = used(pid)
            return {
                "threads": now["threads"],
                "wakeups": now["wakeups"] - before["wakeups"],
                "cpu_ns": now["cpu_ns"] - before["cpu_ns"],
            }

        measure(
            way,
            idle,
            check=lambda found: found["threads"] >= 1,
            rounds=1,
            counts=lambda found: {"idle_s": idle_s, **found},
            cpu_s=lambda found: found["cpu_ns"] / 1e9,
        )
