"""Images over HTTPS, the admin API, and the life of the service, over real sockets. The broker is never there."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmaker_ota.cloud.client import AdminClient, ServiceUnreachable
from rmaker_ota.cloud.config import AdminConfig, CloudConfig
from rmaker_ota.cloud.http import RangeNotSatisfiable, Transfer, parse_range
from rmaker_ota.cloud.service import CloudService, ServiceThread
from rmaker_ota.errors import (
    ArgumentError,
    ConfigError,
    DeviceError,
    NotFoundError,
    OtaError,
    StateError,
    UnsupportedError,
)
from tests.python.cloud_parts import Clock, esp_image, free_port, service_config

CONTENT = esp_image(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TAG = f'"{SHA256}"'


class Running:
    """A service that runs, and what it told its observers."""

    def __init__(self, config: CloudConfig) -> None:
        self.clock = Clock()
        self.config = config
        self.ended: list[Transfer] = []
        self._grew = threading.Condition()
        self.thread = ServiceThread(config, clock=self.clock, on_transfer=self._transfer)
        self.service: CloudService = self.thread.start()
        self.admin = AdminClient(config)
        self.ca = config.http.cert.parent / "ca.crt" if config.http.cert else None

    def _transfer(self, transfer: Transfer) -> None:
        if transfer.ended:
            with self._grew:
                self.ended.append(transfer)
                self._grew.notify_all()

    def wait_ended(self, count: int) -> Transfer:
        with self._grew:
            assert self._grew.wait_for(lambda: len(self.ended) >= count, timeout=20)
            return self.ended[count - 1]

    def url(self, sha256: str = SHA256) -> str:
        return self.service.jobs._links.image_url(sha256)

    def connection(self) -> http.client.HTTPSConnection:
        parts = urlsplit(self.service.url)
        assert parts.hostname is not None
        context = ssl.create_default_context(cafile=self.ca)
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=20, context=context)

    def request(self, url: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = self.connection()
        try:
            path = url.removeprefix(self.service.url)
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("cloud")
    running = Running(service_config(directory))
    image = directory / "app.bin"
    image.write_bytes(CONTENT)
    assert running.admin.upload(image)["sha256"] == SHA256
    yield running
    running.thread.stop()


# -- ranges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", None),
        ("bytes=0-", range(100)),
        ("bytes=0-0", range(1)),
        ("bytes=10-19", range(10, 20)),
        ("bytes=99-", range(99, 100)),
        ("bytes=50-1000", range(50, 100)),
        ("bytes=-1", range(99, 100)),
        ("bytes=-1000", range(100)),
        ("BYTES = 5 - 6 ", range(5, 7)),
        ("bytes=000000000000000000000005-6", range(5, 7)),
        ("bytes=5-" + "9" * 5000, range(5, 100)),
        ("bytes=20-10", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=0-1,5-6", None),
        ("bytes=+1-", None),
        ("bytes=\u0661-", None),
        ("items=0-1", None),
        ("bytes 0-1", None),
    ],
)
def test_range_headers(header: str, expected: range | None) -> None:
    assert parse_range(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=" + "9" * 5000 + "-"])
def test_ranges_outside_of_the_image(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range(header, 100)


@given(size=st.integers(1, 200), first=st.none() | st.integers(0, 250), last=st.none() | st.integers(0, 250))
def test_ranges_agree_with_slicing(size: int, first: int | None, last: int | None) -> None:
    content = list(range(size))
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is not None:
        model = content[first:] if last is None else content[first : last + 1]
    else:
        model = content[-last:] if last else []
    try:
        found = parse_range(header, size)
    except RangeNotSatisfiable:
        assert not model
        return
    if found is None:
        assert (first is None and last is None) or (first is not None and last is not None and last < first)
    else:
        assert list(found) == model
        assert model


# -- images


def test_the_whole_image(running: Running) -> None:
    response, body = running.request(running.url())
    assert (response.status, body) == (200, CONTENT)
    assert response.headers["ETag"] == TAG
    assert response.headers["Content-Length"] == str(len(CONTENT))
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert "aiohttp" not in response.headers["Server"]


def test_head_says_what_get_would(running: Running) -> None:
    response, body = running.request(running.url(), "HEAD", Range="bytes=5-")
    assert (response.status, body) == (200, b"")
    assert (response.headers["Content-Length"], response.headers["ETag"]) == (str(len(CONTENT)), TAG)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("bytes=0-", range(len(CONTENT))),
        ("bytes=131072-", range(131072, len(CONTENT))),
        ("bytes=-5", range(299_995, 300_000)),
    ],
)
def test_a_part_of_the_image(running: Running, header: str, wanted: range) -> None:
    response, body = running.request(running.url(), Range=header)
    assert response.status == 206
    assert body == CONTENT[wanted.start : wanted.stop]
    assert response.headers["Content-Range"] == f"bytes {wanted.start}-{wanted.stop - 1}/{len(CONTENT)}"


def test_a_range_behind_the_end_is_416_with_the_size(running: Running) -> None:
    response, _ = running.request(running.url(), Range=f"bytes={len(CONTENT)}-")
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize(
    ("if_range", "status"),
    [(TAG, 206), ('"other"', 200), ("W/" + TAG, 200), ("Thu, 01 Jan 2026 00:00:00 GMT", 200)],
)
def test_if_range_compares_strongly(running: Running, if_range: str, status: int) -> None:
    response, body = running.request(running.url(), Range="bytes=299999-", If_Range=if_range)
    assert response.status == status
    assert body == (CONTENT[299_999:] if status == 206 else CONTENT)


def test_if_range_of_another_image_hides_an_unsatisfiable_range(running: Running) -> None:
    response, _ = running.request(running.url(), Range="bytes=999999-", If_Range='"other"')
    assert response.status == 200


@pytest.mark.parametrize(
    ("given_tags", "status"), [(TAG, 304), ("W/" + TAG, 304), (f'"a", {TAG}', 304), ("*", 304), ('"other"', 200)]
)
def test_if_none_match(running: Running, given_tags: str, status: int) -> None:
    response, body = running.request(running.url(), If_None_Match=given_tags)
    assert response.status == status
    assert len(body) == (0 if status == 304 else len(CONTENT))


# -- access


def test_only_a_good_url_opens_anything(running: Running) -> None:
    url = running.url()
    path, query = url.split("?")
    expires, signature = query.split("&")
    other = running.url("0" * 64)
    bad = [
        path,
        f"{path}?{expires}",
        f"{path}?{signature}",
        f"{url}&{signature}",
        f"{path}?{expires}&{signature[:-1]}{'0' if signature[-1] != '0' else '1'}",
        f"{path}?expires={int(expires.removeprefix('expires=')) + 1}&{signature}",
        f"{path}?{other.split('?')[1]}",
        f"{path}?{expires}&sig=%C3%A4",
        f"{other.split('?')[0]}?{query}",
    ]
    for each in bad:
        response, body = running.request(each)
        assert (response.status, body) == (403, b"the URL is forged\n"), each


def test_a_url_ends_with_its_time(running: Running) -> None:
    url = running.url()
    running.clock.now += 3599
    assert running.request(url)[0].status == 200
    running.clock.now += 1
    response, body = running.request(url)
    assert (response.status, body) == (403, b"the URL is expired\n")
    assert running.request(running.url())[0].status == 200


def test_a_good_url_of_nothing_is_404(running: Running) -> None:
    for name in ("0" * 64, "..%2f..%2furl.key", "x"):
        assert running.request(running.url(name))[0].status in {403, 404}
    assert running.request(running.url("0" * 64))[0].status == 404
    assert running.request("/")[0].status == 404
    assert running.request(running.url(), "POST")[0].status == 405


def test_signatures_are_not_logged(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    url = running.url()
    with caplog.at_level("DEBUG"):
        running.request(url)
        running.request(url + "0")
        running.request(url, Range="bytes=999999-")
    assert caplog.records
    signature = url.split("sig=")[1]
    assert signature not in caplog.text


# -- clients that go away or take nothing


@pytest.fixture
def big(running: Running) -> str:
    """SHA-256 of an image that does not fit into any socket's buffers."""
    with running.service.images.begin("big.bin") as writer:
        for _ in range(16):
            writer.write(bytes(1 << 20))
        return writer.commit().sha256


def test_a_client_that_closes_ends_the_transfer(running: Running, big: str) -> None:
    count = len(running.ended)
    connection = running.connection()
    connection.request("GET", running.url(big).removeprefix(running.service.url))
    response = connection.getresponse()
    assert len(response.read(1000)) == 1000
    assert connection.sock is not None
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    response.close()
    connection.close()
    transfer = running.wait_ended(count + 1)
    assert 1000 <= transfer.sent < transfer.length == 16 << 20


def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    config = service_config(tmp_path)
    running = Running(replace(config, http=replace(config.http, stall_timeout_s=0.1)))  # type: ignore[arg-type]
    try:
        with running.service.images.begin("big.bin") as writer:
            writer.write(bytes(16 << 20))
            sha256 = writer.commit().sha256
        connection = running.connection()
        connection.request("GET", running.url(sha256).removeprefix(running.service.url))
        transfer = running.wait_ended(1)
        assert transfer.sent < transfer.length
        with pytest.raises((http.client.IncompleteRead, OSError)):
            connection.getresponse().read()
        connection.close()
    finally:
        running.thread.stop()


# -- admin API


def test_a_job_from_upload_to_cancel(running: Running, tmp_path: Path) -> None:
    image_path = tmp_path / "lamp.bin"
    image_path.write_bytes(esp_image(1 << 20, version="4.0", project="lamp"))
    shown: list[tuple[int, int]] = []
    image = running.admin.upload(image_path, on_progress=lambda sent, size: shown.append((sent, size)))
    assert shown[-1] == (1 << 20, 1 << 20)
    assert (image["name"], image["version"], image["project"], image["size"]) == ("lamp.bin", "4.0", "lamp", 1 << 20)
    assert image in running.admin.images()

    job = running.admin.create_job(image["sha256"], ["A", "B"], mode="on-fetch", metadata={"k": [1]})
    assert (job["mode"], job["version"], job["metadata"], job["finished"]) == ("on-fetch", "4.0", {"k": [1]}, False)
    assert job["workflow"] == "auto"
    assert running.admin.create_job(image["sha256"], ["C"], mode="on-fetch", workflow="params")["workflow"] == "params"
    assert running.admin.cancel(running.admin.jobs()[0]["id"]) == ["C"]
    assert job["counts"] == {"queued": 2}
    assert job["image"]["md5"] == image["md5"]
    assert running.admin.jobs()[1] == job

    report = {"ota_job_id": job["id"], "status": "success", "additional_info": "ok", "ts": 5}
    running.service.jobs.on_status("A", json.dumps(report).encode())
    assert running.admin.cancel(job["id"]) == ["B"]
    shown_job = running.admin.job(job["id"])
    assert shown_job["finished"]
    assert [(entry["node"], entry["status"]) for entry in shown_job["history"]] == [
        ("A", "queued"),
        ("B", "queued"),
        ("A", "success"),
        ("B", "cancelled"),
    ]
    assert "A" in [node["node"] for node in running.admin.nodes()]
    assert list(running.admin.watch(job["id"])) == shown_job["history"]


def test_watching_shows_reports_as_they_come_and_ends_with_the_last_node(running: Running) -> None:
    job = running.admin.create_job(SHA256, ["W"], mode="on-fetch")["id"]
    watched = running.admin.watch(job)
    assert next(watched)["status"] == "queued"
    for status in ("in-progress", "rejected"):
        running.service.jobs.on_status("W", json.dumps({"ota_job_id": job, "status": status}).encode())
        assert next(watched)["status"] == status
    assert list(watched) == []


def test_errors_of_the_api_say_what_is_wrong(running: Running, tmp_path: Path) -> None:
    admin = running.admin
    with pytest.raises(NotFoundError, match="no job 'x/y'"):
        admin.job("x/y")
    with pytest.raises(NotFoundError, match="no job"):
        list(admin.watch("nosuch"))
    with pytest.raises(NotFoundError, match="no job"):
        admin.cancel("nosuch")
    with pytest.raises(NotFoundError, match="no image"):
        admin.create_job("0" * 64, ["A"], mode="force")
    with pytest.raises(ArgumentError, match="expected one of force, on-fetch"):
        admin.create_job(SHA256, ["A"], mode="now")
    with pytest.raises(ArgumentError, match="workflow 'mail': expected one of auto, topics, params"):
        admin.create_job(SHA256, ["A"], mode="force", workflow="mail")
    with pytest.raises(ArgumentError, match="node id"):
        admin.create_job(SHA256, ["a b"], mode="force")
    empty = tmp_path / "empty.bin"
    empty.touch()
    with pytest.raises(ArgumentError, match=r"empty\.bin: the image is empty"):
        admin.upload(empty)
    with pytest.raises(DeviceError, match="No such file"):
        admin.upload(tmp_path / "missing.bin")
    with pytest.raises(NotFoundError):
        admin._call("GET", "/v1/nothing")
    for body in (b"{", b"[]", b'{"nodes": "A"}', b'{"nodes": [1]}', b'{"wrong": 1}', b'{"nodes":["A"],"image":5}'):
        with pytest.raises(ArgumentError):
            admin._call("POST", "/v1/jobs", body=body)
    with pytest.raises(ArgumentError, match="metadata"):
        admin._call("POST", "/v1/jobs", body=b'{"nodes":["A"],"metadata":[1]}')


def test_a_failing_database_is_named(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(running.service.store, "jobs", fail)
    with pytest.raises(OtaError, match="the job service failed: database or disk is full"):
        running.admin.jobs()


def test_an_upload_that_breaks_off_is_not_an_image(running: Running) -> None:
    assert running.config.admin.socket is not None
    before = running.admin.images()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(running.config.admin.socket))
        connection.sendall(b"POST /v1/images?name=x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert running.admin.images() == before
    assert running.admin.status()["url"] == running.service.url


def test_files_and_socket_are_private(running: Running) -> None:
    data = running.config.service.data_dir
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    for name in ("admin.sock", "url.key"):
        assert stat.S_IMODE((data / name).stat().st_mode) == 0o600


def test_the_admin_port_wants_the_token(tmp_path: Path) -> None:
    config = service_config(tmp_path, more=f"[admin]\nport = {free_port()}")
    with ServiceThread(config):
        assert AdminClient(config).jobs() == []
        token = config.service.data_dir / "admin.token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xe4"}):
            connection = http.client.HTTPConnection("127.0.0.1", config.admin.port, timeout=20)
            connection.request("GET", "/v1/jobs", headers=header)
            assert connection.getresponse().status == 401
            connection.close()


def test_without_a_service_the_client_says_how_to_start_one(tmp_path: Path) -> None:
    config = service_config(tmp_path)
    with pytest.raises(ServiceUnreachable, match=r"no job service at .*rmaker-ota serve --config"):
        AdminClient(config).jobs()
    with pytest.raises(ServiceUnreachable, match=r"admin\.token: cannot be read"):
        AdminClient(replace(config, admin=AdminConfig(None, 1))).jobs()


# -- life


def test_a_data_directory_has_one_service(running: Running) -> None:
    with pytest.raises(StateError, match="another job service uses this data directory"):
        ServiceThread(running.config).start()


def test_it_stops_during_a_download_leaves_nothing_and_starts_again(tmp_path: Path) -> None:
    config = service_config(tmp_path)
    running = Running(config)
    with running.service.images.begin("big.bin") as writer:
        writer.write(bytes(16 << 20))
        sha256 = writer.commit().sha256
    job = running.admin.create_job(sha256, ["N1"], mode="force")["id"]
    connection = running.connection()
    connection.request("GET", running.url(sha256).removeprefix(running.service.url))
    connection.getresponse().read(1000)
    running.thread.stop()
    running.thread.stop()
    connection.close()
    assert running.wait_ended(1).sent < 16 << 20
    assert config.admin.socket is not None
    assert not config.admin.socket.exists()
    with ServiceThread(config) as service:
        assert service.store.job(job) is not None
        assert AdminClient(config).job(job)["counts"] == {"queued": 1}


def test_a_socket_left_by_a_killed_service_is_replaced(tmp_path: Path) -> None:
    config = service_config(tmp_path)
    assert config.admin.socket is not None
    config.admin.socket.parent.mkdir()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(config.admin.socket))
    with ServiceThread(config):
        assert AdminClient(config).jobs() == []


def test_a_port_in_use_is_named_and_nothing_stays_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = service_config(tmp_path)
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"\[http\] port = {port} on '127\.0\.0\.1': cannot listen there"):
            ServiceThread(replace(config, http=replace(config.http, port=port))).start()
    with ServiceThread(config):
        pass


@pytest.mark.parametrize("part", ["cert", "key"])
def test_unusable_certificates_are_named(tmp_path: Path, part: str) -> None:
    config = service_config(tmp_path)
    (tmp_path / f"server.{'crt' if part == 'cert' else 'key'}").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"\[http\] cert = .*server\.crt.*\[http\] key = .*server\.key"):
        ServiceThread(config).start()


def test_a_data_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    config = service_config(tmp_path)
    config.service.data_dir.touch()
    with pytest.raises(DeviceError, match="data: File exists"):
        ServiceThread(config).start()


def test_without_aiohttp_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'rmaker-ota\[cloud\]'"):
        CloudService(service_config(tmp_path))


def test_the_package_is_imported_without_aiohttp_cryptography_or_rich() -> None:
    code = (
        "import sys; import rmaker_ota.cloud.service, rmaker_ota.cloud.client;"
        "print(sorted({'aiohttp', 'cryptography', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "[]\n"
