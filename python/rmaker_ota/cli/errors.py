"""Exit codes, and what a person reads when a command fails.

=====  =====================================================================================
code   meaning
=====  =====================================================================================
0      done
1      failed
2      wrong usage or configuration
3      rejected: project, version, secure version, chip or signature do not fit the target
130    interrupted (SIGINT, SIGTERM)
=====  =====================================================================================

One sentence on standard error, never a traceback; ``rmaker-ota --debug COMMAND`` shows it.
"""

from __future__ import annotations

import enum
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from rmaker_ota.errors import CancelledError, OtaError, RejectedError


class ExitCode(enum.IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    REJECTED = 3
    INTERRUPTED = 130


def exit_code(exc: BaseException) -> ExitCode:
    """The exit code for an error."""
    match exc:
        case click.UsageError():
            return ExitCode.USAGE
        case CancelledError() | KeyboardInterrupt() | click.Abort():
            return ExitCode.INTERRUPTED
        case RejectedError():
            return ExitCode.REJECTED
        case OtaError(status="ERR_ARGUMENT" | "ERR_HTTP_URL" | "ERR_HTTP_TLS_FILE"):
            return ExitCode.USAGE
    return ExitCode.FAILED


def describe(exc: BaseException) -> str:
    """One sentence for a person."""
    match exc:
        case CancelledError() | KeyboardInterrupt() | click.Abort():
            return "interrupted"
        case OtaError() if exc.message:
            return exc.message
        case OSError(filename=name, strerror=reason) if name and reason:
            return f"{os.fsdecode(name)}: {reason}"
    return str(exc) or type(exc).__name__


def where(exc: BaseException) -> str:
    """Stage and offset of an error, as they stand behind the sentence; empty where there is none."""
    if not isinstance(exc, OtaError) or isinstance(exc, CancelledError):
        return ""
    parts = [exc.stage] if exc.stage != "none" else []
    parts += [f"at byte {exc.offset}"] if exc.offset else []
    return f" ({', '.join(parts)})" if parts else ""


def wants_debug(args: Sequence[str]) -> bool:
    """Whether ``--debug`` stands before the command's name."""
    for arg in args:
        if arg == "--debug":
            return True
        if not arg.startswith("-"):
            return False
    return False


def run(command: Callable[[], Any], *, debug: bool = False) -> int:
    """Runs a click command that was told not to exit by itself.

    Args:
        command: does it; an int it returns is the exit code.
        debug: print the traceback of an error too.

    Returns:
        The exit code. What went wrong is on standard error.
    """
    try:
        result = command()
        sys.stdout.flush()
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except BrokenPipeError:
        # Whoever read our output went away. Nothing may be written to it again, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except (OtaError, OSError, KeyboardInterrupt, click.Abort) as exc:
        report(exc, debug=debug)
        return exit_code(exc)
    except Exception as exc:
        report(exc, debug=debug, unexpected=True)
        return ExitCode.FAILED
    return result if isinstance(result, int) else ExitCode.DONE


def report(exc: BaseException, *, debug: bool = False, unexpected: bool = False) -> None:
    """Says on standard error what went wrong."""
    if debug:
        import traceback

        traceback.print_exception(exc)
    hint = " (a fault of this program; run `rmaker-ota --debug ...` for details)" if unexpected and not debug else ""
    click.echo(
        f"rmaker-ota: {type(exc).__name__ + ': ' if unexpected else ''}{describe(exc)}{where(exc)}{hint}", err=True
    )


@contextmanager
def on_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM call `cancel` once; a second one interrupts at once. Main thread only."""

    def handle(number: int, frame: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.default_int_handler)
        cancel()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
