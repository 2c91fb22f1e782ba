"""``rmaker-ota install``: exit codes, the JSON object, resume records, interruption. Targets are files here."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rmaker_ota.cli import cli
from rmaker_ota.cli.install import ByteCount, ResumeFile, report
from rmaker_ota.errors import ConfigError
from rmaker_ota.install import Installer, Phase, Progress, ResumePoint

KEYS = {
    "status",
    "slot",
    "project",
    "version",
    "bytes_read",
    "bytes_written",
    "bytes_skipped",
    "sha256",
    "md5",
    "seconds",
    "error",
}

BODY = random.Random(1).randbytes(300_001)
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.bin"
    path.write_bytes(BODY)
    return path


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    return tmp_path / "slot.bin"


def install(*args: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["install", *map(str, args)], input=stdin)


def process(*args: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rmaker_ota", "install", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def answer(result: Result) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(result.stdout)
    assert set(value) == KEYS
    if value["error"] is not None:
        assert set(value["error"]) == {"name", "stage", "offset", "message"}
    return value


def test_an_image_is_installed_and_the_object_says_so(image: Path, slot: Path) -> None:
    result = install(image, f"file:{slot}", "--sha256", SHA256, "--md5", MD5, "--size", len(BODY), "--json")
    assert result.exit_code == 0
    value = answer(result)
    assert slot.read_bytes() == BODY
    assert (value["status"], value["error"]) == ("success", None)
    assert (value["sha256"], value["md5"], value["bytes_read"]) == (SHA256, MD5, len(BODY))
    assert value["bytes_written"] + value["bytes_skipped"] >= len(BODY)
    assert value["seconds"] > 0
    assert (value["project"], value["version"]) == (None, None)


def test_a_person_reads_what_happened(image: Path, slot: Path) -> None:
    result = install(image, f"file:{slot}")
    assert result.exit_code == 0
    assert f"installed the image into file:{slot}: 293.0 KiB read" in result.stdout
    assert f"SHA-256 {SHA256}" in result.stdout
    assert result.stderr == ""


def test_standard_input_is_a_source(image: Path, slot: Path) -> None:
    with image.open("rb") as stream, process("-", f"file:{slot}", "--json", stdin=stream) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert json.loads(out)["sha256"] == SHA256
    assert slot.read_bytes() == BODY


@pytest.mark.parametrize("transform", ["auto", "gzip"])
def test_a_packed_image_is_unpacked(tmp_path: Path, slot: Path, transform: str) -> None:
    packed = tmp_path / "image.gz"
    packed.write_bytes(gzip.compress(BODY))
    result = install(packed, f"file:{slot}", "--transform", transform, "--json")
    assert result.exit_code == 0
    assert slot.read_bytes() == BODY
    assert answer(result)["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("option", "value", "stage", "name"),
    [
        ("--sha256", "00" * 32, "verify", "ESP_ERR_OTA_VALIDATE_FAILED"),
        ("--md5", "00" * 16, "verify", "ESP_ERR_OTA_VALIDATE_FAILED"),
        ("--size", "300000", "verify", "ESP_ERR_OTA_VALIDATE_FAILED"),
    ],
)
def test_what_was_announced_and_is_not_so_is_a_failure(
    image: Path, slot: Path, option: str, value: str, stage: str, name: str
) -> None:
    result = install(image, f"file:{slot}", option, value, "--json")
    assert result.exit_code == 1
    failure = answer(result)
    assert failure["status"] == "failed"
    assert (failure["error"]["stage"], failure["error"]["name"]) == (stage, name)
    assert failure["error"]["message"] in result.stderr
    assert failure["sha256"] is None


def test_a_missing_source_is_a_failure_of_the_source(slot: Path) -> None:
    result = install("nowhere.bin", f"file:{slot}", "--json")
    assert result.exit_code == 1
    assert answer(result)["error"]["stage"] == "source"
    assert "nowhere.bin" in result.stderr
    assert not slot.exists()


def test_a_target_that_cannot_be_written_is_named(image: Path, tmp_path: Path) -> None:
    result = install(image, f"file:{tmp_path}/no/such/slot.bin", "--json")
    assert result.exit_code == 1
    assert "no/such" in answer(result)["error"]["message"]


@pytest.mark.parametrize(
    "args",
    [
        ["x"],
        ["http://127.0.0.1:1/image.bin", "file:slot"],
        ["image.bin", "floppy:slot"],
        ["image.bin", "file:"],
        ["image.bin", "file:slot", "--sha256", "12"],
        ["image.bin", "file:slot", "--md5", "zz" * 16],
        ["image.bin", "file:slot", "--size", "0"],
        ["image.bin", "file:slot", "--limit-rate", "fast"],
        ["image.bin", "file:slot", "--deadline", "-1"],
        ["image.bin", "file:slot", "--transform", "rar"],
        ["image.bin", "file:slot", "--ca", "/nowhere/ca.pem"],
        ["image.bin", "file:slot", "--cert", __file__],
        ["-", "file:slot", "--resume", "record.json"],
        ["ftp://127.0.0.1/image.bin", "file:slot"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_touches_nothing(
    args: list[str], tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = install(*args, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


@pytest.mark.parametrize("options", [["--ca", "note.txt"], ["--cert", "note.txt", "--key", "note.txt"]])
def test_a_certificate_file_that_is_none_is_wrong_usage_before_anything_is_connected(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("no certificate")
    result = install("https://nowhere.invalid/image.bin", "file:slot", *options)
    assert result.exit_code == 2
    assert "note.txt: no PEM certificate found" in result.stderr
    assert not Path("slot").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_130(tmp_path: Path, slot: Path, number: signal.Signals) -> None:
    """A source that never says more: standard input is a pipe that stays open."""
    read, write = os.pipe()
    with process("-", f"file:{slot}", "--json", stdin=read) as child:
        os.close(read)
        # More than the pipe holds and less than the header gate and a chunk want: when it was taken, the engine reads.
        os.write(write, BODY[:65536])
        os.write(write, BODY[65536:131072])
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    os.close(write)
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert json.loads(out)["status"] == "failed"


def test_a_damaged_resume_record_is_named_with_the_way_out(image: Path, slot: Path, tmp_path: Path) -> None:
    record = tmp_path / "resume.json"
    digest = "00" * 32
    for text in (
        "",
        "{",
        "[]",
        "[" * 200_000,
        '{"offset": "x"}',
        '{"offset": 5, "sha256": "zz", "entity_tag": ""}',
        '{"offset": 4096, "sha256": "00", "entity_tag": ""}',
        '{"offset": 4096, "sha256": 7, "entity_tag": ""}',
        f'{{"offset": 4096, "sha256": "{digest}", "entity_tag": 7}}',
        *(
            f'{{"offset": {offset}, "sha256": "{digest}", "entity_tag": ""}}'
            for offset in ("-4096", "4097", "4096.0", "true", "Infinity", "1e400", "9223372036854775808")
        ),
    ):
        record.write_text(text)
        result = install(image, f"file:{slot}", "--resume", record)
        assert result.exit_code == 2
        assert f"{record} is no resume record" in result.stderr
        assert "remove it" in result.stderr
    assert not slot.exists()


def test_a_resume_record_counts_only_for_what_it_was_made_for(tmp_path: Path) -> None:
    path = tmp_path / "resume.json"
    point = ResumePoint(1 << 20, hashlib.sha256(b"x").digest(), '"tag"')
    ResumeFile(path, "https://host/app.bin?signature=secret", "file:slot", "slot").save(point)
    assert "secret" not in path.read_text()
    assert ResumeFile(path, "https://host/app.bin?signature=other", "file:slot", "slot").load() == point
    for other in (("https://host/b.bin", "file:slot", "slot"), ("https://host/app.bin", "file:slot2", "slot")):
        assert ResumeFile(path, *other).load() is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["resume.json"]
    ResumeFile(path, "https://host/app.bin", "file:slot", "slot").clear()
    assert ResumeFile(path, "https://host/app.bin", "file:slot", "slot").load() is None


def test_a_local_file_that_was_changed_is_not_resumed_from(tmp_path: Path) -> None:
    source, path = tmp_path / "image.bin", tmp_path / "resume.json"
    source.write_bytes(BODY)
    point = ResumePoint(4096, hashlib.sha256(BODY[:4096]).digest())
    ResumeFile(path, str(source), "file:slot", "slot").save(point)
    assert ResumeFile(path, str(source), "file:slot", "slot").load() == point
    source.write_bytes(BODY[::-1])
    os.utime(source, ns=(1, 1))
    assert ResumeFile(path, str(source), "file:slot", "slot").load() is None


def test_a_record_needs_its_directory_before_anything_is_written(image: Path, slot: Path, tmp_path: Path) -> None:
    result = install(image, f"file:{slot}", "--resume", tmp_path / "missing" / "resume.json")
    assert result.exit_code == 2
    assert "no such directory" in result.stderr
    assert not slot.exists()


@pytest.mark.parametrize("name", ["image.bin", "link.bin", "hard.bin"])
def test_a_file_is_not_installed_into_itself(image: Path, name: str) -> None:
    (image.parent / "link.bin").symlink_to(image)
    (image.parent / "hard.bin").hardlink_to(image)
    result = install(image.parent / name, f"file:{image}", "--json")
    assert result.exit_code == 2
    assert "is the target itself" in result.stderr
    assert image.read_bytes() == BODY


def test_standard_input_that_is_the_target_is_refused(image: Path) -> None:
    with image.open("rb") as stream, process("-", f"file:{image}", stdin=stream) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "is the target itself" in err
    assert image.read_bytes() == BODY


def test_a_closed_standard_input_is_named(slot: Path) -> None:
    command = [sys.executable, "-m", "rmaker_ota", "install", "-", f"file:{slot}"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr


@pytest.mark.parametrize("closed", ["0", "1", "2"])
def test_a_closed_standard_descriptor_is_never_the_slots(image: Path, slot: Path, closed: str) -> None:
    command = [sys.executable, "-m", "rmaker_ota", "install", str(image), f"file:{slot}"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert slot.read_bytes() == BODY


def test_bytes_left_alone_are_not_written_in_a_failure_either() -> None:
    value = report(
        "failed",
        slot=None,
        header=None,
        result=None,
        progress=Progress(Phase.VERIFYING, 10, 10, 8, None),
        seconds=1.0,
        error=None,
    )
    assert (value["bytes_written"], value["bytes_skipped"]) == (2, 8)


def test_a_second_signal_leaves_an_object_too(monkeypatch: pytest.MonkeyPatch, image: Path, slot: Path) -> None:
    """`timeout` sends its signal to the program and to its process group: twice."""

    def interrupted(self: Installer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Installer, "result", interrupted)
    result = install(image, f"file:{slot}", "--json")
    assert result.exit_code == 130
    assert answer(result)["status"] == "failed"


def test_a_finished_installation_removes_its_record(image: Path, slot: Path, tmp_path: Path) -> None:
    record = tmp_path / "resume.json"
    result = install(image, f"file:{slot}", "--resume", record)
    assert result.exit_code == 0
    assert not record.exists()


def test_a_record_that_is_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, OSError)):
        ResumeFile(tmp_path, "a", "b", "c").load()


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("4096", 4096), ("512K", 1 << 19), ("1.5m", 3 << 19), ("2GiB", 2 << 30), ("10kb", 10240)],
)
def test_numbers_of_bytes(text: str, count: int) -> None:
    assert ByteCount().convert(text, None, None) == count


def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back(image: Path, slot: Path) -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "rmaker_ota", "install", str(image), f"file:{slot}"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side is gone
            while piece := os.read(ours, 65536):
                shown += piece
        assert child.wait(timeout=60) == 0
    os.close(ours)
    assert "━".encode() in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"installed the image" in shown
