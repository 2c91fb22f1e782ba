"""One image into several chips at once, over doubles on pseudo terminals."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmaker_ota.errors import ArgumentError, CancelledError, NotFoundError, RejectedError
from rmaker_ota.install import ImagePolicy, InstallOptions
from rmaker_ota.targets.base import Target
from rmaker_ota.targets.esp32_fleet import ChipResult, Esp32Fleet, install_fleet
from tests.flows.test_esp32_serial import Bench, image
from tests.sim.esp_chip import Fault
from tests.sim.esp_chip.faults import LOSE_REPLY
from tests.sim.esp_chip.opcodes import FLASH_DEFL_DATA


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    with made.stack:
        yield made


def test_two_chips_share_one_download_and_one_stream(bench: Bench) -> None:
    chips = [bench.chip(), bench.chip()]
    targets = [bench.target(chip) for chip in chips]
    new = image("2.0.0")
    seen: list[tuple[ChipResult, ...]] = []
    result = install_fleet(new, targets, restart=True, on_progress=lambda now, each: seen.append(each))
    assert result.error is None
    assert result.failed == ()
    assert result.install is not None
    assert result.install.version == "2.0.0"
    assert seen
    for chip, one in zip(chips, result.chips, strict=True):
        assert (one.slot, one.phase, one.verified, one.committed) == ("ota_1", "done", True, True)
        assert one.counts is not None
        assert one.counts["programmed"] + one.counts["skipped"] + one.counts["blank"] == len(new)
        assert one.boot is not None
        assert chip.wait_mode("app")
        assert chip.running is not None
        assert chip.running.version == "2.0.0"
    assert result.store["compressed"] <= len(new)


def test_what_happens_to_one_chip_does_not_happen_to_the_others(bench: Bench) -> None:
    good, other = bench.chip(), bench.chip(persona="esp32s3")
    targets = [bench.target(good), bench.target(other)]
    result = install_fleet(image("2.0.0"), ["esp32-serial:/dev/ttyUSB9999", *targets], restart=True)
    assert result.error is None
    missing, first, second = result.chips
    assert isinstance(missing.error, NotFoundError)
    assert first.error is None
    assert isinstance(second.error, RejectedError)
    assert "chip id 5" in str(second.error)
    for chip, version in ((good, "2.0.0"), (other, "1.0.0")):
        assert chip.wait_mode("app")
        assert chip.running is not None
        assert chip.running.version == version


def test_every_chip_has_its_own_policy_and_none_is_an_error(bench: Bench) -> None:
    chips = [bench.chip("1.0.0"), bench.chip("2.0.0")]
    targets = [bench.target(chip) for chip in chips]
    result = install_fleet(image("2.0.0"), targets, policy=ImagePolicy)
    assert result.error is None
    assert [chip.error is None for chip in result.chips] == [True, False]
    assert isinstance(result.chips[1].error, RejectedError)
    result = install_fleet(image("2.0.0", project="fan"), targets, policy=ImagePolicy)
    assert isinstance(result.error, RejectedError)
    assert len(result.failed) == 2


def test_an_image_that_is_there_is_not_written_again_and_a_kept_stream_is_used(bench: Bench, tmp_path: Path) -> None:
    chips = [bench.chip(), bench.chip()]
    targets = [bench.target(chip, cache=str(tmp_path / "kept")) for chip in chips]
    new = image("2.0.0")
    options = InstallOptions(sha256=hashlib.sha256(new).digest(), md5=hashlib.md5(new).digest())
    assert install_fleet(new, targets[:1], options=options).failed == ()
    result = install_fleet(new, targets, options=options)
    assert result.failed == ()
    assert [chip.identical for chip in result.chips] == [True, False]
    assert result.store["cached"] is True
    assert result.store["compressed"] == 0
    first = result.chips[0].counts
    assert first is not None
    assert (first["probes"], first["programmed"], first["skipped"]) == (1, 0, len(new))


def test_a_cancel_ends_all_and_the_old_images_run(bench: Bench) -> None:
    chips = [bench.chip(), bench.chip()]
    for chip in chips:  # both wait for an answer that does not come
        chip.faults.add(Fault(LOSE_REPLY, FLASH_DEFL_DATA))
    targets = [bench.target(chip) for chip in chips]
    cancel = threading.Event()

    def progress(now: object, each: tuple[ChipResult, ...]) -> None:
        if all(chip.phase == "writing" for chip in each):
            cancel.set()

    options = InstallOptions(progress_interval_s=0.01)
    result = install_fleet(image("2.0.0"), targets, options=options, on_progress=progress, cancel=cancel)
    assert isinstance(result.error, CancelledError)
    assert len(result.failed) == 2
    for chip, target in zip(chips, targets, strict=True):
        target.close()
        assert chip.wait_mode("app")
        assert chip.running is not None
        assert chip.running.version == "1.0.0"


def test_jobs_one_writes_one_after_the_other(bench: Bench) -> None:
    chips = [bench.chip(), bench.chip()]
    busy: list[int] = []

    def progress(now: object, each: tuple[ChipResult, ...]) -> None:
        busy.append(sum(chip.phase in {"comparing", "erasing", "writing", "verifying"} for chip in each))

    result = install_fleet(
        image("2.0.0"),
        [bench.target(chip) for chip in chips],
        jobs=1,
        options=InstallOptions(progress_interval_s=0.01),
        on_progress=progress,
    )
    assert result.failed == ()
    assert max(busy) == 1


def test_a_fleet_of_nothing_and_one_of_other_things_are_refused(bench: Bench) -> None:
    target: Target = bench.target(bench.chip())
    with pytest.raises(ArgumentError, match="without targets"):
        Esp32Fleet([])
    with pytest.raises(ArgumentError, match="each of them once"):
        Esp32Fleet([target, target])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="esp32-serial"):
        Esp32Fleet(["file:/tmp/x"])
    with pytest.raises(NotFoundError):
        Esp32Fleet(["esp32-serial:/dev/ttyUSB9999"])
