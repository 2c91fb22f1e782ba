"""A Mosquitto broker for one installation: its configuration with mutual TLS, and running it as a child process.

The name in a client's certificate is its user name. Nodes may publish and subscribe below ``node/<their id>/`` and
publish on ``$aws/rules/<rule>/node/<their id>/``, ask for image streams and read the answers below
``$aws/things/<their id>/streams/``; the job service may do so for all nodes; nobody else gets in.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from rmaker_ota.errors import NotFoundError, StateError

SERVICE_NAME = "rmaker-ota-cloud"  # common name of the job service's client certificate
DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"  # where Debian puts it and users' PATH does not look
START_S = 10.0
STOP_S = 5.0


def find_mosquitto() -> str:
    """Path of the mosquitto program.

    Raises:
        NotFoundError: it is not installed; the message says how to install it.
    """
    program = shutil.which("mosquitto", path=os.environ.get("PATH", os.defpath) + ":" + DIRECTORIES)
    if program is None:
        raise NotFoundError("mosquitto is not installed: sudo apt-get install -y mosquitto")
    return program


def write_mosquitto(
    directory: Path,
    *,
    host: str,
    port: int,
    ca: Path,
    cert: Path,
    key: Path,
    persistence: bool = True,
    log_types: tuple[str, ...] = (),
) -> Path:
    """Writes ``mosquitto.conf`` and ``mosquitto.acl`` into a directory; returns the former.

    Args:
        host: address to listen on; empty: every one.
        ca: authority of the clients' certificates.
        cert, key: the broker's own certificate and key.
        persistence: keep sessions and what waits for clients over a restart or a crash, in the same directory.
        log_types: what is logged beside errors, warnings and notices; mosquitto.conf(5).
    """
    rules = directory / "mosquitto.acl"
    rules.write_text(
        f"user {SERVICE_NAME}\n"
        "topic readwrite node/#\n"
        "topic readwrite $aws/rules/#\n"
        "topic readwrite $aws/things/#\n"
        "\n"
        "pattern readwrite node/%u/#\n"
        "pattern write $aws/rules/+/node/%u/#\n"
        "pattern write $aws/things/%u/streams/+/get/+\n"
        "pattern write $aws/things/%u/streams/+/describe/+\n"
        "pattern read $aws/things/%u/streams/#\n"
    )
    rules.chmod(0o600)  # Mosquitto 2 warns about more
    lines = [
        "# Mutual TLS: a client's user name is the common name of its certificate.",
        f"listener {port} {host}".rstrip(),
        f"cafile {ca}",
        f"certfile {cert}",
        f"keyfile {key}",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
        f"acl_file {rules}",
        "max_packet_size 1048576",
        "max_inflight_messages 100",  # as AWS IoT; the usual 20 would bound what a node has asked for over MQTT
        f"user {pwd.getpwuid(os.geteuid()).pw_name}",  # when root starts it: who may read the key
        "log_dest stderr",
        "log_type information",  # one line says that it runs
        "log_type notice",
        "log_type warning",
        "log_type error",
        *(f"log_type {each}" for each in log_types),
    ]
    if persistence:
        lines += ["persistence true", f"persistence_location {directory}/"]
        lines += ["autosave_on_changes true", "autosave_interval 1"]  # else a broker that crashes forgets up to 30 min
    config = directory / "mosquitto.conf"
    config.write_text("\n".join([*lines, ""]))
    return config


class Broker:
    """A Mosquitto as a child process; it ends with the block, and with this process where the system offers that.

    Start it on the main thread: the kernel ties the child to the thread that started it.

    Args:
        config: its configuration file, which logs to standard error.
        on_line: called with each line of its log, on a thread.
    """

    def __init__(self, config: Path, *, on_line: Callable[[str], object] | None = None) -> None:
        self._config = config
        self._on_line = on_line
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._log: list[str] = []
        self._running = threading.Event()

    def start(self) -> None:
        """Starts it; returns when it listens.

        Raises:
            NotFoundError: mosquitto is not installed.
            StateError: it ended, or said nothing, instead of listening; the message has its last words.
        """
        self._process = subprocess.Popen(
            [*bound_to_this_process(), find_mosquitto(), "-c", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        self._reader.start()
        listening = self._running.wait(START_S) and self._process.poll() is None
        if not listening:
            self.stop()
            raise StateError("mosquitto did not start: " + "; ".join(self._log[-3:]))

    def stop(self) -> None:
        """Ends it and waits until it has ended. Calling it again is harmless."""
        process, self._process = self._process, None
        if process is not None:
            end_process(process)
        if self._reader is not None:
            self._reader.join()

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._log.append(line.rstrip())
                del self._log[:-100]
                if " running" in line:
                    self._running.set()
                if self._on_line is not None:
                    self._on_line(line.rstrip())
        process.wait()
        self._running.set()  # whoever waits finds that it has ended


def bound_to_this_process() -> list[str]:
    """Words to put before a command so that the kernel ends it when this process dies without warning."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", "TERM", "--"] if program else []


def end_process(process: subprocess.Popen[str], timeout_s: float = STOP_S) -> None:
    """Ends a child process: politely, after ``timeout_s`` by force; reaps it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
