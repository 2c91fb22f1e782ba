"""Drives a `Workflow` as its documentation says, and keeps what it did: for tests of the rules alone."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rmaker_ota.rainmaker.params import Params
from rmaker_ota.rainmaker.types import OtaData, OtaType
from rmaker_ota.rainmaker.workflow import (
    Action,
    ApiReturn,
    BootFacts,
    CallbackQueued,
    ConfigReported,
    Connected,
    Disconnected,
    Enable,
    EnableConfig,
    Input,
    MarkInvalid,
    MarkValid,
    MessageReceived,
    NodeInfo,
    Now,
    OtaOptions,
    PostEvent,
    PubAck,
    Publish,
    PublishResult,
    QueueCallback,
    ReportConfig,
    Restart,
    StartAttempt,
    Started,
    StartTimer,
    StopTimer,
    StoredValue,
    StoreErase,
    StoreSet,
    TargetResult,
    TimerFired,
    TimerKind,
    Workflow,
)
from rmaker_ota.targets.base import BootState

NODE = NodeInfo("N1", "1.0.0")
URL_TOPIC = "node/N1/otaurl"
MD5 = "d41d8cd98f00b204e9800998ecf8427e"
IMAGE_SIZE = 100_000
VERSIONS = {"ota_0": "1.0.0", "ota_1": "2.0.0"}  # of the chip's two slots
REMOTE = "node/N1/params/remote"
LOCAL = "$aws/rules/esp_set_params/node/N1/params/local"
INIT = "$aws/rules/esp_init_params/node/N1/params/local/init"
T = TypeVar("T")


def chip(running: str, state: BootState | None, version: str | None = None) -> BootFacts:
    """A chip with two slots, one of which runs; ``version`` None: what that slot has in `VERSIONS`."""
    (other,) = VERSIONS.keys() - {running}
    return BootFacts(running, state, other, "gw", version or VERSIONS[running])


BOOT = chip("ota_0", BootState.VALID)
PENDING = chip("ota_1", BootState.PENDING_VERIFY)


@dataclass
class Driver:
    """One boot. ``accept`` and ``target_error`` are how publishing and the boot layer answer."""

    options: OtaOptions = field(default_factory=OtaOptions)
    boot: BootFacts = BOOT
    stored: dict[str, StoredValue] | None = field(default_factory=dict)
    node: NodeInfo | None = NODE
    accept: bool = True
    message_ids: bool = True
    target_error: int = 0
    queue_full: bool = False
    unix: float = 1_800_000_000.0
    monotonic: float = 0.0
    minute: int = 720
    done: list[Action] = field(default_factory=list)
    timers: dict[TimerKind, StartTimer] = field(default_factory=dict)
    due: dict[TimerKind, float] = field(default_factory=dict)
    unacknowledged: list[int] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)
    dead: bool = False
    check: Callable[[Action], None] = lambda action: None
    params: Params = field(default_factory=Params)

    def __post_init__(self) -> None:
        self.workflow = Workflow(self.options, self.node, self.boot, self.stored, self.params)
        self.calls = itertools.count(1)
        self.ids = itertools.count(1)

    def feed(self, event: Input) -> list[Action]:
        """Hands one input in and performs what comes of it; returns it."""
        before = len(self.done)
        pending = deque(self.workflow.handle(event, self.now))
        while pending:
            action = pending.popleft()
            self.done.append(action)
            answer = self._perform(action)
            self.check(action)
            if answer is not None:
                pending.extendleft(reversed(self.workflow.handle(answer, self.now)))
        return self.done[before:]

    @property
    def now(self) -> Now:
        return Now(self.unix + self.monotonic, self.monotonic, self.minute)

    def _perform(self, action: Action) -> Input | None:
        assert not self.dead, f"{action} after the restart"
        match action:
            case Publish(token):
                if not self.accept:
                    return PublishResult(token, False)
                self.accepted.add(token)
                if not self.message_ids:
                    return PublishResult(token, True)
                number = next(self.ids)
                self.unacknowledged.append(number)
                return PublishResult(token, True, number)
            case MarkValid(token) | MarkInvalid(token):
                return TargetResult(token, self.target_error)
            case QueueCallback(job):
                return CallbackQueued(job, not self.queue_full)
            case ReportConfig():
                return ConfigReported()
            case StartTimer(kind, seconds):
                self.timers[kind] = action
                self.due[kind] = self.monotonic + seconds
            case StopTimer(kind):
                self.timers.pop(kind, None)
            case StoreSet(key, value):
                assert self.stored is not None
                self.stored[key] = value
            case StoreErase(key):
                assert self.stored is not None
                del self.stored[key]  # only what is there is erased
            case Restart():
                self.dead = True
        return None

    # -- What tests say

    def enable(self, ota_type: OtaType = OtaType.USING_TOPICS, **config: Any) -> list[Action]:
        given = EnableConfig(**config) if config else None
        return self.feed(Enable(next(self.calls), ota_type, given))

    def start(self, **config: Any) -> list[Action]:
        """Enabled, connected, started."""
        before = len(self.done)
        self.enable(**config)
        self.feed(Connected())
        self.feed(Started())
        return self.done[before:]

    def start_params(self, **config: Any) -> list[Action]:
        """The same in the params workflow, without the actions of enabling."""
        self.enable(OtaType.USING_PARAMS, **config)
        return self.come_up()

    def come_up(self) -> list[Action]:
        """Connected, configuration reported, started."""
        before = len(self.done)
        for event in (Connected(), ConfigReported(), Started()):
            self.feed(event)
        return self.done[before:]

    def write(self, values: object, topic: str = REMOTE) -> list[Action]:
        """A ``params/remote`` message."""
        return self.feed(MessageReceived(topic, values if isinstance(values, bytes) else json.dumps(values).encode()))

    def url(self, url: str = "https://x/fw.bin") -> list[Action]:
        return self.write({"OTA": {"URL": url}})

    def acknowledge(self) -> list[Action]:
        """Everything that waits for it."""
        numbers, self.unacknowledged = self.unacknowledged, []
        return [action for number in numbers for action in self.feed(PubAck(number))]

    def call(self, make: Callable[..., Input], *arguments: object) -> int | None:
        """Makes an API call; what it returned, or None while it goes on."""
        number = next(self.calls)
        actions = self.feed(make(number, *arguments))
        returned = [action.value for action in actions if isinstance(action, ApiReturn) and action.call == number]
        assert len(returned) <= 1
        return returned[0] if returned else None

    def job(self, job_id: str = "J1", **fields: Any) -> list[Action]:
        message = {"ota_job_id": job_id, "url": "https://x/fw.bin", "file_size": IMAGE_SIZE, **fields}
        return self.feed(MessageReceived(URL_TOPIC, json.dumps(message).encode()))

    def fire(self, kind: TimerKind) -> list[Action]:
        """Lets a running timer fire at its time."""
        timer = self.timers[kind]
        self.monotonic = max(self.monotonic, self.due[kind])
        if timer.repeat:
            self.due[kind] = self.monotonic + timer.seconds
        else:
            del self.timers[kind]
        return self.feed(TimerFired(kind))

    def away(self, seconds: float) -> None:
        self.feed(Disconnected())
        self.monotonic += seconds
        self.feed(Connected())

    @property
    def attempt(self) -> StartAttempt:
        return of(self.done, StartAttempt)[-1]


def of(actions: list[Action], kind: type[T]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def reports(actions: list[Action]) -> list[tuple[str, str]]:
    """Status and text of every ``otastatus`` message."""
    found = [json.loads(action.payload) for action in of(actions, Publish) if action.topic.endswith("/otastatus")]
    return [(one["status"], one["additional_info"]) for one in found]


def said(actions: list[Action], topic: str = LOCAL) -> list[dict[str, Any]]:
    """Every report of parameters on a topic."""
    return [json.loads(action.payload) for action in of(actions, Publish) if action.topic == topic]


def fetches(actions: list[Action]) -> int:
    return sum(action.topic.endswith("/otafetch") for action in of(actions, Publish))


def events(actions: list[Action]) -> list[tuple[int, object]]:
    return [(action.event, action.data) for action in of(actions, PostEvent)]


def data_of(actions: list[Action]) -> OtaData:
    return of(actions, QueueCallback)[-1].data
