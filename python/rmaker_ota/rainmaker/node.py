"""Runs the rules of `workflow` against the world: MQTT, time, the state file, a target, downloads, callbacks, restart.

One thread, the loop's, owns the workflow: whatever happens is posted to it, and it performs the workflow's actions in
order. The MQTT thread, download attempts, the worker of callbacks and callers of the API only leave inputs there.
Application code never runs on the loop's thread, nor on the MQTT thread.

A node object is one boot. Making it is what power-on is to a chip: a target whose boot loader is software chooses its
slot exactly then, once, whether the process was started by a restart of the node, by a service manager after a crash,
or by hand. Restarting never chooses: it ends the process, and the next node object does.

Order of durable effects at an update: image data, sync, verify, boot choice (all in the engine), then the state file,
then the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rmaker_ota.config import NETWORK_ID, NodeConfig, load_config, parse_config
from rmaker_ota.errors import ArgumentError, ConfigError, NotBootableError, NotFoundError, OtaError, StateError
from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker import messages
from rmaker_ota.rainmaker import workflow as rules
from rmaker_ota.rainmaker.application import OtaConfig, OtaDiagPriv, OtaHandle, raise_for
from rmaker_ota.rainmaker.attempt import Attempt, InstallationFactory
from rmaker_ota.rainmaker.connection import make_transport
from rmaker_ota.rainmaker.events import Event, Events
from rmaker_ota.rainmaker.loop import Clock, Loop, SystemClock
from rmaker_ota.rainmaker.params import Connectivity, Device, Groups, Params, Write
from rmaker_ota.rainmaker.store import SqliteStore, Store, Value
from rmaker_ota.rainmaker.stream_attempt import StreamAttempt, StreamInput
from rmaker_ota.rainmaker.timezone import load_timezone, local_minute
from rmaker_ota.rainmaker.transport import PublishRefused, Transport
from rmaker_ota.rainmaker.types import (
    COMMON_EVENT_BASE,
    RMAKER_EVENT_BASE,
    CommonEvent,
    DiagStatus,
    OtaData,
    OtaType,
    RmakerEvent,
)
from rmaker_ota.rainmaker.worker import Worker

if TYPE_CHECKING:
    from rmaker_ota.install import Progress
    from rmaker_ota.rainmaker.observe import Metrics
    from rmaker_ota.targets.base import Target

log = logging.getLogger(__name__)

MAX_MESSAGES_WAITING = 64  # received and not looked at; more are dropped
BLOCK_COST = 256  # bytes a block costs beside its own, at least
MAX_EVENTS_WAITING = 1024  # events times subscribers; more are dropped, as behind a callback that does not return
CONFIG_RETRY_S = 60.0  # after a node configuration that could not be published
COMMAND_RETRY_S = 60.0  # after a restart command that failed
MAX_DELAY_S = 2**31 - 1  # of a fetch: the most a C int can ask for
FLUSH_S = 2.0  # at the end, for messages not acknowledged yet


class Outcome(enum.Enum):
    """Why a node ended."""

    STOPPED = "stopped"
    RESTART = "restart"  # it wants to be started again


# -- what the loop is told beside the workflow's own inputs


@dataclass(frozen=True)
class _MqttConnected:
    session_present: bool


@dataclass(frozen=True)
class _MqttDisconnected:
    reason: str


@dataclass(frozen=True)
class _MqttMessage:
    topic: str
    payload: bytes
    cost: int  # bytes a block counts for; 0: any other message


@dataclass(frozen=True)
class _MqttPublished:
    message_id: int


@dataclass(frozen=True)
class _ReportConfig:
    """Time to try the node configuration again."""


@dataclass(frozen=True)
class _ConfigChanged:
    """There is another device or service."""


@dataclass(frozen=True)
class _ReportConnected:
    """The connection has lasted."""


@dataclass(frozen=True)
class _NetworkChanged:
    network_id: str | None


@dataclass(frozen=True)
class _Marker:
    """What was posted before it has been handled."""

    reached: threading.Event


class _Listener:
    """Hears of the transport, on its thread, and leaves it to the loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting = 0
        self._dropping = False
        self._stream: tuple[frozenset[str], int] = (frozenset(), 0)
        self._stream_bytes = 0

    def expect(self, topics: frozenset[str], most: int) -> None:
        """Blocks of an image are to come on these topics, so many bytes at once; they do not count as messages."""
        with self._lock:
            self._stream = topics, most

    def connected(self, session_present: bool) -> None:
        self._loop.post(_MqttConnected(session_present))

    def disconnected(self, reason: str) -> None:
        self._loop.post(_MqttDisconnected(reason))

    def published(self, message_id: int) -> None:
        self._loop.post(_MqttPublished(message_id))

    def message(self, topic: str, payload: bytes) -> None:
        with self._lock:
            topics, most = self._stream
            cost = len(payload) + BLOCK_COST if topic in topics else 0
            if self._stream_bytes + cost > most if cost else self._waiting >= MAX_MESSAGES_WAITING:
                if not self._dropping:
                    log.warning("messages come faster than they can be looked at: dropping some")
                self._dropping = True
                return
            self._dropping = False
            self._waiting += cost == 0
            self._stream_bytes += cost
        self._loop.post(_MqttMessage(topic, payload, cost))

    def taken(self, message: _MqttMessage) -> None:
        with self._lock:
            self._waiting -= message.cost == 0
            self._stream_bytes -= message.cost


class _Call:
    def __init__(self) -> None:
        self.value: int = EspErr.FAIL
        self.done = threading.Event()


class Node:
    """One node, for one boot.

    Args:
        config: everything; or None, and the following make one:
        node_id, mqtt, target, state, ota, restart: as in the sections of a configuration file; ``target`` is a URI or a
            target, ``state`` a path or a store.
        transport, store, clock, restarter, make_installation: stand-ins for tests and other surroundings.
            ``restarter`` is called, with the reason, in place of what ``[restart]`` says.

    Raises:
        ConfigError: wrong configuration.
        StateFileError: the state file cannot be used, or another node uses it.
        OtaError: the target cannot be used, or nothing on it boots.
    """

    def __init__(
        self,
        config: NodeConfig | None = None,
        *,
        node_id: str | None = None,
        mqtt: Mapping[str, Any] | None = None,
        target: str | Target | None = None,
        state: str | os.PathLike[str] | Store | None = None,
        ota: Mapping[str, Any] | None = None,
        restart: Mapping[str, Any] | None = None,
        node: Mapping[str, Any] | None = None,
        transport: Transport | None = None,
        clock: Clock | None = None,
        restarter: Callable[[str], None] | None = None,
        make_installation: InstallationFactory | None = None,
    ) -> None:
        if config is None:
            config = _config_of(node_id, node, mqtt, target, state, ota, restart)
        self.config = config
        self._clock = clock or SystemClock()
        self._zone = None if config.ota.timezone is None else load_timezone(config.ota.timezone)
        self._restarter = restarter
        self._make_installation = make_installation
        self._ended = threading.Event()
        self._outcome = Outcome.STOPPED
        self._failure: BaseException | None = None
        self._lifecycle = threading.Lock()
        self._is_stopping = False
        self._is_down = False  # nothing is performed any more
        self._down = threading.Event()  # all that belongs to it has been given back
        self._attempt: Attempt | StreamAttempt | None = None
        self._bytes_before = 0  # of earlier attempts
        self._calls: dict[int, _Call] = {}
        self._calls_lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._ota: dict[int, OtaConfig] = {}  # by workflow; the diagnostics given first stand for both
        self._enable_lock = threading.Lock()
        self._mqtt_started = False
        self._is_started = False  # RMAKER_EVENT/STARTED was posted
        self._is_online = False  # as the loop knows it
        self._config_due = True  # the node configuration is to be reported

        # The state first: a second node on the same file must not restart this one's target.
        self._store = state if isinstance(state, Store) else SqliteStore(config.state.path if state is None else state)
        try:
            self._target = _open_target(config) if target is None or isinstance(target, str) else target
            try:
                self._boot = self._power_on()
                self._info = rules.NodeInfo(
                    config.node.id or "", config.node.version or self._boot.version, config.node.network_id
                )
                kept = self._store.items()
                self._keep_job_id(kept.get(rules.KEY_JOB_ID))
                self._group_id = kept.get(rules.KEY_GROUP_ID)
                self.params = Params()
                self.params.reporter = lambda: raise_for(self._call(rules.CallReportParams), "report")
                if config.node.groups:
                    self.params.add(Groups())
                if config.node.connectivity:
                    self.params.add(Connectivity())
                self._workflow = rules.Workflow(config.ota, self._info, self._boot, kept, self.params)
                self._transport = transport if transport is not None else make_transport(config)
            except BaseException:
                self._target.close()
                raise
        except BaseException:
            self._store.close()
            raise

        self._loop = Loop(self._handle, self._clock)
        begin, end = self._loop.begin, self._loop.end
        self._worker = Worker("rmaker-worker", begin=begin, end=end)
        # Of their own, so that a lamp can be switched while a job callback is at work (Q44).
        self._param_worker = Worker("rmaker-params", capacity=MAX_MESSAGES_WAITING, begin=begin, end=end)
        self._event_worker = Worker("rmaker-events", capacity=MAX_EVENTS_WAITING, begin=begin, end=end)
        self.events = Events(self._event_worker)
        self._metrics: Metrics | None = None
        if config.metrics.path is not None:
            from rmaker_ota.rainmaker.observe import Metrics

            self._metrics = Metrics(self, config.metrics.path)
        self._listener = _Listener(self._loop)
        self._topics = messages.Topics(self._info.node_id, config.ota.mqtt_use_basic_ingest)
        with _default_lock:
            _defaults.append(self)

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], **stand_ins: Any) -> Node:
        """A node as a configuration file says. Raises as `Node` does."""
        return cls(load_config(path), **stand_ins)

    # -- life

    def start(self) -> None:
        """Connects, and returns. Enable OTA before: see `rmaker_ota.Ota`.

        A node that has ended already, as by a rollback while OTA was enabled, stays ended: see `run`.

        Raises:
            ConfigError: the MQTT credentials cannot be used.
            StateError: the node is started already.
        """
        with self._lifecycle:
            if self._is_stopping:
                return
            if self._mqtt_started:
                raise StateError("a node starts once")
            self._mqtt_started = True
        self._post_event(RMAKER_EVENT_BASE, RmakerEvent.INIT_DONE)
        self._set_will()
        self._transport.start(self._listener)

    def run(self) -> Outcome:
        """Starts the node unless it is, and waits for its end.

        Raises:
            OtaError: what ended it, or kept it from starting.
        """
        if not self._mqtt_started:
            self.start()
        return self.wait()

    def wait(self) -> Outcome:
        """Waits for the end of the node, whether it is started or not.

        Raises:
            OtaError: what ended it.
        """
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self._outcome

    def stop(self, timeout_s: float = FLUSH_S) -> None:
        """Ends the node in order: a download is cut short where it can go on later, accepted messages are sent.

        Args:
            timeout_s: for messages that are not acknowledged yet. What is then still open is in the state file.
        """
        try:
            self._shut_down(timeout_s)
        finally:
            self._ended.set()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def node_id(self) -> str:
        return self._info.node_id

    @property
    def boot(self) -> rules.BootFacts:
        """What was found at power-on: slot, state, project, version."""
        return self._boot

    @property
    def is_connected(self) -> bool:
        """Whether the MQTT connection is up."""
        return self._transport.is_connected

    def progress(self) -> Progress | None:
        """Counters of the download that runs; None when none does. Any thread."""
        attempt = self._attempt
        return None if attempt is None else attempt.progress()

    @property
    def image_bytes(self) -> int:
        """Bytes of images this boot received, those a resume found on the slot included."""
        now = self.progress()
        return self._bytes_before + (0 if now is None else now.bytes_read)

    @property
    def job_id(self) -> str | None:
        """The job at hand, or the last one while it is remembered."""
        return self._job_id

    def _keep_job_id(self, value: Value | None) -> None:
        self._job_id = value.decode(errors="replace") if isinstance(value, bytes) else None

    def responds(self, timeout_s: float) -> bool:
        """Whether the node's thread comes to new work within so many seconds; also when the node has ended. For
        watchdogs: not from a callback of the node."""
        reached = threading.Event()
        return not self._loop.post(_Marker(reached)) or reached.wait(timeout_s) or self._is_stopping

    def settle(self, timeout_s: float = 30.0) -> None:
        """Waits until everything begun is done, downloads and callbacks included. For tests."""
        self._loop.settle(timeout_s)

    # -- devices, services, parameters

    def add_device(self, device: Device) -> None:
        """Gives the node a device or a service; best before `start`, so that it is part of the first configuration.

        Raises:
            ArgumentError: there is one of that name, or it belongs to a node already.
        """
        self.params.add(device)
        self._loop.post(_ConfigChanged())

    def add_service(self, service: Device) -> None:
        """The same as `add_device`, under the name of the C API."""
        self.add_device(service)

    def set_network_id(self, network_id: str | None) -> None:
        """The node is in another network (Thread) from now on: its configuration and all values are reported again.

        Args:
            network_id: 8 upper-case hex digits; None: none.

        Raises:
            ArgumentError: not such a text.
        """
        if network_id is not None and not NETWORK_ID.fullmatch(network_id):
            raise ArgumentError(f"network id {network_id!r}: expected 8 upper-case hex digits")
        self._loop.post(_NetworkChanged(network_id))

    def report(self) -> None:
        """Reports every parameter that was updated since its last report. Before the node has started nothing is sent:
        all values go out at the start.

        Raises:
            OtaError: not sent; it is tried again by itself.
        """
        self.params.report()

    # -- the API, as numbers; `Ota` and the C names are made of these

    def enable(self, config: OtaConfig | None, ota_type: int) -> int:
        """Switches OTA on; returns an ``esp_err_t``. The diagnostics' INIT call is over when it returns.

        Without a certificate in ``config`` the node's ``[ota] server_cert`` is used.

        Raises:
            ConfigError: that file cannot be read.
        """
        mine = config or OtaConfig()
        cert = mine.server_cert or self._server_cert()
        facts = rules.EnableConfig(mine.ota_cb is not None, mine.ota_diag is not None, cert, mine.priv)
        if self._worker.is_current() and self._enable_lock.locked():  # inside the diagnostics which the lock waits for
            return EspErr.FAIL if ota_type in set(OtaType) else EspErr.INVALID_ARG
        with self._enable_lock:
            previous = self._ota
            self._ota = previous | {ota_type: previous.get(ota_type, mine)}  # what is there stays
            value = self._call(lambda number: rules.Enable(number, ota_type, facts))
            if value != EspErr.OK:
                self._ota = previous
            return value

    def _server_cert(self) -> str | None:
        path = self.config.ota.server_cert
        try:
            return None if path is None else path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f'{self.config.source}: [ota] server_cert = "{path}": {error}, expected PEM') from error

    def fetch(self) -> int:
        """Asks the cloud for a job; returns an ``esp_err_t``."""
        return self._call(rules.CallFetch)

    def fetch_with_delay(self, seconds: int) -> int:
        """The same in so many seconds; returns an ``esp_err_t``."""
        if not isinstance(seconds, int) or seconds > MAX_DELAY_S:
            return EspErr.INVALID_ARG
        return self._call(lambda number: rules.CallFetchWithDelay(number, seconds))

    def report_status(self, handle: OtaHandle | None, status: int, info: str | None) -> int:
        """Reports a status; returns an ``esp_err_t``."""
        if not isinstance(status, int) or not isinstance(info, str | None):
            return EspErr.INVALID_ARG
        return self._call(
            lambda call: rules.CallReportStatus(call, None if handle is None else handle.number, status, info)
        )

    def default_callback(self, handle: OtaHandle | None, data: OtaData, transport: str | None = None) -> int:
        """Runs the built-in handler to its end, over "https" or "mqtt", None: as configured; returns an
        ``esp_err_t``."""
        number = None if handle is None else handle.number
        return self._call(lambda call: rules.CallDefaultCallback(call, number, data, transport))

    def mark_valid(self) -> int:
        """Confirms the running image; returns an ``esp_err_t``."""
        return self._call(rules.CallMarkValid)

    def mark_invalid(self) -> int:
        """Refuses the running image and restarts; returns an ``esp_err_t`` when that cannot be."""
        return self._call(rules.CallMarkInvalid)

    def _call(self, make: Callable[[int], rules.Input]) -> int:
        assert not self._loop.is_current(), "the loop cannot wait for itself"
        number = next(self._numbers)
        call = _Call()
        with self._calls_lock:
            self._calls[number] = call
        if not self._loop.post(make(number)):
            self._answer(number, EspErr.FAIL)
        call.done.wait()
        return call.value

    def _answer(self, number: int, value: int) -> None:
        with self._calls_lock:
            call = self._calls.pop(number, None)
        if call is not None:
            call.value = value
            call.done.set()

    def _answer_all(self, value: int) -> None:
        with self._calls_lock:
            numbers = list(self._calls)
        for number in numbers:
            self._answer(number, value)

    # -- power-on

    def _power_on(self) -> rules.BootFacts:
        """Boots a virtual target, and finds out what runs."""
        target, config = self._target, self.config
        if target.boots_with_process:
            report = target.restart()
            for reason in report.reasons:
                log.info("boot: %s", reason)
            if report.slot is None:
                raise NotBootableError(f"{target.uri}: nothing boots: {'; '.join(report.reasons)}", stage="target")
        slot = target.running_slot()
        state = None
        description = None
        if slot is not None:
            description = target.describe(slot)
            try:
                state = target.boot_state(slot)
            except NotFoundError:
                log.debug("slot %s has no boot entry", slot.name)
        try:
            next_slot = target.next_slot().name
        except NotFoundError as error:
            log.warning("no update can be installed: %s", error)
            next_slot = None
        project = description.project_name if description is not None else config.node.project
        version = description.version if description is not None else config.node.version
        for key, value in (("project", project), ("version", version)):
            if value is None:
                raise ConfigError(
                    f"{config.source}: [node] {key}: missing, expected a text: {target.uri} has no app descriptor to "
                    "take it from"
                )
        return rules.BootFacts(
            running_slot=None if slot is None else slot.name,
            boot_state=state,
            next_slot=next_slot,
            project_name=project or "",
            version=version or "",
            secure_version=target.secure_version,
        )

    # -- the loop's thread

    def _handle(self, item: object) -> None:
        if isinstance(item, _Marker):
            item.reached.set()
            return
        if self._is_down:
            return
        match item:
            case _MqttConnected():
                self._post_event(COMMON_EVENT_BASE, CommonEvent.MQTT_CONNECTED)
                self._is_online = True
                self._feed(rules.Connected())
                if isinstance(self._attempt, StreamAttempt):
                    self._attempt.connected()
                self._report_config()
                if self.params.connectivity is not None:
                    # Not at once: the broker may send the will of the connection before only now (section 8.5).
                    self._loop.start_timer(
                        _ReportConnected, self.config.ota.connectivity_report_delay_s, _ReportConnected()
                    )
            case _MqttDisconnected():
                self._post_event(COMMON_EVENT_BASE, CommonEvent.MQTT_DISCONNECTED)
                self._is_online = False
                if isinstance(self._attempt, StreamAttempt):
                    self._attempt.disconnected()
                self._loop.stop_timer(_ReportConnected)
                self._set_will()
                self._feed(rules.Disconnected())
            case _MqttMessage(topic, payload):
                self._listener.taken(item)
                log.debug("message on %s, %d bytes", topic, len(payload))
                if isinstance(self._attempt, StreamAttempt) and topic in self._attempt.topics:
                    self._attempt.message(topic, payload)
                else:
                    self._feed(rules.MessageReceived(topic, payload))
            case _MqttPublished(message_id):
                self._post_event(COMMON_EVENT_BASE, CommonEvent.MQTT_PUBLISHED, message_id)
                self._feed(rules.PubAck(message_id))
            case StreamInput():
                if isinstance(self._attempt, StreamAttempt):
                    self._attempt.handle(item)
            case _ReportConfig():
                self._report_config()
            case _ReportConnected():
                if self.params.connectivity is not None:
                    self.params.connectivity["Connected"].put(True)
                    self._feed(rules.CallReportParams(0))
            case _NetworkChanged(network_id):
                if network_id != self._info.network_id:
                    self._info = dataclasses.replace(self._info, network_id=network_id)
                    self._feed(rules.NodeInfoChanged(self._info))
                    self._config_due = True
                    self._report_config()
            case _ConfigChanged():
                self._config_due = True
                self._report_config()
            case _:
                stream = self._attempt if isinstance(self._attempt, StreamAttempt) else None
                if stream is not None:
                    stream.before(item)
                try:
                    self._feed(item)  # type: ignore[arg-type]
                    if stream is not None:
                        stream.after(item)
                except Exception:
                    call = getattr(item, "call", None)
                    if call is not None:  # whoever made it must not wait for ever
                        self._answer(call, EspErr.FAIL)
                    raise

    def _feed(self, event: rules.Input) -> None:
        """Gives the workflow an input and performs what it says."""
        pending = deque(self._workflow.handle(event, self._now()))
        while pending and not self._is_down:
            changes: dict[str, Value | None] = {}  # values written one after the other become durable together
            while pending and isinstance(pending[0], (rules.StoreSet, rules.StoreErase)):
                action = pending.popleft()
                assert isinstance(action, (rules.StoreSet, rules.StoreErase))
                changes[action.key] = action.value if isinstance(action, rules.StoreSet) else None
            if changes:
                self._update_store(changes)
                continue
            answer = self._perform(pending.popleft())
            if answer is not None:
                pending.extendleft(reversed(self._workflow.handle(answer, self._now())))

    def _now(self) -> rules.Now:
        unix = self._clock.unix()
        return rules.Now(unix, self._clock.monotonic(), self._minute_at(unix), self._minute_at)

    def _minute_at(self, unix: float) -> int:
        return local_minute(unix, self._zone)

    def _update_store(self, changes: Mapping[str, Value | None]) -> None:
        if rules.KEY_JOB_ID in changes:
            self._keep_job_id(changes[rules.KEY_JOB_ID])
        self._group_id = changes.get(rules.KEY_GROUP_ID, self._group_id)
        try:
            self._store.update(changes)
        except OtaError as error:
            # The node goes on: a state that is not kept costs a report after the next restart, stopping costs updates.
            log.error("state is not kept: %s", error)
            return
        log.debug("state kept: %s", ", ".join(changes))

    def _perform(self, action: rules.Action) -> rules.Input | None:
        """Does one thing; returns the answer to a question."""
        match action:
            case rules.Publish(token, topic, payload, qos):
                return self._publish(token, topic, payload, qos)
            case rules.Subscribe(topic, qos):
                try:
                    self._transport.subscribe(topic, qos=qos)
                except OtaError as error:
                    log.error("%s", error)
            case rules.Unsubscribe(topic):
                self._transport.unsubscribe(topic)
            case rules.StartTimer(kind, seconds, repeat):
                self._loop.start_timer(kind, seconds, rules.TimerFired(kind), repeat=repeat)
            case rules.StopTimer(kind):
                self._loop.stop_timer(kind)
            case rules.FetchScheduled(seconds, effective):
                log.debug("fetch in %g s%s", seconds, "" if effective else ": an earlier one is due")
            case rules.StartAttempt():
                self._start_attempt(action)
            case rules.AcceptHeader(attempt):
                self._decide(attempt, None)
            case rules.RefuseHeader(attempt, reason):
                self._decide(attempt, reason)
            case rules.QueueCallback():
                accepted = action.builtin or self._worker.submit(lambda: self._run_callback(action))
                return rules.CallbackQueued(action.job, accepted)
            case rules.WriteParams(write):
                if not self._param_worker.submit(lambda: self._run_write(write)):
                    log.error("%s not written: its callbacks are far behind, or the node ends", write.device.name)
            case rules.ReportConfig():
                self._config_due = True
                return rules.ConfigReported() if self._publish_config() else None
            case rules.CallDiagnostics():
                self._worker.submit(lambda: self._run_diagnostics(action), always=True)
            case rules.PostEvent(base, event, data):
                self._post_event(base, event, data)
            case rules.MarkValid(token):
                return rules.TargetResult(token, self._ask_target(self._target.mark_valid, "confirm"))
            case rules.MarkInvalid(token):
                return rules.TargetResult(token, self._ask_target(self._target.mark_invalid, "refuse"))
            case rules.Restart(reason):
                self._restart(reason)
            case rules.ApiReturn(call, value):
                self._answer(call, value)
            case rules.Log(level, message):
                log.log(level, "%s", message)
            case _:
                raise AssertionError(f"no such action: {action}")
        return None

    def _publish(self, token: int, topic: str, payload: bytes, qos: int) -> rules.PublishResult:
        try:
            message_id = self._transport.publish(topic, payload, qos=qos)
        except OtaError as error:
            log.warning("not published: %s", error)
            return rules.PublishResult(token, False)
        log.debug("published %s %s", topic, payload.decode(errors="replace"))
        return rules.PublishResult(token, True, message_id)

    def _ask_target(self, act: Callable[[], None], what: str) -> int:
        try:
            act()
        except OtaError as error:
            log.error("cannot %s the running image: %s", what, error)
            return error.esp_err or EspErr.FAIL
        except Exception:
            log.exception("cannot %s the running image", what)
            return EspErr.FAIL
        return EspErr.OK

    def _post_event(self, base: str, event: int, data: str | int | None = None) -> None:
        self.events.post(Event(base, event, data))

    def _connected_message(self) -> tuple[str, bytes] | None:
        """Topic and payload that say the node is gone; None without the service."""
        service = self.params.connectivity
        if service is None:
            return None
        kept = self._group_id if self.params.groups is not None else None
        group = kept if isinstance(kept, str) and messages.valid_group_id(kept) else ""
        payload = messages.params_payload({service.name: {"Connected": False}})
        assert payload is not None
        return messages.Topics(self._info.node_id, basic_ingest=False).params_local_of(group), payload

    def _set_will(self) -> None:
        will = self._connected_message()
        if will is not None:
            self._transport.set_will(*will)

    def _report_config(self) -> None:
        """Node configuration, parameters, and once: started (specification, section 2.2)."""
        if not self._config_due or not self._publish_config():
            return
        self._feed(rules.ConfigReported())
        if not self._is_started:
            self._is_started = True
            self._post_event(RMAKER_EVENT_BASE, RmakerEvent.STARTED)
            self._feed(rules.Started())

    def _publish_config(self) -> bool:
        """False: not now; it is tried again later."""
        if not self._is_online:
            return False
        node = self.config.node
        payload = messages.node_config_payload(
            messages.NodeConfig(
                node_id=self._info.node_id,
                name=node.name,
                type=node.type,
                fw_version=self._info.fw_version,
                model=node.model or self._boot.project_name,
                project_name=self._boot.project_name,
                platform=node.platform,
                attributes={} if self._info.network_id is None else {"network-id": self._info.network_id},
                devices=self.params.devices,
                services=self.params.services,
            )
        )
        try:
            self._transport.publish(self._topics.config, payload)
        except PublishRefused as error:
            log.warning("node configuration not published: %s", error)
            self._loop.start_timer("report-config", CONFIG_RETRY_S, _ReportConfig())
            return False
        self._config_due = False
        self._post_event(RMAKER_EVENT_BASE, RmakerEvent.CONFIG_REPORTED)
        return True

    # -- downloads

    def _start_attempt(self, action: rules.StartAttempt) -> None:
        attempt = self._make_attempt(action)
        if attempt is None:
            self._loop.post(rules.AttemptFailed(action.attempt, rules.Stage.BEGIN, answered=False))
            return
        self._bytes_before = self.image_bytes
        self._attempt = attempt
        if self._is_stopping:  # set before whoever stops looks for an attempt
            return
        if isinstance(attempt, Attempt):
            self._loop.begin()
        attempt.start()

    def _make_attempt(self, action: rules.StartAttempt) -> Attempt | StreamAttempt | None:
        make, post = self._make_installation, self._loop.post
        if action.stream_id is None:
            return Attempt(action, self._target, self.config.ota, post, make=make, ended=self._loop.end)
        try:
            attempt = StreamAttempt(
                action,
                self._target,
                self.config.ota,
                post,
                node_id=self._info.node_id,
                transport=self._transport,
                loop=self._loop,
                make=make,
            )
        except ValueError as error:
            log.error("stream of the image: %s", error)
            return None
        self._listener.expect(attempt.topics, attempt.most_bytes)
        return attempt

    def _decide(self, number: int, refusal: str | None) -> None:
        if self._attempt is not None and self._attempt.number == number:
            self._attempt.decide(refusal)

    # -- the application's code, on the worker

    def _run_callback(self, action: rules.QueueCallback) -> None:
        callback = self._ota[action.type].ota_cb
        assert callback is not None
        error: str | None = None
        try:
            callback(OtaHandle(self, action.handle), action.data)
        except BaseException as raised:  # SystemExit would end this thread and not the program
            log.exception("OTA callback raised")
            error = f"{type(raised).__name__}: {raised}" if str(raised) else type(raised).__name__
        finally:
            self._loop.post(rules.CallbackReturned(action.job, error))

    def _run_diagnostics(self, action: rules.CallDiagnostics) -> None:
        status = DiagStatus.FAIL
        try:
            config = next(iter(self._ota.values()), None)
            if config is None or config.ota_diag is None:
                status = DiagStatus.SUCCESS
            else:
                answer = config.ota_diag(OtaDiagPriv(action.state, action.rmaker_ota), config.priv)
                if isinstance(answer, bool) or not isinstance(answer, int):
                    raise TypeError(f"OTA diagnostics returned {answer!r}, expected a DiagStatus")
                status = DiagStatus(answer)
        except BaseException:
            log.exception("OTA diagnostics failed")
        finally:
            self._loop.post(rules.DiagnosticsReturned(action.token, status))

    def _run_write(self, write: Write) -> None:
        device = write.device
        if device.write_cb is None:
            log.warning("%s not written: it has no write callback", device.name)
            return
        for param, value in write.values:
            try:
                device.write_cb(device, param, value)
            except BaseException:
                log.exception("the write callback of %s raised", param.full_name)

    # -- the end

    def _restart(self, reason: str) -> None:
        log.warning("restart: %s", reason)
        if not self._shut_down(FLUSH_S, answer=EspErr.OK):
            return  # it is being stopped, and restarts when it is started again
        self._outcome = Outcome.RESTART
        try:
            if self._restarter is not None:
                self._restarter(reason)
            elif self.config.restart.mode == "process":
                restart_process()
            elif self.config.restart.mode == "command":
                self._run_command(self.config.restart.command)
        except Exception as error:
            log.exception("cannot restart")
            self._failure = error
        self._ended.set()

    def _run_command(self, command: tuple[str, ...]) -> None:
        """Runs the restart command until it works; the end of the process is what ends this."""
        while True:
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
                if done.returncode == 0:
                    return
                log.error("restart command %s ended with code %d", command[0], done.returncode)
            except OSError as error:
                log.error("restart command %s: %s", command[0], error.strerror)
            if self._ended.wait(COMMAND_RETRY_S):
                return

    def _shut_down(self, timeout_s: float, answer: int = EspErr.FAIL) -> bool:
        """Ends everything, once. Returns False to whoever does not come first, after the first one is done."""
        with self._lifecycle:
            first, self._is_stopping = not self._is_stopping, True
        if not first:
            if not self._loop.is_current():  # which the first one waits for
                self._down.wait()
            return False
        try:
            with contextlib.ExitStack() as steps:  # last one first; each is taken whatever becomes of the others
                steps.callback(self._store.close)
                steps.callback(self._target.close)
                if self._metrics is not None:
                    steps.callback(self._metrics.close)
                steps.callback(self._stop_workers, timeout_s)
                steps.callback(self._answer_all, answer)
                steps.callback(self._stop_loop)
                steps.callback(self._transport.stop, timeout_s)
                steps.callback(self._say_goodbye)
                steps.callback(self._stop_attempt)
        finally:
            with _default_lock:
                _defaults.remove(self)
            self._down.set()
        return True

    def _stop_attempt(self) -> None:
        attempt = self._attempt
        if attempt is not None and not attempt.cancel(10.0):
            log.error("the download does not end")

    def _say_goodbye(self) -> None:
        """The broker keeps the will to itself where a node leaves in order."""
        will = self._connected_message()
        if will is not None and self._transport.is_connected:
            with contextlib.suppress(PublishRefused):
                self._transport.publish(*will)

    def _stop_loop(self) -> None:
        if not self._loop.is_current():
            self._drain()  # positions kept and acknowledgements that came up to now
        self._is_down = True
        self._loop.stop()

    def _stop_workers(self, timeout_s: float) -> None:
        for worker in (self._worker, self._param_worker, self._event_worker):
            if not worker.stop(timeout_s):
                log.warning("a callback is not over; going on without it")

    def _is_current(self) -> bool:
        workers = (self._worker, self._param_worker, self._event_worker)
        return self._loop.is_current() or any(worker.is_current() for worker in workers)

    def _drain(self) -> None:
        """Waits until the loop has handled what was posted before."""
        drained = threading.Event()
        if self._loop.post(_Marker(drained)) and not drained.wait(10.0):
            log.error("the node's thread is stuck")


def restart_process() -> None:
    """Starts this program anew, in this process: same arguments, same surroundings."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # by path: it may be one of a virtual environment


def _config_of(
    node_id: str | None,
    node: Mapping[str, Any] | None,
    mqtt: Mapping[str, Any] | None,
    target: object,
    state: object,
    ota: Mapping[str, Any] | None,
    restart: Mapping[str, Any] | None,
) -> NodeConfig:
    tables: dict[str, Any] = {
        "node": dict(node or {}) | ({} if node_id is None else {"id": node_id}),
        "mqtt": dict(mqtt or {}),
        "target": {"uri": target if isinstance(target, str) else getattr(target, "uri", "")},
        "ota": dict(ota or {}),
        "restart": dict(restart or {}),
    }
    if isinstance(state, (str, os.PathLike)):
        tables["state"] = {"path": os.fspath(state)}
    return parse_config(tables, source="Node")


def _open_target(config: NodeConfig) -> Target:
    from rmaker_ota.targets import open_target

    try:
        return open_target(config.target.uri, **config.target.options)
    except ArgumentError as error:
        raise ConfigError(f"{config.source}: [target] {error}") from error


# -- the process's default node, which the C names work on: the first one made and not yet stopped

_default_lock = threading.Lock()
_defaults: list[Node] = []


def default_node() -> Node | None:
    """The node the C names work on; None while there is none."""
    with _default_lock:
        return _defaults[0] if _defaults else None


def node_of_thread() -> Node | None:
    """The node a thread works for: the only one of the process, else the one whose thread it is. For log records."""
    nodes = tuple(_defaults)  # without the lock: whoever holds it may log
    if len(nodes) == 1:
        return nodes[0]
    return next((node for node in nodes if node._is_current()), None)


def ota_types_of(config: NodeConfig) -> tuple[OtaType, ...]:
    """The workflows a configuration asks for."""
    wanted = {"topics": (OtaType.USING_TOPICS,), "params": (OtaType.USING_PARAMS,), "both": tuple(OtaType)}
    return wanted[config.ota.type]
