"""The state store: both stores by the same rules, and what only a file can meet."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rmaker_ota.errors import ArgumentError, OtaError, StateFileError
from rmaker_ota.rainmaker.store import MemoryStore, SqliteStore, Store, Value

VALUES: list[Value] = [b"", b"\x00\xff", "", "a", "Ä\x00\U0001f600", "half \ud800 pair", 0, -1, 2**63 - 1, -(2**63)]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "state.db") as store:
        yield store


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_a_value_is_read_back_with_its_type(store: Store, value: Value) -> None:
    store.update({"ota_update": value})
    found = store.get("ota_update")
    assert found == value
    assert type(found) is type(value)
    assert store.items() == {"ota_update": value}


def test_an_update_writes_replaces_and_erases(store: Store) -> None:
    store.update({"a": 1, "b": "x", "c": b"y"})
    store.update({"a": None, "b": 2, "d": "new", "never there": None})
    assert store.items() == {"b": 2, "c": b"y", "d": "new"}
    assert store.get("a") is None


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, True, 1.5, ["list"]], ids=repr)
def test_an_update_with_a_bad_value_changes_nothing(store: Store, bad: Value) -> None:
    store.update({"a": 1})
    with pytest.raises(ArgumentError, match="'b'"):
        store.update({"a": 2, "b": bad})
    assert store.items() == {"a": 1}


def test_values_survive_closing(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "state.db") as store:
        store.update({"rmaker_ota_id": b"J1", "ota_file_md5": "5d41", "ota_written": 307200})
    with SqliteStore(tmp_path / "state.db") as store:
        assert store.items() == {"rmaker_ota_id": b"J1", "ota_file_md5": "5d41", "ota_written": 307200}


def test_values_survive_the_death_of_the_process(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from rmaker_ota.rainmaker.store import SqliteStore
store = SqliteStore(sys.argv[1])
store.update({"rmaker_ota_id": b"J1"})
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "state.db"
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with SqliteStore(path) as store:
        assert store.get("rmaker_ota_id") == b"J1"


def test_it_is_written_ahead_and_synced(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "state.db") as store:
        store.update({"a": 1})
        database = store._database
        assert database is not None
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
        assert database.execute("pragma synchronous").fetchone() == (2,)


def test_a_second_node_is_refused_by_any_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    (tmp_path / "other-name").symlink_to(path)
    with SqliteStore(path):
        for name in (path, tmp_path / "other-name"):
            with pytest.raises(StateFileError, match=rf"another node uses it \(process {os.getpid()}\)"):
                SqliteStore(name)
    SqliteStore(path).close()


def test_others_can_look_while_a_node_runs(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with SqliteStore(path) as node:
        node.update({"a": 1})
        with SqliteStore(path, exclusive=False) as looker:
            assert looker.items() == {"a": 1}
            node.update({"a": 2})
            assert looker.get("a") == 2


def test_namespaces_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with SqliteStore(path) as one, SqliteStore(path, exclusive=False, namespace="other") as other:
        one.update({"a": 1})
        other.update({"a": 2})
        assert (one.items(), other.items()) == ({"a": 1}, {"a": 2})


def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    failures: list[BaseException] = []
    gate = threading.Barrier(8)

    def use(number: int) -> None:
        try:
            gate.wait()
            with SqliteStore(path, exclusive=False) as store:
                store.update({f"key{number}": number})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with SqliteStore(path) as store:
        assert store.items() == {f"key{number}": number for number in range(8)}


def a_text_file(path: Path) -> None:
    path.write_text("this is not a database, but it is long enough to be looked at " * 200)


def another_programs_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table bookmarks (url text)")


def a_value_of_the_wrong_type(path: Path) -> None:
    SqliteStore(path).close()
    with sqlite3.connect(path) as database:
        database.execute("insert into value values ('rmaker_ota', 'ota_written', 'int', 'many')")


def a_table_that_is_gone(path: Path) -> None:
    SqliteStore(path).close()
    with sqlite3.connect(path) as database:
        database.execute("drop table value")


def a_newer_format(path: Path) -> None:
    SqliteStore(path).close()
    with sqlite3.connect(path) as database:
        database.execute("pragma user_version = 99")


@pytest.mark.parametrize(
    ("damage", "way_out"),
    [
        (a_text_file, "damaged .* move it away"),
        (another_programs_database, "another program's database; set .state. path"),
        (a_value_of_the_wrong_type, "damaged .*ota_written.* move it away"),
        (a_table_that_is_gone, "damaged .* move it away"),
        (a_newer_format, "format 99, expected 1.* move it away"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_way_out(
    tmp_path: Path, damage: Callable[[Path], None], way_out: str
) -> None:
    path = tmp_path / "state.db"
    damage(path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StateFileError, match=way_out) as caught, SqliteStore(path) as store:
            store.items()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_the_way_out_works(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    a_text_file(path)
    with pytest.raises(StateFileError) as caught:
        SqliteStore(path)
    commands = str(caught.value).partition("move it away (")[2].partition(")")[0]
    subprocess.run(commands, shell=True, check=True)
    with SqliteStore(path) as store:
        assert store.items() == {}


def test_whatever_is_damaged_the_values_are_right_or_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    values: dict[str, Value] = {f"key{number}": os.urandom(300) for number in range(20)}
    with SqliteStore(path) as store:
        store.update(values)
    good = path.read_bytes()
    luck = random.Random(1)
    named = 0
    for round_number in range(150):
        bad = bytearray(good)
        if round_number % 3 == 0:
            del bad[luck.randrange(1, len(bad)) :]
        else:
            for _ in range(1 + round_number % 5):
                bad[luck.randrange(len(bad))] ^= luck.randrange(1, 256)
        path.write_bytes(bad)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        try:
            with SqliteStore(path) as store:
                store.items()
                store.update({"more": 1})
        except StateFileError as error:
            assert str(path) in str(error)
            named += 1
    assert named > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no such directory" / "state.db", tmp_path):
        with pytest.raises(StateFileError, match=str(path)):
            SqliteStore(path)


def test_a_full_medium_is_said_and_the_old_values_stay(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "state.db") as store:
        store.update({"a": 1})
        database = store._database
        assert database is not None
        (pages,) = database.execute("pragma page_count").fetchone()
        database.execute(f"pragma max_page_count = {pages}")
        with pytest.raises(StateFileError, match="full") as caught:
            store.update({"a": 2, "big": bytes(1 << 20)})
        assert "damaged" not in str(caught.value)
        assert store.items() == {"a": 1}


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    store.close()
    store.close()
    with pytest.raises(StateFileError, match="closed"):
        store.items()


def test_the_memory_twin_can_fail_on_request() -> None:
    store = MemoryStore({"a": 1})
    store.failure = StateFileError("state file x: damaged")
    with pytest.raises(OtaError, match="damaged"):
        store.update({"a": 2})
    store.failure = None
    assert store.items() == {"a": 1}
