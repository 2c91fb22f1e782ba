"""The demo's fourth part: two chips at serial ports, updated side by side.

The chips are simulated, each a process of its own on a pseudo terminal: boot ROM, flash, boot loader and an application
that says its version on the console. They belong to the project's tests, so this part is there in a source tree only.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rmaker_ota
from rmaker_ota.cloud.broker import bound_to_this_process, end_process
from rmaker_ota.cloud.store import NodeState
from rmaker_ota.demo.world import CHIP, CHIP_ID, FIRST_VERSION, FLASH_SIZE, IMAGE_SIZE, Outcome, Scenario, Show
from rmaker_ota.errors import DeviceError, OtaError
from rmaker_ota.esp_build import build_image
from rmaker_ota.install import ImagePolicy, Installer, Progress

PROJECT = "demo_sensor"
VERSION = "2.0.0"
COUNT = 2
CONSOLE_S = 10.0
READY = "main: ready"  # what the simulated application says when it runs

CHIPS = Scenario("chips", f"{COUNT} chips at serial ports, updated side by side", VERSION, NodeState.SUCCESS, VERSION)


def source_tree() -> Path | None:
    """Where the simulated chip is; None: this is an installed package."""
    root = Path(rmaker_ota.__file__).resolve().parents[2]
    return root if (root / "tests" / "sim" / "esp_chip" / "__main__.py").is_file() else None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A chip is done: its slot and version, or what went wrong."""

    name: str
    slot: str | None
    version: str | None
    bytes: int
    seconds: float
    problem: str | None = None


class _Chip:
    """A simulated chip in its boot loader, and the installation on it."""

    def __init__(self, name: str, directory: Path, root: Path, stack: contextlib.ExitStack) -> None:
        from rmaker_ota.targets.create import create_flash_image

        self.name = name
        self._done = 0
        flash = directory / f"{name}.bin"
        create_flash_image(flash, firmware(FIRST_VERSION), chip=CHIP, flash_size=FLASH_SIZE)
        log = stack.enter_context((directory / f"{name}.log").open("w"))
        self._process = subprocess.Popen(
            [
                *(*bound_to_this_process(), sys.executable, "-m", "tests.sim.esp_chip"),
                *("--chip", CHIP, "--flash", str(flash), "--pty"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=root,
            start_new_session=True,
        )
        stack.callback(self._end)
        assert self._process.stdout is not None
        self.port = self._process.stdout.readline().strip()
        if not self.port:
            raise DeviceError(
                f"the simulated chip {name} did not start: see {flash.with_suffix('.log')}", stage="target"
            )
        self.ask("release")  # the button was held at power-on: a pseudo terminal has no lines to reset the chip with

    def _end(self) -> None:
        end_process(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    @property
    def done(self) -> int:
        """Image bytes that are on their way or in flash."""
        return self._done

    def ask(self, command: str) -> dict[str, Any]:
        """Has the simulation do what a port cannot carry; its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def update(self, image: Path, ended: Callable[[_Ended], None]) -> None:
        """Installs an image, restarts the chip and waits for its application to say that it runs."""
        from rmaker_ota.targets.esp32_serial import Esp32SerialTarget

        def progress(now: Progress) -> None:
            self._done = now.bytes_written

        begun = time.monotonic()
        try:
            with Esp32SerialTarget(self.port, watch_s=CONSOLE_S, expect=READY, cache="none") as target:
                result = Installer(image, target, header_gate=ImagePolicy(target), on_progress=progress).run()
                seconds = time.monotonic() - begun
                boot = target.restart()
                app = None if boot.slot is None else target.describe(boot.slot)
                slot = None if boot.slot is None else boot.slot.name
                version = None if app is None else app.version
                console = target.last_console
                problem = None if console is not None and console.is_well else f"console of {self.name}: {console}"
            ended(_Ended(self.name, slot, version, result.bytes_read, seconds, problem))
        except (OtaError, OSError) as error:
            ended(_Ended(self.name, None, None, 0, time.monotonic() - begun, f"{self.name}: {error}"))


def firmware(version: str) -> bytes:
    return build_image(size=IMAGE_SIZE, version=version, project_name=PROJECT, chip_id=CHIP_ID)


def run(directory: Path, root: Path, show: Show) -> Outcome:
    """Starts the chips, updates them and ends them.

    Args:
        directory: for flash images and logs.
        root: the source tree.
    """
    outcome = Outcome(CHIPS)
    show.scenario(CHIPS)
    begun = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            _run(directory, root, show, outcome, stack)
    except (OtaError, OSError, ValueError) as error:
        outcome.problems.append(str(error))
    outcome.seconds = time.monotonic() - begun
    outcome.ok = not outcome.problems
    show.ended(outcome)
    return outcome


def _run(directory: Path, root: Path, show: Show, outcome: Outcome, stack: contextlib.ExitStack) -> None:
    image = directory / f"{PROJECT}-{VERSION}.bin"
    image.write_bytes(firmware(VERSION))
    begun = time.monotonic()
    chips = [_Chip(f"chip-{number}", directory, root, stack) for number in range(1, COUNT + 1)]
    for chip in chips:
        show.happened(time.monotonic() - begun, chip.name, FIRST_VERSION, f"simulated ESP32-C3 on {chip.port}")
    results: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
    for chip in chips:
        thread = threading.Thread(target=chip.update, args=(image, results.put), name=chip.name)
        thread.start()
        stack.callback(thread.join)
    endings = []
    for ended in _all(results, chips, show):
        endings.append(ended)
        if ended.problem is not None:
            outcome.problems.append(ended.problem)
            continue
        text = f"{ended.bytes} bytes in {ended.seconds:.1f} s into {ended.slot}; its console says that it runs"
        show.happened(time.monotonic() - begun, ended.name, ended.version or "-", text)
        if ended.version != VERSION:
            outcome.problems.append(f"{ended.name} runs {ended.version}, expected {VERSION}")
    if outcome.problems:
        return
    for chip in chips:
        counts = chip.ask("report")
        text = f"booted {counts['running']}, {counts['command_count']} commands"
        show.happened(time.monotonic() - begun, chip.name, "counted", text)
        if counts["running"] != endings[0].slot:
            outcome.problems.append(f"{chip.name} booted {counts['running']}, expected {endings[0].slot}")
    outcome.state = NodeState.SUCCESS.value
    outcome.running_version = VERSION
    outcome.slot = endings[0].slot
    outcome.bytes = sum(ended.bytes for ended in endings)
    outcome.download_seconds = max(ended.seconds for ended in endings)


def _all(results: queue.SimpleQueue[_Ended], chips: list[_Chip], show: Show) -> Iterator[_Ended]:
    """The chips as they end; what they have in common is shown meanwhile."""
    left = len(chips)
    while left:
        try:
            ended = results.get(timeout=0.1)  # people watch the bytes go by
        except queue.Empty:
            show.downloading(sum(chip.done for chip in chips), IMAGE_SIZE * len(chips))
            continue
        left -= 1
        yield ended
