"""The border of NVS: values both ways, errors, and any series of changes against a dict."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, FormatError, NotFoundError, StateError
from rmaker_ota.nvs import NvsOp, NvsType, NvsValue

PAGE = 4096
ERASED = b"\xff" * (3 * PAGE)
KEYS = bytes(range(64))

NUMBERS: dict[NvsType, tuple[int, int]] = {
    "u8": (0, 2**8 - 1),
    "i8": (-(2**7), 2**7 - 1),
    "u16": (0, 2**16 - 1),
    "i16": (-(2**15), 2**15 - 1),
    "u32": (0, 2**32 - 1),
    "i32": (-(2**31), 2**31 - 1),
    "u64": (0, 2**64 - 1),
    "i64": (-(2**63), 2**63 - 1),
}

names = (
    st.text(min_size=1, max_size=15)
    .filter(lambda s: len(s.encode("utf-8", "surrogateescape")) <= 15)
    .filter(lambda s: "\0" not in s)
)


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=80)


def typed_values() -> st.SearchStrategy[tuple[NvsType, NvsValue]]:
    numbers = [st.tuples(st.just(name), st.integers(low, high)) for name, (low, high) in NUMBERS.items()]
    others: list[st.SearchStrategy[tuple[NvsType, NvsValue]]] = [
        st.tuples(st.just("str"), texts()),
        st.tuples(st.just("blob"), st.binary(max_size=200)),
        st.tuples(st.just("blob"), st.integers(0, 3000).map(lambda n: bytes(range(1, 252)) * (n // 251 + 1))),
        st.tuples(st.just("double"), st.floats(allow_nan=False)),
        st.tuples(st.just("float"), st.floats(allow_nan=False, width=32)),
    ]
    return st.one_of(*numbers, *others)


def fixed_names(nonempty: list[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(nonempty)


changes = st.lists(
    st.tuples(fixed_names(["rmaker_ota", "a"]), fixed_names(["k", "ota_written", "x"]), st.none() | typed_values()),
    max_size=40,
)


def as_dict(nvs: ota_core.Nvs) -> dict[tuple[str | None, str], tuple[str, NvsValue]]:
    found = {(item.namespace, item.key): (item.type, item.value) for item in nvs.items()}
    assert len(found) == len(nvs.items())
    return found


@settings(deadline=None)
@given(changes=changes, encrypted=st.booleans(), purge=st.booleans(), page_count=st.integers(3, 5))
def test_any_series_of_changes_leaves_what_a_dict_holds(
    changes: list[tuple[str, str, tuple[NvsType, NvsValue] | None]], encrypted: bool, purge: bool, page_count: int
) -> None:
    keys = KEYS if encrypted else None
    partition = bytearray(b"\xff" * (page_count * PAGE))
    model: dict[tuple[str | None, str], tuple[str, NvsValue]] = {}
    for namespace, key, change in changes:
        if change is None:
            if model.pop((namespace, key), None) is None:
                with pytest.raises(NotFoundError):
                    ota_core.nvs_erase(partition, namespace, key, keys=keys, purge=purge)
                continue
            operations = ota_core.nvs_erase(partition, namespace, key, keys=keys, purge=purge)
        else:
            same = model.get((namespace, key)) == change and repr(model[namespace, key]) == repr(change)
            operations = ota_core.nvs_set(partition, namespace, key, *change, keys=keys, purge=purge)
            assert (operations == []) == same
            model[namespace, key] = change
        ota_core.nvs_apply(partition, operations)
        nvs = ota_core.Nvs(partition, keys)
        assert as_dict(nvs) == model
        assert nvs.repair_count == 0
        assert nvs.image == partition
        assert any(partition[i : i + PAGE] == b"\xff" * PAGE for i in range(0, len(partition), PAGE))


@settings(deadline=None)
@given(namespace=names, key=names, change=typed_values())
def test_any_name_and_value_comes_back(namespace: str, key: str, change: tuple[NvsType, NvsValue]) -> None:
    nvs = ota_core.Nvs(ERASED)
    nvs.set(namespace, key, *change)
    assert nvs.get(namespace, key) == change[1]
    assert nvs.get(namespace, key, change[0]) == change[1]
    assert nvs.namespaces == {namespace: 1}
    assert nvs.items() == [(namespace, key, *change)]
    with pytest.raises(NotFoundError):
        nvs.get(namespace, key + "x" if len(key) < 10 else "x")


@settings(deadline=None)
@given(data=st.binary(max_size=3 * PAGE), keys=st.none() | st.binary(min_size=64, max_size=64))
def test_arbitrary_bytes_never_crash(data: bytes, keys: bytes | None) -> None:
    padded = data + b"\xff" * (-len(data) % PAGE)
    for candidate in (data, padded):
        try:
            nvs = ota_core.Nvs(candidate, keys)
        except (ArgumentError, FormatError):
            continue
        repaired = bytearray(candidate)
        ota_core.nvs_apply(repaired, nvs.operations())
        assert repaired == nvs.image
        assert ota_core.Nvs(repaired, keys).items() == nvs.items()


def history() -> bytes:
    nvs = ota_core.Nvs(b"\xff" * (4 * PAGE))
    for i in range(200):
        nvs.set("rmaker_ota", "ota_written", "u16", i)
        nvs.set("rmaker_ota", f"text{i % 7}", "str", "x" * i)
        nvs.set("other", f"blob{i % 3}", "blob", bytes(i * 7))
    return nvs.image


HISTORY = history()


@settings(deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(HISTORY) - 1), st.integers(0, 255)), min_size=1, max_size=12),
    keys=st.none() | st.just(KEYS),
)
def test_mutated_partitions_never_crash_and_take_a_value_or_say_why_not(
    flips: list[tuple[int, int]], keys: bytes | None
) -> None:
    partition = bytearray(HISTORY)
    for at, value in flips:
        partition[at] = value
    try:
        operations = ota_core.nvs_set(partition, "rmaker_ota", "mqtt_ota_off", "u32", 7, keys=keys)
    except FormatError:
        return
    ota_core.nvs_apply(partition, operations)
    assert ota_core.nvs_get(partition, "rmaker_ota", "mqtt_ota_off", keys=keys) == 7


@settings(deadline=None)
@given(cut=st.integers(0, 400), inside=st.integers(0, 4096))
def test_a_cut_anywhere_leaves_the_old_or_the_new_value(cut: int, inside: int) -> None:
    partition = bytearray(HISTORY)
    operations = ota_core.nvs_set(partition, "other", "blob1", "blob", b"new" * 1500)
    cut = min(cut, len(operations))
    ota_core.nvs_apply(partition, operations[:cut])
    if cut < len(operations):
        operation = operations[cut]
        part = operation.data[:inside]
        partition[operation.offset : operation.offset + len(part)] = part
    old = ota_core.nvs_get(HISTORY, "other", "blob1")
    nvs = ota_core.Nvs(partition)
    assert nvs.get("other", "blob1") in (old, b"new" * 1500)
    assert len(nvs.items()) == len(ota_core.parse_nvs(HISTORY))
    nvs.set("rmaker_ota", "ota_written", "u16", 9)
    ota_core.nvs_apply(partition, nvs.operations())
    assert ota_core.nvs_get(partition, "rmaker_ota", "ota_written") == 9
    assert ota_core.Nvs(partition).repair_count == 0


def test_values_of_the_wrong_kind_are_refused() -> None:
    nvs = ota_core.Nvs(ERASED)
    for type_name, value in [
        ("u8", "1"), ("u8", True), ("u8", 1.0), ("str", b"x"), ("blob", "x"), ("float", "1"), ("double", True)
    ]:  # fmt: skip
        with pytest.raises(TypeError):
            nvs.set("a", "k", type_name, value)  # type: ignore[arg-type]
    for name, (low, high) in NUMBERS.items():
        for value in (low - 1, high + 1):
            with pytest.raises(ArgumentError):
                nvs.set("a", "k", name, value)
    for arguments in [
        ("", "k", "u8", 1), ("a", "", "u8", 1), ("a", "k" * 16, "u8", 1), ("a" * 16, "k", "u8", 1),
        ("a", "k\0", "u8", 1), ("a", "k", "u9", 1), ("a", "k", "str", "x" * 4000), ("a", "k", "str", "x\0y"),
        ("a", "k", "blob", bytes(8001)), ("a", "k", "float", 1e39),
    ]:  # fmt: skip
        with pytest.raises(ArgumentError):
            nvs.set(*arguments)  # type: ignore[arg-type]
    for arguments in [("a", "k\ud800", "u8", 1), ("\ud800", "k", "u8", 1), ("a", "k", "str", "\ud800")]:
        with pytest.raises(ArgumentError):
            nvs.set(*arguments)  # type: ignore[arg-type]
    assert nvs.operations() == []


def test_sizes_that_are_not_whole_pages_are_refused() -> None:
    for size in (0, 1, PAGE - 1, PAGE + 1, 16 * 1024 * 1024 + PAGE):
        with pytest.raises(ArgumentError):
            ota_core.parse_nvs(bytes(size))


def test_a_newer_format_is_refused_by_its_esp_error() -> None:
    header = bytearray(b"\xff" * PAGE)
    header[0:9] = struct.pack("<IIB", 0xFFFFFFFE, 0, 0xFD)
    header[28:32] = struct.pack("<I", zlib.crc32(bytes(header[4:28]), 0xFFFFFFFF))
    with pytest.raises(FormatError) as caught:
        ota_core.parse_nvs(bytes(header))
    assert caught.value.device_code == 0x1110
    assert caught.value.status == "ERR_NVS"


def test_a_full_partition_says_so_and_stays_as_it_was() -> None:
    nvs = ota_core.Nvs(ERASED)
    with pytest.raises(FormatError) as caught:
        for i in range(100):
            nvs.set("a", f"k{i}", "blob", bytes([i]) * 700)
    assert caught.value.status == "ERR_NVS_FULL"
    count = len(nvs.items())
    before = nvs.image
    with pytest.raises(FormatError):
        nvs.set("a", "more", "blob", bytes(700))
    assert (len(nvs.items()), nvs.image) == (count, before)


def test_wrong_keys_read_nothing_and_write_nothing() -> None:
    nvs = ota_core.Nvs(ERASED, KEYS)
    nvs.set("a", "k", "str", "secret")
    for keys in (None, bytes(reversed(KEYS))):
        other = ota_core.Nvs(nvs.image, keys)
        assert other.items() == []
        assert other.damaged > 0
        with pytest.raises(FormatError):
            other.set("a", "k", "u8", 1)
    with pytest.raises(FormatError):
        ota_core.Nvs(nvs.image, b"\xff" * PAGE)
    with pytest.raises(ArgumentError):
        ota_core.Nvs(nvs.image, bytes(64))


def test_operations_are_checked_before_they_are_applied() -> None:
    partition = bytearray(ERASED)
    operations = ota_core.nvs_set(partition, "a", "k", "u8", 1)
    assert {operation.op for operation in operations} == {"program"}
    ota_core.nvs_apply(partition, operations)
    with pytest.raises(StateError):
        ota_core.nvs_apply(partition, [NvsOp("program", 0, b"\xff")])
    with pytest.raises(ArgumentError):
        ota_core.nvs_apply(partition, [NvsOp("program", len(partition), b"\0")])
    with pytest.raises(ArgumentError):
        ota_core.nvs_apply(partition, [NvsOp("erase", 1, b"\xff" * PAGE)])
    ota_core.nvs_apply(partition, [NvsOp("erase", 0, b"\xff" * PAGE)])
    assert partition == ERASED


def test_credentials_of_the_factory_partition_are_blobs() -> None:
    nvs = ota_core.Nvs(b"\xff" * 0x6000)
    nvs.set("rmaker_creds", "node_id", "blob", b"AABBCCDDEEFF")
    nvs.set("rmaker_creds", "client_cert", "blob", b"-----BEGIN CERTIFICATE-----\n" + b"A" * 2000)
    nvs.set("rmaker_creds", "random", "blob", bytes(range(64)))
    assert ota_core.nvs_get(nvs.image, "rmaker_creds", "node_id", "blob") == b"AABBCCDDEEFF"
    assert ota_core.nvs_get(nvs.image, "rmaker_creds", "random") == bytes(range(64))
