"""A private nginx on loopback that serves one folder over TLS 1.3, with ranges and entity tags.

It gets its listening socket from us (the ``NGINX`` variable of its own binary upgrade), so the port is never taken by
somebody else and connections are accepted, by the kernel, before it is up: nothing has to wait for it. It runs in the
foreground, one process, everything it writes lies in a folder of its own, and it is gone when the ``with`` block ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trustme

CONFIG = """
daemon off;
master_process on;
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/error.log warn;
{user}
events {{ worker_connections 64; }}
http {{
    log_format requests '$request_uri\t$status\t$http_range\t$http_if_range\t$body_bytes_sent';
    access_log {home}/access.log requests;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    default_type application/octet-stream;
    sendfile on;
    keepalive_timeout 60s;
    server {{
        listen 127.0.0.1:{port}{listen_options};
        server_name localhost;
        root "{root}";
        ssl_certificate {home}/server.pem;
        ssl_certificate_key {home}/server.key;
        ssl_protocols {protocols};
        {more}
    }}
}}
"""


@dataclass(frozen=True)
class LoggedRequest:
    """One line of the access log."""

    path: str
    status: int
    range: str  # the Range field, "-" when there was none
    if_range: str
    body_bytes: int


def find_nginx() -> str | None:
    """Path of the nginx program; Debian keeps it where ordinary users' PATH does not look."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Nginx:
    """Serves `root` as https://localhost:PORT/ while the ``with`` block lasts.

    Args:
        root: folder to serve; must be readable by this user.
        http2: offer HTTP/2 beside HTTP/1.1.
        protocols: value of ``ssl_protocols``.
        more: lines for the ``server`` block.

    Attributes:
        ca_pem, ca_file: the certificate to trust.
        port: the port on 127.0.0.1.
    """

    def __init__(self, root: Path, *, http2: bool = False, protocols: str = "TLSv1.3", more: str = "") -> None:
        self.root = root.resolve()
        self.http2 = http2
        self.protocols = protocols
        self.more = more
        ca = trustme.CA()
        self._certificate = ca.issue_cert("localhost", "127.0.0.1")
        self.ca_pem: bytes = ca.cert_pem.bytes()
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = find_nginx()
        if program is None:
            raise FileNotFoundError("nginx is not installed: sudo apt-get install -y nginx")
        self._folder = tempfile.TemporaryDirectory(prefix="nginx-")
        self.home = Path(self._folder.name)
        self.ca_file = self.home / "ca.pem"
        self.ca_file.write_bytes(self.ca_pem)
        self._certificate.private_key_pem.write_to_path(str(self.home / "server.key"))
        for part in self._certificate.cert_chain_pems:
            part.write_to_path(str(self.home / "server.pem"), append=True)
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
                self.port = listener.getsockname()[1]
                self._start(program, listener)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def _start(self, program: str, listener: socket.socket) -> None:
        config = self.home / "nginx.conf"
        config.write_text(
            CONFIG.format(
                home=self.home,
                port=self.port,
                root=self.root,
                protocols=self.protocols,
                listen_options=" ssl http2" if self.http2 else " ssl",
                user="user root;" if os.geteuid() == 0 else "",
                more=self.more,
            )
        )
        self._process = subprocess.Popen(
            [program, "-p", str(self.home), "-c", str(config), "-e", str(self.home / "error.log")],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self._folder.cleanup()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def url(self, name: str) -> str:
        """URL of a file in the folder."""
        return f"https://localhost:{self.port}/{name}"

    def stop(self) -> list[LoggedRequest]:
        """Ends the process, so that its log is complete.

        Returns:
            What was asked for, in the order in which the answers ended.

        Raises:
            RuntimeError: it had ended before on its own; with what it had to say.
        """
        process = self._process
        if process is not None:
            self._process = None
            died = process.poll()
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if died is not None:
                log = self.home / "error.log"
                raise RuntimeError(f"nginx ended with {died}: {log.read_text() if log.exists() else ''}")
        return self._requests()

    def _requests(self) -> list[LoggedRequest]:
        log = self.home / "access.log"
        requests = []
        for line in log.read_text().splitlines() if log.exists() else []:
            path, status, asked, if_range, size = line.split("\t")
            requests.append(LoggedRequest(path, int(status), asked, if_range.replace("\\x22", '"'), int(size)))
        return requests
