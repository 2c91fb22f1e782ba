"""Programs that end while a job runs: they end at once and as they wanted, and the next start takes the job anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmaker_ota.esp_build import build_image
from rmaker_ota.targets import open_target
from tests.sim.agent import Agent, Cloud
from tests.sim.https_server import HttpsServer, serve, stalls
from tests.sim.mosquitto import Mosquitto, find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

NEW = build_image(version="2.0.0", project_name="gw", size=512 * 1024)
SUCCESS = ("success", "OTA Upgrade finished and verified successfully")

PROGRAM = """
import atexit, logging, os, sys, threading
import rmaker_ota as ota
from rmaker_ota.rainmaker import workflow

workflow.FETCH_DELAY_S = 0.1
MODE = {mode!r}
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
atexit.register(print, "exit handler", file=sys.stderr)
begun = threading.Event()

def hear(event):
    if event.data == "Downloading Firmware Image":
        begun.set()
        if MODE == "event-exits":
            os._exit(6)
        if MODE == "event-raises":
            sys.exit(7)  # ends the call, not the program

def job(handle, data):
    if MODE == "callback-exits":
        os._exit(5)
    return ota.esp_rmaker_ota_default_cb(handle, data)

node = ota.Node.from_config(sys.argv[sys.argv.index("--config") + 1])
node.events.subscribe(hear)
ota.Ota(node, ota.OtaConfig(ota_cb=job))
node.start()
assert begun.wait(30)
match MODE:
    case "main-stops":
        node.stop()
    case "main-exits":
        sys.exit(4)
    case "main-raises":
        raise RuntimeError("why not")
"""

ENDS = {
    "main-returns": 0,
    "main-stops": 0,
    "main-exits": 4,
    "main-raises": 1,
    "event-raises": 0,
    "event-exits": 6,
    "callback-exits": 5,
}


@pytest.mark.parametrize("mode", ENDS)
def test_a_program_may_end_while_a_job_runs(tmp_path: Path, mode: str) -> None:
    (tmp_path / "broker").mkdir()
    script = [serve(NEW)] if mode == "callback-exits" else [stalls(NEW, len(NEW) // 2), serve(NEW)]
    with (
        Mosquitto(tmp_path / "broker") as broker,
        HttpsServer(script) as server,
        Cloud(broker) as cloud,
        Agent(tmp_path / "node", broker, server_ca=server.ca_pem) as agent,
    ):
        agent.start(program=PROGRAM.format(mode=mode))
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        assert agent.wait() == ENDS[mode]
        assert agent.log.count("exit handler") == (0 if mode in ("event-exits", "callback-exits") else 1)
        assert ("Traceback" in agent.log) is mode.endswith("raises")
        with open_target(f"esp32-image:{agent.flash}", read_only=True) as target:
            slot = target.running_slot()
            assert slot is not None
            app = target.describe(slot)
            assert app is not None
            assert app.version == "1.0.0"
        agent.start()
        cloud.wait("otafetch")
        cloud.send_job(server.url(), NEW)
        cloud.wait_status(*SUCCESS)
