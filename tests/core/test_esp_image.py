"""ESP images over the border: whatever the bytes, the checker ends in a result; what was built is found again."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmaker_ota import esp_build, ota_core
from rmaker_ota.errors import ArgumentError, DataError, ImageError, OtaError, RejectedError
from rmaker_ota.esp_build import build_image
from rmaker_ota.inspect import app_description

SMALL = build_image(size=1024)
KINDS = st.sampled_from(["app", "bootloader", "any"])


def result(pieces: list[bytes], **rules: Any) -> tuple[Any, str | None, int | None]:
    """What was found, and how it ended, when the image comes in these pieces."""
    checker = ota_core.ImageChecker(**rules)
    try:
        for piece in pieces:
            checker.update(piece)
        checker.finish()
    except OtaError as error:
        found = checker.result()
        assert found.error is not None
        assert (found.error.status, str(found.error), found.error.offset) == (error.status, str(error), error.offset)
        return (found.header, found.descriptor, found.segments, found.size), error.status, error.offset
    found = checker.result()
    assert found.error is None
    return (found.header, found.descriptor, found.segments, found.size), None, None


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A right image with a few bytes changed, cut somewhere, or with something behind it."""
    image = bytearray(draw(st.sampled_from([SMALL, build_image(size=336), build_image(size=70000)])))
    for _ in range(draw(st.integers(0, 4))):
        image[draw(st.one_of(st.integers(0, 300), st.integers(0, len(image) - 1)))] = draw(st.integers(0, 255))
    end = draw(st.one_of(st.just(len(image)), st.integers(0, len(image))))
    return bytes(image[:end]) + draw(st.binary(max_size=8))


@st.composite
def sliced(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(st.binary(max_size=600), KINDS)
def test_any_bytes_end_in_a_result(data: bytes, kind: Any) -> None:
    image = ota_core.parse_image(data, kind=kind)
    assert image.error is not None
    assert image.size == 0 or image.header is not None


@given(st.data(), damaged(), KINDS)
def test_slices_do_not_matter(data: st.DataObject, image: bytes, kind: Any) -> None:
    pieces = data.draw(sliced(image))
    assert result(pieces, kind=kind) == result([image], kind=kind)


@given(st.binary(max_size=300))
def test_records_are_parsed_or_refused(data: bytes) -> None:
    for parse in (ota_core.parse_image_header, ota_core.parse_app_descriptor):
        try:
            parse(data)
        except OtaError as error:
            assert error.status in {
                "ERR_INCOMPLETE",
                "ERR_IMAGE_MAGIC",
                "ERR_IMAGE_STRUCTURE",
                "ERR_IMAGE_DESCRIPTOR",
                "ERR_UNSUPPORTED",
            }


@given(st.binary(min_size=288, max_size=288))
def test_a_descriptor_of_any_bytes_gives_text(data: bytes) -> None:
    raw = bytearray(data)
    raw[32:36] = b"\x32\x54\xcd\xab"
    descriptor = ota_core.parse_app_descriptor(bytes(raw))
    for text in (descriptor.version, descriptor.project_name, descriptor.idf_version, descriptor.time):
        assert "\0" not in text
        text.encode("utf-8")  # can be shown and sent


text32 = st.text(max_size=32).filter(lambda text: "\0" not in text and len(text.encode()) <= 32)


@given(
    lines=st.integers(0, 200),
    version=text32,
    project_name=text32,
    secure_version=st.integers(0, 2**32 - 1),
    chip_id=st.sampled_from([chip.id for chip in ota_core.esp_chips()] + [77]),
    min_chip_rev=st.integers(0, 65535),
    max_chip_rev=st.integers(0, 65535),
    spi_flash_mode=st.integers(0, 5),
    hash_appended=st.booleans(),
    padding=st.integers(0, 40),
)
def test_what_was_built_is_found_again(lines: int, **given_: Any) -> None:
    smallest = 336 if given_["hash_appended"] else 304
    size = smallest + 16 * lines + given_["padding"]
    data = build_image(size=size, **given_)
    assert len(data) == size
    image = ota_core.parse_image(data, kind="app")
    assert image.error is None
    assert image.size == size - given_["padding"]
    assert image.bytes_after == given_["padding"]
    header, descriptor = image.header, image.descriptor
    assert header is not None
    assert descriptor is not None
    assert (descriptor.version, descriptor.project_name) == (given_["version"], given_["project_name"])
    assert descriptor.secure_version == given_["secure_version"]
    assert descriptor.spi_flash_mode == given_["spi_flash_mode"]
    assert (header.min_chip_rev_full, header.max_chip_rev_full) == (given_["min_chip_rev"], given_["max_chip_rev"])
    assert (header.chip_id, header.hash_appended) == (given_["chip_id"], given_["hash_appended"])


@pytest.mark.parametrize("size", [8192, 12288, 32768, 40960, 49152, 65536, 65808, 65824, 102400, 204800, 2 << 20])
def test_sizes_of_real_updates_are_reached(size: int) -> None:
    image = ota_core.parse_image(build_image(size=size), kind="app", chip_id=5, chip_revision=4, slot_size=size)
    assert image.error is None
    assert image.size == size
    assert image.header is not None
    assert image.header.segment_count == len(image.segments)


@pytest.mark.parametrize("over", range(-32, 64, 16))
def test_images_beyond_16_mib_have_more_segments(over: int) -> None:
    size = 0x10020 + 0xFF0000 + 16 + 32 + over
    image = ota_core.parse_image(build_image(size=size), kind="app")
    assert image.error is None
    assert len(image.segments) == (4 if over > 0 else 3)
    assert all(segment.size < 1 << 24 for segment in image.segments)


@pytest.mark.parametrize("chip", ota_core.esp_chips(), ids=lambda chip: chip.name)
def test_every_chip_gets_images_it_accepts(chip: Any) -> None:
    for size in (336, 102400):
        image = ota_core.parse_image(build_image(size=size, chip_id=chip.id), kind="app", chip_id=chip.id)
        assert image.error is None
        assert image.segments[0].mapped
        assert image.segments[-1].mapped


@pytest.mark.parametrize(
    ("defect", "status"),
    [
        ({"bad_magic": True}, "ERR_IMAGE_MAGIC"),
        ({"bad_desc_magic": True}, "ERR_IMAGE_DESCRIPTOR"),
        ({"bad_checksum": True}, "ERR_IMAGE_CHECKSUM"),
        ({"bad_sha": True}, "ERR_IMAGE_HASH"),
        ({"padding": 4096}, None),
        ({"chip_id": 9}, "ERR_IMAGE_CHIP"),
        ({"min_chip_rev": 101}, "ERR_IMAGE_REVISION"),
        ({"max_chip_rev": 3}, "ERR_IMAGE_REVISION"),
        ({"min_chip_rev": 4, "max_chip_rev": 4}, None),
        ({"spi_flash_mode": 1}, "ERR_IMAGE_FLASH_MODE"),
        ({"min_efuse_block_rev": 2}, "ERR_IMAGE_REVISION"),
        ({"hash_appended": False}, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_defects_are_what_they_are_called(defect: dict[str, Any], status: str | None) -> None:
    data = build_image(size=40960, **defect)
    assert len(data) == 40960
    image = ota_core.parse_image(data, kind="app", chip_id=5, chip_revision=4, efuse_block_revision=1, spi_flash_mode=3)
    assert (image.error.status if image.error is not None else None) == status
    if "bad_desc_magic" not in defect:
        assert ota_core.parse_app_descriptor(data[:288]).version == "1.0.0"


def test_images_differ_by_version_and_seed_and_by_nothing_else() -> None:
    assert build_image(version="1.0.0") == build_image(version="1.0.0")
    different = {
        hashlib.sha256(image).digest()
        for image in (build_image(), build_image(version="2.0.0"), build_image(seed="x"), build_image(project_name="y"))
    }
    assert len(different) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 335},
        {"size": 320},
        {"size": 1000},
        {"size": 1024, "padding": 8},
        {"size": 1024, "padding": -16},
        {"version": "v" * 33},
        {"version": "a\0b"},
        {"project_name": "ü" * 17},
        {"secure_version": -1},
        {"chip_id": 65536},
        {"max_chip_rev": -1},
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        build_image(**wrong)


def test_the_smallest_image_holds_its_descriptor_alone() -> None:
    image = ota_core.parse_image(build_image(size=esp_build.MIN_SIZE, hash_appended=False), kind="app")
    assert image.error is None
    assert [segment.size for segment in image.segments] == [256]


def test_rules_are_checked() -> None:
    with pytest.raises(ArgumentError, match="kind"):
        ota_core.parse_image(SMALL, kind="application")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chip"):
        ota_core.parse_image(SMALL, chip=5)  # type: ignore[call-arg]
    with pytest.raises(OverflowError):
        ota_core.parse_image(SMALL, chip_id=-1)


def test_a_result_carries_the_exception_that_would_be_raised() -> None:
    image = ota_core.parse_image(SMALL, chip_id=9)
    assert isinstance(image.error, RejectedError)
    assert "ESP32-S3" in str(image.error)
    image = ota_core.parse_image(b"<html>", kind="app")
    assert isinstance(image.error, ImageError)
    assert image.header is None


def test_the_header_gate_sees_the_descriptor_of_a_damaged_image() -> None:
    assert app_description(SMALL[:288]).chip_id == 5
    damaged_header = app_description(build_image(size=1024, bad_magic=True)[:288])
    assert (damaged_header.version, damaged_header.chip_id) == ("1.0.0", None)
    with pytest.raises(ImageError, match="descriptor"):
        app_description(build_image(size=1024, bad_desc_magic=True)[:288])
    with pytest.raises(ImageError, match="magic byte"):
        app_description(b"<!DOCTYPE html>".ljust(288))
    with pytest.raises(DataError):
        app_description(SMALL[:287])


def test_any_buffer_will_do() -> None:
    whole = ota_core.parse_image(SMALL)
    assert ota_core.parse_image(bytearray(SMALL)) == whole
    assert ota_core.parse_image(memoryview(SMALL)) == whole
    assert ota_core.parse_image(b"").error is not None


def test_chips_have_names() -> None:
    assert ota_core.esp_chip_id("esp32c3") == ota_core.esp_chip_id("ESP32-C3") == 5
    with pytest.raises(ArgumentError, match="esp8266"):
        ota_core.esp_chip_id("esp8266")
