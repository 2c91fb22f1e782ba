"""The job service's memory: images, jobs, where each node of a job stands, and every report with its time. SQLite.

What it holds survives a crash at any moment (write-ahead log, ``synchronous=FULL``): a change is on the medium when the
method that made it returns. All times are Unix seconds. Methods may be called from any thread; `transaction` joins
several calls into one change. It decides nothing: the rules are in `jobs`.
"""

from __future__ import annotations

import enum
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmaker_ota.errors import OtaError

# Entry n brings a database of user_version n to n + 1. Never change one that was released; add another.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE images (
            sha256 TEXT PRIMARY KEY, md5 TEXT NOT NULL, size INTEGER NOT NULL, name TEXT NOT NULL,
            project TEXT, version TEXT, secure_version INTEGER, chip_id INTEGER, imported_at REAL NOT NULL
        ) STRICT""",
        """CREATE TABLE jobs (
            id TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images(sha256), version TEXT, metadata TEXT,
            mode TEXT NOT NULL, created_at REAL NOT NULL
        ) STRICT""",
        """CREATE TABLE job_nodes (
            job TEXT NOT NULL REFERENCES jobs(id), node TEXT NOT NULL, state TEXT NOT NULL, info TEXT NOT NULL,
            updated_at REAL NOT NULL, offers INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (job, node)
        ) STRICT""",
        "CREATE INDEX job_nodes_by_node ON job_nodes (node, state)",
        """CREATE TABLE history (
            number INTEGER PRIMARY KEY, job TEXT NOT NULL, node TEXT NOT NULL, at REAL NOT NULL, origin TEXT NOT NULL,
            status TEXT NOT NULL, info TEXT NOT NULL, node_ts INTEGER, verdict TEXT NOT NULL, state TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX history_by_job ON history (job, node, number)",
        """CREATE TABLE nodes (
            id TEXT PRIMARY KEY, fw_version TEXT, network_id TEXT, config TEXT, config_at REAL, seen_at REAL NOT NULL
        ) STRICT""",
    ),
    (
        "ALTER TABLE jobs ADD COLUMN workflow TEXT NOT NULL DEFAULT 'auto'",
        "CREATE INDEX history_by_node ON history (node, number) WHERE origin = 'service' AND info = 'by params'",
    ),
)


class StoreError(OtaError):
    """The database cannot be used: the message names the file and the way out."""


class NodeState(enum.StrEnum):
    """Where a node stands in a job."""

    QUEUED = "queued"  # not offered yet
    SENT = "sent"  # offered (otaurl published), nothing heard yet
    IN_PROGRESS = "in-progress"
    SUCCESS = "success"
    FAILED = "failed"  # offered again on the next fetch
    REJECTED = "rejected"
    DELAYED = "delayed"  # the node fetches again when its window opens
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether the node is never offered this job again."""
        return self in FINISHED


FINISHED = frozenset({NodeState.SUCCESS, NodeState.REJECTED, NodeState.CANCELLED})


BY_PARAMS = "by params"  # the text of an offer that is a write to the OTA service


class JobMode(enum.StrEnum):
    """When a job is offered first: at once, or when the node asks."""

    FORCE = "force"
    ON_FETCH = "on-fetch"


class Workflow(enum.StrEnum):
    """How a node gets a job and reports."""

    AUTO = "auto"  # by params when its configuration has the OTA service
    TOPICS = "topics"  # otaurl, otastatus
    PARAMS = "params"  # a write to the OTA service, reports of its parameters


class Verdict(enum.StrEnum):
    """What became of an entry of the history."""

    APPLIED = "applied"  # it is where the node stands now
    DUPLICATE = "duplicate"  # the same report as the one before
    LATE = "late"  # the job was finished for this node
    UNKNOWN = "unknown"  # a status this service does not know


@dataclass(frozen=True, slots=True)
class Image:
    """An image kept by the service. Digests are lower-case hex; ``project`` to ``chip_id`` only for ESP images."""

    sha256: str
    md5: str
    size: int
    name: str
    imported_at: float
    project: str | None = None
    version: str | None = None
    secure_version: int | None = None
    chip_id: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One image for some nodes. ``version`` is what nodes are told; ``metadata`` is JSON text of an object."""

    id: str
    image: str
    mode: JobMode
    created_at: float
    version: str | None = None
    metadata: str | None = None
    workflow: Workflow = Workflow.AUTO


@dataclass(frozen=True, slots=True)
class JobNode:
    """Where one node stands in one job. ``offers``: how often it was sent the job."""

    job: str
    node: str
    state: NodeState
    info: str
    updated_at: float
    offers: int = 0


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One thing that happened to a node in a job.

    Attributes:
        at: when the service learned of it, by the service's clock.
        origin: ``"node"`` (a report) or ``"service"``.
        status: what the node said, or the state the service set.
        node_ts: the node's own time stamp, or None.
        state: where the node stood afterwards.
    """

    job: str
    node: str
    at: float
    origin: str
    status: str
    info: str
    node_ts: int | None
    verdict: Verdict
    state: NodeState


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What nodes said of themselves. ``config`` is JSON text as the node published it."""

    id: str
    seen_at: float
    fw_version: str | None = None
    network_id: str | None = None
    config: str | None = None
    config_at: float | None = None


class Store:
    """The database file; created when missing, brought to the current layout when older.

    Args:
        path: the file; ``":memory:"`` keeps nothing.

    Raises:
        StoreError: not a database, damaged, written by a newer version, or not accessible.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._lock = threading.RLock()
        self._depth = 0
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
        except sqlite3.Error as error:
            self._db.close()
            raise self._unusable(error) from error
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Ends the use of the file; calling it again is harmless."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything done inside happens as a whole, or not at all when the block raises."""
        with self._lock:
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
            except BaseException:
                self._depth -= 1
                if self._depth == 0 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                self._db.execute("COMMIT")

    # -- images

    def add_image(self, image: Image) -> Image:
        """Keeps an image's record; when there is one with this SHA-256 already, that one stays and is returned."""
        with self.transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO images (sha256, md5, size, name, project, version, secure_version, chip_id,"
                " imported_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    image.sha256,
                    image.md5,
                    image.size,
                    image.name,
                    image.project,
                    image.version,
                    image.secure_version,
                    image.chip_id,
                    image.imported_at,
                ),
            )
            kept = self.image(image.sha256)
            assert kept is not None
            return kept

    def image(self, sha256: str) -> Image | None:
        rows = self._rows(f"SELECT {_IMAGE} FROM images WHERE sha256 = ?", sha256)
        return Image(*rows[0]) if rows else None

    def images(self) -> list[Image]:
        """All images, the oldest first."""
        return [Image(*row) for row in self._rows(f"SELECT {_IMAGE} FROM images ORDER BY imported_at, sha256")]

    # -- jobs

    def add_job(self, job: Job, nodes: Sequence[str]) -> None:
        """Keeps a new job, queued for each of the nodes."""
        with self.transaction():
            self._db.execute(
                f"INSERT INTO jobs ({_JOB}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.image, job.mode.value, job.created_at, job.version, job.metadata, job.workflow.value),
            )
            for node in nodes:
                self._db.execute(
                    "INSERT INTO job_nodes (job, node, state, info, updated_at) VALUES (?, ?, ?, '', ?)",
                    (job.id, node, NodeState.QUEUED.value, job.created_at),
                )
                self._add_history(
                    HistoryEntry(
                        job.id, node, job.created_at, "service", "queued", "", None, Verdict.APPLIED, NodeState.QUEUED
                    )
                )

    def job(self, job_id: str) -> Job | None:
        rows = self._rows(f"SELECT {_JOB} FROM jobs WHERE id = ?", job_id)
        return _job(rows[0]) if rows else None

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        return [_job(row) for row in self._rows(f"SELECT {_JOB} FROM jobs ORDER BY created_at DESC, rowid DESC")]

    def job_nodes(self, job_id: str) -> list[JobNode]:
        """Where the nodes of a job stand, in the order in which the job names them."""
        return [
            _job_node(row) for row in self._rows(f"SELECT {_NODE} FROM job_nodes WHERE job = ? ORDER BY rowid", job_id)
        ]

    def job_node(self, job_id: str, node_id: str) -> JobNode | None:
        rows = self._rows(f"SELECT {_NODE} FROM job_nodes WHERE job = ? AND node = ?", job_id, node_id)
        return _job_node(rows[0]) if rows else None

    def open_jobs(self, node_id: str) -> list[tuple[Job, JobNode]]:
        """The jobs a node has not finished, the oldest first."""
        rows = self._rows(
            f"SELECT {_NODE} FROM job_nodes JOIN jobs ON jobs.id = job_nodes.job WHERE node = ?"
            " AND state NOT IN ('success', 'rejected', 'cancelled') ORDER BY created_at, jobs.rowid",
            node_id,
        )
        return [(self._known_job(row[0]), _job_node(row)) for row in rows]

    def offered_by_params(self, node_id: str) -> JobNode | None:
        """Where a node stands in the job it was offered last by params."""
        rows = self._rows(
            "SELECT job FROM history WHERE node = ? AND origin = 'service' AND info = 'by params'"
            " ORDER BY number DESC LIMIT 1",
            node_id,
        )
        return self.job_node(rows[0][0], node_id) if rows else None

    def unsent_pushes(self) -> list[tuple[Job, JobNode]]:
        """What is to be pushed at once and was not yet, the oldest first."""
        rows = self._rows(
            f"SELECT {_NODE} FROM job_nodes JOIN jobs ON jobs.id = job_nodes.job"
            " WHERE mode = 'force' AND state = 'queued' ORDER BY created_at, jobs.rowid, job_nodes.rowid"
        )
        return [(self._known_job(row[0]), _job_node(row)) for row in rows]

    def record(self, entry: HistoryEntry, *, offered: bool = False, keep: bool = True) -> None:
        """Adds to the history of a node in a job, and sets where it stands when the entry was applied.

        Args:
            offered: the entry is an offer of the job; they are counted.
            keep: whether the entry is written; the state is set in any case.
        """
        with self.transaction():
            if entry.verdict is Verdict.APPLIED:
                self._db.execute(
                    "UPDATE job_nodes SET state = ?, info = ?, updated_at = ?, offers = offers + ?"
                    " WHERE job = ? AND node = ?",
                    (entry.state.value, entry.info, entry.at, int(offered), entry.job, entry.node),
                )
            if keep:
                self._add_history(entry)

    def history(self, job_id: str, node_id: str | None = None) -> list[HistoryEntry]:
        """Everything that happened in a job (to one node of it), in order."""
        sql = f"SELECT {_HISTORY} FROM history WHERE job = ?"
        if node_id is None:
            rows = self._rows(sql + " ORDER BY number", job_id)
        else:
            rows = self._rows(sql + " AND node = ? ORDER BY number", job_id, node_id)
        return [_entry(row) for row in rows]

    def reports_since_offer(self, job_id: str, node_id: str, limit: int = 8) -> tuple[int, list[HistoryEntry]]:
        """How many entries a node has in a job, and its latest reports since it was last offered the job."""
        count = self._rows("SELECT count(*) FROM history WHERE job = ? AND node = ?", job_id, node_id)[0][0]
        rows = self._rows(
            f"SELECT {_HISTORY} FROM history WHERE job = ?1 AND node = ?2 AND origin = 'node' AND number > coalesce("
            "(SELECT max(number) FROM history WHERE job = ?1 AND node = ?2 AND origin = 'service' AND status = 'sent'),"
            " 0) ORDER BY number DESC LIMIT ?3",
            job_id,
            node_id,
            limit,
        )
        return count, [_entry(row) for row in rows]

    # -- nodes

    def node_seen(
        self,
        node_id: str,
        at: float,
        *,
        fw_version: str | None = None,
        network_id: str | None = None,
        config: str | None = None,
    ) -> None:
        """Remembers what a node said of itself; None leaves what was known."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO nodes (id, seen_at, fw_version, network_id, config, config_at) VALUES (?1, ?2, ?3, ?4, ?5,"
                " iif(?5 IS NULL, NULL, ?2)) ON CONFLICT (id) DO UPDATE SET seen_at = ?2,"
                " fw_version = coalesce(?3, fw_version), network_id = coalesce(?4, network_id),"
                " config = coalesce(?5, config), config_at = iif(?5 IS NULL, config_at, ?2)",
                (node_id, at, fw_version, network_id, config),
            )

    def node(self, node_id: str) -> NodeInfo | None:
        rows = self._rows(f"SELECT {_NODE_INFO} FROM nodes WHERE id = ?", node_id)
        return NodeInfo(*rows[0]) if rows else None

    def nodes(self) -> list[NodeInfo]:
        """All nodes ever heard of, by id."""
        return [NodeInfo(*row) for row in self._rows(f"SELECT {_NODE_INFO} FROM nodes ORDER BY id")]

    # -- inner

    def _rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _known_job(self, job_id: str) -> Job:
        job = self.job(job_id)
        assert job is not None, "the database refuses a job_nodes row without its job"
        return job

    def _add_history(self, entry: HistoryEntry) -> None:
        self._db.execute(
            "INSERT INTO history (job, node, at, origin, status, info, node_ts, verdict, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.job,
                entry.node,
                entry.at,
                entry.origin,
                entry.status,
                entry.info,
                entry.node_ts,
                entry.verdict.value,
                entry.state.value,
            ),
        )

    def _migrate(self) -> None:
        with self.transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"{self.path}: written by a newer version (layout {version}, this one knows {len(MIGRATIONS)}):"
                    " use that version, or another data directory"
                )
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        return StoreError(
            f"{self.path}: not usable as the job database: {error}. Move it away to start with an empty one"
        )


_IMAGE = "sha256, md5, size, name, imported_at, project, version, secure_version, chip_id"
_JOB = "id, image, mode, created_at, version, metadata, workflow"
_NODE = "job, node, state, info, updated_at, offers"
_HISTORY = "job, node, at, origin, status, info, node_ts, verdict, state"
_NODE_INFO = "id, seen_at, fw_version, network_id, config, config_at"


def _job(row: Sequence[Any]) -> Job:
    job_id, image, mode, created_at, version, metadata, workflow = row
    return Job(job_id, image, JobMode(mode), created_at, version, metadata, Workflow(workflow))


def _job_node(row: Sequence[Any]) -> JobNode:
    job, node, state, info, updated_at, offers = row
    return JobNode(job, node, NodeState(state), info, updated_at, offers)


def _entry(row: Sequence[Any]) -> HistoryEntry:
    job, node, at, origin, status, info, node_ts, verdict, state = row
    return HistoryEntry(job, node, at, origin, status, info, node_ts, Verdict(verdict), NodeState(state))


def json_value(text: str | None) -> Any:
    """The value of a JSON text the store keeps (metadata, configuration), or None."""
    return None if text is None else json.loads(text)
