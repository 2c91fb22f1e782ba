"""The command ``rmaker-ota``: one file per command, imported only when that command runs.

A command ``mark-valid`` is the click command named ``command`` in ``rmaker_ota.cli.mark_valid``. Nothing heavy is
imported here: what a command costs at start-up is what its own module imports. Exit codes and messages:
`rmaker_ota.cli.errors`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from rmaker_ota.cli import errors

COMMANDS = {
    "demo": "The main job on this machine, with real parts: update, rollback, resume.",
    "agent": "Run a node until it is stopped.",
    "install": "Install one image into one target.",
    "inspect": "Show what an image, a flash image or a partition holds, and what boots next.",
    "flash": "Write, check, read and erase the flash of ESP32 chips at offsets.",
    "ports": "List serial ports with the chips behind them and what runs there.",
    "boot": "Restart a chip once.",
    "mark-valid": "Confirm the running image.",
    "mark-invalid": "Mark the running image invalid: the next restart rolls back.",
    "serve": "Run the job service.",
    "job": "Create, list, show and cancel jobs of the job service.",
    "c-abi": "Say how to build a C program with libesp_rmaker_ota.",
}


class Cli(click.Group):
    """The top-level group: knows its commands by name and imports the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"rmaker_ota.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, with this project's exit codes. With ``standalone_mode=False`` it returns or raises."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        debug = errors.wants_debug(sys.argv[1:] if args is None else args)
        sys.exit(errors.run(lambda: super(Cli, self).main(args, prog_name, complete_var, False, **extra), debug=debug))


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Prints the version and ends the program. The engine knows it; asking the package's metadata takes 40 ms more."""
    if value and not ctx.resilient_parsing:
        from rmaker_ota.ota_core import VERSION

        click.echo(f"rmaker-ota, version {VERSION}")
        ctx.exit()


@click.command(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 rejected, 130 interrupted.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Over-the-air updates for embedded-Linux gateways and the ESP32 chips attached to them."""


def occupy_standard_descriptors() -> None:
    """Gives descriptors 0 to 2 that were closed when the program began to /dev/null.

    The image's own file would get such a number otherwise, and what is printed would land in it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line and exits with its code.

    Args:
        args: the arguments after the program's name; None: those of the process.
    """
    occupy_standard_descriptors()
    # What was imported lives as long as the process: it is not looked at again and again, nor once more at the end.
    # That is 12 ms of CPU, a seventh of a small installation.
    gc.freeze()
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    cli.main(args, prog_name="rmaker-ota")
    raise AssertionError("cli.main exits")
