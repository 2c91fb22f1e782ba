"""``rmaker-ota flash PORT [OFFSET FILE]...``: write, check, read and erase flash at offsets, on one chip or many."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from rmaker_ota.cli import errors, output
from rmaker_ota.cli.serial_options import FlashNumber, port_list, serial_options
from rmaker_ota.errors import CancelledError, OtaError
from rmaker_ota.esp_err import esp_err_name
from rmaker_ota.flasher.write import SECTOR, Part, Region, check_chip, check_parts, verify_part, write_parts
from rmaker_ota.records import dataclass
from rmaker_ota.targets.esp32_serial import ChipPort

FILE_MAX = 256 << 20


class RegionType(click.ParamType[Region]):
    """``OFFSET:SIZE``."""

    name = "region"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Region:
        if isinstance(value, Region):
            return value
        offset, colon, size = str(value).partition(":")
        if not colon:
            self.fail(f"{value!r} is not OFFSET:SIZE", param, ctx)
        number = FlashNumber()
        return Region(number.convert(offset, param, ctx), number.convert(size, param, ctx))


@dataclass(frozen=True, slots=True)
class Work:
    """What is done to every chip, in this order: erase, write or compare, read."""

    erase: tuple[Region, ...]
    erase_all: bool
    parts: tuple[Part, ...]
    only_verify: bool
    skip_same: bool
    force: bool
    read: Region | None
    read_path: Path | None
    restart: bool


class Board:
    """One chip of the run. ``done`` of ``total`` bytes, for the progress of all together."""

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.report: dict[str, Any] = {"port": name, "chip": None, "mac": None, "stub": None, "error": None}
        self.error: BaseException | None = None
        self._port: ChipPort | None = None
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """From any thread."""
        with self._lock:
            self._cancelled = True
            if self._port is not None:
                self._port.flasher.cancel()

    def run(self, work: Work, options: dict[str, Any], note: Callable[[str], None]) -> None:
        """All of the work; what went wrong is in ``error``."""
        began = time.monotonic()
        try:
            with self._lock:
                if self._cancelled:
                    raise CancelledError("interrupted")
                self._port = ChipPort(self.name, **options)
            try:
                self._work(self._port, work, note)
            finally:
                self._end(self._port, work)
        except (OtaError, OSError) as exc:
            self.error = exc
            self.report["error"] = {
                "name": esp_err_name(exc.esp_err) if isinstance(exc, OtaError) else "ESP_FAIL",
                "status": exc.status if isinstance(exc, OtaError) else None,
                "offset": exc.offset if isinstance(exc, OtaError) else 0,
                "message": errors.describe(exc),
            }
        self.report["seconds"] = round(time.monotonic() - began, 3)

    def _work(self, port: ChipPort, work: Work, note: Callable[[str], None]) -> None:
        info = port.connect()
        self.report |= {
            "chip": info.chip,
            "mac": info.mac,
            "stub": info.stub,
            "flash_size": info.flash_size,
            "baud": info.baud,
        }
        how = f"stub {info.stub}" if info.stub else "boot ROM"
        rate = f", {info.baud} baud" if info.baud else ""
        note(f"{self.name}: {info.title} {info.mac or ''}, {how}{rate}")
        if not work.force:
            check_chip(info, work.parts)
        flasher = port.flasher
        if work.erase_all:
            flasher.erase(0, info.flash_size)
        for region in work.erase:
            flasher.erase(region.offset, region.size)

        def show(done: int) -> None:
            self.done = done

        if work.only_verify:
            done = 0
            for part in work.parts:
                verify_part(flasher, part)
                done += len(part.data)
                show(done)
            self.report |= {"verified": True}
        elif work.parts:
            result = write_parts(flasher, work.parts, skip_same=work.skip_same and not work.erase_all, on_progress=show)
            self.report |= {
                "bytes_written": result.written,
                "bytes_skipped": result.skipped,
                "bytes_blank": result.blank,
                "verified": result.verified,
            }
            if not result.verified:
                note(f"{self.name}: written, and cannot be verified: secure download mode")
        if work.read is not None and work.read_path is not None:
            before = self.done
            data = flasher.read(work.read.offset, work.read.size, on_progress=lambda now: show(before + now))
            save(work.read_path, data)
            self.report |= {"bytes_read": len(data)}

    def _end(self, port: ChipPort, work: Work) -> None:
        """Lets the chip run, whatever happened, and gives the port back."""
        flasher = port.flasher
        self.report["counts"] = flasher.counts
        try:
            if work.restart and flasher.state in {"ready", "broken", "stopped"}:
                if flasher.state == "stopped":
                    flasher.rearm()
                flasher.reset()
        finally:
            port.close()


def save(path: Path, data: bytes) -> None:
    """The file has all of it, or stays as it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_parts(words: Sequence[str]) -> tuple[Part, ...]:
    """Parts of ``OFFSET FILE`` pairs."""
    if len(words) % 2 != 0:
        raise click.UsageError("every OFFSET needs its FILE")
    parts = []
    for offset, name in zip(words[::2], words[1::2], strict=True):
        path = Path(name)
        with path.open("rb") as file:
            data = file.read(FILE_MAX + 1)
        if len(data) > FILE_MAX:
            raise click.UsageError(f"{name} is larger than {FILE_MAX >> 20} MiB")
        parts.append(Part(FlashNumber().convert(offset, None, None), data, name))
    check_parts(parts)
    return tuple(parts)


def summary(board: Board) -> str:
    report = board.report
    parts = []
    for key, text in (
        ("bytes_written", "written"),
        ("bytes_blank", "left blank"),
        ("bytes_skipped", "were there already"),
        ("bytes_read", "read"),
    ):
        if report.get(key):
            parts.append(f"{output.mib(report[key])} {text}")
    if report.get("verified"):
        parts.append("verified")
    return f"{board.name}: {', '.join(parts) or 'done'}, {report['seconds']:.2f} s"


def run_all(boards: Sequence[Board], work: Work, options: dict[str, Any], jobs: int, progress: output.Progress) -> None:
    """All boards, `jobs` at a time; this thread shows how far they are, and is the one that is interrupted."""
    total = sum(board.total for board in boards)

    def stop() -> None:
        for board in boards:
            board.cancel()

    lock = threading.Lock()

    def note(text: str) -> None:
        with lock:
            progress.note(text)

    with errors.on_interrupt(stop), ThreadPoolExecutor(jobs, thread_name_prefix="rmaker-flash") as pool:
        runs = [pool.submit(board.run, work, options, note) for board in boards]
        for run in runs:
            while True:
                try:
                    run.result(timeout=0.2)
                    break
                except TimeoutError:
                    with lock:
                        progress.update(sum(board.done for board in boards), total or None)
        if total:
            progress.update(sum(board.done for board in boards), total)


@click.command("flash")
@click.argument("ports", metavar="PORT[,PORT...]")
@click.argument("words", metavar="[OFFSET FILE]...", nargs=-1)
@click.option("--verify", "only_verify", is_flag=True, help="Compare the files with the flash; write nothing.")
@click.option("--erase", type=RegionType(), multiple=True, metavar="OFFSET:SIZE", help="Erase sectors first.")
@click.option("--erase-all", is_flag=True, help="Erase the whole flash first.")
@click.option("--read", type=RegionType(), metavar="OFFSET:SIZE", help="Read flash into --output at last.")
@click.option("--output", "read_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@click.option("--no-skip", is_flag=True, help="Write what lies there already too.")
@click.option("--force", is_flag=True, help="Write images for other chips, and onto encrypted flash.")
@click.option("--no-restart", is_flag=True, help="Leave the chip in its boot loader.")
@click.option("--jobs", "-j", type=click.IntRange(1, 256), metavar="N", help="Chips at a time.  [default: all]")
@click.option("--flash-size", type=FlashNumber(), default=0, help="Bytes of flash.  [default: asked for]")
@serial_options
@output.json_option
def command(
    ports: str,
    words: tuple[str, ...],
    *,
    only_verify: bool,
    erase: tuple[Region, ...],
    erase_all: bool,
    read: Region | None,
    read_path: Path | None,
    no_skip: bool,
    force: bool,
    no_restart: bool,
    jobs: int | None,
    flash_size: int,
    baud: int,
    chip: str,
    before: str,
    stub: str | None,
    connect_attempts: int,
    as_json: bool,
) -> int:
    """Write FILEs at OFFSETs of the flash of the ESP32 at PORT, and compare them.

    PORT is a path, serial=SERIAL, usb=PLUG or socket://HOST:PORT; several ports, with commas between them, are flashed
    side by side, and one that fails concerns no other. To update the running application use `install`.
    """
    names = port_list(ports)
    if (read is None) != (read_path is None):
        raise click.UsageError("--read and --output belong together")
    if read is not None and len(names) > 1:
        raise click.UsageError("--read is for one port")
    if not words and not erase and not erase_all and read is None:
        raise click.UsageError("nothing to do: give OFFSET FILE, --erase, --erase-all or --read")
    if only_verify and (erase or erase_all or not words):
        raise click.UsageError("--verify compares OFFSET FILE and erases nothing")
    for region in erase:
        if region.offset % SECTOR or region.size % SECTOR or not region.size:
            raise click.UsageError(
                f"--erase {region.offset:#x}:{region.size:#x} is not whole sectors of {SECTOR} bytes"
            )
    work = Work(
        erase=erase,
        erase_all=erase_all,
        parts=read_parts(words),
        only_verify=only_verify,
        skip_same=not no_skip,
        force=force,
        read=read,
        read_path=read_path,
        restart=not no_restart,
    )
    options = {
        "baud": baud,
        "chip": chip,
        "before": before,
        "after": "default-reset",
        "stub": stub,
        "connect_attempts": connect_attempts,
        "flash_size": flash_size,
        "allow_encrypted": force,
    }
    total = sum(len(part.data) for part in work.parts) + (read.size if read is not None else 0)
    boards = [Board(name, total) for name in names]
    with output.Progress("flash", quiet=as_json) as progress:
        run_all(boards, work, options, jobs or len(boards), progress)
    failed = [board for board in boards if board.error is not None]
    if as_json:
        output.print_json([board.report for board in boards])
    else:
        for board in boards:
            if board.error is None:
                output.say(summary(board))
    if failed and len(boards) == 1 and not as_json:
        assert failed[0].error is not None
        raise failed[0].error
    if not as_json:
        for board in failed:
            click.echo(f"rmaker-ota: {board.name}: {board.report['error']['message']}", err=True)
    return max((errors.exit_code(board.error) for board in failed if board.error is not None), default=0)
