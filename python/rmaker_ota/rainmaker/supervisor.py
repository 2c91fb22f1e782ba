"""Nodes that restart while the process goes on: the sub-devices of a gateway.

A `Node` lives for one boot. A `Supervisor` runs one after the other in a thread of its own: when a node restarts, its
target is restarted with the next one. What ends a node, as a chip that is unplugged, is logged and tried again after a
while; it never concerns other nodes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from rmaker_ota.config import NodeConfig
from rmaker_ota.errors import OtaError
from rmaker_ota.rainmaker.node import Node, Outcome, ota_types_of
from rmaker_ota.rainmaker.ota import Ota

log = logging.getLogger(__name__)

RETRY_S = 5.0  # after a node that could not begin or did not end well; doubled up to RETRY_MAX_S
RETRY_MAX_S = 300.0


def enable_configured(node: Node) -> None:
    """Switches on what the configuration of a node asks for."""
    for ota_type in ota_types_of(node.config):
        Ota(node, type=ota_type)


class Supervisor:
    """Runs the node of one configuration, boot after boot.

    Args:
        config: of the node. Its ``[restart]`` is not looked at.
        prepare: called with each new node before it starts, to enable OTA and to add devices.
        make_node: makes one; for tests and other surroundings.
        wait: waits so many seconds or until the event is set, and says whether it is; for tests.
    """

    def __init__(
        self,
        config: NodeConfig,
        prepare: Callable[[Node], None] = enable_configured,
        *,
        make_node: Callable[[NodeConfig], Node] | None = None,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self.config = config
        self._prepare = prepare
        self._make_node = make_node or _make_node
        self._wait = wait
        self._lock = threading.Lock()
        self._node: Node | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"rmaker-{config.node.id}", daemon=True)
        self.boots = 0
        """Nodes that were started so far."""

    @property
    def node(self) -> Node | None:
        """The node of now; None between two boots."""
        return self._node

    def start(self) -> None:
        """Begins; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the node in order, and waits for that. Harmless when it was never started."""
        with self._lock:
            self._over.set()
            node = self._node
        if node is not None:
            node.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def responds(self, timeout_s: float) -> bool:
        """Whether the node's thread comes to new work within so many seconds, or there is no node now."""
        node = self._node
        return node is None or node.responds(timeout_s)

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        delay = RETRY_S
        while not self._over.is_set():
            try:
                outcome = self._boot()
            except OtaError as error:
                log.error("node %s: %s; again in %g s", self.config.node.id, error, delay)
            except Exception:
                log.exception("node %s failed; again in %g s", self.config.node.id, delay)
            else:
                delay = RETRY_S
                if outcome is Outcome.RESTART:
                    continue
                if not self._over.is_set():
                    log.info("node %s: %s", self.config.node.id, outcome.value)
                return
            if self._wait(self._over, delay):
                return
            delay = min(2 * delay, RETRY_MAX_S)

    def _boot(self) -> Outcome:
        """One node from its power-on to its end."""
        node = self._make_node(self.config)
        with node:
            with self._lock:
                if self._over.is_set():
                    return Outcome.STOPPED
                self._node = node
            try:
                boot = node.boot
                log.info(
                    "node %s runs %s %s from %s",
                    node.node_id,
                    boot.project_name,
                    boot.version,
                    boot.running_slot or "there",
                )
                self._prepare(node)
                self.boots += 1
                return node.run()
            finally:
                with self._lock:
                    self._node = None


def _make_node(config: NodeConfig) -> Node:
    return Node(config, restarter=lambda reason: None)  # the next boot restarts the target
