"""``rmaker-ota demo``: the main job on this machine, with real parts."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rmaker_ota.cli.errors import ExitCode
from rmaker_ota.cli.output import is_terminal, json_option, print_json, say
from rmaker_ota.errors import OtaError

if TYPE_CHECKING:
    from rmaker_ota.demo.world import Outcome

WATCHABLE = 500_000  # bytes per second: a download of two seconds


@click.command()
@click.option(
    "--full-speed", is_flag=True, help="Do not slow downloads down to 0.5 MB/s, as is done on a terminal to be seen."
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Work in this new directory and leave everything there: flash image, logs, certificates, database.",
)
@json_option
def command(full_speed: bool, keep: Path | None, as_json: bool) -> int:
    """Show the main job on this machine, with real parts, in under a minute.

    A Mosquitto with mutual TLS, the job service and a virtual ESP32-C3 as a process of its own are started on loopback.
    Then the node is updated from 1.0.0 to 2.0.0; gets firmware that fails its diagnostics, and rolls back; and has a
    download cut in the middle, which it resumes. From a source tree two simulated chips at serial ports are updated
    side by side as well. The exit code is 0 if all ended as they should. Nothing is left running.
    """
    from rmaker_ota.demo import chips
    from rmaker_ota.demo.show import Lines, Silent, Terminal
    from rmaker_ota.demo.world import SCENARIOS, Demo, interruptible

    begun = time.monotonic()
    terminal = is_terminal() and not as_json
    outcomes: list[Outcome] = []
    error: OtaError | None = None
    node_log: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible())
        directory = _directory(keep, stack)
        show = Silent() if as_json else Terminal() if terminal else Lines()
        stack.callback(show.close)
        demo = Demo(directory, show, max_bytes_per_s=WATCHABLE if terminal and not full_speed else 0)
        try:
            outcomes = demo.run()
        except OtaError as exc:
            if not as_json:
                raise
            error = exc
        ok = len(outcomes) == len(SCENARIOS) and all(outcome.ok for outcome in outcomes)
        root = chips.source_tree()
        if ok and root is not None:
            outcomes.append(chips.run(directory, root, show))
            ok = outcomes[-1].ok
        if not ok:
            node_log = demo.node_log()
    seconds = time.monotonic() - begun
    if as_json:
        print_json(
            {
                "ok": ok,
                "seconds": round(seconds, 3),
                "scenarios": [outcome.as_dict() for outcome in outcomes],
                "error": None if error is None else error.message,
                "node_log": node_log,
            }
        )
    else:
        _summary(outcomes, seconds, ok, node_log)
    return ExitCode.DONE if ok else ExitCode.FAILED


def _directory(keep: Path | None, stack: contextlib.ExitStack) -> Path:
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmaker-ota-demo-")))
    try:
        keep.mkdir(mode=0o700)
    except FileExistsError:
        raise click.BadParameter(f"{keep} exists already", param_hint="--keep") from None
    return keep.absolute()


def _summary(outcomes: list[Outcome], seconds: float, ok: bool, node_log: list[str]) -> None:
    from rmaker_ota.cli.job import table

    rows = [
        (
            outcome.scenario.name,
            "ok" if outcome.ok else "FAILED",
            outcome.state or "-",
            outcome.running_version or "-",
            f"{outcome.bytes}" + (f" (resumed at {outcome.resumed_at})" if outcome.resumed_at else ""),
            f"{outcome.seconds:.1f}",
            f"{outcome.bytes_per_second / 1e6:.1f}",
            f"{outcome.messages}",
        )
        for outcome in outcomes
    ]
    say("")
    table(("scenario", "result", "job", "runs", "bytes", "seconds", "MB/s", "messages"), rows)
    say("")
    for line in node_log:
        say(f"  node: {line}")
    verdict = "All ended as they should" if ok else "Not all ended as they should"
    say(f"{verdict}, in {seconds:.1f} s; nothing is left running.")
