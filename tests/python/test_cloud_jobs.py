"""The rules of the job service: offers, reports, cancelling, and what hostile nodes send."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmaker_ota.cloud import jobs as rules
from rmaker_ota.cloud.jobs import MAX_PAYLOAD, judge_report
from rmaker_ota.cloud.store import JobMode, NodeState, Verdict
from rmaker_ota.errors import ArgumentError, NotFoundError
from tests.python.cloud_parts import START, Cloud, esp_image


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def create(
    cloud: Cloud, *nodes: str, mode: JobMode = JobMode.FORCE, content: bytes | None = None, **more: object
) -> str:
    return cloud.jobs.create(cloud.add_image(content), nodes or ("N1",), mode=mode, **more).id  # type: ignore[arg-type]


def test_a_forced_job_is_pushed_at_once_with_all_that_is_known(cloud: Cloud) -> None:
    content = esp_image(version="2.0.0")
    metadata = {"download_window": {"start": 1380, "end": 120}}
    job = create(cloud, content=content, metadata=metadata)
    [(topic, message)] = cloud.sent
    assert topic == "node/N1/otaurl"
    sha256 = hashlib.sha256(content).hexdigest()
    assert message.pop("url").startswith(f"https://ota.test:8443/images/{sha256}?expires={int(START) + 3600}&sig=")
    assert list(json.loads(cloud.raw[0])) == ["ota_job_id", "url", "fw_version", "file_size", "file_md5", "metadata"]
    assert message == {
        "ota_job_id": job,
        "fw_version": "2.0.0",
        "file_size": len(content),
        "file_md5": hashlib.md5(content).hexdigest(),
        "metadata": metadata,
    }
    assert len(job) == 22
    assert cloud.state(job) == "sent"


def test_messages_hold_no_escapes_the_firmware_would_not_decode(cloud: Cloud) -> None:
    create(cloud, metadata={"note": "Größe/1"})
    assert b"\\" not in cloud.raw[0]
    assert "Größe/1".encode() in cloud.raw[0]


def test_version_can_be_given_and_is_left_out_when_nobody_knows_it(cloud: Cloud) -> None:
    create(cloud, version="9.9")
    create(cloud, content=b"no app descriptor" * 100)
    assert cloud.sent[0][1]["fw_version"] == "9.9"
    assert "fw_version" not in cloud.sent[1][1]


def test_a_job_on_fetch_waits_for_the_node(cloud: Cloud) -> None:
    job = create(cloud, mode=JobMode.ON_FETCH)
    assert cloud.sent == []
    assert cloud.state(job) == "queued"
    assert cloud.jobs.push_unsent() == 0
    assert cloud.fetch()
    assert cloud.sent[0][1]["ota_job_id"] == job
    assert cloud.state(job) == "sent"


def test_a_fetch_without_a_job_is_not_answered(cloud: Cloud) -> None:
    create(cloud, "N2", mode=JobMode.ON_FETCH)
    assert not cloud.fetch("N1")
    assert cloud.sent == []


def test_without_a_broker_a_forced_job_is_pushed_when_it_is_back_and_once_only(cloud: Cloud) -> None:
    cloud.online = False
    job = create(cloud, "N1", "N2")
    assert cloud.state(job) == "queued"
    assert cloud.jobs.push_unsent() == 0
    cloud.online = True
    assert cloud.jobs.push_unsent() == 2
    assert cloud.jobs.push_unsent() == 0
    assert [topic for topic, _ in cloud.sent] == ["node/N1/otaurl", "node/N2/otaurl"]


def test_the_whole_life_of_a_job_is_in_its_history(cloud: Cloud) -> None:
    job = create(cloud)
    told = [
        ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)"),
        ("in-progress", "Downloading Firmware Image"),
        ("in-progress", "Firmware Image download complete"),
        ("in-progress", "Rebooting into new firmware (after 1 HTTPS attempt)"),
        ("success", "OTA Upgrade finished and verified successfully"),
    ]
    for status, info in told:
        assert cloud.report(job, status, info) == f"applied {status}"
    history = cloud.store.history(job)
    assert [(entry.status, entry.info) for entry in history] == [("queued", ""), ("sent", ""), *told]
    assert [entry.at for entry in history[1:]] == [START + i for i in range(6)]
    assert [entry.node_ts for entry in history] == [None, None] + [int(START) + i for i in range(1, 6)]
    assert history == cloud.seen
    assert not cloud.fetch(version="2.0.0")


@pytest.mark.parametrize("status", ["failed", "delayed"])
def test_failed_and_delayed_are_offered_again_with_a_fresh_url(cloud: Cloud, status: str) -> None:
    job = create(cloud)
    cloud.report(job, status)
    cloud.clock.now += 300
    assert cloud.fetch()
    first, second = cloud.sent
    assert second[1]["ota_job_id"] == job
    assert second[1]["url"] != first[1]["url"]
    assert cloud.state(job) == "sent"
    row = cloud.store.job_node(job, "N1")
    assert row is not None
    assert row.offers == 2


@pytest.mark.parametrize("status", ["success", "rejected"])
def test_success_and_rejected_finish_and_later_reports_change_nothing(cloud: Cloud, status: str) -> None:
    job = create(cloud)
    cloud.report(job, status)
    assert not cloud.fetch()
    for late in ("in-progress", "failed", "success", "rejected"):
        assert cloud.report(job, late, "late") == f"late {status}"
    assert [entry.verdict.value for entry in cloud.store.history(job)][-4:] == ["late"] * 4


def test_a_failed_attempt_can_still_end_in_success(cloud: Cloud) -> None:
    job = create(cloud)
    assert cloud.report(job, "failed", "OTA Attempt 1/3 failed: ...") == "applied failed"
    assert cloud.report(job, "in-progress", "Starting OTA Upgrade (HTTPS attempt 2/3)") == "applied in-progress"
    assert cloud.report(job, "success") == "applied success"


def test_a_report_delivered_twice_counts_once_also_out_of_order(cloud: Cloud) -> None:
    job = create(cloud)
    cloud.report(job, "failed", "OTA Attempt 1/3 failed", ts=100)
    cloud.report(job, "in-progress", "Starting OTA Upgrade (HTTPS attempt 2/3)", ts=100)
    assert cloud.report(job, "failed", "OTA Attempt 1/3 failed", ts=100) == "duplicate in-progress"
    assert cloud.report(job, "failed", "OTA Attempt 1/3 failed", ts=101) == "applied failed"


def test_a_node_whose_clock_starts_over_is_believed_after_a_new_offer(cloud: Cloud) -> None:
    job = create(cloud)
    cloud.report(job, "in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)", ts=20)
    cloud.report(job, "failed", "x", ts=21)
    cloud.fetch()
    assert cloud.report(job, "in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)", ts=20) == "applied in-progress"


def test_an_unknown_status_is_recorded_and_changes_nothing(cloud: Cloud) -> None:
    job = create(cloud)
    assert cloud.report(job, "invalid") == "unknown sent"
    assert cloud.store.history(job)[-1].verdict is Verdict.UNKNOWN


def test_reports_for_other_jobs_and_of_other_nodes_are_dropped(cloud: Cloud) -> None:
    job = create(cloud, "N1")
    assert cloud.report("nosuchjob", "success") == "dropped"
    assert cloud.report(job, "success", node="N2") == "dropped"
    assert cloud.state(job) == "sent"


def test_a_fetch_while_in_progress_is_answered_and_keeps_the_state(cloud: Cloud) -> None:
    job = create(cloud)
    cloud.report(job, "in-progress")
    assert cloud.fetch()
    assert cloud.state(job) == "in-progress"


def test_of_several_jobs_what_was_begun_comes_first_and_what_failed_last(cloud: Cloud) -> None:
    failed, delayed, queued, begun = (create(cloud, mode=JobMode.ON_FETCH) for _ in range(4))
    for job, status in ((failed, "failed"), (delayed, "delayed"), (begun, "in-progress")):
        cloud.report(job, status)
    order = []
    for _ in range(4):
        cloud.fetch()
        order.append(cloud.sent[-1][1]["ota_job_id"])
        cloud.report(order[-1], "success")
    assert order == [begun, queued, delayed, failed]


def test_cancel_ends_the_job_for_nodes_that_have_not_finished(cloud: Cloud) -> None:
    job = create(cloud, "N1", "N2", "N3")
    cloud.report(job, "success", node="N1")
    cloud.report(job, "in-progress", node="N2")
    assert cloud.jobs.cancel(job) == ["N2", "N3"]
    assert [cloud.state(job, node) for node in ("N1", "N2", "N3")] == ["success", "cancelled", "cancelled"]
    assert not cloud.fetch("N3")
    assert cloud.report(job, "success", node="N2") == "late cancelled"
    assert cloud.jobs.cancel(job) == []


def test_cancel_for_one_node_leaves_the_others(cloud: Cloud) -> None:
    job = create(cloud, "N1", "N2")
    assert cloud.jobs.cancel(job, ["N1"]) == ["N1"]
    assert cloud.state(job, "N2") == "sent"
    with pytest.raises(NotFoundError, match="N9"):
        cloud.jobs.cancel(job, ["N9"])
    with pytest.raises(NotFoundError, match="nosuchjob"):
        cloud.jobs.cancel("nosuchjob")


@pytest.mark.parametrize("node", ["", "a/b", "+", "#", "a b", "a\0", "x" * 129])
def test_impossible_node_ids_are_refused(cloud: Cloud, node: str) -> None:
    with pytest.raises(ArgumentError, match="node id"):
        create(cloud, node)


def test_impossible_jobs_are_refused(cloud: Cloud) -> None:
    sha256 = cloud.add_image()
    with pytest.raises(ArgumentError, match="at least one node"):
        cloud.jobs.create(sha256, [])
    with pytest.raises(NotFoundError, match="no image"):
        cloud.jobs.create("0" * 64, ["N1"])
    with pytest.raises(ArgumentError, match="version"):
        cloud.jobs.create(sha256, ["N1"], version="a\nb")
    with pytest.raises(ArgumentError, match="metadata"):
        cloud.jobs.create(sha256, ["N1"], metadata={"x": float("nan")})
    with pytest.raises(ArgumentError, match=r"metadata: .* bytes"):
        cloud.jobs.create(sha256, ["N1"], metadata={"x": "y" * 5000})
    assert cloud.store.jobs() == []


def test_a_node_named_twice_gets_one_offer(cloud: Cloud) -> None:
    create(cloud, "N1", "N1")
    assert len(cloud.sent) == 1


HOSTILE = {
    "empty": b"",
    "not json": b"hello",
    "invalid utf-8": b'{"node_id":"\xff\xfe"}',
    "deep": b'{"a":' + b"[" * 4000 + b"]" * 4000 + b"}",
    "unclosed deep": b"[" * 8000,
    "huge number": b'{"ts":' + b"9" * 5000 + b"}",
    "nan": b'{"ts":NaN}',
    "wrong types": b'{"node_id":5,"ota_job_id":[],"status":{}}',
    "null": b"null",
    "array": b"[1,2]",
    "one megabyte": b'{"node_id":"' + b"x" * (1 << 20) + b'"}',
    "no job id": b'{"status":"success"}',
    "other node": b'{"node_id":"N2","fw_version":"1"}',
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_payloads_are_dropped_with_a_log_line(
    cloud: Cloud, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    job = create(cloud, mode=JobMode.ON_FETCH)
    with caplog.at_level("WARNING", "rmaker_ota.cloud.jobs"):
        assert cloud.jobs.on_status("N1", payload) is None
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(record.getMessage()) < 200
    if payload != HOSTILE["no job id"]:
        assert not cloud.jobs.on_fetch("N1", payload)
    if payload not in (HOSTILE["one megabyte"], HOSTILE["no job id"]):
        assert not cloud.jobs.on_config("N1", payload)
    assert cloud.state(job) == "queued"


def test_strange_but_readable_fields_are_recorded_as_far_as_they_go(cloud: Cloud) -> None:
    job = create(cloud)
    payload = json.dumps(
        {"ota_job_id": job, "status": "failed", "additional_info": "\ud800\0" + "x" * 5000, "ts": 1 << 70}
    )
    entry = cloud.jobs.on_status("N1", payload.encode())
    assert entry is not None
    assert entry.info.startswith("?\0xxx")
    assert len(entry.info) == rules.MAX_INFO
    assert entry.node_ts is None
    assert cloud.store.history(job)[-1] == entry


def test_a_report_cut_by_the_firmware_is_understood(cloud: Cloud) -> None:
    job = create(cloud)
    whole = json.dumps(
        {"ota_job_id": job, "status": "failed", "additional_info": "OTA Attempt 1/3 failed: " + "e" * 200, "ts": 5},
        separators=(",", ":"),
    ).encode()
    entry = cloud.jobs.on_status("N1", whole[:199])
    assert entry is not None
    assert (entry.job, entry.status, entry.state) == (job, "failed", NodeState.FAILED)
    assert entry.info.startswith("OTA Attempt 1/3 failed: eee")
    assert cloud.jobs.on_status("N1", whole[:198]) is None


def test_the_history_of_a_node_in_a_loop_is_bounded(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_HISTORY", 6)
    job = create(cloud)
    for _ in range(10):
        cloud.report(job, "in-progress")
    assert cloud.report(job, "failed") == "applied failed"
    assert len(cloud.store.history(job)) == 6
    assert cloud.state(job) == "failed"


def test_an_observer_that_fails_harms_nobody(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    def fail(entry: object) -> None:
        raise RuntimeError("observer")

    cloud.jobs._on_change = fail
    job = create(cloud)
    assert cloud.report(job, "success") == "applied success"
    assert "an observer of jobs failed" in caplog.text


def test_node_configuration_and_versions_are_remembered(cloud: Cloud) -> None:
    config = {"node_id": "N1", "config_version": "2020-03-20", "info": {"name": "gw", "fw_version": "1.0.0"}}
    assert cloud.jobs.on_config("N1", json.dumps(config).encode())
    cloud.jobs.on_fetch("N1", b'{"node_id":"N1","fw_version":"1.1.0","network_id":"0A1B2C3D"}')
    node = cloud.store.node("N1")
    assert node is not None
    assert json.loads(node.config or "") == config
    assert (node.fw_version, node.network_id) == ("1.1.0", "0A1B2C3D")


@given(state=st.sampled_from(NodeState), status=st.text(max_size=12) | st.sampled_from(sorted(rules.REPORTED)))
def test_no_report_takes_a_node_out_of_a_finished_job(state: NodeState, status: str) -> None:
    verdict, after = judge_report(state, status)
    assert (after is state) or (verdict is Verdict.APPLIED and not state.finished)
    if state.finished:
        assert after is state


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=200)
@given(payload=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_payload_raises(tmp_path_factory: pytest.TempPathFactory, payload: bytes) -> None:
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    for handler in (cloud.jobs.on_fetch, cloud.jobs.on_status, cloud.jobs.on_config):
        handler("N1", payload)
    assert len(payload) <= MAX_PAYLOAD
    cloud.store.close()
