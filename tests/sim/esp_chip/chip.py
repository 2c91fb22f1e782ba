"""The chip itself: power, reset, boot, what runs on it, and its own time.

**Time.** The chip sleeps for nothing. It keeps a time line in seconds: bytes take wire time, erases and programs take
flash time, an answer is with the host one turn-around later, and the host's next bytes start when it has the answer
plus what it thought about it. So `model_seconds` is what a run takes on a line and a flash of that kind, however fast
or slow the double is. How long the host thinks is measured (real time between an answer that became readable and the
next bytes, or its processor time), or left out. With ``real_time_scale`` answers are held back until their time has
come, scaled.
"""

from __future__ import annotations

import os
import random
import select
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tests.sim.esp_chip import faults as fault_names
from tests.sim.esp_chip import slip
from tests.sim.esp_chip.boot import App, BootedApp, choose, start_text, usual_app
from tests.sim.esp_chip.faults import Faults, spoil
from tests.sim.esp_chip.flash import Flash, PowerLost
from tests.sim.esp_chip.links import Link
from tests.sim.esp_chip.opcodes import MAX_BAUD, NAMES
from tests.sim.esp_chip.personas import MAC, PERSONAS, Persona
from tests.sim.esp_chip.registers import Registers
from tests.sim.esp_chip.rom import RomLoader
from tests.sim.esp_chip.stub import Hung, Stub
from tests.sim.esp_chip.stubs import stub_images

_IDLE_S = 0.010  # real time without a byte after which what is due in model time happens
_CLOSED_S = 0.005  # between looks whether a host has come
_OUTPUT_MAX = 1 << 20  # bytes for a host that does not read; what comes then is lost
_STUB_START_S = 0.010
_BOOT_S = 0.05
_CRASHES_MAX = 3
_SILENCE_S = 0.003  # real time without an answer after which a host is taken to have waited
_STALL_S = 0.020  # the same in the middle of a frame; less is the machine's doing
_EN_RISES_S = 0.005  # of the reset pin, with its capacitor
_ENUMERATES_S = 0.3
_HOST_COMES_S = 5.0  # real time an app waits with its text for a host that reopens a port
_ROM_BAUD = 115200.0


@dataclass(slots=True)
class LinkModel:
    """The line between host and chip.

    Attributes:
        kind: ``uart`` behind a USB bridge, ``usj`` (USB-Serial-JTAG), ``otg`` (USB of the ROM).
        baud: of the wire, whatever the host sets; None: what host and chip set.
        turn_around_s: what an answer takes through USB and the host's driver, added once for each.
        usb_bytes_per_s: of usj and otg.
        think: ``none``: the host reacts at once; ``real``: as measured; ``cpu``: processor time of ``host_pid``.
        host_pid: whose processor time counts.
        latency_s: from a complete frame to the chip's main loop.
    """

    kind: str = "uart"
    baud: int | None = None
    turn_around_s: float = 0.002
    usb_bytes_per_s: float = 450_000.0
    think: str = "none"
    host_pid: int | None = None
    latency_s: float = 100e-6

    @classmethod
    def usb(cls, kind: str = "usj", **rest: Any) -> LinkModel:
        return cls(kind=kind, turn_around_s=0.001, **rest)


@dataclass(slots=True)
class Options:
    """What a chip may have besides its persona.

    Attributes:
        secure_download: the ROM serves the few commands of that mode.
        security_flags, flash_crypt_count: of the security info.
        button: the boot button is held, or wired down: a power-on and a system reset lead to the ROM loader.
        trust_any_stub: a program for RAM that is not one of the published stubs behaves like version 2 of them.
        stub_baud: the chip starts with a stub that an earlier host left behind, at this rate.
        rollback, anti_rollback: how the boot loader was built.
        needs_bootloader: nothing boots without an image where the boot loader belongs.
        table_offset: of the partition table.
        real_time_scale: 1.0: answers come when they would; 0.1: ten times as fast; None: at once.
        re_enumerates: a reset, or a power-on, makes a native USB port disappear and come back under another name.
        watchdog_s: watchdogs of the app go on running in the ROM loader and bite after so long in model time, unless
            the host switches them off. None: they do not.
    """

    secure_download: bool = False
    security_flags: int = 0
    flash_crypt_count: int = 0
    button: bool = True
    trust_any_stub: bool = True
    stub_baud: int | None = None
    rollback: bool = True
    anti_rollback: bool = False
    needs_bootloader: bool = False
    table_offset: int = 0x8000
    real_time_scale: float | None = None
    re_enumerates: bool = False
    watchdog_s: float | None = None


@dataclass(slots=True)
class Counts:
    bytes_in: int = 0
    bytes_out: int = 0
    frames_in: int = 0
    frames_out: int = 0
    frames_lost: int = 0  # started while nobody took bytes
    resets: int = 0
    boots: int = 0
    commands: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class _Timer:
    """Something that happens at a moment of model time.

    Attributes:
        when: the moment.
        action: what.
        awaited: the host waits for it: it happens as soon as nothing else does. Else model time has to get there.
    """

    when: float
    action: Callable[[], None]
    awaited: bool = True


class Chip:
    """A chip on a port, served by a thread.

    Args:
        persona: or its name.
        flash: its flash; the caller closes it after the chip.
        link: its port; closed with the chip.
        link_model: of time.
        options: see there.
        app: what a booted app prints; called with what the boot loader chose.
        mac: six bytes.
    """

    def __init__(
        self,
        persona: Persona | str,
        flash: Flash,
        link: Link,
        *,
        link_model: LinkModel | None = None,
        options: Options | None = None,
        app: Callable[[BootedApp], App] = usual_app,
        mac: bytes = MAC,
    ) -> None:
        self.persona = PERSONAS[persona] if isinstance(persona, str) else persona
        self.flash = flash
        self.link = link
        self.link_model = link_model or LinkModel()
        self.options = options or Options()
        self.app = app
        self.mac = mac
        self.faults = Faults()
        self.counts = Counts()
        self.console = bytearray()  # all the chip printed as text, also while nobody listened
        self.running: BootedApp | None = None
        self.mode = "off"  # off, rom, stub, app, hung
        self.why_hung = ""
        self.on_change: Callable[[str], None] | None = None  # told of every new mode

        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: Exception | None = None
        self._stalled = False
        self._dtr = self._rts = False
        self._usj_download = False
        self._strapped = False
        self._crashes = 0
        self._seen_operations = 0

        self._loader: RomLoader | Stub | None = None
        self._baud = _ROM_BAUD
        self._auto_baud = True
        self._garble = bytes(random.Random(7).sample(range(256), 256))
        self._body: list[bytes] = []
        self._in_frame = False
        self._spoiling = False
        self._opcode = 0

        # the time line, seconds
        self._rx_end = 0.0  # the last byte from the host has arrived
        self._tx_end = 0.0  # the last byte to the host has left
        self._host = 0.0  # the host has the last answer
        self._mark = 0.0
        self._timers: list[_Timer] = []
        self._for_host: tuple[float, Callable[[], None]] | None = None  # real deadline, what waits for a host to come
        self._output: deque[tuple[float, bytes]] = deque()  # real time it is due, bytes
        self._output_size = 0
        self._anchor_real = time.monotonic()
        self._anchor_cpu = self._cpu_s()
        self._epoch_real = self._anchor_real
        self.registers = self._new_registers()
        self._power_on()

    # ---- life --------------------------------------------------------------------------------------------------------

    @property
    def port(self) -> str:
        """What a host opens; another one after the port came back."""
        return self.link.port

    def start(self) -> Self:
        assert self._thread is None
        self._thread = threading.Thread(target=self._serve, name=f"chip {self.port}", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        self._stopping = True
        self._wake_up()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.link.close()
        os.close(self._wake)
        if self._failure is not None:
            raise RuntimeError(f"the double of {self.persona.name} failed") from self._failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)

    # ---- what a test does to it --------------------------------------------------------------------------------------

    def release_button(self) -> None:
        """The boot button is let go; the next system reset looks at it again."""
        with self._lock:
            self.options.button = False

    def power_cycle(self, *, download: bool | None = None) -> None:
        """Off and on again. ``download``: whether the boot button is held; None: as the options say."""
        with self._lock:
            if download is not None:
                self.options.button = download
            self._power_off()
            self._power_on()
            self._wake_up()

    def power_off(self) -> None:
        with self._lock:
            self._power_off()

    def boot(self) -> BootedApp | None:
        """Off and on again with the button up: what the boot loader starts; None: nothing boots."""
        with self._lock:
            self.power_cycle(download=False)
            return self.running

    def set_lines(self, dtr: bool, rts: bool) -> None:
        """The control lines, which the transports cannot carry: wired as on common boards, or those of a USB port."""
        with self._lock:
            was = (self._dtr, self._rts)
            self._dtr, self._rts = dtr, rts
            if self.link_model.kind == "uart":
                if (dtr, rts) == (False, True):
                    self._hold_reset()
                elif was == (False, True):
                    self._at(self._now() + _EN_RISES_S, self._enable_rises)
            else:
                if not rts:
                    self._usj_download = dtr
                if (dtr, rts) == (False, True) and was != (False, True):
                    download = self._usj_download or self._strapped
                    self._reset("0x15 (USB_UART_CHIP_RESET)", download=download, at=self._now())
            self._wake_up()

    def unplug(self) -> None:
        """The port disappears. A chip on native USB loses its power with it."""
        with self._lock:
            self.link.unplug()
            self._output.clear()
            if self.link_model.kind != "uart":
                self._power_off()
            self._wake_up()

    def plug(self) -> None:
        with self._lock:
            self._plug_link()
            if self.mode == "off":
                self._power_on()
            self._wake_up()

    def wait_mode(self, mode: str, timeout_s: float = 30.0) -> bool:
        """Waits until the chip is in that mode: off, rom, stub, app or hung."""
        with self._changed:
            return self._changed.wait_for(lambda: self.mode == mode, timeout_s)

    def wait_port(self, other_than: str, timeout_s: float = 30.0) -> bool:
        """Waits until its port has come back under another name than that."""
        with self._changed:
            return self._changed.wait_for(lambda: self.port != other_than, timeout_s)

    def _plug_link(self) -> None:
        with self._changed:
            self.link.plug()
            self._changed.notify_all()

    def settle(self) -> None:
        """Finishes what the chip still does behind its last answer."""
        with self._lock:
            self._guarded(self._finish_work)

    def deliver(self, data: bytes) -> None:
        """Bytes from a host in this very thread, on a chip that was not started; answers go to its link at once."""
        with self._lock:
            self._guarded(self._receive, data, time.monotonic())

    def let_pass(self) -> None:
        """What the chip does while nobody sends, for a chip that was not started."""
        with self._lock:
            while self._work_waits():
                self._guarded(self._idle)

    # ---- what it reports ---------------------------------------------------------------------------------------------

    @property
    def model_seconds(self) -> float:
        """From the last `mark` to the last answer the host has."""
        with self._lock:
            return self._host - self._mark

    def mark(self) -> None:
        """Counts and time start again from here."""
        with self._lock:
            self._guarded(self._finish_work)
            self.counts = Counts()
            self.flash.counts = type(self.flash.counts)()
            self._mark = self._host = max(self._host, self._rx_end)
            self._anchor_real = time.monotonic()
            self._anchor_cpu = self._cpu_s()

    def report(self) -> dict[str, Any]:
        """All counts, for a file."""
        with self._lock:
            self._guarded(self._finish_work)
            counts = asdict(self.counts)
            commands = {NAMES.get(op, f"{op:#04x}"): n for op, n in sorted(self.counts.commands.items())}
            return {
                "chip": self.persona.name,
                "port": self.port,
                "mode": self.mode,
                "why_hung": self.why_hung,
                "baud": round(self._baud),
                "model_seconds": self._host - self._mark,
                "running": None if self.running is None else self.running.slot,
                **{name: value for name, value in counts.items() if name != "commands"},
                "command_count": sum(self.counts.commands.values()),
                "commands": commands,
                "flash": asdict(self.flash.counts),
                "faults_fired": [(fault.kind, fault.fired) for fault in self.faults.all],
            }

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._serve_until_closed()
        except Exception as exc:  # a fault of the double's own: `close` tells
            self._failure = exc
            self.link.unplug()

    def _serve_until_closed(self) -> None:
        while not self._stopping:
            with self._lock:
                wait_s = self._flush()
                in_fd = None if self._stalled else self.link.poll_fd()
                out_fd = self.link.write_fd() if self._output and wait_s is None else None
                if wait_s is None:
                    if self._work_waits():
                        wait_s = _IDLE_S
                    if in_fd is None and not self._stalled:
                        wait_s = _CLOSED_S
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            if in_fd is not None:
                poller.register(in_fd, select.POLLIN)
            if out_fd is not None:
                poller.register(out_fd, select.POLLOUT | (select.POLLIN if in_fd == out_fd else 0))
            events = dict(poller.poll(None if wait_s is None else wait_s * 1000))
            now = time.monotonic()
            with self._lock:
                if self._wake in events:
                    os.eventfd_read(self._wake)
                if in_fd is not None and events.get(in_fd, 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    data = self.link.read()
                    if data:
                        self._guarded(self._receive, data, now)
                elif not events:
                    self._guarded(self._idle)

    def _work_waits(self) -> bool:
        if self._for_host is not None or any(timer.awaited for timer in self._timers):
            return True
        return self._loader is not None and self._loader.has_work

    def _idle(self) -> None:
        """Nothing comes: what is due happens, in model time."""
        self._finish_work()
        if self._for_host is not None and (self.link.is_open() or time.monotonic() > self._for_host[0]):
            _, action = self._for_host
            self._for_host = None
            action()
        scaled = self.options.real_time_scale is not None
        timer = next((timer for timer in self._timers if timer.awaited or scaled), None)
        if timer is not None and (not scaled or timer.when <= self._now()):
            self._fire(timer)

    def _fire(self, timer: _Timer) -> None:
        self._timers.remove(timer)
        self._rx_end = max(self._rx_end, timer.when)
        timer.action()

    def _finish_work(self) -> None:
        if self._loader is not None:
            self._loader.finish_work()

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Power cuts and hangs in the middle of what the chip does."""
        try:
            action(*args)
        except PowerLost:
            self.flash.faults.power_cut_after = None
            self._power_off()
        except Hung as exc:
            self._hang(str(exc))

    def _set_mode(self, mode: str) -> None:
        with self._changed:
            self.mode = mode
            self._changed.notify_all()
        if self.on_change is not None:
            self.on_change(mode)

    def _hang(self, why: str) -> None:
        self.why_hung = why
        self._loader = None
        self._set_mode("hung")

    # ---- time --------------------------------------------------------------------------------------------------------

    def _cpu_s(self) -> float:
        pid = self.link_model.host_pid
        if self.link_model.think != "cpu" or pid is None:
            return 0.0
        try:
            return time.clock_gettime((~pid << 3) | 2)  # the process' own clock, clock_getcpuclockid(3)
        except OSError:
            return self._anchor_cpu  # it is gone

    def _anchor(self) -> None:
        """From here on the host thinks."""
        self._anchor_real = time.monotonic()
        self._anchor_cpu = self._cpu_s()

    def _host_now(self, real: float) -> float:
        """Model time of the host when it does something at this moment of real time."""
        scale = self.options.real_time_scale
        if scale is not None:
            return max(self._host, (real - self._epoch_real) / scale)
        if self.link_model.think == "real":
            return self._host + max(real - self._anchor_real, 0.0)
        if self.link_model.think == "cpu":
            return self._host + max(self._cpu_s() - self._anchor_cpu, 0.0)
        return self._host

    def _now(self) -> float:
        busy = 0.0 if self._loader is None else self._loader.busy
        return max(self._rx_end, self._tx_end, busy, self._host_now(time.monotonic()))

    def _byte_s(self) -> float:
        if self.link_model.kind != "uart":
            return 1.0 / self.link_model.usb_bytes_per_s
        return 10.0 / (self.link_model.baud or self._baud)

    def _at(self, when: float, action: Callable[[], None], *, awaited: bool = True) -> None:
        self._timers.append(_Timer(when, action, awaited))
        self._timers.sort(key=lambda timer: timer.when)
        self._wake_up()

    # ---- from the host -----------------------------------------------------------------------------------------------

    def _receive(self, data: bytes, real: float) -> None:
        host_now = self._host_now(real)
        silence = real - self._anchor_real
        if self._host < self._rx_end and silence > _SILENCE_S:
            host_now = max(host_now, self._rx_end + silence)  # it waited in vain: that takes its time on any line
        measured = self.link_model.think == "real" or self.options.real_time_scale is not None
        if self._in_frame and not (measured and silence > _STALL_S):
            start = self._rx_end
        else:
            start = max(self._rx_end, host_now)
        self._finish_work()
        while self._timers and (self._timers[0].when <= start or (self.mode == "off" and self._timers[0].awaited)):
            self._fire(self._timers[0])  # a host that talks to a chip in reset has waited for it
        self.counts.bytes_in += len(data)
        if self.mode in ("rom", "stub"):
            data = self._through_line(data, to_chip=True)
            self._feed(data, start, self._byte_s())
        self._rx_end = max(self._rx_end, start + len(data) * self._byte_s())
        if not self._output:
            self._anchor()

    def _through_line(self, data: bytes, *, to_chip: bool) -> bytes:
        """What becomes of bytes when both ends run at different rates."""
        host = self.link.host_baud() if self.link_model.kind == "uart" else None
        if host is None:
            return data
        if to_chip and self._auto_baud and self.mode == "rom":
            self._baud = float(host)
            return data
        if abs(host / self._baud - 1) <= 0.04:
            return data
        return data.translate(self._garble)

    def _feed(self, data: bytes, start: float, byte_s: float) -> None:
        """The receiver of ROM and stub: frames out of bytes."""
        position = 0
        for piece in data.split(slip.END):
            if position:  # there was a delimiter before this piece
                self._delimiter(start + position * byte_s)
            if self._in_frame and piece:
                self._body.append(piece)
            position += len(piece) + 1
            if self._loader is None:
                return

    def _delimiter(self, at: float) -> None:
        loader = self._loader
        if loader is None:
            return
        if not self._in_frame:
            if at < loader.armed_at:
                self.counts.frames_lost += 1
                return
            self._in_frame = True
            return
        if not self._body:
            return
        body = b"".join(self._body)
        self._body.clear()
        self._in_frame = False
        self._frame(body, at)

    def _frame(self, body: bytes, at: float) -> None:
        opcode = body[1] if len(body) >= 8 and body[0] == 0 else -1
        if opcode >= 0 and not self._spoiling:
            spoiled = body
            for fault in list(self.faults.at(fault_names.ON_FRAME, opcode)):
                if fault.kind == fault_names.LOSE_FRAME:
                    return
                spoiled = spoil(spoiled, fault)
            if spoiled != body:
                self._in_frame = True
                self._spoiling = True
                try:
                    self._feed(spoiled + slip.END, at, 0.0)
                finally:
                    self._spoiling = False
                return
        payload = slip.decode(body)
        if payload is None or self._loader is None:
            return
        self._auto_baud = False
        if opcode >= 0:
            self.counts.frames_in += 1
            self.counts.commands[opcode] += 1
            self._opcode = opcode
            if self._strike(opcode, at):
                return
        loader = self._loader
        loader.frame(payload, at)
        if opcode >= 0:
            self._strike_after(opcode)

    def _strike(self, opcode: int, at: float) -> bool:
        """Faults of the chip at this command. True: it never sees it."""
        for fault in list(self.faults.at(fault_names.ON_COMMAND, opcode)):
            kind = fault.kind
            self._finish_work()
            if kind == fault_names.RESET:
                self._reset("0x9 (RTCWDT_SYS_RST)", download=True, at=at)
            elif kind == fault_names.RESET_TO_APP:
                self._reset("0x9 (RTCWDT_SYS_RST)", download=False, at=at)
            elif kind == fault_names.HANG:
                self._hang("told to")
            elif kind == fault_names.POWER_CUT:
                self._power_off()
            else:
                self.link.unplug()
                self._output.clear()
                self._output_size = 0
                if kind == fault_names.UNPLUG_AND_RETURN:
                    self._power_off()
                    self._at(at + 0.5, self.plug)
            return True
        return False

    def _strike_after(self, opcode: int) -> None:
        for fault in list(self.faults.at(fault_names.AFTER_COMMAND, opcode)):
            if fault.kind == fault_names.STALL:
                self._stalled = True
            else:
                self._finish_work()
                self._power_off()

    # ---- to the host -------------------------------------------------------------------------------------------------

    def answer(self, opcode: int, payload: bytes, at: float) -> float:
        """Sends a frame; returns the model time at which its last byte has left."""
        self.counts.frames_out += 1
        before = b""
        body: bytes | None = None
        for fault in list(self.faults.at(fault_names.ON_REPLY, opcode)):
            if fault.kind == fault_names.LOSE_REPLY:
                return at
            if fault.kind == fault_names.REPLY_AFTER_GARBAGE:
                before += bytes((fault.value & 0xFF,)) * 5 + b"\x00\xff\xdb\x01"
            elif fault.kind == fault_names.WRONG_MD5:
                other = ord("0") if payload[8] != ord("0") else ord("1")
                payload = payload[:8] + bytes((other,)) + payload[9:]
            else:
                body = spoil(body or slip.encode(payload)[1:-1], fault, "reply-")
        frame = slip.encode(payload) if body is None else slip.END + body + slip.END
        return self._send(before + frame, at)

    def _send(self, data: bytes, at: float) -> float:
        byte_s = self._byte_s()
        self._tx_end = max(self._tx_end, at) + len(data) * byte_s
        self._host = max(self._host, self._tx_end + self.link_model.turn_around_s)
        self.counts.bytes_out += len(data)
        data = self._through_line(data, to_chip=False)
        scale = self.options.real_time_scale
        due = 0.0 if scale is None else self._epoch_real + self._host * scale
        if self._output_size < _OUTPUT_MAX:
            self._output.append((due, data))
            self._output_size += len(data)
        if scale is None:
            self._flush()
        else:
            self._wake_up()
        return self._tx_end

    def _print(self, text: str, at: float) -> float:
        data = text.encode()
        self.console += data
        return self._send(data, at)

    def _flush(self) -> float | None:
        """Writes what is due. Seconds until more is due; None: nothing waits for its time."""
        if self._output and not self.link.is_open():
            self._output.clear()  # nobody listens
            self._output_size = 0
        wrote = False
        while self._output:
            due, data = self._output[0]
            if due:
                wait_s = due - time.monotonic()
                if wait_s > 0:
                    return wait_s
            done = self.link.write(data)
            self._output_size -= done
            wrote = wrote or done > 0
            if done < len(data):
                self._output[0] = (due, data[done:])
                break
            self._output.popleft()
        if wrote and not self._output:
            self._anchor()
        return None

    # ---- power, reset, boot ------------------------------------------------------------------------------------------

    def _new_registers(self) -> Registers:
        return Registers(
            self.persona,
            self.flash,
            baud=lambda: self._baud,
            arm_watchdog=self._arm_watchdog,
            mac=self.mac,
        )

    def _native_usb(self) -> bool:
        """Whether the port comes and goes with the chip."""
        return self.options.re_enumerates and self.link_model.kind != "uart"

    def _power_off(self) -> None:
        self._stop()
        self._stalled = False
        if self._native_usb():
            self.link.unplug()
            self._output.clear()
            self._output_size = 0

    def _power_on(self) -> None:
        self._crashes = 0
        self._strapped = self.options.button
        if self._native_usb():
            self._plug_link()
        baud = self.options.stub_baud
        if baud is not None:
            self.options.stub_baud = None
            self._baud, self._auto_baud = float(baud), False
            self._loader = Stub(self, busy=self._now())
            self.registers.flash_attached = True
            self._set_mode("stub")
            return
        self._out_of_reset(f"0x1 ({self.persona.power_on})", download=self._strapped, at=self._now())

    def _stop(self) -> None:
        """Nothing runs any more."""
        self._loader = None
        self._timers.clear()
        self._for_host = None
        self._body.clear()
        self._in_frame = False
        self.running = None
        self._set_mode("off")

    def _hold_reset(self) -> None:
        self._guarded(self._finish_work)
        self._stop()

    def _enable_rises(self) -> None:
        """The strap is sampled."""
        self._strapped = (self._dtr and not self._rts) or self.options.button
        self._out_of_reset(f"0x1 ({self.persona.power_on})", download=self._strapped, at=self._now())

    def _reset(self, cause: str, *, download: bool, at: float) -> None:
        """With the port disappearing, where it does."""
        self._stop()
        if not self._native_usb():
            self._out_of_reset(cause, download=download, at=at)
            return
        self.link.unplug()
        self._output.clear()
        self._output_size = 0
        self._at(at + _ENUMERATES_S, lambda: self._enumerate(cause, download, at + _ENUMERATES_S))

    def _enumerate(self, cause: str, download: bool, at: float) -> None:
        self._plug_link()
        if download:
            self._out_of_reset(cause, download=True, at=at)
        else:
            deadline = time.monotonic() + _HOST_COMES_S
            self._for_host = (deadline, lambda: self._out_of_reset(cause, download=False, at=self._now()))

    def _out_of_reset(self, cause: str, *, download: bool, at: float) -> None:
        self.counts.resets += 1
        self.why_hung = ""
        self.registers = self._new_registers()
        self._baud, self._auto_baud = _ROM_BAUD, True
        persona = self.persona
        how = persona.reset_download if download else persona.reset_flash
        text = f"{persona.boot_log.format(name=persona.name)}rst:{cause},boot:{how}\r\n"
        if not download:
            self._boot(text, at)
            return
        at = self._print(text + persona.waiting, at)
        self._loader = RomLoader(self)
        self._loader.busy = at
        if self.options.watchdog_s is not None:
            self.registers.run_watchdogs()
            self._at(at + self.options.watchdog_s, self._app_watchdog_bites, awaited=False)
        self._set_mode("rom")

    def restart(self, at: float) -> None:
        """A software reset: the app boots."""
        self._reset("0xc (SW_CPU_RESET)", download=False, at=at)

    def _boot(self, text: str, at: float) -> None:
        self.counts.boots += 1
        booted = choose(self.flash, self.persona, self.options)
        if booted is None:
            self._print(text + "invalid header: 0xffffffff\r\n" * 3, at)
            self._set_mode("app")
            return
        self.running = booted
        at = self._print(text + start_text(booted), at + _BOOT_S)
        app = self.app(booted)
        self._set_mode("app")
        for line in app.lines:
            at = self._print(line + "\r\n", at + app.line_s)
        if app.confirms:
            booted.confirm(self.flash, self.options)
        if app.crashes:
            at = self._print(app.crash_text(), at + app.line_s)
            self._crashes += 1
            if self._crashes < _CRASHES_MAX:
                self._reset("0xc (SW_CPU_RESET)", download=False, at=at)

    def _arm_watchdog(self, after_s: float) -> None:
        at = 0.0 if self._loader is None else self._loader.busy
        self._at(at + after_s, self._watchdog_bites)

    def _watchdog_bites(self) -> None:
        """A system reset: the strap is sampled again."""
        self._strapped = self.options.button
        self._reset("0x10 (RTCWDT_RTC_RST)", download=self._strapped, at=self._now())

    def _app_watchdog_bites(self) -> None:
        if not self.registers.watchdogs_off:
            self._reset("0x10 (RTCWDT_RTC_RST)", download=self._strapped, at=self._now())

    # ---- for the loaders ---------------------------------------------------------------------------------------------

    def change_baud(self, baud: float) -> None:
        """From the next byte on. Native USB has no rate."""
        if any(self.faults.at((fault_names.WRONG_BAUD,), self._opcode)):
            baud *= 1.07
        if self.link_model.kind == "uart" and 0 < baud <= MAX_BAUD:
            self._baud = baud
        elif self.link_model.kind == "uart":
            self._hang("a baud rate that cannot be")

    def security_info(self) -> bytes:
        options = self.options
        flags = options.security_flags | (1 << 2 if options.secure_download else 0)
        info = struct.pack("<IB7s", flags, options.flash_crypt_count, bytes(7))
        if self.persona.security_info_size > 12:
            info += struct.pack("<II", self.persona.chip_id, self.persona.eco)
        return info

    def run_program(self, entry: int, ram: list[tuple[int, bytearray]], at: float) -> None:
        """Starts what lies in RAM. A published stub with a bit wrong crashes; so does a jump into nothing."""
        content = dict(ram)
        version = 0
        for name in (self.persona.name, *self.persona.more_stubs):
            image = next((image for image in stub_images(name) if image.entry == entry), None)
            if image is not None:
                whole = all(bytes(content.get(address, b"")) == data for address, data in image.segments)
                version = image.version if whole else -1
                break
        else:
            inside = any(start <= entry < start + len(data) for start, data in ram)
            version = 2 if inside and self.options.trust_any_stub else -1
        if version < 0:
            self._hang("the program in RAM crashed")
            return
        if any(self.faults.at((fault_names.NO_OHAI,), self._opcode)):
            self._hang("the stub did not start")
            return
        self._loader = Stub(self, version, busy=at + _STUB_START_S)
        self.registers.flash_attached = True
        self._set_mode("stub")
        self.answer(-1, b"OHAI", at + _STUB_START_S)
