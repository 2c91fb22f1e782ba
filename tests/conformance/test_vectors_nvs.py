"""NVS partitions from the generator and from firmware's own classes: read, and written again byte for byte."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import ota_core
from rmaker_ota.errors import FormatError
from rmaker_ota.nvs import NvsType, NvsValue
from tests.conformance.vectors import VECTORS, described, description

NVS = described("nvs")
KEYS = VECTORS / "nvs" / "keys" / "nvs_keys.bin"
by_name = pytest.mark.parametrize("path", NVS, ids=lambda path: path.stem)

Change = tuple[str, str, NvsType, NvsValue | None]  # None: erased

# What the firmware driver did: the two vectors share their beginning. ota_written counts KB.
FIRST: list[Change] = [
    ("nvs.net80211", "opmode", "u8", 2),
    ("rmaker_ota", "rmaker_ota_id", "blob", b"abcdEFGH"),
    ("rmaker_ota", "ota_file_md5", "str", "0123456789abcdef0123456789abcdef"),
    *(("rmaker_ota", "ota_written", "u16", 50 * i) for i in range(300)),
]
LAST: list[Change] = [
    ("rmaker_ota", "ota_file_md5", "str", None),
    ("rmaker_ota", "ota_written", "u16", None),
    ("rmaker_ota", "ota_update", "blob", b"\2"),
    ("rmaker_ota", "ota_update", "blob", b"\1"),
    ("rmaker_ota", "ota_fail_rsn", "str", "Rollback"),
]


def keys_of(path: Path) -> bytes | None:
    return KEYS.read_bytes() if "encrypted" in path.stem else None


def as_expected(value: Any) -> Any:
    """A value as the JSON files write it: short blobs in hexadecimal, long ones by their digest."""
    if not isinstance(value, bytes):
        return value
    return value.hex() if len(value) <= 64 else "sha256:" + hashlib.sha256(value).hexdigest()


def values(nvs: ota_core.Nvs) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for item in nvs.items():
        assert item.namespace is not None
        assert item.key not in found.setdefault(item.namespace, {})
        found[item.namespace][item.key] = [item.type, as_expected(item.value)]
    return found


def pages(nvs: ota_core.Nvs) -> list[dict[str, Any]]:
    return [
        {"state": page.state}
        if page.state == "empty"
        else {"state": page.state, "seq": page.seq, "version": page.version, "entries_used": page.written}
        for page in nvs.pages
    ]


def written(changes: list[Change], size: int, keys: bytes | None = None, *, purge: bool = False) -> bytes:
    """An erased partition after changes, made by carrying out the operations of each."""
    partition = bytearray(b"\xff" * size)
    for namespace, key, type_name, value in changes:
        if value is None:
            operations = ota_core.nvs_erase(partition, namespace, key, keys=keys, purge=purge)
        else:
            operations = ota_core.nvs_set(partition, namespace, key, type_name, value, keys=keys, purge=purge)
        ota_core.nvs_apply(partition, operations)
    return bytes(partition)


def csv_changes(path: Path) -> list[Change]:
    changes: list[Change] = []
    namespace = ""
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            name, encoding, text = row["key"], row["encoding"], row["value"]
            if row["type"] == "namespace":
                namespace = name
            elif encoding == "hex2bin":
                changes.append((namespace, name, "blob", bytes.fromhex(text)))
            elif encoding == "string":
                changes.append((namespace, name, "str", text))
            else:
                changes.append((namespace, name, encoding, int(text)))  # type: ignore[arg-type]
    return changes


def test_all_vectors_are_here() -> None:
    assert len(NVS) == 8


@by_name
def test_pages_namespaces_and_values_are_read(path: Path) -> None:
    data = path.read_bytes()
    about = description(path)
    assert hashlib.sha256(data).hexdigest() == about["sha256"]
    nvs = ota_core.Nvs(data, keys_of(path))
    assert pages(nvs) == about["expected"]["pages"]
    assert nvs.namespaces == about["expected"]["namespaces"]
    assert values(nvs) == about["expected"]["values"]
    assert nvs.damaged == 0
    assert (nvs.repair_count > 0) == ("cut" in path.stem)


@by_name
def test_firmware_reads_what_we_read(path: Path) -> None:
    reads = description(path).get("firmware_reads", {})
    found = values(ota_core.Nvs(path.read_bytes(), keys_of(path)))
    of_all = {key: str(value) for keys in found.values() for key, (_, value) in keys.items()}
    for key, value in reads.items():
        assert of_all.get(key, "-") == value


@by_name
def test_a_writer_continues_and_keeps_the_rest(path: Path) -> None:
    data = bytearray(path.read_bytes())
    keys = keys_of(path)
    before = values(ota_core.Nvs(data, keys))
    operations = ota_core.nvs_set(data, "rmaker_ota", "ota_written", "u16", 15000, keys=keys)
    ota_core.nvs_apply(data, operations)
    after = ota_core.Nvs(data, keys)
    before["rmaker_ota"]["ota_written"] = ["u16", 15000]
    assert values(after) == before
    assert after.repair_count == 0
    assert b"\xff" * 4096 in [data[i : i + 4096] for i in range(0, len(data), 4096)]


@by_name
def test_every_truncation_to_whole_pages_is_read(path: Path) -> None:
    data = path.read_bytes()
    whole = values(ota_core.Nvs(data, keys_of(path)))
    for size in range(4096, len(data), 4096):
        part = values(ota_core.Nvs(data[:size], keys_of(path)))
        for namespace, items in part.items():
            assert set(items) <= set(whole[namespace])


def test_the_key_partition_is_read() -> None:
    about = description(KEYS)["expected"]
    keys = KEYS.read_bytes()
    assert ota_core.parse_nvs_keys(keys).hex() == about["eky"] + about["tky"]
    for at in range(68):
        with pytest.raises(FormatError):
            ota_core.parse_nvs_keys(keys[:at] + bytes([keys[at] ^ 1]) + keys[at + 1 :])


@pytest.mark.parametrize(
    ("name", "changes", "purge"),
    [
        ("nvs_firmware_progress", FIRST, True),
        ("nvs_firmware_many_updates", FIRST + LAST, True),
        ("nvs_firmware_unpurged", FIRST + LAST, False),
    ],
)
def test_we_write_what_firmware_writes(name: str, changes: list[Change], purge: bool) -> None:
    expected = (VECTORS / "nvs" / f"{name}.bin").read_bytes()
    assert written(changes, len(expected), purge=purge) == expected


@pytest.mark.parametrize("name", ["nvs_small", "nvs_small_encrypted", "nvs_all_types"])
def test_we_write_what_the_generator_writes(name: str) -> None:
    path = VECTORS / "nvs" / f"{name}.bin"
    expected = path.read_bytes()
    changes = csv_changes(VECTORS / "nvs" / f"{name.removesuffix('_encrypted')}.csv")
    assert written(changes, len(expected), keys_of(path)) == expected
