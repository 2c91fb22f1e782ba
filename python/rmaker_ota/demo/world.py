"""The demo's parts, started and always ended again, and its three scenarios.

Everything that happens (a line of the broker's log, a report in the job service, an answer of the image server, a line
of the node) is put into one queue; `Demo.run` takes it from there on the calling thread. Nothing waits by sleeping.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rmaker_ota.cloud import setup
from rmaker_ota.cloud.broker import (
    SERVICE_NAME,
    Broker,
    bound_to_this_process,
    end_process,
    find_mosquitto,
    write_mosquitto,
)
from rmaker_ota.cloud.ca import CertificateAuthority
from rmaker_ota.cloud.config import AdminConfig, CloudConfig, HttpConfig, MqttConfig, ServiceConfig
from rmaker_ota.cloud.service import CloudService, ServiceThread, require_aiohttp
from rmaker_ota.cloud.store import HistoryEntry, NodeState
from rmaker_ota.demo.node import BROKEN
from rmaker_ota.demo.proxy import Proxy
from rmaker_ota.errors import NotFoundError, OtaError, StateError
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets.base import BootState

NODE_ID = "demo-lamp"
PROJECT = "demo_lamp"
IMAGE_SIZE = 1 << 20  # bytes of each firmware image
FLASH_SIZE = 4 << 20
CHIP = "esp32c3"
CHIP_ID = 5
SCENARIO_S = 45.0  # an update takes about 12 s, 10 of them the fixed delay before the restart
READY_S = 20.0
PORT_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Scenario:
    """One update and how it should end.

    Attributes:
        name: for machines.
        title: for people.
        version: of the firmware that is offered.
        ends: state of the job at the end.
        runs: version that runs at the end.
        cut: the first connection is cut in the middle of the image.
    """

    name: str
    title: str
    version: str
    ends: NodeState
    runs: str
    cut: bool = False


FIRST_VERSION = "1.0.0"
SCENARIOS = (
    Scenario("update", "an update", "2.0.0", NodeState.SUCCESS, "2.0.0"),
    Scenario("rollback", "an update that fails its diagnostics", "2.1.0" + BROKEN, NodeState.REJECTED, "2.0.0"),
    Scenario("resume", "an update whose download is cut in the middle", "3.0.0", NodeState.SUCCESS, "3.0.0", cut=True),
)


@dataclass(slots=True)
class Outcome:
    """What a scenario came to. Times are seconds, sizes bytes.

    Attributes:
        ok: it ended as it should.
        problems: why not, in words.
        bytes: of the image, as they were downloaded over all connections.
        resumed_at: position at which the second connection went on; None: there was none.
        download_seconds: from the first request to the last byte.
        messages: MQTT messages between node and job service.
        reports: status and text of every report.
    """

    scenario: Scenario
    ok: bool = False
    problems: list[str] = field(default_factory=list)
    job: str = ""
    state: str = ""
    running_version: str | None = None
    slot: str | None = None
    bytes: int = 0
    resumed_at: int | None = None
    seconds: float = 0.0
    download_seconds: float = 0.0
    messages: int = 0
    reports: list[tuple[str, str]] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.download_seconds if self.download_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.scenario.name,
            "ok": self.ok,
            "problems": self.problems,
            "job": self.job,
            "offered_version": self.scenario.version,
            "expected_state": self.scenario.ends.value,
            "state": self.state,
            "expected_version": self.scenario.runs,
            "running_version": self.running_version,
            "slot": self.slot,
            "bytes": self.bytes,
            "resumed_at": self.resumed_at,
            "seconds": round(self.seconds, 3),
            "download_seconds": round(self.download_seconds, 3),
            "mb_per_s": round(self.bytes_per_second / 1e6, 3),
            "messages": self.messages,
            "reports": [{"status": status, "info": info} for status, info in self.reports],
        }


class Show(Protocol):
    """Whoever tells people what happens. All calls come from the thread that runs the demo."""

    def fact(self, name: str, text: str) -> None: ...
    def scenario(self, scenario: Scenario) -> None: ...
    def happened(self, seconds: float, who: str, what: str, text: str) -> None: ...
    def downloading(self, done: int, total: int) -> None: ...
    def restarting(self) -> None: ...
    def still(self) -> None:
        """Nothing happened for a moment."""

    def ended(self, outcome: Outcome) -> None: ...


# -- what happens, as it lies in the queue


@dataclass(frozen=True, slots=True)
class _Report:
    entry: HistoryEntry
    at: float


@dataclass(frozen=True, slots=True)
class _Request:
    """An answer of the image server began."""

    status: int
    start: int
    at: float


@dataclass(frozen=True, slots=True)
class _NodeSaid:
    line: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _NodeEnded:
    status: int


@dataclass(frozen=True, slots=True)
class _Subscription:
    """The node is (or no longer) subscribed to its jobs."""

    there: bool


class Demo:
    """All of it, in a directory.

    Args:
        directory: an empty one; what is left in it may be looked at afterwards.
        show: tells people.
        max_bytes_per_s: slows downloads down so that they can be watched; 0: as fast as they go.
    """

    def __init__(self, directory: Path, show: Show, *, max_bytes_per_s: int = 0) -> None:
        self._directory = directory
        self._show = show
        self._max_bytes_per_s = max_bytes_per_s
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._subscribed = False
        self._service: CloudService
        self._proxy: Proxy
        self._flash = directory / "flash.bin"
        self._log = directory / "node.log"

    def run(self, scenarios: tuple[Scenario, ...] = SCENARIOS) -> list[Outcome]:
        """Starts everything, runs the scenarios, ends everything. A scenario that fails is the last one.

        Raises:
            OtaError: a part could not be started.
        """
        require_aiohttp()
        find_mosquitto()
        outcomes = []
        with self._parts():
            for scenario in scenarios:
                self._show.scenario(scenario)
                outcomes.append(self._run(scenario))
                self._show.ended(outcomes[-1])
                if not outcomes[-1].ok:
                    break
        return outcomes

    def node_log(self, lines: int = 10) -> list[str]:
        """The last lines the node logged."""
        try:
            return self._log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    # -- parts

    @contextlib.contextmanager
    def _parts(self) -> Iterator[None]:
        directory, show = self._directory, self._show
        authority = CertificateAuthority.create(directory)
        server = (directory / "server.crt", directory / "server.key")
        client = (directory / "service.crt", directory / "service.key")
        authority.issue_server(setup.LOOPBACK, *server)
        authority.issue_client(SERVICE_NAME, *client)
        credentials = authority.issue_node(NODE_ID, directory / "node", mqtt_host="localhost")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_logging_to(directory / "service.log"))
            mqtt_port = self._start_broker(stack, authority.path, *server)
            show.fact("broker", f"Mosquitto with mutual TLS on port {mqtt_port}")
            self._proxy = stack.enter_context(Proxy())
            config = CloudConfig(
                ServiceConfig(directory / "data"),
                HttpConfig(port=0, url=f"https://localhost:{self._proxy.port}", cert=server[0], key=server[1]),
                MqttConfig(host="localhost", port=mqtt_port, ca=authority.path, cert=client[0], key=client[1]),
                AdminConfig(directory / "admin.sock"),
            )
            self._service = stack.enter_context(
                ServiceThread(config, wait_ready_s=READY_S, on_change=self._changed, on_transfer=self._transfer)
            )
            self._proxy.forward_to(*self._service.address)
            show.fact("job service", f"{self._service.url}, connected to the broker")
            self._make_node(credentials.directory, mqtt_port, authority.path)
            process = self._start_node(stack, credentials.directory / "node.toml")
            show.fact("node", f"virtual ESP32-C3, 4 MiB of flash, {PROJECT} {FIRST_VERSION}, process {process.pid}")
            if self._max_bytes_per_s:
                text = f"slowed down to {self._max_bytes_per_s / 1e6:.1f} MB/s to be seen; --full-speed does not"
                show.fact("downloads", text)
            yield

    def _start_broker(self, stack: contextlib.ExitStack, ca: Path, cert: Path, key: Path) -> int:
        directory = self._directory / "broker"
        directory.mkdir()
        for attempt in range(PORT_ATTEMPTS):
            port = _free_port()  # somebody else may take it before the broker does
            config = write_mosquitto(
                directory,
                host="127.0.0.1",
                port=port,
                ca=ca,
                cert=cert,
                key=key,
                persistence=False,
                log_types=("subscribe",),
            )
            broker = Broker(config, on_line=self._broker_line)
            try:
                stack.enter_context(broker)
                return port
            except StateError:
                if attempt + 1 == PORT_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _make_node(self, directory: Path, mqtt_port: int, ca: Path) -> None:
        from rmaker_ota.targets.create import create_flash_image

        create_flash_image(self._flash, _firmware(FIRST_VERSION), chip=CHIP, flash_size=FLASH_SIZE)
        (directory / "node.toml").write_text(
            f"""\
[node]
name = "Demo lamp"
type = "Lightbulb"
platform = "{CHIP}"
[mqtt]
credentials = "."
port = {mqtt_port}
ca = {_toml(ca)}
[ota]
type = "topics"
server_cert = {_toml(ca)}
ota_checkpoint_kib = 64
http_max_bytes_per_s = {self._max_bytes_per_s}
[target]
uri = {_toml(f"esp32-image:{self._flash}")}
[state]
path = "node.state"
[restart]
mode = "process"
"""
        )

    def _start_node(self, stack: contextlib.ExitStack, config: Path) -> subprocess.Popen[str]:
        log = stack.enter_context(self._log.open("w"))
        process = subprocess.Popen(
            [*bound_to_this_process(), sys.executable, "-m", "rmaker_ota.demo.node", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read_node, args=(process,), name="node", daemon=True)
        reader.start()
        stack.callback(reader.join)
        stack.callback(end_process, process)
        return process

    # -- what happens, on whatever thread

    def _changed(self, entry: HistoryEntry) -> None:
        self._events.put(_Report(entry, time.monotonic()))

    def _transfer(self, transfer: Any) -> None:
        if not transfer.ended:
            self._events.put(_Request(transfer.status, transfer.start, time.monotonic()))

    def _broker_line(self, line: str) -> None:
        if line.endswith(f" {NODE_ID} 1 node/{NODE_ID}/otaurl"):
            self._events.put(_Subscription(True))
        elif f"Client {NODE_ID} " in line and ("disconnected" in line or "closed its connection" in line):
            self._events.put(_Subscription(False))

    def _read_node(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self._events.put(_NodeSaid(json.loads(line)))
        self._events.put(_NodeEnded(process.wait()))

    # -- a scenario

    def _run(self, scenario: Scenario) -> Outcome:
        outcome = Outcome(scenario)
        begun = time.monotonic()
        requests: list[_Request] = []
        loaded_at = begun
        try:
            self._wait_subscribed(begun)
            begun = time.monotonic()
            before = self._service.mqtt.counts()
            if scenario.cut:
                self._proxy.cut_after(IMAGE_SIZE * 6 // 10)
            outcome.job = self._push(scenario)
            for event in self._until(begun, lambda: outcome.state != "" and self._subscribed):
                match event:
                    case _Report(entry, at) if entry.job == outcome.job:
                        self._tell_report(entry, at - begun)
                        if entry.origin == "node":
                            outcome.reports.append((entry.status, entry.info))
                        if entry.info == "Firmware Image download complete":
                            loaded_at = at
                        if entry.state.finished:
                            outcome.state = entry.state.value
                            outcome.seconds = at - begun
                    case _Request(status, start, at):
                        requests.append(event)
                        text = f"sends the image from byte {start} on (206)" if status == 206 else "sends the image"
                        self._show.happened(at - begun, "server", str(status), text)
                    case _NodeSaid(line):
                        self._tell_node(line, time.monotonic() - begun)
            after = self._service.mqtt.counts()
            outcome.messages = sum(after.values()) - sum(before.values())
            if requests:
                outcome.download_seconds = max(loaded_at - requests[0].at, 0.0)
                outcome.bytes = IMAGE_SIZE
                outcome.resumed_at = requests[-1].start if len(requests) > 1 and requests[-1].status == 206 else None
            self._judge(outcome, requests)
        except OtaError as error:
            outcome.problems.append(str(error))
            outcome.seconds = outcome.seconds or time.monotonic() - begun
        return outcome

    def _wait_subscribed(self, begun: float) -> None:
        for event in self._until(begun, lambda: self._subscribed):
            if isinstance(event, _NodeSaid):
                self._tell_node(event.line, time.monotonic() - begun)

    def _until(self, begun: float, done: Callable[[], bool]) -> Iterator[object]:
        """What happens, until ``done``; StateError when that takes too long or the node ends."""
        while not done():
            left = begun + SCENARIO_S - time.monotonic()
            if left <= 0:
                raise StateError(f"nothing came of it within {SCENARIO_S:.0f} s")
            try:
                event = self._events.get(timeout=min(left, 0.1))  # people watch the time pass
            except queue.Empty:
                self._show.still()
                continue
            match event:
                case _Subscription(there):
                    self._subscribed = there
                case _NodeSaid({"event": "boot"}):
                    self._subscribed = False
                case _NodeEnded(status):
                    raise StateError(f"the node's process ended with status {status}")
            yield event

    def _push(self, scenario: Scenario) -> str:
        with self._service.images.begin(f"{PROJECT}-{scenario.version}.bin") as writer:
            writer.write(_firmware(scenario.version))
            sha256 = writer.commit().sha256
        return self._service.jobs.create(sha256, [NODE_ID]).id

    def _tell_report(self, entry: HistoryEntry, seconds: float) -> None:
        if entry.origin == "service":
            if entry.status == "sent":
                text = "job sent" if entry.state is NodeState.SENT else "the node asks for jobs: this one, which it has"
                self._show.happened(seconds, "service", "otaurl", text)
            return
        self._show.happened(seconds, "node", entry.status, entry.info)
        if entry.info.startswith("Rebooting"):
            self._show.restarting()

    def _tell_node(self, line: dict[str, Any], seconds: float) -> None:
        match line:
            case {"event": "progress", "done": int(done), "total": int(total)}:
                self._show.downloading(done, total)
            case {"event": "boot", "version": str(version), "slot": str(slot)}:
                self._show.happened(seconds, "node", "boot", f"{version} runs from {slot}")
            case {"event": "diagnostics", "state": str(state), "works": bool(works)}:
                verdict = "the firmware works" if works else "the lamp does not answer: roll back"
                self._show.happened(seconds, "node", "diagnose", f"{state}: {verdict}")

    def _judge(self, outcome: Outcome, requests: list[_Request]) -> None:
        from rmaker_ota.targets import open_target

        scenario, problems = outcome.scenario, outcome.problems
        with open_target(f"esp32-image:{self._flash}", read_only=True) as target:
            slot = target.running_slot()
            description = target.describe(slot) if slot else None
            outcome.slot = slot.name if slot else None
            outcome.running_version = description.version if description else None
            try:
                state = target.boot_state(slot) if slot else None
            except NotFoundError:
                state = None
        if outcome.state != scenario.ends:
            problems.append(f"the job ended as {outcome.state}, not {scenario.ends.value}")
        if outcome.running_version != scenario.runs:
            problems.append(f"version {outcome.running_version} runs, not {scenario.runs}")
        if state is not BootState.VALID:
            problems.append(f"the running slot is {'unknown' if state is None else state.name}, not VALID")
        if scenario.cut:
            failed = [info for status, info in outcome.reports if status == "failed"]
            if len(requests) != 2 or not outcome.resumed_at or len(failed) != 1:
                shown = [(request.status, request.start) for request in requests]
                problems.append(f"the download was not resumed once: requests {shown}, failed reports {failed}")
        elif [request.status for request in requests] != [200]:
            problems.append(f"expected one request for the whole image, not {[r.status for r in requests]}")
        outcome.ok = not problems


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first of SIGINT, SIGTERM and SIGHUP interrupts; further ones do not disturb the clearing up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """What this process logs goes to a file, not to the screen."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("rmaker_ota")
    level, propagate = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate
        handler.close()


def _firmware(version: str) -> bytes:
    return build_image(size=IMAGE_SIZE, version=version, project_name=PROJECT, chip_id=CHIP_ID)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _toml(value: object) -> str:
    return json.dumps(str(value))


__all__ = ["SCENARIOS", "Demo", "Outcome", "Scenario", "Show", "interruptible"]
