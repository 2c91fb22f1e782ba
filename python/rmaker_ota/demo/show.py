"""What a person sees of the demo: coloured lines and a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from rmaker_ota.cli.output import mib, say
from rmaker_ota.demo.world import Outcome, Scenario

RESTART_S = 10.0  # between a finished download and the restart, a constant of the protocol


class Silent:
    """Shows nothing."""

    def fact(self, name: str, text: str) -> None:
        pass

    def scenario(self, scenario: Scenario) -> None:
        pass

    def happened(self, seconds: float, who: str, what: str, text: str) -> None:
        pass

    def downloading(self, done: int, total: int) -> None:
        pass

    def restarting(self) -> None:
        pass

    def still(self) -> None:
        pass

    def ended(self, outcome: Outcome) -> None:
        pass

    def close(self) -> None:
        pass


class Lines(Silent):
    """Plain lines; of a download one for every quarter."""

    def __init__(self) -> None:
        self._quarter = 0

    def fact(self, name: str, text: str) -> None:
        say(f"  {name:<12} {text}")

    def scenario(self, scenario: Scenario) -> None:
        self._quarter = 0
        say(f"\n{scenario.title}: to {scenario.version}")

    def happened(self, seconds: float, who: str, what: str, text: str) -> None:
        say(f"  {seconds:5.1f} s  {who:<8} {what:<12} {text}")

    def downloading(self, done: int, total: int) -> None:
        quarter = 4 * done // total
        if quarter > self._quarter:
            self._quarter = quarter
            say(f"           node     downloading  {100 * done // total}% of {mib(total)}")

    def ended(self, outcome: Outcome) -> None:
        for problem in outcome.problems:
            say(f"  FAILED: {problem}")


class Terminal(Silent):
    """Lines that stay, and below them a bar that lives."""

    COLOURS: ClassVar[dict[str, str]] = {
        "success": "green",
        "rejected": "yellow",
        "failed": "red",
        "in-progress": "cyan",
        "boot": "magenta",
        "diagnose": "magenta",
    }

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            TextColumn("{task.fields[note]}"),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._restart_at: float | None = None
        self._loading_since = 0.0
        self._bar.start()

    def fact(self, name: str, text: str) -> None:
        self._print(("  ", ""), (f"{name:<12} ", "bold"), (text, ""))

    def scenario(self, scenario: Scenario) -> None:
        self._loading_since = 0.0
        self._print(("", ""))
        self._print((f"{scenario.title}: to {scenario.version}", "bold"))
        self._wait("waiting for the node")

    def happened(self, seconds: float, who: str, what: str, text: str) -> None:
        self._print(
            (f"  {seconds:5.1f} s  ", "dim"),
            (f"{who:<8} ", ""),
            (f"{what:<12} ", self.COLOURS.get(what, "")),
            (text, ""),
        )
        if what == "boot":
            self._wait("node starts")

    def downloading(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._restart_at = None
        self._loading_since = self._loading_since or now
        speed = done / max(now - self._loading_since, 0.05)
        note = f"{mib(done)} of {mib(total)}, {speed / 1e6:.1f} MB/s"
        self._bar.update(self._task, description="download", completed=done, total=total, note=note)

    def restarting(self) -> None:
        self._restart_at = time.monotonic() + RESTART_S
        self.still()

    def still(self) -> None:
        if self._restart_at is None:
            return
        left = self._restart_at - time.monotonic()
        if left <= 0:
            self._wait("node restarts")
            return
        self._bar.update(
            self._task, description="restart", completed=RESTART_S - left, total=RESTART_S, note=f"in {left:.0f} s"
        )

    def ended(self, outcome: Outcome) -> None:
        if outcome.ok:
            self._print(("  as it should be: ", "green"), (f"{outcome.running_version} runs, job {outcome.state}", ""))
        for problem in outcome.problems:
            self._print(("  FAILED: ", "bold red"), (problem, ""))

    def close(self) -> None:
        self._bar.stop()

    def _wait(self, what: str) -> None:
        self._restart_at = None
        self._bar.update(self._task, description=what, completed=0, total=None, note="")

    def _print(self, *parts: tuple[str, str]) -> None:
        from rich.text import Text

        line: Any = Text.assemble(*parts)
        self._bar.console.print(line, soft_wrap=True)
