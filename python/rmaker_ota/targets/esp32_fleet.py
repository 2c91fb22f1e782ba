"""One image into many chips at serial ports, at the same time: one download, one compressed stream, a thread of the
engine for each chip.

What happens to one chip does not happen to the others: a port that is missing, an image that is not for that chip, a
cable that is pulled are results of that chip alone. The installation fails only when no chip is left.

    >>> result = install_fleet("app.bin", ["esp32-serial:/dev/ttyUSB0", "esp32-serial:/dev/ttyUSB1"])
    >>> [(one.name, one.error) for one in result.chips]
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, NotFoundError, OtaError, RejectedError, StateError, UnsupportedError
from rmaker_ota.install import (
    HttpOptions,
    ImageHeader,
    ImagePolicy,
    Installer,
    InstallOptions,
    InstallResult,
    Progress,
)
from rmaker_ota.records import dataclass
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import AppDescription, BootReport, BootState, Slot, Target
from rmaker_ota.targets.esp32_serial import Esp32SerialTarget


@dataclass(frozen=True, slots=True)
class ChipResult:
    """What became of one chip.

    Attributes:
        name: its target as it was named.
        error: why the image is not there; None: it is.
        slot: the slot it is in; None: it did not come that far.
        phase: how far it came (``ota_serial_phase``); "waiting" before the sink begins.
        done, size: bytes of the image that are dealt with, and all of them (None: not known).
        identical: the slot held the image already.
        verified: the chip's MD5 said that it holds the image.
        committed: the slot is the next one to boot, where that was asked for.
        counts: of this chip: wire_out, wire_in, commands, retries, programmed, skipped, blank, erased, probes,
            reconnects, resumed_at (bytes and numbers).
        phase_ms: how long it was in which phase.
        boot: of the restart; None: it was not restarted.
    """

    name: str
    error: OtaError | None
    slot: str | None = None
    phase: str = "waiting"
    done: int = 0
    size: int | None = None
    identical: bool = False
    verified: bool = False
    committed: bool = False
    counts: dict[str, int] | None = None
    phase_ms: dict[str, int] | None = None
    boot: BootReport | None = None


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What became of all: `install` as of the engine, None when it did not come to its end; and each chip."""

    install: InstallResult | None
    error: OtaError | None
    chips: tuple[ChipResult, ...]
    store: dict[str, int | bool]

    @property
    def failed(self) -> tuple[ChipResult, ...]:
        """The chips that do not have the image."""
        return tuple(chip for chip in self.chips if chip.error is not None)


_COUNTS = (
    "wire_out",
    "wire_in",
    "commands",
    "retries",
    "programmed",
    "skipped",
    "blank",
    "erased",
    "probes",
    "reconnects",
    "resumed_at",
)


class _Member:
    def __init__(self, name: str) -> None:
        self.name = name
        self.target: Esp32SerialTarget | None = None
        self.slot: Slot | None = None
        self.rules: dict[str, int] = {}
        self.index: int | None = None  # in the sink
        self.error: OtaError | None = None
        self.boot: BootReport | None = None


class Esp32Fleet(Target):
    """Chips at serial ports as one target: what is installed into its one slot goes into the next slot of each.

    How they are written (skip, diff, pre_erase, reconnects, ...) is what the first one says.

    Args:
        targets: URIs of ``esp32-serial:`` targets, which are opened and closed again, or such targets, which are not.
        jobs: chips that are connected to and written at the same time; 0: all.
        options: of every target that is opened.

    Raises:
        ArgumentError: none, the same one twice, or one of another kind.
        OtaError: no chip could be opened: the error of the first one.
    """

    def __init__(self, targets: Sequence[str | Esp32SerialTarget], *, jobs: int = 0, **options: Any) -> None:
        names = [target if isinstance(target, str) else target.uri for target in targets]
        if not names or len(set(names)) != len(names):
            raise ArgumentError(
                "a fleet needs targets, each of them once" if names else "a fleet without targets", stage="target"
            )
        for name in names:
            if not name.startswith("esp32-serial:"):
                raise ArgumentError(f"{name!r}: a fleet consists of esp32-serial: targets", stage="target")
        if jobs < 0:
            raise ArgumentError(f"jobs is {jobs}, expected 0 or more", stage="target")
        self.uri = "esp32-fleet:" + ",".join(names)
        self._jobs = jobs
        self._lock = threading.Lock()
        self._sink: ota_core.SerialSink | None = None
        self._members = [_Member(name) for name in names]
        self._own: list[Esp32SerialTarget] = []

        def prepare(member: _Member, target: str | Esp32SerialTarget) -> None:
            if isinstance(target, str):
                opened = open_target(target, **options)
                assert isinstance(opened, Esp32SerialTarget)
                with self._lock:
                    self._own.append(opened)
                target = opened
            member.target = target
            target.esp  # noqa: B018  # holds the chip
            member.slot = target.next_slot()
            member.rules = target.verify_image_rules()

        self._each(prepare, list(targets))
        if not self._alive():
            self.close()
            raise self._first_error()

    def _each(self, work: Callable[..., None], arguments: Sequence[Any] | None = None) -> None:
        """Does something for every chip that is well, side by side; what it raises is that chip's error."""

        def one(member: _Member, argument: Any) -> None:
            try:
                work(member, argument) if arguments is not None else work(member)
            except OtaError as error:
                member.error = error

        pairs = [
            (member, arguments[i] if arguments is not None else None)
            for i, member in enumerate(self._members)
            if member.error is None
        ]
        if not pairs:
            return
        with ThreadPoolExecutor(self._jobs or len(pairs), "rmaker-ota-chip") as pool:
            for future in [pool.submit(one, *pair) for pair in pairs]:
                future.result()

    def _first_error(self, *, installing: bool = False) -> OtaError:
        return next(m.error for m in self._members if m.error is not None and (m.index is not None or not installing))

    def _alive(self) -> list[_Member]:
        return [member for member in self._members if member.error is None]

    # ---- the target --------------------------------------------------------------------------------------------------

    def next_slot(self) -> Slot:
        sizes = [member.slot.size for member in self._alive() if member.slot is not None]
        if not sizes:
            raise NotFoundError("no chip is left", stage="target")
        return Slot("next", 0, max(sizes))

    def verify_image_rules(self) -> dict[str, int]:
        """What all chips have in common; `gate` looks at the rest."""
        rules = [member.rules for member in self._alive()]
        common = {key: value for key, value in rules[0].items() if all(other.get(key) == value for other in rules)}
        common["slot_size"] = self.next_slot().size
        return common

    def open_sink(self, slot: Slot, *, activate: bool = True) -> ota_core.Sink:
        members: list[tuple[ota_core.EspTarget, str]] = []
        for member in self._alive():
            assert member.target is not None
            assert member.slot is not None
            try:
                part = member.target.sink_place(member.slot)
                ota_core.SerialSink([part])  # says what speaks against this one
                member.target.expect_image(member.slot, activate=activate)
            except OtaError as error:
                member.error = error
                continue
            member.index = len(members)
            members.append(part)
        if not members:
            raise self._first_error()
        first = next(m.target for m in self._members if m.index is not None and m.target is not None)
        self._sink = ota_core.SerialSink(members, activate=activate, jobs=self._jobs, **first.sink_options())
        return self._sink

    def gate(self, header: ImageHeader, policy: Callable[[Target], ImagePolicy] = ImagePolicy) -> None:
        """Judges the image for every chip; those it is not for are left out.

        Raises:
            RejectedError: it is for none of them; the first one's reason.
        """
        sink = self._sink
        if sink is None:
            raise StateError("there is no installation", stage="header")
        for member in self._alive():
            assert member.target is not None
            assert member.index is not None
            try:
                _refuse_other_chip(header, member.rules)
                policy(member.target)(header)
            except OtaError as error:
                member.error = error
                sink.exclude(member.index, error)
        if not self._alive():
            raise self._first_error(installing=True)

    def results(self) -> tuple[ChipResult, ...]:
        """How each chip is doing, or did; any time, from any thread."""
        rows = self._sink.results() if self._sink is not None else []
        results = []
        for member in self._members:
            if member.index is None or member.index >= len(rows):
                results.append(ChipResult(member.name, member.error))
                continue
            row = rows[member.index]
            results.append(
                ChipResult(
                    name=member.name,
                    error=member.error or row["error"],
                    slot=member.slot.name if member.slot is not None else None,
                    phase=row["phase"],
                    done=row["done"],
                    size=row["size"],
                    identical=row["identical"],
                    verified=row["verified"],
                    committed=row["committed"],
                    counts={name: row[name] for name in _COUNTS},
                    phase_ms=row["phase_ms"],
                    boot=member.boot,
                )
            )
        return tuple(results)

    @property
    def store_counts(self) -> dict[str, int | bool]:
        """What was done once for all chips."""
        return self._sink.store_counts if self._sink is not None else {}

    def restart_all(self) -> None:
        """Restarts the chips that have the image; the others are let go. What fails is that chip's error."""
        for member, result in zip(self._members, self.results(), strict=True):
            member.error = result.error

        def restart(member: _Member) -> None:
            assert member.target is not None
            member.boot = member.target.restart()
            if member.boot.slot != member.slot:
                member.error = RejectedError(
                    f"{member.name} went back to its older image: {'; '.join(member.boot.reasons)}", stage="target"
                )

        self._each(restart)
        for member in self._members:
            if member.error is not None and member.target is not None:
                member.target.release()

    def release(self) -> None:
        for member in self._members:
            if member.target is not None:
                member.target.release()

    def close(self) -> None:
        self._sink = None
        for target in self._own:
            target.close()
        self._own.clear()

    # ---- what only one chip has --------------------------------------------------------------------------------------

    @property
    def secure_version(self) -> int:
        return 0

    def running_slot(self) -> Slot | None:
        return None

    def describe(self, slot: Slot) -> AppDescription | None:
        return None

    def boot_state(self, slot: Slot) -> BootState:
        raise _one_by_one()

    def set_boot(self, slot: Slot) -> None:
        raise _one_by_one()

    def mark_valid(self) -> None:
        raise _one_by_one()

    def mark_invalid(self) -> None:
        raise _one_by_one()

    def can_rollback(self) -> bool:
        raise _one_by_one()

    def restart(self) -> BootReport:
        self.restart_all()
        return BootReport(None, (), ())


def _one_by_one() -> UnsupportedError:
    return UnsupportedError("ask the chips of a fleet one by one", stage="target")


def _refuse_other_chip(header: ImageHeader, rules: dict[str, int]) -> None:
    image = ota_core.parse_image_header(header.raw)
    wanted = rules.get("chip_id")
    if wanted is not None and image.chip_id != wanted:
        raise RejectedError(
            f"the image is for chip id {image.chip_id}, this is {wanted}", status="ERR_IMAGE_CHIP", stage="header"
        )
    revision = rules.get("chip_revision")
    if revision is not None and not image.min_chip_rev_full <= revision:
        raise RejectedError(
            f"the image needs chip revision {image.min_chip_rev_full}, this is {revision}",
            status="ERR_IMAGE_REVISION",
            stage="header",
        )


def install_fleet(
    source: ota_core.Source | str | os.PathLike[str] | bytes | int,
    targets: Sequence[str | Esp32SerialTarget],
    *,
    options: InstallOptions = InstallOptions(),
    http: HttpOptions = HttpOptions(),
    jobs: int = 0,
    policy: Callable[[Target], ImagePolicy] | None = None,
    restart: bool = False,
    on_progress: Callable[[Progress, tuple[ChipResult, ...]], None] | None = None,
    cancel: threading.Event | None = None,
    **target_options: Any,
) -> FleetResult:
    """Installs one image into many chips; see `rmaker_ota.install.install` for the arguments it shares.

    Args:
        targets: ``esp32-serial:`` URIs or targets.
        jobs: chips that are written at the same time; 0: all.
        policy: makes the gate of each chip from its target (`ImagePolicy`); None: only the chip has to be right.
        restart: restart the chips afterwards.
        target_options: of targets that are opened.

    Returns:
        FleetResult: also when the installation failed, for the chips' own errors.

    Raises:
        ArgumentError: something in the arguments.
        OtaError: no chip could be opened.
    """
    with Esp32Fleet(targets, jobs=jobs, **target_options) as fleet:
        installer: Installer

        def progress(now: Progress) -> None:
            if cancel is not None and cancel.is_set():
                installer.cancel()
            if on_progress is not None:
                on_progress(now, fleet.results())

        installer = Installer(
            source,
            fleet,
            options=options,
            http=http,
            header_gate=lambda header: fleet.gate(header, policy or _any_image),
            on_progress=progress if cancel is not None or on_progress is not None else None,
        )
        result: InstallResult | None = None
        failure: OtaError | None = None
        try:
            result = installer.run()
        except OtaError as error:
            failure = error
        if restart and result is not None:
            fleet.restart_all()
        chips = fleet.results()
        if failure is not None:  # nobody has the image, whatever stopped it
            chips = tuple(_with_error(chip, failure) if chip.error is None else chip for chip in chips)
        return FleetResult(result, failure, chips, fleet.store_counts)


def _any_image(target: Target) -> ImagePolicy:
    return ImagePolicy(target, skip_project=True, skip_version=True)


def _with_error(chip: ChipResult, error: OtaError) -> ChipResult:
    from dataclasses import replace

    return replace(chip, error=error)


__all__ = ["ChipResult", "Esp32Fleet", "FleetResult", "install_fleet"]
