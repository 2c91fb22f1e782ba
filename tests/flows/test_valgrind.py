"""C programs under valgrind: no invalid access, no use of what was never written, nothing lost.

Twice, because each way sees what the other cannot:

* with Python's own allocator: values that were never written, and whatever C code takes from malloc();
* with malloc() for everything, also each string and structure a callback is given: freed memory that is still used, and
  every lost block. (There CPython 3.11 is known to compute 0 * (a digit never written) in its look for small integers.)

`make test` runs a program's start and end the second way; `make valgrind` everything (RMAKER_OTA_VALGRIND=1).
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from rmaker_ota.cloud.service import ServiceThread
from tests.c_abi.compiled import HERE, ROOT, build_program
from tests.c_abi.library import WHY_NOT
from tests.flows.test_c_abi import LISTENS, broker, gateway, offer  # noqa: F401 - fixtures
from tests.flows.test_cloud_mosquitto import Watch, config_for
from tests.sim.agent import Cloud
from tests.sim.c_program import CProgram
from tests.sim.mosquitto import Mosquitto, find_mosquitto

VALGRIND = shutil.which("valgrind")
pytestmark = [
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.skipif(VALGRIND is None, reason="valgrind is not installed"),
    pytest.mark.timeout(600),
]
WAYS = {
    "pymalloc": ({}, []),
    "malloc": ({"PYTHONMALLOC": "malloc"}, ["--undef-value-errors=no"]),
}


def under_valgrind(program: Path, logs: Path, *options: str) -> list[str | Path]:
    return [
        VALGRIND or "",
        "--quiet",
        "--trace-children=yes",  # restarts are exec()
        f"--log-file={logs}/valgrind.%p.%n",
        f"--suppressions={ROOT / 'packaging' / 'valgrind.supp'}",
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
        "--num-callers=30",
        "--error-exitcode=101",
        *options,
        program,
    ]


def found(logs: Path) -> str:
    files = sorted(logs.glob("valgrind.*"))
    assert files
    return "".join(path.read_text() for path in files)


in_full = pytest.mark.skipif("RMAKER_OTA_VALGRIND" not in os.environ, reason="takes a minute: make valgrind")


@pytest.fixture(params=[pytest.param("pymalloc", marks=in_full), "malloc"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_program_starts_and_ends(way: str, broker: Mosquitto, tmp_path: Path) -> None:  # noqa: F811
    environment, options = WAYS[way]
    program = build_program(HERE / "faults.c", tmp_path / "faults")
    with CProgram(under_valgrind(program, tmp_path, *options), tmp_path / "node", broker) as node:
        node.start("behaves", environment={"PATH": os.environ["PATH"], **environment})
        broker.wait_log(LISTENS, timeout_s=300)
        node.signal(signal.SIGTERM)
        assert node.wait() == 0, found(tmp_path)
    assert found(tmp_path) == ""


@in_full
def test_a_pointer_that_is_kept_beyond_its_callback_is_found(broker: Mosquitto, tmp_path: Path) -> None:  # noqa: F811
    """Which shows that the others would find something."""
    environment, options = WAYS["malloc"]
    program = build_program(HERE / "faults.c", tmp_path / "faults")
    with (
        Cloud(broker) as cloud,
        CProgram(under_valgrind(program, tmp_path, *options), tmp_path / "node", broker, wait_s=300) as node,
    ):
        node.start("keeps-pointer", environment={"PATH": os.environ["PATH"], **environment})
        broker.wait_log(LISTENS, timeout_s=300)
        cloud.send_job("https://localhost/x", b"")
        assert node.wait() == 101
    assert "Invalid read" in found(tmp_path)


@in_full
def test_an_update_and_a_rollback(way: str, gateway: Path, broker: Mosquitto, tmp_path: Path) -> None:  # noqa: F811
    environment, options = WAYS[way]
    watch = Watch()
    with ServiceThread(config_for(broker, tmp_path), wait_ready_s=20, on_change=watch) as service:
        command = under_valgrind(gateway, tmp_path, *options)
        ca, ota = (tmp_path / "ca.crt").read_bytes(), {"ota_disable_auto_reboot": True}
        with CProgram(command, tmp_path / "node", broker, server_ca=ca, ota=ota, wait_s=300) as node:
            node.start(environment={"PATH": os.environ["PATH"], **environment})
            broker.wait_log(LISTENS, timeout_s=300)
            offer(service, "2.0.0")
            node.wait_log("event 3 ")
            mark = len(broker.log)
            offer(service, "2.1.0-broken")
            node.wait_log("event 5 ")
            broker.wait_log(LISTENS, since=mark, timeout_s=300)
            assert node.stop() == 0, found(tmp_path)
    assert found(tmp_path) == ""
