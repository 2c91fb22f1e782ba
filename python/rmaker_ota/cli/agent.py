"""``rmaker-ota agent``: a node as a service.

It runs until SIGTERM or SIGINT, or until the node restarts: with ``[restart] mode = "process"`` the same process then
starts anew. Started by systemd with ``Type=notify`` it says when it is up and when it stops; with ``WatchdogSec=`` it
says that it is alive as long as the nodes' threads take work. ``packaging/rmaker-ota-agent.service`` is such a unit.

Sub-devices (``[[sub_device]]``), as chips at the gateway's USB ports, are nodes of their own in the same process. They
restart by themselves; the agent's end is that of its own node.

Exit codes: 0 stopped by SIGTERM, or a restart that somebody else does (``mode = "none"``); 1 failed; 2 wrong
configuration, or a state file that cannot be used: starting again will not help, so a unit should have
``RestartPreventExitStatus=2``; 130 interrupted by SIGINT.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from rmaker_ota.cli.errors import ExitCode
from rmaker_ota.errors import OtaError, StateFileError

if TYPE_CHECKING:
    from rmaker_ota.rainmaker.node import Node

log = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")


class UnusableState(click.ClickException):
    """A state file that will not get better by itself."""

    exit_code = ExitCode.USAGE

    def show(self, file: object = None) -> None:
        click.echo(f"rmaker-ota: {self.message}", err=True)


@click.command()
@click.option(
    "--config",
    "config_path",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The node's configuration (TOML).",
)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True, help="What is logged.")
@click.option("--log-format", type=click.Choice(("text", "json")), default="text", show_default=True, help="How.")
def command(config_path: Path, log_level: str, log_format: str) -> int:
    """Run a node until it is stopped.

    \b
    The configuration has the sections [node] [mqtt] [ota] [target] [state] [restart] [metrics],
    and a [[sub_device]] for each chip this node takes care of.
    Stop it with SIGTERM; what it was doing goes on at the next start.
    """
    set_up_logging(log_level, json=log_format == "json")
    from rmaker_ota.config import load_config
    from rmaker_ota.rainmaker.node import Node, restart_process
    from rmaker_ota.rainmaker.supervisor import Supervisor, enable_configured

    config = load_config(config_path)
    devices = [Supervisor(each) for each in config.sub_devices]

    def restart(reason: str) -> None:
        for device in devices:  # what they download goes on later
            device.stop()
        restart_process()

    try:
        node = Node(config, restarter=restart if devices and config.restart.mode == "process" else None)
    except StateFileError as error:
        raise UnusableState(error.message) from error
    boot = node.boot
    log.info("node %s runs %s %s from %s", node.node_id, boot.project_name, boot.version, boot.running_slot or "here")

    def responds(timeout_s: float) -> bool:
        return node.responds(timeout_s) and all(device.responds(timeout_s) for device in devices)

    with Signals(node) as signals, Watchdog(responds, watchdog_interval_s(os.environ)):
        try:
            try:
                enable_configured(node)
                node.start()
                for device in devices:
                    device.start()
                notify("READY=1")
            except OtaError:
                if signals.first is None:  # otherwise it was stopped before it had begun
                    raise
            outcome = node.run()
        finally:
            notify("STOPPING=1")
            for device in devices:
                device.stop()
            node.stop()
    log.info("node %s: %s", node.node_id, outcome.value)
    return ExitCode.INTERRUPTED if signals.first == signal.SIGINT else ExitCode.DONE


def set_up_logging(level: str, *, json: bool = False) -> None:
    """Logs go to standard error; with systemd's level prefix in place of the time when the journal reads them. Secrets
    are taken out, see `rmaker_ota.rainmaker.observe`."""
    from rmaker_ota.rainmaker.observe import JsonFormatter, LogFields

    journal = "JOURNAL_STREAM" in os.environ
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JournalFormatter() if journal else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if json:
        handler.setFormatter(JsonFormatter())
    handler.addFilter(LogFields())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class _JournalFormatter(logging.Formatter):
    """``<4>text``: the journal keeps time itself and takes the level from the prefix (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        syslog = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}.get(record.levelno, 3)
        return "\n".join(f"<{syslog}>{line}" for line in super().format(record).splitlines())


def notify(state: str) -> None:
    """Tells systemd (sd_notify(3)); nothing happens unless it started us with ``Type=notify``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.send(state.encode())
    except OSError as error:
        log.warning("systemd is not told %s: %s", state, error.strerror)


def watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    """Half of what systemd allows between two signs of life (sd_watchdog_enabled(3)); None: it waits for none."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / 2e6 if text.isascii() and text.isdigit() and int(text) > 0 else None


class Watchdog:
    """While inside, tells systemd that the node is alive, as long as it is.

    Args:
        responds: whether the node answers within so many seconds.
        interval_s: between two signs of life; None: none are wanted.
        tell: sends one.
    """

    def __init__(
        self,
        responds: Callable[[float], bool],
        interval_s: float | None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._responds = responds
        self._interval_s = interval_s
        self._tell = tell or notify
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rmaker-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._interval_s is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    def _run(self) -> None:
        assert self._interval_s is not None
        while True:
            if self._responds(self._interval_s):
                self._tell("WATCHDOG=1")
            else:
                log.error("the node's thread does not answer: no sign of life for systemd")
            if self._over.wait(self._interval_s):
                return


class Signals:
    """While inside, SIGTERM and SIGINT stop the node; a second one interrupts at once. Main thread only.

    The handler itself does nothing: it may run in the middle of anything. Python writes the signal's number to a
    socket, and a thread that waits there stops the node.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self.first: int | None = None

    def __enter__(self) -> Signals:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self._previous:
            signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._wait, name="rmaker-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._write.close()  # ends the thread
        self._thread.join(10.0)
        self._read.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.first is not None:
            raise KeyboardInterrupt
        self.first = number

    def _wait(self) -> None:
        if self._read.recv(1):
            log.info("stopping")
            self._node.stop()
