"""Partition tables made by ESP-IDF's generator, as CSV and binary."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rmaker_ota import ota_core
from rmaker_ota.errors import FormatError
from rmaker_ota.esp_format import Partition, PartitionTable
from tests.conformance.vectors import described, description

TABLES = described("partition_table")
by_name = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)


def expected_table(path: Path) -> PartitionTable:
    expected = description(path)["expected"]
    return PartitionTable(
        tuple(Partition(**row) for row in expected["entries"]), has_md5=expected.get("md5_row") is not None
    )


def csv_of(path: Path) -> str:
    own = path.with_suffix(".csv")
    return (own if own.exists() else path.with_name("two_ota.csv")).read_text()


def test_all_vectors_are_here() -> None:
    assert len(TABLES) == 5


@by_name
def test_the_binary_is_read(path: Path) -> None:
    data = path.read_bytes()
    about = description(path)
    assert hashlib.sha256(data).hexdigest() == about["sha256"]
    table = ota_core.parse_partition_table(data)
    assert table == expected_table(path)
    assert table.end_offset == about["expected"]["terminator_offset"]
    md5 = about["expected"].get("md5_row")
    assert table.md5 == (bytes.fromhex(md5) if md5 is not None else None)


@by_name
def test_the_binary_is_built_again_byte_for_byte(path: Path) -> None:
    data = path.read_bytes()
    assert ota_core.build_partition_table(ota_core.parse_partition_table(data)) == data
    assert ota_core.build_partition_table(expected_table(path)) == data


@by_name
def test_the_csv_gives_the_binary(path: Path) -> None:
    table = ota_core.partition_table_from_csv(csv_of(path))
    assert table.partitions == expected_table(path).partitions
    if expected_table(path).has_md5:
        assert ota_core.build_partition_table(table) == path.read_bytes()


@by_name
def test_the_csv_written_is_that_of_the_generator(path: Path) -> None:
    table = ota_core.parse_partition_table(path.read_bytes())
    written = ota_core.partition_table_to_csv(table)
    assert written.splitlines() == description(path)["csv_read_back"]
    assert ota_core.partition_table_from_csv(written).partitions == table.partitions


@by_name
def test_the_generators_checks_pass(path: Path) -> None:
    table = ota_core.parse_partition_table(path.read_bytes())
    ota_core.check_partition_table(table)
    end = max(partition.end for partition in table.partitions)
    ota_core.check_partition_table(table, flash_size=end)
    ota_core.parse_partition_table(path.read_bytes(), flash_size=end)
    with pytest.raises(FormatError, match="flash"):
        ota_core.check_partition_table(table, flash_size=end - 1)
    with pytest.raises(FormatError, match="flash"):
        ota_core.parse_partition_table(path.read_bytes(), flash_size=end - 1)


@by_name
def test_every_truncation_before_the_end_marker_is_refused(path: Path) -> None:
    data = path.read_bytes()
    end = description(path)["expected"]["terminator_offset"] + 32
    for size in range(end):
        with pytest.raises(FormatError):
            ota_core.parse_partition_table(data[:size])
    assert ota_core.parse_partition_table(data[:end]) == expected_table(path)


def test_one_wrong_bit_in_the_rows_is_noticed_by_the_md5() -> None:
    path = next(path for path in TABLES if path.stem == "gateway_2mb")
    data = path.read_bytes()
    rows = description(path)["expected"]["terminator_offset"]
    for offset in range(rows):
        for bit in (0, 7):
            wrong = bytearray(data)
            wrong[offset] ^= 1 << bit
            if rows - 32 + 2 <= offset < rows - 16:
                ota_core.parse_partition_table(bytes(wrong))  # the fill of the MD5 row is looked at by nobody
            else:
                with pytest.raises(FormatError):
                    ota_core.parse_partition_table(bytes(wrong))


def test_a_second_md5_row_is_refused() -> None:
    path = next(path for path in TABLES if path.stem == "two_ota")
    data = path.read_bytes()
    end = description(path)["expected"]["terminator_offset"]
    twice = data[:end] + data[end - 32 : end] + data[end:-32]
    with pytest.raises(FormatError, match="second MD5"):
        ota_core.parse_partition_table(twice)
    behind = data[:end] + data[:32] + data[end:-32]
    with pytest.raises(FormatError, match="behind the MD5"):
        ota_core.parse_partition_table(behind)


def test_94_partitions_are_the_most() -> None:
    path = next(path for path in TABLES if path.stem == "full_94_entries")
    table = ota_core.parse_partition_table(path.read_bytes())
    assert len(table.partitions) == 94
    extra = Partition("p94", 1, 0x99, 0x100000, 0x1000)
    with pytest.raises(FormatError, match="too many"):
        ota_core.build_partition_table(PartitionTable((*table.partitions, extra)))
    without_md5 = PartitionTable((*table.partitions, extra), has_md5=False)
    assert ota_core.parse_partition_table(ota_core.build_partition_table(without_md5)) == without_md5
    with pytest.raises(FormatError, match="too many"):
        ota_core.build_partition_table(PartitionTable((*table.partitions, extra, extra), has_md5=False))
    with pytest.raises(FormatError, match="room"):
        ota_core.partition_table_from_csv(path.with_suffix(".csv").read_text() + "p94, data, 0x99, , 0x1000,\n")
