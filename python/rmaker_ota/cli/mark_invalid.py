"""``rmaker-ota mark-invalid TARGET``: give the running image up by hand."""

from __future__ import annotations

import click

from rmaker_ota.cli import output
from rmaker_ota.targets import open_target


@click.command("mark-invalid")
@click.argument("target")
@output.json_option
def command(target: str, *, as_json: bool) -> None:
    """Mark the image that runs on TARGET invalid, so that the next restart rolls back.

    Fails, with nothing changed, when there is no image to roll back to. Does not restart: rmaker-ota boot does.
    """
    with open_target(target) as place:
        slot = place.running_slot()
        place.mark_invalid()
        state = place.boot_state(slot).name.lower() if slot else "invalid"
    if as_json:
        output.print_json({"slot": slot.name if slot else None, "state": state})
    else:
        output.say(f"{slot.name if slot else target}: {state}; the next restart rolls back")
