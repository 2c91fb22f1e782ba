"""``rmaker-ota inspect``: every kind of file is told, described as its vector says, and damage is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rmaker_ota import ota_core
from rmaker_ota.cli import cli

VECTORS = Path(__file__).resolve().parents[1] / "data" / "vectors"


def inspect(*args: object) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, args)])


def found(*args: object) -> dict[str, Any]:
    result = inspect(*args, "--json")
    answer: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code == 1) == bool(answer["error"])
    return answer


def expected(path: Path) -> dict[str, Any]:
    sidecar: dict[str, Any] = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    return sidecar["expected"]


def vectors(folder: str) -> list[Path]:
    paths = sorted((VECTORS / folder).glob("*.bin"))
    assert paths
    return paths


@pytest.fixture
def flash(tmp_path: Path) -> Path:
    path = tmp_path / "chip.bin"
    path.write_bytes(gzip.decompress((VECTORS / "flash" / "esp32c3_2mb.bin.gz").read_bytes()))
    return path


@pytest.mark.parametrize("path", vectors("images"), ids=lambda path: path.stem)
def test_images_are_described_as_their_vectors_say(path: Path) -> None:
    answer, wanted = found(path), expected(path)
    assert answer["kind"] == "image"
    assert answer["error"] is None
    assert answer["header"]["chip_id"] == wanted["chip_id"]
    assert answer["header"]["entry_addr"] == wanted["entry_addr"]
    assert answer["header"]["hash_appended"] == bool(wanted["hash_appended"])
    assert [(s["offset"], s["size"], s["load_addr"]) for s in answer["segments"]] == [
        (s["data_offset"], s["length"], s["load_addr"]) for s in wanted["segments"]
    ]
    assert answer["checksum"]["stored"] == wanted["checksum"]
    assert answer["checksum"]["right"]
    assert bool(answer["sha256"]) == bool(wanted["hash_appended"])
    if "app_desc" in wanted:
        assert answer["app"]["project"] == wanted["app_desc"]["project_name"]
        assert answer["app"]["version"] == wanted["app_desc"]["version"]
        assert answer["app"]["secure_version"] == wanted["app_desc"]["secure_version"]
    else:
        assert answer["app"] is None
        assert answer["bootloader"]


@pytest.mark.parametrize("path", vectors("partition_table"), ids=lambda path: path.stem)
def test_partition_tables_are_listed(path: Path) -> None:
    answer, wanted = found(path), expected(path)
    assert answer["kind"] == "partition-table"
    assert [(row["label"], row["offset"], row["size"]) for row in answer["partitions"]] == [
        (row["label"], row["offset"], row["size"]) for row in wanted["entries"]
    ]


@pytest.mark.parametrize("path", vectors("otadata"), ids=lambda path: path.stem)
def test_otadata_entries_are_shown(path: Path) -> None:
    answer, wanted = found(path, "--kind", "otadata"), expected(path)
    for entry, want in zip(answer["entries"], wanted["entries"], strict=True):
        if entry["seq"] is None:
            assert want == "erased"
        else:
            assert (entry["seq"], entry["state"], entry["crc_right"]) == (
                want["ota_seq"],
                want["state_name"],
                want["crc_ok"],
            )


def test_a_flash_image_says_what_boots_next_and_why(flash: Path) -> None:
    answer = found(f"esp32-image:{flash}")
    assert answer == found(flash)
    assert answer["kind"] == "flash"
    assert answer["bootloader"]["chip"] == "esp32c3"
    assert [(slot["slot"], slot["empty"]) for slot in answer["slots"]] == [("ota_0", False), ("ota_1", True)]
    assert answer["slots"][0]["app"]["version"] == "1.0.0"
    assert answer["boot"]["slot"] == "ota_0"
    assert answer["boot"]["reasons"]
    assert answer["boot"]["writes"] is False


def test_looking_changes_nothing(flash: Path) -> None:
    before = flash.read_bytes(), flash.stat().st_mtime_ns
    flash.chmod(0o400)
    inspect(flash)
    assert (flash.read_bytes(), flash.stat().st_mtime_ns) == before


def test_a_damaged_app_is_not_what_boots(flash: Path) -> None:
    data = bytearray(flash.read_bytes())
    data[0x20000 + 5000] ^= 1
    flash.write_bytes(data)
    answer = found(flash)
    assert answer["slots"][0]["error"]["name"] == "ERR_IMAGE_CHECKSUM"
    assert answer["boot"]["slot"] is None


@pytest.mark.parametrize("name", ["nvs_all_types.bin", "nvs_firmware_progress.bin", "nvs_small.bin"])
def test_nvs_partitions_are_listed(name: str) -> None:
    answer = found(VECTORS / "nvs" / name)
    assert (answer["kind"], answer["damaged"]) == ("nvs", 0)
    assert answer["items"]
    text = inspect(VECTORS / "nvs" / name).stdout
    for item in answer["items"]:
        assert f"{item['namespace']}/{item['key']} ({item['type']})" in text


def test_secrets_of_an_nvs_partition_are_not_shown(tmp_path: Path) -> None:
    partition = ota_core.Nvs(b"\xff" * 0x4000)
    for namespace, key, kind, value in (
        ("rmaker_creds", "client_key", "blob", b"-----BEGIN PRIVATE KEY-----hidden"),
        ("nvs.net80211", "sta.pswd", "str", "hidden"),
        ("rmaker_ota", "url", "str", "https://host/app.bin?signature=hidden"),
        ("rmaker_ota", "job_id", "str", "shown"),
        ("rmaker_ota", "count", "u16", 4711),
    ):
        partition.set(namespace, key, kind, value)
    path = tmp_path / "nvs.bin"
    path.write_bytes(partition.image)
    for args in ([], ["--json"]):
        text = inspect(path, *args).stdout
        for word in ("client_key", "sta.pswd", "https://host/app.bin", "shown", "4711", "not shown"):
            assert word in text
        assert "hidden" not in text


def test_text_shows_the_essentials(flash: Path) -> None:
    text = inspect(flash).output
    for part in ("esp32c3", "ota_0         vector_c3 1.0.0", "ota_1         empty", "boots next    ota_0", "0xe0000"):
        assert part in text
    text = inspect(VECTORS / "images" / "esp32c3_app_v1.0.0.bin").output
    for part in ("vector_c3 1.0.0", "esp32c3, revision v0.3 to v1.99", "segment 4", "SHA-256", "right"):
        assert part in text
    assert "sequence 1 -> ota_0, VALID" in inspect(VECTORS / "otadata" / "s0_seq1_valid.bin").output


@pytest.mark.parametrize(
    ("folder", "name", "at", "status"),
    [
        ("images", "esp32c3_app_v1.0.0.bin", 6000, "ERR_IMAGE_CHECKSUM"),
        ("images", "esp32c3_app_v1.0.0.bin", -1, "ERR_IMAGE_HASH"),
        ("partition_table", "two_ota.bin", 40, "ERR_PARTITION_TABLE"),
    ],
)
def test_damage_is_named_and_is_exit_code_1(tmp_path: Path, folder: str, name: str, at: int, status: str) -> None:
    data = bytearray((VECTORS / folder / name).read_bytes())
    data[at] ^= 1
    path = tmp_path / name
    path.write_bytes(data)
    assert found(path)["error"]["name"] == status
    result = inspect(path)
    assert result.exit_code == 1
    assert "damaged" in result.output
    assert status in result.output


def test_a_cut_image_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "app.bin"
    path.write_bytes((VECTORS / "images" / "esp32c3_app_v1.0.0.bin").read_bytes()[:30000])
    answer = found(path)
    assert answer["error"]["name"] == "ERR_INCOMPLETE"
    assert answer["app"]["version"] == "1.0.0"


def test_what_nobody_knows_is_wrong_usage(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(b"hello, world")
    result = inspect(path)
    assert result.exit_code == 2
    assert "--kind" in result.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = inspect(tmp_path / "nowhere.bin")
    assert result.exit_code == 1
    assert "nowhere.bin: No such file" in result.stderr


@pytest.mark.parametrize("kind", ["image", "partition-table", "otadata", "nvs", "flash"])
@pytest.mark.parametrize("data", [b"", b"\xe9", b"\xaa\x50", b"\xff" * 8192, b"\xaa\x50" * 40000])
def test_any_bytes_taken_for_any_kind_are_described(tmp_path: Path, kind: str, data: bytes) -> None:
    path = tmp_path / "bytes.bin"
    path.write_bytes(data)
    for args in ([], ["--json"]):
        result = inspect(path, "--kind", kind, *args)
        assert result.exit_code in {0, 1}
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.output
