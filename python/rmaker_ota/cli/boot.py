"""``rmaker-ota boot TARGET``: restart a chip once."""

from __future__ import annotations

from typing import Any

import click

from rmaker_ota.cli import output
from rmaker_ota.errors import NotBootableError
from rmaker_ota.targets import open_target


@click.command("boot")
@click.argument("target")
@click.option("--no-rollback", is_flag=True, help="A boot loader without rollback of unconfirmed images.")
@click.option("--anti-rollback", is_flag=True, help="A boot loader that compares secure versions.")
@click.option(
    "--secure-version",
    type=click.IntRange(0, 0xFFFFFFFF),
    metavar="N",
    help="The smallest secure version it accepts (eFuse); with --anti-rollback.  [default: 0]",
)
@output.json_option
def command(target: str, *, no_rollback: bool, anti_rollback: bool, secure_version: int | None, as_json: bool) -> None:
    """Restart the chip TARGET once, and say what its boot loader chose, why, and what it wrote.

    TARGET is esp32-image:PATH, whose flash image is changed as the boot loader would change the flash, or
    esp32-serial:PORT, which is told what its own boot loader will choose.
    """
    if secure_version is not None and not anti_rollback:
        raise click.UsageError("--secure-version means something with --anti-rollback only")
    options: dict[str, Any] = {}
    if no_rollback:
        options["rollback"] = False
    if anti_rollback:
        options |= {"anti_rollback": True, "secure_version": secure_version or 0}
    with open_target(target, **options) as place:
        boot = place.restart()
        running = place.describe(boot.slot) if boot.slot else None
    if as_json:
        output.print_json(
            {
                "slot": boot.slot.name if boot.slot else None,
                "project": running.project_name if running else None,
                "version": running.version if running else None,
                "reasons": list(boot.reasons),
                "writes": list(boot.writes),
            }
        )
    else:
        for reason in boot.reasons:
            output.say(f"  {reason}")
        for write in boot.writes:
            output.say(f"  wrote: {write}")
        if boot.slot:
            name = f": {running.project_name} {running.version}" if running else ""
            output.say(f"{boot.slot.name} boots{name}")
    if boot.slot is None:
        raise NotBootableError("no slot holds an image that boots", stage="target")
