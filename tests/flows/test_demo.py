"""`rmaker-ota demo` as a user runs it: all of it once, interrupted, and with nothing left afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mosquitto import find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
COMMAND = [sys.executable, "-m", "rmaker_ota", "demo"]


def left_running(directory: Path) -> list[str]:
    """Command lines of processes that name the directory."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(str(directory) in word for word in words):
            lines.append(" ".join(words))
    return lines


@pytest.mark.timeout(180)
def test_all_four_scenarios_end_as_they_should(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    done = subprocess.run([*COMMAND, "--json", "--keep", str(directory)], capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    assert (done.returncode, result["ok"], result["error"]) == (0, True, None), done.stdout + done.stderr
    assert done.stderr == ""
    update, rollback, resume, chips = result["scenarios"]
    assert (update["state"], update["running_version"], update["slot"]) == ("success", "2.0.0", "ota_1")
    assert (rollback["state"], rollback["running_version"], rollback["slot"]) == ("rejected", "2.0.0", "ota_1")
    assert (resume["state"], resume["running_version"], resume["slot"]) == ("success", "3.0.0", "ota_0")
    assert [report["info"] for report in update["reports"]] == [
        "Starting OTA Upgrade (HTTPS attempt 1/3)",
        "Downloading Firmware Image",
        "Firmware Image download complete",
        "Rebooting into new firmware (after 1 HTTPS attempt)",
        "OTA Upgrade finished and verified successfully",
    ]
    assert rollback["reports"][-1] == {"status": "rejected", "info": "Firmware rolled back"}
    assert 0 < resume["resumed_at"] < resume["bytes"] == 1 << 20
    assert [report["status"] for report in resume["reports"]].count("failed") == 1
    assert (chips["state"], chips["running_version"], chips["slot"]) == ("success", "2.0.0", "ota_1")
    assert chips["bytes"] == 2 << 20
    assert left_running(directory) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_running(tmp_path: Path, how: signal.Signals) -> None:
    directory = tmp_path / "demo"
    with subprocess.Popen([*COMMAND, "--keep", str(directory)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Rebooting into new firmware" in line:
                assert len(left_running(directory)) >= 3  # the demo itself, broker, node
                process.send_signal(how)
                process.send_signal(how)
                break
        assert process.wait(30) == 130
    assert left_running(directory) == []


def test_it_does_not_work_in_a_directory_that_is_there(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--keep", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "exists already" in done.stderr
