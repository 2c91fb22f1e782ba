"""The power goes, or an operation fails, at every point of an update of a virtual ESP32.

Whole flows, as the command line and a node do them: install (through the engine), restart, confirm or reject, restart.
Each is repeated with the flash losing its power in operation 0, 1, 2, ... (and in the middle of it), then with the n-th
operation failing, until none does. Then the power comes back: a new process opens what is left, and restarts. It must
find an intact old or new image every time, go on finding one, tell the truth about it, and be able to update again.
That every sync is where it must be is checked by tests/csrc/test_esp_target.c, on a flash that has a cache.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rmaker_ota.errors import DeviceError, OtaError, PendingVerifyError, StateError
from rmaker_ota.install import Installer, InstallOptions, ResumePoint, install
from rmaker_ota.ota_core import Fault
from rmaker_ota.targets import chip_record
from rmaker_ota.targets.base import BootState
from rmaker_ota.targets.chip_record import ChipRecord
from rmaker_ota.targets.esp32_image import Esp32ImageTarget
from tests.python.chips import image, make_chip, memory_directory, slot_bytes, spoil, version_of

CHANGES = Fault.WRITE | Fault.ERASE | Fault.SYNC
# bytes of the cut write or erase that still happen: none, the sequence, all but the CRC, all but one, half a sector...
TORN = [0, 4, 28, 31, 2048, 1 << 30]
NEW = "3.0.0"
OPTIONS = InstallOptions(threads=False, buffer_size=4096)


@dataclass
class Flow:
    """One course of events, and what was promised to its user when it ended.

    Attributes:
        entries, running, factory, rollback: the chip at the start.
        spoiled: the slot that is going to be written holds no image that boots.
        confirm: the new image is confirmed; else it is rejected.
    """

    name: str
    entries: tuple[str, str]
    running: str
    factory: bool = False
    rollback: bool = True
    confirm: bool = True
    spoiled: bool = False
    done: list[str] = field(default_factory=list)

    @property
    def old(self) -> str:
        return {"ota_0": "1.0.0", "ota_1": "2.0.0", "factory": "0.9.0"}[self.running]

    @property
    def next(self) -> str:
        return "ota_1" if self.running == "ota_0" else "ota_0"

    def start(self, path: Path) -> None:
        make_chip(path, self.entries, factory=self.factory, running=self.running, rollback=self.rollback)
        if self.spoiled:
            spoil(path, self.next)
        self.done = []

    def run(self, target: Esp32ImageTarget) -> None:
        def step(name: str, action: Callable[[], object]) -> None:
            action()
            self.done.append(name)

        step("install", lambda: install(image(NEW), target, options=OPTIONS))
        step("restart", target.restart)
        assert version_of(target) == NEW
        if self.confirm:
            step("confirm", target.mark_valid)
        else:
            step("reject", target.mark_invalid)
        step("restart again", target.restart)
        assert version_of(target) == (NEW if self.confirm else self.old)


FLOWS = [
    Flow("confirmed", ("1:VALID", "blank"), "ota_0"),
    Flow("rejected", ("1:VALID", "blank"), "ota_0", confirm=False),
    Flow("confirmed over an older one", ("1:VALID", "2:VALID"), "ota_1"),
    Flow("rejected over an older one", ("1:VALID", "2:VALID"), "ota_1", confirm=False),
    Flow("after a rollback", ("1:VALID", "2:ABORTED"), "ota_0"),
    Flow("running by fallback", ("1:VALID", "2:VALID"), "ota_0", spoiled=True),
    Flow("otadata empty", ("blank", "blank"), "ota_1", confirm=False, spoiled=True),
    Flow("from factory", ("blank", "blank"), "factory", factory=True),
    Flow("from factory, rejected", ("blank", "blank"), "factory", factory=True, confirm=False),
    Flow("without rollback", ("1:UNDEFINED", "2:UNDEFINED"), "ota_1", rollback=False),
]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with memory_directory(tmp_path) as directory:
        yield directory / "chip.bin"


@contextmanager
def power(path: Path, fault: Fault) -> Iterator[Esp32ImageTarget]:
    """A chip until its power goes. Whatever happens to the flash, the file is given back."""
    target = Esp32ImageTarget(path, fault=fault)
    try:
        yield target
    finally:
        target.close()


def check_recovery(flow: Flow, path: Path) -> None:
    """The power is back."""
    done = flow.done
    with Esp32ImageTarget(path) as target:
        report = target.restart()
        assert report.slot is not None
        booted = version_of(target)
        assert booted in {flow.old, NEW}
        assert slot_bytes(path, flow.running) == image(flow.old)  # the old image was never touched
        assert report.slot.name == (flow.next if booted == NEW else flow.running)
        if booted == NEW:
            assert slot_bytes(path, flow.next) == image(NEW)
        if "confirm" in done:
            assert booted == NEW
        if "reject" in done:
            assert booted == flow.old
        if done == ["install"] and not flow.rollback:
            assert booted == NEW  # with rollback, the cut may have hit the boot loader's first write

        # What it says of itself is so: an image nobody confirmed is not called valid, and goes at the next restart.
        if booted == NEW and flow.rollback and "confirm" not in done:
            state = target.boot_state(report.slot)
            begun_to_confirm = flow.confirm and "restart" in done
            assert state is BootState.PENDING_VERIFY or (begun_to_confirm and state is BootState.VALID)
            if state is BootState.PENDING_VERIFY:
                with pytest.raises(PendingVerifyError):
                    target.open_sink(target.next_slot())
                target.restart()
                assert version_of(target) == flow.old
                assert target.boot_state(target.slot(flow.next)) is BootState.ABORTED
        stable = version_of(target)
        target.restart()
        assert version_of(target) == stable

    with Esp32ImageTarget(path) as target:  # and the next update works
        assert version_of(target) == stable
        result = install(image("4.0.0"), target, options=OPTIONS)
        target.restart()
        assert version_of(target) == "4.0.0"
        target.mark_valid()
        target.restart()
        assert version_of(target) == "4.0.0"
        assert result.slot != flow.running or stable == NEW


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_after_a_power_cut_the_old_or_the_new_image_boots(path: Path, flow: Flow, torn: int) -> None:
    cuts = 0
    while True:
        flow.start(path)
        fault = Fault(ops=CHANGES, after=cuts, power_cut=True, torn_len=torn)
        with power(path, fault) as target:
            try:
                flow.run(target)
            except OtaError as error:
                assert fault.lost
                assert isinstance(error, DeviceError) and error.errno == errno.EIO
        check_recovery(flow, path)
        if not fault.lost:
            break
        cuts += 1
    assert cuts > 15
    assert len(flow.done) == 4


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_an_operation_that_fails_is_told_and_harmless(path: Path, flow: Flow) -> None:
    fails = 0
    while True:
        flow.start(path)
        fault = Fault(after=fails, count=1, errnum=errno.ENOSPC, torn_len=fails % 3 * 16)
        told = None
        try:
            with power(path, fault) as target:
                flow.run(target)
        except OtaError as error:
            told = error
        hit = fault.seen > fails
        assert hit == (told is not None)
        if told is not None:
            assert isinstance(told, DeviceError)
            assert (told.errno, told.status) == (errno.ENOSPC, "ERR_NO_SPACE")
        check_recovery(flow, path)
        if not hit:
            break
        fails += 1
    assert fails > 30
    assert len(flow.done) == 4


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("torn", [0, 2048])
def test_a_resumed_installation_ends_as_one_in_a_piece_whenever_it_was_cut(
    path: Path, threads: bool, torn: int
) -> None:
    options = InstallOptions(threads=threads, buffer_size=4096, checkpoint_bytes=4096)
    resumed = set()
    cuts = 0
    while True:
        make_chip(path, ("3:VALID", "2:VALID"), running="ota_0")
        points: list[ResumePoint] = []
        fault = Fault(ops=CHANGES, after=cuts, power_cut=True, torn_len=torn)
        with power(path, fault) as target:
            try:
                install(image(NEW), target, options=options, on_checkpoint=points.append)
            except DeviceError:
                assert fault.lost
        with Esp32ImageTarget(path) as target:
            target.restart()
            if version_of(target) == NEW:  # it was cut after its last write
                break
            point = points[-1] if points else None
            again = InstallOptions(threads=threads, buffer_size=4096, resume=point)
            result = Installer(image(NEW), target, options=again).run()
            assert result.resumed_from == (point.offset if point else 0)
            resumed.add(result.resumed_from)
            target.restart()
            assert version_of(target) == NEW
            assert slot_bytes(path, "ota_1") == image(NEW)
        if not fault.lost:
            break
        cuts += 1
    assert {0, 4096, 8192} <= resumed


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_a_cut_between_flash_and_record_leaves_a_chip_that_sorts_itself_out(
    path: Path, monkeypatch: pytest.MonkeyPatch, flow: Flow, cut: int
) -> None:
    """A restart ends with the record of what runs; the power goes just before the first, or the second, is written."""
    flow.start(path)
    save = chip_record.save
    saved: list[ChipRecord] = []

    def cut_save(image_path: Path, record: ChipRecord) -> None:
        if len(saved) == cut:
            raise DeviceError("the power is gone", device_code=errno.EIO)
        saved.append(record)
        save(image_path, record)

    with Esp32ImageTarget(path) as target, monkeypatch.context() as patched:
        patched.setattr(chip_record, "save", cut_save)
        if cut == 1 and flow.confirm:
            flow.run(target)  # the second restart changes nothing, so nothing is written
        else:
            with pytest.raises(DeviceError, match="the power is gone"):
                flow.run(target)
            assert flow.done == (["install"] if cut == 0 else ["install", "restart", "reject"])
    with Esp32ImageTarget(path) as target:
        assert version_of(target) == (flow.old if cut == 0 else NEW)  # what last ran for sure
        if cut == 0 or not flow.confirm:
            with pytest.raises(StateError):  # it is not what the boot loader has written since
                target.mark_valid()
    check_recovery(flow, path)
