"""The state of a node that survives a restart: a few named values.

`SqliteStore` keeps them in an SQLite file (write-ahead log, ``synchronous=FULL``): when `Store.update` has returned,
the values are on the medium; when the power goes before that, all values of that call are the old ones. `MemoryStore`
is its twin for tests. The names are those of the firmware's NVS namespace ``rmaker_ota``; a value is a blob, a string
or an integer, as there, and is read back as what it was written as.

A file belongs to one running node: its lock file (``PATH.lock``) is held from `SqliteStore` to `close`, and goes with
the process. A damaged file is never repaired or replaced behind the owner's back: every use raises `StateFileError`,
which names the file and the way out.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from rmaker_ota.errors import ArgumentError, StateFileError

Value = bytes | str | int

NAMESPACE = "rmaker_ota"
FORMAT = 1  # of the file, in PRAGMA user_version
APPLICATION_ID = 0x524D4F54  # "RMOT", in the file's header
BUSY_TIMEOUT_MS = 10_000  # how long an access waits for another process's

# A damaged file can also damage the text of SQLite's error.
_SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)

_CREATE = """
create table if not exists value (
    namespace text not null,
    key text not null,
    type text not null check (type in ('blob', 'str', 'int')),
    value not null,
    primary key (namespace, key)
) without rowid
"""


class Store(ABC):
    """Named values that survive a restart. Any thread may call; an update is seen whole or not at all."""

    @abstractmethod
    def items(self) -> dict[str, Value]:
        """All values by name.

        Raises:
            StateFileError: the values cannot be read.
        """

    @abstractmethod
    def get(self, key: str) -> Value | None:
        """One value, or None when there is none of that name.

        Raises:
            StateFileError: the values cannot be read.
        """

    @abstractmethod
    def update(self, changes: Mapping[str, Value | None]) -> None:
        """Writes values (None: erases one), all or none of them; durable when it returns.

        Raises:
            StateFileError: they cannot be written.
            ArgumentError: an integer beyond 64 bits, or a value of another type.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the values back to whoever wants to use them next. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check(key: str, value: Value | None) -> None:
    """Refuses what a file could not keep as it is. ``bool`` is an ``int`` to Python, not to a reader of the file."""
    if isinstance(value, bool) or not isinstance(value, (bytes, str, int, type(None))):
        raise ArgumentError(f"state value {key!r}: expected bytes, str or int, got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ArgumentError(f"state value {key!r}: {value} does not fit 64 bits")


class MemoryStore(Store):
    """Values in memory. The same rules as a file; nothing survives the object, unless it is handed on."""

    def __init__(self, values: Mapping[str, Value] = MappingProxyType({})) -> None:
        self._values = dict(values)
        self._lock = threading.Lock()
        self.failure: StateFileError | None = None  # raised by every use while it is set

    def items(self) -> dict[str, Value]:
        with self._lock:
            self._fail()
            return dict(self._values)

    def get(self, key: str) -> Value | None:
        return self.items().get(key)

    def update(self, changes: Mapping[str, Value | None]) -> None:
        for key, value in changes.items():
            _check(key, value)
        with self._lock:
            self._fail()
            for key, value in changes.items():
                if value is None:
                    self._values.pop(key, None)
                else:
                    self._values[key] = value

    def close(self) -> None:
        pass

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class SqliteStore(Store):
    """Values in an SQLite file, which is made when it does not exist.

    Args:
        path: the file; SQLite puts ``-wal`` and ``-shm`` beside it, the lock is ``.lock``.
        exclusive: be the one node this file belongs to. Otherwise only look (and write with care) beside a running one.
        namespace: values of other namespaces are neither seen nor touched.

    Raises:
        StateFileError: damaged, not a state file, in use by another node, or not accessible.
    """

    def __init__(self, path: str | os.PathLike[str], *, exclusive: bool = True, namespace: str = NAMESPACE) -> None:
        # Another name of the same file must meet the same lock.
        self.path = Path(path).resolve()
        self._namespace = namespace
        self._lock = threading.Lock()
        self._lock_fd = -1
        self._database: sqlite3.Connection | None = None
        if exclusive:
            self._take_lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # -- values

    def items(self) -> dict[str, Value]:
        rows = self._select("select key, type, value from value where namespace = ?", (self._namespace,))
        return {key: self._decode(key, kind, value) for key, kind, value in rows}

    def get(self, key: str) -> Value | None:
        rows = self._select(
            "select key, type, value from value where namespace = ? and key = ?", (self._namespace, key)
        )
        return self._decode(*rows[0]) if rows else None

    def update(self, changes: Mapping[str, Value | None]) -> None:
        for key, value in changes.items():
            _check(key, value)
        if not changes:
            return
        with self._lock:
            database = self._opened()
            try:
                with database:  # commits, or takes all back
                    database.execute("begin immediate")
                    for key, value in changes.items():
                        if value is None:
                            database.execute(
                                "delete from value where namespace = ? and key = ?", (self._namespace, key)
                            )
                        else:
                            database.execute(
                                "replace into value (namespace, key, type, value) values (?, ?, ?, ?)",
                                (self._namespace, key, *_encode(value)),
                            )
            except _SQLITE_ERRORS as error:
                raise self._failure(error) from error

    def close(self) -> None:
        with self._lock:
            database, self._database = self._database, None
            if database is not None:
                database.close()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    # -- inner

    def _take_lock(self) -> None:
        lock_path = self.path.with_name(self.path.name + ".lock")
        try:
            self._lock_fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock_fd, 32, 0).decode("ascii", "replace").strip()
            self.close()
            raise StateFileError(
                f"state file {self.path}: another node uses it (process {owner or 'unknown'}); "
                "stop that one, or give this node a [state] path of its own"
            ) from error
        except OSError as error:
            self.close()
            raise StateFileError(f"state file {self.path}: cannot use {lock_path}: {error.strerror}") from error
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode("ascii"), 0)

    def _open(self) -> None:
        try:
            is_new = not self.path.exists()
            database = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False
            )
            self._database = database
            with database:  # one transaction: others may be making the file at this moment
                database.execute("begin")
                self._is_ours(database)  # before anything is changed
            database.execute("pragma journal_mode = wal").fetchone()
            database.execute("pragma synchronous = full")
            for (line,) in database.execute("pragma quick_check(1)"):
                if line != "ok":
                    raise StateFileError(self._damaged(str(line)))
            with database:
                database.execute("begin immediate")
                if not self._is_ours(database):
                    database.execute(_CREATE)
                    database.execute(f"pragma application_id = {APPLICATION_ID}")
                    database.execute(f"pragma user_version = {FORMAT}")
            if is_new:
                self._sync_directory()
        except _SQLITE_ERRORS as error:
            raise self._failure(error) from error

    def _is_ours(self, database: sqlite3.Connection) -> bool:
        """Whether this is a state file; False for a new, empty one. Raises StateFileError for anything else."""
        (application,) = database.execute("pragma application_id").fetchone()
        (version,) = database.execute("pragma user_version").fetchone()
        (tables,) = database.execute("select count(*) from sqlite_master").fetchone()
        if application == APPLICATION_ID and version == FORMAT:
            return True
        if application == APPLICATION_ID:
            raise StateFileError(
                f"state file {self.path}: format {version}, expected {FORMAT}: written by another version; "
                f"go back to that version, or {self._way_out()}"
            )
        if application == 0 and version == 0 and tables == 0:
            return False
        raise StateFileError(
            f"state file {self.path}: this is another program's database; set [state] path to a file of its own"
        )

    def _sync_directory(self) -> None:
        """A new file is durable only when its name is."""
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise StateFileError(f"state file {self.path}: already closed")
        return self._database

    def _select(self, sql: str, arguments: tuple[str, ...]) -> list[tuple[str, str, object]]:
        with self._lock:
            try:
                return self._opened().execute(sql, arguments).fetchall()
            except _SQLITE_ERRORS as error:
                raise self._failure(error) from error

    def _decode(self, key: str, kind: str, value: object) -> Value:
        match kind, value:
            case ("blob", bytes()) | ("str", str()) | ("int", int()):
                assert isinstance(value, (bytes, str, int))
                return value
            case ("str", bytes()):
                return value.decode("utf-8", "surrogatepass")
        raise StateFileError(self._damaged(f"value {key!r} of type {kind!r} is a {type(value).__name__}"))

    def _failure(self, error: sqlite3.Error | UnicodeDecodeError) -> StateFileError:
        code = getattr(error, "sqlite_errorcode", None)  # absent when Python, not SQLite, found the fault
        if code is None or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return StateFileError(self._damaged(str(error)))
        return StateFileError(f"state file {self.path}: {error}")

    def _damaged(self, why: str) -> str:
        return f"state file {self.path}: damaged ({why}); {self._way_out()}"

    def _way_out(self) -> str:
        return (
            f"move it away (mv {self.path} {self.path}.damaged; rm -f {self.path}-wal {self.path}-shm) and start "
            "again: the node begins with an empty state, an update still to be reported is not reported"
        )


def _encode(value: Value) -> tuple[str, Value]:
    match value:
        case bytes():
            return "blob", value
        case int():
            return "int", value
        case _:
            try:
                value.encode()
            except UnicodeEncodeError:  # half a surrogate pair, as JSON can have it: SQLite takes it as bytes only
                return "str", value.encode("utf-8", "surrogatepass")
            return "str", value
