"""The rules of the job service: which job a node is offered, and what a report changes.

Life of a node in a job (specification of the protocol, sections 2.8 and 11.1)::

    queued --offer--> sent --report--> in-progress --report--> success | rejected          finished
       |                ^                  |     ^
       |                +--- fetch --- failed, delayed        offered again on the next fetch
       +--------------------- cancel ---------------------->   cancelled                   finished

``failed`` does not finish a job: nodes report it for every attempt and ask again later. A node that works by params
never asks; its initial report, which it makes at every start, counts as a fetch. What arrives late, twice or
with a status nobody knows is recorded and changes nothing. Payloads are hostile until checked; a bad one is dropped
with a log line. The node's id is the one in the topic: brokers tie topics to certificates, nothing ties the id inside a
payload.

No socket and no clock of its own: `publish` and `clock` are handed in. Methods may be called from any thread.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rmaker_ota.cloud.images import ImageStore, stream_id
from rmaker_ota.cloud.links import Links
from rmaker_ota.cloud.store import BY_PARAMS, HistoryEntry, Job, JobMode, JobNode, NodeState, Store, Verdict, Workflow
from rmaker_ota.errors import ArgumentError, NotFoundError

logger = logging.getLogger("rmaker_ota.cloud.jobs")

JOB_ID_LENGTH = 22  # as on public RainMaker; firmware reads at most 63
JOB_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
MAX_PAYLOAD = 8192  # bytes of an otafetch or otastatus; a node's own limit is 200
MAX_CONFIG_PAYLOAD = 256 * 1024  # bytes of a node configuration
MAX_PARAMS_PAYLOAD = 128 * 1024  # bytes of a report of parameters; what AWS IoT delivers at most
OTA_SERVICE_TYPE = "esp.service.ota"
OTA_SERVICE = "OTA"  # its name, everywhere
MAX_INFO = 1024  # characters of additional_info that are kept
MAX_HISTORY = 5000  # entries kept for one node in one job; a node in a loop must not fill the disk
MAX_METADATA = 4096  # bytes of JSON
CUT_REPORT = 199  # firmware cuts longer reports here, which leaves no valid JSON
_NODE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CUT = re.compile(
    r'\{"ota_job_id":"([^"\\]{1,64})","status":"([a-z-]{1,16})"(?:.*?"additional_info":"(.*))?', re.DOTALL
)

REPORTED = {
    "in-progress": NodeState.IN_PROGRESS,
    "success": NodeState.SUCCESS,
    "failed": NodeState.FAILED,
    "rejected": NodeState.REJECTED,
    "delayed": NodeState.DELAYED,
}

# Which of several open jobs a fetch is answered with, the first rank first, then by age: what was begun is ended, and a
# job that cannot run now does not keep others waiting.
FETCH_RANK = {
    NodeState.IN_PROGRESS: 0,
    NodeState.SENT: 0,
    NodeState.QUEUED: 1,
    NodeState.DELAYED: 2,
    NodeState.FAILED: 3,
}


class PayloadError(ValueError):
    """A payload that is not what the topic is for; the message says why."""


def judge_report(state: NodeState, status: str) -> tuple[Verdict, NodeState]:
    """What a node's report does to where it stands."""
    if status not in REPORTED:
        return Verdict.UNKNOWN, state
    if state.finished:
        return Verdict.LATE, state
    return Verdict.APPLIED, REPORTED[status]


class JobService:
    """Creates, offers and follows jobs.

    Args:
        store: where everything is kept.
        images: the images jobs are about.
        links: makes the URLs nodes get.
        publish: hands a message (topic, payload) to the broker with QoS 1; False when that is not possible now.
        clock: Unix seconds.
        on_change: called with every history entry after it was written; must not block, must not call back.
        streams: whether nodes are told a stream id beside the URL.
    """

    def __init__(
        self,
        store: Store,
        images: ImageStore,
        links: Links,
        *,
        publish: Callable[[str, bytes], bool],
        clock: Callable[[], float] = time.time,
        on_change: Callable[[HistoryEntry], None] | None = None,
        streams: bool = False,
    ) -> None:
        self._streams = streams
        self._store = store
        self._images = images
        self._links = links
        self._publish = publish
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.RLock()
        self._infos: dict[str, str] = {}  # by node: the text of a report by params, until its status comes

    # -- what operators do

    def create(
        self,
        image: str,
        nodes: Sequence[str],
        *,
        mode: JobMode = JobMode.FORCE,
        version: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        workflow: Workflow = Workflow.AUTO,
    ) -> Job:
        """Creates a job and, with `JobMode.FORCE`, offers it to the nodes at once (or as soon as the broker is back).

        Args:
            image: SHA-256 of an image kept here.
            nodes: ids of the nodes; each is taken once.
            version: what nodes are told; None: the version in the image, if it has one.
            metadata: handed to the nodes as it is, e.g. ``{"download_window": {"start": 1380, "end": 120}}``; nodes
                that work by params get none.
            workflow: how the nodes get the job.

        Raises:
            NotFoundError: there is no such image.
            ArgumentError: no node, an impossible node id, version or metadata.
        """
        known = self._images.require(image)
        nodes = list(dict.fromkeys(nodes))
        if not nodes:
            raise ArgumentError("a job needs at least one node")
        for node in nodes:
            if not valid_node_id(node):
                raise ArgumentError(f"{node!r} is not a node id: expected 1 to 128 letters, digits or _ . : -")
        if version is not None and (not version or len(version) > 64 or not version.isprintable()):
            raise ArgumentError(f"version {version!r}: expected 1 to 64 printable characters")
        job = Job(
            id="".join(secrets.choice(JOB_ID_ALPHABET) for _ in range(JOB_ID_LENGTH)),
            image=image,
            mode=mode,
            created_at=self._clock(),
            version=version or known.version or None,
            metadata=None if metadata is None else _metadata_text(metadata),
            workflow=workflow,
        )
        if workflow is Workflow.PARAMS and metadata is not None:
            raise ArgumentError("metadata: nodes that work by params get none")
        with self._lock:
            self._store.add_job(job, nodes)
            for entry in self._store.history(job.id):
                self._tell(entry)
            if mode is JobMode.FORCE:
                for row in self._store.job_nodes(job.id):
                    self._offer(job, row)
        return job

    def cancel(self, job_id: str, nodes: Iterable[str] | None = None) -> list[str]:
        """Takes a job back from the nodes that have not finished it; returns their ids.

        A node that already got it cannot be stopped: what it reports is recorded as late.

        Args:
            nodes: ids of the nodes; None: all of the job's.

        Raises:
            NotFoundError: there is no such job, or a node has no part in it.
        """
        with self._lock:
            rows = {row.node: row for row in self._job_nodes(job_id)}
            chosen = list(rows) if nodes is None else list(dict.fromkeys(nodes))
            for node in chosen:
                if node not in rows:
                    raise NotFoundError(f"node {node!r} has no part in job {job_id}")
            cancelled = [node for node in chosen if not rows[node].state.finished]
            with self._store.transaction():
                for node in cancelled:
                    self._set(rows[node], NodeState.CANCELLED, "cancelled")
        return cancelled

    def push_unsent(self) -> int:
        """Offers every force job that could not be offered so far; to be called when the broker is connected.

        Returns:
            how many were offered.
        """
        with self._lock:
            return sum(self._offer(job, node) for job, node in self._store.unsent_pushes())

    # -- what nodes say

    def on_fetch(self, node_id: str, payload: bytes) -> bool:
        """Answers an otafetch: offers the open job of the lowest `FETCH_RANK`; says nothing when there is none.

        Returns:
            whether a job was offered.
        """
        try:
            fields = _fields(node_id, payload, MAX_PAYLOAD)
        except PayloadError as error:
            logger.warning("otafetch of node %s dropped: %s", printable(node_id), error)
            return False
        with self._lock:
            self._store.node_seen(
                node_id,
                self._clock(),
                fw_version=_text(fields.get("fw_version"), 64),
                network_id=_text(fields.get("network_id"), 64),
            )
            open_jobs = self._store.open_jobs(node_id)
            if not open_jobs:
                logger.debug("otafetch of node %s: no job", node_id)
                return False
            job, node = min(open_jobs, key=lambda pair: FETCH_RANK[pair[1].state])
            return self._offer(job, node)

    def on_status(self, node_id: str, payload: bytes) -> HistoryEntry | None:
        """Takes an otastatus report. Returns what was recorded, or None when the payload was dropped."""
        try:
            job_id, status, info, node_ts = _report(node_id, payload)
        except PayloadError as error:
            logger.warning("otastatus of node %s dropped: %s", printable(node_id), error)
            return None
        with self._lock:
            self._store.node_seen(node_id, self._clock())
            node = self._store.job_node(job_id, node_id)
            if node is None:
                logger.warning("otastatus of node %s dropped: it has no job %s", node_id, printable(job_id))
                return None
            verdict, state = judge_report(node.state, status)
            count, recent = self._store.reports_since_offer(job_id, node_id)
            if node_ts is not None and any((e.status, e.info, e.node_ts) == (status, info, node_ts) for e in recent):
                verdict, state = Verdict.DUPLICATE, node.state
            if verdict is not Verdict.APPLIED:
                logger.info("otastatus of node %s, job %s: %r is %s", node_id, job_id, printable(status), verdict.value)
            entry = HistoryEntry(job_id, node_id, self._clock(), "node", status, info, node_ts, verdict, state)
            self._store.record(entry, keep=count < MAX_HISTORY)
            self._tell(entry)
            return entry

    def on_config(self, node_id: str, payload: bytes) -> bool:
        """Keeps a node's configuration. Returns whether it was one."""
        try:
            fields = _fields(node_id, payload, MAX_CONFIG_PAYLOAD)
        except PayloadError as error:
            logger.warning("config of node %s dropped: %s", printable(node_id), error)
            return False
        info = fields.get("info")
        version = _text(info.get("fw_version"), 64) if isinstance(info, dict) else None
        with self._lock:
            text = json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
            self._store.node_seen(node_id, self._clock(), fw_version=version, config=text)
        return True

    def on_params(self, node_id: str, payload: bytes) -> HistoryEntry | None:
        """Takes a report of parameters: those of the OTA service come as text first, then as status.

        Returns what was recorded, or None when there was nothing to record.
        """
        said = self._ota_params(node_id, payload)
        if said is None:
            return None
        status, info = said
        with self._lock:
            node = self._store.offered_by_params(node_id)
            if node is None:
                return None
            if info is not None:
                self._infos[node_id] = info
            _, recent = self._store.reports_since_offer(node.job, node_id)
            if status is None or (info is not None and not recent):
                return None  # with the first text of a job comes what was last said at the start, once more
            return self._record(node, status, self._infos.pop(node_id, ""))

    def on_params_init(self, node_id: str, payload: bytes) -> bool:
        """Takes a node's initial report: a result that was only known after its restart, or nothing; then it may get
        the next job.

        Returns:
            whether a job was offered.
        """
        said = self._ota_params(node_id, payload)
        if said is None:
            return False
        status, info = said[0] or "", said[1] or ""
        with self._lock:
            self._infos.pop(node_id, None)
            node = self._store.offered_by_params(node_id)
            if node is not None and status:
                _, recent = self._store.reports_since_offer(node.job, node_id)
                # Of a job the node has not begun it says nothing: that is an older one's result, said once more.
                if recent and (recent[0].status, recent[0].info) != (status, info):
                    self._record(node, status, info)
            open_jobs = [pair for pair in self._store.open_jobs(node_id) if self._by_params(*pair)]
            if not open_jobs or status in ("in-progress", "failed", "delayed"):
                return False
            return self._offer(*min(open_jobs, key=lambda pair: FETCH_RANK[pair[1].state]))

    # -- inner

    def _ota_params(self, node_id: str, payload: bytes) -> tuple[str | None, str | None] | None:
        """Status and text in a report of parameters; None: nothing of the OTA service is in it."""
        try:
            if not valid_node_id(node_id):
                raise PayloadError("not a node id in the topic")
            service = parse_object(payload, MAX_PARAMS_PAYLOAD).get(OTA_SERVICE)
        except PayloadError as error:
            logger.warning("params of node %s dropped: %s", printable(node_id), error)
            return None
        if not isinstance(service, dict):
            return None
        return _text(service.get("Status"), 64), _text(service.get("Info"), MAX_INFO)

    def _record(self, node: JobNode, status: str, info: str) -> HistoryEntry:
        verdict, state = judge_report(node.state, status)
        count, _ = self._store.reports_since_offer(node.job, node.node)
        if verdict is not Verdict.APPLIED:
            logger.info("params of node %s, job %s: %r is %s", node.node, node.job, printable(status), verdict.value)
        entry = HistoryEntry(node.job, node.node, self._clock(), "node", status, info, None, verdict, state)
        self._store.node_seen(node.node, entry.at)
        self._store.record(entry, keep=count < MAX_HISTORY)
        self._tell(entry)
        return entry

    def _by_params(self, job: Job, node: JobNode) -> bool:
        if job.workflow is not Workflow.AUTO:
            return job.workflow is Workflow.PARAMS
        known = self._store.node(node.node)
        config = None if known is None or known.config is None else json.loads(known.config)
        services = config.get("services") if isinstance(config, dict) else None
        return isinstance(services, list) and any(
            isinstance(service, dict) and service.get("type") == OTA_SERVICE_TYPE for service in services
        )

    def _offer(self, job: Job, node: JobNode) -> bool:
        by_params = self._by_params(job, node)
        if by_params:
            url = self._links.image_url(self._images.require(job.image).sha256)
            topic, message = "params/remote", {OTA_SERVICE: {"URL": url}}
        else:
            topic, message = "otaurl", self._otaurl(job)
        # No \u escapes: the parser of the original firmware keeps them as they stand.
        payload = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
        if not self._publish(f"node/{node.node}/{topic}", payload):
            logger.info("job %s for node %s waits for the broker", job.id, node.node)
            return False
        state = NodeState.IN_PROGRESS if node.state is NodeState.IN_PROGRESS else NodeState.SENT
        self._set(node, state, "sent", BY_PARAMS if by_params else "", offered=True)
        return True

    def _otaurl(self, job: Job) -> dict[str, Any]:
        image = self._images.require(job.image)
        message: dict[str, Any] = {"ota_job_id": job.id, "url": self._links.image_url(image.sha256)}
        if job.version:
            message["fw_version"] = job.version
        if self._streams:
            message["stream_id"] = stream_id(image.sha256)
        message["file_size"] = image.size
        message["file_md5"] = image.md5
        if job.metadata is not None:
            message["metadata"] = json.loads(job.metadata)
        return message

    def _set(self, node: JobNode, state: NodeState, status: str, info: str = "", *, offered: bool = False) -> None:
        entry = HistoryEntry(node.job, node.node, self._clock(), "service", status, info, None, Verdict.APPLIED, state)
        count, _ = self._store.reports_since_offer(node.job, node.node)
        self._store.record(entry, offered=offered, keep=count < MAX_HISTORY)
        self._tell(entry)

    def _job_nodes(self, job_id: str) -> list[JobNode]:
        if self._store.job(job_id) is None:
            raise NotFoundError(f"no job {job_id!r}")
        return self._store.job_nodes(job_id)

    def _tell(self, entry: HistoryEntry) -> None:
        info = f" ({printable(entry.info)})" if entry.info else ""
        logger.info("job %s, node %s: %s%s", entry.job, entry.node, printable(entry.status), info)
        if self._on_change is not None:
            try:
                self._on_change(entry)
            except Exception:
                logger.exception("an observer of jobs failed")


def valid_node_id(node_id: str) -> bool:
    """Whether this can be a node's id: it must be one level of an MQTT topic."""
    return _NODE_ID.fullmatch(node_id) is not None


def printable(text: str, limit: int = 80) -> str:
    """A text somebody else chose, made fit for a log line."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return shown + "..." if len(text) > limit else shown


def parse_object(payload: bytes, limit: int) -> dict[str, Any]:
    """The JSON object in a payload of at most ``limit`` bytes.

    Raises:
        PayloadError: it is not one; also for nesting and numbers beyond what a reader should follow.
    """
    if len(payload) > limit:
        raise PayloadError(f"{len(payload)} bytes, at most {limit} are read")
    try:
        value = json.loads(payload.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise PayloadError("not UTF-8") from error
    except RecursionError as error:
        raise PayloadError("nested too deeply") from error
    except ValueError as error:
        raise PayloadError(f"not JSON: {printable(str(error))}") from error
    if not isinstance(value, dict):
        raise PayloadError("not a JSON object")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _fields(node_id: str, payload: bytes, limit: int) -> dict[str, Any]:
    if not valid_node_id(node_id):
        raise PayloadError("not a node id in the topic")
    fields = parse_object(payload, limit)
    if fields.get("node_id", node_id) != node_id:
        raise PayloadError("it speaks of another node than its topic")
    return fields


def _report(node_id: str, payload: bytes) -> tuple[str, str, str, int | None]:
    if not valid_node_id(node_id):
        raise PayloadError("not a node id in the topic")
    try:
        fields = parse_object(payload, MAX_PAYLOAD)
    except PayloadError:
        cut = _CUT.match(payload.decode("utf-8", "ignore")) if len(payload) == CUT_REPORT else None
        if cut is None:
            raise
        return cut[1], cut[2], cut[3] or "", None
    job_id, status = fields.get("ota_job_id"), fields.get("status")
    if not isinstance(job_id, str) or not isinstance(status, str) or not job_id or not status:
        raise PayloadError("ota_job_id and status are not both strings")
    node_ts = fields.get("ts")
    if not isinstance(node_ts, int) or isinstance(node_ts, bool) or not 0 <= node_ts < 1 << 63:
        node_ts = None
    return storable(job_id)[:64], storable(status)[:64], _text(fields.get("additional_info"), MAX_INFO) or "", node_ts


def _text(value: object, limit: int) -> str | None:
    return storable(value)[:limit] if isinstance(value, str) else None


def storable(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"metadata: expected a JSON object: {error}") from error
    if size > MAX_METADATA:
        raise ArgumentError(f"metadata: {size} bytes of JSON, expected at most {MAX_METADATA}")
    return text
