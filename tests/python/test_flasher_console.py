"""The health check: what a chip's console tells after a restart."""

from __future__ import annotations

import pytest

from rmaker_ota.errors import ConfigError
from rmaker_ota.flasher.console import LINE_MAX, ConsoleReport, ConsoleWatch, Verdict

BOOT = (
    b"ESP-ROM:esp32c3-api1-20210207\r\nBuild:Feb  7 2021\r\nrst:0x1 (POWERON),boot:0xd (SPI_FAST_FLASH_BOOT)\r\n"
    b"I (30) boot: ESP-IDF v5.5 2nd stage bootloader\r\nI (95) esp_image: segment 0: paddr=00020020 vaddr=3c0a0020\r\n"
    b"I (310) boot: Loaded app from partition at offset 0x20000\r\n"
)


def judge(*pieces: bytes, success: str | None = "ready", slot_offset: int | None = 0x20000) -> ConsoleReport:
    watch = ConsoleWatch(success, slot_offset=slot_offset)
    for piece in pieces:
        watch.feed(piece)
    return watch.end()


def test_the_line_that_was_expected_is_well() -> None:
    assert judge(BOOT, b"I (900) app: all ready now\r\n") == ConsoleReport(Verdict.WELL, "I (900) app: all ready now")


def test_the_verdict_is_the_same_however_the_bytes_come() -> None:
    text = BOOT + b"\x1b[0;32mI (900) app: re\x1b[0mady\x1b[0m\r\nGuru Meditation Error: Core 0 panic'ed\r\n"
    whole = judge(text)
    assert whole.line == "I (900) app: ready"
    assert judge(*(text[i : i + 1] for i in range(len(text)))) == whole


@pytest.mark.parametrize(
    "line",
    [
        b"Guru Meditation Error: Core  0 panic'ed (LoadProhibited). Exception was unhandled.",
        b"abort() was called at PC 0x40081234 on core 0",
        b"assert failed: app_main main.c:12 (x)",
        b"Backtrace: 0x40081234:0x3ffb0000",
        b"E (123) esp_image: image at 0x20000 has invalid magic byte (nothing flashed here?)",
        b"E (124) esp_image: Checksum failed. Calculated 0x1 read 0x2",
        b"E (125) boot: No bootable app partitions in the partition table",
        b"invalid header: 0xffffffff",
        b"E (9000) task_wdt: Task watchdog got triggered. The following tasks did not reset",
        b"rst:0x3 (SW_CPU_RESET),boot:0xd (SPI_FAST_FLASH_BOOT)",
        b"waiting for download",
        b"wait uart0 download",
        b"I (310) boot: Loaded app from partition at offset 0x1a0000",
        b"***ERROR*** A stack overflow in task main has been detected.",
    ],
)
def test_a_crash_is_bad_whatever_comes_later(line: bytes) -> None:
    report = judge(BOOT, line + b"\r\n", b"app: ready\r\n")
    assert report == ConsoleReport(Verdict.BAD, line.decode())
    assert judge(BOOT, line, success=None).verdict is Verdict.BAD  # the last line need not end


def test_the_expected_line_before_a_crash_is_well() -> None:
    assert judge(BOOT, b"ready\nGuru Meditation Error\n").is_well


def test_silence_is_bad_when_a_line_was_expected() -> None:
    assert judge() == ConsoleReport(Verdict.BAD, "it stayed silent, expected 'ready'")
    assert judge(BOOT) == ConsoleReport(Verdict.BAD, "no line matched, expected 'ready'")


def test_without_a_pattern_time_without_a_crash_is_well() -> None:
    assert judge(BOOT, success=None) == ConsoleReport(Verdict.WELL, "6 lines without a crash")
    assert judge(success=None).is_well


def test_a_chip_that_never_ends_a_line_fills_no_memory() -> None:
    watch = ConsoleWatch("ready")
    for _ in range(100):
        assert watch.feed(b"x" * LINE_MAX) is Verdict.NOTHING
        assert len(watch._rest) <= LINE_MAX
    assert watch.feed(b" ready\n") is Verdict.WELL


def test_what_is_shown_moves_no_cursor() -> None:
    report = judge(b"Guru Meditation Error \x1b[2J\x07\x9b\xff" + b"y" * 500 + b"\n")
    assert report.line.isprintable()
    assert len(report.line) == 200


@pytest.mark.parametrize("pattern", ["(", "x" * 513, "a{99999999999}"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        ConsoleWatch(pattern)
