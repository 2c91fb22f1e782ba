"""Target ``esp32-serial:PORT[?option=value&...]``: a real ESP32 behind a serial port.

PORT is a path, ``serial=...``, ``usb=...`` or ``socket://host:port`` (`rmaker_ota.flasher.ports`). The options are the
keyword arguments of `Esp32SerialTarget`.

A chip is either *held* in its boot loader, where its flash can be read and written and its application stands still,
or it *runs*. It is held when something is asked that needs its flash, and runs again after `release`, `restart` and
`close`. What was learned while it was held answers the usual questions (what runs, which slot is next) afterwards, so
that looking stops it once.

An image on trial that is stopped to be looked at gets its trial again: its boot entry goes from PENDING_VERIFY back to
NEW before the chip is let go, because the boot loader would take the restart for a crash. What runs is read from
otadata alone (`EspTarget`, ``stopped``). The order of durable effects is the one of every ESP32 target.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from rmaker_ota import ota_core
from rmaker_ota.errors import ArgumentError, NotFoundError, OtaError, StateError, UnsupportedError
from rmaker_ota.esp_format import BootConfig, BootDecision, OtadataEntry, SlotFacts
from rmaker_ota.flasher.chip import ChipInfo
from rmaker_ota.flasher.console import ConsoleReport, ConsoleWatch, Verdict
from rmaker_ota.flasher.facts import FactsFile, cache_folder
from rmaker_ota.flasher.ports import Port, resolve_port
from rmaker_ota.flasher.stubs import StubSet, find_stubs
from rmaker_ota.records import dataclass
from rmaker_ota.targets.base import AppDescription, BootReport, BootState, Slot
from rmaker_ota.targets.esp32 import Esp32Target

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

DEFAULT_BAUD = 921_600
"""Bits per second. What a bridge does not do is found out and stepped down from."""

REOPEN_S = 5.0
"""How long a port that vanished with a reset may take to come back: 0.1 to 1 s for a chip's USB, more behind hubs."""

_CONSOLE_STEP_MS = 100


def parse_size(text: str) -> int:
    """Bytes of a flash: ``"4MB"``, ``"512K"``, ``"0x400000"``.

    Raises:
        ValueError: none of these.
    """
    number = text.strip().upper().removesuffix("B")
    unit = {"K": 1 << 10, "M": 1 << 20}.get(number[-1:], 1)
    return int(number if unit == 1 else number[:-1], 0) * unit


def _number(text: str) -> int:
    return int(text, 0)


def _flag(text: str) -> bool:
    try:
        return {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is not yes or no") from None


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "baud": _number,
    "chip": str,
    "before": str,
    "after": str,
    "link": str,
    "connect_attempts": _number,
    "stub": str,
    "flash_size": parse_size,
    "table_offset": _number,
    "rollback": _flag,
    "anti_rollback": _flag,
    "secure_version": _number,
    "watch_s": float,
    "expect": str,
    "console_baud": _number,
    "cache": str,
    "skip": _flag,
    "diff": _flag,
    "pre_erase": _flag,
    "reconnects": _number,
    "reopen_s": float,
}
"""Options of a URI and how their text is read."""


def parse_target(text: str) -> tuple[str, dict[str, Any]]:
    """Port and options of what stands behind ``esp32-serial:``.

    Raises:
        ArgumentError: an option that is not known, or its value.
    """
    port, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise ArgumentError(f"option {name!r} is none of {', '.join(_OPTIONS)}", stage="target")
        try:
            options[name] = _OPTIONS[name](value)
        except ValueError as exc:
            raise ArgumentError(f"option {name}={value!r}: {exc}", stage="target") from None
    if not port:
        raise ArgumentError("esp32-serial: names no port", stage="target")
    return port, options


class ChipPort:
    """A port with a flasher on it: what target and commands share.

    Args:
        port: as the user named it.
        baud, chip, before, after, link, connect_attempts, flash_size, allow_encrypted: of `ota_core.Flasher`.
        stub: folder of stubs, ``none`` or ``auto`` (`rmaker_ota.flasher.stubs.find_stubs`).
        cache: folder for facts about devices, ``none``; None: the user's.
        reopen_s: seconds a port that vanished may take to come back.
        sysfs_root, dev_root, fault, on_lines, on_trace: of `ota_core.Flasher`.

    Raises:
        NotFoundError, DeviceError: the port is not there, in use, or not permitted.
        ArgumentError, ConfigError: something in the options.
    """

    def __init__(
        self,
        port: str,
        *,
        baud: int | None = None,
        chip: str | None = None,
        before: str = "default-reset",
        after: str = "default-reset",
        link: str = "auto",
        connect_attempts: int = 7,
        stub: str | None = None,
        flash_size: int = 0,
        allow_encrypted: bool = False,
        cache: str | None = None,
        reopen_s: float = REOPEN_S,
        sysfs_root: str = "/sys",
        dev_root: str = "/dev",
        fault: ota_core.Fault | None = None,
        on_lines: Callable[[bool, bool], None] | None = None,
        on_trace: Callable[[str, bytes], None] | None = None,
    ) -> None:
        from pathlib import Path

        if baud is not None and not 1200 <= baud <= 12_000_000:
            raise ArgumentError(f"baud is {baud}, expected 1200 to 12000000", stage="target")
        if not 0 <= reopen_s <= 3600:
            raise ArgumentError(f"reopen_s is {reopen_s}, expected 0 to 3600 seconds", stage="target")
        self.reopen_s = reopen_s
        self.stubs: StubSet = find_stubs(stub)
        path, self.port = resolve_port(port, sysfs_root=sysfs_root, dev_root=dev_root)
        folder = None if cache == "none" else Path(cache) if cache else cache_folder()
        self.cache = folder
        """Where what is learned is kept; None: nowhere."""
        self._facts = FactsFile(self.port.device_key if self.port is not None else None, folder)
        wanted = DEFAULT_BAUD if baud is None else baud
        self.flasher = ota_core.Flasher(
            path,
            baud=0 if wanted == 115_200 else wanted,
            chip=None if chip in {None, "auto"} else chip,
            before=before,
            after=after,
            link=link,
            connect_attempts=connect_attempts,
            reuse_baud=wanted if before.startswith("no-reset") else 0,
            stubs=self.stubs.stubs,
            facts=self._facts.load(),
            flash_size=flash_size,
            allow_encrypted=allow_encrypted,
            keep_lines=before.startswith("no-reset"),
            fault=fault,
            on_lines=on_lines,
            on_trace=on_trace,
            sysfs_root=sysfs_root,
            dev_root=dev_root,
        )

    def connect(self) -> ChipInfo:
        """Holds the chip in its boot loader, from whatever state it is in."""
        flasher = self.flasher
        if flasher.state == "stopped":
            flasher.rearm()
        if flasher.state == "gone":
            flasher.reopen(round(self.reopen_s * 1000))
        if flasher.state != "ready":
            flasher.connect()
        info = flasher.info
        assert info is not None, "connected"
        if info.facts is not None:
            self._facts.save(info.facts)
        return info

    def watch(self, watch: ConsoleWatch, seconds: float, *, console_baud: int | None = None) -> ConsoleReport:
        """Listens to a chip that was restarted, until the watch has its verdict or time is over."""
        flasher = self.flasher
        end = time.monotonic() + seconds
        if flasher.state == "gone":
            flasher.reopen(round(self.reopen_s * 1000))
        if console_baud is not None:
            flasher.set_baud(console_baud)
        while (left := end - time.monotonic()) > 0:
            try:
                data = flasher.read_console(4096, max(1, min(_CONSOLE_STEP_MS, round(left * 1000))))
            except OtaError:
                if flasher.state != "gone":
                    raise
                data = b"\n"  # a port that vanishes again is a chip that restarts again; the log tells
                flasher.reopen(max(1, round(left * 1000)))
            if watch.feed(data) is not Verdict.NOTHING:
                break
        return watch.end()

    def close(self) -> None:
        self.flasher.close()


IMAGES_KEPT = 8
"""Compressed images in the cache; those that were made longest ago go first."""


def image_cache(folder: Path | None) -> Path | None:
    """The folder for compressed images below the cache's, made and with room for one more; None: there is none."""
    if folder is None:
        return None
    images = folder / "images"
    try:
        images.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = sorted(images.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[: max(0, len(kept) - IMAGES_KEPT + 1)]:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.info("no cache for images in %s: %s", images, error)
        return None
    return images


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a chip that runs: as it was when it was let go, and what its boot loader makes of it then."""

    slots: dict[str, Slot]
    running: str | None
    next: str | None
    states: dict[str, BootState]
    apps: dict[str, AppDescription | None]
    rules: dict[str, int]
    can_rollback: bool


class Esp32SerialTarget(Esp32Target):
    """A real ESP32.

    Args:
        path: the port, with options behind a ``?``; those given as keywords win.
        baud, chip, before, after, link, connect_attempts, stub, flash_size, cache: of `ChipPort`.
        table_offset: of the partition table, bytes.
        rollback: boot loader and app are built with app rollback; None: as otadata shows.
        anti_rollback: they are built with secure version checks.
        secure_version: burnt into the eFuses; None: with ``anti_rollback`` that of the running app, else 0.
        watch_s: seconds `restart` listens to the console of an image on trial, and rolls back what is not well; 0: not.
        expect: a line that matches this regular expression says that it is well; None: time without a crash does.
        console_baud: rate of the application's console; None: 115200.
        skip, diff, pre_erase: leave an image alone that is there; find by MD5 what differs and write that alone; erase
            while the image arrives (usual: yes).
        reconnects: how often a lost link is taken up again while an image is written; 0: usual.
        reopen_s: seconds a port that vanished may take to come back; None: 5, while an image is written 30.
        sysfs_root, dev_root, fault, on_lines, on_trace: of `ota_core.Flasher`.

    Raises:
        NotFoundError, DeviceError: the port is not there, in use, or not permitted.
        ArgumentError, ConfigError: something in the options.
    """

    boots_with_process = True

    def __init__(
        self,
        path: str,
        *,
        table_offset: int | None = None,
        rollback: bool | None = None,
        anti_rollback: bool | None = None,
        secure_version: int | None = None,
        watch_s: float | None = None,
        expect: str | None = None,
        console_baud: int | None = None,
        skip: bool | None = None,
        diff: bool | None = None,
        pre_erase: bool | None = None,
        reconnects: int | None = None,
        reopen_s: float | None = None,
        baud: int | None = None,
        chip: str | None = None,
        before: str | None = None,
        after: str | None = None,
        link: str | None = None,
        connect_attempts: int | None = None,
        stub: str | None = None,
        flash_size: int | None = None,
        cache: str | None = None,
        sysfs_root: str | None = None,
        dev_root: str | None = None,
        fault: ota_core.Fault | None = None,
        on_lines: Callable[[bool, bool], None] | None = None,
        on_trace: Callable[[str, bytes], None] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if value is not None}
        for name in ("self", "path", "__class__"):
            given.pop(name, None)
        port, options = parse_target(path)
        options |= given
        self._table_offset: int = options.pop("table_offset", 0x8000)
        self._rollback: bool | None = options.pop("rollback", None)
        self._anti_rollback: bool = options.pop("anti_rollback", False)
        self._least_secure_version: int | None = options.pop("secure_version", None)
        self._watch_s: float = options.pop("watch_s", 0.0)
        self._expect: str | None = options.pop("expect", None)
        self._console_baud: int | None = options.pop("console_baud", None)
        self._skip: bool = options.pop("skip", True)
        self._diff: bool = options.pop("diff", True)
        self._pre_erase: bool = options.pop("pre_erase", True)
        self._reconnects: int = options.pop("reconnects", 0)
        self._reopen_ms = round(options.get("reopen_s", 0) * 1000)
        if not 0 <= self._reconnects <= 1000:
            raise ArgumentError(f"reconnects is {self._reconnects}, expected 0 to 1000", stage="target")
        if not 0 <= self._watch_s <= 3600:
            raise ArgumentError(f"watch_s is {self._watch_s}, expected 0 to 3600 seconds", stage="target")
        ConsoleWatch(self._expect)  # says now what is wrong with it
        self.place = port
        self.uri = f"esp32-serial:{port}"
        self._lock = threading.RLock()
        self._esp: ota_core.EspTarget | None = None
        self._known: _Known | None = None
        self._info: ChipInfo | None = None
        self._fresh: str | None = None  # slot of an image that was installed and did not run yet
        self._closed = False
        self._stays = options.get("after") == "no-reset"
        self._port = ChipPort(port, **options)
        self.last_console: ConsoleReport | None = None
        """How the last watch of the console ended."""

    # ---- held or running ---------------------------------------------------------------------------------------------

    @property
    def esp(self) -> ota_core.EspTarget:
        """The flash underneath; holds the chip."""
        with self._lock:
            if self._closed:
                raise StateError("the target is closed", stage="target")
            if self._esp is None or self._port.flasher.state != "ready":
                self._hold()
            assert self._esp is not None
            return self._esp

    @property
    def is_held(self) -> bool:
        """Whether the chip stands in its boot loader for us."""
        return self._esp is not None

    @property
    def flasher(self) -> ota_core.Flasher:
        """The boot loader's protocol underneath."""
        return self._port.flasher

    @property
    def port(self) -> Port | None:
        """What is known of the port; None for sockets and pseudo terminals."""
        return self._port.port

    @property
    def stubs(self) -> StubSet:
        """The stubs there were to choose from."""
        return self._port.stubs

    @property
    def chip(self) -> ChipInfo:
        """The chip; holds it when it was never connected."""
        with self._lock:
            if self._info is None:
                self.esp  # noqa: B018
            assert self._info is not None
            return self._info

    @property
    def info(self) -> ChipInfo | None:
        """The chip as far as it is known; None: it was never connected."""
        return self._info

    def release(self) -> None:
        """Lets a chip that is held run, where options do not say that it stays. What fails is logged."""
        with self._lock:
            if self._esp is not None:
                self._end()

    def _hold(self) -> None:
        self._drop()
        info = self._port.connect()
        self._info = info
        if info.secure_download:
            raise UnsupportedError(
                f"{self.place}: the {info.title} is in secure download mode: its slots cannot be read; "
                "write images at offsets with `rmaker-ota flash`",
                stage="target",
            )
        if info.flash_encrypted:
            raise UnsupportedError(
                f"{self.place}: the flash of the {info.title} is encrypted: its slots cannot be read; "
                "write images at offsets with `rmaker-ota flash`",
                stage="target",
            )
        self._esp = self._open(True if self._rollback is None else self._rollback)
        if self._rollback is None and not self._anti_rollback and not self._is_built_with_rollback():
            self._esp.close()
            self._esp = self._open(False)
        self._known = None

    def _open(self, rollback: bool) -> ota_core.EspTarget:
        info = self._info
        assert info is not None
        return ota_core.EspTarget(
            self._port.flasher,
            table_offset=self._table_offset,
            rollback=rollback,
            anti_rollback=self._anti_rollback,
            secure_version=self._least_secure_version or 0,
            chip_id=info.chip_id,
            chip_revision=self._port.flasher.read_revision(),
        )

    def _is_built_with_rollback(self) -> bool:
        """Without rollback the app writes entries whose state is UNDEFINED; other states are of builds with it."""
        count = len(self._ota_slots())
        live = [entry for entry in self._entries() if ota_core.otadata_facts(entry, count).live]
        return not live or max(live, key=lambda entry: entry.seq).state != BootState.UNDEFINED

    def _drop(self) -> None:
        if self._esp is not None:
            self._esp.close()
            self._esp = None

    def _let_go(self) -> BootDecision:
        """Restarts the chip; what its boot loader will choose."""
        esp = self._esp
        assert esp is not None
        esp.retry()
        decision = self._foresee()
        known = self._remember(decision.slot, decision.plan.after)
        self._drop()
        self._port.flasher.reset()
        self._known = known
        return decision

    def preview(self) -> BootReport:
        """What a restart would do now; holds the chip, changes nothing."""
        with self._lock:
            self.esp  # noqa: B018
            decision = self._foresee()
            slot = None if decision.slot is None else super()._by_name()[decision.slot]
            return BootReport(slot, decision.reasons, ())

    def _foresee(self) -> BootDecision:
        """What the boot loader will do. An image on trial counts as given its trial again.

        Every image with a readable header is taken for whole: reading them takes long, and the boot loader does it
        itself."""
        esp = self._esp
        assert esp is not None
        slots = super()._by_name()
        facts = {}
        for name, slot in slots.items():
            app = super().describe(slot)
            facts[name] = SlotFacts(app is not None, app is not None, app.secure_version if app else 0)
        entries = [
            replace(entry, state=BootState.NEW) if entry.state == BootState.PENDING_VERIFY else entry
            for entry in self._entries()
        ]
        layout = ota_core.partition_layout(esp.partition_table())
        config = BootConfig(
            slot_count=len(layout.slots),
            has_factory=layout.factory is not None,
            has_test=False,  # asks a pin
            has_otadata=layout.otadata is not None,
            rollback=esp.rollback,
            anti_rollback=self._anti_rollback,
            secure_version=esp.secure_version,
            slots=facts,
        )
        return ota_core.boot_decide(entries, config)

    def _entries(self) -> tuple[OtadataEntry, OtadataEntry]:
        assert self._esp is not None
        try:
            return self._esp.entries()
        except NotFoundError:
            return ota_core.blank_otadata_entry(), ota_core.blank_otadata_entry()

    def _remember(self, running: str | None, entries: Sequence[OtadataEntry]) -> _Known:
        slots = super()._by_name()
        count = len(self._ota_slots())
        states = {}
        for name in slots:
            try:
                states[name] = _state(ota_core.otadata_slot_state(entries, count, name))
            except (NotFoundError, UnsupportedError):
                continue
        following = ota_core.otadata_next_slot(count, running)
        if following == running:
            following = None
        rules = {"bytes_after_allowed": True, **self.chip_rules()}
        if running is not None:
            rules |= self._mode_rule(running)
        if following is not None:
            rules["slot_size"] = slots[following].size
        return _Known(
            slots=slots,
            running=running,
            next=following,
            states=states,
            apps={name: super(Esp32SerialTarget, self).describe(slot) for name, slot in slots.items()},
            rules=rules,
            can_rollback=super().can_rollback(),
        )

    def _ota_slots(self) -> list[str]:
        assert self._esp is not None
        return [name for name, *_ in self._esp.slots() if name.startswith("ota_")]

    # ---- what is there -----------------------------------------------------------------------------------------------

    @property
    def _answers(self) -> _Known | None:
        """What answers in place of the flash: of a chip that runs, or whose flash is being written."""
        return self._known if self._esp is None or self._esp.is_installing else None

    def chip_rules(self) -> dict[str, int]:
        info = self.chip
        rules = {"chip_id": info.chip_id}
        revision = self._port.flasher.info.revision if self._port.flasher.info is not None else None
        if revision is not None:
            rules["chip_revision"] = revision
        return rules

    def _by_name(self) -> dict[str, Slot]:
        known = self._answers
        return known.slots if known is not None else super()._by_name()

    def running_slot(self) -> Slot | None:
        known = self._answers
        if known is None:
            return super().running_slot()
        return None if known.running is None else known.slots[known.running]

    def next_slot(self) -> Slot:
        known = self._answers
        if known is None:
            return super().next_slot()
        if known.next is None:
            raise NotFoundError("the partition table has no OTA slot but the running one", stage="target")
        return known.slots[known.next]

    def describe(self, slot: Slot) -> AppDescription | None:
        known = self._answers
        return super().describe(slot) if known is None else known.apps[self._name(slot)]

    def boot_state(self, slot: Slot) -> BootState:
        known = self._answers
        if known is None:
            return super().boot_state(slot)
        try:
            return known.states[self._name(slot)]
        except KeyError:
            raise NotFoundError(f"slot {slot.name} has no boot entry", stage="target") from None

    @property
    def secure_version(self) -> int:
        if self._least_secure_version is not None or not self._anti_rollback:
            return self._least_secure_version or 0
        running = self.running_slot()
        app = self.describe(running) if running is not None else None
        return app.secure_version if app is not None else 0

    def can_rollback(self) -> bool:
        known = self._answers
        return super().can_rollback() if known is None else known.can_rollback

    def verify_image_rules(self) -> dict[str, int]:
        known = self._answers
        return super().verify_image_rules() if known is None else dict(known.rules)

    # ---- changes -----------------------------------------------------------------------------------------------------

    def open_sink(self, slot: Slot, *, activate: bool = True) -> ota_core.Sink:
        with self._lock:
            sink = ota_core.SerialSink([self.sink_place(slot)], activate=activate, **self.sink_options())
            self.expect_image(slot, activate=activate)
            return sink

    def sink_place(self, slot: Slot) -> tuple[ota_core.EspTarget, str]:
        """What stands for a slot of this chip in a `SerialSink`. Holds the chip. Raises ArgumentError: no such slot."""
        with self._lock:
            return self.esp, self._name(slot)

    def sink_options(self) -> dict[str, Any]:
        """How a `SerialSink` is to write, as the options say."""
        return {
            "skip_identical": self._skip,
            "sector_diff": self._diff,
            "pre_erase": self._pre_erase,
            "reconnects": self._reconnects,
            "reopen_ms": self._reopen_ms,
            "cache_dir": image_cache(self._port.cache),
        }

    def expect_image(self, slot: Slot, *, activate: bool) -> None:
        """A sink was made for the slot: from now on what is known answers, and a restart will run another image."""
        with self._lock:
            self._fresh = self._name(slot) if activate else None
            self._known = self._remember(self.esp.running, self._entries())

    def set_boot(self, slot: Slot) -> None:
        with self._lock:
            name = self._name(slot)
            self.esp.set_boot(name)

    def mark_valid(self) -> None:
        with self._lock:
            self.esp.mark_valid()

    def mark_invalid(self) -> None:
        with self._lock:
            self.esp.mark_invalid()

    def restart(self) -> BootReport:
        """Restarts the chip; its own boot loader chooses, and the report says what it will.

        With ``watch_s`` the console of an image on trial is listened to; when it is not well, the image is marked
        invalid, the chip is restarted, and the report is that of the older image.
        """
        with self._lock:
            self.esp  # noqa: B018
            decision = self._let_go()
            known = self._known
            assert known is not None
            slot = None if decision.slot is None else known.slots[decision.slot]
            reasons: Iterable[str] = decision.reasons
            fresh, self._fresh = self._fresh, None
            on_trial = slot is not None and (
                slot.name == fresh or known.states.get(slot.name) is BootState.PENDING_VERIFY
            )
            if slot is None or not on_trial or self._watch_s == 0:
                return BootReport(slot, tuple(reasons), ())
            report = self.watch_console(slot)
            if report.is_well:
                return BootReport(slot, (*reasons, f"the console is well: {report.line}"), ())
            log.warning("%s: the image in %s is not well: %s", self.place, slot.name, report.line)
            return self._roll_back(slot, (*reasons, f"the console is not well: {report.line}"))

    def watch_console(self, slot: Slot | None = None, *, seconds: float | None = None) -> ConsoleReport:
        """Listens to a chip that was restarted.

        Args:
            slot: whose image should run; None: not compared.
            seconds: at most so long; None: ``watch_s``.
        """
        watch = ConsoleWatch(self._expect, slot_offset=None if slot is None else slot.offset)
        self.last_console = self._port.watch(
            watch, self._watch_s if seconds is None else seconds, console_baud=self._console_baud
        )
        return self.last_console

    def _roll_back(self, slot: Slot, reasons: tuple[str, ...]) -> BootReport:
        esp = self.esp
        if esp.running == slot.name:
            esp.mark_invalid()
            reasons = (*reasons, f"{slot.name} was marked invalid")
        decision = self._let_go()
        known = self._known
        assert known is not None
        older = None if decision.slot is None else known.slots[decision.slot]
        return BootReport(older, (*reasons, *decision.reasons), ())

    def cancel(self) -> None:
        """From any thread: what waits for the chip ends with CancelledError."""
        self._port.flasher.cancel()

    def close(self) -> None:
        """Lets the chip run and gives the port back."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._esp is not None:
                    self._end()
            finally:
                self._closed = True
                self._drop()
                self._port.close()

    def _end(self) -> None:
        """The chip runs again, if that is possible: also after an error, the image that ran before."""
        if self._stays:
            return
        try:
            if self._port.flasher.state == "stopped":
                self._port.flasher.rearm()
            if self._port.flasher.state == "ready":
                self._let_go()
            else:
                self._drop()
                self._port.flasher.reset()
        except OtaError as error:
            log.warning("%s: the chip could not be restarted: %s", self.place, error)


def _state(number: int) -> BootState:
    try:
        return BootState(number)
    except ValueError:
        return BootState.UNDEFINED


__all__ = ["DEFAULT_BAUD", "ChipPort", "Esp32SerialTarget", "parse_size", "parse_target"]
