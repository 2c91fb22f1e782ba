"""What others see of a node: fields in its log records, and a text file for Prometheus.

All records of this package are below the logger ``rmaker_ota``. `LogFields`, a filter for a handler, gives each record
``node_id`` and ``job_id`` and takes secrets out; `JsonFormatter` writes one JSON object a line:

    handler.addFilter(LogFields())
    handler.setFormatter(logging.Formatter("%(levelname)s %(node_id)s %(job_id)s %(message)s"))

The text file (``[metrics] path``) is for the textfile collector of the node exporter: whole at any moment, rewritten
when something happens, its counters go on across restarts.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rmaker_ota.rainmaker.types import COMMON_EVENT_BASE, OTA_EVENT_BASE, CommonEvent, OtaEvent
from rmaker_ota.targets.base import BootState

if TYPE_CHECKING:
    from rmaker_ota.rainmaker.events import Event
    from rmaker_ota.rainmaker.node import Node

log = logging.getLogger(__name__)

# ---- Logging ---------------------------------------------------------------------------------------------------------

NO_VALUE = "-"

_SECRETS = (
    (re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL), "(private key)"),
    (re.compile(r"(\bhttps?://[^\s?\"'\\]+)\?[^\s\"'\\]+", re.IGNORECASE), r"\1?(not shown)"),  # signatures are there
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.IGNORECASE), r"\1(not shown)@"),
)


def without_secrets(text: str) -> str:
    """A text without private keys in PEM, and URLs without user, password and query."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class LogFields(logging.Filter):
    """Lets every record pass, with ``node_id`` and ``job_id`` (or `NO_VALUE`) and without secrets.

    The node is the only one of this process, or the one whose thread logs.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        module = sys.modules.get("rmaker_ota.rainmaker.node")  # without it there is no node
        node: Node | None = None if module is None else module.node_of_thread()
        record.node_id = NO_VALUE if node is None else node.node_id
        record.job_id = NO_VALUE if node is None else node.job_id or NO_VALUE
        message = record.getMessage()
        shown = without_secrets(message)
        if shown != message:
            record.msg, record.args = shown, ()
        if record.exc_info and record.exc_info[0] is not None:
            text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_text = without_secrets(text)  # which formatters take as it is
        return True


class JsonFormatter(logging.Formatter):
    """One line of JSON: time (UTC), level, logger, node_id, job_id, message, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "node_id": getattr(record, "node_id", NO_VALUE),
            "job_id": getattr(record, "job_id", NO_VALUE),
            "message": record.getMessage(),
        }
        if record.exc_text or record.exc_info:
            entry["exception"] = record.exc_text or (
                self.formatException(record.exc_info) if record.exc_info is not None else ""
            )
        return json.dumps(entry, ensure_ascii=False)


# ---- Metrics ---------------------------------------------------------------------------------------------------------

RESULTS = {
    OtaEvent.SUCCESSFUL: "success",
    OtaEvent.FAILED: "failed",
    OtaEvent.REJECTED: "rejected",
    OtaEvent.DELAYED: "delayed",
}
STATES = ("idle", "updating", "delayed", "restart_wanted", "verifying")
_AFTER = {
    OtaEvent.STARTING: "updating",
    OtaEvent.IN_PROGRESS: "updating",
    OtaEvent.SUCCESSFUL: "idle",
    OtaEvent.FAILED: "idle",
    OtaEvent.REJECTED: "idle",
    OtaEvent.DELAYED: "delayed",
    OtaEvent.REQ_FOR_REBOOT: "restart_wanted",
}
# The text of a failed attempt (specification, section 4): the event alone does not tell it from a failed job.
_ATTEMPT = re.compile(r"OTA Attempt (\d+)/(\d+) failed")
_LINE = re.compile(r'(rmaker_ota_\w+)\{node_id="((?:[^"\\]|\\.)*)"(?:,result="(\w+)")?\} ([0-9.e+]+)')


class Metrics:
    """Keeps the text file of a node.

    Args:
        node: whose.
        path: of the file; its directory must be there. What cannot be written is logged, once, and tried again.
        clock: seconds since 1970.
    """

    def __init__(self, node: Node, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._node = node
        self._path = path
        self._clock = clock
        self._label = f'node_id="{_escaped(node.node_id)}"'
        self._updates = dict.fromkeys(RESULTS.values(), 0)
        self._bytes_before = 0
        self._last_success = 0.0
        self._state = "verifying" if node.boot.boot_state == BootState.PENDING_VERIFY else "idle"
        self._connected = False
        self._is_failing = False
        self._go_on()
        self.write()
        self._subscription = node.events.subscribe(self._heard)

    def close(self) -> None:
        """Writes it a last time: the node is not connected any more."""
        self._subscription.unsubscribe()
        self._connected = False
        self.write()

    def write(self) -> None:
        """Replaces the file. Whoever reads it finds the old one or the new one."""
        new = self._path.with_name(self._path.name + ".new")
        try:
            new.write_text("\n".join(self._lines()) + "\n", encoding="utf-8", errors="backslashreplace")
            new.chmod(0o644)  # somebody else collects it
            new.replace(self._path)
        except OSError as error:
            if not self._is_failing:
                log.warning("metrics %s cannot be written: %s", self._path, error.strerror)
            self._is_failing = True
        else:
            self._is_failing = False

    def _heard(self, event: Event) -> None:
        if event.base == OTA_EVENT_BASE and event.id in _AFTER:
            kind = OtaEvent(event.id)
            attempt = _ATTEMPT.match(event.data) if isinstance(event.data, str) else None
            if kind == OtaEvent.FAILED and attempt is not None and attempt[1] != attempt[2]:
                kind = OtaEvent.IN_PROGRESS  # another one follows
            self._state = _AFTER[kind]
            if kind in RESULTS:
                self._updates[RESULTS[kind]] += 1
            if kind == OtaEvent.SUCCESSFUL:
                self._last_success = self._clock()
        elif event.base == COMMON_EVENT_BASE and event.id in (
            CommonEvent.MQTT_CONNECTED,
            CommonEvent.MQTT_DISCONNECTED,
        ):
            self._connected = event.id == CommonEvent.MQTT_CONNECTED
        else:
            return
        self.write()

    def _go_on(self) -> None:
        """Takes the counters of an earlier run over, as far as they can be read."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return
        for name, node_id, result, value in _LINE.findall(text):
            if node_id != _escaped(self._node.node_id):
                continue
            try:
                number = float(value)
            except ValueError:
                continue
            if not math.isfinite(number):
                continue
            if name == "rmaker_ota_updates_total" and result in self._updates:
                self._updates[result] = int(number)
            elif name == "rmaker_ota_image_bytes_total":
                self._bytes_before = int(number)
            elif name == "rmaker_ota_last_success_timestamp_seconds":
                self._last_success = number

    def _lines(self) -> list[str]:
        label, boot = self._label, self._node.boot
        info = f'{label},project="{_escaped(boot.project_name)}",version="{_escaped(boot.version)}"'
        image_bytes = self._bytes_before + self._node.image_bytes
        lines = ["# HELP rmaker_ota_updates_total Jobs that ended, or were put off, by result."]
        lines.append("# TYPE rmaker_ota_updates_total counter")
        lines += [
            f'rmaker_ota_updates_total{{{label},result="{result}"}} {count}' for result, count in self._updates.items()
        ]
        for name, kind, text, labels, value in (
            ("image_bytes_total", "counter", "Bytes of images received, those a resume found there included.", label,
             str(image_bytes)),
            ("last_success_timestamp_seconds", "gauge", "When an update last succeeded; 0: never.", label,
             f"{self._last_success:.3f}"),
            ("connected", "gauge", "Whether the MQTT connection is up.", label, str(int(self._connected))),
            ("info", "gauge", "What runs.", info, "1"),
        ):  # fmt: skip
            lines += [f"# HELP rmaker_ota_{name} {text}", f"# TYPE rmaker_ota_{name} {kind}"]
            lines.append(f"rmaker_ota_{name}{{{labels}}} {value}")
        lines += ["# HELP rmaker_ota_state What the node is at: 1 for one of them.", "# TYPE rmaker_ota_state gauge"]
        lines += [f'rmaker_ota_state{{{label},state="{state}"}} {int(state == self._state)}' for state in STATES]
        return lines


def _escaped(text: str) -> str:
    """A label value, as the text format wants it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
