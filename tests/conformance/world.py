"""The world a trace was recorded in, in virtual time: clock, MQTT, store, flash, HTTPS, the application - and the real
`Workflow` in the middle of it.

Time jumps from one thing that is due to the next. A step of the trace is over when nothing it set going is still
at work (a download, a waiting callback), as in the recordings. A restart or a loss of power unwinds whatever is
going on.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections import deque
from collections.abc import Callable, Generator, Hashable
from functools import partial
from typing import Any

from rmaker_ota.config import OtaSection
from rmaker_ota.errors import OtaError
from rmaker_ota.esp_err import EspErr, esp_err_name
from rmaker_ota.rainmaker.default_cert import DEFAULT_SERVER_CERT
from rmaker_ota.rainmaker.params import Params
from rmaker_ota.rainmaker.stream_attempt import StreamAttempt
from rmaker_ota.rainmaker.timezone import load_timezone, local_minute
from rmaker_ota.rainmaker.transport import PublishRefused
from rmaker_ota.rainmaker.types import COMMON_EVENT_BASE, CommonEvent, DiagStatus, OtaEvent, OtaStatus, OtaType
from rmaker_ota.rainmaker.workflow import (
    AcceptHeader,
    Action,
    ApiReturn,
    AttemptFailed,
    AttemptFinished,
    AttemptProgress,
    AttemptReceived,
    BootFacts,
    CallbackQueued,
    CallbackReturned,
    CallDefaultCallback,
    CallDiagnostics,
    CallFetch,
    CallFetchWithDelay,
    CallMarkInvalid,
    CallMarkValid,
    CallReportStatus,
    ConfigReported,
    Connected,
    DiagnosticsReturned,
    Disconnected,
    Enable,
    EnableConfig,
    FetchScheduled,
    Input,
    Log,
    MarkInvalid,
    MarkValid,
    MessageReceived,
    NodeInfo,
    NodeInfoChanged,
    Now,
    OtaOptions,
    PostEvent,
    PubAck,
    Publish,
    PublishResult,
    QueueCallback,
    RefuseHeader,
    ReportConfig,
    Restart,
    Stage,
    StartAttempt,
    Started,
    StartTimer,
    StopTimer,
    StoreErase,
    StoreSet,
    Subscribe,
    TargetResult,
    TimerFired,
    TimerKind,
    Unsubscribe,
    Workflow,
)
from tests.conformance.http_twin import Client, PowerCut, Server
from tests.conformance.observe import OWN_KEYS, TIMERS, Observation, parse_payload, stored_value
from tests.conformance.platforms import Platform, Running, Services, StreamServices
from tests.conformance.stream_twin import Delivery, StreamServer
from tests.conformance.trace import Trace, UnknownInput

Json = dict[str, Any]
ACK_S = 0.1
NAMESPACE = "rmaker_ota"

# What a trace may name as the moment of a loss of power, and what it is called here.
_CUTS = {
    "mqtt_publish": "publish",
    "mqtt_subscribe": "subscribe",
    "mqtt_unsubscribe": "unsubscribe",
    "event": "event",
    "callback": "callback",
    "callback_return": "callback_return",
    "api_return": "api_return",
    "timer_start": "timer",
    "timer_fired": "timer_fired",
    "http_connect": "http_connect",
    "http_request": "http_request",
    "http_response": "http_response",
    "slot_state": "slot_state",
    "slot_write": "slot_write",
    "image_check": "image_check",
    "nvs_set": "stored",
    "nvs_erase": "erased",
}
LONGEST_S = 400 * 86400.0  # of virtual time for one step; longer means that something runs in circles

_MD5 = re.compile(r"[0-9a-fA-F]{32}")


class Reboot(Exception):
    """The node restarts, whatever is going on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Sleep:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class _Call:
    """An API call: made with its number, over when it returns."""

    def __init__(self, api: str, make: Callable[[int], Input]) -> None:
        self.api = api
        self.make = make


Task = Generator[_Sleep | _Call, int | None, None]


def _default_callback(query: QueueCallback, call: int) -> Input:
    return CallDefaultCallback(call, query.handle, query.data)


def options_of(config: Json) -> OtaOptions:
    """The options a recording was made with."""
    return OtaOptions(
        ota_transport=config["protocol"],
        ota_autofetch=config["autofetch"],
        ota_autofetch_period_hours=config["autofetch_period_hours"],
        ota_skip_version_check=config["skip_version_check"],
        ota_skip_secure_version_check=config["skip_secure_version_check"],
        ota_skip_project_name_check=config["skip_project_name_check"],
        ota_rollback_wait_period_s=config["rollback_wait_s"],
        ota_rollback_report_failed=config["rollback_report_failed"],
        ota_test_rollback=config.get("test_rollback", False),
        ota_test_rollback_count=config.get("test_rollback_count", 100),
        ota_disable_auto_reboot=not config["auto_reboot"],
        ota_time_support=config["time_support"],
        ota_progress_support=config["progress_support"],
        ota_progress_interval_pct=config.get("progress_interval", 10),
        ota_max_retries=config["max_retries"],
        ota_retry_delay_minutes=config["retry_delay_minutes"],
        http_ota_resumption=config.get("http_resumption", True),
        http_rx_buffer_size=config.get("http_rx_buffer_size", 1024),
        use_cert_bundle=config.get("cert_bundle", True),
        rollback_enable=config["rollback_enable"],
        mqtt_use_basic_ingest=config["basic_ingest"],
        strict=True,
    )


def section_of(config: Json) -> OtaSection:
    """The options of downloads over MQTT a recording was made with."""
    return OtaSection(
        mqtt_ota_block_size=config.get("mqtt_block_size", 4096),
        mqtt_ota_blocks_per_request=config.get("mqtt_blocks_per_request", 16),
        mqtt_ota_max_retries=config.get("mqtt_max_retries", 3),
        mqtt_ota_block_wait_s=config.get("mqtt_block_wait_s", 10),
    )


class _StreamWorld:
    """What a download over MQTT finds around it: the world as its transport and its loop."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._timers: dict[Hashable, int] = {}
        self._numbers = itertools.count()

    @property
    def is_connected(self) -> bool:
        return self._world._connected

    def subscribe(self, topic: str, *, qos: int = 1) -> None:
        if not self._world._subscribe(topic, qos):
            raise OtaError("refused by the trace")

    def unsubscribe(self, topic: str) -> bool:
        return self._world._unsubscribe(topic, always=False)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1) -> int:
        accepted, message = self._world._send(topic, payload, qos)
        if not accepted:
            raise PublishRefused("refused by the trace")
        return message or 0

    def monotonic(self) -> float:
        return self._world.t

    def begin(self) -> None:
        pass

    def end(self) -> None:
        pass

    def start_timer(self, key: Hashable, seconds: float, item: object) -> None:
        number = self._timers[key] = next(self._numbers)

        def fire() -> None:
            if self._timers.get(key) == number:
                del self._timers[key]
                self._world._to_stream(lambda stream: stream.handle(item))

        self._world._at(self._world.t + seconds, fire)

    def stop_timer(self, key: Hashable) -> bool:
        return self._timers.pop(key, None) is not None


class World:
    """Replays one trace. After `run`: ``seen``, what is left, and ``notes`` on what the HTTP twin did as the
    reference would."""

    def __init__(self, trace: Trace, platform: Callable[[Json, Callable[[str, Json], None]], Platform]) -> None:
        self._trace = trace
        self._inputs = trace.inputs
        self.seen: list[Observation] = []
        self.notes: set[str] = set()
        self.t = 0.0
        self._wall = float(self._inputs["clock"])
        self._zone = load_timezone(self._inputs["timezone"])
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._boot = 0
        self._platform = platform(self._inputs, self._record)
        self._nvs: dict[str, dict[str, bytes | str | int]] = {
            namespace: {key: stored_value(entry) for key, entry in entries.items()}
            for namespace, entries in self._inputs.get("nvs", {}).items()
        }
        self._no_store = bool(self._inputs.get("storage_unavailable"))
        mqtt = self._inputs.get("mqtt", {})
        self._publish_rules = [dict(rule) for rule in mqtt.get("publish_rules", [])]
        self._subscribe_rules = [dict(rule) for rule in mqtt.get("subscribe_rules", [])]
        self._server = Server(
            list(self._inputs.get("https_server") or []),
            self._inputs.get("https_server_default") or {},
            self._platform.contents,
        )
        self._stream_server = StreamServer(self._inputs, self._platform.contents)
        self._checksums: dict[str, bytes] = {}
        self._queue_full = 0
        self._power_loss_on: str | None = self._inputs.get("power_loss_on")
        if self._power_loss_on is not None and self._power_loss_on not in _CUTS:
            raise UnknownInput(f"power_loss_on {self._power_loss_on}")
        self._dark = False
        self._running: Running | None = None
        self._reset_boot()

    # -- Running

    def run(self) -> None:
        try:
            self._run()
        finally:
            self._platform.close()

    def _run(self) -> None:
        boots = self._inputs["boots"]
        while True:
            self._boot += 1
            config = self._trace.configs[min(self._boot, len(self._trace.configs)) - 1]
            self._start(config)
            if self._boot > len(boots):
                return
            try:
                for step in boots[self._boot - 1]:
                    self._step(step)
                return
            except Reboot as reboot:
                self._dark = False
                self._record("reboot", {"reason": reboot.reason})

    @property
    def stored(self) -> dict[str, bytes | str | int]:
        """Stored values, ``namespace/key``."""
        return {f"{space}/{key}": value for space, values in self._nvs.items() for key, value in values.items()}

    @property
    def running(self) -> str | None:
        """The slot that runs."""
        return None if self._running is None else self._running.slot

    def _reset_boot(self) -> None:
        self._due.clear()
        self._timers: dict[TimerKind, int] = {}
        self._active = 0
        self._connected = False
        self._started = False
        self._start_called = False
        self._subscriptions: set[str] = set()
        self._messages = 0
        self._in_flight: dict[int, float] = {}
        self._unacknowledged: list[tuple[int, float]] = []
        self._calls = itertools.count(1)
        self._call_names: dict[int, str] = {}
        self._waiting: dict[int, Task] = {}
        self._returned: dict[int, int] = {}
        self._ota_config: Json = {}
        self._enabled = False
        self._handle: int | None = None
        self._steps = 0
        self._attempting = False
        self._stream: StreamAttempt | None = None
        self._stream_world = _StreamWorld(self)

    def _start(self, config: Json) -> None:
        self._reset_boot()
        self._options = options_of(config)
        self._section = section_of(config)
        loader = bool(self._inputs.get("boot_loader_rollback", config["rollback_enable"]))
        self._running = self._platform.start(loader, bool(config["rollback_enable"]))
        running = self._running
        self._record(
            "boot", {"running": running.slot, "version": running.version, "project_name": running.project_name}
        )
        node = self._inputs["node"]
        info = NodeInfo(node["node_id"], node.get("fw_version", running.version), node.get("network_id"))
        facts = BootFacts(
            running_slot=running.slot,
            boot_state=running.boot_state,
            next_slot=running.next_slot,
            project_name=running.project_name,
            version=running.version,
            secure_version=self._inputs.get("device", {}).get("efuse_secure_version", 0),
        )
        stored = None if self._no_store else self._nvs.get(NAMESPACE, {})
        self._params = Params()
        self._workflow = Workflow(self._options, info, facts, stored, self._params)

    def _record(self, kind: str, data: Json) -> None:
        if self._dark:
            return
        self._happened(kind)
        self.seen.append(Observation(round(self.t, 3), self._boot, kind, data, self._steps))

    def _happened(self, kind: str) -> None:
        """The power goes at the first thing of a kind; from then on nothing is heard or done in this boot."""
        if self._power_loss_on is not None and _CUTS[self._power_loss_on] == kind:
            self._power_loss_on = None
            self._dark = True
            self._at(self.t, self._cut)

    def _cut(self) -> None:
        raise Reboot("power_loss")

    # -- Time

    def _now(self) -> Now:
        unix = self._wall + self.t
        return Now(unix, self.t, local_minute(unix, self._zone))

    def _at(self, t: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (round(t, 6), next(self._order), action))

    def _next(self, limit: float) -> bool:
        """Lets the next thing happen that is due by ``limit``."""
        if not self._due or self._due[0][0] > round(limit, 6):
            return False
        t, _, action = heapq.heappop(self._due)
        self.t = max(self.t, t)
        action()
        return True

    def _advance(self, seconds: float) -> None:
        end = self.t + seconds
        while self._next(end):
            pass
        self.t = max(self.t, end)

    def _settle(self) -> None:
        """Until nothing is at work any more."""
        limit = self.t + LONGEST_S
        while self._active or self._dark:
            if not self._next(limit):
                raise UnknownInput("a step does not come to an end")

    # -- Steps

    def _step(self, step: Json) -> None:
        self._steps += 1
        match step["do"]:
            case "enable":
                self._enable(step["type"], step.get("ota_config"))
            case "start":
                self._start_called = True
            case "mqtt_connect":
                self._connect()
            case "mqtt_disconnect":
                self._disconnect()
            case "message":
                self._message(step)
            case "advance":
                self._advance(step["seconds"])
            case "set_clock":
                self._wall = step["epoch"] - self.t
            case "at":
                self._at(self.t + step["seconds"], lambda: self._step(step["step"]))
                return
            case "api":
                self._spawn(self._api_step(step["call"]))
            case "reboot":
                raise Reboot("requested")
            case "power_cycle":
                raise Reboot("power_loss")
            case "work_queue_full":
                self._queue_full += step["count"]
            case "no_node_info":
                self._feed(NodeInfoChanged(None))
            case other:
                raise UnknownInput(f"step {other}")
        self._settle()

    def _enable(self, ota_type: str | int, config: Json | None) -> None:
        number = {"topics": OtaType.USING_TOPICS, "params": OtaType.USING_PARAMS}.get(str(ota_type), ota_type)
        given = None
        if config is not None:
            given = EnableConfig(
                has_ota_callback=bool(config.get("ota_cb")),
                has_diagnostics=bool(config.get("ota_diag")),
                server_cert=config.get("server_cert"),
                priv=config.get("priv"),
            )
        before = self._ota_config
        self._ota_config = config or {}
        call = next(self._calls)
        self._call_names[call] = "enable"
        self._feed(Enable(call, int(number), given))
        self._settle()
        if self._returned.get(call) == EspErr.OK:
            self._enabled = True
        else:
            self._ota_config = before

    def _connect(self) -> None:
        self._connect_again()
        self._settle()
        if self._start_called and not self._started:
            self._started = True
            if self._params.services:  # the recordings leave out what a node without any says before its start
                self._feed(ConfigReported())
            self._feed(Started())

    def _disconnect(self) -> None:
        self._connected = False
        self._unacknowledged += self._in_flight.items()
        self._in_flight = {}
        self._to_stream(lambda stream: stream.disconnected())
        self._feed(Disconnected())

    def _message(self, step: Json) -> None:
        topic = step["topic"]
        payload = bytes.fromhex(step["payload_hex"]) if "payload_hex" in step else step["payload"].encode()
        if self._connected and topic in self._subscriptions:
            self._feed(MessageReceived(topic, payload))
        else:
            self._record("undelivered", {"topic": topic})

    # -- The application

    def _spawn(self, task: Task) -> None:
        self._active += 1
        self._at(self.t, lambda: self._resume(task, None))

    def _resume(self, task: Task, value: int | None) -> None:
        try:
            asked = task.send(value)
        except StopIteration:
            self._active -= 1
            return
        if isinstance(asked, _Sleep):
            self._at(self.t + asked.seconds, lambda: self._resume(task, 0))
            return
        call = next(self._calls)
        self._call_names[call] = asked.api
        self._waiting[call] = task
        self._feed(asked.make(call))

    def _api(self, call: Json, own_handle: int | None) -> _Call:
        match call["name"]:
            case "fetch":
                return _Call("fetch", CallFetch)
            case "fetch_with_delay":
                return _Call("fetch_with_delay", lambda number: CallFetchWithDelay(number, call["seconds"]))
            case "mark_valid":
                return _Call("mark_valid", CallMarkValid)
            case "mark_invalid":
                return _Call("mark_invalid", CallMarkInvalid)
            case "enable_default":
                return _Call("enable_default", lambda number: Enable(number, OtaType.USING_TOPICS))
            case "report_status":
                which = call.get("handle")
                handle = {"last": self._handle, "own": own_handle}.get(str(which)) if which is not None else None
                return self._report(call, handle)
            case other:
                raise UnknownInput(f"api call {other}")

    def _report(self, report: Json, handle: int | None) -> _Call:
        status = report["status"]
        number = OtaStatus.__members__.get(status, 0) if isinstance(status, str) else int(status)
        return _Call("report_status", lambda call: CallReportStatus(call, handle, number, report.get("info")))

    def _api_step(self, call: Json) -> Task:
        yield self._api(call, None)

    def _actions(self, callback: Json, query: QueueCallback | None) -> Generator[_Sleep | _Call, int | None, str]:
        """An application callback's actions; returns what it returns."""
        last: int | None = EspErr.OK
        for action in callback.get("actions", []):
            if "wait_seconds" in action:
                yield _Sleep(action["wait_seconds"])
            if "report" in action:
                last = yield self._report(action["report"], None if query is None else query.handle)
            if "api" in action:
                last = yield self._api(action["api"], None if query is None else query.handle)
            if action.get("call_default") and query is not None:
                last = yield _Call("default_cb", partial(_default_callback, query))
        returned = callback.get("return", "ESP_OK")
        return esp_err_name(last or 0) if returned == "last" else str(returned)

    def _ota_callback(self, query: QueueCallback) -> Task:
        data = query.data
        fields = ("url", "stream_id", "filesize", "fw_version", "file_md5", "metadata", "server_cert", "priv")
        shown = {name: getattr(data, name) for name in (*fields, "ota_job_id")}
        self._record("callback", {"which": "ota_cb", **shown})
        returned = yield from self._actions(self._ota_config["ota_cb"], query)
        self._record("callback_return", {"which": "ota_cb", "ret": returned})
        self._feed(CallbackReturned(query.job))

    def _diag_callback(self, query: CallDiagnostics) -> Task:
        answer = self._ota_config["ota_diag"].get(query.state.name, "SUCCESS")
        if isinstance(answer, str):
            answer = {"return": answer}
        self._record(
            "callback",
            {
                "which": "ota_diag",
                "state": query.state.name,
                "rmaker_ota": query.rmaker_ota,
                "priv": self._ota_config.get("priv"),
            },
        )
        returned = yield from self._actions({"return": "SUCCESS", **answer}, None)
        self._record("callback_return", {"which": "ota_diag", "ret": returned})
        self._feed(DiagnosticsReturned(query.token, DiagStatus[returned]))

    # -- The workflow's driver, as its documentation has it

    def _feed(self, event: Input) -> None:
        if self._dark:
            return
        pending = deque(self._workflow.handle(event, self._now()))
        while pending and not self._dark:
            answer = self._perform(pending.popleft())
            if answer is not None:
                pending.extendleft(reversed(self._workflow.handle(answer, self._now())))

    def _perform(self, action: Action) -> Input | None:
        match action:
            case Publish():
                return self._publish(action)
            case Subscribe(topic, qos):
                self._subscribe(topic, qos)
            case Unsubscribe(topic):
                self._unsubscribe(topic)
            case FetchScheduled(seconds):
                self._record("timer", {"timer": "fetch_delay", "seconds": float(seconds)})
            case StartTimer(kind, seconds, repeat):
                self._start_timer(kind, seconds, repeat)
            case StopTimer(kind):
                self._timers.pop(kind, None)
            case StartAttempt():
                self._active += 1
                begin = self._attempt if action.stream_id is None else self._begin_stream
                self._at(self.t, lambda: begin(action))
            case AcceptHeader(attempt):
                self._platform.decide(attempt, True)
            case RefuseHeader(attempt):
                self._platform.decide(attempt, False)
            case QueueCallback():
                return self._queue(action)
            case CallDiagnostics():
                self._spawn(self._diag_callback(action))
            case ReportConfig():
                return ConfigReported()
            case StoreSet(key, value):
                self._nvs.setdefault(NAMESPACE, {})[key] = value
                if f"{NAMESPACE}/{key}" not in OWN_KEYS:
                    self._happened("stored")
            case StoreErase(key):
                self._nvs.setdefault(NAMESPACE, {}).pop(key, None)
                if f"{NAMESPACE}/{key}" not in OWN_KEYS:
                    self._happened("erased")
            case PostEvent(base, event, data):
                names = CommonEvent if base == COMMON_EVENT_BASE else OtaEvent
                self._record("event", {"base": base, "event": names(event).name, "data": data})
            case MarkValid(token):
                return TargetResult(token, self._platform.mark_valid())
            case MarkInvalid(token):
                return TargetResult(token, self._platform.mark_invalid())
            case Restart():
                raise Reboot("software")
            case ApiReturn(call, value):
                self._record("api_return", {"api": self._call_names[call], "ret": esp_err_name(value)})
                self._returned[call] = value
                task = self._waiting.pop(call, None)
                if task is not None:
                    self._at(self.t, lambda: self._resume(task, value))
            case Log():
                pass
        return None

    def _start_timer(self, kind: TimerKind, seconds: float, repeat: bool) -> None:
        number = next(self._order)
        self._timers[kind] = number
        if kind in TIMERS and kind != TimerKind.FETCH:
            self._record("timer", {"timer": TIMERS[kind], "seconds": float(seconds)})

        def fire() -> None:
            if self._timers.get(kind) != number:
                return
            if repeat:
                self._at(self.t + seconds, fire)
            else:
                del self._timers[kind]
            if kind in TIMERS:
                self._happened("timer_fired")
            self._feed(TimerFired(kind))

        self._at(self.t + seconds, fire)

    def _queue(self, query: QueueCallback) -> Input:
        if self._queue_full > 0:
            self._queue_full -= 1
            return CallbackQueued(query.job, False)
        self._handle = query.handle
        if not query.builtin:
            self._spawn(self._ota_callback(query))
        return CallbackQueued(query.job, True)

    # -- MQTT

    def _rule(self, rules: list[Json], topic: str) -> Json | None:
        for rule in rules:
            if topic.endswith(rule.get("topic_ends_with", "")) and rule.get("count", 1) > 0:
                if "count" in rule:
                    rule["count"] -= 1
                return rule
        return None

    def _subscribe(self, topic: str, qos: int) -> bool:
        accepted = self._rule(self._subscribe_rules, topic) is None
        if accepted:
            self._subscriptions.add(topic)
        self._record("subscribe", {"topic": topic, "qos": qos, "accepted": accepted})
        return accepted

    def _unsubscribe(self, topic: str, *, always: bool = True) -> bool:
        known = topic in self._subscriptions
        self._subscriptions.discard(topic)
        if known or always:
            self._record("unsubscribe", {"topic": topic})
        return known

    def _publish(self, action: Publish) -> Input:
        accepted, message = self._send(action.topic, action.payload, action.qos)
        return PublishResult(action.token, accepted, message)

    def _send(self, topic: str, payload: bytes, qos: int) -> tuple[bool, int | None]:
        """Whether a message was accepted, and its number."""
        rule = self._rule(self._publish_rules, topic) or {}
        how = rule.get("action", "ack")
        accepted = how != "fail"
        self._record("publish", {"topic": topic, "qos": qos, "payload": parse_payload(payload), "accepted": accepted})
        if not accepted:
            return False, None
        if self._stream is not None and topic.endswith("/get/cbor"):
            for delivery in self._stream_server.answer(payload):
                self._at(self.t + delivery.after, partial(self._deliver, topic, delivery))
        if how == "no_msg_id":
            return True, None
        self._messages += 1
        message = self._messages
        if how == "ack_before_return":
            self._feed(PubAck(message))
        elif how != "no_puback":
            self._acknowledge(message, rule.get("ms", 100) / 1000 if how == "delay" else ACK_S)
        return True, message

    def _acknowledge(self, message: int, seconds: float) -> None:
        """The acknowledgement arrives after so much time; when the connection is lost, so much after the next one."""
        if not self._connected:
            self._unacknowledged.append((message, seconds))
            return
        due = self.t + seconds

        def arrive() -> None:
            if message in self._in_flight and abs(due - self.t) < 1e-3:
                del self._in_flight[message]
                self._feed(PubAck(message))

        self._in_flight[message] = seconds
        self._at(due, arrive)

    # -- Downloads

    def _checksum(self, label: str | None, image: bytes) -> bytes | None:
        """The real MD5 behind a checksum of the trace, which is a mere label: that of the first file it came with."""
        if label is None or not _MD5.fullmatch(label):
            return None if label is None else b""
        digest = hashlib.md5(image, usedforsecurity=False).digest()
        return self._checksums.setdefault(label.lower(), digest)

    def _begin_stream(self, action: StartAttempt) -> None:
        services = StreamServices(
            self._inputs["node"]["node_id"],
            self._stream_world,
            self._stream_post,
            self._checksum,
            self._options.rollback_enable,
            lambda: self._dark,
            self._stream_server.image,
        )
        try:
            self._stream = self._platform.stream(action, self._section, services)
        except ValueError:
            self._active -= 1
            self._feed(AttemptFailed(action.attempt, Stage.BEGIN, answered=False))
            return
        self._to_stream(lambda stream: stream.start())

    def _to_stream(self, act: Callable[[Any], None]) -> None:
        if self._stream is not None and not self._dark:
            stream = self._stream
            act(stream)
            self._platform.pump(stream)

    def _stream_post(self, event: Any) -> None:
        """What a download over MQTT tells; the world is nowhere else meanwhile."""
        stream = self._stream
        if stream is not None:
            stream.before(event)
        if isinstance(event, AttemptFailed | AttemptFinished):
            self._stream = None
            self._active -= 1
        self._feed(event)
        if stream is not None:
            stream.after(event)
        if isinstance(event, AttemptProgress):
            self._happened("slot_write")
        elif isinstance(event, AttemptReceived):
            self._happened("image_check")

    def _deliver(self, get_topic: str, delivery: Delivery) -> None:
        topic = f"{get_topic.removesuffix('/get/cbor')}/{delivery.kind}/cbor"
        match delivery.kind:
            case "power":
                raise Reboot("power_loss")
            case "disconnect":
                self._disconnect()
                if delivery.back is not None:
                    self._at(self.t + delivery.back, self._connect_again)
            case _ if self._connected and topic in self._subscriptions:
                self._to_stream(lambda stream: stream.message(topic, delivery.payload))

    def _connect_again(self) -> None:
        self._connected = True
        waiting, self._unacknowledged = self._unacknowledged, []
        for message, seconds in waiting:
            self._acknowledge(message, seconds)
        self._feed(Connected())
        self._to_stream(lambda stream: stream.connected())

    def _attempt(self, action: StartAttempt) -> None:
        if self._attempting:
            raise AssertionError("two attempts at once")
        self._attempting = True
        steps = self._download(action)

        def go() -> None:
            try:
                wait = next(steps)
                while wait <= 0:
                    wait = next(steps)
            except StopIteration:
                self._active -= 1
                return
            except PowerCut:
                raise Reboot("power_loss") from None
            self._at(self.t + wait, go)

        go()

    def _download(self, action: StartAttempt) -> Generator[float, None, None]:
        verify = "certificate bundle" if action.server_cert is None else f"server_cert:{action.server_cert}"
        if action.server_cert == DEFAULT_SERVER_CERT:
            verify = "default certificate"

        def record(kind: str, data: Json) -> None:
            if kind == "http_response":
                self._happened(kind)  # what was answered shows in what is done with it
            else:
                self._record(kind, data)

        client = Client(self._server, record, verify=verify, allow_http=action.allow_http)

        def feed(event: Input) -> None:
            if isinstance(event, AttemptFailed | AttemptFinished):
                self.notes.update(client.peculiarities)
                self._attempting = False
            self._feed(event)
            if isinstance(event, AttemptProgress):
                self._happened("slot_write")
            elif isinstance(event, AttemptReceived):
                self._happened("image_check")

        yield from self._platform.attempt(
            action,
            Services(
                client,
                feed,
                self._checksum,
                self._options.http_rx_buffer_size or 1024,
                self._options.rollback_enable,
                lambda: self._dark,
            ),
        )
