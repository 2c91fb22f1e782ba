"""Cross-check: the usual flashing tool, as installed, takes the double for a chip and agrees on what is in flash."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.sim.esp_chip import Chip, Fault, Flash, LinkModel, Options, PtyLink, TcpLink

ESPTOOL = Path(sys.executable).parent / "esptool"
CHIPS = ("esp32", "esp32s3", "esp32c3", "esp32c6")
MAC = "a0:b1:c2:d3:e4:f5"


@contextmanager
def chip_on_port(
    folder: Path, name: str = "esp32c3", *, tcp: bool = False, model: LinkModel | None = None, **options: object
) -> Iterator[Chip]:
    flash = Flash(folder / "flash.bin", 4 << 20)
    with Chip(
        name,
        flash,
        TcpLink() if tcp else PtyLink(),
        link_model=model,
        options=Options(**options),  # type: ignore[arg-type]
    ) as chip:
        yield chip
    flash.close()


def esptool(chip: Chip, *args: object, stub: bool = True, baud: int = 115200, fails: bool = False) -> str:
    """Runs the tool on the chip's port."""
    command = [str(ESPTOOL), "--port", chip.port, "--before=no-reset", "--after=no-reset", f"--baud={baud}"]
    if not stub:
        command.append("--no-stub")
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def image(folder: Path, size: int, seed: int) -> Path:
    """Half of it compresses well."""
    rng = random.Random(seed)
    data = b"".join(
        rng.randbytes(256) + bytes(rng.randrange(256) for _ in range(8)) * 32 for _ in range(size // 512 + 1)
    )
    path = folder / f"image-{seed}.bin"
    path.write_bytes(data[:size])
    return path


@pytest.mark.parametrize("stub", [True, False], ids=["stub", "rom"])
@pytest.mark.parametrize("name", CHIPS)
def test_esptool_finds_chip_and_flash(tmp_path: Path, name: str, stub: bool) -> None:
    with chip_on_port(tmp_path, name) as chip:
        text = esptool(chip, "flash-id", stub=stub)
        assert MAC in text
        assert f"Connected to {name.upper().replace('ESP32', 'ESP32-', 1).rstrip('-')} on" in text
        assert "Manufacturer: ef" in text and "Device: 4016" in text and "4MB" in text
        assert chip.mode == ("stub" if stub else "rom")


@pytest.mark.parametrize("mode", ["--compress", "--no-compress"])
@pytest.mark.parametrize("stub", [True, False], ids=["stub", "rom"])
@pytest.mark.parametrize("name", CHIPS)
def test_esptool_writes_what_was_meant(tmp_path: Path, name: str, stub: bool, mode: str) -> None:
    path = image(tmp_path, 100_000, 1)
    with chip_on_port(tmp_path, name) as chip:
        chip.flash[0x10000 : 0x10000 + 0x20000] = bytes(range(256)) * 512  # what was there before
        esptool(chip, "write-flash", mode, 0x10000, path, stub=stub)
        chip.settle()
        data = path.read_bytes()
        assert chip.flash[0x10000 : 0x10000 + len(data)] == data
        assert chip.flash[0x30000:0x31000] == b"\xff" * 0x1000  # beyond: untouched
        esptool(chip, "verify-flash", 0x10000, path, stub=stub)


@pytest.mark.parametrize("baud", [460800, 921600, 1_500_000, 2_000_000])
@pytest.mark.parametrize("stub", [True, False], ids=["stub", "rom"])
@pytest.mark.parametrize("name", ["esp32", "esp32c3"])
def test_esptool_raises_the_baud_rate(tmp_path: Path, name: str, stub: bool, baud: int) -> None:
    path = image(tmp_path, 20_000, 3)
    with chip_on_port(tmp_path, name) as chip:
        esptool(chip, "write-flash", 0x10000, path, stub=stub, baud=baud)
        assert chip.flash[0x10000 : 0x10000 + 20_000] == path.read_bytes()
        assert chip.report()["baud"] == pytest.approx(baud, rel=0.02)


@pytest.mark.parametrize("tcp", [False, True], ids=["pty", "socket"])
def test_esptool_reads_erases_and_comes_again(tmp_path: Path, tcp: bool) -> None:
    path = image(tmp_path, 70_000, 2)
    copy = tmp_path / "copy.bin"
    with chip_on_port(tmp_path, tcp=tcp) as chip:
        esptool(chip, "write-flash", 0x20000, path)
        esptool(chip, "read-flash", 0x20000, 70_000, copy)
        assert copy.read_bytes() == path.read_bytes()
        esptool(chip, "erase-region", 0x21000, 0x3000)
        data = bytearray(path.read_bytes())
        data[0x1000:0x4000] = b"\xff" * 0x3000
        assert chip.flash[0x20000 : 0x20000 + 70_000] == data
        assert chip.mode == "stub"  # it stays until a reset
        chip.power_cycle()
        esptool(chip, "read-flash", 0x20000, 4096, copy, stub=False)
        assert copy.read_bytes() == data[:4096]


@pytest.mark.parametrize("stub", [True, False], ids=["stub", "rom"])
@pytest.mark.parametrize(("seed", "name"), list(enumerate((*CHIPS, "esp32s2", "esp32h2"))))
def test_esptool_writes_random_images_in_random_layouts(tmp_path: Path, seed: int, name: str, stub: bool) -> None:
    """All of the flash is as it should be: sectors that were written to, and no others."""
    rng = random.Random(seed)
    with chip_on_port(tmp_path, name) as chip:
        expected = bytearray(rng.randbytes(65536) * 64)
        chip.flash[: len(expected)] = bytes(expected)
        layout: list[object] = []
        sector = rng.randrange(32)
        for number in range(rng.randrange(2, 5)):
            size = rng.choice((1, 4095, 4096, 4097, 65536, rng.randrange(1, 90_000)))
            path = image(tmp_path, size, 100 * seed + number)
            offset = sector * 4096
            layout += [hex(offset), path]
            sectors = (size + 4095) // 4096
            expected[offset : offset + sectors * 4096] = path.read_bytes().ljust(sectors * 4096, b"\xff")
            sector += sectors + rng.choice((0, 1, 17))
        esptool(chip, "write-flash", rng.choice(("--compress", "--no-compress")), *layout, stub=stub)
        chip.settle()
        assert chip.flash.content() == expected


def test_esptool_notices_what_the_double_does_wrong(tmp_path: Path) -> None:
    path = image(tmp_path, 50_000, 4)
    for prepare in (
        lambda chip: chip.faults.add(Fault("wrong-md5")),
        lambda chip: chip.flash.faults.dead_bytes.update(range(0x12000, 0x12100)),
    ):
        with chip_on_port(tmp_path) as chip:
            prepare(chip)
            esptool(chip, "write-flash", "--compress", 0x10000, path, fails=True)


def test_esptool_sends_a_spoilt_block_again(tmp_path: Path) -> None:
    """The stub refuses it before it does anything with it, so that is right."""
    path = image(tmp_path, 50_000, 4)
    with chip_on_port(tmp_path) as chip:
        chip.faults.add(Fault("flip-byte", opcode=0x11, position=2000, value=1))
        esptool(chip, "write-flash", "--compress", 0x10000, path)
        assert chip.report()["faults_fired"] == [("flip-byte", 1)]
        assert chip.flash[0x10000 : 0x10000 + 50_000] == path.read_bytes()


def test_esptool_resets_by_the_watchdog(tmp_path: Path) -> None:
    with chip_on_port(tmp_path, "esp32s3", button=True) as chip:
        esptool(chip, "flash-id")
        chip.options.button = False
        esptool(chip, "--after=watchdog-reset", "flash-id")
        assert chip.wait_mode("app")
