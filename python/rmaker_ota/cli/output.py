"""What commands print: plain lines, one JSON object, or progress. rich is imported on a terminal only.

With ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def is_terminal() -> bool:
    """Whether a person watches standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in {None, "", "dumb"}


def say(text: str) -> None:
    """One line for a person."""
    click.echo(text)


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """One JSON document on standard output. Bytes are written in hex."""
    click.echo(json.dumps(value, indent=2 if is_terminal() else None, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def mib(count: float) -> str:
    """A number of bytes for people: ``"1.5 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Progress:
    """Shows how far something is: a bar on a terminal, a line now and then elsewhere, nothing when `quiet`.

    Used as a context manager, by one thread at a time. rich is imported at the first `update`, not before.

    Args:
        label: what is under way.
        quiet: show nothing.
        every_s: least time between two plain lines, seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self, label: str, *, quiet: bool = False, every_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label = label
        self._quiet = quiet
        self._every_s = every_s
        self._clock = clock
        self._started = clock()
        self._shown_at: float | None = None
        self._shown = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def update(self, done: int, total: int | None) -> None:
        """Tells where it is.

        Args:
            done: bytes so far.
            total: bytes in all; None: not known.
        """
        if self._quiet:
            return
        if is_terminal():
            self._update_bar(done, total)
        else:
            self._update_lines(done, total)

    def _update_lines(self, done: int, total: int | None) -> None:
        now = self._clock()
        if self._shown_at is None:
            self._shown_at = self._started
        complete = total is not None and done >= total
        if done == self._shown or (now - self._shown_at < self._every_s and not complete):
            return
        rate = done / max(now - self._started, 1e-3)
        share = f"{100 * done // total:3d}% of {mib(total)}" if total else mib(done)
        say(f"{self._label}: {share}, {mib(rate)}/s")
        self._shown_at = now
        self._shown = done

    def _update_bar(self, done: int, total: int | None) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                transient=False,
            )
            self._task = self._bar.add_task(self._label, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
