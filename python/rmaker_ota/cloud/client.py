"""Talks to a job service that runs, over its admin API (`rmaker_ota.cloud.http`). Standard library only.

client = AdminClient(load_config("cloud.toml"))
image = client.upload(Path("app.bin"))
job = client.create_job(image["sha256"], ["N1"], mode="force")
"""

from __future__ import annotations

import errno
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from rmaker_ota.cloud.config import CloudConfig
from rmaker_ota.errors import ArgumentError, DeviceError, NotFoundError, OtaError

TIMEOUT_S = 60.0
BLOCK = 256 * 1024


class ServiceUnreachable(OtaError):
    """The job service does not run, or does not answer as one."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class AdminClient:
    """One connection for each call; every call may raise

    * ServiceUnreachable: nobody answers,
    * ArgumentError (400) or NotFoundError (404) with the service's own words,
    * OtaError: the service failed.
    """

    def __init__(self, config: CloudConfig) -> None:
        self._config = config

    def status(self) -> dict[str, Any]:
        return self._call("GET", "/v1/status")

    def upload(self, path: Path, *, on_progress: Callable[[int, int], object] | None = None) -> dict[str, Any]:
        """Hands an image to the service, in small pieces.

        Args:
            on_progress: called with the bytes sent so far and the size of the file.

        Raises:
            DeviceError: the file cannot be read.
        """
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                return self._call(
                    "POST", f"/v1/images?name={quote(path.name)}", body=_pieces(file, size, on_progress), size=size
                )
        except OSError as error:
            if isinstance(error, OtaError):
                raise
            raise DeviceError(f"{path}: {error.strerror}", device_code=error.errno or 0) from error

    def images(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "/v1/images")["images"])

    def create_job(
        self,
        image: str,
        nodes: list[str],
        *,
        mode: str,
        version: str | None = None,
        metadata: dict[str, Any] | None = None,
        workflow: str = "auto",
    ) -> dict[str, Any]:
        body = {
            "image": image,
            "nodes": nodes,
            "mode": mode,
            "version": version,
            "metadata": metadata,
            "workflow": workflow,
        }
        return self._call("POST", "/v1/jobs", body=json.dumps(body).encode())

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        return list(self._call("GET", "/v1/jobs")["jobs"])

    def job(self, job_id: str) -> dict[str, Any]:
        """A job with its history."""
        return self._call("GET", f"/v1/jobs/{quote(job_id, safe='')}")

    def cancel(self, job_id: str, nodes: list[str] | None = None) -> list[str]:
        body = json.dumps({"nodes": nodes}).encode()
        return list(self._call("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel", body=body)["cancelled"])

    def watch(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The history of a job as it grows, from its beginning until every node has finished."""
        connection, response = self._request("GET", f"/v1/jobs/{quote(job_id, safe='')}/watch")
        try:
            if connection.sock is not None:
                connection.sock.settimeout(None)  # nothing may happen for a long time
            while line := response.readline():
                yield json.loads(line)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def nodes(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "/v1/nodes")["nodes"])

    # -- inner

    def _call(self, method: str, path: str, *, body: Any = None, size: int | None = None) -> dict[str, Any]:
        connection, response = self._request(method, path, body=body, size=size)
        try:
            value = json.loads(response.read())
            if not isinstance(value, dict):
                raise TypeError("not an object")
            return value
        except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, *, body: Any = None, size: int | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._connect()
        headers = {} if size is None else {"Content-Length": str(size)}
        if self._config.admin.port:
            headers["Authorization"] = f"Bearer {self._token()}"
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            if response.status < 300:
                return connection, response
            message = _message(response)
        except _FileFailed as error:
            connection.close()
            raise error.cause from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        connection.close()
        kind = {400: ArgumentError, 404: NotFoundError}.get(response.status, OtaError)
        raise kind(message)

    def _connect(self) -> http.client.HTTPConnection:
        admin = self._config.admin
        if admin.socket is not None:
            return _UnixConnection(admin.socket)
        return http.client.HTTPConnection("127.0.0.1", admin.port, timeout=TIMEOUT_S)

    def _token(self) -> str:
        path = self._config.service.data_dir / "admin.token"
        try:
            return path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServiceUnreachable(f"{path}: cannot be read: {error}; does the job service run?") from error

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        admin = self._config.admin
        where = admin.socket if admin.socket is not None else f"127.0.0.1:{admin.port}"
        reason = getattr(error, "strerror", None) or error
        return ServiceUnreachable(
            f"no job service at {where} ({reason}); start it with `rmaker-ota serve --config {self._config.path}`"
        )


class _FileFailed(Exception):
    """The file that is sent could not be read: not the connection's fault."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _pieces(file: BinaryIO, size: int, on_progress: Callable[[int, int], object] | None) -> Iterator[bytes]:
    sent = 0
    while sent < size:
        try:
            piece = file.read(min(BLOCK, size - sent))
        except OSError as error:
            raise _FileFailed(error) from error
        if not piece:
            raise _FileFailed(OSError(errno.ENODATA, "became shorter while it was sent"))
        yield piece
        sent += len(piece)
        if on_progress is not None:
            on_progress(sent, size)


def _message(response: http.client.HTTPResponse) -> str:
    try:
        return str(json.loads(response.read())["error"])
    except (ValueError, TypeError, KeyError):
        return f"the job service answered {response.status} {response.reason}"
