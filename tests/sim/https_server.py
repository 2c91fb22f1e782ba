"""A scripted HTTPS server on loopback: answers each request as a test wants it, faults included.

A test gives it a script: one behaviour for each request, the last one for all further ones. A behaviour is a function
of an `Exchange`, which reads like what it does on the wire; the common ones are made by the functions below (`serve`,
`redirects`, `stalls`, ...). Everything is driven by events: whoever must wait waits for a condition, nobody sleeps.
Every request is recorded before it is answered.

    with HttpsServer([closes_early(IMAGE, 1000), serve(IMAGE)]) as server:
        source = HttpSource(server.url("/image.bin"), ca_pem=server.ca_pem)
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import selectors
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import trustme

WAIT_S = 30.0  # after which a test that waits for something that never happens fails
MAX_REQUEST = 256 * 1024


class ClientGone(Exception):
    """The client closed the connection, or the server is being stopped."""


@dataclass(frozen=True)
class Request:
    """One request as it arrived.

    Attributes:
        number: 0, 1, ... in order of arrival at this server.
        connection: 0, 1, ... in order of the connections accepted.
        path: path and query.
        headers: names in lower case; of several fields with one name the last.
    """

    number: int
    connection: int
    method: str
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


# ---- Certificates ----------------------------------------------------------------------------------------------------

CertificateKind = Literal["good", "expired", "not_yet_valid", "wrong_host", "unknown_ca"]


@dataclass(frozen=True)
class Authority:
    """A CA and the certificates a test may need; made once, keys take their time."""

    ca: trustme.CA
    certificates: dict[CertificateKind, trustme.LeafCert]
    client: trustme.LeafCert

    @property
    def ca_pem(self) -> bytes:
        return self.ca.cert_pem.bytes()


@functools.cache
def authority() -> Authority:
    ca, stranger = trustme.CA(), trustme.CA()
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    names = ("localhost", "127.0.0.1")
    return Authority(
        ca,
        {
            "good": ca.issue_cert(*names),
            "expired": ca.issue_cert(*names, not_before=now - 3 * day, not_after=now - day),
            "not_yet_valid": ca.issue_cert(*names, not_before=now + day, not_after=now + 3 * day),
            "wrong_host": ca.issue_cert("elsewhere.test"),
            "unknown_ca": stranger.issue_cert(*names),
        },
        ca.issue_cert(common_name="node"),
    )


# ---- One request and its answer --------------------------------------------------------------------------------------


class Exchange:
    """What a behaviour gets: the request, and the connection to answer on.

    Sending on a connection the client has left raises ClientGone, which ends the behaviour quietly.
    """

    def __init__(self, server: HttpsServer, connection: socket.socket, request: Request) -> None:
        self.server = server
        self.connection = connection
        self.request = request
        self.keep_alive = True

    def send(self, data: bytes) -> None:
        """Sends bytes as they are."""
        try:
            self.connection.sendall(data)
        except (OSError, ValueError) as exc:
            raise ClientGone from exc

    def head(self, status: int, headers: dict[str, str] | None = None, reason: str = "Whatever") -> None:
        """Sends a status line and header fields."""
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    def respond(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """Sends a whole answer with its right Content-Length."""
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.send(body)

    def close(self, *, notify: bool = True) -> None:
        """Ends the connection; with or without TLS's own goodbye."""
        self.keep_alive = False
        if notify and isinstance(self.connection, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.connection = self.connection.unwrap()
        self.server.drop(self.connection)

    def reset(self) -> None:
        """Ends the connection with a TCP reset."""
        self.keep_alive = False
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def hold(self) -> None:
        """Says nothing more until the test releases the server."""
        self.server.hold()


Behaviour = Callable[[Exchange], None]


def entity(content: bytes, etag: str | None, headers: dict[str, str] | None) -> dict[str, str]:
    fields = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    if etag is not None:
        fields["ETag"] = etag
    return {**fields, **(headers or {})}


def wanted_range(request: Request, size: int, etag: str | None) -> tuple[int, int] | None:
    """The first and last byte a request asks for, as RFC 9110 has it for one open or closed range; None: the whole."""
    asked = request.range
    if asked is None or not asked.startswith("bytes="):
        return None
    if_range = request.headers.get("if-range")
    if if_range is not None and if_range != etag:
        return None
    first, _, last = asked.removeprefix("bytes=").partition("-")
    return int(first), min(int(last), size - 1) if last else size - 1


def serve(
    content: bytes, etag: str | None = '"v1"', *, ranges: bool = True, headers: dict[str, str] | None = None
) -> Behaviour:
    """A server as it should be: 200, or 206 and 416 to a range; `ranges` False: always 200."""

    def behave(exchange: Exchange) -> None:
        part = wanted_range(exchange.request, len(content), etag) if ranges else None
        fields = entity(content, etag, headers)
        if part is None:
            exchange.respond(200, fields, content)
        elif part[0] >= len(content):
            exchange.respond(416, {**fields, "Content-Range": f"bytes */{len(content)}"}, b"no such range")
        else:
            first, last = part
            fields["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            exchange.respond(206, fields, content[first : last + 1])

    return behave


def answers(
    status: int, headers: dict[str, str] | None = None, body: bytes = b"what the server has to say"
) -> Behaviour:
    """One status with a small body."""
    return lambda exchange: exchange.respond(status, headers, body)


def redirects(location: str | None, status: int = 302, body: bytes = b"") -> Behaviour:
    """A redirect; `location` None: without saying where to."""
    return answers(status, {} if location is None else {"Location": location}, body)


def raw(data: bytes, *, notify: bool = True) -> Behaviour:
    """Sends these very bytes and closes."""

    def behave(exchange: Exchange) -> None:
        exchange.send(data)
        exchange.close(notify=notify)

    return behave


def says_nothing(*, reset: bool = False) -> Behaviour:
    """Takes the request and closes the connection."""

    def behave(exchange: Exchange) -> None:
        if reset:
            exchange.reset()
        else:
            exchange.close()

    return behave


def begin_body(exchange: Exchange, content: bytes, etag: str | None) -> bytes:
    """The header of a right answer, ranges included; returns the body that ought to follow."""
    part = wanted_range(exchange.request, len(content), etag)
    fields = entity(content, etag, None)
    if part is None:
        exchange.head(200, {**fields, "Content-Length": str(len(content))})
        return content
    first, last = part
    fields["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    exchange.head(206, {**fields, "Content-Length": str(last + 1 - first)})
    return content[first : last + 1]


def closes_early(
    content: bytes, count: int, etag: str | None = '"v1"', *, how: Literal["notify", "fin", "reset"] = "notify"
) -> Behaviour:
    """Ends the connection after `count` bytes of the body: with TLS's goodbye, without it, or with a reset.

    Before a reset it waits for `release`, for a reset overtakes the bytes sent before it.
    """

    def behave(exchange: Exchange) -> None:
        body = begin_body(exchange, content, etag)
        exchange.send(body[:count])
        if how == "reset":
            exchange.hold()
            exchange.reset()
        else:
            exchange.close(notify=how == "notify")

    return behave


def stalls(content: bytes, count: int, etag: str | None = '"v1"') -> Behaviour:
    """Stops after `count` bytes of the body until released, then sends the rest. Negative: before any answer."""

    def behave(exchange: Exchange) -> None:
        if count < 0:
            exchange.hold()
        body = begin_body(exchange, content, etag)
        if count >= 0:
            exchange.send(body[:count])
            exchange.hold()
        exchange.send(body[max(count, 0) :])

    return behave


def drips(content: bytes, piece: int = 1, etag: str | None = '"v1"') -> Behaviour:
    """The right answer in many small writes, each a TLS record of its own."""

    def behave(exchange: Exchange) -> None:
        exchange.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = begin_body(exchange, content, etag)
        for at in range(0, len(body), piece):
            exchange.send(body[at : at + piece])

    return behave


def chunked(content: bytes, piece: int = 1000, *, truncated: bool = False, trailer: bytes = b"") -> Behaviour:
    """A body in chunks; `truncated`: closed before the last one."""

    def behave(exchange: Exchange) -> None:
        exchange.head(200, {"Transfer-Encoding": "chunked", "ETag": '"v1"'})
        for at in range(0, len(content), piece):
            part = content[at : at + piece]
            exchange.send(b"%x\r\n" % len(part) + part + b"\r\n")
        if truncated:
            exchange.close()
        else:
            exchange.send(b"0\r\n" + trailer + b"\r\n")

    return behave


def until_close(content: bytes, *, notify: bool = True) -> Behaviour:
    """Neither length nor chunks: the end of the connection is the end of the body."""

    def behave(exchange: Exchange) -> None:
        exchange.head(200, {"Connection": "close"})
        exchange.send(content)
        exchange.close(notify=notify)

    return behave


def announces(content: bytes, size: int | str) -> Behaviour:
    """The whole body under a Content-Length that is wrong, then the end of the connection."""

    def behave(exchange: Exchange) -> None:
        exchange.head(200, {"Content-Length": str(size)})
        exchange.send(content)
        exchange.close()

    return behave


def corrupts(content: bytes, offset: int, etag: str | None = '"v1"') -> Behaviour:
    """A right answer with one bit of one byte changed."""
    wrong = bytearray(content)
    wrong[offset] ^= 0x10
    return serve(bytes(wrong), etag)


def partial(
    body: bytes, content_range: str | None, etag: str | None = '"v1"', *, headers: dict[str, str] | None = None
) -> Behaviour:
    """A 206 with whatever Content-Range."""
    fields = entity(body, etag, headers)
    if content_range is not None:
        fields["Content-Range"] = content_range
    return answers(206, fields, body)


def tunnels() -> Behaviour:
    """A proxy: takes CONNECT and passes bytes both ways until one side has had enough."""

    def behave(exchange: Exchange) -> None:
        host, _, port = exchange.request.path.rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            exchange.head(200)
            near = exchange.connection
            with selectors.DefaultSelector() as waits:
                waits.register(near, selectors.EVENT_READ, far)
                waits.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in waits.select():
                        try:
                            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                        except OSError:
                            data = b""
                        if not data:
                            exchange.close()
                            return
                        try:
                            key.data.sendall(data)
                        except OSError as exc:
                            raise ClientGone from exc

    return behave


# ---- The server ------------------------------------------------------------------------------------------------------


class HttpsServer:
    """Listens on 127.0.0.1 while the ``with`` block lasts.

    Args:
        script: one behaviour for each request in order of arrival; the last one goes on.
        tls: False: plain HTTP.
        certificate: which of the certificates it shows.
        client_certificate: ask for one of our CA's and turn everybody else away.
        tls_versions: lowest and highest version offered.
        silent: accept connections and never say a word, not even in TLS.

    Attributes:
        requests: what arrived so far.
        connections: how many were accepted.
        client_subjects: common name of the client certificate of each connection that got through the handshake;
            "": it showed none.
    """

    def __init__(
        self,
        script: Sequence[Behaviour] = (),
        *,
        tls: bool = True,
        certificate: CertificateKind = "good",
        client_certificate: bool = False,
        tls_versions: tuple[ssl.TLSVersion, ssl.TLSVersion] = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
        silent: bool = False,
    ) -> None:
        self.script = list(script)
        self.tls = tls
        self.silent = silent
        self.ca_pem = authority().ca_pem
        self.requests: list[Request] = []
        self.client_subjects: list[str] = []
        self.connections = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version, self._context.maximum_version = tls_versions
        if tls_versions[1] < ssl.TLSVersion.TLSv1_2:
            self._context.set_ciphers("ALL:@SECLEVEL=0")
        authority().certificates[certificate].configure_cert(self._context)
        if client_certificate:
            self._context.verify_mode = ssl.CERT_REQUIRED
            authority().ca.configure_trust(self._context)
        self._changed = threading.Condition()  # guards everything below, and the attributes
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._held = 0
        self._released = False
        self._stopping = False
        self._errors: list[BaseException] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            sockets = list(self._sockets)
        for sock in [self._listener, *sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it, which close() would not
        while True:
            with self._changed:
                if not self._threads:
                    break
                thread = self._threads.pop()
            thread.join()
        self._listener.close()
        if self._errors and exc is None:
            raise self._errors[0]

    def url(self, path: str = "/image.bin", host: str = "localhost") -> str:
        """A URL of this server."""
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        """The Range fields of the requests so far."""
        return [request.range for request in self.requests]

    def wait_for_requests(self, count: int) -> None:
        """Waits until so many requests arrived."""
        self._wait(lambda: len(self.requests) >= count)

    def wait_for_connections(self, count: int) -> None:
        """Waits until so many connections were accepted."""
        self._wait(lambda: self.connections >= count)

    def wait_until_held(self) -> None:
        """Waits until a behaviour stands in `hold`; what it sent before is on its way."""
        self._wait(lambda: self._held > 0)

    def release(self) -> None:
        """Lets everything that holds, now or later, go on."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    # ---- for exchanges

    def hold(self) -> None:
        with self._changed:
            self._held += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._released or self._stopping)
            self._held -= 1
            if self._stopping:
                raise ClientGone

    def drop(self, sock: socket.socket) -> None:
        with self._changed:
            self._sockets.discard(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    # ---- threads

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, WAIT_S):
                raise TimeoutError("the server never got there")

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=self._guard, args=(target, *args), daemon=True)
        with self._changed:
            self._threads.append(thread)
            thread.start()

    def _guard(self, target: Callable[..., None], *args: object) -> None:
        try:
            target(*args)
        except BaseException as exc:  # a fault of a behaviour: shown where the server is left
            with self._changed:
                self._errors.append(exc)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # stopped
            with self._changed:
                if self._stopping:
                    sock.close()
                    return
                self._sockets.add(sock)
                number = self.connections
                self.connections += 1
                self._changed.notify_all()
            if not self.silent:
                self._spawn(self._serve, sock, number)

    def _handshake(self, sock: socket.socket) -> socket.socket | None:
        if not self.tls:
            return sock
        with self._changed:
            self._sockets.discard(sock)
            if self._stopping:
                sock.close()
                return None
            wrapped = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._sockets.add(wrapped)
        try:
            wrapped.do_handshake()
            peer: Any = wrapped.getpeercert() or {}
        except (OSError, ValueError, AttributeError):  # the last two: the client is gone, `drop` closed it meanwhile
            self.drop(wrapped)
            return None
        names = [value for part in peer.get("subject", ()) for key, value in part if key == "commonName"]
        with self._changed:
            self.client_subjects.append(names[0] if names else "")
        return wrapped

    def _serve(self, plain: socket.socket, number: int) -> None:
        connection = self._handshake(plain)
        if connection is None:
            return
        try:
            while True:
                request = self._read_request(connection, number)
                if request is None:
                    break
                exchange = Exchange(self, connection, request)
                behaviour = self.script[min(request.number, len(self.script) - 1)]
                behaviour(exchange)
                if not exchange.keep_alive:
                    return
        except ClientGone:
            pass
        self.drop(connection)

    def _read_request(self, connection: socket.socket, number: int) -> Request | None:
        data = b""
        while b"\r\n\r\n" not in data:
            try:
                more = connection.recv(65536)
            except OSError:
                more = b""
            if not more or len(data) > MAX_REQUEST:
                return None
            data += more
        head = data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        with self._changed:
            request = Request(len(self.requests), number, method, path, headers)
            self.requests.append(request)
            self._changed.notify_all()
        return request


@contextlib.contextmanager
def refused_port() -> Iterator[int]:
    """A port on 127.0.0.1 that refuses connections: bound, so nobody else gets it, but not listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
