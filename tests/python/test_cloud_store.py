"""The job database: layout, durability, damage."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from rmaker_ota.cloud.store import (
    MIGRATIONS,
    HistoryEntry,
    Image,
    Job,
    JobMode,
    NodeState,
    Store,
    StoreError,
    Verdict,
)

IMAGE = Image("a" * 64, "b" * 32, 10, "app.bin", 1.0, "gw", "2.0.0", 3, 5)
JOB = Job("J1", IMAGE.sha256, JobMode.FORCE, 2.0, "2.0.0", '{"x":1}')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def entry(status: str, state: NodeState, *, node: str = "N1", verdict: Verdict = Verdict.APPLIED) -> HistoryEntry:
    return HistoryEntry("J1", node, 3.0, "node", status, "info", 7, verdict, state)


def test_everything_written_is_there_after_reopening(path: Path) -> None:
    store = Store(path)
    assert store.add_image(IMAGE) == IMAGE
    store.add_job(JOB, ["N1", "N2"])
    store.record(entry("in-progress", NodeState.IN_PROGRESS))
    store.node_seen("N1", 4.0, fw_version="1.0.0")
    store.node_seen("N1", 5.0, config='{"a":1}')
    store.close()

    store = Store(path)
    assert store.images() == [IMAGE]
    assert store.job("J1") == JOB
    assert [(row.node, row.state.value, row.info) for row in store.job_nodes("J1")] == [
        ("N1", "in-progress", "info"),
        ("N2", "queued", ""),
    ]
    assert [(row.node, row.status, row.at) for row in store.history("J1")] == [
        ("N1", "queued", 2.0),
        ("N2", "queued", 2.0),
        ("N1", "in-progress", 3.0),
    ]
    info = store.node("N1")
    assert info is not None
    assert (info.seen_at, info.fw_version, info.config, info.config_at) == (5.0, "1.0.0", '{"a":1}', 5.0)
    store.close()


def test_the_first_record_of_an_image_stays() -> None:
    store = Store(":memory:")
    store.add_image(IMAGE)
    other_name = Image(IMAGE.sha256, IMAGE.md5, IMAGE.size, "other.bin", 9.0)
    assert store.add_image(other_name) == IMAGE


def test_a_failed_transaction_leaves_nothing() -> None:
    store = Store(":memory:")
    store.add_image(IMAGE)
    with pytest.raises(RuntimeError), store.transaction():
        store.add_job(JOB, ["N1"])
        raise RuntimeError
    assert store.job("J1") is None
    store.add_job(JOB, ["N1"])
    assert store.job("J1") == JOB


def test_a_job_needs_its_image() -> None:
    store = Store(":memory:")
    with pytest.raises(sqlite3.IntegrityError):
        store.add_job(JOB, ["N1"])


def test_what_was_not_applied_leaves_the_state_and_what_is_not_kept_still_sets_it() -> None:
    store = Store(":memory:")
    store.add_image(IMAGE)
    store.add_job(JOB, ["N1"])
    store.record(entry("nonsense", NodeState.QUEUED, verdict=Verdict.UNKNOWN))
    store.record(entry("failed", NodeState.FAILED), keep=False)
    row = store.job_node("J1", "N1")
    assert row is not None
    assert row.state is NodeState.FAILED
    assert [item.status for item in store.history("J1", "N1")] == ["queued", "nonsense"]


def test_the_layout_is_numbered_and_a_newer_one_is_refused(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreError, match=r"jobs\.sqlite: written by a newer version"):
        Store(path)


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_a_damaged_file_is_named_with_the_way_out(path: Path, damage: str) -> None:
    Store(path).close()
    whole = path.read_bytes()
    path.write_bytes(b"not a database at all" * 100 if damage == "garbage" else whole[: len(whole) // 2 + 100])
    with pytest.raises(StoreError, match=r"jobs\.sqlite: .*Move it away"):
        Store(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_an_unreadable_file_is_named(path: Path) -> None:
    path.touch(mode=0)
    with pytest.raises(StoreError, match=r"jobs\.sqlite"):
        Store(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        Store(tmp_path / "nowhere" / "jobs.sqlite")


def test_threads_may_share_it() -> None:
    store = Store(":memory:")
    store.add_image(IMAGE)
    store.add_job(JOB, [f"N{i}" for i in range(4)])

    def report(node: str) -> None:
        for _ in range(25):
            store.record(entry("in-progress", NodeState.IN_PROGRESS, node=node))

    threads = [threading.Thread(target=report, args=(f"N{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.history("J1")) == 4 + 100
