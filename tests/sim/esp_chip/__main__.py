"""A chip as a process: ``python -m tests.sim.esp_chip --chip esp32c3 --flash FILE --pty``.

Prints the port, then runs until SIGTERM or SIGINT. What a serial port cannot carry comes on standard input, one command
a line, each answered by one line of JSON on standard output: ``report``, ``mark``, ``power-cycle``, ``download``,
``release``, ``boot``, ``lines DTR RTS``, ``unplug``, ``plug``, ``fault KIND,...``, ``host-pid PID``, ``quit``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.sim.esp_chip import (
    PERSONAS,
    Chip,
    Fault,
    Flash,
    FlashTiming,
    LinkModel,
    Options,
    PtyLink,
    TcpLink,
    crashing_app,
    silent_app,
    usual_app,
)
from tests.sim.esp_chip.links import Link

_APPS = {"usual": usual_app, "silent": silent_app, "crashing": crashing_app}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.esp_chip", description=__doc__)
    parser.add_argument("--chip", choices=sorted(PERSONAS), default="esp32c3")
    parser.add_argument("--flash", type=Path, help="flash image file; made when missing; usual: a temporary one")
    parser.add_argument("--size", type=lambda text: int(text, 0), help="bytes of a new flash (4 MiB)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--pty", action="store_true", help="on a pseudo terminal (usual)")
    where.add_argument("--tcp", type=int, metavar="PORT", help="TCP server; 0: any free port")
    parser.add_argument("--pty-link", type=Path, help="symbolic link that leads to the pseudo terminal")
    parser.add_argument("--link", choices=("uart", "usj", "otg"), default="uart")
    parser.add_argument("--baud-model", type=int, help="rate of the wire, whatever the host sets")
    parser.add_argument("--turn-around-ms", type=float, help="2 for a UART bridge, 1 for native USB")
    parser.add_argument("--usb-kb-per-s", type=float, default=450.0)
    parser.add_argument("--think", choices=("none", "real", "cpu"), default="none", help="the host's time that counts")
    parser.add_argument("--timing", choices=("typical", "fast", "slow", "none"), default="typical")
    parser.add_argument("--real-time", type=float, metavar="SCALE", help="hold answers back; 1: as long as a chip does")
    parser.add_argument("--secure-download", action="store_true")
    parser.add_argument("--stub-baud", type=int, help="starts with a stub left behind at this rate")
    parser.add_argument("--no-button", action="store_true", help="a power-on starts the app")
    parser.add_argument("--re-enumerates", action="store_true")
    parser.add_argument("--app", choices=sorted(_APPS), default="usual")
    parser.add_argument("--fault", type=Fault.parse, action="append", default=[], metavar="KIND[,opcode=..,nth=..]")
    parser.add_argument("--power-cut-after", type=int, help="erases and programs until the supply goes away")
    parser.add_argument("--json-report", type=Path, help="written at the end")
    args = parser.parse_args(argv)

    with contextlib.ExitStack() as stack:
        path = args.flash or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "flash.bin"
        flash = Flash(path, args.size)
        stack.callback(flash.close)
        flash.timing = FlashTiming.named(args.timing)
        flash.faults.power_cut_after = args.power_cut_after
        link: Link = TcpLink(args.tcp) if args.tcp is not None else PtyLink(args.pty_link)
        turn_around_ms = args.turn_around_ms
        if turn_around_ms is None:
            turn_around_ms = 2.0 if args.link == "uart" else 1.0
        chip = Chip(
            args.chip,
            flash,
            link,
            link_model=LinkModel(
                kind=args.link,
                baud=args.baud_model,
                turn_around_s=turn_around_ms / 1000,
                usb_bytes_per_s=args.usb_kb_per_s * 1000,
                think=args.think,
            ),
            options=Options(
                secure_download=args.secure_download,
                button=not args.no_button,
                stub_baud=args.stub_baud,
                real_time_scale=args.real_time,
                re_enumerates=args.re_enumerates,
            ),
            app=_APPS[args.app],
        )
        chip.faults.add(*args.fault)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with chip:
            print(chip.port, flush=True)
            threading.Thread(target=_commands, args=(chip, stop), daemon=True).start()
            stop.wait()
            if args.json_report is not None:
                args.json_report.write_text(json.dumps(chip.report(), indent=2) + "\n", encoding="utf-8")
    return 0


def _commands(chip: Chip, stop: threading.Event) -> None:
    """Reads standard input. Its end does not end the chip."""
    for line in sys.stdin:
        words = line.split()
        if not words:
            continue
        if words[0] == "quit":
            stop.set()
            return
        try:
            answer = _command(chip, words)
        except (ValueError, KeyError, IndexError) as exc:
            answer = {"error": str(exc)}
        print(json.dumps(answer), flush=True)


def _command(chip: Chip, words: list[str]) -> dict[str, Any]:
    name, *rest = words
    if name == "report":
        return chip.report()
    if name == "mark":
        chip.mark()
    elif name == "power-cycle":
        chip.power_cycle()
    elif name == "download":
        chip.power_cycle(download=True)
    elif name == "release":
        chip.release_button()
    elif name == "boot":
        chip.boot()
    elif name == "lines":
        chip.set_lines(bool(int(rest[0])), bool(int(rest[1])))
    elif name == "unplug":
        chip.unplug()
    elif name == "plug":
        chip.plug()
    elif name == "fault":
        chip.faults.add(Fault.parse(rest[0]))
    elif name == "host-pid":
        chip.link_model.host_pid = int(rest[0])
    else:
        raise ValueError(f"no command is called {name!r}")
    return {"mode": chip.mode, "port": chip.port, "running": None if chip.running is None else chip.running.slot}


if __name__ == "__main__":
    sys.exit(main())
