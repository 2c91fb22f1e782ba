"""The job service and nodes that work by params: what they are sent, and what their reports change."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmaker_ota.cloud import store as store_module
from rmaker_ota.cloud.jobs import MAX_PARAMS_PAYLOAD
from rmaker_ota.cloud.mqtt import filters, parse_topic
from rmaker_ota.cloud.store import JobMode, Store, Workflow
from rmaker_ota.errors import ArgumentError
from tests.python.cloud_parts import Cloud

SERVICE = {"name": "OTA", "type": "esp.service.ota", "params": []}
REMOTE = "node/N1/params/remote"


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    cloud = Cloud(tmp_path)
    cloud.configured(SERVICE)
    return cloud


def create(cloud: Cloud, **more: object) -> str:
    return cloud.jobs.create(cloud.add_image(), ["N1"], **more).id  # type: ignore[arg-type]


def begun(cloud: Cloud) -> str:
    """A job the node has begun."""
    job = create(cloud)
    assert cloud.params(Info="Starting OTA Upgrade (HTTPS attempt 1/3)") == "nothing"
    assert cloud.params(Status="in-progress") == "applied in-progress"
    return job


def history(cloud: Cloud, job: str) -> list[tuple[str, str, str]]:
    return [(entry.status, entry.info, entry.verdict.value) for entry in cloud.store.history(job)]


def test_the_service_in_its_configuration_says_how_a_node_works(cloud: Cloud) -> None:
    create(cloud)
    [(topic, message)] = cloud.sent
    assert topic == REMOTE
    assert list(message) == ["OTA"]
    assert list(message["OTA"]) == ["URL"]
    assert message["OTA"]["URL"].startswith("https://ota.test:8443/images/")
    cloud.configured({"name": "Time", "type": "esp.service.time"}, node="N2")
    cloud.jobs.create(cloud.add_image(), ["N2"])
    assert cloud.sent[1][0] == "node/N2/otaurl"


@pytest.mark.parametrize("services", [None, 5, {}, ["OTA"], [{"type": 5}], [{"name": "OTA"}]])
def test_a_configuration_of_another_shape_has_no_such_service(tmp_path: Path, services: object) -> None:
    cloud = Cloud(tmp_path)
    assert cloud.jobs.on_config("N1", json.dumps({"node_id": "N1", "services": services}).encode())
    create(cloud)
    assert cloud.sent[0][0] == "node/N1/otaurl"


def test_the_workflow_can_be_chosen(cloud: Cloud) -> None:
    create(cloud, workflow=Workflow.TOPICS)
    cloud.jobs.create(cloud.add_image(), ["N9"], workflow=Workflow.PARAMS)
    assert [topic for topic, _ in cloud.sent] == ["node/N1/otaurl", "node/N9/params/remote"]
    with pytest.raises(ArgumentError, match="metadata: nodes that work by params get none"):
        create(cloud, workflow=Workflow.PARAMS, metadata={"a": 1})


def test_text_and_status_of_a_report_are_recorded_together(cloud: Cloud) -> None:
    job = begun(cloud)
    cloud.params(Info="Downloading Firmware Image")
    cloud.params(Status="in-progress")
    assert history(cloud, job) == [
        ("queued", "", "applied"),
        ("sent", "by params", "applied"),
        ("in-progress", "Starting OTA Upgrade (HTTPS attempt 1/3)", "applied"),
        ("in-progress", "Downloading Firmware Image", "applied"),
    ]


def test_a_result_known_only_after_the_restart_comes_with_the_initial_report(cloud: Cloud) -> None:
    job = begun(cloud)
    assert cloud.starts("success", "verified") is False
    assert cloud.state(job) == "success"
    assert cloud.starts("success", "verified") is False  # it was not acknowledged to the node
    assert history(cloud, job)[-1] == ("success", "verified", "applied")
    assert cloud.params(Info="x") == "nothing"
    assert cloud.params(Status="failed") == "late success"


def test_a_result_of_an_older_job_is_not_taken_for_that_of_the_next_one(cloud: Cloud) -> None:
    begun(cloud)
    cloud.starts("success", "verified")
    second = create(cloud)
    assert cloud.params(Status="success", Info="Starting OTA Upgrade (HTTPS attempt 1/3)") == "nothing"
    assert cloud.state(second) == "sent"
    assert cloud.params(Status="in-progress") == "applied in-progress"
    assert history(cloud, second)[-1][1] == "Starting OTA Upgrade (HTTPS attempt 1/3)"

    third = create(cloud)
    assert cloud.starts("success", "verified") is True  # and so it gets a job, the one it has begun
    assert cloud.state(third) == "sent"


def test_every_start_of_a_node_counts_as_a_fetch(cloud: Cloud) -> None:
    job = create(cloud, mode=JobMode.ON_FETCH)
    assert cloud.sent == []
    assert cloud.starts() is True
    assert cloud.state(job) == "sent"
    cloud.params(Info="a")
    cloud.params(Status="failed")
    assert cloud.state(job) == "failed"
    assert cloud.starts("failed", "a") is False  # it has just failed; the next start tries again
    assert cloud.starts("in-progress", "b") is False  # not a start: its configuration has changed meanwhile
    assert cloud.starts() is True
    assert len(cloud.sent) == 2


def test_a_forced_job_waits_for_the_broker(cloud: Cloud) -> None:
    cloud.online = False
    job = create(cloud)
    assert cloud.state(job) == "queued"
    cloud.online = True
    assert cloud.jobs.push_unsent() == 1
    assert cloud.sent[0][0] == REMOTE


def test_reports_without_a_job_and_of_other_devices_are_passed_over(cloud: Cloud) -> None:
    assert cloud.params(Info="x") == "nothing"
    assert cloud.params(Status="success") == "nothing"
    begun(cloud)
    before = len(cloud.seen)
    for payload in (b'{"Lamp":{"Power":true}}', b'{"OTA":5}', b'{"OTA":{"Status":5}}', b'{"OTA":{"URL":""}}'):
        assert cloud.jobs.on_params("N1", payload) is None
    assert len(cloud.seen) == before


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b"\xff", b'{"OTA":NaN}', b"[" * 100_000, b'{"a":"' + b"x" * MAX_PARAMS_PAYLOAD + b'"}'],
)
def test_what_is_no_report_is_dropped_with_a_log_line(
    cloud: Cloud, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    job = begun(cloud)
    assert cloud.jobs.on_params("N1", payload) is None
    assert cloud.jobs.on_params_init("N1", payload) is False
    assert cloud.jobs.on_params("a/b", b'{"OTA":{"Status":"success"}}') is None
    assert [record.message.startswith("params of node") for record in caplog.records] == [True] * 3
    assert cloud.state(job) == "in-progress"


@settings(max_examples=60, deadline=None)
@given(
    reports=st.lists(
        st.tuples(
            st.booleans(),
            st.fixed_dictionaries(
                {},
                optional={
                    "Status": st.sampled_from(["", "in-progress", "success", "failed", "rejected", "x", 5, None]),
                    "Info": st.one_of(st.text(max_size=20), st.none()),
                },
            ),
        ),
        max_size=12,
    )
)
def test_a_finished_job_stays_finished_whatever_is_reported(
    tmp_path_factory: pytest.TempPathFactory, reports: list[tuple[bool, dict[str, object]]]
) -> None:
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    cloud.configured(SERVICE)
    job = create(cloud)
    finished = None
    for initial, values in reports:
        payload = json.dumps({"OTA": values}).encode()
        if initial:
            cloud.jobs.on_params_init("N1", payload)
        else:
            cloud.jobs.on_params("N1", payload)
        state = cloud.state(job)
        assert finished is None or state == finished
        if state in ("success", "rejected"):
            finished = state
    assert (cloud.jobs.on_fetch("N1", b"{}")) == (finished is None)


def test_topics_of_parameters() -> None:
    assert parse_topic("node/N1/params/local") == ("N1", "params/local")
    assert parse_topic("node/N1/params/local/init") == ("N1", "params/local/init")
    assert parse_topic("node/N1/params/local/group-7") == ("N1", "params/local")
    assert parse_topic("$aws/rules/esp_set_params/node/N1/params/local") == ("N1", "params/local")
    assert parse_topic("$aws/rules/esp_init_params/node/N1/params/local/init") == ("N1", "params/local/init")
    for topic in (
        "$aws/rules/esp_set_params/node/N1/params/local/group-7",
        "$aws/rules/esp_init_params/node/N1/params/local",
        "$aws/rules/esp_node_config/node/N1/otafetch",
        "node/N1/params/remote",
        "node/N1/params/local/a/b",
        "node/N1",
        "$aws/rules",
        "x",
    ):
        assert parse_topic(topic) is None
    for choice in ("on", "off", "both"):
        assert len(set(filters(choice))) == len(filters(choice))
        assert "node/+/params/local/+" in filters(choice)
        assert "node/+/params/local/init" not in filters(choice)  # a message must not come twice


def test_a_database_of_the_first_layout_is_brought_to_the_current_one(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    old = sqlite3.connect(path)
    for statement in store_module.MIGRATIONS[0]:
        old.execute(statement)
    old.execute("INSERT INTO images VALUES ('aa', 'bb', 1, 'n', NULL, NULL, NULL, NULL, 1.0)")
    old.execute("INSERT INTO jobs (id, image, mode, created_at) VALUES ('J', 'aa', 'force', 1.0)")
    old.execute("PRAGMA user_version = 1")
    old.commit()
    old.close()
    store = Store(path)
    kept = store.job("J")
    assert kept is not None
    assert kept.workflow is Workflow.AUTO
    store.close()
