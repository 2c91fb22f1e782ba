"""Cross-check: the usual flashing tool, as installed, takes the double for a chip and agrees on what is in flash."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.sim.esp_chip import Chip, Flash, LinkModel, Options, PtyLink, TcpLink

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
