"""The runner: it does not let a difference pass, nor anything it does not know."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.__main__ import main
from tests.conformance.deviations import RULES
from tests.conformance.runner import Outcome, judge, replay, run
from tests.conformance.test_traces import DOCUMENTS, TRACES
from tests.conformance.trace import parse
from tests.conformance.world import World

Json = dict[str, Any]

VISIBLE = {
    "mqtt_publish",
    "mqtt_subscribe",
    "event",
    "callback",
    "callback_return",
    "api_return",
    "timer_start",
    "http_connect",
    "http_request",
    "slot_state",
    "reboot",
    "boot",
}


def drop(trace: list[Json], index: int) -> None:
    del trace[index]


def delay(trace: list[Json], index: int) -> None:
    trace[index]["t"] += 1.5


def alter(trace: list[Json], index: int) -> None:
    record = trace[index]
    match record["kind"]:
        case "mqtt_publish" if "cbor" in record:
            fields = bytearray.fromhex(record["payload_hex"])
            fields[fields.index(b"al\x19") + 3] ^= 1  # another block size
            record["payload_hex"] = fields.hex()
        case "mqtt_publish":
            record["payload"] = record["payload"].replace('","ts', 'X","ts').replace('"}', 'X"}')
        case "mqtt_subscribe":
            record["qos"] = 0
        case "event":
            if "seconds" in record:
                record["seconds"] += 1
            else:
                record["data"] = f"{record.get('data')}X"
        case "callback":
            record.get("ota_data", record)["priv"] = "X"
        case "callback_return" | "api_return":
            record["ret"] = "ESP_ERR_NO_MEM"
        case "timer_start":
            record["seconds"] += 7
        case "http_connect":
            record["port"] += 1
        case "http_request":
            record["headers"]["Range"] = "bytes=123456-"
        case "slot_state":
            record["state"] = "UNDEFINED"
        case "reboot":
            record["reason"] = "X"
        case "boot":
            record["version"] += "X"


CHANGES: tuple[Callable[[list[Json], int], None], ...] = (drop, delay, alter)


@pytest.fixture(scope="module")
def replays() -> dict[str, tuple[World, Outcome]]:
    done = {}
    for name in DOCUMENTS:
        trace = parse(DOCUMENTS[name])
        world = run(trace)
        done[name] = (world, judge(trace, world))
    return done


def changed(name: str, every: int) -> Iterator[tuple[str, Json]]:
    """The recording with one thing in it changed, for each ``every``-th thing and each kind of change."""
    records = DOCUMENTS[name]["trace"]
    count = 0
    for index, record in enumerate(records):
        if record["kind"] not in VISIBLE:
            continue
        for change in CHANGES:
            count += 1
            if count % every == sum(map(ord, name)) % every:
                document = copy.copy(DOCUMENTS[name])
                document["trace"] = copy.deepcopy(records)
                change(document["trace"], index)
                yield f"{name}: {change.__name__} record {index}, {record['kind']}", document


def test_no_change_to_a_matching_recording_passes(replays: dict[str, tuple[World, Outcome]]) -> None:
    passed = []
    tried = 0
    for name, (world, outcome) in replays.items():
        if outcome.kind != "matched":
            continue
        for what, document in changed(name, every=7):
            tried += 1
            if judge(parse(document), world).kind != "unmatched":
                passed.append(what)
    assert tried > 1000
    assert passed == []


def test_a_deviation_explains_little_beside_what_it_is_about(replays: dict[str, tuple[World, Outcome]]) -> None:
    """Where a whole job goes otherwise, nobody can compare its parts; everything else is still compared."""
    verdicts: Counter[bool] = Counter()
    for name, (world, outcome) in replays.items():
        if outcome.kind != "deviates":
            continue
        for _, document in changed(name, every=7):
            verdicts[judge(parse(document), world).kind == "unmatched"] += 1
    assert verdicts[True] > 8 * verdicts[False]


def other(name: str, change: Callable[[Json], None]) -> Outcome:
    document = copy.deepcopy(DOCUMENTS[name])
    change(document)
    return replay(parse(document))


def test_final_values_slot_and_time_are_compared() -> None:
    name = "https-success-rollback"
    assert other(name, lambda document: None).kind == "matched"
    stale = {"type": "blob", "value": {"text": "J1"}}
    assert other(name, lambda document: document["final"]["nvs"]["rmaker_ota"].update(rmaker_ota_id=stale)).kind == (
        "unmatched"
    )
    assert other(name, lambda document: document["final"].update(running="ota_0")).kind == "unmatched"
    assert other(name, lambda document: document["final"].update(t=51.0)).kind == "unmatched"


def test_another_behaviour_of_the_world_shows() -> None:
    def refuse(document: Json) -> None:
        document["inputs"]["https_server"] = [{"connect": "refused", "errno": 111}]

    def no_restart(document: Json) -> None:
        document["config"]["auto_reboot"] = False

    def other_window(document: Json) -> None:
        document["inputs"]["timezone"] = "IST-5:30"

    assert other("https-success-rollback", refuse).kind == "unmatched"
    assert other("https-success-rollback", no_restart).kind == "unmatched"
    assert other("window-day", other_window).kind == "unmatched"


@pytest.mark.parametrize(
    ("where", "key", "why"),
    [
        ("inputs", "surprise", "inputs: surprise"),
        ("config", "surprise", "config: surprise"),
        ("step", "surprise", "step advance: surprise"),
        ("server", "surprise", "https_server: surprise"),
        ("image", "surprise", "image: surprise"),
        ("stream", "surprise", "stream_server: surprise"),
    ],
)
def test_what_is_not_known_is_not_passed_over(tmp_path: Path, where: str, key: str, why: str) -> None:
    document = copy.deepcopy(DOCUMENTS["https-success-rollback"])
    if where == "step":
        next(step for step in document["inputs"]["boots"][0] if step["do"] == "advance")[key] = 1
    elif where == "server":
        document["inputs"]["https_server"] = [{key: 1}]
    elif where == "stream":
        document["inputs"]["stream_server"] = {key: 1}
    elif where == "image":
        document["inputs"]["images"]["new"][key] = 1
    else:
        document[where][key] = 1
    (tmp_path / "a.json").write_text(json.dumps(document))
    tally = tally_of(tmp_path)
    assert tally["not_replayed"] == {"https-success-rollback": why}


def test_an_unknown_step_is_not_passed_over(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENTS["https-success-rollback"])
    document["inputs"]["boots"][0].insert(2, {"do": "dance"})
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert tally_of(tmp_path)["not_replayed"] == {"https-success-rollback": "step dance"}


def tally_of(folder: Path) -> Json:
    from tests.conformance.runner import find, replay_all

    return replay_all(find([folder])).to_json()


def test_the_command_prints_the_tally_and_its_exit_code_says_whether_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
    for name in ("fetch-connected", "fetch-three-times-not-connected", "params-busy"):
        (good / f"{name}.json").write_text(json.dumps(DOCUMENTS[name]))
    strange = copy.deepcopy(DOCUMENTS["mqtt-short-block"])
    strange["inputs"]["stream_server"]["rules"][0]["do"]["surprise"] = True
    (good / "strange.json").write_text(json.dumps(strange))
    (good / "note.json").write_text('{"no": "trace"}')
    broken = copy.deepcopy(DOCUMENTS["fetch-connected"])
    broken["trace"] = [record for record in broken["trace"] if record["kind"] != "mqtt_publish"]
    (bad / "broken.json").write_text(json.dumps(broken))
    (bad / "torn.json").write_text('{"torn')

    assert main([str(good), "--json"]) == 0
    tally = json.loads(capsys.readouterr().out)
    assert tally["matched"] == ["fetch-connected", "params-busy"]
    assert tally["deviates"] == {"fetch-three-times-not-connected": ["Q7"]}
    assert set(tally["not_replayed"]) == {"mqtt-short-block"}
    assert tally["unmatched"] == {}
    assert tally["counts"] == {"matched": 2, "deviates": 1, "unmatched": 0, "not_replayed": 1}

    assert main([str(good), str(bad)]) == 1
    text = capsys.readouterr().out
    assert "UNMATCHED     fetch-connected: extra 5 s, boot 1: publish" in text
    assert "UNMATCHED     torn: cannot be read" in text
    assert text.splitlines()[-1] == "2 matched, 1 deviates, 2 unmatched, 1 not_replayed"

    with pytest.raises(SystemExit) as usage:
        main([str(tmp_path / "nowhere")])
    assert usage.value.code == 2


def test_rules_know_no_scenario_by_name() -> None:
    source = (Path(__file__).parent / "deviations.py").read_text() + (Path(__file__).parent / "scenario.py").read_text()
    assert [name for name in DOCUMENTS if name in source] == []
    numbers = [rule.id for rule in RULES]
    assert len(numbers) == len(set(numbers))
    assert all(len(rule.text) > 40 for rule in RULES)


def test_the_folder_holds_what_its_index_lists() -> None:
    index = (TRACES / "INDEX.md").read_text()
    assert [name for name in DOCUMENTS if f"({name}.json)" not in index] == []
