"""Where this project is meant to differ from the reference (specification, section 10), as rules.

A rule has the number of its row in that section, a text that says what may differ, and a function that explains
differences: it looks at those not yet explained, checks its condition against the trace, and takes those that are
exactly what its text allows. A trace deviates when all its differences are explained; one that is left over makes
it unmatched. No rule knows a scenario by name.

Where a rule changes what becomes of a job, the replay's side is not taken on trust: `Flow` checks that the job
went the way the specification has it, attempt by attempt, and ended as the rule says.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.conformance.compare import Difference
from tests.conformance.observe import Observation
from tests.conformance.scenario import Marker, Message, Scenario

Json = dict[str, Any]

TICKS_PER_S = 100
LONGEST_DELAY_S = 2**32 / TICKS_PER_S
FETCH_DELAY_S = 5.0
RETRY_S = (30.0, 60.0, 120.0, 240.0, 480.0)
PUBACK_S = 60.0
SECTOR = 4096
HEADER_REQUEST = 289
SUCCESS_INFO = "OTA Upgrade finished and verified successfully"
ROLLED_BACK_INFO = "Firmware rolled back"
NO_JSON = "Aborted. JSON Payload error"
NO_ID = "Aborted. OTA Updated ID not found in JSON"


@dataclass
class Context:
    """One trace with its differences; ``open`` are those nobody explained yet."""

    scenario: Scenario
    reference: list[Observation]
    replay: list[Observation]
    open: list[Difference]
    used: dict[str, int] = field(default_factory=dict)
    all: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.all = list(self.open)

    def missing(self, kind: str | None = None) -> list[Difference]:
        return self._side("missing", kind)

    def extra(self, kind: str | None = None) -> list[Difference]:
        return self._side("extra", kind)

    def _side(self, side: str, kind: str | None) -> list[Difference]:
        return [one for one in self.open if one.side == side and (kind is None or one.seen.kind == kind)]

    def explain(self, rule: str, *differences: Difference) -> None:
        for one in differences:
            if one in self.open:
                self.open.remove(one)
                self.used[rule] = self.used.get(rule, 0) + 1

    def pairs(self, kind: str) -> Iterator[tuple[Difference, Difference]]:
        """A missing and an extra observation of one kind at one moment, in order."""
        extra = self.extra(kind)
        for missing in self.missing(kind):
            for other in extra:
                if (other.seen.boot, other.seen.t) == (missing.seen.boot, missing.seen.t):
                    extra.remove(other)
                    yield missing, other
                    break

    def config(self, boot: int) -> Json:
        """The settings of a boot."""
        configs = self.scenario.trace.configs
        return configs[min(boot, len(configs)) - 1]

    @property
    def messages(self) -> list[Message]:
        return self.scenario.messages

    @property
    def records(self) -> tuple[Json, ...]:
        return self.scenario.trace.records


@dataclass(frozen=True)
class Rule:
    id: str
    text: str
    apply: Callable[[Context], None]


RULES: list[Rule] = []


def rule(number: str, text: str) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    def register(function: Callable[[Context], None]) -> Callable[[Context], None]:
        RULES.append(Rule(number, text, function))
        return function

    return register


# ---- Looking at observations ----------------------------------------------------------------------------------


def status_of(seen: Observation) -> Json | None:
    """The payload of an ``otastatus`` message."""
    if seen.kind != "publish" or not str(seen.data["topic"]).endswith("/otastatus"):
        return None
    payload = seen.data["payload"]
    return payload if isinstance(payload, dict) and "status" in payload else None


def ota_params_of(seen: Observation) -> Json | None:
    """The OTA service's part of a report of parameters."""
    if seen.kind != "publish" or "/params/local" not in str(seen.data["topic"]):
        return None
    payload = seen.data["payload"]
    part = payload.get("OTA") if isinstance(payload, dict) else None
    return part if isinstance(part, dict) else None


def reports_of(seen: Iterable[Observation], job_id: str) -> Iterator[tuple[Observation, Json | None]]:
    """Each observation and, where a report of that job is complete with it, its status and text. What is reported by
    parameters is of the job at hand, which has no id."""
    info = ""
    for one in seen:
        part = ota_params_of(one)
        if part is None or str(one.data["topic"]).endswith("/init"):
            status = status_of(one)
            yield one, status if status is not None and status.get("ota_job_id") == job_id else None
            continue
        info = str(part.get("Info", info))
        complete = "Status" in part and "Info" not in part  # with a text comes the status of before the start
        yield one, {"status": part["Status"], "additional_info": info} if complete else None


def is_fetch(seen: Observation) -> bool:
    return seen.kind == "publish" and str(seen.data["topic"]).endswith("/otafetch")


def is_timer(seen: Observation, timer: str) -> bool:
    return seen.kind == "timer" and seen.data["timer"] == timer


def is_fetching(seen: Observation) -> bool:
    """Part of fetching: the message, the wait for its acknowledgement, the delay until the next one."""
    return is_fetch(seen) or is_timer(seen, "puback_timeout") or is_timer(seen, "fetch_delay")


def without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_time(one) for key, one in value.items() if key != "ts"}
    return value


def same_place(a: Observation, b: Observation) -> bool:
    return (a.boot, a.t) == (b.boot, b.t)


def wrapped(seconds: float) -> float:
    """A delay as the reference's 32-bit tick counter holds it."""
    return int(seconds) * TICKS_PER_S % 2**32 / TICKS_PER_S


# ---- How a job went -------------------------------------------------------------------------------------------


@dataclass
class Flow:
    """What was reported for one job, as a line of letters, and the texts behind them.

    ``A1`` attempt 1 starts, ``D`` downloading, ``p`` progress, ``C`` complete, ``F1`` attempt 1 failed, ``R1``
    rebooting after attempt 1, ``S1`` success without rollback, ``X`` rejected, ``L`` delayed, ``E`` failed for good.
    """

    line: str
    failures: list[str]
    texts: list[str]
    wrong: str | None = None

    WELL_FORMED = re.compile(r"(A\d+(Dp*C?)?F\d+)*(A\d+((Dp*C?)?F\d+|Dp*C[RS]\d+|(Dp*)?X))|L|E")


_PATTERNS = [
    (re.compile(r"Starting OTA Upgrade \((?:HTTPS|MQTT) attempt (\d+)/\d+\)"), "in-progress", "A"),
    (re.compile(r"Downloading Firmware Image()"), "in-progress", "D"),
    (re.compile(r"Downloaded \d+% Firmware Image()"), "in-progress", "p"),
    (re.compile(r"Firmware Image download complete()"), "in-progress", "C"),
    (re.compile(r"OTA Attempt (\d+)/\d+ failed: .*"), "failed", "F"),
    (re.compile(r"Rebooting into new firmware \(after (\d+) (?:HTTPS|MQTT) attempts?\)"), "in-progress", "R"),
    (re.compile(r"(?:HTTPS|MQTT) OTA Upgrade finished successfully \(after (\d+) attempts?\)"), "success", "S"),
    (re.compile(r".*()"), "rejected", "X"),
    (re.compile(r".*()"), "delayed", "L"),
    (re.compile(r".*()"), "failed", "E"),
]


def flow_of(seen: Iterable[Observation], job_id: str) -> Flow:
    """The flow of a job's reports; ``wrong`` says what is not as it has to be whatever the outcome."""
    line, failures, texts = "", [], []
    wrong = None
    expected_event: tuple[float, str] | None = None
    for one, status in reports_of(seen, job_id):
        if expected_event is not None and one.kind in ("publish", "event"):
            if one.kind != "event" or (one.t, one.data["data"]) != expected_event:
                wrong = f"no event after the report '{expected_event}'"
            expected_event = None
        if status is None:
            continue
        info = str(status["additional_info"])
        texts.append(info)
        expected_event = (one.t, info)
        for pattern, wire, letter in _PATTERNS:
            found = pattern.fullmatch(info)
            if found is not None and status["status"] == wire:
                line += letter + found.group(1)
                if letter == "F":
                    failures.append(info.split(" failed: ", 1)[1])
                break
        else:
            wrong = f"a report that belongs to no job: {status}"
    if wrong is None and Flow.WELL_FORMED.fullmatch(line) is None:
        wrong = f"the reports of job {job_id} make no sense: {line}"
    attempts = [int(number) for number in re.findall(r"A(\d+)", line)]
    if wrong is None and attempts != list(range(1, len(attempts) + 1)):
        wrong = f"attempts {attempts}"
    return Flow(line, failures, texts, wrong)


def episode(context: Context, side: list[Observation], message: Message) -> list[Observation]:
    """What happened in that boot from a message on until the next one."""
    following = context.scenario.next_message(message)
    last = following.step if following is not None else 10**9
    return [one for one in side if one.boot == message.boot and message.step <= one.step < last]


_JOB_KINDS = {
    "subscribe",
    "unsubscribe",
    "publish",
    "event",
    "http_connect",
    "http_request",
    "slot_state",
    "timer",
    "callback_return",
    "api_return",
}


def job_went_otherwise(context: Context, number: str, message: Message, good: Callable[[Flow], bool]) -> bool:
    """Explains that a job went another way than in the reference, if either way makes sense and ours is a good one.

    What follows from it is explained too: one side restarts and the other does not, or another image runs afterwards.
    """
    ours = episode(context, context.replay, message)
    theirs = episode(context, context.reference, message)
    flow = flow_of(ours, str(message.field("ota_job_id")))
    if flow.wrong is not None or not good(flow) or _nonsense(context, message, theirs):
        return False
    following = context.scenario.next_message(message)
    restarts = [any(one.kind == "reboot" for one in side) for side in (theirs, ours)]

    def belongs(seen: Observation) -> bool:
        if seen.boot == 0:
            return following is None  # what is left at the end
        if seen.boot > message.boot:
            return following is None and restarts[0] != restarts[1]
        within = seen.boot == message.boot and seen.step >= message.step
        return (
            within
            and (following is None or seen.step < following.step)
            and seen.kind in (*_JOB_KINDS, "reboot", "boot")
        )

    taken = [one for one in context.open if belongs(one.seen)]
    if not taken:
        return False
    context.explain(number, *taken)
    if restarts == [True, True]:
        _other_image_runs(context, number, message.boot + 1)
    return True


def _other_outcome(
    context: Context, number: str, boot: int, theirs: tuple[str, str] | None, ours: tuple[str, str]
) -> None:
    """Explains that a boot's initial report says another outcome, or one at all; and so does, of its status, the first
    report after it."""
    status, info = theirs or ("", "")
    for missing, extra in list(context.pairs("publish")):
        said, saying = ota_params_of(missing.seen), ota_params_of(extra.seen)
        if said is None or saying is None or missing.seen.boot != boot:
            continue
        if missing.seen.data["topic"] != extra.seen.data["topic"]:
            continue
        if str(missing.seen.data["topic"]).endswith("/init"):
            if said == {**said, "Status": status, "Info": info} and saying == {
                **said,
                "Status": ours[0],
                "Info": ours[1],
            }:
                context.explain(number, missing, extra)
        elif said.get("Status") == (None if theirs is None else status) and saying == {**said, "Status": ours[0]}:
            context.explain(number, missing, extra)


def _boots_at_another_time(context: Context, number: str, message: Message) -> None:
    """A job that took another time: so do the restart and all that follows."""
    moments = [
        [one.t for one in side if one.kind == "boot" and one.boot == message.boot + 1]
        for side in (context.reference, context.replay)
    ]
    if moments[0] and moments[1]:
        _later(context, number, message.boot + 1, round(moments[1][0] - moments[0][0], 3))


def _nonsense(context: Context, message: Message, theirs: list[Observation]) -> bool:
    """Whether the reference's side of a job is not what the reference does: somebody changed the recording."""
    readable = message.job_id is not None and "\\" not in message.job_id
    if readable and message.strict is not None:
        flow = flow_of(theirs, str(message.job_id))
        if flow.wrong is not None and flow.line != "":  # an application callback may report nothing
            return True
        if flow.line.startswith("A") and not any(
            one.kind == "event" and (one.data["event"], one.data["data"]) == ("STARTING", None) for one in theirs
        ):
            return True
    config = context.config(message.boot)
    usual = {FETCH_DELAY_S, 10.0, PUBACK_S, *RETRY_S, config["retry_delay_minutes"] * 60.0}
    return any(
        one.seen.kind == "timer" and one.seen.data["seconds"] not in usual
        for one in context.missing("timer")
        if one.seen.boot == message.boot and one.seen.step >= message.step
    )


def _other_image_runs(context: Context, number: str, boot: int, swap: dict[str, str] | None = None) -> None:
    """After the restart another image runs, or the same under another job: the same things happen under other names."""
    names = dict(swap or {})
    booted = [
        [one.data["version"] for one in seen if one.kind == "boot" and one.boot == boot]
        for seen in (context.reference, context.replay)
    ]
    if booted[0] and booted[1]:
        names[booted[0][0]] = booted[1][0]
    for kind in ("boot", "publish", "stored"):
        for missing, extra in list(context.pairs(kind)):
            if missing.seen.boot in (0, boot) and _swapped(missing.seen.data, names) == extra.seen.data:
                context.explain(number, missing, extra)


def _swapped(value: Any, swap: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _swapped(one, swap) for key, one in value.items()}
    if isinstance(value, str):
        for old, new in swap.items():
            if value == old:
                return new
            if value == old.encode().hex():
                return new.encode().hex()
    return value


# ---- The rules ------------------------------------------------------------------------------------------------


@rule("Q1", "A callback is told the stream id of a job whichever transport is used.")
def stream_id(context: Context) -> None:
    for missing, extra in context.pairs("callback"):
        message = context.scenario.message_before(missing.seen.boot, missing.seen.step)
        announced = None if message is None else message.field("stream_id")
        if announced is None or missing.seen.data.get("stream_id") is not None:
            continue
        if {**missing.seen.data, "stream_id": announced} == extra.seen.data:
            context.explain("Q1", missing, extra)


@rule("Q2", "In the params workflow a callback is told no job id, where the reference hands out an address of its own.")
def no_job_id(context: Context) -> None:
    for missing, extra in context.pairs("callback"):
        job_id = missing.seen.data.get("ota_job_id")
        by_params = context.config(missing.seen.boot)["workflow"] == "params"
        if by_params and job_id is not None and {**missing.seen.data, "ota_job_id": None} == extra.seen.data:
            context.explain("Q2", missing, extra)


@rule(
    "Q3",
    "mark_valid inside the INIT diagnostics works: it returns 0, the slot is valid and success is reported at "
    "once, so that no rollback timer runs and nothing is asked or confirmed at the connection.",
)
def mark_valid_inside_init(context: Context) -> None:
    inside = [
        one
        for one in context.missing("api_return")
        if one.seen.data == {"api": "mark_valid", "ret": "ESP_ERR_INVALID_ARG"}
        and _inside_init(context.reference, one.index)
    ]
    for refused in inside:
        boot, t = refused.seen.boot, refused.seen.t
        worked = [
            one
            for one in context.extra("api_return")
            if same_place(one.seen, refused.seen) and one.seen.data == {"api": "mark_valid", "ret": "ESP_OK"}
        ]
        valid = [one for one in context.extra("slot_state") if one.seen.boot == boot and one.seen.t == t]
        if len(worked) != 1 or [one.seen.data["state"] for one in valid] != ["VALID"]:
            continue
        taken = [refused, worked[0]]
        # The confirmation moves from the connection to the diagnostics: the same things, earlier.
        moved = ("slot_state", "publish", "event")
        late = [
            one
            for one in context.missing()
            if one.seen.boot == boot and one.seen.t >= t and one.seen.kind in moved and not is_fetching(one.seen)
        ]
        early = [
            one
            for one in context.extra()
            if one.seen.boot == boot and one.seen.t == t and one.seen.kind in moved and not is_fetching(one.seen)
        ]
        if [(one.seen.kind, without_time(_flat(one.seen.data))) for one in late] != [
            (one.seen.kind, without_time(_flat(one.seen.data))) for one in early
        ]:
            continue
        taken += late + early
        taken += [
            one
            for one in context.missing()
            if one.seen.boot == boot
            and (
                is_timer(one.seen, "rollback")
                or (one.seen.kind == "callback" and one.seen.data.get("state") == "POST_MQTT")
                or (one.seen.kind == "callback_return" and one.seen.data["which"] == "ota_diag")
                or is_timer(one.seen, "fetch_delay")
            )
        ]
        taken += [one for one in context.extra("timer") if one.seen.boot == boot and is_timer(one.seen, "fetch_delay")]
        context.explain("Q3", *taken)


def _flat(data: Json) -> Json:
    payload = data.get("payload")
    return {**data, "payload": without_time(payload)} if payload is not None else data


def _inside_init(seen: list[Observation], index: int) -> bool:
    for one in reversed(seen[:index]):
        if one.kind == "callback_return":
            return False
        if one.kind == "callback":
            return one.data.get("state") == "INIT"
    return False


@rule(
    "Q4",
    "OTA enabled after the node was started subscribes and fetches at once; jobs that arrive then are taken.",
)
def enabled_late(context: Context) -> None:
    for boot, steps in enumerate(context.scenario.trace.inputs["boots"], start=1):
        started = False
        start_called = False
        for number, step in enumerate(steps, start=1):
            if step["do"] == "start":
                start_called = True
            elif step["do"] == "mqtt_connect" and start_called:
                started = True
            elif step["do"] == "enable" and started:
                _explain_late_enable(context, boot, number)
                return


def _explain_late_enable(context: Context, boot: int, step: int) -> None:
    after = [one for one in context.open if one.seen.boot == boot and one.seen.step >= step]
    if not any(one.side == "extra" and one.seen.kind == "subscribe" for one in after):
        return
    context.explain(
        "Q4",
        *(
            one
            for one in after
            if one.side == "extra"
            and (one.seen.kind == "subscribe" or is_fetching(one.seen) or is_timer(one.seen, "autofetch"))
        ),
    )
    for message in context.messages:
        if message.boot != boot or message.step < step:
            continue
        lost = [
            one for one in context.missing("undelivered") if one.seen.boot == boot and one.seen.step == message.step
        ]
        context.explain("Q4", *lost)
        if lost:
            job_went_otherwise(context, "Q4", message, lambda flow: True)
            context.explain(
                "Q4",
                *(
                    one
                    for one in context.extra()
                    if one.seen.boot == boot
                    and one.seen.step == message.step
                    and one.seen.kind in ("callback", "callback_return")
                ),
            )


@rule(
    "Q7",
    "One fetch is due at a time: where the reference has several fetch timers running, those due later than "
    "another one do not fire, nor does what they would have started.",
)
def one_fetch_timer(context: Context) -> None:
    _replaced_timers(context)
    surplus = context.scenario.surplus
    if not surplus.started:
        return
    for one in list(context.missing()):
        if one.seen.record in surplus.caused and is_fetching(one.seen):
            context.explain("Q7", one)
    # The retry counter was shared, so what is left may be delayed by another step of it: fewer fetches, at other
    # moments.
    begun = {
        boot: min(context.records[start]["t"] for start in surplus.started if context.records[start]["boot"] == boot)
        for boot in {context.records[start]["boot"] for start in surplus.started}
    }
    for boot, first in begun.items():
        theirs = sum(1 for seen in context.reference if is_fetch(seen) and seen.boot == boot)
        ours = sum(1 for seen in context.replay if is_fetch(seen) and seen.boot == boot)
        retries = [
            one
            for one in context.open
            if one.seen.boot == boot
            and one.seen.t > first
            and is_fetching(one.seen)
            and (one.seen.kind != "timer" or one.seen.data["seconds"] in (*RETRY_S, PUBACK_S))
        ]
        if ours <= theirs and any(is_timer(one.seen, "fetch_delay") for one in retries):
            context.explain("Q7", *retries)


def _replaced_timers(context: Context) -> None:
    """A fetch that ours alone asks for (Q12, Q13) takes the place of one that is due later."""
    asked_for = [
        one.seen for one in context.all if one.side == "extra" and one not in context.open and one.seen.kind == "timer"
    ]
    for ours in asked_for:
        if not is_timer(ours, "fetch_delay"):
            continue
        due = ours.t + ours.data["seconds"]
        for index, record in enumerate(context.records):
            if record["kind"] != "timer_start" or record["timer"] != "fetch_delay" or record["boot"] != ours.boot:
                continue
            if record["t"] <= ours.t and record["t"] + record["seconds"] > due:
                fired = context.scenario.fired
                context.explain(
                    "Q7",
                    *(
                        one
                        for one in context.missing()
                        if fired.get(one.seen.record) == index and is_fetching(one.seen)
                    ),
                )


@rule(
    "Q8",
    "fetch_with_delay refuses a negative delay; delays are computed in 64 bits, so one beyond the reference's "
    "32-bit tick counter is as long as it was asked for.",
)
def delays(context: Context) -> None:
    for missing, extra in list(context.pairs("api_return")):
        if (missing.seen.data, extra.seen.data) != (
            {"api": "fetch_with_delay", "ret": "ESP_OK"},
            {"api": "fetch_with_delay", "ret": "ESP_ERR_INVALID_ARG"},
        ):
            continue
        timers = [
            one
            for one in context.missing("timer")
            if same_place(one.seen, missing.seen)
            and is_timer(one.seen, "fetch_delay")
            and any(
                wrapped(step["seconds"]) == one.seen.data["seconds"]
                for step in _delays_asked_for(context)
                if step["seconds"] < 0
            )
        ]
        if timers:
            context.explain("Q8", missing, extra, timers[0])
            _wrapped_timer_fires(context, timers[0].seen)
    for missing, extra in list(context.pairs("timer")):
        if not (is_timer(missing.seen, "fetch_delay") and is_timer(extra.seen, "fetch_delay")):
            continue
        ours, theirs = extra.seen.data["seconds"], missing.seen.data["seconds"]
        if ours >= LONGEST_DELAY_S - 1 and abs(wrapped(ours) - theirs) < 0.02:
            context.explain("Q8", missing, extra)
            _wrapped_timer_fires(context, missing.seen)


def _delays_asked_for(context: Context) -> Iterator[Json]:
    def calls(value: Any) -> Iterator[Json]:
        if isinstance(value, dict):
            if value.get("name") == "fetch_with_delay":
                yield value
            for one in value.values():
                yield from calls(one)
        elif isinstance(value, list):
            for one in value:
                yield from calls(one)

    yield from calls(context.scenario.trace.inputs["boots"])


def _wrapped_timer_fires(context: Context, started: Observation) -> None:
    fired = context.scenario.fired
    context.explain(
        "Q8",
        *(one for one in context.missing() if fired.get(one.seen.record) == started.record and is_fetching(one.seen)),
    )


@rule("Q9", "mark_invalid returns the boot layer's error when there is no image to roll back to.")
def mark_invalid_error(context: Context) -> None:
    for missing, extra in list(context.pairs("api_return")):
        if (
            missing.seen.data == {"api": "mark_invalid", "ret": "ESP_OK"}
            and extra.seen.data == {"api": "mark_invalid", "ret": "ESP_ERR_OTA_ROLLBACK_FAILED"}
            and not any(one.kind == "reboot" and one.t == missing.seen.t for one in context.reference)
        ):
            context.explain("Q9", missing, extra)


def _unescape(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(f'"{value}"', strict=False)
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: one if key == "metadata" else _unescape(one) for key, one in value.items()}
    return value


@rule(
    "Q10",
    "Jobs are read by a real JSON parser: strings are unescaped, sizes have 64 bits, and what is no JSON text "
    "in UTF-8 is no job, whatever the reference makes of it.",
)
def json_parser(context: Context) -> None:
    for message in context.messages:
        if message.strict is None:
            _no_json(context, message)
        elif b"\\" in message.payload:
            _escapes(context, message)
        size = message.field("file_size")
        if isinstance(size, int) and not -(2**31) <= size < 2**31:
            _large_size(context, message, size)
    for missing, extra in list(context.pairs("stored")):
        if missing.seen.data["key"] != extra.seen.data["key"]:
            continue
        if not missing.seen.data["key"].endswith("/rmaker_ota_id"):
            continue
        text = bytes.fromhex(str(missing.seen.data["value"])).decode("utf-8", "replace")
        if "\\" in text and str(_unescape(text)).encode().hex() == extra.seen.data["value"]:
            context.explain("Q10", missing, extra)


def _no_json(context: Context, message: Message) -> None:
    """The reference took it, or found something else wrong; ours drops it as no JSON."""
    refused = [
        one
        for one in context.extra("event")
        if one.seen.boot == message.boot and one.seen.step == message.step and one.seen.data["data"] == NO_JSON
    ]
    if not refused:
        return
    ours = [
        one
        for one in context.replay
        if one.boot == message.boot and one.step == message.step and one.kind not in ("event", "timer")
    ]
    if ours:
        return
    theirs = [one for one in context.missing() if one.seen.boot == message.boot and one.seen.step == message.step]
    context.explain("Q10", *refused, *theirs)
    _stored_id(context, "Q10")


def _stored_id(context: Context, number: str) -> None:
    """What is stored as the last job's id differs, as the jobs taken did."""
    context.explain(
        number,
        *(one for one in context.open if one.seen.kind == "stored" and one.seen.data["key"].endswith("rmaker_ota_id")),
    )


def _escapes(context: Context, message: Message) -> None:
    for kind in ("callback", "publish"):
        for missing, extra in list(context.pairs(kind)):
            at = (missing.seen.boot, missing.seen.step)
            if at == (message.boot, message.step) and _unescape(missing.seen.data) == extra.seen.data:
                context.explain("Q10", missing, extra)
    url = message.field("url")
    if isinstance(url, str) and url.encode() not in message.payload:
        # The reference asks for the escaped URL, which is none; ours downloads.
        theirs = flow_of(episode(context, context.reference, message), str(message.field("ota_job_id")))
        if theirs.failures and all(text.startswith("OTA Begin failed: ESP_FAIL") for text in theirs.failures):
            job_went_otherwise(context, "Q10", message, lambda flow: "D" in flow.line)


def _large_size(context: Context, message: Message, size: int) -> None:
    for missing, extra in list(context.pairs("callback")):
        if (
            missing.seen.step == message.step
            and {**missing.seen.data, "filesize": size} == {**extra.seen.data, "filesize": size}
            and extra.seen.data["filesize"] == (size if -(2**63) <= size < 2**63 else 0)
        ):
            context.explain("Q10", missing, extra)


@rule(
    "Q11",
    "A message without a readable job id is reported for no job: nothing is published, and the stored id stays.",
)
def no_stale_job_id(context: Context) -> None:
    for one in list(context.missing("publish")):
        status = status_of(one.seen)
        message = context.scenario.message_before(one.seen.boot, one.seen.step)
        if status is None or message is None or message.step != one.seen.step:
            continue
        carried = message.field("ota_job_id")
        if (
            status["status"] == "failed"
            and status["additional_info"] in (NO_JSON, NO_ID)
            and not isinstance(carried, str)
        ):
            context.explain("Q11", one)
            for stored in context.extra("stored"):
                if stored.seen.data["key"] == "rmaker_ota/rmaker_ota_id":
                    context.explain("Q11", stored)


@rule("Q12", "A job for which the worker has no room is asked for again, 5 s later.")
def no_room(context: Context) -> None:
    for record in context.records:
        if record["kind"] != "work_queue_full":
            continue
        timer = [
            one
            for one in context.extra("timer")
            if (one.seen.boot, one.seen.t) == (record["boot"], record["t"])
            and one.seen.data == {"timer": "fetch_delay", "seconds": FETCH_DELAY_S}
        ]
        if timer:
            context.explain("Q12", timer[0], *_fetch_at(context, record["boot"], record["t"] + FETCH_DELAY_S))


def _fetch_at(context: Context, boot: int, t: float) -> list[Difference]:
    """The extra fetch of a moment."""
    return [
        one
        for one in context.extra()
        if one.seen.boot == boot
        and abs(one.seen.t - t) < 0.01
        and (is_fetch(one.seen) or is_timer(one.seen, "puback_timeout"))
    ]


@rule(
    "Q13",
    "Another job that arrives while one is at hand, or while an image is not confirmed, is remembered: a fetch"
    " follows 5 s after there is time for it.",
)
def other_job_remembered(context: Context) -> None:
    for message in context.messages:
        theirs = [
            one
            for one in episode(context, context.reference, message)
            if one.kind == "callback" and one.data.get("ota_job_id") == message.job_id
        ] or [
            one
            for one in episode(context, context.reference, message)
            if (status_of(one) or {}).get("ota_job_id") == message.job_id
        ]
        if theirs or not isinstance(message.field("ota_job_id"), str):
            continue  # it was taken, or says nothing
        for one in list(context.extra("timer")):
            seen = one.seen
            if seen.boot != message.boot or seen.t < message.t:
                continue
            if seen.data == {"timer": "fetch_delay", "seconds": FETCH_DELAY_S}:
                context.explain("Q13", one, *_fetch_at(context, seen.boot, seen.t + FETCH_DELAY_S))
                break


@rule(
    "Q14",
    "After an image was installed no further job is taken until the restart, so the image that was reported is"
    " the one that boots.",
)
def busy_until_restart(context: Context) -> None:
    waiting: dict[int, int] = {}  # boot -> step from which on a restart is due
    for one in context.reference:
        if one.kind == "event" and one.data["event"] in ("REBOOT", "REQ_FOR_REBOOT"):
            waiting.setdefault(one.boot, one.step)
    for message in context.messages:
        if message.boot not in waiting or message.step <= waiting[message.boot]:
            continue
        if any(
            one.kind not in ("timer", "undelivered") and not is_fetch(one)
            for one in context.replay
            if one.boot == message.boot and one.step == message.step
        ):
            continue  # ours did something about it
        dropped = [
            one
            for one in context.missing()
            if one.seen.boot == message.boot
            and message.step <= one.seen.step
            and one.seen.kind in (_JOB_KINDS | {"callback"})
            and not is_fetch(one.seen)
        ]
        if not dropped or _nonsense(context, message, episode(context, context.reference, message)):
            continue
        context.explain("Q14", *dropped)
        _other_image_boots(context, message)


def _other_image_boots(context: Context, second: Message) -> None:
    """The reference boots the second job's image under the second job's id; ours the first one's."""
    first = [one for one in context.messages if (one.boot, one.step) < (second.boot, second.step)]
    if first and second.by_params:
        _other_image_runs(context, "Q14", second.boot + 1)
    elif first and second.job_id is not None and first[-1].job_id is not None:
        _other_image_runs(context, "Q14", second.boot + 1, {second.job_id: first[-1].job_id})


@rule(
    "Q15",
    "Messages are always valid JSON: strings are escaped and nothing is cut off at 199 (status) or 149 (fetch) bytes.",
)
def valid_json(context: Context) -> None:
    for missing, extra in list(context.pairs("publish")):
        text = missing.seen.data["payload"].get("text") if isinstance(missing.seen.data["payload"], dict) else None
        if text is None or {**missing.seen.data, "payload": None} != {**extra.seen.data, "payload": None}:
            continue
        limit = 149 if is_fetch(missing.seen) else 199
        naive = ",".join(
            f'"{key}":{value}' if isinstance(value, int) else f'"{key}":"{value}"'
            for key, value in extra.seen.data["payload"].items()
        )
        if ("{" + naive + "}").encode()[:limit].decode("utf-8", "ignore") == text:
            context.explain("Q15", missing, extra)


@rule(
    "Q16",
    "The outcome of a job is kept until it is acknowledged: one that was refused by the MQTT layer, not "
    "acknowledged before a restart, or not reported before a loss of power is reported later, once; what it "
    "was kept under is erased then.",
)
def outcome_is_kept(context: Context) -> None:
    for one in list(context.extra("publish")):
        status = status_of(one.seen)
        if status is None or status["status"] not in ("success", "rejected", "failed"):
            continue
        before = [
            seen
            for seen in context.replay[: one.index]
            if (earlier := status_of(seen)) is not None and without_time(earlier) == without_time(status)
        ]
        events = [
            other
            for other in context.extra("event")
            if same_place(other.seen, one.seen) and other.seen.data["data"] == status["additional_info"]
        ]
        if before:
            lost = not before[-1].data["accepted"] or before[-1].boot < one.seen.boot
        else:
            lost = bool(events) and status["status"] != "success" and _verdict_was_lost(context, one.seen, status)
        if not lost:
            continue
        context.explain("Q16", one, *events[:1])
        if before and one.seen.data["accepted"] is False:
            continue
        for stored in context.missing("stored"):
            if stored.seen.data["key"].split("/")[1] in ("rmaker_ota_id", "ota_fail_jid", "ota_fail_rsn"):
                context.explain("Q16", stored)
    final = {"SUCCESSFUL": "success", "REJECTED": "rejected", "FAILED": "failed"}
    for one in list(context.extra("publish")):
        before = [
            seen.data
            for seen in context.replay
            if seen.kind == "event" and seen.boot < one.seen.boot and seen.data["data"]
        ]
        if ota_params_of(one.seen) is not None and before and before[-1]["event"] in final:
            outcome = (final[before[-1]["event"]], str(before[-1]["data"]))
            _other_outcome(context, "Q16", one.seen.boot, None, outcome)


def _verdict_was_lost(context: Context, seen: Observation, status: Json) -> bool:
    """The reference noticed a rollback in an earlier boot and never reported it."""
    noticed = [
        record["boot"]
        for record in context.records
        if record["kind"] == "nvs_erase" and record.get("key") == "ota_update" and record.get("existed")
    ]
    reported = any(
        without_time(other) == without_time(status)
        for one in context.reference
        if (other := status_of(one)) is not None
    )
    return any(boot < seen.boot for boot in noticed) and not reported


@rule(
    "Q19",
    "A plain http URL is refused: every attempt fails with `OTA Begin failed: ESP_ERR_INVALID_ARG`, nothing is"
    " connected to.",
)
def plain_http(context: Context) -> None:
    for message in context.messages:
        url = message.field("url")
        if not isinstance(url, str) or not url.lower().startswith("http:"):
            continue
        if any(one.kind == "http_connect" for one in episode(context, context.replay, message)):
            continue
        expected = "OTA Begin failed: ESP_ERR_INVALID_ARG (errno=0: Invalid)"
        job_went_otherwise(context, "Q19", message, partial(_all_failed, {expected}))


def _all_failed(texts: set[str], flow: Flow) -> bool:
    return bool(flow.failures) and set(flow.failures) == texts


@rule(
    "Q20",
    "A server that sends nothing for 60 s ends the attempt with ESP_ERR_TIMEOUT; the job goes on with the next"
    " attempt.",
)
def stall(context: Context) -> None:
    behaviours = [
        *(context.scenario.trace.inputs.get("https_server") or []),
        context.scenario.trace.inputs.get("https_server_default") or {},
    ]
    if not any(
        ("stall_after" in one and one.get("stalls", 10**6) * 5 >= 60) or one.get("no_response") == "silent"
        for one in behaviours
    ):
        return
    for message in context.messages:
        job_went_otherwise(
            context, "Q20", message, lambda flow: any("ESP_ERR_TIMEOUT" in text for text in flow.failures)
        )


@rule(
    "Q22",
    "Size and MD5 are checked after the download, the size that the server announces before it: a file that is "
    "not the announced one fails with `Image validation failed`. Over MQTT what is no image at all fails so before it"
    " is downloaded to its end, and one for another chip revision, which would not boot, is rejected as over HTTPS.",
)
def not_the_announced_file(context: Context) -> None:
    for message in context.messages:
        if _other_revision(context, message):
            job_went_otherwise(context, "Q22", message, lambda flow: flow.texts[-1:] == ["Chip revision mismatch"])
        if _mismatch(context, message):
            job_went_otherwise(context, "Q22", message, lambda flow: "Image validation failed" in flow.failures)


def _other_revision(context: Context, message: Message) -> bool:
    """Whether a stream holds an image for another revision of the chip."""
    inputs = context.scenario.trace.inputs
    if context.config(message.boot)["protocol"] != "mqtt":
        return False
    image = inputs["images"].get((inputs.get("stream_server") or {}).get("image", "new"), {})
    revision = {"chip_revision": 4, **inputs.get("device", {})}["chip_revision"]
    return not image.get("min_chip_rev", 0) <= revision <= image.get("max_chip_rev", 99)


def _mismatch(context: Context, message: Message) -> bool:
    """Whether the announced size or checksum is not that of some file the server has."""
    inputs = context.scenario.trace.inputs
    behaviours = [*(inputs.get("https_server") or []), inputs.get("https_server_default") or {}]
    if context.config(message.boot)["protocol"] == "mqtt":
        image = inputs["images"][(inputs.get("stream_server") or {}).get("image", "new")]
        behaviours = [inputs.get("stream_server") or {}]
        if image.get("bad_magic"):
            return True
    names = {one.get("image", "new") for one in behaviours}
    size = message.field("file_size")
    sizes = {
        min(inputs["images"][name].get("size", 65536), one.get("body_bytes", 2**32), one.get("content_length", 2**32))
        for one in behaviours
        for name in [one.get("image", "new")]
    }
    wrong_size = isinstance(size, int) and size > 0 and sizes != {size}
    md5 = message.field("file_md5")
    return wrong_size or (isinstance(md5, str) and md5 != "" and (len(names) > 1 or len(md5) != 32))


@rule(
    "Q23",
    "Progress: each multiple of the interval is reported once when it is reached, never 100 percent or more, "
    "and nothing without a size.",
)
def progress(context: Context) -> None:
    for one in list(context.open):
        config = context.config(one.seen.boot)
        if not config.get("progress_support"):
            continue
        interval = config.get("progress_interval", 10)
        if one.seen.kind == "event":
            text = str(one.seen.data["data"])
        else:
            text = str((status_of(one.seen) or {}).get("additional_info", ""))
        found = re.fullmatch(r"Downloaded (-?\d+)% Firmware Image", text)
        if found is None:
            continue
        percent = int(found.group(1))
        sensible = 0 < percent < 100 and percent % interval == 0
        allowed = not sensible if one.side == "missing" else sensible and _jumped_over(context, one.seen, percent)
        if allowed:
            context.explain("Q23", one)


def _jumped_over(context: Context, seen: Observation, percent: int) -> bool:
    """Whether no position the reference reads up to is exactly that many percent."""
    message = context.scenario.message_before(seen.boot, seen.step)
    size = None if message is None else message.field("file_size")
    if not isinstance(size, int) or size <= 0:
        return False
    if _between_positions(context, seen, percent, size):
        return True
    config = context.config(seen.boot)
    over_mqtt = config["protocol"] == "mqtt"
    step = config.get("mqtt_block_size", 4096) if over_mqtt else config["http_rx_buffer_size"]
    return all(100 * position // size != percent for position in range(0, size + step, step))


def _between_positions(context: Context, seen: Observation, percent: int, size: int) -> bool:
    """Whether ours goes on from a position behind the reference's (Q24) and passes this multiple on the way."""
    before = [one for one in context.replay[: context.replay.index(seen)] if one.kind == "http_request"]
    if not before:
        return False
    theirs = [one for one in context.reference if one.kind == "http_request" and same_place(one, before[-1])]
    mine = _offset(before[-1].data["range"]) or 0
    return any(100 * mine // size < percent <= 100 * (_offset(one.data["range"]) or 0) // size for one in theirs)


@rule(
    "Q24",
    "A kept position is used only if it belongs to the slot, the size and the checksum of the job and the "
    "digest of what is in the slot is known; it may be up to one sector an attempt behind what arrived; it is dropped "
    "when the download cannot begin although the server answers, and when nothing of the image is there yet. "
    "It is stored in bytes.",
)
def kept_position(context: Context) -> None:
    requests = [one for one in context.reference if one.kind == "http_request"]
    markers = dict(zip((id(one) for one in requests), context.scenario.requests, strict=True))
    needless = _useless_ranges(context, markers)
    anew: list[Difference] = []
    for missing, extra in list(context.pairs("http_request")):
        if {**missing.seen.data, "range": None} != {**extra.seen.data, "range": None}:
            continue
        marker = context.scenario.markers[markers[id(missing.seen)]]
        if _range_may_differ(context, missing, extra.seen, marker):
            context.explain("Q24", missing, extra)
            if (_offset(missing.seen.data["range"]) or 0) > 0 and extra.seen.data["range"] is None and not marker.own:
                anew.append(missing)
    for missing, extra in list(context.pairs("stored")):
        if missing.seen.data["key"] != extra.seen.data["key"] or not missing.seen.data["key"].endswith("ota_written"):
            continue
        theirs, ours = int(missing.seen.data["value"]), int(extra.seen.data["value"])
        resumed = sum(one.kind == "http_request" and (_offset(one.data["range"]) or 0) > 0 for one in context.replay)
        if theirs * 1024 - SECTOR * (1 + resumed) < ours <= theirs * 1024 + 1023:
            context.explain("Q24", missing, extra)
    _stream_position(context)
    keys = ("ota_written", "ota_file_md5", "mqtt_ota_off", "mqtt_ota_md5")
    position = [one for one in context.missing("stored") if one.seen.data["key"].endswith(keys)]
    values = {one.seen.data["key"].split("/")[1]: one.seen.data["value"] for one in position}
    if position and (
        0 in (values.get("ota_written"), values.get("mqtt_ota_off")) or _last_failure_before_data(context)
    ):
        context.explain("Q24", *position)
    _begun_anew(context, "Q24", anew)
    for one in needless:  # what the server has for the reference's next connections, ours gets from then on
        message = context.scenario.message_before(one.seen.boot, one.seen.step)
        if message is not None:
            job_went_otherwise(context, "Q24", message, lambda flow: re.search(r"D|F\d+A", flow.line) is not None)
    _wedge(context)


def _stream_position(context: Context) -> None:
    """A position over MQTT that was there before: nobody knows what lies in the slot."""
    before = context.scenario.trace.inputs.get("nvs", {}).get("rmaker_ota", {})
    if "mqtt_ota_off" not in before or "ota_position" in before:
        return
    for message in context.messages:
        theirs = [one.data["payload"] for one in episode(context, context.reference, message) if is_request(one)]
        ours = [one.data["payload"] for one in episode(context, context.replay, message) if is_request(one)]
        if theirs and ours and theirs[0]["o"] == before["mqtt_ota_off"]["value"] > 0 and ours[0]["b"] is None:
            job_went_otherwise(context, "Q24", message, lambda flow: "D" in flow.line)
            _boots_at_another_time(context, "Q24", message)


def _offset(value: str | None) -> int | None:
    found = re.fullmatch(r"bytes=(\d+)-", value or "")
    return None if found is None else int(found.group(1))


def _range_may_differ(context: Context, missing: Difference, ours: Observation, marker: Marker) -> bool:
    theirs = _offset(missing.seen.data["range"])
    mine = _offset(ours.data["range"])
    if theirs is None or marker.md5 is None or theirs != (marker.written or 0) * 1024:
        return False  # not what the reference asks for either
    if theirs == 0:
        return mine is None  # nothing of the image is there yet
    lost = SECTOR * (1 + _resumed_before(context, ours))
    if mine is not None:
        return theirs - lost < mine <= theirs
    if theirs < lost:
        return True  # not one whole sector of it
    return not marker.own or _begin_failed_before(context, missing) or _other_size(context, missing.seen)


def _resumed_before(context: Context, request: Observation) -> int:
    """How many attempts of the job went on from a kept position before; each may have lost part of a sector."""
    message = context.scenario.message_before(request.boot, request.step)
    asked = [] if message is None else [one for one in episode(context, context.replay, message) if one is not request]
    return sum(one.kind == "http_request" and (_offset(one.data["range"]) or 0) > 0 for one in asked)


def _begin_failed_before(context: Context, request: Difference) -> bool:
    """Whether the job's attempt before this request got an answer and could not begin."""
    for seen in reversed(context.reference[: request.index]):
        status = status_of(seen)
        if status is not None and status["status"] == "failed":
            return any(text in status["additional_info"] for text in ("OTA Begin failed", "Failed to read image"))
    return False


def _other_size(context: Context, request: Observation) -> bool:
    """Whether the position was kept for a job with the same checksum and another size."""
    message = context.scenario.message_before(request.boot, request.step)
    if message is None:
        return False
    before = [
        one
        for one in context.messages
        if (one.boot, one.step) < (message.boot, message.step) and one.field("file_md5") == message.field("file_md5")
    ]
    return bool(before) and before[-1].field("file_size") != message.field("file_size")


def _last_failure_before_data(context: Context) -> bool:
    failed = [
        status["additional_info"]
        for one in context.replay
        if (status := status_of(one)) is not None and status["status"] == "failed"
    ]
    return bool(failed) and any(text in failed[-1] for text in ("OTA Begin failed", "Failed to read image"))


def _useless_ranges(context: Context, markers: dict[int, int]) -> list[Difference]:
    """A range the server does not grant is followed by a second connection; without the range there is only that
    one. Returns the requests that ours does not need."""
    needless = []
    for one in list(context.missing("http_request")):
        marker = context.scenario.markers[markers[id(one.seen)]]
        offset = _offset(one.seen.data["range"])
        if offset is None or marker.md5 is None or offset != (marker.written or 0) * 1024:
            continue
        if (
            marker.own
            and offset >= SECTOR
            and not (_begin_failed_before(context, one) or _other_size(context, one.seen))
        ):
            continue
        if _not_granted(context, "Q24", one, markers[id(one.seen)]):
            needless.append(one)
    return needless


def _not_granted(context: Context, number: str, request: Difference, record: int) -> bool:
    """Explains a request whose range the server did not grant, and the connection that took; False: it did."""
    answer = context.records[record + 1]
    if answer["kind"] != "http_response" or answer["status"] not in (200, 416):
        return False
    connects = [other for other in context.missing("http_connect") if same_place(other.seen, request.seen)]
    context.explain(number, request, *connects[:1])
    return True


def _begun_anew(context: Context, number: str, requests: list[Difference]) -> None:
    """A job that ours begins anew where the reference goes on from a kept position can only end better."""
    for one in requests:
        message = context.scenario.message_before(one.seen.boot, one.seen.step)
        if message is not None:
            job_went_otherwise(context, number, message, lambda flow: "D" in flow.line)


def _wedge(context: Context) -> None:
    """The reference cannot read the description from the slot, attempt after attempt; ours starts over."""
    for message in context.messages:
        theirs = flow_of(episode(context, context.reference, message), str(message.field("ota_job_id")))
        ranges = [one for one in episode(context, context.reference, message) if one.kind == "http_request"]
        if any(text.startswith("Failed to read image description") for text in theirs.failures) and any(
            (_offset(one.data["range"]) or 0) > 0 for one in ranges
        ):
            job_went_otherwise(
                context,
                "Q24",
                message,
                lambda flow: sum(text.startswith("Failed to read image") for text in flow.failures) <= 1,
            )


@rule("Q28", "A rollback to a factory slot is reported, and the flag is erased.")
def rollback_to_factory(context: Context) -> None:
    for boot in {one.boot for one in context.replay if one.kind == "boot" and one.data["running"] == "factory"}:
        reports = [
            one
            for one in context.extra()
            if one.seen.boot == boot
            and (
                (status_of(one.seen) or {}).get("additional_info") == ROLLED_BACK_INFO
                or (one.seen.kind == "event" and one.seen.data["data"] == ROLLED_BACK_INFO)
            )
        ]
        if not reports:
            continue
        flags = [
            one
            for one in context.missing("stored")
            if one.seen.data["key"].split("/")[1] in ("ota_update", "rmaker_ota_id")
        ]
        context.explain("Q28", *reports, *flags)
        _other_outcome(context, "Q28", boot, None, ("rejected", ROLLED_BACK_INFO))


@rule(
    "Q29",
    "When the diagnostics answer PENDING after the connection, the time limit for the verdict starts again, "
    "with its own text; everything that follows a rollback for that reason is later by so much.",
)
def verdict_period(context: Context) -> None:
    for index, one in enumerate(context.replay):
        if one.kind != "callback_return" or one.data != {"which": "ota_diag", "ret": "PENDING"}:
            continue
        asked = [seen for seen in context.replay[:index] if seen.kind == "callback"]
        if not asked or asked[-1].data.get("state") != "POST_MQTT":
            continue
        timers = [
            timer
            for timer in context.extra("timer")
            if is_timer(timer.seen, "rollback") and same_place(timer.seen, one)
        ]
        if not timers:
            continue
        context.explain("Q29", *timers)
        begun = [seen for seen in context.reference if is_timer(seen, "rollback") and seen.boot == one.boot]
        if begun:
            _later(context, "Q29", one.boot, round(one.t - begun[0].t, 3))


def _later(context: Context, number: str, boot: int, delay: float) -> None:
    """Explains what is the same but later by ``delay``; what reports say of the time limit may have another text."""
    extra = context.extra()
    for missing in context.missing():
        seen = missing.seen
        at_the_end = seen.boot == 0
        if seen.boot < boot and not at_the_end:
            continue
        for other in extra:
            if (
                (other.seen.kind, other.seen.boot) == (seen.kind, seen.boot)
                and (at_the_end or abs(other.seen.t - seen.t - delay) < 0.002)
                and _same_later(seen.data, other.seen.data, delay)
            ):
                extra.remove(other)
                context.explain(number, missing, other)
                break


def _same_later(theirs: Any, ours: Any, delay: float) -> bool:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return set(theirs) == set(ours) and all(
            abs(ours[key] - theirs[key] - delay) <= 1
            if key in ("ts", "t")
            else _same_later(theirs[key], ours[key], delay)
            for key in theirs
        )
    if isinstance(theirs, str) and isinstance(ours, str):
        mqtt = re.fullmatch(r"MQTT did not connect within (\d+) seconds", theirs)
        if mqtt is not None:
            return ours == f"Firmware verification did not finish within {mqtt.group(1)} seconds"
    return bool(theirs == ours)


@rule(
    "Q35",
    "An image that runs without having had to be confirmed is reported as success, when it is the one that was"
    " installed.",
)
def runs_without_confirmation(context: Context) -> None:
    for missing, extra in list(context.pairs("publish")):
        theirs, ours = status_of(missing.seen), status_of(extra.seen)
        if theirs is None or ours is None:
            continue
        expected = {**theirs, "status": "success", "additional_info": SUCCESS_INFO}
        if theirs["additional_info"] != ROLLED_BACK_INFO or ours != expected:
            continue
        if not _installed_slot_runs(context, missing.seen.boot):
            continue
        context.explain("Q35", missing, extra)
        for lost, found in list(context.pairs("event")):
            if same_place(lost.seen, missing.seen) and (lost.seen.data["data"], found.seen.data["data"]) == (
                ROLLED_BACK_INFO,
                SUCCESS_INFO,
            ):
                context.explain("Q35", lost, found)

    for lost, found in list(context.pairs("event")):
        boot = lost.seen.boot
        if (lost.seen.data["data"], found.seen.data["data"]) != (ROLLED_BACK_INFO, SUCCESS_INFO):
            continue
        if context.config(boot)["workflow"] == "params" and _installed_slot_runs(context, boot):
            context.explain("Q35", lost, found)
            theirs, ours = ("rejected", ROLLED_BACK_INFO), ("success", SUCCESS_INFO)
            _other_outcome(context, "Q35", boot, theirs, ours)


def _installed_slot_runs(context: Context, boot: int) -> bool:
    states = [one.data for one in context.reference if one.kind == "slot_state"]
    installed = [data["slot"] for data in states if data["state"] == "NEW"]
    running = [one.data["running"] for one in context.reference if one.kind == "boot" and one.boot == boot]
    return bool(installed) and bool(running) and installed[-1] == running[0]


@rule(
    "Q36",
    "A kept position belongs to a job only if the checksums are equal (either case of the letters); the "
    "beginning of one, or an empty one, is not enough.",
)
def whole_checksum(context: Context) -> None:
    requests = [one for one in context.reference if one.kind == "http_request"]
    for one, index in zip(requests, context.scenario.requests, strict=True):
        marker = context.scenario.markers[index]
        message = context.scenario.message_before(one.boot, one.step)
        announced = None if message is None else message.field("file_md5")
        if not isinstance(announced, str) or marker.md5 is None:
            continue
        if announced.lower() == marker.md5.lower() or not marker.md5.startswith(announced):
            continue
        for missing, extra in list(context.pairs("http_request")):
            if missing.seen is one and extra.seen.data == {**one.data, "range": None}:
                context.explain("Q36", missing, extra)
                _begun_anew(context, "Q36", [missing])
        for missing in context.missing("http_request"):
            if missing.seen is one and _not_granted(context, "Q36", missing, index):
                _begun_anew(context, "Q36", [missing])
        context.explain(
            "Q36",
            *(
                stored
                for stored in context.open
                if stored.seen.kind == "stored"
                and stored.seen.data["key"].split("/")[1] in ("ota_file_md5", "ota_written")
            ),
        )


def is_request(seen: Observation) -> bool:
    """A request for blocks of a stream."""
    readable = seen.kind == "publish" and isinstance(seen.data["payload"], dict) and "l" in seen.data["payload"]
    return readable and str(seen.data["topic"]).endswith("/get/cbor")


@rule(
    "Q33",
    "A request for the first batch asks for as many blocks as the file has, where the reference counts some behind"
    " its end.",
)
def first_batch(context: Context) -> None:
    for missing, extra in list(context.pairs("publish")):
        if not (is_request(missing.seen) and is_request(extra.seen)):
            continue
        theirs, ours = missing.seen.data["payload"], extra.seen.data["payload"]
        message = context.scenario.message_before(missing.seen.boot, missing.seen.step)
        size = None if message is None else message.field("file_size")
        if (theirs["l"], theirs["o"]) != (ours["l"], ours["o"]) or not isinstance(size, int):
            continue
        # Its bitmap has a bit for each block it counts; what stands behind the file's own bytes is whatever lay there.
        bitmap, own = theirs["b"] or "", ours["b"] or ""
        if not own or not bitmap.startswith(own) or len(bitmap) != -(-theirs["n"] // 8) * 2:
            continue
        if theirs["n"] != context.config(missing.seen.boot).get("mqtt_blocks_per_request", 16):
            continue
        if ours["n"] == -(-size // ours["l"]) - ours["o"] < theirs["n"] and _is_of_first_batch(context, missing.seen):
            context.explain("Q33", missing, extra)


def _is_of_first_batch(context: Context, request: Observation) -> bool:
    """Whether the reference asked for no other blocks before, since it subscribed."""
    for seen in reversed(context.reference[: context.reference.index(request)]):
        if seen.kind == "subscribe":
            return True
        asked = seen.data["payload"] if is_request(seen) else {}
        if asked.get("b") is not None and asked["o"] != request.data["payload"]["o"]:
            return False
    return False


@rule("Q6", "A job over MQTT without stream id or size is reported as failed at once, with one report of its own.")
def missing_stream(context: Context) -> None:
    info = "Missing stream_id or filesize for MQTT OTA"
    for message in context.messages:
        if context.config(message.boot)["protocol"] != "mqtt" or message.strict is None:
            continue
        size = message.field("file_size")
        usable = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not usable or message.field("stream_id") == "":
            job_went_otherwise(context, "Q6", message, lambda flow: flow.texts == [info])
    for event in context.extra("event"):  # a job of the params workflow has neither
        boot = event.seen.boot
        if event.seen.data["data"] != info or context.config(boot)["protocol"] != "mqtt":
            continue
        payloads: list[Json] = [{"OTA": {"Info": info}}, {"OTA": {"Status": "failed"}}]
        reports = [
            one
            for one in context.extra("publish")
            if same_place(one.seen, event.seen)
            and str(one.seen.data["topic"]).endswith("/params/local")
            and one.seen.data["payload"] in payloads
        ]
        if [one.seen.data["payload"] for one in reports] == payloads:
            context.explain("Q6", event, *reports)


@rule(
    "Q32",
    "Blocks are counted: several that arrive at once are several, so no wait runs into its limit although everything"
    " is there; all that follows is earlier by so much.",
)
def blocks_are_counted(context: Context) -> None:
    rules = (context.scenario.trace.inputs.get("stream_server") or {}).get("rules") or []
    if not any(one["do"].get("together", 1) > 1 for one in rules):
        return
    info = "Firmware Image download complete"
    moments = [
        [one for one in side if (status_of(one) or {}).get("additional_info") == info]
        for side in (context.reference, context.replay)
    ]
    for theirs, ours in zip(*moments, strict=False):
        wait = context.config(theirs.boot).get("mqtt_block_wait_s", 10)
        delay = round(ours.t - theirs.t, 3)
        if theirs.boot == ours.boot and delay < 0 and delay % wait == 0:
            _later(context, "Q32", theirs.boot, delay)


@rule(
    "Q39",
    "A position behind the end of the file starts over with all checks: nothing is reported before the header is here.",
)
def position_behind_the_end(context: Context) -> None:
    before = context.scenario.trace.inputs.get("nvs", {}).get("rmaker_ota", {})
    if "mqtt_ota_off" not in before:
        return
    block_size = context.config(1).get("mqtt_block_size", 4096)
    for message in context.messages:
        size = message.field("file_size")
        if isinstance(size, int) and before["mqtt_ota_off"]["value"] * block_size >= size > 0:
            job_went_otherwise(context, "Q39", message, lambda flow: "D" in flow.line)


@rule("Q45", "The answer to the header request may be as long as what was asked for, also where blocks are shorter.")
def header_of_small_blocks(context: Context) -> None:
    for message in context.messages:
        if context.config(message.boot).get("mqtt_block_size", 4096) >= HEADER_REQUEST:
            continue
        theirs = flow_of(episode(context, context.reference, message), str(message.field("ota_job_id")))
        if theirs.failures and set(theirs.failures) == {"Failed to read image description: ESP_FAIL"}:
            job_went_otherwise(context, "Q45", message, lambda flow: "D" in flow.line)


@rule(
    "Q41",
    "What the server says when it rejects a request stands at the end of the report: code and message, in the present"
    " form or the older one; of what is no such message, that it cannot be read.",
)
def rejection_is_told(context: Context) -> None:
    rules = (context.scenario.trace.inputs.get("stream_server") or {}).get("rules") or []
    endings = [_told(str(one["do"]["reject"])) for one in rules if "reject" in one["do"]]

    def told(theirs: str, ours: str) -> bool:
        if "failed: " not in theirs or not ours.startswith(theirs):
            return False
        return any(ending.fullmatch(ours[len(theirs) :]) for ending in endings)

    for missing, extra in list(context.pairs("publish")):
        a, b = status_of(missing.seen), status_of(extra.seen)
        if a is None or b is None or {**a, "additional_info": ""} != {**b, "additional_info": ""}:
            continue
        if told(a["additional_info"], b["additional_info"]):
            context.explain("Q41", missing, extra)
    for missing, extra in list(context.pairs("event")):
        if told(str(missing.seen.data["data"]), str(extra.seen.data["data"])):
            context.explain("Q41", missing, extra)


def _told(rejection: str) -> re.Pattern[str]:
    """What may stand at the end of a report for a message on ``rejected``."""
    members: Any = None
    with contextlib.suppress(ValueError):
        members = json.loads(rejection)
    if not isinstance(members, dict):
        return re.compile(r" \(unreadable message \([^()]*\)\)")
    said = [
        next((one for key in keys if isinstance(one := members.get(key), str)), "")
        for keys in (("o", "code"), ("m", "message"))
    ]
    text = ": ".join(one for one in said if one)
    return re.compile(re.escape(f" ({text})") if text else "(?!)")


@rule(
    "Q26",
    "Where all blocks came and their sizes do not add up to the announced one the attempt fails with `Complete data was"
    " not received`.",
)
def sizes_do_not_add_up(context: Context) -> None:
    for message in context.messages:
        if context.config(message.boot)["protocol"] == "mqtt" and _mismatch(context, message):
            job_went_otherwise(context, "Q26", message, lambda flow: "Complete data was not received" in flow.failures)


@rule("Q27", "The position of a download over MQTT is stored in bytes, so that another block size does no harm.")
def position_in_bytes(context: Context) -> None:
    for missing, extra in list(context.pairs("stored")):
        if missing.seen.data["key"] != extra.seen.data["key"] or not missing.seen.data["key"].endswith("mqtt_ota_off"):
            continue
        if missing.seen.data["value"] * context.config(1).get("mqtt_block_size", 4096) == extra.seen.data["value"]:
            context.explain("Q27", missing, extra)


@rule("Q38", "The validity of a job is compared in 64 bits: a date beyond 32 bits is that date.")
def long_dates(context: Context) -> None:
    for message in context.messages:
        metadata = message.field("metadata")
        validity = metadata.get("validity") if isinstance(metadata, dict) else None
        if not isinstance(validity, dict):
            continue
        dates = [value for value in (validity.get("start"), validity.get("end")) if isinstance(value, int)]
        if all(-(2**31) <= value < 2**31 for value in dates):
            continue
        now = _clock_at(context, message)
        if now is None:
            continue
        start, end = validity.get("start"), validity.get("end")
        right = _validity(start, end, now)
        if right != _validity(_as_32_bits(start), _as_32_bits(end), now):
            job_went_otherwise(context, "Q38", message, partial(_went_as, right))


def _as_32_bits(value: Any) -> Any:
    """A number as the reference reads it."""
    if not isinstance(value, int):
        return value
    return -1 if value >= 2**32 else (value + 2**31) % 2**32 - 2**31  # beyond, it is the largest one, read with a sign


def _validity(start: Any, end: Any, now: int) -> str | None:
    """What is reported for a validity; None: the job proceeds."""
    if isinstance(start, int) and start != -1 and now < start:
        return "Not within valid window."
    if isinstance(end, int) and end != -1 and now > end:
        return "OTA download window lapsed."
    return None


def _went_as(report: str | None, flow: Flow) -> bool:
    return flow.line.startswith("A1") if report is None else flow.texts == [report]


def _clock_at(context: Context, message: Message) -> int | None:
    """Wall clock when a message was handled, from what was reported then."""
    for one in episode(context, context.replay, message):
        status = status_of(one)
        if status is not None:
            return int(status["ts"])
    return None


@rule(
    "Q40",
    "Diagnostics that fail with no image to roll back to are reported as failed once the node is connected.",
)
def failed_without_way_back(context: Context) -> None:
    info = "Diagnostics failed and there is no image to roll back to"
    for boot in {one.seen.boot for one in context.extra("publish")}:
        failed_init = any(
            one.kind == "callback_return"
            and one.data == {"which": "ota_diag", "ret": "FAIL"}
            and one.boot == boot
            and _inside_init(context.replay, index)
            for index, one in enumerate(context.replay)
        )
        if not failed_init or any(one.boot == boot and one.kind == "reboot" for one in context.replay):
            continue
        context.explain(
            "Q40",
            *(
                one
                for one in context.extra()
                if one.seen.boot == boot
                and (
                    (status_of(one.seen) or {}).get("additional_info") == info
                    or (one.seen.kind == "event" and one.seen.data["data"] == info)
                )
            ),
        )
        _other_outcome(context, "Q40", boot, None, ("failed", info))


@rule(
    "Q42",
    "An acknowledgement that arrives before the publishing call returns counts: no time-out and no further "
    "fetch follow.",
)
def early_acknowledgement(context: Context) -> None:
    rules = context.scenario.trace.inputs.get("mqtt", {}).get("publish_rules", [])
    if not any(one.get("action") == "ack_before_return" for one in rules):
        return
    late: set[int] = set()  # timers that would not run
    for index, record in enumerate(context.records):
        if record["kind"] == "timer_start" and (
            record["timer"] == "puback_timeout" or context.scenario.fired.get(index) in late
        ):
            late.add(index)
    context.explain(
        "Q42",
        *(
            one
            for one in context.missing()
            if context.scenario.fired.get(one.seen.record) in late and is_fetching(one.seen)
        ),
    )


@rule("Q43", "Writing to the slot invalidates a kept position: after a job without a checksum there is none.")
def position_is_invalidated(context: Context) -> None:
    requests = [one for one in context.reference if one.kind == "http_request"]
    for one, index in zip(requests, context.scenario.requests, strict=True):
        marker = context.scenario.markers[index]
        asked = _offset(one.data["range"])
        if not marker.overwritten or marker.md5 is None or asked != (marker.written or 0) * 1024:
            continue
        for missing, extra in list(context.pairs("http_request")):
            if missing.seen is one and extra.seen.data == {**one.data, "range": None}:
                context.explain("Q43", missing, extra)
                message = context.scenario.message_before(one.boot, one.step)
                if message is not None:
                    job_went_otherwise(context, "Q43", message, lambda flow: "D" in flow.line)
        for missing in context.missing("http_request"):
            if missing.seen is one and _not_granted(context, "Q43", missing, index):
                _begun_anew(context, "Q43", [missing])
    last = [message for message in context.messages if "D" in _line(context, message)]
    if last and not last[-1].field("file_md5"):
        context.explain(
            "Q43",
            *(
                one
                for one in context.missing("stored")
                if one.seen.data["key"].split("/")[1] in ("ota_file_md5", "ota_written")
            ),
        )


def _line(context: Context, message: Message) -> str:
    return flow_of(episode(context, context.replay, message), str(message.field("ota_job_id"))).line


def explain_stop(context: Context, last_common: int) -> None:
    """Where the reference did not continue there is nothing to compare with what ours does from then on.

    Args:
        last_common: index of the last thing in the replay that the reference did too.
    """
    last = context.records[-1]
    steps = sum(one["kind"] == "step" and one["boot"] == last["boot"] for one in context.records)
    after = [
        one
        for one in context.extra()
        if (one.seen.boot, one.seen.t, one.seen.step) >= (last["boot"], last["t"], steps)
        and (one.index > last_common or one.seen.kind == "timer")
    ]
    context.explain(_why_it_stopped(context, last["kind"]), *after)
    if last["kind"] == "endless":  # ours follows ten redirects and no more
        begun = [one for one in context.reference if one.kind == "http_request"]
        surplus = {one.record for one in begun[11:]}
        context.explain("", *(one for one in context.missing("http_request") if one.seen.record in surplus))


def _why_it_stopped(context: Context, kind: str) -> str:
    text = json.dumps(context.scenario.trace.inputs["boots"])
    if kind == "endless_wait":
        return "Q20"
    if kind == "livelock":
        return "Q26"
    if kind == "crash" and '"report_status"' in text and '"info": null' in text:
        return "Q5"
    if kind == "crash" and '"fetch_with_delay"' in text:
        return "Q8"
    if kind == "crash" and context.config(context.records[-1]["boot"]).get("progress_support"):
        return "Q23"
    return ""


def explain(context: Context) -> None:
    """Applies the rules until nothing more is explained."""
    while context.open:
        before = len(context.open)
        for one in RULES:
            one.apply(context)
        if len(context.open) == before:
            return
