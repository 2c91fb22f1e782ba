"""Twin of an HTTPS file server and of the client that asks it, in virtual time.

The server behaves as the trace says, connection by connection. The client is the product's as far as ranges, redirects
and falling back to a whole download go (the table in ``src/csrc/source/source_http.c``). In three respects it is the
reference's, as the traces were recorded with that client; each use is noted in ``peculiarities``, and the runner tells:

* a whole file in place of a range is asked for once more, without the range (specification, sections 4.3 and 9.8);
  `source_http.c` takes that very answer, which saves a request;
* a request that does not fit the send buffer (section 4.2: 1024 bytes, or the length of the URL + 128 where the
  URL is longer) is not sent; `source_http.c` has no such limit;
* a redirect to a path alone is refused like one to an unencrypted address; `source_http.c` follows it (RFC 9110).

Both are generators: they yield the seconds that pass, and get what they ask for back from the world.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rmaker_ota.esp_err import EspErr

Json = dict[str, Any]
Wait = Generator[float, None, None]

READ_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 60.0  # the product's: no byte for so long ends the attempt (Q20)
MAX_REDIRECTS = 10
SEND_BUFFER = 1024
USER_AGENT = "ESP32 HTTP Client/1.0"
_REDIRECTS = (301, 302, 303, 307, 308)


class HttpFailure(Exception):
    """The exchange failed.

    Attributes:
        status: the product's name for it (the table in ``src/csrc/base/status.h``).
        esp_err: what the reference reports.
        errno: of the system, 0: none.
        answered: the server had sent an answer.
    """

    def __init__(self, status: str, esp_err: int, errno: int = 0, *, answered: bool = True) -> None:
        super().__init__(status)
        self.status = status
        self.esp_err = esp_err
        self.errno = errno
        self.answered = answered


class PowerCut(Exception):
    """The power goes in the middle of a transfer."""


@dataclass
class Server:
    """The HTTPS server: ``connections`` counts over the whole scenario."""

    behaviours: list[Json]
    default: Json
    contents: Callable[[str], bytes]
    connections: int = 0

    def connect(self) -> Json:
        index = self.connections
        self.connections += 1
        return self.behaviours[index] if index < len(self.behaviours) else self.default


@dataclass
class Answer:
    """What the server sends to one request."""

    status: int
    headers: dict[str, str]
    body: bytes
    start: int = 0  # offset of the body in the file
    announced: int | None = None  # bytes, None: not said
    ends: bool = True  # a body without announced length that says where it ends (chunked)


def answer(server: Server, behaviour: Json, offset: int | None) -> Answer:
    """The server's answer to a GET; ``offset`` is that of its Range header, if it has one."""
    status = behaviour.get("status", 200)
    if status != 200:
        body = str(behaviour.get("body", "")).encode()
        headers = {"Content-Length": str(len(body))}
        if "location" in behaviour:
            headers["Location"] = behaviour["location"]
        return Answer(status, headers, body, announced=len(body))
    content = server.contents(behaviour.get("image", "new"))
    if "body_bytes" in behaviour:
        content = content[: behaviour["body_bytes"]]
    if "corrupt_byte_at" in behaviour and behaviour["corrupt_byte_at"] < len(content):
        at = behaviour["corrupt_byte_at"]
        content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
    start = 0
    status = 200
    if offset is not None and not behaviour.get("ignore_range"):
        if offset >= len(content):
            return Answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}, b"", announced=0)
        start, status = offset, 206
    body = content[start:]
    if behaviour.get("chunked"):
        return Answer(status, {"Transfer-Encoding": "chunked"}, body, start, None)
    if behaviour.get("no_content_length"):
        return Answer(status, {}, body, start, None, ends=False)
    announced = behaviour.get("content_length", len(body))
    return Answer(status, {"Content-Length": str(announced)}, body[:announced], start, announced)


@dataclass
class Body:
    """The body of a usable answer, read piece by piece."""

    behaviour: Json
    answer: Answer
    stalls_left: int | None = None
    position: int = 0
    stalled: bool = field(default=False)

    @property
    def offset(self) -> int:
        """Where it begins in the file."""
        return self.answer.start

    @property
    def size(self) -> int | None:
        """Bytes of the whole file, if announced."""
        return None if self.answer.announced is None else self.answer.start + self.answer.announced

    def read(self, limit: int) -> Generator[float, None, bytes]:
        """Up to ``limit`` bytes; nothing at the end of a complete body.

        Raises:
            HttpFailure: closed, reset, stalled.
            PowerCut: the power goes before these bytes are there.
        """
        behaviour = self.behaviour
        body = self.answer.body
        stop = behaviour.get("stop_after", len(body))
        power = behaviour.get("power_loss_after")
        stall = behaviour.get("stall_after")
        if behaviour.get("ms_per_read") and self.position < len(body):
            yield behaviour["ms_per_read"] / 1000
        if stall is not None and not self.stalled and self.position >= min(stall, len(body)):
            self.stalled = True
            stalls = behaviour.get("stalls")
            seconds = STALL_TIMEOUT_S if stalls is None else min(stalls * READ_TIMEOUT_S, STALL_TIMEOUT_S)
            yield seconds
            if seconds >= STALL_TIMEOUT_S:
                raise HttpFailure("ERR_STALLED", EspErr.TIMEOUT)
        end = min(self.position + limit, len(body), stop)
        if stall is not None and not self.stalled:
            end = min(end, stall)
        if power is not None and self.position < power <= self.position + limit:
            raise PowerCut
        if end > self.position:
            piece = body[self.position : end]
            self.position = end
            return piece
        if self.position >= stop and stop < len(body):
            if behaviour.get("how") == "reset":
                raise HttpFailure("ERR_HTTP_CLOSED", EspErr.FAIL, behaviour.get("errno", 104))
            raise HttpFailure("ERR_HTTP_CLOSED", EspErr.FAIL)
        if self.answer.announced is not None and self.position < self.answer.announced:
            raise HttpFailure("ERR_HTTP_CLOSED", EspErr.FAIL)  # the server closed before everything announced was sent
        return b""


class Client:
    """One download: connects, follows redirects, falls back to the whole file.

    Args:
        record: takes what another party can see: ``http_connect``, ``http_request`` and ``http_response``.
        verify: what the server's certificate is checked against, as the traces spell it.
    """

    def __init__(self, server: Server, record: Callable[[str, Json], None], *, verify: str, allow_http: bool) -> None:
        self._server = server
        self._record = record
        self._verify = verify
        self._allow_http = allow_http
        self.peculiarities: set[str] = set()

    def open(self, url: str, offset: int | None) -> Generator[float, None, Body]:
        """Asks for the file from ``offset`` on (None: without a range).

        Raises:
            HttpFailure: there is no usable answer.
        """
        while True:
            body = yield from self._request(url, offset)
            if body is not None:
                return body
            offset = None  # the answer to the range is of no use: once more without one

    def _request(self, first_url: str, offset: int | None) -> Generator[float, None, Body | None]:
        url = first_url
        behaviour: Json | None = None
        connected: tuple[str, int] | None = None
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._split(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            here = (parts.hostname or "", port)
            if behaviour is None or connected != here:
                behaviour = yield from self._connect(parts.scheme == "https", *here)
                connected = here
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            if not self._fits(first_url, path):
                self.peculiarities.add("the request does not fit the reference's send buffer")
                raise HttpFailure("ERR_ARGUMENT", EspErr.HTTP_HEADER_TOO_LONG, answered=False)
            request: Json = {"method": "GET", "path": path, "range": None if offset is None else f"bytes={offset}-"}
            self._record("http_request", request)
            reply = yield from self._answer(behaviour, offset)
            self._record("http_response", {"status": reply.status})
            if reply.status in _REDIRECTS:
                url = self._follow(url, reply.headers.get("Location"))
                continue
            if reply.status == 206 and offset is not None and reply.start == offset:
                return Body(behaviour, reply)
            if reply.status == 200 and offset is None:
                return Body(behaviour, reply)
            if offset is not None and reply.status in (200, 206, 416):
                if reply.status == 200:
                    self.peculiarities.add("a whole file in place of a range is asked for again, without the range")
                return None
            if reply.status == 304:
                raise HttpFailure("ERR_HTTP_NOT_MODIFIED", EspErr.HTTP_NOT_MODIFIED)
            raise HttpFailure("ERR_HTTP_STATUS", EspErr.FAIL)
        raise HttpFailure("ERR_HTTP_REDIRECT", EspErr.HTTP_MAX_REDIRECT)

    def _split(self, url: str) -> Any:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise HttpFailure("ERR_HTTP_URL", EspErr.FAIL, answered=False) from None
        if not parts.scheme or not parts.hostname:
            raise HttpFailure("ERR_HTTP_URL", EspErr.FAIL, answered=False)
        if parts.scheme not in ("http", "https"):
            raise HttpFailure("ERR_HTTP_URL", EspErr.HTTP_INVALID_TRANSPORT, answered=False)
        if parts.scheme == "http" and not self._allow_http:
            raise HttpFailure("ERR_HTTP_INSECURE", EspErr.INVALID_ARG, answered=False)  # Q19
        return parts

    def _connect(self, tls: bool, host: str, port: int) -> Generator[float, None, Json]:
        behaviour = self._server.connect()
        failure = behaviour.get("connect")
        if failure is not None:
            if behaviour.get("connect_ms"):
                yield behaviour["connect_ms"] / 1000
            self._record("http_connect", {"tls": tls, "host": host, "port": port, "result": failure})
            status = "ERR_HTTP_CONNECT_TIMEOUT" if "timed out" in failure else "ERR_HTTP_CONNECT"
            raise HttpFailure(status, EspErr.HTTP_CONNECT, behaviour.get("errno", 0), answered=False)
        verify = self._verify if tls else None
        self._record("http_connect", {"tls": tls, "host": host, "port": port, "result": "ok", "verify": verify})
        return behaviour

    def _fits(self, url: str, path: str) -> bool:
        """The request line and the first field have to fit into the buffer together; further fields follow in a
        second go."""
        lines = (f"GET {path} HTTP/1.1", f"User-Agent: {USER_AGENT}", "")
        room = SEND_BUFFER if len(url) <= SEND_BUFFER else len(url) + 128
        return sum(len(line.encode()) + 2 for line in lines) <= room

    def _answer(self, behaviour: Json, offset: int | None) -> Generator[float, None, Answer]:
        silence = behaviour.get("no_response")
        if silence == "close":
            raise HttpFailure("ERR_HTTP_NO_RESPONSE", EspErr.FAIL, answered=False)
        if silence == "silent":
            yield STALL_TIMEOUT_S
            raise HttpFailure("ERR_STALLED", EspErr.TIMEOUT, answered=False)
        if behaviour.get("ms_per_read"):
            yield behaviour["ms_per_read"] / 1000
        return answer(self._server, behaviour, offset)

    def _follow(self, url: str, location: str | None) -> str:
        if location is None:
            raise HttpFailure("ERR_HTTP_REDIRECT", EspErr.INVALID_ARG)
        if "://" not in location:
            self.peculiarities.add("a redirect to a path is refused by the reference's client")
            raise HttpFailure("ERR_HTTP_DOWNGRADE", EspErr.HTTP_REDIRECT_DOWNGRADE)
        if url.startswith("https:") and not location.startswith("https:"):
            raise HttpFailure("ERR_HTTP_DOWNGRADE", EspErr.HTTP_REDIRECT_DOWNGRADE)
        return location
