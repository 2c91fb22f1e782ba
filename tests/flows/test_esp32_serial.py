"""A chip on a serial port, from the command line and the target, over the double: look, install, roll back, flash.

The double's pseudo terminal carries no control lines: the target drives the chip's pins as a gateway does by GPIO. The
command line cannot, and asks the watchdog to restart the chip.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rmaker_ota.cli import cli, errors
from rmaker_ota.errors import (
    ArgumentError,
    ConfigError,
    DeviceError,
    DigestError,
    NotFoundError,
    OtaError,
    RejectedError,
    SlotRunningError,
    StateError,
    TargetError,
    UnsupportedError,
)
from rmaker_ota.esp_build import build_image
from rmaker_ota.install import ImagePolicy, Installer, InstallOptions
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import BootState
from rmaker_ota.targets.create import create_flash_image
from rmaker_ota.targets.esp32_serial import Esp32SerialTarget
from tests.sim.esp_chip import App, BootedApp, Chip, Fault, Flash, LinkModel, Options, PtyLink, TcpLink, usual_app
from tests.sim.esp_chip.opcodes import FLASH_DEFL_DATA

SIZE = 1 << 20
APP_SIZE = 150_000
CHIP = "esp32c3"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(version: str, *, chip_id: int = 5, project: str = "lamp", secure_version: int = 0) -> bytes:
    return build_image(
        size=APP_SIZE, version=version, project_name=project, chip_id=chip_id, secure_version=secure_version
    )


class Bench:
    """Chips on ports, closed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()

    def chip(
        self,
        version: str = "1.0.0",
        *,
        persona: str = CHIP,
        app: Callable[[BootedApp], App] = usual_app,
        tcp: bool = False,
        factory: bool = False,
        blank: bool = False,
        pty_link: Path | None = None,
        **options: Any,
    ) -> Chip:
        number = len(list(self.folder.glob("*.bin")))
        path = self.folder / f"chip{number}.bin"
        if not blank:
            chip_id = {"esp32c3": 5, "esp32s3": 9, "esp32": 0, "esp32c6": 13}[persona]
            create_flash_image(path, image(version, chip_id=chip_id), chip=persona, flash_size=SIZE, factory=factory)
        flash = Flash(path, SIZE if blank else None)
        self.stack.callback(flash.close)
        link = TcpLink(0) if tcp else PtyLink(pty_link)
        options.setdefault("button", False)
        made = Chip(persona, flash, link, link_model=LinkModel(), options=Options(**options), app=app)
        return self.stack.enter_context(made)

    def target(self, board: Chip, *, port: str | None = None, **options: Any) -> Esp32SerialTarget:
        options.setdefault("cache", "none")
        options.setdefault("on_lines", board.set_lines)
        return self.stack.enter_context(Esp32SerialTarget(port or board.port, **options))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    with made.stack:
        yield made


def install(target: Esp32SerialTarget, app: bytes, **options: Any) -> Any:
    return Installer(app, target, options=InstallOptions(**options), header_gate=ImagePolicy(target)).run()


# ---- Looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persona", ["esp32", "esp32s3", "esp32c3", "esp32c6"])
@pytest.mark.parametrize("stub", ["auto", "none"])
def test_a_chip_tells_what_it_is_and_what_runs(bench: Bench, persona: str, stub: str) -> None:
    chip = bench.chip(persona=persona)
    assert chip.wait_mode("app")
    target = bench.target(chip, stub=stub)
    running = target.running_slot()
    assert running is not None
    assert running.name == "ota_0"
    assert target.next_slot().name == "ota_1"
    app = target.describe(running)
    assert app is not None
    assert (app.project_name, app.version) == ("lamp", "1.0.0")
    info = target.chip
    assert info.chip == persona
    assert (info.stub is None) == (stub == "none")
    assert info.flash_size == SIZE
    assert info.mac == ":".join(f"{byte:02x}" for byte in chip.mac)
    assert target.verify_image_rules()["chip_id"] == info.chip_id
    target.close()
    assert chip.wait_mode("app")


def test_looking_stops_the_chip_once_and_it_runs_afterwards(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip)
    target.running_slot()
    assert target.is_held
    assert chip.mode in {"rom", "stub"}
    target.release()
    assert not target.is_held
    assert chip.wait_mode("app")
    resets = chip.counts.resets
    running = target.running_slot()
    assert running is not None
    app = target.describe(running)
    assert app is not None
    assert app.version == "1.0.0"
    assert target.next_slot().name == "ota_1"
    assert target.describe(target.next_slot()) is None
    assert target.verify_image_rules()["slot_size"] == target.next_slot().size
    assert not target.can_rollback()
    assert chip.counts.resets == resets
    assert chip.mode == "app"


def test_a_look_writes_nothing_to_a_chip_that_runs_well(bench: Bench) -> None:
    chip = bench.chip()
    chip.wait_mode("app")  # the first boot writes otadata
    with Esp32SerialTarget(chip.port, cache="none", on_lines=chip.set_lines) as target:
        target.running_slot()
        before = chip.flash.content()
        assert target.preview().slot == target.running_slot()
    assert chip.wait_mode("app")
    assert chip.flash.content() == before


def test_a_chip_on_trial_that_is_looked_at_keeps_its_trial(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip)
    install(target, image("2.0.0"))
    target.close()
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.slot == "ota_1"
    again = bench.target(chip)
    slot = again.running_slot()
    assert slot is not None
    assert slot.name == "ota_1"
    assert again.boot_state(slot) is BootState.PENDING_VERIFY
    again.close()
    assert chip.wait_mode("app")
    assert chip.running.slot == "ota_1"
    last = bench.target(chip)
    last.mark_valid()
    last.close()
    chip.power_cycle()
    assert chip.wait_mode("app")
    assert chip.running.slot == "ota_1"


def test_a_chip_that_crashes_on_trial_is_rolled_back_by_its_boot_loader(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip)
    install(target, image("2.0.0"))
    target.close()
    assert chip.wait_mode("app")
    chip.power_cycle()
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.version == "1.0.0"
    again = bench.target(chip)
    slot = again.running_slot()
    assert slot is not None
    assert slot.name == "ota_0"


# ---- Installing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stub", ["auto", "none"])
def test_an_update_is_installed_restarted_and_confirmed(bench: Bench, stub: str) -> None:
    chip = bench.chip()
    target = bench.target(chip, stub=stub)
    new = image("2.0.0")
    result = install(target, new)
    assert (result.slot, result.version, result.activated) == ("ota_1", "2.0.0", True)
    slot = target.slot("ota_1")
    assert chip.flash[slot.offset : slot.offset + len(new)] == new
    report = target.restart()
    assert report.slot == slot
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.version == "2.0.0"
    assert target.running_slot() == slot
    assert target.boot_state(slot) is BootState.PENDING_VERIFY
    target.mark_valid()
    assert target.boot_state(slot) is BootState.VALID
    target.release()
    assert chip.wait_mode("app")
    assert chip.running.version == "2.0.0"
    assert target.next_slot().name == "ota_0"


def crashes_from(version: str) -> Callable[[BootedApp], App]:
    def app(booted: BootedApp) -> App:
        usual = usual_app(booted)
        return App(usual.lines[:1], crashes=True) if booted.version == version else usual

    return app


def test_an_image_whose_console_shows_a_crash_is_rolled_back(bench: Bench) -> None:
    chip = bench.chip(app=crashes_from("2.0.0"))
    target = bench.target(chip, watch_s=20, expect="ready")
    install(target, image("2.0.0"))
    report = target.restart()
    assert report.slot is not None
    assert report.slot.name == "ota_0"
    assert any("Guru Meditation Error" in reason for reason in report.reasons)
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.version == "1.0.0"
    assert target.running_slot() == report.slot
    chip.power_cycle()
    assert chip.wait_mode("app")
    assert chip.running.version == "1.0.0"


def test_an_image_whose_console_says_ready_stays(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip, watch_s=20, expect="main: ready")
    install(target, image("2.0.0"))
    report = target.restart()
    assert report.slot is not None
    assert report.slot.name == "ota_1"
    assert report.reasons[-1] == "the console is well: I (812) main: ready"
    target.mark_valid()
    target.close()
    chip.power_cycle()
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.version == "2.0.0"


def test_an_image_for_another_chip_changes_nothing(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip)
    target.running_slot()
    before = chip.flash.content()
    for app, error in (
        (image("2.0.0", chip_id=9), OtaError),
        (image("2.0.0", project="oven"), RejectedError),
        (image("1.0.0"), RejectedError),
        (b"no image" * 1000, OtaError),
    ):
        with pytest.raises(error):
            install(target, app)
        assert chip.flash.content() == before
        assert chip.wait_mode("app")  # it was let go


def test_the_running_slot_is_never_written(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip)
    running = target.running_slot()
    assert running is not None
    with pytest.raises(SlotRunningError):
        target.open_sink(running)


def test_a_second_program_is_told_who_has_the_port(bench: Bench) -> None:
    chip = bench.chip()
    bench.target(chip)
    with pytest.raises(DeviceError, match=r"in use by .*process") as caught:
        bench.target(chip)
    assert caught.value.status == "ERR_BUSY"


def test_a_closed_target_says_so(bench: Bench) -> None:
    target = bench.target(bench.chip())
    target.close()
    target.close()
    with pytest.raises(StateError, match="closed"):
        target.running_slot()


def test_a_chip_without_a_table_is_an_error_that_says_so(bench: Bench) -> None:
    chip = bench.chip(blank=True, button=True)
    target = bench.target(chip)
    with pytest.raises(OtaError):
        target.running_slot()
    assert target.chip.chip == CHIP


def test_secure_download_mode_is_told(bench: Bench) -> None:
    chip = bench.chip(secure_download=True, button=True)
    target = bench.target(chip, chip=CHIP)
    with pytest.raises(UnsupportedError, match="secure download mode"):
        target.running_slot()


# ---- The command line ------------------------------------------------------------------------------------------------


def run(*args: str, code: int = 0) -> Result:
    """A command line with the program's own exit codes."""
    result = CliRunner().invoke(cli, args, standalone_mode=False)
    exc = result.exception
    got = errors.exit_code(exc) if exc is not None else result.return_value or 0
    assert got == code, (exc, result.output)
    return result


def uri(chip: Chip) -> str:
    return f"esp32-serial:{chip.port}?cache=none"


def test_install_inspect_and_mark_from_the_command_line(bench: Bench, tmp_path: Path) -> None:
    chip = bench.chip(button=True)
    new = tmp_path / "lamp-2.0.0.bin"
    new.write_bytes(image("2.0.0"))
    out = run("install", str(new), uri(chip)).output
    assert "installed lamp 2.0.0 into ota_1" in out
    found = json.loads(run("inspect", uri(chip), "--json").output)
    assert found["chip"]["chip"] == CHIP
    assert found["chip"]["mac"] == ":".join(f"{byte:02x}" for byte in chip.mac)
    assert found["stub"]["used"] == CHIP
    assert found["stub"]["release"]
    assert [slot["app"]["version"] for slot in found["slots"]] == ["1.0.0", "2.0.0"]
    text = run("inspect", uri(chip)).output
    assert "of release" in text
    assert "installed esptool" in text
    text = run("inspect", uri(chip) + "&stub=none").output
    assert "none, the boot ROM alone" in text


def test_images_are_flashed_at_offsets_compared_and_read_back(bench: Bench, tmp_path: Path) -> None:
    chip = bench.chip(blank=True, button=True)
    whole = bench.folder / "whole"
    create_flash_image(whole, image("1.0.0"), chip=CHIP, flash_size=SIZE)
    part = whole.read_bytes()[0x8000:0x60000]
    file = tmp_path / "merged"
    file.write_bytes(part)
    out = run("flash", chip.port, "0x8000", str(file)).output
    assert "verified" in out
    assert chip.flash[0x8000:0x60000] == part
    assert "were there already" in run("flash", chip.port, "0x8000", str(file)).output
    run("flash", chip.port, "0x8000", str(file), "--verify")
    read = tmp_path / "read"
    run("flash", chip.port, "--read", "0x8000:0x58000", "--output", str(read))
    assert read.read_bytes() == part
    run("flash", chip.port, "--erase", "0x20000:64K")
    assert chip.flash[0x20000:0x30000] == b"\xff" * 0x10000
    result = run("flash", chip.port, "0x8000", str(file), "--verify", code=1)
    assert isinstance(result.exception, DigestError)


def test_many_chips_are_flashed_and_one_that_fails_concerns_no_other(bench: Bench, tmp_path: Path) -> None:
    chips = [bench.chip(blank=True, button=True) for _ in range(3)]
    chips.append(bench.chip(blank=True, button=True, persona="esp32s3"))
    file = tmp_path / "app"
    file.write_bytes(image("1.0.0"))
    ports = ",".join([*(chip.port for chip in chips), "/dev/ttyUSB9999"])
    result = CliRunner().invoke(cli, ["flash", ports, "0x20000", str(file), "--json"], standalone_mode=False)
    assert result.return_value == errors.ExitCode.REJECTED
    rows = json.loads(result.stdout)
    assert [row["error"] and row["error"]["status"] for row in rows] == [
        None,
        None,
        None,
        "ERR_IMAGE_CHIP",
        "ERR_NOT_FOUND",
    ]
    for chip in chips[:3]:
        assert chip.flash[0x20000 : 0x20000 + APP_SIZE] == file.read_bytes()
    assert chips[3].flash[0x20000:0x30000] == b"\xff" * 0x10000


def test_ports_tells_chip_slot_and_version(bench: Bench) -> None:
    chip = bench.chip(button=True)
    (row,) = json.loads(run("ports", chip.port, "--json").output)
    assert row["probe"]["chip"] == CHIP
    assert (row["probe"]["slot"], row["probe"]["project"], row["probe"]["version"]) == ("ota_0", "lamp", "1.0.0")
    text = run("ports", chip.port).output
    assert "lamp 1.0.0" in text
    (row,) = json.loads(run("ports", "/dev/ttyUSB9999", "--json").output)
    assert row["probe"]["error"]["status"] == "ERR_NOT_FOUND"
    (row,) = json.loads(run("ports", chip.port, "--no-probe", "--json").output)
    assert "probe" not in row


def test_a_chip_over_tcp_is_reached_without_control_lines(bench: Bench) -> None:
    chip = bench.chip(tcp=True, button=True)
    with open_target(f"esp32-serial:{chip.port}?cache=none") as target:
        running = target.running_slot()
        assert running is not None
        assert running.name == "ota_0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?baud=9600",
        "/dev/x?baud=fast",
        "/dev/x?speed=1",
        "/dev/x?rollback=maybe",
        "/dev/x?baud=3",
        "/dev/x?watch_s=-1",
        "/dev/x?expect=(",
    ],
)
def test_options_that_cannot_be_are_refused_before_a_port_is_opened(text: str) -> None:
    with pytest.raises((ArgumentError, ConfigError)):
        open_target(f"esp32-serial:{text}")


def test_a_port_that_is_not_there_is_told() -> None:
    with pytest.raises(NotFoundError, match="/dev/ttyUSB9999"):
        open_target("esp32-serial:/dev/ttyUSB9999")


# ---- Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 3, 8])
def test_a_chip_that_is_unplugged_for_good_while_it_is_written_boots_the_old_image(bench: Bench, nth: int) -> None:
    chip = bench.chip()
    target = bench.target(chip, reconnects=1, reopen_s=0)
    target.running_slot()
    chip.faults.add(Fault("unplug", opcode=FLASH_DEFL_DATA, nth=nth))
    with pytest.raises(OtaError):
        install(target, image("2.0.0"))
    chip.power_cycle(download=False)
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.version == "1.0.0"


@pytest.mark.parametrize("nth", [1, 3, 8])
def test_a_chip_that_is_plugged_in_again_under_another_name_is_written_on(bench: Bench, nth: int) -> None:
    chip = bench.chip(pty_link=bench.folder / "by-id")
    target = bench.target(chip, port=str(bench.folder / "by-id"))
    target.running_slot()
    before = chip.port
    chip.faults.add(Fault("unplug-and-return", opcode=FLASH_DEFL_DATA, nth=nth))
    new = image("2.0.0")
    install(target, new)
    assert chip.port != before
    slot = target.slot("ota_1")
    assert chip.flash[slot.offset : slot.offset + len(new)] == new
    report = target.restart()
    assert report.slot == slot
    assert chip.wait_mode("app")
    assert chip.running is not None
    assert chip.running.version == "2.0.0"


def test_an_image_that_is_there_already_is_not_sent_again(bench: Bench) -> None:
    chip = bench.chip()
    target = bench.target(chip)
    new = image("2.0.0")
    first = install(target, new, activate=False)
    again = install(target, new)
    assert first.bytes_written >= len(new)
    assert again.bytes_written == 0
    assert target.restart().slot == target.slot("ota_1")


def test_a_rolled_back_install_fails_the_command(bench: Bench) -> None:
    chip = bench.chip(app=crashes_from("2.0.0"))
    target = bench.target(chip, watch_s=20)
    install(target, image("2.0.0"))
    from rmaker_ota.cli.install import confirm

    with pytest.raises(TargetError, match=r"ota_1 was rolled back: the console is not well: .*; ota_0 runs again"):
        confirm(target, "ota_1")
