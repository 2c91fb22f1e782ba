"""The OTA job as a state machine: events in, actions out. No clock, no socket, no thread, no file.

What it decides: when to fetch, whether a job is taken, the built-in job handler with its attempts, what is
reported under which job id, what is stored, confirmation and rollback of a new image, and when parameters are reported
and written; one of their services brings and reports the jobs of the params workflow. What it leaves to others:
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
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence

from rmaker_ota.errors import ArgumentError
from rmaker_ota.esp_err import EspErr, esp_err_name
from rmaker_ota.rainmaker.default_cert import DEFAULT_SERVER_CERT
from rmaker_ota.rainmaker.messages import (
    MAX_INFO,
    Job,
    JobError,
    Topics,
    fetch_payload,
    params_payload,
    parse_otaurl,
    parse_time_limits,
    status_payload,
    valid_group_id,
)
from rmaker_ota.rainmaker.params import Param, Params, Value, Write, ota_service
from rmaker_ota.rainmaker.types import (
    COMMON_EVENT_BASE,
    OTA_EVENT_BASE,
    CommonEvent,
    DiagState,
    DiagStatus,
    OtaData,
    OtaEvent,
    OtaStatus,
    OtaType,
    status_event,
    status_text,
)
from rmaker_ota.records import dataclass
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
    http_rx_buffer_size: int | None = None  # bytes; None: what serves best; the firmware has 1024
    ota_transport: str = "https"
    use_cert_bundle: bool = True
    rollback_enable: bool = True
    mqtt_use_basic_ingest: bool = True
    # Additions of this project.
    allow_http: bool = False  # Q19
    fetch_after_reconnect: bool = True  # Q17
    report_attempt_failures: bool = True  # Q31; False: they go out as in-progress, and one final `failed`
    strict: bool = False  # do exactly what the reference does where an addition could be seen (Q17, refused params)
    type: str = "topics"  # where jobs come from; "both": each workflow may be enabled once, beside the other

    def __post_init__(self) -> None:
        for name, (low, high) in OPTION_RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")
        if self.ota_transport not in ("https", "mqtt"):
            raise ValueError(f'ota_transport is "{self.ota_transport}", expected "https" or "mqtt"')
        if self.type not in ("topics", "params", "both"):
            raise ValueError(f'type is "{self.type}", expected "topics", "params" or "both"')


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
    next_slot: str | None = None  # where an update goes; None: not known
    project_name: str = ""
    version: str = ""
    secure_version: int = 0  # the smallest one the target accepts (eFuse)


@dataclass(frozen=True, slots=True)
class Now:
    """The moment an input is handled at. ``unix`` and ``monotonic`` in seconds; ``local_minute``: minutes since local
    midnight in the node's time zone, daylight saving included (0 to 1439). ``minute_at``: the same for any other moment
    in Unix seconds; None: it is taken that no clock is put forward or back."""

    unix: float
    monotonic: float
    local_minute: int
    minute_at: Callable[[float], int] | None = None


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

    OFFLINE = "offline"  # over MQTT: no connection in time
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
    REPORT_PARAMS = "report-params"


@dataclass(frozen=True, slots=True)
class Connected:
    """The MQTT session is up; subscriptions were restored. Comes before `Started` on the first connection."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The MQTT session is down."""


@dataclass(frozen=True, slots=True)
class ConfigReported:
    """The node configuration was published: before `Started`, and whenever `ReportConfig` asked for it."""


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
    """Where to go on: ``offset`` bytes of the image are durable in the slot, their digest is ``sha256`` (32 bytes);
    ``entity_tag`` as HTTP gave it, or empty."""

    offset: int
    sha256: bytes = b""
    entity_tag: str = ""


@dataclass(frozen=True, slots=True)
class ImageDescription:
    """App descriptor of the offered image; strings end at their first NUL (Q37)."""

    project_name: str
    version: str
    secure_version: int = 0


@dataclass(frozen=True, slots=True)
class AttemptHeader:
    """The app descriptor was read (None: the target's images have none); nothing is written before `AcceptHeader`.
    ``offset``: where the data really begins (0: from the start, also when a resume was asked for). ``slot``: name
    of the slot being written."""

    attempt: int
    description: ImageDescription | None
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
    """The whole body has arrived, ``bytes_done`` with what a resume took over; nothing is known yet of its
    soundness."""

    attempt: int
    bytes_done: int = 0


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """Verified, and the next boot will be the new image. ``slot`` and ``version`` name it."""

    attempt: int
    slot: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The attempt is over. ``esp_err`` and ``errno`` (0: none) go into the report; ``answered``: the server had sent a
    response. A refused attempt (`RefuseHeader`) ends with this too, whatever the stage.
    """

    attempt: int
    stage: Stage
    esp_err: int = -1
    errno: int = 0
    answered: bool = True
    said: str = ""  # by the server, for the report (Q41)


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
    """``esp_rmaker_ota_default_cb``, ``https_cb``, ``mqtt_cb``: answered when the job is over. Meant to be called
    inside a callback. ``transport`` None: the configured one."""

    call: int
    handle: int | None
    data: OtaData
    transport: str | None = None


@dataclass(frozen=True, slots=True)
class CallMarkValid:
    call: int


@dataclass(frozen=True, slots=True)
class CallMarkInvalid:
    call: int


@dataclass(frozen=True, slots=True)
class CallReportParams:
    """Report every parameter that was updated since its last report; without effect before `Started`."""

    call: int


Input = (
    Connected
    | Disconnected
    | ConfigReported
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
    | CallReportParams
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
    ``stream_id`` None: over HTTPS, from ``url``; else over MQTT. ``resume`` None: from the start; else ask the server
    to continue there. ``md5`` is the announced text (32 hex digits in either case, or not an MD5 at all, which then can
    never match), ``size`` the announced bytes, 0 = unknown; both are checked after the download (Q22). ``server_cert``:
    the only PEM to trust; None: the system's certificates. ``keep_position``: send `AttemptCheckpoint`.
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
    stream_id: str | None = None


@dataclass(frozen=True, slots=True)
class AcceptHeader:
    attempt: int


@dataclass(frozen=True, slots=True)
class RefuseHeader:
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class QueueCallback:
    """Question, answered with `CallbackQueued`: run the application's job callback on the worker.

    ``builtin``: there is no such callback; the machine handles the job itself once it is told that the job may begin.
    ``type``: the workflow the job came by.
    """

    job: int
    handle: int
    data: OtaData
    builtin: bool = False
    type: OtaType = OtaType.USING_TOPICS


@dataclass(frozen=True, slots=True)
class WriteParams:
    """Call the device's write callback with each of the values."""

    write: Write


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """Question, answered with `ConfigReported` if it works: publish the node configuration, which has changed."""


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
    | WriteParams
    | ReportConfig
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


# ---- The rules ------------------------------------------------------------------------------------------------

# Names in the store (specification, section 6.2) ...
KEY_JOB_ID = "rmaker_ota_id"  # blob: id of the last job taken
KEY_UPDATE = "ota_update"  # blob 01: an image was installed and is not yet confirmed
KEY_FAIL_REASON = "ota_fail_rsn"
KEY_FAIL_JOB_ID = "ota_fail_jid"
KEY_WRITTEN = "ota_written"  # integer: bytes durable in the slot (the firmware stores KiB)
KEY_MD5 = "ota_file_md5"
KEY_STREAM_OFFSET = "mqtt_ota_off"  # integer: bytes durable in the slot (the firmware stores blocks, Q27)
KEY_STREAM_MD5 = "mqtt_ota_md5"
KEY_TEST_COUNT = "ota_test_cnt"
KEY_TEST_JOB_ID = "ota_test_jid"
# ... and those of this project.
KEY_POSITION = "ota_position"  # str, JSON: what the offset belongs to: slot, size, digest, entity tag (Q24)
KEY_TARGET = "ota_target"  # str, JSON: slot and version that were installed (Q35)
KEY_RESULT = "ota_result"  # str, JSON: final reports that were not acknowledged yet (Q16)
KEY_PARAMS_RESULT = "ota_params_result"  # str, JSON: the same of the params workflow, which has one at a time
KEY_GROUP_ID = "group_id"  # str: of the service `Groups`

FETCH_DELAY_S = 5
FETCH_PUBACK_S = 60
FETCH_RETRY_S = 30
FETCH_RETRY_STEPS = 5
REBOOT_DELAY_S = 10
CLOCK_UNSET = 1546300800  # 2019-01-01: a clock not beyond it was never set
CLOCK_RETRY_S = 30
WINDOW_BUFFER_S = 5
RECONNECT_FETCH_S = 60  # Q17: an absence longer than this is followed by a fetch
HEADER_SIZE = 1024  # bytes a file must have at least; positions below it count as none
STREAM_HEADER_SIZE = 288  # the same over MQTT: image header, segment header, app descriptor
MISSING_STREAM = "Missing stream_id or filesize for MQTT OTA"
MAX_STORED_JOB_ID = 64  # bytes a stored job id can have to be read back
MAX_RESULTS = 8
_HEX = re.compile(r"([0-9a-f]{2})*")
MAX_ERR_DESC = 127
MAX_ATTEMPT_INFO = 191

SUCCESS_INFO = "OTA Upgrade finished and verified successfully"
ROLLED_BACK_INFO = "Firmware rolled back"
UNDECIDED_INFO = "Diagnostics failed and there is no image to roll back to"
MAX_LOGGED = 8  # refusals of one message


class _Busy(enum.Enum):
    """Why no job is taken."""

    JOB = "a job is running"
    VERIFY = "the running image is not confirmed"
    RESTART = "a new image waits for the restart"  # Q14


@dataclass(slots=True)
class _Result:
    """A final report on its way; kept in the store until it is acknowledged (Q16)."""

    job_id: str
    status: int
    info: str
    reported: bool = False  # published, or tried to, and its event posted
    token: int | None = None
    message_id: int | None = None
    tried: bool = False  # in this boot; it was refused if it is idle

    @property
    def idle(self) -> bool:
        return self.token is None and self.message_id is None


@dataclass(slots=True)
class _Run:
    """The built-in handler at work on one job. ``call`` None: not called by an application callback."""

    call: int | None
    data: OtaData
    transport: str
    number: int = 0  # of the attempt: 1, 2, ...
    attempt: int = 0  # its id
    resume: ResumePoint | None = None
    keep_position: bool = False
    accepted: bool = False
    refused: bool = False
    percent: int = 0

    @property
    def over_mqtt(self) -> bool:
        return self.transport == "mqtt"

    @property
    def label(self) -> str:
        """Of the transport, in reports."""
        return self.transport.upper()

    @property
    def header_size(self) -> int:
        return STREAM_HEADER_SIZE if self.over_mqtt else HEADER_SIZE

    @property
    def position_keys(self) -> tuple[str, str]:
        """Where offset and MD5 of a download that was cut off are kept."""
        return (KEY_STREAM_OFFSET, KEY_STREAM_MD5) if self.over_mqtt else (KEY_WRITTEN, KEY_MD5)


class Workflow:
    """The rules for one boot of one node.

    Args:
        options: see `OtaOptions`.
        node: the node information; None while it is missing.
        boot: what the target says at start-up.
        stored: the store's namespace ``rmaker_ota`` as it is now; None when it cannot be opened.
        params: devices and services of the node.
    """

    def __init__(
        self,
        options: OtaOptions,
        node: NodeInfo | None,
        boot: BootFacts,
        stored: Mapping[str, StoredValue] | None,
        params: Params | None = None,
    ) -> None:
        self._options = options
        self._node = node
        self._identity = node  # the last one that was there: topics and reports do not need the node information
        self._boot = boot
        self._boot_state = boot.boot_state
        self._stored: dict[str, StoredValue] | None = None if stored is None else dict(stored)
        self._out: list[Action] = []
        self._now = Now(0, 0, 0)
        self._dead = False
        self._numbers = 0
        self._published: dict[int, Callable[[PublishResult], None]] = {}
        self._asked: dict[int, Callable[[int], None]] = {}
        self._early_acks: set[int] = set()

        self._connected = False
        self._disconnected_at: float | None = None
        self._started = False
        self._start_done = False
        self._enabled: dict[OtaType, EnableConfig] = {}
        self._enable_call: int | None = None
        self._via = OtaType.USING_TOPICS  # the workflow of the job at hand or, without one, of the last one

        self._params = params or Params()
        self._ota_service = ota_service()
        self._group_id: str | None = None  # its topic is subscribed; None: the node's own is not yet either
        self._init_waits = False  # the initial report was refused
        self._params_message: int | None = None  # the report that carries `KEY_PARAMS_RESULT` waits to be acknowledged
        self._refused_params = 0

        self._busy: _Busy | None = None
        self._job: Job | None = None
        self._job_data = OtaData(None)
        self._job_number = 0
        self._callback_running = False
        self._run: _Run | None = None
        self._other_job_waits = False  # Q13
        self._restart_due = False

        self._fetch_due: float | None = None
        self._fetch_token: int | None = None
        self._fetch_message: int | None = None
        self._fetch_failures = 0

        self._installed_by_us = False
        self._diagnostics: tuple[int, DiagState] | None = None
        self._listening = False  # ask POST_MQTT at the next connection
        self._verdict_awaited = False  # the application was asked and said PENDING (Q29)
        self._validating = False  # within the time limit for the confirmation
        self._undecided = False  # Q40
        self._verdict: tuple[int, str] | None = None  # status and text of a report without a job id
        self._results = self._load_results()
        self._resend_failures = 0

    @property
    def busy(self) -> bool:
        """Whether a job would not be taken now."""
        return self._busy is not None

    def handle(self, event: Input, now: Now) -> list[Action]:
        """Takes one input and says what to do, in order."""
        if self._dead:
            return []
        self._out = []
        self._now = now
        match event:
            case Connected():
                self._on_connected()
            case Disconnected():
                self._connected = False
                self._disconnected_at = now.monotonic
            case ConfigReported():
                self._report_all_params()
            case Started():
                self._started = True
                if self._enable_call is None:
                    self._start()
            case NodeInfoChanged(node):
                self._node = node
                self._identity = node or self._identity
            case MessageReceived(topic, payload):
                self._on_message(topic, payload)
            case PublishResult(token):
                done = self._published.pop(token, None)
                if done is not None:
                    done(event)
                if not self._published:
                    self._early_acks.clear()
            case PubAck(message_id):
                self._on_puback(message_id)
            case TimerFired(kind):
                self._on_timer(kind)
            case AttemptHeader():
                self._on_header(event)
            case AttemptCheckpoint():
                self._on_checkpoint(event)
            case AttemptProgress():
                self._on_progress(event)
            case AttemptReceived():
                self._on_received(event)
            case AttemptFinished():
                self._on_finished(event)
            case AttemptFailed():
                self._on_failed(event)
            case CallbackQueued(job, accepted):
                self._on_queued(job, accepted)
            case CallbackReturned(job, error):
                self._on_callback_returned(job, error)
            case DiagnosticsReturned(token, status):
                self._on_diagnostics(token, status)
            case TargetResult(token, esp_err):
                answered = self._asked.pop(token, None)
                if answered is not None:
                    answered(esp_err)
            case Enable(call, ota_type, config):
                self._enable(call, ota_type, config)
            case CallFetch(call):
                self._fetch(call)
            case CallFetchWithDelay(call, seconds):
                self._fetch_with_delay(call, seconds)
            case CallReportStatus():
                self._report_status(event)
            case CallDefaultCallback():
                self._default_callback(event)
            case CallMarkValid(call):
                self._mark_valid(call)
            case CallMarkInvalid(call):
                self._mark_invalid(call)
            case CallReportParams(call):
                self._report_params(lambda err: self._return(call, err))
        out, self._out = self._out, []
        return out

    # -- Small things

    def _do(self, action: Action) -> None:
        if not self._dead:
            self._out.append(action)

    def _log(self, level: int, message: str) -> None:
        self._do(Log(level, message))

    def _return(self, call: int | None, value: int) -> None:
        if call is not None:
            self._do(ApiReturn(call, value))

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    @property
    def _topics(self) -> Topics | None:
        node = self._identity
        return None if node is None else Topics(node.node_id, self._options.mqtt_use_basic_ingest)

    def _get(self, key: str) -> StoredValue | None:
        return None if self._stored is None else self._stored.get(key)

    def _set(self, key: str, value: StoredValue) -> None:
        if self._stored is not None and self._stored.get(key) != value:
            self._stored[key] = value
            self._do(StoreSet(key, value))

    def _erase(self, *keys: str) -> None:
        for key in keys:
            if self._stored is not None and self._stored.pop(key, None) is not None:
                self._do(StoreErase(key))

    def _get_text(self, key: str, limit: int | None = None) -> str | None:
        value = self._get(key)
        if isinstance(value, str):
            value = value.encode()
        if not isinstance(value, bytes) or (limit is not None and len(value) > limit):
            return None
        return value.decode("utf-8", "replace")

    def _get_json(self, key: str) -> dict[str, object]:
        try:
            value = json.loads(self._get_text(key) or "{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def _stored_job_id(self) -> str | None:
        if self._via == OtaType.USING_PARAMS:
            return None  # it is that of an older job
        return self._get_text(KEY_JOB_ID, MAX_STORED_JOB_ID)

    def _restart(self, reason: str) -> None:
        self._do(Restart(reason))
        self._dead = True

    # -- Reports

    def _publish(self, topic: str, payload: bytes, done: Callable[[PublishResult], None]) -> int:
        token = self._number()
        self._published[token] = done
        self._do(Publish(token, topic, payload))
        return token

    def _report(
        self,
        status: int,
        info: str,
        *,
        final: bool = False,
        consume: bool = True,
        then: Callable[[int], None] | None = None,
    ) -> None:
        """Reports under the id of the job at hand, else under the stored one, which is used up by it unless not
        ``consume``.

        ``final``: the outcome of a job, kept until it is acknowledged. ``then`` gets the `EspErr` of the report.
        """
        if self._via == OtaType.USING_PARAMS:
            self._report_by_params(status, info, final=final)
            if then is not None:
                then(EspErr.OK)
            return
        job_id = self._job.job_id if self._job is not None else self._stored_job_id
        from_store = self._job is None and job_id is not None
        topics = self._topics

        def finish(err: int) -> None:
            self._do(PostEvent(OTA_EVENT_BASE, status_event(status), info))
            if then is not None:
                then(err)

        if topics is None:
            finish(EspErr.FAIL)
            return
        if job_id is None and self._stored is not None:
            self._log(logging.WARNING, f"no job to report '{info}' for")
            finish(EspErr.INVALID_STATE)
            return
        result: _Result | None = None
        if job_id is not None:
            self._forget_results(job_id)
            if final:
                result = _Result(job_id, status, info, reported=True)
                self._results = [*self._results[-MAX_RESULTS + 1 :], result]
            self._save_results()
            if from_store and final and consume:
                self._erase(KEY_JOB_ID)

        def done(answer: PublishResult) -> None:
            if from_store and consume and not final and answer.accepted:
                self._erase(KEY_JOB_ID)
            if result is not None:
                self._result_published(result, answer)
            finish(EspErr.OK if answer.accepted else EspErr.FAIL)

        token = self._publish(topics.otastatus, self._status_payload(job_id, status, info), done)
        if result is not None:
            result.token, result.tried = token, True

    def _status_payload(self, job_id: str | None, status: int, info: str) -> bytes:
        network_id = None if self._identity is None else self._identity.network_id
        return status_payload(job_id, status_text(status), info, self._now.unix, network_id)

    def _load_results(self) -> list[_Result]:
        try:
            stored = json.loads(self._get_text(KEY_RESULT) or "[]")
            return [
                _Result(str(entry["id"]), int(entry["status"]), str(entry["info"]), bool(entry["reported"]))
                for entry in stored
            ][-MAX_RESULTS:]
        except (ValueError, TypeError, KeyError):
            return []  # not ours, or damaged: there is nothing to send

    def _save_results(self) -> None:
        if not self._results:
            self._erase(KEY_RESULT)
            return
        entries = [
            {"id": one.job_id, "status": int(one.status), "info": one.info, "reported": one.reported}
            for one in self._results
        ]
        self._set(KEY_RESULT, json.dumps(entries, ensure_ascii=False, separators=(",", ":")))

    def _forget_results(self, job_id: str) -> None:
        self._results = [one for one in self._results if one.job_id != job_id]

    def _result_published(self, result: _Result, answer: PublishResult) -> None:
        result.token = None
        if not answer.accepted:
            delay = FETCH_RETRY_S * 2 ** min(self._resend_failures, FETCH_RETRY_STEPS - 1)
            self._resend_failures += 1
            self._do(StartTimer(TimerKind.RESEND, delay))
        elif answer.message_id is None or answer.message_id in self._early_acks:
            self._result_acknowledged(result)
        else:
            result.message_id = answer.message_id

    def _result_acknowledged(self, result: _Result) -> None:
        self._resend_failures = 0
        self._results = [one for one in self._results if one is not result]
        self._save_results()

    def _send_results(self, *, refused: bool) -> None:
        """Sends the final reports that nobody has taken over yet; ``refused``: also those refused in this boot."""
        topics = self._topics
        if topics is None:
            return
        for result in [one for one in self._results if one.idle and (refused or not one.tried)]:
            result.tried = True
            first = not result.reported
            if first:
                result.reported = True
                self._save_results()
                if self._job is None and self._stored_job_id == result.job_id:
                    self._erase(KEY_JOB_ID)
                if self._get_text(KEY_FAIL_JOB_ID) == result.job_id:
                    self._erase(KEY_FAIL_JOB_ID, KEY_FAIL_REASON, KEY_JOB_ID)

            def done(answer: PublishResult, result: _Result = result, first: bool = first) -> None:
                self._result_published(result, answer)
                if first:
                    self._do(PostEvent(OTA_EVENT_BASE, status_event(result.status), result.info))

            payload = self._status_payload(result.job_id, result.status, result.info)
            result.token = self._publish(topics.otastatus, payload, done)

    def _report_status(self, event: CallReportStatus) -> None:
        if event.handle is None or not self._enabled:
            self._return(event.call, EspErr.FAIL)
            return
        self._report(
            event.status,
            event.info or "",
            final=event.status in (OtaStatus.SUCCESS, OtaStatus.FAILED, OtaStatus.REJECTED),
            then=lambda err: self._return(event.call, err),
        )

    # -- Parameters, and reports by them (section 3)

    def _report_by_params(self, status: int, info: str, *, final: bool) -> None:
        """Two messages; before the start the values go out with the initial report (section 3.4)."""
        if final:
            kept = {"status": status, "info": info[:MAX_INFO]}
            self._set(KEY_PARAMS_RESULT, json.dumps(kept, ensure_ascii=True, separators=(",", ":")))
        else:
            self._erase(KEY_PARAMS_RESULT)
        self._params_message = None
        for name, value in (("Info", info[:MAX_INFO]), ("Status", status_text(status))):
            self._ota_service[name].put(value)
            self._report_params(lambda _: None)
        self._do(PostEvent(OTA_EVENT_BASE, status_event(status), info))

    def _restore_params_result(self) -> None:
        """The outcome that nobody acknowledged in an earlier boot is said again (Q16)."""
        kept = self._get_json(KEY_PARAMS_RESULT)
        status, info = kept.get("status"), kept.get("info")
        if isinstance(status, int) and isinstance(info, str):
            self._ota_service["Info"].restore(info)
            self._ota_service["Status"].restore(status_text(status))

    def _report_params(self, then: Callable[[int], None]) -> None:
        """Publishes what was updated; refused, it is tried again later."""
        topics = self._topics
        if not self._started:
            then(EspErr.OK)
            return
        values, taken = self._params.take_changed()
        payload = params_payload(values)
        if payload is None or topics is None:
            then(EspErr.OK if payload is None else EspErr.FAIL)
            return
        result = self._ota_service["Status"] in taken

        def done(answer: PublishResult) -> None:
            if answer.accepted:
                self._params_sent(answer, result)
            elif not self._options.strict:
                self._params.put_back(taken)
                self._retry_params()
            then(EspErr.OK if answer.accepted else EspErr.FAIL)

        self._publish(topics.params_local_of(self._group_id or ""), payload, done)

    def _report_all_params(self) -> None:
        """Subscriptions and the initial report, which does not count as a report (section 3.4)."""
        topics = self._topics
        if topics is None:
            return
        first = self._group_id is None
        self._join_group()
        if first:
            self._do(Subscribe(topics.params_remote))
        payload = params_payload(self._params.values())
        if payload is None:
            return

        def done(answer: PublishResult) -> None:
            self._init_waits = not answer.accepted and not self._options.strict
            if answer.accepted:
                self._params_sent(answer, OtaType.USING_PARAMS in self._enabled)
            elif self._init_waits:
                self._retry_params()

        self._publish(topics.params_local_init, payload, done)

    def _retry_params(self) -> None:
        delay = FETCH_RETRY_S * 2 ** min(self._refused_params, FETCH_RETRY_STEPS - 1)
        self._refused_params += 1
        self._do(StartTimer(TimerKind.REPORT_PARAMS, delay))

    def _resend_params(self) -> None:
        if self._init_waits:
            self._report_all_params()
        self._report_params(lambda _: None)

    def _params_sent(self, answer: PublishResult, with_result: bool) -> None:
        """``with_result``: the status of the OTA service is in it."""
        self._refused_params = 0
        if not with_result or self._get(KEY_PARAMS_RESULT) is None:
            return
        if answer.message_id is None or answer.message_id in self._early_acks:
            self._erase(KEY_PARAMS_RESULT)
        else:
            self._params_message = answer.message_id

    def _join_group(self) -> None:
        """Subscribes to what is written to the group, and leaves the one before."""
        groups, topics, old = self._params.groups, self._topics, self._group_id
        if topics is None:
            return
        if groups is not None and not groups.group_id:
            kept = self._get_text(KEY_GROUP_ID) or ""
            groups["GroupID"].restore(kept if valid_group_id(kept) else "")
        new = "" if groups is None else groups.group_id
        self._group_id = new
        if old and old != new:
            self._do(Unsubscribe(topics.params_remote_of(old)))
        if new and old != new:
            self._do(Subscribe(topics.params_remote_of(new)))

    def _on_params_remote(self, payload: bytes) -> None:
        try:
            writes, refused = self._params.parse_writes(payload)
        except ValueError as error:
            self._log(logging.WARNING, f"parameters not written: {error}")
            return
        for reason in refused[:MAX_LOGGED]:
            self._log(logging.WARNING, f"not written: {reason}")
        for write in writes:
            if write.device is self._ota_service:
                self._on_url(write.values)
            elif write.device is self._params.groups:
                self._on_group_id(write.values)
            else:
                self._do(WriteParams(write))

    def _on_group_id(self, values: Sequence[tuple[Param, Value]]) -> None:
        for param, value in values:
            if not isinstance(value, str) or not valid_group_id(value):
                self._log(logging.WARNING, f"not written: parameter {param.full_name}: no id of a group")
                continue
            param.put(value)
            self._set(KEY_GROUP_ID, value)
            self._join_group()

    def _on_url(self, values: Sequence[tuple[Param, Value]]) -> None:
        """A job of the params workflow: an address, and nothing else (section 3.3)."""
        url = str(values[0][1])  # of the service's parameters it alone can be written
        if self._busy is not None:
            self._log(logging.WARNING, f"OTA.URL not taken: {self._busy.value}")
            return
        self._busy = _Busy.JOB
        self._via = OtaType.USING_PARAMS
        self._erase(KEY_PARAMS_RESULT)
        config = self._enabled[self._via]
        self._queue_job(OtaData(url=url, server_cert=config.server_cert, priv=config.priv))

    # -- Connection and start

    def _on_connected(self) -> None:
        self._connected = True
        away = None if self._disconnected_at is None else self._now.monotonic - self._disconnected_at
        self._disconnected_at = None
        if self._listening:
            self._ask_diagnostics(DiagState.POST_MQTT)
        if self._started and self._refused_params:
            self._resend_params()
        if self._start_done:
            self._send_results(refused=True)
            wanted = self._options.fetch_after_reconnect and not self._options.strict
            if wanted and away is not None and away > RECONNECT_FETCH_S and self._busy is None:
                self._schedule_fetch(FETCH_DELAY_S)  # Q17

    def _start(self) -> None:
        """Begins to fetch and to take jobs, where they come by topics."""
        if self._start_done or OtaType.USING_TOPICS not in self._enabled:
            return
        self._start_done = True
        self._send_results(refused=False)
        if self._verdict is not None:
            (status, info), self._verdict = self._verdict, None
            self._report(status, info, final=True)
        if self._undecided and self._via == OtaType.USING_TOPICS:
            self._report(OtaStatus.FAILED, UNDECIDED_INFO, final=True, consume=False)
        if self._topics is not None:
            self._do(Subscribe(self._topics.otaurl))
        if self._options.ota_autofetch and self._busy is None:
            self._schedule_fetch(FETCH_DELAY_S)
        if self._options.ota_autofetch_period_hours > 0:
            self._do(StartTimer(TimerKind.AUTOFETCH, self._options.ota_autofetch_period_hours * 3600))

    def _on_puback(self, message_id: int) -> None:
        if self._published:
            self._early_acks.add(message_id)
        if message_id == self._fetch_message:
            self._fetch_acknowledged()
        if message_id == self._params_message:
            self._params_message = None
            self._erase(KEY_PARAMS_RESULT)
        for result in list(self._results):
            if result.message_id == message_id:
                self._result_acknowledged(result)

    def _on_timer(self, kind: TimerKind) -> None:
        match kind:
            case TimerKind.FETCH if self._fetch_due is not None:
                self._fetch_due = None
                self._fetch(None)
            case TimerKind.FETCH_PUBACK if self._fetch_message is not None:
                self._fetch_message = None
                self._retry_fetch()
            case TimerKind.AUTOFETCH:
                self._fetch(None)
                self._do(StartTimer(TimerKind.AUTOFETCH, self._options.ota_autofetch_period_hours * 3600))
            case TimerKind.ROLLBACK if self._boot_state == BootState.PENDING_VERIFY:
                self._time_out()
            case TimerKind.REBOOT if self._restart_due:
                self._restart("new firmware")
            case TimerKind.RESEND:
                self._send_results(refused=True)
            case TimerKind.REPORT_PARAMS if self._started:
                self._resend_params()

    # -- Fetch

    def _schedule_fetch(self, seconds: float) -> None:
        """One fetch is due at a time; an earlier one takes the place of a later one (Q7, Q30)."""
        due = self._now.monotonic + seconds
        effective = self._fetch_due is None or due < self._fetch_due
        self._do(FetchScheduled(seconds, effective))
        if effective:
            self._fetch_due = due
            self._do(StartTimer(TimerKind.FETCH, seconds))

    def _retry_fetch(self) -> None:
        self._fetch_failures = min(self._fetch_failures + 1, FETCH_RETRY_STEPS)
        self._schedule_fetch(FETCH_RETRY_S * 2 ** (self._fetch_failures - 1))

    def _fetch(self, call: int | None) -> None:
        if self._fetch_token is not None or self._fetch_message is not None:
            self._return(call, EspErr.OK)
            return
        topics = self._topics
        if not self._connected or self._node is None or topics is None:
            self._retry_fetch()
            self._return(call, EspErr.FAIL if self._connected else EspErr.INVALID_STATE)
            return

        def done(answer: PublishResult) -> None:
            self._fetch_token = None
            if not answer.accepted or answer.message_id is None:
                self._retry_fetch()
                self._return(call, EspErr.FAIL)
                return
            self._fetch_message = answer.message_id
            self._do(StartTimer(TimerKind.FETCH_PUBACK, FETCH_PUBACK_S))
            if answer.message_id in self._early_acks:  # Q42
                self._fetch_acknowledged()
            self._return(call, EspErr.OK)

        payload = fetch_payload(self._node.node_id, self._node.fw_version, self._node.network_id)
        self._fetch_token = self._publish(topics.otafetch, payload, done)

    def _fetch_acknowledged(self) -> None:
        self._fetch_message = None
        self._fetch_failures = 0
        self._do(StopTimer(TimerKind.FETCH_PUBACK))

    def _fetch_with_delay(self, call: int, seconds: int) -> None:
        if seconds < 0:  # Q8
            self._return(call, EspErr.INVALID_ARG)
            return
        self._schedule_fetch(seconds)
        self._return(call, EspErr.OK)

    # -- Enable, confirmation, rollback

    def _enable(self, call: int, ota_type: int, config: EnableConfig | None) -> None:
        if ota_type not in (OtaType.USING_PARAMS, OtaType.USING_TOPICS):
            self._return(call, EspErr.INVALID_ARG)
            return
        ota_type = OtaType(ota_type)
        both = self._options.type == "both"
        if self._enable_call is not None or ota_type in self._enabled or (self._enabled and not both):
            self._return(call, EspErr.FAIL)
            return
        if ota_type == OtaType.USING_PARAMS:
            try:
                self._params.add(self._ota_service)
            except ArgumentError as error:
                self._log(logging.ERROR, str(error))
                self._return(call, EspErr.INVALID_ARG)
                return
            self._restore_params_result()
        first = not self._enabled
        self._enabled[ota_type] = config or EnableConfig()  # before the diagnostics, so that they can confirm (Q3)
        self._enable_call = call
        if not first:
            self._enable_done()
            return
        self._via = ota_type
        if both and (target := self._get_json(KEY_TARGET)):  # the image that runs may have come by the other one
            by_params = target.get("workflow") == "params"
            self._via = OtaType.USING_PARAMS if by_params else OtaType.USING_TOPICS
        self._check_boot()

    @property
    def _first_config(self) -> EnableConfig:
        """The one given first; its diagnostics stand for both workflows."""
        return next(iter(self._enabled.values()))

    def _check_boot(self) -> None:
        self._installed_by_us = self._get(KEY_UPDATE) is not None
        if self._boot_state == BootState.PENDING_VERIFY:
            self._busy = _Busy.VERIFY
            self._ask_diagnostics(DiagState.INIT)
            return
        if self._installed_by_us:
            self._record_outcome()
        self._enable_done()

    def _record_outcome(self) -> None:
        """An image of ours is not waiting to be confirmed: it was rolled back, or it runs without having to be."""
        target = self._get_json(KEY_TARGET)
        runs = (target.get("slot"), target.get("version")) == (self._boot.running_slot, self._boot.version)
        if self._via == OtaType.USING_PARAMS:
            if target and runs:
                self._report(OtaStatus.SUCCESS, SUCCESS_INFO, final=True)  # Q35
            else:
                self._report(OtaStatus.REJECTED, ROLLED_BACK_INFO, final=True)
            self._erase(KEY_UPDATE, KEY_TARGET)
            return
        if target and runs:
            job_id, status, info = self._stored_job_id, OtaStatus.SUCCESS, SUCCESS_INFO  # Q35
        elif (failed := self._get_text(KEY_FAIL_JOB_ID)) is not None:
            reason = self._get_text(KEY_FAIL_REASON) or "Firmware verification failed"
            job_id, status, info = failed, OtaStatus.FAILED, reason
        else:
            job_id, status, info = self._stored_job_id, OtaStatus.REJECTED, ROLLED_BACK_INFO
        if job_id is None:
            self._verdict = (status, info)
        else:  # kept before the flag goes (Q16)
            self._forget_results(job_id)
            self._results.append(_Result(job_id, status, info))
            self._save_results()
        self._erase(KEY_UPDATE, KEY_TARGET)

    def _enable_done(self) -> None:
        call, self._enable_call = self._enable_call, None
        self._return(call, EspErr.OK)
        if call is not None and self._started:  # Q4
            self._start()
            if OtaType.USING_PARAMS in self._enabled:
                self._do(ReportConfig())

    def _ask_diagnostics(self, state: DiagState) -> None:
        if self._diagnostics is not None:
            return
        token = self._number()
        self._diagnostics = (token, state)
        if self._first_config.has_diagnostics:
            self._do(CallDiagnostics(token, state, self._installed_by_us))
        else:
            self._on_diagnostics(token, DiagStatus.SUCCESS)

    def _on_diagnostics(self, token: int, status: DiagStatus) -> None:
        if self._diagnostics is None or self._diagnostics[0] != token:
            return
        state = self._diagnostics[1]
        self._diagnostics = None
        pending = self._boot_state == BootState.PENDING_VERIFY
        if state == DiagState.INIT:
            self._init_diagnosed(pending, status)
        elif not pending:
            pass  # decided inside the callback
        elif status == DiagStatus.SUCCESS:
            if self._options.ota_test_rollback:
                self._test_rollback()
            else:
                self._mark_valid(None)
        elif status == DiagStatus.FAIL:
            self._roll_back(lambda _: None)
        elif not self._verdict_awaited:
            self._verdict_awaited = True  # the application has the whole period from now on (Q29)
            self._start_rollback_timer()

    def _init_diagnosed(self, pending: bool, status: DiagStatus) -> None:
        if not pending:
            self._enable_done()
        elif status == DiagStatus.FAIL:

            def impossible(_: int) -> None:
                self._undecided = True  # Q40
                self._free()
                self._log(logging.ERROR, "diagnostics failed, and there is no image to roll back to")
                if self._via == OtaType.USING_PARAMS:
                    self._report(OtaStatus.FAILED, UNDECIDED_INFO, final=True)
                self._enable_done()

            self._roll_back(impossible)
        else:
            self._validating = True
            self._start_rollback_timer()
            self._listening = True
            self._enable_done()
            if self._connected:
                self._ask_diagnostics(DiagState.POST_MQTT)

    def _start_rollback_timer(self) -> None:
        self._do(StartTimer(TimerKind.ROLLBACK, self._options.ota_rollback_wait_period_s, repeat=True))

    def _ask(self, action: Callable[[int], Action], answered: Callable[[int], None]) -> None:
        token = self._number()
        self._asked[token] = answered
        self._do(action(token))

    def _roll_back(self, refused: Callable[[int], None]) -> None:
        def answered(err: int) -> None:
            if err == EspErr.OK:
                self._restart("rollback")
            else:
                self._log(logging.ERROR, f"cannot roll back: {esp_err_name(err)}")
                refused(err)

        self._ask(MarkInvalid, answered)

    def _time_out(self) -> None:
        """Nobody confirmed the image in time."""
        undo: list[Callable[[], None]] = []
        if self._options.ota_rollback_report_failed and self._via == OtaType.USING_TOPICS:
            period = self._options.ota_rollback_wait_period_s
            what = "Firmware verification did not finish" if self._verdict_awaited else "MQTT did not connect"
            job_id = self._get(KEY_JOB_ID)
            self._set(KEY_FAIL_REASON, f"{what} within {period} seconds")
            undo.append(lambda: self._erase(KEY_FAIL_REASON))
            if job_id is not None and self._stored_job_id is not None:
                self._set(KEY_FAIL_JOB_ID, self._stored_job_id)
                self._erase(KEY_JOB_ID)
                undo.append(lambda: self._set(KEY_JOB_ID, job_id))
                undo.append(lambda: self._erase(KEY_FAIL_JOB_ID))

        def refused(_: int) -> None:
            for step in undo:
                step()

        self._roll_back(refused)

    def _mark_valid(self, call: int | None, info: str = SUCCESS_INFO) -> None:
        if self._boot_state is not None and self._boot_state != BootState.PENDING_VERIFY:
            self._return(call, EspErr.INVALID_STATE)
            return
        if not self._enabled:
            self._return(call, EspErr.INVALID_ARG)
            return

        def answered(err: int) -> None:
            if err != EspErr.OK:  # Q34
                self._log(logging.ERROR, f"cannot confirm the running image: {esp_err_name(err)}")
                self._return(call, err)
                return
            self._boot_state = BootState.VALID
            self._listening = False
            self._undecided = False
            if self._busy == _Busy.VERIFY:
                self._free()
            self._do(StopTimer(TimerKind.ROLLBACK))
            self._report(OtaStatus.SUCCESS, info, final=True)
            self._erase(KEY_UPDATE, KEY_TARGET)
            if OtaType.USING_TOPICS in self._enabled:
                self._schedule_fetch(FETCH_DELAY_S)
            self._return(call, EspErr.OK)

        self._ask(MarkValid, answered)

    def _mark_invalid(self, call: int) -> None:
        if self._boot_state is not None and self._boot_state != BootState.PENDING_VERIFY:
            self._return(call, EspErr.INVALID_STATE)
            return
        self._roll_back(lambda err: self._return(call, err))  # Q9

    def _test_rollback(self) -> None:
        job_id = self._stored_job_id
        same = job_id is not None and self._get_text(KEY_TEST_JOB_ID) == job_id
        previous = self._get(KEY_TEST_COUNT)
        count = previous + 1 if same and isinstance(previous, int) else 1
        limit = self._options.ota_test_rollback_count
        self._set(KEY_TEST_COUNT, count)
        if job_id is not None:
            self._set(KEY_TEST_JOB_ID, job_id.encode())
        if limit and count >= limit:
            self._erase(KEY_TEST_COUNT, KEY_TEST_JOB_ID)
            self._mark_valid(None, f"TEST_ROLLBACK_END: {count}/{limit} cycles complete; marking valid")
            return
        cycle = f"cycle {count}/{limit}" if limit else f"cycle {count}, indefinite"
        self._do(StopTimer(TimerKind.ROLLBACK))
        self._report(OtaStatus.FAILED, f"TEST_ROLLBACK: forced failure to re-trigger OTA ({cycle})", final=True)
        self._erase(KEY_UPDATE, KEY_TARGET, KEY_JOB_ID, KEY_FAIL_REASON, KEY_FAIL_JOB_ID)
        self._roll_back(lambda _: None)

    # -- Jobs

    def _on_message(self, topic: str, payload: bytes) -> None:
        topics = self._topics
        if topics is None:
            return
        if topic == topics.params_remote or (self._group_id and topic == topics.params_remote_of(self._group_id)):
            self._on_params_remote(payload)
            return
        if OtaType.USING_TOPICS not in self._enabled or topic != topics.otaurl:
            return
        if self._busy is not None:
            self._note_other_job(payload)
            return
        try:
            job = parse_otaurl(payload, require_stream_id=self._options.ota_transport == "mqtt")  # Q1
        except JobError as error:
            if error.job_id is None:  # Q11: nobody to report to
                self._log(logging.WARNING, f"message on {topic} dropped: {error.info}")
                self._do(PostEvent(OTA_EVENT_BASE, OtaEvent.FAILED, error.info))
            else:
                self._take(Job(error.job_id, ""))
                self._report(OtaStatus.FAILED, error.info, final=True)
                self._end_job()
            return
        self._take(job)
        config = self._enabled[self._via]
        data = OtaData(
            url=job.url,
            stream_id=job.stream_id,
            filesize=job.file_size,
            fw_version=job.fw_version,
            file_md5=job.file_md5,
            ota_job_id=job.job_id,
            server_cert=config.server_cert,
            priv=config.priv,
            metadata=job.metadata,
        )
        self._queue_job(data)

    def _queue_job(self, data: OtaData) -> None:
        self._job_data = data
        self._job_number = self._number()
        builtin = not self._enabled[self._via].has_ota_callback
        self._do(QueueCallback(self._job_number, self._job_number, data, builtin, self._via))

    def _take(self, job: Job) -> None:
        self._busy = _Busy.JOB
        self._via = OtaType.USING_TOPICS
        self._job = job
        self._set(KEY_JOB_ID, job.job_id.encode())
        if any(one.job_id == job.job_id for one in self._results):
            self._forget_results(job.job_id)  # it is begun anew, so its earlier outcome is history
            self._save_results()

    def _note_other_job(self, payload: bytes) -> None:
        """A job came while none is taken (Q13): another one than that at hand is asked for again when there is time."""
        current = self._job.job_id if self._job is not None else self._stored_job_id
        try:
            other = parse_otaurl(payload).job_id
        except JobError as error:
            self._log(logging.WARNING, f"message dropped while busy: {error.info}")
            return
        if other == current:
            self._log(logging.DEBUG, f"job {other} is the one at hand")
        else:
            self._other_job_waits = True
            reason = "" if self._busy is None else self._busy.value
            self._log(logging.INFO, f"job {other} waits: {reason}")

    def _on_queued(self, number: int, accepted: bool) -> None:
        if self._busy is not _Busy.JOB or number != self._job_number or self._run is not None:
            return
        if not accepted:
            job = self._job
            self._log(logging.WARNING, "no room for the job" if job is None else f"no room for job {job.job_id}")
            self._end_job()
            if self._via == OtaType.USING_TOPICS:
                self._schedule_fetch(FETCH_DELAY_S)  # Q12
        elif self._enabled[self._via].has_ota_callback:
            self._callback_running = True
        else:
            self._begin_run(_Run(None, self._job_data, self._options.ota_transport))

    def _on_callback_returned(self, number: int, error: str | None) -> None:
        if not self._callback_running or number != self._job_number:
            return
        self._callback_running = False
        if error is not None:
            self._report(OtaStatus.FAILED, f"OTA callback failed: {error}", final=True)
        if self._run is None:
            self._end_job()

    def _end_job(self) -> None:
        self._job = None
        self._free()

    def _free(self) -> None:
        """Jobs are taken again, unless a new image waits for the restart (Q14)."""
        if self._restart_due:
            self._busy = _Busy.RESTART
        elif self._validating and self._boot_state == BootState.PENDING_VERIFY:
            self._busy = _Busy.VERIFY
        else:
            self._busy = None
        if self._other_job_waits and self._busy is None:
            self._other_job_waits = False
            self._schedule_fetch(FETCH_DELAY_S)  # Q13

    # -- The built-in handler

    def _default_callback(self, event: CallDefaultCallback) -> None:
        run = _Run(event.call, event.data, event.transport or self._options.ota_transport)
        if event.handle is None or not self._enabled or (event.data.url is None and not run.over_mqtt):
            self._return(event.call, EspErr.FAIL)
        elif self._run is not None:
            self._log(logging.ERROR, "a download is running already")
            self._return(event.call, EspErr.FAIL)
        else:
            self._begin_run(run)

    def _begin_run(self, run: _Run) -> None:
        self._run = run
        self._busy = self._busy or _Busy.JOB
        if run.over_mqtt and (not run.data.stream_id or run.data.filesize <= 0):
            self._report(OtaStatus.FAILED, MISSING_STREAM, final=True)  # Q6
            self._end_run(EspErr.FAIL)
            return
        if self._options.ota_time_support and not self._in_time(run.data.metadata):
            self._end_run(EspErr.FAIL)
            return
        self._do(PostEvent(OTA_EVENT_BASE, OtaEvent.STARTING))
        self._next_attempt(run)

    def _end_run(self, value: int) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        self._return(run.call, value)
        if not self._callback_running:
            self._end_job()

    def _in_time(self, metadata: str | None) -> bool:
        """Download window and validity (section 4.1); reports and schedules when it is not the time."""
        limits = parse_time_limits(metadata)
        if limits is None:
            return True
        now = math.floor(self._now.unix)
        if now <= CLOCK_UNSET:
            return self._delay("No time information available yet.", CLOCK_RETRY_S)
        if limits.valid_from is not None and now < limits.valid_from:
            return self._delay("Not within valid window.", limits.valid_from - now + WINDOW_BUFFER_S)
        if limits.valid_until is not None and now > limits.valid_until:
            self._report(OtaStatus.FAILED, "OTA download window lapsed.", final=True)
            return False
        if limits.window_start is None:
            return True
        if limits.window_end is None:
            self._report(OtaStatus.FAILED, "Invalid download window specified.", final=True)
            return False
        wait = minutes_to_window(limits.window_start, limits.window_end, self._now.local_minute)
        if wait == 0:
            return True
        seconds = seconds_to_window(limits.window_start, wait, self._now)
        return self._delay("Not within download window.", seconds + WINDOW_BUFFER_S)

    def _delay(self, info: str, seconds: int) -> bool:
        self._report(OtaStatus.DELAYED, info)
        self._schedule_fetch(seconds)
        return False

    def _next_attempt(self, run: _Run) -> None:
        run.number += 1
        run.attempt = self._number()
        run.accepted = run.refused = False
        run.percent = 0
        total = self._options.ota_max_retries
        self._report(OtaStatus.IN_PROGRESS, f"Starting OTA Upgrade ({run.label} attempt {run.number}/{total})")
        self._look_up_position(run)
        config = self._enabled.get(self._via, self._first_config)
        cert = None if self._options.use_cert_bundle else config.server_cert or DEFAULT_SERVER_CERT
        self._do(
            StartAttempt(
                attempt=run.attempt,
                number=run.number,
                url=run.data.url or "",
                resume=run.resume,
                md5=run.data.file_md5 or None,
                size=max(run.data.filesize, 0),
                header_size=run.header_size,
                server_cert=cert,
                keep_position=run.keep_position,
                allow_http=self._options.allow_http,
                skip_common_name_check=self._options.ota_skip_common_name_check,
                stream_id=run.data.stream_id if run.over_mqtt else None,
            )
        )

    def _current(self, attempt: int) -> _Run | None:
        return self._run if self._run is not None and self._run.attempt == attempt else None

    def _look_up_position(self, run: _Run) -> None:
        """Where to begin (sections 4.3, 5.5; Q24, Q27, Q36, Q39)."""
        md5 = run.data.file_md5
        run.resume = None
        allowed = run.over_mqtt or self._options.http_ota_resumption
        run.keep_position = bool(md5) and allowed and self._stored is not None
        if not run.keep_position or not md5:
            return
        key_offset, key_md5 = run.position_keys
        written = self._get(key_offset)
        position = self._get_json(KEY_POSITION)
        if isinstance(written, int) and (self._get_text(key_md5) or "").lower() == md5.lower():
            digest = position.get("sha256")
            fits = (position.get("offset"), position.get("size"), position.get("slot")) == (
                written,
                run.data.filesize,
                self._boot.next_slot,
            )
            if fits and written >= run.header_size and isinstance(digest, str) and _HEX.fullmatch(digest):
                run.resume = ResumePoint(written, bytes.fromhex(digest), str(position.get("entity_tag", "")))
                return
        self._erase(KEY_POSITION)
        self._set(key_offset, 0)
        self._set(key_md5, md5)

    def _forget_position(self) -> None:
        self._erase(KEY_WRITTEN, KEY_MD5, KEY_STREAM_OFFSET, KEY_STREAM_MD5, KEY_POSITION)

    def _on_header(self, event: AttemptHeader) -> None:
        run = self._current(event.attempt)
        if run is None or run.accepted or run.refused:
            return
        reason = None if event.description is None else self._refusal(event.description)
        if reason is not None:
            run.refused = True
            self._report(OtaStatus.REJECTED, reason, final=True)
            self._do(RefuseHeader(event.attempt, reason))
            return
        run.accepted = True
        if event.offset > 0 and run.data.filesize > 0:
            run.percent = self._multiple_of_interval(100 * event.offset // run.data.filesize)  # not crossed this time
        self._report(OtaStatus.IN_PROGRESS, "Downloading Firmware Image")
        if not run.keep_position:
            self._forget_position()  # the slot is about to be overwritten (Q43)
        elif event.offset < (run.resume.offset if run.resume is not None else 0):
            self._erase(KEY_POSITION)
            self._set(run.position_keys[0], 0)
        self._do(AcceptHeader(event.attempt))

    def _refusal(self, image: ImageDescription) -> str | None:
        """Why an image is not wanted (section 4.4), or None."""
        options = self._options
        if not options.ota_skip_project_name_check and image.project_name != self._boot.project_name:
            return "Project Name mismatch"
        if not options.ota_skip_version_check and image.version == self._boot.version:
            return "Same version received"
        if not options.ota_skip_secure_version_check and image.secure_version < self._boot.secure_version:
            return "Lower secure version received"
        return None

    def _on_checkpoint(self, event: AttemptCheckpoint) -> None:
        run = self._current(event.attempt)
        if run is None or not run.accepted or not run.keep_position:
            return
        position = {
            "offset": event.point.offset,
            "slot": self._boot.next_slot,
            "size": run.data.filesize,
            "sha256": event.point.sha256.hex(),
            "entity_tag": event.point.entity_tag,
        }
        self._set(KEY_POSITION, json.dumps(position, separators=(",", ":")))
        self._set(run.position_keys[0], event.point.offset)

    def _on_progress(self, event: AttemptProgress) -> None:
        run = self._current(event.attempt)
        if run is not None and run.accepted:
            self._report_progress(run, event.bytes_done)

    def _multiple_of_interval(self, percent: int) -> int:
        return percent - percent % self._options.ota_progress_interval_pct

    def _report_progress(self, run: _Run, bytes_done: int) -> None:
        if not self._options.ota_progress_support or run.data.filesize <= 0:
            return
        interval = self._options.ota_progress_interval_pct
        reached = min(100 * bytes_done // run.data.filesize, 99)
        for percent in range(run.percent + interval, reached + 1, interval):  # each multiple once (Q23)
            run.percent = percent
            self._report(OtaStatus.IN_PROGRESS, f"Downloaded {percent}% Firmware Image")

    def _on_received(self, event: AttemptReceived) -> None:
        run = self._current(event.attempt)
        if run is None:
            return
        self._report_progress(run, event.bytes_done)  # what nobody had told yet
        run.percent = 100
        self._forget_position()
        self._report(OtaStatus.IN_PROGRESS, "Firmware Image download complete")

    def _on_failed(self, event: AttemptFailed) -> None:
        run = self._current(event.attempt)
        if run is None:
            return
        if event.stage == Stage.CHIP and not run.refused:
            run.refused = True
            self._report(OtaStatus.REJECTED, "Chip revision mismatch", final=True)
        if run.refused:
            self._end_run(EspErr.FAIL)
            return
        if event.stage == Stage.VALIDATE or (not run.accepted and (event.answered or run.resume is None)):
            # What is in the slot is wrong, or may be why it cannot begin (Q24). An unreachable server says nothing.
            self._forget_position()
        total = self._options.ota_max_retries
        info = f"OTA Attempt {run.number}/{total} failed: {_describe(event, run.over_mqtt)[:MAX_ERR_DESC]}"[
            :MAX_ATTEMPT_INFO
        ]
        last = run.number >= total
        keep = self._options.report_attempt_failures
        by_params = self._via == OtaType.USING_PARAMS
        status = OtaStatus.FAILED if keep or last else OtaStatus.IN_PROGRESS  # Q31
        self._report(status, info, final=last and by_params)
        if not last:
            self._next_attempt(run)
            return
        if not by_params:
            self._schedule_fetch(self._options.ota_retry_delay_minutes * 60)
        self._end_run(EspErr.FAIL)

    def _on_finished(self, event: AttemptFinished) -> None:
        run = self._current(event.attempt)
        if run is None:
            return
        tries = "attempt" if run.number == 1 else "attempts"
        if self._options.rollback_enable:
            target = {"slot": event.slot or self._boot.next_slot, "version": event.version}
            if self._via == OtaType.USING_PARAMS:
                target["workflow"] = "params"
            self._set(KEY_TARGET, json.dumps(target, separators=(",", ":")))  # Q35
            self._set(KEY_UPDATE, b"\x01")
            self._report(OtaStatus.IN_PROGRESS, f"Rebooting into new firmware (after {run.number} {run.label} {tries})")
        else:
            self._report(
                OtaStatus.SUCCESS,
                f"{run.label} OTA Upgrade finished successfully (after {run.number} {tries})",
                final=True,
            )
        if self._options.ota_disable_auto_reboot:
            self._do(PostEvent(OTA_EVENT_BASE, OtaEvent.REQ_FOR_REBOOT))
        elif not self._restart_due:
            self._do(StartTimer(TimerKind.REBOOT, REBOOT_DELAY_S))
            self._do(PostEvent(COMMON_EVENT_BASE, CommonEvent.REBOOT, REBOOT_DELAY_S))
        self._restart_due = True
        self._end_run(EspErr.OK)


def minutes_to_window(start: int, end: int, now: int) -> int:
    """Minutes until a daily window opens; 0 inside it, both ends included (section 4.1).

    Args:
        start, end: minutes since local midnight; a start behind the end means a window across midnight.
        now: minutes since local midnight.
    """
    if start > end:
        shift = 1440 - start
        end += shift
        now = int(math.fmod(now + shift, 1440))  # a remainder as C has it, so negative for a start beyond the day
        start = 0
    if start <= now <= end:
        return 0
    wait = start - now
    return wait if wait > 0 else wait + 1440


def seconds_to_window(start: int, wait: int, now: Now) -> int:
    """Seconds until the local clock shows the begin of a window, where it is put forward or back in between.

    The firmware counts minutes, comes an hour late after the night of one spring day, and may find the window closed.

    Args:
        start: begin of the window, minutes since local midnight.
        wait: minutes until then as `minutes_to_window` counts them.
        now: the moment.
    """
    seconds = wait * 60
    if now.minute_at is None or not 0 <= start < 1440:
        return seconds
    early = (start - now.minute_at(now.unix + seconds) + 720) % 1440 - 720
    corrected = seconds + early * 60
    if corrected > 0 and now.minute_at(now.unix + corrected) == start:
        return corrected
    return seconds  # that hour does not exist on this day: what is shown then is looked at anew


def _describe(event: AttemptFailed, over_mqtt: bool) -> str:
    """``err_desc`` of a failed attempt (sections 4.2 and 5.4); over MQTT errors have no errno part, and what the server
    said follows (Q41)."""
    error = esp_err_name(event.esp_err)
    if not over_mqtt:
        error += f" (errno={event.errno}: {'Invalid' if event.errno == 0 else os.strerror(event.errno)})"
    elif event.said:
        error += f" ({event.said})"
    match event.stage:
        case Stage.OFFLINE:
            return "MQTT not connected"
        case Stage.BEGIN:
            return f"{'ESP MQTT ' if over_mqtt else ''}OTA Begin failed: {error}"
        case Stage.DESCRIPTION:
            return f"Failed to read image description: {error}"
        case Stage.INCOMPLETE:
            return "Complete data was not received"
        case Stage.VALIDATE:
            return "Image validation failed"
        case Stage.FINISH:
            return f"OTA finish failed: {error}"
        case _:
            return f"OTA failed: {error}"
