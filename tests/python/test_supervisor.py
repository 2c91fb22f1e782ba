"""Nodes that restart while the process goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from rmaker_ota.config import NodeConfig
from rmaker_ota.errors import DeviceError
from rmaker_ota.rainmaker.node import Node
from rmaker_ota.rainmaker.supervisor import RETRY_MAX_S, RETRY_S, Supervisor, enable_configured
from tests.sim.node_world import WAIT_S, World, good


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


class Boots:
    """Makes the nodes of a world, and tells when each is ready."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.failures: queue.Queue[Exception] = queue.Queue()
        self.ready: queue.Queue[Node] = queue.Queue()
        self.waits: list[float] = []

    def make_node(self, config: NodeConfig) -> Node:
        try:
            raise self.failures.get_nowait()
        except queue.Empty:
            pass
        self.world.node = None  # the supervisor ends its nodes itself
        return self.world.power_on()

    def prepare(self, node: Node) -> None:
        enable_configured(node)
        node.start()
        self.ready.put(node)

    def wait(self, over: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        return over.is_set()

    def supervisor(self) -> Supervisor:
        return Supervisor(self.world.config(), self.prepare, make_node=self.make_node, wait=self.wait)


def test_a_node_that_restarts_is_followed_by_the_next_boot(world: World) -> None:
    boots = Boots(world)
    world.scripts.append(good("2.0.0"))
    with boots.supervisor() as supervisor:
        first = boots.ready.get(timeout=WAIT_S)
        world.connect()
        world.deliver_job()
        world.advance(10.0)
        second = boots.ready.get(timeout=WAIT_S)
        assert second is not first
        assert supervisor.node is second
        assert second.boot.version == "2.0.0"
        assert supervisor.boots == 2
        assert supervisor.responds(WAIT_S)
    assert supervisor.node is None
    assert len(world.restart_reasons) == 1
    assert boots.waits == []


def test_what_cannot_begin_is_tried_again_ever_later(world: World, caplog: pytest.LogCaptureFixture) -> None:
    boots = Boots(world)
    for _ in range(8):
        boots.failures.put(DeviceError("the port is not there", stage="target"))
    boots.failures.put(RuntimeError("a mistake"))
    with boots.supervisor():
        boots.ready.get(timeout=WAIT_S)
    assert boots.waits[:3] == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S]
    assert boots.waits[-1] == RETRY_MAX_S
    assert len(boots.waits) == 9
    assert caplog.text.count("node N1: the port is not there") == 8
    assert "a mistake" in caplog.text


def test_a_stop_ends_the_wait_for_a_device(world: World) -> None:
    waiting = threading.Event()

    def wait(over: threading.Event, seconds: float) -> bool:
        waiting.set()
        return over.wait(WAIT_S)

    def nothing(config: NodeConfig) -> Node:
        raise DeviceError("the port is not there", stage="target")

    supervisor = Supervisor(world.config(), make_node=nothing, wait=wait)
    supervisor.start()
    assert waiting.wait(WAIT_S)
    assert supervisor.responds(0.0)
    supervisor.stop()
    assert supervisor.boots == 0


def test_one_that_was_never_started_stops_at_once(world: World) -> None:
    supervisor = Supervisor(world.config())
    supervisor.stop()
    assert supervisor.node is None
