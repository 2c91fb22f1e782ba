"""The double on its ports, as a process, and with apps that start, crash and are rolled back."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota import ota_core
from rmaker_ota.esp_build import build_image
from tests.sim.esp_chip import (
    App,
    BootedApp,
    Chip,
    DirectLink,
    Fault,
    Flash,
    LinkModel,
    Options,
    PtyLink,
    TcpLink,
    crashing_app,
    silent_app,
    slip,
    usual_app,
)
from tests.sim.esp_chip import opcodes as op
from tests.sim.esp_chip.host import SYNC_DATA, Host, pack, packet

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0
SLOTS = {"ota_0": 0x20000, "ota_1": 0x120000}
TABLE = f"""\
nvs, data, nvs, 0x9000, 0x4000
otadata, data, ota, 0xd000, 0x2000
ota_0, app, ota_0, {SLOTS["ota_0"]:#x}, 0x100000
ota_1, app, ota_1, {SLOTS["ota_1"]:#x}, 0x100000
"""


@pytest.fixture
def flash(tmp_path: Path) -> Iterator[Flash]:
    """With two slots, an app 1.0.0 in the first and 2.0.0 in the second."""
    flash = Flash(tmp_path / "flash.bin", 4 << 20)
    table = ota_core.partition_table_from_csv(TABLE, table_offset=0x8000, flash_size=4 << 20, bootloader_offset=0)
    data = ota_core.build_partition_table(table)
    flash[0x8000 : 0x8000 + len(data)] = data
    for (_, offset), version in zip(SLOTS.items(), ("1.0.0", "2.0.0"), strict=True):
        image = build_image(size=65536, version=version, project_name="lamp")
        flash[offset : offset + len(image)] = image
    yield flash
    flash.close()


def choose_second(flash: Flash) -> None:
    """As an update leaves it: the second slot is new and boots next."""
    with contextlib.closing(ota_core.EspTarget(flash.path, running="ota_0")) as esp:
        esp.set_boot("ota_1")


class Line:
    """A host's end of a pty or a socket."""

    def __init__(self, chip: Chip) -> None:
        if chip.port.startswith("socket://"):
            host, _, port = chip.port.removeprefix("socket://").rpartition(":")
            self._socket: socket.socket | None = socket.create_connection((host, int(port)))
            self.fd = self._socket.fileno()
        else:
            self._socket = None
            self.fd = os.open(chip.port, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(self.fd)
            attributes = termios.tcgetattr(self.fd)
            attributes[4] = attributes[5] = termios.B115200
            termios.tcsetattr(self.fd, termios.TCSANOW, attributes)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self.fd)

    def send(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def read_until(self, ending: bytes) -> bytes:
        """What came up to there, or until the port went."""
        data = b""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        while ending not in data:
            assert poller.poll(WAIT_S * 1000), f"only {data!r} came"
            try:
                more = os.read(self.fd, 4096)
            except OSError:
                more = b""
            if not more:
                return data
            data += more
        return data

    def sync(self) -> None:
        """Until the chip answers: it may take a moment until it sees that the port was opened."""
        self.send(slip.encode(packet(op.SYNC, SYNC_DATA)))
        assert self.read_until(b"\xc0" + b"\x01\x08").count(b"\x01\x08")


@pytest.mark.parametrize("tcp", [False, True])
def test_port_is_opened_again_and_again(flash: Flash, tcp: bool) -> None:
    with Chip("esp32c3", flash, TcpLink() if tcp else PtyLink()) as chip:
        for _ in range(5):
            with Line(chip) as line:
                line.sync()


def test_baud_rate_of_the_host_is_seen_on_a_pty(flash: Flash) -> None:
    with Chip("esp32c3", flash, PtyLink()) as chip, Line(chip) as line:
        line.sync()
        attributes = termios.tcgetattr(line.fd)
        attributes[4] = attributes[5] = termios.B460800
        termios.tcsetattr(line.fd, termios.TCSANOW, attributes)
        assert chip.link.host_baud() == 460800


@pytest.mark.parametrize("kind", ["uart", "usj"])
def test_port_goes_and_comes_back_under_another_name(flash: Flash, tmp_path: Path, kind: str) -> None:
    by_id = tmp_path / "by-id"
    with Chip("esp32c3", flash, PtyLink(by_id), link_model=LinkModel(kind=kind)) as chip:
        first = chip.port
        chip.faults.add(Fault("unplug-and-return", opcode=op.READ_REG))
        with Line(chip) as line:
            line.sync()
            line.send(slip.encode(packet(op.READ_REG, pack(0))))
            line.read_until(b"the end of the port")
            assert chip.wait_mode("rom", WAIT_S)
            assert chip.port != first
            assert str(by_id.readlink()) == chip.port
        with Line(chip) as line:
            line.sync()


def test_usb_port_re_enumerates_at_a_reset(flash: Flash) -> None:
    options = Options(button=False, re_enumerates=True)
    with Chip("esp32c3", flash, PtyLink(), link_model=LinkModel.usb("usj"), options=options) as chip:
        first = chip.port
        for dtr, rts in ((False, False), (True, False), (True, True), (False, True), (False, False)):
            chip.set_lines(dtr, rts)
        assert chip.wait_mode("rom", WAIT_S)
        assert chip.port != first
        with Line(chip) as line:
            line.sync()
        second = chip.port
        chip.set_lines(False, True)
        chip.set_lines(False, False)
        assert chip.wait_port(second, WAIT_S)
        with Line(chip) as line:
            assert b"Loaded app" in line.read_until(b"ready\r\n")  # the app waited for a host


def test_writing_blocks_when_the_line_takes_no_more(flash: Flash) -> None:
    with Chip("esp32c3", flash, PtyLink()) as chip, Line(chip) as line:
        line.sync()
        chip.faults.add(Fault("stall", opcode=op.READ_REG))
        line.send(slip.encode(packet(op.READ_REG, pack(0x40001000))))
        line.read_until(b"\x6f\x50\x31\x1b")
        os.set_blocking(line.fd, False)
        with pytest.raises(BlockingIOError):
            for _ in range(1000):
                os.write(line.fd, bytes(4096))


def test_answers_wait_for_their_time_when_told_to(flash: Flash) -> None:
    options = Options(real_time_scale=0.001)
    with Chip("esp32c3", flash, PtyLink(), options=options) as chip, Line(chip) as line:
        line.sync()
        line.send(slip.encode(packet(op.SPI_ATTACH, bytes(8))))
        line.read_until(b"\x01\x0d\x04\x00")
        chip.mark()
        line.send(slip.encode(packet(op.FLASH_BEGIN, pack(0x100000, 1, 0x400, 0, 0))))
        line.read_until(b"\x01\x02\x04\x00")
        assert chip.model_seconds > 256 * 0.045


def test_time_to_think_counts_when_measured(flash: Flash) -> None:
    chip = Chip("esp32c3", flash, DirectLink(), link_model=LinkModel(think="cpu", host_pid=os.getpid()))
    host = Host(chip)
    host.sync()
    chip.mark()
    host.one(op.READ_REG, pack(0))
    little = chip.model_seconds
    used = before = os.times().user
    while used - before < 0.1:
        used = os.times().user
    host.one(op.READ_REG, pack(0))
    assert chip.model_seconds - little > 0.09


# ---- boot ------------------------------------------------------------------------------------------------------------


def test_power_on_boots_the_app_and_shows_its_console(flash: Flash) -> None:
    chip = Chip("esp32c3", flash, DirectLink(), options=Options(button=False))
    assert chip.running is not None
    assert (chip.running.slot, chip.running.version, chip.running.project_name) == ("ota_0", "1.0.0", "lamp")
    assert b"SPI_FAST_FLASH_BOOT" in chip.console
    assert b"App version:      1.0.0\r\n" in chip.console
    choose_second(flash)
    booted = chip.boot()
    assert booted is not None
    assert booted.slot == "ota_1"


def test_a_new_app_that_crashes_is_rolled_back(flash: Flash) -> None:
    def apps(booted: BootedApp) -> App:
        return crashing_app(booted) if booted.version == "2.0.0" else usual_app(booted)

    choose_second(flash)
    chip = Chip("esp32c3", flash, DirectLink(), options=Options(button=False), app=apps)
    assert chip.running is not None
    assert chip.running.slot == "ota_0"
    assert chip.console.index(b"Guru Meditation") < chip.console.index(b"App version:      1.0.0")
    assert chip.counts.boots == 2


def test_an_app_that_confirms_itself_stays(flash: Flash) -> None:
    choose_second(flash)
    chip = Chip(
        "esp32c3", flash, DirectLink(), options=Options(button=False), app=lambda _: App(("hello",), confirms=True)
    )
    assert chip.running is not None
    assert chip.running.slot == "ota_1"
    again = chip.boot()
    assert again is not None
    assert again.slot == "ota_1"


def test_an_app_that_does_not_confirm_boots_once(flash: Flash) -> None:
    choose_second(flash)
    chip = Chip("esp32c3", flash, DirectLink(), options=Options(button=False), app=silent_app)
    slots = [chip.running and chip.running.slot]
    for _ in range(2):
        booted = chip.boot()
        slots.append(booted and booted.slot)
    assert slots == ["ota_1", "ota_0", "ota_0"]


def test_crash_loops_end(flash: Flash) -> None:
    chip = Chip("esp32c3", flash, DirectLink(), options=Options(button=False), app=crashing_app)
    assert chip.console.count(b"Guru Meditation") == 3


def test_empty_flash_boots_nothing(tmp_path: Path) -> None:
    flash = Flash(tmp_path / "empty.bin", 1 << 20)
    chip = Chip("esp32c3", flash, DirectLink(), options=Options(button=False))
    assert chip.running is None
    assert b"invalid header" in chip.console
    flash.close()


def test_boot_loader_may_be_asked_for(flash: Flash) -> None:
    chip = Chip("esp32c3", flash, DirectLink(), options=Options(button=False, needs_bootloader=True))
    assert chip.running is None
    flash[0:24] = build_image(size=4096, chip_id=5)[:24]
    assert chip.boot() is not None


# ---- process ---------------------------------------------------------------------------------------------------------


def test_process_prints_its_port_takes_commands_and_reports(flash: Flash, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "tests.sim.esp_chip",
        "--chip",
        "esp32c3",
        "--flash",
        str(flash.path),
        "--tcp",
        "0",
    ]
    with subprocess.Popen(
        [*command, "--json-report", str(report), "--fault", "lose-reply,opcode=0x0a"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.startswith("socket://127.0.0.1:")

        def tell(text: str) -> dict[str, object]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(text + "\n")
            process.stdin.flush()
            answer: dict[str, object] = json.loads(process.stdout.readline())
            return answer

        host, _, number = port.removeprefix("socket://").rpartition(":")
        with socket.create_connection((host, int(number))) as line:
            line.settimeout(WAIT_S)
            line.sendall(slip.encode(packet(op.SYNC, SYNC_DATA)))
            got = b""
            while got.count(b"\x01\x08\x04\x00") < 8:
                got += line.recv(4096)
        assert tell("boot") == {"mode": "app", "port": port, "running": "ota_0"}
        assert tell("download")["mode"] == "rom"
        assert "error" in tell("dance")
        assert tell("report")["frames_in"] == 1
        assert tell("mark")["mode"] == "rom"
        process.stdin.write("quit\n")
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
    saved = json.loads(report.read_text())
    assert saved["frames_in"] == 0
    assert saved["faults_fired"] == [["lose-reply", 0]]
