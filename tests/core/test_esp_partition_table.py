"""Partition tables over the border: hostile bytes and text end in an error or a table; what is built reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, FormatError
from rmaker_ota.esp_format import Partition, PartitionTable

TWO_SLOTS = """
nvs,      data, nvs,     ,        0x4000,
otadata,  data, ota,     ,        0x2000,
phy_init, data, phy,     ,        0x1000,
ota_0,    app,  ota_0,   ,        1M,
ota_1,    app,  ota_1,   ,        1M,
"""
BINARY = ota_core.build_partition_table(ota_core.partition_table_from_csv(TWO_SLOTS))

labels = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=16).filter(
    lambda label: len(label.encode()) <= 16
)
u32 = st.integers(0, 2**32 - 1)
partitions = st.builds(Partition, labels, st.integers(0, 255), st.integers(0, 255), u32, u32, u32)
tables = st.builds(PartitionTable, st.lists(partitions, min_size=1, max_size=94).map(tuple), st.booleans())


@given(tables)
def test_what_is_built_reads_back(table: PartitionTable) -> None:
    binary = ota_core.build_partition_table(table)
    assert len(binary) == 0xC00
    parsed = ota_core.parse_partition_table(binary)
    assert parsed == table
    assert ota_core.build_partition_table(parsed) == binary


@given(st.data())
def test_damaged_tables_are_refused_or_read(data: st.DataObject) -> None:
    raw = bytearray(BINARY)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
    binary = bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, 300)))])
    try:
        table = ota_core.parse_partition_table(binary, flash_size=4 << 20)
    except FormatError as error:
        assert str(error)
        assert error.stage == "target"
        return
    assert ota_core.parse_partition_table(ota_core.build_partition_table(table)) == table
    ota_core.partition_table_to_csv(table).encode("utf-8")
    for partition in table.partitions:
        assert partition.end <= 4 << 20


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    try:
        table = ota_core.parse_partition_table(b"\xaa\x50" + data)
    except FormatError:
        return
    assert table.partitions


@given(st.one_of(st.text(max_size=200), st.binary(max_size=200)))
def test_any_text_is_refused_or_read(text: str | bytes) -> None:
    try:
        table = ota_core.partition_table_from_csv(text)
    except FormatError as error:
        assert str(error)
        return
    assert table.partitions


fields = st.sampled_from(
    ["", "a", "nvs", "app", "data", "ota_0", "0x1000", "4K", "1M", "-64K", "0x10000", "$X", "readonly", "7", "fat", " "]
)


@given(st.lists(st.lists(fields, min_size=1, max_size=8).map(",".join), max_size=6).map("\n".join))
def test_text_that_looks_like_csv_is_refused_or_gives_a_table_that_passes_its_checks(text: str) -> None:
    try:
        table = ota_core.partition_table_from_csv(text, variables={"X": "0x2000"})
    except FormatError as error:
        assert str(error).startswith(("line ", "the CSV"))
        return
    ota_core.check_partition_table(table)
    again = ota_core.partition_table_from_csv(ota_core.partition_table_to_csv(table))
    assert again == table


def test_errors_name_line_and_field() -> None:
    with pytest.raises(FormatError, match=r"line 2, size: \"lots\"") as caught:
        ota_core.partition_table_from_csv("# comment\nnvs,data,nvs,,lots\n")
    assert caught.value.offset == len("# comment\n")
    assert caught.value.status == "ERR_PARTITION_TABLE"


def test_variables_and_options_are_used() -> None:
    table = ota_core.partition_table_from_csv(
        "boot, bootloader, primary, N/A, N/A\napp, app, factory, $AT, ${SIZE}",
        variables={"AT": "0x20000", "SIZE": "128K"},
        table_offset=0x10000,
        bootloader_offset=0x2000,
    )
    assert [(p.label, p.offset, p.size) for p in table.partitions] == [
        ("boot", 0x2000, 0xE000),
        ("app", 0x20000, 0x20000),
    ]
    with pytest.raises(FormatError, match="flash"):
        ota_core.partition_table_from_csv(TWO_SLOTS, flash_size=2 << 20)
    with pytest.raises(FormatError, match="0x10000"):
        ota_core.partition_table_from_csv("a,app,factory,,68K", secure_boot_v1=True)
    with pytest.raises(TypeError, match="flashsize"):
        ota_core.partition_table_from_csv(TWO_SLOTS, flashsize=1)  # type: ignore[call-arg]


def test_numbers_that_do_not_fit_are_refused() -> None:
    for wrong in (
        Partition("x" * 17, 1, 2, 0x9000, 0x1000),
        Partition("x", 256, 2, 0x9000, 0x1000),
        Partition("x", 1, 2, 1 << 32, 0x1000),
        Partition("x", 1, 2, 0x9000, -1),
    ):
        with pytest.raises(ArgumentError):
            ota_core.build_partition_table(PartitionTable((wrong,)))
    with pytest.raises(ArgumentError, match="too many"):
        ota_core.build_partition_table(PartitionTable((Partition("x", 1, 2, 0x9000, 0x1000),) * 97))
    with pytest.raises(FormatError, match="at least one"):
        ota_core.build_partition_table(PartitionTable(()))


def test_a_label_that_is_not_text_is_shown_and_kept() -> None:
    raw = bytearray(BINARY)
    raw[12:16] = b"\xff\xfe\0z"
    raw[5 * 32 : 6 * 32] = b"\xff" * 32  # no MD5 row
    table = ota_core.parse_partition_table(bytes(raw))
    assert table.partitions[0].label == r"\xff\xfe"
    assert ota_core.build_partition_table(table) == bytes(raw)


def test_parts_are_found_by_kind_and_name() -> None:
    table = ota_core.parse_partition_table(BINARY)
    otadata = table.find(1, 0)
    assert otadata is not None
    assert otadata == table.named("otadata")
    assert otadata.end == 0xF000
    assert table.find(1, 99) is None
    assert table.named("none") is None
    assert ota_core.partition_names(0, 0x1F) == ("app", "ota_15")
    assert ota_core.partition_names(0x40, 7) == ("64", "7")
    layout = ota_core.partition_layout(table)
    assert layout.otadata == otadata
    assert [slot.label for slot in layout.slots] == ["ota_0", "ota_1"]
    with pytest.raises(FormatError, match="gap"):
        ota_core.partition_layout(ota_core.partition_table_from_csv("a,app,ota_1,,64K"))
