"""A private Mosquitto broker on loopback with mutual TLS, for tests.

    with Mosquitto(tmp_path) as broker:
        identity = broker.identity("N1")          # certificate whose common name is N1
        client.tls_set(broker.ca_file, identity.cert_file, identity.key_file)
        client.connect(broker.host, broker.port)

The broker runs in the directory given to it, with a certificate authority of its own, and is always stopped: by the
``with`` block, and by an exit handler when the block is never left. Whoever waits for it, waits for a line of its log.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import trustme

START_ATTEMPTS = 5  # the port chosen may be taken by somebody else before the broker binds it


class BrokerError(Exception):
    """The broker did not start or did not do what was waited for; the message ends with its log."""


@dataclass(frozen=True)
class Identity:
    """A client certificate with its chain, and its private key (PEM files)."""

    common_name: str
    cert_file: Path
    key_file: Path


def find_mosquitto() -> str | None:
    """Path of the mosquitto program, or None. Debian puts it where users' PATH does not look."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    """A loopback TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """One broker. It listens on a port of its own, the same one over restarts.

    Args:
        directory: where configuration, certificates and persistence live; must exist.
        tls: mutual TLS (a client certificate of this broker's authority is required); otherwise plain and anonymous.
        persistence: keep sessions and queued messages over a restart.
        port: the port to listen on; 0 chooses a free one.
        options: further lines of mosquitto.conf.
    """

    host = "localhost"

    def __init__(
        self,
        directory: Path,
        *,
        tls: bool = True,
        persistence: bool = False,
        port: int = 0,
        options: tuple[str, ...] = (),
    ) -> None:
        self.directory = directory
        self.port = port
        self.tls = tls
        self.ca_file = directory / "ca.pem"
        self._persistence = persistence
        self._options = options
        self._authority = trustme.CA(organization_name="RMaker OTA tests")
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._log: list[str] = []
        self._log_closed = True
        self._log_grew = threading.Condition()
        self._authority.cert_pem.write_to_path(self.ca_file)
        server = self._authority.issue_cert("localhost", "127.0.0.1", "::1")
        server.private_key_pem.write_to_path(directory / "server.key")
        _write_chain(server, directory / "server.pem")

    # -- certificates

    def identity(self, common_name: str) -> Identity:
        """A client certificate of the authority this broker trusts."""
        return issue_identity(self._authority, self.directory, common_name)

    def stranger(self, common_name: str) -> Identity:
        """A client certificate of an authority the broker does not know."""
        return issue_identity(trustme.CA(), self.directory, common_name, prefix="stranger-")

    # -- life

    def start(self) -> None:
        """Starts the broker and returns when it listens.

        Raises:
            BrokerError: mosquitto is not installed, or it stopped instead of listening.
        """
        assert self._process is None, "already started"
        program = find_mosquitto()
        if program is None:
            raise BrokerError("mosquitto is not installed: apt-get install mosquitto")
        chosen_here = self.port == 0
        for attempt in range(START_ATTEMPTS):
            if chosen_here:
                self.port = free_port()
            config = self.directory / "mosquitto.conf"
            config.write_text(self._configuration())
            self._log_closed = False
            mark = len(self._log)
            self._process = subprocess.Popen(
                [program, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            atexit.register(self._kill_process, self._process)
            self._reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
            self._reader.start()
            try:
                self.wait_log(" running", since=mark)
                return
            except BrokerError as error:
                self.kill()
                if not ("Address already in use" in str(error) and chosen_here and attempt + 1 < START_ATTEMPTS):
                    raise

    def stop(self) -> None:
        """Ends the broker in order: clients are disconnected, persistence is written. Harmless when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the broker without warning: what it had received and not passed on is lost."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Ends the broker without warning and starts it again on the same port."""
        self.kill()
        self.start()

    def suspend(self) -> None:
        """The broker stops running but its connections stay: it receives and acknowledges nothing until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends `suspend`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    # -- log

    @property
    def log(self) -> list[str]:
        """Everything the broker logged so far, over all starts."""
        with self._log_grew:
            return list(self._log)

    def wait_log(self, text: str, *, since: int = 0, timeout_s: float = 10.0) -> int:
        """Waits for a log line that contains a text; returns the number of the line.

        Args:
            since: number of the first line looked at; ``len(broker.log)`` taken earlier.

        Raises:
            BrokerError: it did not come in time, or the broker ended.
        """
        deadline = time.monotonic() + timeout_s
        with self._log_grew:
            looked_at = since
            while True:
                for number in range(looked_at, len(self._log)):
                    if text in self._log[number]:
                        return number
                looked_at = len(self._log)
                if self._log_closed or not self._log_grew.wait(deadline - time.monotonic()):
                    why = "ended" if self._log_closed else f"did not log {text!r} within {timeout_s} s"
                    raise BrokerError(f"mosquitto {why}; its log:\n" + "\n".join(self._log[since:]))

    # -- inner

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _configuration(self) -> str:
        lines = [
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "user root",  # no effect unless started by root: then it must still read its files
            "log_dest stderr",
            "log_type all",
            "set_tcp_nodelay true",
            "message_size_limit 0",
            "max_queued_messages 10000",
        ]
        if self.tls:
            lines += [
                f"cafile {self.ca_file}",
                f"certfile {self.directory / 'server.pem'}",
                f"keyfile {self.directory / 'server.key'}",
                "require_certificate true",
                "use_identity_as_username true",
            ]
        if self._persistence:
            lines += ["persistence true", f"persistence_location {self.directory}/"]
        return "\n".join([*lines, *self._options, ""])

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._log_grew:
                self._log.append(line.decode(errors="replace").rstrip())
                self._log_grew.notify_all()
        with self._log_grew:
            self._log_closed = True
            self._log_grew.notify_all()

    def _end(self, how: signal.Signals) -> None:
        process, reader = self._process, self._reader
        if process is None or reader is None:
            return
        if how != signal.SIGKILL:  # which ends a suspended process too, and must not let it finish its work first
            process.send_signal(signal.SIGCONT)
        # Said again and again: mosquitto 2.0 forgets a SIGTERM that comes between the line "running" and its main loop.
        for _ in range(40):
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.25)
                break
        else:
            process.kill()
            process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
        atexit.unregister(self._kill_process)
        self._process = self._reader = None

    @staticmethod
    def _kill_process(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()


def issue_identity(authority: trustme.CA, directory: Path, common_name: str, *, prefix: str = "client-") -> Identity:
    """Writes a client certificate and its key into a directory."""
    leaf = authority.issue_cert(f"{common_name}.node.invalid", common_name=common_name)
    identity = Identity(common_name, directory / f"{prefix}{common_name}.pem", directory / f"{prefix}{common_name}.key")
    _write_chain(leaf, identity.cert_file)
    leaf.private_key_pem.write_to_path(identity.key_file)
    return identity


def _write_chain(leaf: trustme.LeafCert, path: Path) -> None:
    path.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
