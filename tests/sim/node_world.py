"""A world for a node: a chip with two slots and a boot loader in memory, downloads from a script, a broker that is the
test, time that the test moves.

    world = World()
    world.boot()                                  # power-on: makes and starts a node
    world.connect()
    world.deliver_job()
    world.advance(10)                             # everything due is done when it returns
    assert world.statuses() == [...]
    world.boot()                                  # after a restart: state, slots and time go on
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmaker_ota.config import MqttSection, NodeConfig, NodeSection, OtaSection, RestartSection, TargetSection
from rmaker_ota.errors import CancelledError, NotFoundError, PendingVerifyError, RollbackError, StateError
from rmaker_ota.install import ImageHeader, InstallResult, Phase, Progress, ResumePoint
from rmaker_ota.rainmaker.application import OtaConfig
from rmaker_ota.rainmaker.attempt import Callbacks
from rmaker_ota.rainmaker.events import Event
from rmaker_ota.rainmaker.loop import VirtualClock
from rmaker_ota.rainmaker.node import Node
from rmaker_ota.rainmaker.store import MemoryStore
from rmaker_ota.rainmaker.transport import MemoryTransport, PublishBudget, Sent
from rmaker_ota.rainmaker.types import OtaType
from rmaker_ota.rainmaker.workflow import StartAttempt
from rmaker_ota.targets.base import AppDescription, BootReport, BootState, Slot, Target

if TYPE_CHECKING:
    from rmaker_ota.ota_core import Sink

WAIT_S = 20.0
URL = "https://fw.example.com/image.bin"
OTAURL = "node/N1/otaurl"
OTASTATUS = "$aws/rules/esp_node_otastatus/node/N1/otastatus"
OTAFETCH = "$aws/rules/esp_node_otafetch/node/N1/otafetch"
CONFIG = "$aws/rules/esp_node_config/node/N1/config"


class FakeChip(Target):
    """Two slots and a boot loader with rollback, in memory. Counts its restarts."""

    uri = "fake:chip"
    boots_with_process = True

    def __init__(self, version: str = "1.0.0", *, second: bool = True) -> None:
        self.slots = [Slot("ota_0", 0, 1 << 20), Slot("ota_1", 1 << 20, 1 << 20)][: 2 if second else 1]
        self.apps: dict[str, AppDescription] = {"ota_0": AppDescription(version, "gw")}
        self.states: dict[str, BootState] = {"ota_0": BootState.VALID}
        self.order = ["ota_0"]  # what the boot entries name, the newest first
        self.running: str | None = None
        self.restarts = 0
        self.mark_valid_error: Exception | None = None
        self.closed = 0

    def running_slot(self) -> Slot | None:
        return next((slot for slot in self.slots if slot.name == self.running), None)

    def next_slot(self) -> Slot:
        for slot in self.slots:
            if slot.name != self.running:
                return slot
        raise NotFoundError("there is no second slot")

    def describe(self, slot: Slot) -> AppDescription | None:
        return self.apps.get(slot.name)

    def boot_state(self, slot: Slot) -> BootState:
        return self.states[slot.name]

    @property
    def secure_version(self) -> int:
        return 0

    def open_sink(self, slot: Slot, *, activate: bool = True) -> Sink:
        raise NotImplementedError

    def install(self, app: AppDescription) -> None:
        """What the engine does: the image, then the boot choice."""
        assert self.running is not None
        if self.states[self.running] == BootState.PENDING_VERIFY:
            raise PendingVerifyError("the running image is not confirmed", stage="sink")
        slot = self.next_slot()
        self.apps[slot.name] = app
        self.set_boot(slot)

    def set_boot(self, slot: Slot) -> None:
        self.states[slot.name] = BootState.NEW
        self.order = [slot.name, *(name for name in self.order if name != slot.name)]

    def mark_valid(self) -> None:
        assert self.running is not None
        if self.mark_valid_error is not None:
            raise self.mark_valid_error
        if self.states[self.running] != BootState.PENDING_VERIFY:
            raise StateError("nothing to confirm")
        self.states[self.running] = BootState.VALID

    def mark_invalid(self) -> None:
        assert self.running is not None
        if not self.can_rollback():
            raise RollbackError("there is no other image")
        self.states[self.running] = BootState.INVALID

    def can_rollback(self) -> bool:
        good = (BootState.VALID, BootState.UNDEFINED)
        return any(name != self.running and self.states[name] in good for name in self.order)

    def restart(self) -> BootReport:
        self.restarts += 1
        for name in self.order:
            if self.states[name] == BootState.PENDING_VERIFY:
                self.states[name] = BootState.ABORTED
        bootable = (BootState.NEW, BootState.VALID, BootState.UNDEFINED)
        chosen = next((name for name in self.order if self.states[name] in bootable), None)
        self.running = chosen
        if chosen is not None and self.states[chosen] == BootState.NEW:
            self.states[chosen] = BootState.PENDING_VERIFY
        return BootReport(self.running_slot(), (f"{chosen} boots",), ())

    def close(self) -> None:
        self.closed += 1


Script = Callable[["FakeInstallation"], None]


class FakeInstallation:
    """An installation that does what a script says, by calling `header`, `receive`, `keep` and `finish`."""

    def __init__(self, world: World, action: StartAttempt, callbacks: Callbacks) -> None:
        self.world = world
        self.action = action
        self.resume = action.resume
        self.callbacks = callbacks
        self.cancelled = threading.Event()
        self.wrote = False
        self._app: AppDescription | None = None

    def run(self) -> InstallResult:
        self.world.scripts.pop(0)(self)
        app = self._app
        assert app is not None, "a script ends with finish or an exception"
        return InstallResult(
            slot=self.world.chip.next_slot().name,
            project=app.project_name,
            version=app.version,
            bytes_read=65536,
            bytes_written=65536,
            bytes_skipped=0,
            image_size=65536,
            sha256=None,
            md5=None,
            seconds=0.0,
            activated=True,
            resumed_from=0,
            counts={},
        )

    def cancel(self) -> None:
        self.cancelled.set()

    def progress(self) -> Progress:
        return Progress(Phase.RECEIVING, 1000, 1000, 0, 65536)

    # -- for scripts

    def header(self, version: str = "2.0.0", project: str = "gw", offset: int = 0) -> None:
        """The gate: returns when the image is accepted."""
        self._app = AppDescription(version, project)
        self.callbacks.on_phase(Phase.HEADER)
        self.callbacks.header_gate(ImageHeader(self._app, b"", 65536, offset, '"v1"'))
        self.wrote = True
        self.callbacks.on_phase(Phase.RECEIVING)

    def progress_to(self, count: int) -> None:
        self.callbacks.on_progress(Progress(Phase.RECEIVING, count, count, 0, 65536))

    def keep(self, offset: int) -> None:
        """A position that is durable."""
        if self.callbacks.on_checkpoint is not None:
            self.callbacks.on_checkpoint(ResumePoint(offset, bytes([offset % 251]) * 32, '"v1"'))

    def finish(self) -> None:
        for phase in (Phase.RECEIVED, Phase.VERIFYING, Phase.COMMITTING):
            self.callbacks.on_phase(phase)
        assert self._app is not None
        self.world.chip.install(self._app)

    def wait_for_cancel(self) -> None:
        if not self.cancelled.wait(WAIT_S):
            raise TimeoutError("not cancelled")
        raise CancelledError("cancelled")


def good(version: str = "2.0.0", project: str = "gw") -> Script:
    """A download without any trouble."""

    def script(run: FakeInstallation) -> None:
        run.header(version, project)
        run.finish()

    return script


def fails(error: Exception, *, after_header: bool = False) -> Script:
    def script(run: FakeInstallation) -> None:
        if after_header:
            run.header()
        raise error

    return script


class World:
    """Everything around a node that outlives it, and the node of this boot.

    Args:
        ota: options that differ from the defaults.
    """

    def __init__(self, *, chip: FakeChip | None = None, ota: Mapping[str, Any] | None = None) -> None:
        self.chip = chip or FakeChip()
        self.store = MemoryStore()
        self.clock = VirtualClock()
        self.scripts: list[Script] = []
        self.installations: list[FakeInstallation] = []
        self.restart_reasons: list[str] = []
        self.ota = dict(ota or {})
        self.groups = False
        self.acknowledge = True
        self.budget: PublishBudget | None = None
        self.node: Node | None = None

    def config(self) -> NodeConfig:
        return NodeConfig(
            node=NodeSection(id="N1", name="gw", model="gw", groups=self.groups),
            mqtt=MqttSection(host="broker.invalid", cert=Path("node.crt"), key=Path("node.key")),
            ota=OtaSection(**self.ota),
            target=TargetSection("fake:chip"),
            restart=RestartSection(),
        )

    def power_on(self) -> Node:
        """A node that is not enabled and not started."""
        if self.node is not None:
            self.node.stop()
        self.transport = MemoryTransport(acknowledge=self.acknowledge, budget=self.budget, clock=self.clock.monotonic)
        self.events: list[Event] = []
        self.node = Node(
            self.config(),
            target=self.chip,
            state=self.store,
            transport=self.transport,
            clock=self.clock,
            restarter=self.restart_reasons.append,
            make_installation=self._make_installation,
        )
        self.node.events.subscribe(self.events.append)
        return self.node

    def boot(self, config: OtaConfig | None = None) -> Node:
        """A node that runs, with OTA on."""
        node = self.power_on()
        assert node.enable(config, OtaType.USING_TOPICS) == 0
        node.start()
        node.settle()
        return node

    def connect(self) -> None:
        self.transport.go_online()
        self.settle()

    def disconnect(self) -> None:
        self.transport.go_offline()
        self.settle()

    def settle(self) -> None:
        assert self.node is not None
        self.node.settle()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def deliver_job(self, job_id: str = "J1", **more: object) -> None:
        """An ``otaurl`` message, and all that comes of it at once."""
        self.deliver({"ota_job_id": job_id, "url": URL, "file_size": 65536, **more})

    def deliver(self, payload: object) -> None:
        raw = payload if isinstance(payload, (bytes, str)) else json.dumps(payload)
        assert self.transport.deliver(OTAURL, raw), "the node does not listen"
        self.settle()

    def stop(self) -> None:
        if self.node is not None:
            self.node.stop()

    # -- what came of it

    def published(self, topic: str) -> list[dict[str, Any]]:
        return [json.loads(sent.payload) for sent in self.transport.sent if sent.topic == topic]

    def statuses(self) -> list[tuple[str, str]]:
        """Status and text of each report of this boot."""
        return [(each["status"], each["additional_info"]) for each in self.published(OTASTATUS)]

    def sent(self) -> list[tuple[str, str]]:
        return [(sent.kind, sent.topic) for sent in self.transport.sent]

    def wait_sent(self, topic: str, text: str) -> Sent:
        return self.transport.wait_for(lambda sent: sent.topic == topic and text.encode() in sent.payload)

    def _make_installation(
        self,
        action: StartAttempt,
        target: Target,
        slot: Slot,
        options: OtaSection,
        callbacks: Callbacks,
    ) -> FakeInstallation:
        installation = FakeInstallation(self, action, callbacks)
        self.installations.append(installation)
        return installation
