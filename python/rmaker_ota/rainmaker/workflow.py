"""The OTA job as a state machine: events in, actions out. No clock, no socket, no thread, no file.

What it decides: when to fetch, whether a job is taken, the built-in job handler with its attempts, what is
reported under which job id, what is stored, confirmation and rollback of a new image. What it leaves to others:
the MQTT session and its publish budget (an exhausted budget is a refused publish), timers, the store, the download
and the installation, threads.

How it is run
    ``handle(event, now)`` returns a list of actions. They are performed in order, and an action that is a question
    (`Publish`, `MarkValid`, `MarkInvalid`, `QueueCallback`) is answered with the matching input *before* the next
    action of the list is performed::

        def feed(event):
            pending = deque(workflow.handle(event, now()))
            while pending:
                answer = perform(pending.popleft())          # an input, or None
                if answer is not None:
                    pending.extendleft(reversed(workflow.handle(answer, now())))

    One thread at a time calls ``handle``. Application callbacks run elsewhere and hand their API calls in as
    inputs; each call carries a number chosen by the caller and is answered by one `ApiReturn` with that number -
    at once for most, after the whole download for `CallDefaultCallback`. `Enable` and `CallMarkValid` may be
    answered after a diagnostics callback.

    After `Restart` the machine is dead: it ignores everything. A new one is made for the next boot.

Every deviation from the reference firmware carries its Q number (specification, section 10).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from rmaker_ota.rainmaker.types import DiagState, DiagStatus, OtaData
from rmaker_ota.targets.base import BootState

StoredValue = bytes | str | int


# ---- What is known from the start --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OtaOptions:
    """Options of specification section 7 that concern the rules; the names are those of the configuration file.

    Raises:
        ValueError: a number is outside its range; the message names option, value and range.
    """

    ota_autofetch: bool = True
    ota_autofetch_period_hours: int = 0
    ota_skip_common_name_check: bool = False
    ota_skip_version_check: bool = False
    ota_skip_secure_version_check: bool = False
    ota_skip_project_name_check: bool = False
    ota_rollback_wait_period_s: int = 90
    ota_rollback_report_failed: bool = False
    ota_test_rollback: bool = False
    ota_test_rollback_count: int = 100
    ota_disable_auto_reboot: bool = False
    ota_time_support: bool = True
    ota_progress_support: bool = False
    ota_progress_interval_pct: int = 10
    ota_max_retries: int = 3
    ota_retry_delay_minutes: int = 5
    http_ota_resumption: bool = True
    http_rx_buffer_size: int = 1024
    ota_transport: str = "https"
    use_cert_bundle: bool = True
    rollback_enable: bool = True
    mqtt_use_basic_ingest: bool = True
    # Additions of this project.
    allow_http: bool = False  # Q19
    fetch_after_reconnect: bool = True  # Q17
    report_attempt_failures: bool = True  # Q31; False: they go out as in-progress, and one final `failed`
    strict: bool = False  # do exactly what the reference does where an addition could be seen (Q17)

    def __post_init__(self) -> None:
        for name, (low, high) in OPTION_RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")
        if self.ota_transport not in ("https", "mqtt"):
            raise ValueError(f'ota_transport is "{self.ota_transport}", expected "https" or "mqtt"')


# Bounds of the numbers, both included.
OPTION_RANGES: dict[str, tuple[int, int]] = {
    "ota_autofetch_period_hours": (0, 168),
    "ota_rollback_wait_period_s": (30, 600),
    "ota_test_rollback_count": (0, 100_000),
    "ota_progress_interval_pct": (5, 50),
    "ota_max_retries": (1, 10),
    "ota_retry_delay_minutes": (1, 60),
    "http_rx_buffer_size": (512, 65_535),
}


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Who reports: ``fw_version`` is the node information's version, by default that of the running app."""

    node_id: str
    fw_version: str
    network_id: str | None = None


@dataclass(frozen=True, slots=True)
class BootFacts:
    """What the target says at start-up. ``boot_state`` None: not readable (factory slot, no otadata, no such
    notion)."""

    running_slot: str | None
    boot_state: BootState | None
    project_name: str = ""
    version: str = ""
    secure_version: int = 0  # the smallest one the target accepts (eFuse)


@dataclass(frozen=True, slots=True)
class Now:
    """The moment an input is handled at. ``unix`` and ``monotonic`` in seconds; ``local_minute``: minutes since local
    midnight in the node's time zone, daylight saving included (0 to 1439)."""

    unix: float
    monotonic: float
    local_minute: int


@dataclass(frozen=True, slots=True)
class EnableConfig:
    """``esp_rmaker_ota_config_t``: whether there are callbacks; they themselves stay with the runtime."""

    has_ota_callback: bool = False
    has_diagnostics: bool = False
    server_cert: str | None = None
    priv: object = None


# ---- Inputs ------------------------------------------------------------------------------------------------


class Stage(enum.StrEnum):
    """Where an attempt failed; decides the text of the report (specification, section 4.2)."""

    BEGIN = "begin"  # no usable answer of the server
    DESCRIPTION = "description"  # app descriptor unreadable
    TRANSFER = "transfer"  # reading, writing, erasing
    INCOMPLETE = "incomplete"  # ended without error, but not everything announced has arrived
    VALIDATE = "validate"  # the complete image is not what it should be
    FINISH = "finish"  # the slot could not be made bootable
    CHIP = "chip"  # made for another chip or chip revision: rejected


class TimerKind(enum.StrEnum):
    """The machine's timers; at most one of each kind runs."""

    FETCH = "fetch"
    FETCH_PUBACK = "fetch-puback"
    AUTOFETCH = "autofetch"
    ROLLBACK = "rollback"
    REBOOT = "reboot"
    RESEND = "resend"


@dataclass(frozen=True, slots=True)
class Connected:
    """The MQTT session is up; subscriptions were restored. Comes before `Started` on the first connection."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The MQTT session is down."""


@dataclass(frozen=True, slots=True)
class Started:
    """The node reported its configuration and is started (RMAKER_EVENT/STARTED); once per boot, after `Connected`."""


@dataclass(frozen=True, slots=True)
class NodeInfoChanged:
    """The node information is another one from now on, or missing (None)."""

    node: NodeInfo | None


@dataclass(frozen=True, slots=True)
class MessageReceived:
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class PublishResult:
    """Answer to `Publish`. ``accepted``: sent or queued; refused also when the publish budget is used up.

    ``message_id`` None: accepted, but there is no way to learn of its acknowledgement.
    """

    token: int
    accepted: bool
    message_id: int | None = None


@dataclass(frozen=True, slots=True)
class PubAck:
    """A message published with QoS 1 was acknowledged; may come before its `PublishResult` (Q42)."""

    message_id: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    kind: TimerKind


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where to go on: ``offset`` bytes of the image are durable in the slot; ``entity_tag`` as HTTP gave it, or
    empty."""

    offset: int
    entity_tag: str = ""


@dataclass(frozen=True, slots=True)
class ImageDescription:
    """App descriptor of the offered image; strings end at their first NUL (Q37)."""

    project_name: str
    version: str
    secure_version: int = 0


@dataclass(frozen=True, slots=True)
class AttemptHeader:
    """The app descriptor was read; nothing is written before `AcceptHeader`. ``offset``: where the data really begins
    (0: from the start, also when a resume was asked for). ``slot``: name of the slot being written."""

    attempt: int
    description: ImageDescription
    offset: int = 0
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptCheckpoint:
    """So many bytes are durable in the slot."""

    attempt: int
    point: ResumePoint


@dataclass(frozen=True, slots=True)
class AttemptProgress:
    """Image position reached, offset of a resumed download included, in bytes."""

    attempt: int
    bytes_done: int


@dataclass(frozen=True, slots=True)
class AttemptReceived:
    """The whole body has arrived; nothing is known yet of its soundness."""

    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """Verified, and the next boot will be the new image. ``slot`` and ``version`` name it."""

    attempt: int
    slot: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """``esp_err`` and ``errno`` (0: none) go into the report; ``answered``: the HTTP server had sent a response.

    After `RefuseHeader` the attempt ends with `AttemptFailed` too, whatever the stage; it is ignored then.
    """

    attempt: int
    stage: Stage
    esp_err: int = -1
    errno: int = 0
    answered: bool = True


@dataclass(frozen=True, slots=True)
class CallbackQueued:
    """Answer to `QueueCallback`: whether the worker took it."""

    job: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class CallbackReturned:
    """The application's job callback is over; its value is ignored. ``error``: it raised, and the sentence is
    reported."""

    job: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DiagnosticsReturned:
    """Answer to `CallDiagnostics`, later. An exception counts as FAIL."""

    token: int
    status: DiagStatus


@dataclass(frozen=True, slots=True)
class TargetResult:
    """Answer to `MarkValid` and `MarkInvalid`: 0 or the boot layer's error."""

    token: int
    esp_err: int


@dataclass(frozen=True, slots=True)
class Enable:
    """``esp_rmaker_ota_enable(config, type)``; ``config`` None: all defaults."""

    call: int
    type: int
    config: EnableConfig | None = None


@dataclass(frozen=True, slots=True)
class CallFetch:
    call: int


@dataclass(frozen=True, slots=True)
class CallFetchWithDelay:
    call: int
    seconds: int


@dataclass(frozen=True, slots=True)
class CallReportStatus:
    """``handle`` None: C's NULL; ``info`` None counts as empty (Q5)."""

    call: int
    handle: int | None
    status: int
    info: str | None


@dataclass(frozen=True, slots=True)
class CallDefaultCallback:
    """``esp_rmaker_ota_default_cb``/``https_cb``: answered when the job is over. Meant to be called inside a
    callback."""

    call: int
    handle: int | None
    data: OtaData


@dataclass(frozen=True, slots=True)
class CallMarkValid:
    call: int


@dataclass(frozen=True, slots=True)
class CallMarkInvalid:
    call: int


Input = (
    Connected
    | Disconnected
    | Started
    | NodeInfoChanged
    | MessageReceived
    | PublishResult
    | PubAck
    | TimerFired
    | AttemptHeader
    | AttemptCheckpoint
    | AttemptProgress
    | AttemptReceived
    | AttemptFinished
    | AttemptFailed
    | CallbackQueued
    | CallbackReturned
    | DiagnosticsReturned
    | TargetResult
    | Enable
    | CallFetch
    | CallFetchWithDelay
    | CallReportStatus
    | CallDefaultCallback
    | CallMarkValid
    | CallMarkInvalid
)


# ---- Actions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Publish:
    """Question, answered with `PublishResult`. QoS 1, not retained."""

    token: int
    topic: str
    payload: bytes
    qos: int = 1


@dataclass(frozen=True, slots=True)
class Subscribe:
    topic: str
    qos: int = 1


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    topic: str


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Starts, or starts again, the timer of that kind. ``repeat``: fires every ``seconds`` until stopped."""

    kind: TimerKind
    seconds: float
    repeat: bool = False


@dataclass(frozen=True, slots=True)
class StopTimer:
    kind: TimerKind


@dataclass(frozen=True, slots=True)
class FetchScheduled:
    """A fetch was asked for in so many seconds. For display and tests: the timer is started by `StartTimer`, which does
    not follow when one is due earlier (``effective`` False, Q7)."""

    seconds: float
    effective: bool


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Download and install into the slot that is not running; one attempt runs at a time.

    The header gate is fed with the first ``header_size`` bytes; a shorter file fails at `Stage.DESCRIPTION`.
    ``resume`` None: from the start; else ask the server to continue there. ``md5`` is the announced text (32 hex
    digits in either case, or not an MD5 at all, which then can never match), ``size`` the announced bytes, 0 =
    unknown; both are checked after the download (Q22). ``server_cert``: the only PEM to trust; None: the system's
    certificates. ``keep_position``: send `AttemptCheckpoint`.
    """

    attempt: int
    number: int
    url: str
    resume: ResumePoint | None
    md5: str | None
    size: int
    header_size: int
    server_cert: str | None
    keep_position: bool
    allow_http: bool = False
    skip_common_name_check: bool = False


@dataclass(frozen=True, slots=True)
class AcceptHeader:
    attempt: int


@dataclass(frozen=True, slots=True)
class RefuseHeader:
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class QueueCallback:
    """Question, answered with `CallbackQueued`: run the application's job callback on the worker."""

    job: int
    handle: int
    data: OtaData


@dataclass(frozen=True, slots=True)
class CallDiagnostics:
    """Ask the application; answered with `DiagnosticsReturned` whenever it is done."""

    token: int
    state: DiagState
    rmaker_ota: bool


@dataclass(frozen=True, slots=True)
class StoreSet:
    """Durable before the next action is performed. Namespace ``rmaker_ota``."""

    key: str
    value: StoredValue


@dataclass(frozen=True, slots=True)
class StoreErase:
    key: str


@dataclass(frozen=True, slots=True)
class PostEvent:
    base: str
    event: int
    data: str | int | None = None


@dataclass(frozen=True, slots=True)
class MarkValid:
    """Question, answered with `TargetResult`: confirm the running image."""

    token: int


@dataclass(frozen=True, slots=True)
class MarkInvalid:
    """Question, answered with `TargetResult`: make the next restart roll back."""

    token: int


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart the node now. Nothing follows."""

    reason: str


@dataclass(frozen=True, slots=True)
class ApiReturn:
    """The call with that number is over: ``value`` is its ``esp_err_t``."""

    call: int
    value: int


@dataclass(frozen=True, slots=True)
class Log:
    """``level`` as in `logging`: 10 debug, 20 info, 30 warning, 40 error."""

    level: int
    message: str


Action = (
    Publish
    | Subscribe
    | Unsubscribe
    | StartTimer
    | StopTimer
    | FetchScheduled
    | StartAttempt
    | AcceptHeader
    | RefuseHeader
    | QueueCallback
    | CallDiagnostics
    | StoreSet
    | StoreErase
    | PostEvent
    | MarkValid
    | MarkInvalid
    | Restart
    | ApiReturn
    | Log
)


class Workflow:
    """The rules for one boot of one node.

    Args:
        options: see `OtaOptions`.
        node: the node information; None while it is missing.
        boot: what the target says at start-up.
        stored: the store's namespace ``rmaker_ota`` as it is now; None when it cannot be opened.
    """

    def __init__(
        self,
        options: OtaOptions,
        node: NodeInfo | None,
        boot: BootFacts,
        stored: Mapping[str, StoredValue] | None,
    ) -> None:
        self._options = options
        self._node = node
        self._boot = boot
        self._stored: dict[str, StoredValue] | None = None if stored is None else dict(stored)

    def handle(self, event: Input, now: Now) -> list[Action]:
        """Takes one input and says what to do, in order."""
        raise NotImplementedError
