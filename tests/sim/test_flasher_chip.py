"""The flasher on the double, beside the usual flashing tool on another: both leave the same flash behind.

The flasher is the C program ``flash_port.c``, under sanitizers; port, line and chip are those a device would be.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.csrc import csrc_build
from tests.sim.esp_chip import Chip, Fault, Flash, LinkModel, PtyLink, TcpLink
from tests.sim.esp_chip import opcodes as op
from tests.sim.esp_chip.stubs import stub_images
from tests.sim.test_esp_chip_esptool import esptool, image

CHIPS = ("esp32", "esp32s2", "esp32s3", "esp32c2", "esp32c3", "esp32c5", "esp32c6", "esp32h2", "esp32p4")
SIZE = 4 << 20


@pytest.fixture(scope="module")
def program() -> Path:
    return csrc_build.build(Path(__file__).with_name("flash_port.c"), csrc_build.Toolchain()).path


@contextmanager
def chip_with(
    path: Path, name: str, content: bytes = b"", *, tcp: bool = False, model: LinkModel | None = None
) -> Iterator[Chip]:
    flash = Flash(path, SIZE)
    flash[0 : len(content)] = content
    with Chip(name, flash, TcpLink() if tcp else PtyLink(), link_model=model) as chip:
        yield chip
    flash.close()


class Failed(Exception):
    """The flasher gave up; the text is what it said."""


def flash_port(
    program: Path, folder: Path, chip: Chip, *commands: object, stub: bool = True, baud: int = 115200
) -> dict[str, int]:
    """Runs the flasher; its counts."""
    args = [str(program), chip.port, chip.persona.name, str(baud)]
    if stub:
        (loaded,) = [image for image in stub_images(chip.persona.name) if image.version == 2]
        args.append(hex(loaded.entry))
        for number in range(2):
            address, data = loaded.segments[number] if number < len(loaded.segments) else (0, b"")
            file = folder / f"stub{number}.bin"
            file.write_bytes(data)
            args += [hex(address), str(file)]
    else:
        args.append("-")
    done = subprocess.run(
        [*args, *map(str, commands)],
        env={**os.environ, **csrc_build.RUN_ENV},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    if done.returncode:
        assert done.stdout.startswith("error: ") or "\nerror: " in done.stdout, done.stdout + done.stderr
        raise Failed(done.stdout)
    return {name: int(number) for name, number in re.findall(r"(commands|retries|out) (\d+)", done.stdout)}


@pytest.mark.parametrize("stub", [True, False], ids=["stub", "rom"])
@pytest.mark.parametrize(("seed", "name"), list(enumerate(CHIPS)))
def test_flasher_and_esptool_leave_the_same_flash(
    tmp_path: Path, program: Path, seed: int, name: str, stub: bool
) -> None:
    rng = random.Random(1000 + seed)
    content = rng.randbytes(65536) * 16
    layout: list[object] = []
    ours: list[object] = []
    sector = rng.randrange(16)
    for number in range(rng.randrange(2, 5)):
        size = rng.choice((4095, 4096, 4097, 65536, rng.randrange(1, 90_000)))
        path = image(tmp_path, size, 100 * seed + number)
        layout += [hex(sector * 4096), path]
        ours += [rng.choice(("write", "deflate")), hex(sector * 4096), path]
        sector += (size + 4095) // 4096 + rng.choice((0, 1, 17))
    with chip_with(tmp_path / "theirs.bin", name, content) as chip:
        esptool(chip, "write-flash", *layout, stub=stub)
        chip.settle()
        theirs = chip.flash.content()
    with chip_with(tmp_path / "ours.bin", name, content) as chip:
        flash_port(program, tmp_path, chip, *ours, stub=stub)
        assert chip.mode == ("stub" if stub else "rom")
        assert chip.flash.content() == theirs
        assert chip.counts.frames_lost == 0


@pytest.mark.parametrize("tcp", [False, True], ids=["pty", "socket"])
@pytest.mark.parametrize("baud", [921600, 2_000_000])
@pytest.mark.parametrize("name", ["esp32", "esp32c2", "esp32c3"])
def test_flasher_raises_the_rate(tmp_path: Path, program: Path, name: str, baud: int, tcp: bool) -> None:
    path = image(tmp_path, 60_000, 5)
    with chip_with(tmp_path / "flash.bin", name, tcp=tcp) as chip:
        counts = flash_port(program, tmp_path, chip, "deflate", 0x10000, path, baud=baud)
        assert chip.flash[0x10000 : 0x10000 + 60_000] == path.read_bytes()
        assert chip.report()["baud"] == pytest.approx(115200 if tcp else baud, rel=0.02)
        assert counts["retries"] == 0


@pytest.mark.parametrize("name", CHIPS)
def test_flasher_connects_in_at_most_twenty_commands(tmp_path: Path, program: Path, name: str) -> None:
    with chip_with(tmp_path / "flash.bin", name) as chip:
        flash_port(program, tmp_path, chip, "info", baud=921600)
        assert chip.report()["command_count"] <= 20


def test_flasher_erases_programs_and_resets(tmp_path: Path, program: Path) -> None:
    (tmp_path / "few.bin").write_bytes(bytes(range(32)))
    with chip_with(tmp_path / "flash.bin", "esp32c3", bytes(0x40000)) as chip:
        flash_port(program, tmp_path, chip, "erase", 0x8000, 0x19000, "program", 0x9010, tmp_path / "few.bin", "info")
        expected = bytearray(0x40000)
        expected[0x8000:0x21000] = b"\xff" * 0x19000
        expected[0x9010:0x9030] = bytes(range(32))
        assert chip.flash[0:0x40000] == expected
        chip.options.button = False
        flash_port(program, tmp_path, chip, "reset")
        assert chip.wait_mode("app")


FAULTS = [
    Fault("flip-byte", opcode=op.FLASH_DEFL_DATA, position=3000, value=1),
    Fault("lose-byte", opcode=op.FLASH_DEFL_DATA, position=3000),
    Fault("double-byte", opcode=op.FLASH_DEFL_DATA, position=17),
    Fault("insert-byte", opcode=op.FLASH_DEFL_DATA, position=3000, value=0xC0),
    Fault("lose-byte", opcode=op.FLASH_DEFL_DATA, position=3),
    Fault("lose-reply", opcode=op.FLASH_DATA, nth=2),
    Fault("lose-reply", opcode=op.READ_REG, nth=2),
    Fault("lose-frame", opcode=op.MEM_DATA),
    Fault("lose-frame", opcode=op.FLASH_DEFL_BEGIN),
    Fault("flip-byte", opcode=op.MEM_DATA, position=500, value=2),
    Fault("reply-flip-byte", opcode=op.FLASH_DEFL_DATA, position=8, value=1),
    Fault("reply-lose-byte", opcode=op.SPI_FLASH_MD5, position=12),
    Fault("reply-after-garbage", nth=5, count=20),
    Fault("wrong-md5"),
    Fault("reset", opcode=op.FLASH_DATA, nth=2),
    Fault("reset-to-app", opcode=op.FLASH_DATA, nth=2),
    Fault("hang", opcode=op.FLASH_END),
    Fault("unplug", opcode=op.FLASH_DATA, nth=2),
    Fault("power-cut", opcode=op.FLASH_DATA, nth=2),
    Fault("no-ohai"),
    Fault("no-mem-end-reply", opcode=op.MEM_END),
    Fault("wrong-baud"),
]


def test_flasher_never_takes_a_wrong_flash_for_a_right_one(tmp_path: Path, program: Path) -> None:
    """Whatever happens: what it says is in flash is there, and what it does not say it has said why.

    All at once, because the flasher waits in vain most of the time.
    """
    path = image(tmp_path, 60_000, 6)

    def run(number: int) -> str:
        fault = replace(FAULTS[number])
        folder = tmp_path / str(number)
        folder.mkdir()
        command = "write" if fault.opcode in (op.FLASH_DATA, op.FLASH_END) else "deflate"
        said = ""
        with chip_with(folder / "flash.bin", "esp32c3", bytes(0x40000)) as chip:
            chip.faults.add(fault)
            try:
                flash_port(program, folder, chip, command, 0x10000, path, baud=921600)
            except Failed as failed:
                said = str(failed)
                if not re.search(r"^error: ERR_\w+: .{20,}|^error: MD5 differs", said, re.MULTILINE):
                    return f"{fault}: says only {said}"
            else:
                if chip.flash[0x10000 : 0x10000 + 60_000] != path.read_bytes():
                    return f"{fault}: wrong content, taken for right"
        return "" if fault.fired else f"{fault}: never happened; {said}"

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        assert [result for result in pool.map(run, range(len(FAULTS))) if result] == []


def test_flasher_goes_on_after_faults_that_can_be_mended(tmp_path: Path, program: Path) -> None:
    path = image(tmp_path, 60_000, 7)
    for fault in (
        Fault("lose-reply", opcode=op.READ_REG),
        Fault("reply-after-garbage", nth=5, count=20),
        Fault("reply-flip-byte", opcode=op.READ_REG, position=1, value=8),
        Fault("no-mem-end-reply"),
    ):
        with chip_with(tmp_path / "flash.bin", "esp32c3") as chip:
            chip.faults.add(fault)
            flash_port(program, tmp_path, chip, "deflate", 0x10000, path, baud=921600)
            assert fault.fired
