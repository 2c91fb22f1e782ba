"""``rmaker-ota mark-valid TARGET``: confirm the running image by hand."""

from __future__ import annotations

import click

from rmaker_ota.cli import output
from rmaker_ota.targets import open_target


@click.command("mark-valid")
@click.argument("target")
@output.json_option
def command(target: str, *, as_json: bool) -> None:
    """Confirm the image that runs on TARGET: it is not rolled back any more."""
    with open_target(target) as place:
        place.mark_valid()
        slot = place.running_slot()
        state = place.boot_state(slot).name.lower() if slot else "valid"
    if as_json:
        output.print_json({"slot": slot.name if slot else None, "state": state})
    else:
        output.say(f"{slot.name if slot else target}: {state}")
