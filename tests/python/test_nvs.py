"""Listing of NVS items: printable, ready for JSON, without secrets."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from rmaker_ota import ota_core
from rmaker_ota.cli import cli
from rmaker_ota.nvs import NvsItem, describe, is_secret, shown_value

VECTORS = Path(__file__).resolve().parents[1] / "data" / "vectors"


def test_secrets_are_never_shown() -> None:
    for key, value in [
        ("client_key", b"-----BEGIN"),
        ("random", bytes(64)),
        ("sta.pswd", "hunter2"),
        ("sta.pmk", b"k"),
    ]:
        shown = shown_value(NvsItem("rmaker_creds", key, "blob", value))
        assert shown == f"({len(value)} {'byte' if len(value) == 1 else 'bytes'}, not shown)"
    for key in ("node_id", "mqtt_host", "client_cert", "ota_written", "rmaker_ota_id", "ota_file_md5"):
        assert not is_secret(key)


def test_everything_else_is_printable_and_json() -> None:
    items = [
        NvsItem("rmaker_ota", "ota_written", "u16", 640),
        NvsItem("rmaker_ota", "rmaker_ota_id", "blob", b"job"),
        NvsItem("a", "big", "blob", bytes(1000)),
        NvsItem("a", "float", "float", 0.5),
        NvsItem(None, "b\udcff", "str", "line\n\x1b[31m\udc80é"),
        NvsItem("a", "odd", "0x77", b"\0" * 8),
    ]
    listed = json.loads(json.dumps(describe(items), ensure_ascii=False).encode())
    assert [entry["value"] for entry in listed] == [
        640,
        "6a6f62",
        "00" * 32 + "... (1000 bytes)",
        0.5,
        "line\\n\\x1b[31m\\udc80é",
        "00" * 8,
    ]
    assert listed[4]["namespace"] is None
    assert listed[4]["key"] == "b\\udcff"
    assert math.isfinite(listed[3]["value"])


def looked_into(*args: object) -> tuple[dict[str, Any], str]:
    """What ``inspect`` says of a file: as JSON and in lines."""
    runner = CliRunner()
    answer = runner.invoke(cli, ["inspect", *map(str, args), "--json"])
    lines = runner.invoke(cli, ["inspect", *map(str, args)])
    assert answer.exit_code == lines.exit_code == (1 if '"error": {' in answer.stdout else 0)
    return json.loads(answer.stdout), lines.stdout


def test_inspect_lists_a_partition() -> None:
    answer, lines = looked_into(VECTORS / "nvs" / "nvs_firmware_progress.bin")
    assert answer["kind"] == "nvs"
    assert answer["pages"] == 3
    assert answer["damaged"] == 0
    assert {"namespace": "rmaker_ota", "key": "ota_written", "type": "u16", "value": 14950} in answer["items"]
    assert "rmaker_ota/ota_written (u16) = 14950" in lines


def test_inspect_says_that_an_encrypted_partition_cannot_be_read() -> None:
    answer, lines = looked_into(VECTORS / "nvs" / "nvs_small_encrypted.bin")
    assert answer["items"] == []
    assert answer["damaged"] > 0
    assert "damaged" in lines


def test_inspect_lists_the_partitions_of_a_flash_and_hides_the_private_key(tmp_path: Path) -> None:
    flash = bytearray(gzip.decompress((VECTORS / "flash" / "esp32c3_2mb.bin.gz").read_bytes()))
    table = ota_core.parse_partition_table(flash[0x8000:0x9000])
    row = next(row for row in table.partitions if row.label == "fctry")
    partition = memoryview(flash)[row.offset : row.end]
    ota_core.nvs_apply(partition, ota_core.nvs_set(partition, "rmaker_creds", "client_key", "blob", b"-----BEGIN EC"))
    ota_core.nvs_apply(partition, ota_core.nvs_set(partition, "rmaker_creds", "node_id", "blob", b"AABBCC"))
    partition.release()
    path = tmp_path / "flash.bin"
    path.write_bytes(flash)
    answer, lines = looked_into(path)
    assert [part["label"] for part in answer["nvs"]] == ["nvs", "fctry"]
    assert {
        item["key"]: item["value"] for item in answer["nvs"][1]["items"] if item["namespace"] == "rmaker_creds"
    } == {
        "client_key": "(13 bytes, not shown)",
        "node_id": "414142424343",
    }
    assert "BEGIN" not in lines
    assert b"-----BEGIN".hex() not in lines
