"""The frame of the command line: commands by name, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rmaker_ota import errors as ota_errors
from rmaker_ota.cli import COMMANDS, cli, errors, output
from rmaker_ota.cli.errors import ExitCode


def rejected() -> None:
    raise ota_errors.RejectedError("Project Name mismatch", stage="header")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rmaker_ota", *args], capture_output=True, text=True, check=False, timeout=60
    )


def raising(exc: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise exc

    return command


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    shown = run("--version")
    assert (shown.returncode, shown.stdout) == (0, f"rmaker-ota, version {project['version']}\n")


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (ota_errors.DigestError("the SHA-256 differs"), ExitCode.FAILED),
        (ota_errors.RejectedError("Same version received"), ExitCode.REJECTED),
        (ota_errors.RejectedError("another chip", status="ERR_IMAGE_CHIP"), ExitCode.REJECTED),
        (ota_errors.CancelledError("cancelled"), ExitCode.INTERRUPTED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (click.Abort(), ExitCode.INTERRUPTED),
        (ota_errors.ArgumentError("a target's URI begins with file: or esp32-image:"), ExitCode.USAGE),
        (ota_errors.ConfigError("mqtt.port: 'x', expected a number"), ExitCode.USAGE),
        (click.UsageError("--cert and --key belong together"), ExitCode.USAGE),
        (FileNotFoundError(2, "No such file or directory", "/nowhere"), ExitCode.FAILED),
        (ZeroDivisionError("a fault of ours"), ExitCode.FAILED),
    ],
)
def test_errors_have_their_exit_code_and_one_line(
    exc: BaseException, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(raising(exc)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.strip()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(rejected, debug=True) == ExitCode.REJECTED
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "in rejected" in captured.err


def test_a_command_may_return_its_exit_code() -> None:
    assert errors.run(lambda: 3) == 3
    assert errors.run(lambda: None) == 0


def test_the_message_names_stage_and_offset(capsys: pytest.CaptureFixture[str]) -> None:
    errors.run(raising(ota_errors.ImageError("the image checksum is wrong", stage="verify", offset=4711)))
    assert capsys.readouterr().err == "rmaker-ota: the image checksum is wrong (verify, at byte 4711)\n"


def test_an_unknown_command_is_wrong_usage() -> None:
    done = run("instal")
    assert done.returncode == ExitCode.USAGE
    assert "instal" in done.stderr


def test_help_lists_every_command_without_importing_one() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in result.output
    code = "import sys, rmaker_ota.cli; rmaker_ota.cli.cli.main(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    modules = done.stdout.splitlines()[-1].split()
    assert {"rmaker_ota.cli", "click"} <= set(modules)
    assert not [name for name in modules if name.startswith("rmaker_ota.cli.") and name.endswith(("install", "agent"))]
    assert "rich" not in modules


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "rmaker_ota", "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == ExitCode.FAILED
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_first_signal_cancels_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cancelled = []
    with errors.on_interrupt(lambda: cancelled.append(1)):
        signal.raise_signal(signal.SIGTERM)
        assert cancelled == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_json_is_one_document_with_bytes_in_hex(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"sha256": b"\x01\xff", "name": "\u00e9"})
    assert json.loads(capsys.readouterr().out) == {"sha256": "01ff", "name": "\u00e9"}
    with pytest.raises(TypeError):
        output.print_json({"x": object()})


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with output.Progress("install", every_s=2, clock=lambda: now) as progress:
        for second in range(9):
            now = float(second)
            progress.update(second * 1024 * 1024, 8 * 1024 * 1024)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "install:  25% of 8.0 MiB, 1.0 MiB/s",
        "install:  50% of 8.0 MiB, 1.0 MiB/s",
        "install:  75% of 8.0 MiB, 1.0 MiB/s",
        "install: 100% of 8.0 MiB, 1.0 MiB/s",
    ]


def test_progress_of_unknown_size_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with output.Progress("install", every_s=1, clock=lambda: now) as progress:
        now = 2.0
        progress.update(1536, None)
        progress.update(1536, None)
        progress.note("a line")
    assert capsys.readouterr().out.splitlines() == ["install: 1.5 KiB, 768 B/s", "a line"]


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Progress("install", quiet=True) as progress:
        progress.update(1, 1)
        progress.note("x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert output.mib(count) == text


# ---- The commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_has_a_manual(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert (command.help or "").strip()


def test_an_install_imports_only_what_it_needs() -> None:
    heavy = {"paho", "cryptography", "rich", "aiohttp", "asyncio", "cffi", "sqlite3", "ssl", "http", "urllib.request"}
    modules = "rmaker_ota.cli.install, rmaker_ota.targets.file, rmaker_ota.targets.esp32_image"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not heavy & set(done.stdout.split())
