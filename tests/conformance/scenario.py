"""What a trace was about, as the deviation rules need it: its messages, and what the reference had stored when."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.observe import stored_value
from tests.conformance.trace import Trace

Json = dict[str, Any]

_ID = re.compile(rb'"ota_job_id"\s*:\s*"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Message:
    """An ``otaurl`` message that was given to the node, or a write of an address to the OTA service."""

    boot: int
    step: int  # its number among the steps of that boot
    t: float
    payload: bytes
    by_params: bool = False

    @property
    def job_id(self) -> str | None:
        """As the reference reads it: without decoding escapes."""
        found = _ID.search(self.payload)
        return None if found is None else found.group(1).decode("utf-8", "replace")

    @property
    def strict(self) -> Json | None:
        """The payload as an RFC 8259 parser reads it (of equal keys the first); None: it is no JSON object."""
        try:
            value = json.loads(
                self.payload.decode("utf-8"),
                object_pairs_hook=lambda pairs: dict(reversed(pairs)),
                parse_constant=lambda name: 1 / 0,
            )
        except (ValueError, ZeroDivisionError, RecursionError):
            return None
        if isinstance(value, dict) and self.by_params:
            return {"url": value["OTA"]["URL"]}
        return value if isinstance(value, dict) else None

    def field(self, name: str) -> Any:
        return (self.strict or {}).get(name)


@dataclass
class Marker:
    """The reference's note of a download position. ``own``: written in this scenario, not there before it."""

    md5: str | None = None
    written: int | None = None
    own: bool = False
    overwritten: bool = False  # a job without a checksum wrote to the slot since


@dataclass(frozen=True)
class FetchTimers:
    """The reference's fetch timers that one timer alone would not have (Q7).

    ``started`` are the records that start them, ``caused`` those of what they did when they fired: the fetch, the
    wait for its acknowledgement, and what came of that.
    """

    started: frozenset[int]
    caused: frozenset[int]


@dataclass
class Scenario:
    trace: Trace
    messages: list[Message] = field(default_factory=list)
    markers: dict[int, Marker] = field(default_factory=dict)  # by index of the ``http_request`` record
    requests: list[int] = field(default_factory=list)  # indices of those records
    surplus: FetchTimers = FetchTimers(frozenset(), frozenset())
    fired: dict[int, int] = field(default_factory=dict)  # record caused by a timer -> record that started the timer

    def message_before(self, boot: int, step: int) -> Message | None:
        """The last message given by then in that boot."""
        before = [message for message in self.messages if message.boot == boot and message.step <= step]
        return before[-1] if before else None

    def next_message(self, message: Message) -> Message | None:
        after = [other for other in self.messages if (other.boot, other.step) > (message.boot, message.step)]
        return after[0] if after and after[0].boot == message.boot else None


def study(trace: Trace) -> Scenario:
    scenario = Scenario(trace)
    _find_messages(scenario)
    _follow_marker(scenario)
    _follow_timers(scenario)
    return scenario


def _find_messages(scenario: Scenario) -> None:
    boots = scenario.trace.inputs["boots"]
    planned: list[tuple[float, Json]] = []
    boot = steps = 0
    for record in scenario.trace.records:
        if record["boot"] != boot:
            boot, steps, planned = record["boot"], 0, []
        if record["kind"] != "step":
            continue
        steps += 1
        if record.get("scheduled"):
            due = [one for one in planned if one[1]["do"] == record["do"] and abs(one[0] - record["t"]) < 0.01]
            if not due:
                continue
            planned.remove(due[0])
            step = due[0][1]
        else:
            step = boots[boot - 1][record["i"]]
        if step["do"] == "at":
            planned.append((record["t"] + step["seconds"], step["step"]))
        if step["do"] == "message" and step["topic"].endswith("otaurl"):
            payload = bytes.fromhex(step["payload_hex"]) if "payload_hex" in step else step["payload"].encode()
            scenario.messages.append(Message(boot, steps, record["t"], payload))
        if step["do"] == "message" and step["topic"].endswith("params/remote"):
            payload = bytes.fromhex(step["payload_hex"]) if "payload_hex" in step else step["payload"].encode()
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if isinstance(json.loads(payload)["OTA"]["URL"], str):
                    scenario.messages.append(Message(boot, steps, record["t"], payload, by_params=True))


def _follow_marker(scenario: Scenario) -> None:
    trace = scenario.trace
    values: dict[str, Any] = {}
    for key, entry in trace.inputs.get("nvs", {}).get("rmaker_ota", {}).items():
        values[key] = stored_value(entry)
    own = overwritten = False
    for index, record in enumerate(trace.records):
        kind = record["kind"]
        key = record.get("key")
        if kind == "http_request":
            scenario.requests.append(index)
            scenario.markers[index] = Marker(values.get("ota_file_md5"), values.get("ota_written"), own, overwritten)
        if key not in ("ota_file_md5", "ota_written"):
            if kind == "slot_write" and not _writes_marker(trace.records, index):
                overwritten = True
            continue
        if kind == "nvs_set_run":
            values[key] = record["last"]
            own, overwritten = True, False
        elif kind == "nvs_set":
            with contextlib.suppress(KeyError):
                values[key] = stored_value(record)
            own, overwritten = True, False
        elif kind == "nvs_erase":
            values.pop(key, None)


def _writes_marker(records: tuple[Json, ...], index: int) -> bool:
    """Whether a write to the slot is one whose position is noted."""
    return any(
        record["kind"] in ("nvs_set_run", "nvs_set") and record.get("key") == "ota_written"
        for record in records[index + 1 : index + 3]
    )


def _follow_timers(scenario: Scenario) -> None:
    pending: dict[int, tuple[int, float]] = {}  # timer id -> record that started it, due
    surplus: set[int] = set()  # records
    caused: set[int] = set()
    boot = 0
    cause: int | None = None  # record that started the timer which fired last, while that goes on
    for index, record in enumerate(scenario.trace.records):
        kind, t = record["kind"], record["t"]
        if record["boot"] != boot:
            boot, pending, cause = record["boot"], {}, None
        if kind == "step":
            cause = None
        elif kind == "timer_fired":
            cause = pending.pop(record["id"], (-1, 0.0))[0]
        elif cause is not None and t != scenario.trace.records[index - 1]["t"]:
            cause = None
        if cause is not None and cause >= 0:
            scenario.fired[index] = cause
        if cause in surplus and kind != "timer_fired":
            caused.add(index)
        if kind != "timer_start":
            continue
        due = t + record["seconds"]
        if cause in surplus:
            surplus.add(index)
        elif record["timer"] == "fetch_delay":
            others = [
                (start, other)
                for start, other in pending.values()
                if start not in surplus and scenario.trace.records[start]["timer"] == "fetch_delay"
            ]
            if any(other <= due for _, other in others):
                surplus.add(index)
            else:
                surplus.update(start for start, _ in others)
        pending[record["id"]] = (index, due)
    scenario.surplus = FetchTimers(frozenset(surplus), frozenset(caused))
