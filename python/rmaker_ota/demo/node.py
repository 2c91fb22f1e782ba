"""The demo's firmware: an application of the public API on a virtual ESP32-C3.

    python -m rmaker_ota.demo.node node.toml

Its diagnostics look at what runs: a version whose name ends in ``-broken`` does not find its lamp. What it does it also
tells on standard output, one JSON object a line, for the demo's screen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import rmaker_ota as ota
from rmaker_ota.cli.agent import Signals, set_up_logging
from rmaker_ota.rainmaker.events import Event
from rmaker_ota.rainmaker.types import OTA_EVENT_BASE, OtaEvent

BROKEN = "-broken"
TICK_S = 0.1  # between two lines about a download that runs


def say(event: str, **details: Any) -> None:
    """One line for the demo. Without a demo there is nobody to run for."""
    try:
        print(json.dumps({"event": event, **details}), flush=True)
    except BrokenPipeError:
        os._exit(1)


def diagnose(priv: ota.OtaDiagPriv, node: object) -> int:
    """Does the new firmware work? Asked once right after the start, and once when MQTT is connected."""
    assert isinstance(node, ota.Node)
    works = not node.boot.version.endswith(BROKEN)
    say("diagnostics", state=priv.state.name, works=works)
    return ota.OTA_DIAG_STATUS_SUCCESS if works else ota.OTA_DIAG_STATUS_FAIL


class Meter:
    """Tells how far a download is, while one runs."""

    def __init__(self, node: ota.Node) -> None:
        self._node = node
        self._loading = threading.Event()
        self._over = threading.Event()
        self._told = -1
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._loading.set()
        self._thread.join()

    def on_event(self, event: Event) -> None:
        """For every OTA event."""
        if event.id in {OtaEvent.STARTING, OtaEvent.IN_PROGRESS}:
            self._loading.set()
        else:
            self._loading.clear()
        self._tell()

    def _run(self) -> None:
        while True:
            self._loading.wait()
            if self._over.wait(TICK_S):
                return
            self._tell()

    def _tell(self) -> None:
        progress = self._node.progress()
        if progress is not None and progress.bytes_read != self._told:
            self._told = progress.bytes_read
            say("progress", done=progress.bytes_read, total=progress.bytes_total)


def main() -> None:
    set_up_logging("info")
    config = ota.load_config(sys.argv[1])
    cert = config.ota.server_cert
    node = ota.Node(config)
    boot = node.boot
    say("boot", version=boot.version, project=boot.project_name, slot=boot.running_slot, pid=os.getpid())
    meter = Meter(node)
    with Signals(node) as signals:
        node.events.subscribe(meter.on_event, OTA_EVENT_BASE)
        meter.start()
        try:
            # Broken firmware ends here: its diagnostics fail, and the node restarts into the one before.
            ota.Ota(
                node,
                ota.OtaConfig(ota_diag=diagnose, server_cert=None if cert is None else cert.read_text(), priv=node),
            )
            node.run()
        except ota.OtaError:
            if signals.first is None:
                raise
        finally:
            node.stop()
            meter.stop()


if __name__ == "__main__":
    main()
