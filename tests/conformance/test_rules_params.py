"""Recordings of the topics workflow, told anew as the params workflow has it: the rules hold for them too.

What differs is written from section 3 of the specification: a job is an address, a report is two messages or waits for
the start, nothing is fetched, and no job has an id.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conformance.runner import platform, replay
from tests.conformance.test_rules import back_on_factory, failing_without_way_back
from tests.conformance.test_traces import DOCUMENTS
from tests.conformance.trace import parse

Json = dict[str, Any]

FETCHING = ("fetch_delay", "puback_timeout", "autofetch")
POSITION = ("ota_written", "ota_file_md5")
OF_JOBS = ("rmaker_ota_id", "ota_fail_jid", "ota_fail_rsn")

ROLLED_BACK = "Firmware rolled back"
STATUS = {
    "IN_PROGRESS": "in-progress",
    "SUCCESSFUL": "success",
    "FAILED": "failed",
    "REJECTED": "rejected",
    "DELAYED": "delayed",
}


_URL = re.compile(r'"url"\s*:\s*("(?:[^"\\]|\\.)*")')


class Untellable(Exception):
    """What the recording shows does not exist in the params workflow."""


class Teller:
    """One recording, record by record."""

    def __init__(self, document: Json) -> None:
        self._old = document
        self.new = copy.deepcopy(document)
        self.node_id = document["inputs"]["node"]["node_id"]
        config = document["config"]
        if config["rollback_report_failed"] or config.get("test_rollback") or config["progress_support"]:
            raise Untellable("job ids or sizes")
        if not config["basic_ingest"] or config["protocol"] != "https" or document.get("config_per_boot"):
            raise Untellable("settings")
        inputs = document["inputs"]
        if '"fetch' in json.dumps(inputs["boots"]):
            raise Untellable("fetching")
        if "mqtt" in inputs or "storage_unavailable" in inputs or inputs.get("power_loss_on"):
            raise Untellable("conditions")
        if document["ending"] != "completed":
            raise Untellable("the reference did not go on")
        if any(key in document["final"]["nvs"].get("rmaker_ota", {}) for key in POSITION) or any(
            "Range" in record.get("headers", {}) for record in document["trace"]
        ):
            raise Untellable("resumption")

    def tell(self) -> Json:
        self.new["config"]["workflow"] = "params"
        self.new["inputs"]["boots"] = [[self._step(step) for step in steps] for steps in self._old["inputs"]["boots"]]
        for values in (self.new["inputs"].get("nvs", {}), self.new["final"]["nvs"]):
            for key in OF_JOBS:
                values.get("rmaker_ota", {}).pop(key, None)
        self._records: list[Json] = []
        boot = 0
        for record in self._old["trace"]:
            if record["boot"] != boot:
                boot = record["boot"]
                self._started = self._confirmed = False
                self._flags: set[str] = set()
                self._values = {"Status": "", "Info": "", "URL": ""}
            for one in self._record(record):
                self._records.append({**one, "boot": boot})
        self.new["trace"] = self._records
        return self.new

    def _step(self, step: Json) -> Json:
        match step["do"]:
            case "enable" if step["type"] == "topics":
                return {**step, "type": "params"}
            case "at":
                return {**step, "step": self._step(step["step"])}
            case "api" if step["call"]["name"] in ("enable_default", "report_status"):
                raise Untellable(step["call"]["name"])
            case "message" if step["topic"].endswith("otaurl"):
                try:
                    job = json.loads(step.get("payload", ""))
                except ValueError:
                    job = {}
                url = _URL.search(step.get("payload", ""))
                if not isinstance(job.get("ota_job_id"), str) or {"metadata", "stream_id"} & set(job) or url is None:
                    raise Untellable("no job, or more than an address")
                payload = f'{{"OTA":{{"URL":{url.group(1)}}}}}'  # escapes are kept
                return {"do": "message", "topic": f"node/{self.node_id}/params/remote", "payload": payload}
            case "message" | "no_node_info" | "work_queue_full" | "mqtt_disconnect":
                raise Untellable(step["do"])
        return step

    def _publish(self, t: float, topic: str, values: Json) -> Json:
        rule = "esp_init_params" if topic.endswith("init") else "esp_set_params"
        return {
            "t": t,
            "kind": "mqtt_publish",
            "topic": f"$aws/rules/{rule}/node/{self.node_id}/{topic}",
            "qos": 1,
            "payload": json.dumps({"OTA": values}),
            "result": "ESP_OK",
        }

    def _report(self, event: Json) -> Iterator[Json]:
        """Two messages after the start; before it the values wait, and are said with the next message once more."""
        for name, value in (("Info", event["data"]), ("Status", STATUS[event["event"]])):
            self._values[name] = value
            self._flags.add(name)
            if self._started:
                yield self._publish(event["t"], "params/local", {one: self._values[one] for one in self._flags})
                self._flags = set()
        yield event

    def _record(self, record: Json) -> Iterator[Json]:
        kind, t = record["kind"], record["t"]
        topic = str(record.get("topic", ""))
        if kind == "mqtt_subscribe" and topic.endswith("/otaurl"):
            yield {**record, "topic": f"node/{self.node_id}/params/remote"}
            yield self._publish(t, "params/local/init", dict(self._values))
            self._started = True
        elif kind == "event" and record["base"] == "RMAKER_OTA_EVENT" and record["data"] is not None:
            if record["data"] != ROLLED_BACK:
                yield from self._report(record)
        elif kind == "nvs_erase" and record["key"] == "ota_update" and record["existed"] and not self._confirmed:
            yield record  # it was rolled back, which is said at once
            event = {"t": t, "kind": "event", "base": "RMAKER_OTA_EVENT", "event": "REJECTED", "data": ROLLED_BACK}
            yield from self._report(event)
        elif (
            kind == "mqtt_unsubscribe"
            or (kind == "mqtt_publish" and topic.endswith(("/otafetch", "/otastatus")))
            or (kind.startswith("timer_") and record["timer"] in FETCHING)
            or (kind.startswith("nvs_") and record["key"] in (*OF_JOBS, *POSITION))
        ):
            return
        elif kind == "callback" and record["which"] == "ota_cb":
            nothing = {"filesize": 0, "fw_version": None, "file_md5": None, "ota_job_id": "<opaque pointer>"}
            yield {**record, "ota_data": {**record["ota_data"], **nothing}}
        else:
            self._confirmed |= kind == "slot_state" and record["state"] == "VALID"
            yield record


def told() -> dict[str, Json]:
    found = {}
    for name, document in DOCUMENTS.items():
        if document["config"]["workflow"] == "topics":
            try:
                found[name] = Teller(document).tell()
            except Untellable:
                continue
    return found


TOLD = told()


def test_enough_can_be_told() -> None:
    assert len(TOLD) > 70
    explained = {rule for one in TOLD.values() for rule in replay(parse(one), platform("simple")).rules}
    assert explained >= {"Q2", "Q3", "Q10", "Q14", "Q16", "Q19", "Q29", "Q35"}


@pytest.mark.parametrize("name", TOLD)
def test_a_recording_told_anew_matches_or_deviates_as_specified(name: str) -> None:
    outcome = replay(parse(TOLD[name]), platform("simple"))
    assert outcome.kind in ("matched", "deviates"), "\n".join(outcome.left or [outcome.why])


@pytest.mark.parametrize(("make", "rule"), [(back_on_factory, "Q28"), (failing_without_way_back, "Q40")])
def test_an_outcome_that_only_ours_tells_is_in_the_initial_report(make: Callable[[], Json], rule: str) -> None:
    document = Teller(make()).tell()
    assert replay(parse(document), platform("simple")).rules == [rule]
    for record in document["trace"]:
        if record["kind"] == "mqtt_publish":
            record["payload"] = record["payload"].replace('"URL": ""', '"URL": "x"')
    assert replay(parse(document), platform("simple")).kind == "unmatched"


def change_status(record: Json) -> None:
    record["payload"] = record["payload"].replace("in-progress", "delayed")


def change_text(record: Json) -> None:
    record["payload"] = record["payload"].replace("Downloading", "Loading")


def change_topic(record: Json) -> None:
    record["topic"] += "/x"


@pytest.mark.parametrize("change", [change_status, change_text, change_topic])
@pytest.mark.parametrize("name", ["https-success-rollback", "https-success-then-other-image-before-reboot"])
def test_a_report_that_was_changed_is_noticed(name: str, change: Callable[[Json], None]) -> None:
    document = copy.deepcopy(TOLD[name])
    for record in document["trace"]:
        if record["kind"] == "mqtt_publish" and record["topic"].endswith("/params/local"):
            change(record)
    assert replay(parse(document), platform("simple")).kind == "unmatched"
