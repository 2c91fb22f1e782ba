"""The RainMaker side: messages, the rules, a whole job, the state that survives a restart.

The rules are pure, so the inputs of a recorded job can be given to them again and again: what is timed is the rules
alone. A whole job has everything around them but the network and the image: threads, queue, timers, store, a chip in
memory, from the message to the confirmed new image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from benches.measure import Measure
from tests.conformance import world as conformance_world
from tests.conformance.runner import run
from tests.conformance.trace import parse
from tests.sim.node_world import World, good

from rmaker_ota.rainmaker.messages import Job, parse_otaurl, status_payload
from rmaker_ota.rainmaker.store import SqliteStore
from rmaker_ota.rainmaker.workflow import Action, Input, Now, Workflow

TRACES = Path(__file__).resolve().parent.parent / "tests" / "data" / "traces"

# ---- Messages --------------------------------------------------------------------------------------------------------

URL = "https://fw-images.s3.us-east-1.amazonaws.com/gw/2.0.0/image.bin?" + "&".join(
    f"X-Amz-{name}={'0123456789abcdef' * 4}"
    for name in ("Algorithm", "Credential", "Date", "Security-Token", "Signature")
)
OTAURL = json.dumps(
    {
        "ota_job_id": "oTqXvQXPz2h4bbMyZXYvoM",
        "url": URL,
        "fw_version": "2.0.0",
        "file_size": 1572864,
        "file_md5": "0123456789abcdef0123456789abcdef",
        "metadata": {"download_window": {"start": 60, "end": 300}, "validity": {"start": 1767225600}},
    }
).encode()

small = pytest.mark.benchmark(max_time=0.5, min_rounds=5)


def plain_job(payload: bytes) -> Job:
    """What a script would do: `json.loads`, and look at the members. No limits, no surrogates, no exact metadata."""
    fields = json.loads(payload)
    return Job(
        job_id=fields["ota_job_id"],
        url=fields["url"],
        stream_id=fields.get("stream_id"),
        file_size=fields.get("file_size", 0),
        fw_version=fields.get("fw_version"),
        file_md5=fields.get("file_md5"),
        metadata=json.dumps(fields["metadata"]) if "metadata" in fields else None,
    )


@small
@pytest.mark.parametrize("way", [parse_otaurl, plain_job], ids=["ours", "plain json"])
def test_read_otaurl(measure: Measure, benchmark: Any, way: Callable[[bytes], Job], request: Any) -> None:
    benchmark.group = "read an otaurl message"
    expected = plain_job(OTAURL)
    measure(
        request.node.callspec.id,
        lambda: way(OTAURL),
        check=lambda job: job == expected,
        unit="messages",
        counts=lambda _: {"bytes": len(OTAURL)},
    )


def plain_status(job_id: str, status: str, info: str, unix: float) -> bytes:
    return json.dumps(
        {
            "report_timestamp": round(unix * 1000),
            "ota_job_id": job_id,
            "status": status,
            "additional_info": info,
            "timestamp": round(unix),
        }
    ).encode()


@small
@pytest.mark.parametrize("way", [status_payload, plain_status], ids=["ours", "plain json"])
def test_build_status(measure: Measure, benchmark: Any, way: Callable[..., bytes], request: Any) -> None:
    benchmark.group = "build a status report"
    report = ("oTqXvQXPz2h4bbMyZXYvoM", "in-progress", "Downloading Firmware Image", 1767225600.25)

    def check(payload: bytes) -> bool:
        fields = json.loads(payload)
        return (fields["ota_job_id"], fields["status"], fields["additional_info"]) == report[:3]

    measure(request.node.callspec.id, lambda: way(*report), check=check, unit="messages")


# ---- The rules alone -------------------------------------------------------------------------------------------------


class Recording:
    """What the rules were given and what they answered, over all boots of one recorded trace."""

    def __init__(self, trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
        boots: list[tuple[tuple[Any, ...], list[tuple[Input, Now, list[Action]]]]] = []

        class Recorded(Workflow):
            def __init__(self, *args: Any) -> None:
                self._steps: list[tuple[Input, Now, list[Action]]] = []
                options, node, facts, stored, *_ = args
                boots.append(((options, node, facts, None if stored is None else dict(stored)), self._steps))
                super().__init__(*args)

            def handle(self, event: Input, now: Now) -> list[Action]:
                actions = super().handle(event, now)
                self._steps.append((event, now, actions))
                return actions

        with monkeypatch.context() as patch:
            patch.setattr(conformance_world, "Workflow", Recorded)
            run(parse(json.loads((TRACES / trace).read_text(encoding="utf-8"))))
        self._boots = boots
        self.steps = sum(len(steps) for _, steps in boots)
        self.actions = sum(len(actions) for _, steps in boots for _, _, actions in steps)

    def again(self) -> list[list[Action]]:
        """Gives the same inputs to new rules."""
        answers = []
        for args, steps in self._boots:
            workflow = Workflow(*args)
            answers += [workflow.handle(event, now) for event, now, _ in steps]
        return answers

    def is_right(self, answers: list[list[Action]]) -> bool:
        return answers == [actions for _, steps in self._boots for _, _, actions in steps]


@small
@pytest.mark.parametrize("trace", ["https-success-rollback.json", "https-fail-three-times.json"])
def test_rules(measure: Measure, benchmark: Any, monkeypatch: pytest.MonkeyPatch, trace: str) -> None:
    benchmark.group = f"rules alone: {trace.removesuffix('.json')}"
    recording = Recording(trace, monkeypatch)
    assert recording.steps > 10
    measure(
        "ours",
        recording.again,
        check=recording.is_right,
        work=recording.steps,
        unit="steps",
        counts=lambda _: {"steps": recording.steps, "actions": recording.actions},
    )


# ---- A whole job -----------------------------------------------------------------------------------------------------


def whole_job() -> tuple[World, int]:
    """From the power-on with 1.0.0 to 2.0.0, confirmed and reported; the world after it, and the messages it took."""
    world = World()
    world.scripts.append(good())
    world.boot()
    world.connect()
    world.deliver_job()
    world.advance(10)
    sent = len(world.transport.sent)
    world.boot()
    world.connect()
    world.advance(6)
    sent += len(world.transport.sent)
    world.stop()
    return world, sent


def test_whole_job(measure: Measure, benchmark: Any) -> None:
    benchmark.group = "a whole job, world in memory"

    def check(done: tuple[World, int]) -> None:
        world, _ = done
        assert world.chip.running == "ota_1"
        assert world.statuses() == [("success", "OTA Upgrade finished and verified successfully")]
        assert len(world.restart_reasons) == 1

    measure(
        "ours",
        whole_job,
        check=check,
        rounds=15,
        unit="jobs",
        counts=lambda done: {"sent": done[1], "restarts": len(done[0].restart_reasons)},
    )


# ---- State that survives ---------------------------------------------------------------------------------------------

KEPT = {"ota_file_md5": "0123456789abcdef0123456789abcdef", "ota_written": 640}


class PlainFile:
    """The plain way: one JSON file, written anew, synced, renamed, and the directory synced."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def update(self, changes: Mapping[str, Any]) -> None:
        values = self.items() | dict(changes)
        new = self._path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def items(self) -> dict[str, Any]:
        return dict(json.loads(self._path.read_text())) if self._path.exists() else {}

    def get(self, key: str) -> Any:
        return self.items().get(key)

    def close(self) -> None:
        pass


@pytest.fixture(params=["ours", "plain JSON file"])
def store(request: Any, tmp_path: Path) -> Any:
    made = SqliteStore(tmp_path / "node.state") if request.param == "ours" else PlainFile(tmp_path / "node.json")
    yield made
    made.close()


def test_store_update(measure: Measure, benchmark: Any, store: Any, request: Any) -> None:
    benchmark.group = "two values to the medium, with fsync"
    counter = iter(range(1, 1 << 20))

    def update() -> int:
        position = next(counter)
        store.update({**KEPT, "ota_written": position})
        return position

    measure(
        request.node.callspec.id,
        update,
        check=lambda position: store.items() == {**KEPT, "ota_written": position},
        rounds=100,
        unit="updates",
    )


@small
def test_store_get(measure: Measure, benchmark: Any, store: Any, request: Any) -> None:
    benchmark.group = "one value read"
    store.update(KEPT)
    measure(
        request.node.callspec.id,
        lambda: store.get("ota_file_md5"),
        check=lambda value: value == KEPT["ota_file_md5"],
        unit="reads",
    )
