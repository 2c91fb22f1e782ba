"""HttpSource against a scripted server: every way a download can go wrong, and the ways it has to go right."""

from __future__ import annotations

import contextlib
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from rmaker_ota.errors import (
    ArgumentError,
    CancelledError,
    DownloadError,
    OtaError,
    OtaTimeoutError,
    StateError,
)
from rmaker_ota.ota_core import HttpSource, SourceInfo, public_url
from tests.sim import https_server as sim
from tests.sim.https_server import HttpsServer
from tests.sim.nginx import Nginx, find_nginx

IMAGE = random.Random(20).randbytes(300_007)
SIZE = len(IMAGE)
SECRET = "5f3a9c-not-for-logs"
PATH = f"/images/app.bin?X-Amz-Signature={SECRET}"


@pytest.fixture(autouse=True, scope="module")
def no_proxy_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        yield


def make(server: HttpsServer, path: str = PATH, **options: Any) -> HttpSource:
    return HttpSource(server.url(path), **{"ca_pem": server.ca_pem, **options})


def read_all(source: HttpSource, size: int = 65536) -> bytes:
    parts = []
    while part := source.read(size):
        assert len(part) <= size
        parts.append(part)
    return b"".join(parts)


def read_until_error(source: HttpSource, size: int = 65536) -> tuple[bytes, OtaError]:
    """Everything that is handed out, and the error that ends it; it sticks."""
    body = b""
    with pytest.raises(OtaError) as caught:
        while part := source.read(size):
            body += part
    with pytest.raises(type(caught.value)) as again:
        source.read(1)
    assert again.value.status == caught.value.status
    assert again.value.offset == caught.value.offset
    return body, in_order(caught.value)


def open_error(source: HttpSource, offset: int = 0) -> OtaError:
    with pytest.raises(OtaError) as caught:
        source.open(offset)
    with pytest.raises(StateError):  # it is closed again
        source.read(1)
    return in_order(caught.value)


def in_order(error: OtaError) -> OtaError:
    """Whatever went wrong: the stage is told and the secret is not."""
    assert error.stage == "source"
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    return error


# ---- What has to work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 4096, 16384, 65536, SIZE, SIZE + 1])
def test_the_whole_object_in_reads_of_any_size(size: int) -> None:
    content = IMAGE[:1000] if size < 100 else IMAGE
    with HttpsServer([sim.serve(content)]) as server:
        source = make(server)
        assert source.open() == SourceInfo(len(content), 0, '"v1"')
        assert read_all(source, size) == content
        assert source.read(size) == b""
        assert source.bytes_read == len(content)
        assert source.requests == 1
        (request,) = server.requests
    assert request.path == PATH
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("rmaker-ota/")
    assert "range" not in request.headers
    assert "if-range" not in request.headers


@pytest.mark.parametrize(
    "behaviour",
    [
        sim.chunked(IMAGE),
        sim.chunked(IMAGE, 70_000),
        sim.chunked(IMAGE, trailer=b'X-Digest: "1"\r\nETag: "late"\r\n'),
        sim.until_close(IMAGE),
    ],
    ids=["chunked", "large chunks", "chunked with trailers", "until close"],
)
def test_a_body_of_unknown_size_is_read_to_its_end(behaviour: sim.Behaviour) -> None:
    with HttpsServer([behaviour]) as server:
        source = make(server)
        assert source.open().size is None
        assert read_all(source) == IMAGE


def test_a_dripping_server_is_slow_but_alive() -> None:
    with HttpsServer([sim.drips(IMAGE[:2000])]) as server:
        source = make(server, stall_timeout_ms=20_000)
        assert source.open().size == 2000
        assert read_all(source) == IMAGE[:2000]


def test_an_empty_object_is_done_at_once() -> None:
    with HttpsServer([sim.serve(b"")]) as server:
        source = make(server)
        assert source.open().size == 0
        assert source.read() == b""


def test_a_content_coding_never_changes_the_bytes() -> None:
    with HttpsServer([sim.serve(IMAGE, headers={"Content-Encoding": "gzip"})]) as server:
        source = make(server)
        source.open()
        assert read_all(source) == IMAGE


def test_interim_answers_are_skipped() -> None:
    interim = b'HTTP/1.1 103 Early Hints\r\nETag: "hint"\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n'

    def behave(exchange: sim.Exchange) -> None:
        exchange.send(interim)
        sim.serve(IMAGE)(exchange)

    with HttpsServer([behave]) as server:
        source = make(server)
        assert source.open() == SourceInfo(SIZE, 0, '"v1"')
        assert read_all(source) == IMAGE


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        ('"abc"', '"abc"'),
        ('W/"abc"', ""),
        ("abc", ""),
        ('"a b"', ""),
        ('"' + "x" * 125 + '"', '"' + "x" * 125 + '"'),
        ('"' + "x" * 126 + '"', ""),
        (None, ""),
    ],
)
def test_only_strong_entity_tags_count(sent: str | None, known: str) -> None:
    with HttpsServer([sim.serve(IMAGE, sent)]) as server:
        assert make(server).open().entity_tag == known


def test_two_entity_tags_are_none() -> None:
    with HttpsServer([sim.raw(b'HTTP/1.1 200 OK\r\nETag: "a"\r\nETag: "b"\r\nContent-Length: 1\r\n\r\nx')]) as server:
        assert make(server).open().entity_tag == ""


def test_a_source_can_be_opened_again_but_not_twice_at_once() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        source = make(server)
        source.open()
        with pytest.raises(StateError):
            source.open()
        first = source.read(1000)
        source.close()
        with pytest.raises(StateError):
            source.read(1)
        info = source.open(len(first))
        assert info.offset == len(first)
        assert first + read_all(source) == IMAGE
        assert server.requests[1].headers["if-range"] == '"v1"'  # it remembered
        assert source.requests == 2


def test_a_slow_reader_makes_the_server_wait_and_gets_everything() -> None:
    content = IMAGE * 40  # more than sockets and curl hold
    with HttpsServer([sim.serve(content)]) as server:
        source = make(server)
        source.open()
        assert source.read(10) == content[:10]
        assert content[10:] == read_all(source, 1 << 20)


def test_plain_http_has_to_be_allowed() -> None:
    with HttpsServer([sim.serve(IMAGE)], tls=False) as server:
        with pytest.raises(DownloadError) as caught:
            make(server)
        assert in_order(caught.value).status == "ERR_HTTP_INSECURE"
        assert caught.value.esp_err == 0x102
        assert server.connections == 0
        source = make(server, allow_http=True)
        source.open()
        assert read_all(source) == IMAGE


@pytest.mark.parametrize(
    "url",
    [
        "",
        "image.bin",
        "ftp://localhost/x",
        "file:///etc/passwd",
        "https://",
        "https://host:99999/x",
        "https://a b/x",
        "://x",
    ],
)
def test_a_bad_url_is_refused_before_anything_else(url: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        HttpSource(url + f"?{SECRET}" if url else url)
    assert in_order(caught.value).status == "ERR_HTTP_URL"


def test_bad_options_are_named() -> None:
    with pytest.raises(ArgumentError, match="connect_timeout_ms is -1"):
        HttpSource("https://localhost/", connect_timeout_ms=-1)
    with pytest.raises(ArgumentError, match="url contains a NUL"):
        HttpSource("https://localhost/\0x")
    with pytest.raises(ArgumentError, match="client key without"):
        HttpSource("https://localhost/", client_key_file="/key.pem")
    with pytest.raises(TypeError):
        HttpSource("https://localhost/", deadline_ms=1.5)  # type: ignore[arg-type]


# ---- Resuming --------------------------------------------------------------------------------------------------------

AT = 100_000


@pytest.mark.parametrize("tag", ["", '"v1"', 'W/"v1"'])
@pytest.mark.parametrize("offset", [1, AT, SIZE - 1])
def test_a_right_part_resumes(offset: int, tag: str) -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        source = make(server, entity_tag=tag)
        assert source.open(offset) == SourceInfo(SIZE, offset, '"v1"')
        assert read_all(source) == IMAGE[offset:]
        (request,) = server.requests
        assert request.range == f"bytes={offset}-"
        assert request.headers.get("if-range") == (tag if tag == '"v1"' else None)


def expect_start_over(server: HttpsServer, *, requests: int, tag: str = '"v1"', offset: int = AT) -> None:
    source = make(server, entity_tag=tag)
    info = source.open(offset)
    assert info.offset == 0
    assert read_all(source) == IMAGE
    assert server.ranges == [f"bytes={offset}-", *[None] * (requests - 1)]
    assert source.requests == requests
    assert all("if-range" not in request.headers for request in server.requests[1:])


def test_a_server_without_ranges_starts_over_with_the_same_answer() -> None:
    with HttpsServer([sim.serve(IMAGE, ranges=False)]) as server:
        expect_start_over(server, requests=1)


def test_another_object_starts_over_with_the_same_answer() -> None:
    with HttpsServer([sim.serve(IMAGE, '"v2"')]) as server:
        expect_start_over(server, requests=1)


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, 2**40])
def test_an_offset_the_server_cannot_satisfy_starts_over(offset: int) -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        expect_start_over(server, requests=2, offset=offset)


REST = IMAGE[AT:]


@pytest.mark.parametrize(
    "behaviour",
    [
        sim.partial(REST, f"bytes {AT + 1}-{SIZE - 1}/{SIZE}"),
        sim.partial(IMAGE, f"bytes 0-{SIZE - 1}/{SIZE}"),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{SIZE + 1}"),
        sim.partial(REST, f"bytes {AT}-{SIZE}/{SIZE}"),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}/*"),
        sim.partial(REST[:10], f"bytes {AT}-{AT + 9}/{SIZE}"),
        sim.partial(REST[:-1], f"bytes {AT}-{SIZE - 1}/{SIZE}"),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{2**64}"),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}"),
        sim.partial(REST, f"byte {AT}-{SIZE - 1}/{SIZE}"),
        sim.partial(REST, f"bytes -{AT}-{SIZE - 1}/{SIZE}"),
        sim.partial(REST, ""),
        sim.partial(REST, None),
        sim.partial(REST, None, headers={"Content-Type": "multipart/byteranges; boundary=x"}),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{SIZE}", '"v2"'),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{SIZE}", 'W/"v1"'),
        sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{SIZE}", None),
        sim.partial(
            REST, f"bytes {AT}-{SIZE - 1}/{SIZE}", headers={"content-range": f"bytes {AT}-{SIZE - 1}/{SIZE + 5}"}
        ),
        sim.answers(416),
        sim.answers(416, {"Content-Length": "1000000", "Connection": "close"}, b""),
    ],
)
def test_a_wrong_part_is_dropped_and_the_whole_asked_for_once(behaviour: sim.Behaviour) -> None:
    with HttpsServer([behaviour, sim.serve(IMAGE)]) as server:
        expect_start_over(server, requests=2)


def test_without_an_entity_tag_a_part_needs_none() -> None:
    with HttpsServer([sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{SIZE}", None)]) as server:
        source = make(server)
        assert source.open(AT) == SourceInfo(SIZE, AT, "")
        assert read_all(source) == REST


def test_a_part_nobody_asked_for_is_refused() -> None:
    with HttpsServer([sim.partial(REST, f"bytes {AT}-{SIZE - 1}/{SIZE}")]) as server:
        error = open_error(make(server))
        assert (error.status, error.device_code) == ("ERR_HTTP_RANGE", 206)
        # and when it comes again after the wrong part was dropped
        assert open_error(make(server), 5).status == "ERR_HTTP_RANGE"


def test_a_416_to_the_whole_is_an_error() -> None:
    with HttpsServer([sim.answers(416)]) as server:
        error = open_error(make(server), AT)
        assert (error.status, error.device_code) == ("ERR_HTTP_STATUS", 416)
        assert server.ranges == [f"bytes={AT}-", None]


def test_a_chunked_part_longer_than_it_said_is_refused() -> None:
    def behave(exchange: sim.Exchange) -> None:
        exchange.head(206, {"Transfer-Encoding": "chunked", "Content-Range": f"bytes {AT}-{SIZE - 1}/{SIZE}"})
        exchange.send(b"%x\r\n" % (len(REST) + 1) + REST + b"!\r\n0\r\n\r\n")

    with HttpsServer([behave]) as server:
        source = make(server)
        assert source.open(AT).offset == AT
        body, error = read_until_error(source)
        assert error.status == "ERR_HTTP_PROTOCOL"
        assert REST.startswith(body)


def test_a_chunked_part_shorter_than_it_said_is_incomplete() -> None:
    def behave(exchange: sim.Exchange) -> None:
        exchange.head(206, {"Transfer-Encoding": "chunked", "Content-Range": f"bytes {AT}-{SIZE - 1}/{SIZE}"})
        exchange.send(b"%x\r\n" % 1000 + REST[:1000] + b"\r\n0\r\n\r\n")

    with HttpsServer([behave]) as server:
        source = make(server)
        source.open(AT)
        body, error = read_until_error(source)
        assert (body, error.status, error.offset) == (REST[:1000], "ERR_HTTP_CLOSED", AT + 1000)


@pytest.mark.parametrize("count", [0, 1, 5000, 150_000, SIZE - 1])
def test_a_download_cut_anywhere_is_resumed_without_a_gap(count: int) -> None:
    with HttpsServer([sim.closes_early(IMAGE, count), sim.serve(IMAGE)]) as server:
        source = make(server)
        source.open()
        body, error = read_until_error(source)
        assert error.status == "ERR_HTTP_CLOSED"
        assert len(body) == error.offset == count
        source.close()
        assert source.open(len(body)).offset == len(body)
        assert body + read_all(source) == IMAGE


# ---- Errors of the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 205, 300, 305, 400, 401, 403, 404, 410, 500, 503, 599])
def test_an_error_status_is_told(status: int) -> None:
    with HttpsServer([sim.answers(status, body=b"" if status == 204 else b"x")]) as server:
        error = open_error(make(server))
    assert (error.status, error.device_code, error.esp_err) == ("ERR_HTTP_STATUS", status, -1)
    assert str(status) in str(error)


def test_not_modified_has_a_status_of_its_own() -> None:
    with HttpsServer([sim.raw(b"HTTP/1.1 304 Not Modified\r\n\r\n")]) as server:
        error = open_error(make(server))
    assert (error.status, error.device_code, error.esp_err) == ("ERR_HTTP_NOT_MODIFIED", 304, 0x7009)


@pytest.mark.parametrize("how", ["notify", "fin", "reset"])
def test_an_early_end_of_the_connection_says_how_far_it_came(how: Any) -> None:
    with HttpsServer([sim.closes_early(IMAGE, 70_000, how=how)]) as server:
        source = make(server)
        assert source.open().size == SIZE
        body = b""
        while len(body) < 70_000:
            body += source.read()
        server.release()
        rest, error = read_until_error(source)
    assert body + rest == IMAGE[:70_000]
    assert (error.status, error.offset, error.esp_err) == ("ERR_HTTP_CLOSED", 70_000, -1)


def test_an_early_end_of_a_resumed_download_counts_from_the_start() -> None:
    with HttpsServer([sim.closes_early(IMAGE, 1000)]) as server:
        source = make(server)
        assert source.open(AT).offset == AT
        body, error = read_until_error(source)
        assert (body, error.offset) == (REST[:1000], AT + 1000)


def test_a_chunked_body_without_its_end_is_incomplete() -> None:
    with HttpsServer([sim.chunked(IMAGE, truncated=True)]) as server:
        source = make(server)
        source.open()
        body, error = read_until_error(source)
        assert (body, error.status, error.offset) == (IMAGE, "ERR_HTTP_CLOSED", SIZE)


def test_a_body_until_close_needs_the_goodbye_of_tls() -> None:
    """Without close_notify nobody can tell the end from a cut."""
    with HttpsServer([sim.until_close(IMAGE, notify=False)]) as server:
        source = make(server)
        source.open()
        body, error = read_until_error(source)
        assert (body, error.status) == (IMAGE, "ERR_HTTP_CLOSED")


def test_an_announced_size_that_is_too_large_is_an_early_end() -> None:
    with HttpsServer([sim.announces(IMAGE, SIZE + 5)]) as server:
        source = make(server)
        assert source.open().size == SIZE + 5
        body, error = read_until_error(source)
        assert (body, error.status, error.offset) == (IMAGE, "ERR_HTTP_CLOSED", SIZE)


def test_of_an_announced_size_that_is_too_small_no_more_is_read() -> None:
    with HttpsServer([sim.announces(IMAGE, SIZE - 5)]) as server:
        source = make(server)
        assert source.open().size == SIZE - 5
        assert read_all(source) == IMAGE[:-5]


@pytest.mark.parametrize("size", ["-1", "many", "99999999999999999999999999", "0x10", "5, 6", "", "+5", "5 6"])
def test_a_size_that_is_no_number_is_never_believed(size: str) -> None:
    with HttpsServer([sim.announces(IMAGE, size)]) as server:
        error = open_error(make(server))
    assert error.status == "ERR_HTTP_PROTOCOL"


def test_two_sizes_that_differ_are_not_believed() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Length: %d\r\n\r\n"
    with HttpsServer([sim.raw(head % (SIZE, SIZE - 5) + IMAGE), sim.raw(head % (SIZE, SIZE) + IMAGE)]) as server:
        assert open_error(make(server)).status == "ERR_HTTP_PROTOCOL"
        assert make(server).open().size == SIZE


def test_chunks_override_a_size() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with HttpsServer([sim.raw(head + b"3\r\nabc\r\n7\r\ndefghij\r\n0\r\n\r\n")]) as server:
        source = make(server)
        assert source.open().size is None
        assert read_all(source) == b"abcdefghij"


def test_a_corrupt_byte_passes_for_others_to_find() -> None:
    with HttpsServer([sim.corrupts(IMAGE, 12345)]) as server:
        source = make(server)
        source.open()
        body = read_all(source)
    assert [i for i in range(SIZE) if body[i] != IMAGE[i]] == [12345]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff" * 500,
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 80_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-Fill: yyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 3000 + b"\r\n",
    ],
)
def test_garbage_for_an_answer_is_a_protocol_error(garbage: bytes) -> None:
    with HttpsServer([sim.raw(garbage)]) as server:
        error = open_error(make(server))
    assert error.status in ("ERR_HTTP_PROTOCOL", "ERR_HTTP_NO_RESPONSE", "ERR_HTTP_CLOSED")
    assert all(ord(c) >= 0x20 for c in str(error))


def test_endless_headers_end() -> None:
    def behave(exchange: sim.Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            exchange.send(b"X-Fill: " + b"z" * 1000 + b"\r\n")

    with HttpsServer([behave]) as server:
        error = open_error(make(server))
    assert error.status == "ERR_HTTP_PROTOCOL"
    assert "too long" in str(error)


def test_bad_chunks_are_an_error() -> None:
    with HttpsServer([sim.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n")]) as server:
        source = make(server)
        source.open()
        body, error = read_until_error(source)
    assert body == b""
    assert error.status in ("ERR_HTTP_PROTOCOL", "ERR_HTTP_CLOSED")


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_closed_without_an_answer(reset: bool) -> None:
    with HttpsServer([sim.says_nothing(reset=reset)]) as server:
        source = make(server)
        error = open_error(source)
        assert (error.status, error.esp_err) == ("ERR_HTTP_NO_RESPONSE", 0x7004)
        assert source.requests == 1


SAMPLES = [
    b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\nETag: "v1"\r\n\r\n' + IMAGE[:20],
    b"HTTP/1.1 206 Partial\r\nContent-Length: 10\r\nContent-Range: bytes 10-19/20\r\n\r\n" + IMAGE[10:20],
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n5;x=y\r\nabcde\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /other?x=y\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\nto the end",
    b"HTTP/1.1 416 No\r\nContent-Range: bytes */20\r\nContent-Length: 0\r\n\r\n",
]


@st.composite
def damaged_answers(draw: st.DrawFn) -> bytes:
    """An answer with a few bytes changed, inserted, taken out, or cut off."""
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "insert", "remove", "cut", "repeat"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "insert":
                data[at:at] = draw(
                    st.sampled_from([b"\r\n", b"\0", b"9" * 30, b"-", b"\xff", b": ", b"\r\n\r\n", b"HTTP/1.1 "])
                )
            case "remove":
                del data[at : at + draw(st.integers(1, 10))]
            case "cut":
                del data[at:]
            case "repeat":
                data[at:at] = data[: draw(st.integers(0, 40))]
    return bytes(data)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.lists(damaged_answers(), min_size=1, max_size=2), st.sampled_from([0, 10]))
def test_no_answer_does_harm(answers: list[bytes], offset: int) -> None:
    """Whatever comes, the source ends with bytes or with an error of its own kind, and tells a consistent story."""
    with HttpsServer([sim.raw(answer) for answer in answers], tls=False) as server:
        source = make(server, allow_http=True, stall_timeout_ms=20_000, max_redirects=3)
        try:
            info = source.open(offset)
            body = b""
            while part := source.read(7):
                body += part
        except OtaError as exc:
            assert in_order(exc).status.startswith("ERR_HTTP_"), exc
        else:
            assert info.offset in (0, offset)
            assert info.size is None or info.size == info.offset + len(body)


# ---- Redirects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_range(status: int) -> None:
    script = [sim.redirects(f"/other/place?{SECRET}", status, b"moved"), sim.serve(IMAGE)]
    with HttpsServer(script) as server:
        source = make(server, entity_tag='"v1"')
        assert source.open(AT).offset == AT
        assert read_all(source) == REST
        assert [request.path for request in server.requests] == [PATH, f"/other/place?{SECRET}"]
        assert server.ranges == [f"bytes={AT}-"] * 2
        assert [request.headers["if-range"] for request in server.requests] == ['"v1"'] * 2
        assert source.requests == 2
        assert server.connections == 1  # the small body was read, the connection kept


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("next.bin", "/images/next.bin"),
        ("../up.bin?x=1", "/up.bin?x=1"),
        ("?only=query", "/images/app.bin?only=query"),
        ("/a b", "/a%20b"),
        ("/with#fragment", "/with"),
    ],
)
def test_relative_redirects_are_resolved(location: str, path: str) -> None:
    with HttpsServer([sim.redirects(location), sim.serve(IMAGE)]) as server:
        source = make(server)
        source.open()
        assert read_all(source) == IMAGE
        assert server.requests[1].path == path


@pytest.mark.parametrize("body", [b"", b"x" * 10_000, b"x" * 1_000_000])
def test_the_body_of_a_redirect_is_not_the_image(body: bytes) -> None:
    with HttpsServer([sim.redirects("/there", body=body), sim.serve(IMAGE)]) as server:
        source = make(server)
        assert source.open().size == SIZE
        assert read_all(source) == IMAGE


def test_a_redirect_whose_body_never_comes_is_a_stall() -> None:
    def behave(exchange: sim.Exchange) -> None:
        exchange.head(302, {"Location": "/there", "Content-Length": "10"})
        exchange.hold()

    with HttpsServer([behave, sim.serve(IMAGE)]) as server:
        assert open_error(make(server, stall_timeout_ms=200)).status == "ERR_STALLED"


def test_redirects_in_a_circle_end() -> None:
    with HttpsServer([sim.redirects(PATH)]) as server:
        source = make(server)
        error = open_error(source)
        assert (error.status, error.device_code, error.esp_err) == ("ERR_HTTP_REDIRECT", 302, 0x7001)
        assert len(server.requests) == source.requests == 11  # the first and ten more


def test_the_number_of_redirects_is_an_option() -> None:
    with HttpsServer([sim.redirects("/1"), sim.redirects("/2"), sim.serve(IMAGE)]) as server:
        assert open_error(make(server, max_redirects=1)).status == "ERR_HTTP_REDIRECT"
    with HttpsServer([sim.redirects("/1"), sim.redirects("/2"), sim.serve(IMAGE)]) as server:
        assert make(server, max_redirects=2).open().size == SIZE


@pytest.mark.parametrize("allow_http", [False, True])
def test_a_redirect_from_https_to_http_is_refused_even_where_http_is_allowed(allow_http: bool) -> None:
    with HttpsServer([sim.serve(IMAGE)], tls=False) as plain:
        target = plain.url(f"/x?{SECRET}")
        with HttpsServer([sim.redirects(target)]) as server:
            error = open_error(make(server, allow_http=allow_http))
        assert (error.status, error.esp_err) == ("ERR_HTTP_DOWNGRADE", 0x700D)
        assert plain.connections == 0


def test_a_redirect_from_http_to_https_is_followed() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server, HttpsServer([sim.redirects(server.url())], tls=False) as plain:
        source = make(plain, allow_http=True)
        source.open()
        assert read_all(source) == IMAGE


@pytest.mark.parametrize(
    "location", [None, "", "ftp://localhost/x", "file:///etc/passwd", "gopher://x", "https://", "http:\\\\x"]
)
def test_a_redirect_to_nowhere_useful_is_refused(location: str | None) -> None:
    with HttpsServer([sim.redirects(location)]) as server:
        error = open_error(make(server))
        assert error.status in ("ERR_HTTP_REDIRECT", "ERR_HTTP_DOWNGRADE")
        assert len(server.requests) == 1


def test_credentials_are_kept_on_the_host_and_dropped_on_another() -> None:
    """The user of the URL and the client certificate are for the host they were given for."""
    with (
        HttpsServer([sim.serve(IMAGE)]) as other,
        HttpsServer([sim.redirects("/same"), sim.redirects(other.url("/other"))]) as server,
    ):
        url = server.url(PATH).replace("https://", "https://node:pa%20ss@")
        source = HttpSource(url, ca_pem=server.ca_pem)
        source.open()
        assert read_all(source) == IMAGE
        assert [request.headers.get("authorization") for request in server.requests] == ["Basic bm9kZTpwYSBzcw=="] * 2
        assert "authorization" not in other.requests[0].headers


def test_credentials_in_a_redirect_are_not_taken() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        server.script.insert(0, sim.redirects(f"https://evil:word@localhost:{server.port}/x"))
        source = make(server)
        source.open()
        assert "authorization" not in server.requests[1].headers


def test_after_a_redirect_a_refused_range_begins_at_the_first_url() -> None:
    script = [sim.redirects("/there"), sim.answers(416), sim.redirects("/there"), sim.serve(IMAGE)]
    with HttpsServer(script) as server:
        source = make(server)
        assert source.open(AT).offset == 0
        assert read_all(source) == IMAGE
        assert [request.path for request in server.requests] == [PATH, "/there", PATH, "/there"]
        assert server.ranges == [f"bytes={AT}-", f"bytes={AT}-", None, None]


# ---- Connecting ------------------------------------------------------------------------------------------------------


def test_a_refused_connection() -> None:
    with sim.refused_port() as port:
        source = HttpSource(f"https://localhost:{port}{PATH}")
        error = open_error(source)
    assert (error.status, error.device_code, error.esp_err) == ("ERR_HTTP_CONNECT", 111, 0x7002)
    assert source.requests == 0


def test_a_name_that_does_not_resolve() -> None:
    error = open_error(HttpSource(f"https://no-such-host.invalid{PATH}", connect_timeout_ms=20_000))
    assert error.status == "ERR_HTTP_RESOLVE"
    assert "no-such-host.invalid" in str(error)


def test_a_server_that_accepts_and_says_nothing_is_a_connect_timeout() -> None:
    with HttpsServer(silent=True) as server:
        error = open_error(make(server, connect_timeout_ms=200))
    assert isinstance(error, OtaTimeoutError)
    assert (error.status, error.esp_err) == ("ERR_HTTP_CONNECT_TIMEOUT", 0x7002)


@pytest.mark.parametrize(
    ("certificate", "code", "reason"),
    [
        ("expired", 10, "expired"),
        ("not_yet_valid", 9, "not yet valid"),
        ("unknown_ca", 20, "local issuer"),
        ("wrong_host", 62, "hostname mismatch"),
    ],
)
def test_a_certificate_is_refused_with_its_reason(certificate: sim.CertificateKind, code: int, reason: str) -> None:
    with HttpsServer([sim.serve(IMAGE)], certificate=certificate) as server:
        source = make(server)
        error = open_error(source)
        assert (error.status, error.device_code, error.esp_err) == ("ERR_HTTP_TLS", code, 0x7002)
        assert reason in str(error)
        assert ("clock" in str(error)) == (code in (9, 10))
        assert server.requests == []
        assert source.requests == 0


def test_the_host_name_may_be_left_unchecked_but_not_the_certificate() -> None:
    with HttpsServer([sim.serve(IMAGE)], certificate="wrong_host") as server:
        assert make(server, skip_common_name_check=True).open().size == SIZE
    with HttpsServer([sim.serve(IMAGE)], certificate="unknown_ca") as server:
        assert open_error(make(server, skip_common_name_check=True)).status == "ERR_HTTP_TLS"


def test_a_given_ca_is_the_only_one_trusted(tmp_path: Path) -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        ca_file = tmp_path / "ca.pem"
        ca_file.write_bytes(server.ca_pem)
        assert make(server, ca_pem=None, ca_file=ca_file).open().size == SIZE
        assert open_error(make(server, ca_pem=None)).device_code == 20  # the system's do not know it
        stranger = trustme.CA().cert_pem.bytes()
        assert open_error(make(server, ca_pem=stranger, ca_file=ca_file)).device_code == 20  # the text goes first


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A directory of files a client may be told to use."""
    client, other = sim.authority().client, trustme.CA().issue_cert("other.invalid")
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "node.pem"))
    client.private_key_pem.write_to_path(str(tmp_path / "node.key"))
    other.private_key_pem.write_to_path(str(tmp_path / "other.key"))
    key = serialization.load_pem_private_key(client.private_key_pem.bytes(), None)
    (tmp_path / "locked.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (tmp_path / "empty.pem").touch()
    (tmp_path / "directory").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("files", "named", "reason"),
    [
        ({"ca_file": "missing.pem"}, "missing.pem", "No such file"),
        ({"ca_file": "node.key"}, "node.key", "no PEM certificate"),
        ({"ca_file": "empty.pem"}, "empty.pem", "no PEM certificate"),
        ({"ca_file": "directory"}, "directory", ""),
        ({"client_cert_file": "missing.pem", "client_key_file": "node.key"}, "missing.pem", "No such file"),
        ({"client_cert_file": "node.key", "client_key_file": "node.key"}, "node.key", "no PEM certificate"),
        ({"client_cert_file": "node.pem", "client_key_file": "missing.key"}, "missing.key", "No such file"),
        ({"client_cert_file": "node.pem", "client_key_file": "node.pem"}, "node.pem", "no PEM private key"),
        ({"client_cert_file": "node.pem"}, "node.pem", "no PEM private key"),
        ({"client_cert_file": "node.pem", "client_key_file": "other.key"}, "other.key", "does not belong"),
        ({"client_cert_file": "node.pem", "client_key_file": "locked.key"}, "locked.key", "password"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_before_anything_is_connected(
    pem: Path, files: dict[str, str], named: str, reason: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        HttpSource("https://nowhere.invalid/", **{name: pem / file for name, file in files.items()})
    assert (caught.value.status, caught.value.esp_err) == ("ERR_HTTP_TLS_FILE", 0x7002)
    assert str(pem / named) in str(caught.value)
    assert reason in str(caught.value)


def test_a_text_without_a_certificate_is_refused_too() -> None:
    with pytest.raises(ArgumentError, match="no PEM certificate found"):
        HttpSource("https://nowhere.invalid/", ca_pem="no PEM at all")


def test_a_file_that_went_bad_later_is_named(pem: Path) -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        (pem / "ca.pem").write_bytes(server.ca_pem)
        source = make(server, ca_pem=None, ca_file=pem / "ca.pem")
        (pem / "ca.pem").unlink()
        error = open_error(source)
        assert error.status == "ERR_HTTP_TLS_FILE"
        assert "ca.pem" in str(error)
        source = make(server, client_cert_file=pem / "node.pem", client_key_file=pem / "node.key")
        (pem / "node.key").write_text("no key")
        error = open_error(source)
        assert error.status == "ERR_HTTP_TLS_FILE"
        assert "node.key" in str(error)


def test_a_client_certificate_is_shown_and_needed(tmp_path: Path) -> None:
    client = sim.authority().client
    cert, key = tmp_path / "node.pem", tmp_path / "node.key"
    client.cert_chain_pems[0].write_to_path(str(cert))
    client.private_key_pem.write_to_path(str(key))
    with HttpsServer([sim.serve(IMAGE)], client_certificate=True) as server:
        source = make(server, client_cert_file=cert, client_key_file=key)
        source.open()
        assert read_all(source) == IMAGE
        assert server.client_subjects == ["node"]
        error = open_error(make(server))
        assert error.status in ("ERR_HTTP_TLS", "ERR_HTTP_NO_RESPONSE")  # TLS 1.3 tells after the request went out


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(version: ssl.TLSVersion) -> None:
    with HttpsServer([sim.serve(IMAGE)], tls_versions=(version, version)) as server:
        source = make(server)
        source.open()
        assert read_all(source) == IMAGE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_not_spoken() -> None:
    version = ssl.TLSVersion.TLSv1_1
    with HttpsServer([sim.serve(IMAGE)], tls_versions=(version, version)) as server:
        assert open_error(make(server)).status == "ERR_HTTP_TLS"


def test_connect_to_reaches_a_named_host_elsewhere() -> None:
    with HttpsServer([sim.serve(IMAGE)], certificate="wrong_host") as server:
        source = HttpSource(
            "https://elsewhere.test/x", ca_pem=server.ca_pem, connect_to=f"elsewhere.test:443:127.0.0.1:{server.port}"
        )
        assert source.open().size == SIZE
        assert server.requests[0].headers["host"] == "elsewhere.test"


def test_a_proxy_is_used_when_given_or_in_the_environment_and_can_be_ruled_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server, HttpsServer([sim.tunnels()], tls=False) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        source = make(server, proxy=address)
        source.open()
        assert read_all(source) == IMAGE
        assert source.requests == 1
        assert proxy.requests[0].method == "CONNECT"
        monkeypatch.setenv("https_proxy", address)
        make(server).open()
        assert len(proxy.requests) == 2
        make(server, proxy="").open()
        assert len(proxy.requests) == 2


def test_a_proxy_that_refuses_is_told() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server, HttpsServer([sim.answers(403)], tls=False) as proxy:
        source = make(server, proxy=f"http://user:{SECRET}@127.0.0.1:{proxy.port}")
        error = open_error(source)
        assert (error.status, error.device_code) == ("ERR_HTTP_CONNECT", 403)
        assert source.requests == 0
        assert server.connections == 0


# ---- Time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 100_000])
def test_a_stall_is_told_with_its_offset_and_can_be_resumed(count: int) -> None:
    with HttpsServer([sim.stalls(IMAGE, count), sim.serve(IMAGE)]) as server:
        source = make(server, stall_timeout_ms=200)
        source.open()
        body, error = read_until_error(source)
        assert isinstance(error, OtaTimeoutError)
        assert (error.status, error.offset, error.esp_err) == ("ERR_STALLED", count, 0x107)
        assert body == IMAGE[:count]
        source.close()
        source.open(count)
        assert body + read_all(source) == IMAGE


def test_an_answer_that_never_comes_is_a_stall() -> None:
    with HttpsServer([sim.stalls(IMAGE, -1)]) as server:
        source = make(server, stall_timeout_ms=200)
        assert open_error(source).status == "ERR_STALLED"
        assert source.requests == 1


def test_the_deadline_holds_from_open_on() -> None:
    with HttpsServer([sim.stalls(IMAGE, -1), sim.stalls(IMAGE, 1000)]) as server:
        source = make(server, deadline_ms=200)
        error = open_error(source)
        assert (error.status, error.esp_err) == ("ERR_DEADLINE", 0x107)
        source = make(server, deadline_ms=1000)
        source.open()
        body, error = read_until_error(source)
        assert (body, error.status) == (IMAGE[:1000], "ERR_DEADLINE")


def test_the_deadline_holds_while_connecting() -> None:
    with HttpsServer(silent=True) as server:
        assert open_error(make(server, deadline_ms=200, connect_timeout_ms=60_000)).status == "ERR_DEADLINE"


def test_the_bandwidth_limit_is_never_exceeded() -> None:
    limit, content = 100_000, IMAGE[:30_000]
    with HttpsServer([sim.serve(content)]) as server:
        source = make(server, max_bytes_per_s=limit)
        begin = time.monotonic()
        source.open()
        body = b""
        while part := source.read():
            body += part
            # The limit starts with nothing saved up. Its clock has millisecond steps: one may be cut at each end.
            assert len(body) <= limit * (time.monotonic() - begin + 0.001)
        assert body == content


def test_the_deadline_holds_while_the_limit_makes_us_wait() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        source = make(server, max_bytes_per_s=1, deadline_ms=300)
        source.open()
        body, error = read_until_error(source)
        assert error.status == "ERR_DEADLINE"
        assert len(body) <= 1


# ---- Cancel ----------------------------------------------------------------------------------------------------------


def cancelled_while(source: HttpSource, act: Callable[[], object], ready: Callable[[], object]) -> None:
    """`act` runs on another thread; once `ready` returns the source is cancelled; `act` ends with CancelledError."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    ready()
    source.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert [type(exc) for exc in raised] == [CancelledError]
    for again in (source.open, source.read):
        with pytest.raises((CancelledError, StateError)):
            again()
    source.close()
    with pytest.raises(CancelledError):
        source.open()


def test_cancel_while_connecting() -> None:
    with HttpsServer(silent=True) as server:
        source = make(server, connect_timeout_ms=60_000)
        cancelled_while(source, source.open, lambda: server.wait_for_connections(1))


def test_cancel_while_waiting_for_the_answer() -> None:
    with HttpsServer([sim.stalls(IMAGE, -1)]) as server:
        source = make(server)
        cancelled_while(source, source.open, server.wait_until_held)


def test_cancel_while_stalled() -> None:
    with HttpsServer([sim.stalls(IMAGE, 1000)]) as server:
        source = make(server)
        source.open()
        cancelled_while(source, lambda: read_all(source), server.wait_until_held)


def test_cancel_while_the_limit_makes_us_wait() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        source = make(server, max_bytes_per_s=1)
        source.open()
        cancelled_while(source, lambda: read_all(source), lambda: None)


def test_cancel_before_open_is_not_lost() -> None:
    with HttpsServer([sim.serve(IMAGE)]) as server:
        source = make(server)
        source.cancel()
        with pytest.raises(CancelledError):
            source.open()
        assert server.connections == 0


def test_two_threads_cannot_read_at_once() -> None:
    with HttpsServer([sim.stalls(IMAGE, 1000)]) as server:
        source = make(server)
        source.open()

        def ready() -> None:
            server.wait_until_held()
            with pytest.raises(StateError, match="in use"):
                while source.read(1):  # the other thread may not have come to its last read yet
                    pass

        taken = threading.Event()

        def drain() -> None:
            taken.set()
            while source.read(1 << 20):
                pass

        source.read(1000)
        cancelled_while(source, drain, lambda: taken.wait(30))


# ---- A real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    if find_nginx() is None:
        pytest.skip("nginx is not installed")
    root = tmp_path_factory.mktemp("www")
    (root / "app.bin").write_bytes(IMAGE)
    with Nginx(root) as server:
        yield server


def test_nginx_serves_the_whole_and_its_parts(nginx: Nginx) -> None:
    source = HttpSource(nginx.url("app.bin"), ca_file=nginx.ca_file)
    info = source.open()
    assert (info.size, info.offset) == (SIZE, 0)
    assert info.entity_tag
    assert read_all(source) == IMAGE
    source.close()
    assert source.open(AT) == SourceInfo(SIZE, AT, info.entity_tag)
    assert read_all(source) == REST
    source.close()
    assert source.open(SIZE).offset == 0  # 416
    assert read_all(source) == IMAGE


def test_nginx_sends_the_whole_when_the_file_is_another(nginx: Nginx) -> None:
    source = HttpSource(nginx.url("app.bin"), ca_file=nginx.ca_file, entity_tag='"of-yesterday"')
    assert source.open(AT).offset == 0
    assert read_all(source) == IMAGE


def test_nginx_knows_nothing_of_another_file(nginx: Nginx) -> None:
    error = open_error(HttpSource(nginx.url(f"other.bin?{SECRET}"), ca_file=nginx.ca_file))
    assert (error.status, error.device_code) == ("ERR_HTTP_STATUS", 404)


# ---- What may be shown of a URL --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/path?query#fragment", "https://host/path"),
        ("https://user:word@host:8443/path", "https://host:8443/path"),
        ("https://a@b@host/path", "https://host/path"),
        ("https://host/p@th", "https://host/p@th"),
        ("https://host?q=https://u:p@x/", "https://host"),
        ("https://host/\x1b[31m\n", "https://host/?[31m?"),
        ("no url", "no url"),
        ("", ""),
    ],
)
def test_what_may_be_shown_of_a_url(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_a_long_url_is_cut() -> None:
    shown = public_url("https://host/" + "x" * 5000)
    assert len(shown) == 1023
    assert shown.endswith("xx...")


def test_the_socket_is_closed_when_the_source_is_gone() -> None:
    """The server sees the end of the connection when the object dies, not at some later time."""
    gone = threading.Event()

    def behave(exchange: sim.Exchange) -> None:
        exchange.head(200, {"Content-Length": "10"})
        with contextlib.suppress(OSError):
            exchange.connection.recv(1)
        gone.set()
        raise sim.ClientGone

    with HttpsServer([behave]) as server:
        source = make(server)
        source.open()
        del source
        assert gone.wait(30)
