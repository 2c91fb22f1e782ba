"""The job service over HTTP: images for nodes, and the admin API for the command line.

Images: ``GET``/``HEAD /images/<sha256>?expires=..&sig=..``; ranges, ``If-Range`` and ``If-None-Match`` with a strong
entity tag, which is the SHA-256 (RFC 9110, sections 8.8, 13 and 14). Without a good signature every answer is 403,
whether there is such an image or not. Several ranges at once are answered with the whole image, as the RFC allows.

Admin API, JSON, on a Unix socket or on 127.0.0.1 with a token::

    GET  /v1/status
    POST /v1/images?name=NAME         body: the image         -> image
    GET  /v1/images                                           -> {"images": [...]}
    POST /v1/jobs                     {"image", "nodes", "mode", "version", "metadata", "workflow"} -> job
    GET  /v1/jobs                                             -> {"jobs": [...]}
    GET  /v1/jobs/ID                                          -> job with history
    GET  /v1/jobs/ID/watch            history entries, one JSON object a line, until every node has finished
    POST /v1/jobs/ID/cancel           {"nodes": [...]|null}   -> {"cancelled": [...]}
    GET  /v1/nodes                                            -> {"nodes": [...]}

Errors are ``{"error": "sentence"}`` with status 400, 401, 404 or 500.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from rmaker_ota.cloud import views
from rmaker_ota.cloud.images import CHUNK, ImageStore
from rmaker_ota.cloud.jobs import JobService, PayloadError, parse_object
from rmaker_ota.cloud.links import LinkCheck, Links
from rmaker_ota.cloud.store import HistoryEntry, Job, JobMode, Store, Workflow
from rmaker_ota.errors import ArgumentError, NotFoundError

logger = logging.getLogger("rmaker_ota.cloud.http")

SEND_CHUNK = 128 * 1024  # bytes read from the file and handed to TLS at a time
MAX_REQUEST = 1 << 20  # bytes of an admin request; images are streamed and not limited
SERVER = "rmaker-ota"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes[ \t]*=[ \t]*(\d*)[ \t]*-[ \t]*(\d*)[ \t]*", re.ASCII | re.IGNORECASE)
_MAX_DIGITS = 18  # positions beyond 10^18 lie behind the end of any file


class RangeNotSatisfiable(Exception):
    """The range lies outside of the image (416)."""


def parse_range(header: str, size: int) -> range | None:
    """The positions a Range header asks for, of ``size`` bytes; None: it is to be ignored and all is sent.

    Raises:
        RangeNotSatisfiable: none of the bytes it asks for exists.
    """
    match = _RANGE.fullmatch(header)
    if match is None or match[1] == match[2] == "":
        return None
    first, last = (int(text.lstrip("0")[: _MAX_DIGITS + 1] or "0") if text else None for text in match.groups())
    if first is None:
        assert last is not None
        if last == 0:
            raise RangeNotSatisfiable
        return range(max(size - last, 0), size)
    if last is not None and last < first:
        return None
    if first >= size:
        raise RangeNotSatisfiable
    return range(first, size if last is None else min(last + 1, size))


@dataclass(slots=True)
class Transfer:
    """One answer to a request for an image. ``sent`` grows while it runs; anyone may look.

    Attributes:
        sha256: the image.
        status: HTTP status of the answer.
        start: first position sent.
        length: bytes of the body.
        sent: bytes handed to the connection so far.
        ended: the answer is over, whole or not.
    """

    sha256: str
    status: int
    start: int
    length: int
    sent: int = 0
    ended: bool = False


TransferObserver = Callable[[Transfer], None]


class ImageServer:
    """Serves images to whoever has a good URL.

    Args:
        images: where the files lie.
        links: judges URLs.
        stall_timeout_s: ends a transfer whose client takes nothing for so long.
        on_transfer: called when an answer begins and when it has ended; must not block.
    """

    def __init__(
        self,
        images: ImageStore,
        links: Links,
        *,
        stall_timeout_s: float = 60,
        on_transfer: TransferObserver | None = None,
    ) -> None:
        self._images = images
        self._links = links
        self._stall_timeout_s = stall_timeout_s
        self._on_transfer = on_transfer
        self.app = web.Application()
        self.app.on_response_prepare.append(_server_name)
        self.app.router.add_get("/images/{sha256}", self._image, allow_head=True)

    async def _image(self, request: web.Request) -> web.StreamResponse:
        check = self._check(request)
        if check is not LinkCheck.GOOD:
            logger.warning("%s %s from %s: 403, URL %s", request.method, request.path, request.remote, check.value)
            raise web.HTTPForbidden(text=f"the URL is {check.value}\n")
        sha256 = request.match_info["sha256"]
        try:
            file = await asyncio.to_thread(self._open, sha256)
        except FileNotFoundError:
            raise web.HTTPNotFound(text="no such image\n") from None
        try:
            return await self._answer(request, sha256, file)
        finally:
            os.close(file)

    def _check(self, request: web.Request) -> LinkCheck:
        expires, signature = (request.query.getall(key, []) for key in ("expires", "sig"))
        if len(expires) != 1 or len(signature) != 1:
            return LinkCheck.FORGED
        return self._links.check(request.path, expires[0], signature[0])

    def _open(self, sha256: str) -> int:
        if not _SHA256.fullmatch(sha256):
            raise FileNotFoundError
        return os.open(self._images.path(sha256), os.O_RDONLY | os.O_CLOEXEC)

    async def _answer(self, request: web.Request, sha256: str, file: int) -> web.StreamResponse:
        size = os.fstat(file).st_size
        tag = f'"{sha256}"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes", "Cache-Control": "private"}
        if _names_tag(request.headers.get("If-None-Match", ""), tag):
            return web.Response(status=304, headers=headers)
        wanted = None
        if request.method == "GET" and request.headers.get("If-Range", tag) == tag:
            try:
                wanted = parse_range(request.headers.get("Range", ""), size)
            except RangeNotSatisfiable:
                raise web.HTTPRequestRangeNotSatisfiable(
                    headers={**headers, "Content-Range": f"bytes */{size}"}, text="no such range\n"
                ) from None
        if wanted is not None:
            headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
        positions = range(size) if wanted is None else wanted
        response = web.StreamResponse(status=200 if wanted is None else 206, headers=headers)
        response.content_type = "application/octet-stream"
        response.content_length = len(positions)
        transfer = Transfer(sha256, response.status, positions.start, len(positions))
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        self._tell(transfer)
        try:
            await response.prepare(request)
            await self._send(response, file, positions, transfer)
            await response.write_eof()
        except (ConnectionError, TimeoutError) as error:
            logger.warning(
                "image %s to %s ended after %d of %d bytes: %s",
                sha256[:12],
                request.remote,
                transfer.sent,
                transfer.length,
                "the client takes nothing" if isinstance(error, TimeoutError) else "the client closed the connection",
            )
            if request.transport is not None:
                request.transport.abort()
        finally:
            transfer.ended = True
            self._tell(transfer)
        return response

    async def _send(self, response: web.StreamResponse, file: int, positions: range, transfer: Transfer) -> None:
        at = positions.start
        while at < positions.stop:
            chunk = await asyncio.to_thread(os.pread, file, min(SEND_CHUNK, positions.stop - at), at)
            if not chunk:
                raise ConnectionAbortedError("the image file became shorter")
            async with asyncio.timeout(self._stall_timeout_s):
                await response.write(chunk)
            at += len(chunk)
            transfer.sent += len(chunk)

    def _tell(self, transfer: Transfer) -> None:
        if transfer.ended:
            logger.info(
                "image %s: %d, %d bytes from %d on",
                transfer.sha256[:12],
                transfer.status,
                transfer.sent,
                transfer.start,
            )
        if self._on_transfer is not None:
            try:
                self._on_transfer(transfer)
            except Exception:
                logger.exception("an observer of transfers failed")


def _names_tag(header: str, tag: str) -> bool:
    return header.strip() == "*" or any(item.strip().removeprefix("W/") == tag for item in header.split(","))


async def _server_name(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER


class Changes:
    """Wakes coroutines when a job changed. `notify` may be called from any thread; the rest belongs to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._closed = False

    def notify(self, entry: HistoryEntry) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, entry.job)

    def watch(self, job_id: str) -> asyncio.Event:
        event = asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(event)
        return event

    def forget(self, job_id: str, event: asyncio.Event) -> None:
        watchers = self._watchers.get(job_id, set())
        watchers.discard(event)
        if not watchers:
            self._watchers.pop(job_id, None)

    def _wake(self, job_id: str) -> None:
        for event in self._watchers.get(job_id, ()):
            event.set()


class AdminServer:
    """The API of the command line.

    Args:
        token: what requests must carry as ``Authorization: Bearer``; None on a Unix socket, whose mode guards it.
        status: what ``/v1/status`` says.
    """

    def __init__(
        self,
        store: Store,
        images: ImageStore,
        jobs: JobService,
        changes: Changes,
        *,
        token: str | None,
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._store = store
        self._images = images
        self._jobs = jobs
        self._changes = changes
        self._token = token
        self._status = status
        self.app = web.Application(middlewares=[self._guard], client_max_size=MAX_REQUEST)
        self.app.router.add_routes(
            [
                web.get("/v1/status", self._get_status),
                web.post("/v1/images", self._post_image),
                web.get("/v1/images", self._get_images),
                web.post("/v1/jobs", self._post_job),
                web.get("/v1/jobs", self._get_jobs),
                web.get("/v1/jobs/{id}", self._get_job),
                web.get("/v1/jobs/{id}/watch", self._watch_job),
                web.post("/v1/jobs/{id}/cancel", self._cancel_job),
                web.get("/v1/nodes", self._get_nodes),
            ]
        )

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(self._status())

    async def _post_image(self, request: web.Request) -> web.Response:
        name = Path(request.query.get("name", "")).name or "image"
        with await asyncio.to_thread(self._images.begin, name) as writer:
            async for chunk in request.content.iter_chunked(CHUNK):
                await asyncio.to_thread(writer.write, chunk)
            image = await asyncio.to_thread(writer.commit)
        return web.json_response(views.image(image), status=201)

    async def _get_images(self, request: web.Request) -> web.Response:
        images = await asyncio.to_thread(self._store.images)
        return web.json_response({"images": [views.image(image) for image in images]})

    async def _post_job(self, request: web.Request) -> web.Response:
        fields = await _body(request, {"image", "nodes", "mode", "version", "metadata", "workflow"})
        nodes, metadata = fields.get("nodes"), fields.get("metadata")
        if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
            raise ArgumentError("nodes: expected a list of node ids")
        if metadata is not None and not isinstance(metadata, dict):
            raise ArgumentError("metadata: expected a JSON object")
        mode = _field(fields, "mode", JobMode.FORCE.value)
        if mode not in list(JobMode):
            raise ArgumentError(f"mode {mode!r}: expected one of {', '.join(JobMode)}")
        workflow = _field(fields, "workflow", Workflow.AUTO.value)
        if workflow not in list(Workflow):
            raise ArgumentError(f"workflow {workflow!r}: expected one of {', '.join(Workflow)}")
        job = await asyncio.to_thread(
            self._jobs.create,
            _field(fields, "image", ""),
            nodes,
            mode=JobMode(mode),
            version=_field(fields, "version", "") or None,
            metadata=metadata,
            workflow=Workflow(workflow),
        )
        return web.json_response(await self._view(job), status=201)

    async def _get_jobs(self, request: web.Request) -> web.Response:
        jobs = await asyncio.to_thread(self._store.jobs)
        return web.json_response({"jobs": [await self._view(job) for job in jobs]})

    async def _get_job(self, request: web.Request) -> web.Response:
        job = await self._job(request)
        history = await asyncio.to_thread(self._store.history, job.id)
        return web.json_response({**await self._view(job), "history": [views.entry(entry) for entry in history]})

    async def _cancel_job(self, request: web.Request) -> web.Response:
        fields = await _body(request, {"nodes"})
        nodes = fields.get("nodes")
        if nodes is not None and not (isinstance(nodes, list) and all(isinstance(node, str) for node in nodes)):
            raise ArgumentError("nodes: expected a list of node ids, or null")
        cancelled = await asyncio.to_thread(self._jobs.cancel, request.match_info["id"], nodes)
        return web.json_response({"cancelled": cancelled})

    async def _watch_job(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        changed = self._changes.watch(job.id)
        shown = 0
        try:
            await response.prepare(request)
            while True:
                changed.clear()
                nodes = await asyncio.to_thread(self._store.job_nodes, job.id)
                history = await asyncio.to_thread(self._store.history, job.id)
                for entry in history[shown:]:
                    await response.write(json.dumps(views.entry(entry)).encode() + b"\n")
                shown = len(history)
                if all(node.state.finished for node in nodes):
                    break
                await changed.wait()
            await response.write_eof()
        except ConnectionError:
            pass  # whoever watched has gone
        finally:
            self._changes.forget(job.id, changed)
        return response

    async def _get_nodes(self, request: web.Request) -> web.Response:
        nodes = await asyncio.to_thread(self._store.nodes)
        return web.json_response({"nodes": [views.node(node) for node in nodes]})

    async def _job(self, request: web.Request) -> Job:
        job = await asyncio.to_thread(self._store.job, request.match_info["id"])
        if job is None:
            raise NotFoundError(f"no job {request.match_info['id']!r}")
        return job

    async def _view(self, job: Job) -> dict[str, Any]:
        image = await asyncio.to_thread(self._store.image, job.image)
        assert image is not None, "the database refuses a job without its image"
        return views.job(job, image, await asyncio.to_thread(self._store.job_nodes, job.id))

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is not None:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                return _error(401, "the token is missing or wrong")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except NotFoundError as error:
            return _error(404, str(error))
        except (ArgumentError, PayloadError) as error:
            return _error(400, str(error))
        except (OSError, sqlite3.Error) as error:
            logger.exception("%s %s failed", request.method, request.path)
            return _error(500, f"the job service failed: {error}")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


async def _body(request: web.Request, known: set[str]) -> dict[str, Any]:
    fields = parse_object(await request.read() or b"{}", MAX_REQUEST)
    for key in fields:
        if key not in known:
            raise ArgumentError(f"{key}: not a known key, expected {', '.join(sorted(known))}")
    return fields


def _field(fields: dict[str, Any], key: str, default: str) -> str:
    value = fields.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ArgumentError(f"{key}: expected a string")
    return value
